//! Phases and epochs (SPEC.md, "Phases").

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Run, VM, configure_body, op, pause_body, phase, request, restore,
    restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::Rig;

#[test]
fn a_vm_begins_new_in_epoch_1_without_vcpus() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!((info.version, info.phase, info.epoch), (1, phase::NEW, 1));
    assert_eq!((info.vcpus, info.restored, info.flags), (0, 0, 0));
    assert_eq!((info.max_vcpus, info.request_queues), (512, 1));
}

#[test]
fn configure_vm_leads_from_new_to_paused_with_virtual_count_0_and_physical_offset_0() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(4);
    let info = client.info();
    assert_eq!(
        (info.phase, info.vcpus, info.restored),
        (phase::PAUSED, 4, 4)
    );
    // Frozen at 0, so the offset is the whole host counter.
    assert_eq!((info.cntvoff, info.cntpoff), (info.host_count, 0));
    assert_eq!(client.state().virt_count, 0);
    assert_eq!(info.epoch, 1);
}

#[test]
fn configuring_again_with_the_same_values_is_fine_in_any_phase() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    let same = |client: &mut Client| {
        let frequency = client.info().frequency;
        for frequency in [0, frequency] {
            let body = configure_body(3, 1, frequency);
            client.vm(op::CONFIGURE_VM, &body).ok(0);
        }
    };
    same(&mut client);
    same(&mut client);
    client.resume();
    same(&mut client);
    assert_eq!(client.info().phase, phase::RUNNING);
    client.pause();
    client.restore_begin(3, 0);
    same(&mut client);
    assert_eq!(client.info().phase, phase::RESTORING);
}

#[test]
fn configuring_again_with_other_values_is_ebusy() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(3);
    for body in [
        configure_body(2, 0, 0),
        configure_body(3, 1, 0),
        configure_body(3, 0, 1000),
        configure_body(0, 0, 0),
        configure_body(3, 9, 0),
    ] {
        let answer = client.vm(op::CONFIGURE_VM, &body);
        assert_eq!(answer.outcome(), (status::EBUSY, phase::PAUSED));
    }
    assert_eq!(client.info().vcpus, 3);
}

#[test]
fn a_vm_that_the_backend_cannot_be_is_einval() {
    let rig = Rig::launch(&["--max-vcpus=8", "--counter-frequency=1000000"]);
    let mut client = Client::connect(&rig);
    for body in [
        configure_body(0, 0, 0),
        configure_body(9, 0, 0),
        configure_body(u32::MAX, 0, 0),
        configure_body(1, 2, 0),
        configure_body(1, 255, 0),
        configure_body(1, 0, 999_999),
    ] {
        assert_eq!(
            client.vm(op::CONFIGURE_VM, &body).outcome(),
            (status::EINVAL, 0)
        );
        assert_eq!(client.info().phase, phase::NEW);
    }
    for at in 5..8 {
        let mut body = configure_body(1, 0, 0);
        body[at] = 1;
        assert_eq!(
            client.vm(op::CONFIGURE_VM, &body).outcome(),
            (status::EINVAL, 0)
        );
    }
    client
        .vm(op::CONFIGURE_VM, &configure_body(8, 0, 1_000_000))
        .ok(0);
}

#[test]
fn frequency_0_is_the_backends_and_another_is_taken_where_it_is_free() {
    for (args, asked, got) in [
        (&[][..], 0, 1_000_000_000),
        (&[], 62_500_000, 62_500_000),
        (&["--counter-frequency=24000000"], 0, 24_000_000),
        (&["--counter-frequency=24000000"], 24_000_000, 24_000_000),
    ] {
        let rig = Rig::launch(args);
        let mut client = Client::connect(&rig);
        let body = configure_body(1, 0, asked);
        client.vm(op::CONFIGURE_VM, &body).ok(0);
        assert_eq!(client.info().frequency, got);
        assert_eq!(client.state().frequency, got);
    }
}

#[test]
fn resume_and_pause_go_between_paused_and_running() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    for _ in 0..3 {
        client.resume();
        assert_eq!(client.info().phase, phase::RUNNING);
        client.pause();
        assert_eq!(client.info().phase, phase::PAUSED);
    }
    assert_eq!(client.info().epoch, 1);
}

#[test]
fn pausing_a_paused_vm_changes_nothing() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.set(0, &[(CNT, 50)]);
    for flags in [0, 1, 0] {
        let run = Run::of(client.vm(op::PAUSE, &pause_body(flags)).ok(40));
        assert_eq!(run.virt_count, 50);
    }
    assert_eq!(client.info().phase, phase::PAUSED);
}

#[test]
fn resuming_a_running_vm_changes_nothing() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    let first = client.resume();
    let second = client.resume();
    assert_eq!(first.cntvoff, second.cntvoff);
    assert!(second.virt_count >= first.virt_count);
}

#[test]
fn unknown_pause_flags_and_a_reserved_half_are_einval() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.resume();
    for word in [2, 3, 1 << 31, 1 << 32, u64::MAX] {
        let answer = client.vm(op::PAUSE, &words(&[word]));
        assert_eq!(answer.outcome(), (status::EINVAL, 0), "{word:#x}");
    }
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn pause_and_resume_while_restoring_are_ebusy() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, 0);
    let pause = client.vm(op::PAUSE, &pause_body(0));
    assert_eq!(pause.outcome(), (status::EBUSY, 2));
    assert_eq!(client.vm(op::RESUME, &[]).outcome(), (status::EBUSY, 2));
}

