//! The time page (SPEC.md, "Time page"), byte for byte.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::scope;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::futex;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, Info, PCNT, VM, configure_body, op, pause_body, phase, restore,
    restore_body, status, u32_at, u64_at, words,
};
use vhost_user_timer_kit::raw_driver::{
    PATIENCE, REGION_GPA, REGION_SIZE, RING_EVENT_IDX, RING_INDIRECT, Rig, VERSION_1, seed,
};
use vhost_user_timer_kit::watch::host_count;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

/// The page's fields, as its 64 bytes give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    seq: u32,
    phase: u32,
    epoch: u64,
    cntvoff: u64,
    cntpoff: u64,
    frequency: u64,
    virt_count: u64,
    phys_count: u64,
    wake: u32,
    flags: u32,
}

const VIRT: u32 = 1;
const PHYS: u32 = 2;

impl Page {
    fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 64);
        Page {
            seq: u32_at(bytes, 0),
            phase: u32_at(bytes, 4),
            epoch: u64_at(bytes, 8),
            cntvoff: u64_at(bytes, 16),
            cntpoff: u64_at(bytes, 24),
            frequency: u64_at(bytes, 32),
            virt_count: u64_at(bytes, 40),
            phys_count: u64_at(bytes, 48),
            wake: u32_at(bytes, 56),
            flags: u32_at(bytes, 60),
        }
    }

    /// What it says, without the numbers of its changes.
    fn content(self) -> Self {
        Page {
            seq: 0,
            wake: 0,
            ..self
        }
    }

    /// Whether GET_INFO says the same.
    #[track_caller]
    fn agrees(&self, info: &Info) {
        assert_eq!(self.phase, info.phase);
        assert_eq!(self.epoch, info.epoch);
        assert_eq!(self.frequency, info.frequency);
        for (offset, count, bit, told) in [
            (self.cntvoff, self.virt_count, VIRT, info.cntvoff),
            (self.cntpoff, self.phys_count, PHYS, info.cntpoff),
        ] {
            if self.flags & bit == 0 {
                assert_eq!((offset, count), (told, 0));
            } else {
                let frozen = info.host_count.wrapping_sub(told);
                assert_eq!((offset, count), (0, frozen));
            }
        }
        assert_eq!(self.flags & !(VIRT | PHYS), 0);
    }
}

/// A frontend with a page.
struct Paged {
    client: Client,
    at: u64,
}

fn order(at: u64, length: u64) -> Vec<u8> {
    words(&[at, length])
}

/// What the driver negotiates, and a reset forgets.
const FEATURES: u64 =
    VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// An address in the region's buffer space that no buffer has.
const AT: u64 = REGION_GPA + REGION_SIZE - 4096;

impl Paged {
    fn connect(rig: &Rig) -> Self {
        Self::over(Client::connect(rig))
    }

    fn over(client: Client) -> Self {
        let mut paged = Paged { client, at: AT };
        paged.start().ok(0);
        paged
    }

    fn start(&mut self) -> Answer {
        self.client.vm(op::SET_TIME_PAGE, &order(self.at, 64))
    }

    fn stop(&mut self) {
        self.client.vm(op::SET_TIME_PAGE, &order(0, 0)).ok(0);
    }

    /// The page, while nothing is under way: so it is whole.
    #[track_caller]
    fn page(&self) -> Page {
        let page = Page::of(&self.client.driver.memory.read(self.at, 64));
        assert_eq!(page.seq & 1, 0, "{page:?}");
        page
    }

    /// Does something, and returns the page before and after.
    fn over_a<T>(&mut self, change: impl FnOnce(&mut Client) -> T) -> (Page, Page) {
        let before = self.page();
        change(&mut self.client);
        (before, self.page())
    }

    /// Does something that changes the phase.
    #[track_caller]
    fn changes_phase<T>(&mut self, to: u32, change: impl FnOnce(&mut Client) -> T) -> Page {
        let (before, after) = self.over_a(change);
        assert_ne!(before.phase, to);
        assert_eq!(after.phase, to);
        assert_eq!(after.seq, before.seq + 2);
        assert_eq!(after.wake, before.wake + 1);
        after.agrees(&self.client.info());
        after
    }

    /// Does something that changes the page and not the phase.
    #[track_caller]
    fn changes<T>(&mut self, change: impl FnOnce(&mut Client) -> T) -> Page {
        let (before, after) = self.over_a(change);
        assert_ne!(after.content(), before.content());
        assert_eq!(after.seq, before.seq + 2);
        assert_eq!(after.wake, before.wake);
        after.agrees(&self.client.info());
        after
    }

