//! Hostile values in messages that are well-formed.

use super::*;

#[test]
fn ring_sizes_that_no_ring_has_do_no_harm() {
    let victim = Victim::launch();
    for num in [
        0,
        3,
        7,
        1000,
        1023,
        1025,
        2048,
        0x1_0000,
        0x1_0010,
        u32::MAX,
    ] {
        let mut control = victim.negotiated();
        let _ = control.ask(SET_VRING_NUM, &[pair(1, num)], &[]);
    }
    // Accepted or not, such a ring gives no access.
    for num in [3u16, 1000] {
        let mut driver = victim.driver();
        driver.stop(1);
        let _ = driver.control.set_vring_num(1, num);
        drop(driver);
    }
    victim.unharmed();
}

#[test]
fn a_ring_size_that_is_no_power_of_two_is_refused_and_the_ring_keeps_its_size() {
    let victim = Victim::launch();
    let refuses = |control: &mut Control, largest: u32| {
        for num in [0, 3, 24, 127, 1000, 2 * largest, 0x1_0010, u32::MAX] {
            let answer = control.ask(SET_VRING_NUM, &[pair(1, num)], &[]);
            assert_ne!(answer.expect("an answer"), 0, "{num} is taken");
        }
        // The connection goes on.
        for num in [1, 16, largest] {
            let taken = control.granted(SET_VRING_NUM, &[pair(1, num)], &[]);
            taken.expect("an answer");
        }
    };
    refuses(&mut victim.negotiated(), 1024);
    refuses(&mut victim.clock_negotiated(0), 1024);

    let mut driver = victim.driver();
    driver
        .control
        .set_vring_num(1, 24)
        .expect_err("24 is taken");
    still_serves(&mut driver, 1);
    drop(driver);
    victim.unharmed();
}

#[test]
fn queues_that_there_are_not_do_no_harm() {
    let victim = Victim::launch();
    let fd = blocking_eventfd(0);
    for index in [3, 16, 17, 63, 64, 255, 256, u32::MAX] {
        for code in [
            SET_VRING_NUM,
            SET_VRING_BASE,
            GET_VRING_BASE,
            SET_VRING_ENABLE,
        ] {
            let mut control = victim.negotiated();
            let _ = control.ask(code, &[pair(index, 1)], &[]);
        }
        for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            let mut control = victim.negotiated();
            let _ = control.ask(code, &[index.into()], &[fd.as_fd()]);
        }
    }
    victim.unharmed();
}

#[test]
fn rings_that_start_at_a_random_base_come_to_rest() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    for _ in 0..20 {
        let mut driver = victim.driver();
        driver.stop(1);
        let base = random.u16(1..);
        driver.start_at(1, base);
        driver.rings[1].kick_anyway();
        driver.rings[0].kick_anyway();
        assert!(victim.rig.comes_to_rest(), "VUT_SEED={seed} base {base}");
        still_serves(&mut driver, 2);
    }
    victim.unharmed();
}

#[test]
fn rings_at_addresses_where_they_cannot_be_do_no_harm() {
    let victim = Victim::launch();
    let end = REGION_VA + REGION_SIZE;
    let good = REGION_VA;
    for bad in [
        0,
        1,
        REGION_VA - 1,
        end - 16,
        end - 2,
        end,
        u64::MAX,
        u64::MAX - 15,
        good + 1,
    ] {
        for place in 0..3 {
            let mut driver = victim.driver();
            driver.stop(1);
            let mut config = driver.rings[1].config();
            match place {
                0 => config.desc_table_addr = bad,
                1 => config.avail_ring_addr = bad,
                _ => config.used_ring_addr = bad,
            }
            if driver.control.set_vring_addr(1, &config).is_ok() {
                let ring = &driver.rings[1];
                driver.control.set_vring_call(1, ring.call()).unwrap();
                driver.control.set_vring_kick(1, ring.kick_fd()).unwrap();
                ring.kick_anyway();
                still_serves(&mut driver, 2);
            }
        }
    }
    victim.unharmed();
}

#[test]
fn rings_that_lie_upon_each_other_do_no_harm() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    driver.stop(1);
    let mut config = driver.rings[1].config();
    config.avail_ring_addr = config.desc_table_addr;
    config.used_ring_addr = config.desc_table_addr;
    driver.control.set_vring_addr(1, &config).unwrap();
    driver.control.set_vring_base(1, 0).unwrap();
    let ring = &driver.rings[1];
    driver.memory.write(ring.descriptors_at(), &[1; 64]);
    driver.control.set_vring_call(1, ring.call()).unwrap();
    driver.control.set_vring_kick(1, ring.kick_fd()).unwrap();
    ring.kick_anyway();
    assert!(victim.rig.comes_to_rest());
    still_serves(&mut driver, 2);
    drop(driver);
    victim.unharmed();
}
