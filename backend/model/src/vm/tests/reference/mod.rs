//! The same VM told naively: counts that are moved tick by tick, timers that are looked at one
//! by one, no heap, no offset kept. What it says, the real one must say.

mod requests;
mod restore;

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Phase, Status};

use super::rig::{HZ, PROFILE};
use crate::vm::{Notice, Released, Token};

/// Register ids in the order CTL, CNT, CVAL, PCTL, PCNT, PCVAL, as SPEC.md lists them.
const IDS: [[u64; 6]; 2] = [
    [
        0x6030_0000_0013_df19,
        0x6030_0000_0013_df1a,
        0x6030_0000_0013_df02,
        0x6030_0000_0013_df11,
        0x6030_0000_0013_df01,
        0x6030_0000_0013_df12,
    ],
    [
        0x4020_0000_000f_7181,
        0x4030_0000_000f_0708,
        0x4030_0000_000f_0718,
        0x4020_0000_000f_7101,
        0x4030_0000_000f_0700,
        0x4030_0000_000f_0710,
    ],
];

#[derive(Clone, Copy, Debug, Default)]
struct Clock {
    count: u64,
    moving: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Timer {
    enable: bool,
    imask: bool,
    cval: u64,
    /// The frontend is yet to be told of a rise.
    to_tell: bool,
}

impl Timer {
    fn line(&self, count: u64) -> bool {
        self.enable && !self.imask && count >= self.cval
    }
}

/// A count that was read, and how far the host counter was ahead of it.
type Read = Option<(u64, u64)>;

#[derive(Clone, Debug, Default)]
struct Vcpu {
    timers: [Timer; 2],
    read_alone: [Read; 2],
    read_with_vm: [Read; 2],
    /// What it set in the open restore; counts wait here.
    set: [Option<u64>; 6],
    done: bool,
}

#[derive(Clone, Debug)]
struct Restore {
    clocks: [Clock; 2],
    pinned: bool,
    own_physical: bool,
    timers: Vec<[Timer; 2]>,
    /// How far the host counter went since the clocks were put aside.
    aside: u64,
    flags: u32,
    saved_ns: u64,
    timeout_ns: u64,
    /// Ticks since RESTORE_BEGIN, modulo 2^64 as all time is.
    waited: u64,
}

type Refused = (Status, u32);

#[derive(Clone, Debug)]
pub(in crate::vm::tests) struct Reference {
    pub(in crate::vm::tests) host: u64,
    pub(in crate::vm::tests) realtime_ns: u64,
    phase: Phase,
    epoch: u64,
    abi: usize,
    frequency: u64,
    clocks: [Clock; 2],
    own_physical: bool,
    pinned: bool,
    anchored: bool,
    vcpus: Vec<Vcpu>,
    vm_read: [Read; 2],
    restore: Option<Restore>,
    waiters: Vec<Token>,
    phase_to_tell: Option<Phase>,
    pub(in crate::vm::tests) released: Vec<Released>,
    pub(in crate::vm::tests) notices: Vec<Notice>,
}

impl Reference {
    pub(in crate::vm::tests) fn new(host: u64, realtime_ns: u64) -> Self {
        Reference {
            host,
            realtime_ns,
            phase: Phase::New,
            epoch: 1,
            abi: 0,
            frequency: PROFILE.frequency,
            clocks: [Clock::default(); 2],
            own_physical: false,
            pinned: false,
            anchored: false,
            vcpus: Vec::new(),
            vm_read: [None; 2],
            restore: None,
            waiters: Vec::new(),
            phase_to_tell: None,
            released: Vec::new(),
            notices: Vec::new(),
        }
    }

    // Time.

