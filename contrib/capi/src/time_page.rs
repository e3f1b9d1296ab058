//! Running and reading the guest's counts without a request.

#![expect(unsafe_code, reason = "exports symbols")]

use std::ffi::c_int;
use std::mem::MaybeUninit;

use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_frontend::{CounterSource, GuestClock, Info};

use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::pointer::{given, put};
use crate::types::deadline;

/// The guest's counts at one instant, ticks, modulo 2^64.
#[repr(C)]
pub struct vut_counts {
    /// The virtual count (CNTVCT).
    pub virt_count: u64,
    /// The physical count (CNTPCT).
    pub phys_count: u64,
    /// The host counter.
    pub host_count: u64,
}

/// Reads the guest's counts by the time page. Opaque. vut_clock_open() makes one.
pub struct vut_clock(GuestClock);

/// Makes the backend write the time page: memory of this frontend that has the VM's phase and
/// offsets, so that vut_wait_run_by_page() and vut_clock_counts() make no request. It lasts until
/// vut_time_page_stop(), also over reconnects. (SET_TIME_PAGE, SPEC.md section 9)
///
/// @return 0, or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_time_page_start(frontend: Option<&vut_frontend>, timeout_ns: u64) -> c_int {
    border(|| {
        let frontend = self::frontend(frontend)?.frontend();
        Ok(frontend
            .time_page()
            .start(frontend.queue(), deadline(timeout_ns))?)
    })
}

/// Makes the backend stop writing the time page.
///
/// @return 0, or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_time_page_stop(frontend: Option<&vut_frontend>, timeout_ns: u64) -> c_int {
    border(|| {
        let frontend = self::frontend(frontend)?.frontend();
        Ok(frontend
            .time_page()
            .stop(frontend.queue(), deadline(timeout_ns))?)
    })
}

/// As vut_wait_run(), by the time page if the backend writes one: while the VM is RUNNING it makes
/// no request, and all threads that wait share one.
///
/// With the page it does not check that the vCPU exists, and a RUNNING that ends before the thread
/// sees it may go unnoticed: then the thread waits on.
///
/// @param vcpu     index
/// @param cntvoff  where the virtual offset goes, ticks; may be NULL
/// @param cntpoff  where the physical offset goes, ticks; may be NULL
/// @return as vut_wait_run()
#[unsafe(no_mangle)]
pub extern "C" fn vut_wait_run_by_page(
    frontend: Option<&vut_frontend>,
    vcpu: u32,
    cntvoff: Option<&mut MaybeUninit<u64>>,
    cntpoff: Option<&mut MaybeUninit<u64>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.frontend().queue_of(vcpu);
        let offsets = queue.wait_run_by_page(vcpu, deadline(timeout_ns))?;
        put(cntvoff, offsets.cntvoff);
        put(cntpoff, offsets.cntpoff);
        Ok(())
    })
}

/// Makes a reader of the guest's counts. The time page must have been started.
///
/// It reads what the backend's host counter counts by. That is possible for CLOCK_MONOTONIC,
/// CLOCK_BOOTTIME and CNTVCT_EL0, without an anchor, in this process's time namespace.
///
/// @param clock  where the clock goes, which vut_clock_free() frees; NULL goes there after an error
/// @return 0; -EOPNOTSUPP for another host counter, and for a VM with an anchor; -EINVAL where this
///         process reads another counter than the backend; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_clock_open(
    frontend: Option<&vut_frontend>,
    clock: Option<&mut MaybeUninit<*mut vut_clock>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let to = given(clock, "clock")?;
        to.write(std::ptr::null_mut());
        let (queue, deadline) = (self::frontend(frontend)?.queue(), deadline(timeout_ns));
        let counter = host_counter(&queue.info(deadline)?)?;
        let clock = vut_clock(queue.guest_clock(counter.into(), deadline)?);
        to.write(Box::into_raw(Box::new(clock)));
        Ok(())
    })
}

/// The counter that the backend counts by.
fn host_counter(info: &Info) -> Result<HostCounter, Failure> {
    let cannot = |why: &str| {
        let text =
            format!("cannot read the host counter: {why}: use vut_get_regs() for the counts");
        Failure::new(libc::EOPNOTSUPP, text)
    };
    if info.anchored {
        return Err(cannot("the VM has an anchor"));
    }
    let source = match info.source {
        CounterSource::Monotonic => Source::Monotonic,
        CounterSource::Boottime => Source::Boottime,
        CounterSource::Cntvct => Source::Cntvct,
        // The backend has measured its frequency, and another measurement differs.
        source => return Err(cannot(&format!("the backend counts by {source}"))),
    };
    HostCounter::open(source).map_err(|error| cannot(&error.to_string()))
}

/// Reads the guest's counts. It takes a reading of the host counter and some tens of nanoseconds,
/// no request, and no system call unless the backend writes the page for unusually long.
///
/// While the VM's offsets stay the same, and over pauses, no count decreases from one reading to
/// the next, on any thread.
///
/// @param counts  where the counts go; may be NULL
/// @return 0; -ENODATA where the page cannot be read: in NEW, without vut_time_page_start(), during
///         a reconnect, and permanently once the host counter may have changed: after
///         vut_set_anchor(), vut_reset_device() and vut_device_state_load()
#[unsafe(no_mangle)]
pub extern "C" fn vut_clock_counts(
    clock: Option<&vut_clock>,
    counts: Option<&mut MaybeUninit<vut_counts>>,
) -> c_int {
    border(|| {
        let vut_clock(clock) = given(clock, "clock")?;
        let read = clock.counts().ok_or_else(|| {
            let text = "the time page cannot be read: use vut_get_regs() for the counts";
            Failure::new(libc::ENODATA, text)
        })?;
        put(
            counts,
            vut_counts {
                virt_count: read.virt_count,
                phys_count: read.phys_count,
                host_count: read.host_count,
            },
        );
        Ok(())
    })
}

/// Frees the clock. No other thread may be in a call with it. Before or after vut_close().
///
/// @param clock  NULL does nothing
#[unsafe(no_mangle)]
pub extern "C" fn vut_clock_free(clock: Option<Box<vut_clock>>) {
    border(|| {
        drop(clock);
        Ok(())
    });
}
