//! What was in flight when the connection was lost: each request is carried out, and answered,
//! once.

use super::options;
use super::tell;
use crate::LONG;
use crate::SHORT;
use crate::fake;
use crate::fake::echo;
use crate::fake::model::Lost;
use crate::fake::model::Rig;
use crate::fake::model::VCPUS;
use crate::fake::run_of;
use crate::fake::saved_vcpu;
use crate::restore::saved;
use std::collections::HashSet;
use std::sync::mpsc::channel;
use std::thread::ScopedJoinHandle;
use std::thread::scope;
use vhost_user_timer_frontend::Abi;
use vhost_user_timer_frontend::Deadline;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Op;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::RegValue;
use vhost_user_timer_frontend::RequestQueue;
use vhost_user_timer_frontend::RestoreOptions;
use vhost_user_timer_frontend::Status;
use vhost_user_timer_frontend::VmOptions;
use vhost_user_timer_reference::contract::{CNT, CTL, CVAL};

type Outcome = Result<u32, Error>;
type Ask = fn(&RequestQueue) -> Outcome;

/// The operations that change the VM, as a vCPU's or the VMM's main thread asks for them.
const WRITES: [(Op, Phase, &[u32], Ask); 8] = [
    (Op::ConfigureVm, Phase::Paused, &[], |queue| {
        queue.configure(VCPUS, Abi::Arm64, None, LONG).map(|()| 0)
    }),
    (Op::SetRegs, Phase::Paused, &[], |queue| {
        queue.set_regs(1, &[RegValue::new(CNT, 2)], LONG).map(|_| 0)
    }),
    (Op::SetVm, Phase::Restoring, &[], |queue| {
        queue.set_vm(&[saved_vcpu(1)], LONG).map(|()| 0)
    }),
    (Op::Pause, Phase::Running, &[], |queue| {
        queue.pause(LONG).map(|_| 0)
    }),
    (Op::Resume, Phase::Paused, &[], |queue| {
        queue.resume(LONG).map(|_| 0)
    }),
    (Op::RestoreBegin, Phase::Paused, &[], |queue| {
        let options = RestoreOptions::default();
        queue.restore_begin(options, LONG).map(|_| 0)
    }),
    (Op::RestoreDone, Phase::Restoring, &[0, 1, 2], |queue| {
        queue.restore_done(3, LONG)
    }),
    (Op::RestoreAbort, Phase::Restoring, &[], |queue| {
        queue.restore_abort(LONG).map(|()| 0)
    }),
];

#[test]
fn a_write_is_done_and_told_so_wherever_its_connection_was_lost() {
    for lost in [|_| Lost::Done, |_| Lost::Unseen] as [fn(Op) -> Lost; 2] {
        for (op, phase, done, ask) in WRITES {
            let (mut rig, frontend) = Rig::new(options());
            tell(&frontend, &rig, phase, done);
            let epoch = rig.vm.lock().unwrap().epoch();
            rig.lose(lost);
            let got = scope(|scope| {
                let asking = scope.spawn(|| ask(&frontend.queues()[1]));
                rig.fake.wait_for_held(1);
                rig.kill();
                rig.revive();
                asking.join().unwrap()
            });
            let way = lost(op);
            assert_eq!(got.unwrap_or_else(|e| panic!("{op} {way:?}: {e}")), 0);
            let vm = rig.vm.lock().unwrap();
            let known = matches!(op, Op::RestoreBegin | Op::RestoreAbort) && way == Lost::Done;
            assert_eq!(vm.count(op), if known { 1 } else { 2 }, "{op} {way:?}");
            let (phase, epoch) = match op {
                Op::Resume => (Phase::Running, epoch),
                Op::RestoreBegin => (Phase::Restoring, epoch + 1),
                Op::SetVm => (Phase::Restoring, epoch),
                _ => (Phase::Paused, epoch),
            };
            assert_eq!((vm.phase(), vm.epoch()), (phase, epoch), "{op} {way:?}");
        }
    }
}

