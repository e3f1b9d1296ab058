//! A vCPU whose timers are not in the stream that brings the guest.

use std::fs;

use vhost_user_timer_frontend::{Frontend, Options, Register};
use vhost_user_timer_kit::qemu::{PATIENCE, Shape, TimerVm, environment};

use crate::judge::watched;

/// The vCPU.
const VCPU: usize = 2;

/// The backend's part of the stream has the timers of all vCPUs, and so has QEMU's own part. QEMU
/// itself starts a guest with whatever arrives.
#[test]
fn a_vcpu_whose_timers_did_not_arrive_is_named_and_the_guest_does_not_start() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("guest");
    let mut vm = watched(&environment, &shape);
    vm.guest.save(&file).unwrap();
    let TimerVm { guest, backend, .. } = vm;
    drop(guest);

    // Only the guest knows its compare value, and the backend, which has another frontend now.
    let backend = backend.unwrap();
    let options = Options::default().timeout(PATIENCE);
    let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
    let saved = frontend.queue().save(PATIENCE).unwrap();
    let compare = saved.vcpus()[VCPU].get(Register::TimerCval).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let pattern = compare.to_be_bytes();
    let places: Vec<_> = (0..bytes.len() - pattern.len())
        .filter(|place| bytes[*place..].starts_with(&pattern))
        .collect();
    assert!(!places.is_empty(), "{compare:#x}");
    for place in places {
        bytes[place..place + pattern.len()].fill(0xff);
    }
    fs::write(&file, bytes).unwrap();

    let mut destination = TimerVm::incoming(&environment, &shape);
    let error = destination.guest.load(&file).unwrap_err().to_string();
    let expected = format!(
        "vCPU {VCPU} does not have the CNTV_CVAL that was saved: its timers have not been restored"
    );
    assert!(error.contains(&expected), "{error}");
}
