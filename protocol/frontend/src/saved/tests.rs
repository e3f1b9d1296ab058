use super::*;
use proptest::prelude::*;

const GOLDEN: &[u8] = include_bytes!("../../tests/data/saved-vm-v1-2vcpus.bin");

fn hz(frequency: u64) -> NonZeroU64 {
    NonZeroU64::new(frequency).unwrap()
}

/// A VM of two vCPUs; the second lacks its physical timer.
fn golden() -> SavedVm {
    let mut whole = SavedVcpu::new(0);
    for (n, register) in (1..).zip(Register::ALL) {
        whole.set(register, n << 32 | 7);
    }
    let half = SavedVcpu::new(1)
        .with(Register::TimerCtl, 1)
        .with(Register::TimerCnt, 0x1122_3344_5566_7788)
        .with(Register::TimerCval, u64::MAX);
    SavedVm::new(Abi::Arm64, hz(62_500_000), vec![whole, half])
        .unwrap()
        .saved_at(1_790_000_000_123_456_789)
}

#[test]
fn version_1_stays_as_it_is() {
    assert_eq!(SavedVm::from_bytes(GOLDEN), Ok(golden()));
    assert_eq!(golden().to_bytes(), GOLDEN);
}

#[test]
fn the_counts_of_a_vm_are_the_largest_that_a_vcpu_has() {
    let vm = golden();
    assert_eq!(vm.virt_count(), 0x1122_3344_5566_7788);
    assert_eq!(vm.phys_count(), 5 << 32 | 7);
}

#[test]
fn registers_come_by_their_kvm_ids_in_any_order() {
    let vcpu = golden().vcpus()[0];
    let mut regs: Vec<_> = vcpu.regs(Abi::Arm64).collect();
    assert_eq!(regs.len(), 6);
    for _ in 0..regs.len() {
        regs.rotate_left(1);
        assert_eq!(SavedVcpu::from_regs(Abi::Arm64, 0, &regs), Ok(vcpu));
    }
    regs.reverse();
    assert_eq!(SavedVcpu::from_regs(Abi::Arm64, 0, &regs), Ok(vcpu));
    let few = SavedVcpu::from_regs(Abi::Arm64, 3, &regs[..1]).unwrap();
    assert_eq!(few.index(), 3);
    assert_eq!(few.regs(Abi::Arm64).collect::<Vec<_>>(), regs[..1]);
}

#[test]
fn an_id_that_is_no_timer_register_is_named() {
    let x0 = 0x6030_0000_0010_0000;
    let error = SavedVcpu::from_regs(Abi::Arm64, 0, &[RegValue::new(x0, 1)]).unwrap_err();
    let text = "register 0x6030000000100000 is no timer register of arm64";
    assert_eq!(error.to_string(), text);
    let other = RegValue::new(Register::TimerCnt.id(Abi::Arm), 1);
    let error = SavedVcpu::from_regs(Abi::Arm64, 0, &[other]).unwrap_err();
    assert!(matches!(error, SavedVmError::UnknownRegister { .. }));
}

#[test]
fn a_register_that_is_given_twice_is_refused() {
    let id = Register::TimerCnt.id(Abi::Arm64);
    let regs = [RegValue::new(id, 1), RegValue::new(id, 1)];
    let error = SavedVcpu::from_regs(Abi::Arm64, 0, &regs).unwrap_err();
    assert_eq!(error, SavedVmError::RepeatedRegister(id));
}

#[test]
fn a_vm_has_each_vcpu_once_and_at_its_place() {
    let vm = |indices: &[u32]| {
        let vcpus = indices.iter().map(|&index| SavedVcpu::new(index));
        SavedVm::new(Abi::Arm64, hz(1), vcpus.collect()).map(|_| ())
    };
    assert_eq!(vm(&[]), Err(SavedVmError::Vcpus(0)));
    let many: Vec<_> = (0..=MAX_VCPUS).collect();
    assert_eq!(vm(&many), Err(SavedVmError::Vcpus(4097)));
    assert_eq!(vm(&many[..4096]), Ok(()));
    let order = |expected, found| Err(SavedVmError::VcpuOrder { expected, found });
    assert_eq!(vm(&[1]), order(0, 1));
    assert_eq!(vm(&[0, 0]), order(1, 0));
    assert_eq!(vm(&[0, 2]), order(1, 2));
}

/// Bytes with these changed, and the checksum set right.
fn changed(at: usize, to: &[u8]) -> Result<SavedVm, SavedVmError> {
    let mut bytes = GOLDEN.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to);
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&crc);
    SavedVm::from_bytes(&bytes)
}

