//! A restore that is open when the backend ends.

use super::*;

#[test]
fn a_restore_goes_on_and_the_gate_opens_at_the_last_vcpu() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(3);
        served.begin_restore(autorun());
        let queue = served.queue();
        queue.set_vm(&[row(1, 5_000)], LIMIT).unwrap();
        assert_eq!(queue.restore_vcpu(&row(0, 9_000), LIMIT).unwrap(), 2);
        let waits = queue.submit(&Operation::wait_run(0)).unwrap();
        queue.kick();
        served.info();
        served.end(end);
        assert!(waits.wait(LIMIT).is_err(), "nobody runs");

        let served = life.serve();
        let queue = served.queue();
        let info = served.info();
        assert_eq!(
            (info.phase, info.epoch, info.restored),
            (Phase::Restoring, 2, 1)
        );
        // A vCPU that is done stays done, and what another one staged is kept.
        let entry = RegValue::new(Register::TimerCval.id(Abi::Arm64), 1);
        let busy = queue.set_regs(0, &[entry], LIMIT).unwrap_err();
        assert_eq!(busy.status(), Some(Status::Busy));
        the_gate_opens_at_the_last_vcpu(queue);
    }
}

#[test]
fn a_restore_that_is_aborted_after_a_restart_leads_back_to_the_vm_from_before() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.set(1, Register::TimerCval, 77);
    served.set(0, Register::TimerCnt, 123_456);
    served.begin_restore(autorun());
    served
        .queue()
        .set_vm(&[row(0, 5), row(1, 6)], LIMIT)
        .unwrap();
    served.end(End::Killed);
    let served = life.serve();
    served.queue().restore_abort(LIMIT).unwrap();
    let vm = served.vm(2);
    assert_eq!(served.info().phase, Phase::Paused);
    assert_eq!(
        (vm.virt_count, vm.vcpus[1].get(Register::TimerCval)),
        (123_456, Some(77))
    );
    assert_eq!(vm.vcpus[0].get(Register::TimerCval), Some(0));
}

#[test]
fn a_restores_time_out_goes_on() {
    for dead_until_it_passed in [false, true] {
        with_a_time_out(|time_out| {
            let life = Life::new();
            let served = life.serve();
            served.configure(4);
            let began = Instant::now();
            served.begin_restore(autorun().timeout(time_out.length()));
            served.queue().restore_vcpu(&row(1, 5), LIMIT).unwrap();
            served.end(End::Killed);

            let mut served = if dead_until_it_passed {
                time_out.scene_is_set()?;
                while began.elapsed() <= time_out.length() {
                    std::thread::yield_now();
                }
                life.serve()
            } else {
                let served = life.serve();
                let late = served.queue().submit(&Operation::wait_run(1)).unwrap();
                served.queue().kick();
                // Requests of one queue are carried out in order.
                served.info();
                time_out.scene_is_set()?;
                let late = late.wait(LIMIT).unwrap_err();
                let refusal = late.refusal().unwrap();
                assert_eq!((refusal.status, refusal.detail), (Status::TimedOut, 3));
                served
            };
            // The log says it whether or not anybody waits.
            served
                .backend
                .log_with("Restore timed out: 3 of 4 vCPUs missing: 0, 2-3");
            assert!(began.elapsed() >= time_out.length());
            let info = served.info();
            assert_eq!((info.phase, info.restored), (Phase::Restoring, 1));
            assert!(served.backend.terminate().success());
            Some(())
        });
    }
}

#[test]
fn a_time_out_that_has_passed_does_not_pass_again() {
    let life = Life::new();
    let served = life.serve();
    served.configure(1);
    let options = autorun().timeout(Duration::from_nanos(1));
    served.begin_restore(options);
    // It has passed by the next request.
    served.info();
    served.end(End::Killed);
    let mut served = life.serve();
    served.info();
    assert!(served.backend.terminate().success());
    assert!(
        !served.backend.log().contains("timed out"),
        "{}",
        served.backend.log()
    );
}

#[test]
fn the_last_restore_done_lets_those_run_who_ask_after_a_restart() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.begin_restore(autorun());
    for vcpu in 0..2 {
        served
            .queue()
            .restore_vcpu(&row(vcpu, 1_000), LIMIT)
            .unwrap();
    }
    let run = served.queue().wait_run(0, LIMIT).unwrap();
    served.end(End::Killed);
    let served = life.serve();
    let again = served.queue().wait_run(1, Deadline::from(LIMIT)).unwrap();
    assert_eq!((again.cntvoff, again.cntpoff), (run.cntvoff, run.cntpoff));
    assert!(again.host_count > run.host_count);
}
