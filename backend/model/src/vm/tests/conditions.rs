//! When a timer fires: the cases of the kernel's own arch_timer edge-case tests
//! (Linux: tools/testing/selftests/kvm/arm64/arch_timer_edge_cases.c), each for both clocks
//! and for small, huge and soon wrapping host counters.

use vhost_user_timer_protocol::wire;

use super::rig::{HZ, ON, Rig, START, registers_of};
use crate::vm::Timeline;

/// Half the maximum of a 64-bit counter: where the cases begin.
const DEF: u64 = u64::MAX / 2;

const MS: u64 = HZ / 1_000;
const TVAL_MAX: u64 = i32::MAX as u64;

/// One timer of a running VM.
struct Bench {
    rig: Rig,
    clock: Timeline,
    was_high: bool,
    /// How often its rise was reported, by an event or by the answer to a write.
    fires: u32,
}

impl Bench {
    /// On every clock and host counter, a running VM with this count.
    fn everywhere(count: u64) -> Vec<Bench> {
        let hosts = [START, 0xf333_8991_2222_3333, 0, 0_u64.wrapping_sub(5 * MS)];
        let benches = hosts.into_iter().flat_map(|host| {
            Timeline::ALL.map(|clock| {
                let mut rig = Rig::paused(2);
                rig.now.host = host;
                Bench {
                    rig,
                    clock,
                    was_high: false,
                    fires: 0,
                }
            })
        });
        let mut benches: Vec<_> = benches.collect();
        for bench in &mut benches {
            bench.set_count(count);
        }
        benches
    }

    fn collect(&mut self) {
        let fired = self.rig.fired();
        assert!(fired.iter().all(|fired| *fired == (1, self.clock)));
        self.fires += fired.len() as u32;
        self.was_high = self.line();
    }

    fn line(&mut self) -> bool {
        let lines = self.rig.set(1, &[]).lines.get();
        let mine = [wire::LINE_VIRTUAL, wire::LINE_PHYSICAL][self.clock as usize];
        assert_eq!(lines & !mine, 0);
        lines != 0
    }

    fn write(&mut self, values: &[(vhost_user_timer_protocol::Register, u64)]) {
        self.rig.set(1, values);
        let high = self.line();
        self.fires += u32::from(high && !self.was_high);
        self.was_high = high;
    }

    fn arm(&mut self, control: u64, cval: u64) {
        let [ctl, _, compare] = registers_of(self.clock);
        self.write(&[(ctl, control), (compare, cval)]);
    }

    /// Arms as a write of TVAL does: a signed distance from the count.
    fn arm_tval(&mut self, tval: i32) {
        let cval = self.count().wrapping_add_signed(tval.into());
        self.arm(ON, cval);
    }

    /// The VMM sets the count, which takes a pause.
    fn set_count(&mut self, count: u64) {
        let [_, register, _] = registers_of(self.clock);
        self.rig.pause();
        self.rig.set(0, &[(register, count)]);
        self.rig.resume();
        self.collect();
    }

    fn count(&mut self) -> u64 {
        self.rig.count(self.clock)
    }

    fn pass(&mut self, ticks: u64) {
        self.rig.pass(ticks);
        self.collect();
    }
}

