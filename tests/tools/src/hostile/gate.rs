//! Requests with a gate oracle: random restores, request by request, beside the naive VM.
//!
//! Every answer's status, detail and epoch must be the naive VM's, and a WAIT_RUN must be answered
//! when the naive VM answers it: never before every vCPU of the restore is done, and with one
//! `run` for all that are released together. What the counts are is left to the tests of `crash`.

use std::collections::HashMap;

use fastrand::Rng;
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, DONE, Info, PCNT, PCTL, PCVAL, VM, Vcpu, configure_with,
    info_source, op, pause_body, regs_body, request_with, restore, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{Cut, Layout};
use vhost_user_timer_kit::reference::{Profile, Reference, Waiter};
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};

use super::round::{Round, Socket};

/// Requests in a round.
const REQUESTS: usize = 600;

/// The request queues.
const QUEUES: [u16; 2] = [1, 2];

/// As many waiters as the rings have room for beside requests.
const MOST_WAITERS: usize = 40;

/// A VM and its naive twin.
struct Twins {
    client: Client,
    naive: Reference,
    /// By how much the backend's epochs are ahead.
    epoch: u64,
    vcpus: u32,
    waiters: usize,
    /// Answers that are due, by queue and head.
    due: HashMap<(u16, u16), Answer>,
}

/// A request, whose epoch is the naive VM's.
#[derive(Debug)]
struct Request {
    op: u16,
    flags: u16,
    vcpu: u32,
    epoch: u64,
    body: Vec<u8>,
    room: usize,
}

impl Request {
    fn bytes(&self, ahead: u64) -> Vec<u8> {
        let epoch = match self.epoch {
            0 => 0,
            epoch => epoch.wrapping_add(ahead),
        };
        request_with(self.op, self.flags, self.vcpu, epoch, &self.body)
    }
}

pub(super) fn round(round: &mut Round<'_>) {
    round.tally.connections += 2;
    Client::connect(&round.victim.rig).reset_and_leave();
    round.beside_a_neighbour(Socket::Timer, |round| {
        let client = round
            .victim
            .rig
            .client()
            .queues(3)
            .queue_size(1024)
            .connect();
        let mut twins = Twins::new(client, &mut round.random);
        for _ in 0..REQUESTS {
            let request = twins.draw(&mut round.random);
            let queue = *round.random.choice(&QUEUES).expect("two");
            round.act(|| format!("queue {queue}: {request:?}"));
            let refused = twins.serve(queue, &request, &mut round.random);
            round.tally.refusals += u64::from(refused);
            if twins.waiters > MOST_WAITERS {
                break;
            }
        }
        twins.nothing_more();
    });
}

impl Twins {
    fn new(mut client: Client, random: &mut Rng) -> Self {
        let Info { epoch, .. } = client.info();
        let profile = Profile {
            max_vcpus: u32::MAX,
            request_queues: 2,
            frequency: HOST_FREQUENCY,
            frequency_fixed: false,
            source: info_source::MONOTONIC,
        };
        let naive = Reference::new(profile, host_count(), 0);
        let mut twins = Twins {
            client,
            epoch: epoch.wrapping_sub(naive.epoch()),
            naive,
            vcpus: random.u32(1..5),
            waiters: 0,
            due: HashMap::new(),
        };
        let configure = Request {
            op: op::CONFIGURE_VM,
            flags: 0,
            vcpu: VM,
            epoch: 0,
            body: configure_with(twins.vcpus, 0, random.u8(0..4), HOST_FREQUENCY),
            room: 256,
        };
        twins.serve(1, &configure, random);
        twins
    }

    /// A request that is granted more often than not.
    fn draw(&mut self, random: &mut Rng) -> Request {
        let epoch = match random.u8(0..12) {
            0 => self.naive.epoch().saturating_sub(1),
            1 | 2 => self.naive.epoch(),
            _ => 0,
        };
        let choice = random.u8(0..100);
        let (op, flags, body) = match choice {
            ..8 => (op::RESTORE_BEGIN, 0, self.begin(random)),
            8..20 => (op::SET_REGS, 0, values(random)),
            20..40 => (op::SET_REGS, DONE, values(random)),
            40..48 => (op::SET_VM, 0, self.rows(random)),
            48..56 => (op::SET_VM, DONE, self.rows(random)),
            56..68 => (op::RESTORE_DONE, 0, vec![]),
            68..80 => (op::WAIT_RUN, 0, vec![]),
            80..83 => (op::PAUSE, 0, pause_body(random.u32(0..2))),
            83..86 => (op::RESUME, 0, vec![]),
            86..88 => (op::RESTORE_ABORT, 0, vec![]),
            88..92 => (op::CONFIRM_RUN, 0, self.offsets(random)),
            92..94 => (op::GET_INFO, 0, vec![]),
            94..96 => {
                let offset = host_count() - random.u64(..1 << 30);
                (op::SET_COUNTER_OFFSET, 0, words(&[offset, 0]))
            }
            _ => {
                let (op, _, len) = *random.choice(&op::ALL).expect("one");
                (op, random.u16(0..3), vec![0; len])
            }
        };
        let about_a_vcpu = op::ALL.iter().any(|(known, vcpu, _)| *known == op && *vcpu);
        let vcpu = match about_a_vcpu {
            true if random.u8(0..30) == 0 => self.vcpus,
            true => random.u32(0..self.vcpus),
            false => VM,
        };
        let room = match random.u8(0..30) {
            0 => random.usize(16..80),
            _ => 4096,
        };
        Request {
            op,
            flags,
            vcpu,
            epoch,
            body,
            room,
        }
    }

