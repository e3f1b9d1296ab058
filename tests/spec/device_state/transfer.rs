//! Streams that are damaged, stall, or never end.

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_timer_kit::contract::{CVAL, Client, op, phase};
use vhost_user_timer_kit::raw_driver::message::CHECK_DEVICE_STATE;
use vhost_user_timer_kit::raw_driver::{self, Control, Rig, load, save, start_load, start_save};

use super::{MANY, at_rest, configured, saved};

scenarios! {
    binary {
        every_truncation_and_every_single_bit_flip_is_refused_and_changes_nothing:
            "10.2" "10.14" "10.17";
        a_stream_of_a_newer_version_is_refused_and_changes_nothing: "10.2" "10.14" "10.17";
        an_endless_stream_is_refused_at_once_while_its_writer_goes_on: "10.2" "10.14" "10.17";
        streams_come_and_go_one_byte_at_a_time: "10.7";
        a_writer_that_stalls_fails_the_check_and_nothing_else: "10.17" "10.18";
        a_reader_that_stalls_fails_the_check_and_nothing_else: "10.4" "10.18";
        sigterm_ends_the_backend_at_once_whatever_stalls: "10.18";
        a_second_transfer_replaces_one_that_stalls: "10.19";
        a_check_without_a_transfer_fails: "10.7";
        a_frontend_that_leaves_in_the_middle_leaves_nothing_behind: "1.5" "10.17";
        threads_and_descriptors_stay_as_they_are_over_two_hundred_transfers: "10.4" "10.17";
    }
}

/// CHECK_DEVICE_STATE waits this long for a transfer that does not end.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often something is tried that a machine may be too slow for.
const ROUNDS: u32 = 6;

/// What the log says of a transfer that did not end in time.
const UNFINISHED: &str = "the frontend has not read or written the whole state";

fn every_truncation_and_every_single_bit_flip_is_refused_and_changes_nothing() {
    let stream = saved();
    let rig = Rig::launch_release(&["--log-level=off"]);
    let mut client = configured(&rig, 2);
    let before = at_rest(&mut client);
    let control = client.driver.control.clone();
    for len in 0..stream.len() {
        assert!(!load(&control, &stream[..len]), "cut off after {len} bytes");
    }
    let mut flipped = stream.clone();
    for bit in 0..stream.len() * 8 {
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(!load(&control, &flipped), "bit {bit}");
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(
        !load(&control, &[&stream[..], &[0]].concat()),
        "a byte follows"
    );
    assert_eq!(at_rest(&mut client), before);
    assert!(load(&control, &flipped), "and the stream itself is fine");
}

fn an_endless_stream_is_refused_at_once_while_its_writer_goes_on() {
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 1);
    let before = at_rest(&mut client);
    for head in [&b"vutimer1"[..], b"something else"] {
        let mut writer = start_load(&client.driver.control);
        let head = head.to_vec();
        let writing = thread::spawn(move || {
            let mut written = 0;
            let mut bytes = head.as_slice();
            while let Ok(n) = writer.write(bytes) {
                written += n;
                bytes = &[0x5a; 4_096];
            }
            written
        });
        let written = writing.join().expect("the writer sees a closed pipe");
        assert!(
            (4 << 20..5 << 20).contains(&written),
            "{written} bytes were taken"
        );
        assert!(client.driver.control.check_device_state().is_err());
        rig.log_with("longer than 4194304 bytes");
    }
    assert_eq!(rig.said(UNFINISHED), 0);
    assert_eq!(at_rest(&mut client), before);
}

fn streams_come_and_go_one_byte_at_a_time() {
    let source = Rig::launch_release(&[]);
    let mut client = configured(&source, 3);
    let mut reader = start_save(&client.driver.control);
    let mut stream = Vec::new();
    let mut byte = [0];
    while reader.read(&mut byte).unwrap() == 1 {
        stream.push(byte[0]);
        client.info();
    }
    client.driver.control.check_device_state().unwrap();

    let destination = Rig::launch_release(&[]);
    let mut there = Client::connect(&destination);
    let mut writer = start_load(&there.driver.control);
    for byte in &stream {
        writer.write_all(&[*byte]).unwrap();
        assert_eq!(
            there.info().phase,
            phase::NEW,
            "nothing is taken in before it is whole"
        );
    }
    drop(writer);
    there.driver.control.check_device_state().unwrap();
    assert_eq!(there.state().vcpus, client.state().vcpus);
}

fn a_writer_that_stalls_fails_the_check_and_nothing_else() {
    let stream = saved();
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 2);
    let before = at_rest(&mut client);
    let mut writer = stalls(&mut client, |control| {
        let mut writer = start_load(control);
        writer.write_all(&stream[..stream.len() / 2]).unwrap();
        writer
    });
    assert_eq!(at_rest(&mut client), before);
    let given_up = writer.write_all(&stream).unwrap_err();
    assert_eq!(given_up.kind(), ErrorKind::BrokenPipe);
    assert!(load(&client.driver.control, &stream), "the next is fine");
}

