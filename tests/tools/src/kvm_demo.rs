//! Shows the last metre on a real KVM: `make demo-kvm`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use vhost_user_timer_kit::qemu::{Environment, Kernel, KvmHost};
use vhost_user_timer_kit::rounds::{self, Round, Vcpu};

/// Restores of each kind.
const ROUNDS: usize = 10;

/// The longest that they may take.
const LIMIT: Duration = Duration::from_secs(300);

/// A way to restore a VM.
struct Way {
    /// `--gate` of the VMM.
    gate: &'static str,
    name: &'static str,
    what: &'static str,
    /// Whether the guest must find nothing.
    is_right: bool,
}

const WAYS: [Way; 3] = [
    Way {
        gate: "none",
        name: "the kernel alone",
        what: "Each vCPU's thread gives KVM the vCPU's registers, its count among them, and runs it. KVM\n\
               keeps one offset for the VM, and each count that is written moves it, also under the\n\
               vCPUs that run already.",
        is_right: false,
    },
    Way {
        gate: "only",
        name: "a gate, then the offset",
        what: "No vCPU runs before the registers of all are back. Then all are released, and one thread\n\
               puts the offset into KVM. KVM refuses it while any vCPU runs.",
        is_right: false,
    },
    Way {
        gate: "confirm",
        name: "the gate opens last",
        what: "When the registers of all are back, one thread puts the offset into KVM and confirms that to\n\
               the backend. Only then are the vCPUs released.",
        is_right: true,
    },
];

/// Boots the machine, restores the VM in each way, and shows what its guest saw.
///
/// # Errors
///
/// A text that says what is not as it should be.
pub fn show(programs: &Path) -> Result<(), String> {
    let step = |text: &str| {
        println!("{text}");
        let _ = std::io::stdout().flush();
    };
    let environment = Environment::find().map_err(|error| error.to_string())?;
    step("Booting Linux for AArch64, emulated, with a real KVM in it …");
    let booted = KvmHost::boot(&environment, Kernel::Newest, programs);
    let mut host = booted.map_err(|error| error.to_string())?;
    let frequency = frequency(&mut host)?;
    step(&format!(
        "\nA VM of 4 vCPUs moves from process to process, {ROUNDS} times in each of three ways. On every \
         vCPU\nits guest reads the counter without end. No reading may be below one that was made \
         before it,\non whichever vCPU. One vCPU's thread is always late: which one differs."
    ));
    let mut table = Vec::new();
    let mut wrong = Vec::new();
    for (number, way) in (1..).zip(&WAYS) {
        step(&format!(
            "\n{number}. {}\n\n{}\n",
            capitalized(way.name),
            way.what
        ));
        let rounds = restores(&mut host, way)?;
        step(&one(worst(&rounds), frequency));
        table.push(row(way, &rounds, frequency));
        let bad = rounds.iter().filter(|round| is_bad(round)).count();
        if (bad == 0) != way.is_right {
            wrong.push(format!(
                "{}: {bad} of {ROUNDS} restores were wrong",
                way.name
            ));
        }
    }
    step(&format!("\n{:26} {}", "", HEADINGS));
    table.iter().for_each(|row| step(row));
    println!();
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(wrong.join("; ")),
    }
}

const HEADINGS: &str = "restores   time went back     by up to   offset never in KVM";

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars).collect()
}

fn run(host: &mut KvmHost, command: &str) -> Result<String, String> {
    let output = host
        .run(LIMIT, command)
        .map_err(|error| error.to_string())?;
    match output.status {
        0 => Ok(output.text),
        status => Err(format!("`{command}` ended with {status}: {}", output.text)),
    }
}

/// Of the counter, Hz.
fn frequency(host: &mut KvmHost) -> Result<u64, String> {
    let text = run(host, "kvm-agent kvm")?;
    let kvm: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    kvm["frequency"]
        .as_u64()
        .ok_or_else(|| format!("no frequency in {text}"))
}

