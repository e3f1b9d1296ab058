//! Hostile memory.

use super::*;

#[test]
fn memory_regions_that_make_no_sense_do_no_harm() {
    let victim = Victim::launch();
    let (_, release) = release_program().unwrap();
    let file = memfd(0x10_0000);
    let fd = file.as_fd();
    let mut regions = vec![
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0x1000, 0, 1],
        [0x1000, 0x1000, 0, !0xfff],
        [0x1000, 1 << 46, 0, 0],
        [0x1000, 1 << 62, 0, 0],
        [0x1000, i64::MAX as u64, 0, 0],
        [0x1000, u64::MAX, 0, 0],
        [u64::MAX, 0x1000, 0, 0],
        [u64::MAX - 0xfff, 0x1000, 0, 0],
    ];
    if release {
        // `vhost-user-backend` adds these unchecked; a debug build panics.
        regions.push([0, 0x1000, u64::MAX - 0xff, 0]);
        regions.push([0, 0x1000, u64::MAX, 0]);
    }
    for region in regions {
        let mut control = victim.negotiated();
        let table = [&[1], &region[..]].concat();
        let _ = control.ask(SET_MEM_TABLE, &table, &[fd]);
        drop(control);
        let mut control = victim.negotiated();
        let single = [&[0], &region[..]].concat();
        if control.ask(ADD_MEM_REG, &single, &[fd]).is_ok() {
            let addresses = [1, region[2], region[2], region[2], 0];
            let _ = control.ask(SET_VRING_ADDR, &addresses, &[]);
        }
    }
    victim.unharmed();
}

#[test]
fn overlapping_memory_regions_do_no_harm() {
    let victim = Victim::launch();
    let file = memfd(0x10_0000);
    let fd = file.as_fd();
    for second in [0x1000, 0x2000, 0x8000, 0x1_0fff] {
        let mut control = victim.negotiated();
        let first = [0x1000, 0x1_0000, REGION_VA, 0];
        let second = [second, 0x1_0000, REGION_VA + 0x8000, 0];
        let table = [&[2], &first[..], &second[..]].concat();
        let _ = control.ask(SET_MEM_TABLE, &table, &[fd, fd]);
        drop(control);
        let mut control = victim.negotiated();
        for region in [first, second, first] {
            if control
                .ask(ADD_MEM_REG, &[&[0], &region[..]].concat(), &[fd])
                .is_err()
            {
                break;
            }
        }
    }
    victim.unharmed();
}

#[test]
fn as_many_memory_regions_as_one_likes_are_given_back() {
    let victim = Victim::launch();
    let file = memfd(0x1000);
    let mut control = victim.negotiated();
    for n in 0..700u64 {
        let region = [0, n << 20, 0x1000, REGION_VA + (n << 20), 0];
        match control.ask(ADD_MEM_REG, &region, &[file.as_fd()]) {
            Ok(0) => {}
            _ => break,
        }
    }
    drop(control);
    victim.unharmed();
}

#[test]
fn what_cannot_be_mapped_is_no_memory() {
    let victim = Victim::launch();
    let pipe = std::io::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let folder = File::open("/").unwrap();
    let event = blocking_eventfd(0);
    let file = memfd(0x1000);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let fds = [
        pipe.0.as_fd(),
        null.as_fd(),
        folder.as_fd(),
        event.as_fd(),
        read_only.as_fd(),
    ];
    for fd in fds {
        for code in [SET_MEM_TABLE, ADD_MEM_REG] {
            let mut control = victim.negotiated();
            let region = [1, 0x1000, 0x1000, REGION_VA, 0];
            let _ = control.ask(code, &region, &[fd]);
        }
    }
    victim.unharmed();
}

#[test]
fn a_region_longer_than_its_file_is_refused_before_anything_touches_it() {
    // Reading past the end of a file raises SIGBUS.
    let victim = Victim::launch();
    for (len, offset) in [
        (0, 0),
        (0x1000, 0),
        (0x10_0000, 0x10_0000),
        (REGION_SIZE - 1, 0),
    ] {
        let file = memfd(len);
        for code in [SET_MEM_TABLE, ADD_MEM_REG] {
            let mut control = victim.negotiated();
            let region = [1, REGION_GPA, REGION_SIZE, REGION_VA, offset];
            let refused = control.ask(code, &region, &[file.as_fd()]);
            assert!(!matches!(refused, Ok(0)), "{len:#x} bytes in the file");
            // Whatever the answer was.
            for place in [0, 0x2000, REGION_SIZE - 0x1_0000] {
                let at = REGION_VA + place;
                let _ = control.ask(SET_VRING_ADDR, &[1, at, at, at, 0], &[]);
            }
        }
        victim.unharmed();
    }
}

#[test]
fn memory_that_is_taken_away_under_a_running_ring_stops_the_ring() {
    let victim = Victim::launch();
    let mut driver = victim
        .rig
        .client()
        .queues(3)
        .queue_size(16)
        .add_mem_reg(true)
        .driver();
    let wait = request(op::WAIT_RUN, 0, 0, &[]);
    driver.submit(1, &wait, 56, &Layout::plain());
    driver.call(1, &request(op::GET_INFO, VM, 0, &[]), 80, &Layout::plain());
    let region = driver.memory.region();
    driver.control.remove_mem_region(&region).unwrap();
    for ring in &driver.rings {
        ring.kick_anyway();
    }
    assert!(victim.rig.comes_to_rest());
    // The answers of the ring are lost, and nothing else.
    for queue in 0..3 {
        driver.stop(queue);
    }
    driver.control.add_mem_region(&region).unwrap();
    driver.start(2);
    still_serves(&mut driver, 2);
    drop(driver);
    victim.unharmed();
}

#[test]
fn memory_that_is_replaced_under_held_requests_is_not_written_out_of_bounds() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    let wait = request(op::WAIT_RUN, 0, 0, &[]);
    driver.submit(1, &wait, 56, &Layout::plain());
    driver.call(1, &request(op::GET_INFO, VM, 0, &[]), 80, &Layout::plain());
    // The rings are in it, the buffers are not.
    let mut smaller = driver.memory.region();
    smaller.memory_size = 0x4_0000;
    driver.control.set_mem_table(&[smaller]).unwrap();
    driver.stop(1);
    drop(driver);
    victim.unharmed();
}
