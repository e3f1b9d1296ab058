//! The guest's clock beside the timer device, by one backend: its readings are paired with the
//! guest's counter, and the guest's kernel judges each pair.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use vhost_user_timer_kit::qemu::{
    ClockVm, Environment, Error, LIBRARY_VARIABLE, PATIENCE, Shape, TimerVm, Transport,
    environment, timer_library,
};

/// Cross timestamps in a row.
const MANY: u32 = 1000;

/// A millisecond of the counter of these guests, 62.5 MHz.
const MILLISECOND: i64 = 62_500;

/// What a guest says of many cross timestamps.
struct Many {
    text: String,
}

impl Many {
    /// A number that it says, such as how many succeeded (`ok`); 0 if it does not say.
    fn number(&self, key: &str) -> i128 {
        find_number(&self.text, key).unwrap_or_default()
    }
}

fn find_number(line: &str, key: &str) -> Option<i128> {
    let mut words = line.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.parse().expect(line))
}

/// A number that a line of the guest's must have.
fn number_in(line: &str, key: &str) -> i128 {
    find_number(line, key).unwrap_or_else(|| panic!("no {key}: {line}"))
}

/// A guest that has the clock's driver loaded.
fn boot(environment: &Environment, shape: &Shape) -> TimerVm {
    let mut vm = TimerVm::boot(environment, shape);
    vm.run("modprobe virtio_rtc");
    vm
}

fn many(vm: &mut TimerVm, clock: &str, times: u32) -> Many {
    let text = vm.run(&format!("guest precise-many {clock} {times}"));
    Many { text }
}

/// Checks that all of them succeed, and prints their error.
fn all_succeed(vm: &mut TimerVm, when: &str) -> [i128; 2] {
    ["ptp0", "ptp1"].map(|clock| {
        let answer = many(vm, clock, MANY);
        let Many { text } = &answer;
        assert_eq!(
            answer.number("ok"),
            MANY.into(),
            "{when}: {text}\n{}",
            vm.logs()
        );
        println!(
            "{MANY} cross timestamps of {clock} {when}: off by {} ns typically, {} ns at worst",
            answer.number("typical"),
            answer.number("worst")
        );
        answer.number("median")
    })
}

/// How far apart a clock and the guest's own are, ns.
struct Apart {
    /// By a cross timestamp.
    paired: i128,
    /// By readings that are not paired by the backend: each lies between two of the guest's own
    /// clock, so all of them together are bounds.
    plain: RangeInclusive<i128>,
}

impl Apart {
    /// By 500 plain readings, and more where the bounds of these are wider than this, ns. On a busy
    /// machine most readings take long.
    fn measure(vm: &mut TimerVm, width: i128) -> Self {
        let (mut least, mut most) = (-i128::from(i64::MAX), i128::from(i64::MAX));
        let began = Instant::now();
        let mut samples = 0;
        while samples < 500 || (most - least > width && began.elapsed() < PATIENCE) {
            samples += 25;
            let samples = vm.run("guest offset ptp1 25");
            for sample in samples.lines() {
                let device = number_in(sample, "device");
                least = least.max(device - number_in(sample, "after"));
                most = most.min(device - number_in(sample, "before"));
            }
        }
        // A guest refuses some pairs of a wrong offset, and takes others.
        let began = Instant::now();
        let pair = loop {
            let pair = vm.run("guest precise ptp1");
            if !pair.starts_with("error=") {
                break pair;
            }
            assert!(began.elapsed() < PATIENCE, "{pair}\n{}", vm.logs());
        };
        Apart {
            paired: number_in(&pair, "device") - number_in(&pair, "realtime"),
            // The guest's clock is steered meanwhile, by nanoseconds.
            plain: least - 1000..=most + 1000,
        }
    }

    fn is_right(&self) -> bool {
        self.plain.contains(&self.paired)
    }

    /// The farthest that a cross timestamp within the bounds can be off, ns.
    fn bound(&self) -> i128 {
        let Apart { paired, plain } = self;
        (paired - plain.start()).max(plain.end() - paired)
    }
}

