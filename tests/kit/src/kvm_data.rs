//! Timer registers recorded on a real KVM/arm64 (Linux 7.3.4), and what KVM did with them.
//!
//! The recording is `tests/data/kvm-arm64-7.3.4.jsonl`, one JSON object a line, each naming its
//! case. Two cases are read here:
//!
//! - `armed`: every vCPU's virtual timer is armed one or two seconds ahead, and its physical
//!   timer is on but masked;
//! - skewed (`set_cnt`, then `after_skewed_cnt`): the vCPUs were given counts seconds apart, and
//!   all of them then read the one written last.

use std::collections::BTreeMap;

use serde::Deserialize;
use vhost_user_timer_frontend::SavedVcpu;
use vhost_user_timer_protocol::Register;

const RECORDING: &str = include_str!("../../data/kvm-arm64-7.3.4.jsonl");

/// The part of the recording that tests use.
#[derive(Clone, Debug)]
pub struct KvmData {
    /// CNTFRQ_EL0 of that machine, Hz.
    pub frequency: u64,
    /// The registers of the `armed` case, by vCPU as recorded.
    pub armed: Vec<SavedVcpu>,
    /// The registers of the skewed case, with the TIMER_CNT that each vCPU was given.
    pub skewed: Vec<SavedVcpu>,
    /// The TIMER_CNT that vCPU 0 read on KVM after all of them were set.
    pub kvm_count_after_skew: u64,
}

#[derive(Deserialize)]
#[serde(tag = "case", rename_all = "snake_case")]
enum Line {
    Host {
        cntfrq: u64,
    },
    SetCnt {
        vcpu: u32,
        value: u64,
    },
    AfterSkewedCnt {
        vcpu: u32,
        regs: Registers,
    },
    Armed {
        vcpu: u32,
        regs: Registers,
    },
    #[serde(other)]
    Other,
}

type Registers = BTreeMap<String, Recorded>;

#[derive(Deserialize)]
struct Recorded {
    value: String,
}

impl KvmData {
    /// Reads the recording, which is part of this program.
    ///
    /// # Panics
    ///
    /// If the recording is not what this module says.
    pub fn recorded() -> Self {
        let mut data = KvmData {
            frequency: 0,
            armed: Vec::new(),
            skewed: Vec::new(),
            kvm_count_after_skew: 0,
        };
        let mut given = BTreeMap::new();
        for line in RECORDING.lines() {
            match serde_json::from_str(line).expect("the recording is JSON by line") {
                Line::Host { cntfrq } => data.frequency = cntfrq,
                Line::SetCnt { vcpu, value } => {
                    given.insert(vcpu, value);
                }
                Line::Armed { vcpu, regs } => data.armed.push(registers(vcpu, &regs)),
                Line::AfterSkewedCnt { vcpu, regs } => {
                    let mut registers = registers(vcpu, &regs);
                    if vcpu == 0 {
                        data.kvm_count_after_skew = value(&registers, Register::TimerCnt);
                    }
                    registers.set(Register::TimerCnt, given[&vcpu]);
                    data.skewed.push(registers);
                }
                Line::Other => {}
            }
        }
        assert!(
            data.frequency > 0 && !data.armed.is_empty() && !data.skewed.is_empty(),
            "the recording lacks a case"
        );
        data
    }

    /// The registers of a VM of this many vCPUs. If there are more than were recorded, the recorded
    /// ones repeat.
    pub fn for_vcpus(recorded: &[SavedVcpu], vcpus: u32) -> Vec<SavedVcpu> {
        (0..vcpus)
            .zip(recorded.iter().cycle())
            .map(|(index, registers)| {
                let known = |register| Some((register, registers.get(register)?));
                let known = Register::ALL.into_iter().filter_map(known);
                known.fold(SavedVcpu::new(index), |vcpu, (register, value)| {
                    vcpu.with(register, value)
                })
            })
            .collect()
    }
}

/// A register that was recorded.
fn value(vcpu: &SavedVcpu, register: Register) -> u64 {
    vcpu.get(register).expect("all six were recorded")
}

fn registers(index: u32, recorded: &Registers) -> SavedVcpu {
    let mut vcpu = SavedVcpu::new(index);
    for (name, Recorded { value }) in recorded {
        let register = Register::from_name(name).expect("the recording names timer registers");
        let digits = value.strip_prefix("0x").unwrap_or(value);
        let value = u64::from_str_radix(digits, 16).expect("the recording's values are hex");
        vcpu.set(register, value);
    }
    vcpu
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_timer_protocol::Abi;
    use vhost_user_timer_protocol::wire::ctl;

    #[test]
    fn armed_timers_are_due_one_and_two_seconds_after_the_recording() {
        let data = KvmData::recorded();
        assert_eq!(data.frequency, 1_000_000_000);
        let ahead = data
            .armed
            .iter()
            .map(|v| value(v, Register::TimerCval) - value(v, Register::TimerCnt));
        let seconds: Vec<_> = ahead
            .map(|ticks| (ticks + 500_000_000) / data.frequency)
            .collect();
        assert_eq!(seconds, [1, 2]);
        for vcpu in &data.armed {
            assert_eq!(vcpu.regs(Abi::Arm64).count(), Register::ALL.len());
            assert_eq!(value(vcpu, Register::TimerCtl), ctl::ENABLE);
            assert_eq!(value(vcpu, Register::PtimerCtl), ctl::ENABLE | ctl::IMASK);
        }
    }

    #[test]
    fn kvm_let_the_last_writer_win() {
        let data = KvmData::recorded();
        let given: Vec<_> = data
            .skewed
            .iter()
            .map(|v| value(v, Register::TimerCnt))
            .collect();
        let seconds = [1, 2, 3, 4].map(|s| s * data.frequency);
        assert_eq!(given, seconds);
        // vCPU 0 was given 1 s.
        assert!(data.kvm_count_after_skew >= seconds[3]);
    }

    #[test]
    fn registers_repeat_beyond_the_recorded_vcpus() {
        let data = KvmData::recorded();
        let vcpus = KvmData::for_vcpus(&data.armed, 5);
        let indices: Vec<_> = vcpus.iter().map(SavedVcpu::index).collect();
        assert_eq!(indices, [0, 1, 2, 3, 4]);
        let cval = |vcpu| value(vcpu, Register::TimerCval);
        assert_eq!(cval(&vcpus[4]), cval(&data.armed[0]));
    }
}
