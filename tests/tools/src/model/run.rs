//! Runs a check, and reports its result.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use stateright::report::{ReportData, ReportDiscovery, Reporter};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

use super::Timers;
use super::action::Action;
use super::device::Device;
use super::limits::Limits;
use super::system::System;

/// How often progress is reported.
const PROGRESS_SECONDS: u64 = 5;

/// The properties with a known counterexample.
#[derive(Debug, Default)]
pub(super) struct Failed(Mutex<BTreeSet<&'static str>>);

impl Failed {
    /// Whether this is the first counterexample.
    pub(super) fn is_first(&self, name: &'static str) -> bool {
        let mut failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failed.insert(name)
    }
}

/// How to explore.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Checker threads. With one, the first counterexample is a shortest one.
    pub threads: usize,
    /// Stop after about this many states.
    pub max_states: Option<usize>,
    /// Explore no further than this many steps.
    pub max_depth: Option<usize>,
}

impl Effort {
    /// Everything, in this thread's time.
    pub const WHOLE: Effort = Effort {
        threads: 1,
        max_states: None,
        max_depth: None,
    };
}

/// A property that does not hold, and why.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The property.
    pub property: &'static str,
    /// Each step on the way there, in words.
    pub trace: Vec<String>,
}

/// The result of a check.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// States reached, counting repeats.
    pub states: usize,
    /// Different states.
    pub unique: usize,
    /// Steps to the farthest state.
    pub depth: usize,
    /// Whether every state was reached.
    pub exhaustive: bool,
    /// How long it took.
    pub took: Duration,
    /// The properties that do not hold; the one that fails soonest is first.
    pub failures: Vec<Failure>,
    /// What was never reached, although it must be possible.
    pub never: Vec<&'static str>,
}

impl Verdict {
    /// Whether every property holds, and everything that must be possible was reached.
    pub fn ok(&self) -> bool {
        self.failures.is_empty() && (self.never.is_empty() || !self.exhaustive)
    }
}

/// Explores the states of a device, and calls `progress` now and then.
///
/// # Panics
///
/// If the device panics.
pub fn check<D: Device>(
    limits: Limits,
    device: D,
    effort: Effort,
    progress: impl FnMut(&ReportData) + Send,
) -> Verdict {
    let began = Instant::now();
    let mut builder = Timers::new(limits, device)
        .checker()
        .threads(effort.threads)
        .finish_when(HasDiscoveries::AnyFailures);
    if let Some(states) = effort.max_states {
        builder = builder.target_state_count(states);
    }
    if let Some(depth) = effort.max_depth {
        builder = builder.target_max_depth(depth);
    }
    let checker = builder.spawn_bfs().join_and_report(&mut Progress {
        tell: progress,
        reported: 0,
    });
    let mut failures = Vec::new();
    let discoveries = checker.discoveries();
    let properties = checker.model().properties();
    for property in properties
        .iter()
        .filter(|property| property.expectation == Expectation::Always)
    {
        if let Some(path) = discoveries.get(property.name) {
            failures.push(Failure {
                property: property.name,
                trace: trace(path.clone().into_vec()),
            });
        }
    }
    failures.sort_by_key(|failure| failure.trace.len());
    let never = properties
        .iter()
        .filter(|property| property.expectation == Expectation::Sometimes)
        .map(|property| property.name)
        .filter(|name| !discoveries.contains_key(name))
        .collect();
    let (states, depth) = (checker.state_count(), checker.max_depth());
    let stopped = effort.max_states.is_some_and(|max| states >= max)
        || effort.max_depth.is_some_and(|max| depth >= max);
    Verdict {
        states,
        unique: checker.unique_state_count(),
        depth,
        exhaustive: failures.is_empty() && !stopped,
        took: began.elapsed(),
        failures,
        never,
    }
}

/// A path in words: each step, and the state after it.
fn trace<D: Device>(path: Vec<(System<D>, Option<Action>)>) -> Vec<String> {
    let mut lines = vec![format!("    {}", path[0].0)];
    for ((before, action), (after, _)) in path.iter().zip(&path[1..]) {
        if let Some(action) = action {
            lines.push(format!(
                "{:>3} {}",
                lines.len(),
                step(before, *action, after)
            ));
        }
    }
    lines
}

fn step<D: Device>(before: &System<D>, action: Action, after: &System<D>) -> String {
    let what = match before.request_of(action) {
        Some((who, request)) => {
            let answer = match after.note.status {
                Some(status) => status.name(),
                None => "waits",
            };
            let dies = matches!(action, Action::ServeAndDie(_) | Action::VmmAndDie(_));
            let dies = if dies {
                ", but the backend is killed first"
            } else {
                ""
            };
            format!("{who}: {request} -> {answer}{dies}")
        }
        None => action.to_string(),
    };
    format!("{what}\n        {after}")
}

struct Progress<F> {
    tell: F,
    /// In which second.
    reported: u64,
}

impl<M: Model, F: FnMut(&ReportData)> Reporter<M> for Progress<F> {
    fn report_checking(&mut self, data: ReportData) {
        let second = data.duration.as_secs();
        if !data.done && second >= self.reported + PROGRESS_SECONDS {
            self.reported = second;
            (self.tell)(&data);
        }
    }

    fn report_discoveries(
        &mut self,
        _: &M,
        _: std::collections::BTreeMap<&'static str, ReportDiscovery<M>>,
    ) where
        M::Action: fmt::Debug + PartialEq,
        M::State: fmt::Debug + std::hash::Hash + PartialEq,
    {
    }

    /// The end is seen this late at most.
    fn delay(&self) -> Duration {
        Duration::from_millis(100)
    }
}
