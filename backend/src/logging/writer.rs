//! Writes lines to a descriptor that may be full, closed, or waited for forever.

use std::io::{self, Write};
use std::time::{Instant, SystemTime};

use log::Level;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::logging::limit::Limiter;
use crate::logging::line::Form;
use crate::logging::peer::Peer;
use crate::logging::queue::{Queue, Work};

/// Standard error, unbuffered. Its description belongs to others as well, so it may be
/// non-blocking or become so.
pub(super) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(rustix::stdio::stderr(), bytes) {
                Err(Errno::AGAIN) => {
                    is_writable(None);
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether standard error takes a line now, without waiting for its reader, or does so in time.
pub(super) fn is_writable(limit: Option<&Timespec>) -> bool {
    let stderr = rustix::stdio::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    // An error is one that writing reports too, without waiting.
    !matches!(poll(&mut fds, limit), Ok(0) | Err(_))
}

/// What the writing thread keeps.
pub(super) struct Writer<'a, W> {
    to: W,
    form: &'a Form,
    /// Lines that could not be written since the last one that was, and why.
    failed: u64,
    why: Option<io::Error>,
    /// The last line was written in part.
    torn: bool,
}

impl<'a, W: Write> Writer<'a, W> {
    pub(super) fn new(to: W, form: &'a Form) -> Self {
        Writer {
            to,
            form,
            failed: 0,
            why: None,
            torn: false,
        }
    }

    /// Writes what the queue has, and will have.
    pub(super) fn run(mut self, queue: &Queue, limiter: &Limiter) -> ! {
        loop {
            self.work(queue.next(), limiter);
        }
    }

    fn work(&mut self, work: Work, limiter: &Limiter) {
        match work {
            Work::Write(line) => self.write(&line),
            Work::SayDropped(lines) => {
                self.say(Level::Warn, None, &dropped(lines, &"stderr was not read"));
            }
            Work::Report => {
                let now = Instant::now();
                for left_out in limiter.take_left_out() {
                    self.say(left_out.level, left_out.peer, &left_out.text(now));
                }
            }
        }
    }

    fn say(&mut self, level: Level, peer: Option<Peer>, text: &str) {
        self.write(&self.form.entry(SystemTime::now(), level, peer, text));
    }

    /// Writes a line, after the number of lines that could not be written before it.
    fn write(&mut self, line: &str) {
        if let Some(why) = &self.why {
            let text = dropped(
                self.failed,
                &format_args!("writing to stderr failed: {why}"),
            );
            let text = self.form.entry(SystemTime::now(), Level::Warn, None, &text);
            if self.try_write(&text).is_err() {
                self.failed += 1;
                return;
            }
            (self.failed, self.why) = (0, None);
        }
        if let Err(error) = self.try_write(line) {
            self.failed += 1;
            self.why = Some(error);
        }
    }

    fn try_write(&mut self, line: &str) -> io::Result<()> {
        if self.torn {
            self.to.write_all(b"\n")?;
            self.torn = false;
        }
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.to.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.torn = rest.len() < line.len();
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

fn dropped(lines: u64, why: &dyn std::fmt::Display) -> String {
    match lines {
        1 => format!("1 line was dropped: {why}"),
        lines => format!("{lines} lines were dropped: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Form = Form {
        journal: false,
        name: None,
    };

    /// A file that has room for some bytes only.
    #[derive(Default)]
    struct Limited {
        bytes: Vec<u8>,
        room: usize,
    }

    impl Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let written = bytes.len().min(self.room);
            if written == 0 {
                return Err(Errno::FBIG.into());
            }
            self.room -= written;
            self.bytes.extend_from_slice(&bytes[..written]);
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What was written, without times.
    fn lines<'a>(writer: &'a Writer<'_, Limited>) -> Vec<&'a str> {
        let text = std::str::from_utf8(&writer.to.bytes).unwrap();
        text.lines()
            .map(|line| match line.split_once("vhost-user-timer] ") {
                Some((head, rest)) if head.starts_with('[') => rest,
                _ => line,
            })
            .collect()
    }

    fn write(writer: &mut Writer<'_, Limited>, line: &str) {
        writer.work(Work::Write(line.to_owned()), &Limiter::new());
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_told_when_there_is_room_again() {
        let mut writer = Writer::new(Limited::default(), &PLAIN);
        writer.to.room = 6;
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            write(&mut writer, line);
        }
        assert_eq!(lines(&writer), ["one", "tw"]);
        writer.to.room = 1000;
        write(&mut writer, "five\n");
        let told = "3 lines were dropped: writing to stderr failed: File too large \
                    (os error 27)";
        assert_eq!(lines(&writer), ["one", "tw", told, "five"]);
        write(&mut writer, "six\n");
        assert_eq!(lines(&writer).len(), 5, "it is told once");
    }

    #[test]
    fn a_count_that_cannot_be_told_is_kept() {
        let mut writer = Writer::new(Limited::default(), &PLAIN);
        write(&mut writer, "one\n");
        // Room for a part of the count.
        writer.to.room = 10;
        write(&mut writer, "two\n");
        writer.to.room = 1000;
        write(&mut writer, "three\n");
        let lines = lines(&writer);
        assert!(lines[1].starts_with("2 lines were dropped"), "{lines:?}");
        assert_eq!(lines[2..], ["three"]);
    }

    #[test]
    fn lines_without_room_in_the_queue_are_told_by_their_number() {
        let mut writer = Writer::new(Limited::default(), &PLAIN);
        writer.to.room = 1000;
        for lines in [1, 2] {
            writer.work(Work::SayDropped(lines), &Limiter::new());
        }
        let told = [
            "1 line was dropped: stderr was not read",
            "2 lines were dropped: stderr was not read",
        ];
        assert_eq!(lines(&writer), told);
    }
}
