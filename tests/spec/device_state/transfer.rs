//! Streams that are damaged, stall, or never end.

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::contract::{CVAL, Client, op, phase};
use vhost_user_timer_kit::raw_driver::{Rig, load, save, start_load, start_save};

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

/// Something that takes longer did wait.
const AT_ONCE: Duration = Duration::from_secs(4);

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
        let started = Instant::now();
        assert!(client.driver.control.check_device_state().is_err());
        assert!(started.elapsed() < AT_ONCE);
    }
    rig.log_with("longer than 4194304 bytes");
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
    let mut writer = start_load(&client.driver.control);
    writer.write_all(&stream[..stream.len() / 2]).unwrap();
    stalls(&mut client);
    assert_eq!(at_rest(&mut client), before);
    let given_up = writer.write_all(&stream).unwrap_err();
    assert_eq!(given_up.kind(), ErrorKind::BrokenPipe);
    assert!(load(&client.driver.control, &stream), "the next is fine");
}

fn a_reader_that_stalls_fails_the_check_and_nothing_else() {
    let rig = Rig::launch_release(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    let reader = start_save(&client.driver.control);
    stalls(&mut client);
    drop(reader);
    assert!(!save(&client.driver.control).is_empty(), "the next is fine");
}

fn sigterm_ends_the_backend_at_once_whatever_stalls() {
    for checking in [false, true] {
        let mut rig = Rig::launch_release(&[]);
        let client = configured(&rig, 2);
        let writer = start_load(&client.driver.control);
        let control = client.driver.control.clone();
        let check = checking.then(|| thread::spawn(move || control.check_device_state().is_err()));
        let log = "Ending on SIGTERM";
        let signalled = Instant::now();
        rig.backend.signal(Signal::TERM);
        let status = rig.backend.wait(Duration::from_secs(20));
        assert!(
            status.success() && rig.backend.log().contains(log),
            "{status}"
        );
        assert!(signalled.elapsed() < AT_ONCE);
        if let Some(check) = check {
            assert!(check.join().unwrap());
        }
        drop(writer);
    }
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

/// CHECK_DEVICE_STATE fails after a while, during which requests are served.
fn stalls(client: &mut Client) {
    let control = client.driver.control.clone();
    let check = thread::spawn(move || {
        let started = Instant::now();
        (control.check_device_state().is_err(), started.elapsed())
    });
    let mut served = 0;
    while !check.is_finished() {
        let asked = Instant::now();
        client.set(1, &[(CVAL, 1)]);
        client.set(1, &[(CVAL, !1)]);
        assert!(
            asked.elapsed() < AT_ONCE,
            "a request waits for the transfer"
        );
        served += 1;
        thread::yield_now();
    }
    let (failed, took) = check.join().unwrap();
    assert!(
        failed && took >= PATIENCE && took < PATIENCE + AT_ONCE,
        "{failed} after {took:?}"
    );
    assert!(served > 10, "{served} requests were served");
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
