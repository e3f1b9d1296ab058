//! A client of a VM that confirms: CONFIGURE_VM with flags, and CONFIRM_RUN.

pub use crate::contract::configure::{CONFIRM, ONE_OFFSET};
use crate::contract::{Answer, Client, Queues, Run, configure_with, op, words};

impl<D: Queues> Client<D> {
    /// CONFIGURE_VM for arm64 at the backend's frequency, with these flags. Returns the answer's
    /// status and detail.
    pub fn configure_flags(&mut self, vcpus: u32, flags: u8) -> (u32, u32) {
        let body = configure_with(vcpus, 0, flags, 0);
        self.vm(op::CONFIGURE_VM, &body).outcome()
    }

    /// [`configure_flags`](Self::configure_flags) that is done.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn configure_with(&mut self, vcpus: u32, flags: u8) {
        assert_eq!(self.configure_flags(vcpus, flags), (0, 0));
    }

    /// CONFIGURE_VM of a VM that confirms.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn configure_confirming(&mut self, vcpus: u32) {
        self.configure_with(vcpus, CONFIRM);
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
