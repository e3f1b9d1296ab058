//! A driver's bytes as a request. A malformed request is a value too.

use core::fmt;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::Needs;
use super::wire::{self, RespHead};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
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

impl Operation {
    /// The clock of an alarm request, which only a device with alarms executes.
    pub(super) fn alarm_clock(self) -> Option<u16> {
        match self {
            Operation::ReadAlarm { clock }
            | Operation::SetAlarm { clock, .. }
            | Operation::SetAlarmEnabled { clock, .. } => Some(clock),
            _ => None,
        }
    }

    pub(super) fn clock(self) -> Option<u16> {
        match self {
            Operation::Cfg => None,
            Operation::Read { clock }
            | Operation::ReadCross { clock, .. }
            | Operation::ClockCap { clock }
            | Operation::CrossCap { clock, .. } => Some(clock),
            _ => self.alarm_clock(),
        }
    }

    pub(super) fn counter(self) -> Option<u8> {
        match self {
            Operation::ReadCross { counter, .. } | Operation::CrossCap { counter, .. } => {
                Some(counter)
            }
            _ => None,
        }
    }

    fn needs(self) -> Needs {
        match self {
            Operation::Cfg | Operation::ClockCap { .. } | Operation::ReadAlarm { .. } => {
                Needs::Nothing
            }
            Operation::Read { .. }
            | Operation::SetAlarm { .. }
            | Operation::SetAlarmEnabled { .. } => Needs::Time,
            Operation::ReadCross { .. } | Operation::CrossCap { .. } => Needs::Cross,
        }
    }
}

/// A request as it came in, malformed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub(super) Parsed);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Shorter than a head.
    Headless,
    /// A message that the specification does not have.
    Unknown,
    /// A known message that is cut short.
    Cut { response_size: usize },
    /// A whole message.
    Whole {
        operation: Operation,
        response_size: usize,
        /// Whether everything reserved is zero, flags included.
        reserved_is_zero: bool,
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
    /// The request in these device-readable bytes, of which [`wire::MAX_REQUEST`] are enough.
    pub fn parse(bytes: &[u8]) -> Self {
        Request(Parsed::parse(bytes))
    }
}

impl Request {
    /// Whether it asks to change an alarm.
    pub fn sets_alarm(&self) -> bool {
        let Parsed::Whole { operation, .. } = self.0 else {
            return false;
        };
        matches!(
            operation,
            Operation::SetAlarm { .. } | Operation::SetAlarmEnabled { .. }
        )
    }

    /// What is wrong with the request itself, or with room for this many bytes of a response.
    pub fn fault(&self, room: usize) -> Option<&'static str> {
        match self.0 {
            Parsed::Headless => Some("it is shorter than a head"),
            Parsed::Unknown => Some("the specification has no such message"),
            Parsed::Cut { .. } => Some("it is cut short"),
            Parsed::Whole { response_size, .. } if room < response_size => {
                Some("its response does not fit the buffer")
            }
            Parsed::Whole {
                reserved_is_zero: false,
                ..
            } => Some("a reserved field or an unknown flag is not 0"),
            Parsed::Whole { .. } => None,
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parsed::Whole { operation, .. } = self.0 else {
            return f.write_str("a malformed request");
        };
        match operation {
            Operation::Cfg => f.write_str("CFG"),
            Operation::Read { clock } => write!(f, "READ of clock {clock}"),
            Operation::ClockCap { clock } => write!(f, "CLOCK_CAP of clock {clock}"),
            Operation::ReadAlarm { clock } => write!(f, "READ_ALARM of clock {clock}"),
            Operation::ReadCross { clock, counter } => {
                write!(f, "READ_CROSS of clock {clock} and counter {counter}")
            }
            Operation::CrossCap { clock, counter } => {
                write!(f, "CROSS_CAP of clock {clock} and counter {counter}")
            }
            Operation::SetAlarm {
                clock,
                time,
                enabled,
            } => {
                let state = if enabled { "enabled" } else { "disabled" };
                write!(f, "SET_ALARM of clock {clock} to {time} ns, {state}")
            }
            Operation::SetAlarmEnabled { clock, enabled } => {
                let state = if enabled { "enabled" } else { "disabled" };
                write!(f, "SET_ALARM_ENABLED of clock {clock}, {state}")
            }
        }
    }
}

