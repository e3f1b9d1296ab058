//! How a request is cut into descriptors.

/// Where bytes are cut: the lengths of the pieces, repeated until the bytes are used up. A zero
/// makes an empty descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut(Vec<usize>);

impl Cut {
    /// In one piece.
    pub fn whole() -> Self {
        Cut(vec![usize::MAX])
    }

    /// Into pieces of `n` bytes.
    pub fn every(n: usize) -> Self {
        Cut(vec![n])
    }

    /// Into pieces of these lengths, in turn.
    ///
    /// # Panics
    ///
    /// If all of them are zero.
    pub fn at(lengths: &[usize]) -> Self {
        assert!(lengths.iter().any(|n| *n != 0));
        Cut(lengths.to_vec())
    }

    pub(super) fn pieces(&self, len: usize) -> Vec<usize> {
        let mut rest = len;
        let mut pieces = Vec::new();
        for &n in self.0.iter().cycle() {
            if rest == 0 {
                break;
            }
            let n = n.min(rest);
            pieces.push(n);
            rest -= n;
        }
        pieces
    }
}

/// How a chain is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How the device-readable bytes are cut.
    pub readable: Cut,
    /// How the device-writable bytes are cut.
    pub writable: Cut,
    /// Whether the descriptors are in an indirect table.
    pub indirect: bool,
    /// Whether descriptors and buffers come in descending order.
    pub reversed: bool,
}

impl Layout {
    /// One readable and one writable descriptor.
    pub fn plain() -> Self {
        Layout {
            readable: Cut::whole(),
            writable: Cut::whole(),
            indirect: false,
            reversed: false,
        }
    }

    /// Both sides cut the same way.
    pub fn cut(cut: Cut) -> Self {
        Layout {
            readable: cut.clone(),
            writable: cut,
            ..Self::plain()
        }
    }

    /// Every pair of these cuts for the two sides, each in ascending and descending order, in the
    /// ring's table and in an indirect one.
    pub fn all(cuts: &[Cut]) -> Vec<Layout> {
        let mut layouts: Vec<_> = cuts.iter().cloned().map(Layout::cut).collect();
        layouts.push(Layout {
            readable: Cut::every(1),
            ..Layout::plain()
        });
        layouts.push(Layout {
            writable: Cut::every(1),
            ..Layout::plain()
        });
        let reversed: Vec<_> = layouts.iter().cloned().map(Layout::reversed).collect();
        layouts.extend(reversed);
        let indirect: Vec<_> = layouts.iter().cloned().map(Layout::indirect).collect();
        layouts.extend(indirect);
        layouts
    }

    /// The same in an indirect table.
    #[must_use]
    pub fn indirect(self) -> Self {
        Layout {
            indirect: true,
            ..self
        }
    }

    /// The same with descriptors and buffers in descending order.
    #[must_use]
    pub fn reversed(self) -> Self {
        Layout {
            reversed: true,
            ..self
        }
    }
}
