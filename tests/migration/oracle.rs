//! What must hold of a VM whatever happened to its backends: it runs with the right time, or it
//! is stopped and QEMU's log says why.

use std::time::Instant;

use vhost_user_timer_kit::qemu::{Guest, PATIENCE, Seen};

use crate::judge::{await_all, last};

/// The id of the timer device in each QEMU.
const DEVICE: &str = "timer";

/// What QEMU's log says before each error of the device.
const SAYS: &str = "vhost-user-timer: ";

/// What it says of a start that does not take place.
const REFUSES: &str = "the VM stays stopped";

/// What a VM is found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It runs, and its time is right.
    Right,
    /// It is stopped, and QEMU's log says why.
    Stopped,
}

/// Whether the VM's vCPUs run.
pub(crate) fn runs(guest: &mut Guest) -> bool {
    guest.qmp().status().expect("a status").running
}

/// Tries to have a stopped VM run. Returns whether it does.
pub(crate) fn resumes(guest: &mut Guest) -> bool {
    guest.qmp().cont().expect("an answer to cont");
    runs(guest)
}

/// How many starts the device has refused, by QEMU's log.
pub(crate) fn refusals(guest: &Guest) -> usize {
    let log = guest.qemu_log();
    let said = |line: &&str| line.contains(SAYS) && line.contains(REFUSES);
    log.lines().filter(said).count()
}

/// Waits until a VM runs, or its start is refused, and judges it. `since` is what its guest had
/// seen earlier, and `refused` how many starts had been refused then.
///
/// # Errors
///
/// What is wrong: with the time of a VM that runs, or with the log of one that does not.
pub(crate) fn judge(guest: &mut Guest, since: &[Seen], refused: usize) -> Result<Found, String> {
    let deadline = Instant::now() + PATIENCE;
    while !runs(guest) {
        if refusals(guest) > refused {
            return Ok(Found::Stopped);
        }
        if Instant::now() > deadline {
            let log = guest.qemu_log();
            return Err(format!("the VM does not run, and nothing says why: {log}"));
        }
    }
    let seen = progress(guest, since)?;
    check_order(&seen)?;
    check_start(guest)?;
    Ok(Found::Right)
}

/// Stops a VM that runs, starts it again, and [judges](judge) it. A guest that is ahead of its
/// backend has read its counter past the count at which it was stopped.
///
/// # Errors
///
/// Those of [`judge`].
pub(crate) fn judge_again(guest: &mut Guest) -> Result<Found, String> {
    let since = guest.witness().expect("a report");
    let refused = refusals(guest);
    guest.qmp().stop().expect("an answer to stop");
    resumes(guest);
    let found = judge(guest, &since, refused)?;
    if found == Found::Right {
        let paused = count(guest, "paused-count")?;
        if last(&since) > paused {
            return Err(format!(
                "the guest is ahead: the VM was stopped at {paused}, after {since:?}"
            ));
        }
    }
    Ok(found)
}

/// Waits until each vCPU has read its counter and slept again.
fn progress(guest: &mut Guest, since: &[Seen]) -> Result<Vec<Seen>, String> {
    let seen = await_all(guest, since);
    let moved = |(now, then): (&Seen, &Seen)| now.last > then.last && now.wakes > then.wakes;
    match seen.iter().zip(since).all(moved) {
        true => Ok(seen),
        false => Err(format!("a vCPU stands still: {since:?}, then {seen:?}")),
    }
}

fn check_order(seen: &[Seen]) -> Result<(), String> {
    for (vcpu, seen) in seen.iter().enumerate() {
        if (seen.below_own, seen.below_other, seen.early) != (0, 0, 0) {
            return Err(format!("vCPU {vcpu}: time is out of order: {seen:?}"));
        }
    }
    Ok(())
}

/// Checks the VM's last start: on no vCPU lies a reading between the count at which the VM was
/// stopped and the one at which it was started. An offset that is wrong moves the readings
/// before the stop past the first of these, or those after the start below the second.
fn check_start(guest: &mut Guest) -> Result<(), String> {
    let (paused, confirmed) = (
        count(guest, "paused-count")?,
        count(guest, "confirmed-count")?,
    );
    let gaps = guest.gaps_around(paused, confirmed);
    let gaps = gaps.map_err(|error| error.to_string())?;
    match gaps.iter().all(Option::is_some) {
        true => Ok(()),
        false => Err(format!(
            "a vCPU has read between {paused}, where the VM was stopped, and {confirmed}, where it \
             was started: {gaps:?}"
        )),
    }
}

/// A count that the device has as a property.
fn count(guest: &mut Guest, name: &str) -> Result<u64, String> {
    let path = format!("/machine/peripheral/{DEVICE}");
    let value = guest.qmp().property(&path, name);
    let value = value.map_err(|error| error.to_string())?;
    value.as_u64().ok_or_else(|| format!("{name} is {value}"))
}
