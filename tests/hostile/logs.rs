//! Logs that are full, never read, or flooded.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::{Devices, Launch, find_program};
use vhost_user_timer_kit::clock_driver::{ALARMQ, ClockDriver, UTC};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::message::SET_VRING_NUM;
use vhost_user_timer_kit::raw_driver::{fill, pair};
use vhost_user_timer_kit::victim::{DEADLINE, Victim};

use crate::namespaces::can_unshare;
use crate::printing::{ends, program};

/// More lines than any limit allows, and fewer than a flood has.
const MOST_LINES: usize = 400;

/// Ends the victim, and returns its whole log.
#[track_caller]
fn log_in_the_end(victim: &mut Victim) -> String {
    victim.rig.backend.signal(Signal::TERM);
    let status = victim.rig.backend.exit_within(DEADLINE);
    assert_eq!(status.expect("it ends in time").code(), Some(0));
    victim.rig.backend.log()
}

/// How many lines a log accounts for: those that are there, and those that it says were left out.
fn accounted(log: &str) -> usize {
    let left_out = |line: &str| {
        let (_, text) = line.split_once("] ")?;
        let (lines, _) = text.split_once(" more line")?;
        lines.parse::<usize>().ok()
    };
    log.lines().map(|line| left_out(line).unwrap_or(1)).sum()
}

#[test]
fn a_full_stderr_that_nobody_reads_stops_neither_socket_nor_sigterm() {
    let victim = Victim::released().log_level("debug").unread().start();
    victim.rig.backend.fill_stderr().unwrap();
    for _ in 0..100 {
        victim.serves_the_timer();
        victim.serves_the_clock();
    }
    // With frontends connected, whose requests are logged.
    let mut client = Client::connect(&victim.rig);
    let _guest = victim.clock();
    victim.in_time("a frontend changes its VM", || {
        for _ in 0..100 {
            client.resume();
            client.pause();
        }
    });
    victim.ends_on_sigterm();
}

/// With an alarm due, the device reads the alarm queue whenever it is kicked.
fn guest_with_an_alarm_due(victim: &Victim) -> ClockDriver {
    let mut guest = victim.clock();
    guest.set_alarm(UTC, 1, true);
    guest
}

/// Breaks the alarm queue, and reloads the driver.
fn reload_broken(guest: &mut ClockDriver) {
    let ring = &mut guest.driver.rings[usize::from(ALARMQ)];
    ring.set_avail_index(&guest.driver.memory, ring.next_avail().wrapping_add(17));
    ring.kick_anyway();
    // By then the broken ring was read, and that was logged.
    guest.reads_the_hosts(UTC);
    guest.reads_the_hosts(UTC);
    guest.driver.stop(ALARMQ);
    guest.driver.start(ALARMQ);
}

#[test]
fn a_flood_of_one_peer_hides_no_line_of_the_other_one() {
    let mut victim = Victim::launch();
    let mut guest = guest_with_an_alarm_due(&victim);
    (0..200).for_each(|_| reload_broken(&mut guest));
    let mut driver = victim.driver();
    let ring = &mut driver.rings[2];
    ring.set_avail_index(&driver.memory, ring.next_avail().wrapping_add(17));
    ring.kick_anyway();
    victim
        .rig
        .log_with("Queue 2 is stopped until the frontend starts it again");
    drop((guest, driver));
    let log = log_in_the_end(&mut victim);
    let lines = log.matches("Queue 1 is stopped until").count();
    assert!((100..200).contains(&lines), "{lines} lines");
    assert_eq!(accounted(&log), 200 + 1, "{log}");
}

#[test]
fn a_guest_that_reloads_its_driver_with_a_broken_ring_does_not_stop_anything() {
    let mut victim = Victim::released().log_level("info").unread().start();
    let mut guest = guest_with_an_alarm_due(&victim);
    for _ in 0..80 {
        victim.in_time("ten reloads", || {
            (0..10).for_each(|_| reload_broken(&mut guest));
        });
    }
    drop(guest);
    victim.serves_the_timer();
    victim.serves_the_clock();
    victim.rig.backend.signal(Signal::TERM);
    assert!(victim.rig.backend.exit_within(DEADLINE).is_some());
}

