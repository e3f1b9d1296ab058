//! The structures on the wire (SPEC.md), byte for byte.
//!
//! Every field is little-endian and unaligned, so that a structure can lie anywhere in a
//! message; `zerocopy` turns bytes into references to them and back without copying.

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::payload::{Payload, Shape};
use crate::{Register, Timeline};

/// Declares wire structures together with the layout that SPEC.md gives them, asserted at
/// compile time, and with what must hold of their reserved fields and flags.
macro_rules! wire {
    ($(
        $(#[$meta:meta])*
        $name:ident, $size:literal $(, reserved($it:ident => $zero:expr))? {
            $($(#[$field_meta:meta])* $offset:literal $field:ident: $ty:ty,)*
        }
    )*) => {$(
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Hash,
            FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $ty,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };

        impl Payload for $name {
            const SHAPE: Shape = Shape { fixed: $size, each: 0 };
            $(
                fn reserved_is_zero(&self) -> bool {
                    let $it = self;
                    $zero
                }
            )?
        }
    )*};
}

wire! {
    /// What every request starts with.
    RequestHeader, 16 {
        /// [`Op`](crate::Op) code.
        0 op: U16,
        /// [`request_flags`], of those that the operation takes.
        2 flags: U16,
        /// vCPU index, or [`VM_WIDE`](crate::VM_WIDE).
        4 vcpu: U32,
        /// The epoch the caller means, or 0 for the current one.
        8 epoch: U64,
    }

    /// What every answer starts with; on an error, all of it.
    ResponseHeader, 16 {
        /// [`Status`](crate::Status).
        0 status: U32,
        /// See each [`Status`](crate::Status).
        4 detail: U32,
        /// The current epoch.
        8 epoch: U64,
    }

    /// GET_INFO's answer, and the device's config space.
    Info, 64 {
        /// [`VERSION`](crate::VERSION).
        0 version: U32,
        /// [`Phase`](crate::Phase).
        4 phase: U32,
        /// How many vCPUs; 0 in NEW.
        8 vcpus: U32,
        /// vCPUs done in the open restore; equals `vcpus` outside RESTORING.
        12 restored: U32,
        /// Counter frequency, Hz.
        16 frequency: U64,
        /// Host count − virtual count.
        24 cntvoff: U64,
        /// Host count − physical count.
        32 cntpoff: U64,
        /// Starts at 1; grows by one at every RESTORE_BEGIN and device-state load.
        40 epoch: U64,
        /// The most vCPUs that this backend takes.
        48 max_vcpus: U32,
        /// How many request queues there are.
        52 request_queues: U16,
        /// [`Abi`](crate::Abi).
        54 abi: u8,
        /// [`info_flags`], and the [`CounterSource`](crate::CounterSource).
        55 flags: u8,
        /// The host counter; 0 in config space.
        56 host_count: U64,
    }

    /// CONFIGURE_VM's body.
    ConfigureVm, 16, reserved(it => it.flags & !configure_flags::ALL == 0 && it.reserved == [0; 2]) {
        /// How many vCPUs.
        0 vcpus: U32,
        /// [`Abi`](crate::Abi).
        4 abi: u8,
        /// [`configure_flags`].
        5 flags: u8,
        /// Zero.
        6 reserved: [u8; 2],
        /// Counter frequency in Hz, or 0 for the backend's.
        8 frequency: U64,
    }

    /// A register and its value.
    RegValue, 16 {
        /// KVM id ([`Register`]).
        0 id: U64,
        /// The value.
        8 value: U64,
    }

    /// SET_REGS's answer.
    SetRegsResult, 8 {
        /// Lines that stand high: [`LINE_VIRTUAL`] and [`LINE_PHYSICAL`].
        0 lines: U32,
        /// Count writes that were ignored, because the offset is pinned or because the physical
        /// count follows the virtual one.
        4 ignored: U32,
    }

    /// SET_REGS's answer to a request with [`request_flags::DONE`].
    SetRegsDone, 12 {
        /// As in [`SetRegsResult`].
        0 lines: U32,
        /// As in [`SetRegsResult`].
        4 ignored: U32,
        /// vCPUs still missing.
        8 remaining: U32,
    }

    /// GET_VM's body: which vCPUs.
    VcpuRange, 8 {
        /// The first vCPU's index.
        0 first: U32,
        /// How many.
        4 count: U32,
    }

    /// The head of GET_VM's answer.
    Vm, 40 {
        /// The virtual count.
        0 virt_count: U64,
        /// The physical count.
        8 phys_count: U64,
        /// The host counter.
        16 host_count: U64,
        /// Counter frequency, Hz.
        24 frequency: U64,
        /// The first vCPU's index.
        32 first: U32,
        /// How many vCPUs follow.
        36 count: U32,
    }

    /// One vCPU's timer registers.
    Vcpu, 56 {
        /// The vCPU's index.
        0 vcpu: U32,
        /// Which fields hold a value: [`present`].
        4 present: U32,
        /// The registers' values, by [`Register::index`].
        8 values: [U64; Register::COUNT],
    }

    /// SET_COUNTER_OFFSET's body.
    CounterOffset, 16, reserved(it => it.reserved.get() == 0) {
        /// Host count − guest count, of both clocks.
        0 offset: U64,
        /// Zero.
        8 reserved: U64,
    }

    /// SET_COUNTER_ANCHOR's body.
    CounterAnchor, 16 {
        /// CLOCK_MONOTONIC, ns, when the host counter read `count`.
        0 monotonic_ns: U64,
        /// The host counter then.
        8 count: U64,
    }

    /// PAUSE's body.
    Pause, 8, reserved(it => it.flags.get() & !PAUSE_KEEP_COUNTING == 0 && it.reserved.get() == 0) {
        /// [`PAUSE_KEEP_COUNTING`].
        0 flags: U32,
        /// Zero.
        4 reserved: U32,
    }

    /// Both counts and offsets, all of one instant: what PAUSE, RESUME, WAIT_RUN and
    /// CONFIRM_RUN answer.
    Run, 40 {
        /// Host count − virtual count.
        0 cntvoff: U64,
        /// Host count − physical count.
        8 cntpoff: U64,
        /// The virtual count.
        16 virt_count: U64,
        /// The physical count.
        24 phys_count: U64,
        /// The host counter.
        32 host_count: U64,
    }

    /// RESTORE_BEGIN's body.
    RestoreBegin, 24, reserved(it => it.flags.get() & !restore_flags::ALL == 0) {
        /// The VM's vCPUs, as configured.
        0 vcpus: U32,
        /// [`restore_flags`].
        4 flags: U32,
        /// CLOCK_REALTIME, ns, when the state was saved; looked at with ELAPSED.
        8 saved_realtime_ns: U64,
        /// How long WAIT_RUN waits for the missing vCPUs, ns; 0 forever.
        16 timeout_ns: U64,
    }

    /// RESTORE_DONE's answer, and SET_VM's to a request with [`request_flags::DONE`].
    RestoreDoneResult, 8 {
        /// vCPUs still missing.
        0 remaining: U32,
        /// Zero.
        4 reserved: U32,
    }

    /// CONFIRM_RUN's body: the offsets that the VMM has put where the guest's counter is made.
    ConfirmRun, 16 {
        /// Host count − virtual count.
        0 cntvoff: U64,
        /// Host count − physical count.
        8 cntpoff: U64,
    }

    /// SET_TIME_PAGE's body.
    TimePage, 16 {
        /// Where the page is, in the memory that the frontend shared.
        0 address: U64,
        /// Its length; 0 stops the backend's writing to it.
        8 length: U64,
    }

    /// What the backend writes to the time page.
    Page, 64 {
        /// Odd while the rest changes; other than before once it has changed.
        0 seq: U32,
        /// [`Phase`](crate::Phase).
        4 phase: U32,
        /// The epoch.
        8 epoch: U64,
        /// Host count − virtual count; 0 where that clock is frozen.
        16 cntvoff: U64,
        /// Host count − physical count; 0 where that clock is frozen.
        24 cntpoff: U64,
        /// Counter frequency, Hz.
        32 frequency: U64,
        /// The virtual count, where it is frozen; else 0.
        40 virt_count: U64,
        /// The physical count, where it is frozen; else 0.
        48 phys_count: U64,
        /// A futex: grows at every change of phase.
        56 wake: U32,
        /// [`page_flags`].
        60 flags: U32,
    }

    /// What the backend writes to a buffer of the event queue.
    Event, 32 {
        /// [`EVENT_TIMER_ASSERTED`] or [`EVENT_PHASE_CHANGED`].
        0 kind: U16,
        /// 0: virtual timer, 1: physical timer.
        2 timer: U16,
        /// The vCPU's index, or the new phase.
        4 vcpu: U32,
        /// The timer's compare value.
        8 cval: U64,
        /// The count when the event was written: of the timer's clock, or the virtual one.
        16 count: U64,
        /// The epoch.
        24 epoch: U64,
    }
}

/// Bits of [`Page::flags`].
pub mod page_flags {
    /// The virtual clock stands still.
    pub const VIRT_FROZEN: u32 = 1 << 0;
    /// The physical clock stands still.
    pub const PHYS_FROZEN: u32 = 1 << 1;
}

/// Bits of [`RequestHeader::flags`].
pub mod request_flags {
    /// RESTORE_DONE for the vCPU, or for every vCPU named, at the same instant.
    pub const DONE: u16 = 1 << 0;
}

/// Bits of [`ConfigureVm::flags`].
pub mod configure_flags {
    /// The VM becomes ARMED before it runs, and RUNNING by CONFIRM_RUN.
    pub const CONFIRM: u8 = 1 << 0;
    /// The physical count has the virtual count's offset.
    pub const ONE_OFFSET: u8 = 1 << 1;
    /// Every flag of this version.
    pub const ALL: u8 = CONFIRM | ONE_OFFSET;
}

/// Bits of [`Info::flags`]. Bits 5 to 7 are a [`CounterSource`](crate::CounterSource).
pub mod info_flags {
    /// SET_COUNTER_OFFSET fixed the offset; count writes are ignored.
    pub const OFFSET_PINNED: u8 = 1 << 0;
    /// SET_COUNTER_ANCHOR says what the host counter reads.
    pub const ANCHORED: u8 = 1 << 1;
    /// The physical count is the VM's own, not the host counter's.
    pub const PHYS_VIRTUALISED: u8 = 1 << 2;
    /// The VM was configured with [`configure_flags::CONFIRM`](super::configure_flags::CONFIRM).
    pub const CONFIRM: u8 = 1 << 3;
    /// The VM was configured with
    /// [`configure_flags::ONE_OFFSET`](super::configure_flags::ONE_OFFSET).
    pub const ONE_OFFSET: u8 = 1 << 4;
}

/// Bits of [`RestoreBegin::flags`].
pub mod restore_flags {
    /// The last RESTORE_DONE leads to RUNNING (ARMED in a VM that confirms), not PAUSED.
    pub const AUTORUN: u32 = 1 << 0;
    /// Unequal counts refuse the last RESTORE_DONE.
    pub const STRICT: u32 = 1 << 1;
    /// The wall-clock time since the save is added to the counts.
    pub const ELAPSED: u32 = 1 << 2;
    /// Every flag of this version.
    pub const ALL: u32 = AUTORUN | STRICT | ELAPSED;
}

/// Bits of [`Vcpu::present`] and of the detail of ENODATA.
pub mod present {
    use crate::Register;

    /// TIMER_CTL.
    pub const CTL: u32 = Register::TimerCtl.present_bit();
    /// TIMER_CNT.
    pub const CNT: u32 = Register::TimerCnt.present_bit();
    /// TIMER_CVAL.
    pub const CVAL: u32 = Register::TimerCval.present_bit();
    /// PTIMER_CTL.
    pub const PCTL: u32 = Register::PtimerCtl.present_bit();
    /// PTIMER_CNT.
    pub const PCNT: u32 = Register::PtimerCnt.present_bit();
    /// PTIMER_CVAL.
    pub const PCVAL: u32 = Register::PtimerCval.present_bit();
    /// All of them.
    pub const ALL: u32 = (1 << Register::COUNT) - 1;
}

/// Bits of a timer's control register (Arm ARM, CNTV_CTL_EL0).
pub mod ctl {
    /// The timer is on.
    pub const ENABLE: u64 = 1 << 0;
    /// Its line is masked.
    pub const IMASK: u64 = 1 << 1;
    /// Read-only: on, and the count has reached the compare value.
    pub const ISTATUS: u64 = 1 << 2;
}

/// Bit of [`Pause::flags`]: the clocks go on while the VM is PAUSED.
pub const PAUSE_KEEP_COUNTING: u32 = 1 << 0;

/// Bit of [`SetRegsResult::lines`]: the virtual timer's line.
pub const LINE_VIRTUAL: u32 = Timeline::Virtual.line_bit();
/// Bit of [`SetRegsResult::lines`]: the physical timer's line.
pub const LINE_PHYSICAL: u32 = Timeline::Physical.line_bit();

/// [`Event::kind`]: a timer's line rose by the passing of time, or stood high at the change to
/// RUNNING.
pub const EVENT_TIMER_ASSERTED: u16 = 1;
/// [`Event::kind`]: the VM's phase changed.
pub const EVENT_PHASE_CHANGED: u16 = 2;

/// [`Event::timer`] of the virtual timer.
pub const TIMER_VIRTUAL: u16 = Timeline::Virtual.code();
/// [`Event::timer`] of the physical timer.
pub const TIMER_PHYSICAL: u16 = Timeline::Physical.code();

impl Payload for U64 {
    const SHAPE: Shape = Shape {
        fixed: size_of::<U64>(),
        each: 0,
    };
}

impl Pause {
    /// Whether the clocks go on counting.
    pub fn keeps_counting(&self) -> bool {
        self.flags.get() & PAUSE_KEEP_COUNTING != 0
    }
}

impl Vcpu {
    /// The value of a register's field, present or not.
    pub const fn get(&self, register: Register) -> u64 {
        self.values[register.index()].get()
    }

    /// Sets a register's field and marks it present.
    pub fn set(&mut self, register: Register, value: u64) {
        self.values[register.index()] = value.into();
        self.present |= U32::new(register.present_bit());
    }

    /// Whether a register's field holds a value.
    pub const fn has(&self, register: Register) -> bool {
        self.present.get() & register.present_bit() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_can_be_read_at_any_address() {
        let mut bytes = [0u8; 65];
        bytes[1] = 7;
        let info = Info::ref_from_bytes(&bytes[1..]).unwrap();
        assert_eq!(info.version.get(), 7);
    }

    #[test]
    fn a_vcpus_fields_are_its_registers() {
        let mut vcpu = Vcpu::default();
        for (n, register) in (1..).zip(Register::ALL) {
            vcpu.set(register, n);
            assert_eq!(vcpu.get(register), n);
        }
        assert_eq!(vcpu.present.get(), present::ALL);
        let last: [u8; 8] = vcpu.as_bytes()[48..].try_into().unwrap();
        assert_eq!(u64::from_le_bytes(last), 6);
    }
}