#[test]
fn the_last_restore_done_may_have_set_the_vm_running() {
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Restoring, &[0, 1, 2]);
    rig.set_autorun(&[0, 1, 2]);
    rig.lose(|_| Lost::Done);
    let (done, run) = scope(|scope| {
        let done = scope.spawn(|| frontend.queue().restore_done(3, LONG));
        rig.fake.wait_for_held(1);
        let run = scope.spawn(|| frontend.queues()[1].wait_run(2, LONG));
        rig.fake.wait_for_held(2);
        rig.kill();
        rig.revive();
        (done.join().unwrap(), run.join().unwrap())
    });
    assert_eq!(done.unwrap(), 0);
    assert_eq!(run.unwrap().cntvoff, 1002);
    assert_eq!(rig.vm.lock().unwrap().phase(), Phase::Running);
}

#[test]
fn a_refusal_that_nothing_explains_away_stands() {
    let (mut rig, frontend) = Rig::new(options());
    // No restore is open, and none was.
    rig.lose(|_| Lost::Done);
    let refused = |done: ScopedJoinHandle<'_, Outcome>| match done.join().unwrap() {
        Err(Error::Refused(refusal)) => refusal.status,
        other => panic!("{other:?}"),
    };
    scope(|scope| {
        let queues = frontend.queues();
        let done = scope.spawn(|| queues[0].restore_done(3, LONG));
        let abort = scope.spawn(|| queues[1].restore_abort(LONG).map(|()| 0));
        rig.fake.wait_for_held(2);
        rig.kill();
        rig.revive();
        assert_eq!(refused(done), Status::Busy);
        assert_eq!(refused(abort), Status::Busy);
    });
}

/// Asks for a RESTORE_DONE of vCPU 3, by one operation or another.
const DONES: [(Op, Ask); 3] = [
    (Op::RestoreDone, |queue| queue.restore_done(3, LONG)),
    (Op::SetVm, |queue| queue.set_vm_done(&[saved_vcpu(3)], LONG)),
    (Op::SetRegs, |queue| {
        let done = queue.set_regs_done(3, &DUE, LONG)?;
        let lines = done
            .set
            .expect("the lines are asked for where they were lost");
        assert_eq!((lines.virtual_line, lines.physical_line), (true, false));
        Ok(done.remaining)
    }),
];

/// A virtual timer whose line stands high once its vCPU is settled.
const DUE: [RegValue; 3] = [
    RegValue::new(CTL, 1),
    RegValue::new(CVAL, 0),
    RegValue::new(CNT, 1),
];

#[test]
fn a_done_whose_answer_was_lost_is_done_whether_or_not_it_was_the_last() {
    for lost in [|_| Lost::Done, |_| Lost::Unseen] as [fn(Op) -> Lost; 2] {
        for ((op, ask), done) in DONES.into_iter().zip([&[0, 1, 2][..], &[0, 1]].repeat(3)) {
            let (mut rig, frontend) = Rig::new(options());
            tell(&frontend, &rig, Phase::Restoring, done);
            rig.lose(lost);
            let got = scope(|scope| {
                let asking = scope.spawn(|| ask(frontend.queue()));
                rig.fake.wait_for_held(1);
                rig.kill();
                rig.revive();
                asking.join().unwrap()
            });
            let last = done.len() == 3;
            let missing = got.unwrap_or_else(|error| panic!("{op}: {error}"));
            assert_eq!(missing, u32::from(!last), "{op}");
            let vm = rig.vm.lock().unwrap();
            let phase = match last {
                true => Phase::Paused,
                false => Phase::Restoring,
            };
            assert_eq!(vm.phase(), phase, "{op}");
            // Where the restore was complete by then, SET_REGS's lines are read again.
            let lines = last && op == Op::SetRegs && lost(op) == Lost::Done;
            assert_eq!(vm.count(op), if lines { 3 } else { 2 }, "{op}");
        }
    }
}

