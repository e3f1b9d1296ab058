//! Tests of KVM's half against a KVM of our own, which has the kernel's rules and its refusals.

mod apply;
mod best_effort;
#[cfg(target_arch = "aarch64")]
mod real;
mod registers;
mod vm;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;

use super::bracket::Host;
use super::{CounterOffset, OneReg};
use crate::Info;
use vhost_user_timer_protocol::{Abi, CounterSource, Phase, Register, Timeline};

pub(super) const EBUSY: i32 = 16;
pub(super) const EINVAL: i32 = 22;
const ENOENT: i32 = 2;

const CNTVOFF_EL2: u64 = 0x6030_0000_0013_e703;

pub(super) const FREQUENCY: u64 = 1_000_000_000;

/// GET_INFO's answer about an ARMED VM with CONFIRM and ONE_OFFSET, whose backend counts by cntvct.
pub(super) fn armed(host_count: u64, frequency: u64, offset: u64) -> Info {
    Info {
        phase: Phase::Armed,
        vcpus: 1,
        restored: 1,
        frequency,
        cntvoff: offset,
        cntpoff: offset,
        epoch: 2,
        max_vcpus: 512,
        request_queues: 1,
        abi: Abi::Arm64,
        offset_pinned: false,
        anchored: false,
        phys_virtualised: true,
        confirm: true,
        one_offset: true,
        source: CounterSource::Cntvct,
        host_count,
    }
}

/// A VM with one vCPU, and the host counter. An ioctl takes [`IOCTL`](Self::IOCTL) ticks, and what
/// it does happens in its middle.
pub(super) struct FakeKvm {
    now: Cell<u64>,
    /// Of the virtual and the physical count.
    offsets: Cell<[u64; 2]>,
    /// KVM_ARM_SET_COUNTER_OFFSET was done.
    pinned: Cell<bool>,
    registers: RefCell<BTreeMap<u64, u64>>,
    /// Every register write, in order.
    pub(super) writes: RefCell<Vec<(Register, u64)>>,
    pub(super) has_cap: bool,
    pub(super) has_el2: bool,
    pub(super) has_ptimer: bool,
    /// What KVM_ARM_SET_COUNTER_OFFSET fails with.
    pub(super) refusal: Option<i32>,
    /// What every register access fails with.
    pub(super) register_error: Option<i32>,
    /// Ticks by which KVM sets another offset than it was given.
    pub(super) error: [u64; 2],
}

impl FakeKvm {
    pub(super) const IOCTL: u64 = 5_000;

    /// A fresh VM of a kernel that has everything: the virtual count starts at 0, the physical one
    /// is the host's.
    pub(super) fn new(now: u64) -> Self {
        let registers = Register::ALL.map(|register| (register.id(Abi::Arm64), 0));
        FakeKvm {
            now: Cell::new(now),
            offsets: Cell::new([now, 0]),
            pinned: Cell::new(false),
            registers: RefCell::new(registers.into()),
            writes: RefCell::default(),
            has_cap: true,
            has_el2: false,
            has_ptimer: true,
            refusal: None,
            register_error: None,
            error: [0, 0],
        }
    }

    /// As Linux before 6.4: no offset, and no registers of the physical timer.
    pub(super) fn before_6_4(now: u64) -> Self {
        FakeKvm {
            has_cap: false,
            has_ptimer: false,
            ..FakeKvm::new(now)
        }
    }

    pub(super) fn offsets(&self) -> [u64; 2] {
        self.offsets.get()
    }

    /// What GET_INFO answers now about an ARMED VM with this offset.
    pub(super) fn armed(&self, offset: u64) -> Info {
        armed(self.now.get(), FREQUENCY, offset)
    }

    fn ioctl<T>(&self, does: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.now.set(self.now.get().wrapping_add(Self::IOCTL / 2));
        let result = does();
        self.now.set(self.now.get().wrapping_add(Self::IOCTL / 2));
        result
    }

    fn offset_of(&self, timeline: Timeline) -> u64 {
        self.offsets.get()[timeline.index()]
    }

    /// The register of an id, where this vCPU has it.
    fn register(&self, id: u64) -> io::Result<Register> {
        if let Some(errno) = self.register_error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        Register::from_id(id, Abi::Arm64)
            .ok()
            .filter(|register| self.has_ptimer || register.timeline() == Timeline::Virtual)
            .ok_or_else(|| io::Error::from_raw_os_error(ENOENT))
    }
}

impl Host for FakeKvm {
    fn count(&self) -> u64 {
        self.now.set(self.now.get().wrapping_add(10));
        self.now.get()
    }

    fn frequency(&self) -> u64 {
        FREQUENCY
    }
}

impl OneReg for FakeKvm {
    fn get_one_reg(&self, id: u64) -> io::Result<u64> {
        self.ioctl(|| {
            if self.has_el2 && id == CNTVOFF_EL2 {
                return Ok(0);
            }
            Ok(match self.register(id)? {
                register @ (Register::TimerCnt | Register::PtimerCnt) => {
                    let offset = self.offset_of(register.timeline());
                    self.now.get().wrapping_sub(offset)
                }
                _ => self.registers.borrow()[&id],
            })
        })
    }

    fn set_one_reg(&self, id: u64, value: u64) -> io::Result<()> {
        self.ioctl(|| {
            let register = self.register(id)?;
            self.writes.borrow_mut().push((register, value));
            match register {
                Register::TimerCnt | Register::PtimerCnt => {
                    if !self.pinned.get() {
                        let mut offsets = self.offsets.get();
                        offsets[register.timeline().index()] = self.now.get().wrapping_sub(value);
                        self.offsets.set(offsets);
                    }
                }
                _ => {
                    self.registers.borrow_mut().insert(id, value);
                }
            }
            Ok(())
        })
    }
}

impl CounterOffset for FakeKvm {
    fn has_counter_offset(&self) -> io::Result<bool> {
        self.ioctl(|| Ok(self.has_cap))
    }

    fn set_counter_offset(&self, offset: u64) -> io::Result<()> {
        self.ioctl(|| match self.refusal {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => {
                self.pinned.set(true);
                let set = self.error.map(|error| offset.wrapping_add(error));
                self.offsets.set(set);
                Ok(())
            }
        })
    }
}
