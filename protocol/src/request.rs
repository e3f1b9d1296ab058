//! Bytes → [`Request`].
//!
//! A request is parsed in the order in which SPEC.md checks it: framing (EPROTO), operation
//! (EOPNOTSUPP), reserved fields and unknown flags (EINVAL). What depends on the VM (its
//! vCPUs, epoch, phase, and the values in the body) is for the VM to check. Nothing here
//! panics or allocates, whatever the bytes.

use zerocopy::FromBytes;

pub use crate::op::Body;
use crate::op::{Op, Row, Scope};
use crate::wire::RequestHeader;
use crate::{Status, VM_WIDE};

/// A well-formed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The index of the vCPU that it is about, not checked yet; [`VM_WIDE`] where it is about the
    /// VM.
    pub vcpu: u32,
    /// The epoch that the caller means, or 0 for the current one.
    pub epoch: u64,
    /// Header flags, of those that the operation takes.
    pub flags: u16,
    /// What it asks.
    pub body: Body<'a>,
}

impl<'a> Request<'a> {
    /// Parses a request's readable bytes, header first.
    ///
    /// # Errors
    ///
    /// In this order: [`Status::Malformed`] for a header that is cut short,
    /// [`Status::Unsupported`] for an unknown operation, [`Status::Malformed`] for a length that
    /// the operation does not have, [`Status::Invalid`] for a non-zero reserved field, an unknown
    /// flag, or a vCPU named in a VM-wide operation.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Status> {
        let (header, body) =
            RequestHeader::ref_from_prefix(bytes).map_err(|_| Status::Malformed)?;
        let op = Op::from(header.op.get());
        let row = op.row().ok_or(Status::Unsupported)?;
        if !row.body.allows(body.len()) {
            return Err(Status::Malformed);
        }
        let (vcpu, flags) = (header.vcpu.get(), header.flags.get());
        if flags & !row.flags != 0 || row.scope == Scope::Vm && vcpu != VM_WIDE {
            return Err(Status::Invalid);
        }
        Ok(Request {
            vcpu,
            epoch: header.epoch.get(),
            flags,
            body: Body::parse(op, body)?,
        })
    }

    /// The row of its operation.
    pub const fn row(&self) -> &'static Row {
        self.body.row()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    /// A request of `op` with a zeroed body of `body` bytes, for the scope it has.
    fn request(op: Op, body: usize, out: &mut [u8; 512]) -> &mut [u8] {
        out.fill(0);
        let vcpu = match op.row().map(|row| row.scope) {
            Some(Scope::Vcpu) => 0,
            _ => VM_WIDE,
        };
        let header = RequestHeader {
            op: op.code().into(),
            vcpu: vcpu.into(),
            ..Default::default()
        };
        out[..16].copy_from_slice(header.as_bytes());
        &mut out[..16 + body]
    }

    /// A length the operation has: one entry where any number go.
    fn good_len(op: Op) -> usize {
        op.row().unwrap().body.len(1)
    }

    #[test]
    fn every_operation_parses_at_its_length_and_at_no_other() {
        let mut buf = [0; 512];
        for &op in Op::ALL {
            assert!(Request::parse(request(op, good_len(op), &mut buf)).is_ok());
            for len in 0..200 {
                let parsed = Request::parse(request(op, len, &mut buf)).err();
                let wrong = !op.row().unwrap().body.allows(len);
                assert_eq!(parsed, wrong.then_some(Status::Malformed), "{op} {len}");
            }
        }
    }

    #[test]
    fn a_header_cut_short_is_malformed() {
        for len in 0..16 {
            assert_eq!(Request::parse(&[0xff; 16][..len]), Err(Status::Malformed));
        }
    }

    #[test]
    fn an_unknown_operation_is_refused_before_its_reserved_fields() {
        let mut buf = [0; 512];
        let bytes = request(Op::Unknown(0x7777), 3, &mut buf);
        bytes[2] = 1;
        assert_eq!(Request::parse(bytes), Err(Status::Unsupported));
    }

    #[test]
    fn header_flags_must_be_zero() {
        let mut buf = [0; 512];
        for &op in Op::ALL {
            for byte in [2, 3] {
                let bytes = request(op, good_len(op), &mut buf);
                bytes[byte] = 0x80;
                assert_eq!(Request::parse(bytes), Err(Status::Invalid), "{op}");
            }
        }
    }

    #[test]
    fn a_vm_wide_operation_names_no_vcpu() {
        let mut buf = [0; 512];
        for &op in Op::ALL
            .iter()
            .filter(|op| op.row().unwrap().scope == Scope::Vm)
        {
            let bytes = request(op, good_len(op), &mut buf);
            bytes[4..8].fill(0);
            assert_eq!(Request::parse(bytes), Err(Status::Invalid), "{op}");
        }
    }

    #[test]
    fn reserved_fields_and_unknown_flags_are_refused() {
        // Every byte of a body whose being non-zero must be refused.
        let reserved: [(Op, &[usize], u8); 6] = [
            (Op::ConfigureVm, &[5], 4),
            (Op::ConfigureVm, &[6, 7], 1),
            (Op::SetCounterOffset, &[8, 9, 10, 11, 12, 13, 14, 15], 1),
            (Op::Pause, &[1, 2, 3, 4, 5, 6, 7], 1),
            (Op::Pause, &[0], 2),
            (Op::RestoreBegin, &[4], 8),
        ];
        let mut buf = [0; 512];
        for (op, offsets, value) in reserved {
            for offset in offsets {
                let bytes = request(op, good_len(op), &mut buf);
                bytes[16 + offset] = value;
                assert_eq!(Request::parse(bytes), Err(Status::Invalid), "{op} {offset}");
            }
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = [0u8; 96];
        for _ in 0..100_000 {
            for byte in &mut bytes {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = (state >> 32) as u8;
            }
            // Mostly operations that exist.
            bytes[0] &= 0x53;
            bytes[1] = 0;
            let len = state as usize % (bytes.len() + 1);
            let _ = Request::parse(&bytes[..len]);
        }
    }
}
