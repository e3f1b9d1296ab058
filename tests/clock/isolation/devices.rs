//! Each device has its own features, operations and memory.

use super::*;

fn bits(mask: u64) -> BTreeSet<u32> {
    (0..64).filter(|bit| mask >> bit & 1 == 1).collect()
}

#[test]
fn the_features_are_exactly_those_of_a_clock() {
    let rig = both();
    let mut control = Control::over(rig.clock_stream());
    // Not filtered by a library.
    let mut ask = |code| {
        control.message(code, false, &[], &[]).unwrap();
        let (answered, body) = control.reply().unwrap();
        assert_eq!(answered, code);
        u64::from_le_bytes(body.try_into().unwrap())
    };
    let protocol_features = 1 << 30;
    let common = VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | protocol_features;
    assert_eq!(bits(ask(GET_FEATURES)), bits(common | F_ALARM | F_LOG_ALL));
    // MQ, LOG_SHMFD, REPLY_ACK, RESET_DEVICE, CONFIGURE_MEM_SLOTS, DEVICE_STATE; no CONFIG.
    let offered = bits(ask(GET_PROTOCOL_FEATURES));
    assert_eq!(offered, BTreeSet::from([0, 1, 3, 13, 15, 19]));
    drop(control);

    let mut control = Control::negotiated(rig.clock_stream(), common);
    assert_eq!(control.ask(GET_QUEUE_NUM, &[], &[]).unwrap(), 2);
}

#[test]
fn the_timer_devices_operations_are_nothing_to_it() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(2);
    timer.set(0, &[(CNT, 1 << 40), (CVAL, 77), (CTL, 1)]);
    let before = at_rest(&mut timer);
    let mut guest = ClockDriver::connect(&rig);
    for (op, _, body) in op::ALL {
        for vcpu in [0, 1, VM] {
            for epoch in [0, timer.info().epoch] {
                let bytes = contract::request(op, vcpu, epoch, &vec![0; body]);
                let used = guest.raw(&bytes, 8_192);
                let code = used.bytes()[0];
                if op != msg::READ && op != msg::READ_CROSS {
                    assert_eq!(code, rtc_status::EOPNOTSUPP, "{op:#x}");
                    assert_eq!(used.len, 8);
                } else if vcpu != 0 {
                    // Its code happens to be one of the clock's, where the vCPU lies in a
                    // reserved field.
                    let refused = [rtc_status::EINVAL, rtc_status::ENODEV];
                    assert!(refused.contains(&code), "{op:#x}: {code}");
                }
                guest.reads_the_hosts(UTC);
            }
        }
    }
    assert_eq!(at_rest(&mut timer), before);
}

#[test]
fn the_clocks_messages_are_nothing_to_the_timer_device() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, 1 << 62, true);
    let before = at_rest(&mut timer);
    for (msg_type, ..) in msg::ALL {
        for bytes in [proper(msg_type, UTC), set_alarm(UTC, 1, true)] {
            let answer = timer.raw(&bytes, 80);
            assert_ne!(answer.status, status::OK, "{msg_type:#x}");
        }
    }
    assert_eq!(at_rest(&mut timer), before);
    assert_eq!(guest.read_alarm(UTC), Ok((1 << 62, true)));
}

#[test]
fn an_address_means_the_memory_of_the_connection_that_names_it() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    let mut guest = ClockDriver::connect(&rig);
    // The same addresses in both.
    let (ask, answer) = (
        REGION_GPA + REGION_SIZE / 2,
        REGION_GPA + REGION_SIZE / 2 + 4_096,
    );
    let info = contract::request(op::GET_INFO, VM, 0, &[]);
    timer.driver.memory.write(ask, &info);
    timer.driver.memory.write(answer, &[POISON; 80]);
    guest.driver.memory.write(ask, &request(msg::CFG, 8, &[]));
    guest.driver.memory.write(answer, &[POISON; 80]);
    let add = |driver: &mut Driver, queue: u16, len| {
        let ring = &mut driver.rings[usize::from(queue)];
        let first = descriptor(ask, len, NEXT, 101);
        ring.set_descriptor(&driver.memory, 100, first);
        ring.set_descriptor(&driver.memory, 101, descriptor(answer, 80, WRITE, 0));
        let before = ring.used_index(&driver.memory);
        ring.make_available(&driver.memory, 100);
        ring.kick_anyway();
        before
    };
    let is_served = |driver: &Driver, queue: u16, before| {
        let ring = &driver.rings[usize::from(queue)];
        until("an answer", || ring.used_index(&driver.memory) != before);
    };
    let before = add(&mut guest.driver, REQUESTQ, 8);
    is_served(&guest.driver, REQUESTQ, before);
    let written = guest.driver.memory.read(answer, 80);
    assert_eq!((written[0], written[8]), (rtc_status::OK, 2));
    assert_eq!(timer.driver.memory.read(answer, 80), [POISON; 80]);

    let before = add(&mut timer.driver, 1, 16);
    is_served(&timer.driver, 1, before);
    let info = Info::of(&timer.driver.memory.read(answer, 80)[16..]);
    assert_eq!((info.phase, info.vcpus), (phase::PAUSED, 1));
    assert_eq!(guest.driver.memory.read(answer, 80), written);
}
