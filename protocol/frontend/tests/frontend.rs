//! The frontend library against a fake backend in the same process.

mod fake;

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use fake::{
    EVENT_IDX, Fake, INDIRECT, Pair, answer, echo, hold_wait_run, info, ok, pair, run_of,
    saved_vcpu, socket_path,
};
use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::{
    ContentFault, Deadline, Error, Event, Fault, Frontend, Operation, Options, RegValue,
    RequestQueue, RestoreOptions, RingFault, ShutdownHandle, Timer,
};
use vhost_user_timer_protocol::wire::{self, present};
use vhost_user_timer_protocol::{Abi, Op, Phase, Register, Status};
use zerocopy::IntoBytes;

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(1);

fn echo_pair() -> Pair {
    pair(Fake::new(|request| Some(echo(request))), Options::default())
}

fn every_operation(queue: &RequestQueue) {
    assert_eq!(queue.info(LONG).unwrap().phase, Phase::Paused);
    queue.configure(4, Abi::Arm64, None, LONG).unwrap();
    assert_eq!(*queue.reg_list(0, LONG).unwrap(), [1, 2, 3, 4, 5, 6]);
    let values = queue.get_regs(5, &[10, 20], LONG).unwrap();
    assert_eq!(*values, [RegValue::new(10, 15), RegValue::new(20, 25)]);
    let values = [(1, 2), (3, 4), (5, 6)].map(|(id, value)| RegValue::new(id, value));
    let set = queue.set_regs(3, &values, LONG).unwrap();
    assert!(set.virtual_line && set.physical_line && set.ignored == 3);
    let vm = queue.get_vm(3, 2, LONG).unwrap();
    assert_eq!(vm.vcpus, [saved_vcpu(3), saved_vcpu(4)]);
    queue.set_vm(&vm.vcpus, LONG).unwrap();
    queue.set_counter_offset(1, LONG).unwrap();
    queue.set_counter_anchor(1, 2, LONG).unwrap();
    assert_eq!(queue.pause(LONG).unwrap().cntvoff, 1000);
    assert_eq!(queue.pause_vm_only(LONG).unwrap().cntvoff, 1001);
    assert_eq!(queue.resume(LONG).unwrap().cntvoff, 1002);
    let options = RestoreOptions::default();
    queue.restore_begin(options, LONG).unwrap();
    assert_eq!(queue.restore_done(8, LONG).unwrap(), 9);
    assert_eq!(queue.wait_run(7, LONG).unwrap().cntvoff, 1007);
    queue.restore_abort(LONG).unwrap();
    queue.set_time_page(0, 0, LONG).unwrap();
    assert_eq!(queue.restore_vcpu(&saved_vcpu(8), LONG).unwrap(), 9);
}

#[test]
fn every_operation_is_well_formed_and_answered() {
    for without in [0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX] {
        let mut fake = Fake::new(|request| Some(echo(request)));
        fake.without = without;
        let pair = pair(fake, Options::default().queue_size(4));
        for queue in pair.frontend.queues() {
            every_operation(queue);
        }
    }
}

#[test]
fn a_backend_with_only_mq_will_do() {
    let mut fake = Fake::new(|request| Some(echo(request)));
    fake.protocol_without = VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ;
    let pair = pair(fake, Options::default());
    every_operation(pair.frontend.queue());
    let missing = |result| matches!(result, Err(Error::MissingFeature(_)));
    assert!(missing(pair.frontend.config().map(|_| ())));
    assert!(missing(pair.frontend.reset_device()));
}

#[test]
fn the_largest_vm_is_saved_and_staged_in_one_request() {
    let pair = echo_pair();
    let queue = pair.frontend.queue();
    let saved = queue.save(LONG).unwrap();
    assert_eq!(saved.abi(), Abi::Arm64);
    assert_eq!(saved.frequency().get(), 1_000_000_000);
    let vcpus = saved.vcpus();
    assert_eq!(vcpus.len(), 4096);
    assert!((0..).map(saved_vcpu).zip(vcpus).all(|(a, b)| a == *b));
    queue.set_vm(vcpus, LONG).unwrap();

    // There is one pair of large buffers.
    let first = queue.submit(&Operation::get_vm(0, 4096)).unwrap();
    let second = queue.submit(&Operation::get_vm(0, 4096));
    assert!(matches!(second, Err(Error::QueueFull { queue: 1 })));
    drop(first);
    assert_eq!(queue.get_vm(0, 4096, LONG).unwrap().vcpus.len(), 4096);
}

