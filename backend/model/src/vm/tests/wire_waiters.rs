//! WAIT_RUN: who is answered when, and that all are told the same.

use vhost_user_timer_protocol::wire::restore_flags::AUTORUN;
use vhost_user_timer_protocol::{Phase, Status, wire};

use super::rig::{Ask, HZ, Rig};
use crate::vm::{Notice, Released, Token};

fn header(status: Status, detail: u32, epoch: u64) -> wire::ResponseHeader {
    wire::ResponseHeader {
        status: status.errno().into(),
        detail: detail.into(),
        epoch: epoch.into(),
    }
}

fn refused_waiters(waiters: Vec<Token>, status: Status, detail: u32, epoch: u64) -> Released {
    Released {
        waiters,
        header: header(status, detail, epoch),
        run: None,
    }
}

#[test]
fn in_running_wait_run_is_answered_at_once_with_one_instant() {
    let mut rig = Rig::running(2);
    rig.pass(10);
    let run: wire::Run = rig.done(&Ask::wait_run(1)).read();
    let info = rig.info();
    assert_eq!(run.virt_count.get(), 10);
    assert_eq!(run.host_count.get(), rig.now.host);
    assert_eq!(run.cntvoff.get(), info.cntvoff.get());
    assert_eq!(run.cntpoff.get(), 0);
}

#[test]
fn waiters_of_all_queues_and_vcpus_are_answered_with_one_and_the_same_run() {
    let mut rig = Rig::restoring(3, AUTORUN);
    let mut waiters = Vec::new();
    for vcpu in 0..3 {
        for queue in 1..=2 {
            waiters.push(rig.wait(&Ask::wait_run(vcpu).on_queue(queue)));
            rig.pass(7);
        }
    }
    for vcpu in 0..3 {
        assert_eq!(rig.released(), [], "before the last vCPU is done");
        rig.bring(vcpu, 100 + u64::from(vcpu));
        rig.restored(vcpu);
    }
    let [released] = rig.released().try_into().unwrap();
    assert_eq!(released.waiters, waiters);
    assert_eq!(released.header, header(Status::Ok, 0, rig.vm.epoch()));
    let run = released.run.unwrap();
    assert_eq!(run.virt_count.get(), 102);
    assert_eq!(run.host_count.get(), rig.now.host);
    // A vCPU that asks later is told the same offsets.
    rig.pass(50);
    let later: wire::Run = rig.done(&Ask::wait_run(0)).read();
    assert_eq!((later.cntvoff, later.cntpoff), (run.cntvoff, run.cntpoff));
    assert_eq!(later.virt_count.get(), 152);
}

#[test]
fn a_wait_in_paused_is_answered_by_resume() {
    let mut rig = Rig::paused(2);
    let waiter = rig.wait(&Ask::wait_run(0));
    rig.pass(5);
    let run = rig.resume();
    let expected = Released {
        waiters: vec![waiter],
        header: header(Status::Ok, 0, 1),
        run: Some(run),
    };
    assert_eq!(rig.released(), [expected]);
}

#[test]
fn without_autorun_waiters_wait_on_until_resume() {
    let mut rig = Rig::restoring(1, 0);
    let waiter = rig.wait(&Ask::wait_run(0));
    rig.bring(0, 5);
    rig.restored(0);
    assert_eq!(rig.released(), []);
    rig.resume();
    assert_eq!(rig.released()[0].waiters, [waiter]);
}

#[test]
fn a_waiter_is_answered_once() {
    let mut rig = Rig::paused(1);
    rig.wait(&Ask::wait_run(0));
    rig.resume();
    assert_eq!(rig.released().len(), 1);
    rig.pause();
    rig.resume();
    assert_eq!(rig.released(), []);
}

#[test]
fn restore_begin_answers_older_waiters_estale_in_the_new_epoch() {
    for phase in [Phase::Paused, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let waiters = vec![
            rig.wait(&Ask::wait_run(0)),
            rig.wait(&Ask::wait_run(1).on_queue(2)),
        ];
        rig.done(&Ask::begin(2, 0));
        let expected = refused_waiters(waiters, Status::Stale, 0, rig.vm.epoch());
        assert_eq!(rig.released(), [expected]);
    }
}

#[test]
fn restore_abort_answers_waiters_ecanceled() {
    let mut rig = Rig::restoring(2, AUTORUN);
    let waiters = vec![rig.wait(&Ask::wait_run(1)), rig.wait(&Ask::wait_run(0))];
    rig.done(&Ask::abort());
    let expected = refused_waiters(waiters, Status::Canceled, 0, rig.vm.epoch());
    assert_eq!(rig.released(), [expected]);
}

#[test]
fn stopping_a_queue_cancels_the_waiters_of_that_queue_alone_in_every_phase_that_has_any() {
    for phase in [Phase::Paused, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 3);
        let on_one = [rig.wait(&Ask::wait_run(0)), rig.wait(&Ask::wait_run(1))];
        let on_two = rig.wait(&Ask::wait_run(2).on_queue(2));
        let last = rig.wait(&Ask::wait_run(2));
        rig.vm.cancel_queue(3, &mut rig.effects);
        assert_eq!(rig.released(), [], "nobody waits on this one");
        rig.vm.cancel_queue(1, &mut rig.effects);
        let canceled = vec![on_one[0], on_one[1], last];
        let expected = refused_waiters(canceled, Status::Canceled, 0, rig.vm.epoch());
        assert_eq!(rig.released(), [expected]);
        rig.vm.cancel_queue(1, &mut rig.effects);
        assert_eq!(rig.released(), []);
        rig.done(&Ask::begin(3, 0));
        assert_eq!(rig.released()[0].waiters, [on_two]);
    }
}

