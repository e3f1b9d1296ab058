//! SPEC.md, "Counters" and `info`: two clocks, each counting or frozen.

use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_kit::contract::{
    CNT, Client, Info, PCNT, Run, configure, info_flag, info_source, op, phase, restore, words,
};
use vhost_user_timer_kit::raw_driver::Rig;

use crate::world::{Clock, HZ, PHASES, Vm, World, one_of_each};

scenarios! {
    both {
        a_pause_freezes_the_virtual_clock_and_resume_goes_on_from_there:
            "4.3" "4.6" "4.7" "4.8" "5.41";
        keep_counting_lets_the_clocks_go_on_and_the_offsets_stay: "5.37";
        the_physical_clock_passes_the_host_counter_through_and_no_pause_freezes_it: "4.9" "7.15";
        a_ptimer_cnt_write_makes_the_physical_clock_the_vms_own_and_then_it_freezes_too: "4.10";
        one_clock_can_be_frozen_while_the_other_counts: "5.37" "6.9";
        an_offset_in_an_answer_is_the_host_count_less_the_count_of_that_instant:
            "4.3" "4.11" "5.41";
        all_arithmetic_is_modulo_two_to_the_64: "4.2";
        one_pair_of_offsets_serves_every_vcpu: "4.4" "6.8";
        info_says_what_the_vm_is: "4.11" "4.12" "5.40" "5.52";
        infos_flags_say_pinned_anchored_and_physical_virtualised: "5.40";
        restored_counts_the_vcpus_done_in_this_restore: "5.13" "5.40";
        the_offsets_never_change_while_the_vm_runs: "2.52" "4.5" "6.10";
        a_count_never_goes_back_over_any_number_of_pauses: "4.8" "5.37";
    }
    model {
        the_host_counter_may_pass_its_end: "4.2";
    }
    binary {
        the_host_counter_is_clock_monotonic_by_default: "4.1";
        the_host_counter_runs_at_the_vms_frequency: "4.1" "5.22";
        the_boottime_source_counts: "4.1";
        info_tells_the_source_until_there_is_an_anchor: "5.52" "5.53";
    }
}

/// A run is of one instant, and its counts are these.
#[track_caller]
fn assert_counts(run: Run, virt: u64, phys: u64) {
    // That each offset is the host count less the count, `Run::of` has seen.
    assert_eq!((run.virt_count, run.phys_count), (virt, phys));
}

fn a_pause_freezes_the_virtual_clock_and_resume_goes_on_from_there(on: World) {
    let mut vm = on.paused(2);
    let running = vm.resume();
    vm.pass(100);
    let paused = vm.pause();
    let passed = paused.host_count - running.host_count;
    assert!(passed >= 100);
    assert_eq!(paused.cntvoff, running.cntvoff);
    assert_counts(paused, running.virt_count + passed, paused.host_count);
    vm.pass(12_345);
    assert_eq!(vm.virt(), paused.virt_count);
    for vcpu in 0..2 {
        assert_eq!(vm.get_one(vcpu, CNT), paused.virt_count);
    }
    let resumed = vm.resume();
    assert_counts(resumed, paused.virt_count, resumed.host_count);
    // The offset moved by the pause.
    let pause = resumed.host_count - paused.host_count;
    assert!(pause >= 12_345);
    assert_eq!(resumed.cntvoff, paused.cntvoff + pause);
    vm.pass(7);
    let info = vm.info();
    assert_eq!(info.cntvoff, resumed.cntvoff);
    assert!(vm.virt() >= paused.virt_count + 7);
}

fn keep_counting_lets_the_clocks_go_on_and_the_offsets_stay(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(PCNT, 1)]);
    let running = vm.resume();
    let offsets = [running.cntvoff, running.cntpoff];
    let paused = vm.pause_counting();
    assert_eq!([paused.cntvoff, paused.cntpoff], offsets);
    vm.pass(12_345);
    assert_eq!(vm.phase(), phase::PAUSED);
    assert_eq!(vm.offsets(), offsets);
    let virt = vm.reads_now(Clock::Virtual, |vm| vm.get_one(0, CNT));
    let phys = vm.reads_now(Clock::Physical, |vm| vm.get_one(0, PCNT));
    assert!(virt >= paused.virt_count + 12_345 && phys >= paused.phys_count + 12_345);
    let resumed = vm.resume();
    assert_eq!([resumed.cntvoff, resumed.cntpoff], offsets);
    assert!(resumed.virt_count >= virt);
}

