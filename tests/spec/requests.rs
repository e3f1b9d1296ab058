//! SPEC.md, "Requests": headers, scopes, epochs, room, and which error comes first.

use vhost_user_timer_kit::contract::{
    ARM64, Answer, CNT, CTL, CVAL, VM, configure_body, op, pause_body, phase, range_body,
    regs_body, request, restore_body, status, u16_at, u32_at, u64_at, words,
};
use vhost_user_timer_kit::raw_driver::Layout;

use crate::world::{PHASES, World, one_of_each};

scenarios! {
    both {
        integers_are_little_endian_at_the_headers_offsets: "2.1" "2.6" "2.7";
        an_answer_is_a_header_and_the_operations_body:
            "2.7" "2.30" "5.1" "5.3" "5.4" "5.5" "5.6" "5.10" "5.11" "5.14";
        an_operation_without_an_answer_gives_the_header_alone:
            "2.33" "5.2" "5.7" "5.8" "5.9" "5.12" "5.15" "5.16";
        an_answer_that_just_fits_is_given_and_one_byte_less_is_e2big_with_the_bytes_needed:
            "2.33" "2.52";
        restore_done_needs_room_too_and_else_the_vcpu_is_not_done: "2.2" "2.33" "2.52" "5.13";
        a_wait_run_that_could_not_be_answered_does_not_wait: "2.33";
        every_answer_names_the_current_epoch: "2.9";
        epoch_0_means_the_current_one_and_any_other_is_over: "2.8" "2.40";
        a_vm_wide_operation_that_names_a_vcpu_is_einval_in_every_phase: "2.35" "2.50";
        a_vcpu_operation_on_no_vcpu_of_the_vm_is_enxio: "2.32";
        in_new_every_operation_that_needs_a_vm_is_ebusy_whatever_vcpu_it_names: "2.34" "2.51";
        a_header_flag_that_the_operation_does_not_take_is_einval: "2.3" "2.35";
        a_body_that_is_too_short_or_too_long_is_eproto: "2.37";
        a_request_cut_inside_its_header_is_eproto_and_an_empty_one_too: "2.37";
        an_unknown_operation_is_eopnotsupp_whatever_else_is_wrong: "2.38";
        an_error_writes_the_header_and_nothing_else: "2.11";
        checks_run_in_the_order_of_the_contract: "2.50";
        ebusys_detail_is_the_phase_or_while_restoring_the_vcpus_missing: "2.34";
    }
}

