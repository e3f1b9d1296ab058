//! Descriptors that the peer still holds: blocking again, full, replaced, or its own socket's.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use vhost_user_timer_kit::clock_driver::{UTC, counter};
use vhost_user_timer_kit::contract::{VM, op, request};
use vhost_user_timer_kit::raw_driver::message::{
    GET_CONFIG, GET_VRING_BASE, NO_FD, SET_DEVICE_STATE_FD, SET_VRING_CALL, SET_VRING_ENABLE,
    SET_VRING_ERR, SET_VRING_KICK,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Layout, Memory, RING_EVENT_IDX, Ring, blocking_eventfd, fd_of, full_eventfd,
    make_blocking, pair, until,
};
use vhost_user_timer_kit::victim::{CLOCK_FEATURES, TIMER_FEATURES, Victim};

/// A frontend by hand, whose queue 1 is started.
struct Hand {
    control: Control,
    memory: Memory,
    ring: Ring,
}

impl Hand {
    /// Without EVENT_IDX, so that each answer is notified.
    fn of(victim: &Victim) -> Self {
        let (memory, ring) = (Memory::new(), Ring::new(1, 16, false));
        let features = TIMER_FEATURES & !RING_EVENT_IDX;
        let control = Control::serving(victim.rig.stream(), features, &memory, 1, &ring);
        Hand {
            control: control.expect("the ring starts"),
            memory,
            ring,
        }
    }

    /// The ring as new, once it is stopped.
    fn restarted(mut self) -> Self {
        let ring = Ring::new(1, 16, false);
        ring.clear(&self.memory);
        self.control.start(1, &ring).expect("the ring starts");
        Hand { ring, ..self }
    }

    /// Makes a GET_INFO available.
    fn submit(&mut self) {
        let info = request(op::GET_INFO, VM, 0, &[]);
        self.ring.add(&mut self.memory, &info, 80, &Layout::plain());
    }

    #[track_caller]
    fn is_answered(&mut self) {
        // Not by the call descriptor.
        until("an answer", || match self.ring.take(&mut self.memory) {
            Some(used) => {
                assert_eq!(used.len, 80);
                true
            }
            None => false,
        });
    }

    /// Has an answer on queue 1 that cannot be notified: the call descriptor is full and blocks.
    fn clog(&mut self) -> OwnedFd {
        let call = full_eventfd();
        let taken = self.control.ask(SET_VRING_CALL, &[1], &[call.as_fd()]);
        assert_eq!(taken.unwrap(), 0);
        make_blocking(&call);
        self.submit();
        self.ring.kick_anyway();
        self.is_answered();
        call
    }
}

#[test]
fn one_eventfd_for_the_kicks_of_two_queues_that_blocks_again_costs_its_connection_only() {
    let victim = Victim::launch();
    let kick = blocking_eventfd(0);
    let memory = Memory::new();
    let mut control = victim.negotiated();
    assert_eq!(control.share(memory.file().as_fd()).unwrap(), 0);
    for queue in [1, 2] {
        let ring = Ring::new(queue, 16, true);
        let call = fd_of(ring.call());
        let started = control.start_with(queue.into(), &ring, kick.as_fd(), call);
        started.expect("the ring starts");
    }
    make_blocking(&kick);
    for _ in 0..1000 {
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        std::thread::yield_now();
    }
    victim.serves_the_clock();
    drop(control);
    victim.unharmed();
}

#[test]
fn a_call_descriptor_that_is_full_and_blocks_stops_its_own_rings_and_nothing_else() {
    let victim = Victim::launch();
    let mut hand = Hand::of(&victim);
    let call = hand.clog();
    // Neither the device nor the rings are locked meanwhile.
    victim.in_time("the guest's counter is read", || {
        let _ = victim.clock().read_cross(UTC, counter::ARM_VCT);
    });
    victim.in_time("control messages are answered", || {
        let control = &mut hand.control;
        let enabled = control.ask(SET_VRING_ENABLE, &[pair(1, 0)], &[]);
        assert_eq!(enabled.unwrap(), 0);
        // Four bytes from offset 0, no flags.
        control.ask(GET_CONFIG, &[pair(0, 4), 0], &[]).unwrap();
        control.ask(GET_VRING_BASE, &[pair(2, 0)], &[]).unwrap();
    });
    drop(hand);
    victim.unharmed();
    drop(call);
}

#[test]
fn sigterm_ends_it_while_a_call_descriptor_is_full_and_blocks() {
    let victim = Victim::launch();
    let mut hand = Hand::of(&victim);
    let _call = hand.clog();
    victim.ends_on_sigterm();
}

