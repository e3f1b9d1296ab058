//! The clock device's share of the gate: while a restore is open, the acknowledgement of
//! SET_VRING_ENABLE is held back, so that a VMM that waits for it runs no vCPU before all are
//! restored.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::host::with_longer_spans;
use vhost_user_timer_kit::clock_driver::{ALARMQ, ClockDriver, MONOTONIC, REQUESTQ, UTC};
use vhost_user_timer_kit::contract::{Client, op, phase, request, restore, restore_body};
use vhost_user_timer_kit::raw_driver::{Control, PATIENCE, Rig, Setup, pair, until};

const GET_FEATURES: u32 = 1;
const SET_VRING_ENABLE: u32 = 18;

/// The log line about a frontend that is held back.
const HOLDING: &str = "Holding the clock device's frontend back";

fn both() -> Rig {
    Rig::launch_devices(Devices::TimerAndClock, &[])
}

/// A VMM with a restore of two vCPUs open.
fn restoring(rig: &Rig, flags: u32, timeout: Duration) -> Client {
    let mut timer = Client::connect(rig);
    timer.configure(2);
    let timeout = timeout.as_nanos() as u64;
    let begin = restore_body(2, flags, 0, timeout);
    timer.vm(op::RESTORE_BEGIN, &begin).ok(0);
    timer
}

/// A VMM with a restore of two vCPUs open, in a VM that confirms.
fn restoring_to_armed(rig: &Rig, timeout: Duration) -> Client {
    let mut timer = Client::connect(rig);
    timer.configure_confirming(2);
    let timeout = timeout.as_nanos() as u64;
    let begin = restore_body(2, restore::AUTORUN, 0, timeout);
    timer.vm(op::RESTORE_BEGIN, &begin).ok(0);
    timer
}

/// A VMM whose restore has led to ARMED.
fn armed(rig: &Rig, timeout: Duration) -> Client {
    let mut timer = restoring_to_armed(rig, timeout);
    for vcpu in 0..2 {
        restored(&mut timer, vcpu);
    }
    assert_eq!(timer.info().phase, phase::ARMED);
    timer
}

fn restored(timer: &mut Client, vcpu: u32) {
    timer.bring(vcpu, 1_000);
    timer.restore_done(vcpu);
}

/// A connection to the clock device that has asked to enable its requestq, and that the backend is
/// known to hold back.
struct Held(Control);

impl Held {
    fn at(rig: &Rig) -> Self {
        let features = Setup::default().features();
        let control = Control::negotiated(rig.clock_stream(), features);
        let times = rig.said(HOLDING);
        enable(&control, REQUESTQ, true);
        rig.log_with_times(HOLDING, times + 1);
        Held(control)
    }

    /// [`at`](Self::at), where the restore has a time-out. `None` where that was over before.
    fn before_the_time_out(rig: &Rig) -> Option<Self> {
        let features = Setup::default().features();
        let control = Control::negotiated(rig.clock_stream(), features);
        let times = rig.said(HOLDING);
        enable(&control, REQUESTQ, true);
        let is_held = || rig.said(HOLDING) > times;
        until("it is held, or it goes on", || {
            is_held() || control.is_readable()
        });
        is_held().then_some(Held(control))
    }

    /// Checks that nothing arrives while the VMM is served.
    #[track_caller]
    fn is_held(&self, timer: &mut Client) {
        for _ in 0..50 {
            timer.settle();
            assert!(!self.0.is_readable(), "it was released");
        }
    }

    /// Checks that the acknowledgement arrives.
    #[track_caller]
    fn goes_on(mut self) -> Control {
        let (code, status) = self.0.reply().expect("the acknowledgement");
        assert_eq!((code, status), (SET_VRING_ENABLE, vec![0; 8]));
        self.0
    }
}

fn enable(control: &Control, queue: u16, enabled: bool) {
    let body = pair(queue.into(), enabled.into()).to_le_bytes();
    let sent = control.message(SET_VRING_ENABLE, true, &body, &[]);
    sent.expect("the backend listens");
}

#[test]
fn the_last_restore_done_lets_it_go_on() {
    for flags in [0, restore::AUTORUN] {
        let rig = both();
        let mut timer = restoring(&rig, flags, Duration::ZERO);
        let held = Held::at(&rig);
        held.is_held(&mut timer);
        restored(&mut timer, 1);
        held.is_held(&mut timer);
        timer.bring(0, 5);
        held.is_held(&mut timer);
        timer.restore_done(0);
        held.goes_on();
        assert_ne!(timer.info().phase, phase::RESTORING);
    }
}

#[test]
fn in_a_vm_that_confirms_it_is_held_until_confirm_run() {
    let rig = both();
    let mut timer = restoring_to_armed(&rig, Duration::ZERO);
    let held = Held::at(&rig);
    for vcpu in 0..2 {
        held.is_held(&mut timer);
        restored(&mut timer, vcpu);
    }
    assert_eq!(timer.info().phase, phase::ARMED);
    held.is_held(&mut timer);
    timer.confirm();
    held.goes_on();
}

