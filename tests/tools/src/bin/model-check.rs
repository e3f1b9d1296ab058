//! See `model-check --help`.

use std::process::ExitCode;
use std::thread::available_parallelism;

use clap::{Parser, ValueEnum};
use vhost_user_timer_model::vm::Vm;
use vhost_user_timer_tools::model::device;
use vhost_user_timer_tools::model::limits::Limits;
use vhost_user_timer_tools::model::run::{Effort, Verdict, check};

/// Checks the backend's model of a VM's time in every interleaving of a VMM and its vCPUs
///
/// The options limit how often each kind of event happens. Within these limits, every order of
/// events is tried.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Use larger defaults: three steps of the host counter. Takes some minutes and 5 GiB of
    /// memory; each further step of anything takes several times that
    #[arg(long)]
    large: bool,

    /// Only a VM of this kind [default: one of each kind, one after the other]
    #[arg(long, value_name = "KIND", value_enum)]
    vm: Option<Kind>,

    /// Number of vCPUs [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    vcpus: Option<u32>,

    /// Threads of the VMM that write registers for vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4))]
    vmm_threads: Option<u32>,

    /// Steps of the host counter [default: 2]
    #[arg(long, value_name = "N")]
    ticks: Option<u8>,

    /// How many disturbances happen, of all kinds below together [default: 3]
    #[arg(long, value_name = "N")]
    disturbances: Option<u8>,

    /// RESTORE_BEGINs [default for this and the options below: no limit of its own]
    #[arg(long, value_name = "N")]
    begins: Option<u8>,

    /// RESTORE_ABORTs
    #[arg(long, value_name = "N")]
    aborts: Option<u8>,

    /// PAUSEs
    #[arg(long, value_name = "N")]
    pauses: Option<u8>,

    /// SET_COUNTER_OFFSETs
    #[arg(long, value_name = "N")]
    offsets: Option<u8>,

    /// Writes of a count
    #[arg(long, value_name = "N")]
    counts: Option<u8>,

    /// Writes of a timer
    #[arg(long, value_name = "N")]
    timers: Option<u8>,

    /// Ends of a connection or of a queue
    #[arg(long, value_name = "N")]
    disconnects: Option<u8>,

    /// Kills of the backend
    #[arg(long, value_name = "N")]
    restarts: Option<u8>,

    /// Stop after about this many states
    #[arg(long, value_name = "N")]
    max_states: Option<usize>,

    /// Stop each path after this many steps
    #[arg(long, value_name = "N")]
    depth: Option<usize>,

    /// Checker threads [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

/// What the VM is configured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Neither CONFIRM nor ONE_OFFSET
    Plain,
    /// CONFIRM: the VMM puts the offsets into its hypervisor, and confirms them
    Confirm,
    /// CONFIRM and ONE_OFFSET
    OneOffset,
}

impl Args {
    fn limits(&self, kind: Kind) -> Limits {
        let base = match (kind, self.large) {
            (Kind::Plain, false) => Limits::DEFAULT,
            (Kind::Plain, true) => Limits::LARGE,
            (_, false) => Limits::CONFIRM,
            (_, true) => Limits::LARGE_CONFIRM,
        };
        Limits {
            one_offset: kind == Kind::OneOffset,
            confirm: base.confirm,
            vcpus: self.vcpus.unwrap_or(base.vcpus),
            vmm_threads: self.vmm_threads.unwrap_or(base.vmm_threads),
            ticks: self.ticks.unwrap_or(base.ticks),
            begins: self.begins.unwrap_or(base.begins),
            aborts: self.aborts.unwrap_or(base.aborts),
            pauses: self.pauses.unwrap_or(base.pauses),
            offsets: self.offsets.unwrap_or(base.offsets),
            counts: self.counts.unwrap_or(base.counts),
            timers: self.timers.unwrap_or(base.timers),
            disconnects: self.disconnects.unwrap_or(base.disconnects),
            restarts: self.restarts.unwrap_or(base.restarts),
            disturbances: self.disturbances.unwrap_or(base.disturbances),
        }
        .clamped()
    }

    fn effort(&self) -> Effort {
        let cpus = available_parallelism().map_or(1, usize::from);
        Effort {
            threads: self.threads.map_or(cpus, usize::from),
            max_states: self.max_states,
            max_depth: self.depth,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let effort = args.effort();
    let kinds = Kind::value_variants().iter().copied();
    let ok = kinds
        .filter(|kind| args.vm.is_none_or(|only| only == *kind))
        .all(|kind| explore(args.limits(kind), effort));
    match ok {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Explores a VM of one kind. Returns whether everything holds.
fn explore(limits: Limits, effort: Effort) -> bool {
    println!("model: {limits}; threads={}", effort.threads);
    let explore = |effort| {
        let device = Vm::new(device::profile(limits.vcpus));
        check(limits, device, effort, |data| {
            println!(
                "model: {:>4} s  states={} unique={} depth={}",
                data.duration.as_secs(),
                data.total_states,
                data.unique_states,
                data.max_depth
            );
        })
    };
    let mut verdict = explore(effort);
    if !verdict.failures.is_empty() && effort.threads > 1 {
        println!("model: a property fails; searching for the shortest path to it");
        verdict = explore(Effort {
            threads: 1,
            ..effort
        });
    }
    report(&limits, &verdict);
    verdict.ok()
}

fn report(limits: &Limits, verdict: &Verdict) {
    let figures = format!(
        "states={} unique={} depth={} vcpus={} seconds={:.1}",
        verdict.states,
        verdict.unique,
        verdict.depth,
        limits.vcpus,
        verdict.took.as_secs_f64()
    );
    let mut printed: Option<&[String]> = None;
    for failure in &verdict.failures {
        println!("\n{} -- violated:", failure.property);
        if printed.replace(&failure.trace) == Some(&failure.trace) {
            println!("    by the same steps");
        } else {
            failure.trace.iter().for_each(|line| println!("{line}"));
        }
    }
    for name in &verdict.never {
        println!("model: never reached: {name}");
    }
    if let Some(failure) = verdict.failures.first() {
        println!("model: FAILED property=\"{}\" {figures}", failure.property);
    } else if !verdict.exhaustive {
        println!("model: OK as far as it went, not exhaustive; {figures}");
    } else if verdict.ok() {
        println!("model: OK {figures}");
    } else {
        println!(
            "model: FAILED, because a case that must be possible was never reached; {figures}"
        );
    }
}
