//! A VM as text for a person and as JSON for a program.

use std::fmt::Write as _;

use serde::{Serialize, Serializer};
use vhost_user_timer_frontend::{Info, Phase, Register, SavedVcpu, Vm};
use vhost_user_timer_protocol::wire::ctl;

/// What `info` shows.
#[derive(Serialize)]
pub(crate) struct Summary {
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
    confirm: bool,
    one_offset: bool,
    counter_source: String,
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
            confirm: info.confirm,
            one_offset: info.one_offset,
            counter_source: info.source.to_string(),
        }
    }
}

impl Summary {
    /// The phase, and what ends it where nothing else shows that.
    fn phase_text(&self) -> String {
        if self.phase == Phase::Armed.to_string() {
            format!("{}: waits for the VMM's CONFIRM_RUN", self.phase)
        } else {
            self.phase.clone()
        }
    }

    pub(crate) fn text(&self) -> String {
        let flags: Vec<_> = [
            (self.offset_pinned, "offset pinned"),
            (self.anchored, "host counter anchored"),
            (self.phys_virtualised, "physical count virtualised"),
            (self.confirm, "confirm"),
            (self.one_offset, "one offset"),
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
        line("phase", self.phase_text());
        line("epoch", self.epoch.to_string());
        line("vCPUs", vcpus);
        line("restored", self.restored.to_string());
        line("request queues", self.request_queues.to_string());
        line("ABI", self.abi.clone());
        line("frequency", format!("{} Hz", grouped(self.frequency)));
        line("cntvoff", format!("{:#x}", self.cntvoff));
        line("cntpoff", format!("{:#x}", self.cntpoff));
        line("host counter", self.counter_source.clone());
        line("host count", grouped(self.host_count));
        line("flags", flags);
        lines.join("\n")
    }
}

/// What `dump` shows.
#[derive(Serialize)]
pub(crate) struct Dump {
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

impl From<&SavedVcpu> for Registers {
    fn from(vcpu: &SavedVcpu) -> Self {
        // GET_VM gives all six.
        let value = |register| vcpu.get(register).unwrap_or(0);
        Registers {
            vcpu: vcpu.index(),
            r#virtual: Timer {
                ctl: value(Register::TimerCtl),
                cnt: value(Register::TimerCnt),
                cval: value(Register::TimerCval),
            },
            physical: Timer {
                ctl: value(Register::PtimerCtl),
                cnt: value(Register::PtimerCnt),
                cval: value(Register::PtimerCval),
            },
        }
    }
}

impl Dump {
    pub(crate) fn new(info: &Info, vm: &Vm) -> Self {
        Dump {
            vm: Summary::from(info),
            virt_count: vm.virt_count,
            phys_count: vm.phys_count,
            vcpu: vm.vcpus.iter().map(Registers::from).collect(),
        }
    }

    pub(crate) fn text(&self) -> String {
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

/// Thousands separated: 4,298,104,435.
fn grouped(number: u64) -> String {
    match number {
        0..1000 => number.to_string(),
        _ => format!("{},{:03}", grouped(number / 1000), number % 1000),
    }
}

/// Values that use all 64 bits, which not every JSON reader keeps as numbers.
fn hex<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:#x}"))
}
