//! Serves a connected socket by a crate that only accepts connections.
//!
//! `vhost-user-backend` accepts frontends at a listening socket and nothing else. Behind a
//! connected socket, such as one end of a socket pair, this puts a listening socket at which one
//! connection arrives: a relay of the messages and descriptors. Control messages are few, and the
//! rings do not go through the relay.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// More descriptors than any vhost-user message carries (VHOST_MEMORY_BASELINE_NREGIONS is 8;
/// `vhost` takes 32).
const MAX_FDS: usize = 32;

/// A message's header: request, flags and the length of what follows, 32 bits each (QEMU,
/// docs/interop/vhost-user.rst, "Header"), in the host's byte order.
const HEADER: usize = 12;

/// More than any message has; `vhost` takes 4 KiB.
const LONGEST_BODY: usize = 16 * 1024;

/// A listening socket at which the peer of `stream` arrives, and no other frontend.
pub(crate) fn listen_for(stream: UnixStream) -> io::Result<UnixListener> {
    // In a folder that only this user can enter, and only until the relay is connected.
    let folder = tempfile::Builder::new()
        .prefix("vhost-user-timer-")
        .tempdir()?;
    let path = folder.path().join("relay");
    let listener = UnixListener::bind(&path)?;
    let inner = UnixStream::connect(&path)?;
    folder.close()?;

    let (outer_back, inner_back) = (stream.try_clone()?, inner.try_clone()?);
    spawn("relay-in", stream, inner)?;
    spawn("relay-out", inner_back, outer_back)?;
    Ok(listener)
}

fn spawn(name: &str, from: UnixStream, to: UnixStream) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if let Err(error) = pump(&from, &to) {
                log::debug!("Relaying the connected socket ended: {error}");
            }
            // The end of either direction ends the connection.
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        })
        .map(drop)
}

/// Passes messages on, each with the descriptors that came with it, until the end.
///
/// Message by message: a read past the end of a message also receives the descriptors of the next
/// one (unix(7), SCM_RIGHTS), which would then arrive with the wrong message.
fn pump(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut message = vec![0; HEADER + LONGEST_BODY];
    loop {
        let mut fds = Vec::new();
        let (header, body) = message.split_at_mut(HEADER);
        if !receive(from, header, &mut fds)? {
            return Ok(());
        }
        let len = header
            .last_chunk()
            .map_or(0, |len| u32::from_ne_bytes(*len)) as usize;
        let Some(body) = body.get_mut(..len) else {
            return Err(io::Error::other("a message is longer than any valid one"));
        };
        if !receive(from, body, &mut fds)? {
            return Ok(());
        }
        send(to, message.get(..HEADER + len).unwrap_or_default(), &fds)?;
    }
}

/// Fills `bytes`, and adds the descriptors that come with them. False where the stream ends
/// before.
fn receive(from: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut rest = bytes;
    while !rest.is_empty() {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(rest)];
        let received = match recvmsg(from, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received?,
        };
        if received.bytes == 0 {
            return Ok(false);
        }
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        rest = rest.get_mut(received.bytes..).unwrap_or_default();
    }
    Ok(true)
}

fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut fds = borrowed.as_slice();
    let mut rest = bytes;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    while !rest.is_empty() {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("more descriptors than a message carries"));
        }
        let iov = [IoSlice::new(rest)];
        match sendmsg(to, &iov, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => {
                rest = rest.get(sent?..).unwrap_or_default();
                // The descriptors were sent with the first byte.
                fds = &[];
            }
        }
    }
    Ok(())
}