fn restores(host: &mut KvmHost, way: &Way) -> Result<Vec<Round>, String> {
    let text = run(
        host,
        &format!(
            "vhost-user-timer-vmm moves --gate {} --vcpus 4 --rounds {ROUNDS} --seed 1",
            way.gate
        ),
    )?;
    let mut rounds = rounds::parse(&text)?;
    rounds.retain(|round| round.how == "restore");
    match rounds.len() {
        ROUNDS => Ok(rounds),
        others => Err(format!("{others} restores instead of {ROUNDS}: {text}")),
    }
}

fn is_bad(round: &Round) -> bool {
    round.decreases() > 0 || round.is_elsewhere()
}

/// The round in which time went back the furthest.
fn worst(rounds: &[Round]) -> &Round {
    let worst = rounds.iter().max_by_key(|round| round.worst());
    worst.expect("there are rounds")
}

/// A duration of so many ticks.
fn time(ticks: u64, frequency: u64) -> String {
    let micros = u128::from(ticks) * 1_000_000 / u128::from(frequency.max(1));
    match micros {
        0 => "0".to_owned(),
        1..1_000 => format!("{micros} µs"),
        1_000_000.. => format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10),
        _ => format!("{}.{} ms", micros / 1000, micros / 100 % 10),
    }
}

/// One restore, vCPU by vCPU.
fn one(round: &Round, frequency: u64) -> String {
    let entered = round.vcpus.iter().map(|vcpu| vcpu.entered_at);
    let began = entered.chain(round.confirmed_at).min().unwrap_or(0);
    let mut text = String::new();
    let mut line = |at: Option<u64>, event: &str| {
        let at = at.map_or("?".to_owned(), |at| {
            time(at.saturating_sub(began), frequency)
        });
        let _ = writeln!(text, "   {at:>9}   {event}");
    };
    let mut vcpus: Vec<&Vcpu> = round.vcpus.iter().collect();
    vcpus.sort_by_key(|vcpu| vcpu.entered_at);
    if let Some(confirmed) = round.confirmed_at.filter(|_| round.applies > 0) {
        line(
            Some(confirmed),
            "the offset is in KVM, and that is confirmed",
        );
    }
    for vcpu in vcpus {
        let is_late = if round.order.last() == Some(&vcpu.vcpu) {
            ", the late one,"
        } else {
            ""
        };
        line(
            Some(vcpu.entered_at),
            &format!(
                "vCPU {}{is_late} runs; {}",
                vcpu.vcpu,
                seen(vcpu, frequency)
            ),
        );
    }
    if round.is_elsewhere() {
        line(None, "the offset never came into KVM");
    }
    text.pop();
    text
}

/// What a vCPU's guest saw of the counter.
fn seen(vcpu: &Vcpu, frequency: u64) -> String {
    let below = vcpu.decreases();
    match below {
        0 => format!("all of its {} readings are in order", vcpu.readings),
        _ => format!(
            "{below} of its {} readings are below an earlier one, by up to {}",
            vcpu.readings,
            time(vcpu.worst, frequency)
        ),
    }
}

fn row(way: &Way, rounds: &[Round], frequency: u64) -> String {
    let back = rounds.iter().filter(|round| round.decreases() > 0).count();
    let never = rounds.iter().filter(|round| round.is_elsewhere()).count();
    let furthest = time(worst(rounds).worst(), frequency);
    format!(
        "{:26} {:>8}   {back:>14}   {furthest:>10}   {never:>19}",
        way.name,
        rounds.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_shown_in_the_unit_that_fits() {
        assert_eq!(time(0, 1_000_000_000), "0");
        assert_eq!(time(12_000, 1_000_000_000), "12 µs");
        assert_eq!(time(47_250_000, 1_000_000_000), "47.2 ms");
        assert_eq!(time(86_400_070_500_000, 1_000_000_000), "86400.0 s");
        assert_eq!(time(62_500, 62_500_000), "1.0 ms");
    }
}
