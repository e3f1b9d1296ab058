//! "Split over any number of descriptors at any boundary, indirect or not" (SPEC.md,
//! "Requests").

use vhost_user_timer_kit::contract::{
    ARM64, Answer, Client, VM, Vcpu, VmState, op, range_body, regs_body, request, restore,
    restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{Cut, Layout, Rig, seed};

scenarios! {
    binary {
        the_same_request_in_any_layout_gets_the_same_bytes: "2.4" "2.5" "2.10";
        random_layouts_get_the_same_bytes: "2.5";
        waiters_answers_are_cut_as_their_buffers_are: "2.5" "7.21";
        a_vm_of_4096_vcpus_is_got_and_set_in_one_request_each: "2.5" "2.33" "5.6" "5.7";
        up_to_256_kib_readable_are_looked_at: "2.22" "2.52";
        up_to_256_kib_writable_are_looked_at: "2.24";
    }
}

const VCPUS: u32 = 6;

/// A VM whose registers do not change by themselves and are all different.
fn at_rest(rig: &Rig) -> Client {
    let mut client = rig.client().queue_size(1024).connect();
    client.configure(VCPUS);
    client.restore_begin(VCPUS, 0);
    let body: Vec<u8> = (0..VCPUS).flat_map(|vcpu| saved(vcpu).to_bytes()).collect();
    client.vm(op::SET_VM, &body).ok(0);
    client
}

fn saved(vcpu: u32) -> Vcpu {
    let n = u64::from(vcpu) << 32;
    Vcpu::with(vcpu, [1, n + 2, n + 3, 2, n + 5, n + 6])
}

fn layouts() -> Vec<Layout> {
    Layout::all(&[
        Cut::whole(),
        Cut::every(1),
        Cut::every(2),
        Cut::every(3),
        Cut::every(7),
        Cut::every(15),
        Cut::every(16),
        Cut::every(17),
        Cut::at(&[0, 1, 0, 0, 5]),
        Cut::at(&[16, usize::MAX]),
        Cut::at(&[15, 1, 8, 8, 40]),
        Cut::at(&[0, usize::MAX, 0]),
    ])
}

/// Requests whose answers are the same every time.
fn repeatable() -> Vec<(Vec<u8>, usize)> {
    vec![
        (request(op::GET_REG_LIST, 2, 0, &[]), 64),
        (request(op::GET_REGS, 5, 0, &words(&ARM64)), 16 + 96),
        (request(op::GET_REGS, 1, 0, &words(&ARM64)), 300),
        (
            request(op::SET_REGS, 3, 0, &regs_body(&[(ARM64[2], 3 << 32 | 3)])),
            24,
        ),
        (request(op::SET_VM, VM, 0, &saved(4).to_bytes()), 16),
        (request(op::GET_REGS, 1, 0, &words(&[7])), 16),
        (request(op::GET_REGS, 9, 0, &words(&ARM64)), 20),
        (request(op::GET_REG_LIST, 0, 0, &[]), 63),
        (request(0x4321, 0, 0, &[1, 2, 3]), 16),
        (vec![1], 16),
    ]
}

fn the_same_request_in_any_layout_gets_the_same_bytes() {
    let rig = Rig::launch_release(&[]);
    let mut client = at_rest(&rig);
    for (request, room) in repeatable() {
        let plain = client.driver.call(1, &request, room, &Layout::plain());
        for layout in layouts() {
            let used = client.driver.call(1, &request, room, &layout);
            assert_eq!(used.len, plain.len, "{layout:?}");
            assert_eq!(used.writable, plain.writable, "{layout:?}");
        }
    }
}

fn random_layouts_get_the_same_bytes() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let rig = Rig::launch_release(&[]);
    let mut client = at_rest(&rig);
    for (request, room) in repeatable() {
        let plain = client.driver.call(1, &request, room, &Layout::plain());
        for _ in 0..100 {
            let mut cut = || {
                let mut lengths: Vec<usize> = (0..random.usize(1..6))
                    .map(|_| random.usize(0..40))
                    .collect();
                lengths.push(random.usize(1..100));
                Cut::at(&lengths)
            };
            let layout = Layout {
                readable: cut(),
                writable: cut(),
                indirect: random.bool(),
                reversed: random.bool(),
            };
            let used = client.driver.call(1, &request, room, &layout);
            assert_eq!(used.writable, plain.writable, "VUT_SEED={seed} {layout:?}");
            assert_eq!(used.len, plain.len, "VUT_SEED={seed} {layout:?}");
        }
    }
}

