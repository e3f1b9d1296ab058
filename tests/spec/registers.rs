//! SPEC.md, "Registers": ids, control bits, counts, and that entries take effect together.

use vhost_user_timer_kit::contract::{
    ARM, ARM64, CNT, CTL, CVAL, PCNT, PCTL, PCVAL, Vcpu, op, phase, regs_body, status, u64_at,
    words,
};

use crate::world::{Clock, Vm, World};

scenarios! {
    both {
        the_register_list_is_the_six_of_the_vms_abi: "5.3" "6.1";
        a_fresh_vcpu_has_its_timers_off: "3.8";
        on_arm64_timer_cnt_and_timer_cval_are_the_other_way_round: "6.2";
        each_id_of_the_32_bit_abi_is_the_register_of_its_name: "6.1";
        the_other_architectures_id_and_a_wrong_size_are_einval_with_the_entrys_index:
            "6.3" "2.35" "2.52";
        any_other_id_is_enoent_with_the_entrys_index: "6.4" "2.31" "2.52";
        a_u32_register_given_more_than_32_bits_is_einval: "6.5" "2.52";
        control_stores_enable_and_imask_and_drops_the_rest: "6.6";
        istatus_is_enable_and_count_at_or_past_cval_unsigned: "6.7";
        registers_are_each_vcpus_own_apart_from_the_counts: "5.4" "5.5";
        a_register_can_be_read_twice_and_in_any_order_in_one_request: "5.4";
        a_list_without_entries_is_fine: "6.18";
        more_registers_than_there_are_can_be_asked_for_at_once: "5.4" "5.5" "6.16";
        a_count_write_in_paused_freezes_that_clock_at_the_value_for_every_vcpu: "6.8" "6.9";
        a_count_write_in_running_is_ebusy_even_of_the_very_count: "6.10" "2.52";
        control_and_cval_can_be_written_in_every_phase_but_new: "6.13";
        in_restoring_a_vcpu_that_is_done_takes_no_more_writes_and_the_others_do:
            "6.14" "6.19" "2.52";
        one_register_named_twice_must_have_one_value: "6.16" "2.52";
        lines_are_those_of_the_vcpu_after_the_write: "6.20" "6.21" "8.10";
        a_line_is_high_where_enable_is_set_imask_is_not_and_the_count_is_at_or_past_cval:
            "6.20" "6.21";
        entries_of_one_request_take_effect_together_in_any_order: "6.15";
        in_a_restore_the_order_of_requests_does_not_matter_either: "6.15";
    }
    model {
        istatus_comes_with_the_passing_of_time_and_a_write_of_it_is_dropped: "6.6" "6.7";
        entries_of_one_request_leave_no_expiry_between_them: "6.15";
    }
}

const ALL: [u64; 6] = ARM64;

fn the_register_list_is_the_six_of_the_vms_abi(on: World) {
    for (mut vm, ids) in [(on.paused(2), ARM64), (on.paused_arm(2), ARM)] {
        let answer = vm.vcpu(op::GET_REG_LIST, 1, &[]);
        let mut listed: Vec<u64> = answer.ok(48).chunks(8).map(|id| u64_at(id, 0)).collect();
        // Their order is not part of the contract, as it is not of KVM's.
        let mut wanted = ids.to_vec();
        listed.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(listed, wanted);
        // All of them can be read.
        vm.get(1, &ids);
    }
}

fn a_fresh_vcpu_has_its_timers_off(on: World) {
    let mut vm = on.paused(1);
    assert_eq!(vm.get(0, &[CTL, CNT, CVAL, PCTL, PCVAL]), [0; 5]);
}

fn on_arm64_timer_cnt_and_timer_cval_are_the_other_way_round(on: World) {
    let mut vm = on.paused(2);
    // …df1a is the VM's count, though it has CNTV_CVAL's encoding, and …df02 the compare value.
    vm.set(
        0,
        &[(0x6030_0000_0013_df1a, 111), (0x6030_0000_0013_df02, 222)],
    );
    assert_eq!(vm.get_one(1, 0x6030_0000_0013_df1a), 111);
    assert_eq!(vm.get_one(1, 0x6030_0000_0013_df02), 0);
    assert_eq!(vm.state().virt_count, 111);
    assert_eq!(vm.state().vcpus[0].registers[2], 222);
    // The physical timer's are the right way round.
    vm.set(
        0,
        &[(0x6030_0000_0013_df01, 333), (0x6030_0000_0013_df12, 444)],
    );
    assert_eq!(vm.get_one(1, 0x6030_0000_0013_df01), 333);
    assert_eq!(vm.state().vcpus[0].registers[5], 444);
}

