//! The time page, with content that the test writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{ScopedJoinHandle, scope};
use std::time::Duration;

use crate::LONG;
use crate::fake::{Fake, Pair, answer, echo, info, ok, pair, run_of};
use crate::pace::waiting;
use vhost_user_timer_frontend::{Error, HostClock, Offsets, Options};
use vhost_user_timer_protocol::request::{Body, Request};
use vhost_user_timer_protocol::wire::{self, page_flags};
use vhost_user_timer_protocol::{Phase, Status};
use zerocopy::IntoBytes;

/// A backend that holds WAIT_RUNs, whose host counter is 1000, and whose page is the test's.
struct Rig {
    pair: Pair,
    /// Where the page is.
    at: Arc<AtomicU64>,
}

impl Rig {
    fn new() -> Self {
        let at = Arc::new(AtomicU64::new(0));
        let told = at.clone();
        let fake = Fake::new(move |request| match Request::parse(request).ok()?.body {
            Body::SetTimePage(page) => {
                assert!(page.length.get() == 64 && page.address.get().is_multiple_of(64));
                told.store(page.address.get(), Ordering::Relaxed);
                Some(ok(&[]))
            }
            Body::GetInfo => {
                let host_count = 1000.into();
                Some(ok(wire::Info {
                    host_count,
                    ..info()
                }
                .as_bytes()))
            }
            Body::WaitRun => None,
            _ => Some(echo(request)),
        });
        let pair = pair(fake, Options::default());
        let queue = pair.frontend.queue();
        pair.frontend.time_page().start(queue, LONG).unwrap();
        Rig { pair, at }
    }

    fn say(&self, page: wire::Page) {
        let at = self.at.load(Ordering::Relaxed);
        self.pair.fake.write(at, page.as_bytes());
    }
}

fn page(phase: Phase) -> wire::Page {
    wire::Page {
        seq: 2.into(),
        phase: phase.code().into(),
        epoch: 1.into(),
        cntvoff: 300.into(),
        cntpoff: 400.into(),
        frequency: 1_000_000_000.into(),
        ..Default::default()
    }
}

/// The host counter of the fake.
const HOST: HostClock = HostClock::Function(|_| 1000);

#[test]
fn a_count_is_the_host_counter_less_the_offset_or_the_frozen_count() {
    let rig = Rig::new();
    let queue = rig.pair.frontend.queue();
    let clock = queue.guest_clock(HOST, LONG).unwrap();
    assert_eq!(clock.counts(), None, "nothing was written");
    rig.say(page(Phase::Running));
    let counts = clock.counts().unwrap();
    assert_eq!((counts.virt_count, counts.phys_count), (700, 600));
    assert_eq!(counts.host_count, 1000);
    rig.say(wire::Page {
        flags: page_flags::VIRT_FROZEN.into(),
        cntvoff: 0.into(),
        virt_count: 9.into(),
        ..page(Phase::Paused)
    });
    let counts = clock.counts().unwrap();
    assert_eq!((counts.virt_count, counts.phys_count), (9, 600));
    rig.say(wire::Page {
        cntvoff: 1001.into(),
        ..page(Phase::Running)
    });
    assert_eq!(clock.counts().unwrap().virt_count, u64::MAX, "modulo 2^64");
}

#[test]
fn a_page_of_nonsense_is_none_and_never_a_hang() {
    let rig = Rig::new();
    let queue = rig.pair.frontend.queue();
    let clock = queue.guest_clock(HOST, LONG).unwrap();
    let good = page(Phase::Running);
    let odd = wire::Page {
        seq: 3.into(),
        ..good
    };
    let never = wire::Page {
        seq: 0.into(),
        ..good
    };
    let phase = wire::Page {
        phase: 5.into(),
        ..good
    };
    let ones: [u8; 64] = [0xff; 64];
    for bytes in [odd.as_bytes(), never.as_bytes(), phase.as_bytes(), &ones] {
        let at = rig.at.load(Ordering::Relaxed);
        rig.pair.fake.write(at, bytes);
        assert_eq!(rig.pair.frontend.time_page().read(), None);
        assert_eq!(clock.counts(), None);
    }
    rig.say(page(Phase::New));
    assert_eq!(clock.counts(), None, "there is no clock in NEW");
}

