//! The two sockets, listening or connected, and the end of the process.

use super::*;

/// A backend with a connected or a listening socket for each of its devices.
struct OnSockets {
    rig: Rig,
    timer: Option<UnixStream>,
    clock: Option<UnixStream>,
    folder: TempDir,
}

/// The kind of socket that a device is served on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Connected,
    Listening,
}

fn launch_on(timer: Option<End>, clock: Option<End>) -> OnSockets {
    let folder = TempDir::new().unwrap();
    let mut ends = [(timer, "timer"), (clock, "clock")].map(|(end, name)| match end {
        None => (None, None),
        Some(End::Connected) => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (Some(ours), Some(theirs.into()))
        }
        Some(End::Listening) => {
            let path = folder.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            let ours = UnixStream::connect(path).unwrap();
            (Some(ours), Some(listener.into()))
        }
    });
    let [(ours_timer, theirs_timer), (ours_clock, theirs_clock)] = &mut ends;
    let backend =
        BackendProcess::launch_on_sockets::<&str>(theirs_timer.take(), theirs_clock.take(), &[]);
    OnSockets {
        rig: Rig::watch(backend.expect("a backend")),
        timer: ours_timer.take(),
        clock: ours_clock.take(),
        folder,
    }
}

impl OnSockets {
    fn timer(&mut self) -> Client {
        Client::over(self.timer.take().expect("a timer device"))
    }

    fn guest(&mut self) -> ClockDriver {
        let stream = self.clock.take().expect("a clock device");
        ClockDriver::over(stream, ClockDriver::setup())
    }
}

#[test]
fn a_connected_socket_alone_is_served_in_full_and_its_end_is_the_programs() {
    let mut served = launch_on(None, Some(End::Connected));
    let mut guest = served.guest();
    guest.reads_the_hosts(UTC);
    guest.post_alarm_buffer();
    guest.set_alarm(UTC, 1, true);
    assert_eq!(guest.notified(), UTC);
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_listening_socket_serves_one_guest_after_the_other() {
    let mut served = launch_on(None, Some(End::Listening));
    let path = served.folder.path().join("clock");
    served.guest().reads_the_hosts(UTC);
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        ClockDriver::over(stream, ClockDriver::setup()).reads_the_hosts(UTC);
    }
    assert_eq!(served.rig.backend.terminate().code(), Some(0));
    assert!(path.exists(), "the process that bound it removes it");
}

#[test]
fn with_two_connected_sockets_the_last_ones_end_is_the_programs() {
    let connected = Some(End::Connected);
    let mut served = launch_on(connected, connected);
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(timer);
    served
        .rig
        .log_with("The frontend of the timer device disconnected");
    for _ in 0..20 {
        guest.reads_the_hosts(UTC);
    }
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));

    let mut served = launch_on(connected, connected);
    let (mut timer, guest) = (served.timer(), served.guest());
    timer.configure(1);
    drop(guest);
    served
        .rig
        .log_with("The frontend of the clock device disconnected");
    for _ in 0..20 {
        timer.settle();
    }
    drop(timer);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn beside_a_listening_socket_the_connected_ones_end_is_the_programs() {
    let mut served = launch_on(Some(End::Listening), Some(End::Connected));
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));

    let mut served = launch_on(Some(End::Connected), Some(End::Listening));
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(timer);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_signal_ends_it_with_both_connected() {
    for end in [End::Connected, End::Listening] {
        let mut served = launch_on(Some(end), Some(end));
        let (mut timer, mut guest) = (served.timer(), served.guest());
        timer.configure(1);
        guest.set_alarm(UTC, u64::MAX, true);
        assert_eq!(served.rig.backend.terminate().code(), Some(0));
    }
}