fn each_id_of_the_32_bit_abi_is_the_register_of_its_name(on: World) {
    let mut vm = on.paused_arm(2);
    let values = [2, 111, 222, 3, 333, 1 << 40];
    let entries: Vec<_> = ARM.into_iter().zip(values).collect();
    vm.set(0, &entries);
    let state = vm.state();
    assert_eq!((state.virt_count, state.phys_count), (111, 333));
    assert_eq!(state.vcpus[0].registers, values);
    assert_eq!(vm.get(0, &ARM), values);
    assert_eq!(vm.get(1, &ARM), [0, 111, 0, 0, 333, 0]);
}

/// Ids that are refused, with good ones before them.
fn assert_ids_refused(vm: &mut Vm, good: u64, ids: &[u64], status: u32) {
    let before = vm.snapshot();
    for &id in ids {
        let get = vm.refused(op::GET_REGS, 0, &words(&[good, good, id]));
        assert_eq!(get, (status, 2), "GET {id:#x}");
        for (entries, index) in [
            (&[(good, 5), (id, 1), (id, 1)][..], 1),
            (&[(good, 5), (good, 5), (good, 5), (id, 1)], 3),
        ] {
            let set = vm.set_refused(0, entries);
            assert_eq!(set, (status, index), "SET {id:#x}");
        }
    }
    assert_eq!(vm.snapshot(), before);
}

fn the_other_architectures_id_and_a_wrong_size_are_einval_with_the_entrys_index(on: World) {
    let u32_sized = ARM64.map(|id| id & !(0x10 << 48));
    let mut wrong: Vec<u64> = ARM.into_iter().chain(u32_sized).collect();
    wrong.push(0x6000_0000_0013_df02);
    assert_ids_refused(&mut on.paused(1), CVAL, &wrong, status::EINVAL);
    let mut wrong: Vec<u64> = ARM64.into_iter().chain(u32_sized).collect();
    wrong.extend([0x4030_0000_000f_7181, 0x4020_0000_000f_0708]);
    assert_ids_refused(&mut on.paused_arm(1), ARM[2], &wrong, status::EINVAL);
    let mut vm = on.paused(1);
    assert_ids_refused(&mut vm, CVAL, &[0x4030_0000_000f_7181], status::EINVAL);
}

fn any_other_id_is_enoent_with_the_entrys_index(on: World) {
    let ids = [
        0,
        1,
        u64::MAX,
        0x6030_0000_0013_df18,
        0x6030_0000_0013_df1f,
        0x6030_0000_0013_e703,
    ];
    let mut vm = on.paused(1);
    assert_ids_refused(&mut vm, CVAL, &ids, status::ENOENT);
    for id in ids {
        let get = vm.refused(op::GET_REGS, 0, &words(&[CTL, id, CVAL]));
        assert_eq!(get, (status::ENOENT, 1));
        let set = vm.set_refused(0, &[(CVAL, 5), (CTL, 1), (CNT, 1), (id, 1)]);
        assert_eq!(set, (status::ENOENT, 3));
    }
    assert_eq!(vm.get(0, &[CTL, CNT, CVAL]), [0, 0, 0]);
    let ids = [0, 0x4030_0000_000f_0720, 0x4020_0000_000f_7182];
    assert_ids_refused(&mut on.paused_arm(1), ARM[2], &ids, status::ENOENT);
}

fn a_u32_register_given_more_than_32_bits_is_einval(on: World) {
    let mut vm = on.paused_arm(1);
    for (ctl, cval) in [(ARM[0], ARM[2]), (ARM[3], ARM[5])] {
        let before = vm.snapshot();
        for value in [1 << 32, u64::MAX] {
            let set = vm.set_refused(0, &[(cval, u64::MAX), (ctl, value)]);
            assert_eq!(set, (status::EINVAL, 1));
        }
        assert_eq!(vm.snapshot(), before);
        vm.set(0, &[(cval, u64::MAX), (ctl, 0xffff_ffff)]);
        assert_eq!(vm.get_one(0, ctl), 3);
    }
    // On arm64 every register is a U64.
    let mut vm = on.paused(1);
    for ctl in [CTL, PCTL] {
        vm.set(0, &[(ctl, 1 << 32)]);
        vm.set(0, &[(ctl, u64::MAX)]);
    }
}

