//! What a driver can do by its ring alone.

use vhost::VhostBackend;
use vhost_user_timer_kit::clock_driver::{ALARMQ, ClockDriver, REQUESTQ, UTC, counter};
use vhost_user_timer_kit::raw_driver::{FullRing, Setup};
use vhost_user_timer_kit::victim::Victim;

/// How often a control message is sent beside a full ring.
const MESSAGES: usize = 100;

#[test]
fn a_guest_with_the_worst_ring_does_not_hold_up_its_vmms_control_messages() {
    let victim = Victim::launch();
    let setup = Setup {
        size: 1024,
        ..ClockDriver::setup()
    };
    let mut driver = ClockDriver::connect_with(&victim.rig, setup).driver;
    let alarms = driver.rings.remove(ALARMQ.into());
    let requests = driver.rings.remove(REQUESTQ.into());
    let mut ring = FullRing::new(requests, &mut driver.memory);
    let (control, memory) = (&driver.control, &driver.memory);
    ring.while_full(memory, || {
        victim.in_time("a ring is stopped and started again and again", || {
            for _ in 0..MESSAGES {
                let base = control.get_vring_base(ALARMQ.into()).unwrap();
                control.set_vring_base(ALARMQ.into(), base as u16).unwrap();
                let kick = alarms.kick_fd();
                control.set_vring_kick(ALARMQ.into(), kick).unwrap();
            }
        });
        victim.serves_the_timer();
    });
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_vmm_with_the_worst_ring_does_not_hold_up_the_guests_clock() {
    let victim = Victim::launch();
    let client = victim.rig.client().queues(3).queue_size(1024);
    let mut driver = client.driver();
    let mut ring = FullRing::new(driver.rings.remove(1), &mut driver.memory);
    let mut clock = victim.clock();
    ring.while_full(&driver.memory, || {
        victim.in_time("the guest reads its counter again and again", || {
            for _ in 0..MESSAGES {
                let _ = clock.read_cross(UTC, counter::ARM_VCT);
            }
        });
    });
    drop((driver, clock));
    victim.unharmed();
}

#[test]
fn sigterm_ends_it_while_a_guest_keeps_the_worst_ring_full() {
    let victim = Victim::launch();
    let setup = Setup {
        size: 1024,
        ..ClockDriver::setup()
    };
    let mut driver = ClockDriver::connect_with(&victim.rig, setup).driver;
    let requests = driver.rings.remove(REQUESTQ.into());
    let mut ring = FullRing::new(requests, &mut driver.memory);
    ring.while_full(&driver.memory, || victim.ends_on_sigterm());
}
