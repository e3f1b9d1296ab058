//! Saving and loading the device state by the frontend library.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::LONG;
use crate::fake;
use crate::fake::model::Rig;
use crate::fake::{DeviceState, Fake, Pair, echo, pair, try_pair};
use crate::pace::{waiting, within_some_limit};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_timer_frontend::{Deadline, Error, Options, Reconnect};
use vhost_user_timer_protocol::Phase;

const MOMENT: Duration = Duration::from_millis(30);
const MAX: usize = 4 << 20;

/// What a backend does with a transfer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Carries it out.
    Well,
    /// Holds the descriptor and does nothing.
    Stall,
    /// Closes it after some bytes, and fails the check.
    Leave(usize),
    /// Carries it out, and fails the check.
    FailCheck,
    /// Refuses to begin.
    Refuse,
    /// Gives a descriptor of its own.
    OwnChannel,
}

struct Backend {
    way: Way,
    state: Vec<u8>,
    transfer: Mutex<Option<JoinHandle<io::Result<Vec<u8>>>>>,
    stalled: Mutex<Option<File>>,
    loaded: Arc<Mutex<Vec<u8>>>,
}

impl DeviceState for Backend {
    fn begin(&self, load: bool, mut file: File) -> io::Result<Option<File>> {
        let (mut most, mut other) = (usize::MAX, None);
        match self.way {
            Way::Well | Way::FailCheck => {}
            Way::Leave(some) => most = some,
            Way::Refuse => return Err(io::Error::other("refused")),
            Way::Stall => {
                *self.stalled.lock().unwrap() = Some(file);
                return Ok(None);
            }
            Way::OwnChannel => {
                let (read, write) = io::pipe()?;
                let (read, write) = (OwnedFd::from(read).into(), OwnedFd::from(write).into());
                let (ours, theirs) = if load { (read, write) } else { (write, read) };
                (file, other) = (ours, Some(theirs));
            }
        }
        let state = self.state.clone();
        let work = move || {
            let mut got = Vec::new();
            if load {
                (&file).take(most as u64).read_to_end(&mut got)?;
            } else {
                (&file).write_all(&state[..most.min(state.len())])?;
            }
            Ok(got)
        };
        *self.transfer.lock().unwrap() = Some(std::thread::spawn(work));
        Ok(other)
    }

    fn check(&self) -> io::Result<()> {
        let transfer = self.transfer.lock().unwrap().take();
        let Some(transfer) = transfer else {
            return Err(io::Error::other("nothing was begun"));
        };
        *self.loaded.lock().unwrap() = transfer.join().unwrap()?;
        match self.way {
            Way::Well | Way::OwnChannel => Ok(()),
            _ => Err(io::Error::other("bad")),
        }
    }
}

/// `len` bytes that differ.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

fn backend(way: Way, len: usize, options: Options) -> (Pair, Arc<Mutex<Vec<u8>>>) {
    let loaded = Arc::new(Mutex::new(Vec::new()));
    let mut fake = Fake::new(|request| Some(echo(request)));
    fake.device_state = Box::new(Backend {
        way,
        state: bytes(len),
        transfer: Mutex::default(),
        stalled: Mutex::default(),
        loaded: loaded.clone(),
    });
    (pair(fake, options), loaded)
}

fn refused(result: Result<impl std::fmt::Debug, Error>) -> bool {
    matches!(result, Err(Error::DeviceState(_)))
}

#[test]
fn a_state_of_any_size_is_saved_and_loaded() {
    for way in [Way::Well, Way::OwnChannel] {
        for len in [0, 1, 100_000, MAX] {
            let (pair, loaded) = backend(way, len, Options::default());
            let saved = pair.frontend.save_device_state(LONG).unwrap();
            assert!(saved == bytes(len));
            pair.frontend.load_device_state(&saved, LONG).unwrap();
            assert!(*loaded.lock().unwrap() == saved);
        }
    }
}

