//! SPEC.md, "Registers": ids, control bits, counts, and writing back what was read.

use vhost_user_timer_protocol::wire::{self, info_flags};
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};

use super::rig::{Ask, ON, Rig, registers_of};
use crate::vm::Timeline;
use Register::{PtimerCnt, PtimerCtl, PtimerCval, TimerCnt, TimerCtl, TimerCval};

#[test]
fn the_register_list_is_the_six_of_the_vms_abi() {
    for (mut rig, abi) in [(Rig::paused(2), Abi::Arm64), (Rig::paused_arm(2), Abi::Arm)] {
        let ids: [[u8; 8]; 6] = rig.done(&Ask::get_reg_list(1)).read();
        let mut ids = ids.map(u64::from_le_bytes);
        let mut expected = Register::ALL.map(|register| register.id(abi));
        ids.sort_unstable();
        expected.sort_unstable();
        assert_eq!(ids, expected);
    }
}

#[test]
fn the_arm64_ids_are_those_of_kvm() {
    let ids = Register::ALL.map(|register| register.id(Abi::Arm64));
    let expected = [
        0x6030_0000_0013_df19,
        0x6030_0000_0013_df1a,
        0x6030_0000_0013_df02,
        0x6030_0000_0013_df11,
        0x6030_0000_0013_df01,
        0x6030_0000_0013_df12,
    ];
    assert_eq!(ids, expected);
}

#[test]
fn the_arm_ids_are_those_of_kvm() {
    let ids = Register::ALL.map(|register| register.id(Abi::Arm));
    let expected = [
        0x4020_0000_000f_7181,
        0x4030_0000_000f_0708,
        0x4030_0000_000f_0718,
        0x4020_0000_000f_7101,
        0x4030_0000_000f_0700,
        0x4030_0000_000f_0710,
    ];
    assert_eq!(ids, expected);
}

/// Ids that are refused, with an index of good ids before them.
fn assert_ids_refused(rig: &mut Rig, good: u64, ids: &[u64], status: Status) {
    let before = rig.vm.clone();
    for &id in ids {
        let verdict = rig.refused(&Ask::get_ids(0, &[good, good, id]));
        assert_eq!(verdict, (status, 2), "GET {id:#x}");
        let verdict = rig.refused(&Ask::set_ids(0, &[(good, 1), (id, 1), (id, 1)]));
        assert_eq!(verdict, (status, 1), "SET {id:#x}");
    }
    assert_eq!(rig.vm, before);
}

#[test]
fn the_other_architectures_id_and_a_wrong_size_are_einval_with_the_entrys_index() {
    let other = Register::ALL.map(|register| register.id(Abi::Arm));
    let mut rig = Rig::paused(1);
    let good = TimerCval.id(Abi::Arm64);
    assert_ids_refused(&mut rig, good, &other, Status::Invalid);
    let u32_sized = Register::ALL.map(|register| register.id(Abi::Arm64) & !(0x10 << 48));
    assert_ids_refused(&mut rig, good, &u32_sized, Status::Invalid);

    let other = Register::ALL.map(|register| register.id(Abi::Arm64));
    let mut rig = Rig::paused_arm(1);
    let good = TimerCval.id(Abi::Arm);
    assert_ids_refused(&mut rig, good, &other, Status::Invalid);
    let wrong_size = [0x4030_0000_000f_7181, 0x4020_0000_000f_0708];
    assert_ids_refused(&mut rig, good, &wrong_size, Status::Invalid);
}

#[test]
fn any_other_id_is_enoent_with_the_entrys_index() {
    let ids = [0, 1, u64::MAX, 0x6030_0000_0013_df18, 0x6030_0000_0013_df1f];
    let good = TimerCval.id(Abi::Arm64);
    assert_ids_refused(&mut Rig::paused(1), good, &ids, Status::UnknownRegister);
    let ids = [0, 0x4030_0000_000f_0720, 0x4020_0000_000f_7182];
    let good = TimerCval.id(Abi::Arm);
    assert_ids_refused(&mut Rig::paused_arm(1), good, &ids, Status::UnknownRegister);
}

