//! The stream of events.

use crate::LONG;
use crate::SHORT;
use crate::fake::Fake;
use crate::fake::echo;
use crate::fake::pair;
use crate::operations::echo_pair;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::poll;
use vhost_user_timer_frontend::Error;
use vhost_user_timer_frontend::Event;
use vhost_user_timer_frontend::Fault;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::Timer;
use vhost_user_timer_protocol::wire;
use zerocopy::IntoBytes;

fn timer_event(vcpu: u32) -> wire::Event {
    wire::Event {
        kind: wire::EVENT_TIMER_ASSERTED.into(),
        timer: wire::TIMER_PHYSICAL.into(),
        vcpu: vcpu.into(),
        cval: 5.into(),
        count: 6.into(),
        epoch: 7.into(),
    }
}

#[test]
fn events_come_in_order_and_their_buffers_go_back() {
    let mut pair = pair(
        Fake::new(|request| Some(echo(request))),
        Options::default().event_buffers(4),
    );
    let mut events = pair.frontend.take_events().unwrap();
    assert_eq!(events.try_next().unwrap(), None);
    assert!(matches!(events.next(SHORT), Err(Error::TimedOut { .. })));
    let fake = &pair.fake;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for vcpu in 0..3000 {
                while !fake.emit(timer_event(vcpu).as_bytes()) {
                    std::thread::yield_now();
                }
            }
        });
        for vcpu in 0..3000 {
            let event = Event::TimerAsserted {
                vcpu,
                timer: Timer::Physical,
                cval: 5,
                count: 6,
                epoch: 7,
            };
            assert_eq!(events.next(LONG).unwrap(), event);
        }
    });

    assert_eq!(events.try_next().unwrap(), None);
    let mut phase = timer_event(Phase::Running.code());
    phase.kind = wire::EVENT_PHASE_CHANGED.into();
    let mut no_phase = phase;
    no_phase.vcpu = 77.into();
    let mut no_timer = timer_event(1);
    no_timer.timer = 2.into();
    let mut no_kind = timer_event(1);
    no_kind.kind = 9.into();
    for event in [phase, no_phase, no_timer, no_kind] {
        assert!(fake.emit(event.as_bytes()));
        let mut fds = [PollFd::new(&events, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&LONG.try_into().unwrap())), Ok(1));
        let got = events.try_next().unwrap().unwrap();
        let known = Event::PhaseChanged {
            phase: Phase::Running,
            count: 6,
            epoch: 7,
        };
        let unknown = Event::Unknown {
            kind: event.kind.get(),
            bytes: event.as_bytes().try_into().unwrap(),
        };
        assert_eq!(got, if event == phase { known } else { unknown });
        assert_eq!(events.try_next().unwrap(), None);
    }

    assert!(fake.emit(&timer_event(0).as_bytes()[..31]));
    let fault = Fault::EventLength { len: 31 };
    for _ in 0..2 {
        match events.next(LONG) {
            Err(Error::Protocol {
                queue: 0,
                fault: is,
            }) => assert_eq!(is, fault),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn events_that_came_before_the_backend_died_are_still_read() {
    let mut pair = echo_pair();
    let mut events = pair.frontend.take_events().unwrap();
    for vcpu in 0..3 {
        assert!(pair.fake.emit(timer_event(vcpu).as_bytes()));
    }
    pair.backend.shutdown();
    for _ in 0..3 {
        assert!(matches!(events.next(LONG), Ok(Event::TimerAsserted { .. })));
    }
    assert!(matches!(events.next(LONG), Err(Error::Disconnected)));
}