#[test]
fn a_disconnect_drops_the_waiters_and_changes_nothing_else() {
    for phase in [Phase::Paused, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let before = rig.vm.clone();
        rig.wait(&Ask::wait_run(0));
        rig.vm.disconnect(rig.now);
        assert_eq!(rig.vm, before);
        rig.vm.cancel_queue(1, &mut rig.effects);
        assert_eq!(rig.released(), []);
    }
}

#[test]
fn a_reset_drops_the_waiters() {
    let mut rig = Rig::paused(1);
    rig.wait(&Ask::wait_run(0));
    rig.reset();
    rig.done(&Ask::configure(1, 0, 0));
    rig.resume();
    assert_eq!(rig.released(), []);
}

#[test]
fn when_the_time_out_passes_waiters_are_answered_etimedout_and_the_missing_logged() {
    let mut rig = Rig::paused(4);
    rig.done(&Ask::begin_with(4, AUTORUN, 0, 2 * HZ));
    rig.notices();
    let waiters = vec![rig.wait(&Ask::wait_run(0)), rig.wait(&Ask::wait_run(3))];
    rig.bring(2, 5);
    rig.restored(2);
    assert_eq!(rig.vm.ticks_to_next(rig.now), Some(2 * HZ));
    rig.pass(2 * HZ - 1);
    assert_eq!(rig.vm.ticks_to_next(rig.now), Some(1));
    assert_eq!((rig.released(), rig.notices()), (vec![], vec![]));
    rig.pass(1);
    let expected = refused_waiters(waiters, Status::TimedOut, 3, rig.vm.epoch());
    assert_eq!(rig.released(), [expected]);
    let notice = Notice::RestoreTimedOut {
        missing: vec![0, 1, 3],
        vcpus: 4,
    };
    assert_eq!(rig.notices(), [notice]);
}

#[test]
fn after_the_time_out_the_restore_stays_open_and_later_waits_wait_on() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, AUTORUN, 0, HZ));
    rig.pass(5 * HZ);
    assert_eq!(rig.vm.phase(), Phase::Restoring);
    let waiter = rig.wait(&Ask::wait_run(0));
    rig.pass(500 * HZ);
    assert_eq!(rig.released(), []);
    assert_eq!(rig.vm.ticks_to_next(rig.now), None);
    rig.bring(0, 5);
    rig.restored(0);
    let released = rig.released();
    assert_eq!(released[0].waiters, [waiter]);
    assert_eq!(released[0].run.unwrap().virt_count.get(), 5);
}

#[test]
fn a_restore_begun_again_has_its_own_time_out() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, 0, 0, HZ));
    rig.pass(HZ - 1);
    rig.done(&Ask::begin_with(1, 0, 0, HZ));
    let waiter = rig.wait(&Ask::wait_run(0));
    rig.pass(HZ - 1);
    assert_eq!(rig.released(), []);
    rig.pass(1);
    assert_eq!(rig.released()[0].waiters, [waiter]);
}

#[test]
fn without_a_time_out_waiters_wait_for_ever() {
    let mut rig = Rig::restoring(1, 0);
    rig.wait(&Ask::wait_run(0));
    assert_eq!(rig.vm.ticks_to_next(rig.now), None);
    rig.pass(u64::MAX / 2);
    assert_eq!(rig.released(), []);
}

#[test]
fn the_longest_time_out_is_no_time_out_at_once() {
    let mut rig = Rig::new();
    rig.done(&Ask::configure(1, 0, 10_000_000_000));
    rig.done(&Ask::begin_with(1, 0, 0, u64::MAX));
    rig.wait(&Ask::wait_run(0));
    rig.pass(u64::MAX / 2);
    assert_eq!(rig.released(), []);
}

#[test]
fn a_time_out_shorter_than_a_tick_has_not_passed_at_once() {
    let mut rig = Rig::new();
    rig.done(&Ask::configure(1, 0, 1));
    rig.done(&Ask::begin_with(1, 0, 0, HZ + 1));
    rig.wait(&Ask::wait_run(0));
    rig.pass(1);
    assert_eq!(
        rig.released(),
        [],
        "a second has passed, not a second and more"
    );
    rig.pass(1);
    assert_eq!(rig.released().len(), 1);
}

#[test]
fn the_last_restore_done_after_the_time_out_still_completes_the_restore() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, AUTORUN, 0, HZ));
    rig.bring(0, 5);
    let waiter = rig.wait(&Ask::wait_run(0));
    // The VM hears of the time only with this request.
    rig.drift(2 * HZ);
    rig.restored(0);
    assert_eq!(rig.vm.phase(), Phase::Running);
    let expected = refused_waiters(vec![waiter], Status::TimedOut, 1, rig.vm.epoch());
    assert_eq!(rig.released(), [expected]);
}
