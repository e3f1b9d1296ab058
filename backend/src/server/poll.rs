//! The loop's epoll instance.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use epoll::{ControlOptions, Event, Events};

/// Something that the loop waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A signal that ends the process.
    Signal,
    /// The VM's status has changed.
    VmChanged,
    /// Something at the endpoint of this index.
    Endpoint(EndpointEvent, usize),
}

/// Something that happens at an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EndpointEvent {
    ConnectionEnded = 1,
    Frontend = 2,
}

const EVENTS: [EndpointEvent; 2] = [EndpointEvent::ConnectionEnded, EndpointEvent::Frontend];

impl Token {
    /// As epoll returns it. A token that is handled first has the smaller number.
    fn data(self) -> u64 {
        match self {
            Token::Signal => 0,
            Token::VmChanged => 1,
            Token::Endpoint(event, endpoint) => u64::from(event as u8) << 32 | endpoint as u64,
        }
    }

    fn of(data: u64) -> Option<Self> {
        let endpoint = (data & u64::from(u32::MAX)) as usize;
        match data >> 32 {
            0 => match endpoint {
                0 => Some(Token::Signal),
                1 => Some(Token::VmChanged),
                _ => None,
            },
            event => EVENTS
                .into_iter()
                .find(|known| u64::from(*known as u8) == event)
                .map(|event| Token::Endpoint(event, endpoint)),
        }
    }
}

#[derive(Debug)]
pub(super) struct Poll(RawFd);

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        epoll::create(true).map(Poll)
    }

    pub(super) fn add(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let event = Event::new(Events::EPOLLIN, token.data());
        epoll::ctl(self.0, ControlOptions::EPOLL_CTL_ADD, fd, event)
    }

    pub(super) fn remove(&self, fd: RawFd) -> io::Result<()> {
        let event = Event::new(Events::empty(), 0);
        epoll::ctl(self.0, ControlOptions::EPOLL_CTL_DEL, fd, event)
    }

    /// Waits for the next event, until a deadline where there is one. Of several, a signal comes
    /// before the rest.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> io::Result<Option<Token>> {
        let mut events = [Event::new(Events::empty(), 0); 16];
        loop {
            let timeout = deadline.map_or(-1, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                // Rounded up: not again and again until then.
                i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
            });
            match epoll::wait(self.0, timeout, &mut events) {
                Ok(0) => return Ok(None),
                Ok(n) => {
                    let first = events.iter().take(n).map(|event| event.data).min();
                    if let Some(token) = first.and_then(Token::of) {
                        return Ok(Some(token));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_its_data_and_a_signal_comes_first() {
        let endpoints = EVENTS.map(|event| Token::Endpoint(event, 1));
        for token in [Token::Signal, Token::VmChanged]
            .into_iter()
            .chain(endpoints)
        {
            assert_eq!(Token::of(token.data()), Some(token));
            assert!(Token::Signal.data() <= token.data());
        }
        assert_eq!(Token::of(2), None);
        assert_eq!(Token::of(3 << 32), None);
    }
}
