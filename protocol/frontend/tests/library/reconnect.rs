//! A backend that goes away and comes back.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::{ScopedJoinHandle, scope};
use std::time::{Duration, Instant};

use crate::fake;
use crate::fake::model::{Lost, Rig, VCPUS};
use crate::fake::{Fake, answer, echo, run_of, saved_vcpu, socket_path};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::{
    Connector, Deadline, Error, Event, Frontend, Operation, Options, Reconnect, RegValue,
    RequestQueue, RestoreOptions,
};
use vhost_user_timer_protocol::{Abi, Op, Phase, Status, wire};
use vhost_user_timer_reference::contract::CNT;
use zerocopy::IntoBytes;

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(1);

fn policy() -> Reconnect {
    Reconnect::default()
        .patience(LONG)
        .delays(SHORT, Duration::from_millis(10))
}

fn options() -> Options {
    Options::default().reconnect(policy())
}

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

/// Lets the frontend learn that a restore is open, as it is.
fn tell(frontend: &Frontend, rig: &Rig, phase: Phase, done: &[u32]) {
    if phase == Phase::Restoring {
        let begin = Operation::restore_begin(VCPUS, RestoreOptions::default());
        frontend.queue().perform(&begin, LONG).unwrap();
    }
    rig.set(phase, done);
    rig.vm.lock().unwrap().log.clear();
}

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

#[test]
fn an_end_and_an_abort_at_once_are_uncertain() {
    for done_first in [true, false] {
        let (mut rig, frontend) = Rig::new(options());
        tell(&frontend, &rig, Phase::Restoring, &[0, 1, 2]);
        rig.lose(|_| Lost::Done);
        scope(|scope| {
            let queues = frontend.queues();
            let asks: [Ask; 2] = [
                |queue| queue.restore_done(3, LONG),
                |queue| queue.restore_abort(LONG).map(|()| 0),
            ];
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
    assert_eq!(rig.vm.lock().unwrap().count(Op::WaitRun), 6);
}

#[test]
fn requests_of_the_outage_are_sent_as_they_are_when_it_ends() {
    let (mut rig, frontend) = Rig::new(options());
    rig.kill();
    let queue = frontend.queue();
    // This call notices the loss.
    assert!(matches!(queue.info(SHORT), Err(Error::TimedOut { .. })));
    let pause = queue.submit(&Operation::pause()).unwrap();
    // An abandoned request is not sent again.
    let resume = queue.submit(&Operation::resume()).unwrap();
    queue.kick();
    drop(resume);
    rig.revive();
    pause.wait(LONG).unwrap();
    queue.info(LONG).unwrap();
    let vm = rig.vm.lock().unwrap();
    assert_eq!((vm.count(Op::Resume), vm.count(Op::Pause)), (0, 1));
    assert!(vm.log.contains(&(Op::Pause, 0)));
}

#[test]
fn a_deadline_in_the_outage_is_kept_and_others_wait_on() {
    let (mut rig, frontend) = Rig::new(options());
    rig.kill();
    scope(|scope| {
        let patient = scope.spawn(|| frontend.queue().info(LONG));
        for _ in 0..20 {
            let late = frontend.queues()[1].wait_run(0, SHORT);
            assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
        }
        rig.revive();
        patient.join().unwrap().unwrap();
    });
    // Twenty turns were one request, which was abandoned.
    assert_eq!(rig.vm.lock().unwrap().count(Op::WaitRun), 0);
}

#[test]
fn patience_ends() {
    let patience = Duration::from_millis(50);
    let (mut rig, mut frontend) =
        Rig::new(Options::default().reconnect(policy().patience(patience)));
    let mut events = frontend.take_events().unwrap();
    let started = Instant::now();
    rig.kill();
    scope(|scope| {
        for vcpu in 0..8 {
            let queue = frontend.queue_of(vcpu);
            scope.spawn(move || {
                let error = queue.wait_run(vcpu, Deadline::NEVER).unwrap_err();
                assert!(matches!(error, Error::Disconnected), "{error}");
            });
        }
        scope.spawn(move || {
            let error = events.next(Deadline::NEVER).unwrap_err();
            assert!(matches!(error, Error::Disconnected), "{error}");
        });
    });
    assert!(started.elapsed() >= patience);
    assert!(matches!(frontend.config(), Err(Error::Disconnected)));
    assert!(matches!(frontend.keep_connected(), Error::Disconnected));
    assert!(matches!(
        frontend.queue().process(),
        Err(Error::Disconnected)
    ));
}

#[test]
fn a_backend_that_falls_over_every_request_is_given_up() {
    let patience = Duration::from_millis(400);
    let path = socket_path();
    let kill = Arc::new(Mutex::new(None::<vhost_user_backend::ShutdownHandle>));
    let (fall, killed) = (kill.clone(), path.clone());
    let fake = Arc::new(Fake::new(move |_| {
        if let Some(kill) = fall.lock().unwrap().take() {
            kill.shutdown();
        }
        None
    }));
    let over = AtomicBool::new(false);
    scope(|scope| {
        let (ready, first) = channel();
        let over = &over;
        let backend = scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let (thread, started) = fake::serve(fake.clone(), &killed);
                let _ = ready.send(());
                *kill.lock().unwrap() = started.recv().ok();
                thread.join().unwrap();
            }
        });
        first.recv().unwrap();
        let options = Options::default().reconnect(policy().patience(patience));
        let frontend = Frontend::connect(&path, options).unwrap();
        let error = frontend.queue().info(LONG).unwrap_err();
        over.store(true, Ordering::Relaxed);
        drop(frontend);
        // Lets the last backend go.
        while !backend.is_finished() {
            let _ = UnixStream::connect(&path);
            std::thread::yield_now();
        }
        assert!(matches!(error, Error::Disconnected), "{error}");
    });
    let _ = std::fs::remove_file(&path);
}

