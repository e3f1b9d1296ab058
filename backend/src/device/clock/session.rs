//! One frontend's connection to the clock device: what `vhost-user-backend` calls.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::{ClockDevice, ClockState};
use crate::device::{Session, VIRTIO_FEATURES};
use crate::state::clock_stream;
use crate::vhost_user::dirty_log::{DirtyLog, keep_logging};
use crate::vhost_user::link::{BATCH, LOADING, Link, Serve, Stop, refuse};
use crate::vhost_user::vring::{Memory, Vring};
use crate::virtio::chain::ChainBuffer;
use crate::virtio::ring::{DeviceRing, RingScratch, WhenIdle};
use vhost_user_timer_model::rtc::wire;

/// The requestq (virtio 1.4 §5.23.2).
const REQUEST_QUEUE: u16 = 0;
/// The alarmq.
const ALARM_QUEUE: u16 = 1;
const QUEUES: u16 = 2;

/// As QEMU's device has them.
const MAX_QUEUE_SIZE: usize = 1024;

const HEAD: usize = size_of::<wire::RespHead>();
const NOTIFICATION: usize = size_of::<wire::NotifAlarm>();

const FEATURES: u64 =
    VIRTIO_FEATURES | (1 << wire::F_ALARM) | VhostUserVirtioFeatures::LOG_ALL.bits();

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// What is under way on the connection's rings.
#[derive(Debug, Default)]
struct Rings {
    gathered: ChainBuffer,
    work: RingScratch,
}

/// See the module.
pub(crate) struct ClockSession {
    device: Arc<ClockDevice>,
    link: Link<DirtyLog>,
    rings: Mutex<Rings>,
    /// Nobody is to be held back any more.
    let_go: Arc<AtomicBool>,
}

impl ClockSession {
    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver that begins anew is seen before it is told or answered anything: whichever queue is
    /// served first, a kept alarm that is past is told to it once.
    fn see_new_driver(&self, core: &mut ClockState) {
        if self
            .link
            .vring(REQUEST_QUEUE)
            .is_some_and(Vring::begins_anew)
        {
            let now = self.device.sample();
            core.rtc.driver_started(&now, &mut core.effects);
        }
    }

    /// Serves requests of the requestq until there is a reason to stop.
    fn serve_requests(&self, core: &mut ClockState, rings: &mut Rings, idle: WhenIdle) -> Stop {
        let Some(vring) = self.link.vring(REQUEST_QUEUE) else {
            return Stop::Drained;
        };
        let mem = self.link.memory.memory();
        let Rings { gathered, work } = rings;
        let Some(mut ring) = DeviceRing::usable(vring, REQUEST_QUEUE, &mem, work) else {
            return Stop::Drained;
        };
        ring.when_idle(idle);
        self.see_new_driver(core);
        for _ in 0..BATCH {
            let Some(head) = ring.next_chain(gathered) else {
                return Stop::Drained;
            };
            if !gathered.has_room(REQUEST_QUEUE, HEAD) {
                ring.give_back(head, 0);
                continue;
            }
            let request = gathered.request();
            // After the chain became available, and for each in turn: the readings are in order.
            let now = self.device.sample_for(core.rtc.wants(request));
            let ClockState { rtc, effects, .. } = &mut *core;
            rtc.handle(request, gathered.room(), &now, effects);
            self.device.persist(core);
            let len = ring.write(gathered.writable(), &core.effects.response);
            ring.give_back(head, len);
        }
        Stop::BatchFull
    }

    /// Tells the driver of alarms that have expired, in the buffers that it posted for that.
    fn tell_alarms(&self, core: &mut ClockState, rings: &mut Rings) -> Stop {
        let Some(vring) = self.link.vring(ALARM_QUEUE) else {
            return Stop::Drained;
        };
        let mem = self.link.memory.memory();
        let Rings { gathered, work } = rings;
        let Some(mut ring) = DeviceRing::usable(vring, ALARM_QUEUE, &mem, work) else {
            return Stop::Drained;
        };
        for _ in 0..BATCH {
            if !core.rtc.has_notification() {
                return Stop::Drained;
            }
            let Some(head) = ring.next_chain(gathered) else {
                return Stop::Drained;
            };
            if !gathered.has_room(ALARM_QUEUE, NOTIFICATION) {
                ring.give_back(head, 0);
                continue;
            }
            let Some(notification) = core.rtc.next_notification(&mut core.effects) else {
                ring.put_back();
                return Stop::Drained;
            };
            let len = ring.write(gathered.writable(), notification.as_bytes());
            ring.give_back(head, len);
            ring.publish();
            // After it can be seen: past a crash in between it is told twice, and not never.
            self.device.persist(core);
        }
        Stop::BatchFull
    }

