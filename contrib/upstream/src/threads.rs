//! Workers and the request thread, and how they end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::backend::{Device, Served, WORKER, comes_true, daemon, threads};

/// Dropping a daemon whose backend has no exit event, the default, waits forever.
pub(crate) fn drop_hangs() -> bool {
    let device = Device {
        no_exit_event: true,
        ..Device::default()
    };
    let (_, daemon) = daemon(&Arc::new(device));
    println!("  a daemon without exit events is dropped");
    drop(daemon.expect("a daemon"));
    println!("  it is gone");
    false
}

/// What was made of a daemon when `new` fails is left behind.
pub(crate) fn half_made() -> bool {
    let device = Device {
        fails_half_way: true,
        ..Device::default()
    };
    let (_, daemon) = daemon(&Arc::new(device));
    let error = daemon.err();
    println!("  a daemon with two workers, without descriptors for the second: {error:?}");
    // A daemon that cleans up joins its worker before `new` returns.
    let tasks = tasks();
    println!("  threads of the process, the main one included: {tasks}");
    error.is_some() && tasks == 2
}

/// How many threads this process has; no descriptor is needed for it.
fn tasks() -> u64 {
    let task = fs::metadata("/proc/self/task").expect("/proc");
    // A folder has two links, and one of each folder in it.
    task.nlink() - 2
}

/// Every daemon leaves a descriptor of its exit event behind.
pub(crate) fn exit_event_leak() -> bool {
    const DAEMONS: usize = 10;
    let descriptors = || fs::read_dir("/proc/self/fd").expect("/proc").count();
    let before = descriptors();
    for _ in 0..DAEMONS {
        drop(daemon(&Arc::new(Device::default())).1.expect("a daemon"));
    }
    let left = descriptors() - before;
    println!("  daemons made and dropped: {DAEMONS}; descriptors left behind: {left}");
    left == DAEMONS
}

/// A panic in a callback leaves the frontend waiting on a connection that looks alive.
pub(crate) fn panic_hangs() -> bool {
    let served = Served::new(Device {
        panics: true,
        ..Device::default()
    });
    assert!(comes_true(|| threads("requests") == 1));
    let mut frontend = served.frontend;
    let asks = std::thread::spawn(move || {
        let answer = frontend.get_config(0, 4, VhostUserConfigFlags::empty(), &[0; 4]);
        answer.map(|_| ())
    });
    let ended = comes_true(|| threads("requests") == 0);
    println!("  get_config panics; the request thread ended: {ended}");
    let mut ends = [PollFd::new(&served.stream, PollFlags::IN)];
    let readable = poll(&mut ends, Some(&Default::default())).expect("poll");
    println!(
        "  the frontend's socket has an answer or its end: {}",
        readable != 0
    );
    let waits = !asks.is_finished();
    println!(
        "  the frontend waits: {waits}; workers still there: {}",
        threads(WORKER)
    );
    ended && readable == 0 && waits
}
