//! The status of an answer (SPEC.md, "Requests").

/// Why a request was refused, or that it was not.
///
/// On the wire a status is 0 or a Linux errno (include/uapi/asm-generic/errno.h),
/// positive. `detail` is the answer's second field; what it means depends on the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Status {
    /// Done.
    Ok,
    /// ENOENT: no such register. Detail: the entry's index.
    UnknownRegister,
    /// ENXIO: the VM has no such vCPU.
    NoSuchVcpu,
    /// E2BIG: the answer does not fit. Detail: writable bytes needed, header included.
    TooBig,
    /// EBUSY: not in this phase. Detail: the phase, or, while RESTORING, how many vCPUs are
    /// still missing.
    Busy,
    /// EINVAL: a bad value. Detail: the entry's index, or 0.
    Invalid,
    /// ENODATA: this vCPU lacks registers. Detail: which, as the bits of
    /// [`wire::present`](crate::wire::present).
    Incomplete,
    /// EPROTO: the request is shorter or longer than its operation's.
    Malformed,
    /// EOPNOTSUPP: no such operation.
    Unsupported,
    /// ETIMEDOUT: the restore's time-out passed. Detail: how many vCPUs are missing.
    TimedOut,
    /// ESTALE: the epoch meant is over.
    Stale,
    /// ECANCELED: the queue was stopped or the restore aborted.
    Canceled,
    /// Another value: not one that a backend of this version gives.
    Unknown(u32),
}

macro_rules! statuses {
    ($($name:ident = $errno:literal, $text:literal, $meaning:literal;)*) => {
        impl Status {
            /// The value on the wire: 0 or a positive Linux errno.
            pub const fn errno(self) -> u32 {
                match self {
                    $(Status::$name => $errno,)*
                    Status::Unknown(errno) => errno,
                }
            }

            /// The errno's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Status::$name => $text,)*
                    Status::Unknown(_) => "unknown status",
                }
            }

            /// What the status says, in words.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $(Status::$name => $meaning,)*
                    Status::Unknown(_) => "not a status of this protocol version",
                }
            }
        }

        impl From<u32> for Status {
            fn from(errno: u32) -> Self {
                match errno {
                    $($errno => Status::$name,)*
                    _ => Status::Unknown(errno),
                }
            }
        }
    };
}

statuses! {
    Ok = 0, "OK", "done";
    UnknownRegister = 2, "ENOENT", "no such register";
    NoSuchVcpu = 6, "ENXIO", "no such vCPU";
    TooBig = 7, "E2BIG", "the answer does not fit its buffer";
    Busy = 16, "EBUSY", "not in this phase";
    Invalid = 22, "EINVAL", "bad value";
    Incomplete = 61, "ENODATA", "registers of this vCPU are missing";
    Malformed = 71, "EPROTO", "body too short or too long";
    Unsupported = 95, "EOPNOTSUPP", "no such operation";
    TimedOut = 110, "ETIMEDOUT", "the restore timed out";
    Stale = 116, "ESTALE", "the epoch is over";
    Canceled = 125, "ECANCELED", "the queue stopped or the restore was aborted";
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Status::Unknown(errno) => write!(f, "unknown status {errno}"),
            status => write!(f, "{} ({})", status.name(), status.meaning()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_and_its_errno_are_each_others_inverse() {
        for errno in 0..=200 {
            assert_eq!(Status::from(errno).errno(), errno);
        }
        assert_eq!(Status::from(5), Status::Unknown(5));
    }
}
