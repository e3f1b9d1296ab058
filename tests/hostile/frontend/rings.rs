//! Hostile rings.

use super::*;

/// Calls `act` on queue 1 and checks that the rest of the connection, and everything else, goes on.
#[track_caller]
fn attack(victim: &Victim, what: &str, act: impl FnOnce(&mut Memory, &mut Ring)) {
    let mut driver = victim.driver();
    still_serves(&mut driver, 1);
    act(&mut driver.memory, &mut driver.rings[1]);
    driver.rings[1].kick_anyway();
    assert!(victim.rig.comes_to_rest(), "{what}: it spins");
    still_serves(&mut driver, 2);
    // More kicks change nothing.
    driver.rings[1].kick_anyway();
    still_serves(&mut driver, 2);
    // And the queue itself can be started again.
    driver.stop(1);
    driver.start(1);
    still_serves(&mut driver, 1);
}

/// A buffer with a RESUME in it that must not be carried out.
fn resume(memory: &mut Memory) -> u64 {
    let at = memory.allocate(64);
    memory.write(at, &request(op::RESUME, VM, 0, &[]));
    at
}

#[test]
fn an_available_index_that_jumps_comes_to_rest() {
    let victim = Victim::launch();
    for jump in [17, 18, 1000, 0x7fff, 0x8000, 0xffff] {
        attack(&victim, &format!("a jump by {jump}"), |memory, ring| {
            ring.set_avail_index(memory, ring.next_avail().wrapping_add(jump));
        });
    }
    victim.unharmed();
}

#[test]
fn chains_that_loop_come_to_rest() {
    let victim = Victim::launch();
    for flags in [NEXT, NEXT | WRITE] {
        for (len, second) in [(0, 0), (1, 0), (64, 0), (u32::MAX, 0), (64, 5), (0x8000, 5)] {
            let what = format!("a loop of {len} bytes over {second}, flags {flags}");
            attack(&victim, &what, |memory, ring| {
                let at = resume(memory);
                ring.set_descriptor(memory, 0, descriptor(at, len, flags, second));
                ring.set_descriptor(memory, 5, descriptor(at, len, flags, 0));
                ring.make_available(memory, 0);
            });
        }
    }
    victim.unharmed();
}

#[test]
fn chains_that_lead_out_of_the_table_come_to_rest() {
    let victim = Victim::launch();
    for next in [16, 17, 255, 0x7fff, 0xffff] {
        attack(&victim, &format!("next is {next}"), |memory, ring| {
            let at = resume(memory);
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, next));
            ring.make_available(memory, 0);
        });
        attack(&victim, &format!("the head is {next}"), |memory, ring| {
            ring.make_available(memory, next);
        });
    }
    victim.unharmed();
}

#[test]
fn buffers_outside_the_shared_memory_are_neither_read_nor_written() {
    let victim = Victim::launch();
    let end = REGION_GPA + REGION_SIZE;
    for address in [
        0,
        REGION_GPA - 1,
        end - 8,
        end,
        1 << 52,
        u64::MAX,
        u64::MAX - 15,
        REGION_VA,
    ] {
        for len in [16, 4096, 0x4_0000, u32::MAX] {
            attack(
                &victim,
                &format!("{len} from {address:#x}"),
                |memory, ring| {
                    let at = resume(memory);
                    // Read from there, and write there.
                    ring.set_descriptor(memory, 0, descriptor(address, len, NEXT, 1));
                    ring.set_descriptor(memory, 1, descriptor(at, 64, WRITE, 0));
                    ring.set_descriptor(memory, 2, descriptor(at, 16, NEXT, 3));
                    ring.set_descriptor(memory, 3, descriptor(address, len, WRITE, 0));
                    ring.make_available(memory, 0);
                    ring.make_available(memory, 2);
                },
            );
        }
    }
    victim.unharmed();
}

#[test]
fn the_same_chain_made_available_twice_comes_to_rest() {
    let victim = Victim::launch();
    for op in [op::WAIT_RUN, op::GET_REG_LIST] {
        attack(&victim, &format!("twice {op:#x}"), |memory, ring| {
            let at = memory.allocate(256);
            memory.write(at, &request(op, 0, 0, &[]));
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, 1));
            ring.set_descriptor(memory, 1, descriptor(at + 16, 64, WRITE, 0));
            for _ in 0..16 {
                ring.make_available(memory, 0);
            }
        });
    }
    victim.unharmed();
}

