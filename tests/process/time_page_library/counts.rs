//! Counts by the page, without a request.

use super::*;

#[test]
fn counts_lie_between_two_of_get_regs_in_every_phase() {
    for frequency in [HOST_FREQUENCY, 62_500_000, 24_000_000, 1_000] {
        let served = Served::with(1, frequency, &[]);
        let (queue, clock) = (served.queue(), served.clock());
        let ids = [Register::TimerCnt, Register::PtimerCnt].map(|r| r.id(Abi::Arm64));
        let read = || {
            let values = queue.get_regs(0, &ids, LIMIT).unwrap();
            [values[0].value, values[1].value]
        };
        let agree = || {
            for _ in 0..200 {
                let before = read();
                let Counts {
                    virt_count,
                    phys_count,
                    host_count,
                    ..
                } = clock.counts().unwrap();
                let after = read();
                assert!((before[0]..=after[0]).contains(&virt_count));
                assert!((before[1]..=after[1]).contains(&phys_count));
                assert!(queue.info(LIMIT).unwrap().host_count >= host_count);
            }
        };
        agree();
        queue.resume(LIMIT).unwrap();
        agree();
        queue.pause_vm_only(LIMIT).unwrap();
        agree();
        queue.set_counter_offset(1, LIMIT).unwrap();
        agree();
        served.begin(None);
        // What the vCPU staged is its own until the restore is over.
        let counts = clock.counts().unwrap();
        let vm = queue.get_vm(0, 1, LIMIT).unwrap();
        assert_eq!(
            (counts.virt_count, counts.phys_count),
            (vm.virt_count, vm.phys_count)
        );
        served.bring(0, 5_000_000);
        queue.restore_done(0, LIMIT).unwrap();
        agree();
    }
}

#[test]
fn no_thread_sees_a_count_go_back_while_the_vm_is_paused_and_resumed() {
    let served = Served::new(1);
    let (queue, clock) = (served.queue(), served.clock());
    let largest = [AtomicU64::new(0), AtomicU64::new(0)];
    let over = AtomicBool::new(false);
    let readings = AtomicU64::new(0);
    scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seen = [0, 1].map(|n| largest[n].load(Ordering::SeqCst));
                    // A backend that was preempted leaves the page's seq odd.
                    let Some(counts) = clock.counts() else {
                        continue;
                    };
                    let now = [counts.virt_count, counts.phys_count];
                    for n in 0..2 {
                        if now[n] < seen[n] {
                            over.store(true, Ordering::Relaxed);
                            panic!("clock {n}: {} after {}", now[n], seen[n]);
                        }
                        largest[n].fetch_max(now[n], Ordering::SeqCst);
                    }
                    readings.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let deadline = Instant::now() + LIMIT;
        let read = || readings.load(Ordering::Relaxed);
        let few = || read() <= 1_000 && Instant::now() < deadline + 9 * LIMIT;
        while few() || read() < 2_000_000 && Instant::now() < deadline {
            if over.load(Ordering::Relaxed) {
                return;
            }
            let run = queue.resume(LIMIT).unwrap();
            assert!(
                clock
                    .counts()
                    .is_none_or(|now| now.virt_count >= run.virt_count)
            );
            queue.pause(LIMIT).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(readings.load(Ordering::Relaxed) > 1_000);
}

#[test]
fn another_host_counter_than_the_backends_is_refused() {
    let served = Served::new(1);
    let queue = served.queue();
    let refused = |host| {
        let error = queue.guest_clock(host, LIMIT).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    };
    refused(HostClock::Function(|_| 0));
    refused(HostClock::Function(|_| host_count() - 1_000_000_000));
    refused(HostClock::Function(|_| host_count() + 1_000_000_000));
    let now = Anchor {
        monotonic_ns: host_count(),
        count: host_count(),
    };
    refused(HostClock::Anchored(now));
    let right = HostClock::Function(|_| host_count());
    assert!(queue.guest_clock(right, LIMIT).unwrap().counts().is_some());
}

#[test]
fn an_anchored_vm_is_read_by_its_anchor_and_by_nothing_else() {
    let served = Served::with(1, 62_500_000, &[]);
    let queue = served.queue();
    let monotonic = served.clock();
    let anchor = Anchor {
        monotonic_ns: host_count(),
        count: 1 << 40,
    };
    queue
        .set_counter_anchor(anchor.monotonic_ns, anchor.count, LIMIT)
        .unwrap();
    assert_eq!(monotonic.counts(), None, "from now on another counter");
    assert!(queue.guest_clock(HostClock::MONOTONIC, LIMIT).is_err());
    let clock = queue.guest_clock(HostClock::Anchored(anchor), LIMIT);
    let clock = clock.unwrap();
    queue.resume(LIMIT).unwrap();
    for _ in 0..100 {
        let before = queue.info(LIMIT).unwrap();
        let counts = clock.counts().unwrap();
        let after = queue.info(LIMIT).unwrap();
        assert!((before.host_count..=after.host_count).contains(&counts.host_count));
        assert_eq!(counts.host_count - counts.virt_count, after.cntvoff);
    }
    served.frontend.reset_device().unwrap();
    assert_eq!(clock.counts(), None);
}

#[test]
fn the_counts_are_the_backends_to_the_tick_whatever_they_are_derived_from() {
    for (source, frequency) in [
        ("monotonic", 62_500_000),
        ("boottime", 62_500_000),
        ("tsc", 0),
        ("tsc", 62_500_000),
    ] {
        let mut named = Source::ALL.iter().filter(|s| s.name() == source);
        let counter = match HostCounter::open(*named.next().unwrap()) {
            Ok(counter) => counter,
            Err(error) => {
                eprintln!("skipped: {source}: {error}");
                continue;
            }
        };
        let option = format!("--counter-source={source}");
        let backend = BackendProcess::launch(&[&option]).unwrap();
        let options = Options::default().timeout(LIMIT);
        let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
        let served = Served { backend, frontend };
        let queue = served.queue();
        let native = queue.info(LIMIT).unwrap().frequency;
        let host = HostClock::Counter(counter.at_rate(native));
        queue
            .configure(1, Abi::Arm64, NonZeroU64::new(frequency), LIMIT)
            .unwrap();
        served.start();
        queue.resume(LIMIT).unwrap();
        let clock = queue.guest_clock(host, LIMIT).unwrap();
        for _ in 0..100 {
            let before = queue.info(LIMIT).unwrap();
            let counts = clock.counts().unwrap();
            let after = queue.info(LIMIT).unwrap();
            let between = before.host_count..=after.host_count;
            assert!(between.contains(&counts.host_count), "{source}");
            assert_eq!(counts.host_count - counts.virt_count, after.cntvoff);
        }
    }
}

#[test]
fn without_a_page_there_is_no_count() {
    let served = Served::new(1);
    let clock = served.clock();
    assert!(clock.counts().is_some());
    let page = served.frontend.time_page();
    page.stop(served.queue(), LIMIT).unwrap();
    assert_eq!(clock.counts(), None);
    assert_eq!(page.read(), None);
    served.start();
    assert!(clock.counts().is_some());
}

#[test]
fn the_page_goes_on_after_a_reset() {
    let served = Served::new(1);
    served.frontend.reset_device().unwrap();
    let queue = served.queue();
    queue.configure(1, Abi::Arm64, None, LIMIT).unwrap();
    let page = served.frontend.time_page();
    // The library has asked for it before, on some queue; it is done by now.
    for queue in served.frontend.queues() {
        queue.info(LIMIT).unwrap();
    }
    assert_eq!(page.read().unwrap().phase, Phase::Paused);
}
