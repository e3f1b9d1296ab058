//! The system's allocator, counting what is asked of it.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::getpid;
use rustix::thread::gettid;

struct Counting;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) allocations: usize,
    pub(crate) bytes: usize,
}

pub(crate) const NOTHING: Cost = Cost {
    allocations: 0,
    bytes: 0,
};

thread_local! {
    /// What this thread asked for.
    static COST: Cell<Cost> = const { Cell::new(NOTHING) };
}

/// What all threads asked for, but the one on which the test harness waits for the test: it prints
/// a line where the test takes a minute.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    COST.set(COST.get().plus(Cost {
        allocations: 1,
        bytes,
    }));
    if !is_harness() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Whether this is the process's first thread.
fn is_harness() -> bool {
    gettid() == getpid()
}

impl Cost {
    fn of_all() -> Self {
        Cost {
            allocations: ALLOCATIONS.load(Ordering::Relaxed),
            bytes: BYTES.load(Ordering::Relaxed),
        }
    }

    fn plus(self, other: Self) -> Self {
        Cost {
            allocations: self.allocations + other.allocations,
            bytes: self.bytes + other.bytes,
        }
    }

    fn less(self, other: Self) -> Self {
        Cost {
            allocations: self.allocations - other.allocations,
            bytes: self.bytes - other.bytes,
        }
    }
}

/// What an action allocates on this thread.
pub(crate) fn cost_of<T>(action: impl FnOnce() -> T) -> Cost {
    let before = COST.get();
    let result = action();
    let after = COST.get();
    drop(result);
    after.less(before)
}

/// What all other threads but the harness's allocate meanwhile.
pub(crate) fn cost_to_others(action: impl FnOnce()) -> Cost {
    assert!(!is_harness(), "the test has a thread of its own");
    let before = Cost::of_all();
    let own = cost_of(action);
    Cost::of_all().less(before).less(own)
}

#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
// SAFETY: every call goes to the system's allocator as it came; counting touches nothing but
// atomics and a thread-local without a destructor, and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` with this layout, by `alloc` or `realloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        // SAFETY: as for `dealloc`, and the caller promises a size that is right.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
