//! A VM with neither CONFIRM nor ONE_OFFSET does to the byte what it did before there were such
//! flags, ARMED and DONE.
//!
//! The digests are those of the version before: its `Vm` under this same file. They cover answers,
//! released waiters, notices, events, deadlines, the time page, the records of a state file and
//! what is saved. What `info` tells of the counter source is new, and is masked out.

use vhost_user_timer_protocol::CounterSource;
use vhost_user_timer_reference::contract::{
    ARM, ARM64, Vcpu, configure_body, op, pause_body, range_body, regs_body, request, restore_body,
    words,
};
use zerocopy::IntoBytes;

use super::rig::{PROFILE, START, START_REALTIME};
use crate::vm::{
    Effects, Handled, Incoming, Notice, Now, PageOrder, Profile, SaveError, SavedTimer, Token, Vm,
};

/// The bits of `info`'s flags that do not tell the counter source.
const UNTOLD: u8 = 0x1f;

/// FNV-1a.
struct Digest(u64);

impl Digest {
    fn number(&mut self, number: u64) {
        self.take(&number.to_le_bytes());
    }

    /// Numbers, and how many they are.
    fn numbers(&mut self, numbers: impl IntoIterator<Item = u64>) {
        let numbers: Vec<u64> = numbers.into_iter().collect();
        self.number(numbers.len() as u64);
        numbers.into_iter().for_each(|number| self.number(number));
    }

