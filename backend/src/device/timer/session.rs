//! One frontend's connection to the timer device: what `vhost-user-backend` calls.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vhost_user_timer_protocol::{EVENT_QUEUE, FIRST_REQUEST_QUEUE, MAX_QUEUE_SIZE, Phase, wire};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::rings::Rings;
use super::{TimerDevice, TimerState};
use crate::device::{Session, VIRTIO_FEATURES};
use crate::state::stream;
use crate::vhost_user::link::{LOADING, Link, SAVING, Serve, Stop, refuse};
use crate::vhost_user::vring::{Memory, Vring};
use crate::virtio::ring::WhenIdle;

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// How many requests with effects are served before other rings and the end of the connection
/// get their turn: a frontend can see to it that there is always one more.
const EFFECTS: usize = 256;

/// See the module.
pub(crate) struct TimerSession {
    device: Arc<TimerDevice>,
    link: Link<()>,
    rings: Mutex<Rings>,
}

impl TimerSession {
    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers waiters, tells events, sets the alarm, and last logs: nobody waits for that.
    fn carry_out(&self, core: &mut TimerState, rings: &mut Rings) {
        core.persist(&self.link.memory);
        while let Some(released) = core.effects.released.pop() {
            rings.release(&released, self.link.vrings(), &self.link.memory);
        }
        if let Some(vring) = self.link.vring(EVENT_QUEUE)
            && rings.deliver_events(core, vring, &self.link.memory) == Stop::BatchFull
        {
            self.link.go_on_later(EVENT_QUEUE);
        }
        core.follow_time();
        if core.log_notices() {
            self.device.phase_changed.notify_all();
        }
    }
}

impl Serve for TimerSession {
    fn request_queues(&self) -> Range<u16> {
        FIRST_REQUEST_QUEUE..self.link.queues()
    }

    fn serve(&self, queue: u16, idle: WhenIdle) {
        if queue == EVENT_QUEUE {
            self.carry_out(&mut self.device.state(), &mut self.rings());
            return;
        }
        let Some(vring) = self.link.vring(queue) else {
            return;
        };
        for _ in 0..EFFECTS {
            let mut core = self.device.state();
            let mut rings = self.rings();
            let served = rings.serve(&mut core, vring, queue, &self.link.memory, idle);
            self.carry_out(&mut core, &mut rings);
            match served {
                Stop::Drained => return,
                Stop::EffectsPending => {}
                Stop::BatchFull => break,
            }
        }
        self.link.go_on_later(queue);
    }

    fn time_passed(&self) {
        let mut core = self.device.state();
        core.alarm.went_off();
        let now = core.now();
        let TimerState { vm, effects, .. } = &mut *core;
        vm.advance(now, effects);
        self.carry_out(&mut core, &mut self.rings());
    }

    fn alarm_at(&self) -> u64 {
        self.device.state().alarm.goes_off()
    }

    fn taken(&self) -> u64 {
        self.rings().taken()
    }
}

impl Session for TimerSession {
    type Device = TimerDevice;

    fn new(
        device: &Arc<TimerDevice>,
        memory: Memory<()>,
        ended: EventFd,
        poll_max: Duration,
    ) -> io::Result<Self> {
        Ok(TimerSession {
            link: Link::new(device.queues(), memory, ended, poll_max)?,
            device: Arc::clone(device),
            rings: Mutex::default(),
        })
    }

    fn attach(&self, worker: &VringEpollHandler<Arc<Self>>) -> io::Result<()> {
        self.link.attach(worker, self.device.alarm_fd)
    }

    fn stop(&self) {
        self.link.stop();
    }

    fn stopping(&self) -> bool {
        self.link.stopping()
    }

    /// The VM is left as it was, with nobody waiting.
    fn disconnected(&self) {
        let mut core = self.device.state();
        let now = core.now();
        core.vm.disconnect(now);
        core.page.stop();
        core.follow_time();
    }
}

impl VhostUserBackend for TimerSession {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.link.queues().into()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        VIRTIO_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        PROTOCOL_FEATURES
    }

    fn reset_device(&self) {
        let mut core = self.device.state();
        let from = core.vm.phase();
        let TimerState { vm, effects, .. } = &mut *core;
        vm.reset(effects);
        core.persist(&self.link.memory);
        // A driver that resets a device wants it to let its memory be.
        core.page.stop();
        core.follow_time();
        self.rings().clear();
        self.device.phase_changed.notify_all();
        log::info!("VM {from} -> {} by RESET_DEVICE", Phase::New);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The VM in brief, as GET_INFO answers it. An empty answer refuses what lies outside.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut core = self.device.state();
        let now = core.now();
        let info = wire::Info {
            host_count: 0.into(),
            ..core.vm.info(now)
        };
        let end = offset.saturating_add(size) as usize;
        info.as_bytes()
            .get(offset as usize..end)
            .unwrap_or_default()
            .to_vec()
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "The timer device's config space is read-only",
        ))
    }

    fn update_memory(&self, _memory: Memory<()>) -> io::Result<()> {
        let checked = self.link.check_memory();
        let page = &mut self.device.state().page;
        match &checked {
            Ok(()) => page.remapped(&self.link.memory),
            // To touch it could be fatal.
            Err(_) => page.stop(),
        }
        checked
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
            let mut core = self.device.state();
            let now = core.now();
            let saved = core.vm.save(now).map_err(refuse(SAVING))?;
            drop(core);
            log::info!("Saving the device state: {} vCPUs", saved.vcpus.len());
            Ok(stream::encode(&saved))
        })?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.link.finish_transfer(|bytes| {
            let saved = stream::decode(bytes).map_err(refuse(LOADING))?;
            let mut core = self.device.state();
            core.page.open(&self.link.memory);
            let now = core.now();
            let TimerState { vm, effects, .. } = &mut *core;
            let loaded = vm.load(now, &saved, effects).map_err(refuse(LOADING));
            core.persist(&self.link.memory);
            loaded?;
            log::info!(
                "Loaded the device state: {} vCPUs, {} bytes; each vCPU has its registers to take",
                saved.vcpus.len(),
                bytes.len()
            );
            self.carry_out(&mut core, &mut self.rings());
            Ok(())
        })
    }

    /// GET_VRING_BASE: whoever waits on the queue is told that it stopped, and then nothing of
    /// the ring is touched any more.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let Ok(queue) = u16::try_from(queue_index) else {
            return Ok(());
        };
        let Some(vring) = self.link.vring(queue) else {
            return Ok(());
        };
        self.link.look_away();
        let mut core = self.device.state();
        let mut rings = self.rings();
        let TimerState { vm, effects, .. } = &mut *core;
        vm.cancel_queue(queue, effects);
        self.carry_out(&mut core, &mut rings);
        rings.close(vring, queue, &self.link.memory);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        self.link.handle_event(event, vrings, self)
    }
}
