/* A VM's life: configured, running, paused, saved, in another backend. */
#include "check.h"

static void a_vm_runs_once_its_offsets_are_applied(void)
{
    struct vut_frontend *vm = launch_vm(VUT_CONFIRM | VUT_ONE_OFFSET, NULL, false);
    struct vut_reg set[] = { { VUT_ARM64_TIMER_CVAL, 1 }, { VUT_ARM64_TIMER_CTL, 1 } };
    struct vut_reg get[] = { { VUT_ARM64_TIMER_CTL, 7 }, { VUT_ARM64_TIMER_CVAL, 7 } };
    struct vut_info info = info_of(vm);
    struct applied applied = { .answer = -EPERM };
    struct vcpu vcpus[VCPUS];
    pthread_t threads[VCPUS];
    struct vut_lines lines;
    struct vut_run run;

    CHECK(info.phase == VUT_PHASE_PAUSED && info.vcpus == VCPUS && info.epoch == 1);
    CHECK(info.vm_flags == (VUT_CONFIRM | VUT_ONE_OFFSET) && info.frequency > 0);
    CHECK(info.host_counter == VUT_COUNTER_MONOTONIC && info.abi == VUT_ABI_ARM64);
    OK(vut_configure(vm, VCPUS, VUT_ABI_ARM64, info.frequency, info.vm_flags, LONG));
    RETURNS(-EBUSY, vut_configure(vm, VCPUS + 1, VUT_ABI_ARM64, 0, info.vm_flags, LONG));

    OK(vut_set_regs(vm, 2, set, 2, &lines, LONG));
    CHECK(lines.ignored == 0 && !lines.virtual_line && !lines.physical_line);
    OK(vut_get_regs(vm, 2, get, 2, LONG));
    CHECK(get[0].value == 1 && get[1].value == 1);
    RETURNS(-ENXIO, vut_get_regs(vm, VCPUS, get, 2, LONG));
    get[0].id = 1;
    RETURNS(-ENOENT, vut_get_regs(vm, 2, get, 2, LONG));

    RETURNS(-EPERM, vut_resume_with(vm, apply, &applied, &run, LONG));
    CHECK(strstr(vut_error_message(), "the apply callback failed: Operation not permitted"));
    CHECK(applied.calls == 1 && applied.info.phase == VUT_PHASE_ARMED);
    CHECK(info_of(vm).phase == VUT_PHASE_ARMED);

    for (uint32_t n = 0; n < VCPUS; n++) {
        vcpus[n] = (struct vcpu){ .frontend = vm, .index = n };
        threads[n] = start_waiting(wait_run, &vcpus[n]);
    }
    applied.answer = 0;
    OK(vut_resume_with(vm, apply, &applied, &run, LONG));
    CHECK(applied.calls == 2 && applied.info.cntvoff == run.cntvoff);
    CHECK(run.cntvoff == run.cntpoff && run.host_count - run.virt_count == run.cntvoff);
    for (uint32_t n = 0; n < VCPUS; n++) {
        join(threads[n]);
        OK(vcpus[n].result);
        CHECK(vcpus[n].run.cntvoff == run.cntvoff);
    }
    OK(vut_set_regs(vm, 2, NULL, 0, &lines, LONG));
    CHECK(lines.virtual_line && !lines.physical_line);
    RETURNS(-EBUSY, vut_restore_begin_raw(vm, NULL, NULL, LONG));

    OK(vut_pause(vm, 0, &run, LONG));
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED);
    vut_close(vm);
}

