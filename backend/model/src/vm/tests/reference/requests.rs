//! The naive VM's requests: each is tried on a copy, which is kept if nothing was wrong.

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Phase, Status, VM_WIDE};
use zerocopy::IntoBytes;

use super::{Clock, IDS, Reference, Refused, Vcpu};
use crate::vm::tests::rig::{PROFILE, Reply};
use crate::vm::tests::steps::Want;
use crate::vm::{MAX_FREQUENCY, Token};

impl Reference {
    pub(in crate::vm::tests) fn handle(
        &mut self,
        want: &Want,
        vcpu: u32,
        epoch: u64,
        room: usize,
        token: Token,
    ) -> Option<Reply> {
        self.notice_time();
        let mut trial = self.clone();
        let (verdict, body) = match trial.perform(want, vcpu, epoch, token) {
            Ok(None) if room < 16 + 40 => ((Status::TooBig, 16 + 40), vec![]),
            Ok(None) => {
                *self = trial;
                return None;
            }
            Ok(Some(body)) if 16 + body.len() > room => {
                ((Status::TooBig, 16 + body.len() as u32), vec![])
            }
            Ok(Some(body)) => {
                *self = trial;
                ((Status::Ok, 0), body)
            }
            Err(refused) => (refused, vec![]),
        };
        Some(Reply {
            status: verdict.0,
            detail: verdict.1,
            epoch: self.epoch,
            body,
        })
    }

    fn busy(&self) -> Refused {
        let detail = match self.phase {
            Phase::Restoring => self.missing().len() as u32,
            phase => phase.code(),
        };
        (Status::Busy, detail)
    }

    fn only_in(&self, phases: &[Phase]) -> Result<(), Refused> {
        if phases.contains(&self.phase) {
            Ok(())
        } else {
            Err(self.busy())
        }
    }

    /// Does it, room or not. `None` where the answer waits.
    fn perform(
        &mut self,
        want: &Want,
        vcpu: u32,
        epoch: u64,
        token: Token,
    ) -> Result<Option<Vec<u8>>, Refused> {
        use Phase::{Paused, Restoring, Running};
        let of_one_vcpu = matches!(
            want,
            Want::GetRegList
                | Want::GetRegs(_)
                | Want::SetRegs(_)
                | Want::RestoreDone
                | Want::WaitRun
        );
        if of_one_vcpu
            && self.phase != Phase::New
            && (vcpu == VM_WIDE || vcpu as usize >= self.vcpus.len())
        {
            return Err((Status::NoSuchVcpu, 0));
        }
        if epoch != 0 && epoch != self.epoch {
            return Err((Status::Stale, 0));
        }
        let one = vcpu as usize;
        let mut body = Vec::new();
        match want {
            Want::GetInfo => body = self.info().as_bytes().to_vec(),
            Want::Configure {
                vcpus,
                abi,
                frequency,
            } => self.configure(*vcpus, *abi, *frequency)?,
            Want::GetRegList => {
                self.only_in(&[Paused, Running, Restoring])?;
                body = IDS[self.abi]
                    .iter()
                    .flat_map(|id| id.to_le_bytes())
                    .collect();
            }
            Want::GetRegs(ids) => {
                self.only_in(&[Paused, Running, Restoring])?;
                for (n, id) in ids.iter().enumerate() {
                    let register = self.index_of(*id).map_err(|status| (status, n as u32))?;
                    body.extend(id.to_le_bytes());
                    body.extend(self.registers(one)[register].to_le_bytes());
                    if register % 3 == 1
                        && let Some(reading) = self.reading(register / 3)
                    {
                        self.vcpus[one].read_alone[register / 3] = Some(reading);
                    }
                }
            }
            Want::SetRegs(entries) => body = self.set_regs(one, entries)?,
            Want::GetVm { first, count } => {
                self.only_in(&[Paused, Running, Restoring])?;
                body = self.get_vm(*first, *count)?;
            }
            Want::SetVm(entries) => self.set_vm(entries)?,
            Want::SetOffset(offset) => {
                self.only_in(&[Paused, Restoring])?;
                let clock = Clock {
                    count: self.host.wrapping_sub(*offset),
                    moving: true,
                };
                self.clocks = [clock; 2];
                self.pinned = true;
                self.own_physical = true;
            }
            Want::SetAnchor { .. } => {
                self.only_in(&[Paused])?;
                self.anchored = true;
                self.vm_read = [None; 2];
                for vcpu in &mut self.vcpus {
                    vcpu.read_alone = [None; 2];
                    vcpu.read_with_vm = [None; 2];
                }
            }
            Want::Pause { keep_counting } => {
                self.only_in(&[Paused, Running])?;
                if self.phase == Running && !keep_counting {
                    self.clocks[0].moving = false;
                    self.clocks[1].moving = !self.own_physical;
                }
                self.enter(Paused);
                body = self.run().as_bytes().to_vec();
            }
            Want::Resume => {
                self.only_in(&[Paused, Running])?;
                self.enter(Running);
                body = self.run().as_bytes().to_vec();
            }
            Want::Begin {
                vcpus,
                flags,
                saved_ns,
                timeout_ns,
            } => {
                self.only_in(&[Paused, Restoring])?;
                if *vcpus as usize != self.vcpus.len() {
                    return Err((Status::Invalid, 0));
                }
                self.begin(*flags, *saved_ns, *timeout_ns);
            }
            Want::RestoreDone => {
                self.only_in(&[Restoring])?;
                body = self.restore_done(one)?;
            }
            Want::WaitRun => {
                self.only_in(&[Paused, Running, Restoring])?;
                if self.phase != Running {
                    self.waiters.push(token);
                    return Ok(None);
                }
                body = self.run().as_bytes().to_vec();
            }
            Want::Abort => {
                self.only_in(&[Restoring])?;
                self.put_back();
                self.restore = None;
                self.enter(Paused);
                self.release(Status::Canceled, 0);
            }
        }
        Ok(Some(body))
    }

