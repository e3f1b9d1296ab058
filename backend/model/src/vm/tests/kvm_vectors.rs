//! What KVM on arm64 was measured to do (Linux 7.3.4), case by case: where this device does
//! the same, and where it differs on purpose.

use serde_json::Value;
use vhost_user_timer_protocol::wire::{self, restore_flags};
use vhost_user_timer_protocol::{Abi, Register, Status};

use super::rig::{Ask, HZ, Rig};
use crate::vm::Timeline;
use Register::{PtimerCnt, TimerCnt, TimerCtl, TimerCval};

const MEASURED: &str = include_str!("../../../../../tests/data/kvm-arm64-7.3.4.jsonl");

/// All measurements of one case, at least one.
fn measured(case: &str) -> Vec<Value> {
    let all = MEASURED
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_case: Vec<_> = all.filter(|value| value["case"] == case).collect();
    assert!(!of_case.is_empty(), "no {case}");
    of_case
}

/// A number, or a string in hexadecimal.
fn number(value: &Value) -> u64 {
    match value {
        Value::String(hex) => u64::from_str_radix(hex.trim_start_matches("0x"), 16).unwrap(),
        other => other.as_u64().unwrap(),
    }
}

/// The registers of a dump, and their values.
fn dump(value: &Value) -> [(Register, u64); 6] {
    Register::ALL.map(|register| (register, number(&value["regs"][register.name()]["value"])))
}

#[test]
fn the_frequency_of_these_measurements_is_the_rigs() {
    assert_eq!(number(&measured("host")[0]["cntfrq"]), HZ);
}

#[test]
fn every_register_has_the_id_that_kvm_gives_it() {
    for case in ["fresh", "armed"] {
        for value in measured(case) {
            for register in Register::ALL {
                let id = number(&value["regs"][register.name()]["id"]);
                assert_eq!(register.id(Abi::Arm64), id);
                assert_eq!(Register::from_id(id, Abi::Arm64), Ok(register));
            }
        }
    }
}

#[test]
fn the_register_list_has_kvms_six_whatever_their_order() {
    let list = measured("reg_list_timer_order");
    let names = list[0]["ids"].as_array().unwrap();
    let mut kvm: Vec<u64> = names
        .iter()
        .map(|name| Register::from_name(name.as_str().unwrap()).unwrap())
        .map(|register| register.id(Abi::Arm64))
        .collect();
    let ids: [[u8; 8]; 6] = Rig::paused(1).done(&Ask::get_reg_list(0)).read();
    let mut ids = ids.map(u64::from_le_bytes).to_vec();
    kvm.sort_unstable();
    ids.sort_unstable();
    assert_eq!(ids, kvm);
}

#[test]
fn a_fresh_vcpu_reads_as_in_kvm() {
    for value in measured("fresh") {
        let mut rig = Rig::paused(4);
        rig.now.host = number(&value["host_before"]);
        let vcpu = number(&value["vcpu"]) as u32;
        for ((register, kvm), (_, ours)) in dump(&value).into_iter().zip(rig.get_all(vcpu)) {
            match register {
                // KVM's virtual clock counts from the VM's creation; ours from RESUME.
                TimerCnt => assert_eq!(ours, 0),
                // Passed through: between the host counter before and after.
                PtimerCnt => {
                    assert_eq!(ours, rig.now.host);
                    assert!(ours <= kvm && kvm <= number(&value["host_after"]));
                }
                _ => assert_eq!(ours, kvm, "{register}"),
            }
        }
    }
}

#[test]
fn control_keeps_the_bits_that_kvm_keeps_among_the_two_it_stores() {
    for value in measured("ctl_write") {
        let (wrote, kvm) = (number(&value["wrote"]), number(&value["read"]));
        // KVM drops ISTATUS and stores the rest.
        assert_eq!(kvm, wrote & !4);
        let due = value["cval"] == "0";
        let mut rig = Rig::paused(1);
        let cval = if due { 0 } else { u64::MAX };
        rig.set(0, &[(TimerCval, cval), (TimerCtl, wrote)]);
        // We store ENABLE and IMASK, and compute ISTATUS when read.
        let istatus = if due && wrote & 1 != 0 { 4 } else { 0 };
        assert_eq!(rig.get(0, TimerCtl), kvm & 3 | istatus);
    }
}

