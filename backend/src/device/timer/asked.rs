//! What a request asks for, as the log says it.

use std::fmt;

use vhost_user_timer_model::vm::Incoming;
use vhost_user_timer_protocol::op::{Body, Op};
use vhost_user_timer_protocol::wire::{self, configure_flags, request_flags, restore_flags};
use vhost_user_timer_protocol::{Phase, Request, VM_WIDE};
use zerocopy::FromBytes;

/// What a request asks for: `SET_REGS of vCPU 3 with DONE`.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) incoming: &'a Incoming<'a>,
}

impl Asked<'_> {
    pub(super) fn header(&self) -> Option<wire::RequestHeader> {
        let header = wire::RequestHeader::read_from_prefix(self.bytes);
        header.ok().map(|(header, _)| header)
    }
}

impl fmt::Display for Asked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(header) = self.header() else {
            return write!(f, "A request of {} bytes", self.bytes.len());
        };
        write!(f, "{}", Op::from(header.op.get()))?;
        if header.vcpu.get() != VM_WIDE {
            write!(f, " of vCPU {}", header.vcpu)?;
        }
        let mut flags = Flags::default();
        flags.add(
            header.flags.get().into(),
            &[(request_flags::DONE.into(), "DONE")],
        );
        if let Ok(request) = &self.incoming.request {
            flags.add_of(request);
        }
        write!(f, "{flags}")?;
        match header.epoch.get() {
            0 => Ok(()),
            epoch => write!(f, " in epoch {epoch}"),
        }
    }
}

/// Flags by name, those of the header first.
#[derive(Default)]
struct Flags(Vec<String>);

impl Flags {
    fn add_of(&mut self, request: &Request<'_>) {
        match request.body {
            Body::ConfigureVm(body) => self.add(
                body.flags.into(),
                &[
                    (configure_flags::CONFIRM.into(), "CONFIRM"),
                    (configure_flags::ONE_OFFSET.into(), "ONE_OFFSET"),
                ],
            ),
            Body::Pause(body) if body.keeps_counting() => self.add(1, &[(1, "KEEP_COUNTING")]),
            Body::RestoreBegin(body) => self.add(
                body.flags.get(),
                &[
                    (restore_flags::AUTORUN, "AUTORUN"),
                    (restore_flags::STRICT, "STRICT"),
                    (restore_flags::ELAPSED, "ELAPSED"),
                ],
            ),
            _ => {}
        }
    }

    fn add(&mut self, bits: u32, names: &[(u32, &str)]) {
        let mut rest = bits;
        for (bit, name) in names.iter().filter(|(bit, _)| bits & bit != 0) {
            self.0.push((*name).to_owned());
            rest &= !bit;
        }
        if rest != 0 {
            self.0.push(format!("unknown flags {rest:#x}"));
        }
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [] => Ok(()),
            flags => write!(f, " with {}", flags.join(", ")),
        }
    }
}

/// `RESTORING with 3 of 8 vCPUs missing`.
pub(super) fn phase_of(info: &wire::Info) -> String {
    let Some(phase) = Phase::from_code(info.phase.get()) else {
        return String::new();
    };
    let vcpus = info.vcpus.get();
    let missing = vcpus.saturating_sub(info.restored.get());
    match phase {
        Phase::Restoring => format!("{phase} with {missing} of {vcpus} vCPUs missing"),
        phase => phase.to_string(),
    }
}
