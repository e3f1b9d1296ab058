//! What is saved, and what a load makes of it.

use std::io::{Read, pipe};
use std::path::Path;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
};
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, VM, configure_body, op, phase, request, restore,
    status,
};
use vhost_user_timer_kit::raw_driver::{Layout, Rig, load, save, start_save};

use crate::world::HZ;

use super::{MANY, at_rest, configured, saved};

scenarios! {
    binary {
        a_save_in_paused_is_exact_and_the_same_each_time: "10.1" "10.3" "10.9";
        a_save_in_running_is_one_instant: "10.3" "10.9";
        the_source_goes_on_as_if_nothing_had_happened: "10.4";
        a_save_is_refused_in_new_and_while_restoring_and_the_log_says_why: "10.5";
        what_is_loaded_in_new_waits_for_every_vcpu:
            "3.10" "3.13" "7.7" "10.6" "10.8" "10.9" "10.10";
        what_is_loaded_in_new_and_aborted_is_as_just_configured: "10.13";
        what_is_loaded_in_paused_takes_the_former_vms_place_until_it_is_aborted:
            "3.10" "3.13" "7.30" "10.6" "10.8" "10.11" "10.12";
        the_log_says_when_a_loaded_vm_is_of_another_shape_than_the_configured_one: "10.8";
        a_load_is_refused_in_running_and_while_restoring_and_changes_nothing: "10.6" "10.17";
        another_frequency_is_refused_unless_it_was_left_to_the_stream: "10.8" "10.16" "10.17";
        more_vcpus_than_the_backend_takes_are_refused: "10.15" "10.17";
        what_was_loaded_survives_a_kill: "3.12" "10.9";
        every_golden_stream_is_loaded_by_a_real_backend: "10.2" "10.8" "10.10";
    }
}

fn a_save_in_paused_is_exact_and_the_same_each_time() {
    let source = Rig::launch_release(&[]);
    let mut client = configured(&source, 8);
    let before = client.state();
    let stream = save(&client.driver.control);
    assert_eq!(save(&client.driver.control), stream);

    let destination = Rig::launch_release(&[]);
    let mut there = Client::connect(&destination);
    assert!(load(&there.driver.control, &stream));
    let state = there.state();
    assert_eq!(state.vcpus, before.vcpus);
    assert_eq!(state.frequency, before.frequency);
    assert_eq!(there.info().abi, 0);
}

fn a_save_in_running_is_one_instant() {
    let source = Rig::launch_release(&[]);
    let mut client = configured(&source, 8);
    client.resume();
    let before = client.state();
    let stream = save(&client.driver.control);
    let after = client.state();
    assert_eq!(client.info().phase, phase::RUNNING, "it goes on");

    let destination = Rig::launch_release(&[]);
    let mut there = Client::connect(&destination);
    assert!(load(&there.driver.control, &stream));
    for (vcpu, row) in (0..).zip(&before.vcpus) {
        let [ctl, virt, cval, pctl, phys, pcval] = there.state().vcpus[vcpu].registers;
        assert!((before.virt_count..=after.virt_count).contains(&virt));
        // Both clocks run at one rate, so the two counts are of one instant if they differ by as
        // much as before.
        assert_eq!(
            phys.wrapping_sub(virt),
            before.phys_count.wrapping_sub(before.virt_count)
        );
        assert_eq!([cval, pcval], [row.registers[2], row.registers[5]]);
        assert_eq!(
            [ctl & 3, pctl & 3],
            [row.registers[0] & 3, row.registers[3] & 3]
        );
        assert_eq!(
            virt,
            there.state().vcpus[0].registers[1],
            "all vCPUs bring one count"
        );
    }
}

fn the_source_goes_on_as_if_nothing_had_happened() {
    let rig = Rig::launch_release(&["--max-vcpus=4096"]);
    let mut client = configured(&rig, MANY);
    let registers = |client: &mut Client| {
        let last = client.get(MANY - 1, &[CTL, CNT, CVAL, PCTL, PCNT, PCVAL]);
        (client.info().at_rest(), last)
    };
    let before = registers(&mut client);
    let control = client.driver.control.clone();

    let stream = save(&control);
    assert!(stream.len() > 64 * 1024, "it does not fit a pipe");
    assert_eq!(registers(&mut client), before, "after a save");

    drop(start_save(&control));
    assert!(control.check_device_state().is_err());
    assert_eq!(
        registers(&mut client),
        before,
        "after a save that nobody read"
    );

    let mut reader = start_save(&control);
    reader.read_exact(&mut [0; 1_000]).unwrap();
    drop(reader);
    assert!(control.check_device_state().is_err());
    assert_eq!(
        registers(&mut client),
        before,
        "after a save that was given up half way"
    );

    let stalled = start_save(&control);
    assert_eq!(registers(&mut client), before, "during a save that stalls");
    assert_eq!(save(&control), stream, "a save in its place");
    drop(stalled);

    client.resume();
    assert_eq!(client.info().phase, phase::RUNNING);
}

