//! Cross-timestamps (virtio 1.4 §5.23.6.5): a clock and the guest's own counter at one instant, if
//! the counter is known. Counter values never decrease.

use std::time::Instant;

use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::{
    ClockDriver, Cross, MONOTONIC, MS, SECOND, UTC, counter::ARM_VCT, host, rtc_status,
};
use vhost_user_timer_kit::contract::{CNT, Client, phase, restore};
use vhost_user_timer_kit::raw_driver::{PATIENCE, Rig, load, save};
use vhost_user_timer_kit::watch::host_count;

const READINGS: u32 = 2_000;

fn both() -> Rig {
    Rig::launch_devices(Devices::TimerAndClock, &[])
}

/// A running VM, and its guest.
fn running(rig: &Rig) -> (Client, ClockDriver) {
    let mut timer = Client::connect(rig);
    timer.configure(2);
    timer.resume();
    (timer, ClockDriver::connect(rig))
}

#[track_caller]
fn cross(guest: &mut ClockDriver) -> Cross {
    guest.read_cross(UTC, ARM_VCT).expect("READ_CROSS")
}

/// Checks that READ_CROSS of every clock is refused with this status, and what CROSS_CAP says.
#[track_caller]
fn refused(guest: &mut ClockDriver, capable: bool, status: u8) {
    for clock in host::ids() {
        assert_eq!(guest.cross_cap(clock, ARM_VCT), Ok(capable));
        assert_eq!(guest.read_cross(clock, ARM_VCT), Err(status));
        guest.reads_the_hosts(clock);
    }
}

#[test]
fn where_nobody_knows_the_counter_there_are_none() {
    for devices in [Devices::Clock, Devices::TimerAndClock] {
        let rig = Rig::launch_devices(devices, &[]);
        let mut guest = ClockDriver::connect(&rig);
        refused(&mut guest, false, rtc_status::EOPNOTSUPP);
    }
}

#[test]
fn with_an_offset_told_the_counter_is_the_hosts_less_that() {
    for offset in [0, 1, 12_345, 1 << 63, u64::MAX - 77] {
        let told = [
            format!("--rtc-counter-offset={offset}"),
            format!("--rtc-counter-offset={offset:#x}"),
        ];
        for told in told {
            let rig = Rig::launch_devices(Devices::Clock, &[&told]);
            let mut guest = ClockDriver::connect(&rig);
            for clock in host::ids() {
                assert_eq!(guest.cross_cap(clock, ARM_VCT), Ok(true));
                for _ in 0..50 {
                    let (before, count) = (host::clock(clock), host_count());
                    let pair = guest.read_cross(clock, ARM_VCT).unwrap();
                    let (after, last) = (host::clock(clock), host_count());
                    assert!((before..=after).contains(&pair.clock));
                    let cycles = pair.cycles.wrapping_add(offset);
                    assert!((count..=last).contains(&cycles), "{offset:#x}");
                }
            }
        }
    }
}

#[test]
fn in_armed_there_is_no_running_count_to_pair_and_from_confirm_run_on_there_is() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure_confirming(2);
    timer.resume();
    let mut guest = ClockDriver::connect(&rig);
    for _ in 0..2 {
        assert_eq!(timer.info().phase, phase::ARMED);
        refused(&mut guest, true, rtc_status::EIO);
        let run = timer.confirm();
        let pair = cross(&mut guest);
        assert!((run.virt_count..=host_count() - run.cntvoff).contains(&pair.cycles));
        timer.pause();
        timer.resume();
    }
}

#[test]
fn the_counter_is_what_the_vms_own_virtual_counter_reads() {
    for vcpus in [1, 2] {
        let rig = both();
        let mut timer = Client::connect(&rig);
        timer.configure(vcpus);
        timer.set(0, &[(CNT, 0x1234_5678_9abc)]);
        timer.resume();
        let mut guest = ClockDriver::connect(&rig);
        for clock in host::ids() {
            assert_eq!(guest.cross_cap(clock, ARM_VCT), Ok(true));
            for _ in 0..READINGS / 4 {
                let (first, before) = (timer.get_one(vcpus - 1, CNT), host::clock(clock));
                let pair = guest.read_cross(clock, ARM_VCT).unwrap();
                let (after, last) = (host::clock(clock), timer.get_one(0, CNT));
                assert!((before..=after).contains(&pair.clock));
                assert!((first..=last).contains(&pair.cycles));
            }
        }
    }
}

