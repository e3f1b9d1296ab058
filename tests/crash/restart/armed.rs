//! A VM that is ARMED when the backend ends: the offsets are decided, and perhaps in the hypervisor
//! already, so they must be the same ones afterwards.

use vhost_user_timer_kit::confirming::{CONFIRM, ONE_OFFSET};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PHASE_CHANGED, Run, TIMER_ASSERTED, VM, info_flag, op, phase, request,
    restore, restore_body, status,
};
use vhost_user_timer_kit::raw_driver::Rig;

use super::*;

const VCPUS: u32 = 3;

/// Files that the programs of state-file versions 3 and 4 left, but for the boot id: a VM of four
/// vCPUs with CONFIRM and ONE_OFFSET, ARMED by a restore in which vCPU n brought 2^40 + n for every
/// register.
const ARMED: [&[u8]; 2] = [
    include_bytes!("../../../backend/tests/data/state-file/3.bin"),
    include_bytes!("../../../backend/tests/data/state-file/4-armed.bin"),
];

/// A backend, and a client of it.
fn serve(life: &Life) -> (Rig, Client) {
    let rig = Rig::watch(life.launch(&[]));
    let client = Client::connect(&rig);
    (rig, client)
}

fn end(mut rig: Rig, client: Client, end: End) {
    match end {
        End::Killed => drop(rig.backend.kill()),
        End::Terminated => assert!(rig.backend.terminate().success()),
    }
    drop(client);
}

/// A restore of a paused VM whose vCPU 1 has TIMER_CVAL 77 and whose count is 123,456, up to ARMED.
fn arm_by_restore(client: &mut Client, timeout: Duration) {
    client.configure_confirming(VCPUS);
    client.set(1, &[(CVAL, 77)]);
    client.set(0, &[(CNT, 123_456)]);
    let timeout = timeout.as_nanos() as u64;
    let begin = restore_body(VCPUS, restore::AUTORUN, 0, timeout);
    client.vm(op::RESTORE_BEGIN, &begin).ok(0);
    for vcpu in 0..VCPUS {
        client.bring(vcpu, 5_000 + u64::from(vcpu));
        client.restore_done(vcpu);
    }
    assert_eq!(client.info().phase, phase::ARMED);
}

#[test]
fn a_restore_in_armed_comes_back_with_the_same_offsets_and_what_each_vcpu_brought() {
    for how in ENDS {
        let life = Life::new();
        let (rig, mut client) = serve(&life);
        arm_by_restore(&mut client, Duration::ZERO);
        let before = client.info();
        client.wait_run(1, 0);
        client.settle();
        end(rig, client, how);

        let (_rig, mut client) = serve(&life);
        let after = client.info();
        assert_eq!((after.phase, after.epoch), (phase::ARMED, before.epoch));
        assert_eq!(
            (after.cntvoff, after.cntpoff),
            (before.cntvoff, before.cntpoff)
        );
        assert_eq!((after.restored, after.flags), (VCPUS, before.flags));
        assert_ne!(after.flags & info_flag::CONFIRM, 0);
        // It is still that restore: RESTORE_DONE is fine, and repeats.
        for vcpu in 0..VCPUS {
            assert_eq!(client.restore_done(vcpu), 0);
        }
        let waiting = [0, 1].map(|vcpu| client.wait_run(1, vcpu));
        client.settle();
        let answer = client.confirm_offsets(before.cntvoff ^ 1, before.cntpoff);
        assert_eq!(answer.outcome(), (status::EINVAL, 0));
        let confirm = client.confirm_offsets(before.cntvoff, before.cntpoff);
        let run = Run::of(confirm.ok(40));
        assert!(run.virt_count >= 5_002);
        for answer in client.all_released(1, &waiting) {
            assert_eq!(Run::of(answer.ok(40)), run);
        }
        assert_eq!(client.info().phase, phase::RUNNING);
    }
}

#[test]
fn a_restore_in_armed_that_is_aborted_after_a_restart_leads_back_to_the_vm_from_before() {
    let life = Life::new();
    let (rig, mut client) = serve(&life);
    arm_by_restore(&mut client, Duration::ZERO);
    end(rig, client, End::Killed);

    let (_rig, mut client) = serve(&life);
    let waiting = client.wait_run(1, 2);
    client.settle();
    let abort = request(op::RESTORE_ABORT, VM, 0, &[]);
    let layout = client.layout.clone();
    let aborted = client.driver.submit(1, &abort, 16, &layout);
    let [waited, aborted] = client
        .all_released(1, &[waiting, aborted])
        .try_into()
        .unwrap();
    assert_eq!(waited.outcome(), (status::ECANCELED, 0));
    aborted.ok(0);
    assert_eq!(client.info().phase, phase::PAUSED);
    let state = client.state();
    assert_eq!(state.virt_count, 123_456);
    assert_eq!(state.vcpus[1].registers[2], 77);
}

#[test]
fn a_restore_that_begins_again_in_armed_after_a_restart_begins_from_the_vm_from_before() {
    let life = Life::new();
    let (rig, mut client) = serve(&life);
    arm_by_restore(&mut client, Duration::ZERO);
    let epoch = client.info().epoch;
    end(rig, client, End::Killed);

    let (_rig, mut client) = serve(&life);
    assert_eq!(client.restore_begin(VCPUS, restore::AUTORUN), epoch + 1);
    assert_eq!(client.get_one(1, CVAL), 77);
    assert_eq!(client.get_one(0, CNT), 123_456);
    let lacks = client.vcpu(op::RESTORE_DONE, 0, &[]);
    assert_eq!(lacks.status, status::ENODATA);
}

