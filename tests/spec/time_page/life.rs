//! When the page is written, and how long it lives.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, VM, configure_body, op, pause_body, phase, request, restore,
    restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{
    Layout, REGION_GPA, REGION_SIZE, RING_EVENT_IDX, RING_INDIRECT, Rig, VERSION_1, save, until,
};
use vm_memory::{Bytes, GuestAddress};

use super::{AT, PHYS, Page, Paged, VIRT, order};

scenarios! {
    binary {
        the_page_has_its_bytes_in_every_phase: "9.8" "9.20" "9.23" "9.25" "9.30";
        the_page_is_written_at_every_change_of_a_field: "9.21" "9.25";
        the_page_is_not_written_where_no_field_changes: "9.21";
        a_refused_pause_leaves_the_page_readable_and_as_it_was: "2.52" "9.22";
        set_time_page_is_taken_in_every_phase_and_the_page_is_written_before_the_answer:
            "5.16" "9.7" "9.8" "9.11" "9.23";
        a_second_page_takes_the_first_ones_place: "9.9" "9.11";
        what_is_no_page_is_einval_and_the_former_one_goes_on: "9.3" "9.4" "9.5" "9.10";
        a_page_over_two_regions_or_not_aligned_where_it_is_mapped_is_einval: "9.6";
        reset_device_says_new_in_the_page_and_ends_it: "9.15";
        the_page_ends_with_its_connection_and_its_numbers_go_on: "9.11" "9.12" "9.23";
        a_page_whose_region_is_removed_is_forgotten: "9.13";
        other_memory_at_the_pages_address_gets_the_page: "9.14";
        what_the_frontend_writes_into_the_page_changes_nothing: "9.2" "9.23";
        a_page_on_a_ring_or_a_buffer_does_no_harm: "9.2";
        neither_a_state_file_nor_a_device_state_has_the_page: "9.16";
        what_the_page_says_is_in_the_state_file_already: "9.26";
    }
}

/// What the driver negotiates, and a reset forgets.
const FEATURES: u64 =
    VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

fn the_page_has_its_bytes_in_every_phase() {
    let rig = Rig::launch_release(&[]);
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

fn the_page_is_written_at_every_change_of_a_field() {
    let rig = Rig::launch_release(&[]);
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

fn the_page_is_not_written_where_no_field_changes() {
    let rig = Rig::launch_release(&[]);
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

fn a_refused_pause_leaves_the_page_readable_and_as_it_was() {
    let rig = Rig::launch_release(&[]);
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

fn set_time_page_is_taken_in_every_phase_and_the_page_is_written_before_the_answer() {
    let rig = Rig::launch_release(&[]);
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

fn a_second_page_takes_the_first_ones_place() {
    let rig = Rig::launch_release(&[]);
    let mut vm = Paged::connect(&rig);
    let first = (vm.at, vm.page());
    vm.at += 128;
    vm.start().ok(0);
    vm.changes_phase(phase::PAUSED, |client| client.configure(1));
    vm.at = first.0;
    assert_eq!(vm.page(), first.1);
}

fn what_is_no_page_is_einval_and_the_former_one_goes_on() {
    let rig = Rig::launch_release(&[]);
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

fn reset_device_says_new_in_the_page_and_ends_it() {
    let rig = Rig::launch_release(&[]);
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

fn the_page_ends_with_its_connection_and_its_numbers_go_on() {
    let rig = Rig::launch_release(&[]);
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

fn a_page_whose_region_is_removed_is_forgotten() {
    let rig = Rig::launch_release(&[]);
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
        rig.log_with("time page");
        let (before, after) = vm.over_a(|client| {
            client.resume();
            client.pause();
        });
        assert_eq!(after, before);
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

fn other_memory_at_the_pages_address_gets_the_page() {
    let rig = Rig::launch_release(&[]);
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
        file.read_exact_at(&mut bytes, at).unwrap();
        Page::of(&bytes)
    };
    assert_eq!(written().content(), before.content());
    assert_eq!(written().wake, before.wake + 1);
    vm.client.resume();
    assert_eq!(written().phase, phase::RUNNING);
    assert_eq!(vm.page(), before, "and the old memory is left alone");
}

fn what_the_frontend_writes_into_the_page_changes_nothing() {
    let rig = Rig::launch_release(&[]);
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

fn a_page_on_a_ring_or_a_buffer_does_no_harm() {
    // The frontend may point it wherever it likes: at its own rings too.
    let rig = Rig::launch_release(&[]);
    for offset in [0, 64, 0x1_0000, 0x1_0040, 0x2_0000] {
        let mut client = Client::connect(&rig);
        let body = order(REGION_GPA + offset, 64);
        let request = request(op::SET_TIME_PAGE, VM, 0, &body);
        let layout = client.layout.clone();
        client.driver.submit(1, &request, 16, &layout);
        drop(client);
    }
    assert_eq!(Client::connect(&rig).info().phase, phase::NEW);
}

fn a_page_over_two_regions_or_not_aligned_where_it_is_mapped_is_einval() {
    // A second region begins where the first one's last page would end half way, and is mapped at a
    // host page of its own: there an address that is a multiple of 64 is not one in the mapping.
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    let [mut rings, mut second] = regions(&client);
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    rings.memory_size += 32;
    second.guest_phys_addr += 32;
    second.userspace_addr += 32;
    (second.memory_size, second.mmap_offset) = (4096, 0);
    second.mmap_handle = file.as_raw_fd();
    client
        .driver
        .control
        .set_mem_table(&[rings, second])
        .unwrap();
    let over_both = REGION_GPA + REGION_SIZE / 2;
    for at in [over_both, over_both + 64, over_both + 128] {
        let answer = client.vm(op::SET_TIME_PAGE, &order(at, 64));
        assert_eq!(answer.outcome(), (status::EINVAL, 0), "{at:#x}");
    }
    client
        .vm(op::SET_TIME_PAGE, &order(over_both - 64, 64))
        .ok(0);
}

fn neither_a_state_file_nor_a_device_state_has_the_page() {
    let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    // Both clocks are frozen, so that two streams of one VM are the same.
    client.set(0, &[(CNT, 7), (PCNT, 8)]);
    let stream = save(&client.driver.control);
    let vm = Paged::over(client);
    assert_eq!(save(&vm.client.driver.control), stream);
    let before = vm.page();
    // The next backend on the file gets the same memory, and writes no page there.
    let rig = rig.die_and_go_on(|| {}, &[]);
    let Paged { client, at } = vm;
    let driver = client.driver.moved_to(rig.stream(), |_| {});
    let mut client = Client::new(driver);
    client.resume();
    client.pause();
    assert_eq!(Page::of(&client.driver.memory.read(at, 64)), before);
}

fn what_the_page_says_is_in_the_state_file_already() {
    for round in 0..20 {
        let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
        let mut vm = Paged::connect(&rig);
        vm.client.configure(1);
        vm.client.set(0, &[(CNT, round)]);
        let resume = request(op::RESUME, VM, 0, &[]);
        vm.client.driver.submit(1, &resume, 56, &Layout::plain());
        let memory = vm.client.driver.memory.map().clone();
        let phase = || {
            let mut bytes = [0; 4];
            memory.read_slice(&mut bytes, GuestAddress(AT + 4)).unwrap();
            u32::from_le_bytes(bytes)
        };
        until("the page says RUNNING", || phase() == phase::RUNNING);
        // Killed as soon as it is seen, answered or not.
        let rig = rig.die_and_go_on(|| drop(vm), &[]);
        let info = Client::connect(&rig).info();
        assert_eq!(info.phase, phase::RUNNING, "round {round}");
    }
}
