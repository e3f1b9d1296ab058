//! The library's own tests of its feature `kvm` (`protocol/frontend/src/kvm/tests/real`), on the
//! kernels that they are about.

use vhost_user_timer_kit::qemu::Kernel;

use crate::machine::on;

/// Runs the library's tests of these modules, of which none may be skipped.
fn pass(kernel: Kernel, modules: &[&str]) {
    on(kernel, |machine| {
        let filters: Vec<_> = modules
            .iter()
            .map(|module| format!("kvm::tests::real::{module}"))
            .collect();
        // One at a time: a vCPU that another test has in KVM_RUN would take its CPU.
        let command = format!(
            "library-tests {} --test-threads=1 --nocapture 2>&1",
            filters.join(" ")
        );
        let text = machine.output(&command);
        assert!(!text.contains("skipped:"), "{kernel:?}: {text}");
        for filter in filters {
            let ran = text.contains(&format!("test {filter}::"));
            assert!(ran, "{kernel:?}: {filter}: {text}");
        }
        println!("{kernel:?}: {text}");
    });
}

#[test]
fn the_newest_kernel_takes_an_offset_that_is_then_in_effect() {
    for kernel in [Kernel::Newest, Kernel::Nvhe] {
        pass(kernel, &["any_kernel", "with_offset"]);
    }
}

#[test]
fn under_pkvm_an_ordinary_vm_takes_an_offset_and_a_protected_one_is_refused() {
    pass(Kernel::Protected, &["with_offset", "protected"]);
}

#[test]
fn a_guest_with_el2_is_refused() {
    pass(Kernel::Nested, &["nested"]);
}

#[test]
fn before_linux_6_4_counts_are_set_as_near_as_their_bracket_says() {
    pass(Kernel::Bookworm, &["any_kernel", "without_offset"]);
}
