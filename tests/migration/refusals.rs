//! What QEMU says where the device cannot be, or where a destination does not take the VM. An
//! operator has nothing else, so the texts are compared in full.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use vhost_user_timer_kit::backend_process::exit_within;
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::qemu::{
    Environment, Error, Guest, LIBRARY_VARIABLE, Options, PATIENCE, Shape, TimerVm, UNHURRIED,
    environment, timer_library,
};
use vhost_user_timer_kit::raw_driver::{Rig, release_program};

use crate::judge::{assert_right, await_all};

/// How a test names the backend program, whose path depends on the build.
const BACKEND: &str = "BACKEND";

fn backend() -> String {
    let (program, _) = release_program().expect("a backend program");
    program.display().to_string()
}

/// A QEMU without a guest, with these arguments.
fn start(environment: &Environment, args: &[&str]) -> Child {
    let library = timer_library().unwrap_or_else(|error| panic!("{error}"));
    Command::new(environment.patched_qemu())
        .env(LIBRARY_VARIABLE, library)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
        .args(["-machine", "virt", "-smp", "4", "-m", "64M"])
        .args(args.iter().map(|arg| arg.replace(BACKEND, &backend())))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("QEMU")
}

/// What a QEMU said that ended by itself, with an error.
fn ended(mut child: Child) -> String {
    let status = exit_within(&mut child, PATIENCE);
    let _ = child.kill();
    let mut said = String::new();
    let stderr = child.stderr.as_mut().expect("a pipe");
    stderr.read_to_string(&mut said).expect("text");
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{said}");
    said.replace(&backend(), BACKEND)
}

/// QEMU's own error when it is started with this device, without what QEMU puts before it. A device
/// without a time-out gets one that a backend that answers never uses up.
fn refused(environment: &Environment, args: &[&str], device: &str) -> String {
    let device = match device.contains("timeout=") {
        true => device.to_owned(),
        false => format!("{device},{UNHURRIED}"),
    };
    let args = [&["-cpu", "cortex-a72"], args, &["-device", &device]].concat();
    let said = ended(start(environment, &args));
    let before = format!("-device {device}: ");
    let error = said.lines().find_map(|line| line.split_once(&before));
    error.map_or(said.clone(), |(_, error)| error.to_owned())
}

#[test]
fn each_way_to_connect_that_leads_nowhere_is_an_error_that_says_why() {
    let Some(environment) = environment() else {
        return;
    };
    let null = ["-chardev", "null,id=null"];
    for (args, properties, text) in [
        (
            &[][..],
            "",
            "exactly one of chardev, fd and backend is needed",
        ),
        (
            &[],
            "fd=0,backend=BACKEND",
            "exactly one of chardev, fd and backend is needed",
        ),
        (&null, "chardev=null", "chardev 'null' is not a socket"),
        (
            &[],
            "fd=0",
            "cannot set up the backend's connection: cannot set up the control socket: Socket \
             operation on non-socket (os error 88)",
        ),
        (
            &[],
            "fd=77",
            "cannot set up the backend's connection: cannot duplicate descriptor 77: Bad file \
             descriptor (os error 9)",
        ),
        (
            &[],
            "backend=/bin/true",
            "cannot launch the backend: the backend program /bin/true ended before it served, \
             with exit status: 0: its stderr says why",
        ),
        (
            &[],
            "backend=/nonexistent",
            "cannot launch the backend: cannot start the backend program /nonexistent: No such \
             file or directory (os error 2)",
        ),
        (
            &[],
            "fd=0,state-file=x",
            "backend-args and state-file are for a backend that QEMU launches (backend)",
        ),
        (
            &[],
            "backend=BACKEND,reconnect=on",
            "reconnect needs a chardev with a path, or a backend with a state-file",
        ),
        (&[], "fd=0,timeout=0", "timeout must be at least 1 ms"),
    ] {
        let device = ["vhost-user-timer", properties].join(",");
        let device = device.trim_end_matches(',');
        assert_eq!(refused(&environment, args, device), text, "{device}");
    }
}

#[test]
fn a_vm_that_the_backend_does_not_take_is_an_error_that_says_what_was_asked() {
    let Some(environment) = environment() else {
        return;
    };
    for args in ["--max-vcpus=2", "--counter-frequency=1000000"] {
        let device = format!("vhost-user-timer,backend=BACKEND,backend-args={args}");
        assert_eq!(
            refused(&environment, &[], &device),
            "cannot have the backend configure a VM of 4 vCPUs with a counter of 62500000 Hz, \
             which its --max-vcpus and --counter-frequency must allow: CONFIGURE_VM was refused: \
             EINVAL (bad value)",
            "{args}"
        );
    }
}