#[test]
fn a_ring_that_is_stopped_has_notified_its_driver_before_the_answer_and_is_silent_after() {
    let victim = Victim::launch();
    let mut hand = Hand::of(&victim);
    for _ in 0..1000 {
        hand.submit();
        hand.ring.kick_anyway();
        hand.is_answered();
        hand.control
            .ask(GET_VRING_BASE, &[pair(1, 0)], &[])
            .unwrap();
        hand.ring.call().read().expect("a notification");
        hand.control.ask(GET_CONFIG, &[pair(0, 4), 0], &[]).unwrap();
        assert!(hand.ring.call().read().is_err(), "a late notification");
        hand = hand.restarted();
    }
}

/// Starts loads from descriptors that are made blocking again once the backend has them, and have
/// a byte and no end.
fn stalled_loads(victim: &Victim, mut pipe: impl FnMut() -> (OwnedFd, OwnedFd)) {
    let mut control = victim.negotiated();
    let mut held = Vec::new();
    for _ in 0..60 {
        let (reader, writer) = pipe();
        // Direction 1: the backend reads. No other descriptor comes back: bit 8.
        let answer = control.ask(SET_DEVICE_STATE_FD, &[1], &[reader.as_fd()]);
        assert_eq!(answer.unwrap(), 0x100);
        make_blocking(&reader);
        rustix::io::write(&writer, b"v").unwrap();
        held.push((reader, writer));
    }
    let threads = victim.rig.usage().threads - victim.usage.threads;
    assert!(threads <= 4, "{threads} threads more");
    drop(control);
    // The other ends are still there.
    victim.unharmed();
    drop(held);
}

#[test]
fn device_state_pipes_that_block_again_leave_no_thread_behind() {
    let victim = Victim::launch();
    stalled_loads(&victim, || {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader.into(), writer.into())
    });
}

#[test]
fn device_state_fifos_that_block_again_leave_no_thread_behind() {
    // The kernel reads a pipe without blocking where it is asked to, and a FIFO not.
    let victim = Victim::launch();
    let folder = victim.rig.backend.directory().to_owned();
    let mut number = 0;
    stalled_loads(&victim, || {
        number += 1;
        let path = folder.join(format!("fifo{number}"));
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let end = || open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (end(), end())
    });
}

#[test]
fn a_kick_descriptor_that_was_taken_away_does_not_make_it_spin_once_the_ring_is_disabled() {
    let victim = Victim::launch();
    let other = blocking_eventfd(0);
    for (word, fds) in [(1, &[other.as_fd()][..]), (1 | NO_FD, &[])] {
        let mut hand = Hand::of(&victim);
        // A frontend may be told that no descriptor will not do.
        let _ = hand.control.ask(SET_VRING_KICK, &[word], fds);
        let _ = hand.control.ask(SET_VRING_ENABLE, &[pair(1, 0)], &[]);
        hand.ring.kick_anyway();
        // While its frontend is connected.
        assert!(victim.rig.comes_to_rest());
    }
    victim.unharmed();
}

#[test]
fn a_kick_descriptor_that_replaces_another_while_the_ring_runs_is_the_one_that_counts() {
    let victim = Victim::launch();
    let mut hand = Hand::of(&victim);
    let other = blocking_eventfd(0);
    let taken = hand.control.ask(SET_VRING_KICK, &[1], &[other.as_fd()]);
    assert_eq!(taken.unwrap(), 0);
    for _ in 0..10 {
        assert!(victim.rig.comes_to_rest());
        hand.submit();
        rustix::io::write(&other, &1u64.to_ne_bytes()).unwrap();
        hand.is_answered();
    }
    drop(hand);
    victim.unharmed();
}

#[test]
fn a_frontend_that_hands_over_its_own_socket_takes_the_connection_along() {
    type Connect = fn(&Victim) -> UnixStream;
    let timer: Connect = |victim| victim.rig.stream();
    let clock: Connect = |victim| victim.rig.clock_stream();
    let victim = Victim::launch();
    for (connect, features) in [(timer, TIMER_FEATURES), (clock, CLOCK_FEATURES)] {
        for code in [
            SET_VRING_ERR,
            SET_VRING_CALL,
            SET_VRING_KICK,
            SET_DEVICE_STATE_FD,
        ] {
            let stream = connect(&victim);
            let own = stream.try_clone().unwrap();
            let mut control = Control::negotiated(stream, features);
            // It may be refused, or the connection be ended.
            let _ = control.ask(code, &[1], &[own.as_fd()]);
            drop((control, own));
            victim.unharmed();
        }
    }
}