    fn slice(&self) -> VolatileSlice<'_> {
        let memory = self.client.driver.memory.map();
        GuestMemoryBackend::get_slice(memory, GuestAddress(self.at), 64).unwrap()
    }

    fn scribble(&self, byte: u8) {
        self.client.driver.memory.write(self.at, &[byte; 64]);
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

#[test]
fn the_page_has_its_bytes_in_every_phase() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    let new = vm.page();
    let hz = 1_000_000_000;
    assert_eq!(new.phase, phase::NEW);
    assert_eq!((new.epoch, new.frequency), (1, hz));
    assert_eq!((new.cntvoff, new.cntpoff, new.flags), (0, 0, 0));
    assert_eq!((new.virt_count, new.phys_count), (0, 0));

    let body = configure_body(2, 0, 62_500_000);
    let paused = vm.changes_phase(phase::PAUSED, |client| {
        client.vm(op::CONFIGURE_VM, &body).ok(0);
    });
    assert_eq!((paused.frequency, paused.flags), (62_500_000, VIRT));
    assert_eq!((paused.virt_count, paused.cntpoff), (0, 0));

    let mut run = None;
    let running = vm.changes_phase(phase::RUNNING, |client| run = Some(client.resume()));
    let run = run.unwrap();
    assert_eq!((running.cntvoff, running.cntpoff), (run.cntvoff, 0));
    assert_eq!(running.flags, 0);

    let mut run = None;
    let paused = vm.changes_phase(phase::PAUSED, |client| run = Some(client.pause()));
    assert_eq!(paused.virt_count, run.unwrap().virt_count);
    assert_eq!(paused.flags, VIRT);

    let restoring = vm.changes_phase(phase::RESTORING, |client| {
        client.restore_begin(2, restore::AUTORUN)
    });
    assert_eq!(restoring.epoch, 2);
    assert_eq!(restoring.flags, VIRT | PHYS);
    assert_eq!(restoring.virt_count, paused.virt_count);

    let again = vm.changes(|client| client.restore_begin(2, restore::AUTORUN));
    assert_eq!(again.epoch, 3, "the phase is the same");

    let running = vm.changes_phase(phase::RUNNING, |client| {
        for vcpu in 0..2 {
            client.bring(vcpu, 1 << 50);
            client.restore_done(vcpu);
        }
    });
    assert_eq!(running.flags, 0);
    assert_eq!(running.epoch, 3);

    vm.changes_phase(phase::PAUSED, |client| {
        client.vm(op::PAUSE, &pause_body(1)).ok(40);
    });
    assert_eq!(vm.page().flags, 0, "paused, and counting");
    assert_eq!(vm.page().cntvoff, running.cntvoff);
}

#[test]
fn the_page_is_written_at_every_change_of_a_field() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    let page = vm.changes(|client| client.set(0, &[(CNT, 77)]));
    assert_eq!(page.virt_count, 77);
    let page = vm.changes(|client| client.set(0, &[(PCNT, 78)]));
    assert_eq!((page.phys_count, page.flags), (78, VIRT | PHYS));
    let page = vm.changes(|client| {
        client.vm(op::SET_COUNTER_OFFSET, &words(&[5, 0])).ok(0);
    });
    assert_eq!((page.cntvoff, page.cntpoff, page.flags), (5, 5, 0));
    vm.changes_phase(phase::RESTORING, |client| client.restore_begin(1, 0));
    let page = vm.changes_phase(phase::PAUSED, |client| {
        client.vm(op::RESTORE_ABORT, &[]).ok(0);
    });
    assert_eq!((page.cntvoff, page.epoch), (5, 2));
}

#[test]
fn the_page_is_not_written_where_no_field_changes() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(2);
    for running in [false, true] {
        if running {
            vm.client.resume();
        }
        let (before, after) = vm.over_a(|client| {
            client.set(0, &[(CTL, 1), (CVAL, u64::MAX)]);
            client.get(1, &[CTL, CNT, CVAL]);
            client.state();
            client.info();
            client.vm(0x7777, &[]);
            client.vm(op::RESTORE_ABORT, &[]);
            client.configure(2);
        });
        assert_eq!(after, before);
    }
    // Nor by the passing of time: a timer fires, a restore times out.
    vm.client.post_event_buffer();
    vm.client.post_event_buffer();
    let (before, after) = vm.over_a(|client| {
        client.set(0, &[(CTL, 1), (CVAL, 0)]);
        client.settle();
    });
    assert_eq!(after, before);
}

