//! Who reads the page, and waits by it.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::scope;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::futex;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::contract::{Client, phase, restore, u64_at};
use vhost_user_timer_kit::raw_driver::{PATIENCE, Rig, seed};
use vhost_user_timer_kit::watch::host_count;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::{AT, PHYS, Page, Paged, VIRT};

scenarios! {
    binary {
        a_change_of_phase_wakes_all_who_wait_on_wake: "9.31";
        a_reader_never_gets_a_mixture_nor_a_count_that_goes_back: "9.22" "9.24" "9.29";
        the_offset_is_the_same_for_all_who_read_running: "9.25" "9.27";
    }
}

/// Reads the page while it may change; `None` where it does.
fn read(slice: &VolatileSlice<'_>) -> Option<Page> {
    let seq: &AtomicU32 = slice.get_atomic_ref(0).unwrap();
    let before = seq.load(Ordering::Acquire);
    let mut bytes = Vec::with_capacity(64);
    for offset in (0..64).step_by(8) {
        let word: u64 = slice.load(offset, Ordering::Relaxed).unwrap();
        bytes.extend(word.to_ne_bytes());
    }
    // The counter may be read here.
    fence(Ordering::SeqCst);
    let same = seq.load(Ordering::Relaxed) == before;
    (before & 1 == 0 && same).then(|| Page::of(&bytes))
}

/// Waits on the futex as a thread of the frontend. True where it was woken.
fn sleeps_until_woken(wake: &AtomicU32, value: u32) -> bool {
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    loop {
        match futex::wait(wake, futex::Flags::empty(), value, Some(&timeout)) {
            Ok(()) | Err(Errno::AGAIN) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn a_change_of_phase_wakes_all_who_wait_on_wake() {
    let rig = Rig::launch_release(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    let steps: [&dyn Fn(&mut Client); 5] = [
        &|client| {
            client.resume();
        },
        &|client| {
            client.pause();
        },
        &|client| {
            client.restore_begin(1, restore::AUTORUN);
        },
        &|client| {
            client.bring(0, 5);
            client.restore_done(0);
        },
        &|client| client.driver.control.reset_device().unwrap(),
    ];
    for step in steps {
        let memory = vm.client.driver.memory.map().clone();
        let slice = GuestMemoryBackend::get_slice(&memory, GuestAddress(vm.at), 64).unwrap();
        let wake: &AtomicU32 = slice.get_atomic_ref(56).unwrap();
        let value = wake.load(Ordering::Relaxed);
        scope(|scope| {
            let (woken, done) = channel();
            for _ in 0..3 {
                let woken = woken.clone();
                scope.spawn(move || woken.send(sleeps_until_woken(wake, value)));
            }
            // What changes no phase wakes nobody: the threads have time to fall asleep here.
            vm.client.info();
            let asleep = done.recv_timeout(Duration::from_millis(20));
            assert_eq!(asleep, Err(RecvTimeoutError::Timeout));
            step(&mut vm.client);
            for _ in 0..3 {
                assert_eq!(done.recv_timeout(2 * PATIENCE), Ok(true));
            }
        });
        assert_ne!(wake.load(Ordering::Relaxed), value);
    }
}

fn a_reader_never_gets_a_mixture_nor_a_count_that_goes_back() {
    const READINGS: u64 = 3_000_000;
    let rig = Rig::launch_release(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    let memory = vm.client.driver.memory.map().clone();
    let mut rng = fastrand::Rng::with_seed(seed());
    scope(|scope| {
        let reader = scope.spawn(move || {
            let slice = GuestMemoryBackend::get_slice(&memory, GuestAddress(AT), 64).unwrap();
            let seq: &AtomicU32 = slice.get_atomic_ref(0).unwrap();
            let (mut whole, mut last, mut phases) = (0, 0, [0_u64; 4]);
            let began = Instant::now();
            // As many as that, and some of each phase that the writer is in most often.
            while whole < READINGS || phases[1] == 0 || phases[2] == 0 {
                assert!(began.elapsed() < 2 * PATIENCE, "{phases:?}");
                let Some(page) = read(&slice) else {
                    std::thread::yield_now();
                    continue;
                };
                let host = host_count();
                fence(Ordering::SeqCst);
                if seq.load(Ordering::Relaxed) != page.seq {
                    continue;
                }
                whole += 1;
                phases[page.phase as usize] += 1;
                let count = match page.phase {
                    phase::RUNNING => {
                        assert_eq!((page.flags, page.virt_count), (0, 0), "{page:?}");
                        host.wrapping_sub(page.cntvoff)
                    }
                    phase::PAUSED => {
                        assert_eq!((page.flags, page.cntvoff), (VIRT, 0), "{page:?}");
                        page.virt_count
                    }
                    _ => {
                        assert_eq!(page.flags, VIRT | PHYS, "{page:?}");
                        page.virt_count
                    }
                };
                assert!(count >= last, "{count} after {last}: {page:?}");
                last = count;
            }
        });
        while !reader.is_finished() {
            vm.client.resume();
            for _ in 0..rng.u32(..20) {
                std::hint::spin_loop();
            }
            let run = vm.client.pause();
            if rng.u32(..8) == 0 {
                vm.client.restore_begin(1, restore::AUTORUN);
                vm.client.bring(0, run.virt_count);
                vm.client.restore_done(0);
            }
        }
        reader.join().unwrap();
    });
}

fn the_offset_is_the_same_for_all_who_read_running() {
    let rig = Rig::launch_release(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(2);
    vm.client.restore_begin(2, restore::AUTORUN);
    vm.client.bring(0, 1_000);
    vm.client.restore_done(0);
    let waiter = vm.client.wait_run(1, 0);
    assert_eq!(vm.page().phase, phase::RESTORING, "one vCPU is missing");
    vm.client.bring(1, 2_000);
    vm.client.restore_done(1);
    let page = read(&vm.slice()).unwrap();
    let answer = vm.client.released(1, waiter);
    let body = answer.ok(40);
    assert_eq!(page.phase, phase::RUNNING);
    assert_eq!(page.cntvoff, u64_at(body, 0));
    assert_eq!(page.cntpoff, u64_at(body, 8));
}
