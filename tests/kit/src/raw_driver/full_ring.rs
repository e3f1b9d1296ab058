//! The most work that a driver can make by its ring alone.

use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::Memory;
use super::ring::{INDIRECT, NEXT, Ring, descriptor};
use super::until;

/// The longest indirect table, descriptors.
const TABLE: u16 = u16::MAX;

/// A started ring whose every chain is an indirect table of 65,535 descriptors without a byte.
pub struct FullRing(Ring);

impl FullRing {
    /// Makes such chains of a ring on which nothing is under way.
    ///
    /// # Panics
    ///
    /// If the memory has no room for the table.
    pub fn new(ring: Ring, memory: &mut Memory) -> Self {
        let table: Vec<u8> = (1..=TABLE)
            .flat_map(|next| {
                let flags = if next == TABLE { 0 } else { NEXT };
                descriptor(0, 0, flags, next).to_bytes()
            })
            .collect();
        let at = memory.allocate(table.len());
        memory.write(at, &table);
        for index in 0..ring.size() {
            let chain = descriptor(at, table.len() as u32, INDIRECT, 0);
            ring.set_descriptor(memory, index, chain);
        }
        FullRing(ring)
    }

    /// Keeps as many chains available as the ring has descriptors while `act` runs, which begins
    /// when the device has served the first.
    ///
    /// # Panics
    ///
    /// If the device does not.
    pub fn while_full<T>(&mut self, memory: &Memory, act: impl FnOnce() -> T) -> T {
        let (started, over) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| self.keep_full(memory, &started, &over));
            // Whatever `act` does, the other thread ends.
            let _end = SetOnDrop(&over);
            until("a full ring is served", || started.load(Ordering::Acquire));
            act()
        })
    }

    fn keep_full(&mut self, memory: &Memory, started: &AtomicBool, over: &AtomicBool) {
        let first = self.0.used_index(memory);
        let mut last = None;
        while !over.load(Ordering::Acquire) {
            let used = self.0.used_index(memory);
            if last.replace(used) != Some(used) {
                started.fetch_or(used != first, Ordering::Release);
                self.0
                    .set_avail_index(memory, used.wrapping_add(self.0.size()));
                self.0.kick_anyway();
            }
            std::thread::yield_now();
        }
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
