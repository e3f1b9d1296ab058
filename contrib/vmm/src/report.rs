//! What the program prints: one JSON object a line.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

/// A line of output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// After each round.
    Round(Round),
    /// At the end.
    Verdict(Verdict),
}

/// One time that the guest ran: from the first vCPU's entry until all were stopped. Counts are
/// ticks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) round: u32,
    /// What was before: `boot`, `restore`, `resume`, …
    pub(crate) how: String,
    pub(crate) gate: String,
    /// The order in which the vCPUs' threads were started; the last one was late.
    pub(crate) order: Vec<u32>,
    /// What was killed, and when.
    pub(crate) killed: Option<String>,
    pub(crate) epoch: Option<u64>,
    /// What every vCPU was released with.
    pub(crate) cntvoff: Option<u64>,
    pub(crate) cntpoff: Option<u64>,
    /// The host count at which the VM became RUNNING.
    pub(crate) confirmed_at: Option<u64>,
    /// How often the offset was put into KVM.
    pub(crate) applies: u32,
    /// Why KVM refused the offset, once for each time.
    pub(crate) refused: Vec<String>,
    /// How far KVM's count was ahead of the offset's when the offset was in: at least and at most.
    pub(crate) ahead: Option<(i64, i64)>,
    /// The same when the vCPUs were stopped.
    pub(crate) ahead_at_end: Option<(i64, i64)>,
    pub(crate) vcpus: Vec<VcpuRound>,
}

/// What one vCPU observed in a round. Counts are ticks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VcpuRound {
    pub(crate) vcpu: u32,
    /// The guest has not turned it off.
    pub(crate) on: bool,
    /// The host's CNTVCT just before the first KVM_RUN.
    pub(crate) entered_at: u64,
    /// The guest's first reading; none if this vCPU did not read its counter.
    pub(crate) first: Option<u64>,
    pub(crate) readings: u64,
    pub(crate) below_published: u64,
    pub(crate) below_own: u64,
    /// The largest such difference since the guest was booted.
    pub(crate) worst: u64,
    pub(crate) interrupts: u64,
    pub(crate) early: u64,
    pub(crate) spurious: u64,
    /// The longest delay of an interrupt since the guest was booted.
    pub(crate) latest: u64,
    /// 1 if the timer was overdue when the round ended by its time limit.
    pub(crate) lost: u64,
    /// How often this vCPU began at its entry point since the guest was booted.
    pub(crate) starts: u64,
}

/// The sums of all rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) rounds: u32,
    /// Rounds with another offset in KVM than the VM's, with a wrong reading, or with an interrupt
    /// that came early or not at all.
    pub(crate) bad_rounds: u32,
    /// Rounds with another offset in KVM than the VM's.
    pub(crate) other_offset: u32,
    pub(crate) below_published: u64,
    pub(crate) below_own: u64,
    pub(crate) worst: u64,
    pub(crate) early: u64,
    pub(crate) lost: u64,
    pub(crate) interrupts: u64,
    pub(crate) refused: u32,
    /// vCPUs that entered the guest, or read its counter, before the VM was RUNNING.
    pub(crate) ran_before_confirmation: u32,
}

impl Event {
    /// Prints the line.
    pub(crate) fn print(&self) -> io::Result<()> {
        let line = serde_json::to_string(self)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{line}")?;
        out.flush()
    }
}

impl Verdict {
    pub(crate) fn add(&mut self, round: &Round) {
        let sum = |count: fn(&VcpuRound) -> u64| round.vcpus.iter().map(count).sum::<u64>();
        let (below_published, below_own) = (sum(|v| v.below_published), sum(|v| v.below_own));
        let (early, lost) = (sum(|v| v.early), sum(|v| v.lost));
        let other_offset = round.has_another_offset();
        self.rounds += 1;
        self.bad_rounds +=
            u32::from(other_offset || below_published + below_own + early + lost > 0);
        self.other_offset += u32::from(other_offset);
        self.below_published += below_published;
        self.below_own += below_own;
        self.early += early;
        self.lost += lost;
        self.interrupts += sum(|v| v.interrupts);
        self.refused += round.refused.len() as u32;
        let worst = round.vcpus.iter().map(|v| v.worst).max().unwrap_or(0);
        self.worst = self.worst.max(worst);
        let ran_before = round.vcpus.iter().filter(|vcpu| round.ran_before(vcpu));
        self.ran_before_confirmation += ran_before.count() as u32;
    }
}

