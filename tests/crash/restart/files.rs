//! The state file itself: who may use it, and which files are refused.

use rustix::time::{ClockId, clock_gettime};

use super::*;

#[test]
fn the_file_is_private() {
    let life = Life::new();
    let _served = life.serve();
    let mode = std::fs::metadata(life.file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_second_backend_on_the_same_file_is_refused_and_the_first_goes_on() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    let log = life.refused(&[]);
    assert!(log.contains("is in use by another backend"), "{log}");
    assert_eq!(served.info().vcpus, 2);
}

#[test]
fn a_vm_of_another_boot_starts_over_with_a_warning() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.end(End::Killed);
    life.edit(state_file::of_another_boot);
    let served = life.serve();
    assert_eq!(served.info().phase, Phase::New);
    served.backend.log_with(": the host was rebooted since");
    // From now on it belongs to this boot.
    served.configure(1);
    served.end(End::Killed);
    assert_eq!(life.serve().info().vcpus, 1);
}

#[test]
fn what_a_backend_cannot_go_on_with_is_refused_and_left_as_it_is() {
    let life = Life::new();
    let served = life.serve();
    served.configure(8);
    served.end(End::Terminated);
    let log = life.refused(&["--max-vcpus=7"]);
    assert!(log.contains("8 vCPUs, and this backend takes 7"), "{log}");
    let log = life.refused(&["--counter-source=boottime"]);
    assert!(log.contains("--counter-source"), "{log}");
    let log = life.refused(&["--counter-frequency=62500000"]);
    let text = "has a VM with a counter frequency of 1000000000 Hz, and this backend was started with \
                --counter-frequency 62500000; restart with --counter-frequency 1000000000 or without";
    assert!(log.contains(text), "{log}");
    assert_eq!(life.serve().info().vcpus, 8);

    life.flip(VM_RECORD);
    let log = life.refused(&[]);
    assert!(log.contains("is damaged (the VM's record"), "{log}");
    life.flip(VM_RECORD);
    assert_eq!(life.serve().info().vcpus, 8);

    life.edit(|_| b"my diary".to_vec());
    let log = life.refused(&[]);
    assert!(log.contains("is not a state file"), "{log}");
}

#[test]
fn a_backend_goes_on_by_the_host_counter_of_its_file_unless_another_is_named() {
    let mut life = Life::new();
    life.args = vec!["--counter-source=boottime".to_owned()];
    let served = life.serve();
    served.configure(1);
    served.queue().resume(LIMIT).unwrap();
    let cntvoff = served.info().cntvoff;
    served.end(End::Killed);

    life.args = vec!["--counter-source=auto".to_owned()];
    let served = life.serve();
    let before = ticks(ClockId::Boottime);
    let info = served.info();
    let after = ticks(ClockId::Boottime);
    assert_eq!((info.phase, info.cntvoff), (Phase::Running, cntvoff));
    assert!((before..=after).contains(&info.host_count));
    served.end(End::Killed);

    life.args = Vec::new();
    let log = life.refused(&["--counter-source=monotonic"]);
    let text = "was written with --counter-source boottime at 1000000000 Hz";
    assert!(log.contains(text), "{log}");
}

fn ticks(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * HOST_FREQUENCY + now.tv_nsec as u64
}

#[test]
fn a_file_that_cannot_be_made_is_refused() {
    let mut backend = BackendProcess::launch(&["--state-file=/nowhere/at/all"]).unwrap();
    assert_eq!(backend.wait(LIMIT).code(), Some(1));
    assert!(
        backend
            .log()
            .contains("the state file /nowhere/at/all: there is no folder /nowhere/at"),
        "{}",
        backend.log()
    );
}