fn agree_with_plain_readings(vm: &mut TimerVm, when: &str) {
    let apart = Apart::measure(vm, i128::MAX);
    let bound = apart.bound();
    assert!(apart.is_right(), "{when}, off by {bound} ns\n{}", vm.logs());
    println!("{when} a cross timestamp is right to within {bound} ns, by 500 plain readings");
}

/// `cont` returns only once both devices have started: the backend holds the clock's rings while a
/// restore is open, and QEMU's timer device ends the restore.
#[test]
fn a_guest_takes_every_cross_timestamp_before_and_after_stops_and_a_migration() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = boot(&environment, &Shape::default().clock());
    let mut last = all_succeed(&mut vm, "after the boot");
    agree_with_plain_readings(&mut vm, "after the boot");
    for how in ["a stop", "a migration", "a second migration"] {
        match how {
            "a stop" => {
                vm.guest.qmp().stop().unwrap();
                vm.guest.qmp().cont().unwrap();
            }
            _ => drop(vm.migrate()),
        }
        let when = format!("after {how}");
        let now = all_succeed(&mut vm, &when);
        agree_with_plain_readings(&mut vm, &when);
        // The guest's own time stood still, and the host's, of which the clocks are made, did not.
        for (last, now) in last.iter().zip(now) {
            assert!(*last < now, "{how}: {last} {now}\n{}", vm.logs());
        }
        last = now;
    }
}

#[test]
fn a_guest_refuses_cross_timestamps_whose_offset_is_wrong_by_a_millisecond() {
    let Some(environment) = environment() else {
        return;
    };
    let wrong = format!("x-offset-error={MILLISECOND}");
    let mut vm = boot(&environment, &Shape::default().clock().property(&wrong));
    // Its kernel finds a count that the guest has not reached yet. A pair passes where the answer
    // takes a millisecond to arrive: on an idle machine few do, on a busy one most. With the right
    // offset none is refused on either.
    let began = Instant::now();
    loop {
        let answer = many(&mut vm, "ptp0", MANY);
        println!("{MANY} cross timestamps, wrong by 1 ms: {}", answer.text);
        if answer.number("EOVERFLOW") + answer.number("EINVAL") > 0 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{}", answer.text);
    }
}

/// The kernel takes a pair whose error is less than the time that the answer takes.
#[test]
fn an_offset_that_is_wrong_by_a_fifth_of_a_millisecond_disagrees_with_plain_readings() {
    let Some(environment) = environment() else {
        return;
    };
    let wrong = format!("x-offset-error={}", MILLISECOND / 5);
    let mut vm = boot(&environment, &Shape::default().clock().property(&wrong));
    let apart = Apart::measure(&mut vm, 150_000);
    println!("wrong by 0.2 ms: off by {} ns at most", apart.bound());
    assert!(!apart.is_right(), "{}", vm.logs());
}

/// A reading that is under way when the VM stops finds no running count, and fails with EIO. None
/// is paired with a wrong one.
#[test]
fn cross_timestamps_during_stops_and_a_migration_are_right_or_refused_by_the_device() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = boot(&environment, &Shape::default().clock());
    vm.run("mkfifo /tmp/done; : > /tmp/many");
    let forever = "while [ ! -e /tmp/end ]; do guest precise-many ptp0 100; done >> /tmp/many &";
    vm.run(&format!("({forever} {forever} wait; echo > /tmp/done) &"));
    // When one of the two has its answers, the other reads.
    let next = "lines() { wc -l < /tmp/many; }; before=$(lines); \
                while [ $(lines) = $before ]; do usleep 1000; done";
    for _ in 0..20 {
        vm.run(next);
        vm.guest.qmp().stop().unwrap();
        vm.guest.qmp().cont().unwrap();
    }
    vm.run(next);
    drop(vm.migrate());
    vm.run(next);
    let text = vm.run("touch /tmp/end; cat /tmp/done /tmp/many");
    let (mut succeeded, mut refused) = (0, 0);
    for line in text.lines().filter(|line| !line.is_empty()) {
        let answer = Many {
            text: line.to_owned(),
        };
        succeeded += answer.number("ok");
        refused += answer.number("EIO");
        assert_eq!(answer.number("ok") + answer.number("EIO"), 100, "{text}");
    }
    println!("{succeeded} cross timestamps, and {refused} that the device refused");
    assert!(succeeded > refused, "{text}");
}

