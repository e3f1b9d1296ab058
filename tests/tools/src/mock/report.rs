//! What the demo prints while it runs, and its result.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use super::guest::Fired;

/// Most rows of the table. With more vCPUs, only the notable ones of the rest are shown.
const ROWS: usize = 32;

/// Where the demo's progress goes: to stdout, or with `--json` nowhere.
#[derive(Debug)]
pub(super) struct Console {
    silent: bool,
    start: Instant,
}

impl Console {
    pub(super) fn new(silent: bool) -> Self {
        let start = Instant::now();
        Console { silent, start }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// A line with the time.
    pub(super) fn say(&self, text: fmt::Arguments<'_>) {
        self.print(format_args!("{:>6} ms  {text}", self.elapsed().as_millis()));
    }

    /// A line without.
    pub(super) fn print(&self, text: fmt::Arguments<'_>) {
        if !self.silent {
            print_line(text);
        }
    }
}

/// Prints a line on stdout. A reader that closes the pipe, as `head` does, is not a failure.
pub(super) fn print_line(text: impl fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// One restore, as the vCPUs saw it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Restore {
    /// What was restored.
    pub(super) name: &'static str,
    pub(super) vcpus: u32,
    /// The largest count that a vCPU brought.
    pub(super) largest_brought: u64,
    /// The host counter before and after the offsets were decided.
    pub(super) decided_between: [u64; 2],
    /// Number of different pairs of offsets that they got.
    pub(super) offsets: usize,
    /// Number of different counts, offsets or instants of release.
    pub(super) releases: usize,
    /// vCPUs that were released before the last RESTORE_DONE was sent, or before the VMM confirmed.
    pub(super) early: usize,
    /// How often the VMM put offsets into its hypervisor.
    pub(super) put_in: u64,
    pub(super) metre: Metre,
}

/// The last metre of a restore, from the decision about the offsets to the guest: instants of the
/// host counter, in ns.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Metre {
    /// The guest's count begins to count, from the largest one that was brought.
    pub(super) decided: u64,
    /// The VMM has put the offsets into its hypervisor.
    pub(super) put_in: u64,
    /// The backend has served CONFIRM_RUN.
    pub(super) confirmed: u64,
    /// The first vCPU reads its count.
    pub(super) first_reading: u64,
}

impl Restore {
    /// Whether the count continued from the largest one, for all at one instant.
    fn settled(&self) -> bool {
        let [earliest, latest] = self.decided_between;
        self.releases == 1 && (earliest..=latest).contains(&self.metre.decided)
    }

    /// The restore in a sentence.
    pub(super) fn outcome(&self) -> String {
        let vcpus = counted(self.vcpus, "vCPU");
        let released = if self.releases == 1 {
            format!("{vcpus} released at one instant, with one offset")
        } else {
            let (instants, offsets) = (self.releases, self.offsets);
            format!("{vcpus} released at {instants} INSTANTS with {offsets} OFFSETS")
        };
        let from = if self.settled() { "from" } else { "NOT from" };
        let largest = grouped(self.largest_brought);
        format!("{released}; the count continues {from} {largest}, the largest brought")
    }
}

impl fmt::Display for Metre {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = |at: u64| at.wrapping_sub(self.decided).cast_signed() as f64 / 1e3;
        let (put_in, confirmed) = (since(self.put_in), since(self.confirmed));
        let first = since(self.first_reading);
        write!(
            f,
            "the last metre: offsets decided at 0 µs, in the hypervisor at {put_in:.0} µs, \
             confirmed at {confirmed:.0} µs, first count read by a guest at {first:.0} µs"
        )
    }
}

/// One vCPU over the move.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Row {
    pub(super) vcpu: u32,
    pub(super) straggler: bool,
    pub(super) saved_count: u64,
    pub(super) released_count: u64,
    #[serde(serialize_with = "hex")]
    pub(super) cntvoff: u64,
    #[serde(serialize_with = "hex")]
    pub(super) cntpoff: u64,
    #[serde(serialize_with = "milliseconds")]
    pub(super) waited_ms: Duration,
    pub(super) fired_on_source: Fired,
    pub(super) fired_on_destination: Fired,
    /// Deadlines that the guest programmed and that were due by the end.
    pub(super) programmed: usize,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) early: bool,
    /// It read its count before the offsets were confirmed.
    pub(super) unconfirmed: bool,
    pub(super) backwards: u64,
}

impl Row {
    /// What went wrong for this vCPU, for the end of its row.
    fn faults(&self) -> String {
        let mut text = String::new();
        for (name, count) in [
            ("EARLY", u64::from(self.early)),
            ("UNCONFIRMED", u64::from(self.unconfirmed)),
            ("BACKWARDS", self.backwards),
            ("LOST", self.lost),
            ("DOUBLED", self.doubled),
        ] {
            if count > 0 {
                let _ = write!(text, "  {name} {count}");
            }
        }
        text
    }
}

/// All that was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) restores: Vec<Restore>,
    pub(super) rows: Vec<Row>,
    /// From PAUSE on the source to the release on the destination.
    #[serde(serialize_with = "milliseconds")]
    pub(super) away_ms: Duration,
    /// How often the count decreased, over all restores.
    pub(super) backwards: u64,
    /// Interrupts that came before their deadline.
    pub(super) premature: u64,
}

