//! Requests made from the protocol crate's own types.

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, MAX_MESSAGE, Op, Register, VM_WIDE};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A request as a frontend puts it together, and how it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The operation's code.
    pub op: u16,
    /// The header's flags.
    pub flags: u16,
    /// The vCPU, or [`VM_WIDE`].
    pub vcpu: u32,
    /// The epoch meant; 0 is the current one.
    pub epoch: u64,
    /// The bytes after the header.
    pub body: Vec<u8>,
    /// Device-writable bytes, header included; at most [`MAX_MESSAGE`], which is the default.
    pub room: usize,
    /// The request queue; 1 by default.
    pub queue: u16,
}

impl Ask {
    /// A request of this operation, in the current epoch.
    pub fn new(op: Op, vcpu: u32, body: &(impl IntoBytes + Immutable + ?Sized)) -> Self {
        Ask {
            op: op.code(),
            flags: 0,
            vcpu,
            epoch: 0,
            body: body.as_bytes().to_vec(),
            room: MAX_MESSAGE,
            queue: 1,
        }
    }

    fn of_vm(op: Op, body: &(impl IntoBytes + Immutable + ?Sized)) -> Self {
        Ask::new(op, VM_WIDE, body)
    }

    /// The same request with the flag DONE.
    #[must_use]
    pub fn done(self) -> Self {
        Ask {
            flags: wire::request_flags::DONE,
            ..self
        }
    }

    /// The same request for one epoch.
    #[must_use]
    pub fn in_epoch(self, epoch: u64) -> Self {
        Ask { epoch, ..self }
    }

    /// The same request with this much room for its answer, header included.
    #[must_use]
    pub fn with_room(self, room: usize) -> Self {
        Ask { room, ..self }
    }

    /// The same request on another queue.
    #[must_use]
    pub fn on_queue(self, queue: u16) -> Self {
        Ask { queue, ..self }
    }

    /// The same request with this vCPU in its header.
    #[must_use]
    pub fn for_vcpu(self, vcpu: u32) -> Self {
        Ask { vcpu, ..self }
    }