#[test]
fn a_backend_that_has_a_vm_already_is_refused() {
    let Some(environment) = environment() else {
        return;
    };
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    drop(client);
    let said = refused_by(&environment, &rig, UNHURRIED);
    assert_eq!(
        said,
        "the backend has a VM already; start it again, without the state file of another VM"
    );
}

#[test]
fn a_backend_that_hangs_when_qemu_starts_is_an_error_after_the_time_out() {
    let Some(environment) = environment() else {
        return;
    };
    let mut rig = Rig::launch_release(&[]);
    rig.backend.signal(Signal::STOP);
    let said = refused_by(&environment, &rig, "timeout=1000");
    rig.backend.signal(Signal::CONT);
    assert_eq!(
        said,
        "cannot set up the backend's connection: the backend did not answer the handshake in time"
    );
}

/// QEMU's own error when its device is connected to this backend.
fn refused_by(environment: &Environment, rig: &Rig, timeout: &str) -> String {
    let chardev = format!("socket,id=c0,path={}", rig.backend.socket_path().display());
    refused(
        environment,
        &["-chardev", &chardev],
        &format!("vhost-user-timer,chardev=c0,{timeout}"),
    )
}

#[test]
fn a_machine_whose_time_the_backend_cannot_keep_is_refused() {
    let Some(environment) = environment() else {
        return;
    };
    let device = &format!("vhost-user-timer,backend=BACKEND,{UNHURRIED}");
    for (args, text) in [
        (
            &["-device", device][..],
            "a VM has at most one vhost-user-timer",
        ),
        (
            &["-icount", "shift=auto"],
            "-icount and record/replay have a clock that no backend can follow",
        ),
        (
            &["-cpu", "cortex-a72,cntfrq=62500001"],
            "a counter of 62500001 Hz has no period of whole ns, so under TCG it counts at another \
             frequency",
        ),
    ] {
        assert_eq!(refused(&environment, args, device), text);
    }
}

#[test]
fn a_sandbox_that_forbids_children_forbids_to_launch_the_backend() {
    let Some(environment) = environment() else {
        return;
    };
    let args = ["-sandbox", "on,spawn=deny"];
    let said = refused(&environment, &args, "vhost-user-timer,backend=BACKEND");
    assert_eq!(
        said,
        "-sandbox spawn=deny forbids to launch 'BACKEND'; launch it outside, and connect by \
         chardev or fd"
    );
}

/// Has this VM migrate there, which must fail and leave it running. What the destination's QEMU
/// said.
fn refused_there(source: &mut TimerVm, destination: &mut Guest) -> String {
    let before = source.guest.witness().expect("a report");
    let error = source.guest.send_to(destination);
    let error = error.expect_err("the destination does not fit");
    let Error::Migration { log, .. } = error else {
        panic!("{error}");
    };
    let after = await_all(&mut source.guest, &before);
    assert_right(&before, &after);
    assert_eq!(source.phase().expect("a phase"), "running");
    log
}

#[test]
fn a_destination_of_another_shape_does_not_take_the_vm_and_the_source_runs_on() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default();
    let mut source = TimerVm::boot(&environment, &shape);
    source.guest.start_witness(0).unwrap();
    for (cpu, vcpus, text) in [
        (
            "cortex-a72",
            5,
            "vhost-user-timer: the VM was saved with 4 vCPUs, and has 5 here\n",
        ),
        // QEMU's own: it does not come as far as the device.
        ("cortex-a72", 3, "state for instance 0x0 of device 'cpu'"),
        (
            "cortex-a72,cntfrq=125000000",
            4,
            "vhost-user-timer: the VM was saved with a counter of 62500000 Hz, and has one of \
             125000000 Hz here\n",
        ),
    ] {
        let other = shape.clone();
        let other = other.machine(|machine| machine.vcpus(cpu, vcpus));
        let mut destination = TimerVm::incoming(&environment, &other);
        let log = refused_there(&mut source, &mut destination.guest);
        assert!(log.contains(text), "{log}");
    }

    let library = timer_library().unwrap();
    let without = Options::default()
        .vcpus("cortex-a72", 4)
        .program(environment.patched_qemu())
        .variable(LIBRARY_VARIABLE, library)
        .incoming();
    let mut destination = Guest::start(&environment, &without).unwrap();
    let log = refused_there(&mut source, &mut destination);
    let text = "section or instance 'vhost-user-timer' 0";
    assert!(log.contains(text), "{log}");
}
