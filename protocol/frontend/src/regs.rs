//! Registers by their KVM ids, in requests and answers.

use std::fmt;
use std::ops::Deref;

/// The most registers of one GET_REGS or SET_REGS. A vCPU has six.
pub const MAX_REGS: usize = 16;

/// A register, by its KVM id, and its value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RegValue {
    /// The KVM id ([`Register::id`](crate::Register::id)).
    pub id: u64,
    /// The value.
    pub value: u64,
}

impl RegValue {
    /// A register and its value.
    pub const fn new(id: u64, value: u64) -> Self {
        RegValue { id, value }
    }
}

/// KVM register ids, up to [`MAX_REGS`]: GET_REG_LIST's answer. It derefs to a slice.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct RegIds(List<u64>);

/// Registers and their values, up to [`MAX_REGS`], in the order asked for: GET_REGS's answer. It
/// derefs to a slice.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct RegValues(List<RegValue>);

impl RegIds {
    /// `None` if there are too many.
    pub(crate) fn collect(ids: impl IntoIterator<Item = u64>) -> Option<Self> {
        List::collect(ids).map(RegIds)
    }
}

impl RegValues {
    /// `None` if there are too many.
    pub(crate) fn collect(values: impl IntoIterator<Item = RegValue>) -> Option<Self> {
        List::collect(values).map(RegValues)
    }
}

impl Deref for RegIds {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        self.0.as_slice()
    }
}

impl Deref for RegValues {
    type Target = [RegValue];

    fn deref(&self) -> &[RegValue] {
        self.0.as_slice()
    }
}

impl fmt::Debug for RegIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&**self).finish()
    }
}

impl fmt::Debug for RegValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&**self).finish()
    }
}

/// Up to [`MAX_REGS`] items, without an allocation.
#[derive(Clone, Copy, Default)]
struct List<T> {
    items: [T; MAX_REGS],
    len: usize,
}

impl<T: Copy + Default> List<T> {
    fn collect(items: impl IntoIterator<Item = T>) -> Option<Self> {
        let mut list = List::default();
        for item in items {
            *list.items.get_mut(list.len)? = item;
            list.len += 1;
        }
        Some(list)
    }
}

impl<T> List<T> {
    fn as_slice(&self) -> &[T] {
        &self.items[..self.len]
    }
}

impl<T: PartialEq> PartialEq for List<T> {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl<T: Eq> Eq for List<T> {}
