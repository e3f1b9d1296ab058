//! The size of the world that the checker explores.

use std::fmt;

/// How often each event may happen. Everything else, such as serving a request, or a thread
/// waiting, happens whenever it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// vCPUs of the VM, each with a thread.
    pub vcpus: u32,
    /// Threads of the VMM that act on the VM as a whole.
    pub vmm_threads: u32,
    /// The VM has CONFIRM, and the VMM puts the offsets into its hypervisor.
    pub confirm: bool,
    /// The VM has ONE_OFFSET.
    pub one_offset: bool,
    /// Steps of the host counter.
    pub ticks: u8,
    /// RESTORE_BEGIN.
    pub begins: u8,
    /// RESTORE_ABORT.
    pub aborts: u8,
    /// PAUSE.
    pub pauses: u8,
    /// SET_COUNTER_OFFSET.
    pub offsets: u8,
    /// SET_REGS of a count.
    pub counts: u8,
    /// SET_REGS of a timer whose vCPU runs.
    pub timers: u8,
    /// Ends of the connection, or of a queue.
    pub disconnects: u8,
    /// Ends of the backend.
    pub restarts: u8,
    /// All of the above together, except ticks.
    pub disturbances: u8,
}

impl Limits {
    /// Takes about a minute and 3 GiB of memory.
    pub const DEFAULT: Limits = Limits {
        vcpus: 3,
        vmm_threads: 1,
        ticks: 2,
        disturbances: 3,
        ..Limits::UNLIMITED
    };

    /// For a quick test.
    pub const SMALL: Limits = Limits {
        ticks: 1,
        disturbances: 2,
        ..Limits::DEFAULT
    };

    /// Takes some minutes and 5 GiB of memory.
    pub const LARGE: Limits = Limits {
        ticks: 3,
        ..Limits::DEFAULT
    };

    /// For a VM with CONFIRM: a sixth of that.
    pub const CONFIRM: Limits = Limits {
        disturbances: 2,
        ..Limits::DEFAULT.confirming()
    };

    /// For a VM with CONFIRM, twice [`DEFAULT`](Self::DEFAULT).
    pub const LARGE_CONFIRM: Limits = Limits::DEFAULT.confirming();

    /// Three vCPUs run, and nothing else happens.
    pub const QUIET: Limits = Limits {
        vcpus: 3,
        vmm_threads: 1,
        confirm: false,
        one_offset: false,
        ticks: 0,
        begins: 0,
        aborts: 0,
        pauses: 0,
        offsets: 0,
        counts: 0,
        timers: 0,
        disconnects: 0,
        restarts: 0,
        disturbances: u8::MAX,
    };

    const UNLIMITED: Limits = Limits {
        vcpus: 1,
        vmm_threads: 1,
        confirm: false,
        one_offset: false,
        ticks: u8::MAX,
        begins: u8::MAX,
        aborts: u8::MAX,
        pauses: u8::MAX,
        offsets: u8::MAX,
        counts: u8::MAX,
        timers: u8::MAX,
        disconnects: u8::MAX,
        restarts: u8::MAX,
        disturbances: u8::MAX,
    };

    /// The same limits for a VM with CONFIRM.
    #[must_use]
    pub const fn confirming(self) -> Self {
        Limits {
            confirm: true,
            ..self
        }
    }

    /// The same limits in their one normal form: none is above the limit of all together.
    #[must_use]
    pub fn clamped(self) -> Self {
        let kinds = [
            self.begins,
            self.aborts,
            self.pauses,
            self.offsets,
            self.counts,
            self.timers,
            self.disconnects,
            self.restarts,
        ];
        let sum = kinds.into_iter().fold(0, u8::saturating_add);
        let most = self.disturbances.min(sum);
        Limits {
            disturbances: most,
            begins: self.begins.min(most),
            aborts: self.aborts.min(most),
            pauses: self.pauses.min(most),
            offsets: self.offsets.min(most),
            counts: self.counts.min(most),
            timers: self.timers.min(most),
            disconnects: self.disconnects.min(most),
            restarts: self.restarts.min(most),
            ..self
        }
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits {
            vcpus,
            vmm_threads,
            confirm,
            one_offset,
            ticks,
            begins,
            aborts,
            pauses,
            offsets,
            counts,
            timers,
            disconnects,
            restarts,
            disturbances,
        } = self;
        let kind = match (confirm, one_offset) {
            (false, false) => "",
            (true, false) => " CONFIRM",
            (false, true) => " ONE_OFFSET",
            (true, true) => " CONFIRM ONE_OFFSET",
        };
        write!(
            f,
            "vcpus={vcpus}{kind} vmm-threads={vmm_threads} ticks={ticks}; at most {disturbances} \
             of begins={begins} aborts={aborts} pauses={pauses} offsets={offsets} counts={counts} \
             timers={timers} disconnects={disconnects} restarts={restarts}"
        )
    }
}