#[test]
fn a_refused_pause_leaves_the_page_readable_and_as_it_was() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    let (before, after) = vm.over_a(|client| {
        let refused = client.vm(op::PAUSE, &pause_body(0));
        assert_eq!(refused.outcome(), (status::EBUSY, phase::NEW));
        let refused = client.vm(op::RESTORE_BEGIN, &restore_body(1, 0, 0, 0));
        assert_eq!(refused.outcome(), (status::EBUSY, phase::NEW));
    });
    assert_eq!(after.content(), before.content());
    assert_eq!(after.wake, before.wake);
}

#[test]
fn set_time_page_is_taken_in_every_phase_and_the_page_is_written_before_the_answer() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    let steps: [&dyn Fn(&mut Client); 4] = [
        &|_| {},
        &|client| client.configure(2),
        &|client| {
            client.resume();
        },
        &|client| {
            client.pause();
            client.restore_begin(2, 0);
        },
    ];
    for step in steps {
        vm.stop();
        let (before, after) = vm.over_a(step);
        assert_eq!(after, before, "a page that is stopped is written no more");
        vm.at += 64;
        vm.start().ok(0);
        let page = vm.page();
        page.agrees(&vm.client.info());
        assert_ne!((page.seq, page.wake), (0, 0));
        vm.scribble(0xff);
        vm.start().ok(0);
        assert_eq!(vm.page().seq, page.seq + 2);
        assert_eq!(vm.page().wake, page.wake + 1);
        assert_eq!(vm.page().content(), page.content());
    }
}

#[test]
fn a_second_page_takes_the_first_ones_place() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    let first = (vm.at, vm.page());
    vm.at += 128;
    vm.start().ok(0);
    vm.changes_phase(phase::PAUSED, |client| client.configure(1));
    vm.at = first.0;
    assert_eq!(vm.page(), first.1);
}

#[test]
fn what_is_no_page_is_einval_and_the_former_one_goes_on() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    let end = REGION_GPA + REGION_SIZE;
    for (at, length) in [
        (AT, 1),
        (AT, 63),
        (AT + 1, 64),
        (AT + 8, 64),
        (AT + 32, 128),
        (0, 64),
        (REGION_GPA - 64, 64),
        (end - 64, 65),
        (end - 64, 128),
        (end, 64),
        (AT, u64::MAX),
        (!63, 64),
        (!63, u64::MAX),
        (1 << 63, 1 << 63),
    ] {
        let answer = vm.client.vm(op::SET_TIME_PAGE, &order(at, length));
        assert_eq!(answer.outcome(), (status::EINVAL, 0), "{at:#x} {length:#x}");
        assert_eq!(answer.epoch, 1);
    }
    vm.changes_phase(phase::PAUSED, |client| client.configure(1));
    // The last one that fits.
    vm.at = end - 64;
    vm.start().ok(0);
    vm.changes_phase(phase::RUNNING, |client| client.resume());
    let stop = vm.client.vm(op::SET_TIME_PAGE, &order(3, 0));
    stop.ok(0);
    // The checks before the values: length, vCPU, epoch.
    let body = order(1, 1);
    let client = &mut vm.client;
    assert_eq!(
        client.vm(op::SET_TIME_PAGE, &body[..8]).status,
        status::EPROTO
    );
    assert_eq!(
        client.ask(op::SET_TIME_PAGE, 0, 0, &body).status,
        status::EINVAL
    );
    assert_eq!(
        client.ask(op::SET_TIME_PAGE, VM, 9, &body).status,
        status::ESTALE
    );
}

#[test]
fn reset_device_says_new_in_the_page_and_ends_it() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    vm.client.resume();
    let before = vm.page();
    vm.client.driver.control.reset_device().unwrap();
    let after = vm.page();
    assert_eq!((after.phase, after.epoch), (phase::NEW, before.epoch));
    assert_eq!((after.cntvoff, after.flags), (0, 0));
    assert_eq!(after.wake, before.wake + 1);
    let control = &mut vm.client.driver.control;
    control.set_features(FEATURES).unwrap();
    for queue in 0..2 {
        control.set_vring_enable(queue, true).unwrap();
    }
    let (before, after) = vm.over_a(|client| client.configure(1));
    assert_eq!(after, before);
}

#[test]
fn the_page_ends_with_its_connection_and_its_numbers_go_on() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    let (before, memory) = (vm.page(), vm.client.driver.memory.map().clone());
    drop(vm);
    let mut client = Client::connect(&rig);
    client.resume();
    let mut bytes = [0; 64];
    memory.read_slice(&mut bytes, GuestAddress(AT)).unwrap();
    assert_eq!(Page::of(&bytes), before);
    let page = Paged::over(client).page();
    assert_eq!(page.phase, phase::RUNNING);
    assert!(page.seq > before.seq && page.wake > before.wake);
}

