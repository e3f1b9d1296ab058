//! Signals, and launchers that ignore or block them.

use rustix::process::Signal;
use vhost_user_timer_kit::backend_process::{Devices, Launch};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::Rig;
use vhost_user_timer_kit::victim::DEADLINE;

use crate::printing::program;

/// A backend with both sockets bound by itself, launched by this shell script.
fn launched_by(script: &str) -> Rig {
    let launch = Launch::new(&program(), Devices::TimerAndClock).script(script);
    Rig::watch(launch.start().expect("a backend"))
}

/// Checks that a signal ends the backend with 0, with a frontend connected, and that its sockets
/// are gone.
#[track_caller]
fn ends(mut rig: Rig, signal: Signal) {
    let paths = [
        rig.backend.socket_path().to_owned(),
        rig.backend.clock_path(),
    ];
    let mut client = Client::connect(&rig);
    client.configure(1);
    assert!(paths.iter().all(|path| path.exists()));
    rig.backend.signal(signal);
    let status = rig.backend.exit_within(DEADLINE);
    let status = status.unwrap_or_else(|| panic!("{signal:?} does not end it"));
    assert_eq!(status.code(), Some(0), "{signal:?}: {status}");
    assert!(!paths.iter().any(|path| path.exists()), "{signal:?}");
    rig.log_with("Ending on a signal");
}

#[test]
fn sighup_ends_it_with_0_and_the_sockets_are_gone() {
    ends(launched_by("exec \"$@\""), Signal::HUP);
}

#[test]
fn sighup_that_the_launcher_ignores_stays_ignored() {
    let mut rig = launched_by("trap '' HUP; exec \"$@\"");
    rig.backend.signal(Signal::HUP);
    Client::connect(&rig).configure(1);
    assert_eq!(rig.backend.exit_within(std::time::Duration::ZERO), None);
    assert_eq!(rig.said("Ending on a signal"), 0);
    assert_eq!(rig.backend.terminate().code(), Some(0));
}

#[test]
fn sigterm_and_sigint_end_it_even_if_the_launcher_ignores_them() {
    for (name, signal) in [("TERM", Signal::TERM), ("INT", Signal::INT)] {
        ends(launched_by(&format!("trap '' {name}; exec \"$@\"")), signal);
    }
}

#[test]
fn signals_that_the_launcher_has_blocked_end_it() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        ends(launched_by("exec env --block-signal \"$@\""), signal);
    }
}
