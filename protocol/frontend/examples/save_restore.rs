//! Saves a VM's timers on one backend and restores them on another, or on the same one:
//!
//! ```sh
//! vhost-user-timer --socket-path /tmp/a.sock &
//! vhost-user-timer --socket-path /tmp/b.sock &
//! cargo run --example save_restore /tmp/a.sock /tmp/b.sock
//! ```
//!
//! No vCPU thread goes on before every one of them has its registers back and the offset is where
//! the guest's counter is made, and all go on with the same offset.

use std::error::Error;
use std::thread;
use std::time::Duration;

use vhost_user_timer_frontend::{
    Abi, ApplyError, Frontend, Info, Options, Phase, RestoreOptions, SavedVm, VcpuRestore,
    VmOptions,
};

/// For the handshake and for each request, on a machine that may be busy.
const REQUEST: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let source = args.next().ok_or("usage: save_restore SOCKET [SOCKET]")?;
    let destination = args.next();

    let options = Options::default().timeout(REQUEST);
    let frontend = Frontend::connect(source.as_str(), options.clone())?;
    let bytes = save(&frontend)?;
    println!("saved {} bytes from {source}", bytes.len());

    match destination {
        Some(path) => {
            frontend.close()?;
            restore(&Frontend::connect(path.as_str(), options)?, &bytes)
        }
        None => restore(&frontend, &bytes),
    }
}

/// Stops the VM's time and takes its timers along. What it returns is for a migration stream or a
/// snapshot.
fn save(frontend: &Frontend) -> Result<Vec<u8>, Box<dyn Error>> {
    let queue = frontend.queue();
    if queue.info(REQUEST)?.phase == Phase::New {
        println!("the VM is new: it gets 4 vCPUs and runs");
        queue.configure_with(4, Abi::Arm64, None, VmOptions::KVM, REQUEST)?;
        frontend.resume_with(REQUEST, put_into_hypervisor)?;
    }
    let paused = queue.pause(REQUEST)?;
    println!("paused at virtual count {}", paused.virt_count);
    Ok(frontend.save(REQUEST)?.to_bytes())
}

fn restore(frontend: &Frontend, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let saved = SavedVm::from_bytes(bytes)?;
    let options = RestoreOptions::default().vm(VmOptions::KVM);
    let restore = frontend.restore(&saved, options)?;
    // A VMM hands these to the vCPU threads that it has.
    let threads: Vec<_> = restore
        .vcpus()
        .map(|part| thread::spawn(move || vcpu_thread(part)))
        .collect();
    // Every vCPU has its registers back and the offset is in the hypervisor, or the restore is
    // aborted and all threads end.
    let finished = restore.finish_with(REQUEST, |info| {
        println!("all {} vCPUs are back; none runs yet", info.vcpus);
        put_into_hypervisor(info)
    });
    let mut result = finished.map(drop).map_err(Box::<dyn Error>::from);
    for thread in threads {
        let ended = thread.join().map_err(|_| "a vCPU thread panicked")?;
        result = result.and(ended.map_err(Box::<dyn Error>::from));
    }
    result
}

/// One thread does this, while no vCPU runs.
fn put_into_hypervisor(_info: &Info) -> Result<(), ApplyError> {
    // KVM_ARM_SET_COUNTER_OFFSET with `_info.cntvoff`: `kvm::apply` of the feature `kvm`.
    Ok(())
}

fn vcpu_thread(mut part: VcpuRestore) -> Result<(), vhost_user_timer_frontend::Error> {
    // The registers, counts left out, go into the hypervisor too: part.registers().
    let run = part.run(2 * REQUEST)?;
    println!(
        "vCPU {} runs from virtual count {} with cntvoff {:#x}",
        part.index(),
        run.virt_count,
        run.cntvoff
    );
    // KVM_RUN, …
    Ok(())
}
