/*
 * vhost-user-timer: the VM's timers, kept by a vhost-user backend
 *
 * The backend owns the VM's counter offset. What this device guarantees with
 * it:
 *
 * - No vCPU executes an instruction before the timers of every vCPU are
 *   restored, one offset is decided, that offset is where the guest's counter
 *   is made, and the backend has been told so (CONFIRM_RUN).
 * - Where that does not succeed within the timeout, the VM stays stopped, and
 *   an error says why. "cont" tries again.
 * - A stop is never held up for longer than the timeout, and never prevented.
 * - The timers travel in QEMU's migration stream. A destination that cannot
 *   take them fails the migration, and the source runs on.
 *
 * Order. vm_state_notify() calls all prepare callbacks before any main one,
 * and low priorities first at start. Virtio devices start in main callbacks,
 * and the backend holds the rings of its clock device while a restore is open.
 * So an open restore ends in the prepare callback. RESUME, the application of
 * the offset, and CONFIRM_RUN happen in the main callback of the highest
 * priority: nothing comes after it but resume_all_vcpus(). At stop the same
 * callback is the first one.
 *
 * Time under TCG. The guest's physical count is QEMU_CLOCK_VIRTUAL in ticks,
 * and its virtual count is that minus CNTVOFF_EL2. QEMU stops and migrates
 * QEMU_CLOCK_VIRTUAL itself, so the offset stays 0: it is pinned at each start
 * (SET_COUNTER_OFFSET), after the backend's host counter has been anchored to
 * QEMU_CLOCK_VIRTUAL. vm_prepare_start() lets that clock go on before the
 * callbacks run, so RESUME alone would make the offset the time since then.
 * Only a VM whose count is not QEMU_CLOCK_VIRTUAL, as one that ran under KVM,
 * has another offset. RESUME decides it, and every CPU's CNTVOFF_EL2 has it.
 *
 * Time under KVM. The backend counts by CNTVCT_EL0 as KVM does, and the offset
 * goes into KVM by KVM_ARM_SET_COUNTER_OFFSET at each start, while no vCPU is
 * in an ioctl. From the first time on KVM ignores all writes of counts, those
 * of target/arm included. Counts are never read from KVM: the backend's PAUSE
 * is what freezes them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/config-file.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qapi/visitor.h"
#include "chardev/char-fe.h"
#include "chardev/char-socket.h"
#include "io/channel-socket.h"
#include "migration/vmstate.h"
#include "monitor/monitor.h"
#include "system/cpu-timers.h"
#include "system/kvm.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "system/system.h"
#include "system/tcg.h"
#include "cpu.h"
#include "target/arm/gtimer.h"
#include "trace.h"
#include "hw/arm/vhost-user-timer.h"

/*
 * QEMU 10.0 to 11.1: all that differs between them. A version of QEMU has at
 * most three minor numbers, and micro 50 on the way to the next one.
 */
#define QEMU_AT_LEAST(major, minor)                                      \
    (QEMU_VERSION_MAJOR * 3 + QEMU_VERSION_MINOR +                       \
     (QEMU_VERSION_MICRO >= 50) >= (major) * 3 + (minor))

#if QEMU_AT_LEAST(11, 0)
#include "hw/core/qdev-properties.h"
#include "hw/core/qdev-properties-system.h"
#include "hw/core/resettable.h"
#else
#include "hw/qdev-properties.h"
#include "hw/qdev-properties-system.h"
#include "hw/resettable.h"
#endif

#if QEMU_AT_LEAST(10, 1)
#include "exec/icount.h"
#endif

#if !QEMU_AT_LEAST(10, 2)
typedef CharBackend CharFrontend;
#endif

#if QEMU_AT_LEAST(10, 1)
#define CLASS_DATA const void
#define add_vm_change_state_handler(main, prepare, opaque, priority)     \
    qemu_add_vm_change_state_handler_prio_full(main, prepare, NULL,      \
                                               opaque, priority)
#else
#define CLASS_DATA void
#define add_vm_change_state_handler(main, prepare, opaque, priority)     \
    qemu_add_vm_change_state_handler_prio_full(main, prepare, opaque,    \
                                               priority)
#endif

/* What a backend's device state may be long, as the protocol has it. */
#define STATE_SIZE_MAX (4 * MiB)

/* A query that is not an action of the VM must not hold the monitor up. */
#define QUERY_LIMIT_MS 1000

typedef struct VhostUserTimer VhostUserTimer;

/* What is different under TCG and under KVM. */
typedef struct VhostUserTimerOps {
    uint8_t host_counter;
    uint32_t vm_flags;
    /* Whether this VM can be served. */
    bool (*check)(VhostUserTimer *s, Error **errp);
    /* The counter's frequency, in Hz. */
    uint64_t (*frequency)(ARMCPU *cpu);
    /* The device is there to stay. May be NULL. */
    void (*realized)(VhostUserTimer *s);
    /* Reads the timers of a vCPU. */
    bool (*read)(VhostUserTimer *s, CPUState *cpu, struct vut_vcpu *vcpu,
                 Error **errp);
    /* Gives a PAUSED backend what was read. */
    bool (*store)(VhostUserTimer *s, struct vut_vcpu *vcpus, Error **errp);
    /* Ends the restore that the load of a device state has opened. */
    bool (*finish_load)(VhostUserTimer *s, struct vut_vcpu *vcpus,
                        Error **errp);
    /* Prepares RESUME. */
    bool (*anchor)(VhostUserTimer *s, Error **errp);
    /* Puts the offset where the guest's counter is made. */
    bool (*apply)(VhostUserTimer *s, const struct vut_info *info,
                  Error **errp);
} VhostUserTimerOps;

OBJECT_DECLARE_SIMPLE_TYPE(VhostUserTimer, VHOST_USER_TIMER)

struct VhostUserTimer {
    DeviceState parent_obj;

