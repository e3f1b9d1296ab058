//! Restore and its gate (SPEC.md, "Restore").

use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, Run, VM, Vcpu, info_flag, op, phase,
    request, restore, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{Layout, Rig, Setup};

fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = Client::connect_with(
        rig,
        Setup {
            size: 1024,
            ..Setup::default()
        },
    );
    client.configure(vcpus);
    client
}

fn realtime() -> u64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// RESTORE_DONE together with answers that it releases: its own comes last.
fn done_with(client: &mut Client, vcpu: u32, waiting: &[u16]) -> Vec<Answer> {
    let done = request(op::RESTORE_DONE, vcpu, 0, &[]);
    let done = client.driver.submit(1, &done, 24, &Layout::plain());
    client.all_released(1, &[waiting, &[done]].concat())
}

#[test]
fn restore_begin_wants_the_configured_number_of_vcpus_and_known_flags() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    for body in [
        restore_body(2, 0, 0, 0),
        restore_body(4, 0, 0, 0),
        restore_body(0, 0, 0, 0),
        restore_body(3, 8, 0, 0),
        restore_body(3, 1 << 31, 0, 0),
    ] {
        let answer = client.vm(op::RESTORE_BEGIN, &body);
        assert_eq!(answer.outcome(), (status::EINVAL, 0));
    }
    let info = client.info();
    assert_eq!((info.phase, info.epoch), (phase::PAUSED, 1));
}

#[test]
fn while_restoring_both_clocks_stand_still() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.resume();
    client.vm(op::PAUSE, &words(&[1])).ok(40);
    client.restore_begin(2, 0);
    let first = client.state();
    loop {
        let state = client.state();
        assert_eq!(state.virt_count, first.virt_count);
        assert_eq!(state.phys_count, first.phys_count);
        if state.host_count != first.host_count {
            break;
        }
    }
}

#[test]
fn info_counts_the_vcpus_that_are_done() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    client.restore_begin(3, 0);
    for (n, vcpu) in (0..).zip([2, 0, 1]) {
        assert_eq!(client.info().restored, n);
        client.bring(vcpu, 0);
        assert_eq!(client.restore_done(vcpu), 2 - n);
    }
    let info = client.info();
    assert_eq!((info.phase, info.restored), (phase::PAUSED, 3));
}

#[test]
fn restore_done_needs_ctl_cval_and_cnt_and_says_which_are_missing() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    // Set before the restore: that was another epoch.
    client.set(0, &[(CTL, 0), (CVAL, 0), (CNT, 0)]);
    let bits = [(CTL, 1), (CNT, 2), (CVAL, 4)];
    for brought in 0..8u32 {
        client.restore_begin(2, 0);
        // The physical timer's are not needed.
        client.set(0, &[(PCTL, 0), (PCVAL, 0), (PCNT, 0)]);
        for (id, bit) in bits {
            if brought & bit != 0 {
                client.set(0, &[(id, 1)]);
            }
        }
        let answer = client.vcpu(op::RESTORE_DONE, 0, &[]);
        match 7 & !brought {
            0 => assert_eq!(answer.status, status::OK),
            missing => assert_eq!(answer.outcome(), (status::ENODATA, missing)),
        }
        assert_eq!(client.info().restored, u32::from(brought == 7));
    }
}

#[test]
fn repeating_restore_done_is_fine() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.restore_begin(2, 0);
    client.bring(0, 0);
    for _ in 0..3 {
        assert_eq!(client.restore_done(0), 1);
    }
    assert_eq!(client.info().phase, phase::RESTORING);
    client.bring(1, 0);
    assert_eq!(client.restore_done(1), 0);
}

#[test]
fn the_count_settles_on_the_largest_unsigned_value_of_all_vcpus() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    for (counts, settled) in [
        ([5, 9, 7], 9),
        ([0, 0, 0], 0),
        ([1 << 63, (1 << 63) - 1, 0], 1 << 63),
        ([u64::MAX, 1, 2], u64::MAX),
    ] {
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            client.restore_begin(3, 0);
            for vcpu in order {
                client.bring(vcpu, counts[vcpu as usize]);
                client.restore_done(vcpu);
            }
            for vcpu in 0..3 {
                assert_eq!(client.get_one(vcpu, CNT), settled);
            }
            assert_eq!(client.info().flags & info_flag::PHYS_VIRTUALISED, 0);
        }
    }
}

