//! A VM's timers from KVM through the backend and back into KVM.

use serde_json::{Map, Value, json};
use vhost_user_timer_frontend::{
    Abi, Frontend, Register, RestoreOptions, SavedVcpu, VmOptions, kvm,
};

use crate::Result;
use crate::vm::{LIMIT, Vm, backend, host_counter};

/// Twice: as KVM has a VM before the first apply, and afterwards.
pub(super) fn run(program: &str) -> Result<Value> {
    let vm = Vm::new(4)?;
    arm(&vm)?;
    let backend = backend(program, &[])?;
    let before = once(&vm, backend.frontend())?;
    arm(&vm)?;
    let after = once(&vm, backend.frontend())?;
    Ok(json!({ "before_apply": before, "after_apply": after }))
}

/// Sets each vCPU's timers to another state: off, ahead, due, and due but masked.
fn arm(vm: &Vm) -> Result<()> {
    for (index, vcpu) in (0..).zip(&vm.vcpus) {
        let [count, second] = [current(vm, index)?, host_counter()?.native_frequency()];
        let (ahead, due) = (
            count.wrapping_add(3600 * second),
            count.wrapping_sub(second),
        );
        let (virt, phys) = match index {
            0 => ((0, 0), (1, ahead)),
            1 => ((1, ahead), (3, due)),
            2 => ((1, due), (2, u64::MAX)),
            _ => ((3, due), (0, ahead)),
        };
        for (register, value) in [
            (Register::TimerCval, virt.1),
            (Register::TimerCtl, virt.0),
            (Register::PtimerCval, phys.1),
            (Register::PtimerCtl, phys.0),
        ] {
            let bytes = u64::to_le_bytes(value);
            vcpu.set_one_reg(register.id(Abi::Arm64), &bytes)?;
        }
    }
    Ok(())
}

/// TIMER_CNT of a vCPU.
fn current(vm: &Vm, index: u32) -> Result<u64> {
    let saved = kvm::save_vcpu(&vm.vcpus[index as usize], index)?;
    Ok(saved.get(Register::TimerCnt).ok_or("no TIMER_CNT")?)
}

/// GET from KVM, SET in the backend, GET from the backend; and when the VM runs, SET in KVM and GET
/// from KVM.
fn once(vm: &Vm, frontend: &Frontend) -> Result<Value> {
    let queue = frontend.queue();
    let saved = vm.save_whole()?;
    if queue.info(LIMIT)?.confirm {
        queue.pause(LIMIT)?;
    }
    let options = RestoreOptions::default().vm(VmOptions::KVM);
    let restore = frontend.restore(&saved, options)?;
    queue.set_vm(saved.vcpus(), LIMIT)?;
    let ids = Register::ALL.map(|register| register.id(Abi::Arm64));
    let mut staged = Vec::new();
    for vcpu in saved.vcpus() {
        let regs = queue.get_regs(vcpu.index(), &ids, LIMIT)?;
        staged.push(SavedVcpu::from_regs(Abi::Arm64, vcpu.index(), &regs)?);
    }
    restore.bring_all_back(LIMIT)?;
    let run = restore.finish_with(LIMIT, |info| {
        kvm::apply(&vm.fd, &vm.vcpus[0], info)?;
        Ok(())
    })?;
    for (vcpu, saved) in vm.vcpus.iter().zip(&staged) {
        kvm::restore_vcpu(vcpu, saved)?;
    }
    let names = |saved: &[SavedVcpu]| saved.iter().map(named).collect::<Vec<_>>();
    Ok(json!({
        "kvm": names(saved.vcpus()),
        "backend": names(&staged),
        "kvm_again": names(&vm.save()?),
        "cntvoff": run.cntvoff,
        "cntpoff": run.cntpoff,
        "virt_ahead": vm.ahead(Register::TimerCnt, run.cntvoff)?,
        "phys_ahead": vm.ahead(Register::PtimerCnt, run.cntpoff)?,
    }))
}

/// A vCPU's registers by their names.
fn named(vcpu: &SavedVcpu) -> Map<String, Value> {
    let value = |register: Register| Some((register.name().to_owned(), vcpu.get(register)?.into()));
    Register::ALL.into_iter().filter_map(value).collect()
}
