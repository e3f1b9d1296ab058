/* A restore as an object: nobody runs before every vCPU is back and the offsets are applied. */
#include "check.h"

/* Registers of a VM that was saved elsewhere, at this count. */
static void saved(struct vut_vcpu vcpus[VCPUS], uint64_t count)
{
    for (uint32_t n = 0; n < VCPUS; n++) {
        vcpus[n] = (struct vut_vcpu){
            .vcpu = n,
            .present = VUT_PRESENT_CTL | VUT_PRESENT_CNT | VUT_PRESENT_CVAL,
            .ctl = 1,
            .cnt = count,
            .cval = count + n,
        };
    }
}

static struct vut_restore *begin(struct vut_frontend *vm, uint32_t flags, uint32_t vm_flags)
{
    struct vut_restore_options options = { .flags = flags, .vm_flags = vm_flags };
    struct vut_restore *restore;
    struct vut_vcpu vcpus[VCPUS];

    saved(vcpus, 1000000);
    OK(vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, VCPUS, &options, &restore));
    return restore;
}

/* Starts the threads of these vCPUs. */
static void start_vcpus(struct vut_restore *restore, struct vcpu *vcpus, pthread_t *threads,
                        uint32_t count)
{
    for (uint32_t n = 0; n < count; n++) {
        vcpus[n] = (struct vcpu){ .restore = restore, .index = n };
        threads[n] = start_waiting(restore_run, &vcpus[n]);
    }
}

static void join_vcpus(const struct vcpu *vcpus, const pthread_t *threads, uint32_t count,
                       int expected)
{
    for (uint32_t n = 0; n < count; n++) {
        join(threads[n]);
        RETURNS(expected, vcpus[n].result);
    }
}

static void four_threads_run_together_once_the_offsets_are_applied(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, 0, VUT_CONFIRM);
    struct applied applied = { .answer = -EPERM };
    struct vcpu vcpus[VCPUS];
    pthread_t threads[VCPUS];
    struct vut_run run;

    start_vcpus(restore, vcpus, threads, VCPUS);
    RETURNS(-EPERM, vut_restore_apply(restore, apply, &applied, &run, LONG));
    join_vcpus(vcpus, threads, VCPUS, -EPERM);
    RETURNS(-EPERM, vut_restore_wait(restore, LONG));

    start_vcpus(restore, vcpus, threads, VCPUS);
    applied.answer = 0;
    OK(vut_restore_apply(restore, apply, &applied, &run, LONG));
    join_vcpus(vcpus, threads, VCPUS, 0);
    for (uint32_t n = 0; n < VCPUS; n++) {
        CHECK(vcpus[n].run.cntvoff == applied.info.cntvoff);
        CHECK(vcpus[n].run.virt_count >= 1000000);
    }
    CHECK(applied.calls == 2 && info_of(vm).phase == VUT_PHASE_RUNNING);
    OK(vut_restore_wait(restore, LONG));
    /* Complete: nothing to abort. */
    vut_restore_free(restore);
    CHECK(info_of(vm).phase == VUT_PHASE_RUNNING);
    vut_close(vm);
}

static void an_abort_ends_every_thread_and_leaves_the_vm_paused(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, 0, VUT_CONFIRM);
    struct applied applied = { 0 };
    struct vcpu vcpus[VCPUS - 1];
    pthread_t threads[VCPUS - 1];
    uint32_t missing[1] = { 0 }, count = 0;

    start_vcpus(restore, vcpus, threads, VCPUS - 1);
    while (info_of(vm).restored < VCPUS - 1) {
        sched_yield();
    }
    OK(vut_missing_vcpus(vm, missing, 1, &count, LONG));
    CHECK(count == 1 && missing[0] == VCPUS - 1);
    RETURNS(-ETIMEDOUT, vut_restore_apply(restore, apply, &applied, NULL, SECOND / 1000));
    CHECK(applied.calls == 0);

    OK(vut_restore_abort(restore));
    join_vcpus(vcpus, threads, VCPUS - 1, -ECANCELED);
    RETURNS(-ECANCELED, vut_restore_vcpu_run(restore, VCPUS - 1, NULL, LONG));
    RETURNS(-ECANCELED, vut_restore_apply(restore, apply, &applied, NULL, LONG));
    OK(vut_restore_abort(restore));
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED);
    vut_restore_free(restore);

    /* A restore that is freed is aborted, with no thread in it. */
    restore = begin(vm, 0, VUT_CONFIRM);
    CHECK(info_of(vm).phase == VUT_PHASE_RESTORING);
    vut_restore_free(restore);
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED);
    vut_close(vm);
}

