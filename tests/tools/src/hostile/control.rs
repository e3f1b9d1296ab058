//! The control channel: a correct set-up, mutated, with descriptors of every kind.
//!
//! Each connection's messages are those that start a ring with a request in it, so that what is
//! mutated gets far. Some connections leave in the middle of a message, and some give the backend
//! their own end of the socket, which then stays open.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fastrand::Rng;
use vhost_user_timer_kit::clock_driver::{ClockDriver, F_LOG_ALL, UTC, msg, proper};
use vhost_user_timer_kit::contract::{Client, VM, op, request, words};
use vhost_user_timer_kit::raw_driver::{
    Control, Layout, Memory, REGION_GPA, REGION_SIZE, REGION_VA, Ring, blocking_eventfd, fd_of,
    full_eventfd, header, huge_memfd, make_blocking, memfd, message, pair,
};
use vhost_user_timer_kit::victim::{CLOCK_FEATURES, DEADLINE, TIMER_FEATURES};

use super::round::{Round, Socket};

/// Connections in a round.
const CONNECTIONS: usize = 20;

/// A message that is to be sent.
#[derive(Clone, Debug)]
struct Message {
    code: u32,
    words: Vec<u64>,
    fds: Vec<Fd>,
}

/// A descriptor that goes along.
#[derive(Clone, Copy, Debug)]
enum Fd {
    Memory,
    Kick,
    Call,
    /// The sender's own end of the socket.
    Own,
    /// One of [`Strange`].
    Strange(usize),
}

/// Descriptors that belong nowhere.
struct Strange(Vec<OwnedFd>);

impl Strange {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let open = |path| File::open(path).map(OwnedFd::from);
        let (socket, _) = UnixStream::pair().expect("a pair");
        let mut all = vec![
            memfd(0).into(),
            memfd(0x1000).into(),
            memfd(REGION_SIZE - 1).into(),
            huge_memfd(REGION_SIZE).into(),
            blocking_eventfd(0),
            blocking_eventfd(7),
            full_eventfd(),
            reader.into(),
            writer.into(),
            socket.into(),
        ];
        let paths = [
            "/dev/null",
            "/dev/zero",
            "/dev/urandom",
            "/",
            "/proc/self/status",
        ];
        all.extend(paths.into_iter().filter_map(|path| open(path).ok()));
        Strange(all)
    }
}

/// The connections of a round that may give their own end away, each of which can keep its socket
/// until an unfinished message times out.
const GIVEN_AWAY: u32 = 2;

/// How long that takes, with as much again to serve.
const TIME_OUT: Duration = Duration::from_secs(10);

pub(super) fn round(round: &mut Round<'_>) {
    let strange = Strange::new();
    let mut given_away = 0;
    let attacked = *round
        .random
        .choice(&[Socket::Timer, Socket::Clock])
        .expect("two");
    round.beside_a_neighbour(attacked, |round| {
        for _ in 0..CONNECTIONS {
            let may_give = given_away < GIVEN_AWAY;
            given_away += u32::from(connection(round, attacked, &strange, may_give));
        }
    });
    let limit = TIME_OUT * given_away + DEADLINE;
    round
        .victim
        .rig
        .in_time(limit, "its socket is served again", || {
            let rig = &round.victim.rig;
            match attacked {
                Socket::Timer => drop(Client::connect(rig)),
                Socket::Clock => drop(ClockDriver::connect(rig)),
            }
        });
}

/// One connection. Whether it gave its own end to the backend.
fn connection(round: &mut Round<'_>, socket: Socket, strange: &Strange, may_give: bool) -> bool {
    let stream = round.connect(socket);
    let own = stream.try_clone().expect("dup");
    let control = Control::over(stream);
    let mut memory = Memory::new();
    let (queue, features) = match socket {
        Socket::Timer => (1, TIMER_FEATURES),
        Socket::Clock => (0, CLOCK_FEATURES | F_LOG_ALL),
    };
    let mut ring = Ring::new(queue, 16, round.random.bool());
    let bytes = match socket {
        Socket::Timer => request(op::GET_INFO, VM, 0, &[]),
        Socket::Clock => proper(msg::READ, UTC),
    };
    for _ in 0..round.random.usize(1..6) {
        ring.add(&mut memory, &bytes, 80, &Layout::plain());
    }
    let mut messages = proper_messages(socket, u32::from(queue), features, &ring);
    mutate(&mut round.random, &mut messages, strange);
    let fds = messages.iter_mut().flat_map(|message| &mut message.fds);
    let mut own_ends: Vec<_> = fds.filter(|fd| matches!(fd, Fd::Own)).collect();
    let gives = may_give && !own_ends.is_empty();
    if !may_give {
        own_ends.iter_mut().for_each(|fd| **fd = Fd::Call);
    }
    let last = messages.len() - 1;
    for (index, message) in messages.iter().enumerate() {
        let fds: Vec<BorrowedFd<'_>> = message
            .fds
            .iter()
            .map(|fd| match fd {
                Fd::Memory => memory.file().as_fd(),
                Fd::Kick => fd_of(ring.kick_fd()),
                Fd::Call => fd_of(ring.call()),
                Fd::Own => own.as_fd(),
                Fd::Strange(index) => strange.0[*index].as_fd(),
            })
            .collect();
        let bytes = on_the_wire(&mut round.random, message, index == last);
        round.act(|| format!("{socket:?}: {message:x?} as {} bytes", bytes.len()));
        if control.send(&bytes, &fds).is_err() {
            break;
        }
        // Kicks, so that what is served is served under changes.
        let _ = ring.kick_fd().write(1);
        if round.random.u8(0..8) == 0 {
            // A flag of the description, which the backend has as well.
            make_blocking(fd_of(ring.kick_fd()));
            make_blocking(fd_of(ring.call()));
            strange.0.iter().for_each(make_blocking);
        }
    }
    round.count_refusals(&own);
    gives
}