#[test]
fn a_u32_register_given_more_than_32_bits_is_einval() {
    let mut rig = Rig::paused_arm(1);
    let (ctl, cval) = (PtimerCtl.id(Abi::Arm), PtimerCval.id(Abi::Arm));
    let before = rig.vm.clone();
    let verdict = rig.refused(&Ask::set_ids(0, &[(cval, u64::MAX), (ctl, 1 << 32)]));
    assert_eq!(verdict, (Status::Invalid, 1));
    assert_eq!(rig.vm, before);
    rig.done(&Ask::set_ids(0, &[(cval, u64::MAX), (ctl, 0xffff_ffff)]));
    let read: wire::RegValue = rig.done(&Ask::get_ids(0, &[ctl])).read();
    assert_eq!(read.value.get(), 3);
    // arm64's control registers are U64.
    Rig::paused(1).set(0, &[(PtimerCtl, 1 << 32)]);
}

#[test]
fn control_stores_enable_and_imask_and_drops_the_rest() {
    for clock in Timeline::ALL {
        let [ctl, _, cval] = registers_of(clock);
        for written in (0..64).map(|bit| 1 << bit).chain([u64::MAX, !7, 5, 6, 7]) {
            let mut rig = Rig::paused(1);
            rig.set(0, &[(ctl, written), (cval, u64::MAX)]);
            assert_eq!(rig.get(0, ctl), written & 3);
        }
    }
}

#[test]
fn istatus_is_computed_when_read_enable_and_count_at_or_past_cval_unsigned() {
    let mut rig = Rig::paused(1);
    for (count, cval) in [
        (0, 0),
        (9, 10),
        (10, 10),
        (11, 10),
        (u64::MAX, 1),
        (1, u64::MAX),
        (1 << 63, (1 << 63) - 1),
        ((1 << 63) - 1, 1 << 63),
    ] {
        for control in 0..8 {
            rig.set(
                0,
                &[(TimerCnt, count), (TimerCval, cval), (TimerCtl, control)],
            );
            let met = control & 1 != 0 && count >= cval;
            let istatus = if met { 4 } else { 0 };
            assert_eq!(rig.get(0, TimerCtl), control & 3 | istatus);
        }
    }
}

#[test]
fn istatus_comes_with_the_passing_of_time_and_a_write_of_it_is_dropped() {
    let mut rig = Rig::running(1);
    rig.arm(0, Timeline::Virtual, 7, 10);
    assert_eq!(rig.get(0, TimerCtl), 3);
    rig.pass(9);
    assert_eq!(rig.get(0, TimerCtl), 3);
    rig.pass(1);
    assert_eq!(rig.get(0, TimerCtl), 7);
}

#[test]
fn registers_are_each_vcpus_own_apart_from_the_counts() {
    let mut rig = Rig::paused(3);
    for vcpu in 0..3_u32 {
        let n = u64::from(vcpu);
        let values = [
            (TimerCval, 100 + n),
            (PtimerCval, u64::MAX - n),
            (TimerCtl, n),
            (PtimerCtl, 3 - n),
        ];
        rig.set(vcpu, &values);
    }
    for vcpu in 0..3_u32 {
        let n = u64::from(vcpu);
        assert_eq!(rig.get(vcpu, TimerCval), 100 + n);
        assert_eq!(rig.get(vcpu, PtimerCval), u64::MAX - n);
        assert_eq!(rig.get(vcpu, TimerCtl), n);
        assert_eq!(rig.get(vcpu, PtimerCtl), 3 - n);
    }
}

#[test]
fn a_register_can_be_read_twice_and_in_any_order_in_one_request() {
    let mut rig = Rig::running(1);
    rig.pass(33);
    let asked = [PtimerCval, TimerCnt, TimerCnt, TimerCtl, TimerCnt];
    let entries: [wire::RegValue; 5] = rig.done(&Ask::get_regs(0, &asked)).read();
    let ids = entries.map(|entry| entry.id.get());
    assert_eq!(ids, asked.map(|register| register.id(Abi::Arm64)));
    let values = entries.map(|entry| entry.value.get());
    assert_eq!(values, [0, 33, 33, 0, 33]);
}