static void a_device_state_goes_on_in_another_backend(void)
{
    static uint8_t garbage[16 << 20];
    struct vut_frontend *from = launch_vm(VUT_CONFIRM, NULL, false);
    struct vut_frontend *to = launch(NULL, false);
    struct applied applied = { 0 };
    struct vut_vcpu saved[VCPUS], loaded[VCPUS];
    struct vut_run paused, run;
    struct vut_vm vm;
    uint32_t remaining;
    uint8_t *state;
    size_t len;

    for (uint32_t n = 0; n < VCPUS; n++) {
        struct vut_reg cval = { VUT_ARM64_TIMER_CVAL, 1000 + n };

        OK(vut_set_regs(from, n, &cval, 1, NULL, LONG));
    }
    OK(vut_resume_with(from, apply, &applied, NULL, LONG));
    OK(vut_pause(from, 0, &paused, LONG));
    OK(vut_get_vm(from, &vm, 0, saved, VCPUS, LONG));
    CHECK(vm.virt_count == paused.virt_count && saved[3].cval == 1003 && saved[3].vcpu == 3);
    RETURNS(-EINVAL, vut_get_vm(from, &vm, 1, saved, VCPUS, LONG));
    OK(vut_device_state_save(from, &state, &len, LONG));
    CHECK(state && len > 0);
    vut_close(from);

    /* This process does not ignore SIGPIPE, and the backend stops reading at 4 MiB. */
    RETURNS(-EREMOTEIO, vut_device_state_load(to, garbage, sizeof(garbage), LONG));
    CHECK(info_of(to).phase == VUT_PHASE_NEW);
    state[len / 2] ^= 1;
    RETURNS(-EREMOTEIO, vut_device_state_load(to, state, len, LONG));
    state[len / 2] ^= 1;
    OK(vut_device_state_load(to, state, len, LONG));
    vut_buffer_free(state, len);

    CHECK(info_of(to).phase == VUT_PHASE_RESTORING && info_of(to).restored == 0);
    RETURNS(-EREMOTEIO, vut_device_state_save(to, &state, &len, LONG));
    CHECK(!state && len == 0);
    for (uint32_t n = 0; n < VCPUS; n++) {
        OK(vut_restore_done(to, n, &remaining, LONG));
        CHECK(remaining == VCPUS - 1 - n);
    }
    OK(vut_get_vm(to, &vm, 0, loaded, VCPUS, LONG));
    CHECK(vm.virt_count == paused.virt_count);
    CHECK(memcmp(&saved[2], &loaded[2], offsetof(struct vut_vcpu, pctl)) == 0);
    OK(vut_resume_with(to, apply, &applied, &run, LONG));
    CHECK(applied.calls == 2 && run.virt_count >= paused.virt_count);

    OK(vut_reset_device(to));
    CHECK(info_of(to).phase == VUT_PHASE_NEW);
    vut_close(to);
}

static void a_vm_without_confirm_runs_without_a_callback(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct applied applied = { 0 };
    struct vut_run first, second;

    RETURNS(-EINVAL, vut_resume_with(vm, apply, &applied, NULL, LONG));
    CHECK(applied.calls == 0 && info_of(vm).phase == VUT_PHASE_PAUSED);
    RETURNS(-ETIMEDOUT, vut_wait_run(vm, 0, NULL, SECOND / 1000));
    OK(vut_resume(vm, &first, LONG));
    OK(vut_wait_run(vm, 0, &second, LONG));
    CHECK(first.cntvoff == second.cntvoff);
    OK(vut_confirm_run(vm, first.cntvoff, first.cntpoff, NULL, LONG));
    RETURNS(-EINVAL, vut_confirm_run(vm, first.cntvoff + 1, first.cntpoff, NULL, LONG));

    OK(vut_pause(vm, VUT_PAUSE_KEEP_COUNTING, NULL, LONG));
    OK(vut_resume(vm, &second, LONG));
    CHECK(first.cntvoff == second.cntvoff);
    vut_close(vm);
}

static void the_host_counter_is_what_the_anchor_says(void)
{
    struct vut_options options;
    struct vut_frontend *vm;
    struct vut_run run;

    patient(&options);
    OK(vut_spawn(backend, NULL, NULL, &options, &vm));
    OK(vut_configure(vm, 1, VUT_ABI_ARM64, SECOND, VUT_CONFIRM, LONG));
    OK(vut_set_anchor(vm, 0, 0, LONG));
    CHECK(info_of(vm).anchored);
    OK(vut_set_counter_offset(vm, 0, LONG));
    CHECK(info_of(vm).offset_pinned);
    OK(vut_resume(vm, &run, LONG));
    CHECK(run.cntvoff == 0 && run.cntpoff == 0 && run.virt_count == run.host_count);
    CHECK(info_of(vm).phase == VUT_PHASE_ARMED);
    OK(vut_confirm_run(vm, 0, 0, &run, LONG));
    CHECK(info_of(vm).phase == VUT_PHASE_RUNNING);
    RETURNS(-EBUSY, vut_set_anchor(vm, 0, 0, LONG));
    vut_close(vm);
}

