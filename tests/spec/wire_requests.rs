//! Requests and answers (SPEC.md, "Requests").

use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, Info, PCVAL, VM, configure_body, op, pause_body, phase,
    range_body, regs_body, request, restore_body, status, u32_at, words,
};
use vhost_user_timer_kit::raw_driver::{Layout, POISON, Rig, Setup};

/// A VM of two vCPUs in each phase.
fn in_phase(rig: &Rig, wanted: u32) -> Client {
    let mut client = Client::connect(rig);
    if wanted != phase::NEW {
        client.configure(2);
    }
    match wanted {
        phase::RUNNING => drop(client.resume()),
        phase::RESTORING => drop(client.restore_begin(2, 0)),
        _ => {}
    }
    assert_eq!(client.info().phase, wanted);
    client
}

const PHASES: [u32; 4] = [phase::NEW, phase::PAUSED, phase::RUNNING, phase::RESTORING];

fn vcpu_of(about_a_vcpu: bool) -> u32 {
    if about_a_vcpu { 0 } else { VM }
}

/// A body that the operation takes in every respect, for a VM of two vCPUs.
fn good_body(op: u16) -> Vec<u8> {
    match op {
        op::CONFIGURE_VM => configure_body(2, 0, 0),
        op::GET_REGS => words(&[CTL]),
        op::SET_REGS => regs_body(&[(CTL, 0)]),
        op::GET_VM => range_body(0, 2),
        op::SET_COUNTER_OFFSET | op::SET_COUNTER_ANCHOR | op::SET_TIME_PAGE => words(&[0, 0]),
        op::PAUSE => pause_body(0),
        op::RESTORE_BEGIN => restore_body(2, 0, 0, 0),
        _ => vec![],
    }
}

#[test]
fn every_answer_names_the_current_epoch() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    for epoch in 1..5 {
        assert_eq!(client.vm(op::GET_INFO, &[]).epoch, epoch);
        assert_eq!(client.vm(0x7777, &[]).epoch, epoch);
        assert_eq!(client.raw(&[1, 2, 3], 16).epoch, epoch);
        // RESTORE_BEGIN's own answer names the new one.
        assert_eq!(client.restore_begin(2, 0), epoch + 1);
    }
}

#[test]
fn used_len_is_what_was_written_and_nothing_past_it_is_touched() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    let cases: [(u16, u32, Vec<u8>, u32); 6] = [
        (op::GET_INFO, VM, vec![], 80),
        (op::GET_REG_LIST, 1, vec![], 16 + 48),
        (op::GET_REGS, 0, words(&[CTL, CNT]), 16 + 32),
        (op::SET_REGS, 0, regs_body(&[(CTL, 0)]), 24),
        (op::GET_VM, VM, range_body(1, 1), 16 + 40 + 56),
        (op::CONFIGURE_VM, VM, configure_body(2, 0, 0), 16),
    ];
    for (op, vcpu, body, len) in cases {
        for spare in [0, 1, 4000] {
            let room = len as usize + spare;
            let request = request(op, vcpu, 0, &body);
            let used = client.driver.call(1, &request, room, &Layout::plain());
            assert_eq!(used.len, len, "{op:#x}");
            assert!(used.writable[len as usize..].iter().all(|b| *b == POISON));
        }
    }
}

#[test]
fn on_error_only_the_header_is_written() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    for bad in [
        request(0x7777, VM, 0, &[]),
        request(op::GET_INFO, 0, 0, &[]),
        request(op::GET_REGS, 9, 0, &words(&[CTL])),
        request(op::GET_INFO, VM, 99, &[]),
        request(op::RESTORE_ABORT, VM, 0, &[]),
        request(op::GET_REGS, 0, 0, &words(&[1])),
        request(op::GET_INFO, VM, 0, &[0]),
        vec![],
    ] {
        let used = client.driver.call(1, &bad, 4096, &Layout::plain());
        assert_eq!(used.len, 16);
        assert_ne!(Answer::of(&used).status, status::OK);
    }
}

#[test]
fn without_room_for_a_header_the_chain_comes_back_empty_and_nothing_is_done() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    let before = (client.info().at_rest(), client.state().at_rest(false));
    for room in 0..16 {
        for request in [
            request(op::RESUME, VM, 0, &[]),
            request(op::SET_REGS, 0, 0, &regs_body(&[(CNT, 9)])),
            request(op::RESTORE_BEGIN, VM, 0, &restore_body(2, 0, 0, 0)),
            request(op::WAIT_RUN, 0, 0, &[]),
            vec![0xff; 3],
        ] {
            let used = client.driver.call(1, &request, room, &Layout::plain());
            assert_eq!(used.len, 0, "with room for {room}");
            assert_eq!(used.writable, vec![POISON; room]);
        }
    }
    assert_eq!(
        (client.info().at_rest(), client.state().at_rest(false)),
        before
    );
    let log = rig.backend.log();
    let lines = log.lines().filter(|line| line.contains("writable bytes"));
    // Logged, and not each of the eighty.
    assert!((1..20).contains(&lines.count()), "{log}");
}

