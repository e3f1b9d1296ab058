//! A connection to a backend, from the handshake to its end.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

use crate::connection::{Connection, VringSetup};
use crate::events::{EventLayout, EventQueue};
use crate::memory::{Layout, SharedMemory};
use crate::queue::QueueLayout;
use crate::session::{Session, Survivor};
use crate::{
    Connector, Deadline, Error, EventStream, Feature, Info, InvalidArgument, Options, RequestQueue,
    ShutdownHandle, TimePage,
};
use vhost_user_timer_protocol::{EVENT_QUEUE, FIRST_REQUEST_QUEUE};

/// A timer backend, which serves one VM.
///
/// Dropping it [closes](Self::close) it, which takes [`Options::timeout`] at most. Queues that are
/// still held elsewhere fail with [`Error::ShutDown`] from then on.
pub struct Frontend {
    pub(crate) session: Arc<Session>,
    queues: Vec<RequestQueue>,
    events: Arc<EventQueue>,
    /// Not taken yet.
    stream: Option<EventStream>,
    closed: bool,
}

impl Frontend {
    /// Connects to a backend: by the path that it listens at, over a socket that is connected
    /// already, or by a function ([`Connector`]). [`Backend::spawn`](crate::Backend::spawn)
    /// launches one and connects to it.
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
    /// offsets ([`resume_with`](Self::resume_with), [`Restore::apply`](crate::Restore::apply)).
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

    pub(crate) fn stop(&mut self) -> Result<(), Error> {
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