#[test]
fn the_last_done_may_have_armed_the_vm() {
    for lost in [|_| Lost::Done, |_| Lost::Unseen] as [fn(Op) -> Lost; 2] {
        let (mut rig, frontend) = Rig::confirming(options());
        let restore = frontend.restore(&saved(VCPUS), confirming()).unwrap();
        rig.lose(lost);
        scope(|scope| {
            let bringing = scope.spawn(|| restore.bring_all_back(LONG));
            rig.fake.wait_for_held(1);
            rig.kill();
            rig.revive();
            bringing.join().unwrap().unwrap();
        });
        assert_eq!(restore.missing(), [0; 0]);
        assert_eq!(rig.vm.lock().unwrap().phase(), Phase::Armed);
    }
}

#[test]
fn an_abort_in_armed_whose_answer_was_lost_is_done_once_and_no_vcpu_waits_on() {
    for lost in [Lost::Done, Lost::Unseen] {
        let (mut rig, frontend) = Rig::confirming(options());
        let restore = frontend.restore(&saved(VCPUS), confirming()).unwrap();
        restore.bring_all_back(LONG).unwrap();
        let mut part = restore.vcpu(0).unwrap();
        scope(|scope| {
            let waiting = scope.spawn(move || part.run(LONG));
            rig.fake.wait_for_held(1);
            rig.lose(match lost {
                Lost::Done => |_| Lost::Done,
                _ => |_| Lost::Unseen,
            });
            let dropping = scope.spawn(move || drop(restore));
            rig.fake.wait_for_held(2);
            rig.kill();
            rig.revive();
            dropping.join().unwrap();
            // The model answers no waiter.
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
        });
        let vm = rig.vm.lock().unwrap();
        let sent = if lost == Lost::Done { 1 } else { 2 };
        assert_eq!(
            (vm.phase(), vm.count(Op::RestoreAbort)),
            (Phase::Paused, sent)
        );
    }
}

fn confirming() -> RestoreOptions {
    RestoreOptions::default().vm(VmOptions::KVM)
}

#[test]
fn an_end_and_an_abort_at_once_are_uncertain() {
    let dones = DONES.map(|(_, done)| [(true, done), (false, done)]);
    for (done_first, done) in dones.into_iter().flatten() {
        let (mut rig, frontend) = Rig::new(options());
        tell(&frontend, &rig, Phase::Restoring, &[0, 1, 2]);
        rig.lose(|_| Lost::Done);
        scope(|scope| {
            let queues = frontend.queues();
            let abort: Ask = |queue| queue.restore_abort(LONG).map(|()| 0);
            let asks: [Ask; 2] = [done, abort];
            let first = scope.spawn(move || asks[usize::from(!done_first)](&queues[0]));
            rig.fake.wait_for_held(1);
            let second = scope.spawn(move || asks[usize::from(done_first)](&queues[1]));
            rig.fake.wait_for_held(2);
            rig.kill();
            rig.revive();
            for asked in [first, second] {
                let got = asked.join().unwrap();
                assert!(matches!(got, Err(Error::Uncertain(_))), "{got:?}");
            }
        });
    }
}

#[test]
fn a_write_with_a_change_of_phase_behind_it_is_uncertain() {
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Paused, &[]);
    rig.lose(|_| Lost::Done);
    let queue = frontend.queue();
    let set = queue
        .submit(&Operation::set_regs(0, &[RegValue::new(CNT, 2)]))
        .unwrap();
    let resume = queue.submit(&Operation::resume()).unwrap();
    queue.kick();
    rig.fake.wait_for_held(2);
    rig.kill();
    rig.revive();
    let set = set.wait(LONG).unwrap_err();
    assert!(matches!(set, Error::Uncertain(_)), "{set}");
    resume.wait(LONG).unwrap();
}