#[test]
fn a_vm_that_resume_armed_comes_back_armed_without_a_restore() {
    for how in ENDS {
        let life = Life::new();
        let (rig, mut client) = serve(&life);
        client.configure_confirming(VCPUS);
        let before = client.resume();
        end(rig, client, how);

        let (_rig, mut client) = serve(&life);
        let info = client.info();
        assert_eq!(info.phase, phase::ARMED);
        assert_eq!(
            (info.cntvoff, info.cntpoff),
            (before.cntvoff, before.cntpoff)
        );
        for op in [op::RESTORE_DONE, op::RESTORE_ABORT] {
            let vcpu = if op == op::RESTORE_DONE { 0 } else { VM };
            let refused = client.vcpu(op, vcpu, &[]);
            assert_eq!(refused.outcome(), (status::EBUSY, phase::ARMED));
        }
        let again = client.resume();
        assert_eq!(
            (again.cntvoff, again.cntpoff),
            (before.cntvoff, before.cntpoff)
        );
        client.confirm();
        assert_eq!(client.info().phase, phase::RUNNING);
    }
}

#[test]
fn the_time_out_of_a_restore_in_armed_goes_on_and_the_log_names_confirm_run() {
    with_a_time_out(|time_out| {
        let life = Life::new();
        let (rig, mut client) = serve(&life);
        let began = Instant::now();
        arm_by_restore(&mut client, time_out.length());
        end(rig, client, End::Killed);

        let (rig, mut client) = serve(&life);
        let waiting = client.wait_run(1, 1);
        client.settle();
        time_out.scene_is_set()?;
        let late = client.released(1, waiting);
        assert!(began.elapsed() >= time_out.length());
        assert_eq!(late.outcome(), (status::ETIMEDOUT, 0));
        assert_eq!(client.info().phase, phase::ARMED);
        rig.log_with(
            "Restore timed out: all 3 vCPUs are restored, and CONFIRM_RUN is missing; the VM \
             stays ARMED",
        );
        client.confirm();
        Some(())
    });
}

#[test]
fn the_flags_of_a_vm_are_kept_in_every_phase() {
    for flags in [CONFIRM, ONE_OFFSET, CONFIRM | ONE_OFFSET] {
        let life = Life::new();
        let (rig, mut client) = serve(&life);
        assert_eq!(client.configure_flags(VCPUS, flags), (0, 0));
        let before = client.info().flags;
        end(rig, client, End::Killed);

        let (rig, mut client) = serve(&life);
        assert_eq!(client.info().flags, before);
        assert_eq!(client.configure_flags(VCPUS, flags), (0, 0));
        let others = [0, CONFIRM, ONE_OFFSET, CONFIRM | ONE_OFFSET];
        for other in others.into_iter().filter(|other| *other != flags) {
            let refused = client.configure_flags(VCPUS, other);
            assert_eq!(refused, (status::EBUSY, phase::PAUSED));
        }
        client.restore_begin(VCPUS, 0);
        end(rig, client, End::Killed);

        let (_rig, mut client) = serve(&life);
        client.vm(op::RESTORE_ABORT, &[]).ok(0);
        assert_eq!(client.info().flags, before);
    }
}

#[test]
fn a_timer_that_falls_due_in_armed_fires_when_the_vm_runs_and_not_before() {
    let life = Life::new();
    let (rig, mut client) = serve(&life);
    client.configure_confirming(1);
    client.set(0, &[(CVAL, 0), (CTL, 1)]);
    client.resume();
    end(rig, client, End::Killed);

    let (_rig, mut client) = serve(&life);
    client.post_event_buffer();
    client.settle();
    assert!(client.driver.used_already(0).is_none(), "it fires in ARMED");
    client.confirm();
    assert_eq!(client.event().what(), (PHASE_CHANGED, 0, phase::RUNNING));
    client.post_event_buffer();
    assert_eq!(client.event().what(), (TIMER_ASSERTED, 0, 0));
}

#[test]
fn a_restore_that_an_earlier_program_left_in_armed_is_confirmed_with_its_offsets() {
    for file in ARMED {
        let life = Life::new();
        state_file::write(&life.file(), &state_file::of_this_boot(file)).unwrap();
        let mut offsets = None;
        // The second backend reads what the first one made of the file.
        for how in ENDS {
            let (rig, mut client) = serve(&life);
            let info = client.info();
            assert_eq!((info.phase, info.restored), (phase::ARMED, 4));
            let found = (info.cntvoff, info.cntpoff);
            assert_eq!(found.0, found.1, "ONE_OFFSET");
            assert_eq!(*offsets.get_or_insert(found), found);
            end(rig, client, how);
        }
        let (_rig, mut client) = serve(&life);
        let waiting = client.wait_run(1, 3);
        client.settle();
        let (cntvoff, cntpoff) = offsets.unwrap();
        let run = Run::of(client.confirm_offsets(cntvoff, cntpoff).ok(40));
        assert_eq!(run.virt_count, run.host_count.wrapping_sub(cntvoff));
        assert!(run.virt_count >= (1 << 40) + 3);
        assert_eq!(Run::of(client.released(1, waiting).ok(40)), run);
        for vcpu in 0..4 {
            assert_eq!(client.get_one(vcpu, CVAL), (1 << 40) + u64::from(vcpu));
        }
        assert_eq!(client.info().phase, phase::RUNNING);
    }
}
