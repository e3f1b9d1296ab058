//! What the VMM of contrib/vmm reports of each round: what its guest observed on a real KVM, and
//! when each vCPU entered it. Counts are ticks of the guest's or the host's counter.

use serde::Deserialize;

/// A boot, a restore, or a resume.
#[derive(Clone, Debug, Deserialize)]
pub struct Round {
    /// Its number.
    pub round: u32,
    /// `boot`, `restore` or `resume`.
    pub how: String,
    /// `confirm`, `only` or `none`.
    pub gate: String,
    /// The order in which the threads were started. The last one was held back.
    pub order: Vec<u32>,
    /// `backend-restoring` or `backend-armed` where the backend was killed then.
    pub killed: Option<String>,
    /// The offset of the virtual count that every vCPU was released with.
    pub cntvoff: Option<u64>,
    /// The offset of the physical count that every vCPU was released with.
    pub cntpoff: Option<u64>,
    /// `host_count` of the `run` that the vCPUs were released with.
    pub confirmed_at: Option<u64>,
    /// How often the offset was put into KVM.
    pub applies: u32,
    /// Why KVM refused it, once for each time.
    pub refused: Vec<String>,
    /// How far TIMER_CNT was ahead of what the offset makes it: at least and at most, ticks.
    pub ahead: Option<(i64, i64)>,
    /// The same when the vCPUs had been stopped.
    pub ahead_at_end: Option<(i64, i64)>,
    /// Each vCPU.
    pub vcpus: Vec<Vcpu>,
}

/// One vCPU of a round.
#[derive(Clone, Debug, Deserialize)]
pub struct Vcpu {
    /// Its index.
    pub vcpu: u32,
    /// Whether the guest has it turned on.
    pub on: bool,
    /// The host's CNTVCT just before the thread's first KVM_RUN.
    pub entered_at: u64,
    /// The guest's first reading.
    pub first: Option<u64>,
    /// How many readings.
    pub readings: u64,
    /// Of them, below one that another vCPU had published before.
    pub below_published: u64,
    /// Of them, below the vCPU's own last one.
    pub below_own: u64,
    /// The largest of these differences since the guest was booted.
    pub worst: u64,
    /// Timer interrupts.
    pub interrupts: u64,
    /// Of them, before their time.
    pub early: u64,
    /// Interrupts that were not the timer's.
    pub spurious: u64,
    /// Timers that were due and did not fire.
    pub lost: u64,
}

impl Vcpu {
    /// Readings that were below an earlier one. The vCPU's own are among those that were published.
    pub fn decreases(&self) -> u64 {
        self.below_published.max(self.below_own)
    }
}

impl Round {
    /// Readings that were below an earlier one, of all vCPUs.
    pub fn decreases(&self) -> u64 {
        self.vcpus.iter().map(Vcpu::decreases).sum()
    }

    /// The largest step back since the guest was booted, ticks.
    pub fn worst(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.worst).max().unwrap_or(0)
    }

    /// Whether KVM had another offset at the end than the vCPUs were released with.
    pub fn is_elsewhere(&self) -> bool {
        self.ahead_at_end.is_some_and(|ahead| !contains_zero(ahead))
    }

    /// The vCPUs that were in the guest before [`confirmed_at`](Self::confirmed_at).
    pub fn ran_early(&self) -> Vec<u32> {
        let (Some(confirmed), Some(cntvoff)) = (self.confirmed_at, self.cntvoff) else {
            return Vec::new();
        };
        // A count wraps; the host's counter, near zero after a boot, does not.
        let is_early = |vcpu: &&Vcpu| {
            let first = vcpu.first.map(|first| first.wrapping_add(cntvoff));
            vcpu.entered_at < confirmed || first.is_some_and(|first| first < confirmed)
        };
        self.vcpus
            .iter()
            .filter(is_early)
            .map(|vcpu| vcpu.vcpu)
            .collect()
    }
}

/// Whether a count that is at least and at most so far ahead may be exactly right.
fn contains_zero((least, most): (i64, i64)) -> bool {
    least <= 0 && 0 <= most
}

/// What is wrong with a round that no round may have, one text a finding.
///
/// `vcpus` is how many must have run.
pub fn faults(round: &Round, vcpus: usize) -> Vec<String> {
    let mut faults = Vec::new();
    let mut expect = |holds: bool, what: String| {
        if !holds {
            faults.push(format!("round {} ({}): {what}", round.round, round.how));
        }
    };
    expect(
        round.vcpus.len() == vcpus,
        format!("{} vCPUs reported", round.vcpus.len()),
    );
    for vcpu in &round.vcpus {
        let index = vcpu.vcpu;
        expect(vcpu.readings > 0, format!("vCPU {index} has read nothing"));
        for (count, what) in [
            (vcpu.below_published, "readings below a published one"),
            (vcpu.below_own, "readings below its own last one"),
            (vcpu.early, "timer interrupts before their time"),
            (vcpu.spurious, "interrupts of no timer"),
            (vcpu.lost, "timers that did not fire"),
        ] {
            let worst = vcpu.worst;
            expect(
                count == 0,
                format!("vCPU {index}: {count} {what} (worst: {worst} ticks)"),
            );
        }
        expect(
            vcpu.interrupts > 0,
            format!("vCPU {index} has had no timer interrupt"),
        );
    }
    expect(
        round.cntvoff.is_some() && round.cntvoff == round.cntpoff,
        format!(
            "not one offset: {:?} and {:?}",
            round.cntvoff, round.cntpoff
        ),
    );
    expect(
        round.applies == 1,
        format!("the offset was put into KVM {} times", round.applies),
    );
    expect(
        round.refused.is_empty(),
        format!("KVM refused the offset: {:?}", round.refused),
    );
    for ahead in [round.ahead, round.ahead_at_end] {
        expect(
            ahead.is_some_and(contains_zero),
            format!("KVM's count is off by {ahead:?} ticks"),
        );
    }
    expect(
        round.confirmed_at.is_some(),
        "nothing was confirmed".to_owned(),
    );
    let early = round.ran_early();
    expect(
        early.is_empty(),
        format!("vCPUs {early:?} ran before the confirmation"),
    );
    faults
}