#[test]
fn a_compare_value_reads_back_as_written() {
    for value in measured("cval_roundtrip") {
        let wrote = number(&value["wrote"]);
        assert_eq!(number(&value["read"]), wrote);
        let mut rig = Rig::paused(1);
        for register in [TimerCval, Register::PtimerCval] {
            rig.set(0, &[(register, wrote)]);
            assert_eq!(rig.get(0, register), wrote);
        }
    }
}

#[test]
fn a_count_goes_on_from_what_was_written_once_the_vm_runs() {
    for (case, register) in [("cnt_set_get", TimerCnt), ("pcnt_set_get", PtimerCnt)] {
        for value in measured(case) {
            let wrote = number(&value["wrote"]);
            let mut rig = Rig::paused(1);
            rig.set(0, &[(register, wrote)]);
            rig.pass(HZ);
            assert_eq!(rig.get(0, register), wrote, "exactly, while PAUSED");
            rig.resume();
            // As much as passed before KVM read back.
            rig.pass(number(&value["advance"]));
            assert_eq!(rig.get(0, register), number(&value["read"]));
        }
    }
}

#[test]
fn bad_ids_are_refused_as_kvm_refuses_them_but_for_a_wrong_size() {
    for value in measured("bad_id") {
        let id = number(&value["id"]);
        let errno = -value["rc_get"].as_i64().unwrap();
        assert_eq!(value["rc_get"], value["rc_set"]);
        let expected = match id {
            // TIMER_CTL as a U32: ENOENT in KVM, EINVAL here.
            0x6020_0000_0013_df19 => Status::Invalid,
            _ => Status::from(errno as u32),
        };
        let mut rig = Rig::paused(1);
        let got = rig.refused(&Ask::get_ids(0, &[id]));
        let set = rig.refused(&Ask::set_ids(0, &[(id, 0)]));
        assert_eq!((got, set), ((expected, 0), (expected, 0)), "{id:#x}");
    }
}

#[test]
fn an_armed_vcpu_is_saved_and_restored_as_it_was() {
    let dumps = measured("armed");
    let mut rig = Rig::restoring(dumps.len() as u32, 0);
    let mut counts = (0, 0);
    for value in &dumps {
        let vcpu = number(&value["vcpu"]) as u32;
        let registers = dump(value);
        rig.set(vcpu, &registers);
        for ((register, kvm), (_, ours)) in registers.into_iter().zip(rig.get_all(vcpu)) {
            // From 6.18 KVM reads the stored control; ISTATUS is ours.
            assert_eq!(ours & !4, kvm & !4, "{register}");
        }
        counts = (counts.0.max(registers[1].1), counts.1.max(registers[4].1));
    }
    for vcpu in 0..dumps.len() as u32 {
        rig.restored(vcpu);
    }
    assert_eq!((rig.virt(), rig.phys()), counts);
    rig.resume();
    assert_eq!(rig.fired(), [], "none was due");
    let first = number(&dumps[0]["regs"]["TIMER_CVAL"]["value"]);
    rig.pass(first - counts.0);
    assert_eq!(rig.fired(), [(0, Timeline::Virtual)]);
}

#[test]
fn an_offset_is_taken_as_in_kvm_negative_ones_too() {
    let set = &measured("set_counter_offset")[0];
    assert_eq!((number(&set["rc"]), number(&set["cnt_in_window"])), (0, 1));
    assert_eq!(measured("offset_negative")[0]["in_window"], 1);
    let offset = number(&set["offset"]);
    for offset in [offset, offset.wrapping_neg()] {
        let mut rig = Rig::paused(1);
        rig.done(&Ask::set_offset(offset));
        rig.pass(HZ);
        let count = rig.now.host.wrapping_sub(offset);
        assert_eq!(rig.get(0, TimerCnt), count);
        assert_eq!(rig.get(0, PtimerCnt), count);
    }
}

#[test]
fn a_count_written_after_the_offset_is_ignored_but_not_in_silence() {
    assert_eq!(measured("cnt_after_offset")[0]["ignored"], 1);
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(12_345));
    assert_eq!(rig.set(0, &[(TimerCnt, 1)]).ignored.get(), 1);
    assert_eq!(rig.virt(), rig.now.host - 12_345);
}

