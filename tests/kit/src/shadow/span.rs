//! A number that is known to lie between two others.

use std::ops::{Add, Sub};

/// From the least to the most that a number can be. Counts and offsets are of 64 bits and of
/// either sign here, so that they can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    least: i128,
    most: i128,
}

impl Span {
    /// Between these two.
    pub fn new(least: u64, most: u64) -> Self {
        Span {
            least: least.into(),
            most: most.into(),
        }
    }

    /// Exactly this, read as a signed number.
    pub fn exactly(value: u64) -> Self {
        let value = i128::from(value as i64);
        Span {
            least: value,
            most: value,
        }
    }

    /// What both are, or nothing.
    pub fn met_with(self, other: Span) -> Option<Span> {
        let met = Span {
            least: self.least.max(other.least),
            most: self.most.min(other.most),
        };
        (met.least <= met.most).then_some(met)
    }

    /// Both bounds, modulo 2^64.
    pub fn bounds(self) -> [u64; 2] {
        [self.least as u64, self.most as u64]
    }
}

impl Add for Span {
    type Output = Span;

    fn add(self, other: Span) -> Span {
        Span {
            least: self.least + other.least,
            most: self.most + other.most,
        }
    }
}

impl Sub for Span {
    type Output = Span;

    fn sub(self, other: Span) -> Span {
        Span {
            least: self.least - other.most,
            most: self.most - other.least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_as_uncertain_as_both_its_sides() {
        let difference = Span::new(10, 12) - Span::new(1, 3);
        assert_eq!(difference.bounds(), [7, 11]);
        assert_eq!((difference + Span::exactly(u64::MAX)).bounds(), [6, 10]);
    }

    #[test]
    fn spans_that_do_not_meet_have_nothing_in_common() {
        assert_eq!(Span::new(1, 4).met_with(Span::new(5, 9)), None);
        let met = Span::new(1, 6).met_with(Span::new(5, 9)).unwrap();
        assert_eq!(met.bounds(), [5, 6]);
    }
}
