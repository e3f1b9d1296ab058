//! What a backend did that the rules forbid.

use vhost_user_timer_protocol::Op;

/// A broken rule of virtio or of the timer protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// On the ring itself.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// An answer has a length that its operation's does not have.
    #[error("{len} bytes are no answer to {op}")]
    AnswerLength {
        /// The operation.
        op: Op,
        /// The answer's length in bytes, header included.
        len: usize,
    },
    /// An answer has a value that none can have.
    #[error("the answer to {op} has {fault}")]
    AnswerContent {
        /// The operation.
        op: Op,
        /// What is wrong with the answer.
        fault: ContentFault,
    },
    /// An event has a length that no event has.
    #[error("{len} bytes are no event")]
    EventLength {
        /// Its length in bytes.
        len: u32,
    },
}

/// A value that this version of the protocol does not have, in an answer or in the config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContentFault {
    /// A phase of an unknown code.
    #[error("unknown phase {0}")]
    Phase(u32),
    /// An ABI of an unknown code.
    #[error("unknown ABI {0}")]
    Abi(u8),
    /// GET_REGS answered with another register than asked for.
    #[error("a register that was not asked for")]
    UnaskedRegister,
    /// GET_VM answered with other vCPUs than asked for, or in another order.
    #[error("vCPUs out of order")]
    VcpuOrder,
}

/// A broken rule of virtio, on a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// The device used more chains than it had.
    #[error("used.idx says {used} chains where {in_flight} are in flight")]
    UsedIndex {
        /// Chains used, by used.idx.
        used: u16,
        /// Chains that the device had.
        in_flight: u16,
    },
    /// The device used a chain that is not in flight.
    #[error("used descriptor {id} is not in flight")]
    UsedId {
        /// The used entry's id.
        id: u32,
    },
    /// The device says that it wrote more than there is room for.
    #[error("used descriptor {id} with {len} bytes written has room for {writable}")]
    UsedLen {
        /// The used entry's id.
        id: u32,
        /// The used entry's length in bytes.
        len: u32,
        /// Bytes of the chain that are writable.
        writable: u32,
    },
}
