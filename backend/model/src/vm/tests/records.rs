//! The VM as records: whatever its past, its records are those of a VM that goes on as it would.

use proptest::prelude::*;
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::wire::configure_flags;
use zerocopy::{FromBytes, IntoBytes};

use super::life::{Seen, Verdict, Witness, live};
use super::properties::config;
use super::rig::{Ask, PROFILE, Rig};
use super::steps::story;
use crate::vm::{BadRecord, Vm, VmRecord};

fn reloaded(rig: &Rig, record: &VmRecord) -> Result<Vm, BadRecord> {
    let vcpu = |index| rig.vm.vcpu_record(index);
    Vm::from_records(PROFILE, record, vcpu, |_| rig.now)
}

struct Records;

impl Witness for Records {
    fn see(&mut self, rig: &mut Rig, _: &Seen<'_>) -> Verdict {
        let vm = &rig.vm;
        let record = vm.vm_record();
        let again = reloaded(rig, &record).map_err(|bad| TestCaseError::fail(bad.to_string()))?;
        let written_again = again.vm_record();
        prop_assert_eq!(written_again.as_bytes(), record.as_bytes());
        prop_assert!(record.vcpus() >= vm.info(rig.now).vcpus.get());
        for vcpu in 0..record.vcpus() {
            let (before, after) = (vm.vcpu_record(vcpu), again.vcpu_record(vcpu));
            prop_assert_eq!(before.as_bytes(), after.as_bytes(), "vCPU {}", vcpu);
        }
        prop_assert_eq!(again.info(rig.now), vm.info(rig.now));
        prop_assert_eq!(again.time_page(), vm.time_page());
        prop_assert_eq!(again.save(rig.now), vm.save(rig.now));
        Ok(())
    }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn a_vm_of_its_own_records_is_the_same(story in story(40)) {
        live(&story, &mut Records)?;
    }
}

#[test]
fn a_restores_armed_comes_back_with_what_each_vcpu_brought_and_can_be_aborted() {
    let mut rig = Rig::armed_by_restore(2, 0, 40);
    rig.vm = reloaded(&rig, &rig.vm.vm_record()).unwrap();
    let brought = rig.get_all(1);
    let count = vhost_user_timer_protocol::Register::TimerCnt;
    rig.done(&Ask::set_regs(1, &[(count, 40)]).done());
    assert_eq!(rig.get_all(1), brought);
    rig.done(&Ask::abort());
    assert_eq!((rig.vm.phase(), rig.virt()), (Phase::Paused, 0));

    let mut rig = Rig::armed(2);
    rig.vm = reloaded(&rig, &rig.vm.vm_record()).unwrap();
    assert_eq!(rig.refused(&Ask::abort()).1, Phase::Armed.code());
    rig.confirm();
    assert_eq!(rig.vm.phase(), Phase::Running);
}

#[test]
fn a_record_of_an_armed_vm_that_cannot_be_is_refused() {
    let refused = |rig: &Rig, spoil: &dyn Fn(&mut [u8])| {
        let mut record = rig.vm.vm_record();
        spoil(record.as_mut_bytes());
        reloaded(rig, &record).unwrap_err().to_string()
    };
    // The last byte says that a restore armed the VM; the byte before `frozen`'s end its flags.
    let last = size_of::<VmRecord>() - 1;
    let flags = {
        let plain = Rig::paused(2).vm.vm_record();
        let confirms = Rig::configured(2, configure_flags::CONFIRM).vm.vm_record();
        let differs = |(at, byte): (usize, &u8)| (confirms.as_bytes()[at] != *byte).then_some(at);
        let differences: Vec<_> = plain
            .as_bytes()
            .iter()
            .enumerate()
            .filter_map(differs)
            .collect();
        let [flags] = differences[..] else {
            panic!("CONFIRM is one byte of the record: {differences:?}");
        };
        flags
    };
    let armed = Rig::armed(2);
    assert_eq!(
        refused(&armed, &|record| record[flags] = 0),
        "a record has no valid phase"
    );
    assert_eq!(
        refused(&armed, &|record| record[last] = 1),
        "a record has no valid number of vCPUs",
        "there is no VM from before"
    );
    let one_offset = Rig::configured(2, configure_flags::ONE_OFFSET);
    assert_eq!(
        refused(&one_offset, &|record| record[flags] &= !2),
        "a record has no valid physical clock",
        "ONE_OFFSET without PHYS_VIRTUALISED"
    );
    let mut restoring = Rig::configured(2, configure_flags::CONFIRM);
    restoring.done(&Ask::begin(2, 1));
    let phase = last - 3;
    assert_eq!(
        refused(&restoring, &|record| {
            record[phase] = Phase::Armed.code() as u8;
            record[last] = 1;
        }),
        "a record has no valid restore, though the VM is armed by one"
    );
}

#[test]
fn any_record_is_a_vm_or_refused() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let rigs = [
        Rig::armed_by_restore(2, 2, 5),
        Rig::armed(2),
        Rig::restoring(2, 1),
        Rig::running(2),
    ];
    for n in 0..40_000 {
        let rig = &rigs[n % rigs.len()];
        let mut bytes = rig.vm.vm_record().as_bytes().to_vec();
        for _ in 0..=random() % 3 {
            let at = random() as usize % bytes.len();
            bytes[at] ^= 1 << (random() % 8);
        }
        let record = VmRecord::read_from_bytes(&bytes).unwrap();
        let Ok(vm) = reloaded(rig, &record) else {
            continue;
        };
        let mut rig = rig.clone();
        rig.vm = vm;
        for ask in Ask::one_of_each(2) {
            rig.offer(&ask);
            rig.pass(7);
            rig.events();
        }
    }
}