#[test]
fn one_that_starts_its_rings_in_armed_is_held_until_the_restore_is_over() {
    let ways: [fn(&mut Client); 5] = [
        |timer| _ = timer.confirm(),
        |timer| _ = timer.pause(),
        |timer| _ = timer.vm(op::RESTORE_ABORT, &[]).ok(0),
        |timer| timer.driver.control.reset_device().expect("RESET_DEVICE"),
        |timer| {
            timer.restore_begin(2, 0);
            for vcpu in 0..2 {
                restored(timer, vcpu);
            }
        },
    ];
    for over in ways {
        let rig = both();
        let mut timer = armed(&rig, Duration::ZERO);
        let held = Held::at(&rig);
        let log = rig.log_with(HOLDING);
        assert!(
            log.contains("every vCPU is restored, and CONFIRM_RUN is missing"),
            "{log}"
        );
        held.is_held(&mut timer);
        over(&mut timer);
        held.goes_on();
    }
}

#[test]
fn another_restore_in_armed_holds_it_on() {
    let rig = both();
    let mut timer = armed(&rig, Duration::ZERO);
    let held = Held::at(&rig);
    timer.restore_begin(2, restore::AUTORUN);
    for vcpu in 0..2 {
        held.is_held(&mut timer);
        restored(&mut timer, vcpu);
    }
    held.is_held(&mut timer);
    timer.confirm();
    held.goes_on();
}

#[test]
fn the_time_out_in_armed_lets_it_go_on_and_the_log_names_confirm_run() {
    with_longer_spans(|span| {
        let rig = both();
        let timeout = Duration::from_nanos(4 * span);
        let began = Instant::now();
        let mut timer = armed(&rig, timeout);
        let Some(held) = Held::before_the_time_out(&rig) else {
            return false;
        };
        held.goes_on();
        assert!(began.elapsed() >= timeout);
        assert_eq!(timer.info().phase, phase::ARMED);
        let log = rig.log_with("is released, though a restore is open");
        let line = log
            .lines()
            .find(|line| line.contains("is released, though"));
        assert!(line.unwrap().contains("ERROR"), "{log}");
        assert!(line.unwrap().contains("CONFIRM_RUN is missing"), "{log}");
        true
    });
}

#[test]
fn a_vm_that_resume_armed_holds_nobody_back() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure_confirming(2);
    timer.resume();
    assert_eq!(timer.info().phase, phase::ARMED);
    drop(ClockDriver::connect(&rig));
    held_nobody_back(rig);
}

#[test]
fn an_abort_lets_it_go_on() {
    for timeout in [0, 3_600_000_000_000, u64::MAX] {
        let rig = both();
        let mut timer = restoring(&rig, 0, Duration::from_nanos(timeout));
        let held = Held::at(&rig);
        held.is_held(&mut timer);
        timer.vm(op::RESTORE_ABORT, &[]).ok(0);
        held.goes_on();
    }
}

#[test]
fn a_reset_of_the_timer_device_lets_it_go_on() {
    let rig = both();
    let mut timer = restoring(&rig, 0, Duration::ZERO);
    let held = Held::at(&rig);
    held.is_held(&mut timer);
    timer.driver.control.reset_device().expect("RESET_DEVICE");
    held.goes_on();
}

#[test]
fn another_restore_in_its_place_holds_it_on() {
    let rig = both();
    let mut timer = restoring(&rig, 0, Duration::ZERO);
    let held = Held::at(&rig);
    restored(&mut timer, 0);
    timer.vm(op::RESTORE_ABORT, &[]).ok(0);
    held.goes_on();
    timer.restore_begin(2, 0);
    let held = Held::at(&rig);
    for vcpu in 0..2 {
        held.is_held(&mut timer);
        restored(&mut timer, vcpu);
    }
    held.goes_on();
}

#[test]
fn the_time_out_lets_it_go_on_and_the_log_says_so_as_an_error() {
    with_longer_spans(|span| {
        let rig = both();
        let timeout = Duration::from_nanos(4 * span);
        let began = Instant::now();
        let mut timer = restoring(&rig, 0, timeout);
        restored(&mut timer, 1);
        let Some(held) = Held::before_the_time_out(&rig) else {
            return false;
        };
        let control = held.goes_on();
        assert!(began.elapsed() >= timeout);
        assert_eq!(
            timer.info().phase,
            phase::RESTORING,
            "the restore stays open"
        );
        let log = rig.log_with("is released, though a restore is open");
        let line = log
            .lines()
            .find(|line| line.contains("is released, though"));
        assert!(line.unwrap().contains("ERROR"), "{log}");
        assert!(line.unwrap().contains("1 vCPUs are missing"), "{log}");
        // It has passed for those that connect now, too.
        enable(&control, ALARMQ, true);
        Held(control).goes_on();
        true
    });
}

