//! Events (SPEC.md, "Events").

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Event, PCNT, PCTL, PCVAL, PHASE_CHANGED, TIMER_ASSERTED, op,
    pause_body, phase, restore, words,
};
use vhost_user_timer_kit::raw_driver::{Layout, Rig, Setup};

const MS: u64 = 1_000_000;
const ASSERTED: fn(u16, u32) -> (u16, u16, u32) = |timer, vcpu| (TIMER_ASSERTED, timer, vcpu);
const CHANGED: fn(u32) -> (u16, u16, u32) = |phase| (PHASE_CHANGED, 0, phase);

/// A VM whose phase changes so far have been told of.
fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = Client::connect(rig);
    client.configure(vcpus);
    client.post_event_buffer();
    assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    client
}

fn post(client: &mut Client, buffers: usize) {
    for _ in 0..buffers {
        client.post_event_buffer();
    }
}

/// The next event that tells of a timer.
fn asserted(client: &mut Client) -> Event {
    loop {
        let event = client.event();
        if event.kind == TIMER_ASSERTED {
            return event;
        }
    }
}

/// RESUME, with its PHASE_CHANGED taken out of the way.
fn resume(client: &mut Client) {
    client.post_event_buffer();
    client.resume();
    assert_eq!(client.event().what(), CHANGED(phase::RUNNING));
}

/// Arms vCPU 0's virtual timer so many ticks ahead; its line does not rise by the write. Returns
/// the compare value.
fn arm_ahead(client: &mut Client, ticks: u64) -> u64 {
    loop {
        let cval = client.get_one(0, CNT) + ticks;
        if client.set(0, &[(CTL, 1), (CVAL, cval)]) == (0, 0) {
            return cval;
        }
        client.set(0, &[(CTL, 0)]);
    }
}

#[test]
fn every_phase_change_is_told_with_the_new_phase_and_the_epoch() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    post(&mut client, 8);
    let told = |client: &mut Client, phase, epoch| {
        let event = client.event();
        assert_eq!(event.what(), CHANGED(phase));
        assert_eq!((event.cval, event.epoch), (0, epoch));
    };
    client.resume();
    told(&mut client, phase::RUNNING, 1);
    client.pause();
    told(&mut client, phase::PAUSED, 1);
    client.restore_begin(1, restore::AUTORUN);
    told(&mut client, phase::RESTORING, 2);
    // No change of phase, no event.
    client.restore_begin(1, restore::AUTORUN);
    client.no_event();
    client.bring(0, 1);
    client.restore_done(0);
    told(&mut client, phase::RUNNING, 3);
    client.pause();
    told(&mut client, phase::PAUSED, 3);
    client.restore_begin(1, 0);
    told(&mut client, phase::RESTORING, 4);
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    told(&mut client, phase::PAUSED, 4);
    client.pause();
    client.no_event();
}

#[test]
fn a_timer_that_falls_due_is_told_once_with_its_cval_and_a_count_at_or_past_it() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.set(0, &[(CNT, 0), (PCNT, 0)]);
    client.set(1, &[(CTL, 1), (CVAL, 5 * MS)]);
    client.set(0, &[(PCTL, 1), (PCVAL, 10 * MS)]);
    post(&mut client, 6);
    client.resume();
    let mut told = Vec::new();
    while told.len() < 2 {
        let event = client.event();
        if event.kind == TIMER_ASSERTED {
            assert!(event.count >= event.cval);
            assert_eq!(event.epoch, 1);
            told.push((event.what(), event.cval));
        }
    }
    assert_eq!(told, [(ASSERTED(0, 1), 5 * MS), (ASSERTED(1, 0), 10 * MS)]);
    client.no_event();
    assert_eq!(client.get_one(1, CTL), 5);
}

#[test]
fn timers_are_told_in_the_order_in_which_they_fall_due() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 20);
    client.set(0, &[(CNT, 0)]);
    for vcpu in 0..20 {
        let due = (20 - u64::from(vcpu)) * MS;
        client.set(vcpu, &[(CTL, 1), (CVAL, due)]);
    }
    resume(&mut client);
    post(&mut client, 20);
    for vcpu in (0..20).rev() {
        assert_eq!(client.event().what(), ASSERTED(0, vcpu));
    }
    client.no_event();
}

#[test]
fn a_line_that_stands_high_at_the_change_to_running_is_told() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    client.set(0, &[(CNT, 100), (PCNT, 100), (CTL, 1), (CVAL, 100)]);
    client.set(1, &[(PCTL, 1), (PCVAL, 0)]);
    // Not this one's: masked; nor this: disabled.
    client.set(2, &[(CTL, 3), (CVAL, 0), (PCTL, 0), (PCVAL, 0)]);
    post(&mut client, 8);
    client.no_event();
    client.resume();
    assert_eq!(client.event().what(), CHANGED(phase::RUNNING));
    let mut told = [client.event().what(), client.event().what()];
    told.sort_unstable();
    assert_eq!(told, [ASSERTED(0, 0), ASSERTED(1, 1)]);
    client.no_event();
}

