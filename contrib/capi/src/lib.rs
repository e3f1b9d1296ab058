//! The frontend library for C: `libvhost_user_timer`.
//!
//! `include/vhost_user_timer.h` is made of this crate and documents each call. Rules for all calls,
//! as threads, ownership and the table of errors, are in `cbindgen.toml`, which has the header's
//! first lines.
//!
//! Pointers of single values are `Option<&T>` here: NULL is `None`, and the caller vouches for
//! everything else, as the header says. Arrays and strings become slices in [`pointer`]. No panic
//! crosses the border ([`border`]).

#![expect(
    clippy::missing_safety_doc,
    reason = "the header says under Memory what pointers must be"
)]
#![expect(
    non_camel_case_types,
    reason = "types have the names that they have in C"
)]

pub mod apply;
pub mod border;
pub mod connect;
pub mod device_state;
mod errno;
pub mod operations;
mod pointer;
pub mod process;
pub mod registers;
pub mod restore;
mod sigpipe;
pub mod time_page;
pub mod types;
