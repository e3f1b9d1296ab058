/* How connections begin and end: paths, sockets, processes, kills. */
#include "check.h"

#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

/* Starts a backend that this library does not know. Its end of a socket pair is its stdin. */
static pid_t start_backend(const char *option, const char *value, int stdin_fd)
{
    pid_t child = fork();

    CHECK(child >= 0);
    if (child == 0) {
        if (stdin_fd >= 0) {
            dup2(stdin_fd, 0);
        }
        /* A test that fails leaves nothing behind. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl(backend, backend, option, value, "--log-level=error", (char *)NULL);
        _exit(127);
    }
    return child;
}

static void end_backend(pid_t child)
{
    CHECK(kill(child, SIGKILL) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
}

static void a_path_is_waited_for_and_its_backend_stays_after_the_close(void)
{
    struct vut_frontend *frontend;
    struct vut_options options;
    char buffer[256];
    const char *path = path_of(buffer, "s");
    pid_t child;

    patient(&options);
    options.wait_for_listener = false;
    RETURNS(-ENOENT, vut_connect(path, &options, &frontend));
    options.wait_for_listener = true;
    CHECK(!frontend && strstr(vut_error_message(), path));

    child = start_backend("--socket-path", path, -1);
    OK(vut_connect(path, &options, &frontend));
    OK(vut_configure(frontend, 1, VUT_ABI_ARM64, 0, 0, LONG));
    RETURNS(-EINVAL, vut_pid(frontend));
    RETURNS(-EINVAL, vut_exit_status(frontend, NULL, 0));
    vut_close(frontend);

    OK(vut_connect(path, &options, &frontend));
    CHECK(info_of(frontend).phase == VUT_PHASE_PAUSED);
    vut_close(frontend);
    end_backend(child);
    CHECK(unlink(path) == 0);
}

static void a_backend_at_a_path_is_connected_to_again(void)
{
    struct vut_options options;
    struct vut_frontend *vm;
    char buffer[256];
    const char *path = path_of(buffer, "again");
    pid_t child = start_backend("--socket-path", path, -1);

    patient(&options);
    options.reconnect = true;
    OK(vut_connect(path, &options, &vm));
    OK(vut_info(vm, NULL, LONG));
    end_backend(child);
    child = start_backend("--socket-path", path, -1);
    CHECK(info_of(vm).phase == VUT_PHASE_NEW);
    end_backend(child);
    vut_close(vm);

    /* Nobody comes back: the outage ends with the patience. */
    child = start_backend("--socket-path", path, -1);
    options.patience_ns = SECOND / 10;
    OK(vut_connect(path, &options, &vm));
    end_backend(child);
    RETURNS(-ENOTCONN, vut_info(vm, NULL, LONG));
    vut_close(vm);
    CHECK(unlink(path) == 0);
}

static void a_socket_that_is_connected_stays_the_callers(void)
{
    struct vut_options options;
    struct vut_frontend *frontend;
    int pair[2];
    pid_t child;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    child = start_backend("--fd", "0", pair[1]);
    close(pair[1]);
    patient(&options);
    options.reconnect = true;
    RETURNS(-EINVAL, vut_connect_fd(pair[0], &options, &frontend));
    options.reconnect = false;
    OK(vut_connect_fd(pair[0], &options, &frontend));
    CHECK(info_of(frontend).phase == VUT_PHASE_NEW);
    vut_close(frontend);
    CHECK(close(pair[0]) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
    RETURNS(-EBADF, vut_connect_fd(pair[0], NULL, &frontend));
    RETURNS(-EBADF, vut_connect_fd(-1, NULL, &frontend));
}

static void a_program_that_does_not_serve_is_an_error_with_its_reason(void)
{
    static const char *const wrong[] = { "--no-such-option", NULL };
    static const char *const boottime[] = { "--counter-source=boottime", NULL };
    struct vut_frontend *frontend;
    struct vut_options options;

    RETURNS(-ENOENT, vut_spawn("/nonexistent", NULL, NULL, NULL, &frontend));
    patient(&options);
    RETURNS(-ECHILD, vut_spawn(backend, wrong, NULL, &options, &frontend));
    options.host_counter = VUT_COUNTER_MONOTONIC;
    RETURNS(-EMEDIUMTYPE, vut_spawn(backend, boottime, NULL, &options, &frontend));
    CHECK(strstr(vut_error_message(), "--counter-source monotonic"));
    options.reconnect = true;
    RETURNS(-EINVAL, vut_spawn(backend, NULL, NULL, &options, &frontend));
    CHECK(strstr(vut_error_message(), "state file"));
}

static void a_killed_backend_ends_every_wait_and_is_reaped(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct vcpu vcpu = { .frontend = vm };
    pthread_t thread = start_waiting(wait_run, &vcpu);
    struct pollfd poll_fd = { .fd = vut_fd(vm), .events = POLLRDHUP };
    int status;

    RETURNS(-ETIMEDOUT, vut_exit_status(vm, &status, 0));
    kill_backend(vm);
    join(thread);
    RETURNS(-ENOTCONN, vcpu.result);
    RETURNS(-ENOTCONN, vut_info(vm, NULL, LONG));
    RETURNS(-ENOTCONN, vut_keep_connected(vm));
    CHECK(poll(&poll_fd, 1, -1) == 1 && (poll_fd.revents & (POLLHUP | POLLRDHUP)));
    OK(vut_exit_status(vm, &status, LONG));
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    RETURNS(-ESRCH, vut_pid(vm));
    vut_close(vm);
}

static void a_close_ends_and_reaps_the_process(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    int pid = vut_pid(vm);

    vut_close(vm);
    CHECK(waitpid(pid, NULL, WNOHANG) == -1 && errno == ECHILD);
}

static void a_backend_has_no_signal_blocked_whatever_its_launcher_blocks(void)
{
    struct vut_frontend *vm;
    sigset_t all, before, now;
    int status;

    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
    vm = launch(NULL, false);
    CHECK(kill(vut_pid(vm), SIGTERM) == 0);
    OK(vut_exit_status(vm, &status, LONG));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    vut_close(vm);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, &now) == 0);
    CHECK(sigismember(&now, SIGTERM) && sigismember(&now, SIGPIPE));
}

