//! What is counted: regions, descriptors, the place at a socket. A frontend that asks for more than
//! there is loses its own connection, and nobody else anything.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use vhost_user_timer_kit::backend_process::{BackendProcess, Devices};
use vhost_user_timer_kit::clock_driver::{ClockDriver, UTC};
use vhost_user_timer_kit::contract::{Client, op};
use vhost_user_timer_kit::raw_driver::message::{
    ADD_MEM_REG, GET_FEATURES, GET_MAX_MEM_SLOTS, SET_CONFIG, SET_VRING_ENABLE,
};
use vhost_user_timer_kit::raw_driver::{
    Control, PATIENCE, REGION_GPA, Rig, Usage, header, memfd, pair,
};
use vhost_user_timer_kit::victim::{DEADLINE, Victim};

/// By default, a process may open no more.
const FEW_FILES: &str = "ulimit -n 1024; exec \"$@\"";

/// A region's length, and the distance of two.
const REGION: u64 = 0x1000;

fn region(n: u64) -> [u64; 5] {
    [
        0,
        REGION_GPA + 2 * n * REGION,
        REGION,
        (1 << 40) + 2 * n * REGION,
        0,
    ]
}

#[test]
fn more_regions_than_are_announced_are_refused_and_both_sockets_have_room_for_theirs() {
    let victim = Victim::released().script(FEW_FILES).start();
    let file = memfd(REGION);
    let mut frontends = [victim.negotiated(), victim.clock_negotiated(0)];
    for control in &mut frontends {
        let slots = control.ask(GET_MAX_MEM_SLOTS, &[], &[]).unwrap();
        assert!((8..=509).contains(&slots), "{slots} slots");
        for n in 0..slots {
            control
                .granted(ADD_MEM_REG, &region(n), &[file.as_fd()])
                .unwrap();
        }
        for n in slots..slots + 3 {
            let refused = control.ask(ADD_MEM_REG, &region(n), &[file.as_fd()]);
            assert_eq!(refused.unwrap(), 1);
        }
        // The connection continues.
        control.ask(GET_FEATURES, &[], &[]).unwrap();
    }
    drop(frontends);
    victim.unharmed();
}

/// How many descriptors the process may have.
fn limit_files(rig: &Rig, most: Option<u64>) -> Rlimit {
    let pid = Pid::from_raw(rig.backend.pid() as i32);
    let before = prlimit(
        pid,
        Resource::Nofile,
        Rlimit {
            current: most,
            maximum: Some(4096),
        },
    );
    before.expect("a limit")
}

#[test]
fn descriptors_that_run_out_at_any_step_cost_the_newcomer_its_connection_and_nobody_else_anything()
{
    let victim = Victim::launch();
    let all = limit_files(&victim.rig, Some(4096));
    assert!(all.current.is_none_or(|files| files >= 1024));
    let mut client = Client::connect(&victim.rig);
    let before = client.info().at_rest();
    let limits: Vec<_> = (0..32)
        .map(|left| limit_that_leaves(&victim.rig, left))
        .collect();
    let mut served = 0;
    // A connection to the clock device has some 20.
    for (left, limit) in limits.into_iter().enumerate() {
        limit_files(&victim.rig, Some(limit));
        let mut newcomer = victim.clock_control();
        let _ = newcomer.message(GET_FEATURES, false, &[], &[]);
        // Answered, or disconnected; and never kept waiting.
        let answer = victim.in_time("the newcomer is served or turned away", || newcomer.reply());
        served += u32::from(answer.is_ok());
        drop(newcomer);
        assert_eq!(client.info().at_rest(), before, "with {left} left");
    }
    assert!(served > 0, "the limit was too low all the time");
    assert!(served < 32, "the limit was never too low");
    limit_files(&victim.rig, Some(4096));
    victim.serves_the_clock();
    drop(client);
    victim.unharmed();
}

#[test]
fn without_any_descriptor_left_newcomers_are_turned_away_nothing_spins_and_sigterm_ends_it() {
    let victim = Victim::launch();
    limit_files(&victim.rig, Some(limit_that_leaves(&victim.rig, 0)));
    for _ in 0..3 {
        let mut newcomers = [victim.control(), victim.clock_control()];
        for newcomer in &mut newcomers {
            victim.in_time("the newcomer is turned away", || newcomer.wait_for_end());
        }
    }
    assert!(victim.rig.comes_to_rest(), "it spins");
    victim.ends_on_sigterm();
}

#[test]
fn a_newcomer_that_cannot_even_be_turned_away_waits_until_it_can_be_served() {
    let victim = Victim::launch();
    // Below the descriptors that are open, so that giving one up makes no room.
    limit_files(&victim.rig, Some(3));
    let mut newcomers = [victim.control(), victim.clock_control()];
    assert!(victim.rig.comes_to_rest(), "it spins");
    limit_files(&victim.rig, Some(4096));
    for newcomer in &mut newcomers {
        victim.in_time("the newcomer is served", || {
            newcomer.ask(GET_FEATURES, &[], &[]).expect("the features");
        });
    }
    drop(newcomers);
    victim.unharmed();
}

