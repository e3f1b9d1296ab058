//! The guest: where things are in its RAM, and its program.

mod board;

pub(crate) use board::{Board, MAX_VCPUS, Record};

/// The base of the guest's RAM, a multiple of 1 GiB: the guest maps memory by 1 GiB blocks.
pub(crate) const RAM: u64 = 0x4000_0000;
/// The size of the guest's RAM, bytes. A multiple of every host's page size.
pub(crate) const RAM_SIZE: usize = 0x2_0000;
/// The page that the guest and the VMM share.
pub(crate) const BOARD: u64 = RAM + 0x1_0000;
/// A write here ends KVM_RUN with KVM_EXIT_MMIO.
pub(crate) const DOORBELL: u64 = 0x0900_0000;
/// The GIC's distributor, 64 KiB.
pub(crate) const DISTRIBUTOR: u64 = 0x0800_0000;
/// The GIC's redistributors, 128 KiB for each vCPU.
pub(crate) const REDISTRIBUTORS: u64 = 0x080a_0000;
/// The virtual timer's interrupt: PPI 11.
pub(crate) const TIMER_INTID: u32 = 27;

#[cfg(target_arch = "aarch64")]
pub(crate) use program::program;

#[cfg(target_arch = "aarch64")]
mod program {
    use std::mem::offset_of;

    use super::*;

    #[expect(
        unsafe_code,
        reason = "the guest's program is assembly, and never called"
    )]
    mod assembly {
        use super::*;

        std::arch::global_asm!(
            include_str!("witness.S"),
            RECORDS = const offset_of!(Board, records),
            ROUND = const offset_of!(Board, round),
            PERIOD = const offset_of!(Board, period),
            TURN_ON = const offset_of!(Board, turn_on),
            TURN_OFF = const offset_of!(Board, turn_off),
            RESET = const offset_of!(Board, reset),
            RECORD_SIZE = const size_of::<Record>(),
            READINGS = const offset_of!(Record, readings),
            LAST = const offset_of!(Record, last),
            FIRST = const offset_of!(Record, first),
            RECORD_ROUND = const offset_of!(Record, round),
            BELOW_PUBLISHED = const offset_of!(Record, below_published),
            BELOW_OWN = const offset_of!(Record, below_own),
            WORST = const offset_of!(Record, worst),
            INTERRUPTS = const offset_of!(Record, interrupts),
            EARLY = const offset_of!(Record, early),
            LATEST = const offset_of!(Record, latest),
            ARMED = const offset_of!(Record, armed),
            SPURIOUS = const offset_of!(Record, spurious),
            STARTS = const offset_of!(Record, starts),
            IS_OFF = const offset_of!(Record, is_off),
            FAULT = const offset_of!(Record, fault),
            FAULT_AT = const offset_of!(Record, fault_at),
            TIMER_INTID = const TIMER_INTID,
            BOARD_ADDRESS = const BOARD,
            DOORBELL_ADDRESS = const DOORBELL,
            DISTRIBUTOR_ADDRESS = const DISTRIBUTOR,
            REDISTRIBUTOR_ADDRESS = const REDISTRIBUTORS,
        );

        unsafe extern "C" {
            static witness_start: u8;
            static witness_end: u8;
        }

        /// The guest's program, for the base of its RAM. It begins with the entry point.
        pub(crate) fn program() -> &'static [u8] {
            let (start, end) = (&raw const witness_start, &raw const witness_end);
            let len = end.addr() - start.addr();
            // SAFETY: both symbols are in one section of read-only data, the second at its end.
            unsafe { std::slice::from_raw_parts(start, len) }
        }
    }

    pub(crate) use assembly::program;

    // The program loads `published` from the board's own address.
    const _: () = assert!(offset_of!(Board, published) == 0);
    const _: () = assert!(BOARD + size_of::<Board>() as u64 <= RAM + RAM_SIZE as u64);
}
