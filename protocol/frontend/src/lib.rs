//! The frontend library: what a VMM links to keep its VM's timers in a backend process.
//!
//! A VM has one counter offset, and no vCPU may run before it is known. This library and its
//! backend, `vhost-user-timer`, guarantee both: after a restore no vCPU runs before **every** vCPU
//! has its timer registers back, and all of them run with the same offset.
//!
//! # From the first line to a running VM
//!
//! [`Backend::spawn`] launches a backend and connects to it; [`Frontend::connect`] connects to one
//! that runs. Both do the vhost-user handshake and own the memory shared with the backend. From a
//! [`Frontend`] come
//!
//! | | for |
//! |---|---|
//! | [`Restore`] | a restore as one object: a part for each vCPU's thread, aborted if any fails |
//! | [`RequestQueue`] | every operation of the protocol, from any thread |
//! | [`EventStream`] | timers that expired, phases that changed |
//! | [`TimePage`] | the guest's counts, and waiting to run, without a request |
//! | [`ShutdownHandle`] | ending every wait |
//!
//! A VM's life is five phases: NEW, until [`configure`](RequestQueue::configure) fixes its vCPUs;
//! PAUSED and RUNNING, by [`pause`](RequestQueue::pause) and [`resume`](RequestQueue::resume);
//! RESTORING, while a restore is open; and ARMED, below. A restore opens a new *epoch*; a request
//! that names an older one is refused.
//!
//! # The last metre
//!
//! An offset that a process knows is not yet one that a guest sees: it has to go into the
//! hypervisor, before any vCPU runs. So a VM that is configured with [`VmOptions::confirm`] becomes
//! ARMED where it would run. Its offsets are decided then, and every vCPU still waits. One thread
//! puts the offsets into the hypervisor, by the closure that it gives to [`Restore::apply`] or
//! [`Frontend::resume_with`]. Then the library confirms them, and the vCPUs are released.
//!
//! - The closure is called once for each ARMED, and never while anything runs. PAUSE, RESUME and
//!   RESTORE_BEGIN of every thread wait for it, so it never applies what is over.
//! - If it fails nobody runs. Every thread that waits gets its error. Try again, or give up.
//! - [`Options::host_counter`] refuses a backend that does not count by what the hypervisor counts
//!   by.
//! - The feature `kvm` has the closure for KVM on AArch64.
//!
//! # What always holds
//!
//! - Every wait ends: at its [`Deadline`], at once when the backend dies, or by the shutdown
//!   handle. Connecting and control messages take [`Options::timeout`] at most.
//! - The backend is not trusted. Whatever it writes to the shared memory, the worst result is an
//!   [`Error::Protocol`] and the end of that queue.
//! - The library has no thread of its own, except for the length of a control message. When the
//!   frontend and all that came from it are dropped, no descriptor and no mapping is left.
//! - A lost connection changes nothing in the VM: the next frontend finds it as it was. With
//!   [`Options::reconnect`] this one goes on.
//! - An error says what to do about it by its type: a [`Refusal`] changed nothing, and
//!   [`Error::ends_queue`] tells whether the queue is of further use.
//!
//! # Saving on one host and restoring on another
//!
//! ```no_run
//! use std::thread;
//! use std::time::Duration;
//!
//! use vhost_user_timer_frontend::{ ApplyError, Backend, Error, Frontend, Info, RestoreOptions,
//! SavedVm, SpawnOptions, VmOptions, };
//!
//! const SECOND: Duration = Duration::from_secs(1);
//!
//! /// On the source, once no vCPU runs any more: bytes for the migration stream.
//! fn save(frontend: &Frontend) -> Result<Vec<u8>, Error> {
//!     frontend.queue().pause(SECOND)?;
//!     Ok(frontend.save(SECOND)?.to_bytes())
//! }
//!
//! /// On the destination. If a vCPU cannot be restored, or the offset does not get into the
//! /// hypervisor, none runs, and the error says why.
//! fn restore(bytes: &[u8]) -> Result<Backend, Error> {
//!     let saved = SavedVm::from_bytes(bytes)?;
//!     let backend = Backend::spawn("vhost-user-timer", SpawnOptions::default())?;
//!     let options = RestoreOptions::default().vm(VmOptions::KVM);
//!     let restore = backend.frontend().restore(&saved, options)?;
//!     thread::scope(|scope| {
//!         // Each vCPU's thread brings its registers back and waits for all the others.
//!         let vcpus: Vec<_> = restore
//!             .vcpus()
//!             .map(|mut vcpu| {
//!                 scope.spawn(move || -> Result<(), Error> {
//!                     let run = vcpu.run(20 * SECOND)?;
//!                     println!("vCPU {} runs with cntvoff {:#x}", vcpu.index(), run.cntvoff);
//!                     // KVM_RUN, …
//!                     Ok(())
//!                 })
//!             })
//!             .collect();
//!         // All registers are back and no vCPU runs yet: one thread puts one offset in.
//!         restore.finish_with(10 * SECOND, put_into_hypervisor)?;
//!         vcpus
//!             .into_iter()
//!             .try_for_each(|vcpu| vcpu.join().expect("a vCPU thread panicked"))
//!     })?;
//!     Ok(backend)
//! }
//!
//! fn put_into_hypervisor(info: &Info) -> Result<(), ApplyError> {
//!     // KVM_ARM_SET_COUNTER_OFFSET, …: the feature `kvm` has this as `kvm::apply`.
//!     println!("offset {:#x}", info.cntvoff);
//!     Ok(())
//! }
//! # let _ = (save, restore);
//! ```
//!
//! [`SavedVm`] is plain data with a byte form of its own; with the feature `serde` it goes into the
//! VMM's own formats. A VMM that has read the registers from KVM builds one by
//! [`SavedVcpu::from_regs`].
//!
//! # A backend that comes back
//!
//! With [`Options::reconnect`] a lost connection is no error: the thread that waits for an answer
//! connects again, for as long as [`Reconnect`] and its own deadline allow, and waits on. Requests
//! that had no answer are sent again, and each answer arrives once:
//!
//! - A thread in [`wait_run`](RequestQueue::wait_run) when the backend is killed gets its answer
//!   from the next backend, which needs the state file of the previous one. Without the VM's state,
//!   everything ends with [`Error::StateLost`].
//! - A request that is carried out twice has the effect of one, or the library sees that it was
//!   carried out and does not repeat it: [`Reconnect`] says which, for each operation. Where that
//!   cannot be known the error is [`Error::Uncertain`], which takes two threads that contradict
//!   each other.
//! - Requests and events of the outage wait for its end: submitting does not fail.
//! - Each event arrives at least once; it may arrive again.
//! - The time page does not change during the outage. From its end on it cannot be read until the
//!   new backend has written it. Threads that [wait by it](RequestQueue::wait_run_by_page) are in
//!   `wait_run` as well.
//! - The save of a device state starts over, a load does if it was not done; the steps from which a
//!   VMM builds its own transfer fail with [`Error::Disconnected`].
//!
//! If all threads of a VMM only poll, none of them waits: give
//! [`keep_connected`](Frontend::keep_connected) a thread.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vhost_user_timer_frontend::{Error, Frontend, Options, Reconnect};
//! # fn connect() -> Result<Frontend, Error> {
//! let patience = Duration::from_secs(60);
//! let options = Options::default().reconnect(Reconnect::default().patience(patience));
//! let frontend = Frontend::connect("/tmp/vm1/timer.sock", options)?;
//! # Ok(frontend)
//! # }
//! ```
//!
//! # The clock without a request
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vhost_user_timer_frontend::{Error, Frontend, HostClock};
//! # const SECOND: Duration = Duration::from_secs(1);
//! # fn by_page(frontend: &Frontend, vcpu: u32) -> Result<(), Error> {
//! let queue = frontend.queue_of(vcpu);
//! frontend.time_page().start(queue, SECOND)?;
//! // For a backend with `--counter-source monotonic`.
//! let clock = queue.guest_clock(HostClock::MONOTONIC, SECOND)?;
//! let offsets = queue.wait_run_by_page(vcpu, 10 * SECOND)?;
//! println!("running with cntvoff {:#x}", offsets.cntvoff);
//! if let Some(counts) = clock.counts() {
//!     println!("CNTVCT {}, CNTPCT {}", counts.virt_count, counts.phys_count);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Many requests, one kick
//!
//! An [`Operation`] is a request as a value. [`submit`](RequestQueue::submit) puts it on the ring
//! and returns a [`Ticket`]; [`kick`](RequestQueue::kick) notifies the backend of all of them at
//! once.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vhost_user_timer_frontend::{Abi, Error, Operation, Register, RequestQueue};
//! fn compare_values(queue: &RequestQueue, vcpus: u32) -> Result<Vec<u64>, Error> {
//!     let ids = [Register::TimerCval.id(Abi::Arm64)];
//!     let tickets = (0..vcpus)
//!         .map(|vcpu| queue.submit(&Operation::get_regs(vcpu, &ids)))
//!         .collect::<Result<Vec<_>, _>>()?;
//!     queue.kick();
//!     tickets
//!         .into_iter()
//!         .map(|ticket| Ok(ticket.wait(Duration::from_secs(1))?[0].value))
//!         .collect()
//! }
//! # let _ = compare_values;
//! ```
//!
//! The folder `examples` has whole programs: `save_restore`, `event_loop`, `reconnect`,
//! `time_page`.

