//! Counts, offsets, timers and the rest of a VM with no restore open.

use vhost_user_timer_counter::{HostCounter, Source};

use super::*;

#[test]
fn a_running_vm_goes_on_with_its_offsets_and_registers() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(3);
        served.begin_restore(autorun());
        for vcpu in 0..3 {
            served
                .queue()
                .restore_vcpu(&row(vcpu, 1 << 50), LIMIT)
                .unwrap();
        }
        let (info, vm) = (served.info(), served.vm(3));
        served.end(end);

        let served = life.serve();
        let (info_after, vm_after) = (served.info(), served.vm(3));
        assert_eq!(info_after.phase, Phase::Running, "{end:?}");
        assert_eq!(info_after.epoch, 2);
        assert_eq!(info_after.cntvoff, info.cntvoff);
        assert_eq!(info_after.cntpoff, info.cntpoff);
        assert!(info_after.phys_virtualised);
        assert!(vm_after.virt_count > vm.virt_count && vm_after.phys_count > vm.phys_count);
        for (before, after) in vm.vcpus.iter().zip(&vm_after.vcpus) {
            for register in [
                Register::TimerCtl,
                Register::TimerCval,
                Register::PtimerCval,
            ] {
                assert_eq!(after.get(register), before.get(register));
            }
        }
        served.backend.log_with("Continuing with the VM");
    }
}

#[test]
fn a_paused_vm_stays_at_its_count() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(1);
        served.queue().resume(LIMIT).unwrap();
        let run = served.queue().pause(LIMIT).unwrap();
        served.end(end);
        let served = life.serve();
        assert_eq!(served.vm(1).virt_count, run.virt_count);
        assert_eq!(
            served.queue().resume(LIMIT).unwrap().virt_count,
            run.virt_count
        );
    }
}

#[test]
fn the_count_goes_on_at_its_rate_whatever_it_is_derived_from() {
    for source in ["monotonic", "boottime", "tsc"] {
        let mut life = Life::new();
        life.args = vec![format!("--counter-source={source}")];
        let named = Source::ALL.iter().find(|named| named.name() == source);
        if let Err(error) = HostCounter::open(*named.unwrap()) {
            eprintln!("skipped: {source}: {error}");
            continue;
        }

        let served = life.serve();
        served.configure(1);
        served.queue().resume(LIMIT).unwrap();
        let started = Instant::now();
        let before = served.vm(1);
        let offset = served.info().cntvoff;
        served.end(End::Killed);
        let served = life.serve();
        let after = served.vm(1);
        let most = started.elapsed().as_nanos() as u64;
        assert_eq!(served.info().cntvoff, offset, "{source}");
        let passed = after.virt_count - before.virt_count;
        // A hundredth more, since the TSC's rate is measured.
        assert!(
            (1..=most + most / 100).contains(&passed),
            "{source}: {passed} of {most} ns"
        );
    }
}

#[test]
fn a_timer_that_fell_due_meanwhile_fires_at_once_and_a_later_one_when_it_is_due() {
    let life = Life::new();
    let served = life.serve();
    served.configure(3);
    let start = served.queue().resume(LIMIT).unwrap();
    let soon = start.virt_count + 20_000_000;
    let later = start.phys_count + 400_000_000;
    served.set(1, Register::TimerCval, soon);
    served.set(1, Register::TimerCtl, ctl::ENABLE);
    served.set(2, Register::PtimerCval, later);
    served.set(2, Register::PtimerCtl, ctl::ENABLE);
    served.set(0, Register::TimerCval, soon);
    served.set(0, Register::TimerCtl, ctl::ENABLE | ctl::IMASK);
    served.end(End::Killed);
    while host_count().wrapping_sub(start.cntvoff) < soon {
        std::thread::yield_now();
    }

    let mut served = life.serve();
    let mut events = served.events();
    let (vcpu, timer, cval, count) = next_assertion(&mut events);
    assert_eq!((vcpu, timer, cval), (1, Timer::Virtual, soon));
    assert!(count >= soon);
    let (vcpu, timer, cval, count) = next_assertion(&mut events);
    assert_eq!((vcpu, timer, cval), (2, Timer::Physical, later));
    assert!(count >= later);
    assert!(
        events.try_next().unwrap().is_none(),
        "a masked timer never fires"
    );
}

#[test]
fn an_expiry_that_nobody_may_have_read_is_told_again() {
    let life = Life::new();
    let mut served = life.serve();
    served.configure(1);
    served.set(0, Register::TimerCtl, ctl::ENABLE);
    served.queue().resume(LIMIT).unwrap();
    assert_eq!(next_assertion(&mut served.events()).0, 0);
    served.end(End::Killed);
    let mut served = life.serve();
    assert_eq!(next_assertion(&mut served.events()).0, 0);
}

#[test]
fn a_pinned_offset_and_an_anchor_are_kept() {
    let life = Life::new();
    let served = life.serve();
    served.configure(1);
    let queue = served.queue();
    queue
        .set_counter_anchor(host_count(), 1 << 60, LIMIT)
        .unwrap();
    queue.set_counter_offset(1 << 59, LIMIT).unwrap();
    queue.resume(LIMIT).unwrap();
    let before = served.vm(1);
    served.end(End::Killed);
    let served = life.serve();
    let info = served.info();
    assert!(info.offset_pinned && info.anchored && info.phys_virtualised);
    assert_eq!((info.cntvoff, info.cntpoff), (1 << 59, 1 << 59));
    assert!(served.vm(1).virt_count > before.virt_count);
}

#[test]
fn a_vm_that_was_reset_stays_new_in_its_epoch() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.begin_restore(autorun());
    served.frontend.reset_device().unwrap();
    served.end(End::Killed);
    let served = life.serve();
    let info = served.info();
    assert_eq!((info.phase, info.vcpus, info.epoch), (Phase::New, 0, 2));
    served.configure(1);
    assert_eq!(served.vm(1).vcpus.len(), 1);
}

#[test]
fn a_backend_for_more_vcpus_goes_on_with_the_vm() {
    let mut life = Life::new();
    life.args = vec!["--max-vcpus=2".to_owned()];
    let served = life.serve();
    served.configure(2);
    served.set(1, Register::TimerCval, 99);
    served.end(End::Killed);
    life.args = vec!["--max-vcpus=100".to_owned()];
    let served = life.serve();
    assert_eq!(served.vm(2).vcpus[1].get(Register::TimerCval), Some(99));
    served.frontend.reset_device().unwrap();
    served.configure(100);
    served.set(99, Register::TimerCval, 98);
    served.end(End::Killed);
    let row = life.serve().queue().get_vm(99, 1, LIMIT).unwrap().vcpus[0];
    assert_eq!(row.get(Register::TimerCval), Some(98));
}
