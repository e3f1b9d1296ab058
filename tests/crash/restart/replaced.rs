//! The program is replaced by a newer one under a live VMM: the state file is one that an earlier
//! version of the program left when it was killed.

use std::thread;

use vhost_user_timer_frontend::{Reconnect, SavedVm};
use vhost_user_timer_kit::backend_process::find_program;

use super::*;

/// Files that the program of state-file version 2 left, but for the boot id, which is all zeros.
///
/// The VM has three vCPUs, in epoch 2. RUNNING: an AUTORUN restore brought `row(n, 1 << 50)` for
/// each. RESTORING: before the restore, vCPU 0 set TIMER_CNT to 123,456 and vCPU 1 TIMER_CVAL to
/// 77; in it, vCPU 0 brought `row(0, 9_000)` and is done, and vCPU 1 brought `row(1, 5_000)`.
const RUNNING: &[u8] = include_bytes!("../../../backend/tests/data/state-file/2-running.bin");
const RESTORING: &[u8] = include_bytes!("../../../backend/tests/data/state-file/2-restoring.bin");

/// The offsets in the file of the RUNNING VM.
const CNTVOFF: u64 = 0xfffc_0af6_4495_f680;
const CNTPOFF: u64 = CNTVOFF - 7;

/// A life whose earlier backend left this file.
fn left_by_version_2(file: &[u8]) -> Life {
    let life = Life::new();
    state_file::write(&life.file(), &state_file::of_this_boot(file)).unwrap();
    life
}

#[test]
fn a_running_vm_of_version_2_goes_on_with_its_offsets_and_registers() {
    let life = left_by_version_2(RUNNING);
    // The second backend reads what the first one made of the file.
    for end in ENDS {
        let served = life.serve();
        // A VMM that does not know whether its VM is there configures it again.
        served.configure(3);
        let info = served.info();
        assert_eq!((info.phase, info.epoch), (Phase::Running, 2));
        assert_eq!((info.cntvoff, info.cntpoff), (CNTVOFF, CNTPOFF));
        assert!(info.phys_virtualised && !info.offset_pinned && !info.anchored);
        for (vcpu, after) in (0..).zip(&served.vm(3).vcpus) {
            let before = row(vcpu, 0);
            for register in [Register::TimerCval, Register::PtimerCval] {
                assert_eq!(after.get(register), before.get(register));
            }
            let ctl = after.get(Register::TimerCtl).unwrap();
            assert_eq!(ctl & (ctl::ENABLE | ctl::IMASK), ctl::IMASK);
        }
        let run = served.queue().wait_run(1, LIMIT).unwrap();
        assert_eq!((run.cntvoff, run.cntpoff), (CNTVOFF, CNTPOFF));
        assert_eq!(run.virt_count, run.host_count.wrapping_sub(CNTVOFF));
        served.end(end);
    }
    let served = life.serve();
    let paused = served.queue().pause(LIMIT).unwrap();
    let resumed = served.queue().resume(LIMIT).unwrap();
    assert_eq!(resumed.virt_count, paused.virt_count);
    assert_eq!(resumed.phys_count, paused.phys_count);
}

#[test]
fn a_restore_of_version_2_goes_on_and_the_gate_opens_at_the_last_vcpu() {
    let life = left_by_version_2(RESTORING);
    let served = life.serve();
    let info = served.info();
    assert_eq!(
        (info.phase, info.epoch, info.restored),
        (Phase::Restoring, 2, 1)
    );
    the_gate_opens_at_the_last_vcpu(served.queue());
}

#[test]
fn a_restore_of_version_2_that_is_aborted_leads_back_to_the_vm_from_before() {
    let life = left_by_version_2(RESTORING);
    let served = life.serve();
    served.queue().restore_abort(LIMIT).unwrap();
    let vm = served.vm(3);
    assert_eq!(served.info().phase, Phase::Paused);
    assert_eq!(vm.virt_count, 123_456);
    assert_eq!(vm.vcpus[1].get(Register::TimerCval), Some(77));
    assert_eq!(vm.vcpus[0].get(Register::TimerCval), Some(0));
}

#[test]
fn vcpus_that_wait_for_the_gate_meanwhile_pass_it_together_under_the_new_program() {
    let program = find_program().unwrap();
    let mut backend = BackendProcess::launch_with_state::<&str>(&program, &[]).unwrap();
    let reconnect = Reconnect::default().patience(LIMIT);
    let options = Options::default().timeout(LIMIT).reconnect(reconnect);
    let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
    let rows = vec![row(0, 9_000), row(1, 5_000), row(2, 4_000)];
    let saved = SavedVm::new(Abi::Arm64, NonZeroU64::new(HOST_FREQUENCY).unwrap(), rows).unwrap();
    let mut restore = frontend.restore(&saved, autorun()).unwrap();
    let mut first = restore.vcpu(0).unwrap();
    let first = thread::spawn(move || first.run(LIMIT));
    while restore.missing() != [1, 2] {
        thread::yield_now();
    }
    backend.kill();
    // From here on the file is what the earlier program would have left.
    let file = backend.directory().join("state");
    state_file::write(&file, &state_file::of_this_boot(RESTORING)).unwrap();
    backend.relaunch_with_state::<&str>(&program, &[]).unwrap();
    let others = [1, 2].map(|vcpu| {
        let mut vcpu = restore.vcpu(vcpu).unwrap();
        thread::spawn(move || vcpu.run(LIMIT))
    });
    restore.wait(LIMIT).unwrap();
    let first = first.join().unwrap().unwrap();
    for run in others.map(|other| other.join().unwrap().unwrap()) {
        assert_eq!((run.cntvoff, run.cntpoff), (first.cntvoff, first.cntpoff));
        assert!(run.virt_count >= 9_000);
        assert_eq!(run.phys_count, run.virt_count + 7);
    }
    backend.log_with("Continuing with the VM");
}