#[test]
fn the_last_restore_done_leads_to_paused_or_with_autorun_to_running() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    for (flags, end) in [(0, phase::PAUSED), (restore::AUTORUN, phase::RUNNING)] {
        client.restore_begin(2, flags);
        client.bring(1, 9);
        assert_eq!(client.restore_done(1), 1);
        assert_eq!(client.info().phase, phase::RESTORING);
        client.bring(0, 9);
        assert_eq!(client.restore_done(0), 0);
        assert_eq!(client.info().phase, end);
    }
}

#[test]
fn restore_abort_puts_the_state_from_before_the_restore_back() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.set(0, &[(CTL, 1), (CVAL, 100), (CNT, 40)]);
    client.set(1, &[(CTL, 2), (CVAL, 200)]);
    let before = (client.info().at_rest(), client.state().at_rest(false));
    for _ in 0..2 {
        let epoch = client.restore_begin(2, 0);
        client.set(0, &[(CTL, 3), (CVAL, 1), (CNT, 7)]);
        client.bring(1, 8);
        client.restore_done(1);
        // Abort after a second begin is an abort of both.
        client.restore_begin(2, 0);
        client.set(1, &[(CTL, 1), (CVAL, 2), (CNT, 9)]);
        client.vm(op::RESTORE_ABORT, &[]).ok(0);
        let mut info = client.info().at_rest();
        assert_eq!(info.epoch, epoch + 1);
        info.epoch = before.0.epoch;
        assert_eq!(info, before.0);
        assert_eq!(client.state().at_rest(false), before.1);
    }
}

#[test]
fn restore_begin_again_keeps_nothing_of_the_old_epoch() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, restore::AUTORUN);
    client.bring(0, 5);
    client.restore_done(0);
    client.bring(1, 5);
    client.restore_begin(2, 0);
    assert_eq!(client.info().restored, 0);
    for vcpu in 0..2 {
        // CTL, CNT and CVAL are missing once more.
        let done = client.vcpu(op::RESTORE_DONE, vcpu, &[]);
        assert_eq!(done.outcome(), (status::ENODATA, 7));
        client.bring(vcpu, 3);
        client.restore_done(vcpu);
    }
    // AUTORUN was the old one's.
    assert_eq!(client.info().phase, phase::PAUSED);
    assert_eq!(client.get_one(0, CNT), 3);
}

#[test]
fn the_epoch_grows_by_one_at_every_restore_begin_and_by_nothing_else() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.resume();
    client.pause();
    client.vm(op::SET_COUNTER_OFFSET, &words(&[1, 0])).ok(0);
    assert_eq!(client.info().epoch, 1);
    for epoch in 2..6 {
        assert_eq!(client.restore_begin(1, 0), epoch);
    }
    let refused = client.vm(op::RESTORE_BEGIN, &restore_body(2, 0, 0, 0));
    assert_eq!(refused.outcome(), (status::EINVAL, 0));
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(client.info().epoch, 5);
    drop(client);
    assert_eq!(Client::connect(&rig).info().epoch, 5);
}

#[test]
fn a_request_of_an_epoch_that_is_over_does_nothing() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    let old = client.restore_begin(1, 0);
    client.bring(0, 1);
    client.restore_begin(1, 0);
    client.bring(0, 2);
    let done = client.raw(&request(op::RESTORE_DONE, 0, old, &[]), 24);
    assert_eq!(done.outcome(), (status::ESTALE, 0));
    let abort = client.raw(&request(op::RESTORE_ABORT, VM, old, &[]), 24);
    assert_eq!(abort.outcome(), (status::ESTALE, 0));
    assert_eq!(client.info().phase, phase::RESTORING);
    assert_eq!(client.restore_done(0), 0);
}

#[test]
fn operations_are_refused_in_the_phases_that_the_contract_leaves_out() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    let refused = |client: &mut Client, op, body: &[u8], detail| {
        let answer = client.vm(op, body);
        assert_eq!(answer.outcome(), (status::EBUSY, detail), "{op:#x}");
    };
    let offset = words(&[5, 0]);
    for op in [op::SET_VM, op::RESTORE_ABORT] {
        refused(&mut client, op, &[], phase::PAUSED);
    }
    let done = client.vcpu(op::RESTORE_DONE, 0, &[]);
    assert_eq!(done.outcome(), (status::EBUSY, phase::PAUSED));
    client.resume();
    for op in [op::SET_VM, op::RESTORE_ABORT] {
        refused(&mut client, op, &[], phase::RUNNING);
    }
    for op in [op::SET_COUNTER_OFFSET, op::SET_COUNTER_ANCHOR] {
        refused(&mut client, op, &offset, phase::RUNNING);
    }
    let begin = restore_body(1, 0, 0, 0);
    refused(&mut client, op::RESTORE_BEGIN, &begin, phase::RUNNING);
    client.pause();
    client.restore_begin(1, 0);
    refused(&mut client, op::SET_COUNTER_ANCHOR, &offset, 1);
}
