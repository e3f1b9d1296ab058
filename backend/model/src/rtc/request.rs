//! A driver's bytes as a request. What is malformed is a value too.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::Wants;
use super::wire::{self, RespHead};

/// What a request asks, of a clock where it names one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Read {
        clock: u16,
    },
    ReadCross {
        clock: u16,
        counter: u8,
    },
    Cfg,
    ClockCap {
        clock: u16,
    },
    CrossCap {
        clock: u16,
        counter: u8,
    },
    ReadAlarm {
        clock: u16,
    },
    SetAlarm {
        clock: u16,
        time: u64,
        enabled: bool,
    },
    SetAlarmEnabled {
        clock: u16,
        enabled: bool,
    },
}

impl Ask {
    /// The clock of a request that only a device with alarms knows.
    pub(super) fn alarm_clock(self) -> Option<u16> {
        match self {
            Ask::ReadAlarm { clock }
            | Ask::SetAlarm { clock, .. }
            | Ask::SetAlarmEnabled { clock, .. } => Some(clock),
            _ => None,
        }
    }

    pub(super) fn clock(self) -> Option<u16> {
        match self {
            Ask::Cfg => None,
            Ask::Read { clock }
            | Ask::ReadCross { clock, .. }
            | Ask::ClockCap { clock }
            | Ask::CrossCap { clock, .. } => Some(clock),
            _ => self.alarm_clock(),
        }
    }

    pub(super) fn counter(self) -> Option<u8> {
        match self {
            Ask::ReadCross { counter, .. } | Ask::CrossCap { counter, .. } => Some(counter),
            _ => None,
        }
    }

    fn wants(self) -> Wants {
        match self {
            Ask::Cfg | Ask::ClockCap { .. } | Ask::ReadAlarm { .. } => Wants::Nothing,
            Ask::Read { .. } | Ask::SetAlarm { .. } | Ask::SetAlarmEnabled { .. } => Wants::Time,
            Ask::ReadCross { .. } | Ask::CrossCap { .. } => Wants::Cross,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Shorter than a head.
    Headless,
    /// A message that the specification does not have.
    Unknown,
    /// A known one that is cut short.
    Cut { response_size: usize },
    /// A whole one.
    Whole {
        ask: Ask,
        response_size: usize,
        /// Whether everything reserved is zero, flags included.
        proper: bool,
    },
}

const ZERO_5: [u8; 5] = [0; 5];
const ZERO_6: [u8; 6] = [0; 6];

fn flags_are_known(flags: u8) -> bool {
    flags & !wire::FLAG_ALARM_ENABLED == 0
}

fn enabled(flags: u8) -> bool {
    flags & wire::FLAG_ALARM_ENABLED != 0
}

impl Request {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let Ok((head, _)) = wire::ReqHead::read_from_prefix(bytes) else {
            return Request::Headless;
        };
        match head.msg_type.get() {
            wire::REQ_READ => of_clock::<wire::RespRead>(bytes, |clock| Ask::Read { clock }),
            wire::REQ_READ_CROSS => of_pair::<wire::RespReadCross>(bytes, |clock, counter| {
                Ask::ReadCross { clock, counter }
            }),
            wire::REQ_CFG => {
                whole::<wire::ReqHead, wire::RespCfg>(bytes, |head| (*head, Ask::Cfg, true))
            }
            wire::REQ_CLOCK_CAP => {
                of_clock::<wire::RespClockCap>(bytes, |clock| Ask::ClockCap { clock })
            }
            wire::REQ_CROSS_CAP => of_pair::<wire::RespCrossCap>(bytes, |clock, counter| {
                Ask::CrossCap { clock, counter }
            }),
            wire::REQ_READ_ALARM => {
                of_clock::<wire::RespReadAlarm>(bytes, |clock| Ask::ReadAlarm { clock })
            }
            wire::REQ_SET_ALARM => whole::<wire::ReqSetAlarm, RespHead>(bytes, |request| {
                let ask = Ask::SetAlarm {
                    clock: request.clock_id.get(),
                    time: request.alarm_time.get(),
                    enabled: enabled(request.flags),
                };
                let proper = request.reserved == ZERO_5 && flags_are_known(request.flags);
                (request.head, ask, proper)
            }),
            wire::REQ_SET_ALARM_ENABLED => {
                whole::<wire::ReqSetAlarmEnabled, RespHead>(bytes, |request| {
                    let ask = Ask::SetAlarmEnabled {
                        clock: request.clock_id.get(),
                        enabled: enabled(request.flags),
                    };
                    let proper = request.reserved == ZERO_5 && flags_are_known(request.flags);
                    (request.head, ask, proper)
                })
            }
            _ => Request::Unknown,
        }
    }

    pub(super) fn wants(&self) -> Wants {
        match self {
            Request::Whole { ask, .. } => ask.wants(),
            _ => Wants::Nothing,
        }
    }

    /// The id of the clock for a READ.
    pub(super) fn clock_that_is_read(&self) -> Option<usize> {
        match *self {
            Request::Whole {
                ask: Ask::Read { clock },
                ..
            } => Some(clock.into()),
            _ => None,
        }
    }

    /// How long the response is that the specification has for it, bytes.
    pub(super) fn response_size(&self) -> usize {
        match *self {
            Request::Headless | Request::Unknown => size_of::<RespHead>(),
            Request::Cut { response_size } | Request::Whole { response_size, .. } => response_size,
        }
    }
}

/// A request of type `Q` whose response is a `P`, whatever follows it.
fn whole<Q, P>(bytes: &[u8], read: impl FnOnce(&Q) -> (wire::ReqHead, Ask, bool)) -> Request
where
    Q: FromBytes + KnownLayout + Immutable,
{
    let response_size = size_of::<P>();
    let Ok((request, _)) = Q::read_from_prefix(bytes) else {
        return Request::Cut { response_size };
    };
    let (head, ask, proper) = read(&request);
    Request::Whole {
        ask,
        response_size,
        proper: proper && head.reserved == ZERO_6,
    }
}

fn of_clock<P>(bytes: &[u8], ask: impl FnOnce(u16) -> Ask) -> Request {
    whole::<wire::ReqClock, P>(bytes, |request| {
        let proper = request.reserved == ZERO_6;
        (request.head, ask(request.clock_id.get()), proper)
    })
}

fn of_pair<P>(bytes: &[u8], ask: impl FnOnce(u16, u8) -> Ask) -> Request {
    whole::<wire::ReqCross, P>(bytes, |request| {
        let ask = ask(request.clock_id.get(), request.hw_counter);
        (request.head, ask, request.reserved == ZERO_5)
    })
}
