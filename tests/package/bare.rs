//! The package where nothing but apt is installed: no systemd, no AppArmor, no man.

use std::process::Command;

use crate::root::{BACKEND, INSTALL, Root, folder};

/// Prints each path of the root with its kind, mode, owner and contents, but for what dpkg and apt
/// record of their runs. dpkg orders the lists of all packages' files again.
const LISTING: &str = r#"
listing() {
    find / \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /package.deb -o -path '/var/log/*' \
        -o -path '/var/cache/debconf/*' -o -path '/var/cache/apt/*' -o -path '/var/lib/apt/*' -o -path '/var/lib/dpkg/status*' \) -prune \
        -o -printf '%p %y %m %U:%G %l\n' -type f ! -path '/var/lib/dpkg/info/*.list' -exec sha256sum {} + | LC_ALL=C sort
    dpkg-query --show
}
"#;

/// What `make install PREFIX=/usr` installs, sorted.
fn installed_by_make() -> Vec<String> {
    let output = Command::new(folder().join("../contrib/install"))
        .arg("--list")
        .env("PREFIX", "/usr")
        .env_remove("DESTDIR")
        .output()
        .expect("contrib/install");
    assert!(output.status.success(), "{}", output.status);
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    let mut paths: Vec<_> = printed.lines().map(str::to_owned).collect();
    paths.sort();
    paths
}

#[test]
fn the_package_has_what_make_installs_and_its_own_documentation() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    // Debian compresses manual pages, and has another place for zsh's completions.
    let printed = root.run_installed(
        r"dpkg --listfiles vhost-user-timer | while read -r path; do
            [[ -d $path ]] || sed 's|\.1\.gz$|.1|; s|zsh/vendor-completions|zsh/site-functions|' <<<$path
        done | LC_ALL=C sort",
    );
    let (documents, files): (Vec<_>, Vec<_>) = printed
        .lines()
        .partition(|path| path.starts_with("/usr/share/doc/"));
    assert_eq!(files, installed_by_make());
    let documents = documents.join("\n");
    assert_eq!(
        documents.replace("/usr/share/doc/vhost-user-timer/", ""),
        "README.md\nSECURITY.md\nchangelog.Debian.gz\nchangelog.gz\ncopyright"
    );
}

#[test]
fn a_purged_package_leaves_the_root_as_it_was() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run(&format!(
        r"{LISTING}
        listing >/tmp/before
        {INSTALL}
        listing >/tmp/installed
        echo '# a rule of the administrator' >/etc/apparmor.d/local/usr.bin.vhost-user-timer
        mkdir -p /run/vhost-user-timer/vm1
        apt-get -qq purge -y vhost-user-timer >/dev/null
        listing >/tmp/after
        diff /tmp/before /tmp/after
        grep -c '/usr/bin/vhost-user-timer f 755 0:0' /tmp/installed"
    ));
    assert_eq!(printed, "1\n");
}

#[test]
fn a_removed_package_leaves_only_what_the_administrator_may_have_changed() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run(&format!(
        r"{LISTING}
        listing >/tmp/before
        {INSTALL}
        apt-get -qq remove -y vhost-user-timer >/dev/null
        listing >/tmp/after
        {{ diff /tmp/before /tmp/after || true; }} | sed -n 's/^> \(\/[^ ]*\) f .*/\1/p'"
    ));
    assert_eq!(
        printed,
        "/etc/apparmor.d/local/usr.bin.vhost-user-timer\n\
         /etc/apparmor.d/usr.bin.vhost-user-timer\n\
         /var/lib/dpkg/info/vhost-user-timer.list\n\
         /var/lib/dpkg/info/vhost-user-timer.postrm\n"
    );
}

#[test]
fn purging_the_package_leaves_a_vms_state_alone() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run_installed(
        r"mkdir -p /run/vhost-user-timer/vm1/state /run/vhost-user-timer/vm2
        echo state >/run/vhost-user-timer/vm1/state/vm
        apt-get -qq purge -y vhost-user-timer >/dev/null
        find /run/vhost-user-timer -mindepth 1 -printf '%P\n'",
    );
    assert_eq!(printed, "vm1\nvm1/state\nvm1/state/vm\n");
}

#[test]
fn an_upgrade_leaves_the_administrators_rules() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run_installed(
        r"rules=/etc/apparmor.d/local/usr.bin.vhost-user-timer
        echo '/srv/vms/** rwk,' >$rules
        apt-get -qq install -y --reinstall /package.deb >/dev/null
        cat $rules",
    );
    assert_eq!(printed, "/srv/vms/** rwk,\n");
}

#[test]
fn the_installed_backend_serves_a_vm_and_ends_on_sigterm() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run_installed(&format!(
        r"{BACKEND}
        vhost-user-timer --version
        serve --state-file ${{timer%/*}}/state
        vhost-user-timer-ctl info --socket-path $timer | grep ^phase
        end >/dev/null
        ls ${{timer%/*}}"
    ));
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        printed,
        format!("vhost-user-timer {version}\nphase           NEW\nstate\n")
    );
}

#[test]
fn each_shell_finds_the_completions_of_both_programs() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    // As bash-completion loads them. The other shells read a file by its first line, or its name.
    let printed = root.run_installed(
        r"for program in vhost-user-timer vhost-user-timer-ctl; do
            . /usr/share/bash-completion/completions/$program
            complete -p $program | sed 's/.* //'
            head -n 1 /usr/share/zsh/vendor-completions/_$program
            grep -o -m 1 -- '-c vhost[^ ]*' /usr/share/fish/vendor_completions.d/$program.fish
        done",
    );
    let both = ["vhost-user-timer", "vhost-user-timer-ctl"];
    let found = both.map(|name| format!("{name}\n#compdef {name}\n-c {name}\n"));
    assert_eq!(printed, found.concat());
}