#[test]
fn it_is_held_while_the_vmm_comes_and_goes() {
    let rig = both();
    let mut timer = restoring(&rig, 0, Duration::ZERO);
    restored(&mut timer, 0);
    let held = Held::at(&rig);
    drop(timer);
    let mut timer = Client::connect(&rig);
    held.is_held(&mut timer);
    restored(&mut timer, 1);
    held.goes_on();
}

/// A guest whose VMM sets its device up meanwhile.
fn starting(rig: &Rig) -> JoinHandle<ClockDriver> {
    let stream = rig.clock_stream();
    let guest = thread::spawn(move || ClockDriver::over(stream, ClockDriver::setup()));
    rig.log_with(HOLDING);
    guest
}

#[test]
fn a_guest_that_was_held_back_runs_with_those_that_waited() {
    let rig = both();
    let mut timer = restoring(&rig, restore::AUTORUN, Duration::ZERO);
    let guest = starting(&rig);
    let waiting = [0, 1].map(|vcpu| timer.wait_run(1, vcpu));
    timer.settle();
    assert!(!guest.is_finished());
    for vcpu in 0..2 {
        timer.bring(vcpu, 7);
    }
    timer.restore_done(0);
    timer.settle();
    assert!(!guest.is_finished());
    let last = request(op::RESTORE_DONE, 1, 0, &[]);
    let layout = timer.layout.clone();
    let last = timer.driver.submit(1, &last, 24, &layout);
    let answers = timer.all_released(1, &[waiting[0], waiting[1], last]);
    assert!(answers.iter().all(|answer| answer.status == 0));
    let mut guest = guest.join().expect("a guest");
    guest.reads_the_hosts(UTC);
    guest.reads_the_hosts(MONOTONIC);
    assert!(guest.read_cross(UTC, 0).unwrap().cycles >= 7);
}

#[test]
fn rings_that_are_enabled_already_are_served_and_starting_them_again_is_held_back() {
    let rig = both();
    let mut guest = ClockDriver::connect(&rig);
    guest.reads_the_hosts(UTC);
    let mut timer = restoring(&rig, 0, Duration::ZERO);
    guest.reads_the_hosts(UTC);
    let base = guest.driver.stop(REQUESTQ);
    let guest = thread::spawn(move || {
        guest.driver.start_at(REQUESTQ, base);
        guest
    });
    rig.log_with(HOLDING);
    timer.settle();
    assert!(!guest.is_finished());
    for vcpu in 0..2 {
        restored(&mut timer, vcpu);
    }
    guest.join().expect("a guest").reads_the_hosts(UTC);
}

#[test]
fn disabling_a_ring_is_never_held_back() {
    let rig = both();
    let _timer = restoring(&rig, 0, Duration::ZERO);
    let features = Setup::default().features();
    let control = Control::negotiated(rig.clock_stream(), features);
    enable(&control, REQUESTQ, false);
    Held(control).goes_on();
    held_nobody_back(rig);
}

/// Ends the backend; its log is complete then.
fn held_nobody_back(mut rig: Rig) {
    assert!(rig.backend.terminate().success());
    rig.log_with("Ending on SIGTERM");
    assert_eq!(rig.said(HOLDING), 0);
}

#[test]
fn nobody_is_held_back_when_no_restore_is_open() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    let connects = || drop(ClockDriver::connect(&rig));
    connects();
    timer.configure(2);
    connects();
    timer.resume();
    connects();
    timer.pause();
    timer.restore_begin(2, 0);
    timer.vm(op::RESTORE_ABORT, &[]).ok(0);
    connects();
    timer.restore_begin(2, 0);
    for vcpu in 0..2 {
        restored(&mut timer, vcpu);
    }
    connects();
    timer.resume();
    drop(timer);
    connects();
    held_nobody_back(rig);
}

#[test]
fn a_signal_ends_the_process_while_it_holds_somebody_back() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut rig = both();
        let mut timer = restoring(&rig, 0, Duration::ZERO);
        let held = Held::at(&rig);
        held.is_held(&mut timer);
        rig.backend.signal(signal);
        assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
        let Held(mut control) = held;
        control.wait_for_end();
        assert!(!rig.backend.clock_path().exists());
    }
}

#[test]
fn a_frontend_that_left_while_it_was_held_back_makes_room_when_the_restore_is_over() {
    let rig = both();
    let mut timer = restoring(&rig, 0, Duration::ZERO);
    let held = Held::at(&rig);
    drop(held);
    let mut next = Control::over(rig.clock_stream());
    next.message(GET_FEATURES, false, &[], &[]).unwrap();
    timer.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(next.reply().expect("an answer").0, GET_FEATURES);
    drop(next);
    ClockDriver::connect(&rig).reads_the_hosts(UTC);
}