/// The physical count is the host counter's.
#[track_caller]
fn passes_through(vm: &mut Vm) {
    vm.pass(99);
    let low = vm.info().host_count;
    let count = vm.get_one(0, PCNT);
    let info = vm.info();
    assert!((low..=info.host_count).contains(&count), "{count}");
    assert_eq!((info.cntpoff, info.flags), (0, 0));
    let state = vm.state();
    assert_eq!(state.phys_count, state.host_count);
}

fn the_physical_clock_passes_the_host_counter_through_and_no_pause_freezes_it(on: World) {
    let mut vm = on.paused(2);
    passes_through(&mut vm);
    let run = vm.resume();
    assert_eq!(run.phys_count, run.host_count);
    passes_through(&mut vm);
    let run = vm.pause();
    assert_eq!(run.phys_count, run.host_count);
    passes_through(&mut vm);
    // A restore that brings no PTIMER_CNT leaves it so.
    vm.restore_begin(2, restore::AUTORUN);
    for vcpu in 0..2 {
        vm.restored(vcpu, 10);
    }
    passes_through(&mut vm);
}

fn a_ptimer_cnt_write_makes_the_physical_clock_the_vms_own_and_then_it_freezes_too(on: World) {
    let mut vm = on.paused(2);
    vm.set(1, &[(PCNT, 5_000)]);
    assert_eq!(vm.info().flags, 4);
    vm.pass(5);
    assert_eq!(vm.phys(), 5_000, "frozen");
    assert_eq!(vm.get_one(0, PCNT), 5_000);
    let running = vm.resume();
    assert_eq!(running.phys_count, 5_000);
    vm.pass(5);
    let paused = vm.pause();
    assert_eq!(paused.cntpoff, running.cntpoff);
    let passed = paused.host_count - running.host_count;
    assert_eq!(paused.phys_count, 5_000 + passed);
    vm.pass(5);
    assert_eq!(vm.phys(), paused.phys_count, "frozen by the pause");
    assert_eq!(vm.get_one(0, PCNT), paused.phys_count);
    let resumed = vm.resume();
    assert_eq!(resumed.phys_count, paused.phys_count);
    vm.pause_counting();
    vm.pass(5);
    assert_eq!(vm.offsets()[1], resumed.cntpoff, "not by this one");
}

fn one_clock_can_be_frozen_while_the_other_counts(on: World) {
    for (written, clock) in [(PCNT, Clock::Virtual), (CNT, Clock::Physical)] {
        let mut vm = on.paused(1);
        vm.set(0, &[(PCNT, 1)]);
        let running = vm.resume();
        vm.pause_counting();
        vm.set(0, &[(written, 500)]);
        vm.pass(10);
        let at = usize::from(clock.code());
        let offsets = [running.cntvoff, running.cntpoff];
        assert_eq!(vm.offsets()[at], offsets[at], "{clock:?} counts on");
        assert_eq!(vm.counts()[1 - at], 500);
        assert_eq!(vm.get_one(0, written), 500);
        let resumed = vm.resume();
        assert_eq!([resumed.cntvoff, resumed.cntpoff][at], offsets[at]);
        assert_eq!([resumed.virt_count, resumed.phys_count][1 - at], 500);
    }
}

fn an_offset_in_an_answer_is_the_host_count_less_the_count_of_that_instant(on: World) {
    let mut vm = on.paused(1);
    for _ in 0..4 {
        vm.pass(1_000);
        let info = vm.info();
        assert_eq!(info.cntvoff, info.host_count, "the count stands at 0");
        let run = vm.pause();
        assert_counts(run, 0, run.host_count);
    }
    vm.set(0, &[(CNT, 1_000), (PCNT, 2_000)]);
    for _ in 0..4 {
        vm.pass(1_000);
        let info = vm.info();
        assert_eq!(info.cntvoff, info.host_count.wrapping_sub(1_000));
        assert_eq!(info.cntpoff, info.host_count.wrapping_sub(2_000));
        assert_counts(vm.pause(), 1_000, 2_000);
    }
}