#[test]
fn indirect_tables_that_make_no_sense_come_to_rest() {
    let victim = Victim::launch();
    let end = REGION_GPA + REGION_SIZE;
    for len in [
        0,
        1,
        15,
        17,
        16,
        160,
        16 * 0xffff,
        16 * 0x1_0000,
        !15,
        u32::MAX,
    ] {
        for place in [0u64, end - 16, end, u64::MAX - 15] {
            attack(
                &victim,
                &format!("a table of {len} at {place:#x}"),
                |memory, ring| {
                    ring.set_descriptor(memory, 0, descriptor(place, len, INDIRECT, 0));
                    ring.make_available(memory, 0);
                },
            );
        }
    }
    for flags in [
        INDIRECT,
        INDIRECT | NEXT,
        INDIRECT | WRITE,
        INDIRECT | NEXT | WRITE,
    ] {
        attack(
            &victim,
            &format!("a table in a table, {flags}"),
            |memory, ring| {
                let at = resume(memory);
                let table = memory.allocate(64);
                let inner = descriptor(table, 64, flags, 0);
                memory.write(table, &inner.to_bytes());
                memory.write(table + 16, &descriptor(at, 64, WRITE, 0).to_bytes());
                ring.set_descriptor(memory, 0, descriptor(table, 64, flags, 0));
                ring.make_available(memory, 0);
            },
        );
        attack(
            &victim,
            &format!("a loop in a table, {flags}"),
            |memory, ring| {
                let at = resume(memory);
                let table = memory.allocate(0x1_0000);
                for slot in 0..0x1000u64 {
                    let next = (slot as u16 + 1) % 0x1000;
                    let turn = descriptor(at, 64, NEXT | (slot as u16 % 2 * WRITE), next);
                    memory.write(table + 16 * slot, &turn.to_bytes());
                }
                ring.set_descriptor(memory, 0, descriptor(table, 0x1_0000, flags, 0));
                ring.make_available(memory, 0);
            },
        );
    }
    victim.unharmed();
}

#[test]
fn answers_into_the_ring_itself_come_to_rest() {
    let victim = Victim::launch();
    let places: [fn(&Ring) -> u64; 3] = [Ring::descriptors_at, Ring::avail_at, Ring::used_at];
    for (n, place) in places.into_iter().enumerate() {
        attack(&victim, &format!("ring part {n}"), |memory, ring| {
            let at = memory.allocate(16);
            memory.write(at, &request(op::GET_INFO, VM, 0, &[]));
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, 1));
            ring.set_descriptor(memory, 1, descriptor(place(ring), 80, WRITE, 0));
            ring.make_available(memory, 0);
        });
    }
    victim.unharmed();
}

#[test]
fn hostile_buffers_on_the_event_queue_come_to_rest() {
    let victim = Victim::launch();
    for (address, len, flags) in [
        (0, 32, WRITE),
        (REGION_GPA, 32, 0),
        (REGION_GPA, u32::MAX, WRITE),
        (u64::MAX, u32::MAX, WRITE),
        (REGION_GPA, 16, INDIRECT),
        (REGION_GPA, 0, WRITE),
    ] {
        let mut driver = victim.driver();
        driver.call(1, &request(op::RESUME, VM, 0, &[]), 56, &Layout::plain());
        let ring = &mut driver.rings[0];
        for head in 0..8 {
            let bad = descriptor(address, len, flags, 0);
            ring.set_descriptor(&driver.memory, head, bad);
            ring.make_available(&driver.memory, head);
        }
        ring.kick_anyway();
        assert!(victim.rig.comes_to_rest());
        let jump = ring.next_avail().wrapping_add(99);
        ring.set_avail_index(&driver.memory, jump);
        ring.kick_anyway();
        assert!(victim.rig.comes_to_rest());
        still_serves(&mut driver, 2);
        // As before: paused, at the same count.
        let pause = request(op::PAUSE, VM, 0, &pause_body(0));
        driver.call(1, &pause, 56, &Layout::plain());
        let set = vhost_user_timer_kit::contract::regs_body(&[(CNT, 1 << 30)]);
        let set = request(op::SET_REGS, 0, 0, &set);
        driver.call(1, &set, 24, &Layout::plain());
    }
    victim.unharmed();
}

#[test]
fn random_bytes_for_a_ring_come_to_rest() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    for n in 0..200 {
        let mut driver = victim.driver();
        let ring = &mut driver.rings[1];
        for index in 0..16 {
            let address = match random.u8(0..3) {
                0 => random.u64(..),
                1 => REGION_GPA + random.u64(0..REGION_SIZE),
                // Never bytes that are a request.
                _ => REGION_GPA + 0x1f_0000,
            };
            let len = match random.u8(0..3) {
                0 => random.u32(..),
                _ => random.u32(0..300),
            };
            let hostile = descriptor(address, len, random.u16(0..8), random.u16(0..20));
            ring.set_descriptor(&driver.memory, index, hostile);
        }
        for _ in 0..random.u8(1..16) {
            ring.make_available(&driver.memory, random.u16(0..18));
        }
        ring.kick_anyway();
        still_serves(&mut driver, 2);
        if n % 20 == 0 {
            assert!(victim.rig.comes_to_rest(), "VUT_SEED={seed} at {n}");
        }
    }
    victim.unharmed();
}
