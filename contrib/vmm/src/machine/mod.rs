//! The machine: KVM, the vCPUs' threads, and who decides when they run.

mod error;
mod gic;
mod registers;
mod vcpu;
mod vm;

use std::mem::offset_of;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::guest::{Board, Record};
use error::Error;

pub(crate) fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}: {:?}", std::error::Error::source(&e));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    let n = 2;
    let (vm, vcpus) = vm::Vm::new(n)?;
    vm.load_program(&vcpus)?;
    vm.ram.set_field(offset_of!(Board, period), 20_000_000);
    vm.ram.set_field(offset_of!(Board, round), 1);
    vm.ram.set_field(offset_of!(Board, turn_on), (1 << n) - 2);
    let mut running = vcpu::Running::new()?;
    for v in vcpus {
        running.start(v, |_| Ok(()));
    }
    let t = Instant::now();
    let ok = running
        .doorbell
        .wait_until(t + Duration::from_secs(20), || {
            running.has_ended()
                || (0..n).all(|v| vm.ram.record(v, offset_of!(Record, interrupts)) >= 5)
        });
    println!("{ok} {:?}", t.elapsed());
    for v in 0..n {
        for w in 0..size_of::<Record>() / 8 {
            print!("{:#x} ", vm.ram.record(v, w * 8));
        }
        println!();
    }
    let (vcpus, exits) = running.stop()?;
    println!("{exits:?}");
    let s = registers::save(&vcpus[0])?;
    let g = vm.gic.save()?;
    registers::load(&vcpus[0], &s)?;
    vm.gic.load(&g)?;
    println!("{}", serde_json::to_string(&g).unwrap());
    Ok(())
}
