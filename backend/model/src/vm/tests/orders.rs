//! The order of writes never matters: all 720 orders of the six registers end equal.

use vhost_user_timer_protocol::{Phase, Register};

use super::rig::{Ask, HZ, ON, Rig};
use crate::vm::{Timeline, Vm};
use Register::{PtimerCnt, PtimerCtl, PtimerCval, TimerCnt, TimerCtl, TimerCval};

type Write = (Register, u64);

const WRITES: [Write; 6] = [
    (TimerCtl, 7),
    (TimerCnt, 1_000),
    (TimerCval, 900),
    (PtimerCtl, 1),
    (PtimerCnt, u64::MAX - 5),
    (PtimerCval, u64::MAX - 5),
];

/// All orders of some writes.
fn orders(writes: &[Write]) -> Vec<Vec<Write>> {
    let Some((&first, rest)) = writes.split_first() else {
        return vec![vec![]];
    };
    let mut all = Vec::new();
    for order in orders(rest) {
        for at in 0..=order.len() {
            let mut order = order.clone();
            order.insert(at, first);
            all.push(order);
        }
    }
    all
}

/// Writes to vCPU 1 in every order, in one request and in many. Returns the state that all end in.
fn end_of_all_orders(rig: &Rig, writes: &[Write]) -> Vm {
    let mut end = None;
    for order in orders(writes) {
        let mut at_once = rig.clone();
        at_once.set(1, &order);
        let mut one_by_one = rig.clone();
        for write in &order {
            one_by_one.set(1, &[*write]);
        }
        let end = end.get_or_insert_with(|| at_once.vm.clone());
        assert!(at_once.vm == *end, "{order:?} in one request");
        assert!(one_by_one.vm == *end, "{order:?} in six");
    }
    end.unwrap()
}

#[test]
fn there_are_720_orders_of_six() {
    let mut all = orders(&WRITES);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 720);
}

#[test]
fn all_orders_end_equal_in_paused_with_the_clocks_frozen() {
    let mut rig = Rig::running(2);
    rig.pass(40);
    rig.pause();
    let vm = end_of_all_orders(&rig, &WRITES);
    assert_eq!(vm.info(rig.now).cntvoff.get(), rig.now.host - 1_000);
}

#[test]
fn all_orders_end_equal_in_paused_with_the_clocks_counting() {
    let mut rig = Rig::running(2);
    rig.pass(40);
    rig.pause_counting();
    end_of_all_orders(&rig, &WRITES);
    // With counts that were reported before, which change nothing.
    let told = rig.get_all(1);
    rig.pass(HZ);
    let offset = rig.offset(Timeline::Virtual);
    let vm = end_of_all_orders(&rig, &told);
    assert_eq!(vm.info(rig.now).cntvoff.get(), offset);
}

#[test]
fn all_orders_end_equal_with_the_offset_pinned() {
    let mut rig = Rig::paused(2);
    rig.done(&Ask::set_offset(77));
    let vm = end_of_all_orders(&rig, &WRITES);
    assert_eq!(vm.info(rig.now).cntvoff.get(), 77);
    rig.done(&Ask::begin(2, 0));
    rig.done(&Ask::set_offset(77));
    end_of_all_orders(&rig, &WRITES);
}

#[test]
fn all_orders_end_equal_in_restoring() {
    let mut rig = Rig::restoring(2, 0);
    end_of_all_orders(&rig, &WRITES);
    rig.bring(0, 999);
    rig.restored(0);
    rig.set(1, &[(TimerCnt, 5), (PtimerCtl, 2)]);
    rig.vm = end_of_all_orders(&rig, &WRITES);
    rig.restored(1);
    assert_eq!(rig.vm.phase(), Phase::Paused);
    assert_eq!((rig.virt(), rig.phys()), (1_000, u64::MAX - 5));
}

#[test]
fn all_orders_of_one_request_end_equal_in_running() {
    let writes = WRITES.map(|(register, value)| match register {
        TimerCnt => (TimerCtl, 7),
        PtimerCnt => (PtimerCval, u64::MAX - 5),
        _ => (register, value),
    });
    let mut rig = Rig::running(2);
    rig.arm(1, Timeline::Virtual, ON, 30);
    rig.arm(0, Timeline::Virtual, ON, 30);
    rig.pass(40);
    let mut end = None;
    for order in orders(&writes) {
        let mut rig = rig.clone();
        let lines = rig.set(1, &order).lines.get();
        let vm = rig.vm.clone();
        let after = (vm, lines, rig.fired());
        assert!(*end.get_or_insert_with(|| after.clone()) == after);
    }
}

#[test]
fn the_order_in_which_vcpus_are_restored_does_not_matter() {
    let bring = |rig: &mut Rig, vcpu: u32| {
        let n = u64::from(vcpu);
        let values = [
            (TimerCtl, n & 3),
            (TimerCnt, 50 - n),
            (TimerCval, 3 * n),
            (PtimerCnt, n * 7 % 4),
        ];
        rig.set(vcpu, &values);
        rig.restored(vcpu);
    };
    let vcpus = [0, 1, 2, 3, 4, 5].map(|n| (Register::ALL[n], n as u64));
    let mut end: Option<Vm> = None;
    for order in orders(&vcpus) {
        let mut rig = Rig::restoring(6, 0);
        for (_, vcpu) in order {
            bring(&mut rig, vcpu as u32);
        }
        assert!(*end.get_or_insert_with(|| rig.vm.clone()) == rig.vm);
    }
}
