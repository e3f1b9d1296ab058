//! A request of each operation.

use vhost_user_timer_kit::contract::{
    ARM64, CNT, CTL, CVAL, VM, Vcpu, configure_body, op, pause_body, range_body, regs_body,
    restore_body, words,
};

/// An operation, the vCPU it names, and its body.
pub(crate) type Ask = (u16, u32, Vec<u8>);

/// One request of each operation, right for a VM of `vcpus` vCPUs whatever its phase.
pub(crate) fn one_of_each(vcpus: u32) -> Vec<Ask> {
    vec![
        (op::GET_INFO, VM, vec![]),
        (op::CONFIGURE_VM, VM, configure_body(vcpus, 0, 0)),
        (op::GET_REG_LIST, 0, vec![]),
        (op::GET_REGS, 0, words(&ARM64)),
        (op::SET_REGS, 0, regs_body(&[(CTL, 1), (CVAL, 77)])),
        (op::SET_REGS, 0, regs_body(&[(CNT, 123)])),
        (op::GET_VM, VM, range_body(0, vcpus)),
        (op::SET_VM, VM, Vcpu::with(0, [1, 2, 3, 0, 5, 6]).to_bytes()),
        (op::SET_COUNTER_OFFSET, VM, words(&[99, 0])),
        (op::SET_COUNTER_ANCHOR, VM, words(&[1, 2])),
        (op::PAUSE, VM, pause_body(0)),
        (op::PAUSE, VM, pause_body(1)),
        (op::RESUME, VM, vec![]),
        (op::RESTORE_BEGIN, VM, restore_body(vcpus, 0, 0, 0)),
        (op::RESTORE_DONE, 0, vec![]),
        (op::WAIT_RUN, 0, vec![]),
        (op::RESTORE_ABORT, VM, vec![]),
        (op::CONFIRM_RUN, VM, words(&[3, 4])),
        (op::SET_TIME_PAGE, VM, words(&[0x1000, 64])),
    ]
}
