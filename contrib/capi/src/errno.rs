//! Errors as numbers. The header has this table for its readers.

use std::error::Error as StdError;
use std::ffi::c_int;
use std::fmt;
use std::io;

use vhost_user_timer_frontend::{
    ApplyFailure, DeviceStateError, Error, InvalidArgument, OtherCounter,
};

/// What an `apply` callback returned, positive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallbackError(i32);

impl CallbackError {
    pub(crate) fn new(returned: c_int) -> Self {
        // Positive values have no meaning here.
        let is_errno = (-4095..0).contains(&returned);
        CallbackError(if is_errno { -returned } else { libc::EIO })
    }
}

impl fmt::Display for CallbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.0);
        write!(f, "the apply callback failed: {error}")
    }
}

impl StdError for CallbackError {}

/// The number of an error, positive.
pub(crate) fn errno(error: &Error) -> i32 {
    match error {
        Error::Refused(refusal) => known(refusal.status.errno()),
        Error::InvalidArgument(InvalidArgument::InsideApply) => libc::EDEADLK,
        Error::InvalidArgument(_) | Error::SavedVm(_) => libc::EINVAL,
        Error::TimedOut { .. } => libc::ETIMEDOUT,
        Error::Disconnected => libc::ENOTCONN,
        Error::ShutDown => libc::ESHUTDOWN,
        Error::StateLost(_) => libc::ENOTRECOVERABLE,
        Error::Uncertain(_) => libc::EALREADY,
        Error::Applying { .. } => libc::EBUSY,
        Error::QueueFull { .. } => libc::EAGAIN,
        Error::HostCounter(_) => libc::EMEDIUMTYPE,
        Error::MissingFeature(_) => libc::EOPNOTSUPP,
        Error::Version(_) => libc::EPROTONOSUPPORT,
        Error::Config(_) | Error::Protocol { .. } => libc::EPROTO,
        Error::DeviceState(DeviceStateError::TooLong) => libc::EFBIG,
        Error::DeviceState(_) | Error::Control { .. } => libc::EREMOTEIO,
        Error::BackendEnded { .. } => libc::ECHILD,
        Error::Connect { source, .. } | Error::Spawn { source, .. } | Error::Io { source, .. } => {
            source.raw_os_error().unwrap_or(libc::EIO)
        }
        Error::Apply(failure) => of_apply(failure),
        Error::Restore(failure) => errno(&failure.cause),
        Error::Abandoned => libc::ECANCELED,
        _ => libc::EIO,
    }
}

/// A status of the backend, which may have any value.
fn known(status: u32) -> i32 {
    match i32::try_from(status) {
        Ok(errno @ 1..=4095) => errno,
        _ => libc::EIO,
    }
}

fn of_apply(failure: &ApplyFailure) -> i32 {
    let cause = &*failure.cause;
    if let Some(CallbackError(errno)) = cause.downcast_ref() {
        *errno
    } else if cause.is::<OtherCounter>() {
        libc::EMEDIUMTYPE
    } else {
        libc::ECANCELED
    }
}

/// An error and its causes, in one line.
pub(crate) fn text(error: &Error) -> String {
    let first: &dyn StdError = error;
    let causes = std::iter::successors(Some(first), |&error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}
