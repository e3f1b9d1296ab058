//! The wire contract, typed by hand from SPEC.md.
//!
//! Nothing here comes from the protocol crate, so a slip in the project's own types shows as a
//! difference. Register values are always in the order CTL, CNT, CVAL, PCTL, PCNT, PCVAL.

mod codes;

pub use codes::*;

/// The little-endian 64-bit word at offset `at`.
///
/// # Panics
///
/// If the bytes end before it does.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The little-endian 32-bit word at offset `at`.
///
/// # Panics
///
/// If the bytes end before it does.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// The little-endian 16-bit word at offset `at`.
///
/// # Panics
///
/// If the bytes end before it does.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

/// The little-endian bytes of 64-bit words.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The device-readable bytes of a request.
pub fn request(op: u16, vcpu: u32, epoch: u64, body: &[u8]) -> Vec<u8> {
    request_with(op, 0, vcpu, epoch, body)
}

/// The device-readable bytes of a request with these header flags.
pub fn request_with(op: u16, flags: u16, vcpu: u32, epoch: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend(op.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(vcpu.to_le_bytes());
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The body of CONFIGURE_VM without flags.
pub fn configure_body(vcpus: u32, abi: u8, frequency: u64) -> Vec<u8> {
    configure_with(vcpus, abi, 0, frequency)
}

/// The body of CONFIGURE_VM.
pub fn configure_with(vcpus: u32, abi: u8, flags: u8, frequency: u64) -> Vec<u8> {
    let mut body = vcpus.to_le_bytes().to_vec();
    body.extend([abi, flags, 0, 0]);
    body.extend(frequency.to_le_bytes());
    body
}

/// The body of PAUSE.
pub fn pause_body(flags: u32) -> Vec<u8> {
    words(&[u64::from(flags)])
}

/// The body of GET_VM.
pub fn range_body(first: u32, count: u32) -> Vec<u8> {
    words(&[u64::from(first) | u64::from(count) << 32])
}

/// The body of RESTORE_BEGIN.
pub fn restore_body(vcpus: u32, flags: u32, saved_realtime_ns: u64, timeout_ns: u64) -> Vec<u8> {
    words(&[
        u64::from(vcpus) | u64::from(flags) << 32,
        saved_realtime_ns,
        timeout_ns,
    ])
}

/// The body of SET_REGS.
pub fn regs_body(entries: &[(u64, u64)]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|(id, value)| words(&[*id, *value]))
        .collect()
}

/// An answer, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0, or the errno of a refusal.
    pub status: u32,
    /// What explains the status.
    pub detail: u32,
    /// The current epoch.
    pub epoch: u64,
    /// The bytes after the header; empty for a refusal.
    pub body: Vec<u8>,
}

impl Answer {
    /// Parses an answer's bytes, or those of a chain that was given back.
    ///
    /// # Panics
    ///
    /// If they are shorter than a header, or if a refusal has a body.
    pub fn of(answer: &impl AsRef<[u8]>) -> Self {
        let bytes = answer.as_ref();
        assert!(bytes.len() >= 16, "an answer of {} bytes", bytes.len());
        let answer = Answer {
            status: u32_at(bytes, 0),
            detail: u32_at(bytes, 4),
            epoch: u64_at(bytes, 8),
            body: bytes[16..].to_vec(),
        };
        assert!(
            answer.status == status::OK || answer.body.is_empty(),
            "a refusal has a body: {answer:?}"
        );
        answer
    }

    /// Status and detail.
    pub fn outcome(&self) -> (u32, u32) {
        (self.status, self.detail)
    }

    /// The body, of `len` bytes, of a request that was granted.
    ///
    /// # Panics
    ///
    /// If the request was refused or the body has another length.
    #[track_caller]
    pub fn ok(&self, len: usize) -> &[u8] {
        assert_eq!(self.outcome(), (status::OK, 0), "{self:?}");
        assert_eq!(self.body.len(), len, "the body's length");
        &self.body
    }
}

/// The answer of GET_INFO (`info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub version: u32,
    pub phase: u32,
    pub vcpus: u32,
    pub restored: u32,
    pub frequency: u64,
    pub cntvoff: u64,
    pub cntpoff: u64,
    pub epoch: u64,
    pub max_vcpus: u32,
    pub request_queues: u16,
    pub abi: u8,
    /// Bits 0 to 4 of the byte at 55.
    pub flags: u8,
    /// Bits 5 to 7 of the byte at 55.
    pub source: u8,
    pub host_count: u64,
}

