//! The timer device as the protocol calls it.

use std::ops::Range;
use std::os::fd::RawFd;

use vhost_user_timer_protocol::{EVENT_QUEUE, FIRST_REQUEST_QUEUE, MAX_QUEUE_SIZE, Phase, wire};
use zerocopy::IntoBytes;

use crate::device::timer::requests::{self, InFlight};
use crate::device::timer::{TimerDevice, TimerState};
use crate::state::stream;
use crate::vhost_user::{Device, StateError, Turn};
use crate::virtio::Memory;
use crate::virtio::chain::ChainLimits;
use crate::virtio::ring::{Stop, WhenIdle};

impl TimerDevice {
    /// Answers waiters, reports events, sets the alarm, and last logs: nobody waits for that.
    fn carry_out(&self, state: &mut TimerState, turn: &mut Turn<'_, Self>) {
        state.persist(turn.memory);
        while let Some(released) = state.effects.released.pop() {
            requests::release(&released, turn);
        }
        if requests::deliver_events(state, turn) == Stop::BatchFull {
            turn.serve_later(EVENT_QUEUE);
        }
        state.follow_time();
        if state.log_notices() {
            self.changed(state);
        }
    }
}

impl Device for TimerDevice {
    type Bitmap = ();
    type InFlight = InFlight;

    const NAME: &'static str = "timer";
    const MAX_QUEUE_SIZE: u16 = MAX_QUEUE_SIZE;
    const CHAIN_LIMITS: ChainLimits = ChainLimits::Message;
    const FEATURES: u64 = 0;
    const HAS_CONFIG: bool = true;

    /// The event queue and the request queues.
    fn queues(&self) -> u16 {
        FIRST_REQUEST_QUEUE + self.profile.request_queues
    }

    fn request_queues(&self) -> Range<u16> {
        FIRST_REQUEST_QUEUE..self.queues()
    }

    fn alarm_fd(&self) -> RawFd {
        self.alarm_fd
    }

    fn alarm_at(&self) -> u64 {
        self.state().alarm.goes_off()
    }

    fn serve(&self, turn: &mut Turn<'_, Self>, queue: u16, when_idle: WhenIdle) -> Stop {
        self.turnstile.let_others_go_first();
        let mut state = self.state();
        let stop = if queue == EVENT_QUEUE {
            Stop::Drained
        } else {
            requests::serve(&mut state, turn, queue, when_idle)
        };
        self.carry_out(&mut state, turn);
        stop
    }

    fn time_passed(&self, turn: &mut Turn<'_, Self>) {
        let mut state = self.state();
        state.alarm.went_off();
        let now = state.now();
        let TimerState { vm, effects, .. } = &mut *state;
        vm.advance(now, effects);
        self.carry_out(&mut state, turn);
    }

    /// Waiters on the queue are answered that it stopped.
    fn stop_queue(&self, turn: &mut Turn<'_, Self>, queue: u16) {
        let mut state = self.state();
        let TimerState { vm, effects, .. } = &mut *state;
        vm.cancel_queue(queue, effects);
        self.carry_out(&mut state, turn);
        requests::close(turn, queue);
    }

    fn reset(&self, turn: &mut Turn<'_, Self>) {
        let mut state = self.state();
        let from = state.vm.phase();
        let TimerState { vm, effects, .. } = &mut *state;
        vm.reset(effects);
        state.persist(turn.memory);
        // A driver that resets a device wants its memory left alone.
        state.page.stop();
        state.follow_time();
        turn.in_flight.clear();
        self.changed(&mut state);
        log::info!("VM {from} -> {} by RESET_DEVICE", Phase::New);
    }

    /// The VM in brief, as GET_INFO answers it.
    fn config(&self) -> Vec<u8> {
        let mut state = self.state();
        let now = state.now();
        let info = wire::Info {
            host_count: 0.into(),
            ..state.vm.info(now)
        };
        info.as_bytes().to_vec()
    }

    fn memory_changed(&self, memory: &Memory<()>) {
        self.state().page.remapped(memory);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let mut state = self.state();
        let now = state.now();
        let saved = state.vm.save(now)?;
        drop(state);
        log::info!("Saving the device state: {} vCPUs", saved.vcpus.len());
        Ok(stream::encode(&saved))
    }

    fn load(&self, turn: &mut Turn<'_, Self>, stream: &[u8]) -> Result<(), StateError> {
        let saved = stream::decode(stream)?;
        let mut state = self.state();
        state.page.open(turn.memory);
        let now = state.now();
        let TimerState { vm, effects, .. } = &mut *state;
        let before = vm.info(now);
        let loaded = vm.load(now, &saved, effects);
        state.persist(turn.memory);
        loaded?;
        let (vcpus, frequency) = (saved.vcpus.len(), saved.frequency);
        log::info!(
            "Loaded the device state: {vcpus} vCPUs at {frequency} Hz, {} bytes; each vCPU has \
             its registers to take",
            stream.len()
        );
        let (own_vcpus, own_frequency) = (before.vcpus.get(), before.frequency.get());
        let same = (own_vcpus as usize, own_frequency) == (vcpus, frequency);
        if own_vcpus != 0 && !same {
            log::warn!(
                "The loaded VM has {vcpus} vCPUs at {frequency} Hz, and takes the place of one \
                 with {own_vcpus} vCPUs at {own_frequency} Hz; RESTORE_ABORT brings that back"
            );
        }
        self.carry_out(&mut state, turn);
        Ok(())
    }

    /// The VM is left as it was, with nobody waiting.
    fn disconnected(&self) {
        let mut state = self.state();
        let now = state.now();
        state.vm.disconnect(now);
        state.page.stop();
        state.follow_time();
    }
}