/* Writes and reads a register of its vCPU that nobody else writes. */
static void *write_and_read(void *opaque)
{
    struct vcpu *vcpu = opaque;

    for (uint64_t value = 1; value <= 300; value++) {
        struct vut_reg set = { VUT_ARM64_TIMER_CVAL, value << 8 | vcpu->index };
        struct vut_reg get = { VUT_ARM64_TIMER_CVAL, 0 };

        OK(vut_set_regs(vcpu->frontend, vcpu->index, &set, 1, NULL, LONG));
        OK(vut_get_regs(vcpu->frontend, vcpu->index, &get, 1, LONG));
        CHECK(get.value == set.value);
    }
    return NULL;
}

static void calls_of_many_threads_do_not_disturb_each_other(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct vcpu vcpus[VCPUS], waiting = { .frontend = vm };
    pthread_t threads[VCPUS], wait = start_waiting(wait_run, &waiting);

    for (uint32_t n = 0; n < VCPUS; n++) {
        vcpus[n] = (struct vcpu){ .frontend = vm, .index = n };
        threads[n] = start(write_and_read, &vcpus[n]);
    }
    for (uint32_t n = 0; n < VCPUS; n++) {
        join(threads[n]);
    }
    OK(vut_resume(vm, NULL, LONG));
    join(wait);
    OK(waiting.result);
    vut_close(vm);
}

static void the_time_page_tells_the_counts_without_a_request(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct vut_counts counts, later;
    struct vut_clock *clock;
    struct vut_run run;
    uint64_t cntvoff, cntpoff;

    RETURNS(-ETIMEDOUT, vut_wait_run_by_page(vm, 0, NULL, NULL, SECOND / 1000));
    OK(vut_time_page_start(vm, LONG));
    OK(vut_clock_open(vm, &clock, LONG));
    OK(vut_clock_counts(clock, &counts));
    CHECK(counts.virt_count == 0);
    OK(vut_resume(vm, &run, LONG));
    OK(vut_wait_run_by_page(vm, 1, &cntvoff, &cntpoff, LONG));
    CHECK(cntvoff == run.cntvoff && cntpoff == run.cntpoff);

    /* What needs no answer of the backend is there while it cannot answer. */
    CHECK(kill(vut_pid(vm), SIGSTOP) == 0);
    OK(vut_clock_counts(clock, &counts));
    OK(vut_clock_counts(clock, &later));
    CHECK(counts.virt_count >= run.virt_count && later.virt_count >= counts.virt_count);
    CHECK(counts.host_count - counts.virt_count == cntvoff);
    CHECK(counts.host_count - counts.phys_count == cntpoff);
    OK(vut_wait_run_by_page(vm, 1, NULL, NULL, LONG));
    CHECK(kill(vut_pid(vm), SIGCONT) == 0);

    OK(vut_pause(vm, 0, &run, LONG));
    OK(vut_clock_counts(clock, &later));
    CHECK(later.virt_count == run.virt_count);
    OK(vut_time_page_stop(vm, LONG));
    RETURNS(-ENODATA, vut_clock_counts(clock, &later));
    OK(vut_set_anchor(vm, 0, 0, LONG));
    vut_clock_free(clock);
    RETURNS(-EOPNOTSUPP, vut_clock_open(vm, &clock, LONG));
    CHECK(!clock && strstr(vut_error_message(), "anchor"));
    vut_close(vm);
}

void life(void)
{
    RUN(a_vm_runs_once_its_offsets_are_applied);
    RUN(a_device_state_goes_on_in_another_backend);
    RUN(a_vm_without_confirm_runs_without_a_callback);
    RUN(the_host_counter_is_what_the_anchor_says);
    RUN(calls_of_many_threads_do_not_disturb_each_other);
    RUN(the_time_page_tells_the_counts_without_a_request);
}
