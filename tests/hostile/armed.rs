//! Frontends that misuse ARMED. Whatever they send, nobody is released before CONFIRM_RUN names the
//! VM's own offsets, and then everybody is released once.

use vhost_user_timer_kit::confirming::{CONFIRM, ONE_OFFSET};
use vhost_user_timer_kit::contract::{
    Answer, Client, Info, PHASE_CHANGED, Run, VM, info_flag, op, pause_body, phase, request,
    restore, status, words,
};
use vhost_user_timer_kit::raw_driver::{Driver, Rig, load, save, seed};

const VCPUS: u32 = 4;

fn confirm_request(cntvoff: u64, cntpoff: u64) -> Vec<u8> {
    request(op::CONFIRM_RUN, VM, 0, &words(&[cntvoff, cntpoff]))
}

fn launch() -> Rig {
    Rig::launch_release(&["--request-queues=2", "--log-level=error"])
}

fn connect(rig: &Rig) -> Client {
    rig.client().queues(3).queue_size(256).connect()
}

/// A VM that is ARMED by a restore.
fn armed(rig: &Rig) -> Client {
    let mut client = connect(rig);
    client.configure_confirming(VCPUS);
    arm(&mut client);
    client
}

/// A restore up to ARMED.
fn arm(client: &mut Client) {
    client.restore_begin(VCPUS, restore::AUTORUN);
    for vcpu in 0..VCPUS {
        client.bring(vcpu, 1_000 + u64::from(vcpu));
    }
    for vcpu in 0..VCPUS {
        client.restore_done(vcpu);
    }
    assert_eq!(client.info().phase, phase::ARMED);
}

/// Checks that the VM is as it was and has released nobody, and that it opens now for the waiter on
/// queue 2.
#[track_caller]
fn unchanged_and_opened(client: &mut Client, before: Info, waiting: u16) {
    let at_zero = |info: Info| Info {
        host_count: 0,
        ..info
    };
    assert_eq!(at_zero(client.info()), at_zero(before));
    assert!(client.driver.used_already(2).is_none(), "somebody runs");
    let run = client.confirm();
    assert_eq!(Run::of(client.released(2, waiting).ok(40)), run);
}

/// Sends this many requests at once on each of these queues, and returns their answers.
fn flood(
    client: &mut Client,
    queues: &[u16],
    each: usize,
    body: impl Fn(usize) -> Vec<u8>,
) -> Vec<Answer> {
    let layout = client.layout.clone();
    for n in 0..each {
        for &queue in queues {
            client.driver.add(queue, &body(n), 56, &layout);
        }
    }
    for &queue in queues {
        let Driver { rings, memory, .. } = &mut client.driver;
        rings[usize::from(queue)].kick(memory);
    }
    let answers = queues
        .iter()
        .flat_map(|queue| std::iter::repeat_n(*queue, each));
    answers
        .map(|queue| Answer::of(&client.driver.used(queue)))
        .collect()
}

#[test]
fn a_flood_of_confirmations_of_other_offsets_opens_nothing() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let rig = launch();
    let mut client = armed(&rig);
    let info = client.info();
    let Info {
        cntvoff, cntpoff, ..
    } = info;
    let waiting = client.wait_run(2, 3);
    client.settle_on(2);
    let near = [
        (cntvoff.wrapping_add(1), cntpoff),
        (cntvoff, cntpoff.wrapping_sub(1)),
        (cntpoff, cntvoff),
        (0, 0),
        (cntvoff.swap_bytes(), cntpoff.swap_bytes()),
    ];
    assert_ne!(cntvoff, cntpoff);
    for _ in 0..50 {
        let wrong: Vec<_> = (0..100)
            .map(|n| match near.get(n) {
                Some(offsets) => *offsets,
                None => (random.u64(..), random.u64(..)),
            })
            .collect();
        let answers = flood(&mut client, &[1], 100, |n| {
            confirm_request(wrong[n].0, wrong[n].1)
        });
        for answer in answers {
            assert_eq!(answer.outcome(), (status::EINVAL, 0), "VUT_SEED={seed}");
        }
    }
    unchanged_and_opened(&mut client, info, waiting);
}

