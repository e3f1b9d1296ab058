//! The outage itself: patience, deadlines, events, polling, control messages.

use super::options;
use super::policy;
use super::tell;
use crate::LONG;
use crate::SHORT;
use crate::fake;
use crate::fake::Fake;
use crate::fake::answer;
use crate::fake::echo;
use crate::fake::model::Lost;
use crate::fake::model::Rig;
use crate::fake::socket_path;
use crate::pace::waiting;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::thread::scope;
use std::time::Duration;
use std::time::Instant;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::Connector;
use vhost_user_timer_frontend::Deadline;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Event;
use vhost_user_timer_frontend::Op;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::Reconnect;
use vhost_user_timer_frontend::Status;
use vhost_user_timer_protocol::wire;
use zerocopy::IntoBytes;

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
        let patient = waiting(scope, || frontend.queue().info(LONG));
        for _ in 0..20 {
            let late = frontend.queues()[1].wait_run(0, SHORT);
            assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
        }
        rig.revive();
        patient.join().unwrap().unwrap();
    });
    // Twenty turns were one request, which was abandoned.
    frontend.queues()[1].info(LONG).unwrap();
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
    // The backend that serves: it is known only once it has begun to.
    let serving = Arc::new((
        Mutex::new(None::<vhost_user_backend::ShutdownHandle>),
        Condvar::new(),
    ));
    let (falls, killed) = (serving.clone(), path.clone());
    let fake = Arc::new(Fake::new(move |_| {
        let (backend, started) = &*falls;
        let backend = backend.lock().unwrap();
        let mut backend = started.wait_while(backend, |none| none.is_none()).unwrap();
        backend.take().unwrap().shutdown();
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
                *serving.0.lock().unwrap() = started.recv().ok();
                serving.1.notify_one();
                thread.join().unwrap();
            }
        });
        first.recv().unwrap();
        let options = Options::default().reconnect(policy().patience(patience));
        let frontend = fake::connect(&path, options).unwrap();
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
    scope(|scope| {
        let (send, ended) = channel();
        for vcpu in 0..8 {
            let (send, queue) = (send.clone(), frontend.queue_of(vcpu));
            waiting(scope, move || {
                send.send(queue.wait_run(vcpu, Deadline::NEVER).unwrap_err())
            });
        }
        waiting(scope, move || {
            send.send(events.next(Deadline::NEVER).unwrap_err())
        });
        // One of the threads reconnects; the others wait for it.
        frontend.shutdown_handle().shut_down();
        for _ in 0..9 {
            let error = ended.recv_timeout(LONG).unwrap();
            assert!(matches!(error, Error::ShutDown), "{error}");
        }
    });
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
    let error = fake::connect(Connector::function(nowhere), options());
    assert!(matches!(error.unwrap_err(), Error::Io { .. }));

    let path = socket_path();
    let mut serving = fake::serve(fake.clone(), &path);
    let to = path.clone();
    let connect = move || UnixStream::connect(&to);
    let frontend = fake::connect(Connector::function(connect), options()).unwrap();
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
    let error = fake::connect(ours, options()).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    let hour = Duration::from_secs(3600);
    for (first, max) in [(Duration::ZERO, LONG), (LONG, SHORT), (SHORT, 2 * hour)] {
        let bad = Options::default().reconnect(Reconnect::default().delays(first, max));
        let error = fake::connect("/nowhere", bad).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)));
    }
    let mut fake = Fake::new(|_| Some(answer(Status::Ok, 0, &[])));
    fake.protocol_without = VhostUserProtocolFeatures::CONFIG;
    let path = socket_path();
    let _serving = fake::serve(fake.into(), &path);
    let error = fake::connect(&path, options()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    assert!(matches!(error, Error::MissingFeature(_)), "{error}");
}