impl Report {
    pub(super) fn verdict(&self) -> Verdict {
        let sum = |of: fn(&Row) -> u64| self.rows.iter().map(of).sum();
        let is_unconfirmed = |restore: &&Restore| {
            restore.put_in != 1 || restore.metre.first_reading < restore.metre.confirmed
        };
        Verdict {
            vcpus: self.rows.len(),
            early: self.restores.iter().map(|restore| restore.early).sum(),
            backwards: self.backwards,
            offsets: self.restores.iter().map(|r| r.offsets).max().unwrap_or(0),
            lost: sum(|row| row.lost),
            doubled: sum(|row| row.doubled),
            premature: self.premature,
            unsettled: self.restores.iter().filter(|r| !r.settled()).count(),
            unconfirmed: self.restores.iter().filter(is_unconfirmed).count(),
        }
    }

    /// The table: one row for each vCPU, if there are not too many.
    pub(super) fn table(&self) -> String {
        let mut text = String::from(
            "  vCPU    saved count  released count             cntvoff    waited  \
             deadlines  fired: source  destination\n",
        );
        let mut left_out = 0;
        for (index, row) in self.rows.iter().enumerate() {
            let many = self.rows.len() > ROWS && index >= ROWS / 2;
            if many && !row.straggler && row.faults().is_empty() {
                left_out += 1;
                continue;
            }
            let on = |fired: Fired| format!("{} + {}", fired.virt, fired.phys);
            let _ = writeln!(
                text,
                "{:>6} {:>14}  {:>14}  {:>#18x} {:>6.1} ms  {:>9}  {:>13}  {:>11}{}{}",
                row.vcpu,
                grouped(row.saved_count),
                grouped(row.released_count),
                row.cntvoff,
                row.waited_ms.as_secs_f64() * 1e3,
                row.programmed,
                on(row.fired_on_source),
                on(row.fired_on_destination),
                if row.straggler { "  straggler" } else { "" },
                row.faults(),
            );
        }
        if left_out > 0 {
            let _ = writeln!(text, "   ({left_out} more like these; --json shows all)");
        }
        text + "  deadlines: programmed by the guest; fired: virtual timer + physical timer"
    }
}

/// The promises, and how often each was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    pub(super) vcpus: usize,
    /// vCPUs that ran before the last RESTORE_DONE was sent.
    pub(super) early: usize,
    pub(super) backwards: u64,
    /// Most different pairs of offsets within one restore.
    pub(super) offsets: usize,
    /// Due deadlines whose interrupt never came.
    pub(super) lost: u64,
    /// Interrupts that came twice, or for a timer that was off.
    pub(super) doubled: u64,
    pub(super) premature: u64,
    /// Restores whose vCPUs did not all continue from the largest count that one of them brought.
    pub(super) unsettled: usize,
    /// Restores in which a guest read its count before the offsets were confirmed, or in which they
    /// were not put into the hypervisor once.
    pub(super) unconfirmed: usize,
}

impl Verdict {
    pub(super) fn is_ok(&self) -> bool {
        let kept = Verdict {
            vcpus: self.vcpus,
            early: 0,
            backwards: 0,
            offsets: 1,
            lost: 0,
            doubled: 0,
            premature: 0,
            unsettled: 0,
            unconfirmed: 0,
        };
        *self == kept
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.is_ok() { "OK" } else { "FAILED" };
        let (early, backwards, offsets) = (self.early, self.backwards, self.offsets);
        write!(f, "demo: {word} vcpus={} early={early} ", self.vcpus)?;
        write!(
            f,
            "backwards={backwards} offsets={offsets} lost={}",
            self.lost
        )?;
        for (name, count) in [
            ("doubled", self.doubled),
            ("premature", self.premature),
            ("unsettled", self.unsettled as u64),
            ("unconfirmed", self.unconfirmed as u64),
        ] {
            if count > 0 {
                write!(f, " {name}={count}")?;
            }
        }
        Ok(())
    }
}

/// A number with its thousands separated: 4,298,104,435.
pub(super) fn grouped(number: u64) -> String {
    match number {
        0..1000 => number.to_string(),
        _ => format!("{},{:03}", grouped(number / 1000), number % 1000),
    }
}

/// "1 vCPU", "2 vCPUs".
pub(super) fn counted(number: impl Into<u64>, noun: &str) -> String {
    match number.into() {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

/// Values that use all 64 bits, which not every JSON reader keeps as numbers.
pub(super) fn hex<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:#x}"))
}

fn milliseconds<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(value.as_micros() as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Verdict = Verdict {
        vcpus: 8,
        early: 0,
        backwards: 0,
        offsets: 1,
        lost: 0,
        doubled: 0,
        premature: 0,
        unsettled: 0,
        unconfirmed: 0,
    };

    #[test]
    fn kept_promises_are_ok() {
        assert!(KEPT.is_ok());
        let line = "demo: OK vcpus=8 early=0 backwards=0 offsets=1 lost=0";
        assert_eq!(KEPT.to_string(), line);
    }

    #[test]
    fn each_broken_promise_fails() {
        for broken in [
            Verdict { early: 1, ..KEPT },
            Verdict {
                backwards: 1,
                ..KEPT
            },
            Verdict { offsets: 2, ..KEPT },
            Verdict { lost: 1, ..KEPT },
            Verdict { doubled: 1, ..KEPT },
            Verdict {
                premature: 1,
                ..KEPT
            },
            Verdict {
                unsettled: 1,
                ..KEPT
            },
            Verdict {
                unconfirmed: 1,
                ..KEPT
            },
        ] {
            assert!(!broken.is_ok());
            assert!(broken.to_string().starts_with("demo: FAILED vcpus=8 "));
        }
        let doubled = Verdict { doubled: 3, ..KEPT }.to_string();
        assert!(doubled.ends_with(" lost=0 doubled=3"), "{doubled}");
    }

    #[test]
    fn thousands_are_separated() {
        let texts = [0, 999, 1_000, 4_298_104_435].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "4,298,104,435"]);
    }
}
