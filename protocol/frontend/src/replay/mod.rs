//! Sending again what a lost connection left unanswered, and why that is safe.
//!
//! A request that was answered is never sent again, whether or not its answer was read. A request
//! without an answer may or may not have been carried out. Replaying it relies on this:
//!
//! - There is one frontend, this one, so only its own other requests change the VM meanwhile.
//! - The requests of one queue are sent again in their order. A thread that waits for each answer
//!   has nothing else in flight, so its register writes cannot land in a later phase.
//! - If a request that changes the VM named epoch 0, the current one, its repetition names the
//!   epoch it meant. So a request for one restore never reaches the next, and a RESUME from before
//!   a restore never lets the VM run after it.
//! - The VM's state in the new backend is known before anything is sent.
//! - A request that its caller has abandoned is not sent again.
//!
//! [`Reconnect`](super::Reconnect) lists the result for each operation.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::Info;
use crate::error::StateLoss;
use vhost_user_timer_protocol::{Op, Phase, Status};

/// What of a request, beside its epoch, decides about its repetition.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) op: Op,
    /// RESTORE_DONE, or an operation with the flag DONE.
    pub(crate) done: bool,
    /// RESTORE_BEGIN with AUTORUN.
    pub(crate) autorun: bool,
}

/// What answers have told of the VM. Repetitions are judged by it.
#[derive(Default)]
pub(crate) struct History {
    epoch: AtomicU64,
    /// The last epoch in which a restore is known to have been open.
    opened: AtomicU64,
    /// The last epoch in which a RESTORE_DONE was answered that no vCPU is missing.
    completed: AtomicU64,
    /// The last epoch of a restore with AUTORUN.
    autorun: AtomicU64,
    /// The last epoch for which a PAUSE was submitted.
    pausing: AtomicU64,
    /// The last epoch for which a RESTORE_ABORT was submitted.
    aborting: AtomicU64,
    /// How many RESTORE_ABORTs were carried out, and the last epoch in which one was.
    aborted: AtomicU32,
    aborted_in: AtomicU64,
    /// How often waiting threads were woken because the offsets could not be applied, and the last
    /// epoch in which they were.
    recalled: AtomicU64,
    recalled_in: AtomicU64,
    configured: AtomicBool,
    /// The VM has CONFIRM.
    confirm: AtomicBool,
    /// How many vCPUs the VM has; 0: unknown.
    vcpus: AtomicU32,
    /// Grows when the host counter may have changed, or is about to.
    counter: AtomicU64,
}

/// What a request was meant to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Intent {
    pub(crate) kind: Kind,
    /// The epoch that it is meant for.
    epoch: u64,
    /// The epoch that the caller named, or 0.
    named: u64,
    /// That epoch was over when the request was submitted.
    over: bool,
    /// How many RESTORE_ABORTs were carried out before.
    aborted: u32,
    /// How often waiting threads were recalled before.
    recalled: u64,
    /// It may have been carried out on a previous connection.
    repeated: bool,
    /// It may have been carried out, and nothing will tell.
    unsure: bool,
}

/// What a new connection finds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recovered {
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    /// RESTORE_BEGINs and RESTORE_DONEs that may have been carried out.
    pub(crate) unanswered_begins: usize,
    pub(crate) unanswered_dones: usize,
}

/// What happens to a request on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replay {
    /// It is sent.
    Send,
    /// It is sent and names this epoch.
    SendIn(u64),
    /// It is answered here.
    Answer(Status),
}

/// What a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The refusal as it is.
    Refused,
    /// The request was carried out before.
    Done,
    /// The request may have been carried out before.
    Uncertain,
}

fn grow(least: &AtomicU64, epoch: u64) {
    if least.load(Ordering::Acquire) < epoch {
        least.fetch_max(epoch, Ordering::AcqRel);
    }
}

/// Whether the operation may change the VM.
fn changes(op: Op) -> bool {
    op.row().is_none_or(|row| row.effect.changes_vm())
}

impl History {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The host counter may change from now on: an anchor is set or removed.
    pub(crate) fn counter_changes(&self) {
        self.counter.fetch_add(1, Ordering::AcqRel);
    }

