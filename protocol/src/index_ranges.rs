//! Indices in words.

/// vCPU indices in ascending order, shown as ranges: "7, 12-13".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexRanges<'a>(pub &'a [u32]);

impl core::fmt::Display for IndexRanges<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let runs = self.0.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        for (n, run) in runs.enumerate() {
            let separator = if n == 0 { "" } else { ", " };
            match run {
                [first, .., last] => write!(f, "{separator}{first}-{last}")?,
                [only] => write!(f, "{separator}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_vcpus_are_named_as_ranges() {
        assert_eq!(IndexRanges(&[7, 12, 13]).to_string(), "7, 12-13");
        assert_eq!(IndexRanges(&[0, 1, 2, 3]).to_string(), "0-3");
        assert_eq!(IndexRanges(&[u32::MAX]).to_string(), "4294967295");
        assert_eq!(IndexRanges(&[]).to_string(), "");
    }
}
