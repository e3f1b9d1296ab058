//! Arrays and strings of the caller, and memory that goes to the caller. All pointers that are more
//! than a reference to one value pass here.

#![expect(unsafe_code, reason = "dereferences the caller's pointers")]

use std::ffi::{CStr, OsStr, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::slice;

use crate::border::Failure;

/// The most arguments of a program. More is an array without its NULL.
const MAX_ARGS: usize = 4096;

fn null(what: &str) -> Failure {
    Failure::argument(format!("{what} is NULL"))
}

/// The value that the caller points to.
pub(crate) fn given<T>(value: Option<T>, what: &str) -> Result<T, Failure> {
    value.ok_or_else(|| null(what))
}

/// Where a result goes. NULL: the caller does not want the result.
pub(crate) fn put<T>(to: Option<&mut MaybeUninit<T>>, value: impl Into<T>) {
    if let Some(to) = to {
        to.write(value.into());
    }
}

fn check_array<T>(array: *const T, len: usize, what: &str) -> Result<(), Failure> {
    let fits = len
        .checked_mul(size_of::<T>())
        .is_some_and(|bytes| isize::try_from(bytes).is_ok());
    match () {
        () if !fits => Err(Failure::argument(format!(
            "{what} has {len} entries: more than memory can have"
        ))),
        () if array.is_null() => Err(null(what)),
        () if !array.is_aligned() => Err(Failure::argument(format!("{what} is misaligned"))),
        () => Ok(()),
    }
}

/// An array that the caller gives. NULL is fine for an empty one.
///
/// # Safety
///
/// Where `array` is not NULL and `len` not 0, `array` points to `len` values that nobody changes
/// for `'a`.
pub(crate) unsafe fn array<'a, T>(
    array: *const T,
    len: usize,
    what: &str,
) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check_array(array, len, what)?;
    // SAFETY: not NULL, aligned, no longer than memory; the rest is the caller's promise.
    Ok(unsafe { slice::from_raw_parts(array, len) })
}

/// As [`array()`], for an array that is changed.
///
/// # Safety
///
/// Where `array` is not NULL and `len` not 0, `array` points to `len` values that nobody else reads
/// or changes for `'a`.
pub(crate) unsafe fn array_mut<'a, T>(
    array: *mut T,
    len: usize,
    what: &str,
) -> Result<&'a mut [T], Failure> {
    if len == 0 {
        return Ok(&mut []);
    }
    check_array(array, len, what)?;
    // SAFETY: not NULL, aligned, no longer than memory; the rest is the caller's promise.
    Ok(unsafe { slice::from_raw_parts_mut(array, len) })
}

/// A string that the caller gives, in whatever encoding: a path, an option.
///
/// # Safety
///
/// Where `string` is not NULL it is terminated by a zero byte, and nobody changes it for `'a`.
pub(crate) unsafe fn string<'a>(string: *const c_char, what: &str) -> Result<&'a OsStr, Failure> {
    if string.is_null() {
        return Err(null(what));
    }
    // SAFETY: not NULL; the rest is the caller's promise.
    let string = unsafe { CStr::from_ptr(string) };
    Ok(OsStr::from_bytes(string.to_bytes()))
}

/// Strings up to NULL. NULL itself is an empty array.
///
/// # Safety
///
/// Where `strings` is not NULL it points to pointers, the last of them NULL, and each of the others
/// is as [`string()`] needs it.
pub(crate) unsafe fn strings<'a>(
    strings: *const *const c_char,
    what: &str,
) -> Result<Vec<&'a OsStr>, Failure> {
    let mut found = Vec::new();
    if strings.is_null() {
        return Ok(found);
    }
    while found.len() < MAX_ARGS {
        // SAFETY: no entry before this one was NULL, so the array goes on to here.
        let entry = unsafe { strings.add(found.len()) };
        // SAFETY: as above.
        let entry = unsafe { *entry };
        if entry.is_null() {
            return Ok(found);
        }
        // SAFETY: an entry before the NULL is a string.
        found.push(unsafe { string(entry, what) }?);
    }
    Err(Failure::argument(format!(
        "{what} has more than {MAX_ARGS} entries: its last entry must be NULL"
    )))
}

/// Gives bytes to the caller.
pub(crate) fn give_bytes(bytes: Vec<u8>) -> (*mut u8, usize) {
    let bytes = Box::leak(bytes.into_boxed_slice());
    (bytes.as_mut_ptr(), bytes.len())
}

/// Takes back what [`give_bytes`] gave.
///
/// # Safety
///
/// `data` is NULL, or `data` and `len` come from [`give_bytes`], and nobody uses the bytes any
/// more.
pub(crate) unsafe fn take_bytes(data: *mut u8, len: usize) {
    if !data.is_null() {
        let bytes = std::ptr::slice_from_raw_parts_mut(data, len);
        // SAFETY: these are the box's own bytes, by the caller's promise.
        drop(unsafe { Box::from_raw(bytes) });
    }
}