#[test]
fn the_shutdown_handle_ends_an_outage() {
    let slow = policy().delays(LONG, LONG);
    let (mut rig, mut frontend) = Rig::new(Options::default().reconnect(slow));
    let mut events = frontend.take_events().unwrap();
    rig.kill();
    let started = Instant::now();
    scope(|scope| {
        let (send, ended) = channel();
        for vcpu in 0..8 {
            let (send, queue) = (send.clone(), frontend.queue_of(vcpu));
            scope.spawn(move || send.send(queue.wait_run(vcpu, Deadline::NEVER).unwrap_err()));
        }
        scope.spawn(move || send.send(events.next(Deadline::NEVER).unwrap_err()));
        // One of the threads reconnects, or will; the handle ends both.
        frontend.shutdown_handle().shut_down();
        for _ in 0..9 {
            let error = ended.recv_timeout(LONG).unwrap();
            assert!(matches!(error, Error::ShutDown), "{error}");
        }
    });
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_backend_without_the_vm_is_an_error_and_not_a_fresh_start() {
    for (phase, epoch) in [(Phase::New, 7), (Phase::New, 1), (Phase::Paused, 6)] {
        let (mut rig, frontend) = Rig::with_vcpus(8, options(), |_| {});
        scope(|scope| {
            let waiting: Vec<_> = (0..8)
                .map(|vcpu| {
                    let queue = frontend.queue_of(vcpu);
                    scope.spawn(move || queue.wait_run(vcpu, Deadline::NEVER))
                })
                .collect();
            rig.fake.wait_for_held(8);
            rig.kill();
            rig.set_epoch(phase, epoch, &[], 0);
            rig.revive();
            for waiting in waiting {
                let error = waiting.join().unwrap().unwrap_err();
                assert!(matches!(error, Error::StateLost(_)), "{error}");
            }
        });
        // Nothing was asked of that backend.
        assert_eq!(rig.vm.lock().unwrap().count(Op::WaitRun), 8);
    }
}

#[test]
fn a_backend_that_has_less_to_offer_is_an_error() {
    let offers_less = Arc::new(AtomicBool::new(false));
    let less = offers_less.clone();
    let (mut rig, frontend) = Rig::with(options(), move |fake| {
        fake.less = Some(Box::new(move || {
            less.load(Ordering::Relaxed)
                .then_some(VhostUserProtocolFeatures::CONFIG)
        }));
    });
    offers_less.store(true, Ordering::Relaxed);
    rig.kill();
    rig.revive();
    let error = frontend.queue().info(LONG).unwrap_err();
    assert!(matches!(error, Error::MissingFeature(_)), "{error}");
}

#[test]
fn events_that_were_not_read_are_kept_and_new_ones_come_after_them() {
    let (mut rig, mut frontend) = Rig::new(options().event_buffers(4));
    let mut events = frontend.take_events().unwrap();
    let event = |vcpu: u32| wire::Event {
        kind: wire::EVENT_TIMER_ASSERTED.into(),
        vcpu: vcpu.into(),
        ..Default::default()
    };
    let mut next = 0;
    for round in 0..10 {
        // More at a time than have a buffer each once, over the rounds.
        for _ in 0..3 {
            assert!(rig.fake.emit(event(next).as_bytes()), "{round}");
            next += 1;
        }
        rig.kill();
        rig.revive();
        frontend.queue().info(LONG).unwrap();
        // One buffer is free: the three are unread.
        assert!(rig.fake.emit(event(next).as_bytes()));
        next += 1;
        assert!(!rig.fake.emit(event(next).as_bytes()));
        for vcpu in next - 4..next {
            match events.next(LONG).unwrap() {
                Event::TimerAsserted { vcpu: is, .. } => assert_eq!(is, vcpu),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(events.try_next().unwrap(), None);
    }
}

#[test]
fn polling_threads_go_on_with_the_same_descriptors() {
    use rustix::event::{PollFd, PollFlags, poll};
    let (mut rig, mut frontend) = Rig::with_vcpus(10, options(), |_| {});
    let events = frontend.take_events().unwrap();
    let frontend = Arc::new(frontend);
    let queue = frontend.queue();
    let fds = || [queue.as_fd(), events.as_fd(), frontend.as_fd()].map(|fd| fd.as_raw_fd());
    let before = fds();
    let keeper = frontend.clone();
    let keeper = std::thread::spawn(move || keeper.keep_connected());
    queue.process().unwrap();
    for vcpu in 0..10 {
        let mut ticket = queue.submit(&Operation::wait_run(vcpu)).unwrap();
        queue.process().unwrap();
        rig.fake.wait_for_held(1);
        rig.kill();
        rig.revive();
        rig.fake.wait_for_held(1);
        assert_eq!(ticket.try_wait().unwrap(), None);
        rig.fake.release(echo);
        let run = loop {
            let mut fds = [PollFd::new(queue, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&LONG.try_into().unwrap())), Ok(1));
            queue.process().unwrap();
            if let Some(run) = ticket.try_wait().unwrap() {
                break run;
            }
        };
        assert_eq!(run.cntvoff, 1000 + u64::from(vcpu));
    }
    assert_eq!(fds(), before);
    frontend.shutdown_handle().shut_down();
    assert!(matches!(keeper.join().unwrap(), Error::ShutDown));
}

#[test]
fn a_busy_wait_outlives_the_backend() {
    let (mut rig, frontend) = Rig::new(options());
    tell(&frontend, &rig, Phase::Restoring, &[]);
    rig.lose(|_| Lost::Unseen);
    let ticket = frontend
        .queue()
        .submit(&Operation::restore_done(3))
        .unwrap();
    scope(|scope| {
        let spinning = scope.spawn(|| ticket.spin(LONG));
        rig.fake.wait_for_held(1);
        rig.kill();
        rig.revive();
        assert_eq!(spinning.join().unwrap().unwrap().0, 3);
    });
}

#[test]
fn the_time_page_is_started_again() {
    let (mut rig, frontend) = Rig::new(options());
    let queue = frontend.queue();
    frontend.time_page().start(queue, LONG).unwrap();
    for count in 2..5 {
        rig.kill();
        rig.revive();
        queue.info(LONG).unwrap();
        queue.info(LONG).unwrap();
        rig.fake
            .wait_until(|_| rig.vm.lock().unwrap().count(Op::SetTimePage) == count);
    }
    frontend.time_page().stop(queue, LONG).unwrap();
    rig.kill();
    rig.revive();
    queue.info(LONG).unwrap();
    queue.info(LONG).unwrap();
    assert_eq!(rig.vm.lock().unwrap().count(Op::SetTimePage), 5);
}

#[test]
fn control_messages_are_sent_again() {
    let (mut rig, frontend) = Rig::new(options());
    for _ in 0..3 {
        rig.kill();
        rig.revive();
        assert_eq!(frontend.config().unwrap().epoch, 7);
        rig.kill();
        rig.revive();
        frontend.reset_device().unwrap();
    }
    // After a reset, NEW is no loss.
    rig.set(Phase::New, &[]);
    rig.kill();
    rig.revive();
    assert_eq!(frontend.queues()[1].info(LONG).unwrap().phase, Phase::New);
}

#[test]
fn a_function_can_say_where_the_backend_is() {
    let fake = Arc::new(Fake::new(|request| Some(echo(request))));
    let nowhere = || UnixStream::connect("/nowhere/at/all");
    let error = Frontend::connect(Connector::function(nowhere), options());
    assert!(matches!(error.unwrap_err(), Error::Io { .. }));

    let path = socket_path();
    let mut serving = fake::serve(fake.clone(), &path);
    let to = path.clone();
    let connect = move || UnixStream::connect(&to);
    let frontend = Frontend::connect(Connector::function(connect), options()).unwrap();
    for _ in 0..3 {
        frontend.queue().info(LONG).unwrap();
        // As if the backend had gone away.
        rustix::net::shutdown(&frontend, rustix::net::Shutdown::Both).unwrap();
        serving.0.join().unwrap();
        serving = fake::serve(fake.clone(), &path);
        frontend.queues()[1].info(LONG).unwrap();
    }
    let _ = std::fs::remove_file(&path);
}

#[test]
fn reconnecting_needs_to_be_possible() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Frontend::connect(ours, options()).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    let hour = Duration::from_secs(3600);
    for (first, max) in [(Duration::ZERO, LONG), (LONG, SHORT), (SHORT, 2 * hour)] {
        let bad = Options::default().reconnect(Reconnect::default().delays(first, max));
        let error = Frontend::connect("/nowhere", bad).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)));
    }
    let mut fake = Fake::new(|_| Some(answer(Status::Ok, 0, &[])));
    fake.protocol_without = VhostUserProtocolFeatures::CONFIG;
    let path = socket_path();
    let _serving = fake::serve(fake.into(), &path);
    let error = Frontend::connect(&path, options()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    assert!(matches!(error, Error::MissingFeature(_)), "{error}");
}
