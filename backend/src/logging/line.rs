//! A line of the log as text.
//!
//! On a plain stderr: `[2026-11-26T21:13:53Z WARN  vhost-user-timer vm1 timer#2] What happened`,
//! with the VM's name where there is one, and the connection on lines of a connection. Where stderr
//! is the journal's, which has the time and the program: `<4>vm1 timer#2: What happened`.

use std::fmt::Write as _;
use std::time::SystemTime;

use log::Level;

use crate::logging::peer::Peer;
use crate::logging::{journal, utc};

const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// What every line of this process has in common.
#[derive(Clone, Debug)]
pub(super) struct Form {
    /// Lines are the journal's.
    pub(super) journal: bool,
    /// The VM's name.
    pub(super) name: Option<String>,
}

impl Form {
    /// The form for what standard error is.
    pub(super) fn new(name: Option<&str>) -> Self {
        Form {
            journal: journal::is_stderr(),
            name: name.map(str::to_owned),
        }
    }

    /// An entry with its end. A text of several lines stays one entry: its later lines are
    /// indented.
    pub(super) fn entry(
        &self,
        at: SystemTime,
        level: Level,
        peer: Option<Peer>,
        text: &str,
    ) -> String {
        let mut entry = String::with_capacity(text.len() + 64);
        if self.journal {
            self.push_journal(&mut entry, level, peer, text);
            return entry;
        }
        entry.push('[');
        utc::push(&mut entry, at);
        // Writing to a string does not fail.
        let _ = write!(entry, " {level:<5} {PROGRAM}");
        self.push_whose(&mut entry, " ", peer);
        entry.push_str("] ");
        for (index, line) in text.split('\n').enumerate() {
            if index > 0 {
                entry.push_str("\n    ");
            }
            entry.push_str(line);
        }
        entry.push('\n');
        entry
    }

    /// What the program says as a program, such as why it did not start: with its name alone on a
    /// plain stderr, as an error in the journal.
    pub(super) fn words(&self, peer: Option<Peer>, text: &str) -> String {
        let mut words = String::with_capacity(text.len() + 64);
        if self.journal {
            self.push_journal(&mut words, Level::Error, peer, text);
            return words;
        }
        words.push_str(PROGRAM);
        self.push_whose(&mut words, " ", peer);
        words.push_str(": ");
        words.push_str(text);
        words.push('\n');
        words
    }

    /// Each line of the journal is an entry of its own there, so each has the priority
    /// (sd-daemon(3)), and later ones are indented.
    fn push_journal(&self, entry: &mut String, level: Level, peer: Option<Peer>, text: &str) {
        let priority = match level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        let lines = text.split('\n').enumerate();
        for (index, line) in lines.filter(|(index, line)| *index == 0 || !line.is_empty()) {
            let _ = write!(entry, "<{priority}>");
            if index > 0 {
                entry.push_str("    ");
            } else if self.push_whose(entry, "", peer) {
                entry.push_str(": ");
            }
            entry.push_str(line);
            entry.push('\n');
        }
    }

    /// The VM and the connection, each after `before`, or a space where it is not the first.
    /// Whether there is any.
    fn push_whose(&self, line: &mut String, before: &str, peer: Option<Peer>) -> bool {
        let mut before = before;
        if let Some(name) = &self.name {
            line.push_str(before);
            line.push_str(name);
            before = " ";
        }
        if let Some(peer) = peer {
            let _ = write!(line, "{before}{peer}");
        }
        self.name.is_some() || peer.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PEER: Option<Peer> = Some(Peer::new("timer", 2));

    fn form(journal: bool, name: Option<&str>) -> Form {
        let name = name.map(str::to_owned);
        Form { journal, name }
    }

    fn entry(form: &Form, level: Level, peer: Option<Peer>, text: &str) -> String {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_727_633);
        form.entry(at, level, peer, text)
    }

    #[test]
    fn a_line_has_its_time_level_program_vm_connection_and_text() {
        let lines = [
            (None, None, "vhost-user-timer"),
            (Some("vm1"), None, "vhost-user-timer vm1"),
            (None, PEER, "vhost-user-timer timer#2"),
            (Some("vm1"), PEER, "vhost-user-timer vm1 timer#2"),
        ];
        for (name, peer, whose) in lines {
            let form = form(false, name);
            let line = entry(&form, Level::Warn, peer, "What happened");
            let wanted = format!("[2026-11-26T21:13:53Z WARN  {whose}] What happened\n");
            assert_eq!(line, wanted);
            assert_eq!(form.words(peer, "Why"), format!("{whose}: Why\n"));
        }
        let line = entry(&form(false, None), Level::Error, None, "one\ntwo");
        let wanted = "[2026-11-26T21:13:53Z ERROR vhost-user-timer] one\n    two\n";
        assert_eq!(line, wanted);
    }

    #[test]
    fn a_line_of_the_journal_has_its_priority_vm_connection_and_text() {
        let levels = [
            (Level::Error, 3),
            (Level::Warn, 4),
            (Level::Info, 6),
            (Level::Debug, 7),
            (Level::Trace, 7),
        ];
        for (level, priority) in levels {
            let line = entry(&form(true, Some("vm1")), level, PEER, "What happened");
            assert_eq!(line, format!("<{priority}>vm1 timer#2: What happened\n"));
        }
        let bare = |name, peer| entry(&form(true, name), Level::Info, peer, "What");
        assert_eq!(bare(None, None), "<6>What\n");
        assert_eq!(bare(Some("vm1"), None), "<6>vm1: What\n");
        assert_eq!(bare(None, PEER), "<6>timer#2: What\n");
    }

    #[test]
    fn each_line_of_an_entry_has_the_priority_in_the_journal() {
        let form = form(true, Some("vm1"));
        let line = entry(&form, Level::Warn, None, "one\n\ntwo\n");
        assert_eq!(line, "<4>vm1: one\n<4>    two\n");
        assert_eq!(form.words(None, "one\ntwo"), "<3>vm1: one\n<3>    two\n");
    }
}
