//! Signals, and launchers that ignore or block them.

use rustix::process::{Signal, geteuid};
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

/// The signals that end the backend, by name.
const ENDING: [(&str, Signal); 3] = [
    ("TERM", Signal::TERM),
    ("INT", Signal::INT),
    ("HUP", Signal::HUP),
];

/// Checks that a signal ends the backend with 0, with a frontend connected, that its sockets are
/// gone, and that its log says which signal it was and who sent it.
#[track_caller]
fn ends(mut rig: Rig, (name, signal): (&str, Signal)) {
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
    let sender = format!(
        "process {} of uid {}",
        std::process::id(),
        geteuid().as_raw()
    );
    rig.log_with(&format!("Ending on SIG{name} from {sender}\n"));
}

#[test]
fn sighup_ends_it_with_0_and_the_sockets_are_gone() {
    let [_, _, hangup] = ENDING;
    ends(launched_by("exec \"$@\""), hangup);
}

#[test]
fn sighup_that_the_launcher_ignores_stays_ignored() {
    let mut rig = launched_by("trap '' HUP; exec \"$@\"");
    rig.backend.signal(Signal::HUP);
    Client::connect(&rig).configure(1);
    assert_eq!(rig.backend.terminate().code(), Some(0));
    // Of two that are pending, the one with the lower number comes first: SIGHUP.
    rig.log_with("Ending on SIGTERM");
}

#[test]
fn sigterm_and_sigint_end_it_even_if_the_launcher_ignores_them() {
    let [term, int, _] = ENDING;
    for signal in [term, int] {
        let trap = format!("trap '' {}; exec \"$@\"", signal.0);
        ends(launched_by(&trap), signal);
    }
}

#[test]
fn signals_that_the_launcher_has_blocked_end_it() {
    for signal in ENDING {
        ends(launched_by("exec env --block-signal \"$@\""), signal);
    }
}
