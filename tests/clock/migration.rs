//! The pages that the clock device writes in a guest's memory are marked in the log of a migration
//! (vhost-user, "Migration"), and no others are.

use std::collections::BTreeSet;
use std::thread;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::{
    ALARMQ, ClockDriver, F_ALARM, F_LOG_ALL, MONOTONIC, MS, REQUESTQ, UTC, host, msg, proper,
    set_alarm,
};
use vhost_user_timer_kit::raw_driver::{Cut, DirtyLog, Layout, Rig, Setup, pages};

/// More than two pages, so that one that is not written lies between those that are.
const APART: usize = 3 * 4_096;

/// A guest that is being migrated.
fn migrating(rig: &Rig, setup: Setup) -> (ClockDriver, DirtyLog) {
    let setup = Setup {
        features: F_ALARM | F_LOG_ALL,
        ..setup
    };
    let mut guest = ClockDriver::connect_with(rig, setup);
    guest.settle();
    // avail_event, which is written after an answer to ask for the next kick, is written by then.
    assert!(rig.comes_to_rest());
    let log = DirtyLog::shared(&guest.driver.control);
    (guest, log)
}

fn launch() -> Rig {
    Rig::launch_devices(Devices::Clock, &[])
}

/// The pages of a queue's used ring that are written when it gives back its `n`th chain.
fn of_used_ring(guest: &ClockDriver, queue: u16, n: u16, setup: Setup) -> BTreeSet<u64> {
    let ring = &guest.driver.rings[usize::from(queue)];
    // Flags and index; the element; and, with EVENT_IDX, avail_event.
    let size = u64::from(setup.size);
    let mut written = pages(ring.used_at(), 4);
    written.extend(pages(ring.used_at() + 4 + 8 * (u64::from(n) % size), 8));
    if setup.event_idx {
        written.extend(pages(ring.used_at() + 4 + 8 * size, 2));
    }
    written
}

#[test]
fn nothing_is_marked_before_anything_is_written() {
    let rig = launch();
    let (_guest, log) = migrating(&rig, Setup::default());
    assert!(rig.comes_to_rest());
    assert_eq!(log.taken(), BTreeSet::new());
}

#[test]
fn a_request_marks_its_response_and_the_used_ring_and_no_other_page() {
    for (size, event_idx) in [(128, true), (128, false), (1_024, true), (1_024, false)] {
        let rig = launch();
        let setup = Setup {
            size,
            event_idx,
            ..Setup::default()
        };
        let (mut guest, log) = migrating(&rig, setup);
        for cut in [Cut::whole(), Cut::at(&[5, 5_000]), Cut::every(8)] {
            for (msg_type, _, response, _) in msg::ALL {
                let n = guest.driver.rings[0].next_avail();
                let mut bytes = proper(msg_type, UTC);
                bytes.resize(APART, 0);
                let layout = Layout {
                    readable: Cut::whole(),
                    writable: cut.clone(),
                    ..Layout::plain()
                }
                .indirect();
                // Much more room than is used.
                let room = if cut == Cut::every(8) { 200 } else { APART };
                let head = guest.driver.add(REQUESTQ, &bytes, room, &layout);
                let buffers = guest.driver.rings[0].writable(head).to_vec();
                guest.driver.rings[0].kick(&guest.driver.memory);
                let used = guest.driver.used(REQUESTQ);
                assert_eq!(used.bytes().len(), response);
                let mut expected = of_used_ring(&guest, REQUESTQ, n, setup);
                let mut rest = response;
                for (at, len) in buffers {
                    let len = len.min(rest);
                    expected.extend(pages(at, len as u64));
                    rest -= len;
                }
                // avail_event, which is written after the answer, is written by then.
                assert!(rig.comes_to_rest());
                let marked = log.taken();
                assert_eq!(marked, expected, "{msg_type:#x} {size} {event_idx}");
            }
        }
    }
}

#[test]
fn a_notification_marks_its_buffer_and_the_used_rings_and_no_other_page() {
    let rig = launch();
    let setup = Setup::default();
    let (mut guest, log) = migrating(&rig, setup);
    let mut n = 0;
    for _ in 0..5 {
        host::with_longer_spans(|span| {
            let head = guest.driver.submit(ALARMQ, &[], APART, &Layout::plain());
            let (at, _) = guest.driver.rings[usize::from(ALARMQ)].writable(head)[0];
            assert!(rig.comes_to_rest());
            log.taken();
            // By the timerfd alone: no request is sent when it expires.
            let time = host::utc() + span;
            guest.set_alarm(UTC, time, true);
            let in_time = host::utc() < time;
            assert_eq!(guest.notified(), UTC);
            assert!(rig.comes_to_rest());
            let marked = log.taken();
            let mut expected = of_used_ring(&guest, ALARMQ, n, setup);
            expected.extend(pages(at, 16));
            assert!(marked.is_superset(&expected), "{marked:x?} {expected:x?}");
            // And those of SET_ALARM's response: one page, and its used ring's.
            let others: BTreeSet<_> = marked.difference(&expected).copied().collect();
            let used = pages(guest.driver.rings[0].used_at(), 4);
            assert!(
                others.is_superset(&used) && others.len() <= 2,
                "{others:x?}"
            );
            n += 1;
            in_time
        });
    }
}

