//! SPEC.md, "Connection": rings that are full, stopped, disabled, broken.

use std::collections::BTreeSet;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::contract::{Answer, Client, Run, VM, op, phase, request, status};
use vhost_user_timer_kit::raw_driver::{Layout, POISON, Rig, VERSION_1, negotiate};

scenarios! {
    binary {
        a_queue_has_up_to_1024_descriptors: "1.15";
        a_full_ring_of_1024_is_served: "1.15" "2.15";
        event_idx_is_negotiable: "1.11";
        get_vring_base_cancels_what_the_queue_holds_before_it_is_answered: "1.20" "2.41";
        nothing_of_a_stopped_ring_is_touched: "1.21";
        a_stopped_ring_goes_on_where_it_stopped: "1.21";
        a_disabled_ring_gets_its_answers_when_it_is_enabled_again: "1.22" "1.23";
        get_vring_base_of_a_disabled_ring_gives_back_what_it_holds: "1.20" "1.22";
        requests_made_before_the_ring_is_enabled_are_served_then: "1.22";
        a_ring_whose_driver_breaks_virtios_rules_is_not_served_until_it_is_started_again: "1.24";
    }
}

const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A connection with two request queues.
fn two_queues(rig: &Rig) -> Client {
    rig.client().queues(3).connect()
}

fn a_queue_has_up_to_1024_descriptors() {
    for size in [1, 2, 1024] {
        let rig = Rig::launch_release(&[]);
        let mut client = rig.client().queue_size(size).connect();
        client.layout = Layout::plain().indirect();
        for _ in 0..(2 * u32::from(size) + 3).min(1500) {
            client.info();
        }
    }
    let rig = Rig::launch_release(&[]);
    let control = negotiate(rig.stream(), VERSION_1 | PROTOCOL_FEATURES);
    assert!(control.set_vring_num(0, 2048).is_err());
}

fn a_full_ring_of_1024_is_served() {
    let rig = Rig::launch_release(&[]);
    let mut client = rig.client().queue_size(1024).connect();
    let layout = Layout::plain().indirect();
    let heads: Vec<u16> = (0..1024)
        .map(|_| {
            let info = request(op::GET_INFO, VM, 0, &[]);
            client.driver.add(1, &info, 80, &layout)
        })
        .collect();
    client.driver.rings[1].kick(&client.driver.memory);
    for head in heads {
        let used = client.driver.used(1);
        assert_eq!((used.head, used.len), (head, 80));
    }
}

fn event_idx_is_negotiable() {
    for event_idx in [false, true] {
        let rig = Rig::launch_release(&[]);
        let mut client = rig.client().event_idx(event_idx).connect();
        client.configure(1);
        client.post_event_buffer();
        assert_eq!(client.event().what().2, phase::PAUSED);
        for _ in 0..300 {
            client.info();
        }
        client.post_event_buffer();
        client.resume();
        assert_eq!(client.event().what().2, phase::RUNNING);
    }
}

fn get_vring_base_cancels_what_the_queue_holds_before_it_is_answered() {
    let rig = Rig::launch_release(&["--request-queues=2"]);
    let mut client = two_queues(&rig);
    client.configure(4);
    let heads: Vec<u16> = (0..3).map(|vcpu| client.wait_run(1, vcpu)).collect();
    let other = client.wait_run(2, 3);
    client.settle_on(2);
    client.settle_on(1);
    let handled = client.driver.rings[1].next_avail();
    assert_eq!(client.driver.stop(1), handled);
    // No waiting here: they are there.
    let mut canceled = BTreeSet::new();
    while let Some(used) = client.driver.used_already(1) {
        assert_eq!(used.len, 16);
        let answer = Answer::of(&used);
        assert_eq!(answer.outcome(), (status::ECANCELED, 0));
        canceled.insert(used.head);
    }
    assert_eq!(canceled, heads.into_iter().collect());
    // The other queue's waiter is left alone.
    client.queue = 2;
    client.settle();
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(2, &resume, 56, &Layout::plain());
    let answers = client.all_released(2, &[other, resume]);
    assert_eq!(answers[0], answers[1]);
}

fn nothing_of_a_stopped_ring_is_touched() {
    let rig = Rig::launch_release(&["--request-queues=2"]);
    let mut client = two_queues(&rig);
    client.configure(1);
    let held = client.wait_run(1, 0);
    client.settle();
    client.driver.stop(1);
    let used = client.driver.used(1);
    assert_eq!(used.head, held);
    // Made available and kicked while the ring is stopped: not read.
    let info = request(op::GET_INFO, VM, 0, &[]);
    let head = client.driver.add(1, &info, 80, &Layout::plain());
    client.driver.rings[1].kick_anyway();
    let ring = |client: &Client| {
        let at = client.driver.rings[1].descriptors_at();
        client.driver.memory.read(at, 0x1_0000)
    };
    let before = ring(&client);
    client.queue = 2;
    client.resume();
    client.settle();
    assert_eq!(ring(&client), before);
    let buffer = client.driver.rings[1].peek(&client.driver.memory, head);
    assert_eq!(buffer, [POISON; 80]);
}

