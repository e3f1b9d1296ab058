//! The VM as records of fixed size, for a state file: one for the VM and one per vCPU.
//!
//! Records that are read are not trusted: [`Vm::from_records`] makes a VM of them or says what is
//! wrong. What only matters to a connection is not in them: waiters, events that are yet to be
//! told, and which counts vCPUs were told.

use alloc::boxed::Box;

use vhost_user_timer_protocol::Abi;
use vhost_user_timer_protocol::counter::Anchor;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::clock::{Clock, Now};
use super::machine::{Machine, State, Vcpu};
use super::restore::{Restore, Staged, Terms};
use super::schedule::Timers;
use super::timer::Timer;
use super::{MAX_FREQUENCY, Profile, Vm};

/// Something in the records that no VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record has no valid {0}")]
pub struct BadRecord(&'static str);

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MachineRecord {
    frequency: u64,
    /// Counts where frozen, offsets where not.
    clocks: [u64; 2],
    anchor: [u64; 2],
    vcpus: u32,
    abi: u8,
    frozen: [u8; 2],
    /// [`flag`] bits.
    flags: u8,
}

mod flag {
    pub(super) const PINNED: u8 = 1 << 0;
    pub(super) const PHYS_VIRTUALISED: u8 = 1 << 1;
    pub(super) const ANCHORED: u8 = 1 << 2;
    pub(super) const ALL: u8 = PINNED | PHYS_VIRTUALISED | ANCHORED;
}

/// The VM's own part.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VmRecord {
    epoch: u64,
    machine: MachineRecord,
    before: MachineRecord,
    saved_realtime_ns: u64,
    began: u64,
    timeout: u64,
    restore_flags: u32,
    /// [`Phase`](vhost_user_timer_protocol::Phase) code.
    phase: u16,
    has_timeout: u16,
}

impl VmRecord {
    /// How many vCPUs' records belong to it.
    pub fn vcpus(&self) -> u32 {
        match self.phase {
            0 => 0,
            3 => self.machine.vcpus.max(self.before.vcpus),
            _ => self.machine.vcpus,
        }
    }
}

/// One vCPU's part.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuRecord {
    /// Compare values: now, and before the restore.
    cval: [u64; 2],
    before_cval: [u64; 2],
    staged_counts: [u64; 2],
    staged_present: u32,
    /// Controls, one byte each: now, and before the restore.
    control: [u8; 2],
    before_control: [u8; 2],
    done: u32,
    reserved: u32,
}

fn split(timers: &Timers) -> ([u64; 2], [u8; 2]) {
    (
        timers.map(|timer| timer.cval),
        timers.map(Timer::stored_control),
    )
}

fn join(cval: [u64; 2], control: [u8; 2]) -> Timers {
    let timer = |index: usize| {
        let mut timer = Timer::default();
        timer.set_control(control[index].into());
        timer.cval = cval[index];
        timer
    };
    [timer(0), timer(1)]
}

impl From<&Machine> for MachineRecord {
    fn from(machine: &Machine) -> Self {
        let mut record = MachineRecord {
            frequency: machine.frequency,
            vcpus: machine.vcpus(),
            abi: machine.abi.code(),
            ..Default::default()
        };
        for (index, clock) in machine.clocks.iter().enumerate() {
            (record.frozen[index], record.clocks[index]) = match *clock {
                Clock::Counting { offset } => (0, offset),
                Clock::Frozen { count } => (1, count),
            };
        }
        for (set, bit) in [
            (machine.pinned, flag::PINNED),
            (machine.phys_virtualised, flag::PHYS_VIRTUALISED),
            (machine.anchor.is_some(), flag::ANCHORED),
        ] {
            record.flags |= if set { bit } else { 0 };
        }
        if let Some(anchor) = machine.anchor {
            record.anchor = [anchor.monotonic_ns, anchor.count];
        }
        record
    }
}

