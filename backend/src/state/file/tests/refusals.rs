//! Files that are refused or discarded.

use vhost_user_timer_counter::Source;

use super::*;

#[test]
fn a_file_that_is_cut_off_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(8);
    drop(kept);
    let good = std::fs::read(&path).unwrap();
    for len in (8..good.len()).step_by(61) {
        std::fs::write(&path, &good[..len]).unwrap();
        let error = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap_err();
        let refused = matches!(
            error,
            StateFileError::Damaged { .. } | StateFileError::Foreign(_)
        );
        assert!(refused, "{len}: {error}");
        assert_eq!(std::fs::read(&path).unwrap(), &good[..len]);
    }
}

#[test]
fn a_file_of_anything_else_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hosts");
    for text in [
        "::1 localhost\n".to_owned(),
        "x".to_owned(),
        "x".repeat(100_000),
    ] {
        std::fs::write(&path, &text).unwrap();
        let error = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap_err();
        assert!(matches!(error, StateFileError::Foreign(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn a_damaged_record_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    drop(kept);
    let good = std::fs::read(&path).unwrap();
    // The first commit went to the second slots.
    for at in [
        Record::Vm.slot(1) + HEAD + 3,
        Record::Vcpu(0).slot(1) + HEAD,
    ] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, &bad).unwrap();
        let error = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap_err();
        assert!(matches!(error, StateFileError::Damaged { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bad);
    }
}

#[test]
fn the_file_is_private_and_locked_against_a_second_backend() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let kept = Kept::new(&path);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = open(&path, PROFILE.max_vcpus, |_| COUNTER);
    assert!(matches!(second, Err(StateFileError::InUse(_))));
    drop(kept);
    assert!(open(&path, PROFILE.max_vcpus, |_| COUNTER).is_ok());
}

#[test]
fn a_vm_of_another_boot_or_version_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    for (offset, value) in [(24, b'?'), (8, 9)] {
        let _ = std::fs::remove_file(&path);
        let mut kept = Kept::new(&path);
        kept.configure(2);
        drop(kept);
        let mut other = std::fs::read(&path).unwrap();
        other[offset] = value;
        std::fs::write(&path, &other).unwrap();
        let (_file, found) = open(&path, PROFILE.max_vcpus, |old| {
            assert_eq!(old, None);
            COUNTER
        })
        .unwrap();
        assert!(found.is_none());
    }
}

#[test]
fn a_vm_that_counted_otherwise_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    drop(kept);
    let boottime = CounterId {
        source: 2,
        ..COUNTER
    };
    let refused = open(&path, PROFILE.max_vcpus, |_| boottime).unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!(
            "the state file {} was written with --counter-source monotonic at 1000000000 Hz, and \
             this backend has --counter-source boottime at 1000000000 Hz; restart with the original \
             --counter-source, or with --counter-source auto, or delete the file to start over",
            path.display()
        )
    );
    assert_eq!(reopened(&path, 0).phase(), Phase::Paused);
}

#[test]
fn a_backend_for_fewer_vcpus_refuses_a_larger_vm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(8);
    drop(kept);
    let before = std::fs::read(&path).unwrap();
    let refused = open(&path, 4, |_| COUNTER).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("8 vCPUs, and this backend takes 4"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn a_host_counter_that_cannot_be_read_here_is_refused_and_the_file_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let foreign = if cfg!(target_arch = "aarch64") {
        Source::Tsc
    } else {
        Source::Cntvct
    };
    for (code, text) in [
        (
            77,
            "written with a host counter that this backend does not know (code 77); restart the \
             version that wrote it, or delete the file to start over"
                .to_owned(),
        ),
        (
            foreign.code(),
            format!(
                "written with --counter-source {foreign}, which this host cannot read; delete the \
                 file to start over, without the VM's time"
            ),
        ),
    ] {
        let _ = std::fs::remove_file(&path);
        let other = CounterId {
            source: code,
            ..COUNTER
        };
        drop(open(&path, 1, |_| other).unwrap());
        let before = std::fs::read(&path).unwrap();
        let refused = Opening::new(&path).unwrap().host_counter().unwrap_err();
        let text = format!("the state file {} was {text}", path.display());
        assert_eq!(refused.to_string(), text);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
