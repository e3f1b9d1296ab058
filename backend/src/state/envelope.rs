//! The format that every saved stream has: it names the device, and shows that the stream is whole.
//!
//! ```text
//! 0   8  magic of the device
//! 8   4  CRC-32 (IEEE 802.3) of all that follows, little-endian
//! 12  …  postcard: the version, and what that version says
//! ```
//!
//! A version that was once written is read forever; a new version is a new variant of the device's
//! `Versioned`.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vhost_user_timer_protocol::MAX_STREAM;

const CRC: std::ops::Range<usize> = 8..12;

/// The format of one device's streams.
pub(super) struct StreamFormat {
    pub(super) magic: [u8; 8],
    /// The device, as errors name it.
    pub(super) device: &'static str,
    /// The version that is written, and the newest that is read.
    pub(super) version: u8,
}

/// Why bytes are not a saved device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than any saved device.
    #[error("the stream is longer than {MAX_STREAM} bytes")]
    TooLong,
    /// It ends too early.
    #[error("the stream ends after {0} bytes, in the middle of its head")]
    Truncated(usize),
    /// Something else.
    #[error("the stream is not one of a vhost-user-timer backend's {0}")]
    Foreign(&'static str),
    /// Not what was written.
    #[error("the stream is damaged or cut off: its checksum is {read:#010x}, not {computed:#010x}")]
    Checksum {
        /// What the stream says.
        read: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// Written by a newer backend.
    #[error(
        "the stream has version {version}, and this backend reads up to {newest}; use a newer one"
    )]
    Version {
        /// What the stream says.
        version: u8,
        /// The newest that is read.
        newest: u8,
    },
    /// Nothing that a backend writes.
    #[error("the stream is malformed: {0}")]
    Malformed(&'static str),
}

impl StreamFormat {
    /// A device's versioned state as a stream.
    pub(super) fn encode(&self, state: &impl Serialize) -> Vec<u8> {
        let mut head = self.magic.to_vec();
        head.extend([0; 4]);
        // Writing to a vector does not fail, and these types have nothing that postcard refuses.
        let mut bytes = postcard::to_extend(state, head).unwrap_or_default();
        let crc = crc32fast::hash(bytes.get(CRC.end..).unwrap_or_default());
        if let Some(field) = bytes.get_mut(CRC) {
            field.copy_from_slice(&crc.to_le_bytes());
        }
        bytes
    }

    /// The versioned state of a stream. Only its form has been checked.
    pub(super) fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, DecodeError> {
        if bytes.len() > MAX_STREAM {
            return Err(DecodeError::TooLong);
        }
        let truncated = DecodeError::Truncated(bytes.len());
        let Some(magic) = bytes.first_chunk::<8>() else {
            return Err(if self.magic.starts_with(bytes) {
                truncated
            } else {
                DecodeError::Foreign(self.device)
            });
        };
        if *magic != self.magic {
            return Err(DecodeError::Foreign(self.device));
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
            Some(&version) if version > self.version => {
                let newest = self.version;
                return Err(DecodeError::Version { version, newest });
            }
            Some(_) => {}
        }
        match postcard::take_from_bytes(payload) {
            Ok((state, [])) => Ok(state),
            Ok(_) => Err(DecodeError::Malformed("something follows the device")),
            Err(_) => Err(DecodeError::Malformed("it ends inside the device")),
        }
    }

    /// A stream with this payload and its checksum.
    #[cfg(test)]
    pub(super) fn with_payload(&self, payload: &[u8]) -> Vec<u8> {
        let crc = crc32fast::hash(payload).to_le_bytes();
        [&self.magic[..], &crc, payload].concat()
    }
}
