//! A restore where KVM has no ioctl for the offset.

use serde_json::{Value, json};
use vhost_user_timer_frontend::{Register, RestoreOptions, kvm};

use crate::Result;
use crate::vm::{LIMIT, Vm, backend};

/// Restores what KVM has of a VM, and puts the settled count into KVM by one write.
pub(super) fn run(program: &str) -> Result<Value> {
    let vm = Vm::new(4)?;
    let saved = vm.save_whole()?;
    let backend = backend(program, &[])?;
    let queue = backend.frontend().queue();
    let restore = backend
        .frontend()
        .restore(&saved, RestoreOptions::default())?;
    restore.bring_all_back(LIMIT)?;
    restore.finish(LIMIT)?;
    let counts = kvm::set_counts(&vm.vcpus[0], &queue.info(LIMIT)?)?;
    queue.set_counter_offset(counts.offset, LIMIT)?;
    let run = queue.resume(LIMIT)?;
    Ok(json!({
        "has_ptimer": saved.vcpus()[0].get(Register::PtimerCval).is_some(),
        "cntvoff": run.cntvoff,
        "virt": [counts.virt.least, counts.virt.most],
        "phys": counts.phys.map(|bracket| [bracket.least, bracket.most]),
        "ahead": vm.ahead(Register::TimerCnt, run.cntvoff)?,
    }))
}
