//! Memory regions and the log.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::backend::{Device, REGION, Served, file, region};

/// Bytes of a log.
const LOG: u64 = 4096;

fn log(file: &std::fs::File) -> VhostUserDirtyLogRegion {
    VhostUserDirtyLogRegion {
        mmap_size: LOG,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// SET_LOG_BASE takes a file that is shorter than it says.
pub(crate) fn short_log() -> bool {
    let served = Served::new(Device::default());
    let ram = file(REGION);
    let memory = served.frontend.set_mem_table(&[region(&ram, 0)]);
    memory.expect("SET_MEM_TABLE");
    let empty = file(0);
    let answer = served.frontend.set_log_base(0, Some(log(&empty)));
    println!("  SET_LOG_BASE of {LOG} bytes in an empty file: {answer:?}");
    if answer.is_err() {
        return false;
    }
    println!("  the backend writes to guest memory, as it does at every used-ring entry");
    let memory = served.memory.memory();
    let written = memory.write_slice(&[1], GuestAddress(0));
    println!("  {written:?}");
    false
}

/// Memory that `update_memory` refuses is installed before, and stays.
pub(crate) fn refused_memory() -> bool {
    let served = Served::new(Device::default());
    let ram = file(REGION);
    let first = served.frontend.set_mem_table(&[region(&ram, 0)]);
    first.expect("SET_MEM_TABLE");
    served.device.refuses_memory.store(true, Ordering::Relaxed);
    // The second region's file is empty: to touch it would be SIGBUS.
    let empty = file(0);
    let table = [region(&ram, 0), region(&empty, REGION)];
    let answer = served.frontend.set_mem_table(&table);
    println!("  SET_MEM_TABLE, which update_memory refuses: {answer:?}");
    let regions = served.memory.memory().num_regions();
    println!("  regions that the worker uses now: {regions}, before it was 1");
    answer.is_err() && regions == 2
}

/// The number of memory slots is announced, and not enforced.
pub(crate) fn mem_slots() -> bool {
    let mut served = Served::new(Device::default());
    let announced = served.frontend.get_max_mem_slots();
    let announced = announced.expect("GET_MAX_MEM_SLOTS");
    let ram = file(REGION);
    let more = announced + 50;
    let accepted = (0..more)
        .take_while(|n| {
            let added = served.frontend.add_mem_region(&region(&ram, n * REGION));
            added.is_ok()
        })
        .count() as u64;
    println!("  slots announced: {announced}; regions sent: {more}; accepted: {accepted}");
    accepted > announced
}

/// A region that is added after SET_LOG_BASE is not logged.
pub(crate) fn log_later_region() -> bool {
    let mut served = Served::new(Device::default());
    let (first, later) = (file(REGION), file(REGION));
    let added = served.frontend.add_mem_region(&region(&first, 0));
    added.expect("ADD_MEM_REG");
    let bits = file(LOG);
    let shared = served.frontend.set_log_base(0, Some(log(&bits)));
    shared.expect("SET_LOG_BASE");
    let added = served.frontend.add_mem_region(&region(&later, REGION));
    added.expect("ADD_MEM_REG");
    let memory = served.memory.memory();
    for address in [0, REGION] {
        let written = memory.write_slice(&[1], GuestAddress(address));
        written.expect("it is shared memory");
    }
    // A bit a page of 4 KiB.
    let mut log = [0; LOG as usize];
    bits.read_exact_at(&mut log, 0).expect("the log");
    let page = (REGION / 4096) as usize;
    let is_dirty = |page: usize| log[page / 8] & (1 << (page % 8)) != 0;
    let (before, after) = (is_dirty(0), is_dirty(page));
    println!("  page of the region from before SET_LOG_BASE marked: {before}");
    println!("  page of the region from after it marked: {after}");
    before && !after
}
