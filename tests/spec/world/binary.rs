//! The released backend as a device, behind its socket.

use rustix::time::{ClockId, clock_gettime};
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::contract::{Answer, Info, Queues, VM, op, request};
use vhost_user_timer_kit::raw_driver::{Driver, Layout, Rig, Setup, Used};

use super::{Device, OBSERVERS, Options, REQUEST_QUEUES};

/// A backend, and the connection to it.
pub(crate) struct Binary {
    /// The backend.
    pub(crate) rig: Rig,
    /// `None` between two connections only.
    driver: Option<Driver>,
}

fn setup() -> Setup {
    Setup {
        queues: REQUEST_QUEUES + 1,
        size: 1024,
        ..Setup::default()
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Binary {
    pub(super) fn launch(options: Options) -> Self {
        let mut args = vec![
            format!("--request-queues={REQUEST_QUEUES}"),
            format!("--max-vcpus={}", options.max_vcpus),
        ];
        if let Some(frequency) = options.frequency {
            args.push(format!("--counter-frequency={frequency}"));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let rig = Rig::launch_release(&args);
        let driver = Some(rig.connect_with(setup()));
        Binary { rig, driver }
    }

    /// The connection.
    pub(crate) fn driver(&mut self) -> &mut Driver {
        self.driver.as_mut().expect("a connection")
    }

    fn info(&mut self, queue: u16) -> Info {
        let bytes = request(op::GET_INFO, VM, 0, &[]);
        let used = self.driver().call(queue, &bytes, 80, &Layout::plain());
        Info::of(Answer::of(&used).ok(64))
    }

    /// Whatever the backend had to do at the time of the call is done, its events included; and
    /// what was made available on this queue has been taken.
    ///
    /// The backend may answer a request before it writes the events and answers that came of it.
    /// It serves one queue at a time, so a second answer on another queue comes after those.
    pub(crate) fn settle(&mut self, queue: u16) {
        let [first, second] = OBSERVERS;
        self.info(if queue == 0 { first } else { queue });
        self.info(second);
    }

    fn host_count(&mut self) -> u64 {
        self.info(OBSERVERS[0]).host_count
    }
}

impl Queues for Binary {
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16 {
        self.driver().submit(queue, request, room, layout)
    }

    fn used(&mut self, queue: u16) -> Used {
        self.driver().used(queue)
    }

    fn used_already(&mut self, queue: u16) -> Option<Used> {
        self.driver().used_already(queue)
    }
}

impl Device for Binary {
    fn pass(&mut self, ticks: u64) {
        let start = self.host_count();
        while self.host_count().wrapping_sub(start) < ticks {
            std::thread::yield_now();
        }
    }

    fn reset(&mut self) {
        let driver = self.driver();
        driver.control.reset_device().expect("RESET_DEVICE");
        self.reconnect();
    }

    fn reconnect(&mut self) {
        // One frontend at a time: the old connection ends first.
        self.driver = None;
        self.driver = Some(self.rig.connect_with(setup()));
    }

    fn stop(&mut self, queue: u16) {
        self.driver().stop(queue);
    }

    fn start(&mut self, queue: u16) {
        self.driver().start(queue);
    }

    fn page(&mut self, address: u64) -> Vec<u8> {
        self.driver().memory.read(address, 64)
    }

    fn monotonic(&self) -> u64 {
        nanoseconds(ClockId::Monotonic)
    }

    fn realtime(&self) -> u64 {
        nanoseconds(ClockId::Realtime)
    }

    fn binary(&mut self) -> Option<&mut Binary> {
        Some(self)
    }
}