#[test]
fn what_cannot_be_asked_is_refused_here() {
    let pair = echo_pair();
    let queue = pair.frontend.queue();
    let invalid = |error: Error| matches!(error, Error::InvalidArgument(_));
    assert!(invalid(queue.get_regs(0, &[0; 17], LONG).unwrap_err()));
    assert!(invalid(
        queue
            .set_regs(0, &[RegValue::default(); 17], LONG)
            .unwrap_err()
    ));
    assert!(invalid(queue.get_vm(0, u32::MAX, LONG).unwrap_err()));
    assert!(invalid(
        queue.set_vm(&[saved_vcpu(0); 5000], LONG).unwrap_err()
    ));
    assert_eq!(queue.get_regs(0, &[1; 16], LONG).unwrap().len(), 16);
}

#[test]
fn many_requests_go_by_one_kick_and_come_back_in_any_order() {
    let pair = pair(Fake::new(|_| None), Options::default().queue_size(64));
    let queue = &pair.frontend.queues()[1];
    let tickets: Vec<_> = (0..64)
        .map(|vcpu| queue.submit(&Operation::restore_done(vcpu)).unwrap())
        .collect();
    let full = queue.submit(&Operation::restore_done(64));
    assert!(matches!(full, Err(Error::QueueFull { queue: 2 })));
    queue.kick();
    pair.fake.wait_for_held(64);
    pair.fake.release(echo);
    for (vcpu, ticket) in (0..).zip(tickets) {
        assert_eq!(ticket.wait(LONG).unwrap().0, vcpu + 1);
    }
}

#[test]
fn a_full_queue_makes_blocking_calls_wait_for_a_slot() {
    let pair = pair(
        Fake::new(|request| Some(echo(request))),
        Options::default().queue_size(4),
    );
    let queue = pair.frontend.queue();
    std::thread::scope(|scope| {
        for vcpu in 0..16 {
            scope.spawn(move || {
                for _ in 0..500 {
                    let values = queue.get_regs(vcpu, &[100], LONG).unwrap();
                    assert_eq!(*values, [RegValue::new(100, 100 + u64::from(vcpu))]);
                    let vm = queue.get_vm(vcpu, 20, LONG).unwrap();
                    assert_eq!(vm.vcpus.len(), 20);
                }
            });
        }
    });
}

#[test]
fn vcpus_that_wait_keep_no_other_request_out() {
    const VCPUS: u32 = 512;
    let pair = pair(Fake::new(hold_wait_run), Options::default());
    let queue = pair.frontend.queue();
    let slots = queue.capacity() * 3 / 4;
    std::thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            scope.spawn(move || {
                let run = queue.wait_run(vcpu, LONG).unwrap();
                assert_eq!(run.cntvoff, 1000 + u64::from(vcpu));
            });
        }
        let mut answered = 0;
        while answered < VCPUS as usize {
            let wave = slots.min(VCPUS as usize - answered);
            pair.fake.wait_for_held(wave);
            for vcpu in 0..100 {
                assert_eq!(queue.restore_done(vcpu, LONG).unwrap(), vcpu + 1);
            }
            pair.fake.release(echo);
            answered += wave;
        }
    });
}

#[test]
fn waiting_in_short_turns_takes_one_slot() {
    let pair = pair(
        Fake::new(hold_wait_run),
        Options::default().queue_size(8).request_queues(1),
    );
    let queue = pair.frontend.queue();
    for _ in 0..50 {
        let late = queue.wait_run(3, SHORT);
        assert!(matches!(late, Err(Error::TimedOut { what: "WAIT_RUN" })));
    }
    pair.fake.wait_for_held(1);
    let ticket = queue.submit(&Operation::wait_run(3)).unwrap();
    // Another epoch is another request.
    let other = queue.submit(&Operation::wait_run(3).in_epoch(9)).unwrap();
    queue.kick();
    pair.fake.wait_for_held(2);
    pair.fake.release(echo);
    assert_eq!(ticket.wait(LONG).unwrap().cntvoff, 1003);
    assert_eq!(other.wait(LONG).unwrap().cntvoff, 1003);
}

