//! A saved VM as a stream of bytes.
//!
//! The types here are the stream's own, so that nothing else can change it by accident. Nothing in
//! a stream is trusted: [`decode`] gives a VM whose every field has been checked, or an error.
//!
//! A VM is written in the oldest version that can say all of it, so that an earlier backend can
//! load a VM that has nothing new.

use serde::{Deserialize, Serialize};
use vhost_user_timer_protocol::Abi;

pub use super::envelope::DecodeError;
use super::envelope::StreamFormat;
use vhost_user_timer_model::vm::{Saved, SavedTimer, VmFlags};

const FORMAT: StreamFormat = StreamFormat {
    magic: *b"vutimer1",
    device: "timer device",
    version: 2,
};

#[derive(Serialize, Deserialize)]
enum Versioned {
    /// Never written: version 0 is no version.
    V0,
    V1(V1),
    /// Of a VM that was configured with flags.
    V2(V2),
}

#[derive(Serialize, Deserialize)]
struct V2 {
    /// CONFIGURE_VM's, at least one of them.
    flags: u8,
    vm: V1,
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
    let vm = V1 {
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
    };
    FORMAT.encode(&match saved.flags.bits() {
        0 => Versioned::V1(vm),
        flags => Versioned::V2(V2 { flags, vm }),
    })
}

/// The saved VM of a stream.
///
/// # Errors
///
/// [`DecodeError`] for everything that [`encode`] does not write. How many vCPUs and which
/// frequency a backend accepts is for the VM to say.
pub fn decode(bytes: &[u8]) -> Result<Saved, DecodeError> {
    let malformed = DecodeError::Malformed;
    let (flags, state) = match FORMAT.decode(bytes)? {
        Versioned::V0 => return Err(malformed("no version")),
        Versioned::V1(vm) => (0, vm),
        Versioned::V2(V2 { flags: 0, .. }) => return Err(malformed("version 2 without a flag")),
        Versioned::V2(V2 { flags, vm }) => (flags, vm),
    };
    let timer = |control: u8, compare| SavedTimer {
        control: control.into(),
        compare,
    };
    Ok(Saved {
        abi: Abi::from_code(state.abi).ok_or(malformed("no such ABI"))?,
        frequency: state.frequency,
        flags: VmFlags::from_bits(flags).ok_or(malformed("an unknown flag"))?,
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
    use vhost_user_timer_protocol::wire::configure_flags;

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

    /// The same VM with each combination of flags.
    fn with_flags(saved: &Saved) -> impl Iterator<Item = Saved> {
        (0..=configure_flags::ALL).map(|bits| Saved {
            flags: VmFlags::from_bits(bits).expect("flags"),
            ..saved.clone()
        })
    }

    #[test]
    fn what_is_written_is_read_at_every_size() {
        for vcpus in [0, 1, 8, 512, 4096] {
            for saved in with_flags(&saved(vcpus)) {
                let bytes = encode(&saved);
                assert_eq!(decode(&bytes).unwrap(), saved);
                assert!(bytes.len() < MAX_STREAM / 20);
            }
        }
    }

    #[test]
    fn a_vm_with_flags_is_written_in_version_2_and_any_other_in_version_1() {
        let versions: Vec<_> = with_flags(&saved(2))
            .map(|saved| encode(&saved)[12])
            .collect();
        assert_eq!(versions, [1, 2, 2, 2]);
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
            decode(&FORMAT.with_payload(&[3])),
            Err(DecodeError::Version {
                version: 3,
                newest: 2
            })
        );
        assert_eq!(
            decode(&FORMAT.with_payload(&[0xff])),
            Err(DecodeError::Version {
                version: 0xff,
                newest: 2
            })
        );
        // Version 2 is version 1 after its flags: none, and one that there is not.
        for flags in [0, 4] {
            let flagged = [&[2, flags], &good[1..]].concat();
            let refused = decode(&FORMAT.with_payload(&flagged));
            assert!(
                matches!(refused, Err(DecodeError::Malformed(_))),
                "{refused:?}"
            );
        }
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