/// The VM's memory in two regions, the rings in the first and the page in the second.
fn regions(client: &Client) -> [VhostUserMemoryRegionInfo; 2] {
    let whole = client.driver.memory.region();
    let split = REGION_SIZE / 2;
    let (mut first, mut second) = (whole, whole);
    first.memory_size = split;
    second.memory_size = REGION_SIZE - split;
    second.guest_phys_addr += split;
    second.userspace_addr += split;
    second.mmap_offset += split;
    [first, second]
}

#[test]
fn a_page_whose_region_is_removed_is_forgotten() {
    let rig = Rig::launch(&[]);
    for table in [false, true] {
        let mut client = Client::connect(&rig);
        let [rings, page] = regions(&client);
        client.driver.control.set_mem_table(&[rings, page]).unwrap();
        client.configure(1);
        let mut vm = Paged::over(client);
        let control = &mut vm.client.driver.control;
        if table {
            control.set_mem_table(&[rings]).unwrap();
        } else {
            control.remove_mem_region(&page).unwrap();
        }
        let (before, after) = vm.over_a(|client| {
            client.resume();
            client.pause();
        });
        assert_eq!(after, before);
        assert!(rig.backend.log().contains("time page"), "the log says so");
        assert_eq!(vm.start().outcome(), (status::EINVAL, 0));
        // Its coming back does not bring the page back.
        vm.client.driver.control.add_mem_region(&page).unwrap();
        let (before, after) = vm.over_a(|client| {
            client.resume();
        });
        assert_eq!(after, before);
        vm.start().ok(0);
        vm.changes_phase(phase::PAUSED, |client| client.pause());
    }
}

#[test]
fn other_memory_at_the_pages_address_gets_the_page() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    let [rings, page] = regions(&client);
    client.driver.control.set_mem_table(&[rings, page]).unwrap();
    client.configure(1);
    let mut vm = Paged::over(client);
    let before = vm.page();
    let file = tempfile::tempfile().unwrap();
    file.set_len(page.memory_size).unwrap();
    let other = VhostUserMemoryRegionInfo {
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
        ..page
    };
    vm.client
        .driver
        .control
        .set_mem_table(&[rings, other])
        .unwrap();
    let written = || {
        let mut bytes = [0; 64];
        let at = AT - page.guest_phys_addr;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).unwrap();
        Page::of(&bytes)
    };
    assert_eq!(written().content(), before.content());
    assert_eq!(written().wake, before.wake + 1);
    vm.client.resume();
    assert_eq!(written().phase, phase::RUNNING);
    assert_eq!(vm.page(), before, "and the former memory is let be");
}

#[test]
fn what_the_frontend_writes_into_the_page_changes_nothing() {
    let rig = Rig::launch(&[]);
    let mut vm = Paged::connect(&rig);
    vm.client.configure(1);
    let before = vm.page();
    let mut rounds = 0;
    for byte in [0, 1, 0x7f, 0x80, 0xfe, 0xff] {
        vm.scribble(byte);
        vm.client.resume();
        vm.scribble(byte);
        let run = vm.client.pause();
        rounds += 1;
        let page = vm.page();
        assert_eq!(page.virt_count, run.virt_count);
        assert_eq!(page.seq, before.seq + 4 * rounds);
        // `wake` is only written where it grows, and that it did.
        assert_eq!(page.wake, before.wake + 2 * rounds);
        page.agrees(&vm.client.info());
    }
}

#[test]
fn a_page_on_a_ring_or_a_buffer_does_no_harm() {
    // The frontend may point it wherever it likes: at its own rings too.
    let rig = Rig::launch(&[]);
    for offset in [0, 64, 0x1_0000, 0x1_0040, 0x2_0000] {
        let mut client = Client::connect(&rig);
        let body = order(REGION_GPA + offset, 64);
        let request = vhost_user_timer_kit::contract::request(op::SET_TIME_PAGE, VM, 0, &body);
        let layout = client.layout.clone();
        client.driver.submit(1, &request, 16, &layout);
        drop(client);
    }
    assert_eq!(Client::connect(&rig).info().phase, phase::NEW);
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

#[test]
fn a_change_of_phase_wakes_all_who_wait_on_wake() {
    let rig = Rig::launch(&[]);
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

#[test]
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
            while whole < READINGS {
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
            phases
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
        let phases = reader.join().unwrap();
        assert!(phases[1] > 0 && phases[2] > 0, "{phases:?}");
    });
}

#[test]
fn the_offset_is_the_same_for_all_who_read_running() {
    let rig = Rig::launch(&[]);
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