fn waiters_answers_are_cut_as_their_buffers_are() {
    let rig = Rig::launch_release(&[]);
    let mut client = rig.client().queue_size(1024).connect();
    client.configure(1);
    client.restore_begin(1, restore::AUTORUN);
    let mut heads = Vec::new();
    for (n, layout) in layouts().into_iter().enumerate() {
        // Not more descriptors than the ring has.
        if layout.indirect || n % 14 != 1 {
            let wait = request(op::WAIT_RUN, 0, 0, &[]);
            let room = 56 + n % 3 * 20;
            if heads.len() < 30 {
                heads.push(client.driver.submit(1, &wait, room, &layout));
            }
        }
    }
    client.bring(0, 77);
    let done = request(op::RESTORE_DONE, 0, 0, &[]);
    let done = client.driver.submit(1, &done, 24, &Layout::plain());
    heads.push(done);
    let mut answers = client.all_released(1, &heads);
    answers.pop();
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    answers[0].ok(40);
}

fn a_vm_of_4096_vcpus_is_got_and_set_in_one_request_each() {
    let rig = Rig::launch_release(&["--max-vcpus=4096"]);
    let mut client = rig.client().queue_size(1024).connect();
    client.configure(4096);
    let body: Vec<u8> = (0..4096).flat_map(|vcpu| saved(vcpu).to_bytes()).collect();
    let len = 16 + 40 + 56 * 4096;
    for cut in [Cut::whole(), Cut::every(1000), Cut::every(257)] {
        for layout in [Layout::cut(cut.clone()), Layout::cut(cut).reversed()] {
            let begin = request(op::RESTORE_BEGIN, VM, 0, &restore_body(4096, 0, 0, 0));
            client.raw(&begin, 16).ok(0);
            client.layout = layout.indirect();
            client.raw(&request(op::SET_VM, VM, 0, &body), 16).ok(0);
            let get = request(op::GET_VM, VM, 0, &range_body(0, 4096));
            let answer = client.raw(&get, len);
            let state = VmState::of(answer.ok(len - 16));
            let mut wanted: Vec<_> = (0..4096).map(saved).collect();
            for vcpu in &mut wanted {
                // The virtual timer is on, and none is due but the first's.
                vcpu.registers[0] |= u64::from(vcpu.registers[1] >= vcpu.registers[2]) << 2;
            }
            assert_eq!(state.vcpus, wanted);
            let short = client.raw(&get, len - 1);
            assert_eq!(short.outcome(), (status::E2BIG, len as u32));
        }
    }
}

fn up_to_256_kib_readable_are_looked_at() {
    const MOST: usize = 256 * 1024;
    let rig = Rig::launch_release(&[]);
    let mut client = at_rest(&rig);
    let before = client.state();
    // As many entries as fit, all of them the same register, in requests cut differently.
    let entries = (MOST - 16) / 16;
    let mut body = regs_body(&vec![(ARM64[2], 99); entries]);
    for layout in [
        Layout::plain(),
        Layout::cut(Cut::every(4096)).indirect(),
        Layout::cut(Cut::every(1021)).indirect(),
    ] {
        client.layout = layout;
        let set = request(op::SET_REGS, 0, 0, &body);
        assert_eq!(set.len(), MOST);
        client.raw(&set, 24).ok(8);
    }
    assert_ne!(client.state().vcpus, before.vcpus);
    // One more is one too many, however it is cut.
    let before = client.state();
    body.extend(regs_body(&[(ARM64[2], 100)]));
    for cut in [Cut::whole(), Cut::at(&[MOST, 16]), Cut::every(5000)] {
        client.layout = Layout::cut(cut).indirect();
        let set = request(op::SET_REGS, 0, 0, &body);
        let answer = client.raw(&set, 24);
        assert_eq!(answer.outcome(), (status::EPROTO, 0));
    }
    assert_eq!(client.state().vcpus, before.vcpus);
}

fn up_to_256_kib_writable_are_looked_at() {
    const MOST: usize = 256 * 1024;
    let rig = Rig::launch_release(&[]);
    let mut client = at_rest(&rig);
    let fits = (MOST - 16) / 16;
    for (entries, ok) in [(fits, true), (fits + 1, false)] {
        let get = request(op::GET_REGS, 0, 0, &words(&vec![ARM64[2]; entries]));
        for cut in [Cut::whole(), Cut::every(9000)] {
            let layout = Layout::cut(cut).indirect();
            // Room for both, if all of it counted.
            let used = client.driver.call(1, &get, MOST + 4096, &layout);
            let answer = Answer::of(&used);
            if ok {
                answer.ok(16 * entries);
            } else {
                let needed = 16 + 16 * entries as u32;
                assert_eq!(answer.outcome(), (status::E2BIG, needed));
            }
        }
    }
}
