//! What the guest's own program sees of the counter and the timers of all vCPUs
//! (`tests/qemu/guest/src/witness`).

use std::collections::HashMap;
use std::str::FromStr;
use std::time::Instant;

use super::{Error, Guest, PATIENCE};

/// What was seen on one vCPU since the witness was started. Counts are in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Readings of the counter.
    pub readings: u64,
    /// The last one.
    pub last: u64,
    /// Readings below this vCPU's previous one.
    pub below_own: u64,
    /// Readings below one that had been published, on whichever vCPU.
    pub below_other: u64,
    /// How far below, at most.
    pub worst: u64,
    /// The most ticks from one reading to the next.
    pub longest_gap: u64,
    /// Sleeps that have ended. One ends every 10 ms.
    pub wakes: u64,
    /// Sleeps that ended before their time.
    pub early: u64,
    /// How late sleeps ended on average, ns.
    pub mean_ns: u64,
    /// How late they ended at most since the previous report, ns.
    pub recent_ns: u64,
    /// How late they ended at most, ns.
    pub latest_ns: u64,
    /// Passes over the memory that is written to.
    pub passes: u64,
}

/// The numbers of a line of `key=value`.
fn numbers(line: &str) -> HashMap<&str, u64> {
    let words = line.split_whitespace();
    words
        .filter_map(|word| word.split_once('='))
        .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
        .collect()
}

impl FromStr for Report {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let malformed = || Error::Malformed {
            what: "a witness's report",
            text: text.to_owned(),
        };
        let mut vcpus = Vec::new();
        for line in text.lines() {
            let numbers = numbers(line);
            let number = |key| numbers.get(key).copied().ok_or_else(malformed);
            let (kind, _) = line.split_once(' ').unwrap_or((line, ""));
            if kind.starts_with("vcpus=") {
                vcpus = vec![Seen::default(); usize::try_from(number("vcpus")?).unwrap_or(0)];
                continue;
            }
            let index = usize::try_from(number("vcpu")?).unwrap_or(usize::MAX);
            let seen = vcpus.get_mut(index).ok_or_else(malformed)?;
            match kind {
                "reader" => {
                    seen.readings = number("readings")?;
                    seen.last = number("last")?;
                    seen.below_own = number("below_own")?;
                    seen.below_other = number("below_other")?;
                    seen.worst = number("worst")?;
                    seen.longest_gap = number("longest_gap")?;
                }
                "sleeper" => {
                    seen.wakes = number("wakes")?;
                    seen.early = number("early")?;
                    seen.mean_ns = number("mean_ns")?;
                    seen.recent_ns = number("recent_ns")?;
                    seen.latest_ns = number("latest_ns")?;
                }
                "writer" => seen.passes = number("passes")?,
                _ => return Err(malformed()),
            }
        }
        Ok(Report(vcpus))
    }
}

/// What was seen on all vCPUs.
struct Report(Vec<Seen>);

impl Guest {
    /// Starts the witness, which also writes to so many MiB of memory all the time.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run).
    pub fn start_witness(&mut self, busy: u32) -> Result<(), Error> {
        self.run(&format!("guest witness start {busy}")).map(drop)
    }

    /// What has been seen so far, a vCPU an entry.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run).
    pub fn witness(&mut self) -> Result<Vec<Seen>, Error> {
        let Report(vcpus) = self.run("guest witness report")?.parse()?;
        Ok(vcpus)
    }

    /// For each vCPU the two consecutive readings around these counts, if there was none between
    /// the counts. These must be more than 20 µs apart: smaller gaps are not kept.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run).
    pub fn gaps_around(&mut self, from: u64, to: u64) -> Result<Vec<Option<[u64; 2]>>, Error> {
        // The guest itself waits for 10 s of its time.
        let began = Instant::now();
        while began.elapsed() < PATIENCE && self.witness()?.iter().any(|seen| seen.last < to) {}
        let text = self.run(&format!("guest witness around {from} {to}"))?;
        let gap = |line| {
            let numbers = numbers(line);
            Some([*numbers.get("before")?, *numbers.get("after")?])
        };
        Ok(text.lines().map(gap).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_vcpu_by_vcpu() {
        let text = "vcpus=2\n\
            reader vcpu=0 readings=4 last=95 below_own=1 below_other=2 worst=205 longest_gap=7\n\
            reader vcpu=1 readings=5 last=96 below_own=0 below_other=0 worst=0 longest_gap=8\n\
            sleeper vcpu=0 wakes=9 early=0 mean_ns=14 recent_ns=40 latest_ns=41\n\
            sleeper vcpu=1 wakes=8 early=1 mean_ns=13 recent_ns=30 latest_ns=31\n\
            writer vcpu=1 passes=3\n";
        let Report(vcpus) = text.parse().unwrap();
        assert_eq!(vcpus.len(), 2);
        let first = Seen {
            readings: 4,
            last: 95,
            below_own: 1,
            below_other: 2,
            worst: 205,
            longest_gap: 7,
            wakes: 9,
            early: 0,
            mean_ns: 14,
            recent_ns: 40,
            latest_ns: 41,
            passes: 0,
        };
        assert_eq!(vcpus[0], first);
        assert_eq!((vcpus[1].early, vcpus[1].passes), (1, 3));
        assert!("reader vcpu=0".parse::<Report>().is_err());
    }
}
