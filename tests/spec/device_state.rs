//! Device state (SPEC.md, "Device state") by way of `vhost`'s `Frontend`: a VM saved here and
//! loaded there, whatever happens to the pipe on the way.

use std::io::{ErrorKind, Read, Write, pipe};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, VM, VmState, configure_body, info_flag, op, phase,
    request, restore, status,
};
use vhost_user_timer_kit::raw_driver::{Layout, Rig, load, save, start_load, start_save};

/// CHECK_DEVICE_STATE waits this long for a transfer that does not end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Something that takes longer did wait.
const AT_ONCE: Duration = Duration::from_secs(4);

/// So many vCPUs that a saved VM is more than a pipe holds.
const MANY: u32 = 4_096;

/// A client of a VM with this many vCPUs, whose timers all differ, in PAUSED.
fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = Client::connect(rig);
    client.configure(vcpus);
    for vcpu in 0..vcpus {
        let n = u64::from(vcpu);
        let entries = [
            (CTL, n % 4),
            (CVAL, !n),
            (PCTL, (n + 1) % 4),
            (PCVAL, !n << 8),
        ];
        client.set(vcpu, &entries);
    }
    client.set(0, &[(CNT, 0x1234_5678_9abc), (PCNT, 0x1_0000_0000)]);
    client
}

/// A small VM, saved.
fn saved() -> Vec<u8> {
    let rig = Rig::launch(&[]);
    let client = configured(&rig, 3);
    save(&client.driver.control)
}

/// What a VM at rest is.
fn at_rest(client: &mut Client) -> (VmState, u32, u64) {
    let info = client.info();
    let stands = info.flags & info_flag::PHYS_VIRTUALISED != 0;
    (client.state().at_rest(stands), info.phase, info.epoch)
}

#[test]
fn a_save_in_paused_is_exact_and_the_same_each_time() {
    let source = Rig::launch(&[]);
    let mut client = configured(&source, 8);
    let before = client.state();
    let stream = save(&client.driver.control);
    assert_eq!(save(&client.driver.control), stream);

    let destination = Rig::launch(&[]);
    let mut there = Client::connect(&destination);
    assert!(load(&there.driver.control, &stream));
    let state = there.state();
    assert_eq!(state.vcpus, before.vcpus);
    assert_eq!(state.frequency, before.frequency);
    assert_eq!(there.info().abi, 0);
}

#[test]
fn a_save_in_running_is_one_instant() {
    let source = Rig::launch(&[]);
    let mut client = configured(&source, 8);
    client.resume();
    let before = client.state();
    let stream = save(&client.driver.control);
    let after = client.state();
    assert_eq!(client.info().phase, phase::RUNNING, "it goes on");

    let destination = Rig::launch(&[]);
    let mut there = Client::connect(&destination);
    assert!(load(&there.driver.control, &stream));
    for (vcpu, row) in (0..).zip(&before.vcpus) {
        let [ctl, virt, cval, pctl, phys, pcval] = there.state().vcpus[vcpu].registers;
        assert!((before.virt_count..=after.virt_count).contains(&virt));
        // Both clocks run alike, so they are of one instant if they are as far apart as ever.
        assert_eq!(
            phys.wrapping_sub(virt),
            before.phys_count.wrapping_sub(before.virt_count)
        );
        assert_eq!([cval, pcval], [row.registers[2], row.registers[5]]);
        assert_eq!(
            [ctl & 3, pctl & 3],
            [row.registers[0] & 3, row.registers[3] & 3]
        );
        assert_eq!(
            virt,
            there.state().vcpus[0].registers[1],
            "all vCPUs bring one count"
        );
    }
}

