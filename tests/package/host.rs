//! The package on a host of VMs: with systemd, AppArmor, man and libvirt.

use crate::root::Root;

#[test]
fn man_finds_the_pages_of_both_programs() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let printed = root.run_installed("man -w vhost-user-timer vhost-user-timer-ctl");
    assert_eq!(
        printed,
        "/usr/share/man/man1/vhost-user-timer.1.gz\n/usr/share/man/man1/vhost-user-timer-ctl.1.gz\n"
    );
}

#[test]
fn systemd_accepts_the_units() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let printed = root.run_installed(
        r"cd /usr/lib/systemd/system
        for unit in vhost-user-timer*; do
            systemd-analyze verify --man=no ${unit/@/@vm1} 2>&1
        done
        # A unit that is none is an error.
        echo '[Service]' >vhost-user-timer@.service
        systemd-analyze verify --man=no vhost-user-timer@vm1.service >/dev/null 2>&1 || echo refused",
    );
    assert_eq!(printed, "refused\n");
}

#[test]
fn apparmor_accepts_the_profile_and_the_administrators_rules() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let printed = root.run_installed(
        r"profile=/etc/apparmor.d/usr.bin.vhost-user-timer
        accepts() { apparmor_parser --skip-kernel-load --skip-cache $profile >/dev/null 2>&1; }
        accepts && echo accepted
        echo '/srv/vms/** rwk,' >/etc/apparmor.d/local/usr.bin.vhost-user-timer
        accepts && echo accepted
        # The file is read: a rule that is none is an error.
        echo 'no rule' >/etc/apparmor.d/local/usr.bin.vhost-user-timer
        accepts || echo refused",
    );
    assert_eq!(printed, "accepted\naccepted\nrefused\n");
}

#[test]
fn instances_of_the_units_end_with_the_package_and_not_at_an_upgrade() {
    let Some(root) = Root::find("host") else {
        return;
    };
    // A systemd that runs is one with this folder, and a systemctl that prints what it is to do.
    let printed = root.run_installed(
        r#"mkdir -p /run/systemd/system
        printf '#!/bin/sh\necho "$*" >>/tmp/done\n' >/usr/bin/systemctl
        apt-get -qq install -y --reinstall /package.deb >/dev/null
        echo upgraded >>/tmp/done
        apt-get -qq remove -y vhost-user-timer >/dev/null
        grep -v ^is- /tmp/done"#,
    );
    assert_eq!(
        printed,
        "--system daemon-reload\n\
         upgraded\n\
         stop vhost-user-timer@*.socket vhost-user-timer-clock@*.socket vhost-user-timer@*.service\n\
         --system daemon-reload\n"
    );
}
