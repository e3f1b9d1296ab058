//! The command line of `vhost-user-timer-ctl`, from which its help, its manual page and its
//! completions are made.

pub mod args;
