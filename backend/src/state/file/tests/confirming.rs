//! A VM with flags of CONFIGURE_VM in a state file.

use vhost_user_timer_protocol::wire::{configure_flags, request_flags, restore_flags};

use super::*;

impl Kept {
    /// A random operation of a VM that confirms.
    pub(super) fn perform_random_confirming(&mut self, random: &mut dyn FnMut(u64) -> u64) {
        match random(6) {
            0 => self.confirm(),
            1 => self.restore_to_armed(random(1 << 20)),
            2 => self.perform_with(request_flags::DONE, Op::SetRegs, random(4) as u32, &[]),
            _ => self.perform_random(random),
        }
    }

    fn confirm(&mut self) {
        let info = self.vm.info(Now::at(self.host + 10));
        let confirm = wire::ConfirmRun {
            cntvoff: info.cntvoff,
            cntpoff: info.cntpoff,
        };
        self.perform(Op::ConfirmRun, VM_WIDE, confirm.as_bytes());
    }

    /// A restore of the whole VM, as far as the phase allows it.
    pub(super) fn restore_to_armed(&mut self, count: u64) {
        let begin = wire::RestoreBegin {
            vcpus: 4.into(),
            flags: restore_flags::AUTORUN.into(),
            ..Default::default()
        };
        self.perform(Op::RestoreBegin, VM_WIDE, begin.as_bytes());
        let rows: Vec<_> = (0..4)
            .map(|vcpu: u32| {
                let mut row = wire::Vcpu {
                    vcpu: vcpu.into(),
                    ..Default::default()
                };
                for register in Register::ALL {
                    row.set(register, count + u64::from(vcpu));
                }
                row
            })
            .collect();
        self.perform_with(request_flags::DONE, Op::SetVm, VM_WIDE, rows.as_bytes());
    }
}

#[test]
fn whatever_was_committed_of_a_vm_that_confirms_is_what_the_next_process_finds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut armed = 0;
    for flags in 1..=configure_flags::ALL {
        let _ = std::fs::remove_file(&path);
        let mut random = generator(flags.into());
        let mut kept = Kept::new(&path);
        kept.configure_with(4, flags);
        for round in 0..300 {
            kept.perform_random_confirming(&mut random);
            kept.commit();
            armed += u32::from(kept.vm.phase() == Phase::Armed);
            if round % 3 == 0 {
                // The file is locked while it is in use.
                let copy = folder.path().join("copy");
                std::fs::copy(&path, &copy).unwrap();
                let vm = reopened(&copy, kept.host);
                assert_eq!(vm.phase(), kept.vm.phase());
                assert_eq!(records(&vm), records(&kept.vm), "{flags} {round}");
                let now = Now::at(kept.host);
                assert_eq!(vm.info(now), kept.vm.info(now));
            }
        }
    }
    assert!(armed > 50, "{armed} rounds were ARMED");
}

#[test]
fn a_file_has_the_newest_version_whatever_its_vm_is() {
    let version = |path: &Path| header(&std::fs::read(path).unwrap()).version;
    let folder = tempfile::tempdir().unwrap();
    for flags in 0..=configure_flags::ALL {
        let path = folder.path().join(flags.to_string());
        let mut kept = Kept::new(&path);
        assert_eq!(version(&path), NEWEST_VERSION);
        kept.configure_with(2, flags);
        assert_eq!(version(&path), NEWEST_VERSION);
        let expected = records(&kept.vm);
        drop(kept);
        assert_eq!(records(&reopened(&path, 0)), expected);
    }
}

#[test]
fn a_commit_of_a_vm_that_confirms_cut_short_anywhere_leaves_the_vm_from_before_it() {
    cut_commits_short(configure_flags::CONFIRM, |kept, random| {
        kept.perform_random_confirming(random);
    });
}
