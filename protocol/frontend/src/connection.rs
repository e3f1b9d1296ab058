//! The control channel: vhost-user messages by vhost's `Frontend`, each within its time.
//!
//! vhost retries forever when a receive runs into SO_RCVTIMEO, so a socket time-out cannot bound a
//! message. Instead a guard thread stands by during each exchange. At the deadline, or on a
//! shutdown, the guard shuts the socket down, and `Frontend` fails. The connection is then
//! unusable, as it must be: nobody knows how much of a message the peer has received.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
};
use vhost::vhost_user::{
    Frontend as ControlChannel, VhostUserFrontend, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::FromBytes;

use crate::error::{ControlError, Feature};
use crate::memory::SharedMemory;
use crate::ring::RingLayout;
use crate::sys::{eventfd, io, lock, poll, signal};
use crate::wait::{Deadline, ShutdownHandle};
use crate::{Error, Info};
use vhost_user_timer_protocol::{FIRST_REQUEST_QUEUE, MAX_REQUEST_QUEUES, wire};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const INFO_LEN: usize = size_of::<wire::Info>();

/// What both sides agreed on.
pub(crate) struct Negotiated {
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Request queues that the backend serves.
    pub(crate) request_queues: u16,
}

impl Negotiated {
    pub(crate) fn event_idx(&self) -> bool {
        self.features & EVENT_IDX != 0
    }

    pub(crate) fn indirect(&self) -> bool {
        self.features & INDIRECT_DESC != 0
    }

    pub(crate) fn has_device_state(&self) -> bool {
        let feature = VhostUserProtocolFeatures::DEVICE_STATE;
        self.protocol.contains(feature)
    }

    pub(crate) fn has_config(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
    }
}

/// A virtqueue, as the backend is told of it.
pub(crate) struct VringSetup<'a> {
    pub(crate) index: u16,
    pub(crate) layout: RingLayout,
    pub(crate) call: &'a OwnedFd,
    pub(crate) kick: &'a OwnedFd,
}

/// The control channel of one connection.
pub(crate) struct Connection {
    channel: Mutex<ControlChannel>,
    /// Another descriptor of the `Frontend`'s socket.
    pub(crate) socket: UnixStream,
    shutdown: ShutdownHandle,
}

/// Connects to a listening backend.
pub(crate) fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream, Error> {
    let connect = || -> rustix::io::Result<UnixStream> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let address = SocketAddrUnix::new(path)?;
        loop {
            // A listener whose backlog is full makes connect() wait for this long (unix(7)).
            // Zero would mean forever.
            let left = deadline
                .remaining()
                .map(|left| left.max(std::time::Duration::from_millis(1)));
            set_socket_timeout(&socket, Timeout::Send, left)?;
            match rustix::net::connect(&socket, &address) {
                Err(rustix::io::Errno::INTR) if !deadline.has_passed() => {}
                other => break other?,
            }
        }
        Ok(UnixStream::from(socket))
    };
    connect().map_err(|e| match e {
        rustix::io::Errno::AGAIN => Error::TimedOut { what: "connect" },
        e => Error::Connect {
            path: path.to_owned(),
            source: e.into(),
        },
    })
}

/// Another descriptor of the eventfd, in the type that vhost takes.
#[expect(
    unsafe_code,
    reason = "vmm-sys-util has no other way from an OwnedFd to an EventFd"
)]
fn vhost_eventfd(fd: &OwnedFd) -> Result<EventFd, Error> {
    let fd = fd.try_clone().map_err(io("duplicate an eventfd"))?;
    // SAFETY: `into_raw_fd` passes on the ownership of an open descriptor of an eventfd.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Names the message in its error.
fn message<T>(message: &'static str, result: vhost::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::Control {
        message,
        source: ControlError::new(source),
    })
}

impl Connection {
    pub(crate) fn new(socket: UnixStream, shutdown: ShutdownHandle) -> Result<Self, Error> {
        let error = io("set up the control socket");
        // vhost would spin on a receive that returns early.
        socket.set_nonblocking(false).map_err(&error)?;
        socket.set_read_timeout(None).map_err(&error)?;
        socket.set_write_timeout(None).map_err(&error)?;
        let own = socket.try_clone().map_err(&error)?;
        let queues = u64::from(FIRST_REQUEST_QUEUE + MAX_REQUEST_QUEUES);
        Ok(Connection {
            channel: Mutex::new(ControlChannel::from_stream(socket, queues)),
            socket: own,
            shutdown,
        })
    }