/// The limit with which the process can open this many descriptors more. Each has the lowest free
/// number, and the limit is for numbers.
fn limit_that_leaves(rig: &Rig, left: usize) -> u64 {
    let folder = format!("/proc/{}/fd", rig.backend.pid());
    let open: Vec<u64> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .parse()
                .unwrap()
        })
        .collect();
    let mut free = (0..).filter(|number| !open.contains(number));
    free.nth(left).expect("there are enough numbers")
}

/// The size of a thread's stack. The process has no room for one where less is left of its address
/// space, and no stack of an earlier thread is kept.
const STACK: u64 = 2 << 20;

#[test]
fn threads_that_run_out_at_any_step_cost_the_newcomer_its_connection_and_nobody_else_anything() {
    let (mut served, mut turned_away) = (0, 0);
    // A connection has three threads.
    for stacks in 0..5 {
        // Never connected to its clock device, so that stacks have to be made.
        let mut rig = Rig::launch_devices(Devices::TimerAndClock, &[]);
        let mut client = Client::connect(&rig);
        client.configure(2);
        let before = client.info().at_rest();
        // Nobody is about to map more.
        assert!(rig.comes_to_rest());
        let size = address_space(&rig) + stacks * (STACK + 0x4000) + STACK / 2;
        let limit = |most| {
            let pid = Pid::from_raw(rig.backend.pid() as i32);
            let limit = Rlimit {
                current: most,
                maximum: None,
            };
            prlimit(pid, Resource::As, limit).expect("a limit")
        };
        limit(Some(size));
        let mut newcomer = Control::over(rig.clock_stream());
        let _ = newcomer.message(GET_FEATURES, false, &[], &[]);
        let answer = rig.in_time(DEADLINE, "the newcomer is served or turned away", || {
            newcomer.reply()
        });
        if answer.is_ok() {
            served += 1;
        } else {
            turned_away += 1;
            rig.log_with("A frontend of the clock device was turned away");
        }
        drop(newcomer);
        assert_eq!(client.info().at_rest(), before, "with room for {stacks}");
        limit(None);
        rig.in_time(DEADLINE, "the next one is served", || {
            ClockDriver::connect(&rig).reads_the_hosts(UTC);
        });
        assert_eq!(client.info().at_rest(), before, "with room for {stacks}");
        rig.backend.signal(Signal::TERM);
        let ended = rig.backend.exit_within(DEADLINE).expect("SIGTERM ends it");
        assert_eq!(ended.code(), Some(0));
    }
    assert!(served > 0, "the limit was too low all the time");
    assert!(turned_away > 2, "the limit was too high to fail at a step");
}

/// How much of its address space the process uses, bytes.
fn address_space(rig: &Rig) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", rig.backend.pid())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib: u64 = size
        .expect("the kernel tells")
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

#[test]
fn a_connected_sockets_message_in_pieces_keeps_no_more_descriptors_than_a_message_has() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let timer = Some(OwnedFd::from(theirs));
    let backend = BackendProcess::launch_on_sockets::<&str>(timer, None, &[]);
    let mut rig = Rig::watch(backend.expect("a backend"));
    let mut control = Control::over(ours);
    control.ask(GET_FEATURES, &[], &[]).unwrap();
    let pid = rig.backend.pid();
    assert!(rig.comes_to_rest());
    let before = Usage::of(pid).unwrap().fds;
    let file = memfd(REGION);
    let many = vec![file.as_fd(); 32];
    let body = [0; 64];
    control
        .send(&header(SET_CONFIG, false, body.len() as u32), &[])
        .unwrap();
    for byte in &body[1..] {
        control.send(std::slice::from_ref(byte), &many).unwrap();
    }
    // All but the last byte is taken in.
    rig.in_time(DEADLINE, "it is read", || {
        while Usage::of(pid).unwrap().fds < before + 32 {}
    });
    assert!(rig.comes_to_rest());
    assert_eq!(Usage::of(pid).unwrap().fds, before + 32);
    drop(control);
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_frontend_that_leaves_while_it_is_held_back_frees_its_socket_at_once() {
    let mut victim = Victim::released().log_level("info").start();
    let mut timer = Client::connect(&victim.rig);
    timer.restore_begin(2, 0);
    for times in 1..=3 {
        let held = victim.clock_negotiated(0);
        let enable = pair(0, 1).to_le_bytes();
        held.message(SET_VRING_ENABLE, true, &enable, &[]).unwrap();
        victim
            .rig
            .log_with_times("Holding the clock device's frontend back", times);
        drop(held);
        let mut next = victim.clock_control();
        victim.in_time("the next frontend is served", || {
            next.ask(GET_FEATURES, &[], &[]).expect("the features");
        });
    }
    timer.vm(op::RESTORE_ABORT, &[]).ok(0);
    drop(timer);
    victim.in_time("a guest is served", || {
        ClockDriver::connect(&victim.rig).reads_the_hosts(UTC);
    });
    victim.renew();
    victim.unharmed();
}