    /// Tells alarms and sets the timerfd.
    fn carry_out(&self, core: &mut ClockState, rings: &mut Rings) {
        self.see_new_driver(core);
        // Whoever is told of an alarm is told by the clocks of now.
        core.rearm |= core.rtc.has_notification();
        self.device.follow_time(core);
        if core.rtc.has_notification() && self.tell_alarms(core, rings) == Stop::BatchFull {
            self.link.go_on_later(ALARM_QUEUE);
        }
    }
}

impl Serve for ClockSession {
    fn request_queues(&self) -> Range<u16> {
        REQUEST_QUEUE..REQUEST_QUEUE + 1
    }

    fn serve(&self, queue: u16, idle: WhenIdle) {
        let mut core = self.device.state();
        let mut rings = self.rings();
        if queue == REQUEST_QUEUE
            && self.serve_requests(&mut core, &mut rings, idle) != Stop::Drained
        {
            self.link.go_on_later(queue);
        }
        self.carry_out(&mut core, &mut rings);
    }

    fn time_passed(&self) {
        let mut core = self.device.state();
        core.alarm.went_off();
        core.rearm = true;
        self.carry_out(&mut core, &mut self.rings());
    }

    /// Its alarm is of another clock: at most it is late by as long as the worker looks for requests.
    fn alarm_at(&self) -> u64 {
        u64::MAX
    }

    fn taken(&self) -> u64 {
        self.rings().gathered.count()
    }
}

impl Session for ClockSession {
    type Device = ClockDevice;

    fn new(
        device: &Arc<ClockDevice>,
        memory: Memory<DirtyLog>,
        ended: EventFd,
        poll_max: Duration,
    ) -> io::Result<Self> {
        Ok(ClockSession {
            link: Link::new(QUEUES, memory, ended, poll_max)?,
            device: Arc::clone(device),
            rings: Mutex::default(),
            let_go: Arc::default(),
        })
    }

    fn attach(&self, worker: &VringEpollHandler<Arc<Self>>) -> io::Result<()> {
        self.link.attach(worker, self.device.alarm_fd)?;
        for vring in self.link.vrings() {
            let (timer, let_go) = (Arc::clone(&self.device.timer), Arc::clone(&self.let_go));
            vring.hold_enabling(move || timer.hold_while_restoring(&let_go));
        }
        Ok(())
    }

    fn stop(&self) {
        self.let_go.store(true, Ordering::Release);
        self.device.timer.look_again();
        self.link.stop();
    }

    fn stopping(&self) -> bool {
        self.link.stopping()
    }

    fn disconnected(&self) {}
}

impl VhostUserBackend for ClockSession {
    type Bitmap = DirtyLog;
    type Vring = Vring<DirtyLog>;

    fn num_queues(&self) -> usize {
        QUEUES.into()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn acked_features(&self, features: u64) {
        let alarms = features & (1 << wire::F_ALARM) != 0;
        self.device.state().rtc.set_features(alarms);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        PROTOCOL_FEATURES
    }

    fn reset_device(&self) {
        let mut core = self.device.state();
        let now = self.device.sample();
        let ClockState { rtc, effects, .. } = &mut *core;
        rtc.reset(&now, effects);
        self.device.follow_time(&mut core);
        log::info!("The clock device was reset; its alarms are kept");
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory<DirtyLog>) -> io::Result<()> {
        keep_logging(&self.link.memory.memory());
        self.link.check_memory()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.link.queues_per_thread()
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        self.link.start_transfer(direction, file, || {
            let saved = self.device.state().rtc.save(&self.device.sample());
            log::info!("Saving the clock device's state");
            Ok(clock_stream::encode(&saved))
        })?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.link.finish_transfer(|bytes| {
            let saved = clock_stream::decode(bytes).map_err(refuse(LOADING))?;
            let mut core = self.device.state();
            let now = self.device.sample();
            let ClockState { rtc, effects, .. } = &mut *core;
            rtc.load(&saved, &now, effects).map_err(refuse(LOADING))?;
            log::info!("Loaded the clock device's state: {} bytes", bytes.len());
            self.carry_out(&mut core, &mut self.rings());
            Ok(())
        })
    }

    /// GET_VRING_BASE: whoever serves the ring next expects to be kicked.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Ok(queue) = u16::try_from(queue_index)
            && let Some(vring) = self.link.vring(queue)
        {
            self.link.look_away();
            let mem = self.link.memory.memory();
            let mut rings = self.rings();
            if let Some(mut ring) = DeviceRing::stopping(vring, queue, &mem, &mut rings.work) {
                ring.leave();
            }
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _evset: EventSet,
        vrings: &[Vring<DirtyLog>],
        _thread_id: usize,
    ) -> io::Result<()> {
        self.link.handle_event(event, vrings, self)
    }
}
