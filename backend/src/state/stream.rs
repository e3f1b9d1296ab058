//! A saved VM as a stream of bytes.
//!
//! ```text
//! 0   8  magic "vutimer1"
//! 8   4  CRC-32 (IEEE 802.3) of all that follows, little-endian
//! 12  …  postcard: the version, and what that version says
//! ```
//!
//! The types here are the stream's own, so that nothing else can change it by accident. A version
//! that was once written is read for ever; a new one is a new variant of `Versioned`. Nothing in
//! a stream is trusted: [`decode`] gives a VM whose every field has been looked at, or an error.

use serde::{Deserialize, Serialize};
use vhost_user_timer_protocol::Abi;

use crate::vm::{Saved, SavedVcpu};

/// The longest stream that is read, bytes. The largest VM needs a twentieth of it.
pub const MAX_STREAM: usize = 4 * 1024 * 1024;

const MAGIC: [u8; 8] = *b"vutimer1";
const CRC: std::ops::Range<usize> = MAGIC.len()..MAGIC.len() + 4;

/// The version that is written.
const VERSION: u8 = 1;

#[derive(Serialize, Deserialize)]
enum Versioned {
    /// Never written: version 0 is no version.
    V0,
    V1(V1),
}

#[derive(Serialize, Deserialize)]
struct V1 {
    abi: u8,
    frequency: u64,
    virt_count: u64,
    phys_count: u64,
    vcpus: Vec<VcpuV1>,
}

#[derive(Serialize, Deserialize)]
struct VcpuV1 {
    ctl: u8,
    cval: u64,
    pctl: u8,
    pcval: u64,
}