    CharFrontend chardev;
    char *fd;
    char *backend;
    char *backend_args;
    char *state_file;
    uint32_t timeout_ms;
    bool reconnect;
    int64_t offset_error;
    uint64_t initial_count;

    const VhostUserTimerOps *ops;
    struct vut_frontend *frontend;
    VMChangeStateEntry *change_state;
    Notifier exit;
    uint32_t vcpus;
    uint64_t frequency;

    /* When the action in progress must end, CLOCK_MONOTONIC. */
    int64_t deadline;
    /* What the prepare callback has left of a start's time. */
    int64_t left_ns;
    /* A start is in progress; why it will fail. */
    bool starting;
    Error *start_error;
    /* The last stop or start has failed, and that was reported. */
    bool failed;

    /* The backend has not got what QEMU has since the last stop. */
    bool stale;
    /* The backend has a device state that was loaded and not started yet. */
    bool loaded;
    /* The CPUs were reset since then. */
    bool reset;

    /* TCG: QEMU_CLOCK_VIRTUAL at the last stop. */
    int64_t frozen_ns;
    /* TCG: QEMU_CLOCK_VIRTUAL in ticks minus the VM's virtual count. */
    uint64_t offset;
    /* TCG: what every CPU's CNTVOFF_EL2 is. */
    uint64_t cntvoff_el2;

    /* The VM's virtual counts of the last stop and of the last start. */
    uint64_t paused_count;
    uint64_t confirmed_count;

    /* What is in the migration stream. */
    struct {
        uint32_t vcpus;
        uint64_t frequency;
        int64_t frozen_ns;
        uint32_t size;
        uint8_t *state;
    } saved;
};

/* Starts an action that may take the timeout. */
static void dev_begin(VhostUserTimer *s)
{
    s->deadline = get_clock() + s->timeout_ms * (int64_t)SCALE_MS;
}

static uint64_t dev_left(VhostUserTimer *s)
{
    return MAX(s->deadline - get_clock(), 0);
}

/* Turns what a call to the library has returned into an error. */
static bool dev_done(int ret, Error **errp, const char *what)
{
    if (ret < 0) {
        error_setg(errp, "cannot %s: %s", what, vut_error_message());
        return false;
    }
    return true;
}

static struct vut_vcpu *dev_read_all(VhostUserTimer *s, Error **errp)
{
    g_autofree struct vut_vcpu *vcpus = g_new0(struct vut_vcpu, s->vcpus);
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        struct vut_vcpu *vcpu = &vcpus[cpu->cpu_index];

        vcpu->vcpu = cpu->cpu_index;
        if (!s->ops->read(s, cpu, vcpu, errp)) {
            return NULL;
        }
    }
    return g_steal_pointer(&vcpus);
}

/* The backend's VUT_PHASE_*, or -1. */
static int dev_phase(VhostUserTimer *s, Error **errp)
{
    struct vut_info info;

    if (!dev_done(vut_info(s->frontend, &info, dev_left(s)), errp,
                  "ask for the VM's phase")) {
        return -1;
    }
    return info.phase;
}

/*
 * Gives the backend the VM as QEMU has it, which is stopped. Whatever phase
 * the backend is in, it is PAUSED then.
 */
static bool dev_sync(VhostUserTimer *s, Error **errp)
{
    g_autofree struct vut_vcpu *vcpus = dev_read_all(s, errp);
    struct vut_run run;
    int phase;

    phase = vcpus ? dev_phase(s, errp) : -1;
    if (phase < 0) {
        return false;
    }
    /* A stop under TCG that was interrupted is begun again. */
    if (phase != VUT_PHASE_RESTORING) {
        if (!dev_done(vut_pause(s->frontend, 0, &run, dev_left(s)), errp,
                      "stop the VM's time")) {
            return false;
        }
        s->paused_count = run.virt_count;
    }
    return s->ops->store(s, vcpus, errp);
}

/*
 * Compares the vCPUs with what the backend has of them, which came with the
 * same stream. Nothing else in QEMU notices a vCPU whose timers have not
 * arrived. *@count is the VM's count: the largest that a vCPU brings.
 */
static bool dev_verify(VhostUserTimer *s, struct vut_vcpu *ours,
                       uint64_t *count, Error **errp)
{
    g_autofree struct vut_vcpu *theirs = g_new0(struct vut_vcpu, s->vcpus);
    struct vut_vm vm;

    if (!dev_done(vut_get_vm(s->frontend, &vm, 0, theirs, s->vcpus,
                             dev_left(s)), errp,
                  "read the VM from the backend")) {
        return false;
    }
    *count = 0;
    for (uint32_t i = 0; i < s->vcpus; i++) {
        const char *reg = vhost_user_timer_difference(&ours[i], &theirs[i]);

        if (reg) {
            error_setg(errp, "vCPU %" PRIu32 " does not have the %s that was "
                       "saved: its timers have not been restored", i, reg);
            return false;
        }
        *count = MAX(*count, theirs[i].cnt);
    }
    return true;
}

static bool dev_finish_load(VhostUserTimer *s, Error **errp)
{
    g_autofree struct vut_vcpu *vcpus = dev_read_all(s, errp);
    uint64_t count;

    if (!vcpus) {
        return false;
    }
    if (!s->reset && !dev_verify(s, vcpus, &count, errp)) {
        return false;
    }
    return s->ops->finish_load(s, vcpus, errp);
}

/* Makes the backend of a stopped VM PAUSED, with all that QEMU has. */
static bool dev_settle(VhostUserTimer *s, Error **errp)
{
    int phase = dev_phase(s, errp);
    bool open;

    if (phase < 0) {
        return false;
    }
    /* Its end may have been carried out without an answer in time. */
    open = s->loaded && phase == VUT_PHASE_RESTORING;
    if (!(open ? dev_finish_load(s, errp) : dev_sync(s, errp))) {
        return false;
    }
    s->loaded = false;
    s->stale = false;
    return true;
}