static void a_backend_that_hangs_costs_the_time_limit_and_no_more(void)
{
    struct vut_frontend *vm = launch(NULL, false);
    int error;

    CHECK(kill(vut_pid(vm), SIGSTOP) == 0);
    /* What was under way may still be answered. */
    do {
        error = vut_info(vm, NULL, SECOND / 100);
    } while (error == 0);
    RETURNS(-ETIMEDOUT, error);
    CHECK(kill(vut_pid(vm), SIGCONT) == 0);
    OK(vut_info(vm, NULL, LONG));
    vut_close(vm);
}

static void a_close_ends_a_backend_that_hangs(void)
{
    struct vut_options options;
    struct vut_frontend *vm;
    pid_t pid;
    int error;

    /* The limit of the close is one of the launch too: the shortest that this machine can keep. */
    vut_options_default(&options);
    options.timeout_ns = SECOND / 2;
    do {
        options.timeout_ns *= 2;
        CHECK(options.timeout_ns < 2 * LONG);
        error = vut_spawn(backend, NULL, NULL, &options, &vm);
    } while (error == -ETIMEDOUT);
    OK(error);
    pid = vut_pid(vm);
    CHECK(kill(pid, SIGSTOP) == 0);
    vut_close(vm);
    CHECK(waitpid(pid, NULL, WNOHANG) == -1 && errno == ECHILD);
}

static void with_a_state_file_a_killed_backend_comes_back_with_the_vm(void)
{
    char buffer[256];
    const char *state = path_of(buffer, "state");
    struct vut_frontend *vm = launch_vm(VUT_CONFIRM, state, true);
    struct vcpu vcpu = { .frontend = vm };
    struct applied applied = { 0 };
    struct vut_run before, after;
    pthread_t thread;
    int pid;

    for (int round = 0; round < 3; round++) {
        pid = vut_pid(vm);
        vcpu.result = 1;
        thread = start_waiting(wait_run, &vcpu);
        kill_backend(vm);
        OK(vut_resume_with(vm, apply, &applied, &before, LONG));
        CHECK(vut_pid(vm) != pid);
        join(thread);
        OK(vcpu.result);
        CHECK(vcpu.run.cntvoff == before.cntvoff);
        kill_backend(vm);
        OK(vut_pause(vm, 0, &after, LONG));
        CHECK(after.virt_count >= before.virt_count);
    }
    CHECK(applied.calls == 3);

    pid = vut_pid(vm);
    kill_backend(vm);
    OK(vut_exit_status(vm, NULL, LONG));
    CHECK(unlink(state) == 0);
    RETURNS(-ENOTRECOVERABLE, vut_info(vm, NULL, LONG));
    RETURNS(-ENOTRECOVERABLE, vut_resume(vm, NULL, LONG));
    vut_close(vm);
    unlink(state);
}

static void a_shut_down_ends_every_wait(void)
{
    struct vut_frontend *vm = launch_vm(0, NULL, false);
    struct vcpu waiting = { .frontend = vm }, keeping = { .frontend = vm };
    pthread_t threads[] = { start_waiting(wait_run, &waiting),
                            start_waiting(keep_connected, &keeping) };

    vut_shut_down(vm);
    join(threads[0]);
    join(threads[1]);
    RETURNS(-ESHUTDOWN, waiting.result);
    RETURNS(-ESHUTDOWN, keeping.result);
    RETURNS(-ESHUTDOWN, vut_info(vm, NULL, LONG));
    vut_close(vm);
}

void endings(void)
{
    RUN(a_path_is_waited_for_and_its_backend_stays_after_the_close);
    RUN(a_backend_at_a_path_is_connected_to_again);
    RUN(a_socket_that_is_connected_stays_the_callers);
    RUN(a_program_that_does_not_serve_is_an_error_with_its_reason);
    RUN(a_killed_backend_ends_every_wait_and_is_reaped);
    RUN(a_close_ends_and_reaps_the_process);
    RUN(a_backend_has_no_signal_blocked_whatever_its_launcher_blocks);
    RUN(a_backend_that_hangs_costs_the_time_limit_and_no_more);
    RUN(a_close_ends_a_backend_that_hangs);
    RUN(with_a_state_file_a_killed_backend_comes_back_with_the_vm);
    RUN(a_shut_down_ends_every_wait);
}