impl Round {
    /// Whether KVM's count cannot be the VM's at the end: by best effort, cannot be as far ahead as
    /// it was at the beginning.
    fn has_another_offset(&self) -> bool {
        let exactly = (0, 0);
        let expected = match &*self.gate {
            "best-effort" => self.ahead.unwrap_or(exactly),
            _ => exactly,
        };
        self.ahead_at_end
            .is_some_and(|(least, most)| least > expected.1 || most < expected.0)
    }

    /// Whether this vCPU ran before the VM was RUNNING: by the host's clock, or by what its first
    /// reading is on the host's.
    fn ran_before(&self, vcpu: &VcpuRound) -> bool {
        let (Some(confirmed_at), Some(cntvoff)) = (self.confirmed_at, self.cntvoff) else {
            return false;
        };
        let is_before = |count: u64| count < confirmed_at;
        let first = vcpu.first.map(|first| first.wrapping_add(cntvoff));
        vcpu.on && (is_before(vcpu.entered_at) || first.is_some_and(is_before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> Round {
        let vcpu = VcpuRound {
            on: true,
            entered_at: 1_010,
            first: Some(20),
            ..Default::default()
        };
        Round {
            cntvoff: Some(1_000),
            confirmed_at: Some(1_010),
            vcpus: vec![vcpu.clone(), vcpu],
            ..Default::default()
        }
    }

    fn verdict(round: &Round) -> Verdict {
        let mut verdict = Verdict::default();
        verdict.add(round);
        verdict
    }

    #[test]
    fn a_round_in_which_nothing_is_wrong_is_good() {
        let good = Verdict {
            rounds: 1,
            ..Default::default()
        };
        assert_eq!(verdict(&round()), good);
    }

    #[test]
    fn each_wrong_reading_and_interrupt_makes_a_round_bad() {
        type Wrong = fn(&mut VcpuRound);
        let wrongs: [Wrong; 4] = [
            |v| v.below_published = 1,
            |v| v.below_own = 1,
            |v| v.early = 1,
            |v| v.lost = 1,
        ];
        for wrong in wrongs {
            let mut round = round();
            wrong(&mut round.vcpus[1]);
            assert_eq!(verdict(&round).bad_rounds, 1);
        }
    }

    #[test]
    fn a_round_is_bad_where_the_offset_cannot_be_the_vms() {
        for (ahead, bad) in [((-9, 9), 0), ((0, 9), 0), ((1, 9), 1), ((-9, -1), 1)] {
            let mut round = round();
            round.ahead_at_end = Some(ahead);
            let verdict = verdict(&round);
            assert_eq!((verdict.bad_rounds, verdict.other_offset), (bad, bad));
        }
    }

    #[test]
    fn by_best_effort_a_count_stays_as_far_ahead_as_it_was() {
        for (ahead, bad) in [((-9, -1), 1), ((2, 3), 0), ((4, 9), 0), ((5, 9), 1)] {
            let mut round = round();
            round.gate = "best-effort".to_owned();
            round.ahead = Some((1, 4));
            round.ahead_at_end = Some(ahead);
            assert_eq!(verdict(&round).other_offset, bad, "{ahead:?}");
        }
    }

    #[test]
    fn a_vcpu_that_entered_or_read_before_the_confirmation_is_counted() {
        let mut entered = round();
        entered.vcpus[0].entered_at = 1_009;
        assert_eq!(verdict(&entered).ran_before_confirmation, 1);
        let mut read = round();
        read.vcpus[1].first = Some(9);
        assert_eq!(verdict(&read).ran_before_confirmation, 1);
        read.vcpus[1].on = false;
        assert_eq!(verdict(&read).ran_before_confirmation, 0);
    }
}
