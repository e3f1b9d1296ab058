//! The environment for tests with a real guest does what those tests rely on. It is tested with
//! QEMU's own devices, without this project's backend.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use vhost_user_timer_kit::qemu::{
    Environment, Error, Guest, HostClock, Options, Output, PATIENCE, Transport, environment,
};

const SECOND: Duration = Duration::from_secs(1);

/// QEMU's own virtio-rtc device, which has one clock: UTC.
const QEMUS_RTC: &str = "virtio-rtc";

fn boot(environment: &Environment, options: &Options) -> Guest {
    Guest::boot(environment, options).unwrap_or_else(|error| panic!("{error}"))
}

/// A guest with QEMU's own clock, and its driver.
fn boot_with_clock(environment: &Environment, transport: Transport) -> Guest {
    let options = Options::default().device(transport, QEMUS_RTC);
    let mut guest = boot(environment, &options);
    guest.run("modprobe virtio_rtc").unwrap();
    guest
}

#[test]
fn a_guest_boots_over_each_transport_and_finds_its_device_there() {
    let Some(environment) = environment() else {
        return;
    };
    for transport in Transport::ALL {
        let options = Options::default().device(transport, "virtio-rng");
        let mut guest = boot(&environment, &options);
        let path = guest
            .run("realpath /sys/bus/virtio/drivers/virtio_rng/virtio*")
            .unwrap();
        assert_eq!(path.contains("pci"), transport == Transport::Pci, "{path}");
        assert_eq!(guest.run("nproc").unwrap(), "2");
        assert!(guest.kernel_log().contains("Booting Linux"));
    }
}

#[test]
fn a_command_is_told_from_its_output() {
    let Some(environment) = environment() else {
        return;
    };
    let mut guest = boot(&environment, &Options::default());
    let mut ask = |command| guest.run_within(PATIENCE, command).unwrap();
    let output = |status, text: &str| Output {
        status,
        text: text.to_owned(),
    };
    assert_eq!(ask("true"), output(0, ""));
    assert_eq!(ask("echo a; echo b >&2; exit 3"), output(3, "a\nb\n"));
    assert_eq!(ask("printf unended"), output(0, "unended"));
    assert_eq!(ask("kill -9 $$").status, 137);
    // More than a pipe or a socket holds.
    assert_eq!(ask("seq 100000").text.lines().count(), 100_000);

    // It does not end before it has read a line, which is that of the next command.
    let late = guest.run_within(SECOND / 10, "read -r line; echo late");
    assert!(matches!(late, Err(Error::Late { .. })), "{late:?}");
    guest.send("").unwrap();
    // The late output of one command is not taken for the next one's.
    assert_eq!(guest.run("echo next").unwrap(), "next");
}

#[test]
fn stop_cont_and_reset_are_done_and_told() {
    let Some(environment) = environment() else {
        return;
    };
    let mut guest = boot(&environment, &Options::default());
    let qmp = guest.qmp();
    assert!(qmp.status().unwrap().running);
    qmp.stop().unwrap();
    qmp.event("STOP").unwrap();
    assert_eq!(qmp.status().unwrap().status, "paused");
    let answer = guest.run_within(SECOND / 2, "true");
    assert!(matches!(answer, Err(Error::Late { .. })), "{answer:?}");
    guest.qmp().cont().unwrap();
    guest.qmp().event("RESUME").unwrap();
    assert!(guest.qmp().status().unwrap().running);

    guest.run("touch /seen").unwrap();
    assert_eq!(guest.reset().unwrap().data["guest"], false);
    guest.await_ready().unwrap();
    guest.run("test ! -e /seen").unwrap();

    guest.run("touch /seen").unwrap();
    assert_eq!(guest.reboot().unwrap().data["guest"], true);
    guest.await_ready().unwrap();
    guest.run("test ! -e /seen").unwrap();

    let error = guest.qmp().command("no-such-command").unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");

    guest.send("poweroff -f").unwrap();
    guest.qmp().event("SHUTDOWN").unwrap();
    assert!(guest.wait().unwrap().success());
}

#[test]
fn the_module_loads_where_there_is_no_clock() {
    let Some(environment) = environment() else {
        return;
    };
    let mut guest = boot(&environment, &Options::default());
    guest.run("modprobe virtio_rtc").unwrap();
    assert!(!guest.run("guest clocks").unwrap().contains("class=ptp"));
    guest.run("rmmod virtio_rtc").unwrap();
    let log = guest.kernel_log();
    assert!(!log.contains("Unknown symbol"), "{log}");
}

