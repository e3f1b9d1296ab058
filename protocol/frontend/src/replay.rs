//! Asking again what a lost connection left unanswered, and why that is safe.
//!
//! A request that was answered is never sent again, whether its answer was looked at or not. One
//! that was not may have been done, or not. What is done about it rests on this:
//!
//! - There is one frontend, this one, so nothing changes the VM in between but its other requests.
//! - Requests of one queue are sent again in their order, and whoever waits for an answer
//!   before he asks for more has nothing else under way: a register write of his cannot land
//!   in a later phase.
//! - The repetition of a request that changes something names the epoch that it meant, where
//!   the first had 0 for the current one. What was meant for one restore can so never get into the
//!   next, nor a RESUME from before a restore let the VM run after it.
//! - The state in which the new backend has the VM is known before anything is sent.
//! - What its caller has given up is not sent again.
//!
//! What that comes to for each operation is in the table at [`Reconnect`](super::Reconnect).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::Info;
use crate::error::StateLoss;
use vhost_user_timer_protocol::{Op, Phase, Status};

/// What is known of the VM from answers: by this, repetitions are judged.
#[derive(Default)]
pub(crate) struct History {
    epoch: AtomicU64,
    /// The last epoch in which a restore is known to have been open.
    opened: AtomicU64,
    /// The last epoch in which a RESTORE_DONE was told that it was the last.
    completed: AtomicU64,
    /// The last epoch for which a RESTORE_ABORT was submitted.
    aborting: AtomicU64,
    /// How many RESTORE_ABORTs were done, and the last epoch in which one was.
    aborted: AtomicU32,
    aborted_in: AtomicU64,
    configured: AtomicBool,
    /// How many vCPUs the VM has; 0 where that is not known.
    vcpus: AtomicU32,
    /// Grows when the host counter may have become another one, or is about to.
    counter: AtomicU64,
}

/// What a request was meant for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Intent {
    pub(crate) op: Op,
    /// The epoch that it is to be done in.
    epoch: u64,
    /// The epoch that the caller named, or 0.
    named: u64,
    /// That epoch was over already.
    over: bool,
    /// How many RESTORE_ABORTs were done before.
    aborted: u32,
    /// It may have been done on a former connection.
    repeated: bool,
    /// It may have been done, and nothing will tell.
    unsure: bool,
}

/// What a new connection finds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recovered {
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    /// Requests that may have been done: how many RESTORE_BEGINs and RESTORE_DONEs.
    pub(crate) unanswered_begins: usize,
    pub(crate) unanswered_dones: usize,
}

/// What becomes of a request on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replay {
    /// It is sent.
    Send,
    /// It is sent, for this epoch.
    SendIn(u64),
    /// It is answered here.
    Answer(Status),
}

/// What a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// What it says.
    Refused,
    /// The request was done before.
    Done,
    /// It may have been.
    Uncertain,
}

fn grow(least: &AtomicU64, epoch: u64) {
    if least.load(Ordering::Acquire) < epoch {
        least.fetch_max(epoch, Ordering::AcqRel);
    }
}

/// Whether doing it changes the VM, as far as is known.
fn changes(op: Op) -> bool {
    op.row().is_none_or(|row| row.effect.changes_vm())
}

impl History {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The host counter may be another one from now on: an anchor comes or goes.
    pub(crate) fn counter_changes(&self) {
        self.counter.fetch_add(1, Ordering::AcqRel);
    }

    /// Where this is the same as before, the host counter is.
    pub(crate) fn counter_revision(&self) -> u64 {
        self.counter.load(Ordering::Acquire)
    }

    /// How many RESTORE_ABORTs were done.
    pub(crate) fn aborted(&self) -> u32 {
        self.aborted.load(Ordering::Acquire)
    }

    /// Whether a RESTORE_ABORT may have overtaken a WAIT_RUN on another queue: then nothing would
    /// answer the WAIT_RUN before the next RESUME. That goes for one that was sent again, and for
    /// one that names the restore's epoch.
    pub(crate) fn was_overtaken(&self, intent: &Intent) -> bool {
        intent.op == Op::WaitRun
            && (intent.repeated || intent.named != 0)
            && intent.aborted != self.aborted()
            && intent.epoch == self.aborted_in.load(Ordering::Acquire)
    }

