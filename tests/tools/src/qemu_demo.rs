//! Shows a real guest's clocks: `make demo-qemu`.

use std::io::Write;
use std::time::Instant;

use vhost_user_timer_kit::qemu::{ClockVm, Environment, HostClock, Transport};

/// Number of readings that are compared with the host's.
const READINGS: usize = 1000;

/// The time of day in UTC, from ns since 1970.
fn time_of_day(ns: i128) -> String {
    let (seconds, ns) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let day = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (day / 3600, day / 60 % 60, day % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{ns:09}")
}

/// Boots the guest, and shows its clocks, readings beside the host's, and an alarm.
///
/// # Errors
///
/// A text that says what is not as it should be.
pub fn show(environment: &Environment) -> Result<(), String> {
    let step = |text: &str| {
        println!("{text}");
        let _ = std::io::stdout().flush();
    };
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

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_of_day_is_in_utc() {
        assert_eq!(super::time_of_day(0), "00:00:00.000000000");
        let ns = 86_400_000_000_000 + 3_723_000_000_042;
        assert_eq!(super::time_of_day(ns), "01:02:03.000000042");
    }
}