/// The rounds among the lines that the VMM printed.
///
/// # Errors
///
/// A line that is no JSON, or a round without one of its fields.
pub fn parse(text: &str) -> Result<Vec<Round>, String> {
    #[derive(Deserialize)]
    #[serde(tag = "event", rename_all = "snake_case")]
    enum Line {
        Round(Box<Round>),
        #[serde(other)]
        Other,
    }
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .filter_map(|line| match serde_json::from_str(line) {
            Ok(Line::Round(round)) => Some(Ok(*round)),
            Ok(Line::Other) => None,
            Err(error) => Some(Err(format!("{error}: {line}"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A round with nothing wrong, as the VMM prints it: its vCPUs' first reading is 50 ticks after
    /// the confirmation.
    fn right() -> Value {
        let vcpu = |index: u32| {
            json!({
                "vcpu": index, "on": true, "entered_at": 1010, "first": 150, "readings": 9,
                "below_published": 0, "below_own": 0, "worst": 0, "interrupts": 3, "early": 0,
                "spurious": 0, "lost": 0,
            })
        };
        json!({
            "event": "round", "round": 7, "how": "restore", "gate": "confirm", "order": [1, 0], "killed": null, "epoch": 2, "cntvoff": 900, "cntpoff": 900,
            "confirmed_at": 1000, "applies": 1, "refused": [],
            "ahead": [-3, 5], "ahead_at_end": [-2, 0],
            "vcpus": [vcpu(0), vcpu(1)],
        })
    }

    fn faults_of(round: &Value) -> Vec<String> {
        let verdict = json!({ "event": "verdict", "rounds": 1 });
        let rounds = parse(&format!("{round}\nsaid on stderr\n{verdict}\n")).unwrap();
        assert_eq!(rounds.len(), 1);
        faults(&rounds[0], 2)
    }

    #[test]
    fn a_right_round_has_no_fault() {
        assert_eq!(faults_of(&right()), [""; 0]);
    }

    #[test]
    fn each_fault_is_found() {
        for (pointer, value, fault) in [
            (
                "/vcpus/1/below_published",
                json!(2),
                "vCPU 1: 2 readings below a published one",
            ),
            (
                "/vcpus/0/below_own",
                json!(1),
                "vCPU 0: 1 readings below its own last one",
            ),
            (
                "/vcpus/0/early",
                json!(1),
                "vCPU 0: 1 timer interrupts before their time",
            ),
            (
                "/vcpus/0/spurious",
                json!(1),
                "vCPU 0: 1 interrupts of no timer",
            ),
            (
                "/vcpus/0/lost",
                json!(1),
                "vCPU 0: 1 timers that did not fire",
            ),
            ("/vcpus/0/readings", json!(0), "vCPU 0 has read nothing"),
            (
                "/vcpus/0/interrupts",
                json!(0),
                "vCPU 0 has had no timer interrupt",
            ),
            (
                "/vcpus/1/entered_at",
                json!(999),
                "vCPUs [1] ran before the confirmation",
            ),
            (
                "/vcpus/1/first",
                json!(99),
                "vCPUs [1] ran before the confirmation",
            ),
            (
                "/cntpoff",
                json!(901),
                "not one offset: Some(900) and Some(901)",
            ),
            (
                "/cntvoff",
                json!(null),
                "not one offset: None and Some(900)",
            ),
            ("/confirmed_at", json!(null), "nothing was confirmed"),
            ("/applies", json!(0), "the offset was put into KVM 0 times"),
            ("/applies", json!(2), "the offset was put into KVM 2 times"),
            (
                "/refused",
                json!(["EBUSY"]),
                "KVM refused the offset: [\"EBUSY\"]",
            ),
            (
                "/ahead",
                json!([1, 5]),
                "KVM's count is off by Some((1, 5)) ticks",
            ),
            (
                "/ahead",
                json!([-5, -1]),
                "KVM's count is off by Some((-5, -1)) ticks",
            ),
            ("/ahead", json!(null), "KVM's count is off by None ticks"),
            (
                "/ahead_at_end",
                json!([9, 12]),
                "KVM's count is off by Some((9, 12)) ticks",
            ),
            ("/vcpus", json!([]), "0 vCPUs reported"),
        ] {
            let mut round = right();
            *round.pointer_mut(pointer).unwrap() = value;
            let faults = faults_of(&round);
            assert_eq!(faults.len(), 1, "{pointer}: {faults:?}");
            assert!(
                faults[0].starts_with(&format!("round 7 (restore): {fault}")),
                "{faults:?}"
            );
        }
    }

    #[test]
    fn a_round_without_a_field_is_no_round() {
        let mut round = right();
        round.as_object_mut().unwrap().remove("applies");
        let error = parse(&round.to_string()).unwrap_err();
        assert!(error.contains("missing field `applies`"), "{error}");
    }
}
