//! The frontend library: what a VMM links to keep its VM's timers in a backend process.
//!
//! A VM has one counter offset, and no vCPU may run before it is known. This library and its
//! backend, `vhost-user-timer`, guarantee both: after a restore no vCPU runs before **every** vCPU
//! has its timer registers back, and all of them run with the same offset.
//!
//! # From the first line to a running VM
//!
//! [`Frontend::connect`] does the vhost-user handshake and owns the memory shared with the backend.
//! From a [`Frontend`] come
//!
//! | | for |
//! |---|---|
//! | [`Restore`] | a restore as one object: a part for each vCPU's thread, aborted if any fails |
//! | [`RequestQueue`] | every operation of the protocol, from any thread |
//! | [`EventStream`] | timers that expired, phases that changed |
//! | [`TimePage`] | the guest's counts, and waiting to run, without a request |
//! | [`ShutdownHandle`] | ending every wait |
//!
//! A VM's life is four phases: NEW, until [`configure`](RequestQueue::configure) fixes its vCPUs;
//! PAUSED and RUNNING, by [`pause`](RequestQueue::pause) and [`resume`](RequestQueue::resume); and
//! RESTORING, while a restore is open. A restore opens a new *epoch*; a request that names an older
//! one is refused.
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
//! use vhost_user_timer_frontend::{Error, Frontend, Options, RestoreOptions, SavedVm};
//!
//! const SECOND: Duration = Duration::from_secs(1);
//!
//! /// On the source, once no vCPU runs any more: bytes for the migration stream.
//! fn save(frontend: &Frontend) -> Result<Vec<u8>, Error> {
//!     frontend.queue().pause(SECOND)?;
//!     Ok(frontend.save(SECOND)?.to_bytes())
//! }
//!
//! /// On the destination. If a vCPU cannot be restored, none runs, and the error names it.
//! fn restore(bytes: &[u8]) -> Result<(), Error> {
//!     let saved = SavedVm::from_bytes(bytes)?;
//!     let frontend = Frontend::connect("/run/vm1/timer.sock", Options::default())?;
//!     let restore = frontend.restore(&saved, RestoreOptions::default())?;
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
//!         restore.finish(10 * SECOND)?;
//!         // All registers are back and no vCPU runs yet. One thread puts one offset into both.
//!         let offset = frontend.queue().info(SECOND)?.cntvoff;
//!         // KVM_ARM_SET_COUNTER_OFFSET with `offset`, …
//!         frontend.queue().set_counter_offset(offset, SECOND)?;
//!         frontend.queue().resume(SECOND)?;
//!         vcpus
//!             .into_iter()
//!             .try_for_each(|vcpu| vcpu.join().expect("a vCPU thread panicked"))
//!     })
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
//! let frontend = Frontend::connect("/run/vm1/timer.sock", options)?;
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

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

pub use answers::{Info, Run, SetRegs, SetRegsDone, Timer, Vm};
pub use connector::Connector;
pub use error::{
    ContentFault, ControlError, DeviceStateError, Error, Fault, Feature, InvalidArgument,
    OtherCounter, Refusal, RingFault, StateLoss, VmShape,
};
pub use events::{Event, EventStream};
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

use connection::{Connection, VringSetup};
use events::{EventLayout, EventQueue};
use memory::{Layout, SharedMemory};
use queue::QueueLayout;
use session::{Session, Survivor};

use vhost_user_timer_protocol::{EVENT_QUEUE, FIRST_REQUEST_QUEUE};

/// A timer backend, which serves one VM.
///
/// Dropping it [closes](Self::close) it, which takes [`Options::timeout`] at most. Queues that are
/// still held elsewhere fail with [`Error::ShutDown`] from then on.
pub struct Frontend {
    session: Arc<Session>,
    queues: Vec<RequestQueue>,
    events: Arc<EventQueue>,
    /// Not taken yet.
    stream: Option<EventStream>,
    closed: bool,
}

