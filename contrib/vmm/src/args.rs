//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::guest::MAX_VCPUS;

/// A small VMM on KVM/arm64 whose guest observes its own time.
#[derive(Parser)]
#[command(name = "vhost-user-timer-vmm", version)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Boot the guest, let it run, pause it, and save the VM.
    Boot {
        #[command(flatten)]
        options: Options,
        /// The file to save the VM to.
        #[arg(long, value_name = "FILE")]
        save: PathBuf,
    },
    /// Restore the VM from a file, let it run, and save it again.
    Restore {
        #[command(flatten)]
        options: Options,
        /// The file to restore the VM from.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// The file to save the VM to; without it the VM is not saved.
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
        /// The number of the round, for the output and the random order.
        #[arg(long, value_name = "N", default_value_t = 1)]
        round: u32,
    },
    /// Boot the guest, then restore it once a round, each time in a new process with a new backend.
    Moves {
        #[command(flatten)]
        options: Options,
        /// How many times to restore.
        #[arg(long, value_name = "N", default_value_t = 20)]
        rounds: u32,
        /// Kill the backend, or die, in each Nth round only.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        every: u32,
    },
    /// Boot the guest, then pause and resume it once a round, in one process.
    Pauses {
        #[command(flatten)]
        options: Options,
        /// How many times to pause and resume.
        #[arg(long, value_name = "N", default_value_t = 20)]
        rounds: u32,
        /// Stop the VM only, not its time: the guest finds that time has passed.
        #[arg(long)]
        keep_counting: bool,
    },
    /// Turn a vCPU off and on, with a pause and a restore while it is off, and reset the guest.
    Lifecycle {
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Start this backend for the VM.
    #[arg(long, value_name = "PROGRAM", default_value = "vhost-user-timer")]
    pub(crate) backend: PathBuf,
    /// Connect to a backend that listens at this path instead.
    #[arg(long, value_name = "PATH")]
    pub(crate) timer_socket: Option<PathBuf>,
    /// Number of vCPUs of a VM that is booted.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS as i64))]
    pub(crate) vcpus: u32,
    /// Decides the order of the vCPU threads, and which one is late.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// A round ends when each vCPU has taken so many more timer interrupts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) interrupts: u64,
    /// Who decides when a vCPU runs.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Gate::Confirm)]
    pub(crate) gate: Gate,
    /// Kill the backend by SIGKILL at this point of each restore.
    #[arg(long, value_name = "WHEN", value_enum)]
    pub(crate) kill_backend: Option<KillBackend>,
    /// Kill this process by SIGKILL at this point of each restore.
    #[arg(long, value_name = "WHEN", value_enum, conflicts_with = "kill_backend")]
    pub(crate) die: Option<Die>,
}

/// Who decides when a restored vCPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Gate {
    /// Nobody runs before the offset is in KVM.
    Confirm,
    /// Everybody runs when the offset is decided; then one thread puts it into KVM.
    Only,
    /// Each thread sets its own registers and runs. There is no backend.
    None,
    /// For Linux before 6.4: nobody runs before the counts are in KVM, which takes no offset.
    BestEffort,
}

impl Gate {
    /// Whether the guest's time is right.
    pub(crate) fn is_sound(self) -> bool {
        matches!(self, Gate::Confirm | Gate::BestEffort)
    }
}

/// When the backend is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KillBackend {
    /// When half of the vCPUs are back.
    Restoring,
    /// When the offset is in KVM and not confirmed yet.
    Armed,
}

/// When this process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Die {
    /// When half of the vCPUs are back.
    Restoring,
    /// When the offset is in KVM and not confirmed yet.
    Armed,
    /// When each vCPU has read the counter.
    Running,
}

/// The name of a value on the command line.
pub(crate) fn name(value: impl ValueEnum) -> String {
    let name = value
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    name.unwrap_or_default()
}