#[test]
fn a_clock_is_found_and_read_over_each_transport() {
    let Some(environment) = environment() else {
        return;
    };
    for transport in Transport::ALL {
        let mut guest = boot_with_clock(&environment, transport);
        let clocks = guest.run("guest clocks").unwrap();
        assert!(
            clocks.contains("class=ptp device=ptp0 name=Virtio PTP type 0/variant 0"),
            "{clocks}"
        );
        let brackets = guest.exchange("ptp0", HostClock::Realtime, 1000).unwrap();
        assert_eq!(brackets.len(), 1000);
        for bracket in brackets {
            assert!(bracket.holds(), "{bracket:?}");
        }
        let samples = guest.run("guest offset ptp0 25").unwrap();
        assert_eq!(samples.lines().count(), 25, "{samples}");

        // This device has no counter to pair a reading with.
        let precise = guest.run("guest precise ptp0").unwrap();
        assert_eq!(precise, "error=EOPNOTSUPP");

        let error = guest.exchange("ptp7", HostClock::Realtime, 1).unwrap_err();
        assert!(error.to_string().contains("/dev/ptp7"), "{error}");
        assert_eq!(guest.run("echo next").unwrap(), "next");
        guest.run("rmmod virtio_rtc").unwrap();
    }
}

/// Checks that QEMU connects: its first message is GET_FEATURES.
#[test]
fn a_vhost_user_clock_is_there_over_each_transport() {
    let Some(environment) = environment() else {
        return;
    };
    for transport in Transport::ALL {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rtc.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = std::thread::spawn(move || {
            let mut header = [0; 12];
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut header).unwrap();
            header
        });
        let options = Options::default().rtc(transport, &path);
        // Without an answer QEMU gives up.
        let error = Guest::boot(&environment, &options).unwrap_err().to_string();
        assert!(error.contains("vhost"), "{error}");
        let header = backend.join().unwrap();
        assert_eq!(header[..4], [1, 0, 0, 0]);
    }
}

/// By the alarm of the machine's own RTC.
#[test]
fn an_alarm_is_waited_for() {
    let Some(environment) = environment() else {
        return;
    };
    let mut guest = boot(&environment, &Options::default());
    let answer = guest.run("guest alarm rtc0 2 100").unwrap();
    assert!(answer.contains("data=0x1a0"), "{answer}");
    guest.run("guest alarm-set rtc0 1000").unwrap();
    let answer = guest.run("guest alarm-read rtc0").unwrap();
    assert!(answer.contains("enabled=1"), "{answer}");
    guest.run("guest alarm-cancel rtc0").unwrap();
    let answer = guest.run("guest alarm-read rtc0").unwrap();
    assert!(answer.contains("enabled=0"), "{answer}");
    let error = guest.run("guest alarm-wait rtc0 1").unwrap_err();
    assert!(error.to_string().contains("no interrupt"), "{error}");
}

#[test]
fn chrony_takes_the_time_from_a_clock() {
    let Some(environment) = environment() else {
        return;
    };
    let options = Options::default()
        .archive(environment.chrony())
        .device(Transport::Pci, QEMUS_RTC);
    let mut guest = boot(&environment, &options);
    guest
        .run("modprobe virtio_rtc; date -s 2020-01-01")
        .unwrap();
    guest
        .run(
            "chronyd -u root 'refclock PHC /dev/ptp0 poll 0 dpoll -2' 'makestep 0.1 3' 'cmdport 0'",
        )
        .unwrap();
    // Checks every half second whether the clock is right within 0.1 s, for 100 s.
    guest.run("chronyc waitsync 200 0.1 0 0.5").unwrap();
    let before = HostClock::Realtime.now() / 1_000_000_000;
    let now: i128 = guest.run("date +%s").unwrap().parse().unwrap();
    let after = HostClock::Realtime.now() / 1_000_000_000;
    assert!(
        (before - 1..=after + 1).contains(&now),
        "{before} {now} {after}"
    );
}

#[test]
fn a_guest_that_outlives_its_limit_is_killed() {
    let Some(environment) = environment() else {
        return;
    };
    let options = Options::default().life_limit(SECOND);
    let mut guest = Guest::start(&environment, &options.arg("-S")).unwrap();
    assert_eq!(guest.wait().unwrap().code(), None);
}

#[test]
fn what_stops_a_guest_from_coming_up_is_told() {
    let Some(environment) = environment() else {
        return;
    };
    let options = Options::default().arg("-device").arg("no-such-device");
    let error = Guest::boot(&environment, &options).unwrap_err().to_string();
    assert!(error.contains("no-such-device"), "{error}");
}
