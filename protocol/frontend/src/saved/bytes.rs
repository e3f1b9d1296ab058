//! A saved VM as bytes, version 1. All numbers are little-endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `VUTIMER\0` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | ABI (SPEC.md, CONFIGURE_VM) |
//! | 16 | 8 | counter frequency, Hz |
//! | 24 | 8 | CLOCK_REALTIME of the save, ns since 1970; 0: unknown |
//! | 32 | 8 | virtual count |
//! | 40 | 8 | physical count |
//! | 48 | 4 | number of vCPUs, n |
//! | 52 | 4 | 0 |
//! | 56 | 56 n | the vCPUs, each as in SET_VM |
//! | 56 + 56 n | 4 | CRC-32 (IEEE 802.3) of all before |

use std::num::NonZeroU64;

use vhost_user_timer_protocol::wire::{self, present};
use vhost_user_timer_protocol::{Abi, MAX_VCPUS};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{SavedVcpu, SavedVm, SavedVmError};

const MAGIC: [u8; 8] = *b"VUTIMER\0";
const VERSION: u32 = 1;
const CRC: usize = size_of::<u32>();

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    abi: U32,
    frequency: U64,
    realtime_ns: U64,
    virt_count: U64,
    phys_count: U64,
    vcpus: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Header>() == 56);

impl SavedVm {
    /// The saved VM as bytes, which every later version of this library reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            abi: u32::from(self.abi.code()).into(),
            frequency: self.frequency.get().into(),
            realtime_ns: self.realtime_ns.into(),
            virt_count: self.virt_count.into(),
            phys_count: self.phys_count.into(),
            vcpus: (self.vcpus.len() as u32).into(),
            reserved: 0.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        for vcpu in &self.vcpus {
            bytes.extend_from_slice(vcpu.wire().as_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The saved VM that these bytes are, all of them.
    ///
    /// # Errors
    ///
    /// A [`SavedVmError`] that says what is wrong with them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SavedVmError> {
        let found = bytes.len();
        if !bytes.starts_with(&MAGIC) {
            return Err(SavedVmError::Magic);
        }
        let expected = size_of::<Header>() + CRC;
        let Ok((header, rest)) = Header::ref_from_prefix(bytes) else {
            return Err(SavedVmError::Length { expected, found });
        };
        if header.version != VERSION {
            return Err(SavedVmError::Version(header.version.get()));
        }
        let vcpus = header.vcpus.get() as usize;
        if vcpus > MAX_VCPUS as usize {
            return Err(SavedVmError::Vcpus(vcpus));
        }
        let expected = expected + vcpus * size_of::<wire::Vcpu>();
        let vcpus_and_crc = <[wire::Vcpu]>::ref_from_prefix_with_elems(rest, vcpus);
        let Ok((vcpus, crc)) = vcpus_and_crc else {
            return Err(SavedVmError::Length { expected, found });
        };
        let Ok(crc) = U32::ref_from_bytes(crc) else {
            return Err(SavedVmError::Length { expected, found });
        };
        let computed = crc32fast::hash(&bytes[..found - CRC]);
        if *crc != computed {
            return Err(SavedVmError::Checksum {
                expected: computed,
                found: crc.get(),
            });
        }
        if header.reserved != 0 {
            return Err(SavedVmError::Reserved);
        }
        if vcpus.iter().any(|vcpu| vcpu.present & !present::ALL != 0) {
            return Err(SavedVmError::Reserved);
        }
        let abi = header.abi.get();
        SavedVm {
            abi: u8::try_from(abi)
                .ok()
                .and_then(Abi::from_code)
                .ok_or(SavedVmError::Abi(abi))?,
            frequency: NonZeroU64::new(header.frequency.get()).ok_or(SavedVmError::Frequency)?,
            realtime_ns: header.realtime_ns.get(),
            virt_count: header.virt_count.get(),
            phys_count: header.phys_count.get(),
            vcpus: vcpus.iter().map(SavedVcpu::from_wire).collect(),
        }
        .checked()
    }
}