#[test]
fn a_state_without_an_end_is_not_read_forever() {
    let (pair, _) = backend(Way::Well, MAX + 1, Options::default());
    assert!(refused(pair.frontend.save_device_state(LONG)));
    pair.frontend.queue().info(LONG).unwrap();
}

#[test]
fn what_the_backend_refuses_is_said_so_and_the_connection_goes_on() {
    for way in [Way::Refuse, Way::FailCheck, Way::Leave(10)] {
        let (pair, _) = backend(way, 1000, Options::default());
        let frontend = &pair.frontend;
        assert!(refused(frontend.save_device_state(LONG)));
        assert!(refused(frontend.load_device_state(&bytes(1 << 20), LONG)));
        assert!(refused(frontend.check_device_state()));
        frontend.config().unwrap();
        frontend.queue().info(LONG).unwrap();
    }
}

#[test]
fn a_transfer_that_stalls_ends_at_its_deadline_or_by_the_shutdown_handle() {
    let stalled = || backend(Way::Stall, 1000, Options::default()).0;
    // A limit may pass before the transfer has begun.
    let transfer_is_late = |result| match result {
        Err(Error::TimedOut { what }) => (what == "the device state's transfer").then_some(()),
        other => panic!("{other:?}"),
    };
    within_some_limit(MOMENT, |limit| {
        let saved = stalled().frontend.save_device_state(limit);
        transfer_is_late(saved.map(drop))
    });
    within_some_limit(MOMENT, |limit| {
        transfer_is_late(stalled().frontend.load_device_state(&bytes(1 << 20), limit))
    });

    let pair = stalled();
    let frontend = &pair.frontend;
    // What fits the pipe was written; the check fails.
    assert!(refused(frontend.load_device_state(&bytes(10), LONG)));
    frontend.queue().info(LONG).unwrap();
    std::thread::scope(|scope| {
        let saving = waiting(scope, || frontend.save_device_state(Deadline::NEVER));
        frontend.shutdown_handle().shut_down();
        assert!(matches!(saving.join().unwrap(), Err(Error::ShutDown)));
    });
}