#[test]
fn an_alarm_that_was_set_before_a_migration_fires_after_it() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default().clock().backend_arg("--rtc-clock=smeared");
    let mut vm = boot(&environment, &shape);
    let clocks = vm.run("guest clocks");
    let mut words = clocks
        .lines()
        .filter(|line| line.contains("name=virtio_rtc"))
        .flat_map(str::split_whitespace);
    let rtc = words.find_map(|word| word.strip_prefix("device="));
    let rtc = rtc.unwrap_or_else(|| panic!("no RTC of the driver's: {clocks}"));
    // As far ahead as this machine needs: the guest has to arrive before.
    for ahead in [4, 16, 64, 256] {
        let wait = format!("guest alarm {rtc} {ahead} 1000");
        vm.run(&format!(
            "rm -f /alarm; ({wait} > /waiting 2>&1; mv /waiting /alarm) &"
        ));
        let set = "cat /waiting /alarm 2> /dev/null | grep alarm=";
        let set = vm.run(&format!("until {set}; do usleep 10000; done"));
        drop(vm.migrate());
        // Of the same clock, in ns.
        let now: i128 = vm.run("guest read ptp0").parse().unwrap();
        let has_left = now < 1_000_000_000 * number_in(&set, "alarm");
        let limit = Duration::from_secs(ahead) + PATIENCE;
        let answer = "until [ -e /alarm ]; do usleep 10000; done; cat /alarm";
        let answer = vm.guest.run_within(limit, answer);
        let answer = answer.unwrap().text;
        assert!(answer.contains("data=0x1a0"), "{answer}");
        if has_left {
            return;
        }
    }
    panic!("no migration takes less than four minutes");
}

#[test]
fn a_guest_stays_and_has_its_clock_where_the_destination_has_another_kind_of_clock() {
    let Some(environment) = environment() else {
        return;
    };
    let kind = |kind| Shape::default().clock().backend_arg(kind);
    let mut vm = boot(&environment, &kind("--rtc-clock=smeared"));
    let destination = TimerVm::incoming(&environment, &kind("--rtc-clock=utc"));
    match vm.migrate_to(destination) {
        Err(Error::Migration { .. }) => {}
        Err(error) => panic!("{error}\n{}", vm.logs()),
        Ok(_) => panic!("it moved\n{}", vm.logs()),
    }
    all_succeed(&mut vm, "after a migration that was refused");
}

/// A stock QEMU aborts when its clock loses the backend before the guest has come.
#[test]
fn a_guest_stays_and_has_its_clock_where_the_destination_has_no_backend_any_more() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default().clock();
    let mut vm = boot(&environment, &shape);
    let mut destination = TimerVm::incoming(&environment, &shape);
    destination.backend.as_mut().expect("a backend").kill();
    match vm.migrate_to(destination) {
        Err(Error::Migration { log, .. }) => assert!(!log.contains("Assertion"), "{log}"),
        Err(error) => panic!("{error}\n{}", vm.logs()),
        Ok(_) => panic!("it moved\n{}", vm.logs()),
    }
    all_succeed(&mut vm, "after a migration to nowhere");
}

/// A stock QEMU aborts at `cont`.
#[test]
fn a_guest_outlives_the_backend_of_its_clock() {
    let Some(environment) = environment() else {
        return;
    };
    let library = timer_library().unwrap();
    let mut vm = ClockVm::boot_with(&environment, &[], |options, socket| {
        let options = options.program(environment.patched_qemu());
        let options = options.variable(LIBRARY_VARIABLE, library);
        options.rtc(Transport::Pci, socket)
    });
    vm.backend.kill();
    for _ in 0..2 {
        vm.guest.qmp().stop().unwrap();
        vm.guest.qmp().cont().unwrap();
        vm.run("true");
    }
}
