/* The test program of the library: PROGRAM BACKEND DIRECTORY */
#include "check.h"

const char *backend;
const char *directory;

_Noreturn void fail(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    fprintf(stderr, "  last error: %s\n", vut_error_message());
    _exit(1);
}

void returns(const char *file, int line, int expected, int found, const char *call)
{
    if (found != expected) {
        fprintf(stderr, "%s:%d: %s\n", file, line, call);
        fprintf(stderr, "  returned %d (%s), not %d\n", found, found < 0 ? strerror(-found) : "",
                expected);
        fprintf(stderr, "  last error: %s\n", vut_error_message());
        _exit(1);
    }
    if (found < 0 && !*vut_error_message()) {
        fail(file, line, "an error has a text");
    }
}

void patient(struct vut_options *options)
{
    vut_options_default(options);
    options->timeout_ns = LONG;
}

const char *path_of(char buffer[256], const char *name)
{
    CHECK(snprintf(buffer, 256, "%s/%s", directory, name) < 256);
    return buffer;
}

struct vut_frontend *launch(const char *state_file, bool reconnect)
{
    static const char *const args[] = { "--counter-source=monotonic", "--log-level=error", NULL };
    struct vut_frontend *frontend;
    struct vut_options options;

    patient(&options);
    options.host_counter = VUT_COUNTER_MONOTONIC;
    options.reconnect = reconnect;
    OK(vut_spawn(backend, args, state_file, &options, &frontend));
    return frontend;
}

struct vut_frontend *launch_vm(uint32_t vm_flags, const char *state_file, bool reconnect)
{
    struct vut_frontend *frontend = launch(state_file, reconnect);

    OK(vut_configure(frontend, VCPUS, VUT_ABI_ARM64, 0, vm_flags, LONG));
    return frontend;
}

struct vut_info info_of(struct vut_frontend *frontend)
{
    struct vut_info info;

    OK(vut_info(frontend, &info, LONG));
    return info;
}

void kill_backend(struct vut_frontend *frontend)
{
    int pid = vut_pid(frontend);

    CHECK(pid > 0);
    CHECK(kill(pid, SIGKILL) == 0);
}

pthread_t start(void *(*run)(void *), void *argument)
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, run, argument) == 0);
    return thread;
}

/* Whether a thread of this process sleeps, or has ended (proc_pid_stat(5)). */
static bool waits(pid_t thread)
{
    char path[64], state = 0;
    FILE *stat;

    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", thread);
    stat = fopen(path, "r");
    if (!stat) {
        return true;
    }
    if (fscanf(stat, "%*d (%*[^)]) %c", &state) != 1) {
        state = 'X';
    }
    fclose(stat);
    return state == 'S' || state == 'X' || state == 'Z';
}

pthread_t start_waiting(void *(*run)(void *), struct vcpu *vcpu)
{
    pthread_t thread;

    vcpu->thread = 0;
    thread = start(run, vcpu);
    while (!vcpu->thread || !waits(vcpu->thread)) {
        sched_yield();
    }
    return thread;
}

void join(pthread_t thread)
{
    CHECK(pthread_join(thread, NULL) == 0);
}

int apply(const struct vut_info *info, void *opaque)
{
    struct applied *applied = opaque;

    applied->calls++;
    applied->info = *info;
    return applied->answer;
}

static void *keep_message(struct vcpu *vcpu)
{
    snprintf(vcpu->message, sizeof(vcpu->message), "%s", vut_error_message());
    return NULL;
}

void *wait_run(void *opaque)
{
    struct vcpu *vcpu = opaque;

    vcpu->thread = gettid();
    vcpu->result = vut_wait_run(vcpu->frontend, vcpu->index, &vcpu->run, LONG);
    return keep_message(vcpu);
}

void *restore_run(void *opaque)
{
    struct vcpu *vcpu = opaque;

    vcpu->thread = gettid();
    vcpu->result = vut_restore_vcpu_run(vcpu->restore, vcpu->index, &vcpu->run, LONG);
    return keep_message(vcpu);
}

void *keep_connected(void *opaque)
{
    struct vcpu *vcpu = opaque;

    vcpu->thread = gettid();
    vcpu->result = vut_keep_connected(vcpu->frontend);
    return keep_message(vcpu);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "%s: which backend, which directory?\n", argv[0]);
        return 2;
    }
    backend = argv[1];
    directory = argv[2];
    CHECK(!*vut_error_message());
    life();
    restores();
    endings();
    arguments();
    return 0;
}