    /// While this number is the same, so is the host counter.
    pub(crate) fn counter_revision(&self) -> u64 {
        self.counter.load(Ordering::Acquire)
    }

    /// How many RESTORE_ABORTs were carried out.
    pub(crate) fn aborted(&self) -> u32 {
        self.aborted.load(Ordering::Acquire)
    }

    /// Whether a RESTORE_ABORT may have overtaken a WAIT_RUN on another queue: then nothing would
    /// answer the WAIT_RUN before the next RESUME. That goes for one that was sent again, and for
    /// one that names the restore's epoch.
    pub(crate) fn was_overtaken(&self, intent: &Intent) -> bool {
        intent.kind.op == Op::WaitRun
            && (intent.repeated || intent.named != 0)
            && intent.aborted != self.aborted()
            && intent.epoch == self.aborted_in.load(Ordering::Acquire)
    }

    /// How often waiting threads were recalled.
    pub(crate) fn recalled(&self) -> u64 {
        self.recalled.load(Ordering::Acquire)
    }

    /// Recalls the threads that wait to run in this epoch.
    pub(crate) fn recall(&self, epoch: u64) {
        self.recalled_in.store(epoch, Ordering::Release);
        self.recalled.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether threads were recalled in this epoch since there had been `recalled` recalls.
    pub(crate) fn recalled_since(&self, recalled: u64, epoch: u64) -> bool {
        recalled != self.recalled() && epoch == self.recalled_in.load(Ordering::Acquire)
    }

    /// Whether the thread that waits for this WAIT_RUN is recalled.
    pub(crate) fn was_recalled(&self, intent: &Intent) -> bool {
        intent.kind.op == Op::WaitRun && self.recalled_since(intent.recalled, intent.epoch)
    }

    /// Whether the restore of this epoch is known to be aborted.
    pub(crate) fn was_aborted(&self, epoch: u64) -> bool {
        self.aborted_in.load(Ordering::Acquire) == epoch
    }

    /// A thread takes over a request that is in flight.
    pub(crate) fn reissued(&self, intent: &mut Intent) {
        intent.aborted = self.aborted();
        intent.recalled = self.recalled();
    }

    /// The intent of a request that is submitted now, after `begins` unanswered RESTORE_BEGINs;
    /// `named` is the epoch in its header.
    pub(crate) fn intent(&self, kind: Kind, named: u64, begins: u16) -> Intent {
        let epoch = match named {
            0 => self.epoch().wrapping_add(begins.into()),
            named => named,
        };
        match kind.op {
            Op::RestoreAbort => grow(&self.aborting, epoch),
            Op::Pause => grow(&self.pausing, epoch),
            Op::SetCounterAnchor => self.counter_changes(),
            _ => {}
        }
        Intent {
            kind,
            epoch,
            named,
            over: named != 0 && named < self.epoch(),
            aborted: self.aborted(),
            recalled: self.recalled(),
            repeated: false,
            unsure: false,
        }
    }

    /// Learns from an answer's header; `remaining` is how many vCPUs are missing, where it says so.
    pub(crate) fn learn(&self, kind: Kind, status: Status, epoch: u64, remaining: Option<u32>) {
        grow(&self.epoch, epoch);
        if kind.op == Op::SetCounterAnchor {
            self.counter_changes();
        }
        if status != Status::Ok {
            return;
        }
        if kind.autorun {
            grow(&self.autorun, epoch);
        }
        if kind.done {
            grow(&self.opened, epoch);
            if remaining == Some(0) {
                grow(&self.completed, epoch);
            }
        }
        match kind.op {
            Op::ConfigureVm => self.configured.store(true, Ordering::Release),
            Op::RestoreBegin | Op::SetVm => grow(&self.opened, epoch),
            Op::RestoreAbort => {
                grow(&self.aborted_in, epoch);
                self.aborted.fetch_add(1, Ordering::AcqRel);
            }
            _ => {}
        }
    }

    /// Learns from the config space or GET_INFO.
    pub(crate) fn learn_info(&self, info: &Info) {
        grow(&self.epoch, info.epoch);
        if info.phase == Phase::Restoring {
            grow(&self.opened, info.epoch);
        }
        self.learn_vcpus(info.vcpus);
        self.confirm.store(info.confirm, Ordering::Release);
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

    /// RESET_DEVICE is about to be sent: finding the VM in NEW is no loss from now on.
    pub(crate) fn resetting(&self) {
        self.counter_changes();
        self.configured.store(false, Ordering::Release);
        self.opened.store(0, Ordering::Release);
        self.learn_vcpus(0);
    }

    /// Why this cannot be the VM of this history.
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

    /// What to do about a request that was sent and not answered. `of_queue` is how many of the
    /// RESTORE_BEGINs that [`Recovered`] counts belong to its queue.
    pub(crate) fn again(&self, intent: &mut Intent, found: &Recovered, of_queue: usize) -> Replay {
        let uncertain = |intent: &mut Intent| {
            intent.unsure = true;
            Replay::Answer(Status::Busy)
        };
        intent.repeated = !intent.over;
        let meant = intent.epoch;
        let send = match intent.named {
            0 if changes(intent.kind.op) || intent.kind.op == Op::WaitRun => Replay::SendIn(meant),
            _ => Replay::Send,
        };
        match intent.kind.op {
            Op::Unknown(_) => uncertain(intent),
            Op::RestoreBegin if found.epoch <= meant => {
                intent.repeated = false;
                Replay::Send
            }
            Op::RestoreBegin if intent.over => Replay::Send,
            // Another queue's request may have opened the epoch.
            Op::RestoreBegin if found.unanswered_begins > of_queue => uncertain(intent),
            Op::RestoreBegin => Replay::Answer(Status::Ok),
            Op::RestoreAbort => match self.may_have_aborted(meant, found) {
                Some(true) => uncertain(intent),
                Some(false) => Replay::Answer(Status::Ok),
                None => {
                    // An ARMED that a RESUME led to would refuse it.
                    intent.repeated = found.phase == Phase::Armed;
                    send
                }
            },
            Op::WaitRun if intent.aborted != self.aborted.load(Ordering::Acquire) => {
                Replay::Answer(Status::Canceled)
            }
            _ => send,
        }
    }

    /// Whether a RESTORE_ABORT of this epoch may have been carried out, and if so, whether
    /// something else may have closed the restore instead.
    fn may_have_aborted(&self, meant: u64, found: &Recovered) -> Option<bool> {
        let is = |epoch: &AtomicU64| epoch.load(Ordering::Acquire) == meant;
        let open = matches!(found.phase, Phase::Restoring | Phase::Armed);
        if open || found.epoch != meant || !is(&self.opened) {
            return None;
        }
        // The last RESTORE_DONE leads to ARMED, from which a PAUSE leads on, as the abort does.
        let arms = is(&self.autorun) && self.confirm.load(Ordering::Acquire);
        match arms {
            true if found.phase != Phase::Paused => None,
            true => Some(is(&self.pausing)),
            false if is(&self.completed) => None,
            false => Some(found.unanswered_dones > 0),
        }
    }

    /// A request that was not sent yet is sent for the first time on a new connection.
    pub(crate) fn meant_in(&self, intent: &mut Intent, begins: u16) {
        *intent = self.intent(intent.kind, intent.named, begins);
    }

    /// What the refusal of a request means.
    pub(crate) fn judge(&self, intent: &Intent, status: Status) -> Verdict {
        if intent.unsure {
            return Verdict::Uncertain;
        }
        if !intent.repeated {
            return Verdict::Refused;
        }
        let Kind { op, done, .. } = intent.kind;
        match status {
            Status::Busy if done => {
                if self.opened.load(Ordering::Acquire) != intent.epoch {
                    Verdict::Refused
                } else if self.aborting.load(Ordering::Acquire) == intent.epoch {
                    Verdict::Uncertain
                } else {
                    Verdict::Done
                }
            }
            // Whatever was staged or done in an epoch ended with it.
            Status::Stale if done || matches!(op, Op::SetVm | Op::RestoreAbort) => Verdict::Refused,
            Status::Busy | Status::Stale if changes(op) => Verdict::Uncertain,
            _ => Verdict::Refused,
        }
    }
}

#[cfg(test)]
mod tests;