#[test]
fn a_count_write_in_paused_freezes_that_clock_at_the_value_for_every_vcpu() {
    let mut rig = Rig::running(3);
    rig.pass(50);
    rig.pause_counting();
    rig.set(2, &[(TimerCnt, 7)]);
    rig.pass(100);
    for vcpu in 0..3 {
        assert_eq!(rig.get(vcpu, TimerCnt), 7);
    }
    rig.resume();
    rig.pass(3);
    assert_eq!(rig.get(0, TimerCnt), 10);
}

#[test]
fn a_count_write_in_running_is_ebusy_even_of_the_very_count() {
    let mut rig = Rig::running(1);
    rig.pass(50);
    let before = rig.vm.clone();
    for register in [TimerCnt, PtimerCnt] {
        for value in [0, 50] {
            let ask = Ask::set_regs(0, &[(TimerCval, 5), (register, value)]);
            assert_eq!(rig.refused(&ask), (Status::Busy, 2));
        }
    }
    assert_eq!(rig.vm, before);
}

#[test]
fn with_the_offset_pinned_count_writes_are_ignored_and_counted_in_every_phase() {
    for phase in [Phase::Paused, Phase::Running, Phase::Restoring] {
        let mut rig = Rig::paused(2);
        if phase == Phase::Restoring {
            rig.done(&Ask::begin(2, 0));
        }
        rig.done(&Ask::set_offset(1_000));
        if phase == Phase::Running {
            rig.resume();
        }
        assert_eq!(rig.vm.phase(), phase);
        let result = rig.set(0, &[(TimerCnt, 1), (PtimerCnt, 2), (TimerCval, 3)]);
        assert_eq!(result.ignored.get(), 2, "{phase}");
        assert_eq!(rig.set(0, &[(TimerCnt, 9)]).ignored.get(), 1);
        assert_eq!(rig.set(0, &[(TimerCtl, 0)]).ignored.get(), 0);
        assert_eq!(rig.get(0, TimerCval), 3, "the rest is not ignored");
        for register in [TimerCnt, PtimerCnt] {
            assert_eq!(rig.get(1, register), rig.now.host - 1_000);
        }
    }
}

#[test]
fn control_and_cval_may_be_set_in_every_phase_but_new() {
    for phase in [Phase::Paused, Phase::Running, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 1);
        let values = [
            (TimerCtl, 2),
            (TimerCval, 5),
            (PtimerCtl, 1),
            (PtimerCval, u64::MAX),
        ];
        rig.set(0, &values);
        for (register, value) in values {
            assert_eq!(rig.get(0, register), value, "{register} in {phase}");
        }
    }
}

#[test]
fn in_restoring_a_vcpu_that_is_done_takes_no_more_writes_and_the_others_do() {
    let mut rig = Rig::restoring(2, 0);
    rig.bring(0, 5);
    rig.restored(0);
    let before = rig.vm.clone();
    for register in Register::ALL {
        let ask = Ask::set_regs(0, &[(register, 1)]);
        assert_eq!(rig.refused(&ask), (Status::Busy, 1));
    }
    assert_eq!(rig.vm, before);
    rig.set(1, &[(TimerCtl, 1)]);
}

#[test]
fn one_register_named_twice_must_have_one_value() {
    let mut rig = Rig::paused(1);
    rig.set(0, &[(TimerCval, 4), (TimerCtl, 1), (TimerCval, 4)]);
    assert_eq!(rig.get(0, TimerCval), 4);
    let before = rig.vm.clone();
    let ask = Ask::set_regs(0, &[(TimerCtl, 0), (TimerCval, 6), (TimerCval, 7)]);
    assert_eq!(rig.refused(&ask), (Status::Invalid, 2));
    assert_eq!(rig.vm, before);
}

#[test]
fn a_count_named_twice_with_the_offset_pinned_is_counted_once() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(0));
    let result = rig.set(0, &[(TimerCnt, 4), (TimerCnt, 4)]);
    assert_eq!(result.ignored.get(), 1);
}