/// What a correct frontend says, once.
fn proper_messages(socket: Socket, queue: u32, features: u64, ring: &Ring) -> Vec<Message> {
    let message = |code, words: &[u64], fds: &[Fd]| Message {
        code,
        words: words.to_vec(),
        fds: fds.to_vec(),
    };
    let config = ring.config();
    let (table, used) = (config.desc_table_addr, config.used_ring_addr);
    let index = u64::from(queue);
    let addresses = [index, table, used, config.avail_ring_addr, 0];
    // The next queue has the same ring and kick descriptor.
    let other_addresses = [index + 1, table, used, config.avail_ring_addr, 0];
    let region = [1, REGION_GPA, REGION_SIZE, REGION_VA, 0];
    let second = [
        0,
        REGION_GPA + REGION_SIZE,
        0x1000,
        REGION_VA + REGION_SIZE,
        0,
    ];
    // MQ, LOG_SHMFD, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, DEVICE_STATE.
    let protocol = match socket {
        Socket::Timer => 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 19,
        Socket::Clock => 1 | 1 << 1 | 1 << 3 | 1 << 13 | 1 << 15 | 1 << 19,
    };
    let mut all = vec![
        message(message::SET_OWNER, &[], &[]),
        message(message::GET_FEATURES, &[], &[]),
        message(message::GET_PROTOCOL_FEATURES, &[], &[]),
        message(message::SET_PROTOCOL_FEATURES, &[protocol], &[]),
        message(message::SET_FEATURES, &[features], &[]),
        message(message::GET_QUEUE_NUM, &[], &[]),
        message(message::GET_MAX_MEM_SLOTS, &[], &[]),
        message(message::SET_MEM_TABLE, &region, &[Fd::Memory]),
        message(
            message::SET_VRING_NUM,
            &[pair(queue, ring.size().into())],
            &[],
        ),
        message(message::SET_VRING_ADDR, &addresses, &[]),
        message(message::SET_VRING_BASE, &[pair(queue, 0)], &[]),
        message(message::SET_VRING_ERR, &[index], &[Fd::Call]),
        message(message::SET_VRING_CALL, &[index], &[Fd::Call]),
        message(message::SET_VRING_KICK, &[index], &[Fd::Kick]),
        message(message::SET_VRING_ENABLE, &[pair(queue, 1)], &[]),
        message(
            message::SET_VRING_NUM,
            &[pair(queue + 1, ring.size().into())],
            &[],
        ),
        message(message::SET_VRING_ADDR, &other_addresses, &[]),
        message(message::SET_VRING_KICK, &[index + 1], &[Fd::Kick]),
        message(message::SET_VRING_ENABLE, &[pair(queue + 1, 1)], &[]),
        message(message::ADD_MEM_REG, &second, &[Fd::Memory]),
        message(message::REM_MEM_REG, &second, &[]),
        message(message::SET_VRING_KICK, &[index | message::NO_FD], &[]),
        message(message::GET_VRING_BASE, &[pair(queue, 0)], &[]),
        message(message::SET_DEVICE_STATE_FD, &[0], &[Fd::Strange(8)]),
        message(message::CHECK_DEVICE_STATE, &[], &[]),
        message(message::SET_DEVICE_STATE_FD, &[1], &[Fd::Strange(7)]),
    ];
    if socket == Socket::Clock {
        let log = message(message::SET_LOG_BASE, &[1 << 18, 0], &[Fd::Memory]);
        all.insert(9, log);
        // On the other socket this makes a new VM.
        all.push(message(message::RESET_DEVICE, &[], &[]));
    }
    all
}

