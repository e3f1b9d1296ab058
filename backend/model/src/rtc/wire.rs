//! The messages of virtio-rtc (virtio 1.4 §5.23.6) as bytes, little-endian, under the names
//! that the specification gives them, less `virtio_rtc_`.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// VIRTIO_RTC_F_ALARM, a feature bit (§5.23.3).
pub const F_ALARM: u32 = 0;

/// VIRTIO_RTC_REQ_READ (§5.23.6.5).
pub const REQ_READ: u16 = 0x0001;
/// VIRTIO_RTC_REQ_READ_CROSS (§5.23.6.5).
pub const REQ_READ_CROSS: u16 = 0x0002;
/// VIRTIO_RTC_REQ_CFG (§5.23.6.4).
pub const REQ_CFG: u16 = 0x1000;
/// VIRTIO_RTC_REQ_CLOCK_CAP (§5.23.6.4).
pub const REQ_CLOCK_CAP: u16 = 0x1001;
/// VIRTIO_RTC_REQ_CROSS_CAP (§5.23.6.4).
pub const REQ_CROSS_CAP: u16 = 0x1002;
/// VIRTIO_RTC_REQ_READ_ALARM (§5.23.6.6).
pub const REQ_READ_ALARM: u16 = 0x1003;
/// VIRTIO_RTC_REQ_SET_ALARM (§5.23.6.6).
pub const REQ_SET_ALARM: u16 = 0x1004;
/// VIRTIO_RTC_REQ_SET_ALARM_ENABLED (§5.23.6.6).
pub const REQ_SET_ALARM_ENABLED: u16 = 0x1005;
/// VIRTIO_RTC_NOTIF_ALARM, on the alarmq (§5.23.6.6).
pub const NOTIF_ALARM: u16 = 0x2000;

/// VIRTIO_RTC_COUNTER_ARM_VCT: CNTVCT_EL0 (§5.23.6.3).
pub const COUNTER_ARM_VCT: u8 = 0;
/// VIRTIO_RTC_COUNTER_X86_TSC (§5.23.6.3).
pub const COUNTER_X86_TSC: u8 = 1;
/// VIRTIO_RTC_COUNTER_INVALID (§5.23.6.3).
pub const COUNTER_INVALID: u8 = 0xFF;

/// VIRTIO_RTC_SMEAR_UNSPECIFIED (§5.23.6.3).
pub const SMEAR_UNSPECIFIED: u8 = 0;

/// VIRTIO_RTC_FLAG_ALARM_CAP, of [`RespClockCap`].
pub const FLAG_ALARM_CAP: u8 = 1 << 0;
/// VIRTIO_RTC_FLAG_CROSS_CAP, of [`RespCrossCap`].
pub const FLAG_CROSS_CAP: u8 = 1 << 0;
/// VIRTIO_RTC_FLAG_ALARM_ENABLED, of the alarm messages.
pub const FLAG_ALARM_ENABLED: u8 = 1 << 0;

/// What became of a request (§5.23.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_RTC_S_OK: it was executed.
    Ok = 0,
    /// VIRTIO_RTC_S_EOPNOTSUPP: no such message or counter, or none that this device can read.
    Unsupported = 2,
    /// VIRTIO_RTC_S_ENODEV: no such clock, or no alarm.
    NoDevice = 3,
    /// VIRTIO_RTC_S_EINVAL: values that are not allowed, or a buffer that is too small.
    Invalid = 4,
    /// VIRTIO_RTC_S_EIO: a fault that is not the driver's.
    Io = 5,
}

