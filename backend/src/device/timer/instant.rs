//! The instant of a request.

use rustix::time::ClockId;
use vhost_user_timer_counter::{HostCounter, clock_ticks};
use vhost_user_timer_model::vm::{Now, Vm};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// The VM's instant: its host counter, by the anchor where the VMM gave one, and the wall clock
/// where the VM wants it.
pub(super) fn instant(counter: HostCounter, vm: &Vm) -> Now {
    let frequency = vm.frequency();
    let host = match vm.anchor() {
        Some(anchor) => anchor.host(clock_ticks(ClockId::Monotonic, NS_PER_SEC), frequency),
        None => counter.read(frequency),
    };
    let realtime_ns = if vm.wants_realtime() {
        clock_ticks(ClockId::Realtime, NS_PER_SEC)
    } else {
        0
    };
    Now { host, realtime_ns }
}