#[test]
fn running_takes_no_request_and_those_who_wait_have_one_together() {
    let rig = Rig::new();
    let frontend = &rig.pair.frontend;
    rig.say(page(Phase::Running));
    let offsets = Offsets {
        cntvoff: 300,
        cntpoff: 400,
    };
    for vcpu in 0..100 {
        let queue = frontend.queue_of(vcpu);
        assert_eq!(queue.wait_run_by_page(vcpu, LONG).unwrap(), offsets);
    }
    assert_eq!(rig.pair.fake.held(), 0);

    rig.say(page(Phase::Paused));
    scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|vcpu| {
                let queue = frontend.queue_of(vcpu);
                waiting(scope, move || queue.wait_run_by_page(vcpu, LONG))
            })
            .collect();
        rig.pair.fake.wait_for_held(1);
        // Another request would be held by now.
        for queue in frontend.queues() {
            queue.info(LONG).unwrap();
        }
        assert_eq!(rig.pair.fake.held(), 1);
        release_until(&rig, || threads.iter().all(ScopedJoinHandle::is_finished));
        for thread in threads {
            assert_eq!(thread.join().unwrap().unwrap().cntvoff, 1007);
        }
    });
}

/// Answers WAIT_RUNs until this is so: a thread that did not wait yet makes one more request.
fn release_until(rig: &Rig, is_so: impl Fn() -> bool) {
    while !is_so() {
        rig.pair.fake.release(|_| ok(run_of(7).as_bytes()));
        std::thread::yield_now();
    }
}

#[test]
fn a_running_page_with_a_clock_that_stands_still_is_not_believed() {
    let rig = Rig::new();
    rig.say(wire::Page {
        flags: page_flags::PHYS_FROZEN.into(),
        ..page(Phase::Running)
    });
    let queue = rig.pair.frontend.queue();
    let short = Duration::from_millis(5);
    let got = queue.wait_run_by_page(0, short);
    assert!(matches!(got, Err(Error::TimedOut { .. })), "{got:?}");
    rig.pair.fake.wait_for_held(1);
}

#[test]
fn a_futex_that_the_backend_never_wakes_delays_and_does_not_hang() {
    let rig = Rig::new();
    let frontend = &rig.pair.frontend;
    rig.say(page(Phase::Restoring));
    scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|vcpu| {
                let queue = frontend.queue_of(vcpu);
                waiting(scope, move || queue.wait_run_by_page(vcpu, LONG))
            })
            .collect();
        rig.pair.fake.wait_for_held(1);
        // No wake, and the same number in the futex. All threads return but the leader, which waits
        // for the request.
        rig.say(page(Phase::Running));
        while threads.iter().filter(|thread| thread.is_finished()).count() < 7 {
            std::thread::yield_now();
        }
        rig.pair.fake.release(|_| ok(run_of(1).as_bytes()));
        for thread in threads {
            let offsets = thread.join().unwrap().unwrap();
            assert!([300, 1001].contains(&offsets.cntvoff), "{offsets:?}");
        }
    });
}

#[test]
fn a_refusal_that_is_one_vcpus_own_goes_to_that_one_only() {
    let rig = Rig::new();
    let frontend = &rig.pair.frontend;
    rig.say(page(Phase::Paused));
    scope(|scope| {
        let wait = |vcpu| move || frontend.queue_of(vcpu).wait_run_by_page(vcpu, LONG);
        let bad = scope.spawn(wait(9));
        rig.pair.fake.wait_for_held(1);
        let good = waiting(scope, wait(1));
        let judge = |request: &[u8]| match request[4] {
            9 => answer(Status::NoSuchVcpu, 0, &[]),
            _ => ok(run_of(1).as_bytes()),
        };
        while !good.is_finished() {
            rig.pair.fake.release(judge);
            std::thread::yield_now();
        }
        let error = bad.join().unwrap().unwrap_err();
        assert_eq!(error.status(), Some(Status::NoSuchVcpu));
        assert_eq!(good.join().unwrap().unwrap().cntvoff, 1001);
    });
}