    /// Ticks pass.
    pub(in crate::vm::tests) fn pass(&mut self, ticks: u64) {
        self.host = self.host.wrapping_add(ticks);
        self.realtime_ns = self.realtime_ns.wrapping_add(ticks);
        if let Some(restore) = &mut self.restore {
            restore.aside = restore.aside.wrapping_add(ticks);
            restore.waited = restore.waited.wrapping_add(ticks);
        }
        for (n, clock) in self.clocks.iter_mut().enumerate() {
            if !clock.moving {
                continue;
            }
            let before = clock.count;
            let (after, wrapped) = before.overflowing_add(ticks);
            clock.count = after;
            for vcpu in &mut self.vcpus {
                let timer = &mut vcpu.timers[n];
                // At a wrap the count is zero for a moment.
                let low_between = wrapped && !timer.line(0);
                let rose = timer.line(after) && (!timer.line(before) || low_between);
                timer.to_tell |= rose && self.phase == Phase::Running;
                timer.to_tell &= timer.line(after);
            }
        }
    }

    /// The VM hears what time it is.
    pub(in crate::vm::tests) fn notice_time(&mut self) {
        let missing = self.missing();
        let frequency = u128::from(self.frequency);
        let Some(restore) = &mut self.restore else {
            return;
        };
        let timeout = u128::from(restore.timeout_ns);
        let over = u128::from(restore.waited) * u128::from(HZ) >= timeout * frequency;
        // The longest time-outs are cut to what a counter can hold.
        let over = over || restore.waited == u64::MAX;
        if timeout != 0 && over {
            restore.timeout_ns = 0;
            self.notices.push(Notice::RestoreTimedOut {
                missing: missing.clone(),
                vcpus: self.vcpus.len() as u32,
            });
            self.release(Status::TimedOut, missing.len() as u32);
        }
    }

    fn missing(&self) -> Vec<u32> {
        (0..self.vcpus.len() as u32)
            .filter(|vcpu| !self.vcpus[*vcpu as usize].done)
            .collect()
    }

    /// The host counter is another one from now on.
    pub(in crate::vm::tests) fn set_host(&mut self, host: u64) {
        for clock in &mut self.clocks {
            if clock.moving {
                clock.count = clock.count.wrapping_add(host.wrapping_sub(self.host));
            }
        }
        self.host = host;
    }

    // What the frontend hears.

    fn release(&mut self, status: Status, detail: u32) {
        if self.waiters.is_empty() {
            return;
        }
        let run = (status == Status::Ok).then(|| self.run());
        self.released.push(Released {
            waiters: std::mem::take(&mut self.waiters),
            header: wire::ResponseHeader {
                status: status.errno().into(),
                detail: detail.into(),
                epoch: self.epoch.into(),
            },
            run,
        });
    }

    pub(in crate::vm::tests) fn events(&mut self) -> Vec<wire::Event> {
        let mut events = Vec::new();
        if let Some(phase) = self.phase_to_tell.take() {
            events.push(wire::Event {
                kind: 2.into(),
                vcpu: phase.code().into(),
                count: self.clocks[0].count.into(),
                epoch: self.epoch.into(),
                ..Default::default()
            });
        }
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            for (n, timer) in vcpu.timers.iter_mut().enumerate() {
                if std::mem::take(&mut timer.to_tell) {
                    events.push(wire::Event {
                        kind: 1.into(),
                        timer: (n as u16).into(),
                        vcpu: (index as u32).into(),
                        cval: timer.cval.into(),
                        count: self.clocks[n].count.into(),
                        epoch: self.epoch.into(),
                    });
                }
            }
        }
        events
    }

    pub(in crate::vm::tests) fn cancel_queue(&mut self, queue: u16) {
        let all = std::mem::take(&mut self.waiters);
        self.waiters = all.iter().copied().filter(|w| w.queue == queue).collect();
        self.release(Status::Canceled, 0);
        self.waiters = all.into_iter().filter(|w| w.queue != queue).collect();
    }

    pub(in crate::vm::tests) fn disconnect(&mut self) {
        self.waiters.clear();
        if self.phase == Phase::Running {
            self.tell_all_lines();
        }
    }

    pub(in crate::vm::tests) fn reset(&mut self) {
        *self = Reference {
            epoch: self.epoch,
            released: std::mem::take(&mut self.released),
            notices: std::mem::take(&mut self.notices),
            ..Reference::new(self.host, self.realtime_ns)
        };
    }

    fn tell_all_lines(&mut self) {
        for vcpu in &mut self.vcpus {
            for (timer, clock) in vcpu.timers.iter_mut().zip(&self.clocks) {
                timer.to_tell = timer.line(clock.count);
            }
        }
    }

