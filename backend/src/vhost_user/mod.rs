//! The vhost-user protocol, once for all devices. No other folder knows it, nor the crates `vhost`
//! and `vhost-user-backend`.
//!
//! A [`Device`] lives as long as the process. A `Session` lives as long as one frontend's
//! connection to it, and a [`Connection`] is the thread that ends it. Control messages pass the
//! `door` on that thread, and are carried out on the connection's request thread. Kicks and the
//! device's alarm are served on its one worker thread.
//!
//! The pitfalls of `vhost-user-backend` are contained here:
//!
//! - It acts on a message before it knows whether it can be carried out, ends the connection on any
//!   error, waits without end for the rest of a message, and serves no connection but one that it
//!   accepts: see `door`.
//! - An error or a panic in `handle_event` kills the worker permanently, so the only error is a
//!   kick descriptor that would keep the worker spinning. Its exit event ends the worker at any
//!   point, and leaks a descriptor, which `worker` closes.
//! - A ring stays memory that the frontend owns after GET_VRING_BASE, so every use of it asks first
//!   whether it is started and enabled ([`Vring::usable`]).
//! - It waits for threads without asking whether a peer keeps them: see `interrupt`.
//! - Descriptors may block, the log may miss regions: see `vring`, `dirty_log`.

mod connection;
mod device;
mod dirty_log;
mod door;
mod interrupt;
mod serving;
mod session;
mod transfer;
mod trap;
mod vring;
mod worker;

pub(crate) use connection::Connection;
pub(crate) use device::{Device, StateError, Turn};
pub(crate) use dirty_log::{DirtyBitmap, DirtyLog};
pub(crate) use vring::{ServedRing, Vring};
