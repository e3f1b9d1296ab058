//! GET_VM and SET_VM: the whole VM at one instant.

use vhost_user_timer_protocol::wire::{self, present};
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};
use zerocopy::FromBytes;

use super::rig::{Ask, HZ, Rig, whole_vcpu};

fn get_vm(rig: &mut Rig, first: u32, count: u32) -> (wire::Vm, Vec<wire::Vcpu>) {
    let body = rig.done(&Ask::get_vm(first, count)).body;
    let (vm, vcpus) = wire::Vm::read_from_prefix(&body).unwrap();
    (vm, <[wire::Vcpu]>::ref_from_bytes(vcpus).unwrap().to_vec())
}

#[test]
fn get_vm_is_both_counts_and_the_six_registers_of_each_vcpu_at_one_instant() {
    let mut rig = Rig::running(4);
    for vcpu in 0..4 {
        let cval = 1_000 + u64::from(vcpu);
        rig.set(
            vcpu,
            &[
                (Register::TimerCval, cval),
                (Register::TimerCtl, 1),
                (Register::PtimerCval, cval + 1),
                (Register::PtimerCtl, 3),
            ],
        );
    }
    rig.pass(1_001);
    let host = rig.now.host;
    let (vm, vcpus) = get_vm(&mut rig, 1, 3);
    let expected = wire::Vm {
        virt_count: 1_001.into(),
        phys_count: host.into(),
        host_count: host.into(),
        frequency: HZ.into(),
        first: 1.into(),
        count: 3.into(),
    };
    assert_eq!(vm, expected);
    let expected = [
        whole_vcpu(1, [5, 1_001, 1_001, 7, host, 1_002]),
        whole_vcpu(2, [1, 1_001, 1_002, 7, host, 1_003]),
        whole_vcpu(3, [1, 1_001, 1_003, 7, host, 1_004]),
    ];
    assert_eq!(vcpus, expected);
    assert!(vcpus.iter().all(|vcpu| vcpu.present.get() == present::ALL));
}

#[test]
fn get_vm_takes_any_range_within_the_vm_and_no_other() {
    let mut rig = Rig::paused(4);
    for first in 0..6 {
        for count in 0..6 {
            let reply = rig.send(&Ask::get_vm(first, count));
            if first + count <= 4 {
                assert_eq!(reply.body.len(), 40 + 56 * count as usize);
            } else {
                assert_eq!(reply.verdict(), (Status::Invalid, 0));
            }
        }
    }
    for (first, count) in [(u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX)] {
        let verdict = rig.refused(&Ask::get_vm(first, count));
        assert_eq!(verdict, (Status::Invalid, 0));
    }
}

#[test]
fn the_largest_vm_is_got_and_set_in_one_request() {
    let mut rig = Rig::paused(4096);
    let (_, vcpus) = get_vm(&mut rig, 0, 4096);
    rig.done(&Ask::begin(4096, 0));
    let ask = Ask::set_vm(&vcpus);
    assert!(ask.bytes().len() <= vhost_user_timer_protocol::MAX_MESSAGE);
    rig.done(&ask);
    for vcpu in 0..4096 {
        assert_eq!(rig.restored(vcpu), 4095 - vcpu);
    }
    assert_eq!(rig.vm.phase(), Phase::Paused);
}

#[test]
fn set_vm_stages_what_set_regs_stages() {
    let mut by_regs = Rig::restoring(3, 0);
    let mut by_vm = by_regs.clone();
    let mut entries = Vec::new();
    for vcpu in 0..3 {
        let n = u64::from(vcpu);
        let values = [1, 100 + n, 200 + n, 2, 300 + n, 400 + n];
        entries.push(whole_vcpu(vcpu, values));
        let registers = std::array::from_fn::<_, 6, _>(|n| (Register::ALL[n], values[n]));
        by_regs.set(vcpu, &registers);
    }
    by_vm.done(&Ask::set_vm(&entries));
    assert_eq!(by_vm.vm, by_regs.vm);
    // In pieces, in any order.
    let mut in_pieces = Rig::restoring(3, 0);
    for n in [2, 0, 1] {
        in_pieces.done(&Ask::set_vm(&entries[n..=n]));
    }
    assert_eq!(in_pieces.vm, by_regs.vm);
}

