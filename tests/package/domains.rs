//! The domains of `contrib/libvirt`, as libvirt runs them with the package's backend.

use std::path::PathBuf;

use crate::root::{BACKEND, Root, folder};

fn example(name: &str) -> PathBuf {
    folder().join("../contrib/libvirt").join(name)
}

/// The root with a domain at /domain.xml, and with what the domain boots.
fn with_domain(root: Root, name: &str) -> Root {
    let images = root.environment.directory().to_owned();
    root.mount(&example(name), "/domain.xml")
        .mount(&images.join("Image"), "/var/lib/libvirt/images/Image")
        .mount(
            &images.join("guest.cpio"),
            "/var/lib/libvirt/images/guest.cpio",
        )
}

/// Starts the backend and the VM, asks QEMU, and ends both. Prints the answer, and which frontends
/// the backend had. libvirt's driver is a part of virsh here, without the daemon that writes logs.
fn life(ask: &str) -> String {
    format!(
        r#"{BACKEND}
        virt-xml-validate /domain.xml >/dev/null 2>&1
        mkdir -p /tmp/libvirt/etc
        printf '%s\n' 'stdio_handler = "file"' 'user = "root"' 'group = "root"' 'security_driver = "none"' \
            'cgroup_controllers = []' 'namespaces = []' 'remember_owner = 0' >/tmp/libvirt/etc/qemu.conf
        serve
        virsh -c 'qemu:///embed?root=/tmp/libvirt' "create /domain.xml; domstate vm1; {ask}; destroy vm1" \
            >/tmp/virsh 2>&1 || {{ cat /tmp/virsh; exit 1; }}
        cat /tmp/virsh
        end >/tmp/log
        grep -o 'frontend of the [a-z]* device connected' /tmp/log"#
    )
}

#[test]
fn libvirt_runs_a_vm_with_the_backends_clock_and_a_stock_qemu() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let root = with_domain(root.with_qemu(), "clock.xml");
    let printed = root.run_installed(&life(r#"qemu-monitor-command vm1 --hmp \"info qtree\""#));
    for line in [
        "Domain 'vm1' created from /domain.xml",
        "running",
        "  dev: vhost-user-rtc-pci, id \"clock\"",
        "frontend of the clock device connected",
    ] {
        assert!(
            printed.lines().any(|printed| printed.ends_with(line)),
            "no {line}: {printed}"
        );
    }
}

#[test]
fn libvirt_runs_a_vm_whose_timers_and_clock_the_backend_keeps() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let root = with_domain(root.with_patched_qemu(), "timer-and-clock.xml");
    let printed = root.run_installed(&life(
        r#"qemu-monitor-command vm1 --hmp \"qom-get /machine/peripheral/timer phase\""#,
    ));
    for line in [
        "Domain 'vm1' created from /domain.xml",
        "running",
        // The device's answer; the line above is libvirt's.
        "\"running\"",
        "frontend of the clock device connected",
        "frontend of the timer device connected",
    ] {
        assert!(
            printed.lines().any(|printed| printed.ends_with(line)),
            "no {line}: {printed}"
        );
    }
}

/// A `systemctl` that prints what it is to do.
const HOOK: &str = r#"
mkdir /tmp/bin
printf '#!/bin/sh\necho "$*"\n' >/tmp/bin/systemctl
chmod +x /tmp/bin/systemctl
hook() { PATH=/tmp/bin:$PATH /hook "$@"; }
"#;

#[test]
fn the_hook_starts_the_sockets_before_the_vm_and_ends_the_backend_after_it() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let root = with_domain(root, "timer-and-clock.xml")
        .mount(&example("hooks/vhost-user-timer"), "/hook")
        .mount(&example("clock.xml"), "/clock.xml");
    let printed = root.run(&format!(
        r"{HOOK}
        for domain in /domain.xml /clock.xml; do
            hook vm1 prepare begin - <$domain
            hook vm1 start begin - <$domain
            hook vm1 stopped end - <$domain
            hook vm1 release end - <$domain
        done"
    ));
    let one = "start vhost-user-timer@vm1.socket vhost-user-timer-clock@vm1.socket\n\
         stop vhost-user-timer@vm1.socket vhost-user-timer-clock@vm1.socket vhost-user-timer@vm1.service\n";
    assert_eq!(printed, one.repeat(2));
}

#[test]
fn the_hook_leaves_a_vm_alone_that_names_no_socket_of_its_own() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let root = with_domain(root, "clock.xml").mount(&example("hooks/vhost-user-timer"), "/hook");
    let printed = root.run(&format!(
        r"{HOOK}
        for operation in 'prepare begin' 'release end'; do
            hook vm2 $operation - </domain.xml
            hook vm1 $operation - </dev/null
        done"
    ));
    assert_eq!(printed, "");
}

#[test]
fn a_name_that_systemd_writes_in_another_way_has_the_sockets_of_its_instance() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let root = root.mount(&example("hooks/vhost-user-timer"), "/hook");
    let printed = root.run(&format!(
        r"{HOOK}
        echo 'path=/run/vhost-user-timer/web\x2d1/timer.sock' | hook web-1 prepare begin -"
    ));
    assert_eq!(
        printed,
        "start vhost-user-timer@web\\x2d1.socket vhost-user-timer-clock@web\\x2d1.socket\n"
    );
}

#[test]
fn libvirts_profile_takes_the_rule_for_the_sockets() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let to = "/etc/apparmor.d/abstractions/libvirt-qemu.d/vhost-user-timer";
    let root = root.mount(&example("apparmor"), to);
    let printed = root.run(
        r"printf '%s\n' 'abi <abi/4.0>,' 'include <tunables/global>' \
            'profile vm flags=(attach_disconnected) {' 'include <abstractions/libvirt-qemu>' '}' >/tmp/profile
        apparmor_parser --skip-kernel-load --skip-cache --preprocess /tmp/profile | grep -c '{clock,timer}.sock rw'
        apparmor_parser --skip-kernel-load --skip-cache /tmp/profile >/dev/null 2>&1 && echo accepted",
    );
    assert_eq!(printed, "1\naccepted\n");
}