#[test]
fn a_backend_that_hangs_in_the_check_does_not_hang_the_vmm() {
    struct Hung(Mutex<Option<std::sync::mpsc::Receiver<()>>>);
    impl DeviceState for Hung {
        fn begin(&self, _: bool, _: File) -> io::Result<Option<File>> {
            Ok(None)
        }

        fn check(&self) -> io::Result<()> {
            let release = self.0.lock().unwrap().take();
            let _ = release.map(|release| release.recv());
            Ok(())
        }
    }
    within_some_limit(Duration::from_millis(200), |timeout| {
        let (release, wait) = std::sync::mpsc::channel();
        let mut fake = Fake::new(|request| Some(echo(request)));
        fake.device_state = Box::new(Hung(Mutex::new(Some(wait))));
        let pair = try_pair(fake, Options::default().timeout(timeout))?;
        let saved = pair.frontend.save_device_state(Deadline::NEVER);
        drop(release);
        match saved {
            // The handshake and SET_DEVICE_STATE_FD have the same limit.
            Err(Error::TimedOut { what }) => (what == "CHECK_DEVICE_STATE").then_some(()),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_vmm_can_pipe_the_state_into_its_own_stream() {
    let (pair, loaded) = backend(Way::Well, 5000, Options::default());
    let (mut read, write) = io::pipe().unwrap();
    assert!(
        pair.frontend
            .begin_device_state_save(write)
            .unwrap()
            .is_none()
    );
    let mut saved = Vec::new();
    read.read_to_end(&mut saved).unwrap();
    pair.frontend.check_device_state().unwrap();
    assert!(saved == bytes(5000));

    let (read, mut write) = io::pipe().unwrap();
    assert!(
        pair.frontend
            .begin_device_state_load(read)
            .unwrap()
            .is_none()
    );
    write.write_all(&saved).unwrap();
    drop(write);
    pair.frontend.check_device_state().unwrap();
    assert!(*loaded.lock().unwrap() == saved);
}

#[test]
fn a_backend_without_device_state_is_told_apart() {
    let mut fake = Fake::new(|request| Some(echo(request)));
    fake.protocol_without = VhostUserProtocolFeatures::DEVICE_STATE;
    let pair = pair(fake, Options::default());
    let missing = |result| matches!(result, Err(Error::MissingFeature(_)));
    assert!(missing(pair.frontend.save_device_state(LONG).map(|_| ())));
    assert!(missing(pair.frontend.load_device_state(&[], LONG)));
    assert!(missing(pair.frontend.check_device_state()));
}

/// Goes away in its first check, after or before it has loaded.
struct GoesAway {
    vm: Arc<Mutex<Option<Arc<Mutex<fake::model::Vm>>>>>,
    after: bool,
    checks: Mutex<u32>,
    gone: Arc<Mutex<Option<std::sync::mpsc::Receiver<()>>>>,
    at_check: std::sync::mpsc::Sender<()>,
    file: Mutex<Option<File>>,
}

impl DeviceState for GoesAway {
    fn begin(&self, load: bool, file: File) -> io::Result<Option<File>> {
        if !load {
            (&file).write_all(b"state")?;
        }
        *self.file.lock().unwrap() = load.then_some(file);
        Ok(None)
    }

    fn check(&self) -> io::Result<()> {
        let load = self.file.lock().unwrap().take().is_some();
        let first = {
            let mut checks = self.checks.lock().unwrap();
            *checks += 1;
            *checks == 1
        };
        if load && (self.after || !first) {
            let vm = self.vm.lock().unwrap();
            let mut vm = vm.as_ref().unwrap().lock().unwrap();
            assert_ne!(vm.phase(), Phase::Restoring, "loaded twice");
            vm.load();
        }
        if first {
            self.at_check.send(()).unwrap();
            let gone = self.gone.lock().unwrap().take().unwrap();
            let _ = gone.recv();
        }
        Ok(())
    }
}

#[test]
fn a_transfer_whose_connection_is_lost_is_made_once() {
    for (load, after) in [(false, false), (true, false), (true, true)] {
        let reconnect = Reconnect::default().delays(MOMENT, MOMENT);
        let options = Options::default().reconnect(reconnect);
        let (at_check, checking) = std::sync::mpsc::channel();
        let (go_on, gone) = std::sync::mpsc::channel();
        let vm = Arc::new(Mutex::new(None));
        let state = GoesAway {
            vm: vm.clone(),
            after,
            checks: Mutex::new(0),
            gone: Arc::new(Mutex::new(Some(gone))),
            at_check,
            file: Mutex::default(),
        };
        let (mut rig, frontend) = Rig::with(options, |fake| fake.device_state = Box::new(state));
        *vm.lock().unwrap() = Some(rig.vm.clone());
        std::thread::scope(|scope| {
            let transfer = scope.spawn(|| match load {
                true => frontend.load_device_state(b"state", LONG),
                false => frontend
                    .save_device_state(LONG)
                    .map(|saved| assert_eq!(saved, b"state")),
            });
            checking.recv().unwrap();
            // The backend shuts the socket, and then its check comes to an end.
            rig.shut();
            drop(go_on);
            rig.gone();
            rig.revive();
            transfer.join().unwrap().unwrap();
        });
        let vm = rig.vm.lock().unwrap();
        let want = if load {
            (Phase::Restoring, 8)
        } else {
            (Phase::Paused, 7)
        };
        assert_eq!((vm.phase(), vm.epoch()), want);
        drop(vm);
        // The library knows the epoch: its next requests are meant for that one.
        frontend.queue().info(LONG).unwrap();
    }
}
