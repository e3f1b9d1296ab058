//! The timer registers (SPEC.md, "Registers").

use vhost_user_timer_kit::contract::{
    ARM, ARM64, CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, configure_body, op, phase, regs_body,
    restore, status, u64_at, words,
};
use vhost_user_timer_kit::raw_driver::Rig;

fn configured(rig: &Rig, abi: u8) -> Client {
    let mut client = Client::connect(rig);
    client
        .vm(op::CONFIGURE_VM, &configure_body(2, abi, 0))
        .ok(0);
    client
}

#[test]
fn get_reg_list_gives_the_six_ids_of_the_vms_abi() {
    for (abi, ids) in [(0, ARM64), (1, ARM)] {
        let rig = Rig::launch(&[]);
        let mut client = configured(&rig, abi);
        assert_eq!(client.info().abi, abi);
        let answer = client.vcpu(op::GET_REG_LIST, 1, &[]);
        let mut listed: Vec<u64> = answer.ok(48).chunks(8).map(|id| u64_at(id, 0)).collect();
        let mut wanted = ids.to_vec();
        // Their order is not part of the contract, as it is not of KVM's.
        listed.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(listed, wanted);
    }
}

#[test]
fn a_fresh_vcpu_has_its_timers_off() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    assert_eq!(client.get(0, &[CTL, CNT, CVAL, PCTL, PCVAL]), [0; 5]);
}

#[test]
fn on_arm64_timer_cnt_and_timer_cval_are_the_other_way_round() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    // …df1a is the VM's count, though it bears CNTV_CVAL's encoding, and …df02 the compare value.
    client.set(
        0,
        &[(0x6030_0000_0013_df1a, 111), (0x6030_0000_0013_df02, 222)],
    );
    assert_eq!(client.get_one(1, 0x6030_0000_0013_df1a), 111);
    assert_eq!(client.get_one(1, 0x6030_0000_0013_df02), 0);
    assert_eq!(client.state().virt_count, 111);
    assert_eq!(client.state().vcpus[0].registers[2], 222);
    // The physical timer's are the right way round.
    client.set(
        0,
        &[(0x6030_0000_0013_df01, 333), (0x6030_0000_0013_df12, 444)],
    );
    assert_eq!(client.get_one(1, 0x6030_0000_0013_df01), 333);
    assert_eq!(client.state().vcpus[0].registers[5], 444);
}

#[test]
fn registers_are_each_vcpus_own_and_in_the_order_asked_for() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(CVAL, 1), (PCVAL, 2), (CTL, 3), (PCTL, 1), (PCNT, 0)]);
    client.set(1, &[(CVAL, 3), (PCVAL, 4), (CTL, 2), (PCTL, 0)]);
    let ids = [PCVAL, CTL, CVAL, PCTL];
    assert_eq!(client.get(0, &ids), [2, 3, 1, 1]);
    assert_eq!(client.get(1, &ids), [4, 2, 3, 0]);
    // One twice, and none.
    assert_eq!(client.get(0, &[CVAL, CVAL]), [1, 1]);
    assert!(client.get(0, &[]).is_empty());
    assert_eq!(client.set(0, &[]), (0, 0));
}

#[test]
fn the_other_architectures_id_and_a_wrong_size_are_einval() {
    let wrong_size = [
        0x6020_0000_0013_df19,
        0x6000_0000_0013_df02,
        0x4030_0000_000f_7181,
    ];
    for (abi, own, other) in [(0, ARM64, ARM), (1, ARM, ARM64)] {
        let rig = Rig::launch(&[]);
        let mut client = configured(&rig, abi);
        for id in other.into_iter().chain(wrong_size) {
            let get = client.vcpu(op::GET_REGS, 0, &words(&[own[0], own[2], id]));
            assert_eq!(get.outcome(), (status::EINVAL, 2), "{id:#x}");
            let set = client.set_refused(0, &[(own[2], 5), (id, 1)]);
            assert_eq!(set, (status::EINVAL, 1), "{id:#x}");
        }
        assert_eq!(client.get_one(0, own[2]), 0);
    }
}

#[test]
fn any_other_id_is_enoent_with_its_index() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    for id in [0, 1, u64::MAX, 0x6030_0000_0013_df1f, 0x6030_0000_0013_e703] {
        let get = client.vcpu(op::GET_REGS, 0, &words(&[CTL, id, CVAL]));
        assert_eq!(get.outcome(), (status::ENOENT, 1), "{id:#x}");
        let set = client.set_refused(0, &[(CVAL, 5), (CTL, 1), (CNT, 1), (id, 1)]);
        assert_eq!(set, (status::ENOENT, 3), "{id:#x}");
    }
    assert_eq!(client.get(0, &[CTL, CNT, CVAL]), [0, 0, 0]);
}