fn integers_are_little_endian_at_the_headers_offsets(on: World) {
    let mut vm = on.paused(1);
    let mut bytes = vec![0; 16];
    (bytes[0], bytes[8]) = (0x12, 1);
    bytes.extend(0x6030_0000_0013_df02_u64.to_le_bytes());
    bytes.extend(0x0102_0304_0506_0708_u64.to_le_bytes());
    let head = vm.driver.submit(1, &bytes, 24, &Layout::plain());
    let used = vm.driver.used(1);
    assert_eq!((used.head, used.len), (head, 24));
    let answer = used.bytes();
    assert_eq!(
        (u32_at(answer, 0), u32_at(answer, 4), u64_at(answer, 8)),
        (0, 0, 1)
    );
    assert_eq!(vm.get_one(0, CVAL), 0x0102_0304_0506_0708);
    // A status and an epoch of more than one byte.
    for _ in 0..260 {
        vm.restore_begin(1, 0);
    }
    (bytes[0], bytes[4], bytes[8]) = (0x12, 7, 0);
    vm.driver.submit(1, &bytes, 24, &Layout::plain());
    let used = vm.driver.used(1);
    assert_eq!(
        used.bytes(),
        [6, 0, 0, 0, 0, 0, 0, 0, 5, 1, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(u16_at(used.bytes(), 8), 261);
}

/// The operations whose answer has a body, each in a phase that accepts it, and the body's length.
fn answers_with_a_body() -> Vec<(u32, u16, u32, Vec<u8>, usize)> {
    let cval = regs_body(&[(CVAL, 9)]);
    vec![
        (phase::NEW, op::GET_INFO, VM, vec![], 64),
        (phase::PAUSED, op::GET_INFO, VM, vec![], 64),
        (phase::RUNNING, op::GET_REG_LIST, 1, vec![], 6 * 8),
        (phase::RUNNING, op::GET_REGS, 1, words(&ARM64), 6 * 16),
        (phase::PAUSED, op::GET_REGS, 0, words(&[CTL, CVAL]), 2 * 16),
        (phase::RUNNING, op::GET_REGS, 1, vec![], 0),
        (phase::RUNNING, op::SET_REGS, 1, cval.clone(), 8),
        (phase::PAUSED, op::SET_REGS, 1, cval.clone(), 8),
        (phase::PAUSED, op::SET_REGS, 0, regs_body(&[(CNT, 5)]), 8),
        (phase::RESTORING, op::SET_REGS, 1, cval, 8),
        (
            phase::RUNNING,
            op::GET_VM,
            VM,
            range_body(0, 2),
            40 + 2 * 56,
        ),
        (phase::PAUSED, op::GET_VM, VM, range_body(2, 0), 40),
        (phase::RUNNING, op::PAUSE, VM, pause_body(0), 40),
        (phase::PAUSED, op::PAUSE, VM, pause_body(0), 40),
        (phase::PAUSED, op::RESUME, VM, vec![], 40),
        (phase::RUNNING, op::RESUME, VM, vec![], 40),
        (phase::RUNNING, op::WAIT_RUN, 1, vec![], 40),
    ]
}

fn an_answer_is_a_header_and_the_operations_body(on: World) {
    for (wanted, op, vcpu, body, len) in answers_with_a_body() {
        on.in_phase(wanted, 2).ask(op, vcpu, 0, &body).ok(len);
    }
}

fn an_operation_without_an_answer_gives_the_header_alone(on: World) {
    for (wanted, op, body) in [
        (phase::NEW, op::CONFIGURE_VM, configure_body(2, 0, 0)),
        (phase::PAUSED, op::SET_COUNTER_OFFSET, words(&[1, 0])),
        (phase::PAUSED, op::SET_COUNTER_ANCHOR, words(&[1, 2])),
        (phase::PAUSED, op::RESTORE_BEGIN, restore_body(2, 0, 0, 0)),
        (phase::RESTORING, op::SET_VM, vec![]),
        (phase::RESTORING, op::RESTORE_ABORT, vec![]),
        (phase::NEW, op::SET_TIME_PAGE, words(&[0, 0])),
    ] {
        let mut vm = on.in_phase(wanted, 2);
        vm.raw(&request(op, VM, 0, &body), 16).ok(0);
    }
}

fn an_answer_that_just_fits_is_given_and_one_byte_less_is_e2big_with_the_bytes_needed(on: World) {
    for (wanted, op, vcpu, body, len) in answers_with_a_body() {
        let mut vm = on.in_phase(wanted, 2);
        let before = vm.snapshot();
        let bytes = request(op, vcpu, 0, &body);
        for room in 16..16 + len {
            let outcome = vm.raw(&bytes, room).outcome();
            assert_eq!(
                outcome,
                (status::E2BIG, 16 + len as u32),
                "{op:#x} in {wanted}"
            );
        }
        assert_eq!(vm.snapshot(), before);
        vm.raw(&bytes, 16 + len).ok(len);
    }
}

fn restore_done_needs_room_too_and_else_the_vcpu_is_not_done(on: World) {
    let mut vm = on.restoring(1, 0);
    vm.bring(0, 5);
    let before = vm.snapshot();
    let done = request(op::RESTORE_DONE, 0, 0, &[]);
    assert_eq!(vm.raw(&done, 23).outcome(), (status::E2BIG, 24));
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.raw(&done, 24).ok(8), [0; 8]);
    assert_eq!(vm.phase(), phase::PAUSED);
}

fn a_wait_run_that_could_not_be_answered_does_not_wait(on: World) {
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 2);
        let wait = request(op::WAIT_RUN, 0, 0, &[]);
        for room in [16, 55] {
            assert_eq!(vm.raw(&wait, room).outcome(), (status::E2BIG, 56));
        }
        vm.driver.stop(1);
        assert_eq!(vm.driver.used_already(1), None);
    }
}

fn every_answer_names_the_current_epoch(on: World) {
    let mut vm = on.paused(2);
    for epoch in 1..5 {
        assert_eq!(vm.vm(op::GET_INFO, &[]).epoch, epoch);
        assert_eq!(vm.vm(0x7777, &[]).epoch, epoch);
        assert_eq!(vm.raw(&[1, 2, 3], 16).epoch, epoch);
        assert_eq!(vm.vcpu(op::RESTORE_DONE, 0, &[]).epoch, epoch);
        assert_eq!(vm.vcpu(op::GET_REGS, 9, &[]).epoch, epoch);
        assert_eq!(vm.ask(op::GET_INFO, VM, 77, &[]).epoch, epoch);
        // RESTORE_BEGIN's own answer names the new one.
        assert_eq!(vm.restore_begin(2, 0), epoch + 1);
    }
}

