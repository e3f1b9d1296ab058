//! What the pure parts of the backend cost: operations on the model of the VM's time, and a
//! reading of the guest's clock.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Bencher, BenchmarkId, Criterion, Throughput};
use vhost_user_timer_kit::reference::Ask;
use vhost_user_timer_model::rtc::{
    ClockKind, Counter, Effects as RtcEffects, Request as RtcRequest, Rtc, Sample, Sampled,
    wire as rtc,
};
use vhost_user_timer_model::vm::{Effects, Handled, Incoming, Now, Profile, Token, Vm};
use vhost_user_timer_protocol::{CounterSource, MAX_MESSAGE, Register, Role, wire};
use zerocopy::{FromBytes, IntoBytes};

/// Number of vCPUs.
const SIZES: [u32; 3] = [1, 64, 4096];
const MANY: u32 = 4096;

/// A deadline that never comes.
const FAR: u64 = 1 << 60;

/// A request for each vCPU.
fn each(vcpus: u32, ask: impl Fn(u32) -> Ask) -> Vec<Vec<u8>> {
    (0..vcpus).map(|vcpu| ask(vcpu).bytes()).collect()
}

/// A VM with what its shell keeps for it, and a host counter that advances by itself.
#[derive(Clone)]
struct Bench {
    vm: Vm,
    host: u64,
    effects: Effects,
}

impl Bench {
    fn running(vcpus: u32) -> Self {
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
        bench.ask(&Ask::configure(vcpus, 0, 0).bytes());
        bench.ask(&Ask::resume().bytes());
        bench.done();
        bench
    }

    fn ask(&mut self, request: &[u8]) {
        self.host += 100;
        let call = Incoming::parse(request, MAX_MESSAGE, Token { queue: 1, head: 0 });
        let handled = self.vm.handle(Now::at(self.host), &call, &mut self.effects);
        assert!(black_box(handled) == Handled::Answered);
        self.effects.take_changed(|_| ());
        self.effects.notices.clear();
    }

    /// Asserts that the last request was not refused.
    fn done(&self) {
        let header = wire::ResponseHeader::read_from_prefix(&self.effects.response);
        assert_eq!(header.map(|(header, _)| header.status.get()), Ok(0));
    }
}

/// The requests of a running guest, one vCPU after the other.
fn requests(criterion: &mut Criterion) {
    const VCPUS: u32 = 64;
    let timer = |vcpu| {
        let cval = FAR + 977 * u64::from(vcpu);
        let values = [
            (Register::TimerCtl, wire::ctl::ENABLE),
            (Register::TimerCval, cval),
            (Register::PtimerCval, cval),
        ];
        Ask::set_regs(vcpu, &values)
    };
    for (name, requests) in [
        (
            "GET_REGS of 6",
            each(VCPUS, |vcpu| Ask::get_regs(vcpu, &Register::ALL)),
        ),
        ("SET_REGS of 3", each(VCPUS, timer)),
        ("WAIT_RUN", each(VCPUS, Ask::wait_run)),
    ] {
        let mut bench = Bench::running(VCPUS);
        let mut next = requests.iter().cycle();
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| next.next().map(|request| bench.ask(request)));
        });
        bench.done();
    }
}

