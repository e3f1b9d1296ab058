//! What is behind the timer device's lock.

use std::sync::Arc;

use vhost_user_timer_counter::HostCounter;
use vhost_user_timer_model::vm::{Anchor, Effects, Notice, Now, PageOrder, Vm};
use vhost_user_timer_protocol::{IndexRanges, MAX_MESSAGE, Phase, Status};

use crate::device::timer::alarm::Alarm;
use crate::device::timer::instant::instant;
use crate::device::timer::page::Page;
use crate::device::timer::persist;
use crate::state::Store;
use crate::virtio::Memory;

#[derive(Debug)]
pub(super) struct TimerState {
    pub(super) vm: Vm,
    pub(super) effects: Effects,
    pub(super) alarm: Alarm,
    counter: HostCounter,
    /// The last instant, and what the host counter was then.
    last: Option<(CountedBy, u64)>,
    store: Option<Arc<Store>>,
    /// The time page of the present connection.
    pub(super) page: Page,
}

/// By what a host counter counts: another one may read less.
type CountedBy = (Option<Anchor>, u64);

fn counted_by(vm: &Vm) -> CountedBy {
    (vm.anchor(), vm.frequency())
}

impl TimerState {
    pub(super) fn new(
        vm: Vm,
        counter: HostCounter,
        alarm: Alarm,
        store: Option<Arc<Store>>,
    ) -> Self {
        TimerState {
            vm,
            // Not resident before it is used.
            effects: Effects::with_capacity(MAX_MESSAGE),
            alarm,
            counter,
            last: None,
            store,
            page: Page::new(),
        }
    }

    pub(super) fn counter(&self) -> HostCounter {
        self.counter
    }

    /// The present instant. The model takes a step back of the host counter for a wrap, so a
    /// counter on which two CPUs disagree stands still instead.
    pub(super) fn now(&mut self) -> Now {
        let mut now = instant(self.counter, &self.vm);
        let counter = counted_by(&self.vm);
        if let Some((same, last)) = self.last
            && same == counter
            && now.host.wrapping_sub(last).cast_signed() < 0
        {
            now.host = last;
        }
        self.last = Some((counter, now.host));
        now
    }

    /// Puts what changed into the state file, and then into the time page, which is visible at
    /// once. Answers may be visible after that, not before.
    pub(super) fn persist(&mut self, memory: &Memory<()>) {
        let changed = self.effects.take_changed(|changed| {
            if let Some(store) = &self.store {
                let host_count = match self.last {
                    Some((counter, host)) if counter == counted_by(&self.vm) => host,
                    // The change was of the counter itself.
                    _ => instant(self.counter, &self.vm).host,
                };
                persist::commit(store, &self.vm, changed, host_count);
            }
        });
        if changed.is_some() || self.page.is_open() {
            self.page.follow(&self.vm, memory);
        }
    }

    /// Does what SET_TIME_PAGE asks for, or has it refused.
    pub(super) fn set_page(&mut self, order: PageOrder, memory: &Memory<()>) {
        match order {
            PageOrder::Stop => self.page.stop(),
            PageOrder::WriteAt { address, length } => {
                if !self.page.start(address, length, &self.vm, memory) {
                    self.vm.refuse(Status::Invalid, &mut self.effects);
                }
            }
        }
    }

    /// Sets the alarm for the VM's next event.
    pub(super) fn follow_time(&mut self) {
        // Usually the alarm is already set; the last reading is enough to check that, without
        // reading the clock.
        if let Some((counter, host)) = self.last
            && counter == counted_by(&self.vm)
            && self.alarm.follows(&self.vm, Now::at(host))
        {
            return;
        }
        let now = self.now();
        if let Err(error) = self.alarm.follow(&self.vm, now) {
            log::error!("Setting the timerfd for the next deadline failed: {error}");
        }
    }

    /// Logs what there is to say. True where there was anything.
    pub(super) fn log_notices(&mut self) -> bool {
        let any = !self.effects.notices.is_empty();
        for notice in self.effects.notices.drain(..) {
            match notice {
                Notice::Phase { from, to, epoch } => {
                    let next = match to {
                        Phase::Armed => ": waits for CONFIRM_RUN",
                        _ => "",
                    };
                    log::info!("VM {from} -> {to}, epoch {epoch}{next}");
                }
                Notice::RestoreTimedOut { missing, vcpus } if missing.is_empty() => log::warn!(
                    "Restore timed out: all {vcpus} vCPUs are restored, and CONFIRM_RUN is missing; \
                     the VM stays ARMED"
                ),
                Notice::RestoreTimedOut { missing, vcpus } => log::warn!(
                    "Restore timed out: {} of {vcpus} vCPUs missing: {}; it stays open",
                    missing.len(),
                    IndexRanges(&missing)
                ),
                Notice::PhysicalCountMoved { ticks } => log::info!(
                    "ONE_OFFSET: the restored physical count is not the virtual one, so the \
                     guest's CNTPCT moves by {ticks:+} ticks of {} Hz",
                    self.vm.frequency()
                ),
                Notice::RealtimeWentBack { ns } => log::warn!(
                    "Restore with ELAPSED: the state was saved {} ms after this host's present \
                     time; nothing is added to the counts",
                    ns / 1_000_000
                ),
            }
        }
        any
    }
}
