//! Requests at random, most of which are granted.

use fastrand::Rng;
use vhost_user_timer_protocol::wire::{self, configure_flags, restore_flags};
use vhost_user_timer_protocol::{Phase, Register, Role};
use vhost_user_timer_reference::Ask;

use super::State;
use crate::watch::{HOST_FREQUENCY, host_count};

/// Draws requests for a VM in a state.
#[derive(Debug)]
pub struct Draw<'a> {
    /// Where the random numbers come from.
    pub rng: &'a mut Rng,
    /// The number of vCPUs that the VM has, or is to have.
    pub vcpus: u32,
    /// The VM's state.
    pub state: &'a State,
}

impl Draw<'_> {
    /// A request that a VM in this state mostly grants.
    pub fn request(&mut self) -> Ask {
        let choice = self.rng.u32(..100);
        match (self.state.phase(), choice) {
            (Phase::New, ..90) => self.configure(),
            (_, 90..93) => Ask::get_info(),
            (_, 93..96) => Ask::get_vm(0, self.vcpus),
            (_, 96..) => self.any(),
            (Phase::Running, ..75) => self.set_regs(false),
            (Phase::Running, ..86) => self.pause(),
            (Phase::Paused, ..30) => self.set_regs(true),
            (Phase::Paused, ..65) => Ask::resume(),
            (Phase::Paused, ..78) => self.restore_begin(),
            (Phase::Paused, ..82) => self.set_counter_offset(),
            (Phase::Paused, ..86) => self.set_counter_anchor(),
            (Phase::Armed, ..40) => self.state.confirm().unwrap_or_else(Ask::get_info),
            (Phase::Armed, ..50) => self.set_regs(false),
            (Phase::Armed, ..60) => self.pause(),
            (Phase::Armed, ..70) => self.restore_begin(),
            (Phase::Armed, ..75) => Ask::abort(),
            (Phase::Armed, ..80) => Ask::restore_done(self.vcpu()),
            (Phase::Armed, ..85) => Ask::confirm(self.rng.u64(..), self.rng.u64(..)),
            (Phase::Restoring, ..10) => self.set_regs(true),
            (Phase::Restoring, ..15) => self.set_regs(true).done(),
            (Phase::Restoring, ..30) => self.set_vm(),
            (Phase::Restoring, ..40) => self.set_vm().done(),
            (Phase::Restoring, ..80) => Ask::restore_done(self.vcpu()),
            (Phase::Restoring, ..85) => Ask::abort(),
            (Phase::Restoring, ..87) => self.set_counter_offset(),
            _ => self.any(),
        }
    }

    /// A request that may well be refused.
    fn any(&mut self) -> Ask {
        match self.rng.u32(..9) {
            0 => self.configure(),
            1 => self.pause(),
            2 => Ask::resume(),
            3 => self.restore_begin(),
            4 => Ask::restore_done(self.vcpu()),
            5 => Ask::abort(),
            6 => self.set_vm(),
            7 => self.set_counter_offset(),
            _ => self.set_regs(true),
        }
    }

    fn vcpu(&mut self) -> u32 {
        self.rng.u32(..self.vcpus)
    }

    /// CONFIGURE_VM. The flags follow from the number of vCPUs, so that repeating it asks for the
    /// same VM.
    fn configure(&self) -> Ask {
        let flags = match self.vcpus % 4 {
            0 => configure_flags::CONFIRM,
            2 => configure_flags::ALL,
            _ if self.vcpus == 3 => configure_flags::ONE_OFFSET,
            _ => 0,
        };
        Ask::configure_with(self.vcpus, 0, flags, HOST_FREQUENCY)
    }

    fn pause(&mut self) -> Ask {
        match self.rng.u32(..4) {
            0 => Ask::pause_counting(),
            _ => Ask::pause(),
        }
    }

    fn restore_begin(&mut self) -> Ask {
        let strict = self.rng.u32(..3) == 0;
        let autorun = self.rng.bool();
        let flag = |set, flag| if set { flag } else { 0 };
        let flags = flag(strict, restore_flags::STRICT) | flag(autorun, restore_flags::AUTORUN);
        // Short enough that some pass; nobody waits for them.
        let timeout_ns = self.rng.u64(..4) * self.rng.u64(..1_000_000);
        Ask::begin_with(self.vcpus, flags, 0, timeout_ns)
    }

    fn set_counter_offset(&mut self) -> Ask {
        Ask::set_offset(host_count() - self.rng.u64(..host_count()))
    }

    fn set_counter_anchor(&mut self) -> Ask {
        let monotonic_ns = host_count() - self.rng.u64(..1_000_000);
        Ask::set_anchor(monotonic_ns, monotonic_ns + self.rng.u64(..1 << 40))
    }

    fn value(&mut self, register: Register) -> u64 {
        match register.role() {
            Role::Control => self.rng.u64(..8),
            // Few values, so that some are equal, for STRICT.
            Role::Count => (1 << 50) + self.rng.u64(..3),
            Role::Compare if self.rng.bool() => self.rng.u64(..),
            Role::Compare => {
                let count = self.state.virt_count_at(host_count());
                count.wrapping_add(self.rng.u64(..2_000_000))
            }
        }
    }

    fn set_regs(&mut self, counts: bool) -> Ask {
        let is_count = |register: Register| register.role() == Role::Count;
        let mut entries = Vec::new();
        for register in Register::ALL {
            if self.rng.bool() && (counts || !is_count(register)) {
                entries.push((register, self.value(register)));
            }
        }
        self.rng.shuffle(&mut entries);
        Ask::set_regs(self.vcpu(), &entries)
    }

    fn set_vm(&mut self) -> Ask {
        let mut rows = Vec::new();
        for vcpu in 0..self.vcpus {
            if self.rng.u32(..5) == 0 {
                continue;
            }
            let mut row = wire::Vcpu {
                vcpu: vcpu.into(),
                ..Default::default()
            };
            for register in Register::ALL {
                if self.rng.u32(..8) != 0 {
                    row.set(register, self.value(register));
                }
            }
            rows.push(row);
        }
        Ask::set_vm(&rows)
    }
}
