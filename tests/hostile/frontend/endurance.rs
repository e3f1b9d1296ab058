//! The same many times over: nothing is left behind.

use super::*;

#[test]
fn a_thousand_frontends_leave_no_descriptor_no_thread_and_no_memory_behind() {
    let victim = Victim::launch();
    let visit = |n: u32| {
        let client = victim.rig.client().queues(3);
        let client = client.add_mem_reg(n.is_multiple_of(2));
        let mut client = client.event_idx(n.is_multiple_of(3)).connect();
        client.wait_run(1, 0);
        client.post_event_buffer();
        client.info();
        if n.is_multiple_of(5) {
            client.driver.stop(1);
        }
    };
    (0..50).for_each(visit);
    let before = victim.rig.settled(victim.usage.threads, victim.usage.fds);
    (0..1000).for_each(visit);
    let after = victim.rig.settled(before.threads, before.fds);
    assert_eq!((after.threads, after.fds), (before.threads, before.fds));
    let grown = after.anonymous_kib.saturating_sub(before.anonymous_kib);
    assert!(grown < 2048, "{grown} KiB more");
    victim.unharmed();
}

#[test]
fn a_hundred_thousand_requests_leave_no_memory_behind() {
    let victim = Victim::launch();
    let mut client = victim.rig.client().queue_size(1024).connect();
    let mut flood = |requests: u32| {
        let info = request(op::GET_INFO, VM, 0, &[]);
        for _ in 0..requests / 500 {
            for _ in 0..500 {
                client.driver.add(1, &info, 80, &Layout::plain());
            }
            client.driver.rings[1].kick(&client.driver.memory);
            for _ in 0..500 {
                client.driver.used(1);
            }
        }
    };
    flood(10_000);
    let before = victim.rig.usage();
    flood(100_000);
    let grown = victim
        .rig
        .usage()
        .anonymous_kib
        .saturating_sub(before.anonymous_kib);
    assert!(grown < 512, "{grown} KiB more");
}

#[test]
fn starting_and_stopping_rings_under_a_storm_of_kicks_does_no_harm() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    let over = Arc::new(AtomicBool::new(false));
    for _ in 0..100 {
        let kick = driver.rings[1].kick_fd().try_clone().unwrap();
        let stop = Arc::clone(&over);
        stop.store(false, Ordering::Relaxed);
        let (kicks, began) = channel();
        let storm = std::thread::spawn(move || {
            let _ = kick.write(1);
            let _ = kicks.send(());
            while !stop.load(Ordering::Relaxed) {
                let _ = kick.write(1);
            }
        });
        began.recv().expect("a storm");
        still_serves(&mut driver, 1);
        driver.stop(1);
        over.store(true, Ordering::Relaxed);
        storm.join().unwrap();
        driver.start(1);
    }
    still_serves(&mut driver, 1);
    drop(driver);
    victim.unharmed();
}

/// A ring that is never empty: every chain in it is a request with effects, and its available
/// index runs away from the backend. By the return, the backend has served more than a ringful, and
/// the control channel is closed.
fn endless(mut driver: Driver, over: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let over = Arc::clone(over);
    let mut heads = Vec::new();
    for (n, code) in [op::RESUME, op::PAUSE]
        .into_iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        let at = driver.memory.allocate(256);
        let body = if code == op::PAUSE {
            pause_body(0)
        } else {
            vec![]
        };
        memory_request(&driver.memory, at, code, &body);
        let ring = &driver.rings[1];
        let len = 16 + body.len() as u32;
        let head = 2 * n as u16;
        let first = descriptor(at, len, NEXT, head + 1);
        ring.set_descriptor(&driver.memory, head, first);
        let second = descriptor(at + 64, 64, WRITE, 0);
        ring.set_descriptor(&driver.memory, head + 1, second);
        heads.push(head);
    }
    for head in heads.into_iter().cycle().take(16) {
        driver.rings[1].make_available(&driver.memory, head);
    }
    driver.rings[1].kick_anyway();
    let Driver {
        memory, mut rings, ..
    } = driver;
    let (served, is_served) = channel();
    let storm = std::thread::spawn(move || {
        let (mut served, mut last) = (Some(served), 0);
        while !over.load(Ordering::Relaxed) {
            let used = rings[1].used_index(&memory);
            if used > 16
                && let Some(served) = served.take()
            {
                let _ = served.send(());
            }
            rings[1].set_avail_index(&memory, used.wrapping_add(16));
            // Where the backend was faster, it waits for that.
            if used != last {
                rings[1].kick_anyway();
            }
            last = used;
        }
    });
    let is_served = is_served.recv_timeout(PATIENCE);
    is_served.expect("the ring is served");
    storm
}

fn memory_request(memory: &Memory, at: u64, code: u16, body: &[u8]) {
    memory.write(at, &request(code, VM, 0, body));
}

#[test]
fn a_ring_that_never_ends_does_not_keep_the_next_frontend_out() {
    let victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    // Its memory lives on in the thread.
    let storm = endless(victim.driver(), &over);
    let mut client = Client::connect(&victim.rig);
    assert_eq!(client.info().vcpus, 2);
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
}

#[test]
fn a_ring_that_never_ends_does_not_keep_a_signal_out() {
    let mut victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    let driver = victim.driver();
    let control = driver.control.clone();
    let storm = endless(driver, &over);
    victim.rig.backend.signal(Signal::TERM);
    let status = victim.rig.backend.wait(PATIENCE);
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    drop(control);
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_ring_that_never_ends_does_not_starve_the_other_queues() {
    let victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    let mut driver = victim.driver();
    // Queue 2 is kept here, queue 1 goes to the storm.
    let mine = driver.rings.pop().unwrap();
    let control = driver.control.clone();
    let shared = Memory::sharing(&driver.memory);
    let storm = endless(driver, &over);
    let mut mine = mine;
    let mut memory = shared;
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..100 {
        mine.add(&mut memory, &info, 80, &Layout::plain());
        mine.kick(&memory);
        let used = mine.wait(&mut memory, PATIENCE).expect("an answer");
        assert_eq!(used.len, 80);
    }
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    drop(control);
}