static void dev_stop(VhostUserTimer *s)
{
    Error *err = NULL;

    s->frozen_ns = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL);
    s->stale = true;
    if (s->starting) {
        /*
         * The end of a start that failed. The backend may be ARMED and
         * counting, so stop it if the start's time is not used up. Why it
         * failed was said.
         */
        if (!s->loaded && dev_sync(s, NULL)) {
            s->stale = false;
        }
        return;
    }
    dev_begin(s);
    if (dev_sync(s, &err)) {
        s->stale = false;
        trace_vhost_user_timer_stop(s->paused_count);
        return;
    }
    s->failed = true;
    trace_vhost_user_timer_error("stop", error_get_pretty(err));
    error_reportf_err(err, TYPE_VHOST_USER_TIMER ": the VM is stopped, and "
                      "will not start again without its backend: ");
}

typedef struct ApplyCall {
    VhostUserTimer *s;
    Error *err;
} ApplyCall;

static int dev_apply(const struct vut_info *info, void *opaque)
{
    ApplyCall *call = opaque;

    trace_vhost_user_timer_apply(info->epoch, info->cntvoff, info->cntpoff);
    return call->s->ops->apply(call->s, info, &call->err) ? 0 : -EIO;
}

static bool dev_run(VhostUserTimer *s, Error **errp)
{
    ApplyCall call = { .s = s };
    struct vut_run run;
    int ret;

    if (!s->ops->anchor(s, errp)) {
        return false;
    }
    ret = vut_resume_with(s->frontend, dev_apply, &call, &run, dev_left(s));
    if (call.err) {
        error_propagate(errp, call.err);
        return false;
    }
    if (!dev_done(ret, errp, "let the VM's time go on")) {
        return false;
    }
    s->offset = run.cntvoff;
    s->confirmed_count = run.virt_count;
    return true;
}

static void dev_start(VhostUserTimer *s)
{
    Error *err = g_steal_pointer(&s->start_error);

    if (!runstate_is_live(runstate_get())) {
        /* The callback of another device has stopped the VM again. */
        if (err) {
            error_reportf_err(err, TYPE_VHOST_USER_TIMER ": ");
        }
        s->starting = false;
        return;
    }
    s->deadline = get_clock() + s->left_ns;
    if (!err) {
        cpu_enable_ticks();
    }
    if (!err && dev_run(s, &err)) {
        s->starting = false;
        trace_vhost_user_timer_start(s->confirmed_count, s->offset);
        if (s->failed) {
            s->failed = false;
            info_report(TYPE_VHOST_USER_TIMER ": the backend answers again, "
                        "and the VM runs");
        }
        return;
    }
    s->failed = true;
    trace_vhost_user_timer_error("start", error_get_pretty(err));
    /* No hint: those are not printed for "cont" over QMP. */
    error_reportf_err(err, TYPE_VHOST_USER_TIMER ": the VM stays stopped, "
                      "\"cont\" tries again: ");
    /*
     * This is the last callback, and resume_all_vcpus() does nothing in a VM
     * that is not running: no vCPU has executed an instruction.
     */
    vm_stop(RUN_STATE_PAUSED);
    s->starting = false;
}

static void dev_prepare(void *opaque, bool running, RunState state)
{
    VhostUserTimer *s = opaque;
    int phase;

    if (!running) {
        return;
    }
    s->starting = true;
    /*
     * Until the backend is known to answer, the guest's clock must not go on:
     * a start that fails, and is tried again, would take its time from it.
     */
    cpu_disable_ticks();
    dev_begin(s);
    phase = dev_phase(s, &s->start_error);
    if (phase >= 0 &&
        (s->loaded || s->stale || phase != VUT_PHASE_PAUSED)) {
        dev_settle(s, &s->start_error);
    }
    s->left_ns = dev_left(s);
}

static void dev_change_state(void *opaque, bool running, RunState state)
{
    VhostUserTimer *s = opaque;

    if (running) {
        dev_start(s);
    } else {
        dev_stop(s);
    }
}

static uint64_t dev_ticks(VhostUserTimer *s, int64_t ns)
{
    return ns / (NANOSECONDS_PER_SECOND / s->frequency);
}

/* Ends an open restore: every vCPU at once, with the registers given. */
static bool dev_restore_all(VhostUserTimer *s, const struct vut_vcpu *vcpus,
                            Error **errp)
{
    uint32_t remaining;

    if (!dev_done(vut_set_vm(s->frontend, vcpus, s->vcpus, true, &remaining,
                             dev_left(s)), errp,
                  "give the backend the vCPUs' timers")) {
        return false;
    }
    if (remaining) {
        error_setg(errp, "the backend has %" PRIu32 " vCPUs more than QEMU",
                   remaining);
        return false;
    }
    return true;
}

#ifdef CONFIG_TCG
/*
 * A reset clears a CPU's CNTVOFF_EL2, and so does PSCI CPU_ON, which resets
 * the CPU. The exit phase of the CPU class's reset is the one place that both
 * come through after that and before the CPU executes. It is not called often,
 * and nothing in target/arm has to know this device.
 */
static ResettableExitPhase tcg_parent_exit;
static VhostUserTimer *tcg_device;

static void tcg_cpu_reset_exit(Object *obj, ResetType type)
{
    if (tcg_parent_exit) {
        tcg_parent_exit(obj, type);
    }
    if (tcg_device->cntvoff_el2) {
        ARM_CPU(obj)->env.cp15.cntvoff_el2 = tcg_device->cntvoff_el2;
    }
}

static bool tcg_check(VhostUserTimer *s, Error **errp)
{
    if (icount_enabled()) {
        error_setg(errp, "-icount and record/replay have a clock that no "
                   "backend can follow");
        return false;
    }
    if (NANOSECONDS_PER_SECOND % s->frequency) {
        error_setg(errp, "a counter of %" PRIu64 " Hz has no period of whole "
                   "ns, so under TCG it counts at another frequency",
                   s->frequency);
        return false;
    }
    s->offset = -s->initial_count;
    return true;
}

