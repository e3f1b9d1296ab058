//! Kick descriptors and ring sizes.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use vhost::VhostBackend;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::{Device, REGION, Served, WORKER, comes_true, file, region, threads};

fn started(kicks: &[EventFd]) -> Served {
    let mut served = Served::new(Device::default());
    let memory = served.frontend.set_mem_table(&[region(&file(REGION), 0)]);
    memory.expect("SET_MEM_TABLE");
    for (queue, kick) in kicks.iter().enumerate() {
        served.start_ring(queue, kick);
    }
    served
}

/// A kick descriptor that was replaced stays in the worker's epoll set.
pub(crate) fn replaced_kick() -> bool {
    /// Far more than one kick can explain.
    const MANY: u64 = 100_000;
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut served = started(&[kick.try_clone().expect("a duplicate")]);
    // SET_VRING_KICK of queue 0 without a descriptor (bit 8), with NEED_REPLY.
    let mut message = Vec::new();
    for word in [12_u32, 0x9, 8] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(0x100_u64.to_ne_bytes());
    served.stream.write_all(&message).expect("SET_VRING_KICK");
    let mut reply = [0; 20];
    served.stream.read_exact(&mut reply).expect("a reply");
    println!("  SET_VRING_KICK without a descriptor: {:?}", &reply[12..]);
    let events = || served.device.events.load(Ordering::Relaxed);
    let before = events();
    kick.write(1).expect("the old kick descriptor");
    let many = comes_true(|| events() > before + MANY);
    println!("  one write to the old descriptor; more than {MANY} calls of handle_event: {many}");
    many
}

/// An error of one kick descriptor ends the worker, and nobody is told.
pub(crate) fn kick_ends_worker() -> bool {
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let again = kick.try_clone().expect("a duplicate");
    let frontends = kick.try_clone().expect("a duplicate");
    // Both queues wake up; the second to read finds nothing, which is EAGAIN.
    let served = started(&[kick, again]);
    // A thread names itself, some time after it was made.
    assert!(comes_true(|| threads(WORKER) == 1));
    // A worker that wakes between the two queues' wake-ups reads only one of them: kick again.
    let ended = comes_true(|| {
        frontends.write(1).expect("a kick");
        threads(WORKER) == 0
    });
    println!("  one eventfd is kicked that two queues have; the worker ended: {ended}");
    let answer = served.frontend.get_features();
    println!("  the control channel answers: {}", answer.is_ok());
    ended && answer.is_ok()
}

/// SET_VRING_NUM acknowledges a size that is no power of two, and ignores it.
pub(crate) fn vring_num() -> bool {
    let served = Served::new(Device::default());
    served.frontend.set_vring_num(0, 16).expect("16 is one");
    let answer = served.frontend.set_vring_num(0, 24);
    let size = served.vrings()[0].get_ref().get_queue().size();
    println!("  SET_VRING_NUM 16, then 24: {answer:?}; the ring's size: {size}");
    answer.is_ok() && size == 16
}