    /// Whether the restore of this epoch is known to be aborted.
    pub(crate) fn was_aborted(&self, epoch: u64) -> bool {
        self.aborted_in.load(Ordering::Acquire) == epoch
    }

    /// A request in flight is asked for again.
    pub(crate) fn reissued(&self, intent: &mut Intent) {
        intent.aborted = self.aborted();
    }

    /// What a request that is submitted now means, behind `begins` RESTORE_BEGINs that are not
    /// answered; `named` is the epoch in its header.
    pub(crate) fn intent(&self, op: Op, named: u64, begins: u16) -> Intent {
        let epoch = match named {
            0 => self.epoch().wrapping_add(begins.into()),
            named => named,
        };
        match op {
            Op::RestoreAbort => grow(&self.aborting, epoch),
            Op::SetCounterAnchor => self.counter_changes(),
            _ => {}
        }
        Intent {
            op,
            epoch,
            named,
            over: named != 0 && named < self.epoch(),
            aborted: self.aborted.load(Ordering::Acquire),
            repeated: false,
            unsure: false,
        }
    }

    /// Takes in an answer's header, and the first number of its body.
    pub(crate) fn learn(&self, op: Op, status: Status, epoch: u64, number: u32) {
        grow(&self.epoch, epoch);
        if op == Op::SetCounterAnchor {
            self.counter_changes();
        }
        if status != Status::Ok {
            return;
        }
        match op {
            Op::ConfigureVm => self.configured.store(true, Ordering::Release),
            Op::RestoreBegin | Op::SetVm => grow(&self.opened, epoch),
            Op::RestoreDone => {
                grow(&self.opened, epoch);
                if number == 0 {
                    grow(&self.completed, epoch);
                }
            }
            Op::RestoreAbort => {
                grow(&self.aborted_in, epoch);
                self.aborted.fetch_add(1, Ordering::AcqRel);
            }
            _ => {}
        }
    }

    /// Takes in what the config space or GET_INFO says.
    pub(crate) fn learn_info(&self, info: &Info) {
        grow(&self.epoch, info.epoch);
        if info.phase == Phase::Restoring {
            grow(&self.opened, info.epoch);
        }
        self.learn_vcpus(info.vcpus);
        if info.phase != Phase::New {
            self.configured.store(true, Ordering::Release);
        }
    }

    pub(crate) fn learn_vcpus(&self, vcpus: u32) {
        self.vcpus.store(vcpus, Ordering::Release);
    }

    /// How many vCPUs the VM has, if that is known.
    pub(crate) fn vcpus(&self) -> Option<u32> {
        Some(self.vcpus.load(Ordering::Acquire)).filter(|&vcpus| vcpus > 0)
    }

    /// RESET_DEVICE is about to be sent: to find the VM in NEW is no loss any more.
    pub(crate) fn resetting(&self) {
        self.counter_changes();
        self.configured.store(false, Ordering::Release);
        self.opened.store(0, Ordering::Release);
        self.learn_vcpus(0);
    }

    /// Why this cannot be the VM that this history is of.
    pub(crate) fn contradicts(&self, info: &Info) -> Option<StateLoss> {
        if info.epoch < self.epoch() {
            Some(StateLoss::EarlierEpoch {
                found: info.epoch,
                seen: self.epoch(),
            })
        } else if info.phase == Phase::New && self.configured.load(Ordering::Acquire) {
            Some(StateLoss::NotConfigured)
        } else {
            None
        }
    }

    /// What to do about a request that was sent and not answered. `of_queue` is how many of
    /// the RESTORE_BEGINs that [`Recovered`] counts are of its queue.
    pub(crate) fn again(&self, intent: &mut Intent, found: &Recovered, of_queue: usize) -> Replay {
        let uncertain = |intent: &mut Intent| {
            intent.unsure = true;
            Replay::Answer(Status::Busy)
        };
        intent.repeated = !intent.over;
        let meant = intent.epoch;
        let send = match intent.named {
            0 if changes(intent.op) || intent.op == Op::WaitRun => Replay::SendIn(meant),
            _ => Replay::Send,
        };
        match intent.op {
            Op::Unknown(_) => uncertain(intent),
            Op::RestoreBegin if found.epoch <= meant => {
                intent.repeated = false;
                Replay::Send
            }
            Op::RestoreBegin if intent.over => Replay::Send,
            // It may be another queue's that opened the epoch.
            Op::RestoreBegin if found.unanswered_begins > of_queue => uncertain(intent),
            Op::RestoreBegin => Replay::Answer(Status::Ok),
            Op::RestoreAbort => {
                let closed = found.phase != Phase::Restoring && found.epoch == meant;
                let by_whom = self.opened.load(Ordering::Acquire) == meant
                    && self.completed.load(Ordering::Acquire) != meant;
                match closed && by_whom {
                    true if found.unanswered_dones > 0 => uncertain(intent),
                    true => Replay::Answer(Status::Ok),
                    false => {
                        intent.repeated = false;
                        send
                    }
                }
            }
            Op::WaitRun if intent.aborted != self.aborted.load(Ordering::Acquire) => {
                Replay::Answer(Status::Canceled)
            }
            _ => send,
        }
    }