#[test]
fn a_flood_of_right_confirmations_opens_the_gate_once() {
    let rig = launch();
    let mut client = armed(&rig);
    // What came before ARMED is read first.
    for _ in 0..8 {
        client.post_event_buffer();
    }
    while client.event().what() != (PHASE_CHANGED, 0, phase::ARMED) {}
    let Info {
        cntvoff, cntpoff, ..
    } = client.info();
    let waiting = [0, 1].map(|vcpu| client.wait_run(2, vcpu));
    client.settle_on(2);
    let layout = client.layout.clone();
    let heads: Vec<_> = (0..100)
        .map(|_| {
            let bytes = confirm_request(cntvoff, cntpoff);
            client.driver.add(1, &bytes, 56, &layout)
        })
        .collect();
    let Driver { rings, memory, .. } = &mut client.driver;
    rings[1].kick(memory);
    let runs: Vec<_> = client
        .all_released(1, &heads)
        .iter()
        .map(|answer| Run::of(answer.ok(40)))
        .collect();
    // The first one changed the phase; the others changed nothing.
    let opened = runs[0];
    assert!(runs.iter().all(|run| run.host_count >= opened.host_count));
    assert!(
        runs.iter()
            .all(|run| (run.cntvoff, run.cntpoff) == (cntvoff, cntpoff))
    );
    for answer in client.all_released(2, &waiting) {
        assert_eq!(Run::of(answer.ok(40)), opened);
    }
    client.settle();
    assert_eq!(client.event().what(), (PHASE_CHANGED, 0, phase::RUNNING));
    assert!(client.driver.used_already(0).is_none(), "a second change");
}

#[test]
fn what_was_confirmed_of_an_earlier_arming_is_refused() {
    let rig = launch();
    let mut client = armed(&rig);
    let mut stale = client.info();
    let waiting = client.wait_run(2, 0);
    for round in 0..20 {
        if round != 0 {
            // The restore is over since the first PAUSE: RESUME has armed the VM.
            let abort = client.vm(op::RESTORE_ABORT, &[]);
            assert_eq!(abort.outcome(), (status::EBUSY, phase::ARMED));
        }
        let keep_counting = round % 2;
        client.vm(op::PAUSE, &pause_body(keep_counting)).ok(40);
        client.resume();
        let info = client.info();
        assert_eq!(info.phase, phase::ARMED);
        // A clock that was frozen goes on at another offset.
        assert_eq!(info.cntvoff == stale.cntvoff, keep_counting == 1);
        if keep_counting == 0 {
            let answer = client.confirm_offsets(stale.cntvoff, stale.cntpoff);
            assert_eq!(answer.outcome(), (status::EINVAL, 0), "{round}");
        }
        stale = info;
    }
    client.settle_on(2);
    assert!(client.driver.used_already(2).is_none());
    let run = client.confirm();
    assert_eq!(Run::of(client.released(2, waiting).ok(40)), run);
}

#[test]
fn an_armed_vm_stays_armed_over_disconnects_whatever_was_under_way() {
    let rig = launch();
    let mut client = armed(&rig);
    let info = client.info();
    for round in 0..50 {
        for vcpu in 0..VCPUS {
            client.wait_run(1 + vcpu as u16 % 2, vcpu);
        }
        if round % 2 == 0 {
            client.settle();
        }
        // Some leave with a wrong confirmation under way.
        let bytes = confirm_request(info.cntvoff ^ 1, info.cntpoff);
        let layout = client.layout.clone();
        client.driver.submit(1, &bytes, 56, &layout);
        drop(client);
        client = connect(&rig);
        let now = client.info();
        assert_eq!(
            (now.phase, now.epoch),
            (phase::ARMED, info.epoch),
            "{round}"
        );
        assert_eq!((now.cntvoff, now.cntpoff), (info.cntvoff, info.cntpoff));
    }
    let waiting = client.wait_run(2, 1);
    let run = client.confirm();
    let answer = client.released(2, waiting);
    let released = Run::of(answer.ok(40));
    assert_eq!(
        (released.cntvoff, released.cntpoff),
        (run.cntvoff, run.cntpoff)
    );
}

