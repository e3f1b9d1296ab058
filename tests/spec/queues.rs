//! SPEC.md, "Requests", on the rings: used lengths, order, what is not shared, and what a kill
//! leaves.

use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::contract::{
    Answer, CNT, CTL, CVAL, Client, PCVAL, VM, configure_body, op, phase, range_body, regs_body,
    request, restore_body, status, u32_at, words,
};
use vhost_user_timer_kit::raw_driver::{
    Descriptor, Layout, NEXT, POISON, REGION_GPA, REGION_SIZE, Rig, WRITE, until,
};

scenarios! {
    binary {
        used_len_is_what_was_written_and_nothing_past_it_is_touched: "2.10";
        without_room_for_a_header_the_chain_comes_back_empty_and_nothing_is_done:
            "2.12" "2.13" "2.14";
        with_writable_memory_that_is_not_shared_the_chain_comes_back_empty_and_nothing_is_done:
            "2.12" "2.13" "2.14";
        a_request_in_memory_that_is_not_shared_is_eproto: "2.23";
        requests_of_one_queue_complete_in_order_and_wait_run_apart: "2.15";
        each_operation_is_atomic_across_queues: "2.16" "2.17";
        a_kill_leaves_at_most_one_change_without_its_answer: "2.18" "2.19" "2.20";
        kicks_and_calls_are_never_lost: "1.11";
    }
}

/// A connection with rings of 1024 descriptors.
fn connect(rig: &Rig, queues: u16) -> Client {
    rig.client().queues(queues).queue_size(1024).connect()
}

/// A VM of two vCPUs in PAUSED.
fn paused(rig: &Rig) -> Client {
    let mut client = Client::connect(rig);
    client.configure(2);
    client
}

fn used_len_is_what_was_written_and_nothing_past_it_is_touched() {
    let rig = Rig::launch_release(&[]);
    let mut client = paused(&rig);
    let cases: [(u16, u32, Vec<u8>, u32); 6] = [
        (op::GET_INFO, VM, vec![], 80),
        (op::GET_REG_LIST, 1, vec![], 16 + 48),
        (op::GET_REGS, 0, words(&[CTL, CNT]), 16 + 32),
        (op::SET_REGS, 0, regs_body(&[(CTL, 0)]), 24),
        (op::GET_VM, VM, range_body(1, 1), 16 + 40 + 56),
        (op::CONFIGURE_VM, VM, configure_body(2, 0, 0), 16),
    ];
    for (op, vcpu, body, len) in cases {
        for spare in [0, 1, 4000] {
            let room = len as usize + spare;
            let request = request(op, vcpu, 0, &body);
            let used = client.driver.call(1, &request, room, &Layout::plain());
            assert_eq!(used.len, len, "{op:#x}");
            assert!(used.writable[len as usize..].iter().all(|b| *b == POISON));
        }
    }
}

fn without_room_for_a_header_the_chain_comes_back_empty_and_nothing_is_done() {
    let rig = Rig::launch_release(&[]);
    let mut client = paused(&rig);
    let before = (client.info().at_rest(), client.state().at_rest(false));
    for room in 0..16 {
        for request in [
            request(op::RESUME, VM, 0, &[]),
            request(op::SET_REGS, 0, 0, &regs_body(&[(CNT, 9)])),
            request(op::RESTORE_BEGIN, VM, 0, &restore_body(2, 0, 0, 0)),
            request(op::WAIT_RUN, 0, 0, &[]),
            vec![0xff; 3],
        ] {
            let used = client.driver.call(1, &request, room, &Layout::plain());
            assert_eq!(used.len, 0, "with room for {room}");
            assert_eq!(used.writable, vec![POISON; room]);
        }
    }
    assert_eq!(
        (client.info().at_rest(), client.state().at_rest(false)),
        before
    );
    let log = rig.log_with("writable bytes");
    let lines = log.lines().filter(|line| line.contains("writable bytes"));
    // Logged, and not each of the eighty.
    assert!((1..20).contains(&lines.count()), "{log}");
}

fn requests_of_one_queue_complete_in_order_and_wait_run_apart() {
    let rig = Rig::launch_release(&[]);
    let mut client = connect(&rig, 2);
    client.configure(2);
    let mut waiting = Vec::new();
    let mut heads = Vec::new();
    for n in 0..300 {
        if n % 100 == 7 {
            waiting.push(client.driver.add(
                1,
                &request(op::WAIT_RUN, 0, 0, &[]),
                56,
                &Layout::plain(),
            ));
        } else {
            let body = regs_body(&[(CVAL, n)]);
            let set = request(op::SET_REGS, 0, 0, &body);
            heads.push(client.driver.add(1, &set, 24, &Layout::plain()));
        }
    }
    client.driver.rings[1].kick(&client.driver.memory);
    for head in heads {
        assert_eq!(client.driver.used(1).head, head);
    }
    assert_eq!(client.get_one(0, CVAL), 299);
    assert_eq!(client.driver.used_already(1), None);
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    waiting.push(resume);
    client.all_released(1, &waiting);
}

