//! Memory whose pages another process serves: a file on FUSE whose server answers nothing once the
//! file is open. A page fault would wait for that server, and so do fstat(2) and fstatfs(2).

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, Stdio};

use vhost_user_timer_kit::raw_driver::Control;
use vhost_user_timer_kit::victim::{TIMER_FEATURES, Victim};

use crate::namespaces::can_mount_fuse;

const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const SET_LOG_BASE: u32 = 6;
const GET_FEATURES: u32 = 1;
const SET_VRING_KICK: u32 = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// Names the directory on which a child process mounts and serves its file system.
const SERVER: &str = "HOSTILE_FUSE_SERVER";
/// Whether the server does not even answer when the file is closed.
const SILENT: &str = "HOSTILE_FUSE_SILENT";
/// Names the socket that a child process attacks, and the file that it sends.
const ATTACKED: &str = "HOSTILE_FUSE_ATTACKED";
const FILE: &str = "HOSTILE_FUSE_FILE";
const REFUSED: &str = "every message is refused";
const READY: &str = "the file system is mounted";

/// A process with a file system in namespaces of its own.
struct Server {
    child: Child,
    /// The process ends when this is closed.
    _life: ChildStdin,
}

impl Server {
    /// Runs `test` of this program again, which calls [`serve`].
    fn launch(test: &str, silent: bool) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount"])
            .arg(program)
            .args(["--exact", test, "--nocapture"])
            .env(SERVER, "/mnt")
            .env(SILENT, silent.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1)");
        let life = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap() == READY);
        assert!(ready, "the file system is not mounted");
        Server { child, _life: life }
    }

    fn path(&self) -> String {
        format!("/proc/{}/root/mnt/file", self.child.id())
    }

    fn file(&self) -> File {
        let mut options = File::options();
        options.read(true).write(true).open(self.path()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A reply of FUSE (linux/fuse.h): `struct fuse_out_header` and a body.
fn reply(device: &mut File, unique: u64, error: i32, body: &[u8]) {
    let len = 16 + body.len() as u32;
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(error.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(body);
    // Fails where the kernel no longer waits for it.
    let _ = device.write(&bytes);
}

/// `struct fuse_attr` of a directory or of a file of 16 MiB.
fn attributes(directory: bool) -> Vec<u8> {
    let mode: u32 = if directory { 0o40_755 } else { 0o100_666 };
    let words: [u64; 6] = [2, 16 << 20, 0, 0, 0, 0];
    let halves: [u32; 10] = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(halves.iter().flat_map(|half| half.to_ne_bytes()));
    bytes
}

/// Mounts a file system with one file and serves it until that was opened. From then on only
/// closing it is answered, and not even that where it is silent.
fn serve(directory: &str) {
    let silent = std::env::var(SILENT).is_ok_and(|silent| silent == "true");
    const LOOKUP: u32 = 1;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const FLUSH: u32 = 25;
    const INIT: u32 = 26;
    const ENOSYS: i32 = 38;
    let mut device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .expect("/dev/fuse");
    let mounted = Command::new("mount")
        .args(["-i", "-t", "fuse", "none", directory, "-o"])
        .arg("fd=0,rootmode=40000,user_id=0,group_id=0")
        .stdin(device.try_clone().unwrap())
        .status()
        .unwrap();
    assert!(mounted.success(), "mount(8)");
    // The parent reads no more of this process's output than this line.
    println!("\n{READY}");
    let mut opened = false;
    let mut bytes = vec![0; 1 << 20];
    // Fails when the file system is unmounted.
    while let Ok(len) = device.read(&mut bytes) {
        let request = &bytes[..len];
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
        let node = u64::from_ne_bytes(request[16..24].try_into().unwrap());
        match word(4) {
            INIT => {
                let halves: [u32; 16] = [7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                let body: Vec<u8> = halves.iter().flat_map(|half| half.to_ne_bytes()).collect();
                reply(&mut device, unique, 0, &body);
            }
            FLUSH if !silent => reply(&mut device, unique, -ENOSYS, &[]),
            _ if opened => {}
            LOOKUP => {
                // Node 2; the entry stays valid, its attributes do not.
                let words: [u64; 5] = [2, 1, 1000, 0, 0];
                let body = words.iter().flat_map(|word| word.to_ne_bytes());
                let body: Vec<u8> = body.chain(attributes(false)).collect();
                reply(&mut device, unique, 0, &body);
            }
            GETATTR => {
                let body = [vec![0; 16], attributes(node == 1)].concat();
                reply(&mut device, unique, 0, &body);
            }
            OPEN => {
                reply(&mut device, unique, 0, &[0; 16]);
                opened = true;
            }
            _ => reply(&mut device, unique, -ENOSYS, &[]),
        }
    }
}

#[test]
fn a_file_on_fuse_is_refused_without_asking_its_server() {
    if let Ok(directory) = std::env::var(SERVER) {
        return serve(&directory);
    }
    if !can_mount_fuse() {
        return;
    }
    let test = "memory_files::a_file_on_fuse_is_refused_without_asking_its_server";
    let server = Server::launch(test, false);
    let victim = Victim::launch();
    // After every process is started: one that closes the file waits for the server.
    let file = server.file();
    for code in [SET_MEM_TABLE, ADD_MEM_REG] {
        let mut control = victim.negotiated();
        let region = [1, 0x1000, 1 << 20, 0x1000, 0];
        let answer = victim.in_time("it is refused", || {
            control.ask(code, &region, &[file.as_fd()])
        });
        assert!(!matches!(answer, Ok(0)), "it is accepted");
        victim
            .rig
            .log_with("is not mounted where the backend can see it");
        drop(control);
        victim.unharmed();
    }
    let mut control = victim.clock_negotiated(LOG_ALL);
    let answer = victim.in_time("it is refused", || {
        control.ask(SET_LOG_BASE, &[1 << 20, 0], &[file.as_fd()])
    });
    assert!(!matches!(answer, Ok(0)), "it is accepted");
    drop(control);
    victim.unharmed();
    // Before the file is closed, so that nothing waits for it.
    drop(server);
}

#[test]
fn a_file_whose_close_is_never_answered_costs_one_thread_and_no_connection() {
    if let Ok(directory) = std::env::var(SERVER) {
        return serve(&directory);
    }
    if let Ok(path) = std::env::var(ATTACKED) {
        return send_file(&path);
    }
    if !can_mount_fuse() {
        return;
    }
    let test =
        "memory_files::a_file_whose_close_is_never_answered_costs_one_thread_and_no_connection";
    let victim = Victim::launch();
    let server = Server::launch(test, true);
    // In a process of its own: one that has the file open and starts another would wait.
    let mut attacker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ATTACKED, victim.rig.backend.socket_path())
        .env(FILE, server.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program");
    let mut lines = BufReader::new(attacker.stdout.take().unwrap()).lines();
    let refused = victim.in_time("every message is refused", || {
        lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line == REFUSED)
    });
    assert!(refused, "a message is accepted, or the connection ended");
    victim.serves_the_clock();
    // The connection ends and makes room.
    drop(attacker.stdin.take());
    victim.serves_the_timer();
    // The kernel answers for a server that is gone.
    drop(server);
    let _ = attacker.wait();
    victim.unharmed();
}

/// Sends the silent server's file with messages of every kind; each is refused.
fn send_file(path: &str) {
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .open(std::env::var(FILE).unwrap());
    // Closing it waits for the server.
    let file = std::mem::ManuallyDrop::new(file.unwrap());
    let stream = UnixStream::connect(path).expect("the victim");
    let mut control = Control::negotiated(stream, TIMER_FEATURES);
    for code in [
        SET_MEM_TABLE,
        ADD_MEM_REG,
        SET_VRING_KICK,
        SET_BACKEND_REQ_FD,
    ] {
        let body: &[u64] = match code {
            SET_MEM_TABLE | ADD_MEM_REG => &[1, 0x1000, 1 << 20, 0x1000, 0],
            _ => &[0],
        };
        let answer = control.ask(code, body, &[file.as_fd()]);
        assert_ne!(answer.expect("an answer"), 0, "message {code} is accepted");
    }
    control
        .ask(GET_FEATURES, &[], &[])
        .expect("the connection goes on");
    println!("\n{REFUSED}");
    let _ = std::io::stdin().read(&mut [0]);
    drop(control);
    // The end of the process closes the file.
}