fn all_arithmetic_is_modulo_two_to_the_64(on: World) {
    for count in [0, 1, u64::MAX, u64::MAX - 1_000, 1 << 63] {
        let mut vm = on.paused(1);
        let phys = count.wrapping_sub(1);
        vm.set(0, &[(CNT, count), (PCNT, phys)]);
        let running = vm.resume();
        assert_counts(running, count, phys);
        vm.pass(3);
        vm.reads_now(Clock::Virtual, |vm| vm.get_one(0, CNT));
        let paused = vm.pause();
        let passed = paused.host_count - running.host_count;
        assert!(passed >= 3);
        assert_counts(
            paused,
            count.wrapping_add(passed),
            phys.wrapping_add(passed),
        );
    }
}

fn the_host_counter_may_pass_its_end(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(CNT, u64::MAX), (PCNT, u64::MAX - 1)]);
    vm.resume();
    vm.pass(3);
    assert_eq!(vm.counts(), [2, 1]);
    assert_eq!(vm.get_one(0, CNT), 2);
    let host = vm.exact().now().host;
    vm.pass(u64::MAX - host);
    let before = vm.counts();
    vm.pass(10);
    assert_eq!(vm.exact().now().host, 9);
    let after = before.map(|count| count.wrapping_add(10));
    assert_eq!(vm.counts(), after);
    vm.pause();
    vm.pass(10);
    assert_eq!(vm.counts(), after);
}

fn one_pair_of_offsets_serves_every_vcpu(on: World) {
    let mut vm = on.paused(16);
    vm.set(3, &[(CNT, 70), (PCNT, 80)]);
    for vcpu in 0..16 {
        assert_eq!(vm.get(vcpu, &[CNT, PCNT]), [70, 80]);
    }
    vm.resume();
    vm.pass(11);
    for vcpu in 0..16 {
        vm.reads_now(Clock::Virtual, |vm| vm.get_one(vcpu, CNT));
        vm.reads_now(Clock::Physical, |vm| vm.get_one(vcpu, PCNT));
        let [virt, phys] = vm.get(vcpu, &[CNT, PCNT])[..] else {
            panic!("two values");
        };
        assert_eq!(phys - virt, 10, "both are of one instant");
        assert!(virt >= 81);
    }
    let state = vm.state();
    for vcpu in &state.vcpus {
        assert_eq!(vcpu.registers[1], state.virt_count);
        assert_eq!(vcpu.registers[4], state.phys_count);
    }
}

fn info_says_what_the_vm_is(on: World) {
    for wanted in PHASES {
        let mut vm = on.paused(3);
        let run = match wanted {
            phase::NEW => {
                vm = on.fresh();
                None
            }
            phase::RUNNING => Some(vm.resume()),
            phase::ARMED => {
                vm = on.configured(3, configure::CONFIRM);
                Some(vm.resume())
            }
            phase::RESTORING => {
                vm.restore_begin(3, 0);
                None
            }
            _ => None,
        };
        let frozen = vm.info().host_count;
        vm.pass(40);
        let info = vm.info();
        let configured = wanted != phase::NEW;
        let virt = run.map_or(0, |run| info.host_count - run.host_count);
        let expected = Info {
            version: 1,
            phase: wanted,
            vcpus: if configured { 3 } else { 0 },
            restored: match wanted {
                phase::PAUSED | phase::RUNNING | phase::ARMED => 3,
                _ => 0,
            },
            frequency: HZ,
            cntvoff: if configured {
                info.host_count - virt
            } else {
                0
            },
            // While RESTORING the physical clock is frozen as well.
            cntpoff: match wanted {
                phase::RESTORING => info.cntpoff,
                _ => 0,
            },
            epoch: if wanted == phase::RESTORING { 2 } else { 1 },
            max_vcpus: 4096,
            request_queues: 4,
            abi: 0,
            flags: match wanted {
                phase::ARMED => info_flag::CONFIRM,
                _ => 0,
            },
            source: info_source::MONOTONIC,
            host_count: info.host_count,
        };
        assert_eq!(info, expected);
        if wanted == phase::RESTORING {
            assert!((40..=info.host_count).contains(&info.cntpoff));
            assert!(info.host_count - info.cntpoff <= frozen);
        }
        if let Some(model) = vm.model() {
            // For config space, which no request asks for.
            use zerocopy::IntoBytes;
            assert_eq!(Info::of(model.vm.info(model.now()).as_bytes()), expected);
            assert_eq!(
                info.cntpoff,
                if wanted == phase::RESTORING { 40 } else { 0 }
            );
        }
    }
}

