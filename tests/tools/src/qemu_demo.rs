//! Shows a real guest's clocks, and its migration: `make demo-qemu`.

use std::io::Write;
use std::time::{Duration, Instant};

use vhost_user_timer_kit::qemu::{
    ClockVm, Environment, Error, HostClock, Seen, Shape, TimerVm, Transport,
};

/// Number of readings that are compared with the host's.
const READINGS: usize = 1000;

/// The time of day in UTC, from ns since 1970.
fn time_of_day(ns: i128) -> String {
    let (seconds, ns) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let day = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (day / 3600, day / 60 % 60, day % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{ns:09}")
}

/// Shows the clocks, and then the migration.
///
/// # Errors
///
/// A text that says what is not as it should be.
pub fn show(environment: &Environment) -> Result<(), String> {
    clocks(environment)?;
    migration(environment)
}

fn step(text: &str) {
    println!("{text}");
    let _ = std::io::stdout().flush();
}

/// Boots a guest, and shows its clocks, readings beside the host's, and an alarm.
fn clocks(environment: &Environment) -> Result<(), String> {
    step("Starting the backend, and a Linux guest under QEMU with -device vhost-user-rtc-pci …");
    let began = Instant::now();
    let mut vm = ClockVm::boot(environment, Transport::Pci, &["--rtc-clock=smeared"]);
    step(&format!(
        "The guest is up after {:.1} s; its kernel found these clocks:",
        began.elapsed().as_secs_f64()
    ));
    let ask = |vm: &mut ClockVm, command: &str| {
        let answer = vm.guest.run(command);
        answer.map_err(|error| error.to_string())
    };
    for line in ask(&mut vm, "guest clocks")?.lines() {
        step(&format!("  {line}"));
    }

    let brackets = vm.guest.exchange("ptp0", HostClock::Realtime, READINGS);
    let brackets = brackets.map_err(|error| error.to_string())?;
    step("\nIts wall clock, between two readings of the host's clock:");
    step("  host before          guest                host after");
    for bracket in brackets.iter().take(3) {
        let times = [bracket.before, bracket.reading, bracket.after].map(time_of_day);
        step(&format!("  {}", times.join("   ")));
    }
    let outside = brackets.iter().filter(|bracket| !bracket.holds()).count();
    let backwards = brackets
        .windows(2)
        .filter(|pair| pair[0].reading > pair[1].reading);
    let backwards = backwards.count();
    step(&format!(
        "  of {READINGS} readings: {outside} outside the host's two, {backwards} went backwards"
    ));

    let rtc = vm.rtc();
    step(&format!("\nAn alarm on the guest's {rtc}, 2 s ahead:"));
    let alarm = ask(&mut vm, &format!("guest alarm {rtc} 2"))?;
    for line in alarm.lines() {
        step(&format!("  {line}"));
    }
    println!();
    if outside + backwards != 0 || !alarm.contains("data=0x1a0") {
        return Err(format!("outside={outside} backwards={backwards}"));
    }
    Ok(())
}

/// A number of a witness's report, of all vCPUs together.
fn total(seen: &[Seen], number: fn(&Seen) -> u64) -> u64 {
    seen.iter().map(number).sum()
}

/// Boots a guest whose vCPUs' timers the backend keeps, moves it to another QEMU with another
/// backend, and shows what the guest's counter and timers did meanwhile.
fn migration(environment: &Environment) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    step(
        "Starting another backend, and a guest with 4 vCPUs under QEMU with -device \
         vhost-user-timer …",
    );
    let mut vm = TimerVm::boot(environment, &Shape::default());
    let frequency = vm.number("frequency");
    // Of the VM's time, in ms and µs.
    let time = |count: u64| {
        let micros = u128::from(count) * 1_000_000 / u128::from(frequency.max(1));
        format!("{:>7}.{:03} ms", micros / 1000, micros % 1000)
    };
    step(&format!(
        "The guest is up. Its counter has {frequency} ticks a second. On each vCPU one program reads \
         it without\nend and compares each reading with all earlier ones, on every vCPU; another \
         one sleeps, 10 ms at a time."
    ));
    vm.guest.start_witness(0).map_err(text)?;
    step("\nThe guest moves to another QEMU with another backend …");
    let began = Instant::now();
    let mut source = vm.migrate();
    let took = began.elapsed();
    let after = vm.guest.witness().map_err(text)?;
    let stood = source.guest.qmp().downtime().map_err(text)?;

    let (paused, confirmed) = (source.number("paused-count"), vm.number("confirmed-count"));
    let gaps = vm.guest.gaps_around(paused, confirmed).map_err(text)?;
    step(&format!(
        "It took {:.1} s, in the last {} ms of which the guest stood still. What the guest saw, by its \
         own counter:",
        took.as_secs_f64(),
        stood.as_millis()
    ));
    for (vcpu, gap) in gaps.iter().enumerate() {
        let [last, _] = gap.ok_or_else(|| format!("vCPU {vcpu} has read its counter too early"))?;
        step(&format!(
            "  {}  the last reading on vCPU {vcpu} in the first QEMU",
            time(last)
        ));
    }
    step(&format!(
        "  {}  the first QEMU stopped the VM's time",
        time(paused)
    ));
    step(&format!(
        "  {}  the second QEMU had all 4 vCPUs' timers and the offset in place: only now a vCPU may run",
        time(confirmed)
    ));
    for (vcpu, gap) in gaps.iter().enumerate() {
        let [_, first] = gap.unwrap_or_default();
        step(&format!(
            "  {}  the first reading on vCPU {vcpu} in the second QEMU",
            time(first)
        ));
    }
    let wrong = total(&after, |seen| seen.below_own.max(seen.below_other));
    let early = total(&after, |seen| seen.early);
    let latest = after.iter().map(|seen| seen.latest_ns).max();
    step(&format!(
        "Of {} readings on 4 vCPUs {wrong} were below an earlier one. Of {} sleeps {early} ended early; the \
         latest\nended {:.1} ms late, on vCPUs that never rest.",
        total(&after, |seen| seen.readings),
        total(&after, |seen| seen.wakes),
        Duration::from_nanos(latest.unwrap_or_default()).as_secs_f64() * 1000.0
    ));
    println!();
    match wrong + early {
        0 => Ok(()),
        _ => Err(format!("below={wrong} early={early}")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_of_day_is_in_utc() {
        assert_eq!(super::time_of_day(0), "00:00:00.000000000");
        let ns = 86_400_000_000_000 + 3_723_000_000_042;
        assert_eq!(super::time_of_day(ns), "01:02:03.000000042");
    }
}
