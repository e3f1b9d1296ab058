/**
 * @file
 * libvhost_user_timer: a VM's timers, kept by a vhost-user-timer backend.
 *
 * A VM has one counter offset, and no vCPU may run before it is known. The library and its backend
 * guarantee both: after a restore no vCPU runs before every vCPU has its timer registers back, and
 * all of them run with the same offset.
 *
 * A VM's life is five phases: NEW, until vut_configure() fixes its vCPUs; PAUSED and RUNNING, by
 * vut_pause() and vut_resume(); RESTORING, while a restore is open; and ARMED, for a VM with
 * VUT_CONFIRM: its offsets are decided, and no vCPU runs before they are in the hypervisor and
 * confirmed. protocol/SPEC.md of vhost-user-timer says what each request does; the name in
 * parentheses at the end of a call's first paragraph is the request's.
 *
 * This file is generated from contrib/capi/src. Do not edit it.
 *
 * ## Results
 *
 * A call that returns int returns 0 (or, where it says so, a positive number), or a negative
 * errno; vut_error_message() then has a text with the causes. After an error nothing was written
 * to where results go, except where a call says so, and a request has changed nothing in the VM,
 * except after -ETIMEDOUT, -ENOTCONN, -EALREADY and -ESHUTDOWN, when it may have been carried out.
 *
 * Every request can fail with these:
 *
 * | error            | meaning                                                    | what to do      |
 * |------------------|------------------------------------------------------------|-----------------|
 * | -EINVAL          | an argument is NULL or out of range, or the backend refuses a value | fix the call |
 * | -EBUSY           | not in the VM's phase (vut_info())                         | as the call says |
 * | -ENXIO           | the VM has no such vCPU                                    | fix the call    |
 * | -ETIMEDOUT       | no answer within the time limit; also: a restore's own time-out passed | call again, or give up |
 * | -EAGAIN          | the request queue is full                                  | call again      |
 * | -ENOTCONN        | the backend closed the connection, or died                 | connect again; the VM is as it was if the backend lives or has a state file |
 * | -ESHUTDOWN       | vut_shut_down() was called                                 | vut_close()     |
 * | -ENOTRECOVERABLE | with `reconnect`: the backend that came back does not have the VM | restore the VM |
 * | -EALREADY        | with `reconnect`: not known whether the request was carried out | vut_info(), vut_get_regs() |
 * | -ESTALE          | the epoch that was meant is over: a new restore began      | as the call says |
 * | -ECANCELED       | a restore was aborted, or the offsets were not applied     | as the call says |
 * | -EDEADLK         | the call waits for the apply callback that makes it        | fix the callback |
 * | -EMEDIUMTYPE     | the backend does not count by `host_counter` of the options | start it with the --counter-source that the text names |
 * | -EOPNOTSUPP      | the backend does not offer what is needed                  | use a newer one |
 * | -EPROTONOSUPPORT | the backend speaks another version of the protocol         | use one that fits |
 * | -EPROTO          | the backend broke the protocol                             | vut_close()     |
 * | -EREMOTEIO       | a vhost-user message failed, or the backend refused it     | its log says why |
 * | -EMFILE, ...     | a system call of this process failed                       |                 |
 * | -EIO             | a bug of this library, or a value that no apply callback may return; the text says which | report it, or fix the callback |
 *
 * -ENOTCONN, -ESHUTDOWN, -ENOTRECOVERABLE, -EMEDIUMTYPE, -EPROTONOSUPPORT and -EPROTO of a request
 * are permanent: every later call of this frontend fails with the same.
 *
 * ## Time limits
 *
 * `timeout_ns` is how long a call may take, in ns from the call; VUT_FOREVER: no limit; 0: the call
 * ends at once unless the answer is there. Whatever the limit, every wait ends when the backend
 * dies (with `reconnect`: and does not come back in time), and by vut_shut_down().
 *
 * ## Threads
 *
 * All calls with one frontend may be made at once, from any number of threads, except vut_close(),
 * which must be the last. The same holds for a restore and vut_restore_free(). A call blocks its
 * thread and takes no lock of the caller. The library has no thread of its own, except for the
 * length of a control message (connecting, vut_reset_device(), vut_device_state_*()), with the
 * signal mask of the caller. It installs no signal handler, and no
 * call raises SIGPIPE. After fork() the child may not use a frontend of its parent. vut_error_message() is per thread.
 *
 * ## Memory
 *
 * Pointers are to valid, aligned memory, or NULL. NULL is -EINVAL unless a call says what NULL
 * means. What goes in is read during the call only, and two results may not share memory. What the
 * library gives is freed by vut_close(), vut_restore_free() and vut_buffer_free(), never by free().
 * The backend is not trusted: whatever it writes, the worst is an error.
 *
 * ## A bug in the library
 *
 * As it is released, the library aborts the process when it finds a bug in itself, so that no VM
 * runs on with a time that may be wrong. No argument and nothing that a backend does leads there.
 * Built with CARGO_PROFILE_RELEASE_PANIC=unwind it returns -EIO instead.
 */


#ifndef VHOST_USER_TIMER_H
#define VHOST_USER_TIMER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Flag of vut_pause(): the VM's time goes on, only the VM stops (KEEP_COUNTING).
 */
#define VUT_PAUSE_KEEP_COUNTING 1

/**
 * KVM's id of the virtual timer's control on AArch64, 0x603000000013df19 (CNTV_CTL).
 */
#define VUT_ARM64_TIMER_CTL 6931039826524495641

