//! Device states and state files with odd contents.
//!
//! A stream is a saved one with bytes changed, and mostly with its checksum made right again. One
//! that is refused changes nothing; one that is accepted gives a VM whose restore can be completed,
//! and that is the same after another save and load. A backend that is started on a changed state
//! file either says why it does not and leaves the file as it is, or serves; where one bit has
//! flipped, it serves the same VM.

use std::fs;
use std::path::Path;
use std::time::Instant;

use fastrand::Rng;
use vhost_user_timer_kit::backend_process::{Devices, Launch};
use vhost_user_timer_kit::clock_driver::{ClockDriver, UTC, host, rtc_status};
use vhost_user_timer_kit::contract::{CNT, CTL, CVAL, Client, phase, restore};
use vhost_user_timer_kit::raw_driver::{Rig, load, save};
use vhost_user_timer_kit::state_file::{self, HEADER, crc32};
use vhost_user_timer_kit::victim::DEADLINE;

use super::round::{Round, Socket};

/// Streams in a round, for each device.
const STREAMS: usize = 40;

/// State files in a round.
const FILES: usize = 6;

/// Where a stream's checksum is; it is of all that follows.
const CRC: std::ops::Range<usize> = 8..12;

const VCPUS: u32 = 3;

pub(super) fn round(round: &mut Round<'_>) {
    round.beside_a_neighbour(Socket::Timer, timer_streams);
    round.beside_a_neighbour(Socket::Clock, clock_streams);
    for _ in 0..FILES {
        state_file(round);
    }
}