#[test]
fn set_vm_sets_only_what_is_present() {
    let mut rig = Rig::paused(1);
    rig.set(0, &[(Register::TimerCtl, 2), (Register::TimerCval, 9)]);
    rig.done(&Ask::begin(1, 0));
    let mut entry = whole_vcpu(0, [1, 50, 70, 1, 80, 90]);
    entry.present = present::CNT.into();
    rig.done(&Ask::set_vm(&[entry]));
    assert_eq!(rig.get(0, Register::TimerCtl), 2);
    assert_eq!(rig.get(0, Register::TimerCval), 9);
    assert_eq!(rig.get(0, Register::TimerCnt), 50);
    let missing = present::CTL | present::CVAL;
    let verdict = rig.refused(&Ask::restore_done(0));
    assert_eq!(verdict, (Status::Incomplete, missing));
}

#[test]
fn set_vm_of_an_unknown_vcpu_or_present_bit_is_einval_with_the_index_and_sets_nothing() {
    let good = whole_vcpu(0, [1; 6]);
    let unknown_bit = |bit: u32| wire::Vcpu {
        present: (present::ALL | 1 << bit).into(),
        ..whole_vcpu(1, [0; 6])
    };
    let bad = [
        whole_vcpu(2, [0; 6]),
        whole_vcpu(u32::MAX, [0; 6]),
        unknown_bit(6),
        unknown_bit(31),
        good,
    ];
    let mut rig = Rig::restoring(2, 0);
    let before = rig.vm.clone();
    for entry in bad {
        let verdict = rig.refused(&Ask::set_vm(&[good, entry]));
        assert_eq!(verdict, (Status::Invalid, 1), "{entry:?}");
    }
    // A vCPU named twice is refused even where both entries say the same, or nothing.
    let nothing = wire::Vcpu::default();
    let verdict = rig.refused(&Ask::set_vm(&[nothing, whole_vcpu(1, [1; 6]), nothing]));
    assert_eq!(verdict, (Status::Invalid, 2));
    assert_eq!(rig.vm, before);
}

#[test]
fn set_vm_with_a_vcpu_that_is_done_is_ebusy_and_sets_nothing() {
    let mut rig = Rig::restoring(3, 0);
    rig.bring(1, 5);
    rig.restored(1);
    let before = rig.vm.clone();
    let entries = [0, 1, 2].map(|vcpu| whole_vcpu(vcpu, [1; 6]));
    assert_eq!(rig.refused(&Ask::set_vm(&entries)), (Status::Busy, 2));
    assert_eq!(rig.vm, before);
    rig.done(&Ask::set_vm(&[entries[0], entries[2]]));
}

#[test]
fn set_vm_of_a_u32_register_with_more_than_32_bits_is_einval() {
    let mut rig = Rig::paused_arm(2);
    rig.done(&Ask::begin(2, 0));
    let good = whole_vcpu(0, [3, 1 << 40, 1 << 40, 3, 1 << 40, 1 << 40]);
    for bad in [[1 << 32, 0, 0, 0, 0, 0], [0, 0, 0, 1 << 32, 0, 0]] {
        let verdict = rig.refused(&Ask::set_vm(&[good, whole_vcpu(1, bad)]));
        assert_eq!(verdict, (Status::Invalid, 1));
        let mut absent = whole_vcpu(1, bad);
        absent.present = present::CVAL.into();
        rig.done(&Ask::set_vm(&[absent]));
    }
    rig.done(&Ask::set_vm(&[good]));
    let ctl = Register::TimerCtl.id(Abi::Arm);
    let read: wire::RegValue = rig.done(&Ask::get_ids(0, &[ctl])).read();
    assert_eq!(read.value.get(), 7);
}

#[test]
fn get_vm_in_a_restore_reads_what_each_vcpu_brought() {
    let mut rig = Rig::running(2);
    rig.pass(40);
    rig.pause();
    rig.done(&Ask::begin(2, 0));
    rig.set(0, &[(Register::TimerCnt, 7), (Register::PtimerCnt, 8)]);
    let host = rig.now.host;
    rig.pass(10);
    let (vm, vcpus) = get_vm(&mut rig, 0, 2);
    assert_eq!((vm.virt_count.get(), vm.phys_count.get()), (40, host));
    let counts: Vec<_> = vcpus
        .iter()
        .map(|v| (v.get(Register::TimerCnt), v.get(Register::PtimerCnt)))
        .collect();
    assert_eq!(counts, [(7, 8), (40, host)]);
}
