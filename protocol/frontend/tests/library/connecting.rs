//! Connecting: what a backend must offer, and what a handshake that fails looks like.

use crate::LONG;
use crate::fake;
use crate::fake::Fake;
use crate::fake::echo;
use crate::fake::info;
use crate::fake::ok;
use crate::fake::socket_path;
use crate::operations::echo_pair;
use crate::pace::waiting;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::CounterSource;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::ShutdownHandle;
use vhost_user_timer_protocol::wire::info_flags;
use zerocopy::IntoBytes;

#[test]
fn a_backend_that_never_answers_the_handshake_is_an_error_in_time() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let options = Options::default().timeout(Duration::from_millis(50));
    let started = Instant::now();
    let error = fake::connect(ours, options).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_backend_that_hangs_up_in_the_handshake_is_an_error_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = fake::connect(ours, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error}");
}

#[test]
fn the_shutdown_handle_ends_the_handshake() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let shutdown = ShutdownHandle::new().unwrap();
    let options = Options::default().shutdown(shutdown.clone());
    std::thread::scope(|scope| {
        let connecting = waiting(scope, || fake::connect(ours, options));
        shutdown.shut_down();
        let error = connecting.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::ShutDown), "{error}");
    });
}

#[test]
fn connecting_to_a_listener_that_does_not_accept_ends_in_time() {
    let path = socket_path();
    let address = SocketAddrUnix::new(&path).unwrap();
    let listener = socket();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let options = Options::default().timeout(Duration::from_millis(50));
    // Until the backlog is full it is the handshake that times out.
    let mut backlog = Vec::new();
    let full = loop {
        let socket = socket();
        match rustix::net::connect(&socket, &address) {
            Ok(()) => backlog.push(socket),
            Err(error) => break error,
        }
    };
    assert_eq!(full, Errno::AGAIN);
    let error = fake::connect(&path, options.clone()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    assert!(
        matches!(error, Error::TimedOut { what: "connect" }),
        "{error}"
    );

    let error = fake::connect(&path, options.wait_for_listener(false)).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

#[test]
fn connecting_waits_for_a_listener_until_its_time_out_and_then_says_what_is_missing() {
    let timeout = Duration::from_millis(50);
    let path = socket_path();
    // Nothing is there; then a socket at which nobody listens any more.
    for missing in [ErrorKind::NotFound, ErrorKind::ConnectionRefused] {
        if missing == ErrorKind::ConnectionRefused {
            drop(UnixListener::bind(&path).unwrap());
        }
        let began = Instant::now();
        let error = fake::connect(&path, Options::default().timeout(timeout)).unwrap_err();
        assert!(began.elapsed() >= timeout, "{missing}");
        match error {
            Error::Connect { source, .. } => assert_eq!(source.kind(), missing),
            error => panic!("{missing}: {error}"),
        }
    }
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_backend_that_listens_later_is_connected_to() {
    let path = socket_path();
    let stale = UnixListener::bind(&path).unwrap();
    drop(stale);
    std::thread::scope(|scope| {
        let connecting = waiting(scope, || fake::connect(&path, Options::default()));
        std::fs::remove_file(&path).unwrap();
        let _serving = fake::serve(Arc::new(Fake::new(|request| Some(echo(request)))), &path);
        let frontend = connecting.join().unwrap().unwrap();
        assert_eq!(frontend.config().unwrap().phase, Phase::Paused);
    });
    let _ = std::fs::remove_file(&path);
}

#[test]
fn the_shutdown_handle_ends_the_wait_for_a_listener() {
    let shutdown = ShutdownHandle::new().unwrap();
    let options = Options::default().shutdown(shutdown.clone());
    std::thread::scope(|scope| {
        let connecting = waiting(scope, || fake::connect(socket_path(), options));
        shutdown.shut_down();
        let error = connecting.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::ShutDown), "{error}");
    });
}

/// A socket whose connect() does not wait for the backlog.
fn socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    socket.unwrap()
}

#[test]
fn the_config_space_is_the_info() {
    let pair = echo_pair();
    let config = pair.frontend.config().unwrap();
    assert_eq!(config, pair.frontend.queue().info(LONG).unwrap());
    assert_eq!((config.phase, config.max_vcpus), (Phase::Paused, 4096));
}

fn connect_error(fake: Fake, options: Options) -> Error {
    let path = socket_path();
    let _serving = fake::serve(fake.into(), &path);
    let error = fake::connect(&path, options.clone()).unwrap_err();
    let _ = std::fs::remove_file(&path);
    error
}

#[test]
fn a_backend_that_this_library_cannot_work_with_is_named_so() {
    let fake = || Fake::new(|request| Some(echo(request)));
    let mut newer = fake();
    newer.config.version = 2.into();
    let error = connect_error(newer, Options::default());
    assert!(matches!(error, Error::Version(2)), "{error}");

    // Without a config space it is GET_INFO that tells.
    let mut newer = Fake::new(|_| {
        let mut info = info();
        info.version = 3.into();
        Some(ok(info.as_bytes()))
    });
    newer.protocol_without = VhostUserProtocolFeatures::CONFIG;
    let error = connect_error(newer, Options::default());
    assert!(matches!(error, Error::Version(3)), "{error}");

    let mut strange = fake();
    strange.config.phase = 9.into();
    let error = connect_error(strange, Options::default());
    assert!(matches!(error, Error::Config { .. }), "{error}");

    let mut legacy = fake();
    legacy.without = 1 << 32;
    let error = connect_error(legacy, Options::default());
    assert_eq!(
        error.to_string(),
        "the backend does not offer VIRTIO_F_VERSION_1"
    );

    let error = connect_error(fake(), Options::default().request_queues(3));
    assert!(matches!(error, Error::MissingFeature(_)), "{error}");
}

#[test]
fn a_backend_that_counts_by_something_else_than_the_hypervisor_is_an_error_that_says_so() {
    let expect = || Options::default().host_counter(CounterSource::Cntvct);
    let counting_by = |source: CounterSource, flags: u8| {
        let mut fake = Fake::new(|request| Some(echo(request)));
        fake.config.flags = source.info_flags() | flags;
        fake
    };
    for (source, flags) in [
        (CounterSource::NotTold, 0),
        (CounterSource::Monotonic, 0),
        (CounterSource::Monotonic, info_flags::ANCHORED),
    ] {
        match connect_error(counting_by(source, flags), expect()) {
            Error::HostCounter(other) => {
                assert_eq!(
                    (other.expected, other.found),
                    (CounterSource::Cntvct, source)
                );
                assert_eq!(other.anchored, flags != 0);
            }
            error => panic!("{source}: {error}"),
        }
    }
    let pair = fake::pair(counting_by(CounterSource::Cntvct, 0), expect());
    assert_eq!(
        pair.frontend.config().unwrap().source,
        CounterSource::Cntvct
    );
}

#[test]
fn options_out_of_range_are_refused() {
    let options = Options::default;
    for bad in [
        options().queue_size(2),
        options().queue_size(2048),
        options().queue_size(100),
        options().event_buffers(1),
        options().event_buffers(3),
        options().request_queues(0),
        options().request_queues(17),
    ] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = fake::connect(ours, bad.clone()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{bad:?}");
    }
}