    fn info(&self) -> wire::Info {
        let configured = self.phase != Phase::New;
        let vcpus = self.vcpus.len() as u32;
        let [virt, phys] = [0, 1].map(|n| match configured {
            true => self.host.wrapping_sub(self.clocks[n].count),
            false => 0,
        });
        wire::Info {
            version: 1.into(),
            phase: self.phase.code().into(),
            vcpus: vcpus.into(),
            restored: match self.phase {
                Phase::Restoring => vcpus - self.missing().len() as u32,
                _ => vcpus,
            }
            .into(),
            frequency: self.frequency.into(),
            cntvoff: virt.into(),
            cntpoff: phys.into(),
            epoch: self.epoch.into(),
            max_vcpus: PROFILE.max_vcpus.into(),
            request_queues: PROFILE.request_queues.into(),
            abi: self.abi as u8,
            flags: u8::from(self.pinned)
                | u8::from(self.anchored) << 1
                | u8::from(self.own_physical) << 2,
            host_count: self.host.into(),
        }
    }

    fn configure(&mut self, vcpus: u32, abi: u8, frequency: u64) -> Result<(), Refused> {
        let frequency = match frequency {
            0 => PROFILE.frequency,
            other => other,
        };
        if self.phase != Phase::New {
            let same = vcpus as usize == self.vcpus.len()
                && usize::from(abi) == self.abi
                && frequency == self.frequency;
            return if same { Ok(()) } else { Err(self.busy()) };
        }
        if abi > 1 || vcpus == 0 || vcpus > PROFILE.max_vcpus || frequency > MAX_FREQUENCY {
            return Err((Status::Invalid, 0));
        }
        self.abi = abi.into();
        self.frequency = frequency;
        self.vcpus = vec![Vcpu::default(); vcpus as usize];
        self.clocks[1] = Clock {
            count: self.host,
            moving: true,
        };
        self.enter(Phase::Paused);
        Ok(())
    }