#[test]
fn what_was_meant_for_one_epoch_does_not_get_into_the_next() {
    // RESTORE_BEGIN is carried out and answered; the other requests were not seen.
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Restoring, &[0, 1, 2]);
    let epoch = rig.vm.lock().unwrap().epoch();
    rig.lose(|op| match op {
        Op::RestoreBegin => Lost::No,
        _ => Lost::Unseen,
    });
    let queues = frontend.queues();
    let done = queues[0].submit(&Operation::restore_done(3)).unwrap();
    let set = queues[0]
        .submit(&Operation::set_regs(3, &[RegValue::new(CNT, 2)]))
        .unwrap();
    let run = queues[0].submit(&Operation::wait_run(3)).unwrap();
    queues[0].kick();
    rig.fake.wait_for_held(3);
    queues[1]
        .restore_begin(RestoreOptions::default(), LONG)
        .unwrap();
    rig.kill();
    rig.revive();
    assert_eq!(done.wait(LONG).unwrap_err().status(), Some(Status::Stale));
    assert!(matches!(set.wait(LONG), Err(Error::Uncertain(_))));
    assert_eq!(run.wait(LONG).unwrap_err().status(), Some(Status::Stale));
    let vm = rig.vm.lock().unwrap();
    let again = &vm.log[vm.log.len() - 3..];
    assert!(again.iter().all(|(_, named)| *named == epoch), "{again:?}");
    assert_eq!((vm.epoch(), vm.writes), (epoch + 1, 0));
    assert_eq!(vm.done(), 0);
}

#[test]
fn a_whole_restore_in_one_batch_is_taken_up_where_it_was() {
    for lost_at in [Op::RestoreBegin, Op::SetVm, Op::RestoreDone] {
        let (mut rig, frontend) = Rig::new(options());
        // The first request of that kind is carried out and not answered; later ones are not seen.
        match lost_at {
            Op::RestoreBegin => rig.lose(|op| match op {
                Op::GetInfo => Lost::No,
                Op::RestoreBegin => Lost::Done,
                _ => Lost::Unseen,
            }),
            Op::SetVm => rig.lose(|op| match op {
                Op::GetInfo | Op::RestoreBegin => Lost::No,
                Op::SetVm => Lost::Done,
                _ => Lost::Unseen,
            }),
            _ => rig.lose(|op| match op {
                Op::GetInfo | Op::RestoreBegin | Op::SetVm => Lost::No,
                _ => Lost::Unseen,
            }),
        }
        let queue = frontend.queue();
        // From here on slots are no longer taken in the order of their numbers.
        for info in [(); 6].map(|()| queue.submit(&Operation::get_info()).unwrap()) {
            info.wait(LONG).unwrap();
        }
        let begin = Operation::restore_begin(VCPUS, RestoreOptions::default());
        let begin = queue.submit(&begin).unwrap();
        let vcpus = [0, 1, 2, 3].map(saved_vcpu);
        let set = queue.submit(&Operation::set_vm(&vcpus)).unwrap();
        let dones = [0, 1, 2, 3].map(|v| queue.submit(&Operation::restore_done(v)).unwrap());
        queue.kick();
        let answered = match lost_at {
            Op::RestoreBegin => 0,
            Op::SetVm => 1,
            _ => 2,
        };
        rig.fake.wait_for_held(6 - answered);
        rig.kill();
        rig.revive();
        begin.wait(LONG).unwrap();
        set.wait(LONG).unwrap();
        let remaining = dones.map(|done| done.wait(LONG).unwrap().0);
        assert_eq!(remaining, [3, 2, 1, 0]);
        let vm = rig.vm.lock().unwrap();
        assert_eq!(
            (vm.phase(), vm.epoch(), vm.count(Op::RestoreBegin)),
            (Phase::Paused, 8, 1)
        );
    }
}

