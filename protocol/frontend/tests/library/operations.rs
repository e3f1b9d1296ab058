//! Operations: asked by one thread or many, waited for, polled for, given up.

use crate::LONG;
use crate::SHORT;
use crate::fake::EVENT_IDX;
use crate::fake::EndOfWaits;
use crate::fake::Fake;
use crate::fake::INDIRECT;
use crate::fake::Pair;
use crate::fake::echo;
use crate::fake::hold_wait_run;
use crate::fake::pair;
use crate::fake::run_of;
use crate::fake::saved_vcpu;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::poll;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::Abi;
use vhost_user_timer_frontend::Deadline;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::RegValue;
use vhost_user_timer_frontend::RequestQueue;
use vhost_user_timer_frontend::RestoreOptions;

pub(crate) fn echo_pair() -> Pair {
    pair(Fake::new(|request| Some(echo(request))), Options::default())
}

pub(crate) fn every_operation(queue: &RequestQueue) {
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
    assert_eq!(queue.set_vm_done(&vm.vcpus, LONG).unwrap(), 4);
    let done = queue.set_regs_done(3, &values, LONG).unwrap();
    assert_eq!((done.remaining, done.set), (4, Some(set)));
    let run = queue.confirm_run(5, 6, LONG).unwrap();
    assert_eq!((run.cntvoff, run.cntpoff), (5, 6));
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
    let since_1970 = RestoreOptions::default().elapsed_since(0);
    let begin = Operation::restore_begin(1, since_1970);
    assert!(invalid(queue.perform(&begin, LONG).unwrap_err()));
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
                let run = queue.wait_run(vcpu, Deadline::NEVER).unwrap();
                assert_eq!(run.cntvoff, 1000 + u64::from(vcpu));
            });
        }
        let _end = EndOfWaits(pair.frontend.shutdown_handle());
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
    let ticket = queue.submit(&Operation::wait_run(3)).unwrap();
    // Another epoch is another request.
    let other = queue.submit(&Operation::wait_run(3).in_epoch(9)).unwrap();
    // Answered when all of the others are held.
    queue.info(LONG).unwrap();
    assert_eq!(pair.fake.held(), 2);
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
fn a_reset_leaves_the_queues_in_use() {
    let pair = echo_pair();
    for n in 1..4 {
        pair.frontend.reset_device().unwrap();
        assert_eq!(pair.fake.state.lock().unwrap().resets, n);
        every_operation(&pair.frontend.queues()[1]);
    }
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
