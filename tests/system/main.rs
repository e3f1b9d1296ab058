//! The systemd units on a booted Debian, whose first process is systemd. Each test has a VM of its
//! own, and so an instance of the units.

mod machine;

use machine::{Machine, on};

/// The most that `systemd-analyze security` may say, of 10. It was this when the unit was written.
/// What is left: the host's root, AF_UNIX, /proc/sys, other users, and the access to char-rtc that
/// ProtectClock= brings.
const EXPOSURE: f64 = 0.4;

/// Asks the timer device what its VM is, and so starts the service.
fn info(vm: &str) -> String {
    format!(
        "vhost-user-timer-ctl info --timeout 30 --socket-path /run/vhost-user-timer/{vm}/timer.sock"
    )
}

/// A command that this user runs.
fn as_user(user: &str, command: &str) -> String {
    format!("su {user} -s /bin/sh -c '{command}'")
}

/// Sends a vhost-user message without a payload to the clock device, and prints the answer's bytes.
fn clock_message(vm: &str, request: u8) -> String {
    format!(
        "printf \"\\\\{request:o}\\\\0\\\\0\\\\0\\\\1\\\\0\\\\0\\\\0\\\\0\\\\0\\\\0\\\\0\" | \
         timeout 30 nc.openbsd -N -U /run/vhost-user-timer/{vm}/clock.sock | od -An -tx1 -v"
    )
}

fn show(vm: &str, property: &str) -> String {
    format!("systemctl show -P {property} vhost-user-timer@{vm}.service")
}

impl Machine {
    /// Starts the sockets of a VM.
    fn listen(&mut self, vm: &str) {
        self.output(&format!("systemctl start vhost-user-timer@{vm}.socket"));
    }

    /// Has a VMM configure the VM, run it, and restore it.
    fn live(&mut self, vm: &str) {
        self.output(&as_user("member", &info(vm)));
        let command = format!("save_restore /run/vhost-user-timer/{vm}/timer.sock");
        self.output(&as_user("member", &command));
        let status = "VM RUNNING, 4 vCPUs, epoch 2; no frontend connected";
        self.until(&show(vm, "StatusText"), status);
    }

    /// Whether the units of a VM are active: both sockets and the service.
    fn active(&mut self, vm: &str) -> String {
        let units = format!(
            "vhost-user-timer@{vm}.socket vhost-user-timer-clock@{vm}.socket vhost-user-timer@{vm}.service"
        );
        let (_, states) = self.run(&format!("systemctl is-active {units}"));
        states.lines().collect::<Vec<_>>().join(" ")
    }

    /// The phase and the epoch of the VM, as a member of the group reads them.
    fn phase(&mut self, vm: &str) -> (String, u64) {
        let command = format!("{} --json", info(vm));
        let text = self.output(&as_user("member", &command));
        let info: serde_json::Value = serde_json::from_str(&text).expect(&text);
        let phase = info["phase"].as_str().expect(&text).to_owned();
        (phase, info["epoch"].as_u64().expect(&text))
    }
}

#[test]
fn a_vmm_in_the_group_reaches_both_devices_and_no_other_user_does() {
    on(|machine| {
        machine.listen("reach");
        assert_eq!(machine.active("reach"), "active active inactive");
        let modes =
            machine.output("cd /run/vhost-user-timer/reach && stat -c '%n %U %G %a' *.sock");
        assert_eq!(modes, "clock.sock root kvm 660\ntimer.sock root kvm 660");

        let (_, refused) = machine.run(&as_user("outsider", &info("reach")));
        assert!(refused.contains("Permission denied"), "{refused}");
        let (_, refused) = machine.run(&as_user("outsider", &clock_message("reach", 1)));
        assert!(refused.contains("Permission denied"), "{refused}");
        assert_eq!(machine.active("reach"), "active active inactive");

        // GET_FEATURES, whose answer has 8 bytes.
        let answer = machine.output(&as_user("member", &clock_message("reach", 1)));
        assert!(
            answer.starts_with("01 00 00 00 05 00 00 00 08 00 00 00"),
            "{answer}"
        );
        assert_eq!(machine.active("reach"), "active active active");
        assert_eq!(machine.phase("reach"), ("NEW".to_owned(), 1));
    });
}

