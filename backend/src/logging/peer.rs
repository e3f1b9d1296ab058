//! Whose lines a thread writes.

use std::cell::Cell;
use std::fmt;

thread_local! {
    static PEER: Cell<Option<Peer>> = const { Cell::new(None) };
}

/// A frontend: a device and the number of the frontend's connection to it, from 1. As text
/// `timer#2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    device: &'static str,
    connection: u64,
}

impl Peer {
    /// The frontend of this connection to the device of this name.
    pub const fn new(device: &'static str, connection: u64) -> Self {
        Peer { device, connection }
    }

    /// Has the lines of the calling thread be this frontend's. To be called where a thread that
    /// serves a peer begins.
    pub fn owns_thread(self) {
        PEER.set(Some(self));
    }

    /// Whose thread the calling one is, where it is a frontend's.
    pub(super) fn of_thread() -> Option<Self> {
        PEER.get()
    }

    pub(super) fn device(self) -> &'static str {
        self.device
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.device, self.connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_lines_are_its_peers_and_no_other_threads() {
        let other = std::thread::spawn(|| {
            Peer::new("clock", 7).owns_thread();
            Peer::of_thread().map(|peer| peer.to_string())
        });
        assert_eq!(other.join().unwrap().as_deref(), Some("clock#7"));
        assert_eq!(Peer::of_thread(), None);
    }
}
