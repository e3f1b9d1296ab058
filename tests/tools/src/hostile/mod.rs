//! Hostile campaigns: random attacks on a backend, each with an oracle.
//!
//! All campaigns attack one process, round by round. A round has a seed of its own, made from the
//! run's seed, the campaign and the round's number, so that it can be repeated alone. After each
//! round the [`Victim`] must be unharmed: it lives, serves a correct frontend of either socket,
//! has its descriptors, threads and memory back, comes to rest, and its VM is as it was. What a
//! campaign checks besides is in its module.

mod clock;
mod control;
mod crowd;
mod figures;
mod gate;
mod limits;
mod races;
mod rings;
mod round;
mod states;

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use clap::builder::PossibleValuesParser;
use vhost_user_timer_kit::raw_driver::{Usage, release_program};
use vhost_user_timer_kit::victim::{DEADLINE, Victim};

use figures::{HighWater, Tally, table};
use round::Round;

/// How long a round may take. A campaign bounds its rounds by acts, to about a second; a machine
/// that is busy takes many times as long.
const ROUND: Duration = Duration::from_secs(300);

/// How much memory the process may keep, KiB, whatever the campaigns have done, and however long.
const SLACK_KIB: u64 = 8 << 10;

/// How often progress is printed.
const PROGRESS: Duration = Duration::from_secs(5);

/// One kind of attack.
struct Campaign {
    name: &'static str,
    /// Whether its rounds must leave the VM as it is.
    keeps_vm: bool,
    round: fn(&mut Round<'_>),
}

const CAMPAIGNS: [Campaign; 8] = [
    Campaign {
        name: "control",
        keeps_vm: true,
        round: control::round,
    },
    Campaign {
        name: "rings",
        keeps_vm: true,
        round: rings::round,
    },
    Campaign {
        name: "gate",
        keeps_vm: false,
        round: gate::round,
    },
    Campaign {
        name: "crowd",
        keeps_vm: false,
        round: crowd::round,
    },
    Campaign {
        name: "races",
        keeps_vm: false,
        round: races::round,
    },
    Campaign {
        name: "clock",
        keeps_vm: true,
        round: clock::round,
    },
    Campaign {
        name: "limits",
        keeps_vm: true,
        round: limits::round,
    },
    Campaign {
        name: "states",
        keeps_vm: false,
        round: states::round,
    },
];

/// Attacks a backend at random, and checks that no attack reaches past its own connection
///
/// Campaigns take turns on one backend process:
///   control  messages of the control channel, mutated, cut off, with descriptors of every kind
///   rings    rings, indirect tables and indices, in memory that is truncated and grown again
///   gate     restores at random, compared with a naive VM: no WAIT_RUN is answered too early
///   crowd    restores by vCPU threads, all at once, one of which may be late
///   races    restores while the control channel stops rings, loads device states, and resets
///   clock    virtio-rtc requests of every shape, compared with the standard's status and length
///   limits   frontends that use up the descriptors of a process whose limit is low
///   states   device states and state files with odd contents and right checksums
///
/// Ends with 0, or at the first violation with 1, the command that repeats it, and its last acts.
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
pub struct Args {
    /// Seed of all rounds [default: the number of today's date, the same all day]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Stop after this many minutes, but not before each campaign has had a round
    #[arg(long, value_name = "N", default_value = "1")]
    minutes: f64,

    /// Only this campaign; can be given more than once [default: all]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(CAMPAIGNS.map(|one| one.name)))]
    campaign: Vec<String>,

    /// Only the round with this number, to repeat a violation
    #[arg(long, value_name = "N")]
    round: Option<u64>,

    /// The backend program [default: the release build beside this program]
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,
}

impl Args {
    fn seed(&self) -> u64 {
        let today = || {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs() / 86_400)
        };
        self.seed.unwrap_or_else(today)
    }

    fn campaigns(&self) -> Vec<&'static Campaign> {
        let wanted = |one: &&Campaign| {
            self.campaign.is_empty() || self.campaign.iter().any(|name| name == one.name)
        };
        CAMPAIGNS.iter().filter(wanted).collect()
    }
}

