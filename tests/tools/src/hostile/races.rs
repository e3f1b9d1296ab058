//! Restores that race the control channel: while vCPUs restore, the VMM stops rings, loads
//! device states, resets the device, and goes away.
//!
//! One vCPU is held back, so no WAIT_RUN may succeed, whatever the control channel does. Afterwards
//! a new frontend finds the restore open, in the same epoch, completes it, and is released.

use std::thread;
use std::time::Instant;

use fastrand::Rng;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, DONE, op, phase, regs_body, request, request_with, restore,
    status,
};
use vhost_user_timer_kit::raw_driver::{Driver, Layout, Ring, load, save};
use vmm_sys_util::eventfd::EventFd;

use super::round::{Round, Socket};

/// Races in a round.
const RACES: usize = 10;

/// Acts of the control channel in a race.
const ACTS: usize = 12;

const VCPUS: u32 = 4;

pub(super) fn round(round: &mut Round<'_>) {
    round.beside_a_neighbour(Socket::Timer, |round| {
        for _ in 0..RACES {
            race(round);
        }
    });
}

fn connect(round: &mut Round<'_>) -> Client {
    round.tally.connections += 1;
    round
        .victim
        .rig
        .client()
        .queues(3)
        .queue_size(128)
        .connect()
}

fn race(round: &mut Round<'_>) {
    connect(round).reset_and_leave();
    let mut client = connect(round);
    match round.random.bool() {
        true => client.configure_confirming(VCPUS),
        false => client.configure(VCPUS),
    }
    let stream = save(&client.driver.control);
    let epoch = client.restore_begin(VCPUS, restore::AUTORUN);
    let mut driver = client.driver;
    let vmm = Vmm {
        control: driver.control.clone(),
        rings: [1, 2].map(|queue| {
            let ring: &Ring = &driver.rings[queue];
            let clone = |fd: &EventFd| fd.try_clone().expect("dup");
            (clone(ring.kick_fd()), clone(ring.call()))
        }),
        stream,
    };
    let mut random = round.random.fork();
    let was_reset = thread::scope(|scope| {
        // The rings stay with this thread, which sends, and never waits.
        let racer = scope.spawn(|| vmm.disturb(round));
        while !racer.is_finished() {
            restore_a_while(&mut driver, &mut random);
        }
        racer.join().expect("the control channel is served")
    });
    nobody_is_released(&mut driver);
    drop((driver, vmm));

    let mut client = connect(round);
    let info = client.info();
    if was_reset {
        assert_eq!(info.phase, phase::NEW, "the phase after RESET_DEVICE");
        return;
    }
    assert_eq!((info.phase, info.epoch), (phase::RESTORING, epoch));
    let waiting = client.wait_run(2, VCPUS - 1);
    for vcpu in 0..VCPUS {
        // Without effect for those that were done: the values are the same.
        client.ask_done(op::SET_REGS, vcpu, &brought()).ok(12);
    }
    if client.info().phase == phase::ARMED {
        client.confirm();
    }
    client.released(2, waiting).ok(40);
}

fn brought() -> Vec<u8> {
    regs_body(&[(CTL, 0), (CNT, 1 << 40), (CVAL, u64::MAX)])
}

/// Restores vCPUs but the last, and has any of them wait.
fn restore_a_while(driver: &mut Driver, random: &mut Rng) {
    nobody_is_released(driver);
    // What is not given back while rings are stopped stays there.
    if driver.rings[1..].iter().any(|ring| ring.room() < 8) {
        thread::yield_now();
        return;
    }
    let queue = random.u16(1..3);
    let set = request_with(op::SET_REGS, DONE, random.u32(0..VCPUS - 1), 0, &brought());
    driver.submit(queue, &set, 64, &Layout::plain());
    let wait = request(op::WAIT_RUN, random.u32(0..VCPUS), 0, &[]);
    driver.submit(3 - queue, &wait, 56, &Layout::plain());
}

/// Takes what was given back, and checks that no WAIT_RUN succeeded.
fn nobody_is_released(driver: &mut Driver) {
    for queue in [1, 2] {
        while let Some(used) = driver.used_already(queue) {
            // A WAIT_RUN has room for exactly its answer.
            let released = used.writable.len() == 56 && Answer::of(&used).status == status::OK;
            assert!(
                !released,
                "a vCPU was released before the last one was done"
            );
        }
    }
}

/// The VMM's thread for the control channel.
struct Vmm {
    control: Frontend,
    rings: [(EventFd, EventFd); 2],
    stream: Vec<u8>,
}

impl Vmm {
    /// Disturbs the restore. Whether the device was reset.
    fn disturb(&self, round: &mut Round<'_>) -> bool {
        let mut control = self.control.clone();
        for _ in 0..ACTS {
            let sent = Instant::now();
            let what = match round.random.u8(0..40) {
                ..16 => {
                    self.restart(round.random.usize(0..2));
                    "a ring is stopped and started"
                }
                16..24 => {
                    control.get_queue_num().expect("GET_QUEUE_NUM");
                    "GET_QUEUE_NUM"
                }
                24..32 => {
                    let half = &self.stream[..self.stream.len() / 2];
                    assert!(!load(&control, half), "half a stream is loaded");
                    "half a load"
                }
                32..39 => {
                    assert!(
                        !load(&control, &self.stream),
                        "a load while the VM restores"
                    );
                    "a load while the VM restores"
                }
                _ => {
                    control.reset_device().expect("RESET_DEVICE");
                    round.act(|| "RESET_DEVICE".to_owned());
                    return true;
                }
            };
            round.waited(sent);
            round.act(|| what.to_owned());
        }
        false
    }

    fn restart(&self, ring: usize) {
        let (queue, (kick, call)) = (ring + 1, &self.rings[ring]);
        let base = self.control.get_vring_base(queue).expect("GET_VRING_BASE");
        let control = &self.control;
        control.set_vring_base(queue, base as u16).expect("BASE");
        control.set_vring_call(queue, call).expect("CALL");
        control.set_vring_kick(queue, kick).expect("KICK");
        control
            .clone()
            .set_vring_enable(queue, true)
            .expect("ENABLE");
    }
}
