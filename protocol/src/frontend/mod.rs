//! The frontend library: what a VMM links to have its VM's timers kept by a backend process.
//!
//! [`TimerFrontend`] connects, does the vhost-user handshake, and owns the memory shared with
//! the backend and the rings in it. From it come
//!
//! - [`RequestQueue`]s: every operation of the protocol, from any thread;
//! - an [`EventStream`]: timers that expired, phases that changed;
//! - a [`TimePage`]: the clocks without a request;
//! - a [`ShutdownHandle`]: ends every wait.
//!
//! What holds throughout:
//!
//! - Every wait ends: at its [`Deadline`], when the backend dies (at once), or by the shutdown
//!   handle. That goes for connecting and for control messages too ([`Options::timeout`]).
//! - The backend is not trusted. Whatever it writes to the shared memory, the worst that comes
//!   of it is an [`Error::Protocol`], and the end of that queue.
//! - There is no thread of the library's own, except for the length of a control message. When
//!   the frontend and all that came from it are dropped, no descriptor and no mapping is left.
//!
//! Losing the connection changes nothing in the VM: a new frontend finds it as it was.
//!
//! # Saving on one host and restoring on another
//!
//! The guarantee that this is all about: on the destination no vCPU runs before every one of
//! them has its timers back, and all of them run with the same offset.
//!
//! ```no_run
//! use std::time::Duration;
//! use vhost_user_timer_protocol::frontend::{
//!     Deadline, Error, Options, RestoreOptions, SavedVm, TimerFrontend,
//! };
//!
//! const SECOND: Duration = Duration::from_secs(1);
//!
//! /// On the source, once no vCPU runs any more.
//! fn save(frontend: &TimerFrontend) -> Result<SavedVm, Error> {
//!     let queue = &frontend.queues()[0];
//!     queue.pause(false, SECOND)?;
//!     queue.save(SECOND)
//! }
//!
//! /// On the destination.
//! fn restore(saved: &SavedVm) -> Result<(), Error> {
//!     let frontend = TimerFrontend::connect("/run/vm1/timer.sock", Options::default())?;
//!     let queue = &frontend.queues()[0];
//!     let vcpus = saved.vcpus.len() as u32;
//!     queue.configure(vcpus, saved.abi, saved.frequency, SECOND)?;
//!     let options = RestoreOptions {
//!         autorun: true,
//!         timeout: Some(10 * SECOND),
//!         ..RestoreOptions::default()
//!     };
//!     queue.restore_begin(vcpus, options, SECOND)?;
//!
//!     // Each vCPU thread restores its own registers, in whatever order they come.
//!     std::thread::scope(|scope| {
//!         for vcpu in &saved.vcpus {
//!             let queue = frontend.queue_of(vcpu.vcpu.get());
//!             scope.spawn(move || -> Result<(), Error> {
//!                 queue.restore_vcpu(vcpu, SECOND)?;
//!                 let run = queue.wait_run(vcpu.vcpu.get(), Deadline::NEVER)?;
//!                 println!("running with cntvoff {:#x}", run.cntvoff);
//!                 // KVM_ARM_SET_COUNTER_OFFSET, KVM_RUN, …
//!                 Ok(())
//!             });
//!         }
//!     });
//!     Ok(())
//! }
//! # let _ = (save, restore);
//! ```
//!
//! # Many requests, one kick
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vhost_user_timer_protocol::frontend::{Call, Error, RequestQueue};
//! # use vhost_user_timer_protocol::{Abi, Register};
//! fn compare_values(queue: &RequestQueue, vcpus: u32) -> Result<Vec<u64>, Error> {
//!     let ids = [Register::TimerCval.id(Abi::Arm64)];
//!     let tickets = (0..vcpus)
//!         .map(|vcpu| queue.submit(&Call::get_regs(vcpu, &ids)))
//!         .collect::<Result<Vec<_>, _>>()?;
//!     queue.kick();
//!     tickets
//!         .into_iter()
//!         .map(|ticket| Ok(ticket.wait(Duration::from_secs(1))?[0].1))
//!         .collect()
//! }
//! # let _ = compare_values;
//! ```

mod call;
mod connection;
mod error;
mod events;
mod memory;
mod ops;
mod queue;
mod ring;
mod time_page;
mod types;
mod wait;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use call::{Answer, Call, MAX_REGS, RawAnswer, Remaining};
pub use error::{Error, Fault, Refusal, RingFault};
pub use events::{Event, EventStream};
pub use queue::{RequestQueue, Ticket};
pub use time_page::{PageTime, TimePage};
pub use types::{Info, List, RegIds, RegValues, RestoreOptions, Run, SavedVm, SetRegs, Timer, Vm};
pub use wait::{Deadline, ShutdownHandle};