#[test]
fn lines_are_those_of_the_vcpu_after_the_write() {
    for phase in [Phase::Paused, Phase::Running, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let cases: [(&[(Register, u64)], u32); 6] = [
            (&[(TimerCtl, ON)], wire::LINE_VIRTUAL),
            (&[(PtimerCtl, ON)], wire::LINE_VIRTUAL | wire::LINE_PHYSICAL),
            (&[], wire::LINE_VIRTUAL | wire::LINE_PHYSICAL),
            (&[(TimerCval, u64::MAX)], wire::LINE_PHYSICAL),
            (&[(PtimerCtl, 3)], 0),
            (&[(PtimerCtl, 1), (PtimerCval, u64::MAX)], 0),
        ];
        for (values, lines) in cases {
            assert_eq!(rig.set(0, values).lines.get(), lines, "{values:?} {phase}");
        }
        assert_eq!(rig.set(1, &[]).lines.get(), 0, "another vCPU's are its own");
    }
}

#[test]
fn entries_of_one_request_take_effect_together_count_included() {
    // Whichever came first, an expiry between the two would show.
    let mut rig = Rig::paused(1);
    let result = rig.set(0, &[(TimerCtl, ON), (TimerCval, 100), (TimerCnt, 100)]);
    assert_eq!(result.lines.get(), wire::LINE_VIRTUAL);
    let result = rig.set(0, &[(TimerCnt, 50), (TimerCval, 51)]);
    assert_eq!(result.lines.get(), 0);
}

/// The VM with its clocks counting: after KEEP_COUNTING, with the physical clock virtualised.
fn counting(vcpus: u32) -> Rig {
    let mut rig = Rig::paused(vcpus);
    rig.set(0, &[(TimerCnt, 1_000), (PtimerCnt, 2_000)]);
    rig.resume();
    rig.pass(10);
    rig.pause_counting();
    rig
}

#[test]
fn a_count_written_back_to_a_counting_clock_moves_nothing() {
    for register in [TimerCnt, PtimerCnt] {
        let mut rig = counting(2);
        let offsets = (
            rig.offset(Timeline::Virtual),
            rig.offset(Timeline::Physical),
        );
        let told = rig.get(1, register);
        rig.pass(500);
        rig.set(1, &[(register, told)]);
        rig.pass(500);
        rig.set(1, &[(register, told)]);
        let now = (
            rig.offset(Timeline::Virtual),
            rig.offset(Timeline::Physical),
        );
        assert_eq!(now, offsets, "{register}");
    }
}

#[test]
fn a_count_told_while_running_can_be_written_back_where_the_pause_kept_counting() {
    let mut rig = Rig::running(1);
    rig.pass(10);
    let told = rig.get(0, TimerCnt);
    rig.pass(10);
    rig.pause_counting();
    rig.set(0, &[(TimerCnt, told)]);
    rig.pass(10);
    assert_eq!(rig.virt(), 30);
}

#[test]
fn a_count_told_before_the_clock_was_frozen_is_a_new_count_after() {
    let mut rig = Rig::running(1);
    rig.pass(10);
    let told = rig.get(0, TimerCnt);
    rig.pass(10);
    rig.pause();
    rig.set(0, &[(TimerCnt, told)]);
    assert_eq!(rig.virt(), 10, "the VMM itself writes a smaller count");
}

#[test]
fn a_count_that_only_another_vcpu_was_told_is_a_new_count() {
    let mut rig = counting(2);
    let told = rig.get(0, TimerCnt);
    rig.pass(500);
    rig.set(1, &[(TimerCnt, told)]);
    rig.pass(5);
    assert_eq!(rig.virt(), told);
}

#[test]
fn only_the_last_count_told_is_known() {
    let mut rig = counting(1);
    let first = rig.get(0, TimerCnt);
    rig.pass(500);
    rig.get(0, TimerCnt);
    rig.set(0, &[(TimerCnt, first)]);
    rig.pass(5);
    assert_eq!(rig.virt(), first);
}

