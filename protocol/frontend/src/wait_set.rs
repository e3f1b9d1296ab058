//! What the threads of one queue sleep on, one at a time.
//!
//! An epoll instance knows the descriptors that end a sleep, which costs less than to name them
//! each time. The call eventfd and a timerfd are edge-triggered in it, so that nobody has to read
//! them. And the timerfd is set only where it would go off too late: mostly a deadline is later
//! than the one before, and all of them but the first cost nothing. What it goes off for then is a
//! sleep that ended long ago; somebody wakes for nothing and sets it anew.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::Error;
use crate::error::Failure;
use crate::sys::{io, lock};
use crate::wait::{ConnectionWatch, Deadline, Woken};

/// What the epoll instance says of a descriptor.
const CALL: u64 = 0;
const SHUTDOWN: u64 = 1;
const SOCKET: u64 = 2;
const TIMER: u64 = 3;

/// See the module.
pub(crate) struct WaitSet {
    epoll: OwnedFd,
    timer: OwnedFd,
    armed: Mutex<Armed>,
}

/// For whom the wait_set is armed.
struct Armed {
    /// The number of the connection, and its control socket. It stays open for as long as the epoll
    /// instance knows it: of a closed one that would not tell that it ended.
    connection: u64,
    socket: OwnedFd,
    /// When the timer goes off, where it is set.
    goes_off: Option<Instant>,
}

impl WaitSet {
    /// A wait_set for those who wait for this call eventfd.
    pub(crate) fn new(watch: &ConnectionWatch, call: BorrowedFd<'_>) -> Result<Self, Error> {
        let flags = epoll::CreateFlags::CLOEXEC;
        let epoll = epoll::create(flags).map_err(io("create an epoll instance"))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.map_err(io("create a timerfd"))?;
        let edge = EventFlags::IN | EventFlags::ET;
        add(&epoll, call, CALL, edge)?;
        add(&epoll, timer.as_fd(), TIMER, edge)?;
        add(&epoll, watch.shutdown.as_fd(), SHUTDOWN, EventFlags::IN)?;
        let (connection, socket) = watch.present_socket()?;
        add(&epoll, socket.as_fd(), SOCKET, EventFlags::RDHUP)?;
        Ok(WaitSet {
            epoll,
            timer,
            armed: Mutex::new(Armed {
                connection,
                socket,
                goes_off: None,
            }),
        })
    }

    /// Sleeps until there was a call since the last sleep, the deadline passes or the connection
    /// fails. It may say that there was a call where there was none, and where the deadline has
    /// passed there may have been one.
    pub(crate) fn sleep(
        &self,
        watch: &ConnectionWatch,
        deadline: Deadline,
    ) -> Result<Woken, Error> {
        let mut room = [const { MaybeUninit::uninit() }; 4];
        loop {
            self.make(watch, deadline)?;
            let ready = match epoll::wait(&self.epoll, &mut room, None) {
                Ok((ready, _)) => ready,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(io("wait for the backend")(error)),
            };
            let says = |what| ready.iter().any(|event| event.data.u64() == what);
            let went_off = says(TIMER);
            if went_off {
                // It is told once, whatever else is.
                self.armed().goes_off = None;
            }
            if says(SHUTDOWN) {
                return Ok(Woken::Failed(Failure::ShutDown));
            } else if says(SOCKET) {
                return Ok(Woken::Failed(Failure::Disconnected));
            } else if went_off && deadline.has_passed() {
                // Before the call, of which there may be no end.
                return Ok(Woken::TimedOut);
            } else if says(CALL) {
                return Ok(Woken::Called);
            }
        }
    }

    fn armed(&self) -> MutexGuard<'_, Armed> {
        lock(&self.armed)
    }

    /// Has the wait_set know the present connection's socket, and the timer go off in time.
    fn make(&self, watch: &ConnectionWatch, deadline: Deadline) -> Result<(), Error> {
        let mut armed = self.armed();
        if armed.connection != watch.connection() {
            let (connection, socket) = watch.present_socket()?;
            add(&self.epoll, socket.as_fd(), SOCKET, EventFlags::RDHUP)?;
            let former = std::mem::replace(&mut armed.socket, socket);
            armed.connection = connection;
            epoll::delete(&self.epoll, &former).map_err(io("forget a control socket"))?;
        }
        let Some(at) = deadline.instant() else {
            return Ok(());
        };
        if armed.goes_off.is_none_or(|goes_off| at < goes_off) {
            self.set_timer(at.saturating_duration_since(Instant::now()))?;
            armed.goes_off = Some(at);
        }
        Ok(())
    }

    fn set_timer(&self, after: Duration) -> Result<(), Error> {
        // 0 would disarm it. What does not fit into a `Timespec` does not pass either.
        let after = after.max(Duration::from_nanos(1));
        let Ok(it_value) = Timespec::try_from(after) else {
            return Ok(());
        };
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer)
            .map_err(io("set a timerfd"))?;
        Ok(())
    }
}

