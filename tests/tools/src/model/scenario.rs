//! The numbers of the world that is checked: small and few.

use super::action::Deed;
use super::limits::Limits;
use super::request::{Ask, Request, Timer};

/// The host counter at the beginning.
pub(super) const HOST: u64 = 1_000;
/// How far the host counter advances in one step.
pub(super) const TICK: u64 = 4;
/// The count that the VM has at the beginning.
pub(super) const COUNT: u64 = 20;
/// The counts that vCPUs bring to a restore; which vCPU brings which depends on the epoch. In the
/// first restore, neither the first nor the last vCPU brings the largest.
pub(super) const BROUGHT: [u64; 3] = [COUNT + 4, COUNT + 2, COUNT];
/// A count that the VMM writes, and that sets time back.
pub(super) const BACK: u64 = COUNT - 4;
/// Another, that does not.
pub(super) const AHEAD: u64 = COUNT + 8;
/// A compare value: the largest count that is brought.
const SOON: u64 = COUNT + 4;
/// Another: one tick later.
const LATER: u64 = SOON + 3;

/// The timers that the vCPUs have at the beginning, and bring.
const TIMERS: [Timer; 3] = [
    Timer {
        armed: true,
        cval: SOON,
    },
    Timer {
        armed: true,
        cval: LATER,
    },
    Timer {
        armed: false,
        cval: SOON,
    },
];

/// The timers that the VMM gives them: one whose line falls and rises again, one that becomes
/// masked, and one that becomes unmasked.
const OTHER_TIMERS: [Timer; 3] = [
    Timer {
        armed: true,
        cval: LATER,
    },
    Timer {
        armed: false,
        cval: LATER,
    },
    Timer {
        armed: true,
        cval: SOON,
    },
];

impl Deed {
    /// The request for it.
    pub(super) fn request(self, vcpus: u32) -> Request {
        Request::of_vm(match self {
            Deed::Resume => Ask::Resume,
            Deed::Pause { keep_counting } => Ask::Pause { keep_counting },
            Deed::Begin { autorun } => Ask::Begin {
                vcpus,
                autorun,
                timeout: if autorun { 0 } else { TICK },
            },
            Deed::Abort => Ask::Abort,
            Deed::SetOffset => Ask::SetOffset(HOST - COUNT),
            Deed::SetCount(count) => return Request::of_vcpu(0, 0, Ask::SetCount(count)),
            Deed::SetTimer(vcpu) => {
                let timer = OTHER_TIMERS[vcpu as usize % OTHER_TIMERS.len()];
                return Request::of_vcpu(vcpu, 0, Ask::SetTimer(timer));
            }
        })
    }

    /// The limit that it counts against, if any.
    pub(super) fn cost(self, left: &mut Limits) -> Option<&mut u8> {
        match self {
            Deed::Resume => None,
            Deed::Pause { .. } => Some(&mut left.pauses),
            Deed::Begin { .. } => Some(&mut left.begins),
            Deed::Abort => Some(&mut left.aborts),
            Deed::SetOffset => Some(&mut left.offsets),
            Deed::SetCount(_) => Some(&mut left.counts),
            Deed::SetTimer(_) => Some(&mut left.timers),
        }
    }
}

/// The timer that a vCPU has at the beginning, and brings.
pub(super) fn timer_of(vcpu: u32) -> Timer {
    TIMERS[vcpu as usize % TIMERS.len()]
}