impl Frontend {
    /// Connects to a backend: by the path that it listens at, over a socket that is connected
    /// already, or by a function ([`Connector`]). [`Backend::spawn`] launches one and connects to
    /// it.
    ///
    /// At a path it waits for a backend that was launched just now, as long as
    /// [`Options::timeout`] allows: its socket may not exist yet, or nobody may listen there.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] where nobody listens at the path in time; [`Error::InvalidArgument`] for
    /// options out of range; [`Error::TimedOut`], [`Error::ShutDown`], [`Error::Disconnected`] and
    /// [`Error::Control`] for a handshake that fails; [`Error::MissingFeature`] and
    /// [`Error::Version`] for a backend that this library cannot work with; [`Error::HostCounter`]
    /// for one that counts by something else than [`Options::host_counter`]; [`Error::Io`] where
    /// the function fails, or this process lacks resources.
    pub fn connect(to: impl Into<Connector>, options: Options) -> Result<Self, Error> {
        let connector = to.into();
        options.check()?;
        if options.reconnect.is_some() && !connector.can_reconnect() {
            return Err(InvalidArgument::ReconnectStream.into());
        }
        let shutdown = match &options.shutdown {
            Some(shutdown) => shutdown.clone(),
            None => ShutdownHandle::new()?,
        };
        let deadline = Deadline::from(options.timeout);
        let (socket, reconnector) = connector.connect(&options, &shutdown, deadline)?;

        let connection = Connection::new(socket, shutdown.clone())?;
        let negotiated = connection.negotiate(None, deadline)?;
        let has_config = negotiated.has_config();
        if options.reconnect.is_some() && !has_config {
            return Err(Error::MissingFeature(Feature::Config));
        }
        let info = has_config
            .then(|| connection.config(deadline))
            .transpose()?;
        let count = options.request_queues.unwrap_or(negotiated.request_queues);
        if count > negotiated.request_queues {
            return Err(Error::MissingFeature(Feature::RequestQueues {
                wanted: count,
                offered: negotiated.request_queues,
            }));
        }

        let mut layout = Layout::default();
        let page = TimePage::reserve(&mut layout);
        let event_layout = EventLayout::reserve(&mut layout, options.event_buffers);
        let (size, indirect) = (options.queue_size, negotiated.indirect());
        let queue_layouts: Vec<_> = (0..count)
            .map(|_| QueueLayout::reserve(&mut layout, size, indirect))
            .collect();
        let memory = Arc::new(SharedMemory::new(&layout)?);

        let page = TimePage::new(memory.clone(), page);
        let session = Arc::new(Session::new(
            connection,
            shutdown,
            memory,
            negotiated,
            page,
            &options,
            reconnector,
        )?);
        let events = Arc::new(EventQueue::new(session.clone(), event_layout)?);
        let queues = (FIRST_REQUEST_QUEUE..)
            .zip(queue_layouts)
            .map(|(index, layout)| RequestQueue::new(index, session.clone(), layout))
            .collect::<Result<Vec<_>, _>>()?;
        let vrings: Vec<VringSetup<'_>> = std::iter::once(events.vring())
            .chain(queues.iter().map(|queue| queue.shared.vring()))
            .collect();
        session
            .connection()
            .start(&session.memory, &vrings, deadline)?;
        drop(vrings);
        let events_ring: Weak<dyn Survivor> = Arc::<EventQueue>::downgrade(&events);
        let rings = queues.iter().map(RequestQueue::survivor);
        session.attach(std::iter::once(events_ring).chain(rings));

        let frontend = Frontend {
            session,
            queues,
            stream: Some(EventStream::new(events.clone())),
            events,
            closed: false,
        };
        // The event buffers were posted before the backend had the ring.
        frontend.events.force_kick();
        let info = match info {
            Some(info) => info,
            None => frontend.queue().info(deadline)?,
        };
        frontend.session.history.learn_info(&info);
        frontend.session.check_counter(&info)?;
        Ok(frontend)
    }

    /// The request queues; at least one.
    pub fn queues(&self) -> &[RequestQueue] {
        &self.queues
    }

    /// The first request queue: for a caller that needs no more than one.
    pub fn queue(&self) -> &RequestQueue {
        &self.queues[0]
    }

