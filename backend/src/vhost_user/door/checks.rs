//! What a message must be to be passed on, and how a refused one is answered.
//!
//! The crate ends the connection on any error, and often acts before it finds one. What is found
//! here has changed nothing: the frontend learns that its message is refused, and continues with
//! what it had.

use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use crate::vhost_user::door::message::{Header, Message, is_always_answered, most_descriptors};
use crate::vhost_user::door::rings::{Region, check_ring};
use crate::vhost_user::door::{
    Direction, Limits, Refusal, SHARE_ON, check_eventfd, check_log, check_pipe, check_region,
};

/// The part of a SET_VRING_KICK, _CALL or _ERR that says that it carries no descriptor.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// Bits 0 to 7 of SET_DEVICE_STATE_FD's reply: an error; bit 8: no descriptor comes back.
const STATE_REFUSED: u64 = 0x101;

/// What the checks know of a connection.
pub(super) struct Checks {
    limits: Limits,
    /// Regions that the frontend shares. Exact: an error of the crate ends the connection.
    regions: Vec<Region>,
    /// As the crate knows it: GET_FEATURES was answered.
    asked_features: bool,
    reply_ack: bool,
}

/// What becomes of a message that is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The frontend gets this, and the connection continues.
    Answered(Vec<u8>),
    /// There is no way to tell the frontend but to end the connection.
    Ends,
}

impl Checks {
    pub(super) fn new(limits: Limits) -> Self {
        Checks {
            limits,
            regions: Vec::new(),
            asked_features: false,
            reply_ack: false,
        }
    }

    /// Checks a message that is about to be passed on, and closes descriptors that it need not
    /// have. True where the crate answers it.
    ///
    /// # Errors
    ///
    /// What is wrong with it. Then nothing of it counts.
    pub(super) fn admit(&mut self, message: &mut Message) -> Result<bool, Refusal> {
        let Header {
            request,
            needs_reply,
            ..
        } = message.header;
        let (found, most) = (message.descriptors.len(), most_descriptors(request));
        if found > most {
            return Err(Refusal(format!(
                "it carries {found} descriptors; send {most} at most"
            )));
        }
        check_ring(message, &self.limits, &self.regions)?;
        match request {
            FrontendReq::SET_MEM_TABLE => self.regions = self.check_table(message)?,
            FrontendReq::ADD_MEM_REG => {
                // Padding, guest address, length, user address, offset in the file.
                let [_, guest, len, user, offset] = message.u64s()?;
                self.check_count(self.regions.len() + 1)?;
                check_region(the_descriptor(message)?, offset, len)?;
                self.regions.push(Region { guest, len, user });
            }
            FrontendReq::REM_MEM_REG => {
                message.descriptors.clear();
                // One that the frontend does not share ends the connection.
                let [_, guest, ..] = message.u64s::<5>()?;
                self.regions.retain(|region| region.guest != guest);
            }
            FrontendReq::SET_LOG_BASE => {
                let [len, offset] = message.u64s()?;
                check_log(the_descriptor(message)?, offset, len)?;
            }
            FrontendReq::SET_VRING_KICK if carries_none(message)? => {
                return Err(Refusal(
                    "it carries no descriptor, and rings are not polled for a driver that never \
                     kicks; send an eventfd"
                        .to_owned(),
                ));
            }
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
                if !carries_none(message)? =>
            {
                check_eventfd(the_descriptor(message)?)?;
            }
            FrontendReq::SET_DEVICE_STATE_FD => {
                let [direction, _phase] = message.u32s()?;
                let direction = match direction {
                    0 => Direction::Write,
                    1 => Direction::Read,
                    _ => {
                        return Err(Refusal(format!(
                            "transfer direction {direction} is unknown; send 0 to save or 1 to load"
                        )));
                    }
                };
                check_pipe(the_descriptor(message)?, direction)?;
            }
            FrontendReq::GET_FEATURES => self.asked_features = true,
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let [features] = message.u64s()?;
                self.reply_ack = features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
            }
            _ => {}
        }
        Ok(self.is_answered(request, needs_reply))
    }

    /// How a message that is not passed on is answered.
    pub(super) fn refuse(&self, header: Header) -> Refused {
        let Header {
            request,
            needs_reply,
            ..
        } = header;
        if request == FrontendReq::SET_DEVICE_STATE_FD {
            Refused::Answered(Header::reply(request, STATE_REFUSED))
        } else if !is_always_answered(request) && self.is_answered(request, needs_reply) {
            Refused::Answered(Header::reply(request, 1))
        } else {
            Refused::Ends
        }
    }

    /// What the frontend reads in place of the crate's reply, where that would not be right.
    pub(super) fn correct(&self, request: FrontendReq) -> Option<Vec<u8>> {
        (request == FrontendReq::GET_MAX_MEM_SLOTS)
            .then(|| Header::reply(request, self.limits.regions as u64))
    }

    /// As the crate decides it, to the letter: a reply is waited for before the next message.
    fn is_answered(&self, request: FrontendReq, needs_reply: bool) -> bool {
        is_always_answered(request) || needs_reply && self.asked_features && self.reply_ack
    }

    /// Checks the regions of a SET_MEM_TABLE.
    fn check_table(&self, message: &Message) -> Result<Vec<Region>, Refusal> {
        // The number of regions, padding, and four 64-bit numbers a region.
        let (words, _) = message.body().as_chunks();
        let regions = words.first().map_or(0, |word| u32::from_ne_bytes(*word)) as usize;
        let (len, descriptors) = (message.body().len(), message.descriptors.len());
        if regions == 0 {
            return Err(Refusal(format!("it shares no memory; {SHARE_ON}")));
        }
        if regions.checked_mul(32) != len.checked_sub(8) || regions != descriptors {
            return Err(Refusal(format!(
                "it names {regions} regions in {len} bytes and {descriptors} descriptors; send \
                 each region with its descriptor, at least one"
            )));
        }
        self.check_count(regions)?;
        let mut shared = Vec::with_capacity(regions);
        for (region, file) in regions_of(message).zip(message.descriptors.iter()) {
            let [guest, len, user, offset] = region;
            check_region(file, offset, len)?;
            shared.push(Region { guest, len, user });
        }
        Ok(shared)
    }

    fn check_count(&self, regions: usize) -> Result<(), Refusal> {
        let most = self.limits.regions;
        if regions <= most {
            return Ok(());
        }
        Err(Refusal(format!(
            "it would share {regions} memory regions; share at most {most}, as GET_MAX_MEM_SLOTS \
             says"
        )))
    }
}

/// The regions of a SET_MEM_TABLE, which follow 8 bytes: guest address, length, user address,
/// offset in the file.
fn regions_of(message: &Message) -> impl Iterator<Item = [u64; 4]> {
    let regions = message.body().get(8..).unwrap_or_default();
    let (regions, _) = regions.as_chunks::<8>().0.as_chunks::<4>();
    regions.iter().map(|region| region.map(u64::from_ne_bytes))
}

/// Whether a message for a ring's descriptor says that there is none.
fn carries_none(message: &Message) -> Result<bool, Refusal> {
    let [queue] = message.u64s()?;
    Ok(queue & NO_DESCRIPTOR != 0)
}

fn the_descriptor(message: &Message) -> Result<BorrowedFd<'_>, Refusal> {
    message
        .descriptor()
        .ok_or_else(|| Refusal("it carries no descriptor; send one".to_owned()))
}