#[test]
fn an_operation_with_no_answer_but_the_header_needs_room_for_no_more() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    let configure = request(op::CONFIGURE_VM, VM, 0, &configure_body(2, 0, 0));
    client.raw(&configure, 16).ok(0);
    let begin = request(op::RESTORE_BEGIN, VM, 0, &restore_body(2, 0, 0, 0));
    client.raw(&begin, 16).ok(0);
    client.raw(&request(op::SET_VM, VM, 0, &[]), 16).ok(0);
    client
        .raw(&request(op::RESTORE_ABORT, VM, 0, &[]), 16)
        .ok(0);
}

#[test]
fn an_answer_that_does_not_fit_is_refused_with_the_bytes_needed() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    let before = (client.info().at_rest(), client.state().at_rest(false));
    let cases: [(u16, u32, Vec<u8>, u32); 8] = [
        (op::GET_INFO, VM, vec![], 80),
        (op::GET_REG_LIST, 0, vec![], 64),
        (op::GET_REGS, 0, words(&[CTL, CVAL]), 48),
        (op::SET_REGS, 0, regs_body(&[(CNT, 5)]), 24),
        (op::GET_VM, VM, range_body(0, 2), 168),
        (op::PAUSE, VM, pause_body(0), 56),
        (op::RESUME, VM, vec![], 56),
        (op::WAIT_RUN, 0, vec![], 56),
    ];
    for (op, vcpu, body, needed) in cases {
        for room in [16, needed as usize - 1] {
            let answer = client.raw(&request(op, vcpu, 0, &body), room);
            assert_eq!(answer.outcome(), (status::E2BIG, needed), "{op:#x}");
        }
    }
    assert_eq!(
        (client.info().at_rest(), client.state().at_rest(false)),
        before
    );
}

#[test]
fn requests_of_one_queue_complete_in_order_and_wait_run_apart() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect_with(
        &rig,
        Setup {
            size: 1024,
            ..Setup::default()
        },
    );
    client.configure(2);
    let mut waiting = Vec::new();
    let mut heads = Vec::new();
    for n in 0..300 {
        if n % 100 == 7 {
            waiting.push(client.driver.add(
                1,
                &request(op::WAIT_RUN, 0, 0, &[]),
                56,
                &Layout::plain(),
            ));
        } else {
            let body = regs_body(&[(CVAL, n)]);
            let set = request(op::SET_REGS, 0, 0, &body);
            heads.push(client.driver.add(1, &set, 24, &Layout::plain()));
        }
    }
    client.driver.rings[1].kick(&client.driver.memory);
    for head in heads {
        assert_eq!(client.driver.used(1).head, head);
    }
    assert_eq!(client.get_one(0, CVAL), 299);
    assert_eq!(client.driver.used_already(1), None);
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    waiting.push(resume);
    client.all_released(1, &waiting);
}

#[test]
fn each_operation_is_atomic_across_queues() {
    let rig = Rig::launch(&["--request-queues=3"]);
    let mut client = Client::connect_with(
        &rig,
        Setup {
            queues: 4,
            size: 1024,
            ..Setup::default()
        },
    );
    client.configure(1);
    // Two queues write pairs that belong together, a third reads them.
    for n in 0..200u64 {
        for queue in [1, 2] {
            let value = n * 2 + u64::from(queue);
            let pair = regs_body(&[(CVAL, value), (PCVAL, value)]);
            let set = request(op::SET_REGS, 0, 0, &pair);
            client.driver.add(queue, &set, 24, &Layout::plain());
        }
        let get = request(op::GET_REGS, 0, 0, &words(&[CVAL, PCVAL]));
        client.driver.add(3, &get, 48, &Layout::plain());
    }
    for queue in [1, 2, 3] {
        client.driver.rings[queue].kick(&client.driver.memory);
    }
    for _ in 0..200 {
        Answer::of(&client.driver.used(1)).ok(8);
        Answer::of(&client.driver.used(2)).ok(8);
        let answer = Answer::of(&client.driver.used(3));
        let body = answer.ok(32);
        assert_eq!(body[8..16], body[24..32]);
    }
}

