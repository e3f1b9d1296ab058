//! What must hold of what the guest saw.

use std::time::{Duration, Instant};

use vhost_user_timer_kit::qemu::{Environment, Guest, PATIENCE, Seen, Shape, TimerVm};

/// A guest with a witness that watches.
pub(crate) fn watched(environment: &Environment, shape: &Shape) -> TimerVm {
    let mut vm = TimerVm::boot(environment, shape);
    vm.guest.start_witness(0).unwrap();
    vm
}

/// The guest before something happens to it.
pub(crate) struct Before {
    seen: Vec<Seen>,
    at: Instant,
}

impl Before {
    /// What the witness in the guest has seen until now.
    pub(crate) fn of(vm: &mut TimerVm) -> Self {
        let at = Instant::now();
        let seen = vm.guest.witness().unwrap();
        Before { seen, at }
    }

    /// The witness's report.
    pub(crate) fn seen(&self) -> &[Seen] {
        &self.seen
    }

    /// Checks what the witness has seen since then, and that the counter has not advanced by more
    /// than the host's time. Returns the witness's report.
    pub(crate) fn assert_right_since(&self, vm: &mut TimerVm) -> Vec<Seen> {
        let after = await_all(&mut vm.guest, &self.seen);
        let elapsed = self.at.elapsed();
        assert_right(&self.seen, &after);
        let ticks = last(&after) - last(&self.seen);
        let frequency = u128::from(vm.number("frequency"));
        let limit = elapsed.as_nanos() * frequency / 1_000_000_000;
        assert!(
            u128::from(ticks) <= limit,
            "{ticks} ticks of the guest in {limit} of the host"
        );
        after
    }
}

/// The last reading on any vCPU.
pub(crate) fn last(seen: &[Seen]) -> u64 {
    let readings = seen.iter().map(|seen| seen.last);
    readings.max().unwrap()
}

/// The first report by which each vCPU has read its counter and has woken since an earlier one, or
/// the last within a time limit. On a busy host a vCPU may not run for a while.
pub(crate) fn await_all(guest: &mut Guest, before: &[Seen]) -> Vec<Seen> {
    let began = Instant::now();
    let mut recent = vec![0; before.len()];
    loop {
        let mut after = guest.witness().unwrap();
        for (recent, seen) in recent.iter_mut().zip(&mut after) {
            // Each report begins with it again.
            *recent = seen.recent_ns.max(*recent);
            seen.recent_ns = *recent;
        }
        let has_run = |(seen, earlier): (&Seen, &Seen)| {
            let has_read = seen.last > last(before) && seen.readings > earlier.readings;
            has_read && seen.wakes > earlier.wakes
        };
        if after.iter().zip(before).all(has_run) || began.elapsed() > PATIENCE {
            return after;
        }
    }
}

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

/// Checks that no vCPU has read the counter between the count at which the VM was paused and the
/// one at which its offset was confirmed. Returns the ticks between these.
pub(crate) fn assert_gate(vm: &mut TimerVm, paused: u64) -> u64 {
    let confirmed = vm.number("confirmed-count");
    assert!(
        paused <= confirmed,
        "paused {paused}, confirmed {confirmed}"
    );
    let gaps = vm.guest.gaps_around(paused, confirmed).unwrap();
    assert_eq!(gaps.len(), 4);
    for (vcpu, gap) in gaps.iter().enumerate() {
        assert!(
            gap.is_some(),
            "vCPU {vcpu} has read between {paused} and {confirmed}"
        );
    }
    confirmed - paused
}

/// A report that is right, in a line: how many readings were in order, and how late timers were,
/// on average and at most since the previous report.
pub(crate) fn summary(seen: &[Seen]) -> String {
    let of = |number: fn(&Seen) -> u64| seen.iter().map(number);
    let readings: u64 = of(|seen| seen.readings).sum();
    let mean = of(|seen| seen.mean_ns).sum::<u64>() / seen.len().max(1) as u64;
    let latest = of(|seen| seen.recent_ns).max().unwrap_or_default();
    let [mean, latest] = [mean, latest].map(Duration::from_nanos);
    format!(
        "{readings} readings in order; timers late by {mean:.1?} on average, by {latest:.1?} at most"
    )
}
