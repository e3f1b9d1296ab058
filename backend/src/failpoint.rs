//! Points at which a test can kill this process, to see what a kill leaves behind.
//!
//! With the feature `failpoints`, in a debug build, the environment variable [`VARIABLE`] names a
//! point and a number, as "commit-stored:2": when the point is reached for the second time, the
//! process kills itself with SIGKILL. In every other build, and so in every release, a point is a
//! no-op.

/// The environment variable that names the point.
pub const VARIABLE: &str = "VUT_FAILPOINT";

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A step between taking a request and answering it, or in making a state file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $point,)*
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Point] = &[$(Point::$point,)*];

            /// As [`VARIABLE`] names it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// An old file has been emptied.
    Emptied = "emptied",
    /// The file has a header that says that the file is being made, and nothing else.
    HeaderWritten = "header-written",
    /// The file has its length, and zeros after the header.
    Sized = "sized",
    /// The file is whole, and has no VM.
    Created = "created",
    /// A file with too few slots has no byte after them.
    Trimmed = "trimmed",
    /// The file has its new length.
    Extended = "extended",
    /// The header has the new number of slots.
    Grown = "grown",
    /// The header of an earlier version has a part of what this version adds.
    ConvertedHalf = "converted-half",
    /// The header of an earlier version has all that this version adds.
    ConversionReady = "conversion-ready",
    /// The header has this version.
    Converted = "converted",
    /// A change is about to be written.
    CommitBegun = "commit-begun",
    /// A slot is about to be written.
    SlotBegun = "slot-begun",
    /// A slot is marked as void, and still has the old record.
    SlotVoid = "slot-void",
    /// A slot has half of the new record.
    SlotHalf = "slot-half",
    /// A slot has the new record, and is still marked as void.
    SlotFull = "slot-full",
    /// A slot has the new generation.
    SlotDone = "slot-done",
    /// All slots are written; the commit is about to be stored.
    CommitReady = "commit-ready",
    /// The commit is stored.
    CommitStored = "commit-stored",
    /// The change is persisted; the answer is about to be written.
    AnswerReady = "answer-ready",
    /// The answer is in the frontend's memory; the used ring does not say so yet.
    AnswerWritten = "answer-written",
    /// The answer is in the used ring; the frontend was not notified.
    AnswerUsed = "answer-used",
}

/// This point is reached.
#[cfg(not(all(feature = "failpoints", debug_assertions)))]
#[inline(always)]
pub(crate) fn reached(_: Point) {}

/// This point is reached: the process kills itself here if the variable says so.
#[cfg(all(feature = "failpoints", debug_assertions))]
pub(crate) fn reached(point: Point) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static CHOSEN: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static TIMES: AtomicU64 = AtomicU64::new(0);

    let chosen = CHOSEN.get_or_init(|| {
        let text = std::env::var(VARIABLE).ok()?;
        let (name, times) = text.split_once(':')?;
        Some((name.to_owned(), times.parse().ok()?))
    });
    if let Some((name, times)) = chosen
        && name == point.name()
        && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == *times
    {
        let this = rustix::process::getpid();
        let _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
    }
}
