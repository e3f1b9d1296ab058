//! Random lives of a VM: what a step may be, and how one is drawn.
//!
//! Values are drawn relative to the VM's clocks, so that timers do fall due, counts do meet
//! and written values do equal those read before.

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_user_timer_protocol::op::Scope;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, MAX_MESSAGE, Op, Register, VM_WIDE};

use super::rig::{Ask, HZ, START_REALTIME};
use crate::vm::Timeline;

/// A value, before the life is run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    This(u64),
    /// This far from a clock's count.
    Near(Timeline, i64),
    /// The last count that was read of this clock.
    LastRead(Timeline),
}

/// A register to write, and what.
pub(super) type Write = (Register, Value);

/// What happens next.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Time passes and the VM is advanced.
    Pass(u64),
    /// Time passes; the VM notices at the next request.
    Drift(u64),
    /// Time passes up to the VM's next deadline, or nearly.
    PassToNext(i64),
    /// The frontend takes all events.
    Events,
    CancelQueue(u16),
    Disconnect,
    Reset,
    Ask {
        ask: Ask,
        /// Added to the current epoch; `None` sends 0.
        epoch: Option<i64>,
    },
    /// A request with a wrong byte or a wrong length.
    Mangled {
        ask: Ask,
        mangling: Mangling,
    },
    Get(u32, Vec<Register>),
    /// SET_REGS, with DONE or without.
    Set(u32, Vec<Write>, bool),
    /// SET_VM, with DONE or without.
    SetVm(Vec<(u32, Vec<Write>)>, bool),
    /// The last SET_REGS or SET_VM that was done, once more.
    Again,
    /// CONFIRM_RUN, with offsets that are wrong by this.
    Confirm([u64; 2]),
    SetOffset(Value),
    /// Counts are read, by GET_VM or by the vCPU alone; time passes; the vCPU writes them back.
    WriteBack {
        vcpu: u32,
        with_vm: bool,
        ticks: u64,
        between: Between,
    },
    /// Every vCPU sets what it must, and more, and is done.
    RestoreAll(Vec<[Value; 4]>, How),
    BeginHere {
        flags: u32,
        saved_ns: u64,
        timeout_ns: u64,
    },
}

/// By which requests every vCPU sets its registers and is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// SET_VM, and a RESTORE_DONE each.
    RestoreDone,
    /// SET_VM with DONE.
    SetVm,
    /// A SET_REGS with DONE each.
    SetRegs,
}

/// What comes between the reading of counts and their writing back.
#[derive(Clone, Copy, Debug)]
pub(super) enum Between {
    Nothing,
    /// GET_VM of other vCPUs.
    GetVm,
    /// SET_COUNTER_ANCHOR.
    Anchor,
}

/// What becomes of a request's bytes.
#[derive(Clone, Debug)]
pub(super) enum Mangling {
    /// The byte at this index (modulo the length) is XORed with this.
    Byte(usize, u8),
    /// This many bytes (modulo the length) are cut off.
    CutOff(usize),
    /// These bytes are appended.
    Followed(Vec<u8>),
}

impl Mangling {
    pub(super) fn mangle(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Mangling::Byte(at, by) => {
                let at = at % bytes.len();
                bytes[at] ^= by;
            }
            Mangling::CutOff(by) => bytes.truncate(bytes.len() - by % (bytes.len() + 1)),
            Mangling::Followed(by) => bytes.extend(by),
        }
        bytes
    }
}

pub(super) const QUEUES: std::ops::RangeInclusive<u16> = 1..=2;

fn clock() -> impl Strategy<Value = Timeline> {
    prop_oneof![Just(Timeline::Virtual), Just(Timeline::Physical)]
}

fn register() -> impl Strategy<Value = Register> {
    prop::sample::select(&Register::ALL[..])
}

/// Values at which something could go wrong.
const EDGES: [u64; 7] = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        5 => (clock(), -60_i64..200).prop_map(|(clock, by)| Value::Near(clock, by)),
        3 => clock().prop_map(Value::LastRead),
        2 => (0..8_u64).prop_map(Value::This),
        1 => (0..200_u64).prop_map(|n| Value::This(u64::MAX - n)),
        1 => prop::sample::select(&EDGES[..]).prop_map(Value::This),
        1 => any::<u64>().prop_map(Value::This),
    ]
}

fn write() -> impl Strategy<Value = Write> {
    let control = (0..8_u64).prop_map(Value::This);
    (register(), prop_oneof![control, value()], value()).prop_map(|(register, control, value)| {
        match register {
            Register::TimerCtl | Register::PtimerCtl => (register, control),
            _ => (register, value),
        }
    })
}

/// A timer enabled, mostly so that it falls due soon.
fn arming() -> impl Strategy<Value = Vec<Write>> {
    (
        clock(),
        -20_i64..100,
        prop_oneof![4 => Just(1), 1 => 0..4_u64],
    )
        .prop_map(|(clock, by, control)| {
            let [ctl, _, cval] = super::rig::registers_of(clock);
            vec![(ctl, Value::This(control)), (cval, Value::Near(clock, by))]
        })
}