/// One benchmark for each size of a VM.
fn sizes(criterion: &mut Criterion, name: &str, run: impl Fn(&mut Bencher<'_>, u32)) {
    let mut group = criterion.benchmark_group(name);
    for vcpus in SIZES {
        group.throughput(Throughput::Elements(vcpus.into()));
        group.bench_function(BenchmarkId::from_parameter(vcpus), |b| run(b, vcpus));
    }
    group.finish();
}

fn get_vm(bencher: &mut Bencher<'_>, vcpus: u32) {
    let mut bench = Bench::running(vcpus);
    let request = Ask::get_vm(0, vcpus).bytes();
    bencher.iter(|| bench.ask(&request));
    bench.done();
}

/// What each vCPU brings.
fn brought() -> [(Register, u64); 6] {
    Register::ALL.map(|register| match register.role() {
        Role::Compare => (register, FAR),
        Role::Control => (register, wire::ctl::ENABLE),
        Role::Count => (register, 5_000),
    })
}

/// From PAUSE to the last vCPU's WAIT_RUN, each vCPU with all its registers, which `bring` brings.
fn restore_by(bencher: &mut Bencher<'_>, vcpus: u32, bring: Vec<Ask>) {
    let mut bench = Bench::running(vcpus);
    let head = [
        Ask::pause(),
        Ask::begin(vcpus, wire::restore_flags::AUTORUN),
    ];
    let run = (0..vcpus).map(Ask::wait_run);
    let all = head.into_iter().chain(bring).chain(run);
    let all: Vec<_> = all.map(|ask| ask.bytes()).collect();
    bencher.iter(|| all.iter().for_each(|request| bench.ask(request)));
    bench.done();
}

/// Two requests for each vCPU.
fn restore(bencher: &mut Bencher<'_>, vcpus: u32) {
    let bring = (0..vcpus).flat_map(|vcpu| {
        let done = Ask::restore_done(vcpu);
        [Ask::set_regs(vcpu, &brought()), done]
    });
    restore_by(bencher, vcpus, bring.collect());
}

/// One request for all vCPUs.
fn restore_at_once(bencher: &mut Bencher<'_>, vcpus: u32) {
    let all: Vec<_> = (0..vcpus)
        .map(|vcpu| {
            let mut row = wire::Vcpu {
                vcpu: vcpu.into(),
                ..Default::default()
            };
            for (register, value) in brought() {
                row.set(register, value);
            }
            row
        })
        .collect();
    let bring = Ask {
        flags: wire::request_flags::DONE,
        ..Ask::set_vm(&all)
    };
    restore_by(bencher, vcpus, vec![bring]);
}

/// Time passes for a VM whose vCPUs all have a timer armed.
fn advance(criterion: &mut Criterion) {
    const AHEAD: u64 = 10_000_000;
    let mut bench = Bench::running(MANY);
    let first = bench.host + AHEAD;
    let offset = bench.vm.info(Now::at(bench.host)).cntvoff.get();
    for vcpu in 0..MANY {
        let timer = [
            (Register::TimerCval, first - offset + u64::from(vcpu)),
            (Register::TimerCtl, wire::ctl::ENABLE),
        ];
        bench.ask(&Ask::set_regs(vcpu, &timer).bytes());
        bench.done();
    }
    while bench.vm.next_event(Now::at(bench.host)).is_some() {}
    let mut group = criterion.benchmark_group(format!("advance with {MANY} armed"));
    for (name, host, due) in [
        ("none due", first - 1, 0),
        ("one due", first, 1),
        ("all due", first + u64::from(MANY), MANY),
    ] {
        let now = Now::at(host);
        let mut after = bench.clone();
        after.vm.advance(now, &mut after.effects);
        let events = std::iter::from_fn(|| after.vm.next_event(now));
        assert_eq!(events.count(), due as usize);
        group.throughput(Throughput::Elements(due.max(1).into()));
        group.bench_function(name, |bencher| match due {
            0 => bencher.iter(|| bench.vm.advance(black_box(now), &mut bench.effects)),
            _ => bencher.iter_batched_ref(
                || bench.clone(),
                |bench| bench.vm.advance(now, &mut bench.effects),
                BatchSize::LargeInput,
            ),
        });
    }
    group.finish();
}

fn read(criterion: &mut Criterion) {
    let mut clocks = Rtc::new(&[ClockKind::Utc, ClockKind::Monotonic]);
    let mut effects = RtcEffects::default();
    let mut now = Sample {
        utc_ns: 1_000,
        tai_ns: None,
        monotonic_ns: 1_000,
        counter: Counter::Withheld,
    };
    let request = rtc::ReqClock {
        head: rtc::ReqHead {
            msg_type: rtc::REQ_READ.into(),
            ..Default::default()
        },
        ..Default::default()
    };
    criterion.bench_function("READ", |bencher| {
        bencher.iter(|| {
            now.utc_ns += 100;
            now.monotonic_ns += 100;
            let request = black_box(request.as_bytes());
            let request = RtcRequest::parse(request);
            let now = Sampled::All(now);
            clocks.handle(&request, rtc::MAX_RESPONSE, &now, &mut effects);
        });
    });
    assert_eq!(effects.response.first(), Some(&0), "it was not refused");
}

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    requests(&mut criterion);
    sizes(&mut criterion, "GET_VM", get_vm);
    sizes(&mut criterion, "restore", restore);
    sizes(&mut criterion, "restore at once", restore_at_once);
    advance(&mut criterion);
    read(&mut criterion);
    criterion.final_summary();
}