#[test]
fn the_status_follows_the_vm_and_the_process_is_confined_and_not_root() {
    on(|machine| {
        machine.listen("status");
        machine.output(&info("status"));
        machine.until(
            &show("status", "StatusText"),
            "No VM yet; no frontend connected",
        );
        machine.live("status");
        let pid = machine.output(&show("status", "MainPID"));
        let profile = machine.output(&format!("cat /proc/{pid}/attr/current"));
        assert_eq!(profile, "vhost-user-timer (enforce)");
        let uid = machine.output(&format!("stat -c %u /proc/{pid}"));
        // systemd's range for DynamicUser=.
        assert!(
            (61184..=65519).contains(&uid.parse::<u32>().unwrap()),
            "{uid}"
        );
    });
}

#[test]
fn a_backend_that_is_killed_is_replaced_and_resumes_its_vm_at_the_same_sockets() {
    on(|machine| {
        machine.listen("killed");
        machine.live("killed");
        let sockets = "stat -c %i /run/vhost-user-timer/killed/*.sock";
        let before = machine.output(sockets);
        let pid = machine.output(&show("killed", "MainPID"));
        machine.output(&format!("kill -9 {pid}"));
        assert_eq!(machine.phase("killed"), ("RUNNING".to_owned(), 2));
        assert_eq!(machine.output(&show("killed", "NRestarts")), "1");
        assert_ne!(machine.output(&show("killed", "MainPID")), pid);
        assert_eq!(machine.output(sockets), before);
        assert_eq!(machine.active("killed"), "active active active");
    });
}

#[test]
fn a_backend_that_hangs_is_replaced() {
    on(|machine| {
        machine.output(
            "mkdir -p /run/systemd/system/vhost-user-timer@hung.service.d && \
             printf '[Service]\\nWatchdogSec=20\\n' >/run/systemd/system/vhost-user-timer@hung.service.d/w.conf && \
             systemctl daemon-reload",
        );
        machine.listen("hung");
        machine.live("hung");
        let pid = machine.output(&show("hung", "MainPID"));
        machine.output(&format!("kill -STOP {pid}"));
        machine.until(&show("hung", "NRestarts"), "1");
        let said = machine.journal("-u vhost-user-timer@hung.service");
        assert!(said.contains("Watchdog timeout"), "{said}");
        assert_eq!(machine.phase("hung"), ("RUNNING".to_owned(), 2));
    });
}

#[test]
fn a_vm_outlives_a_restart_of_its_service_and_not_a_stop_and_all_end_with_the_timers_socket() {
    on(|machine| {
        machine.listen("ended");
        machine.live("ended");
        machine.output("systemctl restart vhost-user-timer@ended.service");
        assert_eq!(machine.phase("ended"), ("RUNNING".to_owned(), 2));
        machine.output("systemctl stop vhost-user-timer@ended.service");
        assert_eq!(machine.active("ended"), "active active inactive");
        machine.output("! ls -d /run/private/vhost-user-timer/ended/state");
        assert_eq!(machine.phase("ended"), ("NEW".to_owned(), 1));
        machine.output("systemctl stop vhost-user-timer@ended.socket");
        assert_eq!(machine.active("ended"), "inactive inactive inactive");
        machine.output("! ls /run/vhost-user-timer/ended/*.sock");
    });
}

#[test]
fn the_journal_has_the_vms_name_the_connection_and_a_priority_for_each_line() {
    on(|machine| {
        machine.listen("told");
        machine.live("told");
        let own = "_SYSTEMD_UNIT=vhost-user-timer@told.service";
        assert_eq!(machine.journal(&format!("{own} -p err")), "");
        let lines = machine.journal(&format!("{own} -p info"));
        assert!(lines.contains("told timer#1: "), "{lines}");
        assert!(
            lines.lines().all(|line| line.starts_with("told")),
            "{lines}"
        );
        // A request that there is not.
        machine.output(&as_user("member", &clock_message("told", 200)));
        let own = format!("journalctl -o cat {own}");
        machine.until(&format!("{own} -p err | grep -c \"told clock#1: \""), "1");
    });
}

#[test]
fn systemd_finds_no_fault_with_the_units_and_little_that_they_expose() {
    on(|machine| {
        let units = ["@vm.service", "@vm.socket", "-clock@vm.socket"];
        for unit in units.map(|unit| format!("vhost-user-timer{unit}")) {
            let said = machine.output(&format!("systemd-analyze verify --man=no {unit}"));
            assert_eq!(said, "", "{unit}");
        }
        let table =
            machine.output("systemd-analyze security --no-pager vhost-user-timer@vm.service");
        let overall = table.rsplit_once("vhost-user-timer@vm.service: ");
        let number = overall.and_then(|(_, level)| level.split_whitespace().next());
        let exposure: f64 = number.and_then(|number| number.parse().ok()).expect(&table);
        assert!(exposure <= EXPOSURE, "{table}");
    });
}
