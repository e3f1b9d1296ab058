//! A saved VM as a stream of bytes.
//!
//! The types here are the stream's own, so that nothing else can change it by accident. Nothing in
//! a stream is trusted: [`decode`] gives a VM whose every field has been checked, or an error.

use serde::{Deserialize, Serialize};
use vhost_user_timer_protocol::Abi;

pub use super::envelope::DecodeError;
use super::envelope::StreamFormat;
use vhost_user_timer_model::vm::{Saved, SavedTimer, VmFlags};

const FORMAT: StreamFormat = StreamFormat {
    magic: *b"vutimer1",
    device: "timer device",
    version: 1,
};

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

/// A saved VM as a stream.
pub fn encode(saved: &Saved) -> Vec<u8> {
    let [virt_count, phys_count] = saved.counts;
    let state = Versioned::V1(V1 {
        abi: saved.abi.code(),
        frequency: saved.frequency,
        virt_count,
        phys_count,
        vcpus: saved
            .vcpus
            .iter()
            .map(|[virt, phys]| VcpuV1 {
                // Control registers have three bits.
                ctl: virt.control as u8,
                cval: virt.compare,
                pctl: phys.control as u8,
                pcval: phys.compare,
            })
            .collect(),
    });
    FORMAT.encode(&state)
}

/// The saved VM of a stream.
///
/// # Errors
///
/// [`DecodeError`] for everything that [`encode`] does not write. How many vCPUs and which
/// frequency a backend accepts is for the VM to say.
pub fn decode(bytes: &[u8]) -> Result<Saved, DecodeError> {
    let malformed = DecodeError::Malformed;
    let Versioned::V1(state) = FORMAT.decode(bytes)? else {
        return Err(malformed("no version"));
    };
    let timer = |control: u8, compare| SavedTimer {
        control: control.into(),
        compare,
    };
    Ok(Saved {
        abi: Abi::from_code(state.abi).ok_or(malformed("no such ABI"))?,
        frequency: state.frequency,
        flags: VmFlags::default(),
        counts: [state.virt_count, state.phys_count],
        vcpus: state
            .vcpus
            .into_iter()
            .map(|vcpu| [timer(vcpu.ctl, vcpu.cval), timer(vcpu.pctl, vcpu.pcval)])
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_timer_protocol::MAX_STREAM;

    fn saved(vcpus: u64) -> Saved {
        Saved {
            abi: Abi::Arm64,
            frequency: 62_500_000,
            flags: VmFlags::default(),
            counts: [0x0123_4567_89ab_cdef, u64::MAX],
            vcpus: (0..vcpus)
                .map(|n| {
                    let virt = SavedTimer {
                        control: n % 4,
                        compare: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                    };
                    let phys = SavedTimer {
                        control: 7,
                        compare: n,
                    };
                    [virt, phys]
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

    #[test]
    fn what_has_a_right_checksum_is_not_trusted_either() {
        let good = encode(&saved(2))[12..].to_vec();
        assert!(decode(&FORMAT.with_payload(&good)).is_ok());
        assert_eq!(
            decode(&FORMAT.with_payload(&[2])),
            Err(DecodeError::Version {
                version: 2,
                newest: 1
            })
        );
        assert_eq!(
            decode(&FORMAT.with_payload(&[0xff])),
            Err(DecodeError::Version {
                version: 0xff,
                newest: 1
            })
        );
        let longer = [&good[..], &[0]].concat();
        let mut abi = good.clone();
        abi[1] = 9;
        // A vector of 2^63 vCPUs.
        let huge = [&[1, 0, 1, 1, 1][..], &[0xff; 8], &[0x7f]].concat();
        for bytes in [&[][..], &[0], &longer, &abi, &huge, &good[..good.len() - 1]] {
            let refused = decode(&FORMAT.with_payload(bytes));
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
