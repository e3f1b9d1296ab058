//! CONFIRM and ONE_OFFSET in a device state, and a VM that is saved or loaded in ARMED.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, configure, info_flag, phase, restore,
};
use vhost_user_timer_kit::raw_driver::{Rig, load, save};

scenarios! {
    binary {
        a_vm_is_saved_in_armed_as_in_running: "10.20";
        a_load_is_refused_in_armed: "10.6" "10.17";
        the_flags_of_a_saved_vm_are_those_of_the_vm_that_is_loaded: "10.21";
        a_vm_that_was_configured_before_a_load_keeps_its_flags: "10.22";
        a_vm_with_neither_flag_is_saved_as_version_1: "10.23";
    }
}

/// Where a stream says its version: behind its magic and its checksum.
const VERSION_AT: usize = 12;

/// A VM of one vCPU with these flags, in PAUSED.
fn configured(flags: u8) -> (Rig, Client) {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure_with(1, flags);
    (rig, client)
}

/// A saved VM with these flags.
fn saved(flags: u8) -> Vec<u8> {
    let (_rig, mut client) = configured(flags);
    client.set(0, &[(CTL, 1), (CNT, 1_000), (CVAL, 77), (PCNT, 3_000)]);
    save(&client.driver.control)
}

fn a_vm_is_saved_in_armed_as_in_running() {
    for by_restore in [false, true] {
        let (_rig, mut client) = configured(configure::CONFIRM);
        match by_restore {
            false => drop(client.resume()),
            true => {
                client.restore_begin(1, restore::AUTORUN);
                client.set_done(0, &[(CTL, 0), (CNT, 1_000), (CVAL, 5)]);
            }
        }
        let before = client.state();
        let stream = save(&client.driver.control);
        let after = client.state();
        assert_eq!(client.info().phase, phase::ARMED, "it goes on");
        let (_there, mut there) = configured(configure::CONFIRM);
        assert!(load(&there.driver.control, &stream));
        let count = there.get_one(0, CNT);
        assert!((before.virt_count..=after.virt_count).contains(&count));
    }
}

fn a_load_is_refused_in_armed() {
    let stream = saved(0);
    let (rig, mut client) = configured(configure::CONFIRM);
    let armed = client.resume();
    assert!(!load(&client.driver.control, &stream));
    rig.log_with("the VM is ARMED: a state is loaded in NEW and PAUSED");
    let info = client.info();
    assert_eq!((info.phase, info.epoch), (phase::ARMED, 1));
    client.confirm_offsets(armed.cntvoff, armed.cntpoff).ok(40);
}

/// The flags of CONFIGURE_VM that a VM has, by its `info`.
fn flags_of(client: &mut Client) -> u8 {
    let flags = client.info().flags;
    let flag = |shown, flag| if flags & shown != 0 { flag } else { 0 };
    flag(info_flag::CONFIRM, configure::CONFIRM)
        | flag(info_flag::ONE_OFFSET, configure::ONE_OFFSET)
}

fn the_flags_of_a_saved_vm_are_those_of_the_vm_that_is_loaded() {
    for flags in 0..4 {
        let rig = Rig::launch_release(&[]);
        let mut client = Client::connect(&rig);
        assert!(load(&client.driver.control, &saved(flags)));
        assert_eq!(flags_of(&mut client), flags);
        client.restore_done(0);
        client.resume();
        let expected = match flags & configure::CONFIRM {
            0 => phase::RUNNING,
            _ => phase::ARMED,
        };
        let info = client.info();
        assert_eq!(info.phase, expected);
        let one = info.cntvoff == info.cntpoff;
        assert_eq!(one, flags & configure::ONE_OFFSET != 0);
    }
}

fn a_vm_that_was_configured_before_a_load_keeps_its_flags() {
    for (own, other) in [(0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (3, 0)] {
        let (_rig, mut client) = configured(own);
        assert!(load(&client.driver.control, &saved(other)));
        assert_eq!(client.info().phase, phase::RESTORING);
        assert_eq!(flags_of(&mut client), own);
        client.restore_done(0);
        let [virt, phys] = {
            let state = client.state();
            [state.virt_count, state.phys_count]
        };
        assert_eq!(virt, 1_000);
        // What was saved with ONE_OFFSET has one count; otherwise the VM's own flag decides.
        let one = (own | other) & configure::ONE_OFFSET != 0;
        assert_eq!(phys == virt, one, "{own} {other}");
    }
}

fn a_vm_with_neither_flag_is_saved_as_version_1() {
    assert_eq!(saved(0)[VERSION_AT], 1);
    for flags in 1..4 {
        assert_eq!(saved(flags)[VERSION_AT], 2, "{flags}");
    }
}
