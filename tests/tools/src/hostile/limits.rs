//! A process that runs out of descriptors: frontends of both sockets come, take as many as they
//! can, and go, while the limit is low.
//!
//! Each of them may lose its connection. The process lives, and serves when the limit is gone.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use vhost_user_timer_kit::contract::words;
use vhost_user_timer_kit::raw_driver::{
    Control, REGION_GPA, REGION_VA, blocking_eventfd, memfd, message,
};
use vhost_user_timer_kit::victim::TIMER_FEATURES;

use super::round::{Round, Socket};

/// Acts in a round.
const ACTS: usize = 60;

/// The most connections that are held at a time.
const HELD: usize = 12;

/// A region's length.
const LEN: u64 = 0x1000;

pub(super) fn round(round: &mut Round<'_>) {
    let pid = Pid::from_raw(round.victim.rig.backend.pid() as i32);
    let spare = round.random.usize(0..60);
    let current = Some((round.victim.usage.fds + spare) as u64);
    // A test's own limit is what the backend has inherited.
    let inherited = getrlimit(Resource::Nofile);
    let low = Rlimit {
        current,
        ..inherited
    };
    round.act(|| format!("RLIMIT_NOFILE has room for {spare} more"));
    prlimit(pid, Resource::Nofile, low).expect("a limit");
    let mut held: Vec<Control> = Vec::new();
    for _ in 0..ACTS {
        let full = held.len() == HELD;
        match round.random.u8(0..10) {
            ..5 if !full => {
                let socket = *round
                    .random
                    .choice(&[Socket::Timer, Socket::Clock])
                    .expect("two");
                let stream = round.connect(socket);
                round.act(|| format!("a frontend of {socket:?}"));
                held.push(negotiating(stream));
            }
            5..9 => greedy(round, &held),
            _ if !held.is_empty() => {
                let index = round.random.usize(0..held.len());
                round.act(|| "a frontend goes".to_owned());
                held.swap_remove(index);
            }
            _ => {}
        }
    }
    drop(held);
    prlimit(pid, Resource::Nofile, inherited).expect("a limit");
}

/// A frontend that reads no answers.
fn negotiating(stream: UnixStream) -> Control {
    // What is not read yet is not waited for.
    stream.set_nonblocking(true).expect("a flag");
    let control = Control::over(stream);
    // MQ, REPLY_ACK, CONFIGURE_MEM_SLOTS, DEVICE_STATE.
    let protocol = 1 | 1 << 3 | 1 << 15 | 1 << 19;
    for (code, body) in [
        (message::SET_OWNER, vec![]),
        (message::GET_FEATURES, vec![]),
        (message::SET_FEATURES, words(&[TIMER_FEATURES])),
        (message::SET_PROTOCOL_FEATURES, words(&[protocol])),
    ] {
        let _ = control.message(code, false, &body, &[]);
    }
    control
}

/// One of the frontends takes descriptors.
fn greedy(round: &mut Round<'_>, held: &[Control]) {
    let Some(control) = round.random.choice(held) else {
        return;
    };
    let (file, event) = (memfd(LEN), blocking_eventfd(0));
    match round.random.u8(0..3) {
        0 => {
            let regions = round.random.u64(1..200);
            round.act(|| format!("{regions} regions"));
            for n in 0..regions {
                let region = [0, REGION_GPA + n * LEN, LEN, REGION_VA + n * LEN, 0];
                let body = words(&region);
                let sent = control.message(message::ADD_MEM_REG, false, &body, &[file.as_fd()]);
                if sent.is_err() {
                    break;
                }
            }
        }
        1 => {
            let queue = round.random.u64(0..3);
            let code = round
                .random
                .u32(message::SET_VRING_KICK..=message::SET_VRING_ERR);
            round.act(|| format!("message {code} of queue {queue}"));
            let _ = control.message(code, false, &words(&[queue]), &[event.as_fd()]);
        }
        _ => {
            let fds = vec![file.as_fd(); round.random.usize(1..33)];
            round.act(|| format!("{} descriptors with a byte", fds.len()));
            let _ = control.send(&[1], &fds);
        }
    }
}