use connection::{Connection, Negotiated, Vring};
use events::EventLayout;
use memory::{Layout, SharedMemory};
use queue::QueueLayout;

use crate::{EVENT_QUEUE, FIRST_REQUEST_QUEUE, MAX_QUEUE_SIZE, MAX_REQUEST_QUEUES};

/// How a frontend is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Descriptors of a request queue: a power of two from 4 to 1024. As many requests can be in
    /// flight, or half as many with a backend that does not take indirect descriptors.
    pub queue_size: u16,
    /// Request queues, 1 to 16; `None` for all that the backend serves. More than it serves is
    /// an error.
    pub request_queues: Option<u16>,
    /// Event buffers: a power of two from 2 to 1024.
    pub event_buffers: u16,
    /// How long connecting, the handshake, and any later control message may take.
    pub timeout: Duration,
}

impl Default for Options {
    /// 256 descriptors, all queues, 256 event buffers, 10 s.
    fn default() -> Self {
        Options {
            queue_size: 256,
            request_queues: None,
            event_buffers: 256,
            timeout: Duration::from_secs(10),
        }
    }
}

impl Options {
    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }

    /// Sets [`request_queues`](Self::request_queues).
    #[must_use]
    pub fn request_queues(mut self, request_queues: u16) -> Self {
        self.request_queues = Some(request_queues);
        self
    }

    /// Sets [`event_buffers`](Self::event_buffers).
    #[must_use]
    pub fn event_buffers(mut self, event_buffers: u16) -> Self {
        self.event_buffers = event_buffers;
        self
    }

    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    fn check(&self) -> Result<(), Error> {
        let sizes = |least: u16| least..=MAX_QUEUE_SIZE;
        if !self.queue_size.is_power_of_two() || !sizes(4).contains(&self.queue_size) {
            return Err(Error::InvalidArgument(
                "The queue size must be a power of two from 4 to 1024",
            ));
        }
        if !self.event_buffers.is_power_of_two() || !sizes(2).contains(&self.event_buffers) {
            return Err(Error::InvalidArgument(
                "The number of event buffers must be a power of two from 2 to 1024",
            ));
        }
        let queues = self.request_queues.unwrap_or(1);
        if !(1..=MAX_REQUEST_QUEUES).contains(&queues) {
            return Err(Error::InvalidArgument("There are 1 to 16 request queues"));
        }
        Ok(())
    }
}

/// A connection to a timer backend, which serves one VM.
///
/// To drop it is to [`close`](Self::close) it, which takes [`Options::timeout`] at most: queues
/// that are still held elsewhere fail with [`Error::ShutDown`] from then on.
pub struct TimerFrontend {
    connection: Connection,
    negotiated: Negotiated,
    queues: Vec<RequestQueue>,
    events: Option<EventStream>,
    event_kick: Arc<OwnedFd>,
    time_page: TimePage,
    timeout: Duration,
    closed: bool,
}

impl TimerFrontend {
    /// Connects to the backend that listens at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`], or as [`from_stream`](Self::from_stream).
    pub fn connect(path: impl AsRef<Path>, options: Options) -> Result<Self, Error> {
        options.check()?;
        let deadline = options.timeout.into();
        let socket = connection::connect(path.as_ref(), deadline)?;
        Self::set_up(socket, options, ShutdownHandle::new()?, deadline)
    }

    /// Uses a socket that is connected to a backend.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for options out of range; [`Error::TimedOut`],
    /// [`Error::Disconnected`] and [`Error::Control`] for a handshake that fails;
    /// [`Error::MissingFeature`] and [`Error::Version`] for a backend that this library cannot
    /// work with; [`Error::Io`] where this process lacks resources.
    pub fn from_stream(socket: UnixStream, options: Options) -> Result<Self, Error> {
        Self::from_stream_with(socket, options, ShutdownHandle::new()?)
    }

    /// As [`from_stream`](Self::from_stream), with a shutdown handle that exists already, so
    /// that it can end the handshake too ([`Error::ShutDown`]).
    ///
    /// # Errors
    ///
    /// As [`from_stream`](Self::from_stream).
    pub fn from_stream_with(
        socket: UnixStream,
        options: Options,
        shutdown: ShutdownHandle,
    ) -> Result<Self, Error> {
        options.check()?;
        Self::set_up(socket, options, shutdown, options.timeout.into())
    }