fn id() -> impl Strategy<Value = u64> {
    prop_oneof![
        10 => register().prop_map(|register| register.id(Abi::Arm64)),
        4 => register().prop_map(|register| register.id(Abi::Arm)),
        1 => Just(0x6020_0000_0013_df19),
        1 => Just(0x6030_0000_0013_df18),
        1 => any::<u64>(),
    ]
}

fn ticks() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..60_u64,
        3 => 0..5_000_u64,
        1 => 0..10 * HZ,
        1 => any::<u64>().prop_map(|n| n >> 1),
        1 => any::<u64>(),
    ]
}

/// A vCPU of the VM, rarely one that it does not have.
fn vcpu(vcpus: u32) -> impl Strategy<Value = u32> {
    prop_oneof![
        20 => 0..vcpus,
        1 => vcpus..vcpus + 2,
        1 => Just(VM_WIDE),
    ]
}

fn flags() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(0), 3 => Just(1), 3 => 0..8_u32]
}

fn realtime() -> impl Strategy<Value = u64> {
    (0..200_u64).prop_map(|n| START_REALTIME - 100 + n)
}

fn timeout() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0), 3 => 1..300_u64, 1 => any::<u64>()]
}

fn any_ask(vcpus: u32) -> impl Strategy<Value = Ask> {
    let frequency = prop_oneof![Just(0), Just(HZ), Just(24_000_000), any::<u64>()];
    let page = prop_oneof![Just((0x1000, 64)), Just((0, 0)), (0..300_u64, 0..300_u64)];
    prop_oneof![
        Just(Ask::get_info()),
        (0..vcpus + 2, 0..3_u8, 0..5_u8, frequency).prop_map(|(vcpus, abi, flags, frequency)| {
            Ask::configure_with(vcpus, abi, flags, frequency)
        }),
        Just(Ask::get_reg_list(0)),
        vec(id(), 0..5).prop_map(|ids| Ask::get_ids(0, &ids)),
        (vec((id(), any::<u64>()), 0..4), any::<bool>())
            .prop_map(|(entries, done)| perhaps_done(Ask::set_ids(0, &entries), done)),
        (0..vcpus + 1, 0..vcpus + 1).prop_map(|(first, count)| Ask::get_vm(first, count)),
        (vec(wire_vcpu(vcpus), 0..3), any::<bool>())
            .prop_map(|(entries, done)| perhaps_done(Ask::set_vm(&entries), done)),
        any::<u64>().prop_map(Ask::set_offset),
        (any::<u64>(), any::<u64>()).prop_map(|(ns, count)| Ask::set_anchor(ns, count)),
        any::<bool>().prop_map(pause),
        Just(Ask::resume()),
        (0..vcpus + 2, flags(), realtime(), timeout()).prop_map(
            |(vcpus, flags, saved_ns, timeout_ns)| {
                Ask::begin_with(vcpus, flags, saved_ns, timeout_ns)
            }
        ),
        Just(Ask::restore_done(0)),
        Just(Ask::wait_run(0)),
        Just(Ask::abort()),
        (any::<u64>(), any::<u64>()).prop_map(|(virt, phys)| Ask::confirm(virt, phys)),
        page.prop_map(|(address, length)| Ask::time_page(address, length)),
    ]
}

pub(super) fn perhaps_done(ask: Ask, done: bool) -> Ask {
    if done { ask.done() } else { ask }
}

fn pause(keep_counting: bool) -> Ask {
    if keep_counting {
        Ask::pause_counting()
    } else {
        Ask::pause()
    }
}

/// An entry of SET_VM that may be wrong.
fn wire_vcpu(vcpus: u32) -> impl Strategy<Value = wire::Vcpu> {
    let present = prop_oneof![6 => 0..64_u32, 1 => any::<u32>()];
    (vcpu(vcpus), present, any::<[u64; 6]>()).prop_map(|(vcpu, present, values)| wire::Vcpu {
        present: present.into(),
        ..super::rig::whole_vcpu(vcpu, values)
    })
}

fn sent(vcpus: u32) -> impl Strategy<Value = Ask> {
    let room = prop_oneof![8 => Just(MAX_MESSAGE), 1 => 16..300_usize];
    (any_ask(vcpus), vcpu(vcpus), room, QUEUES).prop_map(|(ask, vcpu, room, queue)| {
        let ask = ask.with_room(room).on_queue(queue);
        match Op::from(ask.op).row().map(|row| row.scope) {
            Some(Scope::Vcpu) => ask.for_vcpu(vcpu),
            _ => ask,
        }
    })
}

fn ask(vcpus: u32) -> impl Strategy<Value = Step> {
    let epoch = prop_oneof![8 => Just(None), 2 => Just(Some(0)), 1 => (-2..3_i64).prop_map(Some)];
    (sent(vcpus), epoch).prop_map(|(ask, epoch)| Step::Ask { ask, epoch })
}

