//! Waits by the page while the backend is killed.

use super::*;

#[test]
fn who_waits_when_the_backend_is_killed_goes_once_with_the_offsets_of_the_next() {
    let program = find_program().unwrap();
    let mut served = Served::kept(8);
    for round in 0..8 {
        served.begin(None);
        let Served { backend, frontend } = &mut served;
        let queue = frontend.queue();
        waiting(frontend, 8, LIMIT.into(), |waiters| {
            if round % 2 == 0 {
                waiters.come_to_rest();
            }
            for vcpu in 0..8 {
                if vcpu == round {
                    backend.kill();
                    backend.relaunch_with_state(&program, &QUEUES).unwrap();
                }
                bring(queue, vcpu, 1 << 40 | u64::from(vcpu));
                waiters.nobody_came();
                queue.restore_done(vcpu, LIMIT).unwrap();
            }
            let info = queue.info(LIMIT).unwrap();
            assert_eq!(info.phase, Phase::Running);
            for offsets in waiters.all_run() {
                assert_eq!(offsets.cntvoff, info.cntvoff);
                assert_eq!(offsets.cntpoff, info.cntpoff);
            }
        });
        queue.pause(LIMIT).unwrap();
    }
    // An abort before the outage, and one during it.
    for killed_first in [false, true] {
        served.begin(None);
        let Served { backend, frontend } = &mut served;
        let queue = frontend.queue();
        waiting(frontend, 8, LIMIT.into(), |waiters| {
            waiters.come_to_rest();
            if !killed_first {
                queue.restore_abort(LIMIT).unwrap();
            }
            backend.kill();
            backend.relaunch_with_state(&program, &QUEUES).unwrap();
            if killed_first {
                queue.restore_abort(LIMIT).unwrap();
            }
            assert_eq!(waiters.refused(8), [Status::Canceled; 8]);
        });
    }
}

#[test]
fn a_page_of_before_the_outage_lets_nobody_run_after_it() {
    let program = find_program().unwrap();
    let mut served = Served::kept(1);
    for _ in 0..10 {
        served.queue().resume(LIMIT).unwrap();
        served.backend.kill();
        served
            .backend
            .relaunch_with_state(&program, &QUEUES)
            .unwrap();
        // The page may not have been written again, but it no longer says RUNNING.
        let queue = &served.frontend.queues()[1];
        queue.pause(LIMIT).unwrap();
        let got = queue.wait_run_by_page(0, Duration::ZERO);
        assert!(matches!(got, Err(Error::TimedOut { .. })), "{got:?}");
    }
}
