//! A refused operation changes nothing, and no bytes that a peer can send do harm.

use vhost_user_timer_protocol::wire::{configure_flags, restore_flags};
use vhost_user_timer_protocol::{Phase, Register, Status, VM_WIDE};

use super::rig::{Ask, ON, PHASES, Rig, whole_vcpu};
use crate::vm::Timeline;

/// VMs of 2 vCPUs in every phase, with something to lose: armed timers, pending events, waiters,
/// staged registers, a vCPU that is done.
fn vms() -> Vec<Rig> {
    let mut paused = Rig::running(2);
    paused.arm(0, Timeline::Virtual, ON, 10);
    paused.arm(1, Timeline::Physical, ON, 0);
    paused.arm(1, Timeline::Virtual, ON, 500);
    paused.pass(20);
    let running = paused.clone();
    paused.pause_counting();
    let mut pinned = paused.clone();
    pinned.done(&Ask::set_offset(40));
    let mut running_pinned = pinned.clone();
    running_pinned.resume();
    paused.get_all(0);
    paused.done(&Ask::get_vm(0, 2));
    paused.wait(&Ask::wait_run(1));
    let mut restoring = paused.clone();
    restoring.done(&Ask::begin(2, restore_flags::STRICT));
    restoring.wait(&Ask::wait_run(0).on_queue(2));
    restoring.bring(0, 5);
    restoring.restored(0);
    restoring.bring(1, 6);
    let mut restoring_pinned = restoring.clone();
    restoring_pinned.done(&Ask::set_offset(50));
    let mut armed = Rig::armed(2);
    armed.arm(0, Timeline::Virtual, ON, 0);
    armed.wait(&Ask::wait_run(0));
    let flags = configure_flags::ALL;
    let mut armed_by_restore = Rig::armed_by_restore(2, flags, 40);
    armed_by_restore.arm(1, Timeline::Physical, ON, 0);
    armed_by_restore.wait(&Ask::wait_run(0));
    let mut one_offset = Rig::configured(2, flags);
    one_offset.done(&Ask::begin(2, restore_flags::STRICT));
    one_offset.bring(0, 5);
    one_offset.restored(0);
    vec![
        Rig::new(),
        paused,
        pinned,
        running,
        running_pinned,
        restoring,
        restoring_pinned,
        armed,
        armed_by_restore,
        one_offset,
    ]
}

/// A request, and all the ways to spoil it.
fn spoilt(ask: &Ask) -> Vec<Ask> {
    let mut all = vec![ask.clone()];
    for room in [16, 17, 23, 55, 60, 100, 111] {
        all.push(ask.clone().with_room(room));
    }
    for epoch in [1, 2, 3, u64::MAX] {
        all.push(ask.clone().in_epoch(epoch));
    }
    for vcpu in [0, 1, 2, VM_WIDE] {
        all.push(ask.clone().for_vcpu(vcpu));
    }
    for byte in 0..ask.body.len().min(96) {
        for value in [0x01, 0x80, 0xff] {
            let mut ask = ask.clone();
            ask.body[byte] ^= value;
            all.push(ask);
        }
    }
    for len in 0..ask.body.len() {
        let mut ask = ask.clone();
        ask.body.truncate(len);
        all.push(ask);
    }
    all
}

fn asks() -> Vec<Ask> {
    let mut asks = Ask::one_of_each(2);
    asks.extend([
        Ask::restore_done(1),
        Ask::configure(3, 1, 24_000_000),
        Ask::begin(3, 7),
        Ask::set_vm(&[whole_vcpu(1, [1; 6])]),
        Ask::set_vm(&[whole_vcpu(1, [1; 6]), whole_vcpu(1, [1; 6])]),
        Ask::set_regs(1, &Register::ALL.map(|register| (register, 9))),
        Ask::set_regs(1, &Register::ALL.map(|register| (register, 9))).done(),
        Ask::set_vm(&[whole_vcpu(1, [1; 6]), whole_vcpu(0, [0; 6])]).done(),
        Ask::set_regs(0, &[]).done(),
        Ask::configure_with(2, 0, 3, 0),
        Ask::get_vm(1, 2),
    ]);
    asks
}

#[test]
fn an_operation_that_fails_has_changed_nothing_in_any_phase_however_it_is_wrong() {
    let asks: Vec<Ask> = asks().iter().flat_map(spoilt).collect();
    let mut refusals = 0;
    for rig in vms() {
        let before = rig.vm.clone();
        for ask in &asks {
            let mut rig = rig.clone();
            rig.effects = Default::default();
            let Some(reply) = rig.offer(ask) else {
                continue;
            };
            if reply.status != Status::Ok {
                assert!(rig.vm == before, "{ask:?} in {}", before.phase());
                assert!(reply.body.is_empty());
                assert_eq!((rig.released(), rig.notices()), (vec![], vec![]));
                refusals += 1;
            }
        }
    }
    assert!(refusals > 5_000, "only {refusals} were refused");
}

#[test]
fn every_phase_is_among_the_vms_tried() {
    let phases: Vec<Phase> = vms().iter().map(|rig| rig.vm.phase()).collect();
    assert!(PHASES.iter().all(|phase| phases.contains(phase)));
}

#[test]
fn no_bytes_that_a_peer_can_send_do_harm() {
    // xorshift64*: the bytes need not be good, only many and the same each time.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    };
    let asks = asks();
    for mut rig in vms() {
        for _ in 0..4_000 {
            let mut bytes = asks[random() as usize % asks.len()].bytes();
            for _ in 0..random() % 4 {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            bytes.truncate(if random() % 8 == 0 {
                random() as usize % (bytes.len() + 1)
            } else {
                bytes.len()
            });
            let room = 16 + random() as usize % 200;
            rig.offer_bytes(&bytes, room, 1 + (random() % 2) as u16);
            rig.pass(if random() % 16 == 0 {
                random() << 31
            } else {
                random() % 100
            });
            if random() % 4 == 0 {
                rig.events();
            }
            rig.released();
            rig.notices();
        }
    }
}
