//! Rings: random tables, indirect tables and indices, kicks, in memory that shrinks and grows.
//!
//! The attacker writes to its memory through the file, so that it can be truncated at any time.
//! Control messages of the same connection must be answered meanwhile, unless the backend ends the
//! connection.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use fastrand::Rng;
use vhost_user_timer_kit::raw_driver::{
    Control, Descriptor, INDIRECT, NEXT, REGION_GPA, REGION_SIZE, Ring, WRITE, descriptor, memfd,
    message, pair,
};
use vhost_user_timer_kit::victim::{CLOCK_FEATURES, TIMER_FEATURES};

use super::round::{Round, Socket};

/// Acts in a round.
const ACTS: usize = 400;

/// Where indirect tables are, past all rings.
const TABLES: u64 = REGION_GPA + (4 << 20);

/// The connection of a driver that breaks the rules.
struct Attacker {
    control: Control,
    file: File,
    ring: Ring,
    available: u16,
    queue: u32,
}

impl Attacker {
    /// Connects; `None` if the backend ended the connection meanwhile.
    fn connect(round: &mut Round<'_>, socket: Socket) -> Option<Self> {
        let (queue, features) = match socket {
            Socket::Timer => (round.random.u16(0..3), TIMER_FEATURES),
            Socket::Clock => (round.random.u16(0..2), CLOCK_FEATURES),
        };
        let features = match round.random.bool() {
            true => features,
            false => features & !(1 << 29),
        };
        let size = *round.random.choice(&[2, 16, 128, 1024]).expect("one");
        let control = Control::negotiated(round.connect(socket), features);
        let file = memfd(REGION_SIZE);
        let ring = Ring::new(queue, size, true);
        let mut attacker = Attacker {
            control,
            file,
            ring,
            available: 0,
            queue: queue.into(),
        };
        attacker.control.share(attacker.file.as_fd()).ok()?;
        attacker.control.start(queue.into(), &attacker.ring).ok()?;
        Some(attacker)
    }

    /// Writes at a guest-physical address. Past the file's end, the file grows.
    fn write(&self, at: u64, bytes: &[u8]) {
        let offset = at.wrapping_sub(REGION_GPA) % REGION_SIZE;
        self.file.write_all_at(bytes, offset).expect("a memfd");
    }

    fn any_descriptor(&self, random: &mut Rng) -> Descriptor {
        let address = match random.u8(0..6) {
            0 => random.u64(..),
            1 => self.ring.descriptors_at() + random.u64(0..0x1_0000),
            2 => REGION_GPA + REGION_SIZE - random.u64(0..0x100),
            3 => TABLES + 16 * random.u64(0..0x1_0000),
            _ => REGION_GPA + random.u64(0..REGION_SIZE),
        };
        let len = match random.u8(0..6) {
            0 => random.u32(..),
            1 => 0,
            2 => 16 * random.u32(0..0x1_0000),
            3 => 1 << 20,
            _ => random.u32(0..300),
        };
        let any = random.u16(..);
        let flags = [0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, any];
        let flags = *random.choice(&flags).expect("one");
        let next = match random.u8(0..4) {
            0 => random.u16(..),
            _ => random.u16(0..self.ring.size()),
        };
        descriptor(address, len, flags, next)
    }

    /// An indirect table of up to 65,535 descriptors, and a descriptor of it at index 0.
    fn table(&self, random: &mut Rng) -> usize {
        let len = match random.u8(0..4) {
            0 => 65_535,
            1 => random.usize(1..5_000),
            _ => random.usize(1..40),
        };
        let loops = random.u8(0..4) == 0;
        let zero = random.bool();
        let mut bytes = Vec::with_capacity(16 * len);
        for index in 0..len {
            let next = if loops && index + 1 == len {
                0
            } else {
                index + 1
            };
            let flags = if next < len { NEXT } else { 0 };
            let write = if index > len / 2 { WRITE } else { 0 };
            let size = if zero { 0 } else { random.u32(0..64) };
            let one = descriptor(REGION_GPA + 0x80_0000, size, flags | write, next as u16);
            bytes.extend(one.to_bytes());
        }
        self.write(TABLES, &bytes);
        let whole = descriptor(TABLES, 16 * len as u32, INDIRECT, 0);
        for index in 0..u64::from(self.ring.size()) {
            self.write(self.ring.descriptors_at() + 16 * index, &whole.to_bytes());
        }
        len
    }