static void tcg_realized(VhostUserTimer *s)
{
    ResettablePhases *phases = &RESETTABLE_GET_CLASS(first_cpu)->phases;

    tcg_device = s;
    tcg_parent_exit = phases->exit;
    phases->exit = tcg_cpu_reset_exit;
}

static uint64_t tcg_frequency(ARMCPU *cpu)
{
    return cpu->gt_cntfrq_hz;
}

static bool tcg_read(VhostUserTimer *s, CPUState *cpu, struct vut_vcpu *vcpu,
                     Error **errp)
{
    const ARMGenericTimer *timers = ARM_CPU(cpu)->env.cp15.c14_timer;

    vcpu->ctl = timers[GTIMER_VIRT].ctl & VHOST_USER_TIMER_CTL_MASK;
    vcpu->cval = timers[GTIMER_VIRT].cval;
    vcpu->pctl = timers[GTIMER_PHYS].ctl & VHOST_USER_TIMER_CTL_MASK;
    vcpu->pcval = timers[GTIMER_PHYS].cval;
    vcpu->present = VHOST_USER_TIMER_PRESENT;
    return true;
}

/* Ends a restore with what QEMU has: its frozen clock is the VM's count. */
static bool tcg_restore(VhostUserTimer *s, struct vut_vcpu *vcpus, Error **errp)
{
    uint64_t count = dev_ticks(s, s->frozen_ns) - s->offset;

    for (uint32_t i = 0; i < s->vcpus; i++) {
        vcpus[i].cnt = count;
        vcpus[i].present |= VUT_PRESENT_CNT;
    }
    s->paused_count = count;
    return dev_restore_all(s, vcpus, errp);
}

static bool tcg_store(VhostUserTimer *s, struct vut_vcpu *vcpus, Error **errp)
{
    return dev_done(vut_restore_begin_raw(s->frontend, NULL, NULL, dev_left(s)),
                    errp, "open a restore") &&
           tcg_restore(s, vcpus, errp);
}

static bool tcg_finish_load(VhostUserTimer *s, struct vut_vcpu *vcpus,
                            Error **errp)
{
    if (!s->offset) {
        return tcg_restore(s, vcpus, errp);
    }
    /*
     * The stream has a physical count as well, which would become the VM's
     * own. Under TCG that has no offset. So restore all but that.
     */
    return dev_done(vut_restore_abort_raw(s->frontend, dev_left(s)), errp,
                    "abort the restore of the device state") &&
           tcg_store(s, vcpus, errp);
}

/*
 * QEMU_CLOCK_VIRTUAL is CLOCK_MONOTONIC plus a constant while it is enabled.
 * Each reading between two of CLOCK_MONOTONIC bounds the constant.
 */
static int64_t tcg_clock_difference(void)
{
    int64_t low = INT64_MIN, high = INT64_MAX;

    for (int i = 0; i < 100; i++) {
        int64_t before = get_clock();
        int64_t now = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL);
        int64_t after = get_clock();

        low = MAX(low, now - after);
        high = MIN(high, now - before);
    }
    return low + (high - low) / 2;
}

static bool tcg_anchor(VhostUserTimer *s, Error **errp)
{
    int64_t period = NANOSECONDS_PER_SECOND / s->frequency;
    uint64_t count = dev_ticks(s, qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL));
    int64_t monotonic = (int64_t)count * period - tcg_clock_difference();

    if (!dev_done(vut_set_anchor(s->frontend, monotonic, count, dev_left(s)),
                  errp, "tell the backend QEMU's clock")) {
        return false;
    }
    return s->offset ||
           dev_done(vut_set_counter_offset(s->frontend, 0, dev_left(s)), errp,
                    "fix the VM's offset");
}

static bool tcg_apply(VhostUserTimer *s, const struct vut_info *info,
                      Error **errp)
{
    uint64_t cntvoff = info->cntvoff + s->offset_error;
    CPUState *cs;

    if (info->cntpoff) {
        error_setg(errp, "TCG cannot give the guest's physical count an "
                   "offset, which is %" PRIu64 " ticks", info->cntpoff);
        return false;
    }
    if (arm_feature(&ARM_CPU(first_cpu)->env, ARM_FEATURE_EL2)) {
        /* CNTVOFF_EL2 is the guest's own. */
        if (cntvoff) {
            error_setg(errp, "TCG cannot give the virtual count of a guest "
                       "with EL2 an offset, which is %" PRIu64 " ticks",
                       cntvoff);
            return false;
        }
        return true;
    }
    s->cntvoff_el2 = cntvoff;
    CPU_FOREACH(cs) {
        ARMCPU *cpu = ARM_CPU(cs);

        if (cpu->env.cp15.cntvoff_el2 != cntvoff) {
            cpu->env.cp15.cntvoff_el2 = cntvoff;
            /* Recomputes the timer, as when it expires. */
            arm_gt_vtimer_cb(cpu);
        }
    }
    return true;
}

static const VhostUserTimerOps tcg_ops = {
    .host_counter = VUT_COUNTER_ANY,
    .vm_flags = VUT_CONFIRM,
    .check = tcg_check,
    .frequency = tcg_frequency,
    .realized = tcg_realized,
    .read = tcg_read,
    .store = tcg_store,
    .finish_load = tcg_finish_load,
    .anchor = tcg_anchor,
    .apply = tcg_apply,
};
#endif /* CONFIG_TCG */

#ifdef CONFIG_KVM
static int kvm_get_reg(void *opaque, uint64_t id, uint64_t *value)
{
    return kvm_get_one_reg(opaque, id, value);
}

static int kvm_set_offset(void *opaque, uint64_t offset)
{
    struct kvm_arm_counter_offset to = { .counter_offset = offset };

    return kvm_vm_ioctl(kvm_state, KVM_ARM_SET_COUNTER_OFFSET, &to);
}

