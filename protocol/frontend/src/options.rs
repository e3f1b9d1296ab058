//! How a frontend is set up, and what it does about a lost connection.

use std::time::Duration;

use crate::{Error, Info, InvalidArgument, ShutdownHandle};
use vhost_user_timer_protocol::wire::configure_flags;
use vhost_user_timer_protocol::{CounterSource, MAX_QUEUE_SIZE, MAX_REQUEST_QUEUES};

/// How a frontend is set up.
#[derive(Clone, Debug)]
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
    /// Whether connecting to a path waits, up to [`timeout`](Self::timeout), for a backend that
    /// does not listen there yet, as one that was launched just now. Without this, it fails at
    /// once.
    pub wait_for_listener: bool,
    /// Whether and how to reconnect after the connection is lost. It takes a backend with a config
    /// space.
    pub reconnect: Option<Reconnect>,
    /// What the hypervisor's guest counter is an offset of, if the backend must count by the same:
    /// [`Cntvct`](CounterSource::Cntvct) for KVM on AArch64. A backend that counts by something
    /// else, or whose counter is anchored (SET_COUNTER_ANCHOR), is [`Error::HostCounter`] when it
    /// is connected to, and before offsets are applied. `None`: no check.
    pub host_counter: Option<CounterSource>,
    /// The handle that ends the frontend's waits, connecting included. `None`: the frontend makes
    /// its own.
    pub shutdown: Option<ShutdownHandle>,
}

/// What CONFIGURE_VM fixes of a VM beside its vCPUs, ABI and frequency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct VmOptions {
    /// CONFIRM: RESUME, and the end of a restore, lead to ARMED instead of RUNNING. The offsets are
    /// decided then, and nobody runs before they are applied to the hypervisor and confirmed
    /// (CONFIRM_RUN): by [`Restore::apply`](crate::Restore::apply) and
    /// [`Frontend::resume_with`](crate::Frontend::resume_with).
    pub confirm: bool,
    /// ONE_OFFSET: the physical count always has the virtual count's offset, as a hypervisor makes
    /// it that has one offset for both (KVM_ARM_SET_COUNTER_OFFSET).
    pub one_offset: bool,
}

impl VmOptions {
    /// For a VM whose offset goes into KVM by KVM_ARM_SET_COUNTER_OFFSET: CONFIRM and ONE_OFFSET.
    pub const KVM: VmOptions = VmOptions {
        confirm: true,
        one_offset: true,
    };

    /// Sets [`confirm`](Self::confirm).
    #[must_use]
    pub fn confirm(mut self, confirm: bool) -> Self {
        self.confirm = confirm;
        self
    }

    /// Sets [`one_offset`](Self::one_offset).
    #[must_use]
    pub fn one_offset(mut self, one_offset: bool) -> Self {
        self.one_offset = one_offset;
        self
    }

    /// The flags of CONFIGURE_VM.
    pub(crate) fn flags(self) -> u8 {
        let flag = |set: bool, bit| if set { bit } else { 0 };
        flag(self.confirm, configure_flags::CONFIRM)
            | flag(self.one_offset, configure_flags::ONE_OFFSET)
    }

    /// Whether a VM with these options has all that `asked` asks for.
    pub(crate) fn include(self, asked: VmOptions) -> bool {
        self.flags() & asked.flags() == asked.flags()
    }
}

impl From<&Info> for VmOptions {
    /// The options that the VM was configured with.
    fn from(info: &Info) -> Self {
        VmOptions {
            confirm: info.confirm,
            one_offset: info.one_offset,
        }
    }
}

