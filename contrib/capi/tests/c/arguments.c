/* Arguments that cannot be used are errors, and nothing else. */
#include "check.h"

/* What must not be touched. */
static void *const NOWHERE = NULL;

static void null_is_an_error_where_something_is_needed(void)
{
    struct vut_frontend *vm = launch_vm(VUT_CONFIRM, NULL, false), *frontend;
    struct vut_restore *restore;
    struct vut_vcpu vcpu = { 0 };
    struct vut_clock *clock;
    uint8_t *data;
    size_t len;

    RETURNS(-EINVAL, vut_connect(NULL, NULL, &frontend));
    CHECK(!strcmp(vut_error_message(), "path is NULL"));
    RETURNS(-EINVAL, vut_connect("/nonexistent", NULL, NULL));
    RETURNS(-EINVAL, vut_connect_fd(0, NULL, NULL));
    RETURNS(-EINVAL, vut_spawn(NULL, NULL, NULL, NULL, &frontend));
    RETURNS(-EINVAL, vut_spawn(backend, NULL, NULL, NULL, NULL));

    RETURNS(-EINVAL, vut_info(NULL, NULL, LONG));
    CHECK(!strcmp(vut_error_message(), "frontend is NULL"));
    RETURNS(-EINVAL, vut_configure(NULL, 1, VUT_ABI_ARM64, 0, 0, LONG));
    RETURNS(-EINVAL, vut_set_anchor(NULL, 0, 0, LONG));
    RETURNS(-EINVAL, vut_set_counter_offset(NULL, 0, LONG));
    RETURNS(-EINVAL, vut_pause(NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_resume(NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_resume_with(NULL, apply, NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_resume_with(vm, NULL, NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_confirm_run(NULL, 0, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_wait_run(NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_missing_vcpus(NULL, NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_missing_vcpus(vm, NULL, 1, NULL, LONG));
    RETURNS(-EINVAL, vut_reset_device(NULL));
    RETURNS(-EINVAL, vut_fd(NULL));
    RETURNS(-EINVAL, vut_pid(NULL));
    RETURNS(-EINVAL, vut_exit_status(NULL, NULL, 0));
    RETURNS(-EINVAL, vut_keep_connected(NULL));

    RETURNS(-EINVAL, vut_get_regs(NULL, 0, NULL, 0, LONG));
    RETURNS(-EINVAL, vut_get_regs(vm, 0, NULL, 1, LONG));
    RETURNS(-EINVAL, vut_set_regs(NULL, 0, NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_set_regs(vm, 0, NULL, 1, NULL, LONG));
    RETURNS(-EINVAL, vut_get_vm(NULL, NULL, 0, NULL, 0, LONG));
    RETURNS(-EINVAL, vut_get_vm(vm, NULL, 0, NULL, 1, LONG));
    RETURNS(-EINVAL, vut_set_vm(NULL, &vcpu, 1, true, NULL, LONG));
    RETURNS(-EINVAL, vut_set_vm(vm, NULL, 1, true, NULL, LONG));
    RETURNS(-EINVAL, vut_restore_done(NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_device_state_save(NULL, &data, &len, LONG));
    RETURNS(-EINVAL, vut_device_state_save(vm, NULL, &len, LONG));
    RETURNS(-EINVAL, vut_device_state_save(vm, &data, NULL, LONG));
    RETURNS(-EINVAL, vut_device_state_load(NULL, NULL, 0, LONG));
    RETURNS(-EINVAL, vut_device_state_load(vm, NULL, 1, LONG));

    RETURNS(-EINVAL, vut_restore_begin_raw(NULL, NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_restore_abort_raw(NULL, LONG));
    RETURNS(-EINVAL, vut_restore_begin(NULL, VUT_ABI_ARM64, 1, &vcpu, 1, NULL, &restore));
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, 1, NULL, 1, NULL, &restore));
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, 1, &vcpu, 1, NULL, NULL));
    RETURNS(-EINVAL, vut_restore_vcpu_run(NULL, 0, NULL, LONG));
    RETURNS(-EINVAL, vut_restore_bring_all_back(NULL, LONG));
    RETURNS(-EINVAL, vut_restore_wait(NULL, LONG));
    RETURNS(-EINVAL, vut_restore_apply(NULL, apply, NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_restore_abort(NULL));

    RETURNS(-EINVAL, vut_time_page_start(NULL, LONG));
    RETURNS(-EINVAL, vut_time_page_stop(NULL, LONG));
    RETURNS(-EINVAL, vut_wait_run_by_page(NULL, 0, NULL, NULL, LONG));
    RETURNS(-EINVAL, vut_clock_open(NULL, &clock, LONG));
    RETURNS(-EINVAL, vut_clock_open(vm, NULL, LONG));
    RETURNS(-EINVAL, vut_clock_counts(NULL, NULL));

    /* These do nothing. */
    vut_options_default(NULL);
    vut_shut_down(NULL);
    vut_close(NULL);
    vut_restore_free(NULL);
    vut_buffer_free(NULL, 0);
    vut_clock_free(NULL);

    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED && info_of(vm).epoch == 1);
    vut_close(vm);
}

static void values_out_of_range_are_errors_that_name_them(void)
{
    struct vut_frontend *vm = launch(NULL, false), *frontend;
    struct vut_restore_options restore_options = { .flags = 4 };
    struct vut_vcpu vcpus[2] = { { .vcpu = 1 }, { .vcpu = 0 } };
    struct vut_reg regs[VUT_MAX_REGS + 1] = { { 0 } };
    static const char *args[5001];
    struct vut_options options;
    struct vut_restore *restore;

    for (int n = 0; n < 5000; n++) {
        args[n] = "--log-level=error";
    }
    RETURNS(-EINVAL, vut_spawn(backend, args, NULL, NULL, &frontend));
    CHECK(strstr(vut_error_message(), "its last entry must be NULL"));

    vut_options_default(&options);
    CHECK(options.timeout_ns == 10 * SECOND && options.patience_ns == 30 * SECOND);
    CHECK(!options.reconnect && options.wait_for_listener && !options.request_queues);
    options.host_counter = VUT_COUNTER_CNTVCT + 1;
    RETURNS(-EINVAL, vut_connect("/nonexistent", &options, &frontend));
    CHECK(strstr(vut_error_message(), "host_counter 5"));
    options.host_counter = VUT_COUNTER_ANY;
    options.request_queues = 17;
    RETURNS(-EINVAL, vut_connect("/nonexistent", &options, &frontend));
    CHECK(strstr(vut_error_message(), "17 request queues"));

    RETURNS(-EINVAL, vut_configure(vm, 1, 2, 0, 0, LONG));
    CHECK(strstr(vut_error_message(), "abi 2"));
    RETURNS(-EINVAL, vut_configure(vm, 1, VUT_ABI_ARM64, 0, 4, LONG));
    CHECK(strstr(vut_error_message(), "0x4 has no meaning"));
    RETURNS(-EINVAL, vut_configure(vm, 0, VUT_ABI_ARM64, 0, 0, LONG));
    RETURNS(-EINVAL, vut_configure(vm, UINT32_MAX, VUT_ABI_ARM64, 0, 0, LONG));
    RETURNS(-EINVAL, vut_configure(vm, 1, VUT_ABI_ARM64, UINT64_MAX, 0, LONG));
    RETURNS(-EBUSY, vut_pause(vm, 0, NULL, LONG));
    OK(vut_configure(vm, 2, VUT_ABI_ARM64, SECOND, 0, LONG));

    RETURNS(-EINVAL, vut_pause(vm, 2, NULL, LONG));
    RETURNS(-EINVAL, vut_get_regs(vm, 0, regs, VUT_MAX_REGS + 1, LONG));
    RETURNS(-EINVAL, vut_get_regs(vm, 0, regs, SIZE_MAX, LONG));
    CHECK(strstr(vut_error_message(), "more than memory can have"));
    RETURNS(-EINVAL, vut_set_regs(vm, 0, (struct vut_reg *)((char *)regs + 1), 1, NULL, LONG));
    CHECK(strstr(vut_error_message(), "misaligned"));
    RETURNS(-ENXIO, vut_get_regs(vm, UINT32_MAX - 1, regs, 1, LONG));
    RETURNS(-EINVAL, vut_device_state_load(vm, (const uint8_t *)regs, SIZE_MAX, LONG));
    /* An array of no entries is never read. */
    OK(vut_get_regs(vm, 0, NOWHERE, 0, LONG));

    RETURNS(-EINVAL, vut_restore_begin_raw(vm, &restore_options, NULL, LONG));
    restore_options = (struct vut_restore_options){ .vm_flags = 8 };
    RETURNS(-EINVAL,
            vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, 2, &restore_options, &restore));
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, 0, vcpus, 2, NULL, &restore));
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, 2, NULL, &restore));
    CHECK(strstr(vut_error_message(), "vCPU 1 is where vCPU 0 must be"));
    vcpus[0].vcpu = 0;
    vcpus[1].vcpu = 1;
    vcpus[1].present = 0x40;
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, 2, NULL, &restore));
    CHECK(strstr(vut_error_message(), "0x40 stands for no register"));
    RETURNS(-EINVAL, vut_restore_begin(vm, VUT_ABI_ARM64, SECOND, vcpus, 1, NULL, &restore));
    CHECK(!restore && strstr(vut_error_message(), "1 vCPUs"));
    CHECK(info_of(vm).phase == VUT_PHASE_PAUSED && info_of(vm).epoch == 1);
    vut_close(vm);
}