fn control_stores_enable_and_imask_and_drops_the_rest(on: World) {
    let mut vm = on.paused(1);
    // The counts are 0 and stay so.
    vm.set(0, &[(CNT, 0), (PCNT, 0)]);
    for clock in Clock::BOTH {
        let [ctl, _, cval] = clock.registers();
        for written in (0..=0xff)
            .chain((8..64).map(|bit| 1 << bit))
            .chain([u64::MAX, !7])
        {
            vm.set(0, &[(ctl, written), (cval, u64::MAX)]);
            assert_eq!(vm.get_one(0, ctl), written & 3, "{written:#x}");
        }
    }
}

fn istatus_is_enable_and_count_at_or_past_cval_unsigned(on: World) {
    let edge = 1 << 63;
    let mut vm = on.paused(1);
    for clock in Clock::BOTH {
        let [ctl, cnt, cval] = clock.registers();
        for (count, compare) in [
            (0, 0),
            (9, 10),
            (10, 10),
            (11, 10),
            (10, 9),
            (u64::MAX, 1),
            (1, u64::MAX),
            (0, u64::MAX),
            (u64::MAX, 0),
            (u64::MAX, u64::MAX),
            (edge, edge - 1),
            (edge - 1, edge),
        ] {
            for control in 0..8 {
                vm.set(0, &[(cnt, count), (cval, compare), (ctl, control)]);
                let met = control & 1 != 0 && count >= compare;
                assert_eq!(vm.get_one(0, ctl), control & 3 | u64::from(met) << 2);
            }
        }
    }
}

fn istatus_comes_with_the_passing_of_time_and_a_write_of_it_is_dropped(on: World) {
    let mut vm = on.running(1);
    vm.arm(0, Clock::Virtual, 7, 10);
    assert_eq!(vm.get_one(0, CTL), 3);
    vm.pass(9);
    assert_eq!(vm.get_one(0, CTL), 3);
    vm.pass(1);
    assert_eq!(vm.get_one(0, CTL), 7);
}

fn registers_are_each_vcpus_own_apart_from_the_counts(on: World) {
    let mut vm = on.paused(3);
    vm.set(0, &[(PCNT, 0)]);
    let of = |n: u64| {
        [
            (CVAL, 100 + n),
            (PCVAL, u64::MAX - n),
            (CTL, n),
            (PCTL, 3 - n),
        ]
    };
    for vcpu in 0..3 {
        vm.set(vcpu, &of(vcpu.into()));
    }
    for vcpu in 0..3 {
        for (id, value) in of(vcpu.into()) {
            assert_eq!(vm.get_one(vcpu, id), value);
        }
        let n = u64::from(vcpu);
        assert_eq!(
            vm.get(vcpu, &[PCVAL, CTL, CVAL, PCTL]),
            [u64::MAX - n, n, 100 + n, 3 - n],
            "in the order asked for"
        );
    }
}

fn a_register_can_be_read_twice_and_in_any_order_in_one_request(on: World) {
    let mut vm = on.running(1);
    vm.pass(33);
    vm.reads_now(Clock::Virtual, |vm| {
        let values = vm.get(0, &[PCVAL, CNT, CNT, CTL, CNT]);
        let count = values[1];
        assert!(count >= 33);
        assert_eq!(values, [0, count, count, 0, count]);
        count
    });
    vm.set(0, &[(CVAL, 1)]);
    assert_eq!(vm.get(0, &[CVAL, CVAL]), [1, 1]);
}

fn a_list_without_entries_is_fine(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 1);
        assert!(vm.get(0, &[]).is_empty());
        let before = vm.snapshot();
        assert_eq!(vm.set(0, &[]), (0, 0));
        assert_eq!(vm.snapshot(), before);
    }
}

fn more_registers_than_there_are_can_be_asked_for_at_once(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(CVAL, 17)]);
    let answer = vm.vcpu(op::GET_REGS, 0, &words(&[CVAL; 400]));
    let values = answer.ok(6_400).chunks(16).map(|entry| u64_at(entry, 8));
    assert_eq!(values.filter(|value| *value == 17).count(), 400);
    vm.vcpu(op::SET_REGS, 0, &regs_body(&[(CVAL, 18); 400]))
        .ok(8);
    assert_eq!(vm.get_one(0, CVAL), 18);
}