fn a_reader_that_stalls_fails_the_check_and_nothing_else() {
    let rig = Rig::launch_release(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    drop(stalls(&mut client, start_save));
    assert!(!save(&client.driver.control).is_empty(), "the next is fine");
}

fn sigterm_ends_the_backend_at_once_whatever_stalls() {
    assert!(sigterm_during_a_load(false));
    let mut rounds = 0..ROUNDS;
    assert!(
        rounds.any(|_| sigterm_during_a_load(true)),
        "the check never waited"
    );
}

/// Ends a backend by SIGTERM while a load stalls, which is being checked or not. Whether it was so
/// when the signal came, and the check had not failed by then.
fn sigterm_during_a_load(checking: bool) -> bool {
    let mut rig = Rig::launch_release(&[]);
    let stream = rig.stream();
    let check = Control::over(stream.try_clone().unwrap());
    let client = Client::over(stream);
    let _writer = start_load(&client.driver.control);
    if checking {
        let sent = check.message(CHECK_DEVICE_STATE, false, &[], &[]);
        sent.expect("the backend listens");
    }
    assert!(rig.comes_to_rest());
    rig.backend.signal(Signal::TERM);
    let status = rig.backend.wait(raw_driver::PATIENCE);
    let log = rig.backend.log();
    assert!(status.success(), "{status}: {log}");
    let (before, after) = log.split_once("Ending on SIGTERM").expect("it says so");
    assert!(!after.contains(UNFINISHED), "it waited: {log}");
    !before.contains(UNFINISHED)
}

fn a_second_transfer_replaces_one_that_stalls() {
    let rig = Rig::launch_release(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    let control = client.driver.control.clone();
    let stream = save(&control);
    let stalled_load = start_load(&control);
    let mut stalled_save = start_save(&control);
    let failed = (&stalled_load).write_all(&[0; 1 << 20]).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::BrokenPipe);
    assert!(load(&control, &stream));
    let mut cut_off = Vec::new();
    stalled_save.read_to_end(&mut cut_off).unwrap();
    assert!(cut_off.len() < stream.len() && stream.starts_with(&cut_off));
    assert_eq!(client.info().phase, phase::RESTORING);
}

fn a_check_without_a_transfer_fails() {
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 1);
    let control = client.driver.control.clone();
    assert!(control.check_device_state().is_err());
    save(&control);
    assert!(
        control.check_device_state().is_err(),
        "each transfer is checked once"
    );
    assert_eq!(client.info().phase, phase::PAUSED);
}

fn a_frontend_that_leaves_in_the_middle_leaves_nothing_behind() {
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 2);
    let before = at_rest(&mut client);
    drop(client);
    // A connection's threads end before the last of its descriptors is closed.
    assert!(rig.comes_to_rest());
    let idle = rig.usage();
    assert_eq!(idle.threads, 2, "between frontends: main and the log");
    for _ in 0..3 {
        let client = Client::connect(&rig);
        let stalled = start_load(&client.driver.control);
        drop(client);
        let now = rig.settled(idle.threads, idle.fds);
        assert_eq!((now.threads, now.fds), (idle.threads, idle.fds));
        drop(stalled);
    }
    assert_eq!(at_rest(&mut Client::connect(&rig)), before);
}

fn threads_and_descriptors_stay_as_they_are_over_two_hundred_transfers() {
    let rig = Rig::launch_release(&["--log-level=off"]);
    let mut client = configured(&rig, 4);
    let control = client.driver.control.clone();
    let stream = save(&control);
    // The transfer's thread ends after the frontend has the stream.
    assert!(rig.comes_to_rest());
    let idle = rig.usage();
    for round in 0..200 {
        match round % 5 {
            0 => assert_eq!(save(&control), stream),
            1 => {
                assert!(load(&control, &stream));
                client.vm(op::RESTORE_ABORT, &[]).ok(0);
            }
            2 => assert!(!load(&control, &stream[1..])),
            3 => drop(start_load(&control)),
            _ => drop(start_save(&control)),
        }
    }
    assert_eq!(save(&control), stream);
    let after = rig.settled(idle.threads, idle.fds);
    assert_eq!((after.threads, after.fds), (idle.threads, idle.fds));
}

/// CHECK_DEVICE_STATE of a transfer that `start` starts fails after a while, during which requests
/// are served. Returns what `start` did.
fn stalls<T>(client: &mut Client, start: impl Fn(&Frontend) -> T) -> T {
    for _ in 0..ROUNDS {
        let control = client.driver.control.clone();
        let end = start(&control);
        let check = thread::spawn(move || {
            let started = Instant::now();
            (control.check_device_state().is_err(), started.elapsed())
        });
        let mut served = 0;
        while !check.is_finished() {
            client.set(1, &[(CVAL, 1)]);
            client.set(1, &[(CVAL, !1)]);
            served += u32::from(!check.is_finished());
            thread::yield_now();
        }
        let (failed, took) = check.join().unwrap();
        assert!(failed && took >= PATIENCE, "{failed} after {took:?}");
        // Fewer if this thread was off the CPU for that long, too.
        if served > 10 {
            return end;
        }
    }
    panic!("requests wait for the transfer");
}

/// CRC-32 (IEEE 802.3), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ 0xedb8_8320 & (crc & 1).wrapping_neg();
        }
    }
    !crc
}

fn a_stream_of_a_newer_version_is_refused_and_changes_nothing() {
    let mut stream = saved();
    assert_eq!(stream[8..12], crc32(&stream[12..]).to_le_bytes());
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 2);
    let before = at_rest(&mut client);
    let version = stream[12];
    for newer in [version + 1, 0x7f] {
        stream[12] = newer;
        let crc = crc32(&stream[12..]).to_le_bytes();
        stream[8..12].copy_from_slice(&crc);
        assert!(!load(&client.driver.control, &stream));
        assert_eq!(at_rest(&mut client), before);
    }
    rig.log_with("use a newer one");
}
