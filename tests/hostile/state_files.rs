//! State files that are not what a backend left, and launchers that do not say what fits them: the
//! backend starts with its VM, or it says why not and leaves the file as it is.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::{BackendProcess, Devices, Launch};
use vhost_user_timer_kit::clock_driver::{ClockDriver, UTC, clock_type};
use vhost_user_timer_kit::contract::{CNT, CTL, CVAL, Client, VmState};
use vhost_user_timer_kit::raw_driver::{Rig, release_program};
use vhost_user_timer_kit::state_file;
use vhost_user_timer_kit::victim::DEADLINE;

use crate::namespaces::can_unshare;

/// Bytes of a state file for this many vCPUs.
const LEN: u64 = 1152 + 192 * VCPUS;
const VCPUS: u64 = 3;

/// A little more than a backend for 512 vCPUs uses, KiB.
const USUAL_KIB: u64 = 8 << 10;

/// A directory with a state file.
struct Kept(TempDir);

impl Kept {
    /// With nothing in it.
    fn new() -> Self {
        Kept(tempfile::tempdir().unwrap())
    }

    /// With the file of a VM that a backend left, and what the VM is.
    fn with_vm() -> (Self, VmState) {
        let kept = Kept::new();
        let rig = kept.start(&[], "exec \"$@\"");
        let mut client = Client::connect(&rig);
        client.configure(2);
        client.set(0, &[(CTL, 1), (CVAL, 1 << 40), (CNT, 1 << 30)]);
        let vm = client.state().at_rest(false);
        drop(client);
        end(rig);
        (kept, vm)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.file()).unwrap()
    }

    fn put(&self, bytes: &[u8]) {
        state_file::write(&self.file(), bytes).unwrap();
    }

    /// A backend with this file, these options as well, and this shell script.
    fn launch(&self, args: &[&str], script: &str) -> BackendProcess {
        let (program, _) = release_program().unwrap();
        let file = format!("--state-file={}", self.file().display());
        let launch = Launch::new(&program, Devices::Timer).script(script);
        let max_vcpus = format!("--max-vcpus={VCPUS}");
        let launch = launch.args(&[&file, &max_vcpus]).args(args);
        launch.inheriting().start().unwrap()
    }

    fn start(&self, args: &[&str], script: &str) -> Rig {
        Rig::watch(self.launch(args, script))
    }

    /// Checks that a backend with these options goes on with this VM.
    #[track_caller]
    fn goes_on(&self, args: &[&str], script: &str, vm: &VmState) {
        let rig = self.start(args, script);
        let mut client = Client::connect(&rig);
        assert_eq!(client.state().at_rest(false), *vm);
        let usage = rig.usage();
        let kib = usage.anonymous_kib + usage.shared_kib;
        assert!(kib < USUAL_KIB, "{kib} KiB");
        drop(client);
        end(rig);
    }

    /// Checks that a backend with these options does not start, says this, and leaves the file as
    /// it is.
    #[track_caller]
    fn is_refused(&self, args: &[&str], text: &str) {
        let before = self.bytes();
        let mut backend = self.launch(args, "exec \"$@\"");
        let ended = backend.exit_within(DEADLINE);
        let _ = backend.kill();
        let log = backend.log();
        assert_eq!(ended.and_then(|status| status.code()), Some(1), "{log}");
        assert!(log.contains(text), "{log}");
        assert!(self.bytes() == before, "the file changed: {log}");
    }
}

#[track_caller]
fn end(mut rig: Rig) {
    rig.backend.signal(Signal::TERM);
    let status = rig.backend.exit_within(DEADLINE).expect("it ends in time");
    assert!(status.success(), "{status}");
}

#[test]
fn a_foreign_file_that_begins_with_zeros_is_not_emptied() {
    let kept = Kept::new();
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    // The same with the length of a state file, one byte of something, and nothing.
    let mut short = vec![0; LEN as usize];
    short[LEN as usize - 1] = 1;
    for foreign in [disk, short, vec![0; 4096], vec![0; 8]] {
        kept.put(&foreign);
        kept.is_refused(&[], "is not a state file");
    }
}

