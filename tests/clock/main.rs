//! The clock device over its socket: the released binary, driven as a guest's driver would.

mod alarms;
mod cross;
mod gate;
mod isolation;
mod migration;
mod requests;
