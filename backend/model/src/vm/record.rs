//! The VM as records of fixed size, for a state file: one for the VM and one per vCPU.
//!
//! Records that are read are not trusted: [`Vm::from_records`] makes a VM of them or says what is
//! wrong. They leave out what belongs to a connection: waiters, pending events, and the counts that
//! were reported to vCPUs.
//!
//! A record has a value for each register of an ABI with two timelines; the count of a vCPU is in
//! it only while a restore is open.

use alloc::boxed::Box;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::{Abi, Phase};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::clock::{ByTimeline, Clock, Now};
use super::configured::{Configured, Open, State};
use super::flags::VmFlags;
use super::model::{MAX_FREQUENCY, Profile, Vm};
use super::restore::{Restore, Staged, Terms};
use super::timer::{Timer, Timers};
use super::vcpu::Vcpu;

/// The records are not those of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record has no valid {0}")]
pub struct BadRecord(&'static str);

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ConfiguredRecord {
    frequency: u64,
    /// Counts where frozen, offsets where not.
    clocks: ByTimeline<u64>,
    anchor: [u64; 2],
    vcpus: u32,
    abi: u8,
    frozen: ByTimeline<u8>,
    /// [`flag`] bits.
    flags: u8,
}

mod flag {
    pub(super) const PINNED: u8 = 1 << 0;
    pub(super) const PHYS_VIRTUALISED: u8 = 1 << 1;
    pub(super) const ANCHORED: u8 = 1 << 2;
    pub(super) const CONFIRM: u8 = 1 << 3;
    pub(super) const ONE_OFFSET: u8 = 1 << 4;
    pub(super) const ALL: u8 = PINNED | PHYS_VIRTUALISED | ANCHORED | CONFIRM | ONE_OFFSET;
}

/// One number and not bytes: state files of version 2 have the first bit alone, as a `u16` in the
/// host's byte order.
mod restore_bit {
    pub(super) const HAS_TIMEOUT: u16 = 1 << 0;
    /// ARMED by this restore, which can still be aborted.
    pub(super) const ARMED: u16 = 1 << 8;
}

/// The VM's own part.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VmRecord {
    epoch: u64,
    current: ConfiguredRecord,
    before: ConfiguredRecord,
    saved_realtime_ns: u64,
    began: u64,
    timeout: u64,
    restore_flags: u32,
    /// [`Phase`](vhost_user_timer_protocol::Phase) code.
    phase: u16,
    /// [`restore_bit`]s.
    restore_bits: u16,
}

impl VmRecord {
    /// How many vCPUs' records belong to it.
    pub fn vcpus(&self) -> u32 {
        match Phase::from_code(self.phase.into()) {
            Some(Phase::New) => 0,
            // Armed by RESUME there is no VM from before a restore; its record is zero.
            Some(Phase::Restoring | Phase::Armed) => self.current.vcpus.max(self.before.vcpus),
            _ => self.current.vcpus,
        }
    }
}

/// One vCPU's part.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuRecord {
    /// Compare values: now, and before the restore.
    cval: ByTimeline<u64>,
    before_cval: ByTimeline<u64>,
    staged_counts: ByTimeline<u64>,
    staged_present: u32,
    /// Controls, one byte each: now, and before the restore.
    control: ByTimeline<u8>,
    before_control: ByTimeline<u8>,
    done: u32,
    reserved: u32,
}

fn split(timers: &Timers) -> (ByTimeline<u64>, ByTimeline<u8>) {
    (
        timers.map(|timer| timer.cval),
        timers.map(Timer::stored_control),
    )
}

fn join(cval: ByTimeline<u64>, control: ByTimeline<u8>) -> Timers {
    core::array::from_fn(|index| Timer::new(control[index].into(), cval[index]))
}

impl From<&Configured> for ConfiguredRecord {
    fn from(configured: &Configured) -> Self {
        let mut record = ConfiguredRecord {
            frequency: configured.frequency,
            vcpus: configured.vcpus(),
            abi: configured.abi.code(),
            ..Default::default()
        };
        for (index, clock) in configured.clocks.iter().enumerate() {
            (record.frozen[index], record.clocks[index]) = match *clock {
                Clock::Counting { offset } => (0, offset),
                Clock::Frozen { count } => (1, count),
            };
        }
        for (set, bit) in [
            (configured.pinned, flag::PINNED),
            (configured.phys_virtualised, flag::PHYS_VIRTUALISED),
            (configured.anchor.is_some(), flag::ANCHORED),
            (configured.flags.confirm, flag::CONFIRM),
            (configured.flags.one_offset, flag::ONE_OFFSET),
        ] {
            record.flags |= if set { bit } else { 0 };
        }
        if let Some(anchor) = configured.anchor {
            record.anchor = [anchor.monotonic_ns, anchor.count];
        }
        record
    }
}