#[test]
fn the_physical_count_settles_alike_where_any_vcpu_brought_one() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    client.restore_begin(3, 0);
    for vcpu in 0..3 {
        client.bring(vcpu, 1);
    }
    client.set(1, &[(PCNT, 44)]);
    client.set(2, &[(PCNT, 33)]);
    for vcpu in 0..3 {
        client.restore_done(vcpu);
    }
    assert_eq!(client.get(0, &[CNT, PCNT]), [1, 44]);
    assert_eq!(client.info().flags, info_flag::PHYS_VIRTUALISED);
    let run = client.resume();
    assert_eq!((run.virt_count, run.phys_count), (1, 44));
}

#[test]
fn with_strict_unequal_counts_refuse_the_last_restore_done_and_the_restore_stays_open() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.restore_begin(2, restore::STRICT | restore::AUTORUN);
    client.bring(0, 10);
    client.restore_done(0);
    client.bring(1, 11);
    for _ in 0..2 {
        let done = client.vcpu(op::RESTORE_DONE, 1, &[]);
        assert_eq!(done.outcome(), (status::EINVAL, 0));
        let info = client.info();
        assert_eq!((info.phase, info.restored), (phase::RESTORING, 1));
    }
    client.set(1, &[(CNT, 10)]);
    assert_eq!(client.restore_done(1), 0);
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn strict_looks_at_the_physical_count_too() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.restore_begin(2, restore::STRICT);
    for vcpu in 0..2 {
        client.bring(vcpu, 10);
        client.set(vcpu, &[(PCNT, 20 + u64::from(vcpu))]);
    }
    client.restore_done(0);
    let done = client.vcpu(op::RESTORE_DONE, 1, &[]);
    assert_eq!(done.outcome(), (status::EINVAL, 0));
    client.set(1, &[(PCNT, 20)]);
    assert_eq!(client.restore_done(1), 0);
}

#[test]
fn elapsed_adds_the_wall_clock_time_since_the_save_to_both_counts() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    const HOUR: u64 = 3_600_000_000_000;
    for physical in [false, true] {
        let saved = realtime() - HOUR;
        let begin = restore_body(2, restore::ELAPSED, saved, 0);
        client.vm(op::RESTORE_BEGIN, &begin).ok(0);
        for vcpu in 0..2 {
            client.bring(vcpu, 1_000);
            if physical {
                client.set(vcpu, &[(PCNT, 2_000)]);
            }
        }
        client.restore_done(0);
        let before = realtime() - saved;
        client.restore_done(1);
        let after = realtime() - saved;
        let counts = client.get(0, &[CNT, PCNT]);
        assert!((before..=after).contains(&(counts[0] - 1_000)));
        if physical {
            assert_eq!(counts[1] - 2_000, counts[0] - 1_000);
        }
    }
}

#[test]
fn elapsed_from_the_future_adds_nothing_and_is_logged() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    let begin = restore_body(1, restore::ELAPSED, realtime() + 60_000_000_000, 0);
    client.vm(op::RESTORE_BEGIN, &begin).ok(0);
    client.bring(0, 1_000);
    client.restore_done(0);
    assert_eq!(client.get_one(0, CNT), 1_000);
    client.settle();
    assert!(
        rig.backend.log().contains("ELAPSED"),
        "{}",
        rig.backend.log()
    );
}

#[test]
fn without_elapsed_the_time_of_the_save_is_not_looked_at() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client
        .vm(op::RESTORE_BEGIN, &restore_body(1, 0, 1, 0))
        .ok(0);
    client.bring(0, 1_000);
    client.restore_done(0);
    assert_eq!(client.get_one(0, CNT), 1_000);
}

