//! When the driver is called, and when it is asked to kick.

use vm_memory::GuestAddressSpace;

use super::driver::{USED, pair};
use super::*;
use crate::virtio::tests::write_recorder::{WriteRecorder, once_written};

#[test]
fn the_driver_is_called_where_the_entry_that_it_waits_for_is_among_the_new_ones() {
    for start in [0, 7, 65_533, 65_535] {
        for count in 1..=8_u16 {
            for event in -9..=9_i16 {
                let (mut driver, mut device) = pair::<()>(8, true, start);
                let event = start.wrapping_add_signed(event);
                driver.shared.set_used_event(event);
                driver.offer(&heads(8, count));
                device.serve_all(WhenIdle::AskForKick);
                // The used index at which each of the entries was put (virtio 1.2 §2.7.7.2).
                let waited_for = (0..count).any(|n| start.wrapping_add(n) == event);
                assert_eq!(
                    driver.calls(),
                    u64::from(waited_for),
                    "{start} {count} {event}"
                );
            }
        }
    }
}

#[test]
fn without_event_idx_a_flag_alone_says_whether_the_driver_is_called() {
    for (flags, calls) in [(0, 1), (1, 0), (2, 1), (0xfffe, 1), (0xffff, 0)] {
        for event in [0, 1, 5] {
            let (mut driver, mut device) = pair::<()>(8, false, 0);
            driver.shared.set_avail_flags(flags);
            driver.shared.set_used_event(event);
            driver.offer(&[0, 1]);
            device.serve_all(WhenIdle::AskForKick);
            assert_eq!(driver.calls(), calls, "{flags}");
        }
    }
}

#[test]
fn with_event_idx_the_flag_is_not_looked_at() {
    let (mut driver, mut device) = pair::<()>(8, true, 0);
    driver.shared.set_avail_flags(1);
    driver.offer(&[0]);
    device.serve_all(WhenIdle::AskForKick);
    assert_eq!(driver.calls(), 1);
}

#[test]
fn the_driver_is_called_once_for_all_that_was_published() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(512, event_idx, 65_500);
        driver.shared.set_used_event(65_502);
        driver.offer(&heads(512, 500));
        device.serve(|ring, chain| {
            for n in 0..500 {
                let head = ring.next_chain(chain).unwrap();
                ring.give_back(head, 0);
                if n % 3 == 0 {
                    ring.publish();
                }
                assert_eq!(driver.calls(), 0, "it is not the end");
            }
        });
        assert_eq!((driver.calls(), driver.used().len()), (1, 500));
    }
}

#[test]
fn a_ring_that_has_no_more_asks_its_driver_at_once_and_not_again() {
    for idle in [WhenIdle::AskForKick, WhenIdle::KeepPolling] {
        for event_idx in BOTH {
            let (mut driver, mut device) = pair::<()>(8, event_idx, 0);
            driver.offer(&[0, 1]);
            device.serve(|ring, chain| {
                ring.when_idle(idle);
                let (first, second) = (ring.next_chain(chain), ring.next_chain(chain));
                ring.give_back(first.unwrap(), 0);
                assert_eq!(ring.next_chain(chain), None);
                assert_eq!(ring.scratch.take_notifications(), 1 << 1);
                driver.shared.set_used_event(1);
                ring.give_back(second.unwrap(), 0);
                assert_eq!(driver.calls(), 0, "not while anything is locked");
            });
            assert_eq!(driver.calls(), 1, "of the second one");
            device.serve_all(idle);
            assert_eq!((driver.calls(), driver.used().len()), (0, 2));
        }
    }
}

#[test]
fn a_driver_that_changes_its_mind_once_it_sees_the_used_index_is_heard() {
    for event_idx in BOTH {
        for wanted in BOTH {
            let (mut driver, mut device) = pair::<WriteRecorder>(8, event_idx, 3);
            let wish = |wanted: bool| {
                let shared = driver.shared.clone();
                move || {
                    shared.set_used_event(if wanted { 3 } else { 9 });
                    shared.set_avail_flags((!wanted).into());
                }
            };
            wish(!wanted)();
            once_written(&driver.shared.memory.memory(), USED + 2, wish(wanted));
            driver.offer(&[0]);
            device.serve_all(WhenIdle::AskForKick);
            assert_eq!(driver.calls(), u64::from(wanted), "{event_idx} {wanted}");
        }
    }
}

#[test]
fn a_driver_is_asked_to_kick_when_nothing_is_left_and_not_before() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(8, event_idx, 65_535);
        driver.offer(&[0, 1]);
        let shared = driver.shared.clone();
        device.serve(|ring, chain| {
            for _ in 0..2 {
                ring.next_chain(chain).unwrap();
                assert_eq!(shared.used_flags(), u16::from(!event_idx));
                assert_eq!(shared.avail_event(), 0);
            }
            assert_eq!(ring.next_chain(chain), None);
        });
        assert_eq!(shared.used_flags(), 0);
        assert_eq!(
            shared.avail_event(),
            u16::from(event_idx),
            "with the next one"
        );
    }
}

#[test]
fn where_somebody_looks_again_soon_the_driver_is_not_asked_to_kick() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(8, event_idx, 0);
        driver.shared.store(driver.shared.avail_event_at(), 77);
        driver.offer(&[0, 1]);
        assert_eq!(device.serve_all(WhenIdle::KeepPolling), [0, 1]);
        assert_eq!(device.serve_all(WhenIdle::KeepPolling), NONE);
        assert_eq!(driver.shared.used_flags(), u16::from(!event_idx));
        assert_eq!(driver.shared.avail_event(), 77);
        device.serve_all(WhenIdle::AskForKick);
        assert_eq!(driver.shared.used_flags(), 0);
        assert_eq!(driver.shared.avail_event(), if event_idx { 2 } else { 77 });
    }
}

#[test]
fn a_chain_that_comes_between_the_look_and_the_request_for_a_kick_is_served() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<WriteRecorder>(8, event_idx, 65_535);
        driver.offer(&[4]);
        assert_eq!(device.serve_all(WhenIdle::KeepPolling), [4]);
        let (late, next) = (driver.shared.clone(), driver.next_avail);
        let asked = if event_idx {
            late.avail_event_at()
        } else {
            USED
        };
        once_written(&driver.shared.memory.memory(), asked, move || {
            late.offer_from(next, &[6]);
        });
        assert_eq!(device.serve_all(WhenIdle::AskForKick), [6], "{event_idx}");
        // And the driver was asked again.
        assert_eq!(driver.shared.used_flags(), 0);
        assert_eq!(driver.shared.avail_event(), u16::from(event_idx));
    }
}

#[test]
fn a_device_that_leaves_a_ring_asks_for_a_kick_whatever_is_there() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(8, event_idx, 65_534);
        driver.offer(&[0, 1, 2]);
        device.serve(|ring, chain| {
            ring.next_chain(chain);
            ring.leave();
        });
        assert_eq!(driver.shared.used_flags(), 0);
        assert_eq!(
            driver.shared.avail_event(),
            if event_idx { 65_535 } else { 0 }
        );
        assert_eq!(device.indices(), (65_535, 65_534));
    }
}

#[test]
fn a_call_descriptor_that_is_full_or_missing_holds_nobody_up() {
    let (mut driver, mut device) = pair::<()>(8, false, 0);
    let most = u64::MAX - 1;
    rustix::io::write(&driver.call, &most.to_ne_bytes()).unwrap();
    driver.offer(&[0]);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [0]);
    assert_eq!(driver.calls(), most);
    device.vring.set_call(None);
    driver.offer(&[1]);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [1]);
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
}