impl Status {
    /// The status of this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        use Status::{Invalid, Io, NoDevice, Ok, Unsupported};
        [Ok, Unsupported, NoDevice, Invalid, Io]
            .into_iter()
            .find(|status| *status as u8 == code)
    }

    /// The name, less `VIRTIO_RTC_`.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "S_OK",
            Status::Unsupported => "S_EOPNOTSUPP",
            Status::NoDevice => "S_ENODEV",
            Status::Invalid => "S_EINVAL",
            Status::Io => "S_EIO",
        }
    }

    /// What the status says, in words.
    pub fn meaning(self) -> &'static str {
        match self {
            Status::Ok => "done",
            Status::Unsupported => "no such counter, or none that this device can read",
            Status::NoDevice => "no such clock, or it has no alarm",
            Status::Invalid => "a value that is not allowed",
            Status::Io => "the counter's reading is not known",
        }
    }
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $type:ty = $at:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(
                Clone, Copy, Debug, Default, PartialEq, Eq,
                FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
            )]
            #[repr(C)]
            #[allow(missing_docs, reason = "the fields are the specification's")]
            pub struct $name {
                $(pub $field: $type,)*
            }

            const _: () = {
                assert!(size_of::<$name>() == $size);
                $(assert!(core::mem::offset_of!($name, $field) == $at);)*
            };
        )*
    };
}

messages! {
    /// What every request begins with; the whole of a CFG.
    ReqHead, 8 { msg_type: U16 = 0, reserved: [u8; 6] = 2, }
    /// What every response begins with; the whole of a SET_ALARM's and SET_ALARM_ENABLED's.
    RespHead, 8 { status: u8 = 0, reserved: [u8; 7] = 1, }
    /// What every notification begins with.
    NotifHead, 8 { msg_type: U16 = 0, reserved: [u8; 6] = 2, }

    /// A READ, CLOCK_CAP or READ_ALARM: which clock.
    ReqClock, 16 { head: ReqHead = 0, clock_id: U16 = 8, reserved: [u8; 6] = 10, }
    /// A READ_CROSS or CROSS_CAP: which clock and counter.
    ReqCross, 16 {
        head: ReqHead = 0, clock_id: U16 = 8, hw_counter: u8 = 10, reserved: [u8; 5] = 11,
    }
    /// A SET_ALARM.
    ReqSetAlarm, 24 {
        head: ReqHead = 0, alarm_time: U64 = 8, clock_id: U16 = 16, flags: u8 = 18,
        reserved: [u8; 5] = 19,
    }
    /// A SET_ALARM_ENABLED.
    ReqSetAlarmEnabled, 16 {
        head: ReqHead = 0, clock_id: U16 = 8, flags: u8 = 10, reserved: [u8; 5] = 11,
    }

    /// The answer to READ.
    RespRead, 16 { head: RespHead = 0, clock_reading: U64 = 8, }
    /// The answer to READ_CROSS.
    RespReadCross, 24 { head: RespHead = 0, clock_reading: U64 = 8, counter_cycles: U64 = 16, }
    /// The answer to CFG.
    RespCfg, 16 { head: RespHead = 0, num_clocks: U16 = 8, reserved: [u8; 6] = 10, }
    /// The answer to CLOCK_CAP.
    RespClockCap, 16 {
        head: RespHead = 0, clock_type: u8 = 8, leap_second_smearing: u8 = 9, flags: u8 = 10,
        reserved: [u8; 5] = 11,
    }
    /// The answer to CROSS_CAP.
    RespCrossCap, 16 { head: RespHead = 0, flags: u8 = 8, reserved: [u8; 7] = 9, }
    /// The answer to READ_ALARM.
    RespReadAlarm, 24 {
        head: RespHead = 0, alarm_time: U64 = 8, flags: u8 = 16, reserved: [u8; 7] = 17,
    }

    /// An alarm expired: goes into one buffer of the alarmq.
    NotifAlarm, 16 { head: NotifHead = 0, clock_id: U16 = 8, reserved: [u8; 6] = 10, }
}

/// The longest request, bytes. What follows it is ignored.
pub const MAX_REQUEST: usize = size_of::<ReqSetAlarm>();

/// The longest response, bytes.
pub const MAX_RESPONSE: usize = size_of::<RespReadCross>();

const _: () = assert!(size_of::<RespReadAlarm>() <= MAX_RESPONSE);