#[test]
fn a_buffer_that_is_too_short_marks_the_used_ring_alone() {
    let rig = launch();
    let setup = Setup::default();
    let (mut guest, log) = migrating(&rig, setup);
    let n = guest.driver.rings[0].next_avail();
    // Not even a status fits.
    let used = guest.raw(&set_alarm(UTC, 1, true), 0);
    assert_eq!(used.len, 0);
    assert!(rig.comes_to_rest());
    assert_eq!(log.taken(), of_used_ring(&guest, REQUESTQ, n, setup));
}

#[test]
fn memory_that_comes_during_the_migration_is_marked_as_well() {
    for (add_mem_reg, size) in [(false, 128), (true, 128), (false, 1_024)] {
        let rig = launch();
        let setup = Setup {
            add_mem_reg,
            size,
            ..Setup::default()
        };
        let (mut guest, log) = migrating(&rig, setup);
        for _ in 0..3 {
            // As when the guest moves a BAR, or gets more memory.
            let region = guest.driver.memory.region();
            let control = &mut guest.driver.control;
            if add_mem_reg {
                control.remove_mem_region(&region).expect("REM_MEM_REG");
                control.add_mem_region(&region).expect("ADD_MEM_REG");
            } else {
                control.set_mem_table(&[region]).expect("SET_MEM_TABLE");
            }
            let n = guest.driver.rings[0].next_avail();
            let head = guest
                .driver
                .add(REQUESTQ, &proper(msg::READ, UTC), 16, &Layout::plain());
            let (at, _) = guest.driver.rings[0].writable(head)[0];
            guest.driver.rings[0].kick(&guest.driver.memory);
            guest.driver.used(REQUESTQ);
            assert!(rig.comes_to_rest());
            let mut expected = of_used_ring(&guest, REQUESTQ, n, setup);
            expected.extend(pages(at, 16));
            assert_eq!(log.taken(), expected, "{add_mem_reg}");
        }
    }
}

#[test]
fn what_is_written_while_the_memory_changes_is_marked_as_well() {
    let rig = launch();
    let setup = Setup::default();
    let (mut guest, log) = migrating(&rig, setup);
    let region = guest.driver.memory.region();
    // One request each time: another would mark the same pages, and hide that a mark is missing.
    for round in 0..300 {
        let control = guest.driver.control.clone();
        let changes = thread::spawn(move || control.set_mem_table(&[region]));
        for _ in 0..round % 50 {
            thread::yield_now();
        }
        let n = guest.driver.rings[0].next_avail();
        let read = proper(msg::READ, UTC);
        let head = guest.driver.add(REQUESTQ, &read, 16, &Layout::plain());
        let mut expected = pages(guest.driver.rings[0].writable(head)[0].0, 16);
        guest.driver.rings[0].kick(&guest.driver.memory);
        guest.driver.used(REQUESTQ);
        expected.extend(of_used_ring(&guest, REQUESTQ, n, setup));
        changes.join().unwrap().expect("the memory table");
        assert!(rig.comes_to_rest());
        assert_eq!(log.taken(), expected, "round {round}");
    }
}

#[test]
fn nothing_is_marked_once_the_rings_are_stopped() {
    host::with_longer_spans(|span| {
        let rig = launch();
        let (mut guest, log) = migrating(&rig, Setup::default());
        for _ in 0..4 {
            guest.post_alarm_buffer();
        }
        let times = [UTC, MONOTONIC].map(|clock| (clock, host::clock(clock) + span));
        for (clock, time) in times {
            guest.set_alarm(clock, time, true);
        }
        for queue in [REQUESTQ, ALARMQ] {
            guest.driver.stop(queue);
        }
        let in_time = times
            .into_iter()
            .all(|(clock, time)| host::clock(clock) < time);
        log.taken();
        let read = proper(msg::READ, UTC);
        guest.driver.add(REQUESTQ, &read, 16, &Layout::plain());
        for ring in &guest.driver.rings {
            ring.kick_anyway();
        }
        for (clock, time) in times {
            host::wait_until(clock, time + MS);
        }
        assert!(rig.comes_to_rest());
        assert_eq!(log.taken(), BTreeSet::new());
        in_time
    });
}
