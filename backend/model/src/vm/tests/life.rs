//! Runs a story: its steps become requests to a real VM, and a witness checks each.

use proptest::test_runner::TestCaseError;
use vhost_user_timer_protocol::request::{Body, Request};
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Register, Status, VM_WIDE};

use super::rig::{Ask, PROFILE, Reply, Rig, START_REALTIME};
use super::steps::{Between, How, Step, Story, Value, Write, perhaps_done};
use crate::vm::{Notice, Now, Released, Timeline, Token};

pub(super) type Verdict = Result<(), TestCaseError>;

/// A request as it was sent.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) bytes: Vec<u8>,
    pub(super) room: usize,
    pub(super) token: Token,
}

impl Asked {
    /// The request, if it is well-formed.
    pub(super) fn body(&self) -> Option<Body<'_>> {
        Request::parse(&self.bytes).ok().map(|request| request.body)
    }

    /// Whether the request makes vCPUs be done: RESTORE_DONE, or one with the flag DONE.
    pub(super) fn is_done(&self) -> bool {
        Request::parse(&self.bytes)
            .is_ok_and(|request| request.body == Body::RestoreDone || request.flags != 0)
    }

    /// The vCPU that the request is about.
    pub(super) fn vcpu(&self) -> u32 {
        Request::parse(&self.bytes).map_or(VM_WIDE, |request| request.vcpu)
    }
}

/// What can be seen of a life.
#[derive(Debug)]
pub(super) enum Seen<'a> {
    /// A request, and its answer unless it waits.
    Asked(&'a Asked, Option<&'a Reply>),
    /// Time passed. Whether the VM was advanced, or will be by the next request.
    Passed(u64, bool),
    /// The frontend took all events.
    Events(&'a [wire::Event]),
    CancelQueue(u16),
    Disconnect,
    Reset,
    /// After an anchor the host counter reads this.
    HostIs(u64),
    /// The effects of the above.
    Effects(&'a [Released], &'a [Notice]),
}

/// Watches a life, and says what is wrong.
pub(super) trait Witness {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict;
}

struct Life<'a, W> {
    rig: Rig,
    abi: Abi,
    flags: u8,
    vcpus: u32,
    /// The last SET_REGS or SET_VM that was done.
    written: Option<Vec<u8>>,
    /// The last count that was read of each clock.
    last_read: [u64; 2],
    witness: &'a mut W,
}

/// Runs a story before a witness.
pub(super) fn live(story: &Story, witness: &mut impl Witness) -> Verdict {
    let mut rig = Rig::with_profile(PROFILE);
    rig.now = Now {
        host: story.host,
        realtime_ns: START_REALTIME,
    };
    let mut life = Life {
        rig,
        abi: Abi::from_code(story.abi).unwrap(),
        flags: story.flags,
        written: None,
        vcpus: story.vcpus,
        last_read: [0; 2],
        witness,
    };
    life.configure()?;
    for step in &story.steps {
        life.step(step)?;
    }
    Ok(())
}

