//! How a connection comes about.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use vhost::vhost_user::Listener;

use crate::backend::{Device, daemon};

/// One end of a socket pair (`--fd` of QEMU's conventions) cannot be served.
pub(crate) fn connected_socket() -> bool {
    let (_frontend, backend) = UnixStream::pair().expect("a socket pair");
    let (_, daemon) = daemon(&Arc::new(Device::default()));
    let mut daemon = daemon.expect("a daemon");
    let listener = UnixListener::from(OwnedFd::from(backend));
    let answer = daemon.start(&mut Listener::from(listener));
    println!("  start() with a connected socket, the only thing that it takes: {answer:?}");
    answer.is_err()
}
