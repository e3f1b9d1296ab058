//! What the VM's time allocates, counted: nothing for a request on the hot path, and never
//! more often for many vCPUs than for one.

mod counting;

use counting::{Cost, NOTHING, cost_of};
use vhost_user_timer_kit::reference::Ask;
use vhost_user_timer_model::vm::{Effects, Handled, Incoming, Now, Profile, Token, Vm};
use vhost_user_timer_protocol::wire::{self, configure_flags, restore_flags};
use vhost_user_timer_protocol::{CounterSource, MAX_MESSAGE, Op, Phase, Register, VM_WIDE};
use zerocopy::FromBytes;

fn get_all(vcpu: u32) -> Vec<u8> {
    Ask::get_regs(vcpu, &Register::ALL).bytes()
}

/// A VM with the buffers that its shell keeps for it.
struct Bench {
    vm: Vm,
    host: u64,
    effects: Effects,
}

impl Bench {
    fn paused(vcpus: u32) -> Self {
        Bench::configured(vcpus, 0)
    }

    fn configured(vcpus: u32, flags: u8) -> Self {
        let profile = Profile {
            max_vcpus: vcpus,
            request_queues: 1,
            frequency: 1_000_000_000,
            frequency_fixed: false,
            source: CounterSource::NotTold,
        };
        let mut bench = Bench {
            vm: Vm::new(profile),
            host: 1_000,
            effects: Effects::default(),
        };
        bench.done(&Ask::configure_with(vcpus, 0, flags, 0).bytes());
        bench
    }

    /// A VM that runs, its buffers as large as the requests below need them.
    fn running(vcpus: u32) -> Self {
        let mut bench = Bench::paused(vcpus);
        bench.done(&Ask::resume().bytes());
        bench.done(&get_all(0));
        bench.done(&Ask::set_regs(0, &[]).bytes());
        bench
    }

    fn handle(&mut self, request: &[u8]) -> u32 {
        let call = Incoming::parse(request, MAX_MESSAGE, Token { queue: 1, head: 0 });
        let now = Now::at(self.host);
        let handled = self.vm.handle(now, &call, &mut self.effects);
        self.effects.take_changed(|_| ());
        assert_eq!(handled, Handled::Answered);
        let header = wire::ResponseHeader::read_from_prefix(&self.effects.response);
        header.unwrap().0.status.get()
    }

    fn done(&mut self, request: &[u8]) {
        assert_eq!(self.handle(request), 0);
    }

    /// Arms both timers of a vCPU to fall due in so many ticks of the virtual clock.
    fn arm(&self, vcpu: u32, ticks: u64) -> Vec<u8> {
        let info = self.vm.info(Now::at(self.host));
        let virt = self.host - info.cntvoff.get();
        let entries = [
            (Register::TimerCval, virt + ticks),
            (Register::TimerCtl, wire::ctl::ENABLE),
            (Register::PtimerCval, self.host + ticks),
            (Register::PtimerCtl, wire::ctl::ENABLE),
        ];
        Ask::set_regs(vcpu, &entries).bytes()
    }
}

const SIZES: [u32; 2] = [1, 4096];

#[test]
fn the_counter_counts() {
    let expected = Cost {
        allocations: 1,
        bytes: 100,
    };
    assert_eq!(cost_of(|| vec![0_u8; 100]), expected);
}

#[test]
fn reading_registers_allocates_nothing() {
    for vcpus in SIZES {
        let mut bench = Bench::running(vcpus);
        let requests: Vec<_> = (0..vcpus).map(get_all).collect();
        let cost = cost_of(|| {
            for request in &requests {
                bench.host += 1;
                bench.done(request);
            }
        });
        assert_eq!(cost, NOTHING, "{vcpus} vCPUs");
    }
}

#[test]
fn arming_and_re_arming_timers_allocates_nothing() {
    for vcpus in SIZES {
        let mut bench = Bench::running(vcpus);
        let requests: Vec<_> = [500, 90, 7_000, 0, 1_000_000]
            .into_iter()
            .flat_map(|ticks| (0..vcpus).map(move |vcpu| (vcpu, ticks)))
            .map(|(vcpu, ticks)| bench.arm(vcpu, ticks + u64::from(vcpu)))
            .collect();
        let cost = cost_of(|| {
            for request in &requests {
                bench.done(request);
            }
        });
        assert_eq!(cost, NOTHING, "{vcpus} vCPUs");
    }
}

#[test]
fn expiries_and_their_events_allocate_nothing() {
    for vcpus in SIZES {
        let mut bench = Bench::running(vcpus);
        for round in 0..3 {
            for vcpu in 0..vcpus {
                let arm = bench.arm(vcpu, 1 + u64::from(vcpu % 13));
                bench.done(&arm);
            }
            let mut events = 0;
            let cost = cost_of(|| {
                while let Some(ticks) = bench.vm.ticks_to_next(Now::at(bench.host))
                    && ticks < 1_000
                {
                    bench.host += ticks;
                    bench.vm.advance(Now::at(bench.host), &mut bench.effects);
                }
                while bench.vm.next_event(Now::at(bench.host)).is_some() {
                    events += 1;
                }
            });
            let phase_change = u32::from(round == 0);
            assert_eq!(events, 2 * vcpus + phase_change);
            assert_eq!(cost, NOTHING, "{vcpus} vCPUs");
        }
    }
}