fn epoch_0_means_the_current_one_and_any_other_is_over(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        let current = vm.epoch();
        vm.ask(op::GET_INFO, VM, 0, &[]).ok(64);
        vm.ask(op::GET_INFO, VM, current, &[]).ok(64);
        for other in [current - 1, current + 1, u64::MAX] {
            if other == 0 {
                continue;
            }
            for (op, vcpu, body) in one_of_each(2) {
                // In NEW too: the epoch comes before the phase.
                let answer = vm.ask(op, vcpu, other, &body);
                assert_eq!(answer.outcome(), (status::ESTALE, 0), "{op:#x} {other}");
                assert_eq!(answer.epoch, current);
            }
        }
        if wanted != phase::NEW {
            vm.ask(op::GET_REGS, 1, current, &words(&[CTL])).ok(16);
        }
    }
}

fn a_vm_wide_operation_that_names_a_vcpu_is_einval_in_every_phase(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        for (op, _, body) in one_of_each(2).into_iter().filter(|ask| ask.1 == VM) {
            for vcpu in [0, 1, 2, VM - 1] {
                let outcome = vm.refused(op, vcpu, &body);
                assert_eq!(outcome, (status::EINVAL, 0), "{op:#x} {vcpu}");
            }
        }
    }
}

fn a_vcpu_operation_on_no_vcpu_of_the_vm_is_enxio(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 2);
        for (op, _, body) in one_of_each(2).into_iter().filter(|ask| ask.1 != VM) {
            for vcpu in [2, 511, 4096, VM - 1, VM] {
                let outcome = vm.refused(op, vcpu, &body);
                assert_eq!(outcome, (status::ENXIO, 0), "{op:#x} {vcpu}");
            }
        }
    }
}

fn in_new_every_operation_that_needs_a_vm_is_ebusy_whatever_vcpu_it_names(on: World) {
    let mut vm = on.fresh();
    let any = [op::GET_INFO, op::CONFIGURE_VM, op::SET_TIME_PAGE];
    for (op, vcpu, body) in one_of_each(2) {
        let vcpus = if vcpu == VM {
            vec![VM]
        } else {
            vec![0, 2, 7, 4096, VM - 1, VM]
        };
        for vcpu in vcpus {
            if !any.contains(&op) {
                let outcome = vm.refused(op, vcpu, &body);
                assert_eq!(outcome, (status::EBUSY, phase::NEW), "{op:#x}");
            }
        }
    }
}

fn a_header_flag_that_the_operation_does_not_take_is_einval(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        for (op, vcpu, body) in one_of_each(2) {
            let takes_done = [op::SET_REGS, op::SET_VM].contains(&op);
            for bit in u32::from(takes_done)..16 {
                let mut bytes = request(op, vcpu, 0, &body);
                bytes[2..4].copy_from_slice(&(1u16 << bit).to_le_bytes());
                let outcome = vm.raw(&bytes, 256).outcome();
                assert_eq!(outcome, (status::EINVAL, 0), "{op:#x} bit {bit}");
            }
        }
        assert_eq!(vm.phase(), wanted);
    }
}

fn a_body_that_is_too_short_or_too_long_is_eproto(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        for (op, vcpu, mut body) in one_of_each(2) {
            body.push(0);
            assert_eq!(vm.refused(op, vcpu, &body), (status::EPROTO, 0));
            body.truncate(body.len() - 1);
            if body.pop().is_some() {
                assert_eq!(vm.refused(op, vcpu, &body), (status::EPROTO, 0));
            }
        }
    }
}

fn a_request_cut_inside_its_header_is_eproto_and_an_empty_one_too(on: World) {
    for wanted in [phase::NEW, phase::RUNNING] {
        let mut vm = on.in_phase(wanted, 1);
        let info = request(op::GET_INFO, VM, 0, &[]);
        for len in 0..info.len() {
            for bytes in [&info[..len], &vec![0xff; len]] {
                let outcome = vm.raw(bytes, 16).outcome();
                assert_eq!(outcome, (status::EPROTO, 0), "{len} bytes");
            }
        }
    }
}

fn an_unknown_operation_is_eopnotsupp_whatever_else_is_wrong(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        for op in [0, 3, 0x13, 0x24, 0x32, 0x45, 0x51, 0xff, 0x100, 0xffff] {
            for (vcpu, epoch, len) in [
                (VM, 0, 0),
                (0, 0, 1),
                (99, 99, 7),
                (0, 0, 16),
                (VM, 1, 5000),
            ] {
                let answer = vm.ask(op, vcpu, epoch, &vec![0xff; len]);
                assert_eq!(answer.outcome(), (status::EOPNOTSUPP, 0), "{op:#x}");
            }
            let mut bytes = request(op, VM, 0, &[]);
            bytes[2] = 1;
            assert_eq!(vm.raw(&bytes, 16).outcome(), (status::EOPNOTSUPP, 0));
        }
    }
}

