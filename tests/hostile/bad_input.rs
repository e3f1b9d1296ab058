//! Wrong requests: each gets the specified status and changes nothing, and the next request is
//! served.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Info, VM, VmState, configure_body, op, pause_body, phase, regs_body,
    request, restore, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{Cut, Layout, Rig, seed};

/// A VM's state, to check that nothing changed. Outside PAUSED the counts move and are left out.
fn snapshot(client: &mut Client) -> (Info, Option<VmState>) {
    let info = client.info();
    match info.phase {
        phase::NEW => (
            Info {
                host_count: 0,
                ..info
            },
            None,
        ),
        phase::RUNNING | phase::ARMED => {
            let mut state = client.state().at_rest(false);
            state.virt_count = 0;
            for vcpu in &mut state.vcpus {
                vcpu.registers[1] = 0;
            }
            (
                Info {
                    host_count: 0,
                    ..info
                },
                Some(state),
            )
        }
        _ => {
            let standing = info.phase == phase::RESTORING;
            let mut rest = info.at_rest();
            if standing {
                rest.cntpoff = 0;
            }
            (rest, Some(client.state().at_rest(standing)))
        }
    }
}

fn in_phase(rig: &Rig, wanted: u32) -> Client {
    let mut client = Client::connect(rig);
    if wanted != phase::NEW {
        match wanted {
            phase::ARMED => client.configure_confirming(2),
            _ => client.configure(2),
        }
        client.set(0, &[(CTL, 2), (CVAL, 77), (CNT, 1 << 40)]);
    }
    match wanted {
        phase::RUNNING => drop(client.resume()),
        phase::RESTORING => {
            client.restore_begin(2, restore::STRICT);
            client.bring(1, 9);
            client.restore_done(1);
            client.set(0, &[(CVAL, 5)]);
        }
        phase::ARMED => {
            client.restore_begin(2, restore::AUTORUN);
            for vcpu in 0..2 {
                client.bring(vcpu, 9);
                client.restore_done(vcpu);
            }
        }
        _ => {}
    }
    assert_eq!(client.info().phase, wanted);
    client
}

const PHASES: [u32; 5] = [
    phase::NEW,
    phase::PAUSED,
    phase::RUNNING,
    phase::RESTORING,
    phase::ARMED,
];

/// Sends a request that must be refused with this outcome, and checks that nothing changed.
#[track_caller]
fn refused(client: &mut Client, bytes: &[u8], room: usize, outcome: (u32, u32)) {
    let before = snapshot(client);
    assert_eq!(client.raw(bytes, room).outcome(), outcome);
    assert_eq!(snapshot(client), before);
}

#[test]
fn bodies_too_short_or_too_long_for_their_operation_are_eproto() {
    let rig = Rig::launch(&[]);
    for wanted in PHASES {
        let mut client = in_phase(&rig, wanted);
        for (op, about_a_vcpu, len) in op::ALL {
            let vcpu = if about_a_vcpu { 0 } else { VM };
            let counted = matches!(op, op::GET_REGS | op::SET_REGS | op::SET_VM);
            for wrong in (0..len + 20).chain([len + 255, 4096, 4097, 20_001]) {
                let right = if counted {
                    wrong % len == 0
                } else {
                    wrong == len
                };
                if !right {
                    let bytes = request(op, vcpu, 0, &vec![0; wrong]);
                    let answer = client.raw(&bytes, 256);
                    assert_eq!(answer.outcome(), (status::EPROTO, 0), "{op:#x} {wrong}");
                }
            }
            refused(
                &mut client,
                &request(op, vcpu, 0, &vec![1; len + 1]),
                256,
                (status::EPROTO, 0),
            );
        }
        client.reset_and_leave();
    }
}

#[test]
fn unknown_operations_change_nothing_in_any_phase() {
    let rig = Rig::launch(&[]);
    for wanted in PHASES {
        let mut client = in_phase(&rig, wanted);
        let known: Vec<u16> = op::ALL.iter().map(|(op, ..)| *op).collect();
        let before = snapshot(&mut client);
        for code in (0..=0x60).chain([0x0101, 0x1000, 0x8001, 0xffff]) {
            if !known.contains(&code) {
                let answer = client.vm(code, &[]);
                assert_eq!(answer.outcome(), (status::EOPNOTSUPP, 0), "{code:#x}");
            }
        }
        assert_eq!(snapshot(&mut client), before);
        client.reset_and_leave();
    }
}