#[test]
fn vcpu_threads_wait_through_outages_and_are_answered_once() {
    const WAITING: u32 = 48;
    let (mut rig, frontend) = Rig::with_vcpus(WAITING, options(), |_| {});
    scope(|scope| {
        let (send, answers) = channel();
        for vcpu in 0..WAITING {
            let (send, queue) = (send.clone(), frontend.queue_of(vcpu));
            scope.spawn(move || {
                let run = queue.wait_run(vcpu, Deadline::NEVER).unwrap();
                send.send((vcpu, run)).unwrap();
            });
        }
        let _end = fake::EndOfWaits(frontend.shutdown_handle());
        for _ in 0..5 {
            rig.fake.wait_for_held(WAITING as usize);
            rig.kill();
            rig.revive();
        }
        rig.fake.wait_for_held(WAITING as usize);
        assert!(answers.try_recv().is_err());
        rig.set(Phase::Running, &[]);
        rig.fake.release(echo);
        let mut answered = HashSet::new();
        for _ in 0..WAITING {
            let (vcpu, run) = answers.recv_timeout(LONG).unwrap();
            assert_eq!(run.cntvoff, run_of(vcpu).cntvoff.get());
            assert!(answered.insert(vcpu));
        }
    });
}

#[test]
fn an_answer_in_the_ring_is_not_asked_for_again() {
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Restoring, &[]);
    let queues = frontend.queues();
    let answered = queues[0].submit(&Operation::restore_done(0)).unwrap();
    queues[0].kick();
    rig.fake
        .wait_until(|_| rig.vm.lock().unwrap().count(Op::RestoreDone) == 1);
    rig.kill();
    rig.revive();
    // This call notices the loss.
    assert_eq!(queues[1].restore_done(1, LONG).unwrap(), 2);
    assert_eq!(answered.wait(LONG).unwrap().0, 3);
    assert_eq!(rig.vm.lock().unwrap().count(Op::RestoreDone), 2);
}

#[test]
fn a_waiter_learns_of_an_abort_whose_cancellation_was_lost() {
    for lost in [Lost::No, Lost::Done] {
        let (mut rig, frontend) = Rig::new(options());
        tell(&frontend, &rig, Phase::Restoring, &[]);
        let queues = frontend.queues();
        let run = queues[0].submit(&Operation::wait_run(1)).unwrap();
        queues[0].kick();
        rig.fake.wait_for_held(1);
        // The model answers no waiter: that is lost in any case.
        if lost == Lost::Done {
            rig.lose(|_| Lost::Done);
        }
        scope(|scope| {
            let abort = scope.spawn(|| queues[1].restore_abort(LONG));
            if lost == Lost::Done {
                rig.fake.wait_for_held(2);
            } else {
                rig.fake
                    .wait_until(|_| rig.vm.lock().unwrap().phase() == Phase::Paused);
                queues[1].info(LONG).unwrap();
            }
            rig.kill();
            rig.revive();
            abort.join().unwrap().unwrap();
        });
        assert_eq!(run.wait(LONG).unwrap_err().status(), Some(Status::Canceled));
        assert_eq!(rig.vm.lock().unwrap().count(Op::RestoreAbort), 1);
    }
}

#[test]
fn a_waiter_learns_of_an_abort_that_overtook_it_on_another_queue() {
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Restoring, &[]);
    let queues = frontend.queues();
    scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|vcpu| scope.spawn(move || queues[1].wait_run(vcpu, LONG)))
            .collect();
        rig.fake.wait_for_held(3);
        rig.kill();
        rig.revive();
        // The model answers no waiter, as a backend that gets the abort first.
        queues[0].restore_abort(LONG).unwrap();
        for waiting in waiting {
            let refused = waiting.join().unwrap().unwrap_err();
            assert_eq!(refused.status(), Some(Status::Canceled));
        }
    });
    // A thread that comes later takes over the same request.
    rig.fake
        .wait_until(|_| rig.vm.lock().unwrap().count(Op::WaitRun) == 6);
    for vcpu in 0..3 {
        let late = queues[1].wait_run(vcpu, SHORT);
        assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
    }
    queues[1].info(LONG).unwrap();
    assert_eq!(rig.vm.lock().unwrap().count(Op::WaitRun), 6);
}