impl<W: Witness> Life<'_, W> {
    fn configure(&mut self) -> Verdict {
        let abi = self.abi.code();
        self.ask(&Ask::configure_with(self.vcpus, abi, self.flags, 0))
    }

    fn seen(&mut self, seen: &Seen<'_>) -> Verdict {
        self.witness.see(&mut self.rig, seen)?;
        let (released, notices) = (self.rig.released(), self.rig.notices());
        let effects = Seen::Effects(&released, &notices);
        self.witness.see(&mut self.rig, &effects)
    }

    fn value(&self, value: Value) -> u64 {
        match value {
            Value::This(value) => value,
            Value::LastRead(clock) => self.last_read[clock as usize],
            Value::Near(clock, by) => {
                let info = self.rig.vm.info(self.rig.now);
                let offset = [info.cntvoff, info.cntpoff][clock as usize].get();
                let count = self.rig.now.host.wrapping_sub(offset);
                count.wrapping_add_signed(by)
            }
        }
    }

    /// The values to write; the last one of several for one register.
    fn values(&self, writes: &[Write]) -> Vec<(Register, u64)> {
        let mut values: Vec<(Register, u64)> = Vec::new();
        for (register, value) in writes {
            values.retain(|(other, _)| other != register);
            values.push((*register, self.value(*value)));
        }
        values
    }

    fn entry(&self, vcpu: u32, writes: &[Write]) -> wire::Vcpu {
        let mut entry = wire::Vcpu {
            vcpu: vcpu.into(),
            ..Default::default()
        };
        for (register, value) in self.values(writes) {
            entry.set(register, value);
        }
        entry
    }

    fn pass(&mut self, ticks: u64) -> Verdict {
        self.rig.pass(ticks);
        self.seen(&Seen::Passed(ticks, true))
    }

    fn step(&mut self, step: &Step) -> Verdict {
        match step {
            Step::Pass(ticks) => self.pass(*ticks),
            Step::Drift(ticks) => {
                self.rig.drift(*ticks);
                self.seen(&Seen::Passed(*ticks, false))
            }
            Step::PassToNext(by) => {
                self.pass(0)?;
                let ticks = self.rig.vm.ticks_to_next(self.rig.now).unwrap_or(0);
                self.pass(ticks.saturating_add_signed(*by))
            }
            Step::Events => {
                self.pass(0)?;
                let events = self.rig.events();
                self.seen(&Seen::Events(&events))
            }
            Step::CancelQueue(queue) => {
                self.rig.vm.cancel_queue(*queue, &mut self.rig.effects);
                self.seen(&Seen::CancelQueue(*queue))
            }
            Step::Disconnect => {
                self.rig.vm.disconnect(self.rig.now);
                self.seen(&Seen::Disconnect)
            }
            Step::Reset => {
                self.rig.reset();
                self.seen(&Seen::Reset)?;
                self.configure()
            }
            Step::Ask { ask, epoch } => {
                let current = self.rig.vm.epoch();
                let epoch = epoch.map_or(0, |by| current.saturating_add_signed(by));
                self.ask(&ask.clone().in_epoch(epoch))
            }
            Step::Mangled { ask, mangling } => {
                self.ask_bytes(mangling.mangle(ask.bytes()), ask.room, ask.queue)
            }
            Step::Get(vcpu, registers) => {
                let ids: Vec<_> = registers.iter().map(|it| it.id(self.abi)).collect();
                self.ask(&Ask::get_ids(*vcpu, &ids))
            }
            Step::Set(vcpu, writes, done) => {
                let ask = self.set_regs(*vcpu, writes);
                self.ask(&perhaps_done(ask, *done))
            }
            Step::SetVm(vcpus, done) => {
                let entries = vcpus.iter().map(|(vcpu, writes)| self.entry(*vcpu, writes));
                let ask = Ask::set_vm(&entries.collect::<Vec<_>>());
                self.ask(&perhaps_done(ask, *done))
            }
            Step::Again => match self.written.clone() {
                Some(bytes) => self.ask_bytes(bytes, 4096, 1),
                None => Ok(()),
            },
            Step::Confirm([virt, phys]) => {
                let info = self.rig.vm.info(self.rig.now);
                let wrong = |offset: u64, by| offset.wrapping_add(by);
                self.ask(&Ask::confirm(
                    wrong(info.cntvoff.get(), *virt),
                    wrong(info.cntpoff.get(), *phys),
                ))
            }
            Step::SetOffset(value) => self.ask(&Ask::set_offset(self.value(*value))),
            &Step::WriteBack {
                vcpu,
                with_vm,
                ticks,
                between,
            } => self.write_back(vcpu, with_vm, ticks, between),
            Step::RestoreAll(values, how) => self.restore_all(values, *how),
            &Step::BeginHere {
                flags,
                saved_ns,
                timeout_ns,
            } => self.ask(&Ask::begin_with(self.vcpus, flags, saved_ns, timeout_ns)),
        }
    }

    fn write_back(&mut self, vcpu: u32, with_vm: bool, ticks: u64, between: Between) -> Verdict {
        let counts = [Register::TimerCnt, Register::PtimerCnt].map(|it| it.id(self.abi));
        if with_vm {
            self.ask(&Ask::get_vm(vcpu, self.vcpus - vcpu))?;
        } else {
            self.ask(&Ask::get_ids(vcpu, &counts))?;
        }
        self.rig.drift(ticks);
        self.seen(&Seen::Passed(ticks, false))?;
        let entries: Vec<_> = counts.into_iter().zip(self.last_read).collect();
        match between {
            Between::Nothing => {}
            Between::GetVm => self.ask(&Ask::get_vm(vcpu + 1, self.vcpus - vcpu - 1))?,
            Between::Anchor => {
                let host = self.rig.now.host.wrapping_add(1_000);
                self.ask(&Ask::set_anchor(0, host))?;
            }
        }
        self.ask(&Ask::set_ids(vcpu, &entries))
    }

    /// SET_REGS; the last of several values for one register.
    fn set_regs(&self, vcpu: u32, writes: &[Write]) -> Ask {
        let values = self.values(writes).into_iter();
        let entries = values.map(|(register, value)| (register.id(self.abi), value));
        Ask::set_ids(vcpu, &entries.collect::<Vec<_>>())
    }

    fn restore_all(&mut self, values: &[[Value; 4]], how: How) -> Verdict {
        let bring = |(vcpu, [cnt, cval, pcnt, pcval]): (u32, &[Value; 4])| {
            let mut writes = vec![
                (Register::TimerCtl, Value::This(u64::from(vcpu) % 3)),
                (Register::TimerCnt, *cnt),
                (Register::TimerCval, *cval),
                (Register::PtimerCtl, Value::This(1)),
                (Register::PtimerCval, *pcval),
            ];
            if let Value::This(_) = pcnt {
                writes.push((Register::PtimerCnt, *pcnt));
            }
            (vcpu, writes)
        };
        let brought: Vec<_> = (0..).zip(values).map(bring).collect();
        let entries: Vec<_> = brought
            .iter()
            .map(|(vcpu, writes)| self.entry(*vcpu, writes))
            .collect();
        match how {
            How::RestoreDone => {
                self.ask(&Ask::set_vm(&entries))?;
                for vcpu in 0..self.vcpus {
                    self.ask(&Ask::restore_done(vcpu))?;
                }
            }
            How::SetVm => self.ask(&Ask::set_vm(&entries).done())?,
            How::SetRegs => {
                for (vcpu, writes) in &brought {
                    let ask = self.set_regs(*vcpu, writes);
                    self.ask(&ask.done())?;
                }
            }
        }
        Ok(())
    }

    fn ask(&mut self, ask: &Ask) -> Verdict {
        self.ask_bytes(ask.bytes(), ask.room, ask.queue)
    }

    fn ask_bytes(&mut self, bytes: Vec<u8>, room: usize, queue: u16) -> Verdict {
        let token = self.rig.next_token(queue);
        let reply = self.rig.offer_bytes(&bytes, room, queue);
        let asked = Asked { bytes, room, token };
        self.seen(&Seen::Asked(&asked, reply.as_ref()))?;
        let Some(reply) = reply.filter(|reply| reply.status == Status::Ok) else {
            return Ok(());
        };
        match asked.body() {
            Some(Body::SetRegs(_) | Body::SetVm(_)) => self.written = Some(asked.bytes),
            Some(Body::SetCounterAnchor(anchor)) => {
                let count = anchor.count.get();
                self.rig.now.host = count;
                self.seen(&Seen::HostIs(count))?;
            }
            Some(Body::GetRegs(_)) => {
                for entry in reply.body.chunks(16) {
                    let id = u64::from_le_bytes(entry[..8].try_into().unwrap());
                    let value = u64::from_le_bytes(entry[8..].try_into().unwrap());
                    for (clock, register) in [
                        (Timeline::Virtual, Register::TimerCnt),
                        (Timeline::Physical, Register::PtimerCnt),
                    ] {
                        if register.id(self.abi) == id {
                            self.last_read[clock as usize] = value;
                        }
                    }
                }
            }
            Some(Body::GetVm(_)) => {
                for clock in Timeline::ALL {
                    let at = 8 * clock as usize;
                    let count = reply.body[at..at + 8].try_into().unwrap();
                    self.last_read[clock as usize] = u64::from_le_bytes(count);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