#[test]
fn answers_given_up_free_their_slots_when_they_come() {
    let pair = pair(Fake::new(|_| None), Options::default().queue_size(8));
    let queue = pair.frontend.queue();
    for round in 0..3 {
        for vcpu in 0..8 {
            let late = queue.restore_done(vcpu, SHORT);
            assert!(matches!(late, Err(Error::TimedOut { .. })), "{round}");
        }
        let full = queue.submit(&Operation::restore_done(0));
        assert!(matches!(full, Err(Error::QueueFull { .. })));
        assert!(matches!(
            queue.restore_done(0, SHORT),
            Err(Error::TimedOut {
                what: "a free slot"
            })
        ));
        pair.fake.wait_for_held(8);
        pair.fake.release(echo);
    }
}

#[test]
fn an_event_loop_learns_of_answers_by_the_descriptor() {
    let pair = pair(Fake::new(|_| None), Options::default());
    let queue = pair.frontend.queue();
    queue.process().unwrap();
    for vcpu in 0..200 {
        let mut ticket = queue.submit(&Operation::restore_done(vcpu)).unwrap();
        queue.process().unwrap();
        assert_eq!(ticket.try_wait().unwrap(), None);
        pair.fake.wait_for_held(1);
        pair.fake.release(echo);
        let mut fds = [PollFd::new(queue, PollFlags::IN)];
        let timeout = LONG.try_into().unwrap();
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1));
        queue.process().unwrap();
        assert_eq!(ticket.try_wait().unwrap().unwrap().0, vcpu + 1);
        assert!(matches!(ticket.try_wait(), Err(Error::InvalidArgument(_))));
        let mut fds = [PollFd::new(queue, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Default::default())), Ok(0));
    }
}

#[test]
fn a_busy_wait_ends_by_its_answer_its_deadline_or_the_backends_death() {
    let pair = pair(Fake::new(hold_wait_run), Options::default());
    let queue = pair.frontend.queue();
    for vcpu in 0..100 {
        let ticket = queue.submit(&Operation::restore_done(vcpu)).unwrap();
        assert_eq!(ticket.spin(LONG).unwrap().0, vcpu + 1);
    }
    let late = queue.submit(&Operation::wait_run(0)).unwrap().spin(SHORT);
    assert!(matches!(late, Err(Error::TimedOut { .. })));
    let ticket = queue.submit(&Operation::wait_run(1)).unwrap();
    pair.backend.shutdown();
    assert!(matches!(ticket.spin(LONG), Err(Error::Disconnected)));
}

#[test]
fn a_backend_that_never_answers_the_handshake_is_an_error_in_time() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let options = Options::default().timeout(Duration::from_millis(50));
    let started = Instant::now();
    let error = Frontend::connect(ours, options).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_backend_that_hangs_up_in_the_handshake_is_an_error_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = Frontend::connect(ours, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error}");
}

#[test]
fn the_shutdown_handle_ends_the_handshake() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let shutdown = ShutdownHandle::new().unwrap();
    shutdown.shut_down();
    let options = Options::default().timeout(LONG).shutdown(shutdown);
    let error = Frontend::connect(ours, options).unwrap_err();
    assert!(matches!(error, Error::ShutDown), "{error}");
}