#[test]
fn no_bit_of_the_header_starts_the_vm_over() {
    let (kept, vm) = Kept::with_vm();
    let good = kept.bytes();
    for at in 0..state_file::HEADER {
        let whole = (state_file::VERSION..12).contains(&at) || state_file::BOOT_ID.contains(&at);
        let bits = if whole { 0..8 } else { at % 8..at % 8 + 1 };
        for bit in bits {
            let mut flipped = good.clone();
            flipped[at] ^= 1 << bit;
            kept.put(&flipped);
            let text = if at < 8 {
                "is not a state file"
            } else {
                "is damaged"
            };
            kept.is_refused(&[], text);
        }
    }
    kept.put(&good);
    kept.goes_on(&[], "exec \"$@\"", &vm);
}

#[test]
fn a_file_of_another_version_is_not_emptied() {
    let (kept, _) = Kept::with_vm();
    for boot in [state_file::of_this_boot, state_file::of_another_boot] {
        let mut later = boot(&kept.bytes());
        later[state_file::VERSION] += 1;
        state_file::seal(&mut later);
        kept.put(&later);
        kept.is_refused(&[], "restart the version that wrote it, or delete the file");
        later[state_file::VERSION] -= 1;
        state_file::seal(&mut later);
        kept.put(&later);
    }
}

#[test]
fn a_files_length_costs_nothing() {
    let (kept, vm) = Kept::with_vm();
    let whole = kept.bytes();
    for bytes in [whole.clone(), state_file::as_of_version_2(&whole)] {
        kept.put(&bytes);
        let file = File::options().write(true).open(kept.file()).unwrap();
        file.set_len(8 << 30).unwrap();
        // A backend that takes memory by the length ends here, and does not take the host's.
        kept.goes_on(&[], "ulimit -v 1048576; exec \"$@\"", &vm);
    }
}

#[test]
fn an_option_that_contradicts_the_file_is_refused_by_its_name() {
    let (kept, vm) = Kept::with_vm();
    kept.is_refused(
        &["--counter-frequency=62500000"],
        "restart with --counter-frequency 1000000000 or without the option",
    );
    kept.is_refused(&["--counter-source=boottime"], "--counter-source");
    kept.goes_on(&["--counter-frequency=1000000000"], "exec \"$@\"", &vm);
}

#[test]
fn a_guests_clock_stays_what_it_was_and_another_kind_is_refused_by_its_option() {
    let (program, _) = release_program().unwrap();
    let args = |kind: &str| [format!("--rtc-clock={kind}")];
    let devices = Devices::TimerAndClock;
    let launched = BackendProcess::launch_devices_with_state(&program, devices, &args("smeared"));
    let mut rig = Rig::watch(launched.unwrap());
    let smeared = |rig: &Rig| {
        let mut guest = ClockDriver::connect(rig);
        // An alarm is a change, and the record is in the file with the first one.
        guest.set_alarm(UTC, u64::MAX, true);
        let kind = guest.clock_cap(UTC).unwrap().clock_type;
        assert_eq!(kind, clock_type::UTC_SMEARED);
    };
    smeared(&rig);
    assert!(rig.backend.terminate().success());
    let error = rig.backend.relaunch_with_state(&program, &args("utc"));
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("restart with --rtc-clock smeared or without the option"),
        "{text}"
    );
    rig.backend
        .relaunch_with_state::<&str>(&program, &[])
        .unwrap();
    smeared(&rig);
}

#[test]
fn a_count_that_went_back_is_refused() {
    const SECOND: u64 = 1_000_000_000;
    let (kept, vm) = Kept::with_vm();
    let good = kept.bytes();
    // Less the time since the file was written, and that is not more than 100,000 s.
    let ahead = 1_000_000 * SECOND;
    kept.put(&state_file::with_larger_host_count(&good, ahead));
    kept.is_refused(&[], "it went back by 9");
    // Time that passed is no fault. The host has been up for longer than this.
    kept.put(&state_file::with_larger_host_count(
        &good,
        0_u64.wrapping_sub(SECOND),
    ));
    kept.goes_on(&[], "exec \"$@\"", &vm);
}