fn add(instance: &OwnedFd, fd: BorrowedFd<'_>, what: u64, events: EventFlags) -> Result<(), Error> {
    epoll::add(instance, fd, EventData::new_u64(what), events).map_err(io("watch a descriptor"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::RecvTimeoutError;

    use rustix::event::{PollFd, PollFlags};

    use super::*;
    use crate::ShutdownHandle;
    use crate::sys::{eventfd, poll, signal};

    struct Room {
        watch: ConnectionWatch,
        call: OwnedFd,
        wait_set: WaitSet,
        peer: UnixStream,
    }

    fn room() -> Room {
        let (socket, peer) = UnixStream::pair().unwrap();
        let watch = ConnectionWatch::new(&socket, ShutdownHandle::new().unwrap()).unwrap();
        let call = eventfd().unwrap();
        let wait_set = WaitSet::new(&watch, call.as_fd()).unwrap();
        Room {
            watch,
            call,
            wait_set,
            peer,
        }
    }

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(3);

    #[test]
    fn each_call_ends_one_sleep() {
        let room = room();
        for _ in 0..3 {
            signal(&room.call);
            let woken = room.wait_set.sleep(&room.watch, LONG.into()).unwrap();
            assert_eq!(woken, Woken::Called);
            let woken = room.wait_set.sleep(&room.watch, SHORT.into()).unwrap();
            assert_eq!(woken, Woken::TimedOut);
        }
    }

    /// Has the timer go off, of which nobody was told yet, at that deadline.
    fn went_off(room: &Room) -> Deadline {
        // Sets the timer, and leaves before it goes off.
        let deadline = loop {
            let deadline = Deadline::from(SHORT);
            signal(&room.call);
            if room.wait_set.sleep(&room.watch, deadline).unwrap() == Woken::Called {
                break deadline;
            }
        };
        let mut timer = [PollFd::new(&room.wait_set.timer, PollFlags::IN)];
        poll(&mut timer, Deadline::NEVER).unwrap();
        deadline
    }

    #[test]
    fn deadlines_are_kept_after_one_that_passed_as_the_connection_ended() {
        let mut room = room();
        went_off(&room);
        let (socket, peer) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut room.peer, peer));
        let woken = room.wait_set.sleep(&room.watch, LONG.into()).unwrap();
        assert_eq!(woken, Woken::Failed(Failure::Disconnected));
        room.watch.follow(&socket).unwrap();
        let (done, over) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let call = &room.call;
            scope.spawn(move || {
                // A sleep without end is ended.
                if over.recv_timeout(LONG / 360) == Err(RecvTimeoutError::Timeout) {
                    signal(call);
                }
            });
            let woken = room.wait_set.sleep(&room.watch, SHORT.into());
            drop(done);
            assert_eq!(woken.unwrap(), Woken::TimedOut);
        });
    }

    #[test]
    fn a_call_at_the_deadline_does_not_put_it_off() {
        let room = room();
        let deadline = went_off(&room);
        signal(&room.call);
        let woken = room.wait_set.sleep(&room.watch, deadline).unwrap();
        assert_eq!(woken, Woken::TimedOut);
    }

    #[test]
    fn a_call_eventfd_that_is_full_is_emptied_by_who_signals() {
        let room = room();
        let full = (u64::MAX - 1).to_ne_bytes();
        rustix::io::write(&room.call, &full).unwrap();
        let woken = room.wait_set.sleep(&room.watch, LONG.into()).unwrap();
        assert_eq!(woken, Woken::Called);
        signal(&room.call);
        let woken = room.wait_set.sleep(&room.watch, LONG.into()).unwrap();
        assert_eq!(woken, Woken::Called);
    }

    #[test]
    fn no_sleep_ends_before_its_deadline_nor_much_later_in_whatever_order_they_come() {
        let room = room();
        for deadline in [SHORT, Duration::ZERO, 5 * SHORT, 2 * SHORT] {
            // Leaves the timer set for a later time, and with the next one for an earlier time.
            for before in [LONG, SHORT / 2] {
                signal(&room.call);
                room.wait_set.sleep(&room.watch, before.into()).unwrap();
                let begin = Instant::now();
                let woken = room.wait_set.sleep(&room.watch, deadline.into()).unwrap();
                assert_eq!(woken, Woken::TimedOut);
                assert!(begin.elapsed() >= deadline);
                assert!(begin.elapsed() < LONG / 60);
            }
        }
    }

    #[test]
    fn a_connection_that_ends_ends_sleeps_and_its_successor_s_do_not_begin_so() {
        let Room {
            watch,
            call,
            wait_set,
            peer,
        } = room();
        drop(peer);
        let lost = Woken::Failed(Failure::Disconnected);
        assert_eq!(wait_set.sleep(&watch, LONG.into()).unwrap(), lost);
        let (socket, peer) = UnixStream::pair().unwrap();
        watch.follow(&socket).unwrap();
        drop(socket);
        assert_eq!(
            wait_set.sleep(&watch, SHORT.into()).unwrap(),
            Woken::TimedOut
        );
        signal(&call);
        assert_eq!(wait_set.sleep(&watch, LONG.into()).unwrap(), Woken::Called);
        drop(peer);
        assert_eq!(wait_set.sleep(&watch, LONG.into()).unwrap(), lost);
    }

    #[test]
    fn shutting_down_ends_sleeps() {
        let room = room();
        room.watch.shutdown.shut_down();
        let woken = room.wait_set.sleep(&room.watch, Deadline::NEVER).unwrap();
        assert_eq!(woken, Woken::Failed(Failure::ShutDown));
    }
}
