//! The floor, the best that two processes can do: a server that does nothing but answer.
//!
//! The server is another process of this program. Its descriptors 0, 1 and 2 are the shared memory
//! and the two eventfds.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

const SIZE: usize = 4096;
/// A cache line each, so that the two sides do not share one.
const ASKED: usize = 0;
const ANSWERED: usize = 64;
const DEADLINE: usize = 128;

/// How the server learns of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// By an eventfd in its epoll instance.
    Events,
    /// By polling shared memory without end.
    Spin,
}

struct Shared(MmapRegion);

impl Shared {
    fn map(file: File) -> io::Result<Self> {
        let region = MmapRegion::from_file(FileOffset::new(file, 0), SIZE);
        region.map(Shared).map_err(io::Error::other)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        let word = self.0.get_atomic_ref(offset);
        word.expect("an aligned offset in the page")
    }
}

/// The server, and the client's end.
pub(super) struct Floor {
    server: Child,
    shared: Shared,
    kick: OwnedFd,
    call: OwnedFd,
    asked: u64,
}

fn signal(fd: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::write(fd, &1_u64.to_ne_bytes())?;
    Ok(())
}

fn take(fd: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::read(fd, &mut [0; 8])?;
    Ok(())
}

impl Floor {
    /// Starts a server.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn launch(kind: Kind) -> io::Result<Self> {
        let file = File::from(memfd_create("floor", MemfdFlags::CLOEXEC)?);
        file.set_len(SIZE as u64)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
        let call = eventfd(0, EventfdFlags::CLOEXEC)?;
        let name = match kind {
            Kind::Events => "events",
            Kind::Spin => "spin",
        };
        let server = Command::new(std::env::current_exe()?)
            .args(["--floor", name])
            .stdin(file.try_clone()?)
            .stdout(Stdio::from(kick.try_clone()?))
            .stderr(Stdio::from(call.try_clone()?))
            .spawn()?;
        Ok(Floor {
            server,
            shared: Shared::map(file)?,
            kick,
            call,
            asked: 0,
        })
    }

    /// The server's process id.
    pub(super) fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Wakes the server and sleeps until it answers.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn round_trip(&self) -> io::Result<()> {
        signal(self.kick.as_fd())?;
        take(self.call.as_fd())
    }

    /// Asks a server that polls, and polls for its answer.
    pub(super) fn spin(&mut self) {
        self.asked += 1;
        self.shared.word(ASKED).store(self.asked, Ordering::Release);
        while self.shared.word(ANSWERED).load(Ordering::Acquire) != self.asked {
            std::hint::spin_loop();
        }
    }

    /// Has the server set its timer, and sleeps until the timer expires.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub(super) fn alarm(&self, deadline_ns: u64) -> io::Result<()> {
        self.shared
            .word(DEADLINE)
            .store(deadline_ns, Ordering::Release);
        self.round_trip()
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The server. It ends with its client's process.
///
/// # Errors
///
/// Errors of the system.
pub(super) fn serve(kind: Kind) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let memory = rustix::stdio::stdin().try_clone_to_owned()?;
    let shared = Shared::map(File::from(memory))?;
    match kind {
        Kind::Spin => spin(&shared),
        Kind::Events => events(&shared),
    }
}

fn spin(shared: &Shared) -> io::Result<()> {
    let mut last = 0;
    loop {
        let asked = shared.word(ASKED).load(Ordering::Acquire);
        if asked != last {
            last = asked;
            shared.word(ANSWERED).store(asked, Ordering::Release);
        }
        std::hint::spin_loop();
    }
}

fn events(shared: &Shared) -> io::Result<()> {
    let (kick, call) = (rustix::stdio::stdout(), rustix::stdio::stderr());
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (n, fd) in [(0, kick), (1, timer.as_fd())] {
        epoll::add(
            &poll,
            fd,
            epoll::EventData::new_u64(n),
            epoll::EventFlags::IN,
        )?;
    }
    let mut ready = Vec::with_capacity(2);
    loop {
        ready.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut ready), None)?;
        for event in &ready {
            if event.data.u64() == 0 {
                take(kick)?;
                let deadline = shared.word(DEADLINE).swap(0, Ordering::Acquire);
                if deadline != 0 {
                    set(&timer, deadline)?;
                    continue;
                }
            } else {
                take(timer.as_fd())?;
            }
            signal(call)?;
        }
    }
}

fn set(timer: &OwnedFd, deadline_ns: u64) -> io::Result<()> {
    let at = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: (deadline_ns / 1_000_000_000) as i64,
            tv_nsec: (deadline_ns % 1_000_000_000) as i64,
        },
    };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &at)?;
    Ok(())
}
