//! Both sides at once.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::driver::pair;
use super::*;

/// Sleeps until the other side has written to the descriptor.
fn sleep(fd: impl AsFd) {
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let ready = poll(&mut fds, Some(&limit)).unwrap();
    assert_eq!(ready, 1, "a notification was lost");
    rustix::io::read(&fd, &mut [0; 8]).unwrap();
}

#[test]
fn neither_side_sleeps_while_the_other_has_something_for_it() {
    const SIZE: u16 = 8;
    const ROUNDS: usize = 20_000;
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(SIZE, event_idx, 60_000);
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut served = 0;
                while served < ROUNDS {
                    served += device.serve_all(WhenIdle::AskForKick).len();
                    if served < ROUNDS {
                        sleep(&kick);
                    }
                }
            });
            let mut free: Vec<u16> = (0..SIZE).collect();
            let (mut sent, mut got) = (0, 0);
            let shared = driver.shared.clone();
            while got < ROUNDS {
                // Batches of one to all, so that both sides sleep and overtake each other.
                let batch = (1 + sent % usize::from(SIZE))
                    .min(free.len())
                    .min(ROUNDS - sent);
                let heads: Vec<u16> = free.drain(..batch).collect();
                sent += batch;
                let old = driver.next_avail;
                driver.offer(&heads);
                fence(Ordering::SeqCst);
                let event = shared.avail_event();
                let wanted = match event_idx {
                    true => (0..batch as u16).any(|n| old.wrapping_add(n) == event),
                    false => shared.used_flags() & NO_NOTIFY == 0,
                };
                if wanted && batch != 0 {
                    rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
                }
                loop {
                    let used = driver.used();
                    if !used.is_empty() {
                        got += used.len();
                        free.extend(used.iter().map(|(head, _)| *head as u16));
                        break;
                    }
                    shared.set_avail_flags(0);
                    shared.set_used_event(60_000_u16.wrapping_add(got as u16));
                    fence(Ordering::SeqCst);
                    if shared.used_idx() == 60_000_u16.wrapping_add(got as u16) {
                        sleep(&driver.call);
                    }
                }
                // Not before it sleeps.
                shared.set_avail_flags(NO_INTERRUPT);
            }
        });
    }
}
