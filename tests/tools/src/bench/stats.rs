//! The harness's own arithmetic.

/// The quantiles that are reported for a latency.
pub(super) const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

/// The value that this fraction of the samples does not exceed (nearest rank); 0 without samples.
pub(super) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    let index = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(0.0)
}

/// Samples in ascending order.
pub(super) fn sorted(samples: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut samples: Vec<_> = samples.into_iter().collect();
    samples.sort_unstable_by(f64::total_cmp);
    samples
}

/// The median.
pub(super) fn median(samples: impl IntoIterator<Item = f64>) -> f64 {
    quantile(&sorted(samples), 0.5)
}

/// Two things measured alternately, round by round.
#[derive(Clone, Debug, Default)]
pub(super) struct Pair {
    ours: Vec<Vec<f64>>,
    floor: Vec<Vec<f64>>,
}

impl Pair {
    /// Adds one round's samples.
    pub(super) fn add(&mut self, ours: Vec<f64>, floor: Vec<f64>) {
        self.ours.push(ours);
        self.floor.push(floor);
    }

    /// All samples, ascending: ours, and the floor's.
    pub(super) fn pooled(&self) -> [Vec<f64>; 2] {
        [&self.ours, &self.floor].map(|rounds| sorted(rounds.iter().flatten().copied()))
    }

    /// The median of each.
    pub(super) fn medians(&self) -> [f64; 2] {
        self.pooled().map(|sorted| quantile(&sorted, 0.5))
    }

    /// Whether no round was added.
    pub(super) fn is_empty(&self) -> bool {
        self.ours.is_empty()
    }

    /// Ours divided by the floor at this quantile. If the rounds have enough samples for the
    /// quantile, this is the median of the rounds' ratios, because whatever disturbs the machine
    /// disturbs both halves of a round. Otherwise it is the ratio over all samples together.
    pub(super) fn ratio(&self, part: f64) -> f64 {
        let enough = |rounds: &[Vec<f64>]| {
            rounds
                .iter()
                .all(|round| (1.0 - part) * round.len() as f64 >= 5.0)
        };
        if enough(&self.ours) && enough(&self.floor) {
            let at = |round: &Vec<f64>| quantile(&sorted(round.iter().copied()), part);
            let rounds = self.ours.iter().zip(&self.floor);
            return median(rounds.map(|(ours, floor)| at(ours) / at(floor)));
        }
        let [ours, floor] = self.pooled();
        quantile(&ours, part) / quantile(&floor, part)
    }
}

/// The exponent k of the best fit of y = c · x^k: least squares over the logarithms.
pub(super) fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<_> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let over: f64 = logs.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let under: f64 = logs.iter().map(|p| (p.0 - x).powi(2)).sum();
    over / under
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_sample_that_this_fraction_does_not_exceed() {
        let hundred: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, 0.5), 50.0);
        assert_eq!(quantile(&hundred, 0.99), 99.0);
        assert_eq!(quantile(&hundred, 0.999), 100.0);
        assert_eq!(quantile(&hundred, 0.0), 1.0);
        assert_eq!(quantile(&[7.0], 0.999), 7.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn a_disturbed_round_does_not_move_the_ratio() {
        let mut pair = Pair::default();
        for disturbance in [1.0, 1.0, 50.0, 1.0, 9.0] {
            let round = |base: f64| vec![base * disturbance; 1000];
            pair.add(round(30.0), round(20.0));
        }
        assert_eq!(pair.ratio(0.5), 1.5);
        assert_eq!(pair.ratio(0.99), 1.5);
        // A round has too few samples for its own p99.9, so all rounds count together.
        assert_eq!(pair.ratio(0.999), 1.5);
    }

    #[test]
    fn the_exponent_of_a_power_is_found() {
        for k in [0.0, 0.5, 1.0, 1.05, 2.0] {
            let points: Vec<_> = [64.0, 512.0, 4096.0]
                .map(|x: f64| (x, 3.0 * x.powf(k)))
                .into();
            assert!((exponent(&points) - k).abs() < 1e-9);
        }
    }
}
