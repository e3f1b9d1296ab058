//! How much is taken from rings before others get their turn.
//!
//! A chain has up to 65,535 descriptors in an indirect table, and as many bytes as the longest
//! message. So chains alone bound no time, and all three are counted. The last chain of a batch may
//! exceed the limits by its own size.

/// How many chains are taken before other rings, the clock and control messages get their turn.
pub(crate) const CHAINS: usize = 256;

/// How many descriptors. Reading one takes some 10 ns.
pub(crate) const DESCRIPTORS: usize = 16 * 1024;

/// How many bytes of requests and answers.
pub(crate) const BYTES: usize = 1024 * 1024;

/// What is left of a batch.
#[derive(Debug)]
pub(crate) struct Budget {
    chains: usize,
    descriptors: usize,
    bytes: usize,
}

impl Budget {
    /// A batch that begins.
    pub(crate) fn whole() -> Self {
        Budget {
            chains: CHAINS,
            descriptors: DESCRIPTORS,
            bytes: BYTES,
        }
    }

    /// Whether the batch ends here.
    pub(crate) fn is_spent(&self) -> bool {
        self.chains == 0 || self.descriptors == 0 || self.bytes == 0
    }

    /// A chain was taken.
    pub(crate) fn take_chain(&mut self, descriptors: usize, bytes: usize) {
        self.chains = self.chains.saturating_sub(1);
        self.descriptors = self.descriptors.saturating_sub(descriptors);
        self.take_bytes(bytes);
    }

    /// Bytes were read or written.
    pub(crate) fn take_bytes(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of these chains a batch has.
    fn chains(descriptors: usize, bytes: usize) -> usize {
        let mut budget = Budget::whole();
        let mut count = 0;
        while !budget.is_spent() {
            budget.take_chain(descriptors, bytes);
            count += 1;
        }
        count
    }

    #[test]
    fn a_batch_ends_after_so_many_chains_descriptors_or_bytes_whichever_comes_first() {
        assert_eq!(chains(1, 1), CHAINS);
        assert_eq!(chains(DESCRIPTORS / CHAINS, BYTES / CHAINS), CHAINS);
        assert_eq!(chains(65_535, 0), 1);
        assert_eq!(chains(DESCRIPTORS / 4, 0), 4);
        assert_eq!(chains(3, BYTES / 5 + 1), 5);
        assert_eq!(chains(0, 0), CHAINS);
    }
}