fn a_save_is_refused_in_new_and_while_restoring_and_the_log_says_why() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    let refused = |client: &Client, why: &str| {
        let (_reader, writer) = pipe().unwrap();
        let control = &client.driver.control;
        let result = control.set_device_state_fd(Direction::SAVE, Phase::STOPPED, writer.into());
        assert!(result.is_err());
        rig.log_with(why);
    };
    refused(&client, "the VM is NEW");
    client.configure(3);
    client.restore_begin(3, 0);
    client.bring(1, 5);
    client.restore_done(1);
    refused(&client, "a restore is open, 2 vCPUs are missing");
    assert_eq!(client.info().restored, 1, "and it stays open");
}

fn what_is_loaded_in_new_waits_for_every_vcpu() {
    let stream = saved();
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    assert!(load(&client.driver.control, &stream));
    let info = client.info();
    assert_eq!(
        (info.phase, info.vcpus, info.restored),
        (phase::RESTORING, 3, 0)
    );
    assert_eq!(info.epoch, 2);
    assert_eq!(client.get(2, &[CTL, CNT, CVAL]), [2, 0x1234_5678_9abc, !2]);

    let waiting = [0, 1, 2].map(|vcpu| client.wait_run(1, vcpu));
    for vcpu in [1, 0, 2] {
        client.settle();
        assert!(
            client.driver.used_already(1).is_none(),
            "nobody runs before all are back"
        );
        // As a VMM does it: what is read is applied, and written back, which changes nothing.
        let ids = [CTL, CNT, CVAL, PCTL, PCNT, PCVAL];
        let values = client.get(vcpu, &ids);
        let entries: Vec<_> = ids.into_iter().zip(values).collect();
        client.set(vcpu, &entries);
        client.restore_done(vcpu);
    }
    let info = client.info();
    assert_eq!((info.phase, info.restored), (phase::PAUSED, 3));
    assert!(
        client.driver.used_already(1).is_none(),
        "nobody runs before RESUME"
    );
    let resume = request(op::RESUME, VM, 0, &[]);
    let resume = client.driver.submit(1, &resume, 56, &Layout::plain());
    let answers = client.all_released(1, &[&waiting[..], &[resume]].concat());
    assert!(
        answers
            .iter()
            .all(|answer| answer.body == answers[0].body && answer.status == 0)
    );
    assert_eq!(client.info().phase, phase::RUNNING);
}

fn what_is_loaded_in_paused_takes_the_former_vms_place_until_it_is_aborted() {
    let stream = saved();
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 5);
    let (state, _, epoch) = at_rest(&mut client);
    let older = client.wait_run(1, 4);
    // The two channels are served by two threads: it waits before the load comes.
    client.settle();
    assert!(load(&client.driver.control, &stream));
    assert_eq!(client.released(1, older).status, status::ESTALE);
    let info = client.info();
    assert_eq!(
        (info.phase, info.vcpus, info.epoch),
        (phase::RESTORING, 3, epoch + 1)
    );
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(at_rest(&mut client), (state, phase::PAUSED, epoch + 1));
}

fn the_log_says_when_a_loaded_vm_is_of_another_shape_than_the_configured_one() {
    let stream = saved();
    for (vcpus, frequency, warned) in [
        (3, HZ, None),
        (3, 62_500_000, Some("3 vCPUs at 62500000 Hz")),
        (5, HZ, Some("5 vCPUs at 1000000000 Hz")),
    ] {
        let rig = Rig::launch_release(&[]);
        let mut client = Client::connect(&rig);
        let body = configure_body(vcpus, 0, frequency);
        client.vm(op::CONFIGURE_VM, &body).ok(0);
        assert!(load(&client.driver.control, &stream));
        rig.log_with("Loaded the device state: 3 vCPUs at 1000000000 Hz, ");
        let text = "The loaded VM has 3 vCPUs at 1000000000 Hz, and takes the place of one with ";
        match warned {
            Some(own) => {
                rig.log_with(&format!("{text}{own}; RESTORE_ABORT brings that back"));
            }
            None => assert_eq!(rig.said(text), 0),
        }
        client.vm(op::RESTORE_ABORT, &[]).ok(0);
        let info = client.info();
        assert_eq!((info.vcpus, info.frequency), (vcpus, frequency));
    }
}

