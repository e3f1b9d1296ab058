//! SPEC.md, "Phases": which operation is accepted when, and where it leads.

use vhost_user_timer_kit::contract::{
    self, CNT, CTL, CVAL, Client, Event, PHASE_CHANGED, VM, configure, configure_body, op,
    pause_body, phase, range_body, regs_body, restore, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::Rig;
use vhost_user_timer_model::vm::Notice;
use vhost_user_timer_protocol::Phase;

use crate::world::{Clock, PHASES, Vm, World};

scenarios! {
    both {
        a_vm_begins_new_in_epoch_1_without_vcpus: "3.9" "5.40";
        every_operation_is_accepted_in_its_phases_and_is_ebusy_in_the_others:
            "2.34" "2.52" "5.1" "5.2" "5.3" "5.4" "5.5" "5.6" "5.7" "5.8" "5.9" "5.10" "5.11" "5.12"
            "5.13" "5.14" "5.15" "5.16" "6.10" "6.13";
        resume_and_pause_go_between_paused_and_running: "3.2" "3.4" "3.11";
        pausing_a_paused_vm_changes_nothing: "5.10";
        resuming_a_running_vm_changes_nothing: "5.11" "8.10";
        unknown_pause_flags_and_a_reserved_half_are_einval: "2.3";
        the_last_restore_done_leads_to_running_with_autorun_and_to_paused_without:
            "3.3" "3.5" "7.4";
        the_epoch_grows_by_one_at_every_restore_begin_and_by_nothing_else: "3.9" "3.10" "3.11";
        a_reset_leads_to_new_and_keeps_the_epoch: "1.18" "1.19" "3.11";
        every_change_of_phase_is_reported_and_nothing_else_is: "8.8";
    }
    binary {
        without_options_a_backend_takes_512_vcpus_and_has_one_request_queue: "5.40";
        the_epoch_outlives_the_process_with_a_state_file: "3.12";
    }
}

fn a_vm_begins_new_in_epoch_1_without_vcpus(on: World) {
    let info = on.fresh().info();
    assert_eq!((info.version, info.phase, info.epoch), (1, phase::NEW, 1));
    assert_eq!((info.vcpus, info.restored, info.flags), (0, 0, 0));
    assert_eq!((info.cntvoff, info.cntpoff), (0, 0));
    assert_eq!((info.max_vcpus, info.request_queues), (4096, 4));
}

fn without_options_a_backend_takes_512_vcpus_and_has_one_request_queue() {
    let info = Client::connect(&Rig::launch_release(&[])).info();
    assert_eq!((info.max_vcpus, info.request_queues), (512, 1));
}

/// An operation, where it goes, a body that it accepts for two vCPUs, and its phases.
type Row = (&'static str, u16, u32, Vec<u8>, &'static [u32]);

fn table() -> Vec<Row> {
    use phase::{ARMED, NEW, PAUSED, RESTORING, RUNNING};
    let configured = &PHASES[1..];
    let count = regs_body(&[(CNT, 1)]);
    let ctl = regs_body(&[(CTL, 1)]);
    vec![
        ("GET_INFO", op::GET_INFO, VM, vec![], &PHASES),
        (
            "CONFIGURE_VM, the same",
            op::CONFIGURE_VM,
            VM,
            configure_body(2, 0, 0),
            &PHASES,
        ),
        (
            "CONFIGURE_VM, others",
            op::CONFIGURE_VM,
            VM,
            configure_body(3, 0, 0),
            &[NEW],
        ),
        ("GET_REG_LIST", op::GET_REG_LIST, 0, vec![], configured),
        ("GET_REGS", op::GET_REGS, 0, words(&[CNT]), configured),
        ("SET_REGS", op::SET_REGS, 0, ctl, configured),
        (
            "SET_REGS, a count",
            op::SET_REGS,
            0,
            count,
            &[PAUSED, RESTORING],
        ),
        ("GET_VM", op::GET_VM, VM, range_body(0, 2), configured),
        ("SET_VM", op::SET_VM, VM, vec![], &[RESTORING]),
        (
            "SET_COUNTER_OFFSET",
            op::SET_COUNTER_OFFSET,
            VM,
            words(&[1, 0]),
            &[PAUSED, RESTORING],
        ),
        (
            "SET_COUNTER_ANCHOR",
            op::SET_COUNTER_ANCHOR,
            VM,
            words(&[1, 1]),
            &[PAUSED],
        ),
        (
            "PAUSE",
            op::PAUSE,
            VM,
            pause_body(0),
            &[PAUSED, RUNNING, ARMED],
        ),
        ("RESUME", op::RESUME, VM, vec![], &[PAUSED, RUNNING, ARMED]),
        (
            "CONFIRM_RUN",
            op::CONFIRM_RUN,
            VM,
            vec![],
            &[RUNNING, ARMED],
        ),
        (
            "RESTORE_BEGIN",
            op::RESTORE_BEGIN,
            VM,
            restore_body(2, 0, 0, 0),
            &[PAUSED, RESTORING, ARMED],
        ),
        ("RESTORE_DONE", op::RESTORE_DONE, 0, vec![], &[RESTORING]),
        ("WAIT_RUN", op::WAIT_RUN, 0, vec![], configured),
        ("RESTORE_ABORT", op::RESTORE_ABORT, VM, vec![], &[RESTORING]),
        (
            "SET_TIME_PAGE",
            op::SET_TIME_PAGE,
            VM,
            words(&[0, 0]),
            &PHASES,
        ),
    ]
}

fn every_operation_is_accepted_in_its_phases_and_is_ebusy_in_the_others(on: World) {
    for wanted in PHASES {
        for (name, op, vcpu, mut body, phases) in table() {
            let mut vm = on.in_phase(wanted, 2);
            match op {
                op::CONFIRM_RUN => body = words(&vm.offsets()),
                // The VM's flags are those of its configuration.
                op::CONFIGURE_VM if wanted == phase::ARMED => body[5] = configure::CONFIRM,
                _ => {}
            }
            if wanted == phase::RESTORING {
                vm.bring(0, 1);
            }
            let detail = match wanted {
                phase::RESTORING => 2,
                other => other,
            };
            let accepted = phases.contains(&wanted);
            if op == op::WAIT_RUN && accepted && wanted != phase::RUNNING {
                vm.wait(0);
                continue;
            }
            if accepted {
                let answer = vm.ask(op, vcpu, 0, &body);
                assert_eq!(answer.outcome(), (status::OK, 0), "{name} in {wanted}");
            } else {
                let before = vm.snapshot();
                let outcome = vm.refused(op, vcpu, &body);
                assert_eq!(outcome, (status::EBUSY, detail), "{name} in {wanted}");
                assert_eq!(vm.snapshot(), before, "{name} in {wanted}");
            }
        }
    }
}

fn resume_and_pause_go_between_paused_and_running(on: World) {
    let mut vm = on.paused(1);
    for _ in 0..3 {
        vm.resume();
        assert_eq!(vm.phase(), phase::RUNNING);
        vm.pause();
        assert_eq!(vm.phase(), phase::PAUSED);
    }
    assert_eq!(vm.epoch(), 1);
}

fn pausing_a_paused_vm_changes_nothing(on: World) {
    // Frozen clocks stay frozen, with KEEP_COUNTING too.
    let mut vm = on.paused(1);
    vm.set(0, &[(CNT, 50)]);
    let before = vm.snapshot();
    assert_eq!(vm.pause().virt_count, 50);
    assert_eq!(vm.pause_counting().virt_count, 50);
    assert_eq!(vm.pause().virt_count, 50);
    assert_eq!(vm.snapshot(), before);
    // Counting clocks go on counting.
    let mut vm = on.running(1);
    let running = vm.pause_counting();
    let before = vm.snapshot();
    vm.pass(5);
    let paused = vm.pause();
    assert_eq!(paused.cntvoff, running.cntvoff);
    assert_eq!(vm.snapshot(), before, "not even the clocks are frozen");
}

fn resuming_a_running_vm_changes_nothing(on: World) {
    let mut vm = on.paused(2);
    let first = vm.resume();
    vm.events();
    assert_eq!(vm.arm(1, Clock::Virtual, 1, 0), 1);
    vm.pass(10);
    let before = vm.snapshot();
    let second = vm.resume();
    assert_eq!(vm.snapshot(), before);
    assert_eq!(second.cntvoff, first.cntvoff);
    let passed = second.host_count - first.host_count;
    assert_eq!(second.virt_count, first.virt_count + passed);
    assert_eq!(vm.events(), [], "and no line is reported again");
}

fn unknown_pause_flags_and_a_reserved_half_are_einval(on: World) {
    let mut vm = on.running(1);
    for word in [2, 3, 1 << 31, 1 << 32, u64::MAX] {
        let outcome = vm.refused(op::PAUSE, VM, &words(&[word]));
        assert_eq!(outcome, (status::EINVAL, 0), "{word:#x}");
    }
    assert_eq!(vm.phase(), phase::RUNNING);
}

fn the_last_restore_done_leads_to_running_with_autorun_and_to_paused_without(on: World) {
    for (flags, end) in [(0, phase::PAUSED), (restore::AUTORUN, phase::RUNNING)] {
        let mut vm = on.restoring(2, flags);
        assert_eq!(vm.restored(1, 9), 1);
        assert_eq!(vm.phase(), phase::RESTORING);
        assert_eq!(vm.restored(0, 9), 0);
        assert_eq!(vm.phase(), end);
    }
}

fn the_epoch_grows_by_one_at_every_restore_begin_and_by_nothing_else(on: World) {
    let mut vm = on.fresh();
    assert_eq!(vm.epoch(), 1);
    vm.configure(1);
    vm.resume();
    vm.pause();
    vm.set_offset(1);
    assert_eq!(vm.epoch(), 1);
    assert_eq!(vm.restore_begin(1, 0), 2);
    assert_eq!(vm.restore_begin(1, 0), 3);
    vm.abort();
    assert_eq!(vm.restore_begin(1, 0), 4);
    vm.restored(0, 0);
    assert_eq!(vm.epoch(), 4);
    let refused = vm.refused(op::RESTORE_BEGIN, VM, &restore_body(2, 0, 0, 0));
    assert_eq!(refused, (status::EINVAL, 0));
    assert_eq!(vm.epoch(), 4);
    vm.driver.reconnect();
    assert_eq!(vm.epoch(), 4);
}

fn a_reset_leads_to_new_and_keeps_the_epoch(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 2);
        let epoch = vm.epoch();
        vm.driver.reset();
        let info = vm.info();
        assert_eq!((info.phase, info.epoch), (phase::NEW, epoch));
        assert_eq!((info.vcpus, info.restored, info.flags), (0, 0, 0));
        assert_eq!(vm.events(), []);
        if let Some(model) = vm.model() {
            assert_eq!(model.ticks_to_next(), None);
        }
        vm.configure_as(3, 1, 24_000_000);
        assert_eq!(vm.restore_begin(3, 0), epoch + 1);
    }
}