#[test]
fn basic_it_fires_once_when_the_count_gets_there() {
    for mut bench in Bench::everywhere(DEF) {
        bench.arm(ON, DEF + 10 * MS);
        bench.pass(10 * MS - 1);
        assert_eq!(bench.fires, 0);
        bench.pass(1);
        assert_eq!(bench.fires, 1);
        bench.pass(100 * MS);
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn past_a_compare_value_in_the_past_fires_at_once() {
    for cval in [DEF - 10 * MS, DEF - 1, DEF, 0] {
        for mut bench in Bench::everywhere(DEF) {
            bench.arm(ON, cval);
            assert_eq!(bench.fires, 1);
            bench.pass(10 * MS);
            assert_eq!(bench.fires, 1);
        }
    }
}

#[test]
fn past_a_distance_in_the_past_fires_at_once() {
    for tval in [0, -(10 * MS as i32), i32::MIN] {
        for mut bench in Bench::everywhere(DEF) {
            bench.arm_tval(tval);
            assert_eq!(bench.fires, 1, "{tval}");
        }
    }
}

#[test]
fn past_armed_before_the_vm_runs_it_fires_when_it_does() {
    for mut bench in Bench::everywhere(DEF) {
        bench.rig.pause();
        bench.rig.arm(1, bench.clock, ON, DEF - 10 * MS);
        bench.rig.resume();
        bench.collect();
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn past_wrap_a_distance_back_over_zero_is_far_ahead() {
    for mut bench in Bench::everywhere(10 * MS) {
        bench.pass(0);
        bench.arm_tval(-(10 * MS as i32) - 1);
        bench.pass(100 * MS);
        assert_eq!(bench.fires, 0);
    }
    // A count that reaches exactly zero has not passed it.
    for mut bench in Bench::everywhere(10 * MS) {
        bench.arm_tval(-(10 * MS as i32));
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn above_tval_max_nothing_fires_before_the_whole_distance() {
    for mut bench in Bench::everywhere(DEF) {
        let distance = TVAL_MAX + 10 * MS;
        bench.arm(ON, DEF + distance);
        bench.pass(10 * MS);
        assert_eq!(bench.fires, 0);
        bench.pass(distance - 10 * MS - 1);
        assert_eq!(bench.fires, 0);
        bench.pass(1);
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn cnt_to_cval_setting_the_count_near_the_compare_value_fires_the_rest_on() {
    for mut bench in Bench::everywhere(0) {
        bench.arm(ON, TVAL_MAX + 5 * MS);
        bench.set_count(TVAL_MAX);
        bench.pass(5 * MS - 1);
        assert_eq!(bench.fires, 0);
        bench.pass(1);
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn ahead_setting_the_count_past_the_compare_value_fires_at_once() {
    for mut bench in Bench::everywhere(0) {
        bench.arm(ON, DEF);
        assert_eq!(bench.fires, 0);
        bench.set_count(DEF + 1);
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn ahead_wrap_setting_the_count_past_it_beyond_the_wrap_fires() {
    for mut bench in Bench::everywhere(0) {
        bench.rig.pause();
        let [_, count, _] = registers_of(bench.clock);
        bench.rig.set(0, &[(count, u64::MAX)]);
        bench.rig.arm(1, bench.clock, ON, 1);
        bench.rig.set(0, &[(count, 2)]);
        bench.rig.resume();
        bench.collect();
        assert_eq!(bench.fires, 1);
    }
    // And by the passing of time.
    for mut bench in Bench::everywhere(u64::MAX) {
        bench.arm(ON, 1);
        assert_eq!(bench.fires, 1, "the count is at the maximum");
        bench.pass(1);
        assert!(!bench.line(), "at zero it is not due");
        bench.pass(1);
        assert_eq!(bench.fires, 2);
    }
}

#[test]
fn behind_setting_the_count_back_lets_the_line_fall() {
    for mut bench in Bench::everywhere(DEF) {
        bench.rig.pause();
        bench.rig.arm(1, bench.clock, ON, DEF - 1);
        let [_, count, _] = registers_of(bench.clock);
        bench.rig.set(0, &[(count, 0)]);
        bench.rig.resume();
        bench.pass(10 * MS);
        assert_eq!(bench.fires, 0);
        assert!(!bench.line());
    }
}

#[test]
fn reprogram_only_the_second_compare_value_counts() {
    for (first, second) in [(20, 10), (10, 20)] {
        for mut bench in Bench::everywhere(DEF) {
            bench.arm(ON, DEF + first * MS);
            bench.arm(ON, DEF + second * MS);
            bench.pass(second * MS - 1);
            assert_eq!(bench.fires, 0);
            bench.pass(1);
            assert_eq!(bench.fires, 1);
            bench.pass(20 * MS);
            assert_eq!(bench.fires, 1);
        }
    }
}

#[test]
fn mask_and_unmask_nothing_while_masked_and_one_after() {
    for mut bench in Bench::everywhere(DEF) {
        let [ctl, ..] = registers_of(bench.clock);
        bench.arm(3, DEF + 10 * MS);
        bench.pass(20 * MS);
        assert_eq!(bench.fires, 0);
        bench.write(&[(ctl, 1)]);
        assert_eq!(bench.fires, 1);
        bench.pass(20 * MS);
        assert_eq!(bench.fires, 1);
    }
}

#[test]
fn a_disabled_timer_never_fires() {
    for control in [0, 2] {
        for mut bench in Bench::everywhere(DEF) {
            bench.arm(control, DEF + 10 * MS);
            bench.pass(20 * MS);
            bench.arm(control, 0);
            bench.pass(20 * MS);
            assert_eq!(bench.fires, 0);
        }
    }
}

#[test]
fn refire_re_armed_in_the_handler_it_fires_each_time() {
    for mut bench in Bench::everywhere(DEF) {
        for n in 1..=10 {
            let cval = bench.count() + 10 * MS;
            bench.arm(ON, cval);
            assert!(!bench.line());
            bench.pass(10 * MS);
            assert_eq!(bench.fires, n);
        }
    }
}

#[test]
fn invariant_istatus_with_enable_is_count_at_or_past_the_compare_value() {
    let edges = [
        0,
        1,
        2,
        TVAL_MAX,
        TVAL_MAX + 1,
        DEF - 1,
        DEF,
        DEF + 1,
        u64::MAX - 1,
        u64::MAX,
    ];
    for mut bench in Bench::everywhere(0) {
        let [ctl, cnt, _] = registers_of(bench.clock);
        for count in edges {
            bench.set_count(count);
            for cval in edges {
                for control in 0..8 {
                    bench.rig.arm(1, bench.clock, control, cval);
                    let read = bench.rig.get(1, ctl);
                    assert_eq!(bench.rig.get(1, cnt), count);
                    let met = read & 4 != 0;
                    assert_eq!(met, control & 1 != 0 && count >= cval);
                    assert_eq!(bench.line(), met && control & 2 == 0);
                }
            }
            bench.rig.arm(1, bench.clock, 0, 0);
            bench.collect();
        }
    }
}