    /// Exchanges messages within the deadline. Nothing is sent after it, and then the connection
    /// stays as it is.
    fn exchange<T>(
        &self,
        what: &'static str,
        deadline: Deadline,
        heed_shutdown: bool,
        exchange: impl FnOnce(&mut ControlChannel) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut channel = lock(&self.channel);
        if heed_shutdown && self.shutdown.was_used() {
            return Err(Error::ShutDown);
        }
        // Another thread's exchange may have taken all the time.
        if deadline.has_passed() {
            return Err(Error::TimedOut { what });
        }
        let done = eventfd()?;
        // By the exchange or by the deadline, whichever is first: what was answered in time does
        // not lose its connection.
        let ended = AtomicBool::new(false);
        let guard = || {
            let mut fds = [
                PollFd::new(&done, PollFlags::IN),
                PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN),
            ];
            let watched = if heed_shutdown { 2 } else { 1 };
            let _ = poll(&mut fds[..watched], deadline);
            if fds[0].revents().is_empty() && !ended.swap(true, Ordering::Relaxed) {
                self.close();
            }
        };
        let result = std::thread::scope(|scope| {
            let guard = std::thread::Builder::new()
                .name("vhost-user-guard".into())
                .spawn_scoped(scope, guard)
                .map_err(io("start a thread"))?;
            let result = exchange(&mut channel);
            let late = ended.swap(true, Ordering::Relaxed);
            signal(&done);
            // The scope waits for the closure, not for the thread to exit.
            let _ = guard.join();
            match late {
                true if heed_shutdown && self.shutdown.was_used() => Err(Error::ShutDown),
                true => Err(Error::TimedOut { what }),
                false => result,
            }
        });
        match result {
            Err(Error::Control { source, .. }) if source.is_disconnect() => {
                Err(Error::Disconnected)
            }
            result => result,
        }
    }

    /// Ends the connection; the backend and every wait see it closed.
    pub(crate) fn close(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Negotiates features and the number of queues. After a reconnect they must be what they were
    /// before.
    pub(crate) fn negotiate(
        &self,
        previous: Option<&Negotiated>,
        deadline: Deadline,
    ) -> Result<Negotiated, Error> {
        self.exchange("the handshake", deadline, true, |channel| {
            let offered = message("GET_FEATURES", channel.get_features())?;
            for (bit, feature) in [
                (VERSION_1, Feature::VirtioVersion1),
                (PROTOCOL_FEATURES, Feature::ProtocolFeatures),
            ] {
                if offered & bit == 0 {
                    return Err(Error::MissingFeature(feature));
                }
            }
            let wanted = VERSION_1 | PROTOCOL_FEATURES | INDIRECT_DESC | EVENT_IDX;
            let features = offered & previous.map_or(wanted, |previous| previous.features);

            let offered = message("GET_PROTOCOL_FEATURES", channel.get_protocol_features())?;
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::DEVICE_STATE;
            let protocol = offered & previous.map_or(wanted, |previous| previous.protocol);
            if !protocol.contains(VhostUserProtocolFeatures::MQ) {
                return Err(Error::MissingFeature(Feature::Mq));
            }
            let set = channel.set_protocol_features(protocol);
            message("SET_PROTOCOL_FEATURES", set)?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                channel.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }

            let queues = message("GET_QUEUE_NUM", channel.get_queue_num())?;
            let request_queues = queues.saturating_sub(u64::from(FIRST_REQUEST_QUEUE));
            let request_queues = request_queues.min(u64::from(MAX_REQUEST_QUEUES)) as u16;
            if request_queues == 0 {
                return Err(Error::MissingFeature(Feature::RequestQueues {
                    wanted: 1,
                    offered: 0,
                }));
            }
            let less = |previous: &Negotiated| {
                (features, protocol) != (previous.features, previous.protocol)
                    || request_queues < previous.request_queues
            };
            if previous.is_some_and(less) {
                return Err(Error::MissingFeature(Feature::SameAsBefore));
            }
            message("SET_OWNER", channel.set_owner())?;
            message("SET_FEATURES", channel.set_features(features))?;
            Ok(Negotiated {
                features,
                protocol,
                request_queues,
            })
        })
    }

    /// Shares the memory and starts the rings.
    pub(crate) fn start(
        &self,
        memory: &SharedMemory,
        vrings: &[VringSetup<'_>],
        deadline: Deadline,
    ) -> Result<(), Error> {
        self.exchange("the handshake", deadline, true, |channel| {
            let table = [memory.region_info()];
            message("SET_MEM_TABLE", channel.set_mem_table(&table))?;
            for vring in vrings {
                let (index, size) = (usize::from(vring.index), vring.layout.size);
                let config = VringConfigData {
                    queue_max_size: size,
                    queue_size: size,
                    flags: 0,
                    desc_table_addr: memory.address(vring.layout.descriptors),
                    used_ring_addr: memory.address(vring.layout.used),
                    avail_ring_addr: memory.address(vring.layout.avail),
                    log_addr: None,
                };
                let (call, kick) = (vhost_eventfd(vring.call)?, vhost_eventfd(vring.kick)?);
                message("SET_VRING_NUM", channel.set_vring_num(index, size))?;
                message("SET_VRING_ADDR", channel.set_vring_addr(index, &config))?;
                message("SET_VRING_BASE", channel.set_vring_base(index, 0))?;
                message("SET_VRING_CALL", channel.set_vring_call(index, &call))?;
                message("SET_VRING_KICK", channel.set_vring_kick(index, &kick))?;
            }
            enable(channel, vrings.iter().map(|vring| vring.index))
        })
    }

    /// The device's config space.
    pub(crate) fn config(&self, deadline: Deadline) -> Result<Info, Error> {
        let bytes = self.exchange("GET_CONFIG", deadline, true, |channel| {
            let flags = VhostUserConfigFlags::empty();
            let config = channel.get_config(0, INFO_LEN as u32, flags, &[0; INFO_LEN]);
            Ok(message("GET_CONFIG", config)?.1)
        })?;
        // vhost checked the length.
        let info = wire::Info::read_from_bytes(&bytes).unwrap_or_default();
        Info::from_config(&info)
    }

    /// Resets the device and starts the rings again.
    pub(crate) fn reset_device(
        &self,
        negotiated: &Negotiated,
        vrings: impl Iterator<Item = u16>,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let feature = VhostUserProtocolFeatures::RESET_DEVICE;
        if !negotiated.protocol.contains(feature) {
            return Err(Error::MissingFeature(Feature::ResetDevice));
        }
        self.exchange("RESET_DEVICE", deadline, true, |channel| {
            message("RESET_DEVICE", channel.reset_device())?;
            // A reset clears the features and disables the rings; the rings stay set up.
            message("SET_FEATURES", channel.set_features(negotiated.features))?;
            enable(channel, vrings)
        })
    }

    /// Makes the backend save or load its state through this descriptor, or through the one that it
    /// returns instead.
    pub(crate) fn transfer_device_state(
        &self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
        deadline: Deadline,
    ) -> Result<Option<OwnedFd>, Error> {
        self.exchange("SET_DEVICE_STATE_FD", deadline, true, |channel| {
            let stopped = VhostTransferStatePhase::STOPPED;
            let other = channel.set_device_state_fd(direction, stopped, fd);
            Ok(message("SET_DEVICE_STATE_FD", other)?.map(OwnedFd::from))
        })
    }

    /// Asks whether the transfer succeeded.
    pub(crate) fn check_device_state(&self, deadline: Deadline) -> Result<(), Error> {
        self.exchange("CHECK_DEVICE_STATE", deadline, true, |channel| {
            message("CHECK_DEVICE_STATE", channel.check_device_state())
        })
    }

    /// Stops the rings, even after a shutdown.
    pub(crate) fn stop(
        &self,
        vrings: impl Iterator<Item = u16>,
        deadline: Deadline,
    ) -> Result<(), Error> {
        self.exchange("GET_VRING_BASE", deadline, false, |channel| {
            for index in vrings {
                let base = channel.get_vring_base(usize::from(index));
                message("GET_VRING_BASE", base)?;
            }
            Ok(())
        })
    }
}

fn enable(channel: &mut ControlChannel, vrings: impl Iterator<Item = u16>) -> Result<(), Error> {
    for index in vrings {
        let enabled = channel.set_vring_enable(usize::from(index), true);
        message("SET_VRING_ENABLE", enabled)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_its_deadline_an_exchange_sends_nothing_and_leaves_the_connection_as_it_is() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, ShutdownHandle::new().unwrap()).unwrap();
        let passed = Deadline::from(std::time::Duration::ZERO);
        let late = connection.exchange("a message", passed, true, |_| -> Result<(), Error> {
            panic!("it is too late to send")
        });
        assert!(matches!(late, Err(Error::TimedOut { what: "a message" })));
        let mut end = [PollFd::new(&theirs, PollFlags::IN | PollFlags::RDHUP)];
        poll(&mut end, passed).unwrap();
        assert!(end[0].revents().is_empty(), "the connection was closed");
    }
}
