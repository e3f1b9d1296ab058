//! The loop's epoll instance.

use std::io;
use std::os::fd::RawFd;

use epoll::{ControlOptions, Event, Events};

use super::Token;

#[derive(Debug)]
pub(super) struct Poll(RawFd);

const TOKENS: [Token; 4] = [
    Token::Signal,
    Token::ConnectionEnded,
    Token::WorkerEnded,
    Token::Frontend,
];

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        epoll::create(true).map(Poll)
    }

    pub(super) fn add(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let data = TOKENS
            .iter()
            .position(|known| *known == token)
            .unwrap_or_default();
        let event = Event::new(Events::EPOLLIN, data as u64);
        epoll::ctl(self.0, ControlOptions::EPOLL_CTL_ADD, fd, event)
    }

    pub(super) fn remove(&self, fd: RawFd) -> io::Result<()> {
        let event = Event::new(Events::empty(), 0);
        epoll::ctl(self.0, ControlOptions::EPOLL_CTL_DEL, fd, event)
    }

    /// The next thing that happened. With several, a signal comes before the rest.
    pub(super) fn wait(&self) -> io::Result<Token> {
        let mut events = [Event::new(Events::empty(), 0); TOKENS.len()];
        loop {
            match epoll::wait(self.0, -1, &mut events) {
                Ok(n) => {
                    let first = events.iter().take(n).map(|event| event.data).min();
                    let token = first.and_then(|data| TOKENS.get(data as usize));
                    if let Some(token) = token {
                        return Ok(*token);
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