#[test]
fn an_offset_with_something_reserved_is_einval_as_in_kvm() {
    let errno = -measured("offset_reserved_nonzero")[0]["rc"]
        .as_i64()
        .unwrap();
    let mut ask = Ask::set_offset(12_345);
    ask.body[8] = 1;
    let verdict = Rig::paused(1).refused(&ask);
    assert_eq!(verdict, (Status::from(errno as u32), 0));
}

#[test]
fn a_late_vcpu_leaves_the_offset_alone() {
    assert_eq!(measured("late_vcpu_keeps_offset")[0]["ok"], 1);
    let mut rig = Rig::restoring(2, restore_flags::AUTORUN);
    rig.done(&Ask::set_offset(777));
    for vcpu in 0..2 {
        rig.pass(HZ);
        rig.bring(vcpu, 0);
        rig.restored(vcpu);
        assert_eq!(rig.offset(Timeline::Virtual), 777);
    }
}

#[test]
fn a_late_vcpu_clobbers_the_count_in_kvm_and_not_here() {
    let clobbered = &measured("late_vcpu_clobbers_cnt")[0];
    assert_eq!(clobbered["clobbered"], 1);
    let mut rig = Rig::restoring(2, restore_flags::AUTORUN);
    rig.bring(0, 4_000_000_000);
    rig.restored(0);
    rig.pass(HZ);
    rig.bring(1, number(&clobbered["cnt_after"]));
    rig.restored(1);
    assert_eq!(rig.virt(), 4_000_000_000);
}

#[test]
fn of_skewed_counts_the_last_wins_in_kvm_and_the_largest_in_a_restore_here() {
    let writes: Vec<(u32, u64)> = measured("set_cnt")
        .iter()
        .map(|write| (number(&write["vcpu"]) as u32, number(&write["value"])))
        .collect();
    let largest = 4_000_000_000;
    for after in measured("after_skewed_cnt") {
        assert!(number(&after["regs"]["TIMER_CNT"]["value"]) >= largest);
    }
    let forwards = writes.clone();
    let backwards: Vec<_> = writes.into_iter().rev().collect();
    for writes in [&forwards, &backwards] {
        let mut rig = Rig::restoring(4, 0);
        for &(vcpu, count) in writes {
            rig.bring(vcpu, count);
            rig.restored(vcpu);
        }
        assert_eq!(rig.virt(), largest);
    }
    // Outside a restore a written count is the VM's at once, so the last one wins.
    for writes in [&forwards, &backwards] {
        let mut rig = Rig::paused(4);
        for &(vcpu, count) in writes {
            rig.set(vcpu, &[(TimerCnt, count)]);
            for vcpu in 0..4 {
                assert_eq!(rig.get(vcpu, TimerCnt), count);
            }
        }
    }
}

#[test]
fn a_thousand_gets_and_sets_lose_time_in_kvm_and_none_here() {
    let drift = &measured("get_set_drift_1000")[0];
    assert!(number(&drift["lost"]) > 20_000_000);
    let step = number(&drift["host_elapsed"]) / 1_000;

    let pauses: [fn(&mut Rig) -> wire::Run; 2] = [Rig::pause, Rig::pause_counting];
    for pause in pauses {
        for virtualised in [false, true] {
            let mut rig = Rig::paused(3);
            if virtualised {
                rig.set(0, &[(PtimerCnt, 5_000)]);
            }
            for vcpu in 0..3 {
                rig.arm(vcpu, Timeline::Virtual, 1, 20 * HZ + u64::from(vcpu));
                rig.arm(vcpu, Timeline::Physical, 3, u64::MAX);
            }
            rig.resume();
            rig.pass(HZ);
            pause(&mut rig);
            let mut twin = rig.clone();
            for _ in 0..1_000 {
                for vcpu in 0..3 {
                    let values = rig.get_all(vcpu);
                    rig.pass(step / 3);
                    twin.pass(step / 3);
                    rig.set(vcpu, &values);
                }
            }
            for vcpu in 0..3 {
                assert_eq!(rig.get_all(vcpu), twin.get_all(vcpu));
            }
            assert_eq!(rig.info(), twin.info());
            assert_eq!(rig.resume(), twin.resume());
            rig.pass(HZ);
            twin.pass(HZ);
            assert_eq!(rig.info(), twin.info());
            assert_eq!(
                rig.vm.ticks_to_next(rig.now),
                twin.vm.ticks_to_next(twin.now)
            );
        }
    }
}
