//! A door between a frontend and a crate, both of which a test plays.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use super::*;
use crate::sys::lock;

const DEADLINE: Duration = Duration::from_secs(30);
/// A time that a test lets pass.
const SHORT: Duration = Duration::from_secs(1);
const NEED_REPLY: u32 = 1 << 3;
const REPLY: u32 = 1 << 2;

struct FakeSession {
    bell: Bell,
    fault: Mutex<Option<Refusal>>,
    released: AtomicBool,
}

impl Guarded for FakeSession {
    fn bell(&self) -> &Bell {
        &self.bell
    }

    fn fault(&self) -> Option<Refusal> {
        lock(&self.fault).clone()
    }

    fn release_held(&self) {
        self.released.store(true, Ordering::Release);
    }
}

/// The ends of both peers of a door that stands on a thread.
struct Stage<'a, 'scope> {
    frontend: UnixStream,
    backend: UnixStream,
    session: &'a FakeSession,
    door: ScopedJoinHandle<'scope, End>,
}

/// Plays at a door that gives both peers all the time that a slow machine takes.
fn stage(play: impl FnOnce(Stage<'_, '_>)) {
    stage_within(2 * DEADLINE, 2 * DEADLINE, play);
}

/// With so long for a message, and for what a frontend that is gone leaves behind.
fn stage_within(message: Duration, aftermath: Duration, play: impl FnOnce(Stage<'_, '_>)) {
    let session = FakeSession {
        bell: Bell::new().unwrap(),
        fault: Mutex::default(),
        released: AtomicBool::new(false),
    };
    let (frontend, outer) = UnixStream::pair().unwrap();
    let (backend, inner) = UnixStream::pair().unwrap();
    for stream in [&frontend, &backend] {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
    }
    let limits = Limits {
        regions: 3,
        queue_size: 1024,
        queues: 4,
        message,
        aftermath,
    };
    std::thread::scope(|scope| {
        let session = &session;
        let door = scope.spawn(move || Door::new(&outer, &inner, session, limits).stand());
        play(Stage {
            frontend,
            backend,
            session,
            door,
        });
    });
}

fn message(request: FrontendReq, flags: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    let header = [u32::from(request), 1 | flags, len];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(body);
    bytes
}

fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn memfd(len: u64) -> OwnedFd {
    let file = memfd_create("door", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

impl Stage<'_, '_> {
    fn sends(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let iov = [IoSlice::new(bytes)];
        let flags = SendFlags::NOSIGNAL;
        assert_eq!(
            sendmsg(&self.frontend, &iov, &mut ancillary, flags).unwrap(),
            bytes.len()
        );
    }

    #[track_caller]
    fn backend_gets(&mut self, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        self.backend.read_exact(&mut got).unwrap();
        assert_eq!(got, bytes);
    }

    #[track_caller]
    fn frontend_gets(&mut self, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        self.frontend.read_exact(&mut got).unwrap();
        assert_eq!(got, bytes);
    }

    /// Negotiates REPLY_ACK.
    fn negotiate(&mut self) {
        let ask = message(FrontendReq::GET_FEATURES, 0, &[]);
        self.sends(&ask, &[]);
        self.backend_gets(&ask);
        let reply = message(FrontendReq::GET_FEATURES, REPLY, &[0; 8]);
        self.backend.write_all(&reply).unwrap();
        self.frontend_gets(&reply);
        let ack = message(FrontendReq::SET_PROTOCOL_FEATURES, 0, &u64s(&[1 << 3]));
        self.sends(&ack, &[]);
        self.backend_gets(&ack);
    }

    /// Checks that a message is refused with a reply, and that the connection continues.
    #[track_caller]
    fn is_refused(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        reply: u64,
    ) {
        self.sends(&message(request, NEED_REPLY, body), descriptors);
        self.frontend_gets(&message(request, REPLY, &u64s(&[reply])));
    }

    /// Checks that a message is passed on, and answered.
    #[track_caller]
    fn is_admitted(&mut self, request: FrontendReq, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let bytes = message(request, NEED_REPLY, body);
        self.sends(&bytes, descriptors);
        self.backend_gets(&bytes);
        let reply = message(request, REPLY, &[0; 8]);
        self.backend.write_all(&reply).unwrap();
        self.frontend_gets(&reply);
    }

    #[track_caller]
    fn ends(self) -> End {
        self.door.join().unwrap()
    }
}

#[track_caller]
fn refusal(end: &End) -> &str {
    match end {
        End::Refused(Refusal(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_message_is_refused_with_its_reply_and_the_connection_continues() {
    stage(|mut stage| {
        stage.negotiate();
        let (call, file) = (event(), memfd(0x1000));
        let (call, file) = (call.as_fd(), file.as_fd());
        let pair = |queue: u32, value: u32| [queue.to_ne_bytes(), value.to_ne_bytes()].concat();
        for size in [0, 3, 2048, 0x1_0000, u32::MAX] {
            stage.is_refused(FrontendReq::SET_VRING_NUM, &pair(0, size), &[], 1);
        }
        stage.is_admitted(FrontendReq::SET_VRING_NUM, &pair(0, 1024), &[]);
        stage.is_refused(FrontendReq::SET_VRING_KICK, &u64s(&[0x100]), &[], 1);
        stage.is_refused(FrontendReq::SET_VRING_KICK, &u64s(&[0]), &[], 1);
        stage.is_refused(FrontendReq::SET_VRING_CALL, &u64s(&[0]), &[file], 1);
        stage.is_refused(FrontendReq::SET_VRING_CALL, &u64s(&[0]), &[call, call], 1);
        stage.is_refused(FrontendReq::SET_OWNER, &[], &[call], 1);
        stage.is_admitted(FrontendReq::SET_VRING_CALL, &u64s(&[0x100]), &[]);
        stage.is_admitted(FrontendReq::SET_VRING_CALL, &u64s(&[0]), &[call]);
        let save = pair(0, 0);
        stage.is_refused(FrontendReq::SET_DEVICE_STATE_FD, &save, &[call], 0x101);
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn regions_are_checked_and_counted_before_any_is_passed_on() {
    stage(|mut stage| {
        stage.negotiate();
        let (file, short) = (memfd(0x2000), memfd(0x1000));
        let (file, short) = (file.as_fd(), short.as_fd());
        let region = |at| [at, 0x2000, at, 0];
        let add = |at| u64s(&[&[0], &region(at)[..]].concat());
        let table = |count: u64| {
            let regions = (0..count).flat_map(|n| region(n << 16));
            u64s(&[count].into_iter().chain(regions).collect::<Vec<_>>())
        };
        stage.is_refused(FrontendReq::SET_MEM_TABLE, &table(2), &[file, short], 1);
        stage.is_refused(FrontendReq::SET_MEM_TABLE, &table(2), &[file], 1);
        stage.is_refused(FrontendReq::SET_MEM_TABLE, &table(0), &[], 1);
        stage.is_refused(FrontendReq::SET_MEM_TABLE, &[0; 7], &[], 1);
        stage.is_refused(FrontendReq::SET_MEM_TABLE, &table(4), &[file; 4], 1);
        stage.is_admitted(FrontendReq::SET_MEM_TABLE, &table(2), &[file, file]);
        stage.is_refused(FrontendReq::ADD_MEM_REG, &add(1 << 20), &[short], 1);
        stage.is_admitted(FrontendReq::ADD_MEM_REG, &add(1 << 20), &[file]);
        stage.is_refused(FrontendReq::ADD_MEM_REG, &add(1 << 21), &[file], 1);
        stage.is_admitted(FrontendReq::REM_MEM_REG, &add(1 << 20), &[]);
        stage.is_admitted(FrontendReq::ADD_MEM_REG, &add(1 << 21), &[file]);
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn where_a_refusal_cannot_be_told_the_connection_ends_and_the_log_has_the_reason() {
    stage(|stage| {
        stage.sends(
            &message(FrontendReq::SET_VRING_KICK, 0, &u64s(&[0x100])),
            &[],
        );
        let end = stage.ends();
        assert!(refusal(&end).starts_with("SET_VRING_KICK refused: it carries no descriptor"));
    });
    // Without REPLY_ACK the flag asks for nothing.
    stage(|stage| {
        let nine = u64s(&[9 << 32 | 3]);
        stage.sends(&message(FrontendReq::SET_VRING_NUM, NEED_REPLY, &nine), &[]);
        assert!(refusal(&stage.ends()).starts_with("SET_VRING_NUM refused: queue 3 would"));
    });
    stage(|stage| {
        let call = event();
        stage.sends(&message(FrontendReq::GET_FEATURES, 0, &[]), &[call.as_fd()]);
        assert_eq!(
            refusal(&stage.ends()),
            "GET_FEATURES refused: it carries 1 descriptors; send 0 at most"
        );
    });
}

#[test]
fn more_memory_slots_than_are_had_are_not_announced() {
    stage(|mut stage| {
        let ask = message(FrontendReq::GET_MAX_MEM_SLOTS, 0, &[]);
        stage.sends(&ask, &[]);
        stage.backend_gets(&ask);
        let crates = message(FrontendReq::GET_MAX_MEM_SLOTS, REPLY, &u64s(&[509]));
        stage.backend.write_all(&crates).unwrap();
        stage.frontend_gets(&message(FrontendReq::GET_MAX_MEM_SLOTS, REPLY, &u64s(&[3])));
        drop(stage.backend.shutdown(Shutdown::Both));
        assert_eq!(stage.ends(), End::Backend);
    });
}

#[test]
fn a_message_waits_for_the_reply_before_it() {
    stage(|mut stage| {
        let ask = message(FrontendReq::GET_QUEUE_NUM, 0, &[]);
        let refused = message(FrontendReq::SET_DEVICE_STATE_FD, 0, &[0; 8]);
        stage.sends(&[ask.clone(), refused].concat(), &[]);
        stage.backend_gets(&ask);
        stage.backend.set_nonblocking(true).unwrap();
        let error = stage.backend.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let reply = message(FrontendReq::GET_QUEUE_NUM, REPLY, &u64s(&[2]));
        stage.backend.write_all(&reply).unwrap();
        stage.frontend_gets(&reply);
        let told = message(FrontendReq::SET_DEVICE_STATE_FD, REPLY, &u64s(&[0x101]));
        stage.frontend_gets(&told);
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn a_message_in_pieces_is_passed_on_as_one_with_its_descriptor() {
    stage(|mut stage| {
        let call = event();
        let bytes = message(FrontendReq::SET_VRING_CALL, 0, &u64s(&[1]));
        stage.sends(&bytes[..1], &[call.as_fd()]);
        for piece in bytes[1..].chunks(5) {
            stage.sends(piece, &[]);
        }
        stage.backend_gets(&bytes);
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn descriptors_beyond_those_of_one_message_are_closed_at_once() {
    stage(|mut stage| {
        stage.negotiate();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let bytes = message(FrontendReq::SET_MEM_TABLE, NEED_REPLY, &[0; 64]);
        let many = vec![writer.as_fd(); 32];
        // 32 with each byte but the last.
        let (last, all) = bytes.split_last().unwrap();
        for byte in all {
            stage.sends(std::slice::from_ref(byte), &many);
        }
        stage.sends(std::slice::from_ref(last), &[]);
        stage.frontend_gets(&message(FrontendReq::SET_MEM_TABLE, REPLY, &u64s(&[1])));
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "one is still open");
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn what_a_frontend_sent_before_it_left_is_passed_on_and_what_holds_it_is_released() {
    stage(|mut stage| {
        let ask = message(FrontendReq::GET_QUEUE_NUM, 0, &[]);
        let last = message(FrontendReq::RESET_DEVICE, 0, &[]);
        stage.sends(&[ask.clone(), last.clone()].concat(), &[]);
        stage.backend_gets(&ask);
        drop(std::mem::replace(&mut stage.frontend, event_stream()));
        // The door sees that the frontend is gone while the backend owes a reply.
        let began = std::time::Instant::now();
        while !stage.session.released.load(Ordering::Acquire) {
            assert!(began.elapsed() < DEADLINE);
            std::thread::yield_now();
        }
        let reply = message(FrontendReq::GET_QUEUE_NUM, REPLY, &[0; 8]);
        stage.backend.write_all(&reply).unwrap();
        stage.backend_gets(&last);
        assert_eq!(stage.ends(), End::Frontend);
    });
}

/// A socket that is connected to nothing of the stage.
fn event_stream() -> UnixStream {
    UnixStream::pair().unwrap().0
}

#[test]
fn a_frontend_that_is_gone_is_not_waited_for_however_long_the_backend_takes() {
    stage_within(2 * DEADLINE, SHORT, |mut stage| {
        let ask = message(FrontendReq::GET_QUEUE_NUM, 0, &[]);
        stage.sends(&ask, &[]);
        stage.backend_gets(&ask);
        drop(std::mem::replace(&mut stage.frontend, event_stream()));
        assert_eq!(stage.ends(), End::Frontend);
    });
}

#[test]
fn a_message_that_is_not_finished_ends_the_connection_by_itself() {
    for sent in [5, 12, 19] {
        stage_within(SHORT, 2 * DEADLINE, |stage| {
            let bytes = message(FrontendReq::SET_FEATURES, 0, &[0; 8]);
            stage.sends(&bytes[..sent], &[]);
            let end = stage.ends();
            assert!(refusal(&end).contains("1 s have passed"), "{end:?}");
        });
    }
    stage(|stage| {
        let bytes = message(FrontendReq::SET_FEATURES, 0, &[0; 8]);
        stage.sends(&bytes[..19], &[]);
        drop(stage.frontend.shutdown(Shutdown::Write));
        assert_eq!(
            refusal(&stage.ends()),
            "a message is not finished (SET_FEATURES, 19 of 20 bytes): the frontend left it; send \
             each message at once"
        );
    });
}

#[test]
fn something_that_is_no_message_ends_the_connection() {
    let long = u32::try_from(MAX_MSG_SIZE + 1).unwrap();
    for words in [[0, 1, 0], [99, 1, 0], [1, 2, 0], [1, 0x11, 0], [1, 1, long]] {
        stage(|stage| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            stage.sends(&bytes, &[]);
            refusal(&stage.ends());
        });
    }
}

#[test]
fn a_fault_of_the_session_ends_the_connection_when_the_bell_rings() {
    stage(|stage| {
        // Rung for nothing.
        stage.session.bell.ring();
        let fault = Refusal("it broke".to_owned());
        *lock(&stage.session.fault) = Some(fault.clone());
        stage.session.bell.ring();
        assert_eq!(stage.ends(), End::Refused(fault));
    });
}