/// What is asked, and the phase that it leads to.
type Step = (u16, Vec<u8>, Option<u32>);

fn every_change_of_phase_is_reported_and_nothing_else_is(on: World) {
    let begin = || restore_body(1, restore::AUTORUN, 0, 0);
    let steps: [Step; 14] = [
        (
            op::CONFIGURE_VM,
            configure_body(1, 0, 0),
            Some(phase::PAUSED),
        ),
        (op::PAUSE, pause_body(0), None),
        (op::RESUME, vec![], Some(phase::RUNNING)),
        (op::RESUME, vec![], None),
        (op::GET_INFO, vec![], None),
        (op::RESTORE_ABORT, vec![], None),
        (op::PAUSE, pause_body(0), Some(phase::PAUSED)),
        (op::RESTORE_BEGIN, begin(), Some(phase::RESTORING)),
        (op::RESTORE_BEGIN, begin(), None),
        (op::SET_VM, contract::Vcpu::with(0, [0; 6]).to_bytes(), None),
        (op::RESTORE_ABORT, vec![], Some(phase::PAUSED)),
        (op::RESTORE_BEGIN, begin(), Some(phase::RESTORING)),
        (op::SET_VM, contract::Vcpu::with(0, [0; 6]).to_bytes(), None),
        (op::RESTORE_DONE, vec![], Some(phase::RUNNING)),
    ];
    let mut vm = on.fresh();
    for (op, body, entered) in steps {
        let from = vm.phase();
        let vcpu = if op == op::RESTORE_DONE { 0 } else { VM };
        vm.ask(op, vcpu, 0, &body);
        let epoch = vm.epoch();
        if let Some(model) = vm.model() {
            let notice = entered.map(|to| Notice::Phase {
                from: Phase::from_code(from).unwrap(),
                to: Phase::from_code(to).unwrap(),
                epoch,
            });
            assert_eq!(model.notices(), Vec::from_iter(notice));
        }
        let mut count = 0;
        let mut events = Vec::new();
        vm.reads_now(Clock::Virtual, |vm: &mut Vm| {
            events = vm.events();
            count = events
                .first()
                .map_or_else(|| vm.virt(), |event: &Event| event.count);
            count
        });
        let event = entered.map(|phase| Event {
            kind: PHASE_CHANGED,
            timer: 0,
            vcpu: phase,
            cval: 0,
            count,
            epoch,
        });
        assert_eq!(events, Vec::from_iter(event), "{op:#x}");
    }
    // The value of a CVAL or a CTL is no phase.
    vm.set(0, &[(CTL, 1), (CVAL, u64::MAX)]);
    assert_eq!(vm.events(), []);
}

fn the_epoch_outlives_the_process_with_a_state_file() {
    use vhost_user_timer_kit::backend_process::Devices;
    let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    assert_eq!(client.restore_begin(1, 0), 2);
    let rig = rig.die_and_go_on(|| drop(client), &[]);
    let mut client = Client::connect(&rig);
    assert_eq!(client.info().epoch, 2);
    assert_eq!(client.restore_begin(1, 0), 3);
}
