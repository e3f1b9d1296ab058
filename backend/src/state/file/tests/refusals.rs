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
    for len in (1..good.len()).step_by(61) {
        write_private(&path, &good[..len]);
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
        write_private(&path, text.as_bytes());
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
        write_private(&path, &bad);
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
fn a_vm_of_another_boot_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    drop(kept);
    let file = std::fs::read(&path).unwrap();
    let other = with_header(&file, |header| header.boot_id[0] ^= 1);
    write_private(&path, &other);
    let (_file, found) = open(&path, PROFILE.max_vcpus, |old| {
        assert_eq!(old, None);
        COUNTER
    })
    .unwrap();
    assert!(found.is_none());
}

#[test]
fn a_file_of_another_version_is_refused_whatever_its_boot_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    drop(kept);
    let file = std::fs::read(&path).unwrap();
    for (version, boot) in [(1, 0), (5, 0), (5, 1), (u32::MAX, 0)] {
        let other = with_header(&file, |header| {
            header.version = version;
            header.boot_id[0] ^= boot;
        });
        write_private(&path, &other);
        let refused = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap_err();
        let text = format!(
            "has version {version}, and this backend reads versions 2 to 4; restart the version \
             that wrote it, or delete the file to start over, without the VM's time"
        );
        assert!(refused.to_string().ends_with(&text), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), other);
    }
}

#[test]
fn a_file_that_others_can_write_is_refused_with_the_remedy() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    drop(kept);
    for (mode, fine) in [
        (0o600, true),
        (0o644, true),
        (0o640, true),
        (0o660, false),
        (0o602, false),
    ] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        match open(&path, PROFILE.max_vcpus, |_| COUNTER) {
            Ok(_) => assert!(fine, "{mode:o}"),
            Err(error) => {
                assert!(!fine, "{error}");
                let text = format!(
                    "has mode 0{mode:o}, so its group or others can change it; take that away with \
                     chmod go-w, or name another file"
                );
                assert!(error.to_string().ends_with(&text), "{error}");
            }
        }
    }
}

#[test]
fn a_count_that_went_back_is_refused_and_one_that_went_on_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    let wrote = kept.host;
    drop(kept);
    let opening = opening(&path).unwrap();
    for later in [0, 1, 1 << 40, u64::MAX >> 1] {
        let reads = wrote.wrapping_add(later);
        assert!(opening.expect_count(reads, PROFILE.frequency).is_ok());
    }
    let refused = opening.expect_count(wrote.wrapping_sub(2_500_000), 1_000_000);
    assert_eq!(
        refused.unwrap_err().to_string(),
        format!(
            "the state file {} was last changed at host count {wrote}, and the counter now reads {}: \
             it went back by 2.500000 s, as in another time namespace or on a host that was itself \
             restored; restart where the file was written, or delete the file to start over, without \
             the VM's time",
            path.display(),
            wrote.wrapping_sub(2_500_000)
        )
    );
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
        let refused = opening(&path).unwrap().host_counter().unwrap_err();
        let text = format!("the state file {} was {text}", path.display());
        assert_eq!(refused.to_string(), text);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