fn each_operation_is_atomic_across_queues() {
    let rig = Rig::launch_release(&["--request-queues=3"]);
    let mut client = connect(&rig, 4);
    client.configure(1);
    // Two queues write pairs that belong together, a third reads them.
    for n in 0..200u64 {
        for queue in [1, 2] {
            let value = n * 2 + u64::from(queue);
            let pair = regs_body(&[(CVAL, value), (PCVAL, value)]);
            let set = request(op::SET_REGS, 0, 0, &pair);
            client.driver.add(queue, &set, 24, &Layout::plain());
        }
        let get = request(op::GET_REGS, 0, 0, &words(&[CVAL, PCVAL]));
        client.driver.add(3, &get, 48, &Layout::plain());
    }
    for queue in [1, 2, 3] {
        client.driver.rings[queue].kick(&client.driver.memory);
    }
    for _ in 0..200 {
        Answer::of(&client.driver.used(1)).ok(8);
        Answer::of(&client.driver.used(2)).ok(8);
        let answer = Answer::of(&client.driver.used(3));
        let body = answer.ok(32);
        assert_eq!(body[8..16], body[24..32]);
    }
}

fn kicks_and_calls_are_never_lost() {
    // One request at a time, so that a lost notification in either direction stops it all.
    for event_idx in [false, true] {
        let rig = Rig::launch_release(&[]);
        let mut client = rig.client().event_idx(event_idx).queue_size(4).connect();
        client.configure(1);
        for n in 0..3000u64 {
            client.set(0, &[(CVAL, n)]);
        }
        let body = client.vcpu(op::GET_REGS, 0, &words(&[CVAL])).body;
        assert_eq!(u32_at(&body, 8), 2999);
    }
}

/// Makes a chain of one readable and one writable descriptor available, wherever they point.
fn chain(client: &mut Client, readable: (u64, u32), writable: (u64, u32)) {
    let memory = &client.driver.memory;
    let ring = &mut client.driver.rings[1];
    for (index, (address, len), flags, next) in [(0, readable, NEXT, 1), (1, writable, WRITE, 0)] {
        let descriptor = Descriptor {
            address,
            len,
            flags,
            next,
        };
        ring.set_descriptor(memory, index, descriptor);
    }
    ring.make_available(memory, 0);
    ring.kick_anyway();
}

/// The used length of the chain that the device has given back, as the first on this ring.
fn first_used(client: &Client) -> u32 {
    let memory = &client.driver.memory;
    let ring = &client.driver.rings[1];
    until("an answer", || ring.used_index(memory) != 0);
    let element = memory.read(ring.used_at() + 4, 8);
    assert_eq!(u32_at(&element, 0), 0, "the head");
    u32_at(&element, 4)
}

/// Addresses of which at least a part is not shared.
const ELSEWHERE: [u64; 3] = [0, REGION_GPA + REGION_SIZE - 8, REGION_GPA + REGION_SIZE];

/// A place for a request's bytes.
const HERE: u64 = REGION_GPA + REGION_SIZE - 4096;

fn with_writable_memory_that_is_not_shared_the_chain_comes_back_empty_and_nothing_is_done() {
    for elsewhere in ELSEWHERE {
        let rig = Rig::launch_release(&["--request-queues=2"]);
        let mut client = connect(&rig, 3);
        client.configure(2);
        let resume = request(op::RESUME, VM, 0, &[]);
        client.driver.memory.write(HERE, &resume);
        // A ring that has given nothing back yet.
        client.driver.stop(1);
        client.driver.start(1);
        chain(&mut client, (HERE, 16), (elsewhere, 56));
        assert_eq!(first_used(&client), 0);
        client.queue = 2;
        assert_eq!(client.info().phase, phase::PAUSED);
        rig.log_with("writable");
    }
}

fn a_request_in_memory_that_is_not_shared_is_eproto() {
    for elsewhere in ELSEWHERE {
        let rig = Rig::launch_release(&["--request-queues=2"]);
        let mut client = connect(&rig, 3);
        client.driver.memory.write(HERE, &[POISON; 80]);
        chain(&mut client, (elsewhere, 16), (HERE, 80));
        assert_eq!(first_used(&client), 16);
        let answer = client.driver.memory.read(HERE, 80);
        assert_eq!(u32_at(&answer, 0), status::EPROTO);
        assert_eq!(answer[16..], [POISON; 64]);
    }
}

fn a_kill_leaves_at_most_one_change_without_its_answer() {
    const CHANGES: u64 = 60;
    // Each says the same many times over, so that a change takes long enough to be killed in.
    const ENTRIES: usize = 12_000;
    let mut killed_between = 0;
    for round in 0.. {
        if killed_between == 3 {
            break;
        }
        assert!(round < 60, "each kill came too late");
        let args = ["--request-queues=2"];
        let rig = Rig::launch_devices_with_state(Devices::Timer, &args);
        let mut client = connect(&rig, 3);
        client.configure(2);
        // Two queues, each with changes of a vCPU of its own: the CVAL says how many were done.
        let before = client.driver.rings[1].used_index(&client.driver.memory);
        for n in 1..=CHANGES {
            let body = regs_body(&[(CVAL, n)]).repeat(ENTRIES);
            for vcpu in 0..2u16 {
                let set = request(op::SET_REGS, vcpu.into(), 0, &body);
                client.driver.add(1 + vcpu, &set, 24, &Layout::plain());
            }
        }
        for queue in [1, 2] {
            client.driver.rings[queue].kick(&client.driver.memory);
        }
        let answered = |client: &Client| {
            let used = |queue: usize| client.driver.rings[queue].used_index(&client.driver.memory);
            u64::from(used(1) - before) + u64::from(used(2))
        };
        until("some answers", || answered(&client) > round % 20);
        let mut answers = 0;
        let rig = rig.die_and_go_on(|| answers = answered(&client), &args);
        drop(client);
        let mut client = connect(&rig, 3);
        let done = client.get_one(0, CVAL) + client.get_one(1, CVAL);
        assert!(
            (answers..=answers + 1).contains(&done),
            "{done} of {answers}"
        );
        killed_between += u32::from(done < 2 * CHANGES);
    }
}
