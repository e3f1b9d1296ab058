//! Which users reach a socket, and which of them are served.

use std::fs::{self, Permissions};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use vhost_user_timer_kit::backend_process::{Devices, Launch, copy_program, find_program};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{PATIENCE, Rig};

use crate::launch::{ends, fails};

/// Another user, and a group that is not that user's own: of most hosts nobody, and none.
const OTHER_USER: u32 = 65534;
const GROUP: u32 = 54_321;

/// A backend that makes its sockets itself, in a folder that everyone can search, with this umask.
fn making(devices: Devices, umask: &str, args: &[&str]) -> Rig {
    let script = format!("umask {umask}; exec \"$@\"");
    let launch = Launch::new(&find_program().unwrap(), devices);
    let rig = Rig::watch(launch.script(&script).args(args).start().unwrap());
    fs::set_permissions(rig.backend.directory(), Permissions::from_mode(0o711)).unwrap();
    rig
}

/// A socket's mode and group.
fn access(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.mode() & 0o7777, found.gid())
}

/// Does this as another user with these supplementary groups: on a thread of its own, since
/// Linux keeps a user for each thread. None, which is reported, where this process is not root.
fn as_other_user<T: Send>(groups: &[u32], act: impl FnOnce() -> T + Send) -> Option<T> {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can act as another user");
        return None;
    }
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            set_thread_groups(&groups).unwrap();
            set_thread_gid(Gid::from_raw(OTHER_USER)).unwrap();
            set_thread_uid(Uid::from_raw(OTHER_USER)).unwrap();
            act()
        });
        Some(other.join().unwrap())
    })
}

#[test]
fn without_options_sockets_are_their_owners_alone_whatever_the_umask() {
    for umask in ["000", "022", "077"] {
        let rig = making(Devices::TimerAndClock, umask, &[]);
        let own = (0o600, getegid().as_raw());
        assert_eq!(access(rig.backend.socket_path()), own, "{umask}");
        assert_eq!(access(&rig.backend.clock_path()), own, "{umask}");
    }
}

#[test]
fn sockets_get_the_group_and_mode_that_are_named_whatever_the_umask() {
    let own = getegid().as_raw().to_string();
    for umask in ["000", "077"] {
        for (args, mode) in [
            (&["--socket-group", &own][..], 0o660),
            (&["--socket-group", &own, "--socket-mode=0600"], 0o600),
            (&["--socket-mode=666"], 0o666),
        ] {
            let rig = making(Devices::TimerAndClock, umask, args);
            let wanted = (mode, getegid().as_raw());
            assert_eq!(access(rig.backend.socket_path()), wanted, "{args:?}");
            assert_eq!(access(&rig.backend.clock_path()), wanted, "{args:?}");
        }
    }
}

#[test]
fn a_vmm_of_another_user_reaches_the_socket_by_its_group_and_not_without() {
    let connect = |rig: &Rig, groups: &[u32]| {
        let path = rig.backend.socket_path();
        as_other_user(groups, || UnixStream::connect(path))
    };
    let denied = |connected: io::Result<UnixStream>| {
        assert_eq!(
            connected.unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
    };
    let rig = making(Devices::Timer, "022", &[]);
    let Some(connected) = connect(&rig, &[GROUP]) else {
        return;
    };
    denied(connected);
    let group = GROUP.to_string();
    let rig = making(Devices::Timer, "022", &["--socket-group", &group]);
    assert_eq!(access(rig.backend.socket_path()), (0o660, GROUP));
    denied(connect(&rig, &[]).unwrap());
    let frontend = connect(&rig, &[GROUP]).unwrap().unwrap();
    Client::over(frontend).configure(1);
}

/// Checks that the program, as another user with these options, cannot start, and says why.
#[track_caller]
fn other_user_cannot(args: &[&str], why: &str) {
    // A folder on the way to the program may be root's alone.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let copy = folder.path().join("program");
    copy_program(&find_program().unwrap(), &copy);
    let output = as_other_user(&[], || {
        let mut command = Command::new(&copy);
        ends(command.args(args).arg("--counter-source=monotonic"))
    });
    let Some(output) = output else { return };
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said, format!("vhost-user-timer: {why}\n"));
}

#[test]
fn a_group_that_this_process_may_not_give_is_an_error_and_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = folder.path().join("socket");
    let why = format!(
        "{}: giving it the group 0 failed; the user of this process must be a member of that \
         group, or root: Operation not permitted (os error 1)",
        socket.display()
    );
    let option = format!("--socket-path={}", socket.display());
    other_user_cannot(&[&option, "--socket-group=0"], &why);
    assert!(!socket.exists());
}