#[test]
fn a_file_system_that_is_no_local_disk_is_refused_by_its_name() {
    if !can_unshare(&["-Urmi"]) {
        return;
    }
    let kept = Kept::new();
    // Any that is not known to be local stands for FUSE and NFS, which need a server.
    let script = format!(
        "exec unshare -Urmi sh -c 'mount -t mqueue none {} && exec \"$@\"' sh \"$@\"",
        kept.0.path().display()
    );
    let mut backend = kept.launch(&[], &script);
    let ended = backend.exit_within(DEADLINE);
    let _ = backend.kill();
    let log = backend.log();
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{log}");
    assert!(
        log.contains("lies on mqueue, whose pages may come from another process or host"),
        "{log}"
    );
}

#[test]
fn a_file_of_another_time_namespace_is_refused() {
    let unshare = ["-UrT", "--fork", "--monotonic", "1000000", "--"];
    if !can_unshare(&unshare) {
        return;
    }
    let kept = Kept::new();
    let pid = kept.0.path().join("pid");
    let script = format!(
        "exec unshare {} sh -c 'echo $$ >{}; exec \"$@\"' sh \"$@\"",
        unshare.join(" "),
        pid.display()
    );
    let mut rig = kept.start(&[], &script);
    Client::connect(&rig).configure(2);
    // The process below unshare(1), which ends with the same status.
    let pid = fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    let status = rig.backend.exit_within(DEADLINE).expect("it ends in time");
    assert!(status.success(), "{status}");
    // Less the time since the file was written.
    kept.is_refused(&[], "it went back by 9");
}

#[test]
fn a_file_that_another_user_can_change_is_refused_with_the_remedy() {
    let (kept, vm) = Kept::with_vm();
    for mode in [0o660, 0o606, 0o622] {
        fs::set_permissions(kept.file(), Permissions::from_mode(mode)).unwrap();
        kept.is_refused(&[], "take that away with chmod go-w");
    }
    fs::set_permissions(kept.file(), Permissions::from_mode(0o644)).unwrap();
    match std::os::unix::fs::chown(kept.file(), Some(65_534), None) {
        Ok(()) => {
            kept.is_refused(&[], "belongs to user 65534");
            std::os::unix::fs::chown(kept.file(), Some(rustix::process::geteuid().as_raw()), None)
                .unwrap();
        }
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
    }
    kept.goes_on(&[], "exec \"$@\"", &vm);
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let kept = Kept::new();
    let paths = ["/dev/zero", "/dev/null", "/proc/self", "/"];
    let (program, _) = release_program().unwrap();
    let mut refused = |path: &str| {
        let launch = Launch::new(&program, Devices::Timer);
        let launch = launch.args(&[format!("--state-file={path}")]);
        let mut backend = launch.inheriting().start().unwrap();
        let ended = backend.exit_within(DEADLINE);
        let _ = backend.kill();
        let log = backend.log();
        assert_eq!(ended.and_then(|status| status.code()), Some(1), "{log}");
        assert!(log.contains("state file"), "{log}");
    };
    paths.into_iter().for_each(&mut refused);
    let fifo = kept.file();
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    refused(fifo.to_str().unwrap());
    let link = kept.0.path().join("link");
    std::os::unix::fs::symlink("/etc/hosts", &link).unwrap();
    refused(link.to_str().unwrap());
}

#[test]
fn a_file_that_the_launcher_made_empty_is_used() {
    let kept = Kept::new();
    kept.put(&[]);
    let rig = kept.start(&[], "exec \"$@\"");
    let mut client = Client::connect(&rig);
    client.configure(2);
    let vm = client.state().at_rest(false);
    drop(client);
    end(rig);
    kept.goes_on(&[], "exec \"$@\"", &vm);
}
