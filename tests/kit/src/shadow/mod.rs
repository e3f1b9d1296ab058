//! What a VM must be like, judging by the answers that its frontend got.
//!
//! A [`Shadow`] is every state that the VM may be in: one, as long as all requests are answered;
//! a few after a backend was killed with requests under way, since each of those was done or was
//! not. The requests and answers that follow must fit one of them. An answer that fits none means
//! that a request was lost or half done, or that an earlier answer was not true.
//!
//! Requests of one queue are done in order. Across queues, [`Shadow::take`] looks for an order
//! that explains all answers.
//!
//! What a request does to a [`State`] is what it does to the naive VM,
//! [`Reference`](vhost_user_timer_reference::Reference).

mod random;
mod sending;
mod state;

pub use random::Draw;
pub use sending::{Outcome, outcome, submit};
pub use state::State;
use vhost_user_timer_reference::Ask;

/// Every state that a VM may be in.
#[derive(Clone, Debug)]
pub struct Shadow {
    states: Vec<State>,
}

/// A request, and what became of it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The request.
    pub ask: Ask,
    /// CLOCK_MONOTONIC, ns, before it was sent.
    pub sent: u64,
    /// Its outcome, and CLOCK_MONOTONIC, ns, when that was seen; `None` if there was no answer.
    pub outcome: Option<(Outcome, u64)>,
}

impl From<State> for Shadow {
    fn from(state: State) -> Self {
        Shadow {
            states: vec![state],
        }
    }
}

impl Shadow {
    /// A VM in NEW, of a backend with these limits.
    pub fn new(max_vcpus: u32, request_queues: u16) -> Self {
        State::new(max_vcpus, request_queues).into()
    }

    /// One of the states that the VM may be in.
    pub fn likely(&self) -> &State {
        &self.states[0]
    }

    /// All states that the VM may be in.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// Takes in requests that were under way together, each queue's in order. A request without
    /// an answer may have been done, by `end` at the latest (CLOCK_MONOTONIC, ns), if all before
    /// it on its queue were.
    ///
    /// # Errors
    ///
    /// If no order of the requests explains the answers: what speaks against each.
    pub fn take(&mut self, queues: &[Vec<Asked>], end: u64) -> Result<(), String> {
        let answered = |asked: &Vec<Asked>| {
            let last = asked.iter().rposition(|asked| asked.outcome.is_some());
            last.map_or(0, |last| last + 1)
        };
        let least: Vec<usize> = queues.iter().map(answered).collect();
        let begin = vec![0; queues.len()];
        // With each state, the last instant that an answer named: what is served later is later.
        let mut seen: Vec<(Vec<usize>, State, u64)> = Vec::new();
        seen.extend(self.states.drain(..).map(|state| (begin.clone(), state, 0)));
        let mut reasons = Vec::new();
        let mut next = 0;
        while let Some((done, state, since)) = seen.get(next).cloned() {
            next += 1;
            if done.iter().zip(&least).all(|(done, least)| done >= least)
                && !self.states.contains(&state)
            {
                self.states.push(state.clone());
            }
            for (queue, asked) in queues.iter().enumerate() {
                let Some(asked) = asked.get(done[queue]) else {
                    continue;
                };
                let mut state = state.clone();
                let (outcome, at) = match &asked.outcome {
                    Some((outcome, at)) => (Some(outcome), *at),
                    None => (None, end),
                };
                if at < since {
                    reasons.push(format!("{:?}: its answer came before that", asked.ask));
                    continue;
                }
                let named = outcome.and_then(|outcome| state.instant(&asked.ask, outcome));
                match state.apply(&asked.ask, asked.sent.max(since)..=at, outcome) {
                    Ok(()) => {
                        let mut done = done.clone();
                        done[queue] += 1;
                        let reached = (done, state, named.map_or(since, |ns| ns.max(since)));
                        if !seen.contains(&reached) {
                            seen.push(reached);
                        }
                    }
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        if self.states.is_empty() {
            return Err(format!(
                "no order explains the answers to {queues:#?}: {reasons:#?}"
            ));
        }
        Ok(())
    }

    /// [`take`](Self::take) of one request that was answered.
    ///
    /// # Errors
    ///
    /// Why the answer cannot be.
    pub fn take_one(&mut self, asked: Asked) -> Result<(), String> {
        self.take(&[vec![asked]], 0)
    }
}

#[cfg(test)]
mod tests {
    use vhost_user_timer_protocol::Register::{TimerCtl, TimerCval};
    use vhost_user_timer_reference::contract::words;

    use super::*;

    fn asked(ask: Ask, outcome: &[u64]) -> Asked {
        Asked {
            ask,
            sent: 100,
            outcome: Some((Outcome::Done(words(outcome)), 900)),
        }
    }

    #[test]
    fn what_is_served_after_a_resume_meets_no_count_from_before_it() {
        let mut shadow = Shadow::new(2, 1);
        shadow
            .take_one(asked(Ask::configure(2, 0, 0), &[]))
            .unwrap();
        let arm = Ask::set_regs(0, &[(TimerCtl, 1), (TimerCval, 300)]);
        // The clock starts at host count 500, so the line is low until 800.
        for lines in [0, 1] {
            let resumed = asked(Ask::resume(), &[500, 0, 0, 500, 500]);
            let armed = asked(arm.clone(), &[lines]);
            let taken = shadow.clone().take(&[vec![resumed, armed]], 0);
            assert!(taken.is_ok(), "{lines}: {taken:?}");
        }
    }
}