fn a_count_write_in_paused_freezes_that_clock_at_the_value_for_every_vcpu(on: World) {
    let mut vm = on.running(3);
    vm.pass(50);
    vm.pause_counting();
    for (writer, value) in [(2, 7), (0, 5), (1, 6), (0, u64::MAX), (1, 7)] {
        vm.set(writer, &[(CNT, value)]);
        vm.pass(100);
        for vcpu in 0..3 {
            assert_eq!(vm.get_one(vcpu, CNT), value);
        }
    }
    assert_eq!(vm.resume().virt_count, 7);
    vm.pass(3);
    let count = vm.reads_now(Clock::Virtual, |vm| vm.get_one(0, CNT));
    assert!(count >= 10);
}

fn a_count_write_in_running_is_ebusy_even_of_the_very_count(on: World) {
    for virtualised in [false, true] {
        let mut vm = on.paused(1);
        if virtualised {
            vm.set(0, &[(PCNT, 1)]);
        }
        vm.resume();
        vm.pass(50);
        let before = vm.snapshot();
        for register in [CNT, PCNT] {
            let now = vm.get_one(0, register);
            for value in [0, 1, now] {
                let set = vm.set_refused(0, &[(CVAL, 5), (register, value), (CTL, 1)]);
                assert_eq!(set, (status::EBUSY, phase::RUNNING));
            }
        }
        if vm.model().is_none() {
            assert_eq!(vm.snapshot(), before);
        }
        assert_eq!(vm.get(0, &[CTL, CVAL]), [0, 0]);
        vm.set(0, &[(CVAL, 5), (CTL, 3)]);
        assert_eq!(vm.get(0, &[CTL, CVAL]), [7, 5]);
    }
    // A refusal changes nothing at all: here no count is read in between.
    let mut vm = on.running(1);
    vm.pass(50);
    let before = vm.snapshot();
    let now = vm.virt();
    for register in [CNT, PCNT] {
        for value in [0, now] {
            vm.set_refused(0, &[(CVAL, 5), (register, value)]);
        }
    }
    assert_eq!(vm.snapshot(), before);
}

fn control_and_cval_can_be_written_in_every_phase_but_new(on: World) {
    let values = [(CTL, 2), (CVAL, 5), (PCTL, 1), (PCVAL, u64::MAX)];
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 1);
        vm.set(0, &values);
        for (register, value) in values {
            assert_eq!(vm.get_one(0, register), value, "{register:#x} in {wanted}");
        }
    }
    let mut vm = on.fresh();
    assert_eq!(vm.set_refused(0, &values), (status::EBUSY, phase::NEW));
}

fn in_restoring_a_vcpu_that_is_done_takes_no_more_writes_and_the_others_do(on: World) {
    let mut vm = on.restoring(2, 0);
    vm.bring(0, 1);
    vm.set(0, &[(CTL, 1), (CVAL, 9)]);
    vm.restore_done(0);
    let before = vm.snapshot();
    for register in ALL {
        assert_eq!(vm.set_refused(0, &[(register, 1)]), (status::EBUSY, 1));
    }
    // Without an entry too: this shows which vCPUs are missing.
    assert_eq!(vm.set_refused(0, &[]), (status::EBUSY, 1));
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.set(1, &[]), (0, 0));
    vm.set(1, &[(CTL, 1), (CVAL, 3)]);
    assert_eq!(vm.get_one(0, CVAL), 9);
}

fn one_register_named_twice_must_have_one_value(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(CVAL, 4), (CTL, 1), (CVAL, 4)]);
    assert_eq!(vm.get_one(0, CVAL), 4);
    let before = vm.snapshot();
    let set = vm.set_refused(0, &[(CTL, 0), (CVAL, 6), (CVAL, 7)]);
    assert_eq!(set, (status::EINVAL, 2));
    assert_eq!(vm.snapshot(), before);
}