    fn advance(&mut self, by: u16) {
        self.available = self.available.wrapping_add(by);
        self.write(self.ring.avail_at() + 2, &self.available.to_le_bytes());
    }

    fn kick(&self) {
        let _ = self.ring.kick_fd().write(1);
    }

    /// Sends a control message whose answer must come. Whether the connection is still there.
    fn ask(&mut self, round: &mut Round<'_>, code: u32, words: &[u64]) -> bool {
        let sent = Instant::now();
        let answered = self.control.ask(code, words, &[]);
        round.waited(sent);
        answered.is_ok()
    }
}

pub(super) fn round(round: &mut Round<'_>) {
    let sockets = [Socket::Timer, Socket::Timer, Socket::Clock];
    let attacked = *round.random.choice(&sockets).expect("one");
    let truncating = round.random.bool();
    round.beside_a_neighbour(attacked, |round| {
        let mut attacker = None;
        for _ in 0..ACTS {
            match &mut attacker {
                None => attacker = Attacker::connect(round, attacked),
                Some(present) => {
                    if !act(round, present, truncating) {
                        round.tally.refusals += 1;
                        attacker = None;
                    }
                }
            }
        }
    });
}

/// One act. Whether the connection is still there.
fn act(round: &mut Round<'_>, attacker: &mut Attacker, truncating: bool) -> bool {
    let choice = round.random.u8(0..100);
    match choice {
        ..15 => {
            let at = attacker.ring.descriptors_at() + round.random.u64(0..0x9000);
            let bytes: Vec<u8> = (0..round.random.usize(1..200))
                .map(|_| round.random.u8(..))
                .collect();
            round.act(|| format!("{} random bytes at {at:#x}", bytes.len()));
            attacker.write(at, &bytes);
        }
        15..40 => {
            let index = u64::from(round.random.u16(0..attacker.ring.size()));
            let one = attacker.any_descriptor(&mut round.random);
            round.act(|| format!("descriptor {index}: {one:x?}"));
            attacker.write(attacker.ring.descriptors_at() + 16 * index, &one.to_bytes());
        }
        40..50 => {
            let len = attacker.table(&mut round.random);
            let by = round.random.u16(1..=attacker.ring.size());
            round.act(|| format!("a table of {len} descriptors, {by} times"));
            attacker.advance(by);
            attacker.kick();
        }
        50..70 => {
            let by = match round.random.u8(0..8) {
                0 => round.random.u16(..),
                _ => round.random.u16(1..=attacker.ring.size()),
            };
            round.act(|| format!("{by} more available"));
            attacker.advance(by);
            attacker.kick();
        }
        70..82 if truncating => {
            let len = match round.random.u8(0..3) {
                0 => 0,
                1 => round.random.u64(0..0x4_0000),
                _ => round.random.u64(0..REGION_SIZE),
            };
            round.act(|| format!("truncated to {len:#x}"));
            attacker.kick();
            attacker.file.set_len(len).expect("a length");
            attacker.kick();
            if round.random.bool() {
                attacker.file.set_len(REGION_SIZE).expect("a length");
            }
        }
        70..90 => {
            round.act(|| "GET_QUEUE_NUM".to_owned());
            return attacker.ask(round, message::GET_QUEUE_NUM, &[]);
        }
        90..97 => {
            round.act(|| "the ring is stopped and started".to_owned());
            let stop = [pair(attacker.queue, 0)];
            if !attacker.ask(round, message::GET_VRING_BASE, &stop) {
                return false;
            }
            attacker.available = 0;
            attacker.write(attacker.ring.avail_at(), &[0; 4]);
            attacker.write(attacker.ring.used_at(), &[0; 4]);
            return attacker
                .control
                .start(attacker.queue, &attacker.ring)
                .is_ok();
        }
        _ => {
            round.act(|| "the connection ends".to_owned());
            return false;
        }
    }
    true
}