static uint64_t kvm_host_count(void *opaque)
{
    uint64_t count;

    asm volatile("isb; mrs %0, cntvct_el0; isb" : "=r" (count) : : "memory");
    return count;
}

static const VhostUserTimerKVM kvm_calls = {
    .get_reg = kvm_get_reg,
    .set_offset = kvm_set_offset,
    .host_count = kvm_host_count,
};

static bool kvm_check(VhostUserTimer *s, Error **errp)
{
    if (!kvm_check_extension(kvm_state, KVM_CAP_COUNTER_OFFSET)) {
        error_setg(errp, "the host's kernel cannot set a VM's counter offset; "
                   "Linux 6.4 and newer can");
        return false;
    }
    if (arm_feature(&ARM_CPU(first_cpu)->env, ARM_FEATURE_EL2)) {
        error_setg(errp, "a KVM guest with EL2 has more than one offset");
        return false;
    }
    if (s->initial_count) {
        error_setg(errp, "x-initial-count is for TCG");
        return false;
    }
    return true;
}

static uint64_t kvm_frequency(ARMCPU *cpu)
{
    uint64_t frequency;

    asm("mrs %0, cntfrq_el0" : "=r" (frequency));
    return frequency;
}

static bool kvm_read(VhostUserTimer *s, CPUState *cpu, struct vut_vcpu *vcpu,
                     Error **errp)
{
    uint64_t id = 0;
    int ret = vhost_user_timer_kvm_read(&kvm_calls, cpu, vcpu, &id);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot read register 0x%" PRIx64
                         " of vCPU %d from KVM", id, cpu->cpu_index);
        return false;
    }
    return true;
}

static bool kvm_store(VhostUserTimer *s, struct vut_vcpu *vcpus, Error **errp)
{
    for (uint32_t i = 0; i < s->vcpus; i++) {
        const struct vut_reg regs[] = {
            { VUT_ARM64_TIMER_CTL, vcpus[i].ctl },
            { VUT_ARM64_TIMER_CVAL, vcpus[i].cval },
            { VUT_ARM64_PTIMER_CTL, vcpus[i].pctl },
            { VUT_ARM64_PTIMER_CVAL, vcpus[i].pcval },
        };

        if (!dev_done(vut_set_regs(s->frontend, i, regs, ARRAY_SIZE(regs), NULL,
                                   dev_left(s)), errp,
                      "give the backend the vCPUs' timers")) {
            return false;
        }
    }
    return true;
}

static bool kvm_finish_load(VhostUserTimer *s, struct vut_vcpu *vcpus,
                            Error **errp)
{
    /* The stream has brought the counts. */
    return dev_restore_all(s, vcpus, errp);
}

static bool kvm_anchor(VhostUserTimer *s, Error **errp)
{
    return true;
}

static bool kvm_apply(VhostUserTimer *s, const struct vut_info *info,
                      Error **errp)
{
    uint64_t offset = info->cntvoff + s->offset_error;
    int ret = vhost_user_timer_kvm_apply(&kvm_calls, first_cpu, offset);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "KVM does not take the offset %" PRIu64,
                         offset);
        return false;
    }
    return true;
}

static const VhostUserTimerOps kvm_ops = {
    .host_counter = VUT_COUNTER_CNTVCT,
    .vm_flags = VUT_CONFIRM | VUT_ONE_OFFSET,
    .check = kvm_check,
    .frequency = kvm_frequency,
    .read = kvm_read,
    .store = kvm_store,
    .finish_load = kvm_finish_load,
    .anchor = kvm_anchor,
    .apply = kvm_apply,
};
#endif /* CONFIG_KVM */

static bool dev_connect_chardev(VhostUserTimer *s, struct vut_options *options,
                                Error **errp)
{
    Chardev *chr = qemu_chr_fe_get_driver(&s->chardev);
    g_autofree char *path = NULL;
    SocketChardev *sock;

    if (!object_dynamic_cast(OBJECT(chr), TYPE_CHARDEV_SOCKET)) {
        error_setg(errp, "chardev '%s' is not a socket", chr->label);
        return false;
    }
    sock = SOCKET_CHARDEV(chr);
    if (!sock->sioc || !qio_channel_has_feature(QIO_CHANNEL(sock->sioc),
                                                QIO_CHANNEL_FEATURE_FD_PASS)) {
        error_setg(errp, "chardev '%s' is not connected to a Unix socket",
                   chr->label);
        return false;
    }
    if (!s->reconnect) {
        return dev_done(vut_connect_fd(sock->sioc->fd, options, &s->frontend),
                        errp, "set up the backend's connection");
    }
    if (sock->is_listen || sock->reconnect_time_ms ||
        sock->addr->type != SOCKET_ADDRESS_TYPE_UNIX) {
        error_setg(errp, "reconnect needs a chardev that has connected to a "
                   "path once: without server, fd and a reconnect of its own");
        return false;
    }
    path = g_strdup(sock->addr->u.q_unix.path);
    /* The backend serves one frontend at a time. */
    qemu_chr_fe_disconnect(&s->chardev);
    return dev_done(vut_connect(path, options, &s->frontend), errp,
                    "connect to the backend");
}

static bool dev_connect_fd_number(VhostUserTimer *s,
                                  const struct vut_options *options,
                                  Error **errp)
{
    int fd = monitor_fd_param(monitor_cur(), s->fd, errp);
    bool ok;

    if (fd < 0) {
        return false;
    }
    /* The library duplicates it. */
    ok = dev_done(vut_connect_fd(fd, options, &s->frontend), errp,
                  "set up the backend's connection");
    close(fd);
    return ok;
}

