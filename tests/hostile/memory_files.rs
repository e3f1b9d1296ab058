//! Memory whose pages another process serves: a file on FUSE whose server answers nothing once the
//! file is open. A page fault would wait for that server, and so do fstat(2) and fstatfs(2).

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, Command, Stdio};

use vhost_user_timer_kit::victim::Victim;

const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const SET_LOG_BASE: u32 = 6;
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// Names the directory on which a child process mounts and serves its file system.
const SERVER: &str = "HOSTILE_FUSE_SERVER";
const READY: &str = "the file system is mounted";

/// A process with a file system in namespaces of its own.
struct Server {
    child: Child,
    /// The process ends when this is closed.
    _life: ChildStdin,
}

impl Server {
    /// Runs `test` of this program again, which calls [`serve`].
    fn launch(test: &str) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount"])
            .arg(program)
            .args(["--exact", test, "--nocapture"])
            .env(SERVER, "/mnt")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1)");
        let life = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap() == READY);
        assert!(ready, "the test needs /dev/fuse and user namespaces");
        Server { child, _life: life }
    }

    fn file(&self) -> File {
        let path = format!("/proc/{}/root/mnt/file", self.child.id());
        let mut options = File::options();
        options.read(true).write(true).open(path).unwrap()
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
/// closing it is answered.
fn serve(directory: &str) {
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
            FLUSH => reply(&mut device, unique, -ENOSYS, &[]),
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
    let test = "memory_files::a_file_on_fuse_is_refused_without_asking_its_server";
    let server = Server::launch(test);
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