fn a_stopped_ring_goes_on_where_it_stopped() {
    for event_idx in [false, true] {
        let rig = Rig::launch_release(&[]);
        let mut client = rig.client().event_idx(event_idx).connect();
        for _ in 0..5 {
            client.info();
        }
        let base = client.driver.stop(1);
        assert_eq!(base, 5);
        // A request made available in between is served once the ring starts again.
        let info = request(op::GET_INFO, VM, 0, &[]);
        let head = client.driver.add(1, &info, 80, &Layout::plain());
        client.driver.start_at(1, base);
        client.driver.rings[1].kick_anyway();
        assert_eq!(client.driver.used(1).head, head);
        client.info();
    }
}

fn a_disabled_ring_gets_its_answers_when_it_is_enabled_again() {
    let rig = Rig::launch_release(&["--request-queues=2"]);
    let mut client = two_queues(&rig);
    client.configure(2);
    let held = client.wait_run(1, 1);
    client.settle_on(1);
    client.driver.control.set_vring_enable(1, false).unwrap();
    client.queue = 2;
    let run = client.resume();
    client.settle();
    assert_eq!(client.driver.used_already(1), None);
    let buffer = client.driver.rings[1].peek(&client.driver.memory, held);
    assert_eq!(buffer, [POISON; 56]);
    client.driver.control.set_vring_enable(1, true).unwrap();
    let answer = client.released(1, held);
    assert_eq!(Run::of(answer.ok(40)), run);
}

fn get_vring_base_of_a_disabled_ring_gives_back_what_it_holds() {
    let rig = Rig::launch_release(&["--request-queues=2"]);
    let mut client = two_queues(&rig);
    client.configure(2);
    let waiting = [client.wait_run(1, 0), client.wait_run(1, 1)];
    client.settle_on(1);
    client.driver.control.set_vring_enable(1, false).unwrap();
    client.driver.stop(1);
    let answers = client.all_released(1, &waiting);
    for answer in answers {
        assert_eq!(answer.outcome(), (status::ECANCELED, 0));
    }
}

fn requests_made_before_the_ring_is_enabled_are_served_then() {
    let rig = Rig::launch_release(&["--request-queues=2"]);
    let mut client = two_queues(&rig);
    client.driver.control.set_vring_enable(1, false).unwrap();
    let info = request(op::GET_INFO, VM, 0, &[]);
    let head = client.driver.submit(1, &info, 80, &Layout::plain());
    client.queue = 2;
    client.settle();
    assert_eq!(client.driver.used_already(1), None);
    client.driver.control.set_vring_enable(1, true).unwrap();
    assert_eq!(client.driver.used(1).head, head);
}

fn a_ring_whose_driver_breaks_virtios_rules_is_not_served_until_it_is_started_again() {
    let breaches: [fn(&mut Client); 3] = [
        |client| {
            // An available index that jumps by more than the ring's size.
            let ring = &mut client.driver.rings[1];
            let jump = ring.next_avail().wrapping_add(ring.size() + 1);
            ring.set_avail_index(&client.driver.memory, jump);
        },
        |client| {
            // A chain that waits, made available once more.
            let head = client.wait_run(1, 0);
            client.settle_on(1);
            client.driver.rings[1].make_available(&client.driver.memory, head);
        },
        |client| {
            // A head that the ring does not have.
            let ring = &mut client.driver.rings[1];
            let head = ring.size();
            ring.make_available(&client.driver.memory, head);
        },
    ];
    for breach in breaches {
        let rig = Rig::launch_release(&["--request-queues=2"]);
        let mut client = two_queues(&rig);
        client.configure(1);
        breach(&mut client);
        client.driver.rings[1].kick_anyway();
        client.queue = 2;
        client.settle();
        // It is right from now on, and still not served.
        let used = client.driver.rings[1].used_index(&client.driver.memory);
        let resume = request(op::RESUME, VM, 0, &[]);
        client.driver.add(1, &resume, 56, &Layout::plain());
        client.driver.rings[1].kick_anyway();
        client.settle();
        assert_eq!(client.info().phase, phase::PAUSED);
        assert_eq!(
            client.driver.rings[1].used_index(&client.driver.memory),
            used
        );
        client.driver.stop(1);
        client.driver.start(1);
        client.queue = 1;
        client.resume();
    }
}
