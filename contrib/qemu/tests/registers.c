/*
 * The register path of vhost-user-timer under KVM, with a KVM that is made up
 *
 * One test a run: registers NAME. Without a name it lists them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vhost-user-timer.h"

#define CHECK(condition)                                                \
    do {                                                                \
        if (!(condition)) {                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,          \
                    #condition);                                        \
            exit(1);                                                    \
        }                                                               \
    } while (0)

/* As arch/arm64/include/uapi/asm/kvm.h of Linux makes them, from op0 to op2. */
#define SYS_REG(op0, op1, crn, crm, op2)                                \
    (UINT64_C(0x6030000000130000) | ((op0) << 14) | ((op1) << 11) |     \
     ((crn) << 7) | ((crm) << 3) | (op2))
#define TIMER_CTL SYS_REG(3, 3, 14, 3, 1)
#define TIMER_CVAL SYS_REG(3, 3, 14, 0, 2)
#define TIMER_CNT SYS_REG(3, 3, 14, 3, 2)
#define PTIMER_CTL SYS_REG(3, 3, 14, 2, 1)
#define PTIMER_CVAL SYS_REG(3, 3, 14, 2, 2)

/* A host counter that moves by one each time it is read. */
struct kvm {
    uint64_t host;
    uint64_t offset;
    /* How many of the offset's writes are dropped in silence. */
    int drops;
    int offsets;
    int set_error;
    uint64_t failing;
    uint64_t read[8];
    int reads;
};

static uint64_t host_count(void *opaque)
{
    struct kvm *kvm = opaque;

    return kvm->host++;
}

static int set_offset(void *opaque, uint64_t offset)
{
    struct kvm *kvm = opaque;

    kvm->offsets++;
    if (kvm->set_error) {
        return kvm->set_error;
    }
    if (kvm->drops) {
        kvm->drops--;
        return 0;
    }
    kvm->offset = offset;
    return 0;
}

static int get_reg(void *opaque, uint64_t id, uint64_t *value)
{
    struct kvm *kvm = opaque;

    CHECK(kvm->reads < 8);
    kvm->read[kvm->reads++] = id;
    if (id == kvm->failing) {
        return -EPERM;
    }
    switch (id) {
    case TIMER_CTL:
        *value = 5;
        return 0;
    case TIMER_CVAL:
        *value = UINT64_C(0x1122334455667788);
        return 0;
    case PTIMER_CTL:
        *value = 7;
        return 0;
    case PTIMER_CVAL:
        *value = UINT64_MAX;
        return 0;
    case TIMER_CNT:
        *value = kvm->host++ - kvm->offset;
        return 0;
    default:
        return -ENOENT;
    }
}

static const VhostUserTimerKVM calls = {
    .get_reg = get_reg,
    .set_offset = set_offset,
    .host_count = host_count,
};

static void a_vcpu_is_read_by_kvms_ids_and_its_counts_are_not(void)
{
    struct kvm kvm = { 0 };
    struct vut_vcpu vcpu = { .vcpu = 3, .cnt = 1, .pcnt = 2 };
    uint64_t failed = 0;

    CHECK(vhost_user_timer_kvm_read(&calls, &kvm, &vcpu, &failed) == 0);
    CHECK(kvm.reads == 4);
    CHECK(vcpu.cval == UINT64_C(0x1122334455667788));
    CHECK(vcpu.pcval == UINT64_MAX);
    CHECK(vcpu.vcpu == 3 && vcpu.cnt == 1 && vcpu.pcnt == 2);
    CHECK(vcpu.present == (VUT_PRESENT_CTL | VUT_PRESENT_CVAL |
                           VUT_PRESENT_PCTL | VUT_PRESENT_PCVAL));
}

static void a_control_is_read_without_its_status(void)
{
    struct kvm kvm = { 0 };
    struct vut_vcpu vcpu = { 0 };
    uint64_t failed = 0;

    CHECK(vhost_user_timer_kvm_read(&calls, &kvm, &vcpu, &failed) == 0);
    CHECK(vcpu.ctl == 1);
    CHECK(vcpu.pctl == 3);
}