fn mangled(vcpus: u32) -> impl Strategy<Value = Step> {
    let bit = (0..8_u32).prop_map(|bit| 1 << bit);
    let mangling = prop_oneof![
        4 => (0..64_usize, prop_oneof![bit, any::<u8>()])
            .prop_map(|(at, by)| Mangling::Byte(at, by)),
        1 => (0..64_usize).prop_map(Mangling::CutOff),
        1 => vec(any::<u8>(), 1..60).prop_map(Mangling::Followed),
    ];
    (sent(vcpus), mangling).prop_map(|(ask, mangling)| Step::Mangled { ask, mangling })
}

/// A step that sends this request.
fn of_vm(ask: Ask) -> Step {
    Step::Ask { ask, epoch: None }
}

fn how() -> impl Strategy<Value = How> {
    prop::sample::select(&[How::RestoreDone, How::SetVm, How::SetRegs][..])
}

fn write_back(vcpus: u32) -> impl Strategy<Value = Step> {
    let between = prop_oneof![
        3 => Just(Between::Nothing),
        1 => Just(Between::GetVm),
        1 => Just(Between::Anchor),
    ];
    (0..vcpus, any::<bool>(), 0..50_u64, between).prop_map(|(vcpu, with_vm, ticks, between)| {
        Step::WriteBack {
            vcpu,
            with_vm,
            ticks,
            between,
        }
    })
}

fn step(vcpus: u32) -> impl Strategy<Value = Step> {
    let writes = || prop_oneof![vec(write(), 0..4), arming()];
    let here = 0..vcpus;
    prop_oneof![
        14 => ticks().prop_map(Step::Pass),
        4 => (0..50_u64).prop_map(Step::Drift),
        4 => (-1..2_i64).prop_map(Step::PassToNext),
        10 => Just(Step::Events),
        1 => QUEUES.prop_map(Step::CancelQueue),
        1 => Just(Step::Disconnect),
        12 => ask(vcpus),
        1 => mangled(vcpus),
        5 => (here.clone(), vec(register(), 0..4)).prop_map(|(vcpu, list)| Step::Get(vcpu, list)),
        16 => (here.clone(), writes(), prop::bool::weighted(0.2))
            .prop_map(|(vcpu, writes, done)| Step::Set(vcpu, writes, done)),
        3 => (vec((here.clone(), writes()), 0..4), any::<bool>())
            .prop_map(|(vcpus, done)| Step::SetVm(vcpus, done)),
        4 => Just(Step::Again),
        4 => prop_oneof![4 => Just([0; 2]), 1 => Just([1, 0]), 1 => Just([0, 1])]
            .prop_map(Step::Confirm),
        4 => write_back(vcpus),
        1 => value().prop_map(Step::SetOffset),
        4 => (vec([value(), value(), value(), value()], vcpus as usize), how())
            .prop_map(|(values, how)| Step::RestoreAll(values, how)),
        4 => Just(of_vm(Ask::resume())),
        3 => any::<bool>().prop_map(|keep_counting| of_vm(pause(keep_counting))),
        4 => (flags(), realtime(), timeout()).prop_map(|(flags, saved_ns, timeout_ns)| {
            Step::BeginHere { flags, saved_ns, timeout_ns }
        }),
    ]
}

/// A life: how many vCPUs, which ABI, the flags of CONFIGURE_VM, the host counter at first, and
/// what happens.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub(super) vcpus: u32,
    pub(super) abi: u8,
    pub(super) flags: u8,
    pub(super) host: u64,
    pub(super) steps: Vec<Step>,
}

/// The host counter when a life begins.
const HOSTS: [u64; 4] = [0, HZ, u64::MAX - 300, 0xf333_8991_2222_3333];

/// A story of up to `steps` steps. RESET_DEVICE in it starts the VM over.
pub(super) fn story(steps: usize) -> impl Strategy<Value = Story> {
    // Few vCPUs, so that steps often hit the same one.
    let vcpus = prop_oneof![3 => 1..=2_u32, 1 => 3..=8_u32];
    let abi = prop_oneof![9 => Just(0), 1 => Just(1)];
    let runs = prop::bool::weighted(0.7);
    let head = (vcpus, abi, 0..4_u8, prop::sample::select(&HOSTS[..]), runs);
    head.prop_flat_map(move |(vcpus, abi, flags, host, runs)| {
        let step = prop_oneof![80 => step(vcpus), 1 => Just(Step::Reset)];
        vec(step, 1..=steps).prop_map(move |mut steps| {
            if runs {
                steps.insert(0, Step::Confirm([0; 2]));
                steps.insert(0, of_vm(Ask::resume()));
            }
            Story {
                vcpus,
                abi,
                flags,
                host,
                steps,
            }
        })
    })
}
