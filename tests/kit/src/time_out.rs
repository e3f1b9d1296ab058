//! Time-outs that the backend counts while a test sets its scene up.
//!
//! On a slow machine such a time-out may pass before the scene is set, and then the test would show
//! something else. [`with_a_time_out`] plays the story again with a longer one: only a story whose
//! scene was set in time is judged.

use std::time::{Duration, Instant};

/// From what an idle machine needs to what none does.
const LENGTHS: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(16),
    Duration::from_secs(64),
];

/// A time-out of the backend, which counts it from some instant of the story on.
#[derive(Debug)]
pub struct TimeOut {
    length: Duration,
    begun: Instant,
}

impl TimeOut {
    /// How long the backend has to wait.
    pub fn length(&self) -> Duration {
        self.length
    }

    /// Says that the scene is set: `None`, for the story to return, where the time-out may have
    /// passed before that. What counts must be known to be done, by an answer that comes after it.
    pub fn scene_is_set(&self) -> Option<()> {
        (!self.may_have_passed()).then_some(())
    }

    /// Whether the backend may have come to the end of the time-out.
    pub fn may_have_passed(&self) -> bool {
        self.begun.elapsed() >= self.length
    }
}

/// Plays a story from its beginning with longer and longer time-outs, until its scene was set in
/// time.
///
/// # Panics
///
/// If it was not within a minute.
pub fn with_a_time_out<T>(mut story: impl FnMut(&TimeOut) -> Option<T>) -> T {
    let played = LENGTHS.into_iter().find_map(|length| {
        let begun = Instant::now();
        story(&TimeOut { length, begun })
    });
    played.expect("the scene is set within a minute")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_whose_scene_was_set_too_late_is_played_again_with_a_longer_time_out() {
        let mut played = Vec::new();
        let length = with_a_time_out(|time_out| {
            played.push(time_out.length());
            while played.len() == 1 && !time_out.may_have_passed() {
                std::thread::yield_now();
            }
            time_out.scene_is_set()?;
            Some(time_out.length())
        });
        assert_eq!(played.first(), LENGTHS.first());
        assert_eq!(played.last(), Some(&length));
        assert!(played.len() > 1 && played.is_sorted());
    }
}