#[test]
fn wait_run_is_answered_only_in_running_and_all_waiters_get_one_and_the_same_run() {
    let rig = Rig::launch(&["--request-queues=3"]);
    let mut client = Client::connect_with(
        &rig,
        Setup {
            queues: 4,
            size: 256,
            ..Setup::default()
        },
    );
    let vcpus = 30;
    client.configure(vcpus);
    client.restore_begin(vcpus, restore::AUTORUN);
    let mut waiting = vec![Vec::new(); 4];
    for vcpu in 0..vcpus {
        let queue = 1 + vcpu as u16 % 3;
        waiting[usize::from(queue)].push(client.wait_run(queue, vcpu));
        client.bring_on(queue, vcpu, 100 + u64::from(vcpu));
        if vcpu != vcpus - 1 {
            client.restore_done(vcpu);
        }
        for queue in 1..4 {
            client.settle_on(queue);
            assert_eq!(client.driver.used_already(queue), None);
        }
    }
    client.queue = 1;
    let done = request(op::RESTORE_DONE, vcpus - 1, 0, &[]);
    let done = client.driver.submit(1, &done, 24, &Layout::plain());
    waiting[1].push(done);
    let mut answers = client.all_released(1, &waiting[1]);
    assert_eq!(answers.pop().unwrap().ok(8), [0; 8]);
    for queue in [2, 3] {
        answers.extend(client.all_released(queue, &waiting[usize::from(queue)]));
    }
    assert_eq!(answers.len(), 30);
    let run = Run::of(answers[0].ok(40));
    assert_eq!(run.virt_count, 100 + 29);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    // And that is how the VM runs.
    assert_eq!(client.info().cntvoff, run.cntvoff);
    // Who asks later is answered at once, with a later instant of the same offsets.
    let late = client.vcpu(op::WAIT_RUN, 7, &[]);
    let late = Run::of(late.ok(40));
    assert_eq!((late.cntvoff, late.cntpoff), (run.cntvoff, run.cntpoff));
}

#[test]
fn after_a_restore_without_autorun_waiters_wait_for_resume() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.restore_begin(1, 0);
    let head = client.wait_run(1, 0);
    client.bring(0, 3);
    client.restore_done(0);
    client.settle();
    assert_eq!(client.driver.used_already(1), None);
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    let answers = client.all_released(1, &[head, resume]);
    assert_eq!(answers[0], answers[1]);
    assert_eq!(Run::of(answers[0].ok(40)).virt_count, 3);
}

#[test]
fn wait_run_in_paused_waits_for_resume_and_in_running_is_answered_at_once() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    let heads = [
        client.wait_run(1, 0),
        client.wait_run(1, 1),
        client.wait_run(1, 1),
    ];
    client.settle();
    assert_eq!(client.driver.used_already(1), None);
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    let answers = client.all_released(1, &[&heads[..], &[resume]].concat());
    assert!(answers.iter().all(|answer| *answer == answers[3]));
    client.vcpu(op::WAIT_RUN, 1, &[]).ok(40);
}

#[test]
fn restore_begin_answers_older_waiters_estale() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    let paused = client.wait_run(1, 0);
    client.settle();
    for begun in 0..2u64 {
        let begin = request(op::RESTORE_BEGIN, VM, 0, &restore_body(2, 0, 0, 0));
        let restoring = if begun == 0 {
            paused
        } else {
            let head = client.wait_run(1, 1);
            client.settle();
            head
        };
        let begin = client.driver.submit(1, &begin, 16, &Layout::plain());
        let answers = client.all_released(1, &[restoring, begin]);
        assert_eq!(answers[0].outcome(), (status::ESTALE, 0));
        // The new epoch is current by then.
        assert_eq!(answers[0].epoch, begun + 2);
    }
}

#[test]
fn restore_abort_answers_older_waiters_ecanceled() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.restore_begin(2, 0);
    let head = client.wait_run(1, 0);
    client.settle();
    let abort = request(op::RESTORE_ABORT, VM, 0, &[]);
    let abort = client.driver.submit(1, &abort, 16, &Layout::plain());
    let answers = client.all_released(1, &[head, abort]);
    assert_eq!(answers[0].outcome(), (status::ECANCELED, 0));
    answers[1].ok(0);
}