#[test]
fn reserved_header_flags_must_be_zero() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::PAUSED);
    for (op, about_a_vcpu, _) in op::ALL {
        for bit in 0..16 {
            let mut bytes = request(op, vcpu_of(about_a_vcpu), 0, &good_body(op));
            bytes[2..4].copy_from_slice(&(1u16 << bit).to_le_bytes());
            let answer = client.raw(&bytes, 256);
            assert_eq!(answer.outcome(), (status::EINVAL, 0), "{op:#x} bit {bit}");
        }
    }
    assert_eq!(client.info().phase, phase::PAUSED);
}

#[test]
fn a_vm_wide_operation_with_another_vcpu_is_einval() {
    let rig = Rig::launch(&[]);
    for wanted in PHASES {
        let mut client = in_phase(&rig, wanted);
        for (op, about_a_vcpu, _) in op::ALL {
            if !about_a_vcpu {
                for vcpu in [0, 1, 2, VM - 1] {
                    let answer = client.ask(op, vcpu, 0, &good_body(op));
                    assert_eq!(answer.outcome(), (status::EINVAL, 0), "{op:#x} {vcpu}");
                }
            }
        }
        client.reset_and_leave();
    }
}

#[test]
fn a_vcpu_operation_past_the_vms_vcpus_is_enxio() {
    let rig = Rig::launch(&[]);
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut client = in_phase(&rig, wanted);
        for (op, about_a_vcpu, _) in op::ALL {
            if about_a_vcpu {
                for vcpu in [2, 511, 4096, VM - 1, VM] {
                    let answer = client.ask(op, vcpu, 0, &good_body(op));
                    assert_eq!(answer.outcome(), (status::ENXIO, 0), "{op:#x} {vcpu}");
                }
            }
        }
        client.reset_and_leave();
    }
}

#[test]
fn in_new_every_operation_but_get_info_and_configure_vm_is_ebusy() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::NEW);
    for (op, about_a_vcpu, _) in op::ALL {
        if matches!(op, op::GET_INFO | op::CONFIGURE_VM | op::SET_TIME_PAGE) {
            continue;
        }
        let vcpus = if about_a_vcpu {
            vec![0, 7, VM]
        } else {
            vec![VM]
        };
        for vcpu in vcpus {
            let answer = client.ask(op, vcpu, 0, &good_body(op));
            assert_eq!(answer.outcome(), (status::EBUSY, phase::NEW), "{op:#x}");
        }
    }
}

#[test]
fn epoch_0_means_the_current_one_and_any_other_must_be_it() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::RESTORING);
    assert_eq!(client.info().epoch, 2);
    for (op, about_a_vcpu, _) in op::ALL {
        for epoch in [1, 3, u64::MAX] {
            let answer = client.ask(op, vcpu_of(about_a_vcpu), epoch, &good_body(op));
            assert_eq!(answer.outcome(), (status::ESTALE, 0), "{op:#x} {epoch}");
            assert_eq!(answer.epoch, 2);
        }
    }
    for epoch in [0, 2] {
        client.ask(op::GET_INFO, VM, epoch, &[]).ok(64);
        client.ask(op::GET_REGS, 1, epoch, &words(&[CTL])).ok(16);
    }
}

#[test]
fn an_unknown_operation_is_eopnotsupp_whatever_else_is_wrong() {
    let rig = Rig::launch(&[]);
    for wanted in PHASES {
        let mut client = in_phase(&rig, wanted);
        for op in [0, 3, 0x13, 0x24, 0x32, 0x44, 0x51, 0x100, 0xffff] {
            for (vcpu, epoch, body) in [(VM, 0, 0), (0, 0, 0), (99, 99, 7), (VM, 1, 5000)] {
                let answer = client.ask(op, vcpu, epoch, &vec![0; body]);
                assert_eq!(answer.outcome(), (status::EOPNOTSUPP, 0), "{op:#x}");
            }
            let mut bytes = request(op, VM, 0, &[]);
            bytes[2] = 1;
            assert_eq!(client.raw(&bytes, 16).status, status::EOPNOTSUPP);
        }
        client.reset_and_leave();
    }
}

