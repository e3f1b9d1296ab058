//! Connects to the backend that the command line names.

use vhost_user_timer_ctl::args::Target;
use vhost_user_timer_frontend::{self as frontend, Frontend, Options};

use crate::error::Error;

/// A connection that reads, with as little memory as it can have.
pub(crate) fn connect(target: &Target) -> Result<Frontend, Error> {
    let options = Options::default()
        .request_queues(1)
        .queue_size(4)
        .event_buffers(2)
        .wait_for_listener(false)
        .timeout(target.timeout());
    match Frontend::connect(&target.socket_path, options) {
        // The connection is in the listening socket's backlog: another frontend is served.
        Err(frontend::Error::TimedOut { .. }) => Err(Error::Busy(target.socket_path.clone())),
        connected => connected.map_err(Error::Unreachable),
    }
}
