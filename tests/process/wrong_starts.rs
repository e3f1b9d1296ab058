//! What a launcher gets wrong before there is a backend: each is an error that says what was tried,
//! on what, and what to do.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::net::{AddressFamily, SocketType, socket};
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::find_program;

use crate::launch::{ends, fails, run_with, text};

/// Checks that the program takes this for a wrong command line, and says exactly why.
#[track_caller]
fn is_wrong(args: &[&str], stdin: Stdio, why: &str) {
    let output = run_with(args, stdin);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert_eq!(said, format!("vhost-user-timer: {why}\n"));
    assert_eq!(text(&output.stdout), "");
}

fn option(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Checks that the program cannot start, and says exactly why.
#[track_caller]
fn cannot(args: &[&str], stdin: Stdio, why: &str) {
    fails(args, stdin, &format!("vhost-user-timer: {why}\n"));
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("vm1");
    let socket = missing.join("socket");
    let why = format!(
        "{}: there is no folder {}; make the folder, or name another path",
        socket.display(),
        missing.display()
    );
    for name in ["--socket-path", "--rtc-socket-path"] {
        cannot(&[&option(name, &socket)], Stdio::null(), &why);
    }
}

#[test]
fn a_path_whose_folder_is_a_file_or_makes_no_files_is_not_called_missing() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let socket = file.join("socket");
    let why = format!(
        "{}: there is no folder {}; make the folder, or name another path",
        socket.display(),
        file.display()
    );
    cannot(&[&option("--socket-path", &socket)], Stdio::null(), &why);
    cannot(
        &["--socket-path=/proc/socket"],
        Stdio::null(),
        "listening on /proc/socket failed: No such file or directory (os error 2)",
    );
}

#[test]
fn a_path_that_names_a_folder_by_its_last_slash_is_refused() {
    let folder = TempDir::new().unwrap();
    let missing = format!("{}/vm1/", folder.path().display());
    let why =
        format!("{missing}: there is no folder {missing}; make the folder, or name another path");
    cannot(&[&format!("--socket-path={missing}")], Stdio::null(), &why);
    fs::create_dir(&missing).unwrap();
    let why = format!("{missing} exists and is not a socket; remove it, or name another path");
    cannot(&[&format!("--socket-path={missing}")], Stdio::null(), &why);
}

#[test]
fn a_state_file_without_its_folder_or_that_is_a_folder_says_so() {
    let folder = TempDir::new().unwrap();
    let socket = option("--socket-path", &folder.path().join("socket"));
    let missing = folder.path().join("missing");
    let file = missing.join("state");
    let why = format!(
        "the state file {}: there is no folder {}; make the folder, or name another file",
        file.display(),
        missing.display()
    );
    cannot(
        &[&socket, &option("--state-file", &file)],
        Stdio::null(),
        &why,
    );
    let why = format!(
        "the file {} is not a state file of a vhost-user-timer backend; name another",
        folder.path().display()
    );
    let state_file = option("--state-file", folder.path());
    cannot(&[&socket, &state_file], Stdio::null(), &why);
}

#[test]
fn a_pid_file_without_its_folder_says_so_and_leaves_no_socket() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("socket");
    let missing = folder.path().join("missing");
    let file = missing.join("pid");
    let why = format!(
        "--pid-file {}: there is no folder {}; make the folder, or name another file",
        file.display(),
        missing.display()
    );
    let options = [
        option("--socket-path", &socket),
        option("--pid-file", &file),
    ];
    cannot(&options.each_ref().map(String::as_str), Stdio::null(), &why);
    assert!(!socket.exists());
}

#[test]
fn a_state_file_that_is_a_link_says_so() {
    let folder = TempDir::new().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("state", &link).unwrap();
    let why = format!(
        "the state file {} is a symbolic link; name the file itself",
        link.display()
    );
    let options = ["--fd=0", &option("--state-file", &link)];
    cannot(&options, Stdio::null(), &why);
}

/// Closes what the program would inherit of this process by accident.
const CLOSE: &str = "exec 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-";

/// Runs the program after this command of a shell, to its end.
fn run_after(command: &str, args: &[&str]) -> Output {
    let script = format!("{command}; exec \"$@\"");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, "sh"]);
    ends(
        shell
            .arg(find_program().unwrap())
            .args(args)
            .stdin(Stdio::null()),
    )
}