static bool dev_launch(VhostUserTimer *s, const struct vut_options *options,
                       Error **errp)
{
    QemuOptsList *sandbox = qemu_find_opts_err("sandbox", NULL);
    QemuOpts *opts = sandbox ? qemu_opts_find(sandbox, NULL) : NULL;
    g_auto(GStrv) args = NULL;
    g_autoptr(GError) error = NULL;

    if (g_strcmp0(opts ? qemu_opt_get(opts, "spawn") : NULL, "deny") == 0) {
        error_setg(errp, "-sandbox spawn=deny forbids to launch '%s'; launch "
                   "it outside, and connect by chardev or fd", s->backend);
        return false;
    }
    if (s->backend_args &&
        !g_shell_parse_argv(s->backend_args, NULL, &args, &error)) {
        error_setg(errp, "backend-args: %s", error->message);
        return false;
    }
    return dev_done(vut_spawn(s->backend, (const char *const *)args,
                              s->state_file, options, &s->frontend),
                    errp, "launch the backend");
}

static bool dev_connect_backend(VhostUserTimer *s, Error **errp)
{
    bool chardev = qemu_chr_fe_backend_connected(&s->chardev);
    struct vut_options options;

    if (chardev + !!s->fd + !!s->backend != 1) {
        error_setg(errp, "exactly one of chardev, fd and backend is needed");
        return false;
    }
    if (!s->backend && (s->backend_args || s->state_file)) {
        error_setg(errp, "backend-args and state-file are for a backend that "
                   "QEMU launches (backend)");
        return false;
    }
    if (s->reconnect && (s->fd || (s->backend && !s->state_file))) {
        error_setg(errp, "reconnect needs a chardev with a path, or a backend "
                   "with a state-file");
        return false;
    }
    vut_options_default(&options);
    options.timeout_ns = s->timeout_ms * (uint64_t)SCALE_MS;
    options.host_counter = s->ops->host_counter;
    options.reconnect = s->reconnect;
    if (chardev) {
        return dev_connect_chardev(s, &options, errp);
    }
    return s->fd ? dev_connect_fd_number(s, &options, errp)
                 : dev_launch(s, &options, errp);
}

static bool dev_configure_vm(VhostUserTimer *s, Error **errp)
{
    g_autofree char *what = NULL;
    int phase = dev_phase(s, errp);

    if (phase < 0) {
        return false;
    }
    if (phase != VUT_PHASE_NEW) {
        error_setg(errp, "the backend has a VM already; start it again, "
                   "without the state file of another VM");
        return false;
    }
    what = g_strdup_printf("have the backend configure a VM of %" PRIu32
                           " vCPUs with a counter of %" PRIu64 " Hz, which its "
                           "--max-vcpus and --counter-frequency must allow",
                           s->vcpus, s->frequency);
    return dev_done(vut_configure(s->frontend, s->vcpus, VUT_ABI_ARM64,
                                  s->frequency, s->ops->vm_flags, dev_left(s)),
                    errp, what);
}

/* The device is for one type of CPU, which has the timers of the A profile. */
static bool dev_check_cpus(VhostUserTimer *s, Error **errp)
{
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        if (object_get_class(OBJECT(cpu)) !=
            object_get_class(OBJECT(first_cpu))) {
            error_setg(errp, "the machine has CPUs of several types");
            return false;
        }
        s->vcpus = MAX(s->vcpus, cpu->cpu_index + 1);
    }
    if (!first_cpu ||
        !arm_feature(&ARM_CPU(first_cpu)->env, ARM_FEATURE_GENERIC_TIMER) ||
        arm_feature(&ARM_CPU(first_cpu)->env, ARM_FEATURE_M)) {
        error_setg(errp, "the machine has no CPU with the generic timer");
        return false;
    }
    return true;
}

static void dev_cpus_reset(void *opaque)
{
    VhostUserTimer *s = opaque;

    s->reset = true;
}

static void dev_close_backend(VhostUserTimer *s)
{
    vut_close(s->frontend);
    s->frontend = NULL;
}

static void dev_exit(Notifier *notifier, void *data)
{
    VhostUserTimer *s = container_of(notifier, VhostUserTimer, exit);

    int pid = vut_pid(s->frontend);

    if (s->stale) {
        /* It did not answer at the stop, so do not wait for it again. */
        vut_shut_down(s->frontend);
        if (pid > 0) {
            kill(pid, SIGKILL);
        }
    }
    dev_close_backend(s);
}

static void dev_realize(DeviceState *dev, Error **errp)
{
    VhostUserTimer *s = VHOST_USER_TIMER(dev);
    bool ambiguous = false;

    object_resolve_path_type("", TYPE_VHOST_USER_TIMER, &ambiguous);
    if (ambiguous) {
        error_setg(errp, "a VM has at most one " TYPE_VHOST_USER_TIMER);
        return;
    }
    if (!s->timeout_ms) {
        error_setg(errp, "timeout must be at least 1 ms");
        return;
    }
#ifdef CONFIG_TCG
    if (tcg_enabled()) {
        s->ops = &tcg_ops;
    }
#endif
#ifdef CONFIG_KVM
    if (kvm_enabled()) {
        s->ops = &kvm_ops;
    }
#endif
    if (!s->ops) {
        error_setg(errp, TYPE_VHOST_USER_TIMER " needs TCG or KVM");
        return;
    }
    if (!dev_check_cpus(s, errp)) {
        return;
    }
    s->frequency = s->ops->frequency(ARM_CPU(first_cpu));
    if (!s->ops->check(s, errp)) {
        return;
    }
    dev_begin(s);
    if (!dev_connect_backend(s, errp) || !dev_configure_vm(s, errp)) {
        dev_close_backend(s);
        return;
    }
    if (s->ops->realized) {
        s->ops->realized(s);
    }
    /* The backend's count starts at 0. */
    s->stale = s->initial_count;
    s->change_state = add_vm_change_state_handler(dev_change_state, dev_prepare,
                                                  s, INT_MAX);
    qemu_register_reset(dev_cpus_reset, s);
    s->exit.notify = dev_exit;
    qemu_add_exit_notifier(&s->exit);
}

