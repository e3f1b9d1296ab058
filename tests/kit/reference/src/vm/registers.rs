//! Registers and timers (SPEC.md, section 6).

use super::{Clock, PHYSICAL, Reference};
use crate::contract::{ARM, ARM64, phase, status};

/// Register ids by ABI.
const IDS: [[u64; 6]; 2] = [ARM64, ARM];

/// The top byte of a register id, which names the architecture, by ABI.
const ARCHITECTURE: [u64; 2] = [0x60, 0x40];

/// The bits of a register id that name the register's size.
const SIZE: u64 = 0xf << 52;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Timer {
    pub(super) enable: bool,
    pub(super) imask: bool,
    pub(super) cval: u64,
    /// TIMER_ASSERTED must still report a rise.
    pub(super) to_report: bool,
}

impl Timer {
    pub(super) fn line(&self, count: u64) -> bool {
        self.enable && !self.imask && count >= self.cval
    }
}

/// A count that was reported of a counting clock, and the offset that the clock had.
pub(super) type Told = Option<(u64, u64)>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Vcpu {
    pub(super) timers: [Timer; 2],
    pub(super) told_by_get_regs: [Told; 2],
    pub(super) told_by_get_vm: [Told; 2],
    /// What it has set in the open restore; its counts wait here.
    pub(super) set: [Option<u64>; 6],
    pub(super) done: bool,
}

impl Reference {
    /// The ids of a vCPU's registers.
    pub(super) fn ids(&self) -> [u64; 6] {
        IDS[self.abi]
    }

    /// The index of the register with this id, or the status that refuses the id.
    pub(super) fn register(&self, id: u64) -> Result<usize, u32> {
        if let Some(index) = self.ids().iter().position(|known| *known == id) {
            return Ok(index);
        }
        let wrong_size = self.ids().iter().any(|known| known | SIZE == id | SIZE);
        if wrong_size || id >> 56 == ARCHITECTURE[1 - self.abi] {
            Err(status::EINVAL)
        } else {
            Err(status::ENOENT)
        }
    }

    /// Whether a value has more bits than the register: CTL is a U32 on arm.
    pub(super) fn is_too_large(&self, register: usize, value: u64) -> bool {
        self.abi == 1 && register.is_multiple_of(3) && value >> 32 != 0
    }

    /// A vCPU's six registers.
    pub(super) fn registers(&self, vcpu: usize) -> [u64; 6] {
        let mut all = [0; 6];
        for clock in 0..2 {
            let timer = self.vcpus[vcpu].timers[clock];
            let count = self.count_of(vcpu, clock);
            let istatus = timer.enable && count >= timer.cval;
            all[3 * clock] =
                u64::from(timer.enable) | u64::from(timer.imask) << 1 | u64::from(istatus) << 2;
            all[3 * clock + 1] = count;
            all[3 * clock + 2] = timer.cval;
        }
        all
    }

    /// The count that a vCPU reads: the VM's, or what the vCPU staged in the open restore.
    fn count_of(&self, vcpu: usize, clock: usize) -> u64 {
        let clock = if self.one_offset { 0 } else { clock };
        match self.vcpus[vcpu].set[1 + 3 * clock] {
            Some(count) if self.phase == phase::RESTORING && !self.pinned => count,
            _ => self.clocks[clock].count,
        }
    }

    /// The levels of a vCPU's interrupt lines, as SET_REGS answers them.
    pub(super) fn lines(&self, vcpu: usize) -> u32 {
        (0..2)
            .filter(|n| self.vcpus[vcpu].timers[*n].line(self.count_of(vcpu, *n)))
            .map(|n| 1 << n)
            .sum()
    }

    /// What a reading of this clock reports now.
    pub(super) fn reading(&self, clock: usize) -> Told {
        let Clock { count, counting } = self.clocks[clock];
        counting.then(|| (count, self.host.wrapping_sub(count)))
    }

    /// A new host counter: no reading says anything about it.
    pub(super) fn forget_readings(&mut self) {
        self.vm_told = [None; 2];
        for vcpu in &mut self.vcpus {
            vcpu.told_by_get_regs = [None; 2];
            vcpu.told_by_get_vm = [None; 2];
        }
    }

    /// Whether writes of this register are ignored.
    pub(super) fn ignores(&self, register: usize) -> bool {
        register % 3 == 1 && self.pinned || register == 4 && self.one_offset
    }

    /// Whether a vCPU that is done has this value already: as it brought it, if it is a count.
    pub(super) fn has(&self, vcpu: usize, register: usize, value: u64) -> bool {
        match register % 3 {
            _ if self.ignores(register) => true,
            0 => self.registers(vcpu)[register] & 3 == value & 3,
            1 => self.vcpus[vcpu].set[register] == Some(value),
            _ => self.registers(vcpu)[register] == value,
        }
    }

    /// Writes one register. Returns whether the write was ignored.
    pub(super) fn write(&mut self, vcpu: usize, register: usize, value: u64) -> bool {
        let clock = register / 3;
        let restoring = self.phase == phase::RESTORING;
        let timer = &mut self.vcpus[vcpu].timers[clock];
        match register % 3 {
            0 => {
                timer.enable = value & 1 != 0;
                timer.imask = value & 2 != 0;
            }
            2 => timer.cval = value,
            _ if self.pinned => return true,
            _ if restoring => {}
            _ if self.ignores(register) => {}
            _ => self.write_count(vcpu, clock, value),
        }
        if restoring {
            self.vcpus[vcpu].set[register] = Some(value);
        }
        self.ignores(register)
    }

    /// Freezes a clock at a count, unless the vCPU writes back what it was told of it.
    fn write_count(&mut self, vcpu: usize, clock: usize, value: u64) {
        let now = self.clocks[clock];
        let same = Some((value, self.host.wrapping_sub(now.count)));
        let vcpu = &self.vcpus[vcpu];
        let told = [
            vcpu.told_by_get_regs[clock],
            vcpu.told_by_get_vm[clock],
            self.vm_told[clock],
        ];
        if !now.counting || !told.contains(&same) {
            self.clocks[clock] = Clock {
                count: value,
                counting: false,
            };
            self.physical_is_own |= clock == PHYSICAL;
            if self.one_offset {
                self.clocks[PHYSICAL] = self.clocks[clock];
            }
        }
    }
}