static void a_time_limit_may_be_0_and_may_be_none(void)
{
    static const char *const args[] = { "--log-level=error", NULL };
    struct vut_frontend *vm;
    struct vut_options options;
    char buffer[256];
    const char *state = path_of(buffer, "limits");

    vut_options_default(&options);
    options.timeout_ns = 0;
    RETURNS(-ETIMEDOUT, vut_spawn(backend, args, NULL, &options, &vm));
    options.timeout_ns = VUT_FOREVER;
    options.patience_ns = VUT_FOREVER;
    options.reconnect = 0xff;
    OK(vut_spawn(backend, args, state, &options, &vm));
    OK(vut_configure(vm, 1, VUT_ABI_ARM64, 0, 0, VUT_FOREVER));
    kill_backend(vm);
    OK(vut_info(vm, NULL, VUT_FOREVER));
    OK(vut_info(vm, NULL, VUT_FOREVER - 1));
    RETURNS(-ETIMEDOUT, vut_wait_run(vm, 0, NULL, 0));
    OK(vut_reset_device(vm));
    vut_close(vm);
    CHECK(unlink(state) == 0);
}

static void what_a_callback_returns_is_the_error(void)
{
    struct vut_frontend *vm = launch_vm(VUT_CONFIRM, NULL, false);
    static const int answers[][2] = {
        { -ENOTTY, -ENOTTY },
        { 1, -EIO },
        { -4096, -EIO },
        { INT32_MIN, -EIO },
    };
    struct applied applied = { 0 };

    for (size_t n = 0; n < sizeof(answers) / sizeof(*answers); n++) {
        applied.answer = answers[n][0];
        RETURNS(answers[n][1], vut_resume_with(vm, apply, &applied, NULL, LONG));
        CHECK(info_of(vm).phase == VUT_PHASE_ARMED);
    }
    OK(vut_pause(vm, 0, NULL, LONG));
    vut_close(vm);
}