#[test]
fn a_u32_register_given_more_than_32_bits_is_einval() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for ctl in [ARM[0], ARM[3]] {
        for value in [1 << 32, u64::MAX] {
            let set = client.set_refused(0, &[(ARM[2], 5), (ctl, value)]);
            assert_eq!(set, (status::EINVAL, 1));
        }
        client.set(0, &[(ctl, u32::MAX.into())]);
        assert_eq!(client.get_one(0, ctl) & 3, 3);
    }
    assert_eq!(client.get_one(0, ARM[2]), 0);
    // On arm64 every register is a U64.
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(CTL, u64::MAX)]);
}

#[test]
fn of_ctl_enable_and_imask_are_stored_and_the_rest_is_dropped() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    // The count is 0 and stays so.
    client.set(0, &[(CNT, 0), (CVAL, 1), (PCNT, 0), (PCVAL, 1)]);
    for ctl in [CTL, PCTL] {
        for value in 0..=0xff {
            client.set(0, &[(ctl, value)]);
            assert_eq!(client.get_one(0, ctl), value & 3, "{value:#x}");
        }
        client.set(0, &[(ctl, u64::MAX)]);
        assert_eq!(client.get_one(0, ctl), 3);
    }
}

#[test]
fn reading_ctl_adds_istatus_which_is_enable_and_count_at_or_past_cval_unsigned() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    let edge = 1 << 63;
    for (ctl, cnt, cval) in [(CTL, CNT, CVAL), (PCTL, PCNT, PCVAL)] {
        for (count, compare) in [
            (10, 9),
            (10, 10),
            (10, 11),
            (0, 0),
            (edge, edge - 1),
            (edge - 1, edge),
            (0, u64::MAX),
            (u64::MAX, 0),
            (u64::MAX, u64::MAX),
        ] {
            for control in 0..4 {
                client.set(0, &[(ctl, control), (cval, compare), (cnt, count)]);
                let status = u64::from(control & 1 == 1 && count >= compare) << 2;
                assert_eq!(client.get_one(0, ctl), control | status);
            }
        }
    }
}

#[test]
fn set_regs_answers_the_lines_as_they_then_stand() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(CNT, 100), (PCNT, 100)]);
    for (virt, phys) in [(0, 0), (1, 0), (0, 1), (1, 1), (3, 1), (1, 3), (2, 2)] {
        for (cval, pcval) in [(100, 100), (101, 100), (100, 101), (0, u64::MAX)] {
            let entries = [(CTL, virt), (PCTL, phys), (CVAL, cval), (PCVAL, pcval)];
            let lines =
                u32::from(virt == 1 && cval <= 100) | u32::from(phys == 1 && pcval <= 100) << 1;
            assert_eq!(client.set(0, &entries), (lines, 0));
        }
    }
    // Those of the vCPU named, whatever the others have.
    assert_eq!(client.set(1, &[]), (0, 0));
}

#[test]
fn a_cnt_write_in_paused_freezes_the_clock_at_the_value_for_all_vcpus() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    for (writer, value) in [(0, 5), (1, 7), (0, 6), (1, u64::MAX)] {
        client.set(writer, &[(CNT, value)]);
        assert_eq!(client.get_one(1 - writer, CNT), value);
    }
}

#[test]
fn a_cnt_write_in_running_is_ebusy_and_nothing_of_its_request_is_done() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(PCNT, 1)]);
    let run = client.resume();
    for count in [CNT, PCNT] {
        let set = client.set_refused(0, &[(CVAL, 5), (count, 1), (CTL, 1)]);
        assert_eq!(set, (status::EBUSY, phase::RUNNING));
    }
    assert_eq!(client.get(0, &[CTL, CVAL]), [0, 0]);
    let info = client.info();
    assert_eq!((info.cntvoff, info.cntpoff), (run.cntvoff, run.cntpoff));
    client.set(0, &[(CVAL, 5), (CTL, 3)]);
    assert_eq!(client.get(0, &[CTL, CVAL]), [7, 5]);
}

#[test]
fn a_cnt_write_in_restoring_is_staged_for_that_vcpu() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(CNT, 50)]);
    client.restore_begin(2, 0);
    client.set(0, &[(CNT, 70)]);
    // The VM's count stands still, whatever a vCPU brought.
    assert_eq!(client.state().virt_count, 50);
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(client.get_one(0, CNT), 50);
}

#[test]
fn ctl_and_cval_can_be_set_in_restoring_until_that_vcpus_restore_done() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.restore_begin(2, 0);
    client.bring(0, 1);
    client.set(0, &[(CTL, 1), (CVAL, 9)]);
    client.restore_done(0);
    for entry in [
        (CTL, 0),
        (CVAL, 1),
        (CNT, 1),
        (PCTL, 1),
        (PCVAL, 1),
        (PCNT, 1),
    ] {
        assert_eq!(client.set_refused(0, &[entry]), (status::EBUSY, 1));
    }
    // The other one's can still be set.
    client.set(1, &[(CTL, 1), (CVAL, 3)]);
    assert_eq!(client.get_one(0, CVAL), 9);
}

