//! Hostile descriptors.

use super::*;

/// A connection whose queue 1 has these kick and call descriptors and a request in it. Checks that
/// the backend comes to rest, whatever it does.
fn with_fds(victim: &Victim, kick: BorrowedFd<'_>, call: BorrowedFd<'_>) {
    let mut control = victim.negotiated();
    let mut memory = Memory::new();
    let mut ring = Ring::new(1, 16, true);
    let info = request(op::GET_INFO, VM, 0, &[]);
    ring.add(&mut memory, &info, 80, &Layout::plain());
    // Refused or served, as it may be. Enabling a ring is a kick, too.
    if matches!(control.share(memory.file().as_fd()), Ok(0)) {
        let _ = control.start_with(1, &ring, kick, call);
    }
    // With the connection open, if it still is.
    assert!(victim.rig.comes_to_rest());
}

#[test]
fn kick_and_call_descriptors_of_any_kind_do_no_harm() {
    let victim = Victim::launch();
    let event = blocking_eventfd(0);
    let full = full_eventfd();
    let semaphore = eventfd(3, EventfdFlags::SEMAPHORE).unwrap();
    let (dead_reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    let (reader, dead_writer) = std::io::pipe().unwrap();
    drop(reader);
    let (short_reader, mut short_writer) = std::io::pipe().unwrap();
    short_writer.write_all(&[1, 2, 3]).unwrap();
    let (_unread, mut full_pipe) = std::io::pipe().unwrap();
    let file = memfd(0x1000);
    let null = File::open("/dev/null").unwrap();
    let folder = File::open("/").unwrap();
    let (socket, peer) = UnixStream::pair().unwrap();
    drop(peer);
    // Always readable.
    let random = File::open("/dev/random").unwrap();
    fill(&mut full_pipe);
    let fds = [
        event.as_fd(),
        full.as_fd(),
        semaphore.as_fd(),
        dead_reader.as_fd(),
        dead_writer.as_fd(),
        short_reader.as_fd(),
        full_pipe.as_fd(),
        file.as_fd(),
        null.as_fd(),
        folder.as_fd(),
        socket.as_fd(),
        random.as_fd(),
    ];
    for kick in fds {
        with_fds(&victim, kick, event.as_fd());
        victim.unharmed();
    }
    for call in fds {
        with_fds(&victim, event.as_fd(), call);
    }
    victim.unharmed();
}

/// Replaces a ring's call descriptor by one that blocks the writer.
fn clog(ring: &Ring) {
    ring.call().write(u64::MAX - 1).unwrap();
    make_blocking(fd_of(ring.call()));
}

#[test]
fn a_call_descriptor_that_takes_no_more_does_not_hold_the_others_up() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    clog(&driver.rings[1]);
    driver
        .control
        .set_vring_call(1, driver.rings[1].call())
        .unwrap();
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..3 {
        driver.submit(1, &info, 80, &Layout::plain());
        still_serves(&mut driver, 2);
        assert!(victim.rig.comes_to_rest());
    }
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_call_descriptor_made_to_block_later_does_not_keep_a_signal_out() {
    let mut victim = Victim::launch();
    let mut driver = victim.driver();
    clog(&driver.rings[1]);
    let info = request(op::GET_INFO, VM, 0, &[]);
    driver.submit(1, &info, 80, &Layout::plain());
    // The worker is in the write that blocks.
    assert!(victim.rig.comes_to_rest());
    assert!(driver.used_already(1).is_some());
    victim.rig.backend.signal(Signal::TERM);
    assert_eq!(victim.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_semaphore_of_endless_kicks_does_not_make_it_spin() {
    let victim = Victim::launch();
    let kick = eventfd(0, EventfdFlags::SEMAPHORE).unwrap();
    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    with_fds(&victim, kick.as_fd(), blocking_eventfd(0).as_fd());
    victim.unharmed();
}

#[test]
fn one_eventfd_for_kick_and_call_comes_to_rest() {
    let victim = Victim::launch();
    let driver = victim.driver();
    let same = driver.rings[1].kick_fd();
    driver.control.set_vring_call(1, same).unwrap();
    let mut driver = driver;
    for _ in 0..5 {
        let info = request(op::GET_INFO, VM, 0, &[]);
        driver.submit(1, &info, 80, &Layout::plain());
        assert!(victim.rig.comes_to_rest());
    }
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_kick_descriptor_that_was_replaced_does_not_make_it_spin() {
    let victim = Victim::launch();
    let driver = victim.driver();
    let other = Ring::new(1, 16, true);
    // The old one is still open here, so it is still in the backend's epoll set.
    let _ = driver.control.set_vring_kick(1, other.kick_fd());
    driver.rings[1].kick_anyway();
    assert!(victim.rig.comes_to_rest());
    driver.rings[1].kick_anyway();
    other.kick_anyway();
    assert!(victim.rig.comes_to_rest());
    drop(driver);
    victim.unharmed();
}

#[test]
fn one_kick_descriptor_for_all_queues_does_no_harm() {
    let victim = Victim::launch();
    let driver = victim.driver();
    for queue in [1, 2] {
        let _ = driver.control.get_vring_base(queue);
        let _ = driver
            .control
            .set_vring_kick(queue, driver.rings[0].kick_fd());
    }
    for _ in 0..10 {
        driver.rings[0].kick_anyway();
    }
    assert!(victim.rig.comes_to_rest());
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_frontends_own_end_as_any_descriptor_does_not_keep_its_connection() {
    const SET_LOG_FD: u32 = 7;
    const SET_BACKEND_REQ_FD: u32 = 21;
    const GPU_SET_SOCKET: u32 = 33;
    let victim = Victim::launch();
    for code in [
        SET_VRING_ERR,
        SET_VRING_CALL,
        SET_VRING_KICK,
        SET_LOG_FD,
        SET_BACKEND_REQ_FD,
        GPU_SET_SOCKET,
    ] {
        for clock in [false, true] {
            let stream = match clock {
                true => victim.rig.clock_stream(),
                false => victim.rig.stream(),
            };
            let own = stream.try_clone().expect("a duplicate");
            let mut control = Control::negotiated(stream, TIMER_FEATURES);
            let answer = control.ask(code, &[0], &[own.as_fd()]);
            assert_ne!(answer.expect("an answer"), 0, "message {code} is taken");
            let eventfd = blocking_eventfd(0);
            let taken = control.granted(SET_VRING_ERR, &[0], &[eventfd.as_fd()]);
            taken.expect("the connection goes on");
            drop((control, own));
            victim.serves_the_timer();
            victim.serves_the_clock();
        }
    }
    victim.unharmed();
}
