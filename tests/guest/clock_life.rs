//! The guest's clock over what can happen to a guest: stops, resets, reboots, its driver unloaded
//! and loaded, the backend killed.

use vhost_user_timer_kit::qemu::{Bracket, ClockVm, HostClock, PATIENCE, Transport, environment};

/// How often each of these is done.
const TIMES: usize = 100;

/// Reads the first clock forever in the background. /readings has a byte for each reading, /bad the
/// one that failed or decreased.
const TRAFFIC: &str = "rm -f /bad; : >/readings; (last=0; while :; do now=$(guest read ptp0) || break; \
                       [ ${#now} -eq 19 ] && [ ! \"$now\" \\< \"$last\" ] || break; last=$now; \
                       printf . >>/readings; done; echo \"$last $now\" >/bad) >/dev/null 2>&1 &";

/// Waits for the next reading but one, which began after this. All are right until then.
fn assert_traffic(vm: &mut ClockVm) {
    let wait = "readings() { wc -c </readings; }; before=$(readings); \
                until [ -e /bad ] || [ $(($(readings) - before)) -ge 2 ]; do usleep 1000; done; \
                cat /bad 2>/dev/null; true";
    assert_eq!(vm.run(wait), "");
}

fn assert_reads(vm: &mut ClockVm) {
    let brackets = vm.guest.exchange("ptp0", HostClock::Realtime, 10).unwrap();
    assert!(brackets.iter().all(Bracket::holds), "{brackets:?}");
}

fn on_each_transport(test: impl Fn(&mut ClockVm)) {
    let Some(environment) = environment() else {
        return;
    };
    for transport in Transport::ALL {
        let mut vm = ClockVm::boot(&environment, transport, &["--rtc-clock=smeared"]);
        assert_reads(&mut vm);
        test(&mut vm);
        assert_reads(&mut vm);
        vm.assert_no_complaint();
    }
}

#[test]
fn stop_and_cont_in_the_middle_of_traffic_lose_no_reading() {
    on_each_transport(|vm| {
        vm.run(TRAFFIC);
        for _ in 0..TIMES {
            vm.guest.qmp().stop().unwrap();
            vm.guest.qmp().cont().unwrap();
            assert_traffic(vm);
        }
    });
}

#[test]
fn resets_and_reboots_in_the_middle_of_traffic_leave_a_clock_that_works() {
    on_each_transport(|vm| {
        for round in 0..TIMES {
            // Mostly while the guest boots, and now and then later.
            if round % 25 == 0 {
                vm.run(TRAFFIC);
            }
            vm.guest.reset().unwrap();
            if round % 25 == 24 {
                vm.guest.await_ready().unwrap();
                vm.load_driver();
                assert_reads(vm);
            }
        }
        for _ in 0..2 {
            vm.run(TRAFFIC);
            vm.guest.reboot().unwrap();
            vm.guest.await_ready().unwrap();
            vm.load_driver();
            assert_reads(vm);
        }
    });
}

#[test]
fn a_driver_that_is_unbound_and_bound_or_loaded_again_finds_its_clocks() {
    on_each_transport(|vm| {
        let device = vm.run("basename $(realpath /sys/bus/virtio/drivers/virtio_rtc/virtio*)");
        let driver = "/sys/bus/virtio/drivers/virtio_rtc";
        // In one command: the driver must be quick, not the console.
        let rebind = format!(
            "for i in $(seq {TIMES}); do echo {device} >{driver}/unbind && \
             echo {device} >{driver}/bind && guest read ptp0 >/dev/null || exit 1; done"
        );
        let reload = format!(
            "for i in $(seq {TIMES}); do rmmod virtio_rtc && modprobe virtio_rtc && \
             guest read ptp0 >/dev/null || exit 1; done"
        );
        for command in [rebind, reload] {
            let output = vm.guest.run_within(3 * PATIENCE, &command).unwrap();
            assert_eq!(output.status, 0, "{}", output.text);
        }
        vm.rtc();
    });
}

/// QEMU 11.1 goes no further: a reader of the clock then waits forever, and QEMU aborts
/// when the device is told to reconnect (`reconnect-ms`), at the next `cont`, and when it is
/// unplugged (assertions in vhost_dev_start and memory_region_del_eventfd).
#[test]
fn qemu_and_its_guest_outlive_the_backend_and_the_next_guest_finds_its_alarm() {
    let Some(environment) = environment() else {
        return;
    };
    for transport in Transport::ALL {
        let mut vm = ClockVm::boot(&environment, transport, &["--rtc-clock=smeared"]);
        let rtc = vm.rtc();
        vm.run(&format!("guest alarm-set {rtc} 1000"));
        let alarm = vm.run(&format!("guest alarm-read {rtc}"));
        let monotonic = vm.run("guest read ptp1").parse::<u64>().unwrap();
        vm.run(TRAFFIC);

        vm.backend.kill();
        for _ in 0..10 {
            assert_eq!(vm.run("echo alive"), "alive");
        }
        assert!(vm.guest.qmp().status().unwrap().running);

        vm.relaunch_backend();
        assert_eq!(vm.run("echo alive"), "alive");
        vm.boot_again(&environment, transport);
        let rtc = vm.rtc();
        let time = |text: &str| text.split_whitespace().next().map(str::to_owned);
        let kept = vm.run(&format!("guest alarm-read {rtc}"));
        assert_eq!(time(&kept), time(&alarm), "{kept}");
        let later = vm.run("guest read ptp1").parse::<u64>().unwrap();
        assert!(later > monotonic, "{monotonic} {later}");
        assert_reads(&mut vm);
    }
}
