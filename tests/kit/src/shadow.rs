//! What a VM must be like, to go by what its frontend was answered.
//!
//! A [`Shadow`] is every state that the VM may be in: one, as long as all requests are answered;
//! a few, after a backend was killed with requests under way, since each of those was done or was
//! not. Whatever is asked and answered next must fit one of them. An answer that fits none is a
//! request lost, or half done, or an answer that was never true.
//!
//! Requests of one queue are done in order. Between queues any order will do that explains all
//! the answers, so [`Shadow::take`] looks for one.
//!
//! [`State`] is the contract of SPEC.md once more, told by its text and not by the backend's code.

mod ask;
mod random;
mod span;
mod state;

pub use ask::{Answer, Ask};
pub use random::Asking;
pub use span::Span;
pub use state::State;

/// Every state that a VM may be in.
#[derive(Clone, Debug)]
pub struct Shadow {
    states: Vec<State>,
}

/// A request, and what came of it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What was asked.
    pub ask: Ask,
    /// CLOCK_MONOTONIC, ns, before it was sent.
    pub sent: u64,
    /// The answer, if any was seen, and CLOCK_MONOTONIC, ns, then.
    pub answer: Option<(Answer, u64)>,
}

impl Default for Shadow {
    /// Of a VM that is yet to be configured.
    fn default() -> Self {
        State::default().into()
    }
}

impl From<State> for Shadow {
    fn from(state: State) -> Self {
        Shadow {
            states: vec![state],
        }
    }
}

impl Shadow {
    /// One of the states that it may be in.
    pub fn likely(&self) -> &State {
        &self.states[0]
    }

    /// All the states that it may be in.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// Takes in what was asked, queue by queue in order, at one time. What has no answer may have
    /// been done, until `end` at the latest, if all before it on its queue was.
    ///
    /// # Errors
    ///
    /// Why no order of the requests explains the answers.
    pub fn take(&mut self, queues: &[Vec<Asked>], end: u64) -> Result<(), String> {
        let answered = |asked: &Vec<Asked>| {
            let last = asked.iter().rposition(|asked| asked.answer.is_some());
            last.map_or(0, |last| last + 1)
        };
        let least: Vec<usize> = queues.iter().map(answered).collect();
        let begin = vec![0; queues.len()];
        let mut seen: Vec<(Vec<usize>, State)> = Vec::new();
        seen.extend(self.states.drain(..).map(|state| (begin.clone(), state)));
        let mut reasons = Vec::new();
        let mut next = 0;
        while let Some((done, state)) = seen.get(next).cloned() {
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
                let (answer, at) = match &asked.answer {
                    Some((answer, at)) => (Some(answer), *at),
                    None => (None, end),
                };
                match state.apply(&asked.ask, Span::new(asked.sent, at), answer) {
                    Ok(()) => {
                        let mut done = done.clone();
                        done[queue] += 1;
                        let reached = (done, state);
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

    /// As [`take`](Self::take), of one request that was answered.
    ///
    /// # Errors
    ///
    /// Why the answer cannot be.
    pub fn take_one(&mut self, asked: Asked) -> Result<(), String> {
        self.take(&[vec![asked]], 0)
    }
}