static void a_register_that_kvm_refuses_is_named(void)
{
    const uint64_t ids[] = { TIMER_CTL, TIMER_CVAL, PTIMER_CTL, PTIMER_CVAL };

    for (size_t i = 0; i < 4; i++) {
        struct kvm kvm = { .failing = ids[i] };
        struct vut_vcpu vcpu = { 0 };
        uint64_t failed = 0;

        CHECK(vhost_user_timer_kvm_read(&calls, &kvm, &vcpu, &failed) ==
              -EPERM);
        CHECK(failed == ids[i]);
    }
}

static void an_offset_goes_in_once_and_the_guest_counts_by_it(void)
{
    /* Host counts and offsets of any size: both wrap. */
    const uint64_t values[] = {
        0, 1, 1000, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 2, UINT64_MAX,
    };
    const size_t n = sizeof(values) / sizeof(values[0]);

    for (size_t i = 0; i < n * n; i++) {
        struct kvm kvm = { .host = values[i % n], .offset = 77 };

        CHECK(vhost_user_timer_kvm_apply(&calls, &kvm, values[i / n]) == 0);
        CHECK(kvm.offsets == 1);
        CHECK(kvm.offset == values[i / n]);
        CHECK(kvm.reads == 1 && kvm.read[0] == TIMER_CNT);
    }
}

static void an_offset_that_the_guest_does_not_see_is_an_error(void)
{
    /* One tick beside the bracket, on either side, and far away. */
    const uint64_t others[] = { 100 - 2, 100 + 2, 0, UINT64_MAX };

    for (size_t i = 0; i < 4; i++) {
        struct kvm kvm = { .host = 5, .offset = others[i], .drops = 1 };

        CHECK(vhost_user_timer_kvm_apply(&calls, &kvm, 100) == -ERANGE);
    }
}

static void an_offset_that_kvm_refuses_is_an_error(void)
{
    struct kvm busy = { .set_error = -EBUSY };
    struct kvm unreadable = { .failing = TIMER_CNT };

    CHECK(vhost_user_timer_kvm_apply(&calls, &busy, 100) == -EBUSY);
    CHECK(busy.offsets == 1 && busy.reads == 0);
    CHECK(vhost_user_timer_kvm_apply(&calls, &unreadable, 100) == -EPERM);
}

static void a_vcpu_that_has_not_got_its_timers_is_found(void)
{
    const struct vut_vcpu saved = {
        .ctl = 1, .cval = 10, .pctl = 3, .pcval = 20, .cnt = 5, .pcnt = 6,
    };
    struct vut_vcpu vcpu = saved;

    vcpu.cnt++;
    vcpu.pcnt++;
    vcpu.ctl |= 4;
    vcpu.pctl |= 4;
    CHECK(!vhost_user_timer_difference(&vcpu, &saved));

    vcpu.pcval++;
    CHECK(!strcmp(vhost_user_timer_difference(&vcpu, &saved), "CNTP_CVAL"));
    vcpu.pctl ^= 2;
    CHECK(!strcmp(vhost_user_timer_difference(&vcpu, &saved), "CNTP_CTL"));
    vcpu.cval++;
    CHECK(!strcmp(vhost_user_timer_difference(&vcpu, &saved), "CNTV_CVAL"));
    vcpu.ctl ^= 1;
    CHECK(!strcmp(vhost_user_timer_difference(&vcpu, &saved), "CNTV_CTL"));
}

#define TEST(name) { #name, name }

int main(int argc, char **argv)
{
    const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        TEST(a_vcpu_is_read_by_kvms_ids_and_its_counts_are_not),
        TEST(a_control_is_read_without_its_status),
        TEST(a_register_that_kvm_refuses_is_named),
        TEST(an_offset_goes_in_once_and_the_guest_counts_by_it),
        TEST(an_offset_that_the_guest_does_not_see_is_an_error),
        TEST(an_offset_that_kvm_refuses_is_an_error),
        TEST(a_vcpu_that_has_not_got_its_timers_is_found),
    };

    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        if (argc < 2) {
            puts(tests[i].name);
        } else if (!strcmp(argv[1], tests[i].name)) {
            tests[i].run();
            return 0;
        }
    }
    return argc < 2 ? 0 : 2;
}
