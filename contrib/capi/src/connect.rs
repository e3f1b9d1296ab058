//! Frontends: connecting, and the end.

#![expect(unsafe_code, reason = "exports symbols; reads the caller's strings")]

use std::ffi::{c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vhost_user_timer_frontend::{
    Backend, Connector, Frontend, Options, Reconnect, RequestQueue, SpawnOptions,
};

use crate::border::{Failure, border};
use crate::pointer::{given, put, string, strings};
use crate::types::{VUT_COUNTER_ANY, host_counter};

/// A connection to a backend, which serves one VM. Opaque.
///
/// vut_connect(), vut_connect_fd() and vut_spawn() make one, vut_close() ends it.
pub struct vut_frontend(Kind);

/// Unlike a pair of both, this can be closed.
enum Kind {
    Connected(Frontend),
    Launched(Backend),
}

/// How a frontend is set up. Start from vut_options_default().
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vut_options {
    /// How long connecting, the handshake, and any later control message may take, ns. The
    /// default is 10 s.
    pub timeout_ns: u64,
    /// With `reconnect`: how long an outage may last before calls fail with -ENOTCONN, ns. The
    /// default is 30 s.
    pub patience_ns: u64,
    /// Request queues, 1 to 16; 0, the default, for all that the backend serves.
    pub request_queues: u16,
    /// The host counter that the backend must count by: VUT_COUNTER_CNTVCT for KVM on AArch64. With
    /// another one connecting and applying fail with -EMEDIUMTYPE. Default: VUT_COUNTER_ANY.
    pub host_counter: u8,
    /// Not 0: connect again when the connection is lost, and send again what was not answered.
    /// Calls wait on, within their own time limits. vut_spawn() launches the backend again, which
    /// takes a state file. Not with vut_connect_fd() (-EINVAL). Default: 0.
    pub reconnect: u8,
    /// Not 0: vut_connect() waits, up to `timeout_ns`, for a backend that does not listen yet.
    /// Default: 1.
    pub wait_for_listener: u8,
}

impl Default for vut_options {
    fn default() -> Self {
        let options = Options::default();
        vut_options {
            timeout_ns: nanoseconds(options.timeout),
            patience_ns: nanoseconds(Reconnect::default().patience),
            request_queues: 0,
            host_counter: VUT_COUNTER_ANY,
            reconnect: 0,
            wait_for_listener: options.wait_for_listener.into(),
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl vut_options {
    fn read(options: Option<&Self>) -> Result<Options, Failure> {
        let from = options.copied().unwrap_or_default();
        let mut options = Options::default()
            .timeout(Duration::from_nanos(from.timeout_ns))
            .wait_for_listener(from.wait_for_listener != 0);
        if from.request_queues != 0 {
            options = options.request_queues(from.request_queues);
        }
        if from.reconnect != 0 {
            let patience = Duration::from_nanos(from.patience_ns);
            options = options.reconnect(Reconnect::default().patience(patience));
        }
        options.host_counter = host_counter(from.host_counter)?;
        Ok(options)
    }
}

impl vut_frontend {
    fn put(self, to: &mut MaybeUninit<*mut vut_frontend>) {
        to.write(Box::into_raw(Box::new(self)));
    }

    pub(crate) fn frontend(&self) -> &Frontend {
        match &self.0 {
            Kind::Connected(frontend) => frontend,
            Kind::Launched(backend) => backend.frontend(),
        }
    }

    /// For requests of the whole VM.
    pub(crate) fn queue(&self) -> &RequestQueue {
        self.frontend().queue()
    }

    /// The process, if this library launched it.
    pub(crate) fn backend(&self) -> Result<&Backend, Failure> {
        match &self.0 {
            Kind::Launched(backend) => Ok(backend),
            Kind::Connected(_) => Err(Failure::argument(
                "this backend was not launched by vut_spawn(), so its process is not known",
            )),
        }
    }
}

/// What all calls of C start with.
pub(crate) fn frontend(frontend: Option<&vut_frontend>) -> Result<&vut_frontend, Failure> {
    given(frontend, "frontend")
}

/// Sets all options to their defaults.
///
/// @param options  where the options go; NULL does nothing
#[unsafe(no_mangle)]
pub extern "C" fn vut_options_default(options: Option<&mut MaybeUninit<vut_options>>) {
    put(options, vut_options::default());
}

/// Connects to a backend that listens at a path.
///
/// @param path      path of the backend's Unix socket (--socket-path)
/// @param options   NULL for the defaults
/// @param frontend  where the frontend goes; NULL goes there after an error
/// @return 0; -ENOENT or -ECONNREFUSED where nobody listens in time; -EINVAL for options out of
///         range or NULL; -EMEDIUMTYPE for another host counter than the options name;
///         -EOPNOTSUPP, -EPROTONOSUPPORT, -EPROTO or -EREMOTEIO for a backend that this library
///         cannot work with; -ETIMEDOUT; -ENOTCONN; another errno where a system call fails
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_connect(
    path: *const c_char,
    options: Option<&vut_options>,
    frontend: Option<&mut MaybeUninit<*mut vut_frontend>>,
) -> c_int {
    open(frontend, || {
        // SAFETY: the caller's promise.
        let path = unsafe { string(path, "path") }?;
        let options = vut_options::read(options)?;
        let frontend = Frontend::connect(Path::new(path), options)?;
        Ok(Kind::Connected(frontend))
    })
}

/// Connects to a backend over a socket that is connected already.
///
/// The descriptor is duplicated, and stays the caller's. Both descriptors are one socket: this call
/// makes it blocking, and nobody else may read it or write to it until vut_close().
///
/// @param fd        a connected Unix stream socket
/// @param options   NULL for the defaults; `reconnect` is refused
/// @param frontend  where the frontend goes; NULL goes there after an error
/// @return 0; -EBADF where `fd` is not open; or as vut_connect()
#[unsafe(no_mangle)]
pub extern "C" fn vut_connect_fd(
    fd: c_int,
    options: Option<&vut_options>,
    frontend: Option<&mut MaybeUninit<*mut vut_frontend>>,
) -> c_int {
    open(frontend, || {
        let options = vut_options::read(options)?;
        let connector = Connector::stream(duplicate(fd)?);
        Ok(Kind::Connected(Frontend::connect(connector, options)?))
    })
}

fn duplicate(fd: c_int) -> Result<UnixStream, Failure> {
    let refused = |error: std::io::Error| {
        let errno = error.raw_os_error().unwrap_or(libc::EBADF);
        Failure::new(errno, format!("cannot duplicate descriptor {fd}: {error}"))
    };
    if fd < 0 {
        return Err(refused(std::io::Error::from_raw_os_error(libc::EBADF)));
    }
    // SAFETY: a descriptor that is not open gives EBADF, and the copy has an owner of its own. It
    // is borrowed for this one call.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(borrowed.try_clone_to_owned().map_err(refused)?.into())
}

/// Launches a backend with one end of a socket pair as its stdin (--fd=0), and connects to it.
///
/// The backend ends with the connection, so also when this process dies. vut_close() ends and reaps
/// it. With `reconnect` a backend that ends is replaced: the thread that reconnects launches the
/// next one with the same options and the state file, and reaps the previous one. The child has
/// this process's environment, stderr and user. SIGCHLD must not be ignored, and nobody else may
/// reap the child.
///
/// @param program     a path, or a name that is searched for in PATH
/// @param args        options of the program without --fd and --state-file; the last entry is NULL.
///                    NULL for none
/// @param state_file  --state-file: a file that keeps the VM while no backend runs, best on a
///                    tmpfs; remove it when the VM ends. NULL for none
/// @param options     NULL for the defaults
/// @param frontend    where the frontend goes; NULL goes there after an error
/// @return 0; -ENOENT, -EACCES, ... where the program cannot be started; -ECHILD where it ends
///         before it serves (its stderr says why); -EINVAL for `reconnect` without a state file; or
///         as vut_connect()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_spawn(
    program: *const c_char,
    args: *const *const c_char,
    state_file: *const c_char,
    options: Option<&vut_options>,
    frontend: Option<&mut MaybeUninit<*mut vut_frontend>>,
) -> c_int {
    open(frontend, || {
        // SAFETY: the caller's promise.
        let program = unsafe { string(program, "program") }?;
        // SAFETY: the caller's promise.
        let args = unsafe { strings(args, "args") }?;
        let mut spawn = SpawnOptions::default().frontend(vut_options::read(options)?);
        for arg in args {
            spawn = spawn.arg(arg);
        }
        if !state_file.is_null() {
            // SAFETY: the caller's promise.
            spawn = spawn.state_file(unsafe { string(state_file, "state_file") }?);
        }
        Ok(Kind::Launched(Backend::spawn(
            PathBuf::from(program),
            spawn,
        )?))
    })
}

fn open(
    to: Option<&mut MaybeUninit<*mut vut_frontend>>,
    connect: impl FnOnce() -> Result<Kind, Failure>,
) -> c_int {
    border(|| {
        let to = given(to, "frontend")?;
        to.write(std::ptr::null_mut());
        vut_frontend(connect()?).put(to);
        Ok(())
    })
}

/// Closes the connection, and frees the frontend. The VM in the backend stays as it is.
///
/// A backend that vut_spawn() launched is ended and reaped; the VM survives it in its state file
/// only. Takes `timeout_ns` of the options at most, twice that for a launched backend that answers
/// and does not end; one that does not answer or end in time is killed.
///
/// This must be the last call with this frontend. No other thread may be in a call with it, or with
/// a restore of it: use vut_shut_down() first where threads wait.
///
/// @param frontend  NULL does nothing
#[unsafe(no_mangle)]
pub extern "C" fn vut_close(frontend: Option<Box<vut_frontend>>) {
    border(|| {
        // The connection is closed, and the process gone, in any case.
        match frontend.map(|frontend| frontend.0) {
            Some(Kind::Connected(frontend)) => frontend.close()?,
            Some(Kind::Launched(backend)) => drop(backend.close()?),
            None => {}
        }
        Ok(())
    });
}

/// Ends every wait of this frontend, on every thread, now and in future: calls fail with
/// -ESHUTDOWN. The backend is not told. It may be called on any thread, not in a signal handler.
///
/// @param frontend  NULL does nothing
#[unsafe(no_mangle)]
pub extern "C" fn vut_shut_down(frontend: Option<&vut_frontend>) {
    border(|| {
        if let Some(vut_frontend(_)) = frontend {
            self::frontend(frontend)?
                .frontend()
                .shutdown_handle()
                .shut_down();
        }
        Ok(())
    });
}

/// Waits until the connection is lost and cannot be had again; with `reconnect` it connects again
/// each time. For a thread of its own, in a program whose other threads do not wait in calls.
///
/// @return never 0: why the connection is over, such as -ENOTCONN, -ESHUTDOWN or -ENOTRECOVERABLE
#[unsafe(no_mangle)]
pub extern "C" fn vut_keep_connected(frontend: Option<&vut_frontend>) -> c_int {
    border(|| Err(self::frontend(frontend)?.frontend().keep_connected().into()))
}

/// The control socket, for an event loop: poll() reports POLLHUP or POLLRDHUP when the backend is
/// gone. It must be neither read nor written nor closed.
///
/// With `reconnect` the number stays, and is another socket after an outage: register it again in
/// an epoll instance.
///
/// @return the descriptor, which is the library's; -EINVAL for NULL
#[unsafe(no_mangle)]
pub extern "C" fn vut_fd(frontend: Option<&vut_frontend>) -> c_int {
    let mut fd = -1;
    let failed = border(|| {
        fd = self::frontend(frontend)?.frontend().as_fd().as_raw_fd();
        Ok(())
    });
    if failed == 0 { fd } else { failed }
}
