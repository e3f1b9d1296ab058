//! Timer registers and offsets between a real KVM and the backend, with no guest that runs.

use serde_json::Value;
use vhost_user_timer_kit::qemu::Kernel;

use crate::machine::on;

/// Everything of a timer that is no count. ISTATUS is left out of CTL: KVM returns it as it was
/// last computed, the backend computes it.
fn armed(vcpu: &Value) -> [u64; 4] {
    const ISTATUS: u64 = 1 << 2;
    [
        number(vcpu, "TIMER_CTL") & !ISTATUS,
        number(vcpu, "TIMER_CVAL"),
        number(vcpu, "PTIMER_CTL") & !ISTATUS,
        number(vcpu, "PTIMER_CVAL"),
    ]
}

fn number(object: &Value, name: &str) -> u64 {
    object[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name} of {object}"))
}

fn list<'a>(object: &'a Value, name: &str) -> &'a [Value] {
    object[name]
        .as_array()
        .unwrap_or_else(|| panic!("{name} of {object}"))
}

/// Asserts that each count may be exactly what one offset makes it. Returns within how many ticks
/// that is known: each bracket is of the same difference, so it lies in all of them.
fn assert_exact(object: &Value, name: &str) -> i64 {
    let ends = list(object, name).iter().map(|bracket| {
        let [least, most] = [0, 1].map(|end| bracket[end].as_i64().expect("ticks"));
        assert!(least <= 0 && 0 <= most, "{name}: {bracket}");
        (least, most)
    });
    let (least, most) = ends.fold((i64::MIN, i64::MAX), |(least, most), bracket| {
        (least.max(bracket.0), most.min(bracket.1))
    });
    most - least
}

/// Asserts that what was read from KVM came back from the backend, and from KVM again.
fn assert_identity(round: &Value) {
    let vcpus = list(round, "kvm");
    assert_eq!(vcpus.len(), 4);
    let others = list(round, "backend").iter().zip(list(round, "kvm_again"));
    for (kvm, (backend, again)) in vcpus.iter().zip(others) {
        assert_eq!(armed(backend), armed(kvm));
        assert_eq!(armed(again), armed(kvm));
        assert_eq!(number(backend, "TIMER_CNT"), number(kvm, "TIMER_CNT"));
        // One offset: the physical count is the virtual one, whatever was written.
        assert_eq!(number(backend, "PTIMER_CNT"), number(kvm, "TIMER_CNT"));
    }
    assert_eq!(round["cntvoff"], round["cntpoff"]);
    for name in ["virt_ahead", "phys_ahead"] {
        let width = assert_exact(round, name);
        println!("{name}: 0 ticks, known to within {width}");
    }
}

#[test]
fn registers_of_kvm_come_back_from_the_backend_as_they_were() {
    on(Kernel::Newest, |machine| {
        let answer = machine.answer("kvm-agent round-trip vhost-user-timer");
        // The guest's CNTPCT is the host's counter here, since the offset was never set.
        let first = &answer["before_apply"];
        let kvm = &list(first, "kvm")[0];
        assert!(
            number(kvm, "PTIMER_CNT") > number(kvm, "TIMER_CNT"),
            "{kvm}"
        );
        assert_identity(first);
        assert_identity(&answer["after_apply"]);
    });
}

#[test]
fn a_pause_through_which_time_goes_on_moves_no_count() {
    on(Kernel::Newest, |machine| {
        let answer = machine.answer("kvm-agent counting vhost-user-timer 50");
        assert_eq!(list(&answer, "moved"), vec![Value::from(0); 50]);
        let width = assert_exact(&answer, "ahead");
        println!("KVM's count, by the offset of before: 0 ticks, known to within {width}");
    });
}

/// What a refusal from the closure of a resume begins with: the VM stays ARMED.
const NOT_APPLIED: &str =
    "ARMED: the VM's offsets were not applied to the hypervisor, so no vCPU runs: ";

#[test]
fn each_reason_for_a_refusal_is_told_apart() {
    on(Kernel::Newest, |machine| {
        let refusals = machine.answer("kvm-agent refusals vhost-user-timer");
        // Each named by what is there instead. The library's own tests compare the texts in full.
        let from_the_closure = [
            ("source", "counts by monotonic"),
            ("anchored", "SET_COUNTER_ANCHOR"),
            ("frequency", "the VM counts at 24000000 Hz"),
            ("two_offsets", "the VM's offsets differ (cntvoff 0x"),
        ];
        for (name, reason) in from_the_closure {
            let error = refusals[name].as_str().expect(name);
            let cause = error.strip_prefix(NOT_APPLIED);
            assert!(
                cause.is_some_and(|cause| cause.contains(reason)),
                "{name}: {error}"
            );
        }
        let others = [
            ("not_armed", "the VM is PAUSED"),
            ("confirm", "the VM is configured with CONFIRM"),
        ];
        for (name, reason) in others {
            let error = refusals[name].as_str().expect(name);
            assert!(error.starts_with(reason), "{name}: {error}");
        }
        let count = refusals.as_object().map(|refusals| refusals.len());
        assert_eq!(count, Some(from_the_closure.len() + others.len()));
    });
}

/// Its host cannot look into it (KVM_VM_TYPE_ARM_PROTECTED).
#[test]
fn the_offset_of_a_protected_vm_is_refused() {
    on(Kernel::Protected, |machine| {
        let answer = machine.answer("kvm-agent protected vhost-user-timer");
        let error = answer["protected"].as_str().expect("an error");
        let reason = "the VM has no KVM_CAP_COUNTER_OFFSET";
        assert!(
            error.starts_with(&format!("{NOT_APPLIED}{reason}")),
            "{error}"
        );
    });
}

/// One write of TIMER_CNT for the VM. KVM subtracts it from a reading of its own, so the offset is
/// known to within the time that the ioctl took.
#[test]
fn before_linux_6_4_one_write_moves_every_vcpu_and_the_offset_is_known_to_within_a_bracket() {
    on(Kernel::Bookworm, |machine| {
        let answer = machine.answer("kvm-agent best-effort vhost-user-timer");
        assert_eq!(answer["has_ptimer"], false);
        assert_eq!(answer["phys"], Value::Null);
        let [least, most] = [0, 1].map(|end| answer["virt"][end].as_i64().expect("ticks"));
        println!("KVM's count, by the backend's offset: {least} to {most} ticks ahead");
        // A vCPU that had an offset of its own would be ahead by milliseconds.
        let vcpus = list(&answer, "ahead");
        assert_eq!(vcpus.len(), 4);
        for vcpu in vcpus {
            let ahead = [0, 1].map(|end| vcpu[end].as_i64().expect("ticks"));
            assert!(
                ahead[0] <= most && least <= ahead[1],
                "{vcpu} and {least} to {most}"
            );
        }
    });
}