/**
 * KVM's id of the virtual count on AArch64, 0x603000000013df1a (CNTVCT).
 */
#define VUT_ARM64_TIMER_CNT 6931039826524495642

/**
 * KVM's id of the virtual timer's compare value on AArch64, 0x603000000013df02 (CNTV_CVAL).
 */
#define VUT_ARM64_TIMER_CVAL 6931039826524495618

/**
 * KVM's id of the physical timer's control on AArch64, 0x603000000013df11 (CNTP_CTL).
 */
#define VUT_ARM64_PTIMER_CTL 6931039826524495633

/**
 * KVM's id of the physical count on AArch64, 0x603000000013df01 (CNTPCT).
 */
#define VUT_ARM64_PTIMER_CNT 6931039826524495617

/**
 * KVM's id of the physical timer's compare value on AArch64, 0x603000000013df12 (CNTP_CVAL).
 */
#define VUT_ARM64_PTIMER_CVAL 6931039826524495634

/**
 * Bit of `present`: `ctl` is known.
 */
#define VUT_PRESENT_CTL 1

/**
 * Bit of `present`: `cnt` is known.
 */
#define VUT_PRESENT_CNT 2

/**
 * Bit of `present`: `cval` is known.
 */
#define VUT_PRESENT_CVAL 4

/**
 * Bit of `present`: `pctl` is known.
 */
#define VUT_PRESENT_PCTL 8

/**
 * Bit of `present`: `pcnt` is known.
 */
#define VUT_PRESENT_PCNT 16

/**
 * Bit of `present`: `pcval` is known.
 */
#define VUT_PRESENT_PCVAL 32

/**
 * The most registers of one vut_get_regs() or vut_set_regs(). A vCPU has six.
 */
#define VUT_MAX_REGS 16

/**
 * Flag of a restore: it ends in RUNNING, not in PAUSED; in ARMED for a VM with VUT_CONFIRM.
 */
#define VUT_RESTORE_AUTORUN 1

/**
 * Flag of a restore: the vCPUs' counts must be equal; else the largest count is the VM's.
 */
#define VUT_RESTORE_STRICT 2

/**
 * As a time limit: no limit. The call ends when the backend answers or dies, or by
 * vut_shut_down().
 */
#define VUT_FOREVER UINT64_MAX

/**
 * The VM is not configured yet.
 */
#define VUT_PHASE_NEW 0

/**
 * Configured; no vCPU may run.
 */
#define VUT_PHASE_PAUSED 1

/**
 * The vCPUs may run.
 */
#define VUT_PHASE_RUNNING 2

/**
 * A restore is open; no vCPU may run until every one of them is done.
 */
#define VUT_PHASE_RESTORING 3

/**
 * The offsets are decided; no vCPU may run until they are confirmed.
 */
#define VUT_PHASE_ARMED 4

/**
 * Any host counter, or one that the backend does not report.
 */
#define VUT_COUNTER_ANY 0

/**
 * CLOCK_MONOTONIC, or an anchor to it (vut_set_anchor()).
 */
#define VUT_COUNTER_MONOTONIC 1

/**
 * CLOCK_BOOTTIME.
 */
#define VUT_COUNTER_BOOTTIME 2

/**
 * The time-stamp counter of x86-64.
 */
#define VUT_COUNTER_TSC 3

/**
 * CNTVCT_EL0 of AArch64.
 */
#define VUT_COUNTER_CNTVCT 4

/**
 * Registers with the ids of KVM on AArch64.
 */
#define VUT_ABI_ARM64 0

/**
 * Registers with the ids of KVM on 32-bit Arm.
 */
#define VUT_ABI_ARM 1

/**
 * Flag of a VM: it becomes ARMED where it would run, and runs once its offsets are applied to the
 * hypervisor and confirmed (vut_resume_with(), vut_restore_apply()).
 */
#define VUT_CONFIRM 1

/**
 * Flag of a VM: the physical count always has the virtual count's offset, as
 * KVM_ARM_SET_COUNTER_OFFSET makes it.
 */
#define VUT_ONE_OFFSET 2

/**
 * Reads the guest's counts by the time page. Opaque. vut_clock_open() makes one.
 */
struct vut_clock;

/**
 * A connection to a backend, which serves one VM. Opaque.
 *
 * vut_connect(), vut_connect_fd() and vut_spawn() make one, vut_close() ends it.
 */
struct vut_frontend;

/**
 * A restore that is open in the backend. Opaque.
 *
 * vut_restore_begin() opens one. Each vCPU's thread calls vut_restore_vcpu_run(), which returns
 * when the vCPU may run; one more thread calls vut_restore_apply() for a VM with VUT_CONFIRM, or
 * vut_restore_wait(). If one vCPU fails, the restore is aborted, every thread gets that vCPU's
 * error, and no vCPU runs.
 */
struct vut_restore;

/**
 * How a frontend is set up. Start from vut_options_default().
 */
struct vut_options {
    /**
     * How long connecting, the handshake, and any later control message may take, ns. The
     * default is 10 s.
     */
    uint64_t timeout_ns;
    /**
     * With `reconnect`: how long an outage may last before calls fail with -ENOTCONN, ns. The
     * default is 30 s.
     */
    uint64_t patience_ns;
    /**
     * Request queues, 1 to 16; 0, the default, for all that the backend serves.
     */
    uint16_t request_queues;
    /**
     * The host counter that the backend must count by: VUT_COUNTER_CNTVCT for KVM on AArch64. With
     * another one connecting and applying fail with -EMEDIUMTYPE. Default: VUT_COUNTER_ANY.
     */
    uint8_t host_counter;
    /**
     * Not 0: connect again when the connection is lost, and send again what was not answered.
     * Calls wait on, within their own time limits. vut_spawn() launches the backend again, which
     * takes a state file. Not with vut_connect_fd() (-EINVAL). Default: 0.
     */
    uint8_t reconnect;
    /**
     * Not 0: vut_connect() waits, up to `timeout_ns`, for a backend that does not listen yet.
     * Default: 1.
     */
    uint8_t wait_for_listener;
};