#[test]
fn a_vm_that_is_configured_counts_and_not_the_offset_that_was_told() {
    let rig = Rig::launch_devices(Devices::TimerAndClock, &["--rtc-counter-offset=0"]);
    let mut guest = ClockDriver::connect(&rig);
    let told = cross(&mut guest).cycles;
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    refused(&mut guest, true, rtc_status::EIO);
    timer.set(0, &[(CNT, told + 3_600 * SECOND)]);
    timer.resume();
    assert!(cross(&mut guest).cycles >= told + 3_600 * SECOND);
}

#[test]
fn clock_and_counter_are_of_one_instant() {
    let rig = both();
    let (_timer, mut guest) = running(&rig);
    // The counter is ahead of the clock by a constant. So if the two were not read at one instant,
    // pairs differ in that by at most the time that a READ_CROSS takes.
    let mut readings: Vec<(u64, i64)> = (0..READINGS)
        .map(|_| {
            let started = host_count();
            let pair = guest.read_cross(MONOTONIC, ARM_VCT).unwrap();
            let took = host_count() - started;
            (took, pair.cycles.wrapping_sub(pair.clock).cast_signed())
        })
        .collect();
    let (quickest, ahead) = *readings.iter().min().unwrap();
    for (took, other) in &readings {
        assert!(other.abs_diff(ahead) <= took + quickest);
    }
    readings.sort_by_key(|(_, other)| other.abs_diff(ahead));
    let off = |share: usize| readings[readings.len() * share / 100 - 1].1.abs_diff(ahead);
    println!(
        "{READINGS} pairs: half are within {} ns, 99 % within {} ns, all within {} ns; a READ_CROSS \
         takes {quickest} ns at least",
        off(50),
        off(99),
        off(100)
    );
}

#[test]
fn there_is_none_while_the_vm_is_paused() {
    let rig = both();
    let (mut timer, mut guest) = running(&rig);
    for _ in 0..3 {
        let last = cross(&mut guest).cycles;
        let run = timer.pause();
        refused(&mut guest, true, rtc_status::EIO);
        timer.resume();
        let next = cross(&mut guest).cycles;
        assert!(next >= run.virt_count && run.virt_count >= last);
    }
}

#[test]
fn there_is_none_while_a_restore_is_open() {
    let rig = both();
    let (mut timer, mut guest) = running(&rig);
    for flags in [0, restore::AUTORUN] {
        let last = cross(&mut guest).cycles;
        let paused = timer.pause().virt_count;
        timer.restore_begin(2, flags);
        refused(&mut guest, true, rtc_status::EIO);
        for vcpu in 0..2 {
            timer.bring(vcpu, paused + 5);
            refused(&mut guest, true, rtc_status::EIO);
            timer.restore_done(vcpu);
        }
        if flags == 0 {
            refused(&mut guest, true, rtc_status::EIO);
            timer.resume();
        }
        let next = cross(&mut guest).cycles;
        assert!(next >= paused + 5 && next > last);
    }
}

#[test]
fn a_counter_below_one_that_was_given_is_withheld_until_it_is_past_that() {
    let rig = both();
    let (mut timer, mut guest) = running(&rig);
    timer.pause();
    // An hour more than the test counts up to below.
    timer.set(0, &[(CNT, 3_600 * SECOND)]);
    timer.resume();
    let last = cross(&mut guest).cycles;
    assert!(last >= 3_600 * SECOND);

    timer.pause();
    timer.set(0, &[(CNT, 5)]);
    timer.resume();
    refused(&mut guest, true, rtc_status::EIO);

    timer.pause();
    timer.set(0, &[(CNT, last - 50 * MS)]);
    timer.resume();
    let started = Instant::now();
    let next = loop {
        assert!(started.elapsed() < PATIENCE, "it is past it by now");
        match guest.read_cross(UTC, ARM_VCT) {
            Ok(pair) => break pair.cycles,
            Err(status) => assert_eq!(status, rtc_status::EIO),
        }
    };
    assert!(next >= last);
    // The driver that starts over was given no count.
    timer.pause();
    timer.set(0, &[(CNT, 5)]);
    timer.resume();
    refused(&mut guest, true, rtc_status::EIO);
    drop(guest);
    let cycles = cross(&mut ClockDriver::connect(&rig)).cycles;
    assert!((5..last).contains(&cycles));
}

#[test]
fn a_counter_may_wrap() {
    let rig = both();
    let (mut timer, mut guest) = running(&rig);
    timer.pause();
    timer.set(0, &[(CNT, u64::MAX - 20 * MS)]);
    timer.resume();
    let started = Instant::now();
    let mut last = cross(&mut guest).cycles;
    while last >= 1 << 63 {
        assert!(started.elapsed() < PATIENCE, "it has wrapped by now");
        let next = cross(&mut guest).cycles;
        assert!(
            next.wrapping_sub(last) < 1 << 63,
            "{next:#x} after {last:#x}"
        );
        last = next;
    }
}

