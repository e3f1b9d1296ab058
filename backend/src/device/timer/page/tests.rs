use std::sync::atomic::AtomicBool;

use super::*;
use vhost_user_timer_protocol::{CounterSource, Op, Phase, VM_WIDE};
use vm_memory::GuestMemoryAtomic;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use vhost_user_timer_model::vm::{Effects, Incoming, Now, Profile, Token};

const AT: u64 = 0x1040;
const MEMORY: usize = 0x4000;

fn memory() -> Memory<()> {
    let ranges = [(GuestAddress(0), MEMORY)];
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn vm() -> Vm {
    Vm::new(Profile {
        max_vcpus: 8,
        request_queues: 1,
        frequency: 1_000,
        frequency_fixed: false,
        source: CounterSource::NotTold,
    })
}

/// Performs an operation about the VM.
fn perform(vm: &mut Vm, op: Op, body: &(impl IntoBytes + Immutable), host: u64) {
    let header = wire::RequestHeader {
        op: op.code().into(),
        vcpu: VM_WIDE.into(),
        ..Default::default()
    };
    let request = [header.as_bytes(), body.as_bytes()].concat();
    let call = Incoming::parse(&request, 4096, Token { queue: 1, head: 0 });
    let mut effects = Effects::default();
    let _ = vm.handle(Now::at(host), &call, &mut effects);
    assert_eq!(effects.response[..4], [0; 4], "{op}");
}

fn configured(frequency: u64) -> Vm {
    configured_with(0, frequency)
}

fn configured_with(flags: u8, frequency: u64) -> Vm {
    let mut vm = vm();
    let configure = wire::ConfigureVm {
        vcpus: 1.into(),
        flags,
        frequency: frequency.into(),
        ..Default::default()
    };
    perform(&mut vm, Op::ConfigureVm, &configure, 0);
    vm
}

fn running() -> Vm {
    let mut vm = configured(0);
    resume(&mut vm);
    vm
}

fn resume(vm: &mut Vm) {
    perform(vm, Op::Resume, &[0_u8; 0], 100);
}

fn pause(vm: &mut Vm) {
    perform(vm, Op::Pause, &wire::Pause::default(), 200);
}

fn said(memory: &Memory<()>) -> wire::Page {
    let mut bytes = [0; LEN];
    memory
        .memory()
        .read_slice(&mut bytes, GuestAddress(AT))
        .unwrap();
    wire::Page::read_from_bytes(&bytes).unwrap()
}

/// The content, with the numbers of its changes.
fn numbered(vm: &Vm, page: &Page) -> wire::Page {
    wire::Page {
        seq: page.seq.into(),
        wake: page.wake.into(),
        ..vm.time_page()
    }
}

#[test]
fn the_page_has_the_bytes_of_its_content_and_no_others_are_touched() {
    let (memory, vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    assert_eq!(said(&memory), numbered(&vm, &page));
    let mut all = vec![0; MEMORY];
    memory
        .memory()
        .read_slice(&mut all, GuestAddress(0))
        .unwrap();
    all[AT as usize..][..LEN].fill(0);
    assert_eq!(all, vec![0; MEMORY]);
}

#[test]
fn a_change_is_written_once_and_wakes_where_the_phase_changed() {
    let (memory, mut vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let first = said(&memory);
    page.follow(&vm, &memory);
    assert_eq!(said(&memory), first, "nothing changed");
    pause(&mut vm);
    page.follow(&vm, &memory);
    let paused = said(&memory);
    assert_eq!(paused, numbered(&vm, &page));
    assert_eq!(paused.seq.get(), first.seq.get() + 2);
    assert_eq!(paused.wake.get(), first.wake.get() + 1);
    let offset = wire::CounterOffset {
        offset: 7.into(),
        ..Default::default()
    };
    perform(&mut vm, Op::SetCounterOffset, &offset, 300);
    page.follow(&vm, &memory);
    let pinned = said(&memory);
    assert_eq!(pinned, numbered(&vm, &page));
    assert_eq!(pinned.seq.get(), paused.seq.get() + 2);
    assert_eq!(pinned.wake, paused.wake, "the phase is the same");
}

#[test]
fn the_page_of_an_armed_vm_says_so_with_both_clocks_counting_and_each_change_wakes() {
    let (memory, mut page) = (memory(), Page::new());
    let mut vm = configured_with(wire::configure_flags::ALL, 0);
    assert!(page.start(AT, 64, &vm, &memory));
    let paused = said(&memory);
    assert_eq!(paused.flags.get(), 3, "both stand still");
    resume(&mut vm);
    page.follow(&vm, &memory);
    let armed = said(&memory);
    assert_eq!(
        (armed.phase.get(), armed.flags.get(), armed.wake.get()),
        (Phase::Armed.code(), 0, paused.wake.get() + 1)
    );
    // The count was 0 at host count 100.
    assert_eq!((armed.cntvoff.get(), armed.cntpoff.get()), (100, 100));
    let confirm = wire::ConfirmRun {
        cntvoff: armed.cntvoff,
        cntpoff: armed.cntpoff,
    };
    perform(&mut vm, Op::ConfirmRun, &confirm, 150);
    page.follow(&vm, &memory);
    let running = said(&memory);
    let expected = wire::Page {
        seq: (armed.seq.get() + 2).into(),
        phase: Phase::Running.code().into(),
        wake: (armed.wake.get() + 1).into(),
        ..armed
    };
    assert_eq!(running, expected);
}

#[test]
fn an_open_page_is_odd_until_it_is_written_though_nothing_changed() {
    let (memory, vm, mut page) = (memory(), running(), Page::new());
    page.open(&memory);
    assert!(!page.is_open(), "there is none");
    assert!(page.start(AT, 64, &vm, &memory));
    let before = said(&memory);
    page.open(&memory);
    assert!(page.is_open());
    assert_eq!(said(&memory).seq.get(), before.seq.get() + 1);
    page.open(&memory);
    assert_eq!(said(&memory).seq.get(), before.seq.get() + 1);
    page.follow(&vm, &memory);
    assert!(!page.is_open());
    let after = said(&memory);
    assert_eq!(after.seq.get(), before.seq.get() + 2);
    assert_eq!(after.wake, before.wake);
}

#[test]
fn a_page_outside_the_memory_is_refused_and_the_former_one_kept() {
    let (memory, mut vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let end = MEMORY as u64;
    for (at, length) in [
        (end, 64),
        (end - 64, 128),
        (!63, 64),
        (!63, u64::MAX),
        (0, u64::MAX),
    ] {
        assert!(!page.start(at, length, &vm, &memory), "{at:#x} {length:#x}");
    }
    pause(&mut vm);
    page.follow(&vm, &memory);
    assert_eq!(said(&memory), numbered(&vm, &page));
    assert!(page.start(end - 64, 64, &vm, &memory));
}

#[test]
fn a_page_that_is_not_aligned_in_this_process_is_refused() {
    // A region whose guest addresses are off by 32 from the mapping's.
    let ranges = [(GuestAddress(32), MEMORY)];
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    assert!(!Page::new().start(AT, 64, &vm(), &memory));
}

#[test]
fn a_page_that_is_stopped_is_written_no_more() {
    let (memory, mut vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let last = said(&memory);
    page.stop();
    pause(&mut vm);
    page.open(&memory);
    page.follow(&vm, &memory);
    page.remapped(&memory);
    assert_eq!(said(&memory), last);
}

#[test]
fn a_page_whose_memory_is_gone_is_forgotten() {
    let (memory, vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let gone = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    page.open(&gone);
    page.remapped(&gone);
    assert_eq!(page.at, None);
    assert!(!page.is_open());
    // It does not come back by itself.
    let last = said(&memory);
    page.remapped(&memory);
    assert_eq!(said(&memory), last);
}

#[test]
fn new_memory_at_the_pages_address_gets_all_of_it() {
    let (first, vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &first));
    let second = memory();
    page.remapped(&second);
    assert_eq!(said(&second), numbered(&vm, &page));
}

#[test]
fn what_the_frontend_scribbles_is_never_taken_for_anything() {
    let (memory, mut vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let (seq, wake) = (page.seq, page.wake);
    for fill in [0, 0x7f, 0xff] {
        memory
            .memory()
            .write_slice(&[fill; LEN], GuestAddress(AT))
            .unwrap();
        pause(&mut vm);
        page.follow(&vm, &memory);
        memory
            .memory()
            .write_slice(&[fill; LEN], GuestAddress(AT))
            .unwrap();
        resume(&mut vm);
        page.follow(&vm, &memory);
        assert_eq!(said(&memory), numbered(&vm, &page));
    }
    assert_eq!((page.seq, page.wake), (seq + 12, wake + 6));
}

#[test]
fn numbers_go_on_over_pages_and_begin_apart_in_every_process() {
    let (memory, vm, mut page) = (memory(), running(), Page::new());
    assert!(page.start(AT, 64, &vm, &memory));
    let first = said(&memory);
    page.stop();
    assert!(page.start(AT, 64, &vm, &memory));
    let second = said(&memory);
    assert_eq!(second.seq.get(), first.seq.get() + 2);
    assert_eq!(
        second.wake.get(),
        first.wake.get() + 1,
        "those who wait look again"
    );
    assert_ne!(Page::new().seq, Page::new().seq);
}

#[test]
fn a_reader_never_gets_a_mixture() {
    const CHANGES: u32 = 300_000;
    const READINGS: u32 = 1_000;
    let (memory, mut page) = (memory(), Page::new());
    // Two VMs, all of whose fields differ.
    let one = running();
    let mut other = configured(9);
    let begin = wire::RestoreBegin {
        vcpus: 1.into(),
        ..Default::default()
    };
    perform(&mut other, Op::RestoreBegin, &begin, 5);
    let contents = [one.time_page(), other.time_page()];
    assert!(page.start(AT, 64, &one, &memory));
    let over = AtomicBool::new(false);
    let whole = AtomicU32::new(0);
    let (mut refused, mut mixture) = (0_u64, None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut changes = 0;
            // Until the reader has read as well, however late that thread runs.
            while changes < CHANGES || whole.load(Ordering::Relaxed) < READINGS {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                page.follow(&other, &memory);
                page.follow(&one, &memory);
                changes += 1;
            }
            over.store(true, Ordering::Relaxed);
        });
        let mem = memory.memory();
        let slice = GuestMemoryBackend::get_slice(&*mem, GuestAddress(AT), LEN).unwrap();
        let seq: &AtomicU32 = slice.get_atomic_ref(0).unwrap();
        while !over.load(Ordering::Relaxed) {
            let before = seq.load(Ordering::Acquire);
            let mut words = [0_u64; 8];
            for (n, word) in words.iter_mut().enumerate() {
                *word = slice.load(8 * n, Ordering::Relaxed).unwrap();
            }
            fence(Ordering::Acquire);
            if before & 1 != 0 || seq.load(Ordering::Relaxed) != before {
                refused += 1;
                continue;
            }
            let read = wire::Page::read_from_bytes(words.as_bytes()).unwrap();
            let read = wire::Page {
                seq: 0.into(),
                wake: 0.into(),
                ..read
            };
            if !contents.contains(&read) {
                mixture = Some(read);
                over.store(true, Ordering::Relaxed);
            }
            whole.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(
        mixture, None,
        "{whole:?} whole readings, {refused} met a change"
    );
}