fn changed(random: &mut Rng, stream: &[u8]) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(CRC.end..bytes.len());
        match random.u8(0..6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.u8(..)),
            2 => bytes.extend((0..random.usize(1..50)).map(|_| random.u8(..))),
            3 => bytes[at] = 0xff,
            4 => bytes[at] ^= 1 << random.u8(0..8),
            _ => bytes[at] = random.u8(..),
        }
        if bytes.len() <= CRC.end {
            break;
        }
    }
    if random.u8(0..10) != 0 && bytes.len() >= CRC.end {
        let crc = crc32(&bytes[CRC.end..]);
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

fn connect(round: &mut Round<'_>) -> Client {
    round.tally.connections += 1;
    Client::connect(&round.victim.rig)
}

fn timer_streams(round: &mut Round<'_>) {
    connect(round).reset_and_leave();
    let mut client = connect(round);
    client.configure(VCPUS);
    for vcpu in 0..VCPUS {
        client.set(vcpu, &[(CTL, 1), (CVAL, 1 << 40), (CNT, 1 << 30)]);
    }
    let stream = save(&client.driver.control);
    for _ in 0..STREAMS {
        let bytes = changed(&mut round.random, &stream);
        round.act(|| format!("a timer stream of {} bytes: {bytes:x?}", bytes.len()));
        let before = (client.info().at_rest(), client.state().at_rest(false));
        if !load(&client.driver.control, &bytes) {
            round.tally.refusals += 1;
            let after = (client.info().at_rest(), client.state().at_rest(false));
            assert_eq!(after, before, "a load that was refused");
            continue;
        }
        let info = client.info();
        assert_eq!(info.phase, phase::RESTORING, "after a load");
        for vcpu in 0..info.vcpus {
            client.restore_done(vcpu);
        }
        assert_eq!(
            client.info().phase,
            phase::PAUSED,
            "after the last RESTORE_DONE"
        );
        let first = client.state();
        let again = save(&client.driver.control);
        assert!(
            load(&client.driver.control, &again),
            "what was saved is loaded"
        );
        for vcpu in 0..info.vcpus {
            client.restore_done(vcpu);
        }
        let second = client.state();
        assert_eq!(
            second.at_rest(true),
            first.at_rest(true),
            "after another save and load"
        );
    }
    client.reset_and_leave();
}

fn clock_streams(round: &mut Round<'_>) {
    round.tally.connections += 1;
    let mut guest = ClockDriver::connect(&round.victim.rig);
    let clocks = host::ids();
    for clock in &clocks {
        guest.set_alarm(*clock, u64::MAX - 7, true);
    }
    let stream = save(&guest.driver.control);
    for _ in 0..STREAMS {
        let bytes = changed(&mut round.random, &stream);
        round.act(|| format!("a clock stream of {} bytes: {bytes:x?}", bytes.len()));
        let alarms = |guest: &mut ClockDriver| {
            clocks
                .iter()
                .map(|clock| guest.read_alarm(*clock))
                .collect::<Vec<_>>()
        };
        let before = alarms(&mut guest);
        if load(&guest.driver.control, &bytes) {
            let again = save(&guest.driver.control);
            let loaded = alarms(&mut guest);
            assert!(
                load(&guest.driver.control, &again),
                "what was saved is loaded"
            );
            assert_eq!(alarms(&mut guest), loaded, "after another save and load");
        } else {
            round.tally.refusals += 1;
            assert_eq!(alarms(&mut guest), before, "a load that was refused");
        }
        // A stream can make a TAI clock of it, which a host reads only if it knows TAI.
        let reading = guest.try_read(UTC);
        assert!(
            matches!(reading, Ok(_) | Err(rtc_status::EIO)),
            "READ: {reading:?}"
        );
    }
    // As it was: MONOTONIC continues from the host's, too.
    assert!(
        load(&guest.driver.control, &stream),
        "what was saved is loaded"
    );
    for clock in clocks {
        guest.set_alarm(clock, 0, false);
    }
}

fn launch(round: &mut Round<'_>, file: &Path) -> std::io::Result<Rig> {
    round.tally.restarts += 1;
    let option = format!("--state-file={}", file.display());
    let launch = Launch::new(round.program, Devices::Timer).args(&[option]);
    // A start that never ends is one that uses the CPU, or its memory.
    let limited = launch.script("ulimit -t 10 -v 2000000; exec \"$@\"");
    let began = Instant::now();
    let started = limited.start();
    let took = began.elapsed();
    assert!(took < DEADLINE, "the backend's start took {took:?}");
    started.map(Rig::watch)
}

fn state_file(round: &mut Round<'_>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    let rig = launch(round, &path).expect("a backend on a new file");
    let mut client = Client::connect(&rig);
    client.configure(2);
    if round.random.bool() {
        client.restore_begin(2, restore::AUTORUN);
    }
    let phase = client.info().phase;
    let vm = client.state().at_rest(false);
    drop(client);
    let Rig { mut backend, .. } = rig;
    backend.kill();
    let mut bytes = fs::read(&path).expect("the state file");
    let (mut sparse, mut same_vm) = (None, false);
    match round.random.u8(0..10) {
        0 => bytes.truncate(round.random.usize(0..bytes.len())),
        1 => sparse = Some(round.random.u64(0..8 << 30)),
        2 => bytes[..64].fill(0),
        4 => {
            // What has a right checksum is not trusted either.
            for _ in 0..round.random.usize(1..4) {
                let at = round.random.usize(HEADER..bytes.len());
                bytes[at] = round.random.u8(..);
            }
            state_file::seal_slots(&mut bytes);
        }
        5 => {
            let at = round.random.usize(state_file::VERSION..HEADER);
            bytes[at] = round.random.u8(..);
            state_file::seal(&mut bytes);
        }
        6 | 7 => {
            same_vm = true;
            let end = *round.random.choice(&[HEADER, bytes.len()]).expect("one");
            bytes[round.random.usize(0..end)] ^= 1 << round.random.u8(0..8);
        }
        3 => {
            let len = round.random.usize(0..9000);
            bytes = (0..len).map(|_| round.random.u8(..)).collect();
        }
        _ => {
            for _ in 0..round.random.usize(1..6) {
                // The head, more often than not.
                let end = *round.random.choice(&[64, 128, bytes.len()]).expect("one");
                let at = round.random.usize(0..end.min(bytes.len()));
                bytes[at] ^= 1 << round.random.u8(0..8);
            }
        }
    }
    fs::write(&path, &bytes).expect("the state file");
    if let Some(len) = sparse {
        let file = fs::File::options()
            .write(true)
            .open(&path)
            .expect("the state file");
        file.set_len(len).expect("a length");
    }
    round.act(|| {
        format!(
            "a state file of phase {phase}, {} bytes, sparse {sparse:?}",
            bytes.len()
        )
    });
    match launch(round, &path) {
        Err(error) => {
            let said = error.to_string();
            assert!(said.contains("state"), "it says why: {said}");
            if sparse.is_none() {
                let now = fs::read(&path).expect("the state file");
                assert!(now == bytes, "it changed the file: {said}");
            }
            round.tally.refusals += 1;
        }
        Ok(rig) => {
            let mut client = Client::connect(&rig);
            let now = client.info();
            assert!(now.phase <= phase::ARMED && now.vcpus <= 4096, "{now:?}");
            if same_vm {
                assert_eq!(client.state().at_rest(false), vm, "one bit made another VM");
            }
            drop(client);
            let Rig { mut backend, .. } = rig;
            assert_eq!(backend.terminate().code(), Some(0));
        }
    }
}