#[test]
fn a_frontend_that_leaves_with_its_confirmation_under_way_leaves_one_of_two_vms() {
    let rig = launch();
    for round in 0..30 {
        let mut client = connect(&rig);
        assert_eq!(client.configure_flags(VCPUS, CONFIRM | ONE_OFFSET), (0, 0));
        client.resume();
        let info = client.info();
        let layout = client.layout.clone();
        let bytes = confirm_request(info.cntvoff, info.cntpoff);
        client.driver.submit(1, &bytes, 56, &layout);
        drop(client);
        let mut client = connect(&rig);
        let now = client.info();
        assert!(
            [phase::ARMED, phase::RUNNING].contains(&now.phase),
            "{round}"
        );
        assert_eq!((now.cntvoff, now.cntpoff), (info.cntvoff, info.cntpoff));
        // The frontend that comes next confirms again, and either VM takes it.
        client.confirm();
        assert_eq!(client.info().phase, phase::RUNNING);
        client.reset_and_leave();
    }
}

#[test]
fn a_queue_that_stops_in_armed_gives_its_waiters_back_canceled_and_no_others() {
    let rig = launch();
    let mut client = armed(&rig);
    let first: Vec<_> = (0..VCPUS).map(|vcpu| client.wait_run(1, vcpu)).collect();
    let second: Vec<_> = (0..VCPUS).map(|vcpu| client.wait_run(2, vcpu)).collect();
    client.settle();
    client.settle_on(2);
    let base = client.driver.stop(1);
    for answer in client.all_released(1, &first) {
        assert_eq!(answer.outcome(), (status::ECANCELED, 0));
    }
    assert!(client.driver.used_already(2).is_none(), "somebody runs");
    client.queue = 2;
    assert_eq!(client.info().phase, phase::ARMED);
    let info = client.info();
    let bytes = confirm_request(info.cntvoff, info.cntpoff);
    let layout = client.layout.clone();
    let confirmed = client.driver.submit(2, &bytes, 56, &layout);
    let all: Vec<_> = [&second[..], &[confirmed]].concat();
    let runs: Vec<_> = client
        .all_released(2, &all)
        .iter()
        .map(|answer| Run::of(answer.ok(40)))
        .collect();
    assert!(runs.iter().all(|run| *run == runs[0]));
    client.driver.start_at(1, base);
    client.queue = 1;
    assert_eq!(client.info().phase, phase::RUNNING);
}

#[test]
fn restores_without_end_in_armed_release_nobody() {
    let rig = launch();
    let mut client = armed(&rig);
    let epoch = client.info().epoch;
    for epoch in epoch..epoch + 100 {
        let waiting = client.wait_run(2, 2);
        client.settle_on(2);
        let old = client.info();
        client.restore_begin(VCPUS, restore::AUTORUN);
        let stale = client.released(2, waiting);
        assert_eq!(stale.outcome(), (status::ESTALE, 0));
        assert_eq!(stale.epoch, epoch + 1);
        let answer = client.confirm_offsets(old.cntvoff, old.cntpoff);
        assert_eq!(answer.outcome(), (status::EBUSY, VCPUS));
        for vcpu in 0..VCPUS {
            client.bring(vcpu, 5);
            client.restore_done(vcpu);
        }
        assert_eq!(client.info().phase, phase::ARMED);
    }
    let waiting = client.wait_run(2, 2);
    client.settle_on(2);
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    let canceled = client.released(2, waiting);
    assert_eq!(canceled.outcome(), (status::ECANCELED, 0));
    assert_eq!(client.info().phase, phase::PAUSED);
}

#[test]
fn device_states_that_are_loaded_in_armed_are_refused_and_change_nothing() {
    let rig = launch();
    let mut client = armed(&rig);
    let waiting = client.wait_run(2, 0);
    client.settle_on(2);
    let before = client.info();
    // A save is taken as in RUNNING.
    let stream = save(&client.driver.control);
    assert!(!load(&client.driver.control, &stream));
    assert!(!load(&client.driver.control, &stream[..stream.len() / 2]));
    unchanged_and_opened(&mut client, before, waiting);
    client.reset_and_leave();

    // The stream is whole, and brings CONFIRM along.
    let mut client = connect(&rig);
    assert!(load(&client.driver.control, &stream));
    let info = client.info();
    assert_eq!(info.phase, phase::RESTORING);
    assert_ne!(info.flags & info_flag::CONFIRM, 0);
}
