//! What stands behind a header: the body of a request, or of an answer.

/// How long a body can be: a fixed part, and then any number of equal parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Length of the fixed part, bytes.
    pub fixed: usize,
    /// Length of each further part, bytes; 0 where there are none.
    pub each: usize,
}

impl Shape {
    /// Whether a body may have this length, bytes.
    pub const fn allows(self, len: usize) -> bool {
        match (len.checked_sub(self.fixed), self.each) {
            (None, _) => false,
            (Some(rest), 0) => rest == 0,
            (Some(rest), each) => rest.is_multiple_of(each),
        }
    }

    /// The length of a body with `count` further parts, bytes; `usize::MAX` where it is more.
    pub const fn len(self, count: usize) -> usize {
        self.each.saturating_mul(count).saturating_add(self.fixed)
    }
}

/// The body of a request or an answer: nothing (`()`), one structure, any number of one (`[T]`), or
/// one structure and then any number of another (`(T, [U])`).
pub trait Payload {
    /// How long it can be.
    const SHAPE: Shape;

    /// Whether its reserved fields, and the flags that this version does not know, are zero.
    fn reserved_is_zero(&self) -> bool {
        true
    }
}

impl Payload for () {
    const SHAPE: Shape = Shape { fixed: 0, each: 0 };
}

impl<T: Payload> Payload for [T] {
    const SHAPE: Shape = Shape {
        fixed: 0,
        each: T::SHAPE.fixed,
    };

    fn reserved_is_zero(&self) -> bool {
        self.iter().all(T::reserved_is_zero)
    }
}

impl<T: Payload, U: Payload> Payload for (T, [U]) {
    const SHAPE: Shape = Shape {
        fixed: T::SHAPE.fixed,
        each: U::SHAPE.fixed,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Vcpu, Vm};

    #[test]
    fn a_body_is_its_fixed_part_and_whole_further_parts() {
        let shapes: [(Shape, &[usize]); 4] = [
            (<()>::SHAPE, &[0]),
            (Vm::SHAPE, &[40]),
            (<[Vcpu]>::SHAPE, &[0, 56, 112]),
            (<(Vm, [Vcpu])>::SHAPE, &[40, 96]),
        ];
        for (shape, allowed) in shapes {
            let lens: Vec<_> = (0..150).filter(|len| shape.allows(*len)).collect();
            assert_eq!(lens, allowed, "{shape:?}");
        }
        assert_eq!(<(Vm, [Vcpu])>::SHAPE.len(2), 152);
        assert_eq!(<[Vcpu]>::SHAPE.len(usize::MAX), usize::MAX);
    }
}
