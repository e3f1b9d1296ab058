//! The end of a connection: every wait ends with it, and so does everything later.

use crate::LONG;
use crate::fake::Fake;
use crate::fake::Pair;
use crate::fake::echo;
use crate::fake::hold_wait_run;
use crate::fake::pair;
use crate::operations::echo_pair;
use crate::pace::waiting;
use std::sync::mpsc::channel;
use vhost_user_timer_frontend::Deadline;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Options;

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
        waiting(scope, move || {
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