    fn enter(&mut self, to: Phase) {
        if to == self.phase {
            return;
        }
        self.notices.push(Notice::Phase {
            from: self.phase,
            to,
            epoch: self.epoch,
        });
        self.phase = to;
        self.phase_to_tell = Some(to);
        for vcpu in &mut self.vcpus {
            for timer in &mut vcpu.timers {
                timer.to_tell = false;
            }
        }
        if to == Phase::Running {
            self.clocks.iter_mut().for_each(|clock| clock.moving = true);
            self.tell_all_lines();
            self.release(Status::Ok, 0);
        }
    }

    // Reading.

    fn run(&self) -> wire::Run {
        let [virt, phys] = self.clocks.map(|clock| clock.count);
        wire::Run {
            cntvoff: self.host.wrapping_sub(virt).into(),
            cntpoff: self.host.wrapping_sub(phys).into(),
            virt_count: virt.into(),
            phys_count: phys.into(),
            host_count: self.host.into(),
        }
    }

    fn vcpu_count(&self, vcpu: usize, clock: usize) -> u64 {
        match self.vcpus[vcpu].set[1 + 3 * clock] {
            Some(count) if self.phase == Phase::Restoring && !self.pinned => count,
            _ => self.clocks[clock].count,
        }
    }

    fn registers(&self, vcpu: usize) -> [u64; 6] {
        let mut all = [0; 6];
        for clock in 0..2 {
            let timer = self.vcpus[vcpu].timers[clock];
            let count = self.vcpu_count(vcpu, clock);
            let status = timer.enable && count >= timer.cval;
            all[3 * clock] =
                u64::from(timer.enable) | u64::from(timer.imask) << 1 | u64::from(status) << 2;
            all[3 * clock + 1] = count;
            all[3 * clock + 2] = timer.cval;
        }
        all
    }

    fn lines(&self, vcpu: usize) -> u32 {
        (0..2)
            .filter(|n| self.vcpus[vcpu].timers[*n].line(self.vcpu_count(vcpu, *n)))
            .map(|n| 1 << n)
            .sum()
    }

    fn reading(&self, clock: usize) -> Read {
        let Clock { count, moving } = self.clocks[clock];
        moving.then(|| (count, self.host.wrapping_sub(count)))
    }

    // Writing.

    fn index_of(&self, id: u64) -> Result<usize, Status> {
        if let Some(index) = IDS[self.abi].iter().position(|known| *known == id) {
            return Ok(index);
        }
        let arch = [0x60, 0x40];
        let size = 0xf << 52;
        let wrong_size = IDS[self.abi].iter().any(|known| known | size == id | size);
        if wrong_size || id >> 56 == arch[1 - self.abi] {
            Err(Status::Invalid)
        } else {
            Err(Status::UnknownRegister)
        }
    }

    fn too_large(&self, register: usize, value: u64) -> bool {
        self.abi == 1 && register.is_multiple_of(3) && value >> 32 != 0
    }

    /// Writes one register. Returns whether it was ignored.
    fn write(&mut self, vcpu: usize, register: usize, value: u64) -> bool {
        let clock = register / 3;
        let restoring = self.phase == Phase::Restoring;
        let timer = &mut self.vcpus[vcpu].timers[clock];
        match register % 3 {
            0 => {
                timer.enable = value & 1 != 0;
                timer.imask = value & 2 != 0;
            }
            2 => timer.cval = value,
            _ if self.pinned => return true,
            _ if restoring => {}
            _ => {
                let now = self.clocks[clock];
                let known = Some((value, self.host.wrapping_sub(now.count)));
                let vcpu = &self.vcpus[vcpu];
                let reads = [
                    vcpu.read_alone[clock],
                    vcpu.read_with_vm[clock],
                    self.vm_read[clock],
                ];
                if !now.moving || !reads.contains(&known) {
                    self.clocks[clock] = Clock {
                        count: value,
                        moving: false,
                    };
                    self.own_physical |= clock == 1;
                }
            }
        }
        if restoring {
            self.vcpus[vcpu].set[register] = Some(value);
        }
        false
    }
}