#[test]
fn whether_there_are_any_is_settled_for_a_drivers_life() {
    let rig = both();
    let mut guest = ClockDriver::connect(&rig);
    assert_eq!(guest.cross_cap(UTC, ARM_VCT), Ok(false));
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    timer.resume();
    refused(&mut guest, false, rtc_status::EOPNOTSUPP);
    // A driver that goes on was told that it is not supported.
    guest = guest.moved_to(rig.clock_stream(), |_| {});
    refused(&mut guest, false, rtc_status::EOPNOTSUPP);
    drop(guest);

    let mut guest = ClockDriver::connect(&rig);
    assert_eq!(guest.cross_cap(UTC, ARM_VCT), Ok(true));
    let last = cross(&mut guest).cycles;
    timer.driver.control.reset_device().expect("RESET_DEVICE");
    refused(&mut guest, true, rtc_status::EIO);
    guest = guest.moved_to(rig.clock_stream(), |_| {});
    refused(&mut guest, true, rtc_status::EIO);
    drop(timer);
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    timer.set(0, &[(CNT, last)]);
    timer.resume();
    assert!(cross(&mut guest).cycles >= last);
    timer.driver.control.reset_device().expect("RESET_DEVICE");
    drop(guest);
    refused(
        &mut ClockDriver::connect(&rig),
        false,
        rtc_status::EOPNOTSUPP,
    );
}

#[test]
fn a_reading_settles_it_as_well() {
    let rig = both();
    let mut guest = ClockDriver::connect(&rig);
    let refusal = Err(rtc_status::EOPNOTSUPP);
    assert_eq!(guest.read_cross(MONOTONIC, ARM_VCT), refusal);
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    timer.resume();
    assert_eq!(guest.cross_cap(MONOTONIC, ARM_VCT), Ok(false));
    assert_eq!(guest.read_cross(MONOTONIC, ARM_VCT), refusal);
}

#[test]
fn it_goes_on_where_it_was_after_a_kill() {
    let mut rig = Rig::launch_devices_with_state(Devices::TimerAndClock, &[]);
    let (timer, mut guest) = running(&rig);
    drop(timer);
    let mut last = cross(&mut guest).cycles;
    for _ in 0..5 {
        rig = rig.die_and_go_on(|| (), &[]);
        guest = guest.moved_to(rig.clock_stream(), |_| {});
        let next = cross(&mut guest).cycles;
        assert!(next > last);
        last = next;
    }
    let mut timer = Client::connect(&rig);
    assert_eq!(timer.info().phase, phase::RUNNING);
    timer.pause();
    timer.set(0, &[(CNT, last - 1)]);
    drop(timer);
    rig = rig.die_and_go_on(|| (), &[]);
    guest = guest.moved_to(rig.clock_stream(), |_| {});
    refused(&mut guest, true, rtc_status::EIO);
    // The backend remembers past the kill which count the guest knows.
    let mut timer = Client::connect(&rig);
    timer.set(0, &[(CNT, 1)]);
    timer.resume();
    refused(&mut guest, true, rtc_status::EIO);
}

#[test]
fn what_a_guest_was_given_goes_along_with_the_device_state() {
    let source = Rig::launch_devices(Devices::Clock, &["--rtc-counter-offset=0"]);
    let mut guest = ClockDriver::connect(&source);
    let last = cross(&mut guest).cycles;
    let stream = save(&guest.driver.control);
    // To a host where the counter is not known, to one where it is an hour behind, and to one where
    // it goes on.
    let hour = format!("--rtc-counter-offset={}", 3_600 * SECOND);
    let refusing =
        [&[][..], &[hour.as_str()]].map(|args| Rig::launch_devices(Devices::Clock, args));
    for rig in &refusing {
        guest = guest.moved_to(rig.clock_stream(), |control| {
            assert!(load(control, &stream));
        });
        assert_eq!(guest.cross_cap(UTC, ARM_VCT), Ok(true));
        assert_eq!(guest.read_cross(UTC, ARM_VCT), Err(rtc_status::EIO));
    }
    let destination = Rig::launch_devices(Devices::Clock, &["--rtc-counter-offset=0"]);
    let mut guest = guest.moved_to(destination.clock_stream(), |control| {
        assert!(load(control, &stream));
    });
    assert!(cross(&mut guest).cycles > last);
}
