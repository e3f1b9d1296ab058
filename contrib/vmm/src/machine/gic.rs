//! The interrupt controller: KVM's vGICv3, and its state.
//!
//! Which registers are saved, and in which order they are loaded, is in the kernel's
//! Documentation/virt/kvm/devices/arm-vgic-v3.rst. This guest has no SPIs, no SGIs and no LPIs: a
//! VMM with devices saves the distributor's registers of its SPIs as well.

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};
use serde::{Deserialize, Serialize};

use super::error::{Context, Error};
use crate::guest::{DISTRIBUTOR, REDISTRIBUTORS};

/// 32 SGIs and PPIs, and the least number of SPIs that KVM takes.
const INTERRUPTS: u32 = 64;

/// GICD_CTLR. It is loaded first: while the distributor is disabled KVM queues no interrupt, and a
/// line that is high already is not queued when the distributor is enabled later
/// (arch/arm64/kvm/vgic/vgic.c, vgic_target_oracle). A timer that was due would be lost for good.
const GICD_CTLR: u64 = 0x0000;

/// A redistributor's registers, in the order of loading. KVM names them by their offset from the
/// redistributor's base; the frame of SGIs and PPIs begins at 0x10000.
const REDISTRIBUTOR: &[u64] = &[
    0x0000,   // GICR_CTLR
    0x0014,   // GICR_WAKER
    0x1_0080, // GICR_IGROUPR0
    0x1_0c00, // GICR_ICFGR0
    0x1_0c04, // GICR_ICFGR1
    0x1_0400, 0x1_0404, 0x1_0408, 0x1_040c, // GICR_IPRIORITYR0..3
    0x1_0410, 0x1_0414, 0x1_0418, 0x1_041c, // GICR_IPRIORITYR4..7
    0x1_0200, // GICR_ISPENDR0
    0x1_0300, // GICR_ISACTIVER0
    0x1_0100, // GICR_ISENABLER0
];
/// The registers of which a load only sets bits, each with the one that clears them.
const CLEARED_BY: &[(u64, u64)] = &[
    (0x1_0200, 0x1_0280),
    (0x1_0300, 0x1_0380),
    (0x1_0100, 0x1_0180),
];

/// The CPU interface's registers: op0, op1, CRn, CRm, op2. ICC_SRE_EL1 first.
const CPU_INTERFACE: &[u64] = &[
    sysreg(3, 0, 12, 12, 5), // ICC_SRE_EL1
    sysreg(3, 0, 12, 12, 4), // ICC_CTLR_EL1
    sysreg(3, 0, 12, 12, 6), // ICC_IGRPEN0_EL1
    sysreg(3, 0, 12, 12, 7), // ICC_IGRPEN1_EL1
    sysreg(3, 0, 4, 6, 0),   // ICC_PMR_EL1
    sysreg(3, 0, 12, 8, 3),  // ICC_BPR0_EL1
    sysreg(3, 0, 12, 12, 3), // ICC_BPR1_EL1
    sysreg(3, 0, 12, 8, 4),  // ICC_AP0R0_EL1
    sysreg(3, 0, 12, 9, 0),  // ICC_AP1R0_EL1
];

const fn sysreg(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// The VM's interrupt controller.
pub(crate) struct Gic {
    device: DeviceFd,
    vcpus: u32,
}

/// The state of a GIC.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct State {
    control: u32,
    vcpus: Vec<VcpuState>,
}

/// The part of the GIC that belongs to one vCPU.
#[derive(Clone, Serialize, Deserialize)]
struct VcpuState {
    redistributor: Vec<u32>,
    cpu_interface: Vec<u64>,
    /// The levels of the lines of interrupts 0 to 31. The timers drive theirs; KVM computes them
    /// again from CTL, CVAL and the count.
    lines: u32,
}

impl Gic {
    pub(crate) fn new(vm: &VmFd, vcpus: u32) -> Result<Self, Error> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            ..Default::default()
        };
        let device = vm
            .create_device(&mut device)
            .context("KVM_CREATE_DEVICE of a vGICv3")?;
        let gic = Gic { device, vcpus };
        let address = KVM_DEV_ARM_VGIC_GRP_ADDR;
        gic.set(address, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), &DISTRIBUTOR)?;
        gic.set(
            address,
            KVM_VGIC_V3_ADDR_TYPE_REDIST.into(),
            &REDISTRIBUTORS,
        )?;
        gic.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &INTERRUPTS)?;
        let init = kvm_device_attr {
            group: KVM_DEV_ARM_VGIC_GRP_CTRL,
            attr: KVM_DEV_ARM_VGIC_CTRL_INIT.into(),
            ..Default::default()
        };
        gic.device
            .set_device_attr(&init)
            .context("KVM_DEV_ARM_VGIC_CTRL_INIT")?;
        Ok(gic)
    }

    /// The state, once no vCPU runs.
    pub(crate) fn save(&self) -> Result<State, Error> {
        let vcpus = (0..self.vcpus)
            .map(|vcpu| {
                let redistributor = REDISTRIBUTOR
                    .iter()
                    .map(|&offset| self.get(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, of(vcpu) | offset))
                    .collect::<Result<_, _>>()?;
                let cpu_interface = CPU_INTERFACE
                    .iter()
                    .map(|&id| self.get(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, of(vcpu) | id))
                    .collect::<Result<_, _>>()?;
                let lines = self.get(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, of(vcpu))?;
                Ok(VcpuState {
                    redistributor,
                    cpu_interface,
                    lines,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(State {
            control: self.get(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR)?,
            vcpus,
        })
    }

    /// Loads a state, before any vCPU runs.
    pub(crate) fn load(&self, state: &State) -> Result<(), Error> {
        let control = &state.control;
        self.set(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR, control)?;
        for (vcpu, state) in (0..self.vcpus).zip(&state.vcpus) {
            let registers = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
            for &(_, clear) in CLEARED_BY {
                self.set(registers, of(vcpu) | clear, &u32::MAX)?;
            }
            for (&offset, value) in REDISTRIBUTOR.iter().zip(&state.redistributor) {
                self.set(registers, of(vcpu) | offset, value)?;
            }
            for (&id, value) in CPU_INTERFACE.iter().zip(&state.cpu_interface) {
                self.set(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, of(vcpu) | id, value)?;
            }
            self.set(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, of(vcpu), &state.lines)?;
        }
        Ok(())
    }

    fn set<T>(&self, group: u32, attr: u64, value: &T) -> Result<(), Error> {
        let attr = kvm_device_attr {
            group,
            attr,
            addr: std::ptr::from_ref(value).addr() as u64,
            flags: 0,
        };
        self.device
            .set_device_attr(&attr)
            .context("KVM_SET_DEVICE_ATTR of the vGICv3")
    }

    #[expect(unsafe_code, reason = "KVM_GET_DEVICE_ATTR takes a host address")]
    fn get<T: Default>(&self, group: u32, attr: u64) -> Result<T, Error> {
        let mut value = T::default();
        let mut attr = kvm_device_attr {
            group,
            attr,
            addr: std::ptr::from_mut(&mut value).addr() as u64,
            flags: 0,
        };
        // SAFETY: the kernel writes 8 bytes for registers of the CPU interface and 4 for those of
        // the other groups that are read here, which is what T has there.
        unsafe { self.device.get_device_attr(&mut attr) }
            .context("KVM_GET_DEVICE_ATTR of the vGICv3")?;
        Ok(value)
    }
}

/// The bits of an attribute that name a vCPU, by its affinity.
fn of(vcpu: u32) -> u64 {
    u64::from(vcpu) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT
}
