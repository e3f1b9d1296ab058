//! A stock QEMU knows nothing of the timer device. Still none of its vCPUs runs while a restore is
//! open there, because the acknowledgement that `cont` waits for is held back.

use std::time::{Duration, Instant};

use serde_json::json;
use vhost_user_timer_frontend::{Frontend, Options, RestoreOptions};
use vhost_user_timer_kit::qemu::{
    Bracket, ClockVm, Error, HostClock, PATIENCE, Qmp, Transport, environment,
};
use vhost_user_timer_protocol::Abi;

/// How long a restore is kept open.
const OPEN: Duration = Duration::from_millis(1500);

/// How long to listen for an answer that must not come: QEMU answers nothing while it is held.
const HELD: Duration = Duration::from_millis(500);

/// The VM's other frontend, which restores it.
struct Restorer(Frontend);

impl Restorer {
    fn connect(vm: &ClockVm) -> Self {
        let options = Options::default().timeout(PATIENCE);
        let frontend = Frontend::connect(vm.backend.socket_path(), options);
        Restorer(frontend.expect("a frontend"))
    }

    fn queue(&self) -> &vhost_user_timer_frontend::RequestQueue {
        self.0.queue()
    }

    fn begin(&self, timeout: Option<Duration>) {
        let mut options = RestoreOptions::default().autorun(true);
        options.timeout = timeout;
        self.queue()
            .restore_begin(options, PATIENCE)
            .expect("RESTORE_BEGIN");
    }
}

/// Checks that QEMU does not answer `cont`.
fn assert_held(qmp: &mut Qmp) {
    let answer = qmp.answer("cont", HELD);
    assert!(matches!(answer, Err(Error::Late { .. })), "{answer:?}");
}

/// A running guest, and the frontend that configured its VM.
fn boot(transport: Transport) -> Option<(ClockVm, Restorer)> {
    let environment = environment()?;
    let vm = ClockVm::boot(&environment, transport, &["--rtc-clock=utc"]);
    let restorer = Restorer::connect(&vm);
    let queue = restorer.queue();
    queue
        .configure(2, Abi::Arm64, None, PATIENCE)
        .expect("CONFIGURE_VM");
    let saved = queue.save(PATIENCE).expect("the VM");
    assert_eq!(saved.vcpus().len(), 2);
    Some((vm, restorer))
}

#[test]
fn cont_is_held_while_a_restore_is_open_and_goes_on_when_it_closes() {
    for transport in Transport::ALL {
        let Some((mut vm, restorer)) = boot(transport) else {
            return;
        };
        let saved = restorer.queue().save(PATIENCE).unwrap();
        vm.guest.qmp().stop().unwrap();
        restorer.begin(None);
        let began = Instant::now();
        let qmp = vm.guest.qmp();
        qmp.send("cont", json!({})).unwrap();
        assert_held(qmp);
        restorer
            .queue()
            .restore_vcpu(&saved.vcpus()[0], PATIENCE)
            .unwrap();
        // One of two is not enough.
        assert_held(vm.guest.qmp());
        restorer
            .queue()
            .restore_vcpu(&saved.vcpus()[1], PATIENCE)
            .unwrap();
        let released = Instant::now();
        vm.guest.qmp().answer("cont", PATIENCE).unwrap();
        println!(
            "{transport:?}: cont was held for {} ms of an open restore, and went on {} ms after it closed",
            (released - began).as_millis(),
            released.elapsed().as_millis()
        );
        assert!(released - began >= 2 * HELD);
        vm.guest.qmp().event("RESUME").unwrap();
        let brackets = vm.guest.exchange("ptp0", HostClock::Realtime, 100).unwrap();
        assert!(brackets.iter().all(Bracket::holds));
        vm.assert_no_complaint();
    }
}

#[test]
fn a_guest_that_is_started_during_a_restore_runs_when_it_is_over() {
    let Some(environment) = environment() else {
        return;
    };
    // A guest that is stopped before its first instruction has no driver yet, so there is nothing
    // to hold back: its firmware and kernel run. It cannot use its clock before the gate opens.
    let mut vm = ClockVm::start(&environment, &["--rtc-clock=utc"], |options, socket| {
        options.rtc(Transport::Pci, socket)
    });
    let restorer = Restorer::connect(&vm);
    restorer
        .queue()
        .configure(2, Abi::Arm64, None, PATIENCE)
        .unwrap();
    let saved = restorer.queue().save(PATIENCE).unwrap();
    restorer.begin(None);
    vm.guest.await_ready().unwrap();
    let probe = "modprobe virtio_rtc && guest read ptp0";
    let answer = vm.guest.run_within(4 * HELD, probe);
    assert!(matches!(answer, Err(Error::Late { .. })), "{answer:?}");
    for vcpu in saved.vcpus() {
        restorer.queue().restore_vcpu(vcpu, PATIENCE).unwrap();
    }
    vm.run("true");
    assert!(vm.run("guest read ptp0").len() >= 19);
}

#[test]
fn the_hold_ends_with_the_restores_time_out_and_the_log_says_so() {
    let Some((mut vm, restorer)) = boot(Transport::Pci) else {
        return;
    };
    vm.guest.qmp().stop().unwrap();
    let began = Instant::now();
    restorer.begin(Some(OPEN));
    vm.guest.qmp().send("cont", json!({})).unwrap();
    vm.guest.qmp().answer("cont", PATIENCE).unwrap();
    assert!(began.elapsed() >= OPEN);
    assert_eq!(vm.run("echo alive"), "alive");
    vm.backend.log_with("is released, though a restore is open");
}
