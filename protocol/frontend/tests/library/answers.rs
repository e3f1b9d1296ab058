//! Answers other than OK: refusals, and bytes that no backend should write.

use crate::LONG;
use crate::fake::Fake;
use crate::fake::answer;
use crate::fake::echo;
use crate::fake::info;
use crate::fake::ok;
use crate::fake::pair;
use vhost_user_timer_frontend::Abi;
use vhost_user_timer_frontend::ContentFault;
use vhost_user_timer_frontend::Deadline;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Fault;
use vhost_user_timer_frontend::Op;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::RegValue;
use vhost_user_timer_frontend::Register;
use vhost_user_timer_frontend::RingFault;
use vhost_user_timer_frontend::Status;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::wire::present;
use zerocopy::IntoBytes;

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
        (
            Status::Busy,
            0,
            "EBUSY (not in this phase): the VM is NEW; it is accepted in PAUSED, RUNNING, ARMED",
        ),
        // It is accepted in RUNNING.
        (
            Status::Busy,
            2,
            "EBUSY (not in this phase): the VM is RESTORING, 2 vCPUs missing; it is accepted in \
             PAUSED, RUNNING, ARMED",
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
    let busy = |op: Op, detail| {
        let raw = Operation::raw(op, u32::MAX, &[], 0).in_epoch(how(Status::Busy, detail));
        let text = text(queue.perform(&raw, LONG).unwrap_err());
        let (_, why) = text.split_once("phase): ").unwrap();
        why.to_owned()
    };
    assert_eq!(
        busy(Op::SetCounterOffset, 2),
        "the VM is RUNNING; it is accepted in PAUSED, RESTORING"
    );
    assert_eq!(
        busy(Op::SetVm, 4),
        "the VM is ARMED, or RESTORING with 4 vCPUs missing (info tells which); it is accepted in \
         RESTORING, ARMED"
    );
    assert_eq!(
        busy(Op::RestoreAbort, 1),
        "the VM is PAUSED; it is accepted in RESTORING, ARMED"
    );
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