impl Parsed {
    fn parse(bytes: &[u8]) -> Self {
        let Ok((head, _)) = wire::ReqHead::read_from_prefix(bytes) else {
            return Parsed::Headless;
        };
        match head.msg_type.get() {
            wire::REQ_READ => of_clock::<wire::RespRead>(bytes, |clock| Operation::Read { clock }),
            wire::REQ_READ_CROSS => of_pair::<wire::RespReadCross>(bytes, |clock, counter| {
                Operation::ReadCross { clock, counter }
            }),
            wire::REQ_CFG => {
                whole::<wire::ReqHead, wire::RespCfg>(bytes, |head| (*head, Operation::Cfg, true))
            }
            wire::REQ_CLOCK_CAP => {
                of_clock::<wire::RespClockCap>(bytes, |clock| Operation::ClockCap { clock })
            }
            wire::REQ_CROSS_CAP => of_pair::<wire::RespCrossCap>(bytes, |clock, counter| {
                Operation::CrossCap { clock, counter }
            }),
            wire::REQ_READ_ALARM => {
                of_clock::<wire::RespReadAlarm>(bytes, |clock| Operation::ReadAlarm { clock })
            }
            wire::REQ_SET_ALARM => whole::<wire::ReqSetAlarm, RespHead>(bytes, |request| {
                let operation = Operation::SetAlarm {
                    clock: request.clock_id.get(),
                    time: request.alarm_time.get(),
                    enabled: enabled(request.flags),
                };
                let reserved_is_zero = request.reserved == ZERO_5 && flags_are_known(request.flags);
                (request.head, operation, reserved_is_zero)
            }),
            wire::REQ_SET_ALARM_ENABLED => {
                whole::<wire::ReqSetAlarmEnabled, RespHead>(bytes, |request| {
                    let operation = Operation::SetAlarmEnabled {
                        clock: request.clock_id.get(),
                        enabled: enabled(request.flags),
                    };
                    let reserved_is_zero =
                        request.reserved == ZERO_5 && flags_are_known(request.flags);
                    (request.head, operation, reserved_is_zero)
                })
            }
            _ => Parsed::Unknown,
        }
    }

    /// What the shell is to sample, whatever state the device is in.
    pub(super) fn needs(&self) -> Needs {
        match self {
            Parsed::Whole { operation, .. } => operation.needs(),
            _ => Needs::Nothing,
        }
    }

    /// The id of the clock for a READ.
    pub(super) fn clock_that_is_read(&self) -> Option<usize> {
        match *self {
            Parsed::Whole {
                operation: Operation::Read { clock },
                ..
            } => Some(clock.into()),
            _ => None,
        }
    }

    /// The length of the response that the specification has for it, bytes.
    pub(super) fn response_size(&self) -> usize {
        match *self {
            Parsed::Headless | Parsed::Unknown => size_of::<RespHead>(),
            Parsed::Cut { response_size } | Parsed::Whole { response_size, .. } => response_size,
        }
    }
}

/// A request of type `Q` whose response is a `P`, whatever follows it.
fn whole<Q, P>(bytes: &[u8], read: impl FnOnce(&Q) -> (wire::ReqHead, Operation, bool)) -> Parsed
where
    Q: FromBytes + KnownLayout + Immutable,
{
    let response_size = size_of::<P>();
    let Ok((request, _)) = Q::read_from_prefix(bytes) else {
        return Parsed::Cut { response_size };
    };
    let (head, operation, reserved_is_zero) = read(&request);
    Parsed::Whole {
        operation,
        response_size,
        reserved_is_zero: reserved_is_zero && head.reserved == ZERO_6,
    }
}

fn of_clock<P>(bytes: &[u8], operation: impl FnOnce(u16) -> Operation) -> Parsed {
    whole::<wire::ReqClock, P>(bytes, |request| {
        let reserved_is_zero = request.reserved == ZERO_6;
        (
            request.head,
            operation(request.clock_id.get()),
            reserved_is_zero,
        )
    })
}

fn of_pair<P>(bytes: &[u8], operation: impl FnOnce(u16, u8) -> Operation) -> Parsed {
    whole::<wire::ReqCross, P>(bytes, |request| {
        let operation = operation(request.clock_id.get(), request.hw_counter);
        (request.head, operation, request.reserved == ZERO_5)
    })
}
