//! SPEC.md, "Connection": features, config space, and frontends that come and go, with `vhost`'s
//! frontend at the other end.

use std::collections::BTreeSet;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_timer_kit::contract::{
    CNT, CVAL, Client, Info, VM, info_flag, op, pause_body, phase, regs_body, request, status,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Driver, Layout, RING_EVENT_IDX, RING_INDIRECT, Rig, VERSION_1, negotiate, readable,
};

scenarios! {
    binary {
        the_virtio_features_are_exactly_those_of_the_contract: "1.1" "1.11";
        the_protocol_features_are_exactly_those_of_the_contract_and_never_17_or_21: "1.12";
        there_is_one_queue_more_than_request_queues: "1.14";
        every_request_queue_serves_requests: "1.13" "1.14";
        config_space_is_info_without_the_host_count: "1.16";
        config_space_can_be_read_in_parts: "1.16";
        config_space_ends_after_64_bytes: "1.16";
        set_config_is_refused_and_changes_nothing: "1.17";
        reset_device_puts_the_vm_back_to_new: "1.18";
        after_reset_device_the_same_connection_can_be_set_up_again: "1.18";
        memory_comes_by_set_mem_table_or_by_add_mem_reg: "1.12";
        memory_can_be_taken_away_and_given_again: "1.12";
        losing_the_connection_changes_nothing_in_the_vm: "1.2" "1.5";
        losing_the_connection_forgets_who_waited_and_keeps_the_restore: "1.5" "1.6";
        a_second_frontend_waits_until_the_first_is_gone: "1.3" "1.4";
        many_frontends_are_served_one_after_the_other_in_order: "1.4" "1.7";
        nothing_of_a_connection_happens_any_more_once_the_next_is_served: "1.7";
        without_the_protocol_feature_bit_rings_are_enabled_at_once: "1.11";
        the_connection_can_be_used_without_acknowledgements: "1.12";
        a_paused_vm_survives_a_thousand_frontends: "1.2" "1.5";
    }
}

const PROTOCOL_FEATURES: u64 = 1 << 30;

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_CONFIG: u32 = 24;

fn bits(mask: u64) -> BTreeSet<u32> {
    (0..64).filter(|bit| mask >> bit & 1 == 1).collect()
}

fn negotiated(rig: &Rig) -> Frontend {
    negotiate(rig.stream(), VERSION_1 | PROTOCOL_FEATURES)
}

pub(crate) fn config(control: &mut Frontend, offset: u32, size: u32) -> Option<Vec<u8>> {
    let buffer = vec![0; size as usize];
    control
        .get_config(offset, size, VhostUserConfigFlags::empty(), &buffer)
        .ok()
        .map(|(_, bytes)| bytes)
}

fn the_virtio_features_are_exactly_those_of_the_contract() {
    let rig = Rig::launch_release(&[]);
    let control = Frontend::from_stream(rig.stream(), 2);
    control.set_owner().unwrap();
    let wanted = VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | PROTOCOL_FEATURES;
    assert_eq!(bits(control.get_features().unwrap()), bits(wanted));
}

fn the_protocol_features_are_exactly_those_of_the_contract_and_never_17_or_21() {
    let rig = Rig::launch_release(&[]);
    let mut control = Control::over(rig.stream());
    // Unfiltered by a library.
    control.message(GET_FEATURES, false, &[], &[]).unwrap();
    control.reply().unwrap();
    control
        .message(GET_PROTOCOL_FEATURES, false, &[], &[])
        .unwrap();
    let (code, body) = control.reply().unwrap();
    assert_eq!(code, GET_PROTOCOL_FEATURES);
    let offered = bits(u64::from_le_bytes(body.try_into().unwrap()));
    // MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, DEVICE_STATE.
    assert_eq!(offered, BTreeSet::from([0, 3, 9, 13, 15, 19]));
    assert!(!offered.contains(&17) && !offered.contains(&21));
}

fn there_is_one_queue_more_than_request_queues() {
    for (args, queues) in [
        (&[][..], 2),
        (&["--request-queues=1"], 2),
        (&["--request-queues", "2"], 3),
        (&["--request-queues=16"], 17),
    ] {
        let rig = Rig::launch_release(args);
        let mut control = negotiated(&rig);
        assert_eq!(control.get_queue_num().unwrap(), queues, "{args:?}");
        let info = Info::of(&config(&mut control, 0, 64).unwrap());
        assert_eq!(u64::from(info.request_queues), queues - 1);
    }
}

fn every_request_queue_serves_requests() {
    let rig = Rig::launch_release(&["--request-queues=16"]);
    let queues = 17;
    let mut client = rig.client().queues(queues).connect();
    client.configure(1);
    for queue in 1..queues {
        client.queue = queue;
        assert_eq!(client.info().request_queues, 16, "queue {queue}");
    }
}

