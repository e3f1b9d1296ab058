//! What a whole backend allocates, counted on all of its threads: nothing for a request or an
//! expiry, from the ring through the model and back into a ring, nor for waking up and going to
//! sleep.
//!
//! One test in a process of its own, since allocations of any other thread count.

mod counting;

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use counting::{NOTHING, cost_to_others};
use rustix::io::{FdFlags, fcntl_setfd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost_user_timer::device::{ClockConfig, ClockDevice, SourceChoice, TimerConfig, TimerDevice};
use vhost_user_timer::server::{Access, Endpoint, Signals, Socket, serve};
use vhost_user_timer_kit::clock_driver::{ClockDriver, MONOTONIC, UTC, host};
use vhost_user_timer_kit::contract::{
    ARM64, CNT, CTL, CVAL, Client, PCVAL, TIMER_ASSERTED, op, request, status,
};
use vhost_user_timer_kit::raw_driver::{Driver, Setup};

const ROUNDS: u32 = 1_000;
const VCPUS: u32 = 4;

/// A timer that does not expire meanwhile.
const FAR: u64 = 1 << 60;

/// A backend in threads of this process, and its frontends.
struct Backend {
    client: Client,
    clock: ClockDriver,
    server: JoinHandle<()>,
}

impl Backend {
    fn start(poll_max: Duration, state_file: Option<&Path>) -> Self {
        let config = TimerConfig {
            max_vcpus: VCPUS,
            request_queues: 2,
            frequency: None,
            source: SourceChoice::Auto,
            state_file: state_file.map(Path::to_owned),
        };
        let timer = Arc::new(TimerDevice::new(&config).unwrap());
        let clock =
            ClockDevice::new(Arc::clone(&timer), timer.store(), ClockConfig::default()).unwrap();
        let (timer_end, timer_backend) = UnixStream::pair().unwrap();
        let (clock_end, clock_backend) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let socket = |end: UnixStream| {
                // As one that a launcher passes.
                fcntl_setfd(&end, FdFlags::empty()).unwrap();
                Socket::from_fd("--fd", end.into_raw_fd(), &Access::default()).unwrap()
            };
            let endpoints = vec![
                Endpoint::timer(timer, socket(timer_backend)).polling(poll_max),
                Endpoint::clock(Arc::new(clock), socket(clock_backend)).polling(poll_max),
            ];
            serve(endpoints, Signals::catch().unwrap(), false, None).unwrap();
        });
        let setup = Setup {
            queues: 3,
            ..Setup::default()
        };
        let mut client = Client::new(Driver::over(timer_end, setup));
        client.configure(VCPUS);
        client.resume();
        // NEW to PAUSED to RUNNING: the last one is told.
        client.post_event_buffer();
        client.event();
        Backend {
            client,
            clock: ClockDriver::over(clock_end, ClockDriver::setup()),
            server,
        }
    }

    fn stop(self) {
        drop(self.client);
        drop(self.clock);
        self.server.join().unwrap();
    }
}

/// Arms a vCPU's virtual timer, whose line does not rise before the answer.
fn arm_ahead(client: &mut Client, vcpu: u32) {
    for ahead in (0..).map(|n| 50_000 << n) {
        client.set(vcpu, &[(CTL, 0)]);
        let cval = client.get_one(vcpu, CNT) + ahead;
        if client.set(vcpu, &[(CVAL, cval), (CTL, 1)]) == (0, 0) {
            return;
        }
    }
}

/// Forty requests at once on each of two queues.
fn batch_on_two_queues(backend: &mut Backend) {
    let Client { driver, layout, .. } = &mut backend.client;
    for n in 0..80 {
        let bytes = request(op::WAIT_RUN, n % VCPUS, 0, &[]);
        driver.add(1 + (n % 2) as u16, &bytes, 56, layout);
    }
    for queue in [1, 2] {
        driver.rings[queue].kick(&driver.memory);
    }
    for n in 0..80 {
        driver.used(1 + n % 2);
    }
}

type Story = (&'static str, fn(&mut Backend));

const STORIES: [Story; 8] = [
    ("GET_REGS", |backend| {
        for n in 0..ROUNDS {
            backend.client.get(n % VCPUS, &ARM64);
        }
    }),
    ("SET_REGS", |backend| {
        for n in 0..ROUNDS {
            let cval = FAR + u64::from(n);
            let entries = [(CTL, 1), (CVAL, cval), (PCVAL, cval)];
            backend.client.set(n % VCPUS, &entries);
        }
    }),
    ("WAIT_RUN in RUNNING", |backend| {
        for n in 0..ROUNDS {
            backend.client.vcpu(op::WAIT_RUN, n % VCPUS, &[]).ok(40);
        }
    }),
    ("expiries and their events", |backend| {
        for n in 0..ROUNDS {
            backend.client.post_event_buffer();
            arm_ahead(&mut backend.client, n % VCPUS);
            assert_eq!(backend.client.event().kind, TIMER_ASSERTED);
        }
    }),
    ("refusals", |backend| {
        for n in 0..ROUNDS {
            let vcpu = n % VCPUS;
            let refused = [
                backend.client.vcpu(0x7777, vcpu, &[]),
                backend.client.vcpu(op::GET_REGS, VCPUS, &[0; 8]),
                backend.client.vcpu(op::RESTORE_DONE, vcpu, &[]),
            ];
            assert!(refused.iter().all(|answer| answer.status != status::OK));
            let layout = backend.client.layout.clone();
            let short = backend.client.driver.call(1, &[0; 100], 15, &layout);
            assert_eq!(short.len, 0);
        }
    }),
    ("batches on two queues", |backend| {
        for _ in 0..ROUNDS / 20 {
            batch_on_two_queues(backend);
        }
    }),
    ("READ and READ_CROSS", |backend| {
        for _ in 0..ROUNDS {
            backend.clock.read(UTC);
            backend.clock.read(MONOTONIC);
            backend.clock.read_cross(UTC, 0).unwrap();
        }
    }),
    ("alarms", |backend| {
        for n in 0..ROUNDS {
            backend.clock.post_alarm_buffer();
            let ahead = u64::from(n % 4) * 30_000;
            backend.clock.set_alarm(UTC, host::utc() + ahead, true);
            assert_eq!(backend.clock.notified(), UTC);
        }
    }),
];

#[test]
fn no_request_and_no_expiry_allocates_anything_on_any_thread_of_the_backend() {
    let folder = tempfile::tempdir().unwrap();
    for poll_max in [Duration::ZERO, Duration::from_micros(200)] {
        for state_file in [None, Some(folder.path().join(format!("{poll_max:?}")))] {
            let mut backend = Backend::start(poll_max, state_file.as_deref());
            // A batch larger than any before. The request before it has woken the worker once.
            backend.client.get(0, &ARM64);
            let cost = cost_to_others(|| batch_on_two_queues(&mut backend));
            assert_eq!(cost, NOTHING, "the first batch, polling {poll_max:?}");
            for (name, story) in STORIES {
                // Buffers as large as this needs them.
                story(&mut backend);
                let cost = cost_to_others(|| story(&mut backend));
                assert_eq!(
                    cost, NOTHING,
                    "{name}, polling {poll_max:?}, state file {state_file:?}"
                );
            }
            // It would have been seen.
            let asked = cost_to_others(|| {
                let control = &mut backend.client.driver.control;
                let flags = VhostUserConfigFlags::empty();
                control.get_config(0, 64, flags, &[0; 64]).unwrap();
            });
            assert_ne!(asked, NOTHING);
            backend.stop();
        }
    }
}
