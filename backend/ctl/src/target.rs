//! Which backend to connect to.

use std::path::PathBuf;
use std::time::Duration;

use vhost_user_timer_frontend::{self as frontend, Frontend, Options};

use crate::error::Error;

/// The backend to ask.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Target {
    /// The socket of the backend's timer device
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,

    /// How long to wait for the backend to accept the connection and to answer
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    timeout: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    if seconds > 0.0 && seconds <= 3600.0 {
        Ok(seconds)
    } else {
        Err("must be more than 0 and at most 3600".to_owned())
    }
}

impl Target {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }

    pub(crate) fn connect(&self) -> Result<Frontend, Error> {
        let options = Options::default()
            .request_queues(1)
            .queue_size(4)
            .event_buffers(2)
            .wait_for_listener(false)
            .timeout(self.timeout());
        match Frontend::connect(&self.socket_path, options) {
            // The connection is in the listening socket's backlog: another frontend is served.
            Err(frontend::Error::TimedOut { .. }) => Err(Error::Busy(self.socket_path.clone())),
            connected => connected.map_err(Error::failed_to("connect to the backend")),
        }
    }
}