#[test]
fn the_source_goes_on_as_if_nothing_had_happened() {
    let rig = Rig::launch(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    let registers = |client: &mut Client| {
        let last = client.get(MANY - 1, &[CTL, CNT, CVAL, PCTL, PCNT, PCVAL]);
        (client.info().at_rest(), last)
    };
    let before = registers(&mut client);
    let control = client.driver.control.clone();

    let stream = save(&control);
    assert!(stream.len() > 64 * 1024, "it does not fit a pipe");
    assert_eq!(registers(&mut client), before, "after a save");

    drop(start_save(&control));
    assert!(control.check_device_state().is_err());
    assert_eq!(
        registers(&mut client),
        before,
        "after a save that nobody read"
    );

    let mut reader = start_save(&control);
    reader.read_exact(&mut [0; 1_000]).unwrap();
    drop(reader);
    assert!(control.check_device_state().is_err());
    assert_eq!(
        registers(&mut client),
        before,
        "after a save that was given up half way"
    );

    let stalled = start_save(&control);
    assert_eq!(registers(&mut client), before, "during a save that stalls");
    assert_eq!(save(&control), stream, "a save in its place");
    drop(stalled);

    client.resume();
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn a_save_is_refused_in_new_and_while_restoring_and_the_log_says_why() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    let refused = |client: &Client, why: &str| {
        let (_reader, writer) = pipe().unwrap();
        let control = &client.driver.control;
        let result = control.set_device_state_fd(Direction::SAVE, Phase::STOPPED, writer.into());
        assert!(result.is_err());
        let log = rig.backend.log();
        assert!(log.contains(why), "{why}: {log}");
    };
    refused(&client, "The VM is NEW");
    client.configure(3);
    client.restore_begin(3, 0);
    client.bring(1, 5);
    client.restore_done(1);
    refused(&client, "A restore is open, 2 vCPUs are missing");
    assert_eq!(client.info().restored, 1, "and it stays open");
}

#[test]
fn what_is_loaded_in_new_waits_for_every_vcpu() {
    let stream = saved();
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    assert!(load(&client.driver.control, &stream));
    let info = client.info();
    assert_eq!(
        (info.phase, info.vcpus, info.restored),
        (phase::RESTORING, 3, 0)
    );
    assert_eq!(info.epoch, 2);
    assert_eq!(client.get(2, &[CTL, CNT, CVAL]), [2, 0x1234_5678_9abc, !2]);

    let waiting = [0, 1, 2].map(|vcpu| client.wait_run(1, vcpu));
    for vcpu in [1, 0, 2] {
        client.settle();
        assert!(
            client.driver.used_already(1).is_none(),
            "nobody runs before all are back"
        );
        // As a VMM does it: what is read is applied, and written back, which changes nothing.
        let ids = [CTL, CNT, CVAL, PCTL, PCNT, PCVAL];
        let values = client.get(vcpu, &ids);
        let entries: Vec<_> = ids.into_iter().zip(values).collect();
        client.set(vcpu, &entries);
        client.restore_done(vcpu);
    }
    let info = client.info();
    assert_eq!((info.phase, info.restored), (phase::PAUSED, 3));
    assert!(
        client.driver.used_already(1).is_none(),
        "nobody runs before RESUME"
    );
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    let answers = client.all_released(1, &[&waiting[..], &[resume]].concat());
    assert!(
        answers
            .iter()
            .all(|answer| answer.body == answers[0].body && answer.status == 0)
    );
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn what_is_loaded_in_paused_takes_the_former_vms_place_until_it_is_aborted() {
    let stream = saved();
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 5);
    let (state, _, epoch) = at_rest(&mut client);
    let older = client.wait_run(1, 4);
    // The two channels are served by two threads: it waits before the load comes.
    client.settle();
    assert!(load(&client.driver.control, &stream));
    assert_eq!(client.released(1, older).status, status::ESTALE);
    let info = client.info();
    assert_eq!(
        (info.phase, info.vcpus, info.epoch),
        (phase::RESTORING, 3, epoch + 1)
    );
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(at_rest(&mut client), (state, phase::PAUSED, epoch + 1));
}

#[test]
fn a_load_is_refused_in_running_and_while_restoring_and_changes_nothing() {
    let stream = saved();
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.resume();
    let before = (client.info().cntvoff, client.get(1, &[CVAL]));
    assert!(!load(&client.driver.control, &stream));
    assert_eq!((client.info().cntvoff, client.get(1, &[CVAL])), before);
    assert!(
        rig.backend
            .log()
            .contains("a state is loaded in NEW and PAUSED")
    );
    client.pause();
    client.restore_begin(2, restore::AUTORUN);
    client.bring(0, 7);
    let before = at_rest(&mut client);
    assert!(!load(&client.driver.control, &stream));
    assert_eq!(at_rest(&mut client), before);
    client.restore_done(0);
}

#[test]
fn every_truncation_and_every_single_bit_flip_is_refused_and_changes_nothing() {
    let stream = saved();
    let rig = Rig::launch(&["--log-level=off"]);
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

#[test]
fn an_endless_stream_is_refused_at_once_while_its_writer_goes_on() {
    let rig = Rig::launch(&[]);
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
        let written = writing.join().expect("the writer is told to stop");
        assert!(
            (4 << 20..5 << 20).contains(&written),
            "{written} bytes were taken"
        );
        let started = Instant::now();
        assert!(client.driver.control.check_device_state().is_err());
        assert!(started.elapsed() < AT_ONCE);
    }
    assert!(rig.backend.log().contains("longer than 4194304 bytes"));
    assert_eq!(at_rest(&mut client), before);
}

#[test]
fn streams_come_and_go_one_byte_at_a_time() {
    let source = Rig::launch(&[]);
    let mut client = configured(&source, 3);
    let mut reader = start_save(&client.driver.control);
    let mut stream = Vec::new();
    let mut byte = [0];
    while reader.read(&mut byte).unwrap() == 1 {
        stream.push(byte[0]);
        client.info();
    }
    client.driver.control.check_device_state().unwrap();

    let destination = Rig::launch(&[]);
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

#[test]
fn a_writer_that_stalls_fails_the_check_and_nothing_else() {
    let stream = saved();
    let rig = Rig::launch(&[]);
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

#[test]
fn a_reader_that_stalls_fails_the_check_and_nothing_else() {
    let rig = Rig::launch(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    let reader = start_save(&client.driver.control);
    stalls(&mut client);
    drop(reader);
    assert!(!save(&client.driver.control).is_empty(), "the next is fine");
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

#[test]
fn sigterm_ends_the_backend_at_once_whatever_stalls() {
    for checking in [false, true] {
        let mut rig = Rig::launch(&[]);
        let client = configured(&rig, 2);
        let writer = start_load(&client.driver.control);
        let control = client.driver.control.clone();
        let check = checking.then(|| thread::spawn(move || control.check_device_state().is_err()));
        let log = "Ending on a signal";
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

#[test]
fn a_second_transfer_replaces_one_that_stalls() {
    let rig = Rig::launch(&["--max-vcpus=4096"]);
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

#[test]
fn a_check_without_a_transfer_fails() {
    let rig = Rig::launch(&[]);
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

#[test]
fn a_frontend_that_leaves_in_the_middle_leaves_nothing_behind() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    let before = at_rest(&mut client);
    drop(client);
    // A connection's threads end before the last of its descriptors is closed.
    assert!(rig.comes_to_rest());
    let idle = rig.usage();
    assert_eq!(idle.threads, 1, "between frontends there is one thread");
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

#[test]
fn threads_and_descriptors_stay_as_they_are_over_two_hundred_transfers() {
    let rig = Rig::launch(&["--log-level=off"]);
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

#[test]
fn another_frequency_is_refused_unless_it_was_left_to_the_stream() {
    const HZ: u64 = 24_000_000;
    let source = Rig::launch(&[]);
    let mut client = Client::connect(&source);
    client.vm(op::CONFIGURE_VM, &configure_body(2, 1, HZ)).ok(0);
    let stream = save(&client.driver.control);

    let fixed = Rig::launch(&["--counter-frequency=62500000"]);
    let mut there = Client::connect(&fixed);
    assert!(!load(&there.driver.control, &stream));
    assert_eq!(there.info().phase, phase::NEW);
    let log = fixed.backend.log();
    assert!(
        log.contains("runs at 24000000 Hz, and this backend's at 62500000 Hz"),
        "{log}"
    );

    for args in [&[][..], &["--counter-frequency=24000000"]] {
        let same = Rig::launch(args);
        let mut there = Client::connect(&same);
        assert!(load(&there.driver.control, &stream));
        let info = there.info();
        assert_eq!((info.frequency, info.abi, info.vcpus), (HZ, 1, 2));
    }
}

#[test]
fn more_vcpus_than_the_backend_takes_are_refused() {
    let rig = Rig::launch(&["--max-vcpus=2"]);
    let mut client = Client::connect(&rig);
    assert!(!load(&client.driver.control, &saved()));
    assert_eq!(client.info().phase, phase::NEW);
    assert!(
        rig.backend
            .log()
            .contains("has 3 vCPUs, and this backend takes 1 to 2")
    );
}

#[test]
fn what_was_loaded_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let state_file = format!("--state-file={}", folder.path().join("state").display());
    let mut first = Rig::launch(&[&state_file]);
    let mut client = Client::connect(&first);
    assert!(load(&client.driver.control, &saved()));
    client.restore_done(2);
    let before = at_rest(&mut client);
    first.backend.kill();

    let second = Rig::launch(&[&state_file]);
    let mut client = Client::connect(&second);
    assert_eq!(at_rest(&mut client), before);
    assert_eq!(client.restore_done(0), 1);
    assert_eq!(client.restore_done(1), 0);
    assert_eq!(client.state().virt_count, 0x1234_5678_9abc);
}

#[test]
fn every_golden_stream_is_loaded_by_a_real_backend() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/tests/data/device-state");
    let mut loaded = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let rig = Rig::launch(&[]);
        let mut client = Client::connect(&rig);
        let stream = std::fs::read(&path).unwrap();
        assert!(
            load(&client.driver.control, &stream),
            "{}: {}",
            path.display(),
            rig.backend.log()
        );
        for vcpu in 0..client.info().vcpus {
            client.restore_done(vcpu);
        }
        assert_eq!(client.info().phase, phase::PAUSED);
        loaded += 1;
    }
    assert!(loaded >= 2);
}
