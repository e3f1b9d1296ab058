//! The epoll set on which a queue's leading thread sleeps.
//!
//! The epoll instance holds the descriptors that end a sleep, which is cheaper than naming them
//! each time. The call eventfd and the timerfd are edge-triggered, so nobody has to read them. The
//! timerfd is set only if it would otherwise fire too late. Deadlines mostly increase, so most of
//! them cost nothing. The timer may then fire for a wait that is already over; the thread it wakes
//! re-arms it.

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

/// What the epoll instance reports for each descriptor.
const CALL: u64 = 0;
const SHUTDOWN: u64 = 1;
const SOCKET: u64 = 2;
const TIMER: u64 = 3;

/// See the module's documentation.
pub(crate) struct WaitSet {
    epoll: OwnedFd,
    timer: OwnedFd,
    armed: Mutex<Armed>,
}

/// The connection and the deadline that the set is armed for.
struct Armed {
    /// The connection's number and its control socket. The socket stays open while it is in the
    /// epoll instance, which does not report the end of a closed one.
    connection: u64,
    socket: OwnedFd,
    /// When the timer fires, if it is set.
    fires_at: Option<Instant>,
}

impl WaitSet {
    /// A set for threads that wait for this call eventfd.
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
                fires_at: None,
            }),
        })
    }

    /// Sleeps until the call eventfd is signalled (also if it was since the last sleep), the
    /// deadline passes, or the connection fails. A reported call may be spurious, and at the
    /// deadline there may have been one.
    pub(crate) fn sleep(
        &self,
        watch: &ConnectionWatch,
        deadline: Deadline,
    ) -> Result<Woken, Error> {
        let mut room = [const { MaybeUninit::uninit() }; 4];
        loop {
            self.arm(watch, deadline)?;
            let ready = match epoll::wait(&self.epoll, &mut room, None) {
                Ok((ready, _)) => ready,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(io("wait for the backend")(error)),
            };
            let says = |what| ready.iter().any(|event| event.data.u64() == what);
            let fired = says(TIMER);
            if fired {
                // Edge-triggered: reported once, whatever else is reported with it.
                self.armed().fires_at = None;
            }
            if says(SHUTDOWN) {
                return Ok(Woken::Failed(Failure::ShutDown));
            } else if says(SOCKET) {
                return Ok(Woken::Failed(Failure::Disconnected));
            } else if fired && deadline.has_passed() {
                // Checked before the call: calls may come without end.
                return Ok(Woken::TimedOut);
            } else if says(CALL) {
                return Ok(Woken::Called);
            }
        }
    }

    fn armed(&self) -> MutexGuard<'_, Armed> {
        lock(&self.armed)
    }

    /// Puts the current connection's socket into the set, and sets the timer if need be.
    fn arm(&self, watch: &ConnectionWatch, deadline: Deadline) -> Result<(), Error> {
        let mut armed = self.armed();
        if armed.connection != watch.connection() {
            let (connection, socket) = watch.present_socket()?;
            add(&self.epoll, socket.as_fd(), SOCKET, EventFlags::RDHUP)?;
            let previous = std::mem::replace(&mut armed.socket, socket);
            armed.connection = connection;
            epoll::delete(&self.epoll, &previous).map_err(io("forget a control socket"))?;
        }
        let Some(at) = deadline.instant() else {
            return Ok(());
        };
        if armed.fires_at.is_none_or(|fires_at| at < fires_at) {
            self.set_timer(at.saturating_duration_since(Instant::now()))?;
            armed.fires_at = Some(at);
        }
        Ok(())
    }

    fn set_timer(&self, after: Duration) -> Result<(), Error> {
        // 0 would disarm the timer. A time beyond `Timespec` never comes.
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

    /// Lets the timer fire at that deadline, without reporting it to any sleep.
    fn fired(room: &Room) -> Deadline {
        // Sets the timer, and returns before it fires.
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
        fired(&room);
        let (socket, peer) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut room.peer, peer));
        let woken = room.wait_set.sleep(&room.watch, LONG.into()).unwrap();
        assert_eq!(woken, Woken::Failed(Failure::Disconnected));
        room.watch.follow(&socket).unwrap();
        let (done, over) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let call = &room.call;
            scope.spawn(move || {
                // Ends a sleep that would otherwise be endless.
                if over.recv_timeout(LONG / 120) == Err(RecvTimeoutError::Timeout) {
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
        let deadline = fired(&room);
        signal(&room.call);
        let woken = room.wait_set.sleep(&room.watch, deadline).unwrap();
        assert_eq!(woken, Woken::TimedOut);
    }

    #[test]
    fn a_call_eventfd_that_is_full_is_emptied_when_it_is_signalled() {
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
    fn a_connection_that_ends_ends_sleeps_and_the_next_connections_sleeps_do_not_end_at_once() {
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
