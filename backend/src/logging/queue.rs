//! The lines that are not written yet. A thread that adds one never waits for the writer.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::sys::lock;

/// Most lines that wait to be written, and most bytes of them.
const MOST_LINES: usize = 1024;
const MOST_BYTES: usize = 128 * 1024;

/// See the module.
pub(super) struct Queue {
    state: Mutex<State>,
    /// There is something to do for the writer.
    changed: Condvar,
    /// The writer has nothing to do.
    idle: Condvar,
}

struct State {
    lines: VecDeque<String>,
    /// Lines that wait for the first one, where there is to be one before them.
    held: Option<Vec<String>>,
    bytes: usize,
    /// Lines for which there was no room, since the last line that is in the queue.
    dropped: u64,
    /// Detailed lines for which there was no room, since the writer had last written all.
    dropped_details: u64,
    /// When the lines that were left out are to be reported.
    report: Option<Instant>,
    /// Reports are due at once.
    ending: bool,
    /// The writer has something to do that is not in the queue any more.
    writing: bool,
}

/// What the writer does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Write this line.
    Write(String),
    /// Say that this many lines had no room.
    SayDropped(u64),
    /// Report the lines that were left out.
    Report,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Queue {
            state: Mutex::new(State {
                lines: VecDeque::new(),
                held: None,
                bytes: 0,
                dropped: 0,
                dropped_details: 0,
                report: None,
                ending: false,
                writing: false,
            }),
            changed: Condvar::new(),
            idle: Condvar::new(),
        }
    }

    /// Holds lines back from now on, until [`release`](Self::release).
    pub(super) fn hold(&self) {
        lock(&self.state).held.get_or_insert_default();
    }

    /// Adds the first line, if there is one, and then those that were held back.
    pub(super) fn release(&self, first: Option<String>) {
        let mut state = lock(&self.state);
        let held = state.held.take().unwrap_or_default();
        first
            .into_iter()
            .chain(held)
            .for_each(|line| state.push(line));
        self.changed.notify_one();
    }

    /// Adds a line, or counts it as dropped where there is no room.
    pub(super) fn push(&self, line: String) {
        lock(&self.state).push(line);
        self.changed.notify_one();
    }

    /// Adds a line of which there can be any number, where less than half of the room is taken.
    pub(super) fn push_detail(&self, line: String) {
        lock(&self.state).push_detail(line);
        self.changed.notify_one();
    }

    /// [`push`](Self::push), for a thread that may hold the queue's lock itself. False if the lock
    /// is taken.
    pub(super) fn try_push(&self, line: String) -> bool {
        let Ok(mut state) = self.state.try_lock() else {
            return false;
        };
        state.give_held();
        state.push(line);
        self.changed.notify_one();
        true
    }

    /// Has the writer report the lines that were left out, at this time or an earlier one that was
    /// set before.
    pub(super) fn report_at(&self, at: Instant) {
        lock(&self.state).report.get_or_insert(at);
        self.changed.notify_one();
    }

    /// Waits for something to do. For the writer alone.
    pub(super) fn next(&self) -> Work {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            state.writing = false;
            if let Some(work) = state.take(now) {
                state.writing = true;
                return work;
            }
            // What a flood has allocated is given back.
            state.lines.shrink_to(0);
            self.idle.notify_all();
            let woken = match state.report {
                Some(at) => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    waited.map(|(state, _)| state).map_err(|_| ())
                }
                None => self.changed.wait(state).map_err(|_| ()),
            };
            state = woken.unwrap_or_else(|()| lock(&self.state));
        }
    }

    /// Waits, for `limit` at most, until everything is written and reported. False if it is not.
    pub(super) fn drain(&self, limit: Duration) -> bool {
        let mut state = lock(&self.state);
        state.give_held();
        state.ending = true;
        self.changed.notify_one();
        let busy = |state: &mut State| !state.is_done();
        let waited = self.idle.wait_timeout_while(state, limit, busy);
        waited.is_ok_and(|(_, waited)| !waited.timed_out())
    }
}

impl State {
    /// Adds the lines that were held back: there will be none before them.
    fn give_held(&mut self) {
        let held = self.held.take();
        held.into_iter().flatten().for_each(|line| self.push(line));
    }

    fn push(&mut self, line: String) {
        if let Some(held) = &mut self.held {
            // The start logs little.
            if held.len() < MOST_LINES {
                held.push(line);
            }
            return;
        }
        // Lines keep their order: after one that was dropped there is no room for any until the
        // writer has written all before it.
        let is_full = self.lines.len() >= MOST_LINES || self.bytes + line.len() > MOST_BYTES;
        if self.dropped > 0 || is_full {
            self.dropped += 1;
        } else {
            self.bytes += line.len();
            self.lines.push_back(line);
        }
    }

    fn push_detail(&mut self, line: String) {
        let half_full =
            self.lines.len() >= MOST_LINES / 2 || self.bytes + line.len() > MOST_BYTES / 2;
        // As above, until the writer has written all before it.
        if self.dropped > 0 || self.dropped_details > 0 || half_full {
            self.dropped_details += 1;
        } else {
            self.push(line);
        }
    }

