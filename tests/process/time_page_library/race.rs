//! vCPU threads race through the gate by the page.

use super::*;

#[test]
fn eight_vcpus_race_through_the_gate_by_the_page_a_thousand_times() {
    const VCPUS: u32 = 8;
    let seed = seed();
    println!("seed {seed}");
    let served = Served::with(VCPUS, HOST_FREQUENCY, &["--request-queues=3"]);
    let clock = served.clock();
    let queue = served.queue();
    let mut rng = Rng::with_seed(seed);
    let largest = AtomicU64::new(0);
    for round in 0..1_000 {
        queue.pause(LIMIT).unwrap();
        let saved = queue.save(LIMIT).unwrap();
        served.begin(None);
        let done_sent = AtomicU32::new(0);
        let straggler = rng.u32(..2 * VCPUS);
        let waiting = AtomicU32::new(0);
        let releases = Mutex::new(Vec::new());
        scope(|scope| {
            for vcpu in saved.vcpus() {
                let mut rng = rng.fork();
                let (done_sent, waiting, releases, largest, clock, frontend) = (
                    &done_sent,
                    &waiting,
                    &releases,
                    &largest,
                    &clock,
                    &served.frontend,
                );
                scope.spawn(move || {
                    let index = vcpu.index();
                    let queue = frontend.queue_of(index);
                    for _ in 0..rng.u32(..10) {
                        std::thread::yield_now();
                    }
                    queue.set_vm(std::slice::from_ref(vcpu), LIMIT).unwrap();
                    if index == straggler {
                        let deadline = Instant::now() + LIMIT;
                        while waiting.load(Ordering::SeqCst) < VCPUS - 1 {
                            assert!(Instant::now() < deadline);
                            std::thread::yield_now();
                        }
                        for _ in 0..rng.u32(..50) {
                            std::thread::yield_now();
                        }
                    }
                    done_sent.fetch_add(1, Ordering::SeqCst);
                    queue.restore_done(index, LIMIT).unwrap();
                    waiting.fetch_add(1, Ordering::SeqCst);
                    let offsets = queue.wait_run_by_page(index, LIMIT).unwrap();
                    let early = done_sent.load(Ordering::SeqCst) < VCPUS;
                    let seen = largest.load(Ordering::SeqCst);
                    let count = host_count().wrapping_sub(offsets.cntvoff);
                    largest.fetch_max(count, Ordering::SeqCst);
                    let by_page = clock.counts().map_or(count, |counts| counts.virt_count);
                    let back = count < seen || by_page < count;
                    releases.lock().unwrap().push((offsets, early, back));
                });
            }
        });
        let releases = releases.into_inner().unwrap();
        for (offsets, early, back) in &releases {
            assert!(!early, "round {round}, seed {seed}");
            assert!(!back, "round {round}, seed {seed}");
            assert_eq!(*offsets, releases[0].0, "round {round}, seed {seed}");
        }
    }
}
