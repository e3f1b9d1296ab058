//! SPEC.md, "Events": once per rise, dropped with the line, never lost.

mod exact;
mod kept;
mod rise;

use vhost_user_timer_kit::contract::{Event, PCNT, PHASE_CHANGED, TIMER_ASSERTED, phase};

use crate::world::{Clock, MS, Vm, World};

/// The scenarios of all of it.
pub(crate) const SCENARIOS: [&[crate::scenarios::Scenario]; 3] =
    [rise::SCENARIOS, kept::SCENARIOS, exact::SCENARIOS];

const ASSERTED: fn(u16, u32) -> (u16, u16, u32) = |timer, vcpu| (TIMER_ASSERTED, timer, vcpu);
const CHANGED: fn(u32) -> (u16, u16, u32) = |phase| (PHASE_CHANGED, 0, phase);

/// A VM just configured, whose change of phase has been read.
fn configured(on: World, vcpus: u32) -> Vm {
    let mut vm = on.paused(vcpus);
    assert_eq!(vm.events().len(), 1);
    vm
}

/// RESUME, with its PHASE_CHANGED taken out of the way.
fn resume(vm: &mut Vm) {
    vm.post_event_buffer();
    vm.resume();
    assert_eq!(vm.event().what(), CHANGED(phase::RUNNING));
}

/// Posts this many buffers.
fn post(vm: &mut Vm, buffers: usize) {
    for _ in 0..buffers {
        vm.post_event_buffer();
    }
}

/// The next event of a timer.
fn asserted(vm: &mut Vm) -> Event {
    loop {
        let event = vm.event();
        if event.kind == TIMER_ASSERTED {
            return event;
        }
    }
}

/// A VM whose first vCPU's timer on this clock has fallen due, unreported.
fn due(on: World, clock: Clock) -> Vm {
    let [ctl, cnt, cval] = clock.registers();
    let mut vm = configured(on, 1);
    vm.set(0, &[(PCNT, 0)]);
    vm.set(0, &[(cnt, 0), (ctl, 1), (cval, MS)]);
    resume(&mut vm);
    vm.until(|vm| vm.get_one(0, ctl) == 5);
    vm.settle();
    vm
}