/// Why bytes are no saved VM.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than any saved VM.
    #[error("The stream is longer than {MAX_STREAM} bytes")]
    TooLong,
    /// It ends too early.
    #[error("The stream ends after {0} bytes, in the middle of its head")]
    Truncated(usize),
    /// Something else altogether.
    #[error("The stream is not one of a vhost-user-timer backend")]
    Foreign,
    /// Not what was written.
    #[error("The stream is damaged or cut off: its checksum is {read:#010x}, not {computed:#010x}")]
    Checksum {
        /// What the stream says.
        read: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// Written by a newer backend.
    #[error("The stream has version {0}, and this backend reads up to {VERSION}; use a newer one")]
    Version(u8),
    /// Nothing that a backend writes.
    #[error("The stream is malformed: {0}")]
    Malformed(&'static str),
}

/// A saved VM as a stream.
pub fn encode(saved: &Saved) -> Vec<u8> {
    let state = Versioned::V1(V1 {
        abi: saved.abi.code(),
        frequency: saved.frequency,
        virt_count: saved.virt_count,
        phys_count: saved.phys_count,
        vcpus: saved
            .vcpus
            .iter()
            .map(|vcpu| VcpuV1 {
                // Control registers have three bits.
                ctl: vcpu.ctl as u8,
                cval: vcpu.cval,
                pctl: vcpu.pctl as u8,
                pcval: vcpu.pcval,
            })
            .collect(),
    });
    let mut head = MAGIC.to_vec();
    head.extend([0; 4]);
    // Writing to a vector does not fail, and these types have nothing that postcard refuses.
    let mut bytes = postcard::to_extend(&state, head).unwrap_or_default();
    let crc = crc32fast::hash(bytes.get(CRC.end..).unwrap_or_default());
    if let Some(field) = bytes.get_mut(CRC) {
        field.copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

/// The saved VM of a stream.
///
/// # Errors
///
/// [`DecodeError`] for everything that [`encode`] does not write. How many vCPUs and which
/// frequency a backend takes is for the VM to say.
pub fn decode(bytes: &[u8]) -> Result<Saved, DecodeError> {
    if bytes.len() > MAX_STREAM {
        return Err(DecodeError::TooLong);
    }
    let truncated = DecodeError::Truncated(bytes.len());
    let Some(magic) = bytes.first_chunk::<{ MAGIC.len() }>() else {
        return Err(if MAGIC.starts_with(bytes) {
            truncated
        } else {
            DecodeError::Foreign
        });
    };
    if *magic != MAGIC {
        return Err(DecodeError::Foreign);
    }
    let crc = bytes.get(CRC).and_then(|field| field.try_into().ok());
    let (Some(crc), Some(payload)) = (crc, bytes.get(CRC.end..)) else {
        return Err(truncated);
    };
    let (read, computed) = (u32::from_le_bytes(crc), crc32fast::hash(payload));
    if read != computed {
        return Err(DecodeError::Checksum { read, computed });
    }
    match payload.first() {
        None | Some(0) => return Err(DecodeError::Malformed("no version")),
        Some(&version) if version > VERSION => return Err(DecodeError::Version(version)),
        Some(_) => {}
    }
    let malformed = DecodeError::Malformed;
    let state = match postcard::take_from_bytes(payload) {
        Ok((Versioned::V1(state), [])) => state,
        Ok((Versioned::V1(_), _)) => return Err(malformed("something follows the VM")),
        _ => return Err(malformed("it ends inside the VM")),
    };
    Ok(Saved {
        abi: Abi::from_code(state.abi).ok_or(malformed("no such ABI"))?,
        frequency: state.frequency,
        virt_count: state.virt_count,
        phys_count: state.phys_count,
        vcpus: state
            .vcpus
            .into_iter()
            .map(|vcpu| SavedVcpu {
                ctl: vcpu.ctl.into(),
                cval: vcpu.cval,
                pctl: vcpu.pctl.into(),
                pcval: vcpu.pcval,
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(vcpus: u64) -> Saved {
        Saved {
            abi: Abi::Arm64,
            frequency: 62_500_000,
            virt_count: 0x0123_4567_89ab_cdef,
            phys_count: u64::MAX,
            vcpus: (0..vcpus)
                .map(|n| SavedVcpu {
                    ctl: n % 4,
                    cval: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                    pctl: 7,
                    pcval: n,
                })
                .collect(),
        }
    }

    #[test]
    fn what_is_written_is_read_at_every_size() {
        for vcpus in [0, 1, 8, 512, 4096] {
            let bytes = encode(&saved(vcpus));
            assert_eq!(decode(&bytes).unwrap(), saved(vcpus));
            assert!(bytes.len() < MAX_STREAM / 20);
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = encode(&saved(3));
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn every_single_bit_flip_is_refused() {
        let mut bytes = encode(&saved(3));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "{bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    /// A stream with this payload and the checksum that goes with it.
    fn sealed(payload: &[u8]) -> Vec<u8> {
        let crc = crc32fast::hash(payload).to_le_bytes();
        [&MAGIC[..], &crc, payload].concat()
    }

    #[test]
    fn what_has_a_right_checksum_is_not_trusted_either() {
        let good = encode(&saved(2))[12..].to_vec();
        assert!(decode(&sealed(&good)).is_ok());
        assert_eq!(decode(&sealed(&[2])), Err(DecodeError::Version(2)));
        assert_eq!(decode(&sealed(&[0xff])), Err(DecodeError::Version(0xff)));
        let longer = [&good[..], &[0]].concat();
        let mut abi = good.clone();
        abi[1] = 9;
        // A vector of 2^63 vCPUs.
        let huge = [&[1, 0, 1, 1, 1][..], &[0xff; 8], &[0x7f]].concat();
        for bytes in [&[][..], &[0], &longer, &abi, &huge, &good[..good.len() - 1]] {
            let refused = decode(&sealed(bytes));
            assert!(
                matches!(refused, Err(DecodeError::Malformed(_))),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn longer_than_any_vm_is_refused() {
        assert_eq!(decode(&vec![0; MAX_STREAM + 1]), Err(DecodeError::TooLong));
    }
}
