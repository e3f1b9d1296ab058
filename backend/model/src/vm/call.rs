//! What goes into the model and what comes out: requests, answers, effects.

use alloc::vec::Vec;

use vhost_user_timer_protocol::abi::BadId;
use vhost_user_timer_protocol::op::Effect;
use vhost_user_timer_protocol::{Phase, Request, Status, wire};
use zerocopy::{Immutable, IntoBytes};

/// A name that the shell gives a WAIT_RUN, to find its place again when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The request queue.
    pub queue: u16,
    /// The head of the descriptor chain.
    pub head: u16,
}

/// One request as it came in.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The request, or the status with which its bytes are refused.
    pub request: Result<Request<'a>, Status>,
    /// How many device-writable bytes there are: at least those of a response header.
    pub room: usize,
    /// Where the answer belongs.
    pub token: Token,
}

impl<'a> Incoming<'a> {
    /// The request in these device-readable bytes.
    pub fn parse(bytes: &'a [u8], room: usize, token: Token) -> Self {
        Incoming {
            request: Request::parse(bytes),
            room,
            token,
        }
    }

    /// The most that handling it can change.
    pub fn effect(&self) -> Effect {
        self.request
            .map_or(Effect::Reads, |request| request.row().effect)
    }
}

/// Whether a request was answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Handled {
    /// The answer is in [`Effects::response`].
    Answered,
    /// It waits. Its token comes back in [`Effects::released`] when it is answered.
    Waiting,
}

/// Waiters that are answered, all with the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// The waiters to answer.
    pub waiters: Vec<Token>,
    /// The answer's header.
    pub header: wire::ResponseHeader,
    /// The answer's body, where they may run.
    pub run: Option<wire::Run>,
}

/// Something that the log should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The VM's phase changed.
    Phase {
        /// The previous phase.
        from: Phase,
        /// The new phase.
        to: Phase,
        /// The epoch of the new phase.
        epoch: u64,
    },
    /// A restore takes longer than the VMM allowed. It stays open.
    RestoreTimedOut {
        /// The vCPUs that are missing, in index order; none in ARMED, where the VMM has not
        /// confirmed the offsets.
        missing: Vec<u32>,
        /// How many vCPUs the VM has.
        vcpus: u32,
    },
    /// ELAPSED was asked for, but the state was saved in this host's future.
    RealtimeWentBack {
        /// By how much, ns.
        ns: u64,
    },
    /// The VM has ONE_OFFSET, and a restore brought another physical count than the virtual one,
    /// which the guest reads instead.
    PhysicalCountMoved {
        /// By how many ticks the guest's physical count moves.
        ticks: i64,
    },
}

/// What a state file must record before an answer may be seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The VM's own part; also where vCPUs changed.
    pub vm: bool,
    /// These vCPUs.
    pub vcpus: Vec<u32>,
    /// Everything.
    pub all: bool,
}

impl Changed {
    /// Whether anything changed at all.
    pub fn any(&self) -> bool {
        self.vm || self.all || !self.vcpus.is_empty()
    }

    fn clear(&mut self) {
        self.vm = false;
        self.all = false;
        self.vcpus.clear();
    }
}

/// What calls into the model led to, for the shell to carry out. The shell reuses it from call to
/// call, so that nothing is allocated for a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The answer to the last request, header first.
    pub response: Vec<u8>,
    /// Waiters to answer; the shell takes them out.
    pub released: Vec<Released>,
    /// What to log; the shell takes it out.
    pub notices: Vec<Notice>,
    /// See [`take_changed`](Self::take_changed).
    pub(super) changed: Changed,
    /// What SET_TIME_PAGE asks for. The shell takes it out, and does it or has it refused
    /// ([`Vm::refuse`](super::Vm::refuse)).
    pub page: Option<PageOrder>,
}

impl Effects {
    /// No effects yet, and room for an answer of this many bytes.
    pub fn with_capacity(answer: usize) -> Self {
        Effects {
            response: Vec::with_capacity(answer),
            ..Effects::default()
        }
    }

    /// Whether the last request was answered OK.
    pub fn is_done(&self) -> bool {
        let status = self.response.first_chunk().copied();
        status.map(u32::from_le_bytes) == Some(Status::Ok.errno())
    }

    /// Gives `record` what changed since it was last taken, and forgets it. `None`, without a call,
    /// if nothing changed.
    pub fn take_changed<T>(&mut self, record: impl FnOnce(&Changed) -> T) -> Option<T> {
        self.changed.any().then(|| {
            let recorded = record(&self.changed);
            self.changed.clear();
            recorded
        })
    }
}

/// Why a request is refused, or waiters are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) detail: u32,
}

impl Refusal {
    pub(super) fn new(status: Status, detail: u32) -> Self {
        Refusal { status, detail }
    }

    /// The entry at this index names no register.
    pub(super) fn bad_id(bad: BadId, entry: usize) -> Self {
        let status = match bad {
            BadId::Invalid => Status::Invalid,
            BadId::Unknown => Status::UnknownRegister,
        };
        Refusal::new(status, entry as u32)
    }

    /// The entry at this index has a bad value.
    pub(super) fn invalid(entry: usize) -> Self {
        Refusal::new(Status::Invalid, entry as u32)
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Refusal::new(status, 0)
    }
}

/// Where an answer's body goes, once it is sure to fit.
pub(super) struct Answer<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) room: usize,
}

/// Length of an answer's header, bytes.
pub(super) const HEADER: usize = size_of::<wire::ResponseHeader>();

impl Answer<'_> {
    /// The last check of every operation: that a body of this length fits.
    pub(super) fn needs(&self, body: usize) -> Result<(), Refusal> {
        let len = HEADER + body;
        if len <= self.room {
            Ok(())
        } else {
            Err(Refusal::new(Status::TooBig, len as u32))
        }
    }

    pub(super) fn push(&mut self, part: &(impl IntoBytes + Immutable)) {
        self.out.extend_from_slice(part.as_bytes());
    }

    /// Checks that it fits, and gives it as the whole body.
    pub(super) fn give(&mut self, body: &(impl IntoBytes + Immutable)) -> Result<(), Refusal> {
        self.needs(size_of_val(body))?;
        self.push(body);
        Ok(())
    }
}

/// What SET_TIME_PAGE asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOrder {
    /// To write the page here from now on.
    WriteAt {
        /// Aligned as the page is.
        address: u64,
        /// The length that the frontend states, bytes: enough for a page.
        length: u64,
    },
    /// To stop writing the page.
    Stop,
}

impl PageOrder {
    pub(super) fn parse(order: &wire::TimePage) -> Result<Self, Refusal> {
        const LEN: u64 = size_of::<wire::Page>() as u64;
        let (address, length) = (order.address.get(), order.length.get());
        match length {
            0 => Ok(PageOrder::Stop),
            _ if length < LEN || !address.is_multiple_of(LEN) => Err(Status::Invalid.into()),
            _ => Ok(PageOrder::WriteAt { address, length }),
        }
    }
}
