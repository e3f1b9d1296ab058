//! How many lines a peer can cause.
//!
//! Each place in the code that logs has a token bucket for each peer. So one thing that happens
//! without end does not hide anything else, nor what another peer does. Places and peers are
//! few, which bounds the lines altogether.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, Record};

use crate::logging::peer::Peer;
use crate::sys::lock;

/// Lines that one place may log at once for one peer.
pub(super) const BURST: u32 = 100;

/// The time after which it may log one more.
const REFILL: Duration = Duration::from_secs(5);

/// How long lines are left out before that is reported.
pub(super) const REPORT_AFTER: Duration = Duration::from_secs(10);

/// Most characters of a line that stands for all that were left out.
const LONGEST_SAMPLE: usize = 200;

/// A place in the code, with the device for whose frontends it logs: one at a time, so those are
/// one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    device: Option<&'static str>,
    file: &'static str,
    line: u32,
}

impl Place {
    pub(super) fn of(record: &Record<'_>, peer: Option<Peer>) -> Self {
        Place {
            device: peer.map(Peer::device),
            file: record.file_static().unwrap_or_default(),
            line: record.line().unwrap_or_default(),
        }
    }
}

struct Bucket {
    tokens: u32,
    /// When the bucket got its last token.
    refilled: Instant,
    left_out: Option<LeftOut>,
}

/// Lines of one place that were left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) level: Level,
    /// Of the first one.
    pub(super) peer: Option<Peer>,
    lines: u64,
    since: Instant,
    sample: String,
}

/// What becomes of a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Write,
    /// It is left out.
    LeaveOut,
    /// It is left out, and is the first one since the last report.
    LeaveOutFirst,
}

/// The buckets.
pub(super) struct Limiter(Mutex<BTreeMap<Place, Bucket>>);

impl Limiter {
    pub(super) const fn new() -> Self {
        Limiter(Mutex::new(BTreeMap::new()))
    }

    /// Takes a token for a line, or counts the line as left out.
    pub(super) fn judge(
        &self,
        place: Place,
        now: Instant,
        level: Level,
        peer: Option<Peer>,
        text: impl FnOnce() -> String,
    ) -> Verdict {
        let mut buckets = lock(&self.0);
        let bucket = buckets.entry(place).or_insert(Bucket {
            tokens: BURST,
            refilled: now,
            left_out: None,
        });
        bucket.refill(now);
        if let Some(left) = bucket.tokens.checked_sub(1) {
            bucket.tokens = left;
            return Verdict::Write;
        }
        if let Some(left_out) = &mut bucket.left_out {
            left_out.lines += 1;
            return Verdict::LeaveOut;
        }
        bucket.left_out = Some(LeftOut {
            level,
            peer,
            lines: 1,
            since: now,
            sample: text().chars().take(LONGEST_SAMPLE).collect(),
        });
        Verdict::LeaveOutFirst
    }

    /// What was left out since it was asked last.
    pub(super) fn take_left_out(&self) -> Vec<LeftOut> {
        let mut buckets = lock(&self.0);
        let left_out = buckets.values_mut().map(|bucket| bucket.left_out.take());
        left_out.flatten().collect()
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.refilled);
        let more = since.as_secs() / REFILL.as_secs();
        let missing = BURST - self.tokens;
        if more >= u64::from(missing) {
            *self = Bucket {
                tokens: BURST,
                refilled: now,
                left_out: self.left_out.take(),
            };
        } else if let Ok(more) = u32::try_from(more) {
            self.tokens += more;
            self.refilled += REFILL * more;
        }
    }
}

impl LeftOut {
    /// The report.
    pub(super) fn text(&self, now: Instant) -> String {
        let LeftOut { lines, sample, .. } = self;
        let seconds = now.saturating_duration_since(self.since).as_secs();
        let lines = match lines {
            1 => "1 more line".to_owned(),
            lines => format!("{lines} more lines"),
        };
        format!("{lines} like this one in {seconds} s, left out: {sample}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(line: u32) -> Place {
        Place {
            device: Some("timer"),
            file: "file",
            line,
        }
    }

    fn judge(limiter: &Limiter, place: Place, now: Instant) -> Verdict {
        limiter.judge(place, now, Level::Error, None, || {
            "What happened".to_owned()
        })
    }

    #[test]
    fn a_place_may_log_a_burst_and_then_one_line_for_each_interval() {
        let (limiter, start) = (Limiter::new(), Instant::now());
        for _ in 0..BURST {
            assert_eq!(judge(&limiter, place(1), start), Verdict::Write);
        }
        assert_eq!(judge(&limiter, place(1), start), Verdict::LeaveOutFirst);
        let early = start + REFILL - Duration::from_millis(1);
        assert_eq!(judge(&limiter, place(1), early), Verdict::LeaveOut);
        let later = start + REFILL * 5 / 2;
        for _ in 0..2 {
            assert_eq!(judge(&limiter, place(1), later), Verdict::Write);
        }
        assert_eq!(judge(&limiter, place(1), later), Verdict::LeaveOut);
        // The half interval is not lost.
        let later = start + REFILL * 3;
        assert_eq!(judge(&limiter, place(1), later), Verdict::Write);
        let much_later = later + REFILL * 1000;
        for _ in 0..BURST {
            assert_eq!(judge(&limiter, place(1), much_later), Verdict::Write);
        }
        assert_eq!(judge(&limiter, place(1), much_later), Verdict::LeaveOut);
    }

    #[test]
    fn another_place_and_another_peer_are_not_limited() {
        let (limiter, now) = (Limiter::new(), Instant::now());
        while judge(&limiter, place(1), now) == Verdict::Write {}
        assert_eq!(judge(&limiter, place(2), now), Verdict::Write);
        for device in [None, Some("clock")] {
            let other = Place { device, ..place(1) };
            assert_eq!(judge(&limiter, other, now), Verdict::Write);
        }
    }

    #[test]
    fn what_was_left_out_is_counted_and_reported_with_its_first_line() {
        let (limiter, start) = (Limiter::new(), Instant::now());
        while judge(&limiter, place(1), start) == Verdict::Write {}
        let reported = |seconds| {
            let now = start + Duration::from_secs(seconds);
            let left_out = limiter.take_left_out();
            left_out
                .iter()
                .map(|left_out| left_out.text(now))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            reported(1),
            ["1 more line like this one in 1 s, left out: What happened"]
        );
        let long = || "x".repeat(1000);
        let verdict = limiter.judge(place(1), start, Level::Info, None, long);
        assert_eq!(verdict, Verdict::LeaveOutFirst);
        for _ in 1..4711 {
            assert_eq!(judge(&limiter, place(1), start), Verdict::LeaveOut);
        }
        let sample = "x".repeat(LONGEST_SAMPLE);
        assert_eq!(
            reported(10),
            [format!(
                "4711 more lines like this one in 10 s, left out: {sample}"
            )]
        );
        assert!(reported(11).is_empty());
    }

    #[test]
    fn connections_to_one_device_share_its_limit() {
        let record = Record::builder()
            .file_static(Some("a"))
            .line(Some(7))
            .build();
        let of = |device| Place {
            device,
            file: "a",
            line: 7,
        };
        for connection in [1, 2] {
            let peer = Some(Peer::new("clock", connection));
            assert_eq!(Place::of(&record, peer), of(Some("clock")));
        }
        assert_eq!(Place::of(&record, None), of(None));
    }
}