#[test]
fn connecting_to_a_listener_that_does_not_accept_ends_in_time() {
    let path = socket_path();
    let _listener = UnixListener::bind(&path).unwrap();
    let options = Options::default().timeout(Duration::from_millis(50));
    // Until the backlog is full it is the handshake that times out.
    let mut waiting = Vec::new();
    while let Ok(socket) = rustix_connect(&path) {
        waiting.push(socket);
    }
    let error = Frontend::connect(&path, options.clone()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    assert!(
        matches!(error, Error::TimedOut { what: "connect" }),
        "{error}"
    );

    let error = Frontend::connect(&path, options).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

/// Connects without waiting for the backlog.
fn rustix_connect(path: &std::path::Path) -> rustix::io::Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Waits in many threads, on both queues and on the events; `end` ends them all.
fn all_waits_end(end: impl FnOnce(&Pair), ended: impl Fn(&Error) -> bool + Sync) {
    let mut pair = pair(Fake::new(hold_wait_run), Options::default());
    let mut events = pair.frontend.take_events().unwrap();
    assert!(pair.frontend.take_events().is_none());
    std::thread::scope(|scope| {
        let (send, errors) = channel();
        for vcpu in 0..20 {
            let (send, queue) = (send.clone(), pair.frontend.queue_of(vcpu));
            scope.spawn(move || {
                let error = queue.wait_run(vcpu, Deadline::NEVER).unwrap_err();
                send.send(error).unwrap();
            });
        }
        scope.spawn(move || {
            let error = events.next(Deadline::NEVER).unwrap_err();
            send.send(error).unwrap();
        });
        pair.fake.wait_for_held(20);
        end(&pair);
        for _ in 0..21 {
            let error = errors.recv_timeout(LONG).unwrap();
            assert!(ended(&error), "{error}");
        }
    });
    // And what comes later ends too.
    for queue in pair.frontend.queues() {
        assert!(ended(&queue.info(Deadline::NEVER).unwrap_err()));
        assert!(ended(&queue.process().unwrap_err()));
        assert!(ended(&queue.submit(&Operation::get_info()).unwrap_err()));
    }
    assert!(ended(&pair.frontend.config().unwrap_err()));
}

#[test]
fn a_dead_backend_ends_all_waits() {
    all_waits_end(
        |pair| pair.backend.shutdown(),
        |error| matches!(error, Error::Disconnected),
    );
}

#[test]
fn the_shutdown_handle_ends_all_waits() {
    all_waits_end(
        |pair| pair.frontend.shutdown_handle().clone().shut_down(),
        |error| matches!(error, Error::ShutDown),
    );
}

#[test]
fn an_answer_that_came_before_the_backend_died_still_counts() {
    let pair = pair(Fake::new(|_| None), Options::default());
    let queue = pair.frontend.queue();
    let ticket = queue.submit(&Operation::restore_done(3)).unwrap();
    queue.kick();
    pair.fake.wait_for_held(1);
    pair.fake.release(echo);
    pair.backend.shutdown();
    assert_eq!(ticket.wait(LONG).unwrap().0, 4);
    assert!(matches!(queue.info(LONG), Err(Error::Disconnected)));
}

#[test]
fn closing_stops_every_ring_and_ends_what_others_hold() {
    let pair = echo_pair();
    let queue = pair.frontend.queue().clone();
    pair.frontend.close().unwrap();
    pair.fake.wait_until(|state| state.stopped == [0, 1, 2]);
    assert!(matches!(queue.info(LONG), Err(Error::ShutDown)));
}

#[test]
fn a_reset_leaves_the_queues_in_use() {
    let pair = echo_pair();
    for n in 1..4 {
        pair.frontend.reset_device().unwrap();
        assert_eq!(pair.fake.state.lock().unwrap().resets, n);
        every_operation(&pair.frontend.queues()[1]);
    }
}

#[test]
fn the_config_space_is_the_info() {
    let pair = echo_pair();
    let config = pair.frontend.config().unwrap();
    assert_eq!(config, pair.frontend.queue().info(LONG).unwrap());
    assert_eq!((config.phase, config.max_vcpus), (Phase::Paused, 4096));
}

fn connect_error(fake: Fake, options: Options) -> Error {
    let path = socket_path();
    let _serving = fake::serve(fake.into(), &path);
    let error = Frontend::connect(&path, options.clone()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    error
}

#[test]
fn a_backend_that_this_library_cannot_work_with_is_named_so() {
    let fake = || Fake::new(|request| Some(echo(request)));
    let mut newer = fake();
    newer.config.version = 2.into();
    let error = connect_error(newer, Options::default());
    assert!(matches!(error, Error::Version(2)), "{error}");

    // Without a config space it is GET_INFO that tells.
    let mut newer = Fake::new(|_| {
        let mut info = info();
        info.version = 3.into();
        Some(ok(info.as_bytes()))
    });
    newer.protocol_without = VhostUserProtocolFeatures::CONFIG;
    let error = connect_error(newer, Options::default());
    assert!(matches!(error, Error::Version(3)), "{error}");

    let mut strange = fake();
    strange.config.phase = 9.into();
    let error = connect_error(strange, Options::default());
    assert!(matches!(error, Error::Config { .. }), "{error}");

    let mut legacy = fake();
    legacy.without = 1 << 32;
    let error = connect_error(legacy, Options::default());
    assert_eq!(
        error.to_string(),
        "the backend does not offer VIRTIO_F_VERSION_1"
    );

    let error = connect_error(fake(), Options::default().request_queues(3));
    assert!(matches!(error, Error::MissingFeature(_)), "{error}");
}

#[test]
fn options_out_of_range_are_refused() {
    let options = Options::default;
    for bad in [
        options().queue_size(2),
        options().queue_size(2048),
        options().queue_size(100),
        options().event_buffers(1),
        options().event_buffers(3),
        options().request_queues(0),
        options().request_queues(17),
    ] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Frontend::connect(ours, bad.clone()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{bad:?}");
    }
}

#[test]
fn a_refusal_says_what_was_refused_and_why() {
    let (ctl, cval) = (
        Register::TimerCtl.id(Abi::Arm64),
        Register::PtimerCval.id(Abi::Arm),
    );
    let values = [(cval, 1), (0xabc, 2), (ctl, 3)].map(|(id, value)| RegValue::new(id, value));
    let ids = [cval, 0xabc, ctl];
    let set = Operation::set_regs(3, &values);
    let get = Operation::get_regs(3, &ids);
    let done = Operation::restore_done(7);
    let missing = present::CTL | present::PCVAL;

    let fake = Fake::new(|request| {
        // The epoch says how to refuse.
        let epoch = u64::from_le_bytes(request[8..16].try_into().unwrap());
        Some(answer(
            Status::from((epoch >> 32) as u32),
            epoch as u32,
            &[],
        ))
    });
    let pair = pair(fake, Options::default());
    let queue = pair.frontend.queue();
    let how = |status: Status, detail: u32| u64::from(status.errno()) << 32 | u64::from(detail);
    let text = |error: Error| error.to_string();

    let error = queue
        .perform(&set.in_epoch(how(Status::Invalid, 2)), LONG)
        .unwrap_err();
    assert_eq!(error.status(), Some(Status::Invalid));
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.op, refusal.vcpu), (Op::SetRegs, Some(3)));
    assert_eq!((refusal.detail, refusal.register), (2, Some(ctl)));
    assert_eq!(
        text(error),
        "SET_REGS of vCPU 3 was refused: EINVAL (bad value), entry 2: TIMER_CTL"
    );
    let error = queue.perform(&get.in_epoch(how(Status::UnknownRegister, 1)), LONG);
    assert_eq!(
        text(error.unwrap_err()),
        "GET_REGS of vCPU 3 was refused: ENOENT (no such register), entry 1: \
         register 0x0000000000000abc"
    );
    // A detail that is no entry's index.
    let error = queue.perform(&get.in_epoch(how(Status::Invalid, 77)), LONG);
    assert_eq!(
        text(error.unwrap_err()),
        "GET_REGS of vCPU 3 was refused: EINVAL (bad value), entry 77"
    );
    let error = queue
        .perform(&done.in_epoch(how(Status::Incomplete, missing)), LONG)
        .unwrap_err();
    let registers: Vec<_> = error.refusal().unwrap().missing_registers().collect();
    assert_eq!(registers, [Register::TimerCtl, Register::PtimerCval]);
    assert_eq!(
        text(error),
        "RESTORE_DONE of vCPU 7 was refused: ENODATA (registers of this vCPU are missing): \
         TIMER_CTL, PTIMER_CVAL"
    );
    for (status, detail, end) in [
        (Status::Busy, 0, "EBUSY (not in this phase): NEW"),
        (
            Status::Busy,
            2,
            "EBUSY (not in this phase): RUNNING, or RESTORING with 2 vCPUs missing",
        ),
        (
            Status::Busy,
            5,
            "EBUSY (not in this phase): RESTORING, 5 vCPUs missing",
        ),
        (
            Status::TooBig,
            99,
            "E2BIG (the answer does not fit its buffer): 99 bytes needed",
        ),
        (
            Status::TimedOut,
            4,
            "ETIMEDOUT (the restore timed out): 4 vCPUs missing (missing_vcpus tells which)",
        ),
        (Status::Stale, 0, "ESTALE (the epoch is over)"),
        (Status::Unknown(5), 0, "unknown status 5"),
    ] {
        let call = Operation::resume().in_epoch(how(status, detail));
        let error = queue.perform(&call, LONG).unwrap_err();
        assert_eq!(text(error), format!("RESUME was refused: {end}"));
    }
    // None of this has harmed the queue.
    let raw = Operation::raw(Op::Unknown(0x777), 1, &[], 0).in_epoch(0);
    queue.perform(&raw, LONG).unwrap();
}

#[test]
fn an_answer_that_makes_no_sense_ends_the_queue() {
    let values = |ids: &[u64]| {
        let values = ids.iter().map(|&id| wire::RegValue {
            id: id.into(),
            value: 0.into(),
        });
        ok(values.collect::<Vec<_>>().as_bytes())
    };
    let length = |len| Fault::AnswerLength {
        op: Op::GetRegs,
        len,
    };
    let content = Fault::AnswerContent {
        op: Op::GetRegs,
        fault: ContentFault::UnaskedRegister,
    };
    for (bytes, fault) in [
        (vec![], length(0)),
        (vec![0; 15], length(15)),
        (ok(&[]), length(16)),
        (ok(&[0; 31]), length(47)),
        (values(&[1]), length(32)),
        (values(&[1, 3]), content),
        (
            values(&[1, 2, 3]),
            RingFault::UsedLen {
                id: 0,
                len: 64,
                writable: 48,
            }
            .into(),
        ),
    ] {
        let pair = pair(
            Fake::new(move |request| match request[0] {
                0x11 => Some(bytes.clone()),
                _ => None,
            }),
            Options::default(),
        );
        let queue = pair.frontend.queue();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let other = pair.frontend.queue();
                other.wait_run(0, Deadline::NEVER).unwrap_err()
            });
            pair.fake.wait_for_held(1);
            let got = queue.get_regs(0, &[1, 2], LONG).unwrap_err();
            for error in [got, other.join().unwrap(), queue.info(LONG).unwrap_err()] {
                let Error::Protocol {
                    queue: 1,
                    fault: is,
                } = error
                else {
                    panic!("{error}");
                };
                match (is, fault) {
                    // Which slot it was does not matter.
                    (
                        Fault::Ring(RingFault::UsedLen { len: a, .. }),
                        Fault::Ring(RingFault::UsedLen { len: b, .. }),
                    ) => assert_eq!(a, b),
                    _ => assert_eq!(is, fault),
                }
            }
        });
        // The other queue is not affected.
        assert!(
            pair.frontend.queues()[1]
                .submit(&Operation::get_info())
                .is_ok()
        );
    }
}

