//! A split ring for as long as it is being served: chains out of it, used entries into it, and one
//! notification at the end.
//!
//! A ring stays memory that the driver owns, so nothing in it is believed: one whose indices make no
//! sense is stopped, and the frontend can start it anew.

use std::fmt::Display;
use std::sync::MutexGuard;

use vhost_user_backend::{VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use super::chain::{Gathered, Segment, scatter};
use super::vring::{Memory, Vring};

/// A ring that is being served. Dropping it tells the driver of what it was given back.
pub(super) struct Ring<'a, B: Bitmap + 'static> {
    state: MutexGuard<'a, VringState<Memory<B>>>,
    mem: &'a GuestMemoryMmap<B>,
    queue: u16,
    /// The used index of which the driver knows.
    told: u16,
}

impl<'a, B: Bitmap + 'static> Ring<'a, B> {
    /// The ring, where it is started and enabled.
    pub(super) fn usable(
        vring: &'a Vring<B>,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
    ) -> Option<Self> {
        let ring = Self::stopping(vring, queue, mem);
        (ring.state.get_queue().ready() && ring.state.is_enabled()).then_some(ring)
    }

    /// The ring, though it is being stopped or is disabled: what was taken from it may be given back.
    pub(super) fn stopping(vring: &'a Vring<B>, queue: u16, mem: &'a GuestMemoryMmap<B>) -> Self {
        let state = vring.get_mut();
        let told = state.get_queue().next_used();
        Ring {
            state,
            mem,
            queue,
            told,
        }
    }

    /// Gathers the next available chain and returns its head. Without one, the driver is asked to
    /// kick when there is; a ring that makes no sense is stopped.
    pub(super) fn next_chain(&mut self, gathered: &mut Gathered) -> Option<u16> {
        // A chain that comes between the look and the request for a kick takes a second look.
        for _ in 0..2 {
            match self.state.get_queue_mut().iter(self.mem) {
                Ok(mut chains) => {
                    if let Some(chain) = chains.next() {
                        let head = chain.head_index();
                        gathered.gather(self.mem, chain);
                        return Some(head);
                    }
                }
                Err(error) => {
                    self.stop(&error);
                    return None;
                }
            }
            match self.state.get_queue_mut().enable_notification(self.mem) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.stop(&error);
                    return None;
                }
            }
        }
        self.stop(&"its index says that chains are available, and there are none");
        None
    }

    /// Leaves the chain that was gathered last for the next look.
    pub(super) fn put_back(&mut self) {
        self.state.get_queue_mut().go_to_previous_position();
    }

    /// Writes an answer without giving the chain back; returns how much of it counts.
    pub(super) fn write(&self, segments: &[Segment], bytes: &[u8]) -> u32 {
        scatter(self.mem, segments, bytes)
    }

    /// Gives a chain back of whose writable part `len` bytes were written. A ring that cannot take it
    /// is stopped.
    pub(super) fn give_back(&mut self, head: u16, len: u32) {
        if let Err(error) = self.state.get_queue_mut().add_used(self.mem, head, len) {
            self.stop(&error);
        }
    }

    /// Stops serving a ring whose driver breaks the rules.
    pub(super) fn stop(&mut self, why: &dyn Display) {
        let queue = self.queue;
        log::error!("Queue {queue} is stopped until the frontend starts it again: {why}");
        self.state.get_queue_mut().set_ready(false);
    }
}

impl<B: Bitmap + 'static> Drop for Ring<'_, B> {
    fn drop(&mut self) {
        // An unreadable used_event is one more reason to tell it.
        let queue = self.state.get_queue_mut();
        if queue.next_used() != self.told
            && queue.needs_notification(self.mem).unwrap_or(true)
            && let Err(error) = self.state.signal_used_queue()
        {
            // A full pipe: the driver has been told often enough.
            log::debug!("The call descriptor takes no notification: {error}");
        }
    }
}
