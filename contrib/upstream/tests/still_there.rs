//! Every fault is still there. Where one is gone, a new version of the crate has mended it: take
//! its report away, and what the backend does because of it.

use std::process::Command;

/// Runs a reproduction.
#[track_caller]
fn is_there(name: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_upstream"))
        .arg(name)
        .output()
        .expect("the program");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name} has changed:\n{text}");
}

macro_rules! faults {
    ($($test:ident = $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                is_there($name);
            }
        )*
    };
}

faults! {
    a_log_that_is_too_short_is_sigbus = "short-log",
    refused_memory_stays_installed = "refused-memory",
    the_number_of_memory_slots_is_not_enforced = "mem-slots",
    a_region_after_set_log_base_is_not_logged = "log-later-region",
    dropping_a_daemon_without_exit_events_hangs = "drop-hangs",
    a_half_made_daemon_leaves_its_worker = "half-made",
    an_exit_event_leaks_its_descriptor = "exit-event-leak",
    a_panic_leaves_the_frontend_waiting = "panic-hangs",
    a_replaced_kick_descriptor_stays_in_epoll = "replaced-kick",
    an_error_of_a_kick_descriptor_ends_the_worker = "kick-ends-worker",
    a_ring_size_that_is_no_power_of_two_is_acknowledged = "vring-num",
    a_connected_socket_cannot_be_served = "connected-socket",
}

#[test]
fn every_report_has_a_program_and_every_program_a_report() {
    let folder = env!("CARGO_MANIFEST_DIR");
    let reports = std::fs::read_dir(folder).expect("the crate's folder");
    let mut reports: Vec<_> = reports
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_suffix(".md")?.to_owned()))
        .filter(|name| name != "README")
        .collect();
    reports.sort();
    let output = Command::new(env!("CARGO_BIN_EXE_upstream"))
        .arg("--list")
        .output()
        .expect("the program");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut programs: Vec<_> = text.lines().collect();
    programs.sort_unstable();
    assert_eq!(reports, programs);
}
