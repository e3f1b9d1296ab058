//! Control messages that the door keeps out: unfinished ones, and those that can only go wrong.

use std::os::fd::AsFd;

use vhost_user_timer_kit::contract::{VM, op, request};
use vhost_user_timer_kit::raw_driver::message::{
    GET_FEATURES, NO_FD, SET_FEATURES, SET_VRING_CALL, SET_VRING_KICK, SET_VRING_NUM,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Layout, Memory, REGION_SIZE, Ring, header, memfd, pair,
};
use vhost_user_timer_kit::victim::{DEADLINE, Victim};

fn unfinished() -> [Vec<u8>; 2] {
    let head = header(SET_FEATURES, false, 8).to_vec();
    [head[..5].to_vec(), head]
}

#[test]
fn a_message_that_is_never_finished_frees_the_socket() {
    let victim = Victim::launch();
    for bytes in unfinished() {
        // On either socket, at once.
        let mut controls = [victim.control(), victim.clock_control()];
        for control in &mut controls {
            control.ask(GET_FEATURES, &[], &[]).unwrap();
            control.send(&bytes, &[]).unwrap();
        }
        // After the 5 s that a message has.
        for control in &mut controls {
            victim.in_time("the connection ends", || control.wait_for_end());
        }
    }
    victim.rig.log_with_times(
        "a message is not finished (SET_FEATURES, 12 of 20 bytes)",
        2,
    );
    victim.unharmed();
}

#[test]
fn an_unfinished_message_with_the_frontends_own_end_frees_the_socket_when_the_frontend_is_gone() {
    let victim = Victim::launch();
    for bytes in unfinished() {
        let stream = victim.rig.stream();
        let own_end = stream.try_clone().unwrap();
        let control = Control::over(stream);
        control.send(&bytes, &[own_end.as_fd()]).unwrap();
        drop((control, own_end));
        victim.in_time("the next frontend is served", || {
            victim.control().ask(GET_FEATURES, &[], &[]).unwrap();
        });
    }
    victim.unharmed();
}

#[test]
fn a_refused_message_is_told_and_leaves_the_connection_what_it_had() {
    let victim = Victim::launch();
    let mut control = victim.negotiated();
    let mut memory = Memory::new();
    let mut ring = Ring::new(1, 16, true);
    assert_eq!(control.share(memory.file().as_fd()).unwrap(), 0);
    let short = memfd(REGION_SIZE - 0x1000);
    let file = short.as_fd();
    let refused = |control: &mut Control, code, words: &[u64]| {
        assert_eq!(control.ask(code, words, &[]).unwrap(), 1, "{words:x?}");
    };
    assert_eq!(control.share(file).unwrap(), 1);
    for size in [0, 3, 17, 2048, 0x1_0000] {
        refused(&mut control, SET_VRING_NUM, &[pair(1, size)]);
    }
    refused(&mut control, SET_VRING_KICK, &[1 | NO_FD]);
    refused(&mut control, SET_VRING_KICK, &[1]);
    assert_eq!(control.ask(SET_VRING_CALL, &[1], &[file]).unwrap(), 1);
    assert_eq!(control.ask(SET_VRING_CALL, &[1], &[file, file]).unwrap(), 1);
    // The memory is the one before, and a ring in it is served.
    control.start(1, &ring).unwrap();
    let info = request(op::GET_INFO, VM, 0, &[]);
    ring.add(&mut memory, &info, 80, &Layout::plain());
    ring.kick(&memory);
    let used = ring.wait(&mut memory, DEADLINE).expect("an answer");
    assert_eq!(used.len, 80);
    drop(control);
    victim.unharmed();
}
