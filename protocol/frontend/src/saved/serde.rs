//! A saved VM in a format of the VMM's choice: registers by name, so that a person can read it.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use ::serde::de::Error as _;
use ::serde::{Deserialize, Deserializer, Serialize, Serializer};
use vhost_user_timer_protocol::{Abi, Register};

use super::{SavedVcpu, SavedVm};

#[derive(Serialize, Deserialize)]
#[serde(rename = "SavedVm")]
struct VmForm<Vcpus> {
    /// The ABI's code on the wire.
    abi: u8,
    frequency: NonZeroU64,
    realtime_ns: u64,
    virt_count: u64,
    phys_count: u64,
    vcpus: Vcpus,
}

#[derive(Serialize, Deserialize)]
#[serde(rename = "SavedVcpu")]
struct VcpuForm<Name: Ord> {
    index: u32,
    /// By name, as SPEC.md writes it; those that are known.
    registers: BTreeMap<Name, u64>,
}

impl Serialize for SavedVm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let form = VmForm {
            abi: self.abi.code(),
            frequency: self.frequency,
            realtime_ns: self.realtime_ns,
            virt_count: self.virt_count,
            phys_count: self.phys_count,
            vcpus: self.vcpus(),
        };
        form.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SavedVm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = VmForm::<Vec<SavedVcpu>>::deserialize(deserializer)?;
        let abi = Abi::from_code(form.abi)
            .ok_or(super::SavedVmError::Abi(form.abi.into()))
            .map_err(D::Error::custom)?;
        SavedVm {
            abi,
            frequency: form.frequency,
            realtime_ns: form.realtime_ns,
            virt_count: form.virt_count,
            phys_count: form.phys_count,
            vcpus: form.vcpus,
        }
        .checked()
        .map_err(D::Error::custom)
    }
}

impl Serialize for SavedVcpu {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let known = |register: Register| Some((register.name(), self.get(register)?));
        let form = VcpuForm {
            index: self.index(),
            registers: Register::ALL.into_iter().filter_map(known).collect(),
        };
        form.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SavedVcpu {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = VcpuForm::<String>::deserialize(deserializer)?;
        let mut vcpu = SavedVcpu::new(form.index);
        for (name, value) in form.registers {
            let register = Register::from_name(&name)
                .ok_or_else(|| D::Error::custom(format_args!("no timer register {name}")))?;
            vcpu.set(register, value);
        }
        Ok(vcpu)
    }
}
