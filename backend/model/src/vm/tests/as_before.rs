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
use crate::vm::{Effects, Incoming, Now, Profile, Token, Vm};

/// The bits of `info`'s flags that do not tell the counter source.
const UNTOLD: u8 = 0x1f;

/// FNV-1a.
struct Digest(u64);

impl Digest {
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
                self.digest.take(format!("{handled:?}").as_bytes());
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
            digest.take(format!("{:?}", released.waiters).as_bytes());
            digest.take(released.header.as_bytes());
            digest.take(released.run.unwrap_or_default().as_bytes());
        }
        for notice in std::mem::take(&mut effects.notices) {
            digest.take(format!("{notice:?}").as_bytes());
        }
        digest.take(format!("{:?}", effects.page.take()).as_bytes());
        let changed = effects.take_changed(|changed| format!("{changed:?}"));
        digest.take(changed.unwrap_or_default().as_bytes());
        let mut info = vm.info(*now);
        info.flags &= UNTOLD;
        digest.take(info.as_bytes());
        digest.take(vm.time_page().as_bytes());
        let next = (vm.ticks_to_next(*now), vm.has_event(), vm.wants_realtime());
        digest.take(format!("{next:?}").as_bytes());
        digest.take(format!("{:?}", vm.open_restore(*now)).as_bytes());
        digest.take(vm.vm_record().as_bytes());
        for vcpu in 0..vm.vcpu_records() {
            digest.take(vm.vcpu_record(vcpu).as_bytes());
        }
        match vm.save(*now) {
            Ok(saved) => {
                let saved = (saved.abi, saved.frequency, saved.counts, saved.vcpus);
                digest.take(format!("{saved:?}").as_bytes());
            }
            Err(error) => digest.take(format!("{error:?}").as_bytes()),
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
    0x63a9_9505_9dbc_6f86,
    0x2f14_d573_f914_4065,
    0xf87c_c206_f7bc_4a02,
    0x78e6_b00a_6db7_9e79,
    0xec34_aef2_7563_c034,
    0xe285_433a_cd30_c1bd,
    0x2306_6582_e9d0_f679,
    0x5a0c_357c_989d_d40c,
    0x2808_cef6_1365_538e,
    0xed87_9f71_9e96_5118,
    0x03bb_87f0_abbb_4b0b,
    0x2d5d_9753_f1cb_78f2,
    0xbd16_c8a4_565c_d4c1,
    0x479c_653b_f75c_d1fe,
    0x288a_d363_c2bc_af9f,
    0x9a9c_90b4_df68_3b45,
    0xa703_6fbe_439f_a5cd,
    0x79e8_c47a_4912_9b3a,
    0x20f6_2746_f95f_6325,
    0x669a_fe68_131d_b0c7,
    0xdc40_9982_026c_baf1,
    0x6f53_ebd5_42cd_7dda,
    0x315f_2bf8_3fe3_6e0b,
    0x0fd7_bf8e_09b4_ee45,
    0x0574_5c40_af39_b9b6,
    0xfece_2bf4_c6f0_4b74,
    0x4e6e_cf09_2eb5_e471,
    0x5db6_e8d0_6787_0303,
    0x5f1e_3b0d_4817_70bf,
    0x6225_4966_ee71_40a3,
    0x4a78_983c_499c_0969,
    0x0d23_3ef0_f02a_60e5,
    0x6007_570e_3e9e_01ba,
    0xf5da_4704_7aeb_5e72,
    0x1251_42e8_026e_2aa0,
    0x4842_b43c_3a85_7632,
    0x2612_25b4_656a_4985,
    0x57c0_7556_b1c9_0925,
    0x690d_0166_c52a_f833,
    0xb405_8610_f265_13fa,
];

#[test]
fn a_vm_with_neither_flag_does_what_it_did_before_there_were_any() {
    let lives: Vec<u64> = (0..).take(BEFORE.len()).map(life).collect();
    assert_eq!(lives, BEFORE);
}
