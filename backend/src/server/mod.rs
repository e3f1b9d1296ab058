//! Accepts frontends, one at a time at each endpoint, until a signal ends the process.
//!
//! The loop waits, with `epoll`, for frontends, for the ends of their connections, and for the
//! signals that end the process.

mod access;
mod activation;
mod arrivals;
mod bound;
mod endpoint;
mod manager;
mod poll;
mod signals;
mod socket;
mod supervision;

use std::io;
use std::os::fd::AsRawFd;

pub use access::{Access, AccessError, ModeError, SocketMode, Stranger};
pub(crate) use activation::LISTEN_FDS;
pub use activation::{ActivationError, Passed, passed_to_another};
pub use bound::PathError;
pub use endpoint::Endpoint;
pub use manager::Manager;
use poll::{Poll, Token};
use rustix::process::{Resource, getrlimit, setrlimit};
pub use signals::{Signals, prepare_signals};
pub use socket::{Socket, SocketError};
pub use supervision::Supervision;

/// Why serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The process could not get ready to serve.
    #[error("preparing to serve failed")]
    Prepare(#[source] io::Error),
    /// Waiting for frontends failed.
    #[error("waiting for frontends failed")]
    Wait(#[source] io::Error),
}

/// Serves at the endpoints until one of the signals arrives, or until the last frontend has left:
/// where sockets were inherited connected, the last of theirs; with `terminate`, the last one of
/// all sockets.
///
/// # Errors
///
/// [`ServerError`] where the system refuses what serving needs. What a frontend does is never
/// an error here: its connection ends, and the next one is served.
pub fn serve(
    mut endpoints: Vec<Endpoint>,
    mut signals: Signals,
    terminate: bool,
    mut supervision: Option<Supervision>,
) -> Result<(), ServerError> {
    let prepare = ServerError::Prepare;
    raise_open_files();
    let poll = Poll::new().map_err(prepare)?;
    poll.add(signals.as_raw_fd(), Token::Signal)
        .map_err(prepare)?;
    if let Some(supervision) = &supervision {
        supervision.register(&poll).map_err(prepare)?;
    }
    for (index, endpoint) in endpoints.iter_mut().enumerate() {
        endpoint.register(&poll, index).map_err(prepare)?;
    }
    loop {
        if let Some(supervision) = &mut supervision {
            supervision.report(&endpoints);
        }
        let retry = endpoints.iter().filter_map(Endpoint::resting_until);
        let due = supervision.as_ref().and_then(Supervision::due);
        let token = poll
            .wait(retry.chain(due).min())
            .map_err(ServerError::Wait)?;
        for (index, endpoint) in endpoints.iter_mut().enumerate() {
            endpoint.wake_up(&poll, index)?;
        }
        match token {
            // What is due, and what the VM has become, is handled with every turn of the loop.
            None | Some(Token::VmChanged) => {}
            Some(Token::Signal) => {
                if let Some(signal) = signals.take() {
                    log::info!("Ending on {signal}");
                    break;
                }
            }
            Some(Token::Endpoint(event, index)) => {
                let Some(endpoint) = endpoints.get_mut(index) else {
                    continue;
                };
                let left = endpoint.handle(event, &poll, index)?;
                if left && is_over(&endpoints, terminate) {
                    log::info!("Ending, since {}", why_over(terminate));
                    break;
                }
            }
        }
    }
    if let Some(supervision) = &supervision {
        supervision.stopping();
    }
    // After a signal a frontend may still be connected. Its end is not waited for: the frontend
    // could delay the worker, and the end of the process ends both.
    Ok(())
}

/// Whether no frontend is left for whose sake the process lives. Asked when one has left.
fn is_over(endpoints: &[Endpoint], terminate: bool) -> bool {
    let counts = |endpoint: &&Endpoint| terminate || endpoint.is_for_one_frontend();
    let mut counting = endpoints.iter().filter(counts).peekable();
    counting.peek().is_some() && counting.all(|endpoint| endpoint.connected().is_none())
}

fn why_over(terminate: bool) -> &'static str {
    match terminate {
        true => "the last frontend disconnected (--terminate)",
        false => "the frontend of each connected socket disconnected",
    }
}

/// Each memory region costs a descriptor, and the soft limit is often 1024 for no reason but
/// select(2), which nothing here uses.
fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // The lower limit does as well: a frontend may share fewer regions then.
    let _ = setrlimit(Resource::Nofile, limit);
}
