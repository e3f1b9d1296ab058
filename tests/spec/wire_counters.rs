//! The two clocks, their offsets and the host counter (SPEC.md, "Counters" and "Offsets").

use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Info, PCNT, Run, configure_body, info_flag, op, pause_body, phase,
    restore, status, words,
};
use vhost_user_timer_kit::raw_driver::Rig;

/// CLOCK_MONOTONIC, ns.
fn monotonic() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = Client::connect(rig);
    client.configure(vcpus);
    client
}

/// Lets the host counter move on by at least one tick of a GHz.
fn pass_time(client: &mut Client) {
    let start = client.info().host_count;
    while client.info().host_count == start {}
}

#[test]
fn the_host_counter_is_clock_monotonic_by_default() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for _ in 0..100 {
        let before = monotonic();
        let info = client.info();
        let after = monotonic();
        assert_eq!(info.frequency, 1_000_000_000);
        assert!((before..=after).contains(&info.host_count));
    }
}

#[test]
fn the_host_counter_runs_at_the_vms_frequency() {
    let rig = Rig::launch(&["--counter-frequency=62500000"]);
    let mut client = configured(&rig, 1);
    for _ in 0..100 {
        let before = monotonic() / 16;
        let host = client.info().host_count;
        assert!((before..=monotonic() / 16).contains(&host));
    }
}

#[test]
fn the_boottime_source_counts() {
    let rig = Rig::launch(&["--counter-source=boottime"]);
    let mut client = configured(&rig, 1);
    let boottime = || {
        let time = clock_gettime(ClockId::Boottime);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    };
    let before = boottime();
    let host = client.info().host_count;
    assert!((before..=boottime()).contains(&host));
}

#[test]
fn pause_freezes_and_resume_goes_on_from_the_frozen_count() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    let running = client.resume();
    pass_time(&mut client);
    let paused = client.pause();
    assert_eq!(paused.cntvoff, running.cntvoff);
    assert!(paused.virt_count > running.virt_count);
    pass_time(&mut client);
    for vcpu in 0..2 {
        assert_eq!(client.get_one(vcpu, CNT), paused.virt_count);
    }
    let resumed = client.resume();
    assert_eq!(resumed.virt_count, paused.virt_count);
    // The offset moved by the pause.
    let pause = resumed.host_count - paused.host_count;
    assert_eq!(resumed.cntvoff, paused.cntvoff + pause);
}

#[test]
fn an_offset_in_an_answer_is_host_minus_count_at_that_instant() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 1000), (PCNT, 2000)]);
    for _ in 0..10 {
        let info = client.info();
        assert_eq!(info.cntvoff, info.host_count.wrapping_sub(1000));
        assert_eq!(info.cntpoff, info.host_count.wrapping_sub(2000));
    }
    // `Run::of` checks the same of PAUSE and RESUME.
    let run = client.pause();
    assert_eq!((run.virt_count, run.phys_count), (1000, 2000));
}

#[test]
fn while_the_clock_counts_the_offset_is_constant() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    let offset = client.resume().cntvoff;
    let mut last = 0;
    for n in 0..300 {
        let info = client.info();
        assert_eq!(info.cntvoff, offset);
        let count = client.get_one(n % 3, CNT);
        let now = info.host_count - offset;
        assert!(count >= now && now >= last);
        last = count;
    }
}

#[test]
fn arithmetic_is_modulo_two_to_the_64() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for count in [0, 1, u64::MAX, u64::MAX - 1_000, 1 << 63] {
        client.set(0, &[(CNT, count)]);
        let run = client.resume();
        assert_eq!(run.virt_count, count);
        pass_time(&mut client);
        let later = client.pause();
        let host = later.host_count - run.host_count;
        assert_eq!(later.virt_count, count.wrapping_add(host));
    }
}

#[test]
fn all_vcpus_have_one_count() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 16);
    client.set(3, &[(CNT, 99)]);
    for vcpu in 0..16 {
        assert_eq!(client.get_one(vcpu, CNT), 99);
    }
    client.resume();
    let state = client.state();
    for vcpu in &state.vcpus {
        assert_eq!(vcpu.registers[1], state.virt_count);
        assert_eq!(vcpu.registers[4], state.phys_count);
    }
}

