//! libblkio's virtio driver layer (the `virtio-driver` crate), which knows nothing of this
//! project, as the driver of the timer device.

use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Info, VM, configure_body, op, regs_body, request, u32_at, u64_at, words,
};
use vhost_user_timer_kit::raw_driver::{POISON, Rig, Used};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    ByteValued, EventFd, QueueNotifier, VhostUser, VirtioFeatureFlags, VirtioTransport, iovec,
};

scenarios! {
    binary {
        an_independent_driver_gets_info_and_sets_and_gets_registers: "1.1" "2.4" "2.6" "2.7";
    }
}

/// The config space, which the transport copies out.
#[derive(Clone, Copy)]
#[repr(C)]
struct Config([u8; 64]);

#[expect(
    unsafe_code,
    reason = "virtio-driver reads a config space only as ByteValued"
)]
// SAFETY: an array of bytes is valid whatever they are, and has no padding.
unsafe impl ByteValued for Config {}

/// What each request has in shared memory.
#[derive(Clone, Copy)]
#[repr(C)]
struct Slot {
    request: [u8; 128],
    answer: [u8; 256],
}

const QUEUES: usize = 2;
const SIZE: u16 = 16;

/// The request queue.
struct Queue<'a> {
    ring: Virtqueue<'a, Slot>,
    kick: Box<dyn QueueNotifier>,
    call: std::sync::Arc<EventFd>,
}

impl Queue<'_> {
    fn call(&mut self, bytes: &[u8]) -> Answer {
        let id = self
            .ring
            .add_request(|slot, add| {
                slot.request[..bytes.len()].copy_from_slice(bytes);
                slot.answer = [POISON; 256];
                let readable = iovec {
                    iov_base: slot.request.as_mut_ptr().cast(),
                    iov_len: bytes.len(),
                };
                let writable = iovec {
                    iov_base: slot.answer.as_mut_ptr().cast(),
                    iov_len: 256,
                };
                add(readable, false)?;
                add(writable, true)
            })
            .unwrap();
        if self.ring.avail_notif_needed() {
            self.kick.notify().unwrap();
        }
        loop {
            if let Some(done) = self.ring.completions().next() {
                assert_eq!(done.id, id);
                return answer(&done.req.answer);
            }
            let patience = Timespec {
                tv_sec: 30,
                tv_nsec: 0,
            };
            let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "no completion");
            self.call.read().unwrap();
        }
    }
}

/// The crate keeps the used length to itself; what was poison still was not written.
fn answer(bytes: &[u8; 256]) -> Answer {
    let len = 256 - bytes.iter().rev().take_while(|b| **b == POISON).count();
    Answer::of(&Used {
        head: 0,
        len: len as u32,
        writable: bytes.to_vec(),
    })
}

fn drive(path: &str, features: VirtioFeatureFlags) {
    let mut transport = VhostUser::<Config, Slot>::new(path, features.bits()).unwrap();
    let accepted = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    assert!(accepted.contains(features));
    assert_eq!(transport.max_queues(), Some(QUEUES));
    let of_config = Info::of(&transport.get_config().unwrap().0);
    assert_eq!((of_config.version, of_config.host_count), (1, 0));

    let translators: Vec<_> = (0..QUEUES).map(|_| transport.iova_translator()).collect();
    let layout = VirtqueueLayout::new::<Slot>(QUEUES, SIZE.into(), accepted).unwrap();
    let memory = transport.alloc_queue_mem(&layout).unwrap();
    let (address, len) = (memory.as_mut_ptr(), memory.len());
    #[expect(unsafe_code, reason = "virtio-driver gives out a raw pointer")]
    // SAFETY: the transport keeps this mapping as long as it lives, which is longer than the
    // queues; nothing else in this process uses it.
    let memory = unsafe { std::slice::from_raw_parts_mut(address, len) };
    let mut rings: Vec<_> = memory
        .chunks_mut(layout.end_offset)
        .zip(translators)
        .map(|(memory, translator)| {
            let mut ring = Virtqueue::<Slot>::new(translator, memory, SIZE, accepted).unwrap();
            ring.set_used_notif_enabled(true);
            ring
        })
        .collect();
    transport.setup_queues(&rings).unwrap();
    let mut queue = Queue {
        ring: rings.pop().unwrap(),
        kick: transport.get_submission_notifier(1),
        call: transport.get_completion_fd(1),
    };

    let info = Info::of(queue.call(&request(op::GET_INFO, VM, 0, &[])).ok(64));
    assert_eq!(
        Info {
            host_count: 0,
            ..info
        },
        of_config
    );
    let configure = request(op::CONFIGURE_VM, VM, 0, &configure_body(2, 0, 0));
    queue.call(&configure).ok(0);
    // More requests than the ring has descriptors.
    for n in 0..100u64 {
        let entries = [(CTL, 1), (CVAL, n + 1), (CNT, n)];
        let set = request(op::SET_REGS, 1, 0, &regs_body(&entries));
        assert_eq!(u32_at(queue.call(&set).ok(8), 0), 0);
        let get = request(op::GET_REGS, 1, 0, &words(&[CNT, CTL, CVAL]));
        let answer = queue.call(&get);
        let body = answer.ok(48);
        assert_eq!([u64_at(body, 0), u64_at(body, 8)], [CNT, n]);
        assert_eq!([u64_at(body, 16), u64_at(body, 24)], [CTL, 1]);
        assert_eq!([u64_at(body, 32), u64_at(body, 40)], [CVAL, n + 1]);
    }
}

/// The crate has no time-outs of its own.
fn within_a_minute(test: impl FnOnce() + Send + 'static) {
    let (ended, end) = channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = ended.send(());
    });
    if end.recv_timeout(Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
    {
        panic!("the driver waits forever");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn an_independent_driver_gets_info_and_sets_and_gets_registers() {
    for features in [
        VirtioFeatureFlags::VERSION_1,
        VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX,
    ] {
        let rig = Rig::launch_release(&[]);
        let path = rig.backend.socket_path().to_str().unwrap().to_owned();
        within_a_minute(move || drive(&path, features));
    }
}