#[test]
fn a_frontend_that_comes_again_and_again_does_not_flood_the_log() {
    const TIMES: usize = 1000;
    let mut victim = Victim::released().log_level("info").start();
    for _ in 0..TIMES {
        let mut control = victim.control();
        control.finish();
        control.wait_for_end();
    }
    victim.unharmed();
    let log = log_in_the_end(&mut victim);
    let lines = log.lines().count();
    assert!(lines < MOST_LINES, "{lines} lines");
    // Each was connected and disconnected.
    let accounted = accounted(&log);
    assert!(accounted >= 2 * TIMES, "{accounted} lines accounted for");
    assert!(log.contains(" more lines like this one in "), "{log}");
    assert!(log.contains("Ending on SIGTERM from process "), "{log}");
}

#[test]
fn what_a_frontend_does_wrong_without_end_is_logged_some_times_and_then_counted() {
    const TIMES: usize = 5000;
    let mut victim = Victim::launch();
    let mut control = victim.negotiated();
    for _ in 0..TIMES {
        // No ring has three descriptors.
        if control.ask(SET_VRING_NUM, &[pair(0, 3)], &[]).is_err() {
            control = victim.negotiated();
        }
    }
    // Something else that is wrong is logged all the same, of the same peer and of the other one.
    drop(control);
    victim.unharmed();
    let log = log_in_the_end(&mut victim);
    let lines = log.lines().count();
    assert!(lines < MOST_LINES, "{lines} lines");
    let accounted = accounted(&log);
    assert!(accounted >= TIMES, "{accounted} lines accounted for");
}

/// RLIMIT_FSIZE of a process, in bytes.
fn file_size_limit(pid: u32) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max file size"));
    let soft = line.unwrap().split_whitespace().next().unwrap();
    soft.parse().unwrap()
}

#[test]
fn a_log_file_at_its_size_limit_costs_lines_and_they_are_counted() {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("log");
    let script = format!("ulimit -f 2; exec \"$@\" 2>>{}", log.display());
    let mut victim = Victim::released()
        .log_level("debug")
        .script(&script)
        .start();
    let mut client = Client::connect(&victim.rig);
    let mut changes = |rounds| {
        for _ in 0..rounds {
            client.resume();
            client.pause();
        }
    };
    changes(50);
    let limit = file_size_limit(victim.rig.backend.pid());
    changes(5);
    // All these lines were written or dropped: none is left that fills the file again below.
    assert!(victim.rig.comes_to_rest());
    assert_eq!(fs::metadata(&log).unwrap().len(), limit);
    // Somebody rotates it.
    File::options()
        .write(true)
        .open(&log)
        .unwrap()
        .set_len(0)
        .unwrap();
    changes(1);
    drop(client);
    victim.serves_the_clock();
    log_in_the_end(&mut victim);
    let text = fs::read_to_string(&log).unwrap();
    let told = "dropped: writing to stderr failed: File too large";
    assert!(text.contains(told), "{text}");
}

#[test]
fn an_error_of_the_start_is_told_for_a_moment_only_where_stderr_is_full() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut full = writer.try_clone().unwrap();
    fill(&mut full);
    drop(full);
    let mut command = Command::new(program());
    command.args(["--fd=77"]).stderr(writer);
    assert_eq!(ends(command), 1);
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    assert!(text.iter().all(|byte| *byte == 0), "there was no room");
}

/// As a VMM in a container may be. The kernel has no other number for it.
#[test]
fn a_frontend_in_a_foreign_pid_namespace_is_process_0() {
    let unshare = ["-Urp", "--fork", "--kill-child", "--mount-proc", "--"];
    if !can_unshare(&unshare) {
        return;
    }
    let script = format!("exec unshare {} \"$@\"", unshare.join(" "));
    let launch = Launch::new(&find_program().unwrap(), Devices::Timer).script(&script);
    let mut backend = launch.inheriting().start().unwrap();
    let _frontend = UnixStream::connect(backend.socket_path()).unwrap();
    backend.log_with("A frontend of the timer device connected: process 0 of uid 0");
    backend.kill();
}