fn infos_flags_say_pinned_anchored_and_physical_virtualised(on: World) {
    let mut vm = on.paused_arm(1);
    assert_eq!((vm.info().abi, vm.info().flags), (1, 0));
    vm.set_anchor(1, 2);
    assert_eq!(vm.info().flags, 2);
    vm.set_offset(1);
    assert_eq!(vm.info().flags, 7);
}

fn restored_counts_the_vcpus_done_in_this_restore(on: World) {
    let mut vm = on.restoring(3, 0);
    for (n, vcpu) in (0..).zip([2, 0, 1]) {
        assert_eq!(vm.info().restored, n);
        assert_eq!(vm.restored(vcpu, 1), 2 - n);
    }
    let info = vm.info();
    assert_eq!((info.phase, info.restored), (phase::PAUSED, 3));
}

fn the_offsets_never_change_while_the_vm_runs(on: World) {
    let mut vm = on.running(3);
    let offsets = vm.offsets();
    let mut last = 0;
    for (op, vcpu, body) in one_of_each(3) {
        vm.pass(1_000);
        if op != op::PAUSE && op != op::SET_TIME_PAGE {
            vm.ask(op, vcpu, 0, &body);
        }
        assert_eq!(vm.phase(), phase::RUNNING);
        assert_eq!(vm.offsets(), offsets, "{op:#x}");
        for vcpu in 0..3 {
            let count = vm.reads_now(Clock::Virtual, |vm| vm.get_one(vcpu, CNT));
            assert!(count >= last);
            last = count;
        }
    }
}

fn a_count_never_goes_back_over_any_number_of_pauses(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(PCNT, 0)]);
    let mut last = [0, 0];
    for n in 0..200 {
        vm.pass(n * 7 % 13);
        match n % 4 {
            0 | 2 => vm.resume(),
            1 => vm.pause_counting(),
            _ => vm.pause(),
        };
        let counts = vm.counts();
        assert!(counts[0] >= last[0] && counts[1] >= last[1]);
        last = counts;
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * HZ + time.tv_nsec as u64
}

/// The host count lies between two readings of this clock, in ticks of so many nanoseconds.
fn counts_by(args: &[&str], clock: ClockId, tick: u64) {
    let rig = Rig::launch_release(args);
    let mut client = Client::connect(&rig);
    client.configure(1);
    for _ in 0..100 {
        let before = nanoseconds(clock) / tick;
        let info = client.info();
        let after = nanoseconds(clock) / tick;
        assert_eq!(info.frequency, HZ / tick);
        assert!((before..=after).contains(&info.host_count));
    }
}

fn the_host_counter_is_clock_monotonic_by_default() {
    counts_by(&[], ClockId::Monotonic, 1);
}

fn the_host_counter_runs_at_the_vms_frequency() {
    counts_by(&["--counter-frequency=62500000"], ClockId::Monotonic, 16);
}

fn the_boottime_source_counts() {
    counts_by(&["--counter-source=boottime"], ClockId::Boottime, 1);
}

fn info_tells_the_source_until_there_is_an_anchor() {
    let native = if cfg!(target_arch = "aarch64") {
        ("cntvct", info_source::CNTVCT)
    } else {
        ("monotonic", info_source::MONOTONIC)
    };
    for (name, source) in [native, ("boottime", info_source::BOOTTIME)] {
        let rig = Rig::launch_release(&["--counter-source", name]);
        let mut client = Client::connect(&rig);
        let config = crate::connection::config(&mut client.driver.control, 0, 64);
        assert_eq!(
            Info::of(&config.unwrap()).source,
            source,
            "the config space"
        );
        assert_eq!(client.info().source, source, "NEW");
        client.configure(1);
        assert_eq!(client.info().source, source);
        client.vm(op::SET_COUNTER_ANCHOR, &words(&[1, 1])).ok(0);
        assert_eq!(client.info().source, info_source::MONOTONIC);
        client.resume();
        assert_eq!(client.info().source, info_source::MONOTONIC);
    }
}
