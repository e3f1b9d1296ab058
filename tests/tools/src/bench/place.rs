//! Where threads run, and what they use.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the two processes of a measurement run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Both on one CPU, as on a crowded machine.
    OneCpu,
    /// One on each of two CPUs.
    TwoCpus,
}

impl Place {
    /// Both.
    pub(super) const ALL: [Place; 2] = [Place::OneCpu, Place::TwoCpus];

    /// For a row's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Place::OneCpu => "one CPU",
            Place::TwoCpus => "two CPUs",
        }
    }
}

/// The CPUs that this process was allowed to use when it started.
#[derive(Clone, Debug)]
pub(super) struct Cpus {
    all: CpuSet,
    usable: Vec<usize>,
}

impl Cpus {
    /// Finds them.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn find() -> io::Result<Self> {
        let all = sched_getaffinity(None)?;
        let usable = (0..CpuSet::MAX_CPU)
            .filter(|cpu| all.is_set(*cpu))
            .collect();
        Ok(Cpus { all, usable })
    }

    /// Whether there are enough CPUs for `place`.
    pub(super) fn allows(&self, place: Place) -> bool {
        place == Place::OneCpu || self.usable.len() > 1
    }

    /// Puts this thread on the first CPU, and all threads of a process where `place` has them.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn split(&self, place: Place, pid: u32) -> io::Result<()> {
        let ours = self.usable.last().copied().unwrap_or(0);
        let theirs = match place {
            Place::OneCpu => ours,
            Place::TwoCpus => self.usable.first().copied().unwrap_or(0),
        };
        sched_setaffinity(None, &only(ours))?;
        for thread in threads(pid)? {
            sched_setaffinity(Some(thread), &only(theirs))?;
        }
        Ok(())
    }

    /// Keeps the CPU of [`split`](Self::split)'s other process busy until `done`.
    pub(super) fn occupy_theirs(&self, done: &AtomicBool) {
        let cpu = self.usable.first().copied().unwrap_or(0);
        // If this fails, the wrong CPU is busy, and the numbers show it.
        let _ = sched_setaffinity(None, &only(cpu));
        while !done.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    }

    /// Lets this thread run anywhere again.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn free(&self) -> io::Result<()> {
        Ok(sched_setaffinity(None, &self.all)?)
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

fn threads(pid: u32) -> io::Result<Vec<Pid>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = entry?.file_name();
        let id = name.to_str().and_then(|name| name.parse().ok());
        threads.extend(id.and_then(Pid::from_raw));
    }
    Ok(threads)
}

/// A file's text for each thread of a process. A thread that has ended meanwhile is left out.
fn of_threads(pid: u32, file: &str) -> io::Result<Vec<String>> {
    let mut texts = Vec::new();
    for thread in threads(pid)? {
        let path = format!("/proc/{pid}/task/{}/{file}", thread.as_raw_nonzero());
        match fs::read_to_string(path) {
            Ok(text) => texts.push(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(texts)
}

/// CPU time of all threads of a process so far, ns.
///
/// # Errors
///
/// If there is no such process.
pub(super) fn cpu_ns(pid: u32) -> io::Result<f64> {
    let texts = of_threads(pid, "schedstat")?;
    Ok(texts.iter().map(|text| first_number(text)).sum())
}

/// A number of KiB from one of a process's files in /proc, by name.
///
/// # Errors
///
/// If there is no such process.
pub(super) fn kib(pid: u32, file: &str, name: &str) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    Ok(number_after(&text, name))
}

fn number_after(text: &str, name: &str) -> f64 {
    let lines = text.lines().filter_map(|line| line.strip_prefix(name));
    lines.map(first_number).sum()
}

/// How often the threads of a process have gone to sleep so far.
///
/// # Errors
///
/// If there is no such process.
pub(super) fn sleeps(pid: u32) -> io::Result<f64> {
    let texts = of_threads(pid, "status")?;
    let count = |text: &String| number_after(text, "voluntary_ctxt_switches:");
    Ok(texts.iter().map(count).sum())
}

fn first_number(text: &str) -> f64 {
    let word = text.split_whitespace().next();
    word.and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let pid = std::process::id();
        assert!(cpu_ns(pid).unwrap() > 0.0);
        assert!(kib(pid, "status", "VmRSS:").unwrap() > 100.0);
        assert!(sleeps(pid).is_ok());
        assert!(!Cpus::find().unwrap().usable.is_empty());
    }

    #[test]
    fn a_number_is_read_whatever_follows() {
        assert_eq!(first_number("  123 kB"), 123.0);
        assert_eq!(first_number("12 34 5"), 12.0);
        assert_eq!(first_number(""), 0.0);
    }
}