fn lines_are_those_of_the_vcpu_after_the_write(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 2);
        let cases: [(&[(u64, u64)], u32); 6] = [
            (&[(CTL, 1)], 0b01),
            (&[(PCTL, 1)], 0b11),
            (&[], 0b11),
            (&[(CVAL, u64::MAX)], 0b10),
            (&[(PCTL, 3)], 0),
            (&[(PCTL, 1), (PCVAL, u64::MAX)], 0),
        ];
        for (values, lines) in cases {
            assert_eq!(vm.set(0, values), (lines, 0), "{values:?} in {wanted}");
        }
        assert_eq!(vm.set(1, &[]).0, 0, "another vCPU's are its own");
    }
}

fn a_line_is_high_where_enable_is_set_imask_is_not_and_the_count_is_at_or_past_cval(on: World) {
    let mut vm = on.paused(2);
    vm.set(0, &[(CNT, 100), (PCNT, 100)]);
    for (virt, phys) in [(0, 0), (1, 0), (0, 1), (1, 1), (3, 1), (1, 3), (2, 2)] {
        for (cval, pcval) in [(100, 100), (101, 100), (100, 101), (0, u64::MAX)] {
            let entries = [(CTL, virt), (PCTL, phys), (CVAL, cval), (PCVAL, pcval)];
            let lines =
                u32::from(virt == 1 && cval <= 100) | u32::from(phys == 1 && pcval <= 100) << 1;
            assert_eq!(vm.set(0, &entries), (lines, 0));
            assert_eq!(vm.set(0, &[]), (lines, 0));
        }
    }
    assert_eq!(vm.set(1, &[]), (0, 0));
}

fn entries_of_one_request_leave_no_expiry_between_them(on: World) {
    // Whichever came first, an expiry between the two would show.
    let mut vm = on.paused(1);
    assert_eq!(vm.set(0, &[(CTL, 1), (CVAL, 100), (CNT, 100)]).0, 1);
    assert_eq!(vm.set(0, &[(CNT, 50), (CVAL, 51)]).0, 0);
    assert_eq!(vm.exact().ticks_to_next(), None);
    assert_eq!(vm.fired(), []);
}

fn permutations(entries: &[(u64, u64)], each: &mut impl FnMut(&[(u64, u64)])) {
    fn go(entries: &mut [(u64, u64)], fixed: usize, each: &mut impl FnMut(&[(u64, u64)])) {
        if fixed == entries.len() {
            return each(entries);
        }
        for i in fixed..entries.len() {
            entries.swap(fixed, i);
            go(entries, fixed + 1, each);
            entries.swap(fixed, i);
        }
    }
    go(&mut entries.to_vec(), 0, each);
}

fn entries_of_one_request_take_effect_together_in_any_order(on: World) {
    let values = [
        (CTL, 1),
        (CNT, 500),
        (CVAL, 400),
        (PCTL, 1),
        (PCNT, 300),
        (PCVAL, 350),
    ];
    let others = [
        (CTL, 3),
        (CNT, 1),
        (CVAL, 2),
        (PCTL, 2),
        (PCNT, 9),
        (PCVAL, 1),
    ];
    let mut vm = on.paused(2);
    let mut orders = 0;
    permutations(&values, &mut |entries| {
        vm.set(0, &others);
        assert_eq!(vm.set(0, entries), (1, 0));
        assert_eq!(vm.get_all(0), [5, 500, 400, 1, 300, 350]);
        orders += 1;
    });
    assert_eq!(orders, 720);
}

fn in_a_restore_the_order_of_requests_does_not_matter_either(on: World) {
    let values = [(CTL, 1), (CNT, 500), (CVAL, 400)];
    let mut vm = on.paused(2);
    permutations(&values, &mut |entries| {
        vm.restore_begin(2, 0);
        for vcpu in [1, 0] {
            for entry in entries {
                vm.set(vcpu, &[*entry]);
            }
        }
        for vcpu in 0..2 {
            vm.restore_done(vcpu);
            assert_eq!(vm.get_one(vcpu, CVAL), 400);
        }
        assert_eq!(vm.get(1, &[CTL, CNT]), [5, 500]);
    });
    // SET_VM is one more way to say it.
    vm.restore_begin(2, 0);
    vm.set_vm(&[0, 1].map(|vcpu| Vcpu::with(vcpu, [1, 500, 400, 0, 0, 0])));
    for vcpu in 0..2 {
        vm.restore_done(vcpu);
    }
    assert_eq!(vm.get(1, &[CTL, CNT, CVAL]), [5, 500, 400]);
}