    fn set_regs(&mut self, vcpu: usize, entries: &[(u64, u64)]) -> Result<Vec<u8>, Refused> {
        self.only_in(&[Phase::Paused, Phase::Running, Phase::Restoring])?;
        let a_count = entries
            .iter()
            .any(|(id, _)| self.index_of(*id).is_ok_and(|register| register % 3 == 1));
        let running = self.phase == Phase::Running;
        let done = self.phase == Phase::Restoring && self.vcpus[vcpu].done;
        if done || running && a_count && !self.pinned {
            return Err(self.busy());
        }
        let mut values = [None; 6];
        for (n, (id, value)) in entries.iter().enumerate() {
            let register = self.index_of(*id).map_err(|status| (status, n as u32))?;
            let other = values[register].is_some_and(|before| before != *value);
            if other || self.too_large(register, *value) {
                return Err((Status::Invalid, n as u32));
            }
            values[register] = Some(*value);
        }
        let mut ignored = 0;
        for (register, value) in values.into_iter().enumerate() {
            if let Some(value) = value {
                ignored += u32::from(self.write(vcpu, register, value));
            }
        }
        for n in 0..2 {
            let count = self.clocks[n].count;
            let timer = &mut self.vcpus[vcpu].timers[n];
            timer.to_tell &= timer.line(count);
        }
        let lines = self.lines(vcpu);
        Ok([lines.to_le_bytes(), ignored.to_le_bytes()].concat())
    }

    fn get_vm(&mut self, first: u32, count: u32) -> Result<Vec<u8>, Refused> {
        let vcpus = first as usize..first as usize + count as usize;
        if vcpus.end > self.vcpus.len() {
            return Err((Status::Invalid, 0));
        }
        let [virt, phys] = self.clocks.map(|clock| clock.count);
        let mut body = Vec::new();
        for word in [virt, phys, self.host, self.frequency] {
            body.extend(word.to_le_bytes());
        }
        body.extend(first.to_le_bytes());
        body.extend(count.to_le_bytes());
        for vcpu in vcpus.clone() {
            body.extend((vcpu as u32).to_le_bytes());
            body.extend(0x3f_u32.to_le_bytes());
            for value in self.registers(vcpu) {
                body.extend(value.to_le_bytes());
            }
        }
        for n in 0..2 {
            if let Some(reading) = self.reading(n) {
                self.vm_read[n] = Some(reading);
                for vcpu in vcpus.clone() {
                    self.vcpus[vcpu].read_with_vm[n] = Some(reading);
                }
            }
        }
        Ok(body)
    }

    fn set_vm(&mut self, entries: &[wire::Vcpu]) -> Result<(), Refused> {
        self.only_in(&[Phase::Restoring])?;
        let fields = |entry: &wire::Vcpu| {
            [
                entry.ctl,
                entry.cnt,
                entry.cval,
                entry.pctl,
                entry.pcnt,
                entry.pcval,
            ]
            .map(|field| field.get())
        };
        let index = |entry: &wire::Vcpu| entry.vcpu.get() as usize;
        for entry in entries {
            if self.vcpus.get(index(entry)).is_some_and(|vcpu| vcpu.done) {
                return Err(self.busy());
            }
        }
        for (n, entry) in entries.iter().enumerate() {
            let bits = entry.present.get();
            let before = &entries[..n];
            let large = (0..6).any(|register| {
                bits >> register & 1 != 0 && self.too_large(register, fields(entry)[register])
            });
            if index(entry) >= self.vcpus.len()
                || bits > 0x3f
                || large
                || before.iter().any(|other| other.vcpu == entry.vcpu)
            {
                return Err((Status::Invalid, n as u32));
            }
        }
        for entry in entries {
            for (register, value) in fields(entry).into_iter().enumerate() {
                if entry.present.get() >> register & 1 != 0 {
                    self.write(index(entry), register, value);
                }
            }
        }
        Ok(())
    }
}