fn config_space_is_info_without_the_host_count() {
    let rig = Rig::launch_release(&["--max-vcpus=7"]);
    let mut client = Client::connect(&rig);
    let of_config =
        |client: &mut Client| Info::of(&config(&mut client.driver.control, 0, 64).unwrap());
    let new = of_config(&mut client);
    let asked = client.info();
    assert_eq!((asked.phase, asked.max_vcpus), (phase::NEW, 7));
    assert_ne!(asked.host_count, 0);
    assert_eq!(
        Info {
            host_count: 0,
            ..asked
        },
        new
    );

    client.configure(3);
    client.resume();
    let asked = client.info();
    assert_eq!((asked.phase, asked.vcpus), (phase::RUNNING, 3));
    // The virtual clock counts, so its offset stands still and the two are equal.
    assert_eq!(
        Info {
            host_count: 0,
            ..asked
        },
        of_config(&mut client)
    );
}

fn config_space_can_be_read_in_parts() {
    let rig = Rig::launch_release(&[]);
    let mut control = negotiated(&rig);
    let whole = config(&mut control, 0, 64).unwrap();
    for (offset, size) in [(0, 1), (0, 4), (16, 8), (48, 16), (63, 1), (1, 62)] {
        let part = config(&mut control, offset, size).unwrap();
        assert_eq!(part, whole[offset as usize..][..size as usize]);
    }
}

fn config_space_ends_after_64_bytes() {
    let rig = Rig::launch_release(&[]);
    // By hand: `vhost`'s frontend waits forever for an answer without bytes.
    let mut control = Control::over(rig.stream());
    control.message(GET_FEATURES, false, &[], &[]).unwrap();
    control.reply().unwrap();
    let config = 1u64 << 9;
    let set = config.to_le_bytes();
    control
        .message(SET_PROTOCOL_FEATURES, false, &set, &[])
        .unwrap();
    let mut read = |offset: u32, size: u32| {
        let mut body = [offset, size, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + size as usize, 0);
        control.message(GET_CONFIG, false, &body, &[]).unwrap();
        let (code, body) = control.reply().unwrap();
        assert_eq!(code, GET_CONFIG);
        // What was read, and how much of it the device says there is.
        (
            body.len() - 12,
            u32::from_le_bytes(body[4..8].try_into().unwrap()),
        )
    };
    for (offset, size) in [(0, 65), (64, 1), (63, 2), (1, 64), (255, 1), (0, 256)] {
        assert_eq!(read(offset, size), (0, 0), "{offset}+{size}");
    }
    // The connection serves on.
    assert_eq!(read(0, 64), (64, 64));
}

fn set_config_is_refused_and_changes_nothing() {
    let rig = Rig::launch_release(&[]);
    let mut control = negotiated(&rig);
    let before = config(&mut control, 0, 64).unwrap();
    let written = control.set_config(4, VhostUserConfigFlags::WRITABLE, &[2, 0, 0, 0]);
    assert!(written.is_err());
    let mut control = negotiated(&rig);
    assert_eq!(config(&mut control, 0, 64).unwrap(), before);
}

fn reset_device_puts_the_vm_back_to_new() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, 0);
    client.wait_run(1, 0);
    client.settle();
    client.driver.control.reset_device().unwrap();
    drop(client);

    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!((info.phase, info.vcpus, info.flags), (phase::NEW, 0, 0));
    client.configure(5);
    assert_eq!(client.info().vcpus, 5);
}

fn after_reset_device_the_same_connection_can_be_set_up_again() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.resume();
    client.driver.control.reset_device().unwrap();
    let features = VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | PROTOCOL_FEATURES;
    client.driver.control.set_features(features).unwrap();
    for queue in 0..2 {
        client.driver.stop(queue);
        client.driver.start(queue);
    }
    assert_eq!(client.info().phase, phase::NEW);
    client.configure(1);
    client.resume();
}

fn memory_comes_by_set_mem_table_or_by_add_mem_reg() {
    for add_mem_reg in [false, true] {
        let rig = Rig::launch_release(&[]);
        let mut client = rig.client().add_mem_reg(add_mem_reg).connect();
        client.configure(1);
        assert_eq!(client.info().phase, phase::PAUSED);
    }
}

fn memory_can_be_taken_away_and_given_again() {
    let rig = Rig::launch_release(&[]);
    let mut client = rig.client().add_mem_reg(true).connect();
    client.configure(1);
    client.driver.stop(0);
    client.driver.stop(1);
    let region = client.driver.memory.region();
    client.driver.control.remove_mem_region(&region).unwrap();
    client.driver.control.add_mem_region(&region).unwrap();
    client.driver.start(0);
    client.driver.start(1);
    assert_eq!(client.info().vcpus, 1);
}

