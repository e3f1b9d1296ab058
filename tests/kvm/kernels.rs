//! Each kernel's KVM is what the tests take it for.

use vhost_user_timer_kit::qemu::Kernel;

use crate::machine::on;

#[test]
fn the_newest_kernel_has_kvm_with_an_ioctl_for_the_offset_in_every_mode() {
    for (kernel, mode) in [
        (Kernel::Newest, "VHE mode initialized successfully"),
        (Kernel::Nvhe, "Hyp nVHE mode initialized successfully"),
        (
            Kernel::Protected,
            "Protected hVHE mode initialized successfully",
        ),
    ] {
        on(kernel, |machine| {
            let kvm = machine.answer("kvm-agent kvm");
            assert_eq!(kvm["api"], 12);
            assert_eq!(kvm["counter_offset"], true, "{kernel:?}");
            if let Some(log) = machine.kernel_log() {
                assert!(log.contains(mode), "{kernel:?}: {log}");
            }
        });
    }
}

#[test]
fn debian_12_has_kvm_without_it() {
    on(Kernel::Bookworm, |machine| {
        let kvm = machine.answer("kvm-agent kvm");
        assert_eq!(kvm["api"], 12);
        assert_eq!(kvm["counter_offset"], false);
    });
}