    fn take(&mut self, now: Instant) -> Option<Work> {
        if let Some(line) = self.lines.pop_front() {
            self.bytes -= line.len();
            return Some(Work::Write(line));
        }
        let dropped = std::mem::take(&mut self.dropped) + std::mem::take(&mut self.dropped_details);
        if dropped > 0 {
            return Some(Work::SayDropped(dropped));
        }
        self.report.take_if(|at| self.ending || *at <= now)?;
        Some(Work::Report)
    }

    fn is_done(&self) -> bool {
        self.lines.is_empty()
            && self.dropped == 0
            && self.dropped_details == 0
            && self.report.is_none()
            && !self.writing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(line: &str) -> Work {
        Work::Write(line.to_owned())
    }

    #[test]
    fn lines_come_out_in_the_order_in_which_they_went_in() {
        let queue = Queue::new();
        queue.push("one".to_owned());
        queue.push("two".to_owned());
        assert_eq!(queue.next(), write("one"));
        assert!(queue.try_push("three".to_owned()));
        assert_eq!(queue.next(), write("two"));
        assert_eq!(queue.next(), write("three"));
    }

    #[test]
    fn lines_without_room_are_counted_and_the_count_follows_the_line_before_them() {
        let queue = Queue::new();
        for line in 0..MOST_LINES + 3 {
            queue.push(line.to_string());
        }
        assert_eq!(queue.next(), write("0"));
        // There is room for it, but not in its place.
        queue.push("late".to_owned());
        for line in 1..MOST_LINES {
            assert_eq!(queue.next(), write(&line.to_string()));
        }
        queue.push("later".to_owned());
        assert_eq!(queue.next(), Work::SayDropped(5));
        queue.push("again".to_owned());
        assert_eq!(queue.next(), write("again"));
    }

    #[test]
    fn details_take_half_of_the_room_and_cost_no_other_line_its_place() {
        let queue = Queue::new();
        for line in 0..MOST_LINES {
            queue.push_detail(line.to_string());
        }
        queue.push("what matters".to_owned());
        for line in 0..MOST_LINES / 2 {
            assert_eq!(queue.next(), write(&line.to_string()));
        }
        // There is room for it, but not in its place.
        queue.push_detail("late".to_owned());
        assert_eq!(queue.next(), write("what matters"));
        let dropped = MOST_LINES / 2 + 1;
        assert_eq!(queue.next(), Work::SayDropped(dropped as u64));
        queue.push_detail("again".to_owned());
        assert_eq!(queue.next(), write("again"));
    }

    #[test]
    fn long_lines_take_the_room_of_many() {
        let queue = Queue::new();
        let line = "x".repeat(MOST_BYTES / 2);
        for _ in 0..3 {
            queue.push(line.clone());
        }
        assert_eq!(queue.next(), write(&line));
        assert_eq!(queue.next(), write(&line));
        assert_eq!(queue.next(), Work::SayDropped(1));
    }

    #[test]
    fn lines_that_are_held_back_come_after_the_first_one_or_at_the_end() {
        let queue = Queue::new();
        queue.hold();
        queue.push("two".to_owned());
        queue.push_detail("three".to_owned());
        queue.release(Some("one".to_owned()));
        queue.push("four".to_owned());
        for line in ["one", "two", "three", "four"] {
            assert_eq!(queue.next(), write(line));
        }
        queue.hold();
        queue.push("why".to_owned());
        assert!(!queue.drain(Duration::ZERO), "nobody writes");
        assert_eq!(queue.next(), write("why"));
        queue.hold();
        queue.push("why".to_owned());
        assert!(queue.try_push("panicked".to_owned()));
        assert_eq!(queue.next(), write("why"));
        assert_eq!(queue.next(), write("panicked"));
    }

    #[test]
    fn a_report_is_made_when_it_is_due_and_once() {
        let queue = Queue::new();
        let due = Instant::now() + Duration::from_millis(20);
        queue.report_at(due);
        queue.report_at(due + Duration::from_secs(3600));
        queue.push("line".to_owned());
        assert_eq!(queue.next(), write("line"));
        assert_eq!(queue.next(), Work::Report);
        assert!(Instant::now() >= due);
        queue.push("line".to_owned());
        assert_eq!(queue.next(), write("line"));
    }

    #[test]
    fn draining_waits_for_the_writer_and_has_reports_made_before_they_are_due() {
        let queue = Queue::new();
        assert!(queue.drain(Duration::ZERO), "there is nothing to write");
        queue.report_at(Instant::now() + Duration::from_secs(3600));
        queue.push("line".to_owned());
        assert!(!queue.drain(Duration::ZERO), "nobody writes");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(queue.next(), write("line"));
                assert_eq!(queue.next(), Work::Report);
                // What is done with the last one counts as well.
                assert!(!queue.drain(Duration::ZERO));
                queue.push("end".to_owned());
                assert_eq!(queue.next(), write("end"));
                queue.push("end".to_owned());
                // Tells that the work before it is done.
                assert_eq!(queue.next(), write("end"));
                lock(&queue.state).writing = false;
                queue.idle.notify_all();
            });
            assert!(queue.drain(Duration::from_secs(30)));
        });
    }
}
