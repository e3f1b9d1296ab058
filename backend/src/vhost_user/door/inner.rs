//! The connection behind the door, whose other end the crate serves.
//!
//! `vhost-user-backend` serves nothing but a connection that it accepts itself. So there is a
//! listening socket for each frontend, for as long as accepting takes.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with,
};
use vhost::vhost_user::Listener;

/// How many names are tried. Each is lost only where another process connects to it within the
/// microseconds between listening and connecting.
const TRIES: usize = 16;

/// A connected socket, and the listener at which its other end is the one connection that waits.
///
/// # Errors
///
/// Where the system refuses a socket.
pub(in crate::vhost_user) fn inner_connection() -> io::Result<(UnixStream, Listener)> {
    for _ in 0..TRIES {
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        // An abstract name that the kernel picks (unix(7), "Autobind feature"): there is no file
        // to remove, and no folder that has to be writable.
        bind(&listener, &SocketAddrUnix::new_unnamed())?;
        // Room for one connection that waits.
        listen(&listener, 0)?;
        let stream = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            FLAGS | SocketFlags::NONBLOCK,
            None,
        )?;
        match connect(&stream, &getsockname(&listener)?) {
            Ok(()) => return Ok((stream.into(), UnixListener::from(listener).into())),
            // A stranger found the name, and has the room. Everybody may connect to it.
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ConnectionRefused,
        "another process connects to every internal socket before this one does",
    ))
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::net::SocketAddrAny;

    use super::*;

    #[test]
    fn the_connection_that_is_accepted_is_our_own() {
        let (mut stream, listener) = inner_connection().unwrap();
        let mut accepted = listener.accept().unwrap().unwrap();
        accepted.write_all(b"!").unwrap();
        let mut byte = [0];
        stream.set_nonblocking(false).unwrap();
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }

    #[test]
    fn a_stranger_cannot_connect_as_well() {
        let (stream, _listener) = inner_connection().unwrap();
        let name: SocketAddrAny = rustix::net::getpeername(&stream).unwrap().unwrap();
        let flags = FLAGS | SocketFlags::NONBLOCK;
        let stranger = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        assert_eq!(connect(&stranger, &name), Err(Errno::AGAIN));
    }
}