    fn notice(&mut self, notice: &Notice) {
        match *notice {
            Notice::Phase { from, to, epoch } => {
                self.numbers([0, from.code().into(), to.code().into(), epoch]);
            }
            Notice::RestoreTimedOut { ref missing, vcpus } => {
                self.numbers([1, vcpus.into()]);
                self.numbers(missing.iter().map(|vcpu| u64::from(*vcpu)));
            }
            Notice::RealtimeWentBack { ns } => self.numbers([2, ns]),
            _ => panic!("no notice of a VM with neither flag: {notice:?}"),
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

struct Life {
    vm: Vm,
    now: Now,
    effects: Effects,
    random: Random,
    digest: Digest,
    vcpus: u32,
    ids: [u64; 6],
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Life {
            vcpus: 1 + random.below(4) as u32,
            ids: random.one_of(&[ARM64, ARM64, ARM64, ARM]),
            random,
            vm: Vm::new(Profile {
                source: CounterSource::NotTold,
                ..PROFILE
            }),
            now: Now {
                host: START,
                realtime_ns: START_REALTIME,
            },
            effects: Effects::default(),
            digest: Digest(0xcbf2_9ce4_8422_2325),
        }
    }

    fn value(&mut self, register: usize) -> u64 {
        let info = self.vm.info(self.now);
        let offset = [info.cntvoff, info.cntpoff][register / 3].get();
        let count = self.now.host.wrapping_sub(offset);
        match self.random.below(8) {
            _ if register.is_multiple_of(3) => self.random.below(8),
            0 => self.random.one_of(&[0, 1, 1 << 32, u64::MAX]),
            1 => self.random.next(),
            _ => count.wrapping_add(self.random.below(120)).wrapping_sub(40),
        }
    }

    fn entries(&mut self) -> Vec<(u64, u64)> {
        let mut entries = Vec::new();
        for _ in 0..self.random.below(5) {
            let register = self.random.below(6) as usize;
            let id = match self.random.below(40) {
                0 => self
                    .random
                    .one_of(&[7, ARM64[1], ARM[1], 0x6020_0000_0013_df19]),
                _ => self.ids[register],
            };
            entries.push((id, self.value(register)));
        }
        entries
    }

    fn vcpu(&mut self) -> u32 {
        match self.random.below(30) {
            0 => self.vcpus,
            _ => self.random.below(self.vcpus.into()) as u32,
        }
    }

    fn rows(&mut self) -> Vec<u8> {
        let mut rows = Vec::new();
        for vcpu in 0..self.vcpus {
            if self.random.below(4) == 0 {
                continue;
            }
            let mut row = Vcpu::with(vcpu, [0; 6]);
            row.registers = std::array::from_fn(|register| self.value(register));
            row.present = match self.random.below(6) {
                0 => self.random.below(70) as u32,
                _ => 0x3f,
            };
            rows.extend(row.to_bytes());
        }
        rows
    }

    fn request(&mut self) -> Vec<u8> {
        const VM: u32 = u32::MAX;
        let abi = u8::from(self.ids == ARM);
        let (op, vcpu, body) = match self.random.below(34) {
            0 => (op::GET_INFO, VM, vec![]),
            1 => {
                let vcpus = self.vcpus + self.random.below(2) as u32;
                (op::CONFIGURE_VM, VM, configure_body(vcpus, abi, 0))
            }
            2 => (op::GET_REG_LIST, self.vcpu(), vec![]),
            3..6 => (op::GET_REGS, self.vcpu(), words(&self.ids)),
            6..14 => {
                let entries = self.entries();
                (op::SET_REGS, self.vcpu(), regs_body(&entries))
            }
            14 => (op::GET_VM, VM, range_body(0, self.vcpus)),
            15..18 => (op::SET_VM, VM, self.rows()),
            18 => {
                let offset = self.value(1);
                (op::SET_COUNTER_OFFSET, VM, words(&[offset, 0]))
            }
            19 if self.random.below(4) == 0 => (op::SET_COUNTER_ANCHOR, VM, words(&[5, 9])),
            19..22 => {
                let flags = u32::from(self.random.below(3) == 0);
                (op::PAUSE, VM, pause_body(flags))
            }
            22..25 => (op::RESUME, VM, vec![]),
            25..27 => {
                let flags = self.random.one_of(&[0, 1, 1, 2, 3, 4, 7]);
                let saved = START_REALTIME + self.random.below(400);
                let timeout = self.random.one_of(&[0, 0, 50, 300]);
                let body = restore_body(self.vcpus, flags, saved, timeout);
                (op::RESTORE_BEGIN, VM, body)
            }
            27..31 => (op::RESTORE_DONE, self.vcpu(), vec![]),
            31 => (op::WAIT_RUN, self.vcpu(), vec![]),
            32 => (op::RESTORE_ABORT, VM, vec![]),
            _ => (op::SET_TIME_PAGE, VM, words(&[64, 64])),
        };
        let epoch = match self.random.below(12) {
            0 => self.vm.epoch(),
            1 => self.vm.epoch() + 1,
            _ => 0,
        };
        request(op, vcpu, epoch, &body)
    }

    fn step(&mut self, n: u16) {
        let ticks = self.random.one_of(&[0, 1, 3, 20, 90, 400]);
        self.now.host = self.now.host.wrapping_add(ticks);
        self.now.realtime_ns += ticks;
        match self.random.below(60) {
            0 => self.vm.disconnect(self.now),
            1 => self.vm.cancel_queue(1, &mut self.effects),
            2 if self.random.below(4) == 0 => self.vm.reset(&mut self.effects),
            2..10 => self.vm.advance(self.now, &mut self.effects),
            10..16 => {
                while let Some(event) = self.vm.next_event(self.now) {
                    self.digest.take(event.as_bytes());
                }
            }
            _ => {
                let bytes = self.request();
                let room = self.random.one_of(&[16, 24, 60, 4_096, 4_096, 4_096]);
                let token = Token {
                    queue: 1 + n % 2,
                    head: n,
                };
                let call = Incoming::parse(&bytes, room, token);
                let handled = self.vm.handle(self.now, &call, &mut self.effects);
                self.digest.number(u64::from(handled == Handled::Waiting));
                let mut response = self.effects.response.clone();
                if bytes[..2] == op::GET_INFO.to_le_bytes()
                    && let Some(flags) = response.get_mut(16 + 55)
                {
                    *flags &= UNTOLD;
                }
                self.digest.take(&response);
            }
        }
        self.look();
    }

    /// Everything that there is to see of the VM.
    fn look(&mut self) {
        let Life {
            vm,
            digest,
            effects,
            now,
            ..
        } = self;
        for released in std::mem::take(&mut effects.released) {
            let waiter = |token: &Token| [token.queue.into(), token.head.into()];
            digest.numbers(released.waiters.iter().flat_map(waiter));
            digest.take(released.header.as_bytes());
            digest.take(released.run.unwrap_or_default().as_bytes());
        }
        for notice in std::mem::take(&mut effects.notices) {
            digest.notice(&notice);
        }
        match effects.page.take() {
            Some(PageOrder::WriteAt { address, length }) => digest.numbers([address, length]),
            Some(PageOrder::Stop) => digest.numbers([0]),
            None => {}
        }
        effects.take_changed(|changed| {
            digest.numbers([changed.vm.into(), changed.all.into()]);
            digest.numbers(changed.vcpus.iter().map(|vcpu| u64::from(*vcpu)));
        });
        let mut info = vm.info(*now);
        info.flags &= UNTOLD;
        digest.take(info.as_bytes());
        digest.take(vm.time_page().as_bytes());
        digest.numbers(vm.ticks_to_next(*now));
        digest.numbers([vm.has_event().into(), vm.wants_realtime().into()]);
        if let Some(open) = vm.open_restore(*now) {
            digest.numbers([open.overdue.into(), open.missing.into()]);
            digest.numbers(open.ticks_left);
        }
        digest.take(vm.vm_record().as_bytes());
        for vcpu in 0..vm.vcpu_records() {
            digest.take(vm.vcpu_record(vcpu).as_bytes());
        }
        match vm.save(*now) {
            Ok(saved) => {
                digest.numbers([saved.abi.code().into(), saved.frequency]);
                digest.numbers(saved.counts);
                let timer = |timer: SavedTimer| [timer.control, timer.compare];
                digest.numbers(saved.vcpus.into_iter().flatten().flat_map(timer));
            }
            Err(SaveError::New) => digest.number(0),
            Err(SaveError::Restoring { missing }) => digest.number(missing.into()),
        }
    }
}

/// The digest of this life.
fn life(seed: u64) -> u64 {
    let mut life = Life::new(seed);
    for n in 0..1_500 {
        life.step(n);
    }
    life.digest.0
}

/// The digests of the lives 0 to 39 under the version before.
const BEFORE: [u64; 40] = [
    0x47fa_8dfa_9058_ea17,
    0xbd8b_7d17_753d_c6f0,
    0x453a_fa4e_88ae_a78b,
    0x55ae_f530_e195_a928,
    0x70a9_176b_0a24_53ce,
    0x62e2_273d_df20_3827,
    0x0f90_119a_739c_9ed6,
    0x812c_f07f_5705_2ee0,
    0xa853_2270_ea18_6858,
    0xa8bf_5c38_7d95_9acb,
    0xb451_abd3_5a06_de05,
    0x61a0_a52b_a9d6_cd99,
    0x532a_5ab4_b81f_3867,
    0x17dd_5346_20ef_9c36,
    0xb95e_7b66_dbae_d2b1,
    0x80d4_336a_1ecc_1e39,
    0xcc73_7936_fdcc_4513,
    0x30aa_2b56_5ba4_9ceb,
    0x3712_8835_03d4_fe94,
    0xa294_b109_cc2c_c108,
    0x965e_1356_b706_b914,
    0xad70_4634_f762_27ca,
    0xd7b2_bc57_0dfa_9df5,
    0x7e0d_9314_63d1_3a8a,
    0x2c69_5ee3_6b61_15f9,
    0xe2b4_04c4_3980_8586,
    0x3783_15a8_a153_f701,
    0x793f_5023_fb4b_a838,
    0xb28e_f0af_eb5d_408d,
    0xa137_3b7f_62eb_b864,
    0xb3dd_8cc6_20e7_d076,
    0x7787_2ad6_1b99_440c,
    0x3629_ecac_5763_6610,
    0x6f53_af4c_f832_ae03,
    0x8ef3_3ef4_6b08_b0a9,
    0x2129_1e89_60b7_c29d,
    0x8bcd_0212_c698_6613,
    0xf1c5_2281_6c98_4919,
    0x4ccf_cac1_7d3d_8d13,
    0x264b_2570_3f2d_aa54,
];

#[test]
fn a_vm_with_neither_flag_does_what_it_did_before_there_were_any() {
    let lives: Vec<u64> = (0..).take(BEFORE.len()).map(life).collect();
    assert_eq!(lives, BEFORE);
}
