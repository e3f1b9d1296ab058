//! A message of the control channel: which request it is, and what belongs to it.
//!
//! QEMU, docs/interop/vhost-user.rst: "Header", "Message types". Numbers are in the host's byte
//! order.

use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag,
};

use crate::vhost_user::door::Refusal;
use crate::vhost_user::door::closing::PeerFds;

/// Request, flags and the length of the body, 32 bits each.
pub(super) const HEADER: usize = 12;

/// The longest message that the crate takes, header included.
pub(super) const LONGEST: usize = HEADER + MAX_MSG_SIZE;

/// The most descriptors that a message carries: one a region of SET_MEM_TABLE.
pub(super) const MOST_DESCRIPTORS: usize = MAX_ATTACHED_FD_ENTRIES;

/// The version of the protocol, in the lowest bits of the flags.
const VERSION: u32 = 1;

/// What a message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request: FrontendReq,
    pub(super) needs_reply: bool,
    /// Bytes that follow.
    pub(super) len: usize,
}

impl Header {
    /// # Errors
    ///
    /// Where this is no header of version 1 of the protocol, or the message is too long.
    pub(super) fn parse(bytes: [u8; HEADER]) -> Result<Self, Refusal> {
        let [request, flags, len] = words(&bytes);
        let Ok(known) = FrontendReq::try_from(request) else {
            return Err(Refusal(format!(
                "request {request} is unknown; negotiate the features that it belongs to"
            )));
        };
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION || flags & VhostUserHeaderFlag::RESERVED_BITS.bits() != 0 {
            return Err(Refusal(format!(
                "{known:?} has flags {flags:#x}; send version {VERSION}, and reserved bits as 0"
            )));
        }
        if len as usize > MAX_MSG_SIZE {
            return Err(Refusal(format!(
                "{known:?} has {len} bytes; send at most {MAX_MSG_SIZE}"
            )));
        }
        Ok(Header {
            request: known,
            needs_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
            len: len as usize,
        })
    }

    /// A reply whose body is one number.
    pub(super) fn reply(request: FrontendReq, value: u64) -> Vec<u8> {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let mut bytes = Vec::with_capacity(HEADER + 8);
        for word in [request.into(), flags, 8] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&value.to_ne_bytes());
        bytes
    }
}

/// A whole message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    /// Header and body.
    pub(super) bytes: Vec<u8>,
    pub(super) descriptors: PeerFds,
}

impl Message {
    pub(super) fn body(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// The descriptor of a message that carries one.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.descriptors.iter().next()
    }

    /// The body, as 32-bit numbers.
    ///
    /// # Errors
    ///
    /// Where it has another length.
    pub(super) fn u32s<const N: usize>(&self) -> Result<[u32; N], Refusal> {
        self.has_len(N * 4)?;
        Ok(words(self.body()))
    }

    /// The body, as 64-bit numbers.
    ///
    /// # Errors
    ///
    /// Where it has another length.
    pub(super) fn u64s<const N: usize>(&self) -> Result<[u64; N], Refusal> {
        self.has_len(N * 8)?;
        let mut numbers = [0; N];
        for (number, bytes) in numbers.iter_mut().zip(self.body().as_chunks().0) {
            *number = u64::from_ne_bytes(*bytes);
        }
        Ok(numbers)
    }

    fn has_len(&self, expected: usize) -> Result<(), Refusal> {
        let found = self.body().len();
        if found == expected {
            return Ok(());
        }
        Err(Refusal(format!(
            "it has {found} bytes; send {expected} bytes after the header"
        )))
    }
}

/// The first 32-bit numbers of these bytes; 0 where there are not so many.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// How many descriptors belong to a request. None where the crate would close them: that can wait
/// for a file's server, so the features with such requests are not offered.
pub(super) fn most_descriptors(request: FrontendReq) -> usize {
    match request {
        FrontendReq::SET_MEM_TABLE => MOST_DESCRIPTORS,
        FrontendReq::SET_LOG_BASE
        | FrontendReq::SET_VRING_KICK
        | FrontendReq::SET_VRING_CALL
        | FrontendReq::SET_VRING_ERR
        | FrontendReq::ADD_MEM_REG
        // Old frontends send one, "the back-end MUST close it".
        | FrontendReq::REM_MEM_REG
        | FrontendReq::SET_DEVICE_STATE_FD => 1,
        _ => 0,
    }
}

/// Whether a request has an answer of its own, asked for or not.
pub(super) fn is_always_answered(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::CHECK_DEVICE_STATE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(request: u32, flags: u32, len: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        for (to, word) in bytes
            .as_chunks_mut()
            .0
            .iter_mut()
            .zip([request, flags, len])
        {
            *to = word.to_ne_bytes();
        }
        bytes
    }

    #[test]
    fn a_header_is_a_known_request_of_version_1_with_a_bounded_length() {
        let parsed = Header::parse(header(12, 0x9, 8)).unwrap();
        assert_eq!(
            parsed,
            Header {
                request: FrontendReq::SET_VRING_KICK,
                needs_reply: true,
                len: 8
            }
        );
        assert!(!Header::parse(header(1, 1, 4096)).unwrap().needs_reply);
        for refused in [
            header(0, 1, 0),
            header(45, 1, 0),
            header(1, 0, 0),
            header(1, 2, 0),
            header(1, 0x11, 0),
            header(1, 1, 4097),
            header(1, 1, u32::MAX),
        ] {
            Header::parse(refused).unwrap_err();
        }
    }

    #[test]
    fn a_body_is_read_as_numbers_of_its_exact_length_only() {
        let header = Header::parse(header(8, 1, 8)).unwrap();
        let bytes: Vec<u8> = (0..20).collect();
        let message = Message {
            header,
            bytes,
            descriptors: PeerFds::default(),
        };
        let numbers = [12, 16].map(|first| u32::from_ne_bytes([0, 1, 2, 3].map(|n| n + first)));
        assert_eq!(message.u32s().unwrap(), numbers);
        assert_eq!(
            message.u32s::<1>().unwrap_err().to_string(),
            "it has 8 bytes; send 4 bytes after the header"
        );
        message.u64s::<2>().unwrap_err();
    }

    #[test]
    fn a_reply_is_a_header_and_a_number() {
        let mut expected = header(42, 5, 8).to_vec();
        expected.extend_from_slice(&0x101_u64.to_ne_bytes());
        assert_eq!(
            Header::reply(FrontendReq::SET_DEVICE_STATE_FD, 0x101),
            expected
        );
    }
}
