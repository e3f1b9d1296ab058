/* What the test programs share: checks that say what failed, backends, threads. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vhost_user_timer.h"

#define SECOND UINT64_C(1000000000)
/* Long enough for any machine, and finite, so that a hang is a failure. */
#define LONG (30 * SECOND)
#define VCPUS 4

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fail(__FILE__, __LINE__, #condition);                                                  \
        }                                                                                          \
    } while (0)

/* A call that must return this. */
#define RETURNS(expected, call) returns(__FILE__, __LINE__, (expected), (call), #call)
#define OK(call) RETURNS(0, call)

_Noreturn void fail(const char *file, int line, const char *what);
void returns(const char *file, int line, int expected, int found, const char *call);

/* The backend program, and a directory for files. */
extern const char *backend;
extern const char *directory;

/* The default options, with LONG for what happens at once on a machine that is not busy. */
void patient(struct vut_options *options);

/* A path in the directory, in memory that the next call with the same buffer overwrites. */
const char *path_of(char buffer[256], const char *name);

/* Launches a backend that counts by CLOCK_MONOTONIC. */
struct vut_frontend *launch(const char *state_file, bool reconnect);

/* The same, with a PAUSED VM of VCPUS vCPUs. */
struct vut_frontend *launch_vm(uint32_t vm_flags, const char *state_file, bool reconnect);

struct vut_info info_of(struct vut_frontend *frontend);

/* Kills the process with SIGKILL. It is not reaped. */
void kill_backend(struct vut_frontend *frontend);

pthread_t start(void *(*run)(void *), void *argument);
void join(pthread_t thread);

struct vcpu;
/* Starts one of the functions below, and returns once its thread waits. A thread that sleeps for a
 * moment for another reason is taken for one that waits: a test may show less by that, and must not
 * fail. */
pthread_t start_waiting(void *(*run)(void *), struct vcpu *vcpu);

/* What an apply callback got, and what it answers. */
struct applied {
    int calls;
    int answer;
    struct vut_info info;
};
int apply(const struct vut_info *info, void *applied);

/* A vCPU's thread: waits to run, and keeps what it got. */
struct vcpu {
    /* The thread's id, once it runs. */
    _Atomic pid_t thread;
    struct vut_frontend *frontend;
    struct vut_restore *restore;
    uint32_t index;
    int result;
    struct vut_run run;
    char message[256];
};
void *wait_run(void *vcpu);
void *restore_run(void *vcpu);
void *keep_connected(void *vcpu);

/* The tests, by file. */
void life(void);
void restores(void);
void endings(void);
void arguments(void);

/* Runs one test, and says that it passed. */
#define RUN(test)                                                                                  \
    do {                                                                                           \
        test();                                                                                    \
        printf("  %s\n", #test);                                                                   \
        fflush(stdout);                                                                            \
    } while (0)

#endif
