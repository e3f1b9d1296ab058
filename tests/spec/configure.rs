//! SPEC.md, CONFIGURE_VM: which VMs there can be.

use vhost_user_timer_kit::contract::{Info, VM, configure_body, op, phase, status};
use vhost_user_timer_model::vm::MAX_FREQUENCY;

use crate::world::{Clock, HZ, Options, World};

scenarios! {
    both {
        configuring_leads_to_paused_with_virtual_count_and_physical_offset_zero: "3.1" "3.8";
        configuring_the_same_again_is_fine_in_any_phase_and_other_values_are_ebusy: "5.2" "5.25";
        a_vm_has_at_least_one_vcpu_and_at_most_those_of_the_backend: "5.20" "5.24";
        an_unknown_abi_is_einval: "5.21" "5.24";
        a_frequency_is_any_up_to_the_highest_and_zero_is_the_backends: "5.22" "5.24";
        a_backend_of_one_frequency_refuses_every_other: "5.22" "5.23" "5.24";
        an_unknown_flag_or_reserved_byte_of_configure_vm_is_einval: "2.3";
    }
}

fn configuring_leads_to_paused_with_virtual_count_and_physical_offset_zero(on: World) {
    let mut vm = on.fresh();
    vm.configure(4);
    let info = vm.info();
    assert_eq!((info.phase, info.epoch), (phase::PAUSED, 1));
    assert_eq!((info.vcpus, info.restored), (4, 4));
    // Frozen at 0, so the offset is the whole host counter.
    assert_eq!((info.cntvoff, info.cntpoff), (info.host_count, 0));
    vm.pass(HZ / 1_000);
    assert_eq!(vm.state().virt_count, 0, "the virtual clock is frozen");
    assert_eq!(vm.virt(), 0);
    vm.reads_now(Clock::Physical, |vm| vm.info().host_count);
}

fn configuring_the_same_again_is_fine_in_any_phase_and_other_values_are_ebusy(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 4);
        let before = vm.snapshot();
        let again = [configure_body(4, 0, 0), configure_body(4, 0, HZ)];
        for body in again {
            vm.vm(op::CONFIGURE_VM, &body).ok(0);
        }
        assert_eq!(vm.snapshot(), before);
        let detail = match wanted {
            phase::RESTORING => 4,
            other => other,
        };
        for other in [
            configure_body(5, 0, HZ),
            configure_body(2, 0, 0),
            configure_body(4, 1, HZ),
            configure_body(4, 0, HZ + 1),
            configure_body(4, 0, 1_000),
            configure_body(0, 0, HZ),
            configure_body(4, 9, HZ),
        ] {
            let outcome = vm.refused(op::CONFIGURE_VM, VM, &other);
            assert_eq!(outcome, (status::EBUSY, detail));
        }
        assert_eq!(vm.snapshot(), before);
    }
    // The 32-bit ABI is among the values.
    let mut vm = on.fresh();
    for wanted in [
        phase::PAUSED,
        phase::PAUSED,
        phase::RUNNING,
        phase::RESTORING,
    ] {
        if wanted == phase::RUNNING {
            vm.resume();
        } else if wanted == phase::RESTORING {
            vm.pause();
            vm.restore_begin(3, 0);
        }
        vm.configure_as(3, 1, 0);
        vm.configure_as(3, 1, HZ);
        assert_eq!(vm.phase(), wanted);
    }
}

fn configured(on: World, options: Options, body: &[u8]) -> (u32, Info) {
    let mut vm = on.with(options);
    let answer = vm.vm(op::CONFIGURE_VM, body);
    assert_eq!(answer.detail, 0);
    let info = vm.info();
    let entered = [phase::NEW, phase::PAUSED][usize::from(answer.status == status::OK)];
    assert_eq!(info.phase, entered);
    (answer.status, info)
}

fn a_vm_has_at_least_one_vcpu_and_at_most_those_of_the_backend(on: World) {
    let options = Options {
        max_vcpus: 8,
        ..Options::default()
    };
    for (vcpus, right) in [
        (0, false),
        (1, true),
        (8, true),
        (9, false),
        (u32::MAX, false),
    ] {
        let (status, info) = configured(on, options, &configure_body(vcpus, 0, 0));
        assert_eq!(
            status,
            if right { status::OK } else { status::EINVAL },
            "{vcpus}"
        );
        assert_eq!(info.vcpus, if right { vcpus } else { 0 });
    }
}

fn an_unknown_abi_is_einval(on: World) {
    for abi in [2, 3, 0xff] {
        let (status, _) = configured(on, Options::default(), &configure_body(1, abi, 0));
        assert_eq!(status, status::EINVAL);
    }
    for abi in [0, 1] {
        let (status, info) = configured(on, Options::default(), &configure_body(1, abi, 0));
        assert_eq!((status, info.abi), (status::OK, abi));
    }
}

fn a_frequency_is_any_up_to_the_highest_and_zero_is_the_backends(on: World) {
    assert_eq!(MAX_FREQUENCY, 10_000_000_000);
    for (asked, taken) in [
        (0, Some(HZ)),
        (1, Some(1)),
        (62_500_000, Some(62_500_000)),
        (MAX_FREQUENCY, Some(MAX_FREQUENCY)),
        (MAX_FREQUENCY + 1, None),
        (u64::MAX, None),
    ] {
        let (status, info) = configured(on, Options::default(), &configure_body(1, 0, asked));
        match taken {
            Some(frequency) => assert_eq!((status, info.frequency), (status::OK, frequency)),
            None => assert_eq!(status, status::EINVAL),
        }
    }
    let mut vm = on.fresh();
    vm.configure_as(1, 0, 62_500_000);
    assert_eq!(vm.state().frequency, 62_500_000);
}

fn a_backend_of_one_frequency_refuses_every_other(on: World) {
    const ONE: u64 = 24_000_000;
    let options = Options {
        frequency: Some(ONE),
        ..Options::default()
    };
    for (asked, right) in [
        (0, true),
        (ONE, true),
        (ONE - 1, false),
        (1, false),
        (HZ, false),
    ] {
        let (status, info) = configured(on, options, &configure_body(1, 0, asked));
        assert_eq!(
            status,
            if right { status::OK } else { status::EINVAL },
            "{asked}"
        );
        assert_eq!(info.frequency, ONE);
    }
}

fn an_unknown_flag_or_reserved_byte_of_configure_vm_is_einval(on: World) {
    let mut vm = on.fresh();
    // Byte 5 has two flags.
    for (at, value) in [(5, 4), (5, 0x80), (5, 0xff), (6, 1), (7, 1)] {
        let mut body = configure_body(1, 0, 0);
        body[at] = value;
        let outcome = vm.refused(op::CONFIGURE_VM, VM, &body);
        assert_eq!(outcome, (status::EINVAL, 0));
    }
    assert_eq!(vm.phase(), phase::NEW);
}
