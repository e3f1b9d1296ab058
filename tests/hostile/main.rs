//! Frontends that break the rules.

mod armed;
mod bad_input;
mod frontend;
mod state_files;
