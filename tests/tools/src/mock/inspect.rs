//! `info` and `dump`: a running backend's VM, as a table or as JSON.
//!
//! Both only read. Their coming and going changes nothing in the VM.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use vhost_user_timer_frontend::{self as frontend, Info, Options, TimerFrontend};
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::wire::{self, ctl};

use super::error::Error;
use super::report::{grouped, hex, print_line};

/// Which backend to ask.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Target {
    /// The backend's socket
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// How long to wait for the backend, which serves one frontend at a time
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    timeout: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    if seconds > 0.0 && seconds <= 3600.0 {
        Ok(seconds)
    } else {
        Err("it must be more than 0 and at most 3600".to_owned())
    }
}

/// `info`.
pub(super) fn info(target: &Target) -> Result<(), Error> {
    let (frontend, timeout) = target.connect()?;
    let info = frontend.queues()[0]
        .info(timeout)
        .map_err(|source| inspect("ask for the VM's state", source))?;
    target.print(&Summary::from(&info), Summary::text);
    Ok(())
}

/// `dump`.
pub(super) fn dump(target: &Target) -> Result<(), Error> {
    let (frontend, timeout) = target.connect()?;
    let queue = &frontend.queues()[0];
    let info = queue
        .info(timeout)
        .map_err(|source| inspect("ask for the VM's state", source))?;
    if info.phase == Phase::New {
        return Err(Error::NotConfigured);
    }
    let vm = queue
        .get_vm(0, info.vcpus, timeout)
        .map_err(|source| inspect("read the VM's registers", source))?;
    let dump = Dump {
        vm: Summary::from(&info),
        virt_count: vm.virt_count,
        phys_count: vm.phys_count,
        vcpu: vm.vcpus.iter().map(Registers::from).collect(),
    };
    target.print(&dump, Dump::text);
    Ok(())
}

fn inspect(what: &'static str, source: frontend::Error) -> Error {
    Error::Inspect { what, source }
}

impl Target {
    fn connect(&self) -> Result<(TimerFrontend, Duration), Error> {
        let timeout = Duration::from_secs_f64(self.timeout);
        let options = Options::default()
            .request_queues(1)
            .queue_size(4)
            .event_buffers(2)
            .timeout(timeout);
        match TimerFrontend::connect(&self.socket_path, options) {
            Ok(frontend) => Ok((frontend, timeout)),
            // The connection is made, and waits for the backend to accept it.
            Err(frontend::Error::TimedOut { .. }) => Err(Error::Busy(self.socket_path.clone())),
            Err(source) => Err(inspect("reach the backend", source)),
        }
    }

    fn print<T: Serialize>(&self, answer: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            let json = serde_json::to_string_pretty(answer);
            print_line(json.expect("plain data serialises"));
        } else {
            print_line(text(answer));
        }
    }
}

#[derive(Serialize)]
struct Summary {
    phase: String,
    epoch: u64,
    vcpus: u32,
    max_vcpus: u32,
    restored: u32,
    request_queues: u16,
    abi: String,
    frequency: u64,
    #[serde(serialize_with = "hex")]
    cntvoff: u64,
    #[serde(serialize_with = "hex")]
    cntpoff: u64,
    #[serde(serialize_with = "hex")]
    host_count: u64,
    offset_pinned: bool,
    anchored: bool,
    phys_virtualised: bool,
}

impl From<&Info> for Summary {
    fn from(info: &Info) -> Self {
        Summary {
            phase: info.phase.to_string(),
            epoch: info.epoch,
            vcpus: info.vcpus,
            max_vcpus: info.max_vcpus,
            restored: info.restored,
            request_queues: info.request_queues,
            abi: info.abi.to_string(),
            frequency: info.frequency,
            cntvoff: info.cntvoff,
            cntpoff: info.cntpoff,
            host_count: info.host_count,
            offset_pinned: info.offset_pinned,
            anchored: info.anchored,
            phys_virtualised: info.phys_virtualised,
        }
    }
}

impl Summary {
    fn text(&self) -> String {
        let flags: Vec<_> = [
            (self.offset_pinned, "offset pinned"),
            (self.anchored, "host counter anchored"),
            (self.phys_virtualised, "physical count virtualised"),
        ]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
        let vcpus = format!("{} of at most {}", self.vcpus, self.max_vcpus);
        let flags = if flags.is_empty() {
            "none".to_owned()
        } else {
            flags.join(", ")
        };
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String| lines.push(format!("{name:<15} {value}"));
        line("phase", self.phase.clone());
        line("epoch", self.epoch.to_string());
        line("vCPUs", vcpus);
        line("restored", self.restored.to_string());
        line("request queues", self.request_queues.to_string());
        line("ABI", self.abi.clone());
        line("frequency", format!("{} Hz", grouped(self.frequency)));
        line("cntvoff", format!("{:#x}", self.cntvoff));
        line("cntpoff", format!("{:#x}", self.cntpoff));
        line("host count", grouped(self.host_count));
        line("flags", flags);
        lines.join("\n")
    }
}

#[derive(Serialize)]
struct Dump {
    vm: Summary,
    #[serde(serialize_with = "hex")]
    virt_count: u64,
    #[serde(serialize_with = "hex")]
    phys_count: u64,
    vcpu: Vec<Registers>,
}

#[derive(Serialize)]
struct Registers {
    vcpu: u32,
    r#virtual: Timer,
    physical: Timer,
}

#[derive(Serialize)]
struct Timer {
    #[serde(serialize_with = "hex")]
    ctl: u64,
    #[serde(serialize_with = "hex")]
    cnt: u64,
    #[serde(serialize_with = "hex")]
    cval: u64,
}

impl From<&wire::Vcpu> for Registers {
    fn from(vcpu: &wire::Vcpu) -> Self {
        Registers {
            vcpu: vcpu.vcpu.get(),
            r#virtual: Timer {
                ctl: vcpu.ctl.get(),
                cnt: vcpu.cnt.get(),
                cval: vcpu.cval.get(),
            },
            physical: Timer {
                ctl: vcpu.pctl.get(),
                cnt: vcpu.pcnt.get(),
                cval: vcpu.pcval.get(),
            },
        }
    }
}

impl Dump {
    fn text(&self) -> String {
        let mut text = self.vm.text();
        let counts = [
            ("virtual count", self.virt_count),
            ("physical count", self.phys_count),
        ];
        for (name, count) in counts {
            let _ = write!(text, "\n{name:<15} {}", grouped(count));
        }
        let _ = write!(
            text,
            "\n\n  vCPU  virtual timer               CVAL  physical timer              CVAL"
        );
        for Registers {
            vcpu,
            r#virtual,
            physical,
        } in &self.vcpu
        {
            let _ = write!(
                text,
                "\n{vcpu:>6}  {:<13}  {:>16x}  {:<14}  {:>16x}",
                r#virtual.state(),
                r#virtual.cval,
                physical.state(),
                physical.cval,
            );
        }
        text
    }
}

impl Timer {
    fn state(&self) -> &'static str {
        let has = |bit| self.ctl & bit != 0;
        match (has(ctl::ENABLE), has(ctl::IMASK), has(ctl::ISTATUS)) {
            (false, _, _) => "off",
            (true, false, false) => "armed",
            (true, false, true) => "asserted",
            (true, true, false) => "masked",
            (true, true, true) => "masked, due",
        }
    }
}