#[test]
fn only_running_emits_timer_asserted() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    post(&mut client, 8);
    // PAUSED with the clocks counting past the compare value.
    client.vm(op::SET_COUNTER_OFFSET, &words(&[0, 0])).ok(0);
    let now = client.info().host_count;
    client.set(0, &[(CTL, 1), (CVAL, now + MS)]);
    while client.info().host_count < now + 2 * MS {}
    client.no_event();
    client.restore_begin(1, 0);
    assert_eq!(client.event().what(), CHANGED(phase::RESTORING));
    client.no_event();
}

#[test]
fn a_masked_or_disabled_timer_never_fires_and_unmasking_is_answered_in_lines() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.set(0, &[(CNT, 0), (CTL, 3), (CVAL, MS)]);
    client.set(1, &[(CTL, 2), (CVAL, MS)]);
    resume(&mut client);
    post(&mut client, 4);
    while client.get_one(0, CNT) < 2 * MS {}
    client.no_event();
    // The line rises by the write, not by the passing of time: its answer says so.
    assert_eq!(client.set(0, &[(CTL, 1)]), (1, 0));
    client.no_event();
}

#[test]
fn a_timer_can_be_armed_again_and_again_and_is_told_once_each_time() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    resume(&mut client);
    for _ in 0..20 {
        client.post_event_buffer();
        let cval = arm_ahead(&mut client, MS);
        let event = client.event();
        assert_eq!((event.what(), event.cval), (ASSERTED(0, 0), cval));
        // As a guest's handler would.
        client.set(0, &[(CTL, 3)]);
    }
    client.post_event_buffer();
    client.no_event();
}

#[test]
fn a_reprogrammed_timer_fires_at_the_second_value_alone() {
    let rig = Rig::launch(&[]);
    // Later and then earlier, and the reverse.
    for (first, second) in [(10_000, 10), (200, 250)] {
        let mut client = configured(&rig, 1);
        client.set(0, &[(CNT, 0)]);
        resume(&mut client);
        post(&mut client, 40);
        loop {
            let former = arm_ahead(&mut client, first * MS);
            let cval = arm_ahead(&mut client, second * MS);
            if client.get_one(0, CNT) < former {
                // In time, so only the second counts.
                assert_eq!(client.event().cval, cval);
                client.no_event();
                break;
            }
            client.set(0, &[(CTL, 0)]);
            client.settle();
            while client.driver.used_already(0).is_some() {}
        }
        client.reset_and_leave();
    }
}

#[test]
fn with_no_buffer_posted_an_event_waits_one_per_vcpu_and_timer() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.set(0, &[(CNT, 0), (PCNT, 0)]);
    resume(&mut client);
    for _ in 0..3 {
        client.pause();
        // The former rise is over before the next.
        let due = client.get_one(0, CNT) + MS;
        for vcpu in 0..2 {
            client.set(vcpu, &[(CTL, 1), (CVAL, due), (PCTL, 1), (PCVAL, 2 * due)]);
        }
        client.resume();
        for vcpu in 0..2 {
            while client.get(vcpu, &[CTL, PCTL]) != [5, 5] {}
        }
        client.settle();
    }
    client.post_event_buffer();
    assert_eq!(client.event().what(), CHANGED(phase::RUNNING));
    post(&mut client, 5);
    let mut told: Vec<_> = (0..4).map(|_| client.event().what()).collect();
    told.sort_unstable();
    let mut wanted: Vec<_> = (0..2)
        .flat_map(|vcpu| [ASSERTED(0, vcpu), ASSERTED(1, vcpu)])
        .collect();
    wanted.sort_unstable();
    assert_eq!(told, wanted);
    client.no_event();
}

#[test]
fn a_waiting_event_is_dropped_if_the_line_fell_meanwhile() {
    let rig = Rig::launch(&[]);
    for lower in [(CTL, 0), (CTL, 3), (CVAL, u64::MAX)] {
        let mut client = configured(&rig, 1);
        client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
        resume(&mut client);
        while client.get_one(0, CTL) != 5 {}
        client.settle();
        client.set(0, &[lower]);
        post(&mut client, 1);
        client.no_event();
        client.reset_and_leave();
    }
}

#[test]
fn a_due_timer_is_not_lost_over_pause_and_resume() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, 3 * MS)]);
    resume(&mut client);
    for _ in 0..5 {
        client.pause();
        client.resume();
    }
    // The buffers come late, and tell of the newest phase first or not at all.
    post(&mut client, 3);
    let event = asserted(&mut client);
    assert_eq!(event.what(), ASSERTED(0, 0));
    // Told before a pause and still high: stood high at the change to RUNNING, so told again.
    client.pause();
    client.resume();
    post(&mut client, 3);
    assert_eq!(asserted(&mut client).what(), ASSERTED(0, 0));
}