    fn begin(&self, random: &mut Rng) -> Vec<u8> {
        let autorun = random.u32(0..3).min(1) * restore::AUTORUN;
        let strict = random.u32(0..2) * restore::STRICT;
        restore_body(self.vcpus, autorun | strict, 0, 0)
    }

    fn rows(&self, random: &mut Rng) -> Vec<u8> {
        let mut body = Vec::new();
        for vcpu in 0..self.vcpus {
            if random.u8(0..4) != 0 {
                let registers = [0; 6].map(|_| random.u64(0..3));
                body.extend(Vcpu::with(vcpu, registers).to_bytes());
            }
        }
        body
    }

    /// The body of a CONFIRM_RUN, of the right offsets more often than not. The naive VM's counts
    /// are made the backend's, so that the right ones are right for both.
    fn offsets(&mut self, random: &mut Rng) -> Vec<u8> {
        let info = self.client.info();
        let count = |offset| info.host_count.wrapping_sub(offset);
        self.naive.set_host(info.host_count);
        self.naive
            .set_counts([count(info.cntvoff), count(info.cntpoff)]);
        let wrong = u64::from(random.u8(0..4) == 0);
        words(&[info.cntvoff ^ wrong, info.cntpoff])
    }

    /// Has both serve a request, and compares. Whether it was refused.
    fn serve(&mut self, queue: u16, request: &Request, random: &mut Rng) -> bool {
        let layout = Layout {
            readable: Cut::at(&[random.usize(0..40), usize::MAX]),
            writable: Cut::at(&[random.usize(0..40), usize::MAX]),
            indirect: random.bool(),
            reversed: random.bool(),
        };
        let (bytes, room) = (request.bytes(self.epoch), request.room);
        let head = self.client.driver.submit(queue, &bytes, room, &layout);
        self.naive.set_host(host_count());
        let waiter = Waiter { queue, head };
        let answer = self.naive.handle(&request.bytes(0), room, waiter);
        let mut refused = false;
        match answer {
            Some(answer) => {
                let answer = Answer::of(&answer);
                refused = answer.status != status::OK;
                self.due.insert((queue, head), answer);
            }
            None => {
                self.waiters += 1;
                // Requests of the other queue could overtake it.
                self.client.settle_on(queue);
            }
        }
        for released in self.naive.take_released() {
            for Waiter { queue, head } in released.waiters {
                self.waiters -= 1;
                self.due.insert((queue, head), Answer::of(&released.answer));
            }
        }
        let mut run = None;
        while let Some(&(queue, _)) = self.due.keys().next() {
            let used = self.client.driver.used(queue);
            let answer = Answer::of(&used);
            let due = self.due.remove(&(queue, used.head));
            let due = due.unwrap_or_else(|| panic!("answered too early: {answer:?}"));
            assert_eq!(answer.outcome(), due.outcome(), "{request:?}");
            let epoch = due.epoch.wrapping_add(self.epoch);
            assert_eq!(answer.epoch, epoch, "the epoch of {request:?}");
            let is_waiter = (queue, used.head) != (waiter.queue, waiter.head);
            if is_waiter && answer.status == status::OK {
                let first = run.get_or_insert_with(|| answer.body.clone());
                assert_eq!(answer.body, *first, "one run for all that are released");
            }
        }
        if random.u8(0..8) == 0 {
            self.nothing_more();
        }
        refused
    }

    /// Checks that the backend answered nobody else.
    fn nothing_more(&mut self) {
        for queue in QUEUES {
            // The next answers are these requests' own.
            self.client.settle_on(queue);
        }
        for queue in QUEUES {
            let early = self.client.driver.used_already(queue);
            assert!(early.is_none(), "answered too early: {early:?}");
        }
        let phase = self.client.info().phase;
        assert_eq!(phase, self.naive.phase(), "the phase");
    }
}

/// Entries of SET_REGS, of few values, so that some are equal.
fn values(random: &mut Rng) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in [CTL, CNT, CVAL, PCTL, PCNT, PCVAL] {
        if random.u8(0..6) != 0 {
            entries.push((id, random.u64(0..3)));
        }
    }
    random.shuffle(&mut entries);
    if random.u8(0..40) == 0 {
        entries.push((random.u64(..), 0));
    }
    regs_body(&entries)
}