fn a_load_is_refused_in_running_and_while_restoring_and_changes_nothing() {
    let stream = saved();
    let rig = Rig::launch_release(&[]);
    let mut client = configured(&rig, 2);
    client.resume();
    let before = (client.info().cntvoff, client.get(1, &[CVAL]));
    assert!(!load(&client.driver.control, &stream));
    assert_eq!((client.info().cntvoff, client.get(1, &[CVAL])), before);
    rig.log_with("a state is loaded in NEW and PAUSED");
    client.pause();
    client.restore_begin(2, restore::AUTORUN);
    client.bring(0, 7);
    let before = at_rest(&mut client);
    assert!(!load(&client.driver.control, &stream));
    assert_eq!(at_rest(&mut client), before);
    client.restore_done(0);
}

fn another_frequency_is_refused_unless_it_was_left_to_the_stream() {
    const HZ: u64 = 24_000_000;
    let source = Rig::launch_release(&[]);
    let mut client = Client::connect(&source);
    client.vm(op::CONFIGURE_VM, &configure_body(2, 1, HZ)).ok(0);
    let stream = save(&client.driver.control);

    let fixed = Rig::launch_release(&["--counter-frequency=62500000"]);
    let mut there = Client::connect(&fixed);
    assert!(!load(&there.driver.control, &stream));
    assert_eq!(there.info().phase, phase::NEW);
    fixed.log_with("runs at 24000000 Hz, and this backend's at 62500000 Hz");

    for args in [&[][..], &["--counter-frequency=24000000"]] {
        let same = Rig::launch_release(args);
        let mut there = Client::connect(&same);
        assert!(load(&there.driver.control, &stream));
        let info = there.info();
        assert_eq!((info.frequency, info.abi, info.vcpus), (HZ, 1, 2));
    }
}

fn more_vcpus_than_the_backend_takes_are_refused() {
    let rig = Rig::launch_release(&["--max-vcpus=2"]);
    let mut client = Client::connect(&rig);
    assert!(!load(&client.driver.control, &saved()));
    assert_eq!(client.info().phase, phase::NEW);
    rig.log_with("has 3 vCPUs, and this backend takes 1 to 2");
}

fn what_was_loaded_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let state_file = format!("--state-file={}", folder.path().join("state").display());
    let mut first = Rig::launch_release(&[&state_file]);
    let mut client = Client::connect(&first);
    assert!(load(&client.driver.control, &saved()));
    client.restore_done(2);
    let before = at_rest(&mut client);
    first.backend.kill();

    let second = Rig::launch_release(&[&state_file]);
    let mut client = Client::connect(&second);
    assert_eq!(at_rest(&mut client), before);
    assert_eq!(client.restore_done(0), 1);
    assert_eq!(client.restore_done(1), 0);
    assert_eq!(client.state().virt_count, 0x1234_5678_9abc);
}

fn every_golden_stream_is_loaded_by_a_real_backend() {
    // Looked up when the test runs, so that the program can run elsewhere than it was built.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let folder = Path::new(&manifest).join("../backend/tests/data/device-state");
    let mut loaded = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let rig = Rig::launch_release(&[]);
        let mut client = Client::connect(&rig);
        let stream = std::fs::read(&path).unwrap();
        assert!(
            load(&client.driver.control, &stream),
            "{}: {}",
            path.display(),
            rig.backend.log()
        );
        for vcpu in 0..client.info().vcpus {
            client.restore_done(vcpu);
        }
        assert_eq!(client.info().phase, phase::PAUSED);
        loaded += 1;
    }
    assert!(loaded >= 2);
}

fn what_is_loaded_in_new_and_aborted_is_as_just_configured() {
    let stream = saved();
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    assert!(load(&client.driver.control, &stream));
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    let info = client.info();
    assert_eq!((info.phase, info.vcpus, info.epoch), (phase::PAUSED, 3, 2));
    assert_eq!((info.cntvoff, info.cntpoff), (info.host_count, 0));
    assert_eq!(info.flags, 0);
    for vcpu in 0..3 {
        assert_eq!(client.get(vcpu, &[CTL, CNT, CVAL, PCTL, PCVAL]), [0; 5]);
    }
}
