//! What must hold of what the guest saw.

use std::time::Duration;

use vhost_user_timer_kit::qemu::Seen;

/// Checks that time never decreased on any vCPU, that no timer was early, and that each vCPU has
/// run since an earlier report.
pub(crate) fn assert_right(before: &[Seen], after: &[Seen]) {
    assert_eq!(before.len(), after.len());
    for (vcpu, (before, after)) in before.iter().zip(after).enumerate() {
        let in_order = (after.below_own, after.below_other, after.worst);
        assert_eq!(in_order, (0, 0, 0), "vCPU {vcpu}: {after:?}");
        assert_eq!(after.early, 0, "vCPU {vcpu}: {after:?}");
        assert!(
            after.last > before.last,
            "vCPU {vcpu}: {before:?} {after:?}"
        );
        assert!(after.readings > before.readings, "vCPU {vcpu}: {after:?}");
        assert!(after.wakes > before.wakes, "vCPU {vcpu}: {after:?}");
    }
}

/// How late timers were: on average, and at most since the previous report.
pub(crate) fn lateness(seen: &[Seen]) -> String {
    let of = |number: fn(&Seen) -> u64| seen.iter().map(number);
    let mean = of(|seen| seen.mean_ns).sum::<u64>() / seen.len().max(1) as u64;
    let latest = of(|seen| seen.recent_ns).max().unwrap_or_default();
    let [mean, latest] = [mean, latest].map(Duration::from_nanos);
    format!("timers late by {mean:.1?} on average, by {latest:.1?} at most")
}