#[test]
fn the_physical_clock_passes_the_host_counter_through_and_is_never_frozen() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    let passes_through = |client: &mut Client| {
        let before = monotonic();
        let count = client.get_one(1, PCNT);
        let after = monotonic();
        assert!((before..=after).contains(&count), "{count}");
        let info = client.info();
        assert_eq!(info.cntpoff, 0);
        assert_eq!(info.flags & info_flag::PHYS_VIRTUALISED, 0);
        let state = client.state();
        assert_eq!(state.phys_count, state.host_count);
    };
    passes_through(&mut client);
    client.resume();
    passes_through(&mut client);
    let paused = client.pause();
    assert_eq!(paused.phys_count, paused.host_count);
    passes_through(&mut client);
    // A restore that brings no PTIMER_CNT leaves it so.
    client.restore_begin(2, restore::AUTORUN);
    for vcpu in 0..2 {
        client.bring(vcpu, 10);
        client.restore_done(vcpu);
    }
    passes_through(&mut client);
}

#[test]
fn a_ptimer_cnt_write_virtualises_the_physical_clock() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.set(1, &[(PCNT, 5000)]);
    assert_eq!(client.get_one(0, PCNT), 5000);
    assert_eq!(client.info().flags, info_flag::PHYS_VIRTUALISED);
    let run = client.resume();
    assert_eq!(run.phys_count, 5000);
    pass_time(&mut client);
    let paused = client.pause();
    assert_eq!(paused.cntpoff, run.cntpoff);
    assert!(paused.phys_count > 5000);
    pass_time(&mut client);
    assert_eq!(client.get_one(0, PCNT), paused.phys_count);
    assert_eq!(client.resume().phys_count, paused.phys_count);
}

#[test]
fn keep_counting_pauses_the_vm_and_not_its_clocks() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(PCNT, 1)]);
    let running = client.resume();
    let paused = Run::of(client.vm(op::PAUSE, &pause_body(1)).ok(40));
    assert_eq!(
        (paused.cntvoff, paused.cntpoff),
        (running.cntvoff, running.cntpoff)
    );
    pass_time(&mut client);
    let info = client.info();
    assert_eq!(info.phase, phase::PAUSED);
    assert_eq!(info.cntvoff, running.cntvoff);
    let counts = client.get(0, &[CNT, PCNT]);
    assert!(counts[0] > paused.virt_count && counts[1] > paused.phys_count);
    let resumed = client.resume();
    assert_eq!(resumed.cntvoff, running.cntvoff);
    assert_eq!(resumed.cntpoff, running.cntpoff);
    assert!(resumed.virt_count >= counts[0]);
}

#[test]
fn a_count_write_after_keep_counting_freezes_that_clock_alone() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(PCNT, 1)]);
    let running = client.resume();
    client.vm(op::PAUSE, &pause_body(1)).ok(40);
    client.set(0, &[(CNT, 123)]);
    pass_time(&mut client);
    assert_eq!(client.get_one(0, CNT), 123);
    let resumed = client.resume();
    assert_eq!(resumed.virt_count, 123);
    assert_eq!(resumed.cntpoff, running.cntpoff);
}

#[test]
fn set_counter_offset_sets_both_offsets_exactly_and_lets_both_clocks_count() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    for offset in [0, 1, 0xf333_8991_2222_3333, u64::MAX] {
        client
            .vm(op::SET_COUNTER_OFFSET, &words(&[offset, 0]))
            .ok(0);
        let info = client.info();
        assert_eq!((info.cntvoff, info.cntpoff), (offset, offset));
        assert_eq!(
            info.flags,
            info_flag::OFFSET_PINNED | info_flag::PHYS_VIRTUALISED
        );
        assert_eq!(info.phase, phase::PAUSED);
        let state = client.state();
        assert_eq!(state.virt_count, state.host_count.wrapping_sub(offset));
        let first = client.get_one(0, CNT);
        pass_time(&mut client);
        assert_ne!(client.get_one(1, CNT), first);
    }
}

#[test]
fn resume_keeps_a_pinned_offset_if_nothing_froze_the_clocks() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.vm(op::SET_COUNTER_OFFSET, &words(&[4242, 0])).ok(0);
    pass_time(&mut client);
    let run = client.resume();
    assert_eq!((run.cntvoff, run.cntpoff), (4242, 4242));
    // PAUSE freezes as ever, and then the offset moves by the pause.
    let paused = client.pause();
    pass_time(&mut client);
    let resumed = client.resume();
    assert_eq!(resumed.virt_count, paused.virt_count);
    assert_eq!(resumed.phys_count, paused.phys_count);
    assert!(resumed.cntvoff > 4242);
    // KEEP_COUNTING does not freeze.
    client.vm(op::PAUSE, &pause_body(1)).ok(40);
    pass_time(&mut client);
    assert_eq!(client.resume().cntvoff, resumed.cntvoff);
}

