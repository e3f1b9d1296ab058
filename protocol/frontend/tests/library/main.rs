//! The frontend library against a fake backend in the same process.

mod answers;
mod apply;
mod connecting;
mod device_state;
mod ending;
mod events;
mod fake;
mod operations;
mod pace;
mod reconnect;
mod restore;
mod time_page;

use std::time::Duration;

use fake::LONG;

const SHORT: Duration = Duration::from_millis(1);