#[test]
fn a_state_file_past_the_limit_of_file_sizes_is_1_and_says_so() {
    let folder = TempDir::new().unwrap();
    let file = option("--state-file", &folder.path().join("state"));
    let output = run_after("ulimit -f 0", &["--fd=0", &file]);
    let said = text(&output.stderr);
    assert!(said.ends_with("File too large (os error 27)\n"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
}

#[test]
fn a_start_without_enough_descriptors_says_so_at_each_step() {
    let folder = TempDir::new().unwrap();
    let socket = option("--socket-path", &folder.path().join("socket"));
    let file = option("--state-file", &folder.path().join("state"));
    // It ends by this where the descriptors are enough.
    let last = "--pid-file=/nowhere/pid";
    let mut ends = [0, 0];
    // Below 4 the program cannot be loaded.
    for limit in 4..=24 {
        let command = format!("{CLOSE}; ulimit -n {limit}");
        let output = run_after(&command, &[&socket, &file, last]);
        let said = text(&output.stderr);
        let has_enough = said.contains("there is no folder /nowhere");
        let says_so = said.ends_with("Too many open files (os error 24)\n");
        assert!(has_enough || says_so, "{limit}: {said}");
        assert_eq!(output.status.code(), Some(1), "{limit}: {said}");
        ends[usize::from(has_enough)] += 1;
    }
    assert!(ends.iter().all(|ends| *ends > 0), "{ends:?}");
}

#[test]
fn an_error_names_the_vm_however_early_it_is() {
    let output = run_with(&["--name=vm1", "--fd=0", "--rtc-clock=utc"], Stdio::null());
    let said = text(&output.stderr);
    assert!(
        said.starts_with("vhost-user-timer vm1: --rtc-clock is for "),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn an_abstract_socket_is_2_and_says_how_to_name_such_a_file() {
    is_wrong(
        &["--socket-path=@vm1"],
        Stdio::null(),
        "--socket-path @vm1: an abstract socket has no mode that keeps others out; name a path, or \
         ./@vm1 for a file of this name",
    );
}

#[test]
fn the_descriptor_of_the_log_is_2() {
    is_wrong(
        &["--fd=2"],
        Stdio::null(),
        "--fd 2: this is standard error, where the log goes; pass another descriptor",
    );
}

#[test]
fn a_path_that_is_too_long_is_refused_with_its_length_and_the_limit() {
    let path = Path::new("/tmp").join("x".repeat(200));
    let why = format!(
        "{} has 205 bytes, and the path of a Unix socket at most 107; name a shorter path, or one \
         relative to the working directory",
        path.display()
    );
    cannot(&[&option("--socket-path", &path)], Stdio::null(), &why);
}

#[test]
fn a_path_without_a_value_is_2() {
    let output = run_with(&["--socket-path="], Stdio::null());
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--socket-path <PATH>"));
}

#[test]
fn one_path_for_both_devices_is_2_and_leaves_no_socket() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let same = folder.path().join("./socket");
    let args = [
        option("--socket-path", &path),
        option("--rtc-socket-path", &same),
    ];
    let why = format!(
        "--socket-path {} and --rtc-socket-path {} are the same path; each needs its own",
        path.display(),
        same.display()
    );
    is_wrong(&[&args[0], &args[1]], Stdio::null(), &why);
    assert!(!path.exists());
}

#[test]
fn an_option_of_the_clock_without_its_socket_is_2() {
    for option in ["--rtc-clock=utc", "--rtc-counter-offset=0"] {
        let name = option.split_once('=').unwrap().0;
        let why = format!(
            "{name} is for the guest's clock, which has no socket; add --rtc-socket-path or \
             --rtc-fd, or leave the option out"
        );
        is_wrong(&["--fd=0", option], Stdio::null(), &why);
    }
}

#[test]
fn an_option_of_sockets_at_a_path_without_one_is_2() {
    for option in ["--socket-group=0", "--socket-mode=660"] {
        let name = option.split_once('=').unwrap().0;
        let why = format!(
            "{name} is for sockets that this process makes, and the launcher makes all of them; \
             add --socket-path or --rtc-socket-path, or have the launcher set it"
        );
        is_wrong(&["--fd=0", option], Stdio::null(), &why);
    }
}

#[test]
fn a_group_or_mode_that_cannot_be_is_2_and_says_what_can() {
    for (option, why) in [
        (
            "--socket-group=no-such-group",
            "invalid value 'no-such-group' for '--socket-group <GROUP>': this host has no group of \
             this name; name another one (getent group), or pass a gid",
        ),
        (
            "--socket-group=4294967295",
            "invalid value '4294967295' for '--socket-group <GROUP>': a uid or gid is a number \
             from 0 to 4294967294",
        ),
        (
            "--socket-mode=rw",
            "invalid value 'rw' for '--socket-mode <MODE>': a mode is three octal digits, such as \
             660, with or without a 0 before them",
        ),
        (
            "--socket-mode=0640",
            "invalid value '0640' for '--socket-mode <MODE>': connecting needs the write \
             permission, without which the others are of no use; use 600, 660 or 666",
        ),
    ] {
        let output = run_with(&["--socket-path=/nowhere/x", option], Stdio::null());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_socket_that_neither_listens_nor_is_connected_is_refused() {
    let unconnected = || socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let folder = TempDir::new().unwrap();
    let bound = unconnected();
    let address = rustix::net::SocketAddrUnix::new(folder.path().join("socket")).unwrap();
    rustix::net::bind(&bound, &address).unwrap();
    for option in ["--fd", "--rtc-fd"] {
        let why = format!(
            "{option} 0: this socket neither listens nor is connected; call listen(2) on it \
             first, or pass one end of a socket pair"
        );
        let args = [option, "0"];
        cannot(&args, unconnected().into(), &why);
        cannot(&args, bound.try_clone().unwrap().into(), &why);
    }
}

#[test]
fn a_descriptor_that_is_not_a_unix_stream_socket_is_1_and_says_so() {
    fails(
        &["--fd=77"],
        Stdio::null(),
        "--fd 77: not an open descriptor",
    );
    let not = "not a Unix stream socket";
    fails(&["--fd=0"], Stdio::null(), not);
    let file = File::open("/proc/self/status").unwrap();
    fails(&["--fd=0"], file.into(), not);
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    fails(&["--fd=0"], OwnedFd::from(datagram).into(), not);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    fails(&["--fd=0"], OwnedFd::from(tcp).into(), not);
}

#[test]
fn a_descriptor_of_the_programs_own_is_not_one_that_it_was_passed() {
    for fd in 3..=9 {
        for option in ["--fd", "--rtc-fd"] {
            let output = run_after(CLOSE, &[option, &fd.to_string()]);
            let why = format!(
                "vhost-user-timer: {option} {fd}: not an open descriptor; pass the number of one \
                 that this process inherits, without FD_CLOEXEC\n"
            );
            assert_eq!(text(&output.stderr), why);
            assert_eq!(output.status.code(), Some(1));
        }
    }
}

#[test]
fn both_devices_on_one_descriptor_is_2() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    is_wrong(
        &["--fd=0", "--rtc-fd=0"],
        OwnedFd::from(socket).into(),
        "--fd and --rtc-fd name the same descriptor; each device needs its own",
    );
}

#[test]
fn both_devices_on_two_descriptors_of_one_socket_is_2() {
    let folder = TempDir::new().unwrap();
    let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
    let copy = OwnedFd::from(listener.try_clone().unwrap());
    let output = Command::new(find_program().unwrap())
        .args(["--fd=0", "--rtc-fd=1"])
        .stdin(OwnedFd::from(listener))
        .stdout(copy)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "vhost-user-timer: --fd 0 and --rtc-fd 1 are the same socket; each device needs its own\n"
    );
}

#[test]
fn a_counter_source_of_another_architecture_is_1_and_says_what_to_do() {
    let other = if cfg!(target_arch = "aarch64") {
        "tsc"
    } else {
        "cntvct"
    };
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("socket");
    let option = option("--socket-path", &socket);
    let source = format!("--counter-source={other}");
    fails(
        &[&option, &source],
        Stdio::null(),
        "use --counter-source monotonic",
    );
    assert!(!socket.exists());
}

#[test]
fn something_that_is_no_socket_is_refused_and_not_removed() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [&file, &link, &folder.path().to_owned()] {
        let option = option("--socket-path", path);
        fails(&[&option], Stdio::null(), "not a socket");
    }
    assert_eq!(fs::read_to_string(&link).unwrap(), "precious");
}
