//! An unmodified Linux guest under a stock QEMU has its clocks from the backend.

use vhost_user_timer_kit::qemu::{Bracket, ClockVm, HostClock, Transport, environment};

/// What the kernel's driver calls the clocks (Linux, drivers/virtio/virtio_rtc_ptp.c).
fn ptp_name(kind: u8) -> String {
    format!("Virtio PTP type {kind}/variant 0")
}

const UTC: u8 = 0;
const MONOTONIC: u8 = 2;
const SMEARED: u8 = 3;
const MAYBE_SMEARED: u8 = 4;

/// A guest on each transport.
fn on_each_transport(args: &[&str], test: impl Fn(&mut ClockVm)) {
    on(&Transport::ALL, args, test);
}

/// A guest on each of these transports.
fn on(transports: &[Transport], args: &[&str], test: impl Fn(&mut ClockVm)) {
    let Some(environment) = environment() else {
        return;
    };
    for &transport in transports {
        let mut vm = ClockVm::boot(&environment, transport, args);
        test(&mut vm);
        vm.assert_no_complaint();
    }
}

/// The device of the PTP clock with that name.
fn ptp(vm: &mut ClockVm, kind: u8) -> String {
    let clocks = vm.run("guest clocks");
    let line = clocks.lines().find(|line| line.ends_with(&ptp_name(kind)));
    let word = line.and_then(|line| {
        line.split_whitespace()
            .find_map(|w| w.strip_prefix("device="))
    });
    word.unwrap_or_else(|| panic!("no clock of type {kind}: {clocks}"))
        .to_owned()
}

#[test]
fn the_driver_binds_and_finds_the_clocks_under_their_names() {
    for (args, kind) in [
        (&["--rtc-clock=utc"][..], UTC),
        (&["--rtc-clock=maybe-smeared"], MAYBE_SMEARED),
    ] {
        on_each_transport(args, |vm| {
            let clocks = vm.run("guest clocks");
            for kind in [kind, MONOTONIC] {
                assert!(clocks.contains(&ptp_name(kind)), "{clocks}");
            }
            // The kernel does not use a clock that may step at a leap second as an RTC.
            assert!(!clocks.contains("class=rtc device=rtc1"), "{clocks}");
        });
    }
}

/// Checks that each reading is within its bracket, and that readings never decrease.
fn assert_in_order(brackets: &[Bracket]) {
    for bracket in brackets {
        assert!(bracket.holds(), "{bracket:?}");
    }
    for pair in brackets.windows(2) {
        assert!(pair[0].reading <= pair[1].reading, "{pair:?}");
    }
}

#[test]
fn ten_thousand_readings_lie_between_the_hosts_and_none_goes_back() {
    on_each_transport(&["--rtc-clock=utc"], |vm| {
        for (kind, host) in [(UTC, HostClock::Realtime), (MONOTONIC, HostClock::Boottime)] {
            let ptp = ptp(vm, kind);
            let brackets = vm.guest.exchange(&ptp, host, 10_000).unwrap();
            assert_eq!(brackets.len(), 10_000);
            assert_in_order(&brackets);
            let widths = brackets
                .iter()
                .map(|bracket| bracket.after - bracket.before);
            println!(
                "{ptp}: 10000 readings, the tightest between two of the host's {} ns apart",
                widths.min().unwrap_or_default()
            );
        }
        // This guest's counter is QEMU's own, which the backend does not know.
        assert_eq!(vm.run("guest precise ptp0"), "error=EOPNOTSUPP");
    });
}