#[test]
fn when_the_time_out_passes_waiters_get_etimedout_and_the_restore_stays_open() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 16);
    // All with one kick, so that it takes a stop of 300 ms in the backend to spoil it.
    let begin = restore_body(16, restore::AUTORUN, 0, 300_000_000);
    let begin = request(op::RESTORE_BEGIN, VM, 0, &begin);
    let mut others = vec![client.driver.add(1, &begin, 16, &Layout::plain())];
    let heads: Vec<u16> = (0..3)
        .map(|vcpu| {
            let wait = request(op::WAIT_RUN, vcpu, 0, &[]);
            client.driver.add(1, &wait, 56, &Layout::plain())
        })
        .collect();
    let there: Vec<u32> = (0..16).filter(|vcpu| ![7, 12, 13].contains(vcpu)).collect();
    let brought: Vec<u8> = there
        .iter()
        .flat_map(|vcpu| Vcpu::with(*vcpu, [0, 5, 0, 0, 0, 0]).to_bytes())
        .collect();
    let set_vm = request(op::SET_VM, VM, 0, &brought);
    others.push(client.driver.add(1, &set_vm, 16, &Layout::plain()));
    for vcpu in there {
        let done = request(op::RESTORE_DONE, vcpu, 0, &[]);
        others.push(client.driver.add(1, &done, 24, &Layout::plain()));
    }
    client.driver.rings[1].kick(&client.driver.memory);
    let answers = client.all_released(1, &[&heads[..], &others[..]].concat());
    let (waited, done) = answers.split_at(3);
    assert!(done.iter().all(|answer| answer.status == status::OK));
    // As many as were missing when it passed, the same for all; three unless this was slow.
    let missing = waited[0].detail;
    assert!((3..=16).contains(&missing));
    for answer in waited {
        assert_eq!(answer.outcome(), (status::ETIMEDOUT, missing));
    }
    client.settle();
    let log = rig.backend.log();
    assert!(missing != 3 || log.contains("7, 12-13"), "{log}");

    assert_eq!(client.info().phase, phase::RESTORING);
    assert_eq!(client.info().restored, 13);
    for vcpu in [7, 12, 13] {
        client.bring(vcpu, 6);
        client.restore_done(vcpu);
    }
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn the_time_out_comes_without_any_request() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    // Waiting already when the restore begins would be ESTALE: it is asked right after.
    let begin = restore_body(2, 0, 0, 300_000_000);
    let begin = request(op::RESTORE_BEGIN, VM, 0, &begin);
    let begin = client.driver.add(1, &begin, 16, &Layout::plain());
    let wait = request(op::WAIT_RUN, 1, 0, &[]);
    let wait = client.driver.submit(1, &wait, 56, &Layout::plain());
    let answers = client.all_released(1, &[begin, wait]);
    answers[0].ok(0);
    assert_eq!(answers[1].outcome(), (status::ETIMEDOUT, 2));
}

#[test]
fn a_time_out_of_0_or_of_centuries_never_passes() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    for timeout_ns in [0, u64::MAX] {
        let begin = restore_body(1, restore::AUTORUN, 0, timeout_ns);
        client.vm(op::RESTORE_BEGIN, &begin).ok(0);
        let head = client.wait_run(1, 0);
        client.bring(0, 1);
        client.settle();
        assert_eq!(client.driver.used_already(1), None);
        let answers = done_with(&mut client, 0, &[head]);
        answers[0].ok(40);
        client.pause();
    }
}

#[test]
fn a_late_vcpu_leaves_the_offset_alone() {
    // The defect of KVM that began all this: whoever comes last resets it for all.
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 4);
    client.restore_begin(4, restore::AUTORUN);
    for vcpu in 0..4 {
        client.bring(vcpu, 1_000_000_000);
    }
    for vcpu in 0..3 {
        client.restore_done(vcpu);
    }
    // The last brings a smaller count.
    client.set(3, &[(CNT, 5)]);
    let head = client.wait_run(1, 0);
    let answers = done_with(&mut client, 3, &[head]);
    assert_eq!(Run::of(answers[0].ok(40)).virt_count, 1_000_000_000);
}

#[test]
fn what_set_vm_brings_counts_as_brought() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    client.restore_begin(3, 0);
    let body: Vec<u8> = [2, 0, 1]
        .iter()
        .flat_map(|vcpu| {
            let n = u64::from(*vcpu);
            Vcpu::with(*vcpu, [1, 100 + n, 200 + n, 3, 300 + n, 400 + n]).to_bytes()
        })
        .collect();
    client.vm(op::SET_VM, &body).ok(0);
    for vcpu in 0..3 {
        client.restore_done(vcpu);
    }
    for vcpu in 0..3u32 {
        let n = u64::from(vcpu);
        assert_eq!(
            client.get(vcpu, &[CTL, CNT, CVAL, PCTL, PCNT, PCVAL]),
            [1, 102, 200 + n, 3, 302, 400 + n]
        );
    }
}