mod answers;
mod confirm;
mod connection;
mod connector;
mod device_state;
mod error;
mod events;
mod frontend;
#[cfg(feature = "kvm")]
pub mod kvm;
mod memory;
mod operation;
mod options;
mod queue;
mod regs;
mod replay;
mod restore;
mod ring;
mod saved;
mod session;
mod spawn;
mod sys;
mod time_page;
mod turn;
mod wait;
mod wait_set;

pub use answers::{Info, Run, SetRegs, SetRegsDone, Timer, Vm};
pub use connector::Connector;
pub use error::{
    ContentFault, ControlError, DeviceStateError, Error, Fault, Feature, InvalidArgument,
    OtherCounter, Refusal, RingFault, StateLoss, VmShape,
};
pub use events::{Event, EventStream};
pub use frontend::Frontend;
pub use operation::{Answer, NewEpoch, Operation, RawAnswer, Remaining};
pub use options::{Options, Reconnect, VmOptions};
pub use queue::{RequestQueue, Ticket};
pub use regs::{MAX_REGS, RegIds, RegValue, RegValues};
pub use restore::{Restore, RestoreFailure, RestoreOptions, VcpuRestore};
pub use saved::{SavedVcpu, SavedVm, SavedVmError};
pub use spawn::{Backend, SpawnOptions};
pub use time_page::{Counts, GuestClock, HostClock, Offsets, PageTime, TimePage};
pub use turn::{ApplyError, ApplyFailure};
pub use wait::{Deadline, ShutdownHandle};

pub use vhost_user_timer_counter::HostCounter;
pub use vhost_user_timer_protocol::counter::Anchor;
pub use vhost_user_timer_protocol::{Abi, CounterSource, IndexRanges, Op, Phase, Register, Status};