#[test]
fn all_entries_take_effect_together_in_any_order() {
    let values = [
        (CTL, 1),
        (CNT, 500),
        (CVAL, 400),
        (PCTL, 1),
        (PCNT, 300),
        (PCVAL, 350),
    ];
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    let all = [CTL, CNT, CVAL, PCTL, PCNT, PCVAL];
    let mut answers = Vec::new();
    permutations(&values, &mut |entries| {
        client.set(
            0,
            &[
                (CTL, 3),
                (CNT, 1),
                (CVAL, 2),
                (PCTL, 2),
                (PCNT, 9),
                (PCVAL, 1),
            ],
        );
        let lines = client.set(0, entries);
        answers.push((lines, client.get(0, &all)));
    });
    assert_eq!(answers.len(), 720);
    let wanted = ((1, 0), vec![5, 500, 400, 1, 300, 350]);
    assert!(answers.iter().all(|answer| *answer == wanted));
}

#[test]
fn in_a_restore_the_order_of_requests_does_not_matter_either() {
    let values = [(CTL, 1), (CNT, 500), (CVAL, 400)];
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    permutations(&values, &mut |entries| {
        client.restore_begin(2, 0);
        for vcpu in [1, 0] {
            for entry in entries {
                client.set(vcpu, &[*entry]);
            }
        }
        for vcpu in 0..2 {
            client.restore_done(vcpu);
            assert_eq!(client.get_one(vcpu, CVAL), 400);
        }
        assert_eq!(client.get(1, &[CTL, CNT]), [5, 500]);
    });
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

#[test]
fn get_then_set_of_the_same_values_changes_nothing_a_thousand_times() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    let all = [CTL, CNT, CVAL, PCTL, PCNT, PCVAL];
    client.set(
        0,
        &[
            (CNT, 5),
            (CTL, 1),
            (CVAL, 9),
            (PCNT, 6),
            (PCTL, 3),
            (PCVAL, 1),
        ],
    );
    let state = client.state().at_rest(true);
    for n in 0..1000 {
        let values = client.get(n % 2, &all);
        let entries: Vec<_> = all.into_iter().zip(values).collect();
        client.set(n % 2, &entries);
    }
    assert_eq!(client.state().at_rest(true), state);
}

#[test]
fn get_then_set_does_not_stop_a_clock_that_counts() {
    // The physical clock passes through, and with KEEP_COUNTING the virtual one counts too.
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    let run = client.resume();
    client.vm(op::PAUSE, &words(&[1])).ok(40);
    for vcpu in [0, 1, 0] {
        let values = client.get(vcpu, &[CNT, PCNT]);
        client.set(vcpu, &[(CNT, values[0]), (PCNT, values[1])]);
        let info = client.info();
        assert_eq!(
            (info.cntvoff, info.cntpoff, info.flags),
            (run.cntvoff, 0, 0)
        );
    }
    // All of them read at one instant by GET_VM, and each written back.
    let state = client.state();
    for vcpu in state.vcpus {
        let entries: Vec<_> = ARM64.into_iter().zip(vcpu.registers).collect();
        client.set(vcpu.vcpu, &entries);
    }
    let info = client.info();
    assert_eq!(
        (info.cntvoff, info.cntpoff, info.flags),
        (run.cntvoff, 0, 0)
    );
}

#[test]
fn get_then_set_in_a_restore_loses_no_time() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.resume();
    let paused = client.pause();
    for n in 0..100 {
        client.restore_begin(2, if n == 99 { restore::AUTORUN } else { 0 });
        for vcpu in [n % 2, 1 - n % 2] {
            let values = client.get(vcpu, &[CTL, CNT, CVAL]);
            client.set(
                vcpu,
                &[(CTL, values[0]), (CNT, values[1]), (CVAL, values[2])],
            );
            if n < 99 || vcpu == n % 2 {
                client.restore_done(vcpu);
            }
        }
        if n < 99 {
            assert_eq!(client.get_one(0, CNT), paused.virt_count);
        }
    }
    let head = client.wait_run(1, 0);
    let done = vhost_user_timer_kit::contract::request(op::RESTORE_DONE, 0, 0, &[]);
    let layout = vhost_user_timer_kit::raw_driver::Layout::plain();
    let done = client.driver.submit(1, &done, 24, &layout);
    let answers = client.all_released(1, &[head, done]);
    let run = vhost_user_timer_kit::contract::Run::of(answers[0].ok(40));
    assert_eq!(run.virt_count, paused.virt_count);
}

#[test]
fn more_registers_than_there_are_can_be_asked_for_at_once() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 0);
    client.set(0, &[(CVAL, 17)]);
    let body = words(&[CVAL; 400]);
    let answer = client.vcpu(op::GET_REGS, 0, &body);
    assert_eq!(
        answer
            .ok(6400)
            .chunks(16)
            .filter(|e| u64_at(e, 8) == 17)
            .count(),
        400
    );
    let same = regs_body(&[(CVAL, 18); 400]);
    client.vcpu(op::SET_REGS, 0, &same).ok(8);
    assert_eq!(client.get_one(0, CVAL), 18);
}
