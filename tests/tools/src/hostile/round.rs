//! A round of a campaign: its random numbers, its figures, its story, and the neighbour.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_user_timer_kit::clock_driver::{ClockDriver, UTC};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::victim::{DEADLINE, Victim};

use super::figures::Tally;

/// How many of the last acts are kept.
const STORY: usize = 24;

/// The time between two requests of the neighbour.
const PACE: Duration = Duration::from_micros(500);

/// One of the backend's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Socket {
    /// The timer device's.
    Timer,
    /// The clock device's.
    Clock,
}

/// What a campaign has in one round.
pub(super) struct Round<'a> {
    pub(super) program: &'a Path,
    pub(super) victim: &'a Victim,
    pub(super) random: Rng,
    pub(super) tally: Tally,
    pub(super) story: VecDeque<String>,
}

impl<'a> Round<'a> {
    /// Round `number` of a campaign. Its random numbers follow from seed, name and number alone.
    pub(super) fn new(
        program: &'a Path,
        victim: &'a Victim,
        campaign: &str,
        seed: u64,
        number: u64,
    ) -> Self {
        // FNV-1a.
        let bytes = campaign
            .bytes()
            .chain(seed.to_le_bytes())
            .chain(number.to_le_bytes());
        let mixed = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Round {
            program,
            victim,
            random: Rng::with_seed(mixed),
            tally: Tally::default(),
            story: VecDeque::new(),
        }
    }

    /// Notes an act.
    pub(super) fn act(&mut self, what: impl FnOnce() -> String) {
        self.tally.acts += 1;
        if self.story.len() == STORY {
            self.story.pop_front();
        }
        self.story.push_back(what());
    }

    /// A new connection.
    pub(super) fn connect(&mut self, socket: Socket) -> UnixStream {
        self.tally.connections += 1;
        match socket {
            Socket::Timer => self.victim.rig.stream(),
            Socket::Clock => self.victim.rig.clock_stream(),
        }
    }

    /// Notes how long a valid control message waited, which must not be long.
    pub(super) fn waited(&mut self, since: Instant) {
        let waited = since.elapsed();
        assert!(waited < DEADLINE, "a control message waited {waited:?}");
        self.tally.control = self.tally.control.max(waited);
    }

    /// Attacks one socket while a correct frontend of the other one is served.
    pub(super) fn beside_a_neighbour(&mut self, attacked: Socket, attack: impl FnOnce(&mut Self)) {
        let (victim, over) = (self.victim, AtomicBool::new(false));
        let (connected, is_connected) = channel();
        let slowest = thread::scope(|scope| {
            let neighbour = scope.spawn(|| neighbour(victim, attacked, connected, &over));
            // A guest that connects while a restore is open is held, as it should be. Where the
            // neighbour has panicked, joining it says so.
            let _ = is_connected.recv();
            // The neighbour ends when the attack panics, too.
            let _end = EndOnDrop(&over);
            attack(self);
            over.store(true, Ordering::Relaxed);
            neighbour.join()
        });
        let slowest = slowest.expect("the neighbour is served");
        assert!(slowest < DEADLINE, "the neighbour waited {slowest:?}");
        self.tally.neighbour = self.tally.neighbour.max(slowest);
    }

    /// Counts the refusals that have arrived on a connection.
    pub(super) fn count_refusals(&mut self, mut stream: &UnixStream) {
        let mut bytes = Vec::new();
        let _ = stream.set_read_timeout(Some(Duration::from_micros(200)));
        let mut chunk = [0; 4096];
        let ended = loop {
            match stream.read(&mut chunk) {
                Ok(0) => break true,
                Ok(read) => bytes.extend_from_slice(&chunk[..read]),
                Err(error) => {
                    let waits = [ErrorKind::WouldBlock, ErrorKind::TimedOut];
                    break !waits.contains(&error.kind());
                }
            }
        };
        let mut rest = &bytes[..];
        while let Some((head, body)) = rest.split_at_checked(12) {
            let size = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
            let Some((body, next)) = body.split_at_checked(size) else {
                break;
            };
            // Only of messages whose answer is an acknowledgement; features look alike.
            let acknowledges = ![1, 15, 17, 36].contains(&head[0]);
            let refused = size == 8 && acknowledges && body.iter().any(|byte| *byte != 0);
            self.tally.refusals += u64::from(refused);
            rest = next;
        }
        self.tally.refusals += u64::from(ended);
    }
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A correct frontend of the socket that is not attacked. Returns its longest wait.
fn neighbour(
    victim: &Victim,
    attacked: Socket,
    connected: Sender<()>,
    over: &AtomicBool,
) -> Duration {
    let mut slowest = Duration::ZERO;
    let mut request: Box<dyn FnMut()> = match attacked {
        Socket::Timer => {
            let mut guest = ClockDriver::connect(&victim.rig);
            Box::new(move || guest.reads_the_hosts(UTC))
        }
        Socket::Clock => {
            let mut client = Client::connect(&victim.rig);
            Box::new(move || {
                client.info();
            })
        }
    };
    let _ = connected.send(());
    while !over.load(Ordering::Relaxed) {
        let sent = Instant::now();
        request();
        slowest = slowest.max(sent.elapsed());
        thread::sleep(PACE);
    }
    slowest
}
