//! The VM's time, and the gate its vCPUs wait at.
//!
//! [`Vm`] is a plain value. It is given requests, with the host counter as an argument, and returns
//! answers and effects; it reads no clock, holds no descriptor and maps no memory. SPEC.md of the
//! protocol crate says what it does. What must always hold:
//!
//! - there is one pair of counter offsets per VM, changed only outside RUNNING;
//! - a WAIT_RUN of a restore is answered only after every vCPU's RESTORE_DONE of that epoch,
//!   and all waiters get the same offsets and the same instant;
//! - in a VM with CONFIRM it is answered only after the VMM has confirmed these very offsets;
//! - no vCPU's count decreases over pause and restore, unless the VMM itself writes a smaller
//!   count;
//! - the order of register writes never matters;
//! - a due timer is never lost; a masked or disabled one never fires.
//!
//! Where to look:
//!
//! - `call`: what goes in and what comes out; `model`: [`Vm`]; `ops`, `ops_restore`: the
//!   operations;
//! - `clock`: where time stands still; `restore`: which vCPUs are missing; `gate`: how a restore
//!   opens and ends; `configured`: how they make a VM; `registers`: what its registers read, and
//!   what writing them does;
//! - `timer`, `schedule`, `deadlines`: when a timer fires, and what is reported of it;
//! - `page`: the time page; `record`, `saved`: the VM in a state file and in device state.

mod call;
mod clock;
mod configured;
mod deadlines;
mod flags;
mod gate;
mod model;
mod ops;
mod ops_restore;
mod page;
mod record;
mod registers;
mod restore;
mod saved;
mod schedule;
mod timer;
mod vcpu;

#[cfg(test)]
mod tests;

pub use call::{Changed, Effects, Handled, Incoming, Notice, PageOrder, Released, Token};
pub use clock::{Now, ns_of_ticks, ticks_of_ns};
pub use flags::VmFlags;
pub use model::{GuestCounter, MAX_FREQUENCY, OpenRestore, Profile, Vm};
pub use record::{BadRecord, VcpuRecord, VmRecord};
pub use saved::{LoadError, SaveError, Saved, SavedTimer, SavedVcpu};
pub use vhost_user_timer_protocol::Timeline;
pub use vhost_user_timer_protocol::counter::Anchor;
pub use vhost_user_timer_protocol::op::Effect;