static void a_vcpu_that_cannot_be_restored_fails_all(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_vcpu registers[VCPUS];
    struct vut_restore *restore;
    struct vcpu vcpus[VCPUS];
    pthread_t threads[VCPUS];

    saved(registers, 5);
    registers[1].present = VUT_PRESENT_CTL | VUT_PRESENT_CNT;
    OK(vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, registers, VCPUS, NULL, &restore));
    RETURNS(-ENODATA, vut_restore_bring_all_back(restore, LONG));
    start_vcpus(restore, vcpus, threads, VCPUS);
    RETURNS(-ENODATA, vut_restore_wait(restore, LONG));
    join_vcpus(vcpus, threads, VCPUS, -ENODATA);
    for (uint32_t n = 0; n < VCPUS; n++) {
        CHECK(strstr(vcpus[n].message, "because vCPU 1 failed"));
        CHECK(strstr(vcpus[n].message, "TIMER_CVAL"));
    }
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED);
    vut_restore_free(restore);
    vut_close(vm);
}

static void all_vcpus_are_brought_back_by_one_request(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, VUT_RESTORE_AUTORUN, 0);
    struct applied applied = { 0 };
    struct vut_run run;

    RETURNS(-EINVAL, vut_restore_apply(restore, apply, &applied, NULL, LONG));
    OK(vut_restore_bring_all_back(restore, LONG));
    RETURNS(-EBUSY, vut_restore_bring_all_back(restore, LONG));
    OK(vut_restore_wait(restore, LONG));
    OK(vut_restore_vcpu_run(restore, 3, &run, LONG));
    CHECK(run.virt_count >= 1000000);
    RETURNS(-ENXIO, vut_restore_vcpu_run(restore, VCPUS, &run, LONG));
    vut_restore_free(restore);
    vut_close(vm);
}

/* As restore_run(), and gives way to another thread. */
static void *restore_run_alone(void *opaque)
{
    struct vcpu *vcpu = opaque;

    do {
        restore_run(vcpu);
    } while (vcpu->result == -EBUSY);
    return NULL;
}

static void one_vcpu_has_one_thread(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, 0, 0);
    struct vcpu vcpu = { .restore = restore };
    pthread_t thread = start(restore_run_alone, &vcpu);
    int error;

    /* Until the other thread waits in its call. */
    do {
        error = vut_restore_vcpu_run(restore, 0, NULL, 0);
    } while (error == -ETIMEDOUT);
    RETURNS(-EBUSY, error);
    OK(vut_restore_abort(restore));
    join_vcpus(&vcpu, &thread, 1, -ECANCELED);
    vut_restore_free(restore);
    vut_close(vm);
}

static void a_strict_restore_refuses_counts_that_differ(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct vut_restore_options options = { .flags = VUT_RESTORE_STRICT };
    struct vut_vcpu vcpus[VCPUS];
    uint64_t epoch;
    uint32_t remaining;

    saved(vcpus, 5);
    vcpus[0].cnt = 6;
    OK(vut_restore_begin_raw(vm, &options, &epoch, LONG));
    CHECK(epoch == 2 && info_of(vm).phase == VUT_PHASE_RESTORING);
    RETURNS(-EINVAL, vut_set_vm(vm, vcpus, VCPUS, true, &remaining, LONG));
    OK(vut_set_vm(vm, vcpus, VCPUS, false, NULL, LONG));
    OK(vut_restore_abort_raw(vm, LONG));
    OK(vut_restore_begin_raw(vm, NULL, &epoch, LONG));
    OK(vut_set_vm(vm, vcpus, VCPUS - 1, true, &remaining, LONG));
    CHECK(epoch == 3 && remaining == 1);
    OK(vut_set_vm(vm, &vcpus[VCPUS - 1], 1, true, &remaining, LONG));
    CHECK(remaining == 0 && info_of(vm).phase == VUT_PHASE_PAUSED);
    OK(vut_get_vm(vm, NULL, 0, vcpus, VCPUS, LONG));
    CHECK(vcpus[3].cnt == 6);
    vut_close(vm);
}

