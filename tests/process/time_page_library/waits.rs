//! Waits by the page, and what ends them.

use super::*;

#[test]
fn running_is_told_by_the_page() {
    let served = Served::new(8);
    let run = served.queue().resume(LIMIT).unwrap();
    for vcpu in 0..8 {
        let queue = served.frontend.queue_of(vcpu);
        let offsets = queue.wait_run_by_page(vcpu, Duration::ZERO).unwrap();
        assert_eq!(offsets, Offsets::from(run));
    }
}

#[test]
fn without_a_page_the_request_tells() {
    let served = Served::new(1);
    let page = served.frontend.time_page();
    page.stop(served.queue(), LIMIT).unwrap();
    let error = served.queue().wait_run_by_page(0, Duration::ZERO);
    assert!(matches!(error, Err(Error::TimedOut { .. })));
    let run = served.queue().resume(LIMIT).unwrap();
    let offsets = served.queue().wait_run_by_page(0, LIMIT).unwrap();
    assert_eq!(offsets, run.into());
}

#[test]
fn in_new_and_for_no_such_vcpu_it_is_refused_as_the_request_is() {
    let served = Served::new(2);
    let queue = served.queue();
    let status = |vcpu| queue.wait_run_by_page(vcpu, LIMIT).unwrap_err().status();
    assert_eq!(status(2), Some(Status::NoSuchVcpu));
    served.frontend.reset_device().unwrap();
    assert_eq!(status(0), Some(Status::Busy));
}

#[test]
fn all_who_wait_go_at_resume_and_a_vcpu_that_is_none_keeps_nobody() {
    let served = Served::new(8);
    served.waiting(8, Deadline::from(LIMIT), |waiters| {
        let bad = served.queue().wait_run_by_page(8, Duration::from_millis(5));
        assert!(bad.is_err());
        waiters.come_to_rest();
        let run = served.queue().resume(LIMIT).unwrap();
        for offsets in waiters.all_run() {
            assert_eq!(offsets, Offsets::from(run));
        }
    });
}

#[test]
fn a_new_restore_is_estale_an_abort_ecanceled_and_a_time_out_etimedout_for_all_who_wait() {
    let served = Served::new(4);
    let queue = served.queue();
    for round in 0..20 {
        served.waiting(4, Deadline::from(LIMIT), |waiters| {
            if round % 2 == 0 {
                waiters.come_to_rest();
            }
            served.begin(None);
            // A thread that had not read the page yet waits in the new restore, and runs with it.
            let early = waiters.refused(if round % 2 == 0 { 4 } else { 0 });
            assert!(early.iter().all(|status| *status == Status::Stale));
            if round % 2 == 1 {
                queue.restore_abort(LIMIT).unwrap();
                served.begin(None);
                queue.restore_abort(LIMIT).unwrap();
                queue.resume(LIMIT).unwrap();
                for _ in 0..4 {
                    match waiters.next().1 {
                        Ok(_) => {}
                        Err(error) => assert!(
                            matches!(error.status(), Some(Status::Stale | Status::Canceled)),
                            "{error}"
                        ),
                    }
                }
                queue.pause(LIMIT).unwrap();
            } else {
                queue.restore_abort(LIMIT).unwrap();
            }
        });
        served.begin(None);
        served.waiting(4, Deadline::from(LIMIT), |waiters| {
            waiters.come_to_rest();
            queue.restore_abort(LIMIT).unwrap();
            assert_eq!(waiters.refused(4), [Status::Canceled; 4]);
        });
    }
    with_a_time_out(|time_out| {
        served.begin(Some(time_out.length()));
        served.waiting(4, Deadline::from(LIMIT), |waiters| {
            if waiters.rest_before(|| time_out.may_have_passed()) {
                assert_eq!(waiters.refused(4), [Status::TimedOut; 4]);
                return Some(());
            }
            queue.restore_abort(LIMIT).unwrap();
            for _ in 0..4 {
                waiters.next().1.unwrap_err();
            }
            None
        })
    });
    // A later wait goes on.
    served.waiting(4, Deadline::from(LIMIT), |waiters| {
        waiters.come_to_rest();
        for vcpu in 0..4 {
            served.bring(vcpu, 99);
            queue.restore_done(vcpu, LIMIT).unwrap();
        }
        waiters.all_run();
    });
}

#[test]
fn the_end_of_a_restore_in_paused_lets_nobody_go() {
    let served = Served::new(2);
    let queue = served.queue();
    let options = RestoreOptions::default();
    queue.restore_begin(options, LIMIT).unwrap();
    served.waiting(2, Deadline::from(LIMIT), |waiters| {
        for vcpu in 0..2 {
            served.bring(vcpu, 7);
            queue.restore_done(vcpu, LIMIT).unwrap();
        }
        waiters.come_to_rest();
        let run = queue.resume(LIMIT).unwrap();
        assert_eq!(run.virt_count, 7);
        assert!(waiters.all_run().iter().all(|got| *got == run.into()));
    });
}

#[test]
fn a_leader_may_leave_and_another_thread_leads() {
    let served = Served::new(4);
    let queue = served.queue();
    for turn in 0..100 {
        served.begin(None);
        scope(|scope| {
            // It mostly comes first and leads, and mostly leaves after the others have come.
            let leader = scope.spawn(|| {
                let short = Duration::from_micros(turn * 20);
                queue.wait_run_by_page(3, short)
            });
            served.waiting(3, Deadline::from(LIMIT), |waiters| {
                let left = leader.join().unwrap();
                assert!(matches!(left, Err(Error::TimedOut { .. })), "{left:?}");
                waiters.come_to_rest();
                queue.restore_abort(LIMIT).unwrap();
                assert_eq!(waiters.refused(3), [Status::Canceled; 3]);
            });
        });
    }
    let soon = Deadline::from(Duration::from_millis(30));
    served.waiting(4, soon, |waiters| {
        for _ in 0..4 {
            let got = waiters.next().1;
            assert!(matches!(got, Err(Error::TimedOut { .. })));
        }
    });
}

#[test]
fn the_shutdown_handle_ends_every_wait_by_the_page() {
    let served = Served::new(8);
    served.waiting(8, Deadline::NEVER, |waiters| {
        waiters.come_to_rest();
        served.frontend.shutdown_handle().shut_down();
        for _ in 0..8 {
            let got = waiters.next().1;
            assert!(matches!(got, Err(Error::ShutDown)), "{got:?}");
        }
    });
}

#[test]
fn a_dead_backend_is_an_error_for_all_who_wait_and_for_who_finds_running() {
    for running in [false, true] {
        let mut served = Served::new(8);
        if running {
            served.queue().resume(LIMIT).unwrap();
            served.backend.kill();
            let page = served.frontend.time_page().read().unwrap();
            assert_eq!(page.phase, Phase::Running, "it says what was last");
            let got = served.queue().wait_run_by_page(0, LIMIT);
            assert!(matches!(got, Err(Error::Disconnected)), "{got:?}");
            continue;
        }
        let Served { backend, frontend } = &mut served;
        waiting(frontend, 8, Deadline::NEVER, |waiters| {
            waiters.come_to_rest();
            backend.kill();
            for _ in 0..8 {
                let got = waiters.next().1;
                assert!(matches!(got, Err(Error::Disconnected)), "{got:?}");
            }
        });
    }
}