    fn set_up(
        socket: UnixStream,
        options: Options,
        shutdown: ShutdownHandle,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let connection = Connection::new(socket, shutdown)?;
        let negotiated = connection.negotiate(deadline)?;
        if negotiated.has_config() {
            connection.config(deadline)?;
        }
        let count = options.request_queues.unwrap_or(negotiated.request_queues);
        if count > negotiated.request_queues {
            return Err(Error::MissingFeature("as many request queues as asked for"));
        }

        let mut layout = Layout::default();
        let time_page = TimePage::reserve(&mut layout);
        let event_layout = EventLayout::reserve(&mut layout, options.event_buffers);
        let (size, indirect) = (options.queue_size, negotiated.indirect());
        let queue_layouts: Vec<_> = (0..count)
            .map(|_| QueueLayout::reserve(&mut layout, size, indirect))
            .collect();
        let memory = Arc::new(SharedMemory::new(&layout)?);

        let (link, event_idx) = (&connection.link, negotiated.event_idx());
        let events = EventStream::new(link.clone(), memory.clone(), event_layout, event_idx)?;
        let queues = (FIRST_REQUEST_QUEUE..)
            .zip(queue_layouts)
            .map(|(index, layout)| {
                RequestQueue::new(index, link.clone(), memory.clone(), layout, event_idx)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let vrings: Vec<Vring<'_>> = std::iter::once(events.vring())
            .chain(queues.iter().map(RequestQueue::vring))
            .collect();
        connection.start(&memory, &vrings, deadline)?;
        drop(vrings);

        let frontend = TimerFrontend {
            event_kick: events.kick_fd(),
            connection,
            queues,
            events: Some(events),
            time_page: TimePage {
                memory,
                offset: time_page,
            },
            timeout: options.timeout,
            closed: false,
            negotiated,
        };
        // The event buffers were posted before the backend had the ring.
        wait::signal(&frontend.event_kick);
        if !frontend.negotiated.has_config() {
            frontend.queues[0].info(deadline)?;
        }
        Ok(frontend)
    }

    /// The request queues; at least one.
    pub fn queues(&self) -> &[RequestQueue] {
        &self.queues
    }

    /// The queue for a vCPU's requests: spreads vCPUs evenly over the queues. Any queue will do,
    /// though.
    pub fn queue_of(&self, vcpu: u32) -> &RequestQueue {
        &self.queues[vcpu as usize % self.queues.len()]
    }

    /// The VM's events. There is one stream: the first call gets it.
    pub fn take_events(&mut self) -> Option<EventStream> {
        self.events.take()
    }

    /// The time page, which the backend writes after [`TimePage::start`].
    pub fn time_page(&self) -> TimePage {
        self.time_page.clone()
    }

    /// What ends every wait of this frontend.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.connection.link.shutdown.clone()
    }

    /// The device's config space: the VM as GET_INFO tells it, by a control message and so
    /// without a queue; `host_count` is 0 there.
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeature`] where the backend has no config space, [`Error::Config`] or
    /// [`Error::Version`] for what is in it, or as the handshake.
    pub fn config(&self) -> Result<Info, Error> {
        if !self.negotiated.has_config() {
            return Err(Error::MissingFeature("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        self.connection.config(self.timeout.into())
    }

    /// Puts the VM back to NEW. The queues go on; a request in flight may be answered before or
    /// after it, or be refused.
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeature`] where the backend cannot be reset, or as the handshake.
    pub fn reset_device(&self) -> Result<(), Error> {
        let deadline = self.timeout.into();
        self.connection
            .reset_device(&self.negotiated, self.vring_indices(), deadline)?;
        // Kicks while the rings were disabled are lost.
        wait::signal(&self.event_kick);
        for queue in &self.queues {
            queue.force_kick();
        }
        Ok(())
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
        let shutdown = &self.connection.link.shutdown;
        // One who has shut the frontend down himself is in a hurry, or knows the backend hung.
        let stopped = if shutdown.was_used() {
            Ok(())
        } else {
            shutdown.shut_down();
            self.connection
                .stop(self.vring_indices(), self.timeout.into())
        };
        self.connection.close();
        stopped
    }
}

impl AsFd for TimerFrontend {
    /// The control socket, for an event loop: it reports a hang-up (`POLLHUP`, `POLLRDHUP`) when
    /// the backend is gone. It must not be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.link.socket.as_fd()
    }
}

impl Drop for TimerFrontend {
    fn drop(&mut self) {
        // The connection ends either way; nobody is left to be told how.
        let _ = self.stop();
    }
}

impl std::fmt::Debug for TimerFrontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimerFrontend")
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
