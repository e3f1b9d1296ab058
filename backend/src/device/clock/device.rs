//! The clock device as the protocol calls it.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;

use vhost_user_timer_model::rtc::{Request, wire};
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

use crate::device::clock::told;
use crate::device::clock::{ClockDevice, ClockState, GuestTime};
use crate::state::clock_stream;
use crate::vhost_user::{self, Device, DirtyLog, StateError, Vring};
use crate::virtio::chain::ChainLimits;
use crate::virtio::ring::{Stop, WhenIdle};

/// The requestq (virtio 1.4 §5.23.2).
const REQUEST_QUEUE: u16 = 0;
/// The alarmq.
const ALARM_QUEUE: u16 = 1;
const QUEUES: u16 = 2;

/// The room without which a response is none: its status alone is one (§5.23.6.2).
const STATUS: usize = size_of::<u8>();
const NOTIFICATION: usize = size_of::<wire::NotifAlarm>();

type Turn<'a, G> = vhost_user::Turn<'a, ClockDevice<G>>;

impl<G: GuestTime> ClockDevice<G> {
    /// A new driver is noticed before it is notified of or answered anything: whichever queue is
    /// served first, a kept alarm that is past is reported to it once.
    fn notice_new_driver(&self, state: &mut ClockState, requests: &Vring<DirtyLog>) {
        if requests.has_new_driver() {
            let now = self.sample();
            state.rtc.driver_started(&now, &mut state.effects);
        }
    }

    /// Serves requests of the requestq until there is a reason to stop.
    fn serve_requests(
        &self,
        state: &mut ClockState,
        turn: &mut Turn<'_, G>,
        when_idle: WhenIdle,
    ) -> Stop {
        let mem = turn.memory.memory();
        let Some(vring) = turn.vring(REQUEST_QUEUE) else {
            return Stop::Drained;
        };
        let Some(mut ring) = vring.usable(REQUEST_QUEUE, &mem, turn.scratch) else {
            return Stop::Drained;
        };
        ring.when_idle(when_idle);
        self.notice_new_driver(state, vring);
        loop {
            let head = match ring.next_with_room(turn.chain, STATUS) {
                Ok(head) => head,
                Err(stop) => return stop,
            };
            let chain = &*turn.chain;
            let request = Request::parse(chain.request());
            // After the chain became available, and for each in turn: the readings are in order.
            let now = self.sample_for(state.rtc.needs(&request));
            let ClockState { rtc, effects, .. } = &mut *state;
            rtc.handle(&request, chain.room(), &now, effects);
            self.persist(state);
            if told::is_wanted() {
                told::tell(&request, chain.room(), &state.effects.response);
            }
            let len = ring.write(chain.writable(), &state.effects.response);
            ring.give_back(head, len);
        }
    }

    /// Notifies the driver of expired alarms, in the buffers that it posted for that.
    fn notify_alarms(&self, state: &mut ClockState, turn: &mut Turn<'_, G>) -> Stop {
        let mem = turn.memory.memory();
        let Some(mut ring) = turn
            .vring(ALARM_QUEUE)
            .and_then(|vring| vring.usable(ALARM_QUEUE, &mem, turn.scratch))
        else {
            return Stop::Drained;
        };
        while state.rtc.has_notification() {
            let head = match ring.next_with_room(turn.chain, NOTIFICATION) {
                Ok(head) => head,
                Err(stop) => return stop,
            };
            let Some(notification) = state.rtc.next_notification(&mut state.effects) else {
                ring.put_back();
                break;
            };
            let len = ring.write(turn.chain.writable(), notification.as_bytes());
            ring.give_back(head, len);
            ring.publish();
            // After it is visible: if the process is killed in between, the driver is notified
            // twice rather than never.
            self.persist(state);
        }
        Stop::Drained
    }

    /// Reports alarms and sets the timerfd.
    fn carry_out(&self, state: &mut ClockState, turn: &mut Turn<'_, G>) {
        if let Some(requests) = turn.vring(REQUEST_QUEUE) {
            self.notice_new_driver(state, requests);
        }
        // Whether an alarm is still to be reported is decided by the clocks of now.
        state.rearm |= state.rtc.has_notification();
        self.follow_time(state);
        if state.rtc.has_notification() && self.notify_alarms(state, turn) == Stop::BatchFull {
            turn.serve_later(ALARM_QUEUE);
        }
    }
}

impl<G: GuestTime> Device for ClockDevice<G> {
    type Bitmap = DirtyLog;
    type InFlight = ();

    const NAME: &'static str = "clock";
    /// As QEMU's device has it.
    const MAX_QUEUE_SIZE: u16 = 1024;
    /// The device must ignore what follows a request or a response (§5.23.6.2).
    const CHAIN_LIMITS: ChainLimits = ChainLimits::First {
        request: wire::MAX_REQUEST,
        response: wire::MAX_RESPONSE,
    };
    const FEATURES: u64 = 1 << wire::F_ALARM;
    const HAS_CONFIG: bool = false;

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn request_queues(&self) -> Range<u16> {
        REQUEST_QUEUE..REQUEST_QUEUE + 1
    }

    fn alarm_fd(&self) -> RawFd {
        self.alarm_fd
    }

    /// The alarm is on another clock.
    fn alarm_at(&self) -> u64 {
        u64::MAX
    }

    fn serve(&self, turn: &mut Turn<'_, G>, queue: u16, when_idle: WhenIdle) -> Stop {
        let mut state = self.state();
        let stop = if queue == REQUEST_QUEUE {
            self.serve_requests(&mut state, turn, when_idle)
        } else {
            Stop::Drained
        };
        self.carry_out(&mut state, turn);
        stop
    }

    fn time_passed(&self, turn: &mut Turn<'_, G>) {
        let mut state = self.state();
        state.alarm.went_off();
        state.rearm = true;
        self.carry_out(&mut state, turn);
    }

    /// Whatever serves the ring next expects kicks.
    fn stop_queue(&self, turn: &mut Turn<'_, G>, queue: u16) {
        let mem = turn.memory.memory();
        if let Some(mut ring) = turn
            .vring(queue)
            .and_then(|vring| vring.stopping(queue, &mem, turn.scratch))
        {
            ring.leave();
        }
    }

    fn set_features(&self, features: u64) {
        let alarms = features & (1 << wire::F_ALARM) != 0;
        self.state().rtc.set_features(alarms);
    }

    fn reset(&self, _turn: &mut Turn<'_, G>) {
        let mut state = self.state();
        let now = self.sample();
        let ClockState { rtc, effects, .. } = &mut *state;
        rtc.reset(&now, effects);
        self.follow_time(&mut state);
        log::info!("The clock device was reset; its alarms are kept");
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let saved = self.state().rtc.save(&self.sample());
        log::info!("Saving the clock device's state");
        Ok(clock_stream::encode(&saved))
    }

    fn load(&self, turn: &mut Turn<'_, G>, stream: &[u8]) -> Result<(), StateError> {
        let saved = clock_stream::decode(stream)?;
        let mut state = self.state();
        let now = self.sample();
        let ClockState { rtc, effects, .. } = &mut *state;
        rtc.load(&saved, &now, effects)?;
        log::info!("Loaded the clock device's state: {} bytes", stream.len());
        self.carry_out(&mut state, turn);
        Ok(())
    }

    fn before_enabling(&self, canceled: &AtomicBool) {
        self.guest.hold(canceled);
    }

    fn wake_held(&self) {
        self.guest.wake_held();
    }
}
