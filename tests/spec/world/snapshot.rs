//! What a VM looks like, to say that nothing in it has changed.

use vhost_user_timer_kit::contract::{Info, Vcpu, phase};
use vhost_user_timer_model::vm;

use super::{Clock, Vm};

/// A clock, without what moves by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Motion {
    /// Counting at this offset.
    Counting(u64),
    /// Frozen at this count.
    Frozen(u64),
}

/// What a frontend can see of a VM, without what time alone moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// `info`, without the offsets and the host count.
    pub(crate) info: Info,
    /// The virtual clock and the physical one.
    pub(crate) clocks: [Motion; 2],
    /// Each vCPU's registers, without the counts of a counting clock.
    pub(crate) vcpus: Vec<Vcpu>,
}

/// A VM at one time. Two of them are equal only where nothing but time came between.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Snapshot {
    /// All of it.
    Whole(Box<vm::Vm>),
    /// What a frontend can see.
    Seen(Seen),
}

impl Seen {
    pub(super) fn of(vm: &mut Vm) -> Self {
        let mut info = vm.info();
        if info.phase == phase::NEW {
            info.host_count = 0;
            return Seen {
                info,
                clocks: [Motion::Counting(0); 2],
                vcpus: Vec::new(),
            };
        }
        vm.pass(1);
        let later = vm.info();
        let clocks = Clock::BOTH.map(|clock| {
            let offset = clock.offset(&later);
            if clock.offset(&info) == offset {
                Motion::Counting(offset)
            } else {
                Motion::Frozen(later.host_count.wrapping_sub(offset))
            }
        });
        let mut vcpus = vm.state().vcpus;
        for (n, clock) in clocks.into_iter().enumerate() {
            if let Motion::Counting(_) = clock {
                for vcpu in &mut vcpus {
                    vcpu.registers[3 * n + 1] = 0;
                    // ISTATUS follows the count.
                    vcpu.registers[3 * n] &= 3;
                }
            }
        }
        (info.cntvoff, info.cntpoff, info.host_count) = (0, 0, 0);
        Seen {
            info,
            clocks,
            vcpus,
        }
    }
}

impl Snapshot {
    pub(super) fn of(vm: &mut Vm) -> Self {
        match vm.model() {
            Some(model) => Snapshot::Whole(Box::new(model.vm.clone())),
            None => Snapshot::Seen(Seen::of(vm)),
        }
    }
}