/// How to reconnect after the connection is lost.
///
/// A request that was answered is not sent again. A request without an answer is, since carrying it
/// out twice has the same effect as once, or the library sees that it was carried out:
///
/// - GET_INFO, GET_REG_LIST, GET_REGS, GET_VM: only read.
/// - CONFIGURE_VM: the same values again are accepted in every phase.
/// - SET_REGS and SET_VM with DONE: as RESTORE_DONE. If the restore was completed, the lines of
///   SET_REGS's answer are read again, by an empty SET_REGS.
/// - SET_REGS: writes the same values; a count, in PAUSED, freezes the clock at the same value.
///   Refused with EBUSY or ESTALE after a change of phase that was sent behind it: uncertain.
/// - SET_VM: stages the same values. Refused with EBUSY after a RESTORE_DONE that was sent behind
///   it: uncertain.
/// - SET_COUNTER_OFFSET, SET_COUNTER_ANCHOR: the same offset, the same pair. Refused as SET_REGS
///   is.
/// - PAUSE, RESUME: in PAUSED and RUNNING, respectively, nothing changes. Refused as SET_REGS is.
/// - CONFIRM_RUN: in RUNNING with the same offsets nothing changes. Nothing is applied again.
/// - RESTORE_BEGIN: would drop what was staged since, so it is sent only if the epoch has not
///   grown. If the epoch has grown, it was carried out.
/// - RESTORE_DONE: done stays done. EBUSY in the same epoch: the restore was completed, and no vCPU
///   is missing. Uncertain if a RESTORE_ABORT was sent as well.
/// - RESTORE_ABORT: sent only while the restore is open, or where it cannot have closed the
///   restore. If the restore was closed, it was carried out. Uncertain if an unanswered
///   RESTORE_DONE, or a PAUSE in ARMED, may have closed the restore.
/// - WAIT_RUN: changes nothing: it waits on, or gets the current offsets. ESTALE is the truth. If a
///   RESTORE_ABORT was carried out meanwhile, it is not sent, but answered with ECANCELED.
/// - SET_TIME_PAGE: the same page. The library names its own page again on every connection.
/// - An unknown operation is not sent again: uncertain.
///
/// *Uncertain* is [`Error::Uncertain`]. This project's backend leaves at most one state change
/// unanswered (SPEC.md, "Requests"). With it, only threads that issue conflicting operations see
/// that error, such as one that completes a restore while another aborts it.
///
/// A restore's time-out during the outage may go unreported: WAIT_RUN then waits on.
///
/// RESET_DEVICE and the load of a device state are control messages. The first is sent again, and
/// does the same; for the second the epoch tells whether it was done.
///
/// An attempt to reconnect takes as long as a handshake, and ends at the deadline of the thread
/// that makes it. If every thread waits in very short turns, no attempt gets anywhere:
/// [`keep_connected`](crate::Frontend::keep_connected) is for that, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reconnect {
    /// How long an outage may last before it is [`Error::Disconnected`]. If the backend goes away
    /// again without having answered anything, the same outage goes on.
    pub patience: Duration,
    /// How long to wait after the first attempt that fails, from 1 ms to 1 h. The first attempt is
    /// made at once; the wait doubles with each one.
    pub first_delay: Duration,
    /// The longest such wait, up to 1 h.
    pub max_delay: Duration,
}

impl Default for Reconnect {
    /// 30 s, 10 ms, 1 s.
    fn default() -> Self {
        Reconnect {
            patience: Duration::from_secs(30),
            first_delay: Duration::from_millis(10),
            max_delay: Duration::from_secs(1),
        }
    }
}

impl Reconnect {
    /// Sets [`patience`](Self::patience).
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sets [`first_delay`](Self::first_delay) and [`max_delay`](Self::max_delay).
    #[must_use]
    pub fn delays(mut self, first: Duration, max: Duration) -> Self {
        (self.first_delay, self.max_delay) = (first, max);
        self
    }

    fn check(&self) -> Result<(), Error> {
        let least = Duration::from_millis(1);
        let most = Duration::from_secs(60 * 60);
        if (least..=most).contains(&self.first_delay)
            && (self.first_delay..=most).contains(&self.max_delay)
        {
            Ok(())
        } else {
            Err(Error::InvalidArgument(InvalidArgument::ReconnectDelays {
                first: self.first_delay,
                max: self.max_delay,
            }))
        }
    }
}

impl Default for Options {
    /// 256 descriptors, all queues, 256 event buffers, 10 s, waiting for a listener, no
    /// reconnecting.
    fn default() -> Self {
        Options {
            queue_size: 256,
            request_queues: None,
            event_buffers: 256,
            timeout: Duration::from_secs(10),
            wait_for_listener: true,
            reconnect: None,
            host_counter: None,
            shutdown: None,
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

    /// Sets [`wait_for_listener`](Self::wait_for_listener).
    #[must_use]
    pub fn wait_for_listener(mut self, wait: bool) -> Self {
        self.wait_for_listener = wait;
        self
    }

    /// Sets [`reconnect`](Self::reconnect).
    #[must_use]
    pub fn reconnect(mut self, reconnect: Reconnect) -> Self {
        self.reconnect = Some(reconnect);
        self
    }

    /// Sets [`host_counter`](Self::host_counter).
    #[must_use]
    pub fn host_counter(mut self, source: CounterSource) -> Self {
        self.host_counter = Some(source);
        self
    }

    /// Sets [`shutdown`](Self::shutdown).
    #[must_use]
    pub fn shutdown(mut self, shutdown: ShutdownHandle) -> Self {
        self.shutdown = Some(shutdown);
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        self.reconnect.as_ref().map_or(Ok(()), Reconnect::check)?;
        let sizes = |least: u16| least..=MAX_QUEUE_SIZE;
        if !self.queue_size.is_power_of_two() || !sizes(4).contains(&self.queue_size) {
            return Err(InvalidArgument::QueueSize(self.queue_size).into());
        }
        if !self.event_buffers.is_power_of_two() || !sizes(2).contains(&self.event_buffers) {
            return Err(InvalidArgument::EventBuffers(self.event_buffers).into());
        }
        let queues = self.request_queues.unwrap_or(1);
        if !(1..=MAX_REQUEST_QUEUES).contains(&queues) {
            return Err(InvalidArgument::RequestQueues(queues).into());
        }
        Ok(())
    }
}