/**
 * The VM, as vut_info() tells it and as an apply callback gets it.
 */
struct vut_info {
    /**
     * Host count - virtual count, modulo 2^64, ticks.
     */
    uint64_t cntvoff;
    /**
     * Host count - physical count, modulo 2^64, ticks.
     */
    uint64_t cntpoff;
    /**
     * Counter frequency, Hz.
     */
    uint64_t frequency;
    /**
     * Starts at 1; grows by one whenever a restore begins or a device state is loaded.
     */
    uint64_t epoch;
    /**
     * The host counter at the instant of the answer, ticks.
     */
    uint64_t host_count;
    /**
     * VUT_PHASE_*.
     */
    uint32_t phase;
    /**
     * How many vCPUs the VM has; 0 in NEW.
     */
    uint32_t vcpus;
    /**
     * vCPUs done in the open restore; equals `vcpus` outside RESTORING. So `vcpus - restored` are
     * missing.
     */
    uint32_t restored;
    /**
     * The most vCPUs that this backend takes.
     */
    uint32_t max_vcpus;
    /**
     * The VM's options: VUT_CONFIRM, VUT_ONE_OFFSET.
     */
    uint32_t vm_flags;
    /**
     * How many request queues the backend serves.
     */
    uint16_t request_queues;
    /**
     * VUT_ABI_*.
     */
    uint8_t abi;
    /**
     * What the host counter counts by: VUT_COUNTER_*.
     */
    uint8_t host_counter;
    /**
     * vut_set_counter_offset() fixed the offset; writes of counts are ignored.
     */
    bool offset_pinned;
    /**
     * vut_set_anchor() says what the host counter reads.
     */
    bool anchored;
    /**
     * The physical count is the VM's own, not the host counter's.
     */
    bool phys_virtualised;
};

/**
 * Both counts and both offsets, all of one instant.
 */
struct vut_run {
    /**
     * Host count - virtual count, modulo 2^64, ticks.
     */
    uint64_t cntvoff;
    /**
     * Host count - physical count, modulo 2^64, ticks.
     */
    uint64_t cntpoff;
    /**
     * The virtual count (CNTVCT), ticks.
     */
    uint64_t virt_count;
    /**
     * The physical count (CNTPCT), ticks.
     */
    uint64_t phys_count;
    /**
     * The host counter, ticks.
     */
    uint64_t host_count;
};

/**
 * Puts the offsets of an ARMED VM into the hypervisor: KVM_ARM_SET_COUNTER_OFFSET, or cntvoff of
 * every emulated CPU.
 *
 * It is called on the thread of the call that it was given to, at most once in that call, while no
 * vCPU runs. Calls that end ARMED, or lead on from it, wait for its end on every other thread; on
 * this one they fail with -EDEADLK. Other calls are allowed. It must return: no longjmp(), no
 * exception.
 *
 * @param info    the VM: `cntvoff` and `cntpoff` are what to put in; valid until it returns
 * @param opaque  what the call was given
 * @return 0; or a negative errno, and then no vCPU runs, and the call fails with that errno. Any
 *         other value counts as -EIO
 */
typedef int (*vut_apply_fn)(const struct vut_info *info, void *opaque);

/**
 * A register, by its KVM id, and its value.
 */
struct vut_reg {
    /**
     * As of KVM_GET_ONE_REG: VUT_ARM64_*.
     */
    uint64_t id;
    /**
     * The value; 32 bits of it for CTL on 32-bit Arm.
     */
    uint64_t value;
};

/**
 * What a write of registers led to.
 */
struct vut_lines {
    /**
     * Count writes that were ignored, because the offset is pinned or because the physical count
     * follows the virtual one.
     */
    uint32_t ignored;
    /**
     * The virtual timer's interrupt line stands high.
     */
    bool virtual_line;
    /**
     * The physical timer's interrupt line stands high.
     */
    bool physical_line;
};

/**
 * The VM's counts at one instant.
 */
struct vut_vm {
    /**
     * The virtual count, ticks.
     */
    uint64_t virt_count;
    /**
     * The physical count, ticks.
     */
    uint64_t phys_count;
    /**
     * The host counter, ticks.
     */
    uint64_t host_count;
    /**
     * Counter frequency, Hz.
     */
    uint64_t frequency;
};

/**
 * The timer registers of one vCPU.
 */
struct vut_vcpu {
    /**
     * The vCPU's index.
     */
    uint32_t vcpu;
    /**
     * Which of the registers are known: VUT_PRESENT_*. The others are ignored.
     */
    uint32_t present;
    /**
     * The virtual timer's control: bit 0 ENABLE, bit 1 IMASK, bit 2 ISTATUS (read only).
     */
    uint64_t ctl;
    /**
     * The virtual count, ticks; the VM's, whichever vCPU it is read from.
     */
    uint64_t cnt;
    /**
     * The virtual timer's compare value, ticks.
     */
    uint64_t cval;
    /**
     * The physical timer's control.
     */
    uint64_t pctl;
    /**
     * The physical count, ticks.
     */
    uint64_t pcnt;
    /**
     * The physical timer's compare value, ticks.
     */
    uint64_t pcval;
};