/// Runs the campaigns, and prints their figures.
pub fn run(args: &Args) -> ExitCode {
    let program = match &args.backend {
        Some(program) => Ok(program.clone()),
        None => release_program().map(|(program, _)| program),
    };
    let program = match program {
        Ok(program) => program,
        Err(error) => {
            eprintln!("hostile: {error}");
            return ExitCode::FAILURE;
        }
    };
    let (seed, time) = (args.seed(), Duration::from_secs_f64(args.minutes * 60.0));
    println!("hostile: seed={seed} backend={}", program.display());
    let said = catch_panics();
    let life = time + (CAMPAIGNS.len() as u32 + 1) * ROUND;
    let mut victim = Victim::program(&program)
        .with_state()
        .slack_kib(SLACK_KIB)
        .log_level("warn")
        .life(life)
        .start();
    let pid = victim.rig.backend.pid();
    println!("hostile: the backend is process {pid}");
    let high = HighWater::watch(pid, victim.usage);
    let campaigns = args.campaigns();
    let mut tallies = vec![Tally::default(); campaigns.len()];
    let (began, mut printed) = (Instant::now(), Instant::now());
    let mut failed = None;
    let first = args.round.unwrap_or(0);
    'run: for number in first.. {
        for (index, campaign) in campaigns.iter().enumerate() {
            let mut round = Round::new(&program, &victim, campaign.name, seed, number);
            let held = catch_unwind(AssertUnwindSafe(|| {
                victim
                    .rig
                    .in_time(ROUND, "the round", || (campaign.round)(&mut round));
            }));
            tallies[index].add(&round.tally);
            let story = std::mem::take(&mut round.story);
            let held = held.and_then(|()| {
                catch_unwind(AssertUnwindSafe(|| {
                    if !campaign.keeps_vm {
                        victim.renew();
                    }
                    victim.unharmed();
                }))
            });
            if held.is_err() {
                failed = Some((campaign.name, number, story));
                break 'run;
            }
            if printed.elapsed() >= PROGRESS {
                printed = Instant::now();
                let acts: u64 = tallies.iter().map(|tally| tally.acts).sum();
                println!(
                    "hostile: {:>4} s  round={number} acts={acts} rss={} KiB",
                    began.elapsed().as_secs(),
                    Usage::of(pid).map_or(0, |usage| usage.anonymous_kib),
                );
            }
            // However slow the machine is, each campaign has a round.
            if began.elapsed() >= time && number > first {
                break 'run;
            }
        }
        if args.round.is_some() || began.elapsed() >= time {
            break;
        }
    }
    let rows = campaigns.iter().map(|one| one.name).zip(&tallies);
    println!("{}", table(rows.collect(), &high.end()));
    let Some((name, number, story)) = failed else {
        let ended = catch_unwind(AssertUnwindSafe(|| victim.ends_on_sigterm()));
        return verdict(ended.is_ok(), seed, began, &said);
    };
    println!("hostile: the last acts of round {number} of {name}:");
    story.iter().for_each(|act| println!("    {act}"));
    let log = victim.rig.backend.log();
    let lines: Vec<_> = log.lines().collect();
    println!("hostile: the backend's last lines:");
    let last = lines.iter().skip(lines.len().saturating_sub(8));
    last.for_each(|line| println!("    {line}"));
    // One that was killed goes away while its frontends notice.
    match victim.rig.backend.exit_within(DEADLINE) {
        Some(status) => println!("hostile: the backend has ended: {status}"),
        // It may be what no signal ends.
        None => drop(victim.rig.backend.kill()),
    }
    std::mem::forget(victim);
    println!("hostile: to repeat: hostile --seed {seed} --campaign {name} --round {number}");
    verdict(false, seed, began, &said)
}

fn verdict(ok: bool, seed: u64, began: Instant, said: &Mutex<String>) -> ExitCode {
    let took = began.elapsed().as_secs();
    if ok {
        println!("hostile: OK seed={seed} seconds={took}");
        return ExitCode::SUCCESS;
    }
    let said = said.lock().unwrap_or_else(PoisonError::into_inner);
    println!("hostile: FAILED seed={seed} seconds={took}: {said}");
    ExitCode::FAILURE
}

/// Has the first panic noted, and none printed.
fn catch_panics() -> Arc<Mutex<String>> {
    let said = Arc::new(Mutex::new(String::new()));
    let note = Arc::clone(&said);
    set_hook(Box::new(move |panic| {
        let mut said = note.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_empty() {
            *said = panic.to_string();
        } else {
            *said += &format!("; then {panic}");
        }
    }));
    said
}
