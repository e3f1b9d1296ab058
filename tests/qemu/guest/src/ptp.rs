//! A PTP clock: its readings alone, and beside those of the system's clock.

#![expect(unsafe_code, reason = "every ioctl is unsafe")]

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::time::{DynamicClockId, clock_gettime_dynamic};

use crate::Result;

/// PTP_MAX_SAMPLES of linux/ptp_clock.h.
const MAX_SAMPLES: usize = 25;

/// `struct ptp_clock_time`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ClockTime {
    seconds: i64,
    nanoseconds: u32,
    reserved: u32,
}

impl ClockTime {
    fn nanoseconds(self) -> i128 {
        i128::from(self.seconds) * 1_000_000_000 + i128::from(self.nanoseconds)
    }
}

/// `struct ptp_sys_offset_extended`.
#[repr(C)]
struct SysOffsetExtended {
    samples: u32,
    clock: i32,
    reserved: [u32; 2],
    times: [[ClockTime; 3]; MAX_SAMPLES],
}

/// `struct ptp_sys_offset_precise`.
#[repr(C)]
#[derive(Default)]
struct SysOffsetPrecise {
    device: ClockTime,
    realtime: ClockTime,
    monotonic_raw: ClockTime,
    reserved: [u32; 4],
}

const PTP_SYS_OFFSET_PRECISE: Opcode = opcode::read_write::<SysOffsetPrecise>(b'=', 8);
const PTP_SYS_OFFSET_EXTENDED: Opcode = opcode::read_write::<SysOffsetExtended>(b'=', 9);

/// An open PTP clock.
pub(crate) struct Clock(File);

impl Clock {
    /// The clock `ptp0` or so on.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let path = format!("/dev/{name}");
        let file = File::options().read(true).write(true).open(&path);
        Ok(Self(file.map_err(|error| format!("{path}: {error}"))?))
    }

    /// A reading, in ns.
    pub(crate) fn read(&self) -> Result<i128> {
        let time = clock_gettime_dynamic(DynamicClockId::Dynamic(self.0.as_fd()))
            .map_err(|error| format!("clock_gettime: {error}"))?;
        Ok(i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec))
    }

    /// Answers each line with a reading, until a line `q` or the end of the input.
    pub(crate) fn exchange(&self, input: &mut impl BufRead, output: &mut impl Write) -> Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            if input.read_line(&mut line)? == 0 || line == "q\n" {
                return Ok(());
            }
            let answer = format!("{}\n", self.read()?);
            output.write_all(answer.as_bytes())?;
            output.flush()?;
        }
    }

    /// That many times the system's clock, this one, and the system's again, in ns.
    pub(crate) fn offset(&self, samples: u32) -> Result<Vec<[i128; 3]>> {
        let count = samples as usize;
        if count > MAX_SAMPLES {
            return Err(format!("{count} samples at once, and {MAX_SAMPLES} are the most").into());
        }
        let mut value = SysOffsetExtended {
            samples,
            clock: 0, // CLOCK_REALTIME
            reserved: [0; 2],
            times: [[ClockTime::default(); 3]; MAX_SAMPLES],
        };
        // SAFETY: the opcode and the type are those of PTP_SYS_OFFSET_EXTENDED.
        let request = unsafe { Updater::<PTP_SYS_OFFSET_EXTENDED, _>::new(&mut value) };
        // SAFETY: the kernel reads and fills that value.
        unsafe { ioctl(&self.0, request) }
            .map_err(|error| format!("PTP_SYS_OFFSET_EXTENDED: {error}"))?;
        let samples = value.times.iter().take(count);
        Ok(samples
            .map(|sample| sample.map(ClockTime::nanoseconds))
            .collect())
    }

    /// This clock, the system's, and CLOCK_MONOTONIC_RAW, at one instant, in ns.
    pub(crate) fn precise(&self) -> std::result::Result<[i128; 3], Errno> {
        let mut value = SysOffsetPrecise::default();
        // SAFETY: the opcode and the type are those of PTP_SYS_OFFSET_PRECISE.
        let request = unsafe { Updater::<PTP_SYS_OFFSET_PRECISE, _>::new(&mut value) };
        // SAFETY: the kernel reads and fills that value.
        unsafe { ioctl(&self.0, request) }?;
        Ok([value.device, value.realtime, value.monotonic_raw].map(ClockTime::nanoseconds))
    }
}
