//! What the log says of requests: at debug each change and each refusal with its reason, at trace
//! every request with its answer.

use std::fmt;
use std::time::Instant;

use log::LevelFilter;
use vhost_user_timer_model::vm::{Incoming, Now, Vm};
use vhost_user_timer_protocol::counter::NS_PER_SEC;
use vhost_user_timer_protocol::op::Body;
use vhost_user_timer_protocol::wire::restore_flags;
use vhost_user_timer_protocol::{Status, wire};
use zerocopy::FromBytes;

use crate::device::timer::asked::{Asked, phase_of};
use crate::device::timer::refused::Reason;

/// Whether the log says anything of requests. One load.
#[inline]
pub(super) fn is_wanted() -> bool {
    log::max_level() >= LevelFilter::Debug
}

/// A span of ELAPSED that no migration and few snapshots have: a year.
const LONG_NS: u64 = 366 * 24 * 3600 * NS_PER_SEC;

/// Says by how much a restore that was begun with ELAPSED moves the guest's counts.
pub(super) fn elapsed(incoming: &Incoming<'_>, realtime_ns: u64) {
    let Ok(Body::RestoreBegin(begin)) = incoming.request.map(|request| request.body) else {
        return;
    };
    if begin.flags.get() & restore_flags::ELAPSED == 0 {
        return;
    }
    let saved = begin.saved_realtime_ns.get();
    // The model says where the clock went back.
    let Some(passed) = realtime_ns.checked_sub(saved) else {
        return;
    };
    let (days, seconds) = (passed / NS_PER_SEC / 86_400, passed / NS_PER_SEC % 86_400);
    let span = format!("{days} days and {seconds} s");
    if passed < LONG_NS {
        log::info!("Restore with ELAPSED: {span} since the save are added to the guest's counts");
    } else {
        log::warn!(
            "Restore with ELAPSED: {span} since the save are added to the guest's counts; if that \
             is wrong, send saved_realtime_ns as CLOCK_REALTIME of the save, not {saved}"
        );
    }
}

/// A request of which the log will say what became.
pub(super) struct Told {
    before: wire::Info,
    /// When it began, where every request is told.
    began: Option<Instant>,
}

impl Told {
    #[cold]
    pub(super) fn new(vm: &Vm, now: Now) -> Self {
        let all = log::max_level() >= LevelFilter::Trace;
        Told {
            before: vm.info(now),
            began: all.then(Instant::now),
        }
    }

    /// Says what became of the request: it has this answer, or waits for one.
    #[cold]
    pub(super) fn tell(
        self,
        vm: &Vm,
        now: Now,
        bytes: &[u8],
        incoming: &Incoming<'_>,
        answer: Option<&[u8]>,
    ) {
        let asked = Asked { bytes, incoming };
        let Some(answer) = answer else {
            log::trace!("{asked}: {} bytes, waits", bytes.len());
            return;
        };
        let Ok((header, _)) = wire::ResponseHeader::read_from_prefix(answer) else {
            return;
        };
        let (status, detail) = (Status::from(header.status.get()), header.detail.get());
        if let Some(began) = self.began {
            log::trace!(
                "{asked}: {} bytes, answered {} detail {detail}, {} bytes, after {} us",
                bytes.len(),
                status.name(),
                answer.len(),
                began.elapsed().as_micros()
            );
        }
        if status != Status::Ok {
            let reason = Reason {
                asked,
                status,
                detail,
                vm,
                info: &self.before,
            };
            log::debug!("{asked} is refused: {}: {reason}", status.name());
        } else if incoming.effect().changes_anything() {
            let change = Change {
                before: &self.before,
                after: vm.info(now),
            };
            log::debug!("{asked}: {change}");
        }
    }
}

/// The VM after an operation: its phase and epoch, and the offsets where they changed.
struct Change<'a> {
    before: &'a wire::Info,
    after: wire::Info,
}

impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { before, after } = self;
        write!(f, "{}, epoch {}", phase_of(after), after.epoch)?;
        let offsets = [
            ("CNTVOFF", before.cntvoff, after.cntvoff),
            ("CNTPOFF", before.cntpoff, after.cntpoff),
        ];
        for (name, before, after) in offsets.iter().filter(|(_, before, after)| before != after) {
            write!(f, ", {name} {:#x} -> {:#x}", before.get(), after.get())?;
        }
        Ok(())
    }
}