    /// A request that was not sent yet is sent first on a new connection.
    pub(crate) fn meant_in(&self, intent: &mut Intent, begins: u16) {
        *intent = self.intent(intent.op, intent.named, begins);
    }

    /// What it means that the request was refused.
    pub(crate) fn judge(&self, intent: &Intent, status: Status) -> Verdict {
        if intent.unsure {
            return Verdict::Uncertain;
        }
        if !intent.repeated {
            return Verdict::Refused;
        }
        match (intent.op, status) {
            (Op::RestoreDone, Status::Busy) => {
                if self.opened.load(Ordering::Acquire) != intent.epoch {
                    Verdict::Refused
                } else if self.aborting.load(Ordering::Acquire) == intent.epoch {
                    Verdict::Uncertain
                } else {
                    Verdict::Done
                }
            }
            // What was staged or done in an epoch went with it.
            (Op::SetVm | Op::RestoreDone | Op::RestoreAbort, Status::Stale) => Verdict::Refused,
            (op, Status::Busy | Status::Stale) if changes(op) => Verdict::Uncertain,
            _ => Verdict::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: u64 = 7;

    /// A history in which a restore was opened in [`EPOCH`].
    fn opened() -> History {
        let history = History::default();
        history.learn(Op::RestoreBegin, Status::Ok, EPOCH, 0);
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
        let mut intent = history.intent(Op::Unknown(0x777), 0, 0);
        let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 0);
        assert_eq!(again, Replay::Answer(Status::Busy));
        assert_eq!(history.judge(&intent, Status::Busy), Verdict::Uncertain);
    }

    #[test]
    fn an_epoch_that_was_over_when_it_was_named_is_refused_as_ever() {
        let history = opened();
        for op in [Op::RestoreBegin, Op::SetRegs, Op::Resume] {
            let mut intent = history.intent(op, EPOCH - 1, 0);
            let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 1);
            assert_eq!(again, Replay::Send, "{op}");
            assert_eq!(history.judge(&intent, Status::Stale), Verdict::Refused);
        }
    }

    #[test]
    fn a_named_epoch_is_not_written_over() {
        let history = opened();
        let mut intent = history.intent(Op::WaitRun, EPOCH, 0);
        let again = history.again(&mut intent, &found(Phase::Running, EPOCH + 1), 0);
        assert_eq!(again, Replay::Send);
    }

    #[test]
    fn an_epoch_that_another_queue_may_have_opened_proves_nothing() {
        let history = opened();
        let grown = found(Phase::Restoring, EPOCH + 1);
        let mut intent = history.intent(Op::RestoreBegin, 0, 0);
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
        history.learn(Op::RestoreDone, Status::Ok, EPOCH, 0);
        let mut intent = history.intent(Op::RestoreAbort, 0, 0);
        let again = history.again(&mut intent, &found(Phase::Paused, EPOCH), 0);
        assert_eq!(again, Replay::SendIn(EPOCH));
        assert_eq!(history.judge(&intent, Status::Busy), Verdict::Refused);
    }

    #[test]
    fn a_reset_ends_a_restore_without_completing_it() {
        let history = opened();
        let mut intent = history.intent(Op::RestoreDone, 0, 0);
        history.again(&mut intent, &found(Phase::New, EPOCH), 0);
        assert_eq!(history.judge(&intent, Status::Busy), Verdict::Done);
        history.resetting();
        assert_eq!(history.judge(&intent, Status::Busy), Verdict::Refused);
    }
}