fn losing_the_connection_changes_nothing_in_the_vm() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(3);
    client.set(1, &[(CNT, 777)]);
    let (info, state) = (client.info(), client.state());
    drop(client);
    let mut client = Client::connect(&rig);
    assert_eq!(client.info().at_rest(), info.at_rest());
    assert_eq!(client.state().at_rest(false), state.at_rest(false));
    let run = client.resume();
    drop(client);
    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!((info.phase, info.cntvoff), (phase::RUNNING, run.cntvoff));
}

fn losing_the_connection_forgets_who_waited_and_keeps_the_restore() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, 1);
    client.bring(0, 5);
    client.restore_done(0);
    client.wait_run(1, 0);
    client.settle();
    drop(client);
    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!((info.phase, info.restored), (phase::RESTORING, 1));
    client.bring(1, 6);
    let head = client.wait_run(1, 1);
    client.queue = 1;
    let done = request(op::RESTORE_DONE, 1, 0, &[]);
    let done = client.driver.submit(1, &done, 24, &Layout::plain());
    // The waiter of the lost connection gets nothing; this one's gets its answer.
    let answers = client.all_released(1, &[head, done]);
    assert_eq!(answers[0].status, status::OK);
    assert_eq!(client.info().phase, phase::RUNNING);
}

fn a_second_frontend_waits_until_the_first_is_gone() {
    let rig = Rig::launch_release(&[]);
    let mut first = Client::connect(&rig);
    first.configure(1);
    // It is in the socket's queue, and what it says is not answered.
    let second = rig.stream();
    let mut waiting = Control::over(second.try_clone().unwrap());
    waiting.message(GET_FEATURES, false, &[], &[]).unwrap();
    for _ in 0..100 {
        first.info();
    }
    assert!(!readable(&second));
    drop(first);
    assert_eq!(waiting.reply().unwrap().0, GET_FEATURES);
    let mut second = Client::over(second);
    assert_eq!(second.info().vcpus, 1);
}

fn many_frontends_are_served_one_after_the_other_in_order() {
    let rig = Rig::launch_release(&[]);
    let streams: Vec<_> = (0..20).map(|_| rig.stream()).collect();
    for (n, stream) in (1..).zip(streams) {
        let mut client = Client::over(stream);
        if n == 1 {
            client.configure(1);
        }
        assert_eq!(client.restore_begin(1, 0), n + 1);
    }
}

fn nothing_of_a_connection_happens_any_more_once_the_next_is_served() {
    let rig = Rig::launch_release(&[]);
    Client::connect(&rig).configure(1);
    for n in 0..50 {
        let mut client = rig.client().queue_size(1024).connect();
        for _ in 0..300 {
            let set = request(op::SET_REGS, 0, 0, &regs_body(&[(CVAL, n)]));
            client.driver.submit(1, &set, 24, &Layout::plain());
        }
        // Gone with most of them unanswered.
        drop(client);
        let mut client = Client::connect(&rig);
        client.set(0, &[(CVAL, u64::MAX)]);
        for _ in 0..50 {
            assert_eq!(client.get_one(0, CVAL), u64::MAX);
        }
    }
}

fn without_the_protocol_feature_bit_rings_are_enabled_at_once() {
    let rig = Rig::launch_release(&[]);
    let client = Client::connect(&rig);
    let memory = client.driver.memory;
    drop((client.driver.control, client.driver.rings));
    let control = Frontend::from_stream(rig.stream(), 2);
    control.set_owner().unwrap();
    control.get_features().unwrap();
    control.set_features(VERSION_1).unwrap();
    control.set_mem_table(&[memory.region()]).unwrap();
    let mut driver = Driver::attached(control, memory);
    let used = driver.call(1, &request(op::GET_INFO, VM, 0, &[]), 80, &Layout::plain());
    assert_eq!(used.len, 80);
}

fn the_connection_can_be_used_without_acknowledgements() {
    let rig = Rig::launch_release(&[]);
    let mut control = Frontend::from_stream(rig.stream(), 2);
    control.set_owner().unwrap();
    control.get_features().unwrap();
    control.get_protocol_features().unwrap();
    control
        .set_protocol_features(VhostUserProtocolFeatures::CONFIG)
        .unwrap();
    control.set_features(VERSION_1 | PROTOCOL_FEATURES).unwrap();
    assert_eq!(config(&mut control, 0, 64).unwrap()[0], 1);
}

fn a_paused_vm_survives_a_thousand_frontends() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.set(0, &[(CNT, 1234)]);
    drop(client);
    for _ in 0..1000 {
        drop(rig.stream());
    }
    let mut client = Client::connect(&rig);
    assert_eq!(client.get_one(0, CNT), 1234);
    assert_eq!(client.info().flags & info_flag::OFFSET_PINNED, 0);
    client.vm(op::PAUSE, &pause_body(0)).ok(40);
}
