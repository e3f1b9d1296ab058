//! A client of a VM that confirms: CONFIGURE_VM with flags, and CONFIRM_RUN.

use crate::contract::{Answer, Client, Queues, Run, configure_body, op, words};

/// CONFIGURE_VM's flag CONFIRM.
pub const CONFIRM: u8 = 1;
/// CONFIGURE_VM's flag ONE_OFFSET.
pub const ONE_OFFSET: u8 = 2;

impl<D: Queues> Client<D> {
    /// CONFIGURE_VM for arm64 at the backend's frequency, with these flags. Returns the answer's
    /// status and detail.
    pub fn configure_flags(&mut self, vcpus: u32, flags: u8) -> (u32, u32) {
        let mut body = configure_body(vcpus, 0, 0);
        body[5] = flags;
        self.vm(op::CONFIGURE_VM, &body).outcome()
    }

    /// CONFIGURE_VM of a VM that confirms.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn configure_confirming(&mut self, vcpus: u32) {
        assert_eq!(self.configure_flags(vcpus, CONFIRM), (0, 0));
    }

    /// CONFIRM_RUN with these offsets.
    pub fn confirm_offsets(&mut self, cntvoff: u64, cntpoff: u64) -> Answer {
        self.vm(op::CONFIRM_RUN, &words(&[cntvoff, cntpoff]))
    }

    /// CONFIRM_RUN with the offsets that GET_INFO gives.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn confirm(&mut self) -> Run {
        let info = self.info();
        let run = Run::of(self.confirm_offsets(info.cntvoff, info.cntpoff).ok(40));
        assert_eq!((run.cntvoff, run.cntpoff), (info.cntvoff, info.cntpoff));
        run
    }
}