#[test]
fn events_that_nobody_reads_do_not_pile_up() {
    for vcpus in SIZES {
        let mut bench = Bench::running(vcpus);
        for _ in 0..10_000 {
            let arm = bench.arm(0, 1);
            let cost = cost_of(|| {
                bench.done(&arm);
                bench.host += 1;
                bench.vm.advance(Now::at(bench.host), &mut bench.effects);
            });
            assert_eq!(cost, NOTHING, "{vcpus} vCPUs");
        }
    }
}

#[test]
fn asking_to_run_in_running_allocates_nothing() {
    for vcpus in SIZES {
        let mut bench = Bench::running(vcpus);
        let request = Ask::wait_run(vcpus - 1).bytes();
        assert_eq!(cost_of(|| bench.done(&request)), NOTHING);
    }
}

#[test]
fn a_refused_request_allocates_nothing() {
    let mut bench = Bench::running(4);
    let requests = [
        vec![],
        vec![0xff; 100],
        Ask::get_ids(9, &[]).bytes(),
        Ask::new(Op::GetRegs, 0, &[0_u8; 4096]).bytes(),
        Ask::new(Op::SetRegs, 0, &[0_u8; 4096]).bytes(),
        Ask::new(Op::SetVm, VM_WIDE, &[0_u8; 0]).bytes(),
        Ask::restore_done(0).bytes(),
        Ask::set_regs(0, &[]).done().bytes(),
        Ask::confirm(1, 2).bytes(),
    ];
    for request in &requests {
        let cost = cost_of(|| assert_ne!(bench.handle(request), 0));
        assert_eq!(cost, NOTHING);
    }
}

#[test]
fn reading_the_vm_takes_room_in_proportion_and_only_the_first_time() {
    for vcpus in [1, 64, 4096] {
        let mut bench = Bench::running(vcpus);
        let request = Ask::get_vm(0, vcpus).bytes();
        bench.done(&request);
        let len = 16 + 40 + 56 * vcpus as usize;
        assert_eq!(bench.effects.response.len(), len);
        assert!(bench.effects.response.capacity() <= 2 * len.max(112));
        assert_eq!(cost_of(|| bench.done(&request)), NOTHING);
    }
}

/// What one vCPU after another costs in a restore, and the restore around it.
fn restore(vcpus: u32) -> [Cost; 3] {
    let mut bench = Bench::paused(vcpus);
    let begin = Ask::begin(vcpus, 0).bytes();
    let begin = cost_of(|| bench.done(&begin));
    let bring: Vec<_> = (0..vcpus)
        .map(|vcpu| {
            let entries = Register::ALL.map(|register| (register, 5));
            Ask::set_regs(vcpu, &entries).bytes()
        })
        .collect();
    let done: Vec<_> = (0..vcpus)
        .map(|vcpu| Ask::restore_done(vcpu).bytes())
        .collect();
    let vcpu_by_vcpu = cost_of(|| {
        for (bring, done) in bring.iter().zip(&done) {
            bench.done(bring);
            bench.done(done);
        }
    });
    assert_eq!(bench.vm.phase(), Phase::Paused);
    let resume = Ask::resume().bytes();
    let resume = cost_of(|| bench.done(&resume));
    [begin, vcpu_by_vcpu, resume]
}

#[test]
fn a_restore_allocates_as_often_for_many_vcpus_as_for_one() {
    // Buffers that grow by doubling are not made here: all is known beforehand.
    let [one, many] = SIZES.map(restore);
    for (one, many) in one.iter().zip(&many) {
        assert_eq!(one.allocations, many.allocations);
        assert!(many.bytes <= 200 * 4096, "{many:?}");
    }
}

/// What one vCPU after another costs in a restore with DONE, and the confirmation after it.
fn restore_to_armed(vcpus: u32) -> [Cost; 2] {
    let mut bench = Bench::configured(vcpus, configure_flags::ALL);
    bench.done(&Ask::begin(vcpus, restore_flags::AUTORUN).bytes());
    let bring: Vec<_> = (0..vcpus)
        .map(|vcpu| {
            let entries = Register::ALL.map(|register| (register, 5));
            Ask::set_regs(vcpu, &entries).done().bytes()
        })
        .collect();
    let vcpu_by_vcpu = cost_of(|| {
        for request in &bring {
            bench.done(request);
        }
    });
    assert_eq!(bench.vm.phase(), Phase::Armed);
    let info = bench.vm.info(Now::at(bench.host));
    let confirm = Ask::confirm(info.cntvoff.get(), info.cntpoff.get()).bytes();
    let confirmed = cost_of(|| bench.done(&confirm));
    assert_eq!(bench.vm.phase(), Phase::Running);
    // Again, by a frontend that has not seen the answer.
    assert_eq!(cost_of(|| bench.done(&confirm)), NOTHING);
    [vcpu_by_vcpu, confirmed]
}

#[test]
fn a_restore_with_done_and_its_confirmation_allocate_as_often_for_many_vcpus_as_for_one() {
    let [one, many] = SIZES.map(restore_to_armed);
    for (one, many) in one.iter().zip(&many) {
        assert_eq!(one.allocations, many.allocations);
        assert!(many.bytes <= 200 * 4096, "{many:?}");
    }
}
