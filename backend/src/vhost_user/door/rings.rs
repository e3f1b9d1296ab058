//! Whether a message about a ring can be carried out: its queue, its numbers, its addresses. The
//! crate answers all that is wrong with "invalid parameters", and ends the connection.

use vhost::vhost_user::message::FrontendReq;

use crate::vhost_user::door::message::Message;
use crate::vhost_user::door::{Limits, Refusal, SHARE_ON};

/// The queue of a SET_VRING_KICK, _CALL or _ERR.
const QUEUE: u64 = 0xff;

/// A memory region that the frontend shares.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    /// Where the guest has it.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Where the frontend has it: the addresses of rings.
    pub(super) user: u64,
}

/// Checks a message, where it is about a ring.
///
/// # Errors
///
/// Which value is wrong, and what would be right.
pub(super) fn check_ring(
    message: &Message,
    limits: &Limits,
    regions: &[Region],
) -> Result<(), Refusal> {
    match message.header.request {
        FrontendReq::SET_VRING_NUM => {
            let [queue, size] = message.u32s()?;
            check_queue(queue.into(), limits)?;
            check_size(queue, size, limits)
        }
        FrontendReq::SET_VRING_BASE => {
            let [queue, base] = message.u32s()?;
            check_queue(queue.into(), limits)?;
            match u16::try_from(base) {
                Ok(_) => Ok(()),
                Err(_) => Err(Refusal(format!(
                    "queue {queue} would start at index {base}; a split ring's is 0 to 65535"
                ))),
            }
        }
        FrontendReq::GET_VRING_BASE => {
            let [queue, _] = message.u32s()?;
            check_queue(queue.into(), limits)
        }
        FrontendReq::SET_VRING_ENABLE => {
            let [queue, enable] = message.u32s()?;
            check_queue(queue.into(), limits)?;
            match enable {
                0 | 1 => Ok(()),
                _ => Err(Refusal(format!(
                    "queue {queue} would be set to {enable}; send 1 to enable and 0 to disable it"
                ))),
            }
        }
        FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
            let [queue] = message.u64s()?;
            check_queue(queue & QUEUE, limits)
        }
        FrontendReq::SET_VRING_ADDR => check_addresses(message, limits, regions),
        _ => Ok(()),
    }
}

fn check_queue(queue: u64, limits: &Limits) -> Result<(), Refusal> {
    let queues = limits.queues;
    if queue < queues.into() {
        return Ok(());
    }
    Err(Refusal(format!(
        "there is no queue {queue}; the device has {queues}, from 0 on"
    )))
}

fn check_size(queue: u32, size: u32, limits: &Limits) -> Result<(), Refusal> {
    let most = limits.queue_size;
    if size.is_power_of_two() && size <= most.into() {
        return Ok(());
    }
    Err(Refusal(format!(
        "queue {queue} would have {size} descriptors; send a power of two up to {most}"
    )))
}

fn check_addresses(message: &Message, limits: &Limits, regions: &[Region]) -> Result<(), Refusal> {
    let [queue, ..] = message.u32s::<10>()?;
    let [_, descriptors, used, available, _log] = message.u64s()?;
    check_queue(queue.into(), limits)?;
    if regions.is_empty() {
        return Err(Refusal(format!(
            "queue {queue} would be in memory, of which none is shared; {SHARE_ON}"
        )));
    }
    // Alignments of virtio 1.4 §2.7.
    for (part, at, alignment) in [
        ("descriptor table", descriptors, 16),
        ("available ring", available, 2),
        ("used ring", used, 4),
    ] {
        let within = |region: &Region| at.wrapping_sub(region.user) < region.len;
        if !at.is_multiple_of(alignment) {
            return Err(Refusal(format!(
                "queue {queue}'s {part} is at {at:#x}; send a multiple of {alignment}"
            )));
        }
        if !regions.iter().any(within) {
            let shared: Vec<_> = regions
                .iter()
                .take(SHOWN)
                .map(ToString::to_string)
                .collect();
            let more = match regions.len().saturating_sub(SHOWN) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            return Err(Refusal(format!(
                "queue {queue}'s {part} is at {at:#x}, in no region that is shared ({}{more}); \
                 send addresses as SET_MEM_TABLE has them (userspace address)",
                shared.join(", ")
            )));
        }
    }
    Ok(())
}

