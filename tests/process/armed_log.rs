//! What the backend's log says of a VM that confirms: what it waits for, that it runs, and how far
//! ONE_OFFSET moves the guest's physical count.

use vhost_user_timer_kit::confirming::{CONFIRM, ONE_OFFSET};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, op, phase, restore, restore_body,
};
use vhost_user_timer_kit::raw_driver::Rig;

/// A VM with one offset, restored to ARMED with these counts.
fn restored_to_armed(rig: &Rig, virt: u64, phys: u64) -> Client {
    let mut client = Client::connect(rig);
    assert_eq!(client.configure_flags(1, CONFIRM | ONE_OFFSET), (0, 0));
    let begin = restore_body(1, restore::AUTORUN, 0, 0);
    client.vm(op::RESTORE_BEGIN, &begin).ok(0);
    client.set(0, &[(CTL, 0), (CVAL, 9), (CNT, virt), (PCNT, phys)]);
    client.restore_done(0);
    assert_eq!(client.info().phase, phase::ARMED);
    client
}

/// The messages of the log lines that have this text, once the last of them is there.
fn lines(rig: &Rig, text: &str, last: &str) -> Vec<String> {
    let log = rig.log_with(last);
    let lines = log.lines().filter(|line| line.contains(text));
    lines
        .map(|line| line.split_once("] ").expect("a log line").1.to_owned())
        .collect()
}

#[test]
fn each_step_of_the_last_metre_is_in_the_log() {
    let rig = Rig::launch(&[]);
    let mut client = restored_to_armed(&rig, 1_000, 1_000);
    client.confirm();
    assert_eq!(
        lines(&rig, "ARMED", "ARMED -> RUNNING"),
        [
            "VM RESTORING -> ARMED, epoch 2: waits for CONFIRM_RUN",
            "VM ARMED -> RUNNING, epoch 2"
        ]
    );
    assert_eq!(rig.said("CNTPCT"), 0, "both counts are the same");
}

#[test]
fn how_far_one_offset_moves_the_physical_count_is_in_the_log_with_its_sign() {
    for (virt, phys, moved) in [(5_000, 7_093, "-2093"), (7_000, 1_000, "+6000")] {
        let rig = Rig::launch(&[]);
        drop(restored_to_armed(&rig, virt, phys));
        assert_eq!(
            lines(&rig, "CNTPCT", "CNTPCT"),
            [format!(
                "ONE_OFFSET: the restored physical count is not the virtual one, so the guest's \
                 CNTPCT moves by {moved} ticks of 1000000000 Hz"
            )]
        );
    }
}