fn an_error_writes_the_header_and_nothing_else(on: World) {
    let mut vm = on.paused(2);
    for bad in [
        request(0x7777, VM, 0, &[]),
        request(op::GET_INFO, 0, 0, &[]),
        request(op::GET_REGS, 9, 0, &words(&[CTL])),
        request(op::GET_INFO, VM, 99, &[]),
        request(op::RESTORE_ABORT, VM, 0, &[]),
        request(op::GET_REGS, 0, 0, &words(&[1])),
        request(op::GET_REGS, 0, 0, &words(&[CTL, CVAL, 1])),
        request(op::GET_INFO, VM, 0, &[0]),
        vec![],
    ] {
        vm.driver.submit(1, &bad, 4096, &Layout::plain());
        let used = vm.driver.used(1);
        assert_eq!(used.len, 16);
        // It also sees that nothing past the used length was touched.
        assert_ne!(Answer::of(&used).status, status::OK);
    }
}

/// What is tried, the request, and the outcome.
type Case = (&'static str, Vec<u8>, (u32, u32));

fn checks_run_in_the_order_of_the_contract(on: World) {
    // Each with everything wrong that is checked later than what it is refused for.
    let flagged = |mut bytes: Vec<u8>| {
        bytes[2] = 2;
        bytes
    };
    let bad = regs_body(&[(CNT, 1), (1, 1)]);
    let begin = |vcpu, epoch, flags| {
        request(
            op::RESTORE_BEGIN,
            vcpu,
            epoch,
            &restore_body(9, flags, 0, 0),
        )
    };
    let set = |vcpu, epoch, body: &[u8]| request(op::SET_REGS, vcpu, epoch, body);
    let cases: [Case; 12] = [
        (
            "framing before all",
            flagged(set(9, 9, &bad[..31])),
            (status::EPROTO, 0),
        ),
        (
            "operation before reserved",
            flagged(request(0x7777, 9, 9, &bad)),
            (status::EOPNOTSUPP, 0),
        ),
        (
            "reserved before vCPU",
            flagged(set(9, 9, &bad)),
            (status::EINVAL, 0),
        ),
        ("vCPU before epoch", set(9, 9, &bad), (status::ENXIO, 0)),
        ("epoch before phase", set(0, 9, &bad), (status::ESTALE, 0)),
        (
            "phase before values",
            set(0, 1, &bad),
            (status::EBUSY, phase::RUNNING),
        ),
        (
            "values before room",
            set(0, 1, &regs_body(&[(CTL, 1), (1, 1)])),
            (status::ENOENT, 1),
        ),
        (
            "room last",
            set(0, 1, &regs_body(&[(CTL, 1)])),
            (status::E2BIG, 24),
        ),
        (
            "VM-wide: vCPU before epoch",
            begin(0, 9, 0),
            (status::EINVAL, 0),
        ),
        (
            "VM-wide: unknown flags before epoch",
            begin(VM, 9, 8),
            (status::EINVAL, 0),
        ),
        (
            "VM-wide: epoch before phase",
            begin(VM, 9, 0),
            (status::ESTALE, 0),
        ),
        (
            "VM-wide: phase before values",
            begin(VM, 1, 0),
            (status::EBUSY, phase::RUNNING),
        ),
    ];
    let mut vm = on.running(2);
    let before = vm.snapshot();
    for (what, bytes, outcome) in cases {
        assert_eq!(vm.raw(&bytes, 16).outcome(), outcome, "{what}");
    }
    assert_eq!(vm.snapshot(), before);
}

fn ebusys_detail_is_the_phase_or_while_restoring_the_vcpus_missing(on: World) {
    let mut vm = on.fresh();
    assert_eq!(vm.refused(op::RESUME, VM, &[]), (status::EBUSY, phase::NEW));
    assert_eq!(
        vm.refused(op::PAUSE, VM, &pause_body(0)),
        (status::EBUSY, phase::NEW)
    );
    vm.configure(3);
    assert_eq!(
        vm.refused(op::RESTORE_ABORT, VM, &[]),
        (status::EBUSY, phase::PAUSED)
    );
    vm.resume();
    let busy = (status::EBUSY, phase::RUNNING);
    assert_eq!(
        vm.refused(op::SET_COUNTER_OFFSET, VM, &words(&[0, 0])),
        busy
    );
    assert_eq!(
        vm.refused(op::RESTORE_BEGIN, VM, &restore_body(3, 0, 0, 0)),
        busy
    );
    vm.pause();
    vm.restore_begin(3, 0);
    for missing in [3, 2, 1] {
        assert_eq!(vm.refused(op::RESUME, VM, &[]), (status::EBUSY, missing));
        vm.restored(missing - 1, 1);
    }
    assert_eq!(
        vm.refused(op::RESTORE_ABORT, VM, &[]),
        (status::EBUSY, phase::PAUSED)
    );
    vm.resume();
}
