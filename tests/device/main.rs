//! QEMU's device (`contrib/qemu`), as far as it can be tested without QEMU: how it reads KVM's
//! registers and gives KVM the offset, with a KVM that is made up. The tests are in C, in
//! `contrib/qemu/tests`; each is named here, so that none can be left out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The program with the tests, compiled once with warnings as errors.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib");
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("registers");
        let compiler = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
            .arg("-I")
            .arg(contrib.join("qemu"))
            .arg("-I")
            .arg(contrib.join("capi/include"))
            .arg(contrib.join("qemu/tests/registers.c"))
            .arg("-o")
            .arg(&program)
            .output()
            .expect("a C compiler, as Rust needs a linker");
        succeeds(&compiler);
        (folder, program)
    });
    program
}

fn succeeds(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}", output.status);
}

fn run(name: Option<&str>) -> Output {
    let mut program = Command::new(program());
    program.args(name).output().expect("the program runs")
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                succeeds(&run(Some(stringify!($name))));
            }
        )*

        #[test]
        fn every_test_of_the_program_is_run() {
            let listed = run(None);
            succeeds(&listed);
            let listed = String::from_utf8(listed.stdout).expect("UTF-8");
            let listed: BTreeSet<_> = listed.lines().collect();
            assert_eq!(listed, BTreeSet::from([$(stringify!($name)),*]));
        }
    };
}

tests! {
    a_vcpu_is_read_by_kvms_ids_and_its_counts_are_not
    a_control_is_read_without_its_status
    a_register_that_kvm_refuses_is_named
    an_offset_goes_in_once_and_the_guest_counts_by_it
    an_offset_that_the_guest_does_not_see_is_an_error
    an_offset_that_kvm_refuses_is_an_error
    a_vcpu_that_has_not_got_its_timers_is_found
}