#[test]
fn bytes_that_are_no_saved_vm_are_refused_for_what_is_wrong_with_them() {
    assert_eq!(changed(0, b"vutimer\0"), Err(SavedVmError::Magic));
    assert_eq!(changed(8, &[2]), Err(SavedVmError::Version(2)));
    assert_eq!(changed(12, &[9]), Err(SavedVmError::Abi(9)));
    assert_eq!(changed(12, &[0, 1]), Err(SavedVmError::Abi(256)));
    assert_eq!(changed(16, &[0; 8]), Err(SavedVmError::Frequency));
    assert_eq!(changed(52, &[1]), Err(SavedVmError::Reserved));
    assert_eq!(changed(60, &[0xff]), Err(SavedVmError::Reserved));
    let order = SavedVmError::VcpuOrder {
        expected: 0,
        found: 5,
    };
    assert_eq!(changed(56, &[5]), Err(order));
    let length = |vcpus: usize| SavedVmError::Length {
        expected: 60 + 56 * vcpus,
        found: GOLDEN.len(),
    };
    assert_eq!(changed(48, &[1]), Err(length(1)));
    assert_eq!(changed(48, &[3]), Err(length(3)));
    assert_eq!(changed(48, &[0]), Err(length(0)));
    let many = changed(48, &[0xff; 4]);
    assert_eq!(many, Err(SavedVmError::Vcpus(0xffff_ffff)));
    assert_eq!(changed(49, &[0x10]), Err(SavedVmError::Vcpus(4098)));
}

#[test]
fn every_single_bit_that_flips_and_every_byte_that_is_missing_is_found() {
    for bit in 0..GOLDEN.len() * 8 {
        let mut bytes = GOLDEN.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(SavedVm::from_bytes(&bytes).is_err(), "bit {bit}");
    }
    for len in 0..GOLDEN.len() {
        assert!(SavedVm::from_bytes(&GOLDEN[..len]).is_err(), "{len} bytes");
    }
    let longer = [GOLDEN, &[0]].concat();
    assert!(SavedVm::from_bytes(&longer).is_err());
}

fn any_vcpu() -> impl Strategy<Value = [Option<u64>; 6]> {
    proptest::array::uniform6(proptest::option::of(any::<u64>()))
}

fn any_vm() -> impl Strategy<Value = SavedVm> {
    let abi = prop_oneof![Just(Abi::Arm64), Just(Abi::Arm)];
    let vcpus = proptest::collection::vec(any_vcpu(), 1..20);
    (abi, 1..=u64::MAX, any::<u64>(), vcpus).prop_map(|(abi, frequency, saved_at, vcpus)| {
        let vcpus = (0..).zip(vcpus).map(|(index, values)| {
            let registers = Register::ALL.into_iter().zip(values);
            registers.fold(SavedVcpu::new(index), |vcpu, (register, value)| {
                value.map_or(vcpu, |value| vcpu.with(register, value))
            })
        });
        SavedVm::new(abi, hz(frequency), vcpus.collect())
            .unwrap()
            .saved_at(saved_at)
    })
}

proptest! {
    #[test]
    fn a_saved_vm_survives_its_bytes(vm in any_vm()) {
        prop_assert_eq!(SavedVm::from_bytes(&vm.to_bytes()), Ok(vm));
    }

    #[test]
    fn hostile_bytes_are_refused_without_a_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
        header in any::<bool>(),
        checksum in any::<bool>(),
    ) {
        if header {
            // As far as it takes to get beyond the first checks.
            for (to, from) in bytes.iter_mut().zip(&GOLDEN[..52]) {
                *to = *from;
            }
        }
        if checksum && bytes.len() > 4 {
            let end = bytes.len() - 4;
            let crc = crc32fast::hash(&bytes[..end]).to_le_bytes();
            bytes[end..].copy_from_slice(&crc);
        }
        if let Ok(vm) = SavedVm::from_bytes(&bytes) {
            prop_assert_eq!(SavedVm::from_bytes(&vm.to_bytes()), Ok(vm));
        }
    }
}

#[cfg(feature = "serde")]
mod serde {
    use super::*;

    #[test]
    fn a_saved_vm_is_json_that_names_its_registers() {
        let json = serde_json::to_string(&golden()).unwrap();
        assert!(
            json.contains(r#""frequency":62500000,"realtime_ns":"#),
            "{json}"
        );
        assert!(
            json.contains(r#""index":1,"registers":{"TIMER_CNT":1234605616436508552,"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<SavedVm>(&json).unwrap(), golden());
        let vcpu = golden().vcpus()[1];
        let json = serde_json::to_string(&vcpu).unwrap();
        assert_eq!(serde_json::from_str::<SavedVcpu>(&json).unwrap(), vcpu);
    }

    #[test]
    fn a_saved_vm_is_checked_when_it_is_deserialized() {
        let json = serde_json::to_string(&golden()).unwrap();
        let wrong = |from, to| {
            let json = json.replace(from, to);
            serde_json::from_str::<SavedVm>(&json)
                .unwrap_err()
                .to_string()
        };
        let order = wrong(r#""index":1"#, r#""index":4"#);
        assert!(
            order.starts_with("vCPU 4 is where vCPU 1 must be"),
            "{order}"
        );
        let abi = wrong(r#""abi":0"#, r#""abi":7"#);
        assert!(abi.starts_with("a saved VM of unknown ABI 7"), "{abi}");
        wrong("62500000", "0");
        let name = wrong("PTIMER_CVAL", "TIMER_TVAL");
        assert!(name.starts_with("no timer register TIMER_TVAL"), "{name}");
    }

    proptest! {
        #[test]
        fn a_saved_vm_survives_a_format_without_names(vm in any_vm()) {
            let bytes = postcard::to_allocvec(&vm).unwrap();
            prop_assert_eq!(postcard::from_bytes::<SavedVm>(&bytes).unwrap(), vm);
        }
    }
}