/// What is tried, the request, its room, and the outcome.
type Case = (&'static str, Vec<u8>, usize, (u32, u32));

#[test]
fn checks_run_in_the_order_of_the_contract() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::RUNNING);
    // Each with everything wrong that is checked later than what it is refused for.
    let flagged = |mut bytes: Vec<u8>| {
        bytes[2] = 1;
        bytes
    };
    let bad_regs = regs_body(&[(CNT, 1), (1, 1)]);
    let cases: [Case; 12] = [
        (
            "framing before all",
            flagged(request(op::SET_REGS, 9, 9, &bad_regs[..31])),
            16,
            (status::EPROTO, 0),
        ),
        (
            "operation before reserved",
            flagged(request(0x7777, 9, 9, &bad_regs)),
            16,
            (status::EOPNOTSUPP, 0),
        ),
        (
            "reserved before vCPU",
            flagged(request(op::SET_REGS, 9, 9, &bad_regs)),
            16,
            (status::EINVAL, 0),
        ),
        (
            "vCPU before epoch",
            request(op::SET_REGS, 9, 9, &bad_regs),
            16,
            (status::ENXIO, 0),
        ),
        (
            "epoch before phase",
            request(op::SET_REGS, 0, 9, &bad_regs),
            16,
            (status::ESTALE, 0),
        ),
        (
            "phase before values",
            request(op::SET_REGS, 0, 1, &bad_regs),
            16,
            (status::EBUSY, phase::RUNNING),
        ),
        (
            "values before room",
            request(op::SET_REGS, 0, 1, &regs_body(&[(CTL, 1), (1, 1)])),
            16,
            (status::ENOENT, 1),
        ),
        (
            "room last",
            request(op::SET_REGS, 0, 1, &regs_body(&[(CTL, 1)])),
            16,
            (status::E2BIG, 24),
        ),
        (
            "a VM-wide operation: vCPU before epoch",
            request(op::RESTORE_BEGIN, 0, 9, &restore_body(9, 0, 0, 0)),
            16,
            (status::EINVAL, 0),
        ),
        (
            "a VM-wide operation: unknown flags before epoch",
            request(op::RESTORE_BEGIN, VM, 9, &restore_body(9, 8, 0, 0)),
            16,
            (status::EINVAL, 0),
        ),
        (
            "a VM-wide operation: epoch before phase",
            request(op::RESTORE_BEGIN, VM, 9, &restore_body(9, 0, 0, 0)),
            16,
            (status::ESTALE, 0),
        ),
        (
            "a VM-wide operation: phase before values",
            request(op::RESTORE_BEGIN, VM, 1, &restore_body(9, 0, 0, 0)),
            16,
            (status::EBUSY, phase::RUNNING),
        ),
    ];
    for (what, bytes, room, outcome) in cases {
        assert_eq!(client.raw(&bytes, room).outcome(), outcome, "{what}");
    }
    assert_eq!(client.get_one(0, CTL), 0);
}

#[test]
fn ebusy_names_the_phase_and_while_restoring_the_missing_vcpus() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    assert_eq!(
        client.vm(op::PAUSE, &pause_body(0)).outcome(),
        (status::EBUSY, phase::NEW)
    );
    client.configure(3);
    let abort = client.vm(op::RESTORE_ABORT, &[]);
    assert_eq!(abort.outcome(), (status::EBUSY, phase::PAUSED));
    client.resume();
    let begin = client.vm(op::RESTORE_BEGIN, &restore_body(3, 0, 0, 0));
    assert_eq!(begin.outcome(), (status::EBUSY, phase::RUNNING));
    client.pause();
    client.restore_begin(3, 0);
    for missing in [3, 2, 1] {
        assert_eq!(
            client.vm(op::RESUME, &[]).outcome(),
            (status::EBUSY, missing)
        );
        client.bring(missing - 1, 1);
        client.restore_done(missing - 1);
    }
    client.resume();
}

#[test]
fn a_request_shorter_than_a_header_is_eproto() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::NEW);
    for len in 0..16 {
        let answer = client.raw(&vec![0xff; len], 16);
        assert_eq!(answer.outcome(), (status::EPROTO, 0), "{len} bytes");
    }
}

#[test]
fn the_current_epoch_survives_reset_device() {
    let rig = Rig::launch(&[]);
    let mut client = in_phase(&rig, phase::RESTORING);
    let epoch = client.info().epoch;
    client.reset_and_leave();
    let mut client = Client::connect(&rig);
    // It may grow and never falls: no late request of the former VM may be taken for a new one.
    let info: Info = client.info();
    assert!(info.epoch >= epoch);
    client.configure(1);
    assert!(client.restore_begin(1, 0) > epoch);
}

#[test]
fn kicks_and_calls_are_never_lost() {
    // One request at a time, so that a lost notification in either direction stops it all.
    for event_idx in [false, true] {
        let rig = Rig::launch(&[]);
        let mut client = Client::connect_with(
            &rig,
            Setup {
                event_idx,
                size: 4,
                ..Setup::default()
            },
        );
        client.configure(1);
        for n in 0..3000u64 {
            client.set(0, &[(CVAL, n)]);
        }
        let body = client.vcpu(op::GET_REGS, 0, &words(&[CVAL])).body;
        assert_eq!(u32_at(&body, 8), 2999);
    }
}
