//! What was tried and failed.

use std::error::Error as StdError;
use std::fmt;

/// What was tried, and why it failed.
#[derive(Debug)]
pub(crate) struct Error {
    tried: String,
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Error {
            tried: what.into(),
            cause: None,
        }
    }

    /// Says on stderr what failed, and why.
    pub(crate) fn report(&self, who: &str) {
        let mut text = format!("vhost-user-timer-vmm: {who}{self}");
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        eprintln!("{text}");
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.tried)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

/// Says what was tried when something failed.
pub(crate) trait Context<T> {
    fn context(self, tried: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, tried: &'static str) -> Result<T, Error> {
        self.map_err(|cause| Error {
            tried: tried.to_owned(),
            cause: Some(cause.into()),
        })
    }
}