fn mutate(random: &mut Rng, messages: &mut Vec<Message>, strange: &Strange) {
    for _ in 0..random.usize(0..8) {
        let at = random.usize(0..messages.len());
        let other = random.usize(0..messages.len());
        match random.u8(0..10) {
            0 => drop(messages.remove(at)),
            1 => messages.swap(at, other),
            2 => messages.insert(other, messages[at].clone()),
            3 | 4 => {
                let words = &mut messages[at].words;
                if let Some(word) = random.choice(words.iter_mut()) {
                    *word = odd_word(random, *word);
                }
            }
            5..8 => {
                let fd = match random.u8(0..8) {
                    0 | 3 => Fd::Own,
                    1 => Fd::Memory,
                    2 => Fd::Kick,
                    _ => Fd::Strange(random.usize(0..strange.0.len())),
                };
                // Where descriptors belong, more often.
                let at = (0..4)
                    .map(|_| random.usize(0..messages.len()))
                    .find(|at| !messages[*at].fds.is_empty())
                    .unwrap_or(at);
                let fds = &mut messages[at].fds;
                match random.u8(0..4) {
                    0 => fds.push(fd),
                    1 => fds.clear(),
                    _ => *fds = vec![fd; fds.len().max(1)],
                }
            }
            8 => {
                let many = random.usize(1..60);
                let one = messages[at].clone();
                messages.splice(at..at, std::iter::repeat_n(one, many));
            }
            _ => {
                messages[at] = Message {
                    code: random.u32(0..48),
                    words: (0..random.usize(0..12)).map(|_| random.u64(..)).collect(),
                    fds: Vec::new(),
                };
                if messages[at].code == message::RESET_DEVICE {
                    messages[at].code = message::GET_CONFIG;
                }
            }
        }
        if messages.len() < 2 {
            return;
        }
    }
}

fn odd_word(random: &mut Rng, word: u64) -> u64 {
    match random.u8(0..7) {
        0 => random.u64(..),
        1 => word ^ 1 << random.u32(0..64),
        2 => word.wrapping_add(1),
        3 => word.wrapping_sub(1),
        4 => 0,
        5 => u64::MAX - random.u64(0..0x2000),
        _ => word << 8,
    }
}

/// A message's bytes, which sometimes lie about their length, or end too early.
fn on_the_wire(random: &mut Rng, message: &Message, last: bool) -> Vec<u8> {
    let body = words(&message.words);
    let size = match random.u8(0..40) {
        0 => random.u32(..),
        1 => random.u32(0..5000),
        _ => body.len() as u32,
    };
    let mut bytes = header(message.code, random.u8(0..4) != 0, size).to_vec();
    if random.u8(0..40) == 0 {
        bytes[4..8].copy_from_slice(&random.u32(..).to_le_bytes());
    }
    bytes.extend(body);
    if last && random.bool() {
        bytes.truncate(random.usize(1..=bytes.len()));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_timer_kit::victim::Victim;

    #[test]
    fn what_is_mutated_is_granted_as_long_as_it_is_not() {
        let victim = Victim::launch();
        let strange = Strange::new();
        for (socket, stream, queue, features) in [
            (Socket::Timer, victim.rig.stream(), 1, TIMER_FEATURES),
            (
                Socket::Clock,
                victim.rig.clock_stream(),
                0,
                CLOCK_FEATURES | F_LOG_ALL,
            ),
        ] {
            let memory = Memory::new();
            let ring = Ring::new(queue, 16, true);
            let mut control = Control::over(stream);
            for message in proper_messages(socket, queue.into(), features, &ring) {
                let fds: Vec<_> = message
                    .fds
                    .iter()
                    .map(|fd| match fd {
                        Fd::Memory => memory.file().as_fd(),
                        Fd::Strange(index) => strange.0[*index].as_fd(),
                        Fd::Kick => fd_of(ring.kick_fd()),
                        _ => fd_of(ring.call()),
                    })
                    .collect();
                let body = words(&message.words);
                let negotiating = message.code <= message::SET_OWNER
                    || message.code == message::SET_PROTOCOL_FEATURES;
                let answers = [1, 15, 17, 36].contains(&message.code);
                control
                    .message(message.code, !negotiating, &body, &fds)
                    .unwrap();
                if negotiating && !answers {
                    continue;
                }
                let (code, _) = control
                    .reply()
                    .unwrap_or_else(|error| panic!("{socket:?} {message:x?}: {error}"));
                assert_eq!(code, message.code, "{socket:?}");
            }
        }
    }
}