impl MachineRecord {
    /// The machine of this record, in PAUSED.
    fn machine(
        &self,
        max_vcpus: u32,
        timers: impl FnMut(u32) -> Timers,
    ) -> Result<Machine, BadRecord> {
        if !(1..=max_vcpus).contains(&self.vcpus) {
            return Err(BadRecord("number of vCPUs"));
        }
        if !(1..=MAX_FREQUENCY).contains(&self.frequency) {
            return Err(BadRecord("frequency"));
        }
        if self.flags & !flag::ALL != 0 {
            return Err(BadRecord("flags"));
        }
        let abi = Abi::from_code(self.abi).ok_or(BadRecord("ABI"))?;
        let mut machine = Machine::new(self.vcpus, abi, self.frequency);
        for (index, clock) in machine.clocks.iter_mut().enumerate() {
            *clock = match self.frozen[index] {
                0 => Clock::Counting {
                    offset: self.clocks[index],
                },
                1 => Clock::Frozen {
                    count: self.clocks[index],
                },
                _ => return Err(BadRecord("clock")),
            };
        }
        machine.pinned = self.flags & flag::PINNED != 0;
        machine.phys_virtualised = self.flags & flag::PHYS_VIRTUALISED != 0;
        machine.anchor = (self.flags & flag::ANCHORED != 0).then_some(Anchor {
            monotonic_ns: self.anchor[0],
            count: self.anchor[1],
        });
        machine.vcpus = (0..self.vcpus).map(timers).map(Vcpu::with_timers).collect();
        Ok(machine)
    }
}

impl Vm {
    /// The VM's own record.
    pub fn vm_record(&self) -> VmRecord {
        let mut record = VmRecord {
            epoch: self.epoch,
            phase: self.phase().code() as u16,
            ..Default::default()
        };
        if let Some(machine) = &self.machine {
            record.machine = machine.into();
            if let Some(restore) = machine.restoring() {
                record.before = (&*restore.before).into();
                record.saved_realtime_ns = restore.terms.saved_realtime_ns;
                record.began = restore.terms.began;
                record.restore_flags = restore.terms.flags;
                record.has_timeout = restore.terms.timeout.is_some().into();
                record.timeout = restore.terms.timeout.unwrap_or(0);
            }
        }
        record
    }

    /// How many vCPUs have something to record.
    pub fn vcpu_records(&self) -> u32 {
        let machine = self.machine.as_ref();
        let before = machine
            .and_then(Machine::restoring)
            .map(|restore| restore.before.vcpus());
        machine.map(Machine::vcpus).max(before).unwrap_or(0)
    }

    /// One vCPU's record.
    pub fn vcpu_record(&self, vcpu: u32) -> VcpuRecord {
        let mut record = VcpuRecord::default();
        let Some(machine) = &self.machine else {
            return record;
        };
        let index = vcpu as usize;
        if let Some(vcpu) = machine.vcpus.get(index) {
            (record.cval, record.control) = split(&vcpu.timers);
        }
        if let Some(restore) = machine.restoring() {
            if let Some(vcpu) = restore.before.vcpus.get(index) {
                (record.before_cval, record.before_control) = split(&vcpu.timers);
            }
            if let Some(staged) = restore.staged.get(index) {
                record.staged_counts = staged.counts;
                record.staged_present = staged.present;
                record.done = staged.done.into();
            }
        }
        record
    }

    /// The VM of these records. Where it runs, every line that stands high at `host` is to be
    /// told: what fell due meanwhile, and what may have been told to nobody.
    ///
    /// # Errors
    ///
    /// [`BadRecord`] where they are no VM that this profile allows.
    pub fn from_records(
        profile: Profile,
        record: &VmRecord,
        vcpu: impl Fn(u32) -> VcpuRecord,
        host: impl FnOnce(&Vm) -> Now,
    ) -> Result<Self, BadRecord> {
        let mut vm = Vm::new(profile);
        if record.epoch == 0 {
            return Err(BadRecord("epoch"));
        }
        vm.epoch = record.epoch;
        let max = profile.max_vcpus;
        let current = |index| join(vcpu(index).cval, vcpu(index).control);
        let mut machine = match record.phase {
            0 => return Ok(vm),
            1..=3 => record.machine.machine(max, current)?,
            _ => return Err(BadRecord("phase")),
        };
        if record.phase == 3 {
            let before = record.before.machine(max, |index| {
                join(vcpu(index).before_cval, vcpu(index).before_control)
            })?;
            let staged = (0..machine.vcpus())
                .map(|index| {
                    let record = vcpu(index);
                    Staged {
                        present: record.staged_present,
                        done: record.done != 0,
                        counts: record.staged_counts,
                    }
                })
                .collect();
            let terms = Terms {
                flags: record.restore_flags,
                saved_realtime_ns: record.saved_realtime_ns,
                began: record.began,
                timeout: (record.has_timeout != 0).then_some(record.timeout),
            };
            let restore = Restore::open(Box::new(before), terms, staged);
            if restore.remaining() == 0 {
                return Err(BadRecord("missing vCPU, though the restore is open"));
            }
            machine.state = State::Restoring(restore);
        }
        vm.machine = Some(machine);
        if record.phase == 2 {
            let now = host(&vm);
            vm.machine
                .iter_mut()
                .for_each(|machine| machine.go_on(now.host));
        }
        Ok(vm)
    }
}
