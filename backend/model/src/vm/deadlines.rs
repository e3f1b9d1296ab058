//! The timers of one clock that are armed and not due yet, earliest first.
//!
//! A binary heap that knows where each vCPU's entry is, so that arming, re-arming and
//! disarming cost O(log n) and allocate nothing. Since all vCPUs share one clock, a timer's
//! key is its compare value itself: moving the offset moves no entry.

use alloc::vec;
use alloc::vec::Vec;

/// `position` of a vCPU that has no entry.
const ABSENT: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(super) struct Deadlines {
    /// (compare value, vCPU); a parent is never later than its children.
    heap: Vec<(u64, u32)>,
    /// Where in `heap` each vCPU's entry is.
    position: Vec<u32>,
}

impl Deadlines {
    pub(super) fn new(vcpus: usize) -> Self {
        Deadlines {
            heap: Vec::with_capacity(vcpus),
            position: vec![ABSENT; vcpus],
        }
    }

    pub(super) fn clear(&mut self) {
        self.heap.clear();
        self.position.fill(ABSENT);
    }

    /// The earliest compare value.
    pub(super) fn first(&self) -> Option<u64> {
        self.heap.first().map(|&(cval, _)| cval)
    }

    /// Takes out the earliest entry if it is at or before `count`.
    pub(super) fn pop_due(&mut self, count: u64) -> Option<u32> {
        let &(cval, vcpu) = self.heap.first()?;
        (cval <= count).then(|| {
            self.remove(vcpu);
            vcpu
        })
    }

    /// Gives the vCPU's timer this compare value, whether or not it had one.
    pub(super) fn set(&mut self, vcpu: u32, cval: u64) {
        self.remove(vcpu);
        let at = self.heap.len();
        self.heap.push((cval, vcpu));
        self.position[vcpu as usize] = at as u32;
        self.sift_up(at);
    }

    /// Takes the vCPU's timer out, where it is in.
    pub(super) fn remove(&mut self, vcpu: u32) {
        let at = core::mem::replace(&mut self.position[vcpu as usize], ABSENT);
        if at == ABSENT {
            return;
        }
        let at = at as usize;
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            self.position[self.heap[at].1 as usize] = at as u32;
            self.sift_up(at);
            self.sift_down(at);
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.position[self.heap[a].1 as usize] = a as u32;
        self.position[self.heap[b].1 as usize] = b as u32;
    }

    fn sift_up(&mut self, mut at: usize) {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.heap[parent] <= self.heap[at] {
                break;
            }
            self.swap(at, parent);
            at = parent;
        }
    }

    fn sift_down(&mut self, mut at: usize) {
        loop {
            let children = 2 * at + 1..self.heap.len().min(2 * at + 3);
            match children.min_by_key(|&child| self.heap[child]) {
                Some(child) if self.heap[child] < self.heap[at] => {
                    self.swap(at, child);
                    at = child;
                }
                _ => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    #[test]
    fn entries_come_out_in_order_and_only_when_due() {
        let mut deadlines = Deadlines::new(4);
        for (vcpu, cval) in [(0, 30), (1, 10), (2, 20), (3, 10)] {
            deadlines.set(vcpu, cval);
        }
        assert_eq!(deadlines.pop_due(9), None);
        assert_eq!(deadlines.pop_due(20), Some(1));
        assert_eq!(deadlines.pop_due(20), Some(3));
        assert_eq!(deadlines.pop_due(20), Some(2));
        assert_eq!(deadlines.pop_due(20), None);
        assert_eq!(deadlines.first(), Some(30));
    }

    #[test]
    fn any_sequence_of_changes_agrees_with_an_ordered_map() {
        let mut random = 1u64;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % below
        };
        let mut deadlines = Deadlines::new(50);
        let mut model = BTreeMap::new();
        for _ in 0..20_000 {
            let vcpu = next(50) as u32;
            match next(4) {
                0 => {
                    deadlines.remove(vcpu);
                    model.remove(&vcpu);
                }
                1 => {
                    let count = next(1_000);
                    let due = deadlines.pop_due(count);
                    let earliest = model.iter().map(|(v, c)| (*c, *v)).min();
                    assert_eq!(due, earliest.filter(|(c, _)| *c <= count).map(|(_, v)| v));
                    due.and_then(|vcpu| model.remove(&vcpu));
                }
                _ => {
                    let cval = next(1_000);
                    deadlines.set(vcpu, cval);
                    model.insert(vcpu, cval);
                }
            }
            assert_eq!(deadlines.first(), model.values().min().copied());
        }
    }

    #[test]
    fn re_arming_never_allocates() {
        let mut deadlines = Deadlines::new(8);
        let capacity = deadlines.heap.capacity();
        for n in 0..1_000u64 {
            deadlines.set((n % 8) as u32, n ^ 0x55);
        }
        assert_eq!(deadlines.heap.capacity(), capacity);
    }
}
