//! The frontend library against a fake backend in the same process.

mod answers;
mod apply;
mod connecting;
mod device_state;
mod ending;
mod events;
mod fake;
mod operations;
mod reconnect;
mod restore;
mod time_page;

use std::time::Duration;

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(1);
