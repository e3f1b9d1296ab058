//! Garbage on the control channel.

use super::*;

#[test]
fn thousands_of_malformed_messages_do_no_harm() {
    let seed = seed();
    println!("VUT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    let (_, release) = release_program().unwrap();
    let files = [
        blocking_eventfd(0),
        memfd(0x1000).into(),
        std::io::pipe().unwrap().0.into(),
        File::open("/dev/null").unwrap().into(),
        UnixStream::pair().unwrap().0.into(),
    ];
    let mut messages = 0;
    while messages < 6000 {
        let control = victim.control();
        if random.u8(0..4) != 0 {
            // To get further in: every feature there is.
            let _ = control.message(SET_OWNER, false, &[], &[]);
            let _ = control.message(GET_FEATURES, false, &[], &[]);
            let all = u64::MAX.to_le_bytes();
            let _ = control.message(SET_PROTOCOL_FEATURES, false, &all, &[]);
            let features = TIMER_FEATURES.to_le_bytes();
            let _ = control.message(SET_FEATURES, false, &features, &[]);
        }
        for _ in 0..random.usize(1..12) {
            messages += 1;
            let mut code = random.u32(0..48);
            if code == RESET_DEVICE {
                // Valid wherever it is sent.
                code = SET_MEM_TABLE;
            }
            let body: Vec<u8> = match random.u8(0..4) {
                0 => (0..random.usize(0..64)).map(|_| random.u8(..)).collect(),
                1 => words(&[pair(random.u32(0..4), random.u32(0..70_000))]),
                2 => {
                    // Shaped like memory regions and ring addresses.
                    let count = *random.choice(&[1, 2, 4, 5, 8, 9, 33]).unwrap();
                    let mask = if release { u64::MAX } else { u64::MAX >> 16 };
                    let mut body = vec![u64::from(random.u8(0..4))];
                    body.extend((1..=count).map(|_| match random.u8(0..4) {
                        0 => 0x1000 * random.u64(0..16),
                        1 => random.u64(..) & mask,
                        2 => 0x4000_0000,
                        _ => mask,
                    }));
                    words(&body)
                }
                _ => vec![],
            };
            let fds: Vec<BorrowedFd<'_>> = (0..*random.choice(&[0, 0, 0, 1, 1, 2, 9, 40]).unwrap())
                .map(|_| random.choice(&files).unwrap().as_fd())
                .collect();
            let announced = match random.u8(0..6) {
                0 => random.u32(..),
                1 => random.u32(0..5000),
                _ => body.len() as u32,
            };
            let mut bytes = header(code, random.bool(), announced).to_vec();
            if random.u8(0..8) == 0 {
                bytes[4..8].copy_from_slice(&random.u32(..).to_le_bytes());
            }
            bytes.extend(body);
            if random.u8(0..8) == 0 {
                bytes.truncate(random.usize(1..=bytes.len()));
            }
            if control.send(&bytes, &fds).is_err() {
                break;
            }
        }
    }
    victim.unharmed();
}

#[test]
fn a_message_cut_short_anywhere_and_then_the_end_does_no_harm() {
    let victim = Victim::launch();
    let memory = Memory::new();
    let mut bytes = header(SET_MEM_TABLE, true, 40).to_vec();
    bytes.extend(words(&[1, REGION_GPA, REGION_SIZE, REGION_VA, 0]));
    for len in 1..bytes.len() {
        for fds in [&[][..], &[memory.file().as_fd()]] {
            let mut control = victim.control();
            control.send(&bytes[..len], fds).unwrap();
            control.finish();
            control.wait_for_end();
        }
    }
    victim.unharmed();
}

#[test]
fn a_frontend_that_says_nothing_or_reads_nothing_does_not_keep_the_next_one_out_for_long() {
    let victim = Victim::launch();
    drop(victim.rig.stream());
    let control = victim.control();
    let stream = victim.rig.stream();
    stream.set_nonblocking(true).unwrap();
    let greedy = Control::over(stream);
    drop(control);
    // This frontend reads no answers, until the backend, which does not get rid of them, takes no
    // more messages.
    while greedy.message(GET_FEATURES, false, &[], &[]).is_ok() {
        while greedy.message(GET_FEATURES, false, &[], &[]).is_ok() {}
        assert!(victim.rig.comes_to_rest());
    }
    drop(greedy);
    victim.unharmed();
}

#[test]
fn more_descriptors_than_belong_to_a_message_are_closed_again() {
    let victim = Victim::launch();
    let file = memfd(0x1000);
    let many = vec![file.as_fd(); 250];
    for code in [GET_FEATURES, SET_MEM_TABLE, SET_VRING_KICK, ADD_MEM_REG, 99] {
        for fds in [&many[..1], &many[..2], &many[..32], &many[..33], &many] {
            let mut control = victim.control();
            let _ = control.message(code, false, &[0; 8], fds);
            control.finish();
            control.wait_for_end();
        }
    }
    victim.unharmed();
}