#[test]
fn a_timer_that_falls_due_while_the_clocks_count_through_a_pause_is_told_on_resume() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, 2 * MS)]);
    resume(&mut client);
    client.vm(op::PAUSE, &pause_body(1)).ok(40);
    while client.get_one(0, CTL) != 5 {}
    client.resume();
    post(&mut client, 3);
    assert_eq!(asserted(&mut client).what(), ASSERTED(0, 0));
}

#[test]
fn a_due_timer_is_not_lost_over_a_restore() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    post(&mut client, 8);
    client.restore_begin(2, restore::AUTORUN);
    client.set(0, &[(CTL, 1), (CVAL, 50), (CNT, 10)]);
    // Due only by the other's count.
    client.set(1, &[(CTL, 0), (CVAL, 0), (CNT, 60)]);
    client.restore_done(0);
    client.restore_done(1);
    assert_eq!(asserted(&mut client).what(), ASSERTED(0, 0));
    client.no_event();
}

#[test]
fn a_due_timer_is_not_lost_over_a_reconnect() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    client.set(1, &[(CTL, 1), (CVAL, 40 * MS)]);
    resume(&mut client);
    while client.get_one(0, CTL) != 5 {}
    // One is due and was not told; the other falls due with nobody there.
    drop(client);
    let mut client = Client::connect(&rig);
    while client.get_one(1, CTL) != 5 {}
    post(&mut client, 4);
    let mut told = [asserted(&mut client).what(), asserted(&mut client).what()];
    told.sort_unstable();
    assert_eq!(told, [ASSERTED(0, 0), ASSERTED(0, 1)]);
}

#[test]
fn an_event_that_a_lost_frontend_may_not_have_read_is_told_again() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    resume(&mut client);
    client.post_event_buffer();
    assert_eq!(client.event().what(), ASSERTED(0, 0));
    drop(client);
    let mut client = Client::connect(&rig);
    client.post_event_buffer();
    assert_eq!(asserted(&mut client).what(), ASSERTED(0, 0));
}

#[test]
fn a_due_timer_is_not_lost_over_a_stop_of_the_event_queue() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    resume(&mut client);
    client.driver.stop(0);
    while client.get_one(0, CTL) != 5 {}
    client.driver.start(0);
    client.post_event_buffer();
    assert_eq!(client.event().what(), ASSERTED(0, 0));
}

#[test]
fn a_buffer_under_32_bytes_comes_back_empty_and_the_event_waits_for_the_next() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for room in [0, 1, 31] {
        client.resume();
        let head = client.driver.submit(0, &[0; 4], room, &Layout::plain());
        let used = client.driver.used(0);
        assert_eq!((used.head, used.len), (head, 0));
        client.post_event_buffer();
        assert_eq!(client.event().what(), CHANGED(phase::RUNNING));
        client.post_event_buffer();
        client.pause();
        assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    }
}

#[test]
fn an_event_takes_32_bytes_of_a_larger_buffer_cut_anywhere() {
    use vhost_user_timer_kit::raw_driver::Cut;
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for layout in [
        Layout::plain(),
        Layout::cut(Cut::every(1)),
        Layout::cut(Cut::at(&[3, 0, 7])).indirect(),
    ] {
        client.driver.submit(0, &[], 64, &layout);
        client.resume();
        let used = client.driver.used(0);
        assert_eq!(used.len, 32);
        assert_eq!(Event::of(&used).what(), CHANGED(phase::RUNNING));
        client.driver.submit(0, &[], 64, &layout);
        client.pause();
        assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    }
}

#[test]
fn thousands_of_timers_due_at_once_are_all_told() {
    let rig = Rig::launch(&["--max-vcpus=4096"]);
    let mut client = Client::connect_with(
        &rig,
        Setup {
            size: 1024,
            ..Setup::default()
        },
    );
    client.configure(4096);
    for vcpu in 0..4096 {
        client.set(vcpu, &[(CTL, 1)]);
    }
    client.resume();
    let mut told = vec![0; 4096];
    let mut phases = 0;
    while told.iter().sum::<u32>() < 4096 {
        post(&mut client, 1);
        let event = client.event();
        match event.kind {
            TIMER_ASSERTED => told[event.vcpu as usize] += 1,
            _ => phases += 1,
        }
    }
    assert!(told.iter().all(|n| *n == 1) && phases == 1);
    post(&mut client, 1);
    client.no_event();
}

#[test]
fn after_reset_device_nothing_of_the_old_vm_is_told() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CTL, 1)]);
    client.resume();
    client.reset_and_leave();
    let mut client = Client::connect(&rig);
    post(&mut client, 2);
    client.no_event();
    client.configure(1);
    assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    client.no_event();
}
