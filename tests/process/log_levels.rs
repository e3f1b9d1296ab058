//! What the log says at its start, and what each level adds.

use vhost_user_timer_kit::backend_process::{BackendProcess, Devices, find_program};
use vhost_user_timer_kit::clock_driver::{ClockDriver, MONOTONIC, UTC, host};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, VM, configure_body, op, range_body, request, restore, restore_body,
};
use vhost_user_timer_kit::raw_driver::message::{
    SET_FEATURES, SET_MEM_TABLE, SET_VRING_ADDR, SET_VRING_ENABLE,
};
use vhost_user_timer_kit::raw_driver::{Control, Rig, pair};

/// The messages of a log's lines at this level, of connections or not.
fn messages(log: &str, level: &str) -> Vec<String> {
    let lines = log.lines().filter_map(|line| {
        let (head, message) = line.split_once("] ")?;
        head.contains(&format!("Z {level:<5} ")).then_some(message)
    });
    lines.map(str::to_owned).collect()
}

#[test]
fn the_first_line_says_the_version_the_devices_the_counter_and_the_options() {
    let args = [
        "--max-vcpus=8",
        "--poll-max-us=200",
        "--name=vm1",
        "--counter-source=auto",
    ];
    let program = find_program().unwrap();
    let mut backend = BackendProcess::launch_with_state(&program, &args).unwrap();
    let timer = backend.socket_path().display().to_string();
    let folder = backend.directory().display().to_string();
    let version = env!("CARGO_PKG_VERSION");
    let first = format!("Version {version} serves the timer device on {timer}; host counter ");
    let mut seen = 0;
    for starts in 1..=2 {
        let log = backend.log_with_times("Ready for a frontend", starts);
        let said = messages(&log[seen..], "INFO");
        assert!(said[0].starts_with(&first), "{log}");
        let file = format!(" Hz (--counter-source auto); state file {folder}/state; options: ");
        for wanted in [&file, " --max-vcpus=8 ", " --name=vm1"] {
            assert!(said[0].contains(wanted), "{wanted}: {log}");
        }
        assert!(!said[0].contains("poll-max-us"), "it is the default: {log}");
        // What is in the file is logged before there is a socket, and comes after the first line.
        assert!(said[1].contains("VM in "), "{log}");
        seen = log.len();
        backend.kill();
        backend.relaunch_with_state(&program, &args).unwrap();
    }
}

#[test]
fn debug_says_each_change_with_what_came_of_it() {
    let rig = Rig::launch(&["--log-level=debug"]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, restore::AUTORUN | restore::STRICT);
    client.bring(0, 1_000);
    client.restore_done(0);
    let waiter = client.wait_run(1, 0);
    client.set_done(1, &[(CTL, 0), (CVAL, 9), (CNT, 1_000)]);
    client.released(1, waiter);
    let log = rig.log_with("WAIT_RUN of 1 waiters is answered OK");
    let said = messages(&log, "DEBUG");
    let changes = [
        "CONFIGURE_VM: PAUSED, epoch 1",
        "RESTORE_BEGIN with AUTORUN, STRICT: RESTORING with 2 of 2 vCPUs missing, epoch 2",
        "SET_REGS of vCPU 0: RESTORING with 2 of 2 vCPUs missing, epoch 2",
        "RESTORE_DONE of vCPU 0: RESTORING with 1 of 2 vCPUs missing, epoch 2",
        "SET_REGS of vCPU 1 with DONE: RUNNING, epoch 2, CNTVOFF ",
    ];
    for (said, wanted) in said.iter().zip(changes) {
        assert!(said.starts_with(wanted), "{said}: {log}");
    }
    assert_eq!(said.len(), changes.len() + 1, "reads are not said: {log}");
}

#[test]
fn debug_says_each_refusal_with_its_reason() {
    let rig = Rig::launch(&["--log-level=debug", "--max-vcpus=4"]);
    let mut client = Client::connect(&rig);
    client.vm(op::CONFIGURE_VM, &configure_body(5, 0, 0));
    client.configure(2);
    client.vm(op::CONFIGURE_VM, &configure_body(3, 0, 0));
    client.vcpu(op::RESTORE_DONE, 1, &[]);
    client.vcpu(op::GET_REG_LIST, 2, &[]);
    client.ask(op::GET_INFO, VM, 7, &[]);
    client.vm(op::GET_VM, &range_body(1, 2));
    client.vm(op::RESTORE_BEGIN, &restore_body(3, 0, 0, 0));
    client.set_refused(0, &[(CTL, 0), (CTL, 1)]);
    client.set_refused(0, &[(CTL, 0), (1, 1)]);
    client.raw(&request(op::GET_VM, VM, 0, &range_body(0, 2)), 16);
    client.vm(op::PAUSE, &[]);
    client.vm(0x7777, &[]);
    client.restore_begin(2, 0);
    client.vcpu(op::RESTORE_DONE, 0, &[]);
    let log = rig.log_with("still lacks");
    let mut said = messages(&log, "DEBUG");
    said.retain(|line| line.contains(" is refused: "));
    let wanted = [
        "CONFIGURE_VM is refused: EINVAL: vcpus is 5; this backend takes 1 to 4 (--max-vcpus, up \
         to 4096)",
        "CONFIGURE_VM is refused: EBUSY: the VM is PAUSED: it is configured with other values; \
         RESET_DEVICE starts over",
        "RESTORE_DONE of vCPU 1 is refused: EBUSY: the VM is PAUSED; RESTORE_DONE is accepted in \
         RESTORING, ARMED",
        "GET_REG_LIST of vCPU 2 is refused: ENXIO: the VM has vCPUs 0 to 1",
        "GET_INFO in epoch 7 is refused: ESTALE: the VM is in epoch 1",
        "GET_VM is refused: EINVAL: first is 1 and count 2, and the VM has 2 vCPUs",
        "RESTORE_BEGIN is refused: EINVAL: vcpus is 3, and the VM has 2",
        "SET_REGS of vCPU 0 is refused: EINVAL: entry 1 sets TIMER_CTL to another value than an \
         earlier entry",
        "SET_REGS of vCPU 0 is refused: ENOENT: entry 1: the VM has no register \
         0x0000000000000001",
        "GET_VM is refused: E2BIG: the answer has 168 bytes, and the chain room for 16",
        "PAUSE is refused: EPROTO: 16 bytes; it has 24, header included",
        "unknown operation 0x7777 is refused: EOPNOTSUPP: this version has no such operation",
        "RESTORE_DONE of vCPU 0 is refused: ENODATA: the vCPU still lacks TIMER_CTL, TIMER_CNT, \
         TIMER_CVAL",
    ];
    assert_eq!(said, wanted);
}