/// How many regions an error shows.
const SHOWN: usize = 4;

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} bytes at {:#x}", self.len, self.user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::door::closing::PeerFds;
    use crate::vhost_user::door::message::{HEADER, Header};
    use crate::vhost_user::door::{AFTERMATH, MESSAGE};
    use FrontendReq as Req;

    fn u64s(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|it| it.to_ne_bytes()).collect()
    }

    #[test]
    fn a_message_about_a_ring_is_refused_by_what_is_wrong_with_it() {
        let limits = Limits {
            regions: 3,
            queue_size: 1024,
            queues: 3,
            message: MESSAGE,
            aftermath: AFTERMATH,
        };
        let shared = [Region {
            guest: 0,
            len: 0x1000,
            user: 0x7000,
        }];
        let why = |request, body: &[u8], regions: &[Region]| {
            let message = Message {
                header: Header {
                    request,
                    needs_reply: false,
                    len: body.len(),
                },
                bytes: [&[0; HEADER], body].concat(),
                descriptors: PeerFds::default(),
            };
            let checked = check_ring(&message, &limits, regions);
            checked.map_or_else(|refusal| refusal.to_string(), |()| "fine".to_owned())
        };
        let pair = |queue: u32, number: u32| u64s(&[u64::from(queue) | u64::from(number) << 32]);
        let none = "there is no queue 3; the device has 3, from 0 on";
        let of_a_pair = [
            (Req::SET_VRING_NUM, 1024),
            (Req::SET_VRING_BASE, 65535),
            (Req::GET_VRING_BASE, 0),
            (Req::SET_VRING_ENABLE, 1),
        ];
        for (request, number) in of_a_pair {
            assert_eq!(why(request, &pair(3, number), &shared), none);
            assert_eq!(why(request, &pair(2, number), &shared), "fine");
        }
        for request in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
            assert_eq!(why(request, &u64s(&[3]), &shared), none);
            assert_eq!(why(request, &u64s(&[0x102]), &shared), "fine");
        }
        assert_eq!(
            why(Req::SET_VRING_NUM, &pair(1, 24), &shared),
            "queue 1 would have 24 descriptors; send a power of two up to 1024"
        );
        assert_eq!(
            why(Req::SET_VRING_BASE, &pair(1, 65536), &shared),
            "queue 1 would start at index 65536; a split ring's is 0 to 65535"
        );
        assert_eq!(
            why(Req::SET_VRING_ENABLE, &pair(1, 2), &shared),
            "queue 1 would be set to 2; send 1 to enable and 0 to disable it"
        );
        let addresses = |queue, at: [u64; 3]| u64s(&[queue, at[0], at[1], at[2], 0]);
        let good = addresses(1, [0x7000, 0x7ffc, 0x7ffe]);
        assert_eq!(why(Req::SET_VRING_ADDR, &good, &shared), "fine");
        assert_eq!(
            why(Req::SET_VRING_ADDR, &addresses(3, [0; 3]), &shared),
            none
        );
        assert_eq!(
            why(Req::SET_VRING_ADDR, &good, &[]),
            format!("queue 1 would be in memory, of which none is shared; {SHARE_ON}")
        );
        assert_eq!(
            why(
                Req::SET_VRING_ADDR,
                &addresses(1, [0x7008, 0x7000, 0x7000]),
                &shared
            ),
            "queue 1's descriptor table is at 0x7008; send a multiple of 16"
        );
        for (used, part) in [(0x8000, "used ring"), (0x6ffc, "used ring")] {
            assert_eq!(
                why(
                    Req::SET_VRING_ADDR,
                    &addresses(1, [0x7000, used, 0x7000]),
                    &shared
                ),
                format!(
                    "queue 1's {part} is at {used:#x}, in no region that is shared (0x1000 bytes at \
                     0x7000); send addresses as SET_MEM_TABLE has them (userspace address)"
                )
            );
        }
        assert_eq!(why(Req::GET_FEATURES, &[], &shared), "fine");
    }
}
