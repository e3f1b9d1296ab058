//! What can happen next.

use std::fmt;

/// One step of the world.
///
/// A request whose content does not depend on when it is made is never queued here: delaying it
/// and making it later are the same. Queued are requests that depend on what their thread knew
/// when it made them: the epoch that they name, or the registers that they bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The host counter advances.
    Tick,
    /// A vCPU's thread wants to run. If its registers are missing, it brings them first.
    Enter(u32),
    /// A thread of the VMM brings the registers of a vCPU whose own thread waits.
    BringFor {
        /// Which thread of the VMM.
        thread: u32,
        /// For which vCPU.
        vcpu: u32,
    },
    /// The backend serves the next request of a queue.
    Serve(usize),
    /// The backend serves the request and is killed before anyone sees an answer. Another backend
    /// takes over, and what was not answered is submitted again.
    ServeAndDie(usize),
    /// The VMM does something, and the backend serves it.
    Vmm(Deed),
    /// The same, and the backend is killed before anyone sees an answer.
    VmmAndDie(Deed),
    /// The VMM reads the offsets of the armed VM, puts them into its hypervisor, and is about to
    /// confirm them. It has one thread for that: two could overtake each other.
    Apply,
    /// The alarm expires, and the frontend takes all events.
    TakeEvents,
    /// The frontend stops the queue of a vCPU that waits, and starts it again.
    StopQueue(u32),
    /// The connection ends, and another is made. What was not answered is lost with it, or
    /// submitted again.
    Reconnect {
        /// Nothing is submitted again.
        lost: bool,
    },
    /// The backend ends as well, and another resumes from its state file.
    Restart {
        /// Nothing is submitted again.
        lost: bool,
    },
}

/// What the VMM does, in any phase, because it cannot know the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// PAUSE.
    Pause {
        /// KEEP_COUNTING.
        keep_counting: bool,
    },
    /// RESUME.
    Resume,
    /// RESTORE_BEGIN.
    Begin {
        /// AUTORUN; a restore without it has a time-out.
        autorun: bool,
    },
    /// RESTORE_ABORT.
    Abort,
    /// SET_COUNTER_OFFSET.
    SetOffset,
    /// SET_REGS of the first vCPU's TIMER_CNT.
    SetCount(u64),
    /// SET_REGS of a vCPU's TIMER_CTL and TIMER_CVAL.
    SetTimer(u32),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = |lost| {
            if lost {
                "what was in flight is lost"
            } else {
                "what was in flight is submitted again"
            }
        };
        match *self {
            Action::Tick => write!(f, "time passes"),
            Action::Enter(vcpu) => write!(f, "vCPU {vcpu} wants to run"),
            Action::BringFor { thread, vcpu } => {
                write!(f, "VMM thread {thread} brings the registers of vCPU {vcpu}")
            }
            Action::Serve(queue) => write!(f, "queue {queue} is served"),
            Action::ServeAndDie(queue) => write!(f, "queue {queue} is served, then a kill"),
            Action::Vmm(deed) => write!(f, "{deed:?}"),
            Action::VmmAndDie(deed) => write!(f, "{deed:?} is served, then a kill"),
            Action::Apply => write!(f, "the VMM puts the offsets into its hypervisor"),
            Action::TakeEvents => write!(f, "the frontend takes all events"),
            Action::StopQueue(vcpu) => write!(f, "the queue of vCPU {vcpu} is stopped"),
            Action::Reconnect { lost } => write!(f, "the frontend reconnects; {}", kept(lost)),
            Action::Restart { lost } => {
                write!(f, "the backend is killed and restarts; {}", kept(lost))
            }
        }
    }
}