#[test]
fn reserved_bits_of_bodies_are_einval() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    let einval = (status::EINVAL, 0);
    for bit in 1..64 {
        let pause = request(op::PAUSE, VM, 0, &words(&[1 << bit]));
        refused(&mut client, &pause, 56, einval);
        let offset = request(op::SET_COUNTER_OFFSET, VM, 0, &words(&[3, 1 << bit]));
        refused(&mut client, &offset, 56, einval);
    }
    for bit in 3..32 {
        let begin = restore_body(2, 1 << bit, 0, 0);
        let begin = request(op::RESTORE_BEGIN, VM, 0, &begin);
        refused(&mut client, &begin, 56, einval);
    }
}

#[test]
fn a_request_in_the_wrong_phase_changes_nothing() {
    let rig = Rig::launch(&[]);
    let cases: [(u32, u16, u32, Vec<u8>, u32); 20] = [
        (phase::NEW, op::RESUME, VM, vec![], 0),
        (phase::NEW, op::SET_REGS, 0, regs_body(&[(CTL, 1)]), 0),
        (phase::PAUSED, op::RESTORE_DONE, 0, vec![], 1),
        (phase::PAUSED, op::RESTORE_ABORT, VM, vec![], 1),
        (phase::PAUSED, op::SET_VM, VM, vec![0; 56], 1),
        (
            phase::RUNNING,
            op::SET_REGS,
            0,
            regs_body(&[(CTL, 1), (CNT, 1)]),
            2,
        ),
        (
            phase::RUNNING,
            op::SET_COUNTER_OFFSET,
            VM,
            words(&[1, 0]),
            2,
        ),
        (
            phase::RUNNING,
            op::RESTORE_BEGIN,
            VM,
            restore_body(2, 0, 0, 0),
            2,
        ),
        (phase::RESTORING, op::RESUME, VM, vec![], 1),
        (phase::RESTORING, op::PAUSE, VM, pause_body(0), 1),
        (
            phase::RESTORING,
            op::SET_COUNTER_ANCHOR,
            VM,
            words(&[1, 1]),
            1,
        ),
        (phase::RESTORING, op::SET_REGS, 1, regs_body(&[(CTL, 1)]), 1),
        (phase::NEW, op::CONFIRM_RUN, VM, words(&[0, 0]), 0),
        (phase::PAUSED, op::CONFIRM_RUN, VM, words(&[0, 0]), 1),
        (phase::RESTORING, op::CONFIRM_RUN, VM, words(&[0, 0]), 1),
        (phase::ARMED, op::SET_COUNTER_OFFSET, VM, words(&[1, 0]), 4),
        (phase::ARMED, op::SET_COUNTER_ANCHOR, VM, words(&[1, 1]), 4),
        (phase::ARMED, op::SET_VM, VM, vec![0; 56], 4),
        (phase::ARMED, op::SET_REGS, 0, regs_body(&[(CNT, 1)]), 4),
        (
            phase::ARMED,
            op::CONFIGURE_VM,
            VM,
            configure_body(2, 0, 0),
            4,
        ),
    ];
    for (phase, op, vcpu, body, detail) in cases {
        let mut client = in_phase(&rig, phase);
        let bytes = request(op, vcpu, 0, &body);
        refused(&mut client, &bytes, 256, (status::EBUSY, detail));
        client.reset_and_leave();
    }
}

#[test]
fn a_vcpu_that_is_not_there_and_an_epoch_that_is_not_now_change_nothing() {
    let rig = Rig::launch(&[]);
    for wanted in PHASES.into_iter().filter(|phase| *phase != phase::NEW) {
        let mut client = in_phase(&rig, wanted);
        let set = regs_body(&[(CTL, 1), (CVAL, 1)]);
        for vcpu in [2, VM] {
            let bytes = request(op::SET_REGS, vcpu, 0, &set);
            refused(&mut client, &bytes, 256, (status::ENXIO, 0));
        }
        let bytes = request(op::SET_REGS, 0, 77, &set);
        refused(&mut client, &bytes, 256, (status::ESTALE, 0));
        client.reset_and_leave();
    }
}

#[test]
fn a_request_with_one_bad_entry_sets_none_of_the_others() {
    let rig = Rig::launch(&[]);
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut client = in_phase(&rig, wanted);
        for index in 0..4usize {
            let mut entries = vec![(CTL, 3), (CVAL, 1), (CNT, 2), (CTL, 3)];
            entries[index] = (1, 1);
            let bytes = request(op::SET_REGS, 0, 0, &regs_body(&entries));
            refused(&mut client, &bytes, 256, (status::ENOENT, index as u32));
        }
        client.reset_and_leave();
    }
}