static void a_new_restore_ends_the_previous_one_and_survives_its_end(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, 0, VUT_CONFIRM);
    struct applied applied = { 0 };
    uint64_t epoch = info_of(vm).epoch, next;

    OK(vut_restore_begin_raw(vm, NULL, &next, LONG));
    CHECK(next == epoch + 1);
    RETURNS(-ESTALE, vut_restore_vcpu_run(restore, 0, NULL, LONG));
    RETURNS(-ESTALE, vut_restore_apply(restore, apply, &applied, NULL, LONG));
    vut_restore_free(restore);
    CHECK(applied.calls == 0);
    CHECK(info_of(vm).phase == VUT_PHASE_RESTORING && info_of(vm).epoch == next);
    vut_close(vm);
}

static void a_restore_has_a_time_out_of_its_own(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore_options options = { .timeout_ns = SECOND / 200, .vm_flags = VUT_CONFIRM };
    struct vut_restore *restore = NULL;
    struct vut_vcpu vcpus[VCPUS];

    saved(vcpus, 5);
    /* A vCPU that begins to wait after the time-out waits on, for as long as its own limit. */
    do {
        vut_restore_free(restore);
        options.timeout_ns *= 2;
        CHECK(options.timeout_ns < LONG);
        OK(vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, VCPUS, &options, &restore));
        RETURNS(-ETIMEDOUT, vut_restore_vcpu_run(restore, 1, NULL, 2 * options.timeout_ns));
    } while (!strstr(vut_error_message(), "because vCPU 0 failed"));
    CHECK(strstr(vut_error_message(), "3 vCPUs missing"));
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED);
    vut_restore_free(restore);
    vut_close(vm);
}

static void the_time_since_the_save_is_added_if_it_is_asked_for(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore_options options = { 0 };
    struct vut_restore *restore;
    struct vut_vcpu vcpus[VCPUS];
    struct timespec now;

    saved(vcpus, 5);
    CHECK(clock_gettime(CLOCK_REALTIME, &now) == 0);
    options.elapsed_since_ns = ((uint64_t)now.tv_sec - 100) * SECOND;
    OK(vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, VCPUS, &options, &restore));
    OK(vut_restore_bring_all_back(restore, LONG));
    OK(vut_get_vm(vm, NULL, 0, vcpus, VCPUS, LONG));
    /* Ticks are ns in this VM. The wall clock may be set meanwhile, if not by much. */
    CHECK(vcpus[0].cnt >= 50 * SECOND && vcpus[0].cnt < 1000 * SECOND);
    vut_restore_free(restore);
    vut_close(vm);
}

static void a_restore_outlives_its_frontend(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    struct vut_restore *restore = begin(vm, 0, 0);

    vut_close(vm);
    RETURNS(-ESHUTDOWN, vut_restore_vcpu_run(restore, 0, NULL, LONG));
    vut_restore_free(restore);
}

void restores(void)
{
    RUN(four_threads_run_together_once_the_offsets_are_applied);
    RUN(an_abort_ends_every_thread_and_leaves_the_vm_paused);
    RUN(a_vcpu_that_cannot_be_restored_fails_all);
    RUN(all_vcpus_are_brought_back_by_one_request);
    RUN(one_vcpu_has_one_thread);
    RUN(a_strict_restore_refuses_counts_that_differ);
    RUN(a_new_restore_ends_the_previous_one_and_survives_its_end);
    RUN(a_restore_has_a_time_out_of_its_own);
    RUN(the_time_since_the_save_is_added_if_it_is_asked_for);
    RUN(a_restore_outlives_its_frontend);
}
