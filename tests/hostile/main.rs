//! Frontends that break the rules.

mod bad_input;
mod frontend;