#[test]
fn an_answer_without_room_changes_nothing() {
    let rig = Rig::launch(&[]);
    for (wanted, op, vcpu, body, needed) in [
        (phase::PAUSED, op::RESUME, VM, vec![], 56),
        (phase::RUNNING, op::PAUSE, VM, pause_body(0), 56),
        (phase::PAUSED, op::SET_REGS, 0, regs_body(&[(CNT, 1)]), 24),
        (phase::RESTORING, op::RESTORE_DONE, 1, vec![], 24),
        (phase::PAUSED, op::WAIT_RUN, 1, vec![], 56),
        (phase::ARMED, op::RESUME, VM, vec![], 56),
        (phase::ARMED, op::PAUSE, VM, pause_body(0), 56),
        (phase::ARMED, op::RESTORE_DONE, 1, vec![], 24),
    ] {
        let mut client = in_phase(&rig, wanted);
        let bytes = request(op, vcpu, 0, &body);
        refused(&mut client, &bytes, 16, (status::E2BIG, needed));
        refused(
            &mut client,
            &bytes,
            needed as usize - 1,
            (status::E2BIG, needed),
        );
        let before = snapshot(&mut client);
        for room in [0, 1, 15] {
            assert_eq!(client.driver.call(1, &bytes, room, &Layout::plain()).len, 0);
        }
        assert_eq!(snapshot(&mut client), before);
        client.reset_and_leave();
    }
}

#[test]
fn a_confirmation_without_room_for_its_answer_releases_nobody() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::ARMED);
    let waiting = client.wait_run(1, 0);
    let info = client.info();
    let body = words(&[info.cntvoff, info.cntpoff]);
    let bytes = request(op::CONFIRM_RUN, VM, 0, &body);
    refused(&mut client, &bytes, 55, (status::E2BIG, 56));
    for room in [0, 15] {
        assert_eq!(client.driver.call(1, &bytes, room, &Layout::plain()).len, 0);
    }
    let stale = request(op::CONFIRM_RUN, VM, info.epoch - 1, &body);
    refused(&mut client, &stale, 56, (status::ESTALE, 0));
    assert_eq!(client.info().phase, phase::ARMED);
    let confirm = client.driver.submit(1, &bytes, 56, &Layout::plain());
    for answer in client.all_released(1, &[waiting, confirm]) {
        answer.ok(40);
    }
}

#[test]
fn random_requests_never_get_more_than_the_contract_says() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let rig = Rig::launch(&[]);
    let mut client = rig.client().queue_size(1024).connect();
    let statuses = [0, 2, 6, 7, 16, 22, 61, 71, 95, 110, 116, 125];
    let mut held = 0;
    for n in 0..20_000 {
        let (op, _, len) = op::ALL[random.usize(0..op::ALL.len())];
        let op = if random.u8(0..20) == 0 {
            random.u16(..)
        } else {
            op
        };
        let vcpu = *random.choice(&[0, 1, 2, VM, VM, VM]).unwrap();
        let epoch = if random.u8(0..8) == 0 {
            random.u64(0..5)
        } else {
            0
        };
        let mut body: Vec<u8> = (0..len)
            .map(|_| *random.choice(&[0, 0, 0, 0, 0, 1, 2, 255]).unwrap())
            .collect();
        if random.u8(0..10) == 0 {
            body.truncate(random.usize(0..=len));
        }
        let room = *random.choice(&[0, 15, 16, 24, 55, 56, 80, 300]).unwrap();
        let layout = Layout {
            readable: Cut::at(&[random.usize(1..40), random.usize(0..9)]),
            writable: Cut::at(&[random.usize(8..40), random.usize(0..9)]),
            indirect: random.bool(),
            reversed: random.bool(),
        };
        let bytes = request(op, vcpu, epoch, &body);
        client.driver.submit(1, &bytes, room, &layout);
        if op == op::WAIT_RUN {
            held += 1;
        }
        // A second request shows when the first one is answered or held.
        let info = request(op::GET_INFO, VM, 0, &[]);
        let sync = client.driver.submit(1, &info, 80, &Layout::plain());
        loop {
            let used = client.driver.used(1);
            assert!(matches!(used.len, 0 | 16..=4096), "VUT_SEED={seed} at {n}");
            let written = used.bytes();
            if used.len != 0 {
                let status = u32::from_le_bytes(written[..4].try_into().unwrap());
                assert!(
                    statuses.contains(&status),
                    "VUT_SEED={seed} at {n}: {status}"
                );
                assert!(status == 0 || used.len == 16, "VUT_SEED={seed} at {n}");
            }
            if used.head == sync {
                break;
            }
        }
        if held > 5 {
            // Ends the waits, so that the ring does not fill.
            client.driver.stop(1);
            while client.driver.used_already(1).is_some() {}
            client.driver.start(1);
            held = 0;
        }
    }
}
