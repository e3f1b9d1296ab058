use super::*;

const EPOCH: u64 = 7;

fn kind(op: Op) -> Kind {
    Kind {
        op,
        done: op == Op::RestoreDone,
        autorun: false,
    }
}

/// A history in which a restore was opened in [`EPOCH`].
fn opened() -> History {
    let history = History::default();
    history.learn(kind(Op::RestoreBegin), Status::Ok, EPOCH, Some(0));
    history
}

fn found(phase: Phase, epoch: u64) -> Recovered {
    Recovered {
        phase,
        epoch,
        unanswered_begins: 1,
        unanswered_dones: 0,
    }
}

#[test]
fn an_unknown_operation_is_not_sent_again() {
    let history = opened();
    let mut intent = history.intent(kind(Op::Unknown(0x777)), 0, 0);
    let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 0);
    assert_eq!(again, Replay::Answer(Status::Busy));
    assert_eq!(history.judge(&intent, Status::Busy), Verdict::Uncertain);
}

#[test]
fn an_epoch_that_was_over_when_it_was_named_is_refused_as_always() {
    let history = opened();
    for op in [Op::RestoreBegin, Op::SetRegs, Op::Resume] {
        let mut intent = history.intent(kind(op), EPOCH - 1, 0);
        let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 1);
        assert_eq!(again, Replay::Send, "{op}");
        assert_eq!(history.judge(&intent, Status::Stale), Verdict::Refused);
    }
}

#[test]
fn a_named_epoch_is_not_written_over() {
    let history = opened();
    let mut intent = history.intent(kind(Op::WaitRun), EPOCH, 0);
    let again = history.again(&mut intent, &found(Phase::Running, EPOCH + 1), 0);
    assert_eq!(again, Replay::Send);
}

#[test]
fn an_epoch_that_another_queue_may_have_opened_proves_nothing() {
    let history = opened();
    let grown = found(Phase::Restoring, EPOCH + 1);
    let mut intent = history.intent(kind(Op::RestoreBegin), 0, 0);
    assert_eq!(
        history.again(&mut intent, &grown, 1),
        Replay::Answer(Status::Ok)
    );
    let of_two = Recovered {
        unanswered_begins: 2,
        ..grown
    };
    assert_ne!(
        history.again(&mut intent, &of_two, 1),
        Replay::Answer(Status::Ok)
    );
    assert_eq!(history.judge(&intent, Status::Busy), Verdict::Uncertain);
}

#[test]
fn a_restore_that_is_known_to_be_complete_was_not_aborted() {
    let history = opened();
    history.learn(kind(Op::RestoreDone), Status::Ok, EPOCH, Some(0));
    let mut intent = history.intent(kind(Op::RestoreAbort), 0, 0);
    let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 0);
    assert_eq!(again, Replay::SendIn(EPOCH));
    assert_eq!(history.judge(&intent, Status::Busy), Verdict::Refused);
}

#[test]
fn a_restore_that_armed_the_vm_may_have_been_aborted_after_its_end() {
    let asked = |phase, pause: bool| {
        let history = History::default();
        let begin = Kind {
            autorun: true,
            ..kind(Op::RestoreBegin)
        };
        history.learn(begin, Status::Ok, EPOCH, None);
        history.learn(kind(Op::RestoreDone), Status::Ok, EPOCH, Some(0));
        history.confirm.store(true, Ordering::Release);
        if pause {
            history.intent(kind(Op::Pause), 0, 0);
        }
        let mut intent = history.intent(kind(Op::RestoreAbort), 0, 0);
        let again = history.again(&mut intent, &found(phase, EPOCH), 0);
        (again, history.judge(&intent, Status::Busy))
    };
    assert_eq!(asked(Phase::Paused, false).0, Replay::Answer(Status::Ok));
    let unsure = (Replay::Answer(Status::Busy), Verdict::Uncertain);
    assert_eq!(asked(Phase::Paused, true), unsure);
    // Not yet; unless a RESUME after it led there.
    let sent = Replay::SendIn(EPOCH);
    assert_eq!(asked(Phase::Armed, false), (sent, Verdict::Uncertain));
    // It was confirmed before the abort came.
    assert_eq!(asked(Phase::Running, false), (sent, Verdict::Refused));
}

#[test]
fn a_reset_ends_a_restore_without_completing_it() {
    let history = opened();
    let mut intent = history.intent(kind(Op::RestoreDone), 0, 0);
    history.again(&mut intent, &found(Phase::New, EPOCH), 0);
    assert_eq!(history.judge(&intent, Status::Busy), Verdict::Done);
    history.resetting();
    assert_eq!(history.judge(&intent, Status::Busy), Verdict::Refused);
}
