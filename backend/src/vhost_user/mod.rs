//! The vhost-user protocol, once for all devices. No other folder knows it, nor the crates `vhost`
//! and `vhost-user-backend`.
//!
//! A [`Device`] lives as long as the process. A `Session` lives as long as one frontend's
//! connection to it, and a [`Connection`] is the handle to end it. Control messages arrive on the
//! connection's request thread; kicks and the device's alarm on its one worker thread.
//!
//! The pitfalls of `vhost-user-backend` are contained here:
//!
//! - An error or a panic in `handle_event` kills the worker permanently, so the only errors are the
//!   request to stop and a kick descriptor that would keep the worker spinning.
//! - A ring stays memory that the frontend owns after GET_VRING_BASE, so every use of it asks first
//!   whether it is started and enabled ([`Vring::usable`]).
//! - Descriptors may block, the log may miss regions, a connected socket is not accepted: see
//!   `vring`, `dirty_log`, `relay`.

mod connection;
mod device;
mod dirty_log;
mod door;
mod relay;
mod serving;
mod session;
mod transfer;
mod trap;
mod vring;
mod worker;

pub use connection::ConnectError;
pub(crate) use connection::{Connection, Ended, Listener};
pub(crate) use device::{Device, StateError, Turn};
pub(crate) use dirty_log::{DirtyBitmap, DirtyLog};
pub(crate) use vring::{ServedRing, Vring};
