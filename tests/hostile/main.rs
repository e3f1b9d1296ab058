//! Frontends that break the rules.

mod armed;
mod bad_input;
mod frontend;
mod logs;
mod memory_files;
mod memory_traps;
mod paths;
mod printing;
mod signals;
mod state_files;
