//! What runs in the guest of the end-to-end tests: it asks the kernel for its clocks, or watches
//! the counter of all vCPUs in the background. It prints the answers as lines of `key=value`, or
//! fails with one line on stderr and exit status 1.
//!
//! `precise` tells a failed system call as an answer, `error=EINVAL`: tests are about just that.

mod counter;
mod ptp;
mod rtc;
mod witness;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;

const USAGE: &str = "\
usage: guest COMMAND
  clocks                      the clocks: a line for each PTP clock and each RTC, with its name
  read PTP                    one reading, in ns
  exchange PTP                a reading for each line of input, until a line `q`
  offset PTP N                N samples of PTP_SYS_OFFSET_EXTENDED, in ns
  precise PTP                 PTP_SYS_OFFSET_PRECISE, in ns
  precise-many PTP N          N of them: how many succeed, how many fail and how, and how far apart
                              this clock and CLOCK_MONOTONIC_RAW are: the median, and the typical and
                              the worst distance from it, in ns
  time RTC                    the time of an RTC, in s
  alarm RTC SECONDS [LIMIT]   set an alarm that far ahead and wait for it, LIMIT seconds at most
  alarm-wait RTC LIMIT        wait for one that is set
  alarm-set RTC SECONDS       set one, and do not wait
  alarm-read RTC              the alarm that is set
  alarm-cancel RTC            none any more
  witness start [MIB]         watch the counter and the timers of all vCPUs in the background, and
                              write to MIB MiB of memory all the time
  witness report              what has been seen since then
  witness around FROM TO      for each vCPU the gap in its readings around these two counts
  witness stop                end it
PTP is ptp0 and so on, RTC is rtc0 and so on.";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How much later than its time an alarm may come, unless the caller says a limit.
const GRACE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest {}: {error}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<()> {
    match *args {
        ["clocks"] => clocks(),
        ["read", ptp] => {
            println!("{}", ptp::Clock::open(ptp)?.read()?);
            Ok(())
        }
        ["exchange", ptp] => {
            ptp::Clock::open(ptp)?.exchange(&mut io::stdin().lock(), &mut io::stdout().lock())
        }
        ["offset", ptp, samples] => {
            for [before, device, after] in ptp::Clock::open(ptp)?.offset(number(samples)?)? {
                println!("before={before} device={device} after={after}");
            }
            Ok(())
        }
        ["precise", ptp] => {
            match ptp::Clock::open(ptp)?.precise() {
                Ok([device, realtime, monotonic_raw]) => {
                    println!("device={device} realtime={realtime} monotonic_raw={monotonic_raw}");
                }
                Err(error) => println!("error={}", name(error)),
            }
            Ok(())
        }
        ["precise-many", ptp, times] => precise_many(&ptp::Clock::open(ptp)?, number(times)?),
        ["time", rtc] => {
            println!("{}", rtc::Rtc::open(rtc)?.now()?);
            Ok(())
        }
        ["alarm", rtc, seconds] => {
            let ahead: u32 = number(seconds)?;
            alarm(rtc, ahead, Duration::from_secs(ahead.into()) + GRACE)
        }
        ["alarm", rtc, seconds, limit] => {
            alarm(rtc, number(seconds)?, Duration::from_secs(number(limit)?))
        }
        ["alarm-wait", rtc, limit] => {
            wait(&rtc::Rtc::open(rtc)?, Duration::from_secs(number(limit)?))
        }
        ["alarm-set", rtc, seconds] => {
            println!(
                "alarm={}",
                rtc::Rtc::open(rtc)?.set_alarm(number(seconds)?)?
            );
            Ok(())
        }
        ["alarm-read", rtc] => {
            let alarm = rtc::Rtc::open(rtc)?.alarm()?;
            println!(
                "alarm={} enabled={} pending={}",
                alarm.at, alarm.enabled, alarm.pending
            );
            Ok(())
        }
        ["alarm-cancel", rtc] => rtc::Rtc::open(rtc)?.cancel_alarm(),
        ["witness", "start"] => witness::start("0"),
        ["witness", "start", mebibytes] => witness::start(mebibytes),
        ["witness", "run", mebibytes] => witness::run(mebibytes),
        ["witness", ref question @ ..] => witness::ask(&question.join(" ")),
        _ => Err(USAGE.into()),
    }
}

/// The number that a word is.
fn number<T: FromStr<Err: Error + 'static>>(word: &str) -> Result<T> {
    word.parse()
        .map_err(|error| format!("{word}: {error}").into())
}

/// The C name of an error, where it is one that a clock's driver gives.
fn name(error: Errno) -> String {
    let name = match error {
        Errno::AGAIN => "EAGAIN",
        Errno::BUSY => "EBUSY",
        Errno::INVAL => "EINVAL",
        Errno::IO => "EIO",
        Errno::NODEV => "ENODEV",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::OVERFLOW => "EOVERFLOW",
        Errno::TIMEDOUT => "ETIMEDOUT",
        _ => return error.raw_os_error().to_string(),
    };
    name.to_owned()
}

fn alarm(name: &str, ahead: u32, limit: Duration) -> Result<()> {
    let rtc = rtc::Rtc::open(name)?;
    println!("alarm={}", rtc.set_alarm(ahead)?);
    wait(&rtc, limit)
}

fn wait(rtc: &rtc::Rtc, limit: Duration) -> Result<()> {
    let (waited, data) = rtc.wait(limit)?;
    println!(
        "now={} waited_ns={} data={data:#x}",
        rtc.now()?,
        waited.as_nanos()
    );
    Ok(())
}

/// Both clocks are made of the host's, at one rate, so their distance changes only by the error of
/// a pair.
fn precise_many(clock: &ptp::Clock, times: u32) -> Result<()> {
    let mut distances = Vec::new();
    let mut errors: BTreeMap<_, u32> = BTreeMap::new();
    for _ in 0..times {
        match clock.precise() {
            Ok([device, _, monotonic_raw]) => distances.push(device - monotonic_raw),
            Err(error) => *errors.entry(name(error)).or_default() += 1,
        }
    }
    print!("ok={}", distances.len());
    for (error, times) in errors {
        print!(" {error}={times}");
    }
    if let Some(median) = median(&mut distances) {
        let mut errors: Vec<_> = distances.iter().map(|d| (d - median).abs()).collect();
        let typical = self::median(&mut errors).unwrap_or_default();
        let worst = errors.last().copied().unwrap_or_default();
        print!(" median={median} typical={typical} worst={worst}");
    }
    println!();
    Ok(())
}

/// The value in the middle, once they are sorted.
fn median(values: &mut [i128]) -> Option<i128> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// The clocks by class, device and the name that its driver gave it.
fn clocks() -> Result<()> {
    for (class, attribute) in [("ptp", "clock_name"), ("rtc", "name")] {
        let directory = format!("/sys/class/{class}");
        let Ok(entries) = fs::read_dir(&directory) else {
            // No driver of that class is there.
            continue;
        };
        let mut devices = Vec::new();
        for entry in entries {
            devices.push(entry?.file_name().to_string_lossy().into_owned());
        }
        devices.sort();
        for device in devices {
            let path = format!("{directory}/{device}/{attribute}");
            let name = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
            println!("class={class} device={device} name={}", name.trim());
        }
    }
    Ok(())
}
