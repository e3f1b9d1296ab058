//! SPEC.md, "Device state", by way of `vhost`'s `Frontend`: a VM saved here and loaded there,
//! whatever happens to the pipe on the way.

mod flags;
mod load;
mod transfer;

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, VmState, info_flag,
};
use vhost_user_timer_kit::raw_driver::{Rig, save};

/// The scenarios of all of it.
pub(crate) const SCENARIOS: [&[crate::scenarios::Scenario]; 3] =
    [flags::SCENARIOS, load::SCENARIOS, transfer::SCENARIOS];

/// So many vCPUs that a saved VM is more than a pipe holds.
const MANY: u32 = 4_096;

/// A client of a VM with this many vCPUs, whose timers all differ, in PAUSED.
fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = Client::connect(rig);
    client.configure(vcpus);
    for vcpu in 0..vcpus {
        let n = u64::from(vcpu);
        let entries = [
            (CTL, n % 4),
            (CVAL, !n),
            (PCTL, (n + 1) % 4),
            (PCVAL, !n << 8),
        ];
        client.set(vcpu, &entries);
    }
    client.set(0, &[(CNT, 0x1234_5678_9abc), (PCNT, 0x1_0000_0000)]);
    client
}

/// A small VM, saved.
fn saved() -> Vec<u8> {
    let rig = Rig::launch_release(&[]);
    let client = configured(&rig, 3);
    save(&client.driver.control)
}

/// What a VM at rest is.
fn at_rest(client: &mut Client) -> (VmState, u32, u64) {
    let info = client.info();
    let stands = info.flags & info_flag::PHYS_VIRTUALISED != 0;
    (client.state().at_rest(stands), info.phase, info.epoch)
}