#[test]
fn a_smeared_clock_is_an_rtc_whose_alarms_wake_a_waiting_process() {
    on_each_transport(&["--rtc-clock=smeared"], |vm| {
        let rtc = vm.rtc();
        assert!(vm.run("guest clocks").contains(&ptp_name(SMEARED)));
        let before = HostClock::Realtime.now() / 1_000_000_000;
        let time: i128 = vm.run(&format!("guest time {rtc}")).parse().unwrap();
        let after = HostClock::Realtime.now() / 1_000_000_000;
        assert!((before..=after).contains(&time), "{before} {time} {after}");

        let interrupts = vm.interrupts();
        for seconds in [1, 2] {
            // It fails if no interrupt comes, and prints how many came: one, the alarm's.
            let answer = vm.run(&format!("guest alarm {rtc} {seconds} 100"));
            assert!(answer.contains("data=0x1a0"), "{answer}");
            let at = |key: &str| {
                let word = answer.split_whitespace().find_map(|w| w.strip_prefix(key));
                word.and_then(|word| word.parse::<i128>().ok()).expect(key)
            };
            assert!(at("now=") >= at("alarm="), "{answer}");
        }
        assert!(vm.interrupts() > interrupts);

        vm.run(&format!("guest alarm-set {rtc} 1000"));
        assert!(
            vm.run(&format!("guest alarm-read {rtc}"))
                .contains("enabled=1")
        );
        vm.run(&format!("guest alarm-cancel {rtc}"));
        assert!(
            vm.run(&format!("guest alarm-read {rtc}"))
                .contains("enabled=0")
        );
        vm.run(&format!(
            "guest alarm-set {rtc} 4; guest alarm-cancel {rtc}"
        ));
        let error = vm
            .guest
            .run(&format!("guest alarm-wait {rtc} 5"))
            .unwrap_err();
        assert!(error.to_string().contains("no interrupt"), "{error}");
    });
}

#[test]
fn an_alarm_is_kept_while_the_driver_is_away() {
    on(&[Transport::Pci], &["--rtc-clock=smeared"], |vm| {
        let rtc = vm.rtc();
        vm.run(&format!("guest alarm-set {rtc} 1000"));
        let alarm = vm.run(&format!("guest alarm-read {rtc}"));
        vm.run("rmmod virtio_rtc");
        vm.load_driver();
        let rtc = vm.rtc();
        let kept = vm.run(&format!("guest alarm-read {rtc}"));
        let time = |text: &str| {
            let mut words = text.split_whitespace();
            words
                .find(|word| word.starts_with("alarm="))
                .map(str::to_owned)
        };
        assert_eq!(time(&kept), time(&alarm), "{kept}");
    });
}

#[test]
fn chrony_selects_the_clock_and_keeps_the_guests_time_by_it() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = ClockVm::boot_with(&environment, &["--rtc-clock=utc"], |options, socket| {
        options
            .archive(environment.chrony())
            .rtc(Transport::Pci, socket)
    });
    vm.run("date -s 2020-01-01");
    let ptp = ptp(&mut vm, UTC);
    vm.run(&format!(
        "chronyd -u root 'refclock PHC /dev/{ptp} refid VRTC poll 0 dpoll -2' 'makestep 0.1 3' \
         'cmdport 0'"
    ));
    // Checks every half second whether the clock is right within 0.1 s, for 100 s.
    vm.run("chronyc waitsync 200 0.1 0 0.5");
    // By itself it waits for its daemon for 7 s.
    let ask = |command| format!("chronyc -n -m 'timeout 30000' {command}");
    let sources = vm.run(&ask("sources"));
    assert!(
        sources.lines().any(|line| line.starts_with("#* VRTC")),
        "{sources}"
    );
    let tracking = vm.run(&ask("tracking"));
    assert!(tracking.contains("VRTC"), "{tracking}");
    let offset = tracking
        .lines()
        .find(|line| line.starts_with("Last offset"));
    println!("chrony selected {ptp}; {}", offset.expect("an offset"));
    let before = HostClock::Realtime.now() / 1_000_000_000;
    let now: i128 = vm.run("date +%s").parse().unwrap();
    let after = HostClock::Realtime.now() / 1_000_000_000;
    assert!(
        (before - 1..=after + 1).contains(&now),
        "{before} {now} {after}"
    );
    vm.assert_no_complaint();
}
