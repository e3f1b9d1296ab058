//! See `model-check --help`.

use std::process::ExitCode;
use std::thread::available_parallelism;

use clap::Parser;
use vhost_user_timer_model::vm::Vm;
use vhost_user_timer_tools::model::device;
use vhost_user_timer_tools::model::limits::Limits;
use vhost_user_timer_tools::model::run::{Effort, Verdict, check};

/// Checks the backend's model of a VM's time in every interleaving of a VMM and its vCPUs
///
/// What can happen is limited in number, by the options below; all that can happen within
/// these limits, in any order, is tried.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Start from larger limits than these defaults: three steps of the host counter. It takes some
    /// minutes and 5 GiB of memory; one more of anything takes several times that
    #[arg(long)]
    large: bool,

    /// vCPUs [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    vcpus: Option<u32>,

    /// Threads of the VMM that bring registers for vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4))]
    vmm_threads: Option<u32>,

    /// Steps of the host counter [default: 2]
    #[arg(long, value_name = "N")]
    ticks: Option<u8>,

    /// How often something out of the ordinary happens: all of the kinds below together
    /// [default: 3]
    #[arg(long, value_name = "N")]
    disturbances: Option<u8>,

    /// RESTORE_BEGINs [default for this and the following: as many disturbances as there are]
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

    /// Connections and queues that end
    #[arg(long, value_name = "N")]
    disconnects: Option<u8>,

    /// Backends that are killed
    #[arg(long, value_name = "N")]
    restarts: Option<u8>,

    /// Stop after about this many states
    #[arg(long, value_name = "N")]
    max_states: Option<usize>,

    /// Go no further than this many steps
    #[arg(long, value_name = "N")]
    depth: Option<usize>,

    /// Checker threads [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

impl Args {
    fn limits(&self) -> Limits {
        let base = if self.large {
            Limits::LARGE
        } else {
            Limits::DEFAULT
        };
        Limits {
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
    let (limits, effort) = (args.limits(), args.effort());
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
        println!("model: something fails; looking for the shortest way there");
        verdict = explore(Effort {
            threads: 1,
            ..effort
        });
    }
    report(&limits, &verdict)
}

fn report(limits: &Limits, verdict: &Verdict) -> ExitCode {
    let figures = format!(
        "states={} unique={} depth={} vcpus={} seconds={:.1}",
        verdict.states,
        verdict.unique,
        verdict.depth,
        limits.vcpus,
        verdict.took.as_secs_f64()
    );
    let mut told: Option<&[String]> = None;
    for failure in &verdict.failures {
        println!("\n{} -- not so:", failure.property);
        if told.replace(&failure.trace) == Some(&failure.trace) {
            println!("    by the same steps");
        } else {
            failure.trace.iter().for_each(|line| println!("{line}"));
        }
    }
    for name in &verdict.never {
        println!("model: never met: {name}");
    }
    if let Some(failure) = verdict.failures.first() {
        println!("model: FAILED property=\"{}\" {figures}", failure.property);
    } else if !verdict.exhaustive {
        println!("model: OK as far as it went, which is not everything; {figures}");
    } else if verdict.ok() {
        println!("model: OK {figures}");
    } else {
        println!("model: FAILED, since what must be possible was never met; {figures}");
    }
    if verdict.ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