#[test]
fn a_count_told_by_get_vm_is_known_of_every_vcpu() {
    for (first, count) in [(0, 3), (1, 1), (0, 0)] {
        let mut rig = counting(3);
        let body = rig.done(&Ask::get_vm(first, count)).body;
        let told = u64::from_le_bytes(body[..8].try_into().unwrap());
        for vcpu in 0..3 {
            rig.pass(500);
            rig.set(vcpu, &[(TimerCnt, told)]);
        }
        assert_eq!(rig.virt(), told + 1_500);
    }
}

#[test]
fn a_vm_read_in_parts_can_be_written_back_vcpu_by_vcpu() {
    let mut rig = counting(4);
    let mut entries = Vec::new();
    for first in 0..4 {
        let body = rig.done(&Ask::get_vm(first, 1)).body;
        let entry: [u8; 56] = body[40..].try_into().unwrap();
        entries.push(zerocopy::transmute!(entry));
        rig.pass(100);
    }
    let offsets = (
        rig.offset(Timeline::Virtual),
        rig.offset(Timeline::Physical),
    );
    for entry in &entries {
        let entry: &wire::Vcpu = entry;
        let values = Register::ALL.map(|register| (register, entry.get(register)));
        rig.set(entry.vcpu.get(), &values);
        rig.pass(100);
    }
    let now = (
        rig.offset(Timeline::Virtual),
        rig.offset(Timeline::Physical),
    );
    assert_eq!(now, offsets);
}

#[test]
fn what_a_vcpu_and_what_all_were_told_are_both_known() {
    let mut rig = counting(1);
    let own = rig.get(0, TimerCnt);
    rig.pass(500);
    rig.done(&Ask::get_vm(0, 1));
    rig.pass(500);
    rig.set(0, &[(TimerCnt, own)]);
    rig.set(0, &[(TimerCnt, own + 500)]);
    assert_eq!(rig.virt(), own + 1_000);
}

#[test]
fn writing_the_passed_through_physical_count_back_does_not_virtualise_it() {
    for phase in [Phase::Paused, Phase::Running] {
        let mut rig = Rig::in_phase(phase, 1);
        let told = rig.get(0, PtimerCnt);
        rig.pass(10);
        if phase == Phase::Running {
            rig.pause();
        }
        rig.pass(10);
        rig.set(0, &[(PtimerCnt, told)]);
        assert_eq!(rig.info().flags & info_flags::PHYS_VIRTUALISED, 0);
        assert_eq!(rig.phys(), rig.now.host);
        rig.set(0, &[(PtimerCnt, told + 1)]);
        assert_eq!(rig.info().flags, info_flags::PHYS_VIRTUALISED);
        assert_eq!(rig.phys(), told + 1);
    }
}

#[test]
fn a_count_told_in_a_restore_that_was_aborted_does_not_hide_the_last_of_a_counting_clock() {
    let mut rig = counting(1);
    let told = rig.get(0, TimerCnt);
    rig.pass(100);
    rig.done(&Ask::begin(1, 0));
    rig.get(0, TimerCnt);
    rig.done(&Ask::abort());
    rig.set(0, &[(TimerCnt, told)]);
    assert_eq!(rig.virt(), told + 100);
}

#[test]
fn what_was_told_is_forgotten_once_the_clock_was_set() {
    let mut rig = counting(1);
    let told = rig.get(0, TimerCnt);
    rig.set(0, &[(TimerCnt, 5_000)]);
    rig.set(0, &[(TimerCnt, told)]);
    rig.pass(100);
    assert_eq!(rig.virt(), told, "frozen at what was written last");
}

#[test]
fn reading_a_frozen_clock_changes_nothing_at_all() {
    let mut rig = Rig::paused(2);
    rig.set(0, &[(TimerCnt, 4), (PtimerCnt, 5)]);
    let before = rig.vm.clone();
    rig.get_all(1);
    rig.done(&Ask::get_vm(0, 2));
    rig.done(&Ask::get_reg_list(0));
    rig.info();
    assert_eq!(rig.vm, before);
    let values = rig.get_all(1);
    rig.set(1, &values);
    assert_eq!(rig.vm, before);
}