static bool dev_save(VhostUserTimer *s, Error **errp)
{
    uint8_t *state;
    size_t size;

    dev_begin(s);
    if (runstate_is_running()) {
        error_setg(errp, "the VM runs");
        return false;
    }
    /* Not only what the last stop has left: the CPUs may be reset since. */
    if (!dev_settle(s, errp) ||
        !dev_done(vut_device_state_save(s->frontend, &state, &size,
                                        dev_left(s)), errp,
                  "save the backend's state")) {
        return false;
    }
    /* Of the save before: versions of QEMU disagree about post_save. */
    g_free(s->saved.state);
    s->saved.state = g_memdup2(state, size);
    s->saved.size = size;
    vut_buffer_free(state, size);
    s->saved.vcpus = s->vcpus;
    s->saved.frequency = s->frequency;
    s->saved.frozen_ns = s->frozen_ns;
    trace_vhost_user_timer_save(s->paused_count, s->saved.size);
    return true;
}

static bool dev_load_state(VhostUserTimer *s, Error **errp)
{
    int phase = dev_phase(s, errp);
    bool ok;

    if (phase < 0) {
        return false;
    }
    if (phase == VUT_PHASE_RESTORING) {
        /* Of a device state that was loaded before this one. */
        ok = dev_done(vut_restore_abort_raw(s->frontend, dev_left(s)), errp,
                      "abort the restore of another device state");
    } else {
        /* It may have missed the last stop; otherwise it is PAUSED. */
        ok = dev_done(vut_pause(s->frontend, 0, NULL, dev_left(s)), errp,
                      "stop the VM's time");
    }
    if (!ok) {
        return false;
    }
    return dev_done(vut_device_state_load(s->frontend, s->saved.state,
                                          s->saved.size, dev_left(s)), errp,
                    "load the backend's state");
}

static bool dev_load(VhostUserTimer *s, Error **errp)
{
    g_autofree struct vut_vcpu *vcpus = NULL;
    uint64_t count;

    dev_begin(s);
    if (s->saved.vcpus != s->vcpus) {
        error_setg(errp, "the VM was saved with %" PRIu32 " vCPUs, and has %"
                   PRIu32 " here", s->saved.vcpus, s->vcpus);
        return false;
    }
    if (s->saved.frequency != s->frequency) {
        error_setg(errp, "the VM was saved with a counter of %" PRIu64 " Hz, "
                   "and has one of %" PRIu64 " Hz here", s->saved.frequency,
                   s->frequency);
        return false;
    }
    if (s->saved.frozen_ns != qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL)) {
        error_setg(errp, "the VM was saved at %" PRId64 " ns of QEMU's clock, "
                   "which has not been restored", s->saved.frozen_ns);
        return false;
    }
    vcpus = dev_read_all(s, errp);
    if (!vcpus || !dev_load_state(s, errp)) {
        return false;
    }
    s->loaded = true;
    s->reset = false;
    if (!dev_verify(s, vcpus, &count, errp)) {
        return false;
    }
    s->frozen_ns = s->saved.frozen_ns;
    if (tcg_enabled()) {
        s->offset = dev_ticks(s, s->frozen_ns) - count;
    }
    trace_vhost_user_timer_load(count, s->saved.size);
    return true;
}

static void dev_forget_saved(VhostUserTimer *s)
{
    g_clear_pointer(&s->saved.state, g_free);
    s->saved.size = 0;
}

/* Passes on what an action of the migration has returned. */
static bool dev_migrated(bool ok, const char *action, Error **errp)
{
    if (!ok) {
        trace_vhost_user_timer_error(action, error_get_pretty(*errp));
        error_prepend(errp, TYPE_VHOST_USER_TIMER ": ");
    }
    return ok;
}

static bool dev_pre_save(void *opaque, Error **errp)
{
    ERRP_GUARD();
    bool ok = dev_save(opaque, errp);

    return dev_migrated(ok, "save", errp);
}

static int dev_pre_load(void *opaque)
{
    dev_forget_saved(opaque);
    return 0;
}

static bool dev_post_load(void *opaque, int version_id, Error **errp)
{
    ERRP_GUARD();
    bool ok = dev_load(opaque, errp);

    dev_forget_saved(opaque);
    return dev_migrated(ok, "load", errp);
}

#if !QEMU_AT_LEAST(10, 2)
/* The migration's error is a number then; its text goes to stderr. */
static int dev_pre_save_report(void *opaque)
{
    Error *err = NULL;

    if (!dev_pre_save(opaque, &err)) {
        error_report_err(err);
        return -EINVAL;
    }
    return 0;
}

static int dev_post_load_report(void *opaque, int version_id)
{
    Error *err = NULL;

    if (!dev_post_load(opaque, version_id, &err)) {
        error_report_err(err);
        return -EINVAL;
    }
    return 0;
}
#endif

static bool dev_size_is_sane(void *opaque, int version_id)
{
    VhostUserTimer *s = opaque;

    return s->saved.size <= STATE_SIZE_MAX;
}

static const VMStateDescription vmstate_vhost_user_timer = {
    .name = TYPE_VHOST_USER_TIMER,
    .version_id = 1,
    .minimum_version_id = 1,
#if QEMU_AT_LEAST(10, 2)
    .pre_save_errp = dev_pre_save,
    .post_load_errp = dev_post_load,
#else
    .pre_save = dev_pre_save_report,
    .post_load = dev_post_load_report,
#endif
    .pre_load = dev_pre_load,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT32(saved.vcpus, VhostUserTimer),
        VMSTATE_UINT64(saved.frequency, VhostUserTimer),
        VMSTATE_INT64(saved.frozen_ns, VhostUserTimer),
        VMSTATE_UINT32(saved.size, VhostUserTimer),
        VMSTATE_VALIDATE("the backend's state is at most 4 MiB",
                         dev_size_is_sane),
        VMSTATE_VBUFFER_ALLOC_UINT32(saved.state, VhostUserTimer, 0, NULL,
                                     saved.size),
        VMSTATE_END_OF_LIST()
    },
};