static int pauses(const struct vut_info *info, void *vm)
{
    (void)info;
    return vut_pause(vm, 0, NULL, LONG);
}

static int reads(const struct vut_info *info, void *vm)
{
    return info_of(vm).cntvoff == info->cntvoff ? 0 : -EINVAL;
}

static void a_callback_may_read_and_may_not_end_armed(void)
{
    struct vut_frontend *vm = launch_vm(VUT_CONFIRM, NULL, false);

    RETURNS(-EDEADLK, vut_resume_with(vm, pauses, vm, NULL, LONG));
    CHECK(info_of(vm).phase == VUT_PHASE_ARMED);
    OK(vut_resume_with(vm, reads, vm, NULL, LONG));
    CHECK(info_of(vm).phase == VUT_PHASE_RUNNING);
    vut_close(vm);
}

static void *fails_otherwise(void *opaque)
{
    (void)opaque;
    RETURNS(-EBADF, vut_connect_fd(-1, NULL, &(struct vut_frontend *){ NULL }));
    return NULL;
}

static void each_thread_has_its_own_text_until_its_next_error(void)
{
    struct vut_frontend *vm = launch(NULL, false);

    RETURNS(-EINVAL, vut_info(NULL, NULL, LONG));
    join(start(fails_otherwise, NULL));
    OK(vut_info(vm, NULL, LONG));
    CHECK(!strcmp(vut_error_message(), "frontend is NULL"));
    CHECK(*vut_version());
    vut_close(vm);
}

void arguments(void)
{
    RUN(null_is_an_error_where_something_is_needed);
    RUN(values_out_of_range_are_errors_that_name_them);
    RUN(a_time_limit_may_be_0_and_may_be_none);
    RUN(what_a_callback_returns_is_the_error);
    RUN(a_callback_may_read_and_may_not_end_armed);
    RUN(each_thread_has_its_own_text_until_its_next_error);
}