#[test]
fn trace_says_every_request_of_both_devices() {
    let program = find_program().unwrap();
    let args = ["--log-level=trace"];
    let backend = BackendProcess::launch_devices(&program, Devices::TimerAndClock, &args);
    let rig = Rig::watch(backend.unwrap());
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.get(0, &[CNT]);
    let waiter = client.wait_run(1, 0);
    client.resume();
    client.released(1, waiter);
    let mut guest = ClockDriver::connect(&rig);
    guest.read(UTC);
    guest.set_alarm(MONOTONIC, 1, true);
    let log = rig.log_with("SET_ALARM of clock 1 to 1 ns, enabled: answered");
    let mut said = messages(&log, "TRACE");
    said.retain(|line| !line.ends_with(" descriptors") && !line.contains(" was kicked"));
    let wanted = [
        "CONFIGURE_VM: 32 bytes, answered OK detail 0, 16 bytes, after ",
        "GET_REGS of vCPU 0: 24 bytes, answered OK detail 0, 32 bytes, after ",
        "WAIT_RUN of vCPU 0: 16 bytes, waits",
        "RESUME: 16 bytes, answered OK detail 0, 56 bytes, after ",
        "READ of clock 0: answered S_OK, 16 bytes",
        "SET_ALARM of clock 1 to 1 ns, enabled: answered S_OK, 8 bytes",
    ];
    for (said, wanted) in said.iter().zip(wanted) {
        assert!(said.starts_with(wanted), "{said}: {log}");
    }
    assert_eq!(said.len(), wanted.len(), "{log}");
}

#[test]
fn info_says_nothing_of_requests() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.vcpu(op::RESTORE_DONE, 0, &[]);
    client.resume();
    let log = rig.log_with("VM PAUSED -> RUNNING");
    assert!(
        messages(&log, "DEBUG").is_empty() && messages(&log, "TRACE").is_empty(),
        "{log}"
    );
    assert!(!log.contains("RESTORE_DONE"), "{log}");
}

#[test]
fn a_message_about_a_ring_is_refused_by_its_name_queue_and_value() {
    let rig = Rig::launch(&[]);
    let refused = |code, body: &[u64], wanted: &str| {
        let mut control = Control::negotiated(rig.stream(), 1 << 32 | 1 << 30);
        let _ = control.ask(code, body, &[]);
        rig.log_with(wanted);
    };
    refused(
        SET_VRING_ENABLE,
        &[pair(7, 1)],
        "SET_VRING_ENABLE refused: there is no queue 7; the device has 2, from 0 on",
    );
    refused(
        SET_VRING_ADDR,
        &[1, 0x1000, 0x1000, 0x1000, 0],
        "SET_VRING_ADDR refused: queue 1 would be in memory, of which none is shared; the backend \
         needs memory of a file that is shared: with QEMU, -machine memory-backend=mem -object ",
    );
    refused(
        SET_MEM_TABLE,
        &[0],
        "SET_MEM_TABLE refused: it shares no memory; the backend needs memory of a file that is \
         shared: with QEMU, -machine memory-backend=mem -object memory-backend-memfd,",
    );
    // What only the crate finds.
    let mut control = Control::over(rig.stream());
    let _ = control.ask(SET_FEATURES, &[1 << 63], &[]);
    rig.log_with("ended on SET_FEATURES (0x8000000000000000): ");
}

#[test]
fn how_much_elapsed_time_is_added_is_said_and_decades_are_a_warning() {
    let rig = Rig::launch(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    let mut begin = |saved| {
        let body = restore_body(1, restore::ELAPSED, saved, 0);
        client.vm(op::RESTORE_BEGIN, &body).ok(0);
    };
    begin(host::utc() - 90_000_000_000_000);
    begin(0);
    let log = rig.log_with("not 0");
    let added = " s since the save are added to the guest's counts";
    let [short, long] = ["INFO", "WARN"].map(|level| messages(&log, level).concat());
    let text = format!("Restore with ELAPSED: 1 days and 3600{added}");
    assert!(
        short.contains(&text) && !short.contains("saved_realtime_ns"),
        "{log}"
    );
    assert!(
        long.contains(added) && long.contains("saved_realtime_ns"),
        "{log}"
    );
}
