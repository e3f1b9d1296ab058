//! What every call does at the border: its errors become numbers and a text, and no panic passes.

#![expect(unsafe_code, reason = "exports symbols; reads its own text in tests")]

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use vhost_user_timer_frontend::Error;

use crate::errno::{errno, text};

/// Why a call failed.
pub(crate) struct Failure {
    /// Positive.
    errno: i32,
    text: String,
}

impl Failure {
    pub(crate) fn new(errno: i32, text: impl Into<String>) -> Self {
        let text = text.into();
        Failure { errno, text }
    }

    /// An argument that cannot be used.
    pub(crate) fn argument(text: impl Into<String>) -> Self {
        Failure::new(libc::EINVAL, text)
    }

    /// A panic, which is a bug of the library. In a library that is built to abort there is none.
    fn bug(panic: &(dyn Any + Send)) -> Self {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
        let said = said.unwrap_or("without a message");
        Failure::new(
            libc::EIO,
            format!("bug in libvhost_user_timer: panicked: {said}"),
        )
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        Failure::new(errno(&error), text(&error))
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs a call's body and returns what C gets: 0, or a negative errno whose text
/// [`vut_error_message`] has.
pub(crate) fn border(body: impl FnOnce() -> Result<(), Failure>) -> c_int {
    // What a panic leaves behind is behind locks, which the library takes over when poisoned, or
    // is the caller's own memory, whose content is void after an error.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return 0,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::bug(&*panic),
    };
    keep(failure.text);
    -failure.errno
}

fn keep(mut text: String) {
    text.retain(|c| c != '\0');
    let text = CString::new(text).unwrap_or_default();
    // A thread that is ending has no text any more.
    let _ = MESSAGE.try_with(|message| message.replace(text));
}

/// The text of the last call on this thread that failed: what was tried, on what, and why it
/// failed, with the causes in one line. Empty if none has failed yet.
///
/// The text is UTF-8, without a line break at its end, and valid until the next call of this
/// library on this thread fails, or the thread ends. A call that succeeds keeps the text.
///
/// @return the text; never NULL
#[unsafe(no_mangle)]
pub extern "C" fn vut_error_message() -> *const c_char {
    MESSAGE
        .try_with(|message| message.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The library's version, as "0.1.0".
///
/// @return a text that is always valid
#[unsafe(no_mangle)]
pub extern "C" fn vut_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    const TEXT: &CStr = match CStr::from_bytes_with_nul(VERSION.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a version has no zero byte"),
    };
    TEXT.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        let text = vut_error_message();
        // SAFETY: the text is valid until the next error of this thread.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_is_an_error_with_its_text_and_passes_no_border() {
        assert_eq!(border(|| panic!("slot {}", 7)), -libc::EIO);
        assert_eq!(message(), "bug in libvhost_user_timer: panicked: slot 7");
        assert_eq!(border(|| panic!("plain")), -libc::EIO);
        assert!(message().ends_with(": plain"));
        assert_eq!(
            border(|| std::panic::resume_unwind(Box::new(7))),
            -libc::EIO
        );
        assert!(message().ends_with(": without a message"));
    }

    #[test]
    fn a_text_is_a_string_of_c_whatever_is_in_it() {
        assert_eq!(message(), "");
        let failure = Failure::new(libc::ENOENT, "a\0b\0");
        assert_eq!(border(|| Err(failure)), -libc::ENOENT);
        assert_eq!(message(), "ab");
        assert_eq!(border(|| Ok(())), 0);
        assert_eq!(message(), "ab", "a success keeps the text");
    }
}