/**
 * How a restore is opened. All zero is a plain restore, for which NULL stands as well.
 */
struct vut_restore_options {
    /**
     * How long vCPUs wait for the missing ones, ns; then their waits end with -ETIMEDOUT.
     * 0 and VUT_FOREVER: no time-out.
     */
    uint64_t timeout_ns;
    /**
     * If not 0: the wall-clock time since this instant is added to the counts. CLOCK_REALTIME, ns
     * since 1970, of the save.
     */
    uint64_t elapsed_since_ns;
    /**
     * VUT_RESTORE_*.
     */
    uint32_t flags;
    /**
     * For vut_restore_begin(): what a VM that is NEW is configured with (VUT_CONFIRM,
     * VUT_ONE_OFFSET). One that is configured already must have at least these.
     */
    uint32_t vm_flags;
};

/**
 * The guest's counts at one instant, ticks, modulo 2^64.
 */
struct vut_counts {
    /**
     * The virtual count (CNTVCT).
     */
    uint64_t virt_count;
    /**
     * The physical count (CNTPCT).
     */
    uint64_t phys_count;
    /**
     * The host counter.
     */
    uint64_t host_count;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The text of the last call on this thread that failed: what was tried, on what, and why it
 * failed, with the causes in one line. Empty if none has failed yet.
 *
 * The text is UTF-8, without a line break at its end, and valid until the next call of this
 * library on this thread fails, or the thread ends. A call that succeeds keeps the text.
 *
 * @return the text; never NULL
 */
const char *vut_error_message(void);

/**
 * The library's version, as "0.1.0".
 *
 * @return a text that is always valid
 */
const char *vut_version(void);

/**
 * Sets all options to their defaults.
 *
 * @param options  where the options go; NULL does nothing
 */
void vut_options_default(struct vut_options *options);

/**
 * Connects to a backend that listens at a path.
 *
 * @param path      path of the backend's Unix socket (--socket-path)
 * @param options   NULL for the defaults
 * @param frontend  where the frontend goes; NULL goes there after an error
 * @return 0; -ENOENT or -ECONNREFUSED where nobody listens in time; -EINVAL for options out of
 *         range or NULL; -EMEDIUMTYPE for another host counter than the options name;
 *         -EOPNOTSUPP, -EPROTONOSUPPORT, -EPROTO or -EREMOTEIO for a backend that this library
 *         cannot work with; -ETIMEDOUT; -ENOTCONN; another errno where a system call fails
 */
int vut_connect(const char *path,
                const struct vut_options *options,
                struct vut_frontend **frontend);

/**
 * Connects to a backend over a socket that is connected already.
 *
 * The descriptor is duplicated, and stays the caller's. Both descriptors are one socket: this call
 * makes it blocking, and nobody else may read it or write to it until vut_close().
 *
 * @param fd        a connected Unix stream socket
 * @param options   NULL for the defaults; `reconnect` is refused
 * @param frontend  where the frontend goes; NULL goes there after an error
 * @return 0; -EBADF where `fd` is not open; or as vut_connect()
 */
int vut_connect_fd(int fd, const struct vut_options *options, struct vut_frontend **frontend);

/**
 * Launches a backend with one end of a socket pair as its stdin (--fd=0), and connects to it.
 *
 * The backend ends with the connection, so also when this process dies. vut_close() ends and reaps
 * it. With `reconnect` a backend that ends is replaced: the thread that reconnects launches the
 * next one with the same options and the state file, and reaps the previous one. The child has
 * this process's environment, stderr and user. SIGCHLD must not be ignored, and nobody else may
 * reap the child.
 *
 * @param program     a path, or a name that is searched for in PATH
 * @param args        options of the program without --fd and --state-file; the last entry is NULL.
 *                    NULL for none
 * @param state_file  --state-file: a file that keeps the VM while no backend runs, best on a
 *                    tmpfs; remove it when the VM ends. NULL for none
 * @param options     NULL for the defaults
 * @param frontend    where the frontend goes; NULL goes there after an error
 * @return 0; -ENOENT, -EACCES, ... where the program cannot be started; -ECHILD where it ends
 *         before it serves (its stderr says why); -EINVAL for `reconnect` without a state file; or
 *         as vut_connect()
 */
int vut_spawn(const char *program,
              const char *const *args,
              const char *state_file,
              const struct vut_options *options,
              struct vut_frontend **frontend);

/**
 * Closes the connection, and frees the frontend. The VM in the backend stays as it is.
 *
 * A backend that vut_spawn() launched is ended and reaped; the VM survives it in its state file
 * only. Takes `timeout_ns` of the options at most, twice that for a launched backend that answers
 * and does not end; one that does not answer or end in time is killed.
 *
 * This must be the last call with this frontend. No other thread may be in a call with it, or with
 * a restore of it: use vut_shut_down() first where threads wait.
 *
 * @param frontend  NULL does nothing
 */
void vut_close(struct vut_frontend *frontend);

/**
 * Ends every wait of this frontend, on every thread, now and in future: calls fail with
 * -ESHUTDOWN. The backend is not told. It may be called on any thread, not in a signal handler.
 *
 * @param frontend  NULL does nothing
 */
void vut_shut_down(const struct vut_frontend *frontend);

/**
 * Waits until the connection is lost and cannot be had again; with `reconnect` it connects again
 * each time. For a thread of its own, in a program whose other threads do not wait in calls.
 *
 * @return never 0: why the connection is over, such as -ENOTCONN, -ESHUTDOWN or -ENOTRECOVERABLE
 */
int vut_keep_connected(const struct vut_frontend *frontend);

/**
 * The control socket, for an event loop: poll() reports POLLHUP or POLLRDHUP when the backend is
 * gone. It must be neither read nor written nor closed.
 *
 * With `reconnect` the number stays, and is another socket after an outage: register it again in
 * an epoll instance.
 *
 * @return the descriptor, which is the library's; -EINVAL for NULL
 */
int vut_fd(const struct vut_frontend *frontend);

/**
 * Saves the VM as the backend's device state: opaque bytes for a migration stream, at most 4 MiB.
 * Not in NEW, and not while a restore is open. (SET_DEVICE_STATE_FD, SPEC.md section 10)
 *
 * @param data  where a buffer goes that vut_buffer_free() frees; NULL goes there after an error
 * @param len   where the buffer's length goes, bytes
 * @return 0; -EREMOTEIO where the backend refuses (its log says why); -EFBIG for more than 4 MiB;
 *         -EOPNOTSUPP where it has no device state; or an error of every request
 */
int vut_device_state_save(const struct vut_frontend *frontend,
                          uint8_t **data,
                          size_t *len,
                          uint64_t timeout_ns);

/**
 * Loads a device state. The VM is RESTORING then, in a new epoch, with every vCPU's registers
 * staged: each must be done (vut_restore_done(), vut_set_vm()). In NEW and PAUSED.
 *
 * @param data  the bytes; whatever they are, the worst is -EREMOTEIO
 * @param len   how many
 * @return 0; -EREMOTEIO where the backend refuses, and then the VM is as it was (its log says
 *         why); -EOPNOTSUPP where it has no device state; or an error of every request
 */
int vut_device_state_load(const struct vut_frontend *frontend,
                          const uint8_t *data,
                          size_t len,
                          uint64_t timeout_ns);

/**
 * Frees a buffer of this library.
 *
 * @param data  NULL does nothing
 * @param len   the buffer's length, as the library gave it
 */
void vut_buffer_free(uint8_t *data, size_t len);

/**
 * Reads what the VM is like. In any phase. (GET_INFO)
 *
 * @param info  where the answer goes; may be NULL
 * @return 0, or an error of every request
 */
int vut_info(const struct vut_frontend *frontend, struct vut_info *info, uint64_t timeout_ns);

/**
 * Fixes the VM's vCPUs, ABI, counter frequency and options. NEW -> PAUSED; the same values again
 * are accepted in every phase. (CONFIGURE_VM)
 *
 * @param vcpus      1 to `max_vcpus` of struct vut_info
 * @param abi        VUT_ABI_*
 * @param frequency  Hz, 1 to 10^10; 0 for the backend's own
 * @param vm_flags   VUT_CONFIRM, VUT_ONE_OFFSET
 * @return 0; -EINVAL for values out of range; -EBUSY for a VM that is configured with others; or
 *         an error of every request
 */
int vut_configure(const struct vut_frontend *frontend,
                  uint32_t vcpus,
                  uint8_t abi,
                  uint64_t frequency,
                  uint32_t vm_flags,
                  uint64_t timeout_ns);

/**
 * Says what the VMM's host counter is: it read `count` when CLOCK_MONOTONIC read `monotonic_ns`.
 * Frozen counts stay, a counting clock keeps its offset. In PAUSED. (SET_COUNTER_ANCHOR)
 *
 * @param monotonic_ns  ns
 * @param count         ticks
 * @return 0; -EBUSY in another phase; or an error of every request
 */
int vut_set_anchor(const struct vut_frontend *frontend,
                   uint64_t monotonic_ns,
                   uint64_t count,
                   uint64_t timeout_ns);

/**
 * Sets both offsets to `offset`, lets both clocks count, and pins the offsets: writes of counts
 * are ignored until the next restore begins. In PAUSED and RESTORING. (SET_COUNTER_OFFSET)
 *
 * @param offset  host count - guest count, modulo 2^64, ticks
 * @return 0; -EBUSY in another phase; or an error of every request
 */
int vut_set_counter_offset(const struct vut_frontend *frontend,
                           uint64_t offset,
                           uint64_t timeout_ns);

/**
 * Stops the VM's time. RUNNING or ARMED -> PAUSED; in PAUSED it changes nothing. (PAUSE)
 *
 * @param flags  0 or VUT_PAUSE_KEEP_COUNTING
 * @param run    where counts and offsets at this instant go; may be NULL
 * @return 0; -EBUSY in NEW and RESTORING; or an error of every request
 */
int vut_pause(const struct vut_frontend *frontend,
              uint32_t flags,
              struct vut_run *run,
              uint64_t timeout_ns);

/**
 * Lets the VM's time go on. PAUSED -> RUNNING, or ARMED in a VM with VUT_CONFIRM; in RUNNING and
 * ARMED it changes nothing. (RESUME)
 *
 * @param run  where counts and offsets at this instant go; may be NULL
 * @return 0; -EBUSY in NEW and RESTORING; or an error of every request
 */
int vut_resume(const struct vut_frontend *frontend, struct vut_run *run, uint64_t timeout_ns);

/**
 * RESUME, `apply`, CONFIRM_RUN: lets the time of a VM with VUT_CONFIRM go on, and lets its vCPUs
 * run once its offsets are where the guest's counter is made.
 *
 * After an error of `apply` the VM stays ARMED and no vCPU runs: call this again to try again, or
 * vut_pause() to give up. `apply` is called once for each ARMED: not again where only the
 * confirmation was lost or late, and not in RUNNING.
 *
 * @param apply   puts the offsets in
 * @param opaque  goes to `apply`
 * @param run     where counts and offsets of the confirmation go: what every waiting vCPU gets.
 *                May be NULL
 * @return 0; what `apply` returned; -EINVAL for a VM without VUT_CONFIRM; -EMEDIUMTYPE where the
 *         backend does not count by `host_counter` of the options; -EBUSY where another thread
 *         paused the VM meanwhile, and in NEW and RESTORING; or an error of every request
 */
int vut_resume_with(const struct vut_frontend *frontend,
                    vut_apply_fn apply,
                    void *opaque,
                    struct vut_run *run,
                    uint64_t timeout_ns);

/**
 * Says that these offsets are where the guest's counter is made. ARMED -> RUNNING; in RUNNING it
 * changes nothing. vut_resume_with() and vut_restore_apply() do this. (CONFIRM_RUN)
 *
 * @param cntvoff  the virtual offset that was applied, ticks
 * @param cntpoff  the physical offset that was applied, ticks
 * @param run      where counts and offsets of the confirmation go; may be NULL
 * @return 0; -EINVAL for offsets that are not the VM's; -EBUSY in another phase; or an error of
 *         every request
 */
int vut_confirm_run(const struct vut_frontend *frontend,
                    uint64_t cntvoff,
                    uint64_t cntpoff,
                    struct vut_run *run,
                    uint64_t timeout_ns);

/**
 * Returns when the vCPU may run, and not before. Any number of threads may wait. After -ETIMEDOUT
 * of the time limit a thread may wait again. (WAIT_RUN)
 *
 * @param vcpu  index
 * @param run   where the counts and offsets that the vCPU starts with go; may be NULL
 * @return 0; -ETIMEDOUT at the time limit, and where the restore's own time-out passed;
 *         -ECANCELED where a restore was aborted; -ESTALE where a new restore began; -ENXIO for an
 *         index past the VM's vCPUs; -EBUSY in NEW; what an apply callback returned, where the
 *         offsets were not applied; or an error of every request
 */
int vut_wait_run(const struct vut_frontend *frontend,
                 uint32_t vcpu,
                 struct vut_run *run,
                 uint64_t timeout_ns);

/**
 * Finds the vCPUs that are missing in the open restore, in order; none if no restore is open. It
 * takes one request per vCPU: for a message after a restore that timed out, not for polling.
 *
 * @param vcpus  room for `len` indices
 * @param len    how many entries `vcpus` has; more missing vCPUs are counted only
 * @param count  where the number of missing vCPUs goes; may be NULL
 * @return 0, or an error of every request
 */
int vut_missing_vcpus(const struct vut_frontend *frontend,
                      uint32_t *vcpus,
                      size_t len,
                      uint32_t *count,
                      uint64_t timeout_ns);

/**
 * Resets the device: the VM is NEW again, its epoch stays. (RESET_DEVICE)
 *
 * Takes `timeout_ns` of the options at most.
 *
 * @return 0; -EOPNOTSUPP where the backend cannot be reset; or an error of every request
 */
int vut_reset_device(const struct vut_frontend *frontend);

/**
 * The process id of a backend that vut_spawn() launched. After an outage it is another one.
 *
 * @return the id, positive; -EINVAL where the backend was not launched by vut_spawn(); -ESRCH
 *         where it ended and was reaped
 */
int vut_pid(const struct vut_frontend *frontend);

/**
 * Waits until a backend that vut_spawn() launched has ended, and reaps it.
 *
 * @param status      where its status goes, as of waitpid() (WIFEXITED(), ...); may be NULL
 * @param timeout_ns  how long to wait, ns; 0 to ask only
 * @return 0; -ETIMEDOUT where it still runs; -EINVAL where the backend was not launched by
 *         vut_spawn()
 */
int vut_exit_status(const struct vut_frontend *frontend, int *status, uint64_t timeout_ns);

/**
 * Reads registers of one vCPU, all at one instant. Not in NEW. (GET_REGS)
 *
 * @param vcpu   index
 * @param regs   `id` of each entry says which register; `value` is filled in
 * @param count  how many entries, up to VUT_MAX_REGS
 * @return 0; -ENXIO for an index past the VM's vCPUs; -ENOENT for an id that is no timer register;
 *         -EINVAL for an id of another ABI, and for too many entries; -EBUSY in NEW; or an error
 *         of every request. After an error no value has changed
 */
int vut_get_regs(const struct vut_frontend *frontend,
                 uint32_t vcpu,
                 struct vut_reg *regs,
                 size_t count,
                 uint64_t timeout_ns);

/**
 * Writes registers of one vCPU, all together: their order does not matter. Not in NEW; counts in
 * PAUSED and RESTORING only. (SET_REGS)
 *
 * @param vcpu   index
 * @param regs   the registers and their values
 * @param count  how many entries, up to VUT_MAX_REGS; with 0 only `lines` is read
 * @param lines  where the levels of the interrupt lines after the write go; may be NULL
 * @return 0; -EBUSY for a count in RUNNING or ARMED, and for a vCPU that is done in the open
 *         restore; -EINVAL for one register with two values; or as vut_get_regs()
 */
int vut_set_regs(const struct vut_frontend *frontend,
                 uint32_t vcpu,
                 const struct vut_reg *regs,
                 size_t count,
                 struct vut_lines *lines,
                 uint64_t timeout_ns);

/**
 * Reads the registers of many vCPUs and the VM's counts, all at one instant. Not in NEW. (GET_VM)
 *
 * @param vm     where the VM's counts go; may be NULL
 * @param first  index of the first vCPU
 * @param vcpus  room for `count` vCPUs, all six registers of each
 * @param count  how many vCPUs
 * @return 0; -EINVAL where `first + count` is past the VM's vCPUs; -EBUSY in NEW; or an error of
 *         every request
 */
int vut_get_vm(const struct vut_frontend *frontend,
               struct vut_vm *vm,
               uint32_t first,
               struct vut_vcpu *vcpus,
               uint32_t count,
               uint64_t timeout_ns);

/**
 * Stages the registers of many vCPUs in an open restore. With `done` every one of them is also
 * done (RESTORE_DONE), at one instant, all or nothing; the last vCPU of the VM ends the restore.
 * In RESTORING; with `done` in the ARMED of a restore as well. (SET_VM)
 *
 * @param vcpus      the vCPUs, in any order
 * @param count      how many vCPUs
 * @param done       whether they have all their registers then
 * @param remaining  with `done`: where the number of vCPUs that are still missing goes; may be
 *                   NULL
 * @return 0; -ENODATA where a vCPU that is to be done lacks TIMER_CTL, TIMER_CVAL or TIMER_CNT;
 *         -EBUSY in another phase, and for a vCPU that is done; -EINVAL for a vCPU that is named
 *         twice, an unknown bit of `present`, and at the end of a strict restore whose counts
 *         differ; -ENXIO or -EINVAL for an index past the VM's vCPUs; or an error of every
 *         request
 */
int vut_set_vm(const struct vut_frontend *frontend,
               const struct vut_vcpu *vcpus,
               uint32_t count,
               bool done,
               uint32_t *remaining,
               uint64_t timeout_ns);

/**
 * Says that the vCPU has all its timer registers, as after a load of a device state. In RESTORING
 * and the ARMED of a restore. (RESTORE_DONE)
 *
 * @param vcpu       index
 * @param remaining  where the number of vCPUs that are still missing goes; may be NULL
 * @return as vut_set_vm() with `done`
 */
int vut_restore_done(const struct vut_frontend *frontend,
                     uint32_t vcpu,
                     uint32_t *remaining,
                     uint64_t timeout_ns);

/**
 * Opens a restore of all the VM's vCPUs, and with it a new epoch. In PAUSED, RESTORING and ARMED.
 * For a caller that says itself which vCPU is done (vut_set_vm()). (RESTORE_BEGIN)
 *
 * @param options  NULL for a plain restore; `vm_flags` is not used
 * @param epoch    where the new epoch goes; may be NULL
 * @return 0; -EBUSY in NEW and RUNNING; or an error of every request
 */
int vut_restore_begin_raw(const struct vut_frontend *frontend,
                          const struct vut_restore_options *options,
                          uint64_t *epoch,
                          uint64_t timeout_ns);

/**
 * Drops the open restore: the VM is PAUSED, as it was before, and vCPUs that wait get -ECANCELED.
 * In RESTORING and the ARMED of a restore. (RESTORE_ABORT)
 *
 * @return 0; -EBUSY in another phase; or an error of every request
 */
int vut_restore_abort_raw(const struct vut_frontend *frontend, uint64_t timeout_ns);

/**
 * Opens a restore of a saved VM: configures the VM if it is NEW, and begins a new epoch, which
 * every request of the restore names. In NEW, PAUSED, RESTORING and ARMED.
 *
 * For a VM with VUT_CONFIRM the restore ends in ARMED, whatever the flags. Takes `timeout_ns` of
 * struct vut_options at most.
 *
 * @param abi        VUT_ABI_*
 * @param frequency  the saved VM's counter frequency, Hz; not 0
 * @param vcpus      every vCPU of the VM, by index from 0 on, as vut_get_vm() gives them
 * @param count      how many vCPUs
 * @param options    NULL for a plain restore
 * @param restore    where the restore goes; NULL goes there after an error
 * @return 0; -EINVAL where the backend is configured for another VM, and for vCPUs that are not
 *         each there once in order; -EBUSY where the VM is RUNNING; or an error of every request
 */
int vut_restore_begin(const struct vut_frontend *frontend,
                      uint8_t abi,
                      uint64_t frequency,
                      const struct vut_vcpu *vcpus,
                      uint32_t count,
                      const struct vut_restore_options *options,
                      struct vut_restore **restore);

/**
 * Brings one vCPU's registers back, and waits for all the others, and for vut_restore_apply()
 * where the VM has VUT_CONFIRM. Returns when the vCPU may run, and not before. For the vCPU's
 * thread; threads of different vCPUs call it at once.
 *
 * After -ETIMEDOUT of the time limit, and after an apply callback failed, it may be called again
 * and goes on where it was.
 *
 * @param vcpu  index
 * @param run   where the counts and offsets that all vCPUs run with go; may be NULL
 * @return 0; -ENXIO for an index past the VM's vCPUs; -ETIMEDOUT at the time limit, and where the
 *         restore's own time-out passed; what the apply callback returned; -ECANCELED after
 *         vut_restore_abort(); -ESTALE where a new restore began; -EBUSY where another thread is
 *         in this call for this vCPU; the error of the vCPU by which the restore failed, which the
 *         text names; or an error of every request
 */
int vut_restore_vcpu_run(const struct vut_restore *restore,
                         uint32_t vcpu,
                         struct vut_run *run,
                         uint64_t timeout_ns);

/**
 * Brings the registers of all vCPUs back by one request: for a caller that has them in one place.
 * vut_restore_vcpu_run() then only waits.
 *
 * @return 0; -EBUSY where another thread is in a call for the whole restore, and where the VM runs
 *         already; or as vut_set_vm() with `done`, and then the restore stays open
 */
int vut_restore_bring_all_back(const struct vut_restore *restore, uint64_t timeout_ns);

/**
 * Waits until every vCPU has its registers back. Then the VM is RUNNING with VUT_RESTORE_AUTORUN,
 * else PAUSED; one with VUT_CONFIRM is ARMED, and waits for vut_restore_apply().
 *
 * @return 0; -ETIMEDOUT at the time limit: the restore goes on, and may be waited for again; the
 *         error of the vCPU that failed first, which the text names: the restore is aborted; what
 *         the apply callback returned, where the last vut_restore_apply() failed; -EBUSY where
 *         another thread is in a call for the whole restore; or an error of every request
 */
int vut_restore_wait(const struct vut_restore *restore, uint64_t timeout_ns);

/**
 * Waits until every vCPU has its registers back and the VM is ARMED, has `apply` put the offsets
 * into the hypervisor, and confirms them. Then every vCPU runs.
 *
 * After an error of `apply` no vCPU runs, and every vut_restore_vcpu_run() returns the same. Call
 * this again, or abort. `apply` is called once for each ARMED: not again where only the
 * confirmation was lost or late.
 *
 * @param apply   puts the offsets in
 * @param opaque  goes to `apply`
 * @param run     where counts and offsets of the confirmation go: what every vCPU gets. May be
 *                NULL
 * @return 0; what `apply` returned; -EINVAL for a VM without VUT_CONFIRM; or as vut_resume_with()
 *         and vut_restore_wait()
 */
int vut_restore_apply(const struct vut_restore *restore,
                      vut_apply_fn apply,
                      void *opaque,
                      struct vut_run *run,
                      uint64_t timeout_ns);

/**
 * Aborts the restore, unless it is complete: the VM is PAUSED, as it was before, and every
 * vut_restore_vcpu_run() ends with -ECANCELED. Takes `timeout_ns` of struct vut_options at most.
 *
 * @return 0, also where it was aborted before; -EBUSY where another thread is in a call for the
 *         whole restore
 */
int vut_restore_abort(const struct vut_restore *restore);

/**
 * Frees the restore, and aborts it as vut_restore_abort() does. No other thread may be in a call
 * with it. Before or after vut_close() of its frontend.
 *
 * @param restore  NULL does nothing
 */
void vut_restore_free(struct vut_restore *restore);

/**
 * Makes the backend write the time page: memory of this frontend that has the VM's phase and
 * offsets, so that vut_wait_run_by_page() and vut_clock_counts() make no request. It lasts until
 * vut_time_page_stop(), also over reconnects. (SET_TIME_PAGE, SPEC.md section 9)
 *
 * @return 0, or an error of every request
 */
int vut_time_page_start(const struct vut_frontend *frontend, uint64_t timeout_ns);

/**
 * Makes the backend stop writing the time page.
 *
 * @return 0, or an error of every request
 */
int vut_time_page_stop(const struct vut_frontend *frontend, uint64_t timeout_ns);

/**
 * As vut_wait_run(), by the time page if the backend writes one: while the VM is RUNNING it makes
 * no request, and all threads that wait share one.
 *
 * With the page it does not check that the vCPU exists, and a RUNNING that ends before the thread
 * sees it may go unnoticed: then the thread waits on.
 *
 * @param vcpu     index
 * @param cntvoff  where the virtual offset goes, ticks; may be NULL
 * @param cntpoff  where the physical offset goes, ticks; may be NULL
 * @return as vut_wait_run()
 */
int vut_wait_run_by_page(const struct vut_frontend *frontend,
                         uint32_t vcpu,
                         uint64_t *cntvoff,
                         uint64_t *cntpoff,
                         uint64_t timeout_ns);

/**
 * Makes a reader of the guest's counts. The time page must have been started.
 *
 * It reads what the backend's host counter counts by. That is possible for CLOCK_MONOTONIC,
 * CLOCK_BOOTTIME and CNTVCT_EL0, without an anchor, in this process's time namespace.
 *
 * @param clock  where the clock goes, which vut_clock_free() frees; NULL goes there after an error
 * @return 0; -EOPNOTSUPP for another host counter, and for a VM with an anchor; -EINVAL where this
 *         process reads another counter than the backend; or an error of every request
 */
int vut_clock_open(const struct vut_frontend *frontend,
                   struct vut_clock **clock,
                   uint64_t timeout_ns);

/**
 * Reads the guest's counts. It takes a reading of the host counter and some tens of nanoseconds,
 * no request, and no system call unless the backend writes the page for unusually long.
 *
 * While the VM's offsets stay the same, and over pauses, no count decreases from one reading to
 * the next, on any thread.
 *
 * @param counts  where the counts go; may be NULL
 * @return 0; -ENODATA where the page cannot be read: in NEW, without vut_time_page_start(), during
 *         a reconnect, and permanently once the host counter may have changed: after
 *         vut_set_anchor(), vut_reset_device() and vut_device_state_load()
 */
int vut_clock_counts(const struct vut_clock *clock, struct vut_counts *counts);

/**
 * Frees the clock. No other thread may be in a call with it. Before or after vut_close().
 *
 * @param clock  NULL does nothing
 */
void vut_clock_free(struct vut_clock *clock);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VHOST_USER_TIMER_H */
