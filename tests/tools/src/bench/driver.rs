//! A virtio driver that costs next to nothing, so that the bench measures the device. Buffers and
//! descriptors are laid out once; a request is one index.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use vhost_user_timer_kit::raw_driver::{Descriptor, NEXT, RING_EVENT_IDX, VERSION_1, WRITE};

/// The region's address for the device.
const BASE: u64 = 0x1000_0000;
const SIZE: usize = 1 << 20;

const AVAIL: usize = 0x8000;
const USED: usize = 0x1_0000;
const BUFFERS: usize = 0x2_0000;
/// Bytes of a slot: a request, and room for its answer.
const SLOT: usize = 256;
const REQUEST: usize = 128;

/// Requests that can be in flight.
pub(super) const SLOTS: u16 = 128;
const RING: u16 = 2 * SLOTS;

/// One queue of a device that is connected.
pub(super) struct Driver {
    /// Ends the connection when it is dropped.
    _control: Frontend,
    memory: MmapRegion,
    kick: OwnedFd,
    call: OwnedFd,
    event_idx: bool,
    next_avail: u16,
    published: u16,
    next_used: u16,
}

fn other<E: std::error::Error + Send + Sync + 'static>(error: E) -> io::Error {
    io::Error::other(error)
}

impl Driver {
    /// Connects to a device, and starts one of its queues.
    ///
    /// # Errors
    ///
    /// If the device or the system refuses.
    pub(super) fn connect(path: &Path, queue: usize) -> io::Result<Self> {
        let mut control = Frontend::from_stream(UnixStream::connect(path)?, 2);
        control.set_owner().map_err(other)?;
        let offered = control.get_features().map_err(other)?;
        let wanted = VERSION_1 | RING_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let protocol = control.get_protocol_features().map_err(other)?;
        let protocol =
            protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK);
        control.set_protocol_features(protocol).map_err(other)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            control.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        control.set_features(offered & wanted).map_err(other)?;

        let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC)?);
        file.set_len(SIZE as u64)?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: SIZE as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        control.set_mem_table(&[region]).map_err(other)?;
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), SIZE).map_err(other)?;
        let mut driver = Driver {
            _control: control,
            memory,
            kick: eventfd(0, EventfdFlags::CLOEXEC)?,
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            event_idx: offered & RING_EVENT_IDX != 0,
            next_avail: 0,
            published: 0,
            next_used: 0,
        };
        driver.start(queue)?;
        Ok(driver)
    }

    #[expect(
        unsafe_code,
        reason = "vmm-sys-util has no other way from an OwnedFd to an EventFd"
    )]
    fn start(&mut self, queue: usize) -> io::Result<()> {
        let config = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: BASE,
            used_ring_addr: BASE + USED as u64,
            avail_ring_addr: BASE + AVAIL as u64,
            log_addr: None,
        };
        let eventfd = |fd: &OwnedFd| -> io::Result<EventFd> {
            use std::os::fd::{FromRawFd, IntoRawFd};
            // SAFETY: the descriptor is a duplicate that nothing else owns.
            Ok(unsafe { EventFd::from_raw_fd(fd.try_clone()?.into_raw_fd()) })
        };
        let (kick, call) = (eventfd(&self.kick)?, eventfd(&self.call)?);
        let control = &mut self._control;
        control.set_vring_num(queue, RING).map_err(other)?;
        control.set_vring_addr(queue, &config).map_err(other)?;
        control.set_vring_base(queue, 0).map_err(other)?;
        control.set_vring_call(queue, &call).map_err(other)?;
        control.set_vring_kick(queue, &kick).map_err(other)?;
        control.set_vring_enable(queue, true).map_err(other)
    }

    fn field(&self, offset: usize) -> &AtomicU16 {
        let field = self.memory.get_atomic_ref(offset);
        field.expect("an aligned offset in the region")
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let slice = self.memory.get_slice(offset, bytes.len());
        slice.expect("a place in the region").copy_from(bytes);
    }

    /// Writes a slot's request, and makes room for an answer.
    pub(super) fn fill(&self, slot: u16, request: &[u8], room: usize) {
        let at = BUFFERS + SLOT * usize::from(slot);
        self.write(at, request);
        let head = 2 * slot;
        let first = Descriptor {
            address: BASE + at as u64,
            len: request.len() as u32,
            flags: NEXT,
            next: head + 1,
        };
        let second = Descriptor {
            address: BASE + (at + REQUEST) as u64,
            len: room as u32,
            flags: WRITE,
            next: 0,
        };
        self.write(16 * usize::from(head), &first.to_bytes());
        self.write(16 * usize::from(head + 1), &second.to_bytes());
    }

    /// Writes a part of a slot's request.
    pub(super) fn amend(&self, slot: u16, offset: usize, bytes: &[u8]) {
        self.write(BUFFERS + SLOT * usize::from(slot) + offset, bytes);
    }

    /// The first bytes of a slot's answer.
    pub(super) fn answer<const N: usize>(&self, slot: u16) -> [u8; N] {
        let mut bytes = [0; N];
        let at = BUFFERS + SLOT * usize::from(slot) + REQUEST;
        let slice = self.memory.get_slice(at, N);
        slice.expect("a place in the region").copy_to(&mut bytes);
        bytes
    }

    /// Makes a slot's request available with the next [`publish`](Self::publish).
    pub(super) fn push(&mut self, slot: u16) {
        let entry = AVAIL + 4 + 2 * usize::from(self.next_avail % RING);
        self.field(entry)
            .store((2 * slot).to_le(), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Gives the device what was pushed, and kicks it where it wants that.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn publish(&mut self) -> io::Result<()> {
        let (old, new) = (self.published, self.next_avail);
        self.published = new;
        self.field(AVAIL + 2).store(new.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = USED + 4 + 8 * usize::from(RING);
            let event = u16::from_le(self.field(at).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u16::from_le(self.field(USED).load(Ordering::Relaxed)) & 1 == 0
        };
        if wanted {
            rustix::io::write(&self.kick, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Number of answers that were not taken yet.
    pub(super) fn answered(&self) -> u16 {
        let used = u16::from_le(self.field(USED + 2).load(Ordering::Acquire));
        used.wrapping_sub(self.next_used)
    }

    /// The slot of the next answer. There must be one.
    pub(super) fn pop(&mut self) -> u16 {
        let entry = USED + 4 + 8 * usize::from(self.next_used % RING);
        let head = u16::from_le(self.field(entry).load(Ordering::Relaxed));
        self.next_used = self.next_used.wrapping_add(1);
        head / 2
    }

    /// Polls until there are this many answers.
    pub(super) fn spin(&self, count: u16) {
        while self.answered() < count {
            std::hint::spin_loop();
        }
    }

    /// Asks for no call before there are this many answers.
    fn want_call_at(&self, count: u16) {
        if self.event_idx {
            let event = self.next_used.wrapping_add(count).wrapping_sub(1);
            let at = AVAIL + 4 + 2 * usize::from(RING);
            self.field(at).store(event.to_le(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no call, as far as virtio allows that.
    pub(super) fn want_no_call(&self) {
        self.want_call_at(0);
        if !self.event_idx {
            self.field(AVAIL).store(1_u16.to_le(), Ordering::Relaxed);
        }
    }

    /// Sleeps until there are this many answers.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn sleep(&self, count: u16) -> io::Result<()> {
        loop {
            self.want_call_at(count);
            if self.answered() >= count {
                return Ok(());
            }
            let mut fds = [rustix::event::PollFd::new(
                &self.call,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None)?;
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
    }
}

impl AsFd for Driver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }
}