fn timer_event(vcpu: u32) -> wire::Event {
    wire::Event {
        kind: wire::EVENT_TIMER_ASSERTED.into(),
        timer: wire::TIMER_PHYSICAL.into(),
        vcpu: vcpu.into(),
        cval: 5.into(),
        count: 6.into(),
        epoch: 7.into(),
    }
}

#[test]
fn events_come_in_order_and_their_buffers_go_back() {
    let mut pair = pair(
        Fake::new(|request| Some(echo(request))),
        Options::default().event_buffers(4),
    );
    let mut events = pair.frontend.take_events().unwrap();
    assert_eq!(events.try_next().unwrap(), None);
    assert!(matches!(events.next(SHORT), Err(Error::TimedOut { .. })));
    let fake = &pair.fake;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for vcpu in 0..3000 {
                while !fake.emit(timer_event(vcpu).as_bytes()) {
                    std::thread::yield_now();
                }
            }
        });
        for vcpu in 0..3000 {
            let event = Event::TimerAsserted {
                vcpu,
                timer: Timer::Physical,
                cval: 5,
                count: 6,
                epoch: 7,
            };
            assert_eq!(events.next(LONG).unwrap(), event);
        }
    });

    assert_eq!(events.try_next().unwrap(), None);
    let mut phase = timer_event(Phase::Running.code());
    phase.kind = wire::EVENT_PHASE_CHANGED.into();
    let mut no_phase = phase;
    no_phase.vcpu = 77.into();
    let mut no_timer = timer_event(1);
    no_timer.timer = 2.into();
    let mut no_kind = timer_event(1);
    no_kind.kind = 9.into();
    for event in [phase, no_phase, no_timer, no_kind] {
        assert!(fake.emit(event.as_bytes()));
        let mut fds = [PollFd::new(&events, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&LONG.try_into().unwrap())), Ok(1));
        let got = events.try_next().unwrap().unwrap();
        let known = Event::PhaseChanged {
            phase: Phase::Running,
            count: 6,
            epoch: 7,
        };
        let unknown = Event::Unknown {
            kind: event.kind.get(),
            bytes: event.as_bytes().try_into().unwrap(),
        };
        assert_eq!(got, if event == phase { known } else { unknown });
        assert_eq!(events.try_next().unwrap(), None);
    }

    assert!(fake.emit(&timer_event(0).as_bytes()[..31]));
    let fault = Fault::EventLength { len: 31 };
    for _ in 0..2 {
        match events.next(LONG) {
            Err(Error::Protocol {
                queue: 0,
                fault: is,
            }) => assert_eq!(is, fault),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn events_that_came_before_the_backend_died_are_still_read() {
    let mut pair = echo_pair();
    let mut events = pair.frontend.take_events().unwrap();
    for vcpu in 0..3 {
        assert!(pair.fake.emit(timer_event(vcpu).as_bytes()));
    }
    pair.backend.shutdown();
    for _ in 0..3 {
        assert!(matches!(events.next(LONG), Ok(Event::TimerAsserted { .. })));
    }
    assert!(matches!(events.next(LONG), Err(Error::Disconnected)));
}

#[test]
fn handles_can_be_used_from_other_threads() {
    fn can<T: Send + Sync>(_: &T) {}
    let mut pair = echo_pair();
    can(&pair.frontend);
    can(pair.frontend.queue());
    can(&pair.frontend.shutdown_handle());
    can(&pair.frontend.time_page());
    can(&pair.frontend.take_events());
    let ticket = pair
        .frontend
        .queue()
        .submit(&Operation::wait_run(4))
        .unwrap();
    let run = std::thread::spawn(move || ticket.wait(LONG))
        .join()
        .unwrap();
    assert_eq!(run.unwrap().cntvoff, run_of(4).cntvoff.get());
}

#[test]
fn a_backend_that_changes_its_version_ends_the_queue() {
    let pair = pair(
        Fake::new(|request| {
            let mut info = info();
            info.version = 9.into();
            match request[0] {
                0x01 => Some(ok(info.as_bytes())),
                _ => Some(echo(request)),
            }
        }),
        Options::default(),
    );
    let queue = pair.frontend.queue();
    queue.resume(LONG).unwrap();
    let other = |error: Error| error.ends_queue() && matches!(error, Error::Version(9));
    assert!(other(queue.info(LONG).unwrap_err()));
    assert!(other(queue.resume(LONG).unwrap_err()));
}

#[test]
fn a_restore_names_the_vcpus_that_were_configured_and_asks_only_where_that_is_not_known() {
    use std::sync::{Arc, Mutex};
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = log.clone();
    let mut fake = Fake::new(move |request| {
        seen.lock()
            .unwrap()
            .push((request[0], request.get(16).copied()));
        Some(echo(request))
    });
    // A config space that does not have the VM yet.
    fake.config.phase = Phase::New.code().into();
    fake.config.vcpus = 0.into();
    let pair = pair(fake, Options::default());
    let queue = pair.frontend.queue();
    let begin = || {
        log.lock().unwrap().clear();
        let epoch = queue
            .restore_begin(RestoreOptions::default(), LONG)
            .unwrap();
        assert_eq!(epoch, 1);
        std::mem::take(&mut *log.lock().unwrap())
    };
    // GET_INFO says 4096.
    assert_eq!(begin(), [(0x01, None), (0x40, Some(0))]);
    queue.configure(7, Abi::Arm64, None, LONG).unwrap();
    assert_eq!(begin(), [(0x40, Some(7))]);
    pair.frontend.reset_device().unwrap();
    assert_eq!(begin(), [(0x01, None), (0x40, Some(0))]);
}