#[test]
fn with_the_offset_pinned_count_writes_are_ignored_and_counted() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.vm(op::SET_COUNTER_OFFSET, &words(&[7, 0])).ok(0);
    assert_eq!(client.set(0, &[(CNT, 1)]).1, 1);
    assert_eq!(client.set(0, &[(CNT, 1), (PCNT, 2), (CTL, 0)]).1, 2);
    assert_eq!(client.set(0, &[(CTL, 0)]).1, 0);
    let info = client.info();
    assert_eq!((info.cntvoff, info.cntpoff), (7, 7));
    // In RUNNING likewise: ignored and not refused.
    client.resume();
    assert_eq!(client.set(0, &[(CNT, 1), (CVAL, 9)]).1, 1);
    assert_eq!(client.get_one(0, CVAL), 9);
    assert_eq!(client.info().cntvoff, 7);
}

#[test]
fn restore_begin_unpins_and_an_offset_set_while_restoring_pins_again() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.vm(op::SET_COUNTER_OFFSET, &words(&[7, 0])).ok(0);
    client.restore_begin(1, 0);
    assert_eq!(client.info().flags & info_flag::OFFSET_PINNED, 0);
    client.vm(op::SET_COUNTER_OFFSET, &words(&[9, 0])).ok(0);
    assert_eq!(client.info().flags & info_flag::OFFSET_PINNED, 1);
    // Pinned, so TIMER_CNT need not be brought, and is ignored if it is.
    let done = client.vcpu(op::RESTORE_DONE, 0, &[]);
    assert_eq!(done.outcome(), (status::ENODATA, 0b101));
    assert_eq!(client.set(0, &[(CTL, 0), (CVAL, 0), (CNT, 55)]).1, 1);
    assert_eq!(client.restore_done(0), 0);
    let info = client.info();
    assert_eq!((info.cntvoff, info.cntpoff), (9, 9));
    assert_eq!(client.resume().cntvoff, 9);
}

#[test]
fn the_reserved_half_of_set_counter_offset_must_be_zero() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for reserved in [1, 1 << 63] {
        let answer = client.vm(op::SET_COUNTER_OFFSET, &words(&[0, reserved]));
        assert_eq!(answer.outcome(), (status::EINVAL, 0));
    }
    assert_eq!(client.info().flags, 0);
}

#[test]
fn an_anchor_says_what_the_host_counter_is() {
    let rig = Rig::launch(&[]);
    for frequency in [1_000_000_000u64, 62_500_000, 1_000] {
        let mut client = Client::connect(&rig);
        let configure = configure_body(1, 0, frequency);
        client.vm(op::CONFIGURE_VM, &configure).ok(0);
        let expected = |anchor: u64, count: u64, ns: u64| {
            let passed = i128::from(ns) - i128::from(anchor);
            let ticks = (passed * i128::from(frequency)).div_euclid(1_000_000_000);
            (i128::from(count) + ticks) as u64
        };
        let now = monotonic();
        for (anchor, count) in [
            (now, 5_000_000_000_000),
            (now, 0),
            (0, 77),
            (now + 1_000_000_000, 1 << 63),
            (now, u64::MAX),
        ] {
            client
                .vm(op::SET_COUNTER_ANCHOR, &words(&[anchor, count]))
                .ok(0);
            let before = monotonic();
            let info: Info = client.info();
            let after = monotonic();
            assert_eq!(info.flags & info_flag::ANCHORED, info_flag::ANCHORED);
            let low = expected(anchor, count, before);
            let high = expected(anchor, count, after);
            let past_low = info.host_count.wrapping_sub(low);
            assert!(past_low <= high.wrapping_sub(low), "{frequency} {count}");
        }
        client.reset_and_leave();
    }
}

#[test]
fn an_anchor_leaves_a_frozen_count_alone() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 31), (CTL, 1), (CVAL, 40)]);
    client
        .vm(op::SET_COUNTER_ANCHOR, &words(&[0, 1 << 40]))
        .ok(0);
    assert_eq!(client.get_one(0, CNT), 31);
    let run = client.resume();
    assert_eq!(run.virt_count, 31);
    assert_eq!(run.cntvoff, run.host_count - 31);
}

#[test]
fn timers_fire_by_the_anchored_counter() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    let anchor = words(&[monotonic(), 0xf333_8991_2222_3333]);
    client.vm(op::SET_COUNTER_ANCHOR, &anchor).ok(0);
    client.set(0, &[(CTL, 1), (CVAL, 2_000_000), (CNT, 0)]);
    for _ in 0..3 {
        client.post_event_buffer();
    }
    client.resume();
    loop {
        let event = client.event();
        if event.kind == 1 {
            assert!(event.count >= 2_000_000);
            break;
        }
    }
}