    /// The queue for a vCPU's requests, which spreads vCPUs evenly over the queues. Any other queue
    /// works as well.
    pub fn queue_of(&self, vcpu: u32) -> &RequestQueue {
        &self.queues[vcpu as usize % self.queues.len()]
    }

    /// Takes the stream of the VM's events. There is one: later calls return `None`.
    pub fn take_events(&mut self) -> Option<EventStream> {
        self.stream.take()
    }

    /// The time page, which the backend writes after [`TimePage::start`].
    pub fn time_page(&self) -> TimePage {
        self.session.page.clone()
    }

    /// The handle that ends every wait of this frontend.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.session.watch.shutdown.clone()
    }

    /// Reads the device's config space: what GET_INFO answers, by a control message instead of a
    /// queue; `host_count` is 0 there.
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeature`] where the backend has no config space, [`Error::Config`] or
    /// [`Error::Version`] for what is in it, or as the handshake.
    pub fn config(&self) -> Result<Info, Error> {
        if !self.session.negotiated.has_config() {
            return Err(Error::MissingFeature(Feature::Config));
        }
        self.session
            .exchange(self.session.timeout.into(), Connection::config)
    }

    /// Resets the device: the VM is NEW again. The queues go on; a request in flight may be
    /// answered before or after the reset, or be refused. It waits for a thread that applies
    /// offsets ([`resume_with`](Self::resume_with), [`Restore::apply`]).
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeature`] where the backend cannot be reset, or as the handshake.
    pub fn reset_device(&self) -> Result<(), Error> {
        let session = &self.session;
        let _turn = session.applying.turn(session.timeout.into())?;
        let reset = |connection: &Connection, deadline| {
            session.history.resetting();
            connection.reset_device(&session.negotiated, self.vring_indices(), deadline)
        };
        session.exchange(session.timeout.into(), reset)?;
        // Kicks while the rings were disabled are lost.
        self.events.force_kick();
        for queue in &self.queues {
            queue.force_kick();
        }
        session.restart_page();
        Ok(())
    }

    /// Reconnects whenever the connection is lost, until that is no longer possible, and returns
    /// why. It is for a thread of its own, in a VMM whose other threads only poll: threads that
    /// wait for answers reconnect themselves.
    pub fn keep_connected(&self) -> Error {
        let watch = &self.session.watch;
        loop {
            let generation = self.session.generation();
            let ended = match watch.until_failure(Deadline::NEVER) {
                Ok(Some(failure)) => self
                    .session
                    .outlive(failure, generation, Deadline::NEVER)
                    .map(Error::from),
                Ok(None) => None,
                Err(error) => Some(error),
            };
            if let Some(error) = ended {
                return error;
            }
        }
    }

    /// Ends all waits with [`Error::ShutDown`], has the backend stop every ring
    /// (GET_VRING_BASE), and closes the connection. The VM in the backend stays as it is.
    ///
    /// # Errors
    ///
    /// As the handshake. The connection is closed in any case.
    pub fn close(mut self) -> Result<(), Error> {
        self.stop()
    }

    fn vring_indices(&self) -> impl Iterator<Item = u16> + use<> {
        let count = self.queues.len() as u16;
        EVENT_QUEUE..FIRST_REQUEST_QUEUE + count
    }

    fn stop(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let shutdown = &self.session.watch.shutdown;
        // A caller that has used the handle before is in a hurry, or knows that the backend hangs.
        let in_a_hurry = shutdown.was_used();
        shutdown.shut_down();
        let connection = self.session.connection();
        let stopped = if in_a_hurry {
            Ok(())
        } else {
            connection.stop(self.vring_indices(), self.session.timeout.into())
        };
        connection.close();
        stopped
    }
}

impl AsFd for Frontend {
    /// The control socket, for an event loop: it reports a hang-up (`POLLHUP`, `POLLRDHUP`) when
    /// the backend is gone. It must not be read.
    ///
    /// After a reconnect the same number is another socket. poll() notices; in an epoll instance it
    /// must be registered again (`EPOLL_CTL_ADD`).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.watch.as_fd()
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        // The connection ends either way, and nobody is left to tell how.
        let _ = self.stop();
    }
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend")
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
