//! A worker that polls for requests before it sleeps answers like one that does not, leaves the
//! ring to the next worker, ends at once, and uses no CPU at rest.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{Frontend, Operation, Options, RegValue};
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::contract::{VM, op, request};
use vhost_user_timer_kit::raw_driver::{Layout, Rig};
use vhost_user_timer_protocol::{Abi, Register};

const LIMIT: Duration = Duration::from_secs(30);

/// No polling, the default, and the most.
const LONGEST: [&[&str]; 3] = [&["--poll-max-us=0"], &[], &["--poll-max-us=10000"]];

fn cval() -> [u64; 1] {
    [Register::TimerCval.id(Abi::Arm64)]
}

fn configured(rig: &Rig) -> Frontend {
    let path = rig.backend.socket_path();
    let frontend = Frontend::connect(path, Options::default().timeout(LIMIT)).unwrap();
    let queue = frontend.queue();
    queue
        .configure(4, Abi::Arm64, NonZeroU64::new(1_000_000_000), LIMIT)
        .unwrap();
    frontend
}

fn ask_once(frontend: &Frontend) {
    let queue = frontend.queue();
    queue.get_regs(0, &cval(), LIMIT).unwrap();
}

/// Requests of a driver that sleeps and of one that polls, one at a time and many.
fn ask(frontend: &Frontend) {
    let queue = frontend.queue();
    for n in 0..300 {
        queue.get_regs(n % 4, &cval(), LIMIT).unwrap();
        let ticket = queue.submit(&Operation::get_regs(n % 4, &cval())).unwrap();
        ticket.spin(LIMIT).unwrap();
        let id = Register::TimerCval.id(Abi::Arm64);
        let tickets: Vec<_> = (0..16)
            .map(|value| {
                queue
                    .submit(&Operation::set_regs(n % 4, &[RegValue::new(id, value)]))
                    .unwrap()
            })
            .collect();
        for ticket in tickets {
            ticket.wait(LIMIT).unwrap();
        }
        let read = queue.get_regs(n % 4, &cval(), LIMIT).unwrap();
        assert_eq!(read.to_vec(), [RegValue::new(id, 15)]);
    }
}

#[test]
fn requests_are_answered_whether_it_looks_or_not() {
    for args in LONGEST {
        let rig = Rig::launch_release(args);
        ask(&configured(&rig));
    }
}

#[test]
fn requests_with_pauses_of_any_length_are_answered() {
    for args in LONGEST {
        let rig = Rig::launch_release(args);
        let frontend = configured(&rig);
        let queue = frontend.queue();
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..1_000 {
            queue.get_regs(0, &cval(), LIMIT).unwrap();
            let pause = Duration::from_micros(1 << random.u32(..9));
            let until = Instant::now() + pause;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }
}

#[test]
fn at_rest_it_takes_no_cpu_and_is_not_woken() {
    for args in LONGEST {
        let rig = Rig::launch_release(args);
        let frontend = configured(&rig);
        ask(&frontend);
        // The last poll lasts as long as it may.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(6));
            ask_once(&frontend);
        }
        assert!(rig.comes_to_rest(), "{args:?}");
        let before = rig.usage().cpu_ticks;
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(rig.usage().cpu_ticks, before, "{args:?}");
    }
}

#[test]
fn timers_and_other_queues_get_their_turn_while_requests_never_end() {
    let rig = Rig::launch_release(&["--poll-max-us=10000", "--request-queues=2"]);
    let mut frontend = configured(&rig);
    let mut events = frontend.take_events().unwrap();
    let [busy, other] = [frontend.queue(), &frontend.queues()[1]];
    let cntvoff = busy.resume(LIMIT).unwrap().cntvoff;
    events.next(LIMIT).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let ticket = busy.submit(&Operation::get_regs(0, &cval())).unwrap();
                ticket.spin(LIMIT).unwrap();
            }
        });
        for _ in 0..50 {
            let now = other.info(LIMIT).unwrap().host_count;
            let values = [
                RegValue::new(Register::TimerCval.id(Abi::Arm64), now + 500_000 - cntvoff),
                RegValue::new(Register::TimerCtl.id(Abi::Arm64), 1),
            ];
            if !other.set_regs(1, &values, LIMIT).unwrap().virtual_line {
                events.next(LIMIT).unwrap();
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_stopped_ring_is_left_to_one_who_wants_kicks() {
    for event_idx in [false, true] {
        let rig = Rig::launch_release(&["--poll-max-us=10000"]);
        let mut driver = rig.client().event_idx(event_idx).driver();
        let info = request(op::GET_INFO, VM, 0, &[]);
        for _ in 0..100 {
            for _ in 0..20 {
                driver.call(1, &info, 80, &Layout::plain());
            }
            let base = driver.stop(1);
            let ring = &driver.rings[1];
            assert_eq!(base, ring.next_avail());
            let (at, wants_kicks) = if event_idx {
                (ring.used_at() + 4 + 8 * u64::from(ring.size()), base)
            } else {
                (ring.used_at(), 0)
            };
            assert_eq!(driver.memory.read(at, 2), wants_kicks.to_le_bytes());
            driver.start(1);
        }
    }
}

#[test]
fn the_memory_of_stopped_rings_may_go_at_once() {
    let rig = Rig::launch_release(&["--poll-max-us=10000"]);
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..30 {
        let mut driver = rig.connect();
        for _ in 0..20 {
            driver.call(1, &info, 80, &Layout::plain());
        }
        driver.stop(0);
        driver.stop(1);
        // A process that touches it now gets other memory in its place, and says so.
        driver.memory.file().set_len(0).unwrap();
    }
    ask(&configured(&rig));
    let log = rig.log_with_times("device disconnected", 30);
    assert!(!log.contains("cannot be touched"), "{log}");
}

/// A frontend whose kicks are suppressed: a worker that polls asks for none, and a dead one cannot
/// ask any more.
#[test]
fn a_driver_that_only_kicks_when_it_is_asked_to_is_served_after_a_kill() {
    for event_idx in [false, true] {
        let args = ["--poll-max-us=10000"];
        let mut rig = Rig::launch_devices_with_state(Devices::Timer, &args);
        let mut driver = rig.client().event_idx(event_idx).driver();
        let info = request(op::GET_INFO, VM, 0, &[]);
        for _ in 0..10 {
            for _ in 0..20 {
                driver.call(1, &info, 80, &Layout::plain());
            }
            rig = rig.die_and_go_on(|| {}, &args);
            driver = driver.moved_to(rig.stream(), |_| {});
            driver.call(1, &info, 80, &Layout::plain());
        }
    }
}

#[test]
fn it_ends_while_it_polls() {
    for args in LONGEST {
        let mut rig = Rig::launch_release(args);
        let frontend = configured(&rig);
        ask(&frontend);
        frontend.close().unwrap();
        let frontend = configured(&rig);
        ask(&frontend);
        assert!(rig.backend.terminate().success());
        drop(frontend);
    }
}