static bool dev_query(Object *obj, struct vut_info *info, Error **errp)
{
    VhostUserTimer *s = VHOST_USER_TIMER(obj);
    uint64_t limit_ns;

    if (!s->frontend) {
        error_setg(errp, "there is no backend yet");
        return false;
    }
    limit_ns = MIN(s->timeout_ms, QUERY_LIMIT_MS) * (uint64_t)SCALE_MS;
    return dev_done(vut_info(s->frontend, info, limit_ns), errp,
                    "ask the backend");
}

static char *dev_get_phase(Object *obj, Error **errp)
{
    static const char *const names[] = {
        [VUT_PHASE_NEW] = "new",
        [VUT_PHASE_PAUSED] = "paused",
        [VUT_PHASE_RUNNING] = "running",
        [VUT_PHASE_RESTORING] = "restoring",
        [VUT_PHASE_ARMED] = "armed",
    };
    struct vut_info info;

    if (!dev_query(obj, &info, errp)) {
        return NULL;
    }
    return g_strdup(info.phase < ARRAY_SIZE(names) ? names[info.phase] : "?");
}

/* A field of the backend's answer: @opaque is its offset. */
static void dev_get_field(Object *obj, Visitor *v, const char *name,
                          void *opaque, Error **errp)
{
    const size_t *offset = opaque;
    struct vut_info info;
    uint64_t value;

    if (dev_query(obj, &info, errp)) {
        memcpy(&value, (char *)&info + *offset, sizeof(value));
        visit_type_uint64(v, name, &value, errp);
    }
}

static void dev_get_missing(Object *obj, Visitor *v, const char *name,
                            void *opaque, Error **errp)
{
    struct vut_info info;
    uint32_t missing;

    if (dev_query(obj, &info, errp)) {
        missing = info.vcpus - info.restored;
        visit_type_uint32(v, name, &missing, errp);
    }
}

static void dev_get_pid(Object *obj, Visitor *v, const char *name,
                        void *opaque, Error **errp)
{
    VhostUserTimer *s = VHOST_USER_TIMER(obj);
    int32_t pid = s->frontend ? vut_pid(s->frontend) : -ENOTCONN;

    if (pid < 0) {
        error_setg(errp, "QEMU has launched no backend that runs");
        return;
    }
    visit_type_int32(v, name, &pid, errp);
}

static const Property dev_properties[] = {
    DEFINE_PROP_CHR("chardev", VhostUserTimer, chardev),
    DEFINE_PROP_STRING("fd", VhostUserTimer, fd),
    DEFINE_PROP_STRING("backend", VhostUserTimer, backend),
    DEFINE_PROP_STRING("backend-args", VhostUserTimer, backend_args),
    DEFINE_PROP_STRING("state-file", VhostUserTimer, state_file),
    DEFINE_PROP_UINT32("timeout", VhostUserTimer, timeout_ms, 5000),
    DEFINE_PROP_BOOL("reconnect", VhostUserTimer, reconnect, false),
    /* For tests: a wrong clock, and a VM that comes from elsewhere. */
    DEFINE_PROP_INT64("x-offset-error", VhostUserTimer, offset_error, 0),
    DEFINE_PROP_UINT64("x-initial-count", VhostUserTimer, initial_count, 0),
};

static void dev_instance_init(Object *obj)
{
    VhostUserTimer *s = VHOST_USER_TIMER(obj);

    object_property_add_uint64_ptr(obj, "frequency", &s->frequency,
                                   OBJ_PROP_FLAG_READ);
    object_property_add_uint64_ptr(obj, "paused-count", &s->paused_count,
                                   OBJ_PROP_FLAG_READ);
    object_property_add_uint64_ptr(obj, "confirmed-count", &s->confirmed_count,
                                   OBJ_PROP_FLAG_READ);
}

static void dev_class_init(ObjectClass *klass, CLASS_DATA *data)
{
    static struct {
        const char *name;
        const char *description;
        size_t offset;
    } fields[] = {
        { "epoch", "Grows with each restore and each load",
          offsetof(struct vut_info, epoch) },
        { "cntvoff", "Host count minus virtual count, in ticks",
          offsetof(struct vut_info, cntvoff) },
        { "cntpoff", "Host count minus physical count, in ticks",
          offsetof(struct vut_info, cntpoff) },
    };
    DeviceClass *dc = DEVICE_CLASS(klass);

    dc->desc = "VM timers kept by a vhost-user backend";
    dc->realize = dev_realize;
    dc->vmsd = &vmstate_vhost_user_timer;
    dc->hotpluggable = false;
    device_class_set_props(dc, dev_properties);
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);

    object_class_property_add_str(klass, "phase", dev_get_phase, NULL);
    object_class_property_set_description(klass, "phase",
        "new, paused, running, restoring or armed");
    for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
        object_class_property_add(klass, fields[i].name, "uint64",
                                  dev_get_field, NULL, NULL,
                                  &fields[i].offset);
        object_class_property_set_description(klass, fields[i].name,
                                              fields[i].description);
    }
    object_class_property_add(klass, "missing-vcpus", "uint32",
                              dev_get_missing, NULL, NULL, NULL);
    object_class_property_set_description(klass, "missing-vcpus",
        "vCPUs that the open restore waits for");
    object_class_property_add(klass, "backend-pid", "int32", dev_get_pid, NULL,
                              NULL, NULL);
    object_class_property_set_description(klass, "backend-pid",
        "Process that QEMU has launched");
}

static const TypeInfo dev_types[] = {
    {
        .name = TYPE_VHOST_USER_TIMER,
        .parent = TYPE_DEVICE,
        .instance_size = sizeof(VhostUserTimer),
        .instance_init = dev_instance_init,
        .class_init = dev_class_init,
    },
};

DEFINE_TYPES(dev_types)
