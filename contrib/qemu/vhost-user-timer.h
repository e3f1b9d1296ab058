/*
 * vhost-user-timer: the timer registers of one vCPU in KVM, and the VM's
 * counter offset
 *
 * Nothing here needs QEMU: a unit test drives these functions without a KVM.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_ARM_VHOST_USER_TIMER_H
#define HW_ARM_VHOST_USER_TIMER_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <vhost_user_timer.h>

#define TYPE_VHOST_USER_TIMER "vhost-user-timer"

/* What a timer is told by software. ISTATUS is computed. */
#define VHOST_USER_TIMER_CTL_MASK 3

/* A timer's registers. The counts are the VM's: they never go by vCPU. */
#define VHOST_USER_TIMER_PRESENT                                \
    (VUT_PRESENT_CTL | VUT_PRESENT_CVAL |                       \
     VUT_PRESENT_PCTL | VUT_PRESENT_PCVAL)

/*
 * How KVM is reached. Each function returns 0 or a negative errno.
 * @get_reg: KVM_GET_ONE_REG of the vCPU @opaque
 * @set_offset: KVM_ARM_SET_COUNTER_OFFSET of the VM
 * @host_count: CNTVCT_EL0 as the host's user space reads it
 */
typedef struct VhostUserTimerKVM {
    int (*get_reg)(void *opaque, uint64_t id, uint64_t *value);
    int (*set_offset)(void *opaque, uint64_t offset);
    uint64_t (*host_count)(void *opaque);
} VhostUserTimerKVM;

/*
 * Reads CTL and CVAL of both timers of a vCPU. On failure *@failed is the id
 * of the register that could not be read.
 */
static inline int vhost_user_timer_kvm_read(const VhostUserTimerKVM *kvm,
                                            void *opaque,
                                            struct vut_vcpu *vcpu,
                                            uint64_t *failed)
{
    const struct {
        uint64_t id;
        uint64_t *to;
    } regs[] = {
        { VUT_ARM64_TIMER_CTL, &vcpu->ctl },
        { VUT_ARM64_TIMER_CVAL, &vcpu->cval },
        { VUT_ARM64_PTIMER_CTL, &vcpu->pctl },
        { VUT_ARM64_PTIMER_CVAL, &vcpu->pcval },
    };

    for (size_t i = 0; i < sizeof(regs) / sizeof(regs[0]); i++) {
        int ret = kvm->get_reg(opaque, regs[i].id, regs[i].to);

        if (ret < 0) {
            *failed = regs[i].id;
            return ret;
        }
    }
    vcpu->ctl &= VHOST_USER_TIMER_CTL_MASK;
    vcpu->pctl &= VHOST_USER_TIMER_CTL_MASK;
    vcpu->present = VHOST_USER_TIMER_PRESENT;
    return 0;
}

/*
 * Gives the VM one offset, and finds out whether its guest sees it: the
 * virtual count of the vCPU @opaque must lie between two readings of the
 * host's counter. -ERANGE if it does not, as in a kernel that drops the
 * offset in silence.
 */
static inline int vhost_user_timer_kvm_apply(const VhostUserTimerKVM *kvm,
                                             void *opaque, uint64_t offset)
{
    uint64_t before, count, after;
    int ret;

    ret = kvm->set_offset(opaque, offset);
    if (ret < 0) {
        return ret;
    }
    before = kvm->host_count(opaque);
    ret = kvm->get_reg(opaque, VUT_ARM64_TIMER_CNT, &count);
    if (ret < 0) {
        return ret;
    }
    after = kvm->host_count(opaque);
    /* Modulo 2^64, as all counts and offsets are. */
    return count + offset - before <= after - before ? 0 : -ERANGE;
}

/* Whether a vCPU's timers are what the backend has of them. */
static inline const char *
vhost_user_timer_difference(const struct vut_vcpu *ours,
                            const struct vut_vcpu *theirs)
{
    if ((ours->ctl ^ theirs->ctl) & VHOST_USER_TIMER_CTL_MASK) {
        return "CNTV_CTL";
    }
    if (ours->cval != theirs->cval) {
        return "CNTV_CVAL";
    }
    if ((ours->pctl ^ theirs->pctl) & VHOST_USER_TIMER_CTL_MASK) {
        return "CNTP_CTL";
    }
    if (ours->pcval != theirs->pcval) {
        return "CNTP_CVAL";
    }
    return NULL;
}

#endif /* HW_ARM_VHOST_USER_TIMER_H */