impl Info {
    /// From its 64 bytes.
    ///
    /// # Panics
    ///
    /// If there are not 64.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 64);
        Info {
            version: u32_at(bytes, 0),
            phase: u32_at(bytes, 4),
            vcpus: u32_at(bytes, 8),
            restored: u32_at(bytes, 12),
            frequency: u64_at(bytes, 16),
            cntvoff: u64_at(bytes, 24),
            cntpoff: u64_at(bytes, 32),
            epoch: u64_at(bytes, 40),
            max_vcpus: u32_at(bytes, 48),
            request_queues: u16_at(bytes, 52),
            abi: bytes[54],
            flags: bytes[55] & 0x1f,
            source: bytes[55] >> 5,
            host_count: u64_at(bytes, 56),
        }
    }

    /// The same without what changes by itself while the VM is PAUSED: the host counter is 0, and
    /// a frozen clock's offset is replaced by its count.
    #[must_use]
    pub fn at_rest(self) -> Self {
        Info {
            cntvoff: self.host_count.wrapping_sub(self.cntvoff),
            cntpoff: match self.flags & info_flag::PHYS_VIRTUALISED {
                0 => self.cntpoff,
                _ => self.host_count.wrapping_sub(self.cntpoff),
            },
            host_count: 0,
            ..self
        }
    }
}

/// The answer of PAUSE, RESUME, WAIT_RUN and CONFIRM_RUN (`run`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub cntvoff: u64,
    pub cntpoff: u64,
    pub virt_count: u64,
    pub phys_count: u64,
    pub host_count: u64,
}

impl Run {
    /// From its 40 bytes.
    ///
    /// # Panics
    ///
    /// If there are not 40, or if the five values are not of one instant.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 40);
        let run = Run {
            cntvoff: u64_at(bytes, 0),
            cntpoff: u64_at(bytes, 8),
            virt_count: u64_at(bytes, 16),
            phys_count: u64_at(bytes, 24),
            host_count: u64_at(bytes, 32),
        };
        assert_eq!(run.virt_count, run.host_count.wrapping_sub(run.cntvoff));
        assert_eq!(run.phys_count, run.host_count.wrapping_sub(run.cntpoff));
        run
    }
}

/// A vCPU in GET_VM and SET_VM (`vcpu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    pub vcpu: u32,
    pub present: u32,
    pub registers: [u64; 6],
}

impl Vcpu {
    /// A vCPU with all six registers present.
    pub fn with(vcpu: u32, registers: [u64; 6]) -> Self {
        Vcpu {
            vcpu,
            present: 0x3f,
            registers,
        }
    }

    /// From its 56 bytes.
    ///
    /// # Panics
    ///
    /// If there are not 56.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 56);
        Vcpu {
            vcpu: u32_at(bytes, 0),
            present: u32_at(bytes, 4),
            registers: std::array::from_fn(|i| u64_at(bytes, 8 + 8 * i)),
        }
    }

    /// As its 56 bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.vcpu.to_le_bytes().to_vec();
        bytes.extend(self.present.to_le_bytes());
        bytes.extend(words(&self.registers));
        bytes
    }
}

/// The answer of GET_VM (`vm`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    pub virt_count: u64,
    pub phys_count: u64,
    pub host_count: u64,
    pub frequency: u64,
    pub first: u32,
    pub count: u32,
    pub vcpus: Vec<Vcpu>,
}

impl VmState {
    /// From its bytes.
    ///
    /// # Panics
    ///
    /// If their number does not fit the number of vCPUs.
    pub fn of(bytes: &[u8]) -> Self {
        let (head, rest) = bytes.split_at(40);
        let state = VmState {
            virt_count: u64_at(head, 0),
            phys_count: u64_at(head, 8),
            host_count: u64_at(head, 16),
            frequency: u64_at(head, 24),
            first: u32_at(head, 32),
            count: u32_at(head, 36),
            vcpus: rest.chunks(56).map(Vcpu::of).collect(),
        };
        assert_eq!(state.vcpus.len(), state.count as usize);
        state
    }
}

impl VmState {
    /// The same without what changes by itself while the VM is PAUSED: the host counter and,
    /// unless it is frozen, the physical clock.
    #[must_use]
    pub fn at_rest(mut self, physical_stands_still: bool) -> Self {
        self.host_count = 0;
        if !physical_stands_still {
            self.phys_count = 0;
            for vcpu in &mut self.vcpus {
                vcpu.registers[4] = 0;
                // ISTATUS depends on the count.
                vcpu.registers[3] &= 3;
            }
        }
        self
    }
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: u16,
    pub timer: u16,
    pub vcpu: u32,
    pub cval: u64,
    pub count: u64,
    pub epoch: u64,
}

/// An event's kind: TIMER_ASSERTED.
pub const TIMER_ASSERTED: u16 = 1;
/// An event's kind: PHASE_CHANGED.
pub const PHASE_CHANGED: u16 = 2;

impl Event {
    /// From its 32 bytes, or those of a buffer that was given back.
    ///
    /// # Panics
    ///
    /// If there are not 32.
    pub fn of(event: &impl AsRef<[u8]>) -> Self {
        let bytes = event.as_ref();
        assert_eq!(bytes.len(), 32, "an event's length");
        Event {
            kind: u16_at(bytes, 0),
            timer: u16_at(bytes, 2),
            vcpu: u32_at(bytes, 4),
            cval: u64_at(bytes, 8),
            count: u64_at(bytes, 16),
            epoch: u64_at(bytes, 24),
        }
    }

    /// Kind, timer, and vCPU or phase.
    pub fn what(&self) -> (u16, u16, u32) {
        (self.kind, self.timer, self.vcpu)
    }
}
