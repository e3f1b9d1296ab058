//! What CONFIGURE_VM asks for besides the VM's size.

use vhost_user_timer_protocol::wire::{configure_flags, info_flags};

/// The flags of CONFIGURE_VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VmFlags {
    /// The VM becomes ARMED before it runs, and RUNNING by CONFIRM_RUN.
    pub confirm: bool,
    /// The physical count has the virtual count's offset.
    pub one_offset: bool,
}

impl VmFlags {
    /// The flags in [`configure_flags`]; `None` if there is an unknown bit.
    pub fn from_bits(bits: u8) -> Option<Self> {
        (bits & !configure_flags::ALL == 0).then_some(VmFlags {
            confirm: bits & configure_flags::CONFIRM != 0,
            one_offset: bits & configure_flags::ONE_OFFSET != 0,
        })
    }

    /// The flags as [`configure_flags`].
    pub fn bits(self) -> u8 {
        self.select(configure_flags::CONFIRM, configure_flags::ONE_OFFSET)
    }

    /// The flags as [`info_flags`].
    pub(super) fn info(self) -> u8 {
        self.select(info_flags::CONFIRM, info_flags::ONE_OFFSET)
    }

    fn select(self, confirm: u8, one_offset: u8) -> u8 {
        let of = |set, bit| if set { bit } else { 0 };
        of(self.confirm, confirm) | of(self.one_offset, one_offset)
    }
}