#[test]
fn a_folder_or_a_socket_of_another_user_is_an_error_that_says_whose_it_should_be() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let socket = folder.path().join("socket");
    let option = format!("--socket-path={}", socket.display());
    let why = format!(
        "{}: the user of this process (uid {OTHER_USER}) may not make a socket in {}; give that \
         user the folder, or name another path: Permission denied (os error 13)",
        socket.display(),
        folder.path().display()
    );
    other_user_cannot(&[&option], &why);
    let rig = making(Devices::Timer, "022", &[]);
    let path = rig.backend.socket_path().display();
    let why = format!(
        "{path} is a socket that the user of this process may not connect to; remove it if no \
         process listens there, or name another path"
    );
    other_user_cannot(&[&format!("--socket-path={path}")], &why);
}

/// Checks that the backend has disconnected a frontend without a word.
#[track_caller]
fn is_turned_away(mut frontend: UnixStream) {
    frontend.set_read_timeout(Some(PATIENCE)).unwrap();
    match frontend.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

/// A uid that is not this process's.
fn another() -> String {
    (geteuid().as_raw() + 1).to_string()
}

#[test]
fn a_frontend_of_a_user_that_is_not_allowed_is_turned_away_and_the_log_says_who() {
    let another = another();
    for devices in [Devices::Timer, Devices::Clock] {
        let rig = making(devices, "022", &["--allow-uid", &another]);
        let (stream, device) = match devices {
            Devices::Clock => (rig.clock_stream(), "clock"),
            _ => (rig.stream(), "timer"),
        };
        is_turned_away(stream);
        rig.backend.log_with(&format!(
            "A frontend of the {device} device was turned away: process {} is of uid {}, and \
             --allow-uid allows {another}\n",
            std::process::id(),
            geteuid().as_raw()
        ));
    }
}

#[test]
fn each_allowed_user_is_served_by_name_or_number() {
    let own = geteuid().as_raw().to_string();
    let rig = making(
        Devices::Timer,
        "022",
        &["--allow-uid=root", "--allow-uid", &own],
    );
    Client::connect(&rig).configure(1);
    drop(rig);
    let other = OTHER_USER.to_string();
    let args = [
        "--socket-mode=666",
        "--allow-uid=root",
        "--allow-uid",
        &other,
    ];
    let rig = making(Devices::Timer, "022", &args);
    let path = rig.backend.socket_path();
    if let Some(frontend) = as_other_user(&[], || UnixStream::connect(path).unwrap()) {
        Client::over(frontend).configure(1);
    }
}

/// How many come: more than are said, however slow this is.
const STRANGERS: usize = 500;

#[test]
fn strangers_without_end_keep_nobody_out_and_do_not_flood_the_log() {
    let mut rig = making(
        Devices::Timer,
        "022",
        &["--socket-mode=666", "--allow-uid=0"],
    );
    let path = rig.backend.socket_path().to_owned();
    let begun = Instant::now();
    let connected = as_other_user(&[], || {
        for _ in 0..STRANGERS {
            is_turned_away(UnixStream::connect(&path).unwrap());
        }
    });
    if connected.is_none() {
        return;
    }
    Client::connect(&rig).configure(1);
    rig.backend.log_with_times("was turned away: process", 100);
    assert_eq!(rig.backend.terminate().code(), Some(0));
    let log = rig.log_with("Ending on SIGTERM");
    // 100 at once, and one more every 5 s.
    let at_most = 100 + 1 + begun.elapsed().as_secs() / 5;
    let said = log.matches("was turned away: process").count();
    assert!(said < STRANGERS && said as u64 <= at_most, "{said}: {log}");
}

#[test]
fn a_user_that_is_not_allowed_is_turned_away_on_a_socket_that_the_launcher_made() {
    let rig = Rig::launch(&["--allow-uid", &another()]);
    is_turned_away(rig.stream());
    let rig = Rig::launch(&["--allow-uid", &geteuid().as_raw().to_string()]);
    Client::connect(&rig).configure(1);
}

#[test]
fn a_socket_pair_of_a_user_that_is_not_allowed_is_an_error() {
    let (socket, peer) = UnixStream::pair().unwrap();
    let another = another();
    let why = format!(
        "vhost-user-timer: --fd 0: connected by a user that is not served: process {} is of uid \
         {}, and --allow-uid allows {another}\n",
        std::process::id(),
        geteuid().as_raw()
    );
    let args = ["--fd=0", "--allow-uid", &another];
    fails(&args, OwnedFd::from(socket).into(), &why);
    is_turned_away(peer);
}