#[test]
fn set_vm_sets_what_is_present_and_leaves_the_rest() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 1);
    client.set(0, &[(CTL, 1), (CVAL, 5), (PCVAL, 6)]);
    client.restore_begin(1, 0);
    let mut vcpu = Vcpu::with(0, [3, 7, 8, 1, 9, 10]);
    vcpu.present = 0b000_110;
    client.vm(op::SET_VM, &vcpu.to_bytes()).ok(0);
    let done = client.vcpu(op::RESTORE_DONE, 0, &[]);
    assert_eq!(done.outcome(), (status::ENODATA, 1));
    vcpu.present = 1;
    vcpu.registers = [2, 0, 0, 0, 0, 0];
    client.vm(op::SET_VM, &vcpu.to_bytes()).ok(0);
    client.restore_done(0);
    assert_eq!(client.get(0, &[CTL, CNT, CVAL]), [2, 7, 8]);
    assert_eq!(client.info().flags & info_flag::PHYS_VIRTUALISED, 0);
}

#[test]
fn a_bad_entry_of_set_vm_is_einval_with_its_index_and_nothing_is_set() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 3);
    client.restore_begin(3, 0);
    let good = |vcpu| Vcpu::with(vcpu, [1, 2, 3, 1, 5, 6]);
    let mut unknown_bit = good(1);
    unknown_bit.present = 0x40;
    for bad in [good(3), good(u32::MAX), unknown_bit] {
        let body = [good(0).to_bytes(), good(2).to_bytes(), bad.to_bytes()].concat();
        let answer = client.vm(op::SET_VM, &body);
        assert_eq!(answer.outcome(), (status::EINVAL, 2), "{bad:?}");
    }
    let done = client.vcpu(op::RESTORE_DONE, 0, &[]);
    assert_eq!(done.outcome(), (status::ENODATA, 7));
}

#[test]
fn set_vm_does_not_touch_a_vcpu_that_is_done() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.restore_begin(2, 0);
    client.bring(0, 4);
    client.restore_done(0);
    let body = [1, 0].map(|vcpu| Vcpu::with(vcpu, [1, 2, 3, 1, 5, 6]).to_bytes());
    let answer = client.vm(op::SET_VM, &body.concat());
    assert_eq!(answer.outcome(), (status::EBUSY, 1));
    let done = client.vcpu(op::RESTORE_DONE, 1, &[]);
    assert_eq!(done.outcome(), (status::ENODATA, 7));
}

#[test]
fn get_vm_is_one_instant_of_any_range() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 5);
    for vcpu in 0..5 {
        client.set(vcpu, &[(CVAL, 10 + u64::from(vcpu))]);
    }
    client.resume();
    let state = client.state();
    assert_eq!(state.host_count, state.phys_count);
    for vcpu in &state.vcpus {
        assert_eq!(vcpu.present, 0x3f);
        assert_eq!(vcpu.registers[1], state.virt_count);
        assert_eq!(vcpu.registers[2], 10 + u64::from(vcpu.vcpu));
    }
    use vhost_user_timer_kit::contract::{VmState, range_body};
    for (first, count) in [(0, 0), (5, 0), (0, 5), (4, 1), (1, 3)] {
        let answer = client.vm(op::GET_VM, &range_body(first, count));
        let state = VmState::of(answer.ok(40 + 56 * count as usize));
        assert_eq!((state.first, state.count), (first, count));
        let named: Vec<u32> = state.vcpus.iter().map(|vcpu| vcpu.vcpu).collect();
        assert_eq!(named, (first..first + count).collect::<Vec<_>>());
    }
    for (first, count) in [(0, 6), (5, 1), (6, 0), (u32::MAX, 1), (1, u32::MAX)] {
        let answer = client.vm(op::GET_VM, &range_body(first, count));
        assert_eq!(answer.outcome(), (status::EINVAL, 0), "{first}+{count}");
    }
}

#[test]
fn no_count_goes_back_over_a_restore_of_what_was_saved() {
    let rig = Rig::launch(&[]);
    let mut client = configured(&rig, 2);
    client.resume();
    let mut last = 0;
    for _ in 0..20 {
        client.pause();
        let saved = client.state();
        assert!(saved.virt_count > last);
        last = saved.virt_count;
        client.restore_begin(2, restore::AUTORUN);
        let body: Vec<u8> = saved.vcpus.iter().flat_map(|v| v.to_bytes()).collect();
        client.vm(op::SET_VM, &body).ok(0);
        client.restore_done(1);
        let head = client.wait_run(1, 0);
        let answers = done_with(&mut client, 0, &[head]);
        assert_eq!(Run::of(answers[0].ok(40)).virt_count, last);
    }
}
