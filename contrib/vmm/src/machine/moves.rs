//! `moves`: a VM that moves from process to process.

use std::io::BufRead;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::commands::{booted, note, print};
use super::error::{Context, Error};
use crate::args::{Options, name};
use crate::report::{Event, Round, Verdict};

/// `moves`
pub(crate) fn moves(options: &Options, rounds: u32, every: u32) -> Result<(), Error> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let files = ["even", "odd"].map(|name| directory.path().join(name));
    let mut verdict = Verdict::default();
    let (machine, round) = booted(options, Some(false))?;
    note(&mut verdict, round)?;
    machine.save()?.write(&files[0])?;
    drop(machine);

    for round in 1..=rounds {
        let mut options = options.clone();
        if round % every != 0 {
            (options.kill_backend, options.die) = (None, None);
        }
        // Where time is wrong, each round begins with the same right one.
        let chained = options.gate.is_sound();
        let from = &files[if chained { (round as usize + 1) % 2 } else { 0 }];
        let to = chained.then(|| files[round as usize % 2].as_path());
        let round = moved(&options, from, to, round, directory.path())?;
        note(&mut verdict, round)?;
    }
    print(Event::Verdict(verdict))
}

/// Restores the machine in another process. If that process is to die, the next one takes its
/// place, with the backend that the first one leaves behind.
fn moved(
    options: &Options,
    from: &Path,
    to: Option<&Path>,
    round: u32,
    directory: &Path,
) -> Result<Round, Error> {
    let Some(die) = options.die else {
        return in_another_process(options, from, to, round)?
            .ok_or_else(|| Error::new("restore the VM: the process printed no round"));
    };
    let socket = directory.join(format!("socket-{round}"));
    let _backend = Lasting::launch(&options.backend, &socket)?;
    let mut options = Options {
        timer_socket: Some(socket),
        ..options.clone()
    };
    if in_another_process(&options, from, to, round)?.is_some() {
        return Err(Error::new(
            "restore the VM: the process was to die, and did not",
        ));
    }
    options.die = None;
    let round = in_another_process(&options, from, to, round)?;
    let mut round = round.ok_or_else(|| Error::new("restore the VM: the second process died"))?;
    round.killed = Some(format!("vmm-{}", name(die)));
    Ok(round)
}

/// The round of a process that restores the machine; none if it has died as it was told to.
fn in_another_process(
    options: &Options,
    from: &Path,
    to: Option<&Path>,
    round: u32,
) -> Result<Option<Round>, Error> {
    let program = std::env::current_exe().context("find this program")?;
    let mut process = Command::new(program);
    process.arg("restore").arg("--from").arg(from);
    if let Some(to) = to {
        process.arg("--save").arg(to);
    }
    process
        .arg(format!("--round={round}"))
        .arg(format!("--seed={}", options.seed))
        .arg(format!("--interrupts={}", options.interrupts))
        .arg(format!("--gate={}", name(options.gate)));
    if let Some(when) = options.kill_backend {
        process.arg(format!("--kill-backend={}", name(when)));
    }
    if let Some(when) = options.die {
        process.arg(format!("--die={}", name(when)));
    }
    match &options.timer_socket {
        Some(socket) => process.arg("--timer-socket").arg(socket),
        None => process.arg("--backend").arg(&options.backend),
    };
    let output = process
        .stderr(Stdio::inherit())
        .output()
        .context("start a process that restores the VM")?;
    let has_died = options.die.is_some() && output.status.signal() == Some(libc::SIGKILL);
    if has_died {
        return Ok(None);
    }
    if !output.status.success() {
        let status = output.status;
        return Err(Error::new(format!(
            "restore the VM: the process ended with {status}"
        )));
    }
    for line in output.stdout.lines() {
        let line = line.context("read what the process printed")?;
        if let Event::Round(round) = serde_json::from_str(&line).context("parse a round")? {
            return Ok(Some(round));
        }
    }
    Ok(None)
}

/// A backend that outlives the VMMs that connect to it.
struct Lasting(Child);

impl Lasting {
    fn launch(program: &Path, socket: &Path) -> Result<Self, Error> {
        let child = Command::new(program)
            .args([
                "--counter-source=cntvct",
                "--log-level=warn",
                "--socket-path",
            ])
            .arg(socket)
            .spawn();
        child.map(Lasting).context("launch the backend")
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        // It has ended otherwise, or nobody can end it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