impl ConfiguredRecord {
    /// The VM of this record, in PAUSED.
    fn configured(
        &self,
        max_vcpus: u32,
        timers: impl FnMut(u32) -> Timers,
    ) -> Result<Configured, BadRecord> {
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
        let has = |bit| self.flags & bit != 0;
        let flags = VmFlags {
            confirm: has(flag::CONFIRM),
            one_offset: has(flag::ONE_OFFSET),
        };
        let mut configured = Configured::new(self.vcpus, abi, self.frequency, flags);
        for (index, clock) in configured.clocks.iter_mut().enumerate() {
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
        let [virt, phys] = configured.clocks;
        if flags.one_offset && (virt != phys || !has(flag::PHYS_VIRTUALISED)) {
            return Err(BadRecord("physical clock"));
        }
        configured.pinned = has(flag::PINNED);
        configured.phys_virtualised = has(flag::PHYS_VIRTUALISED);
        configured.anchor = has(flag::ANCHORED).then_some(Anchor {
            monotonic_ns: self.anchor[0],
            count: self.anchor[1],
        });
        configured.vcpus = (0..self.vcpus).map(timers).map(Vcpu::with_timers).collect();
        Ok(configured)
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
        if let Some(configured) = &self.configured {
            record.current = configured.into();
            if matches!(configured.state, State::Armed(Some(_))) {
                record.restore_bits |= restore_bit::ARMED;
            }
            if let Some(Open { restore, before }) = configured.open() {
                record.before = before.as_ref().into();
                record.saved_realtime_ns = restore.terms.saved_realtime_ns;
                record.began = restore.terms.began;
                record.restore_flags = restore.terms.flags;
                if restore.terms.timeout.is_some() {
                    record.restore_bits |= restore_bit::HAS_TIMEOUT;
                }
                record.timeout = restore.terms.timeout.unwrap_or(0);
            }
        }
        record
    }

    /// How many vCPUs have something to record.
    pub fn vcpu_records(&self) -> u32 {
        let configured = self.configured.as_ref();
        let before = configured
            .and_then(Configured::open)
            .map(|open| open.before.vcpus());
        configured.map(Configured::vcpus).max(before).unwrap_or(0)
    }

    /// One vCPU's record.
    pub fn vcpu_record(&self, vcpu: u32) -> VcpuRecord {
        let mut record = VcpuRecord::default();
        let Some(configured) = &self.configured else {
            return record;
        };
        let index = vcpu as usize;
        if let Some(vcpu) = configured.vcpus.get(index) {
            (record.cval, record.control) = split(&vcpu.timers);
        }
        if let Some(Open { restore, before }) = configured.open() {
            if let Some(vcpu) = before.vcpus.get(index) {
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

    /// The VM of these records. If it runs, every line that is high at `host` is reported: what
    /// fell due meanwhile, and what may have been reported to nobody.
    ///
    /// # Errors
    ///
    /// [`BadRecord`] unless they are those of a VM that this profile allows.
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
        let phase = Phase::from_code(record.phase.into()).ok_or(BadRecord("phase"))?;
        if phase == Phase::New {
            return Ok(vm);
        }
        let mut configured = record.current.configured(max, current)?;
        let armed = phase == Phase::Armed;
        let by_restore = armed && record.restore_bits & restore_bit::ARMED != 0;
        if armed && !configured.flags.confirm {
            return Err(BadRecord("phase"));
        }
        if phase == Phase::Restoring || by_restore {
            let before = record.before.configured(max, |index| {
                join(vcpu(index).before_cval, vcpu(index).before_control)
            })?;
            let staged = (0..configured.vcpus())
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
                timeout: (record.restore_bits & restore_bit::HAS_TIMEOUT != 0)
                    .then_some(record.timeout),
            };
            let restore = Restore::open(terms, staged);
            let open = Open {
                before: Box::new(before),
                restore,
            };
            configured.state = match (by_restore, open.restore.remaining()) {
                (true, 0) => State::Armed(Some(open)),
                (true, _) => return Err(BadRecord("restore, though the VM is armed by one")),
                (false, 0) => return Err(BadRecord("missing vCPU, though the restore is open")),
                (false, _) => State::Restoring(open),
            };
        } else if armed {
            configured.state = State::Armed(None);
        }
        vm.configured = Some(configured);
        if phase == Phase::Running {
            let now = host(&vm);
            vm.configured
                .iter_mut()
                .for_each(|configured| configured.start_running(now.host));
        }
        Ok(vm)
    }
}