    /// The device-readable bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let header = wire::RequestHeader {
            op: self.op.into(),
            flags: self.flags.into(),
            vcpu: self.vcpu.into(),
            epoch: self.epoch.into(),
        };
        [header.as_bytes(), &self.body].concat()
    }

    /// GET_INFO.
    pub fn get_info() -> Self {
        Ask::of_vm(Op::GetInfo, &[0u8; 0])
    }

    /// CONFIGURE_VM without flags; `frequency` in Hz, 0 for the backend's.
    pub fn configure(vcpus: u32, abi: u8, frequency: u64) -> Self {
        Ask::configure_with(vcpus, abi, 0, frequency)
    }

    /// CONFIGURE_VM.
    pub fn configure_with(vcpus: u32, abi: u8, flags: u8, frequency: u64) -> Self {
        let body = wire::ConfigureVm {
            vcpus: vcpus.into(),
            abi,
            flags,
            reserved: [0; 2],
            frequency: frequency.into(),
        };
        Ask::of_vm(Op::ConfigureVm, &body)
    }

    /// GET_REG_LIST.
    pub fn get_reg_list(vcpu: u32) -> Self {
        Ask::new(Op::GetRegList, vcpu, &[0u8; 0])
    }

    /// GET_REGS of these ids.
    pub fn get_ids(vcpu: u32, ids: &[u64]) -> Self {
        let ids: Vec<_> = ids.iter().map(|id| id.to_le_bytes()).collect();
        Ask::new(Op::GetRegs, vcpu, ids.as_flattened())
    }

    /// GET_REGS of these registers of arm64.
    pub fn get_regs(vcpu: u32, registers: &[Register]) -> Self {
        let ids: Vec<_> = registers.iter().map(|reg| reg.id(Abi::Arm64)).collect();
        Ask::get_ids(vcpu, &ids)
    }

    /// SET_REGS of ids and values.
    pub fn set_ids(vcpu: u32, entries: &[(u64, u64)]) -> Self {
        let entries: Vec<_> = entries
            .iter()
            .map(|&(id, value)| wire::RegValue {
                id: id.into(),
                value: value.into(),
            })
            .collect();
        Ask::new(Op::SetRegs, vcpu, entries.as_slice())
    }

    /// SET_REGS of registers of arm64.
    pub fn set_regs(vcpu: u32, values: &[(Register, u64)]) -> Self {
        let entries: Vec<_> = values
            .iter()
            .map(|&(register, value)| (register.id(Abi::Arm64), value))
            .collect();
        Ask::set_ids(vcpu, &entries)
    }

    /// GET_VM of `count` vCPUs from `first` on.
    pub fn get_vm(first: u32, count: u32) -> Self {
        let range = wire::VcpuRange {
            first: first.into(),
            count: count.into(),
        };
        Ask::of_vm(Op::GetVm, &range)
    }

    /// SET_VM.
    pub fn set_vm(vcpus: &[wire::Vcpu]) -> Self {
        Ask::of_vm(Op::SetVm, vcpus)
    }

    /// SET_COUNTER_OFFSET.
    pub fn set_offset(offset: u64) -> Self {
        let body = wire::CounterOffset {
            offset: offset.into(),
            reserved: 0.into(),
        };
        Ask::of_vm(Op::SetCounterOffset, &body)
    }

    /// SET_COUNTER_ANCHOR.
    pub fn set_anchor(monotonic_ns: u64, count: u64) -> Self {
        let body = wire::CounterAnchor {
            monotonic_ns: monotonic_ns.into(),
            count: count.into(),
        };
        Ask::of_vm(Op::SetCounterAnchor, &body)
    }

    /// PAUSE.
    pub fn pause() -> Self {
        Ask::of_vm(Op::Pause, &wire::Pause::default())
    }

    /// PAUSE with KEEP_COUNTING.
    pub fn pause_counting() -> Self {
        let body = wire::Pause {
            flags: wire::PAUSE_KEEP_COUNTING.into(),
            reserved: 0.into(),
        };
        Ask::of_vm(Op::Pause, &body)
    }

    /// RESUME.
    pub fn resume() -> Self {
        Ask::of_vm(Op::Resume, &[0u8; 0])
    }

    /// RESTORE_BEGIN without a time-out.
    pub fn begin(vcpus: u32, flags: u32) -> Self {
        Ask::begin_with(vcpus, flags, 0, 0)
    }

    /// RESTORE_BEGIN.
    pub fn begin_with(vcpus: u32, flags: u32, saved_ns: u64, timeout_ns: u64) -> Self {
        let body = wire::RestoreBegin {
            vcpus: vcpus.into(),
            flags: flags.into(),
            saved_realtime_ns: saved_ns.into(),
            timeout_ns: timeout_ns.into(),
        };
        Ask::of_vm(Op::RestoreBegin, &body)
    }

    /// RESTORE_DONE.
    pub fn restore_done(vcpu: u32) -> Self {
        Ask::new(Op::RestoreDone, vcpu, &[0u8; 0])
    }

    /// WAIT_RUN.
    pub fn wait_run(vcpu: u32) -> Self {
        Ask::new(Op::WaitRun, vcpu, &[0u8; 0])
    }

    /// RESTORE_ABORT.
    pub fn abort() -> Self {
        Ask::of_vm(Op::RestoreAbort, &[0u8; 0])
    }

    /// CONFIRM_RUN.
    pub fn confirm(cntvoff: u64, cntpoff: u64) -> Self {
        let body = wire::ConfirmRun {
            cntvoff: cntvoff.into(),
            cntpoff: cntpoff.into(),
        };
        Ask::of_vm(Op::ConfirmRun, &body)
    }

    /// SET_TIME_PAGE.
    pub fn time_page(address: u64, length: u64) -> Self {
        let body = wire::TimePage {
            address: address.into(),
            length: length.into(),
        };
        Ask::of_vm(Op::SetTimePage, &body)
    }

    fn is_done(&self) -> bool {
        self.flags & wire::request_flags::DONE != 0
    }

    /// The bytes of the answer's body if the request is granted.
    pub fn answer_len(&self) -> usize {
        match Op::from(self.op) {
            Op::GetInfo => size_of::<wire::Info>(),
            Op::GetRegList => Register::ALL.len() * size_of::<u64>(),
            Op::GetRegs => 2 * self.body.len(),
            Op::SetRegs if self.is_done() => size_of::<wire::SetRegsDone>(),
            Op::SetRegs => size_of::<wire::SetRegsResult>(),
            Op::SetVm if self.is_done() => size_of::<wire::RestoreDoneResult>(),
            Op::GetVm => {
                let range = wire::VcpuRange::read_from_bytes(&self.body);
                let vcpus = range.map_or(0, |range| range.count.get() as usize);
                size_of::<wire::Vm>() + vcpus * size_of::<wire::Vcpu>()
            }
            Op::Pause | Op::Resume | Op::WaitRun | Op::ConfirmRun => size_of::<wire::Run>(),
            Op::RestoreDone => size_of::<wire::RestoreDoneResult>(),
            _ => 0,
        }
    }

    /// One request of each operation, well-formed for a VM of `vcpus` vCPUs.
    pub fn one_of_each(vcpus: u32) -> Vec<Ask> {
        vec![
            Ask::get_info(),
            Ask::configure(vcpus, 0, 0),
            Ask::get_reg_list(0),
            Ask::get_regs(0, &Register::ALL),
            Ask::set_regs(0, &[(Register::TimerCtl, 1), (Register::TimerCval, 77)]),
            Ask::set_regs(0, &[(Register::TimerCnt, 123)]),
            Ask::get_vm(0, vcpus),
            Ask::set_regs(0, &[(Register::TimerCtl, 1), (Register::TimerCval, 77)]).done(),
            Ask::set_vm(&[whole_vcpu(0, [1, 2, 3, 0, 5, 6])]),
            Ask::set_vm(&[whole_vcpu(0, [1, 2, 3, 0, 5, 6])]).done(),
            Ask::set_offset(99),
            Ask::set_anchor(1, 2),
            Ask::pause(),
            Ask::pause_counting(),
            Ask::resume(),
            Ask::begin(vcpus, 0),
            Ask::restore_done(0),
            Ask::wait_run(0),
            Ask::abort(),
            Ask::confirm(5, 6),
            Ask::time_page(0x1000, 64),
        ]
    }
}

/// An entry of SET_VM with all six registers, in the order of [`Register::ALL`].
pub fn whole_vcpu(vcpu: u32, values: [u64; 6]) -> wire::Vcpu {
    let mut entry = wire::Vcpu {
        vcpu: vcpu.into(),
        ..Default::default()
    };
    for (register, value) in Register::ALL.into_iter().zip(values) {
        entry.set(register, value);
    }
    entry
}
