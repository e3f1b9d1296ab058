//! One thread with an epoll instance of its own serves requests, events, and the connection:
//!
//! ```sh
//! vhost-user-timer --socket-path /tmp/a.sock &
//! cargo run --example event_loop /tmp/a.sock
//! ```
//!
//! It arms the virtual timer of vCPU 0, waits for it to expire, and never blocks but in epoll.

use std::error::Error;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use vhost_user_timer_frontend::{
    Abi, Event, Frontend, Operation, Options, Phase, RegValue, Register, RequestQueue, Run,
    SetRegs, Ticket,
};

const SECOND: Duration = Duration::from_secs(1);

/// What the epoll instance reports of each descriptor.
const ANSWERS: u64 = 0;
const EVENTS: u64 = 1;
const CONNECTION: u64 = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: event_loop SOCKET")?;
    let mut frontend = Frontend::connect(path.as_str(), Options::default())?;
    let mut events = frontend.take_events().ok_or("the events are taken")?;
    let queue = frontend.queue();

    // Before the loop a thread may block.
    if queue.info(SECOND)?.phase == Phase::New {
        queue.configure(1, Abi::Arm64, None, SECOND)?;
    }
    let frequency = queue.info(SECOND)?.frequency;

    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |fd, what, flags| epoll::add(&epoll, fd, EventData::new_u64(what), flags);
    watch(queue.as_fd(), ANSWERS, EventFlags::IN)?;
    watch(events.as_fd(), EVENTS, EventFlags::IN)?;
    watch(frontend.as_fd(), CONNECTION, EventFlags::RDHUP)?;

    let mut resumed: Option<Ticket<Run>> = Some(queue.submit(&Operation::resume())?);
    let mut armed: Option<Ticket<SetRegs>> = None;
    loop {
        // Before it sleeps: sends what was submitted, and has the descriptor report answers.
        queue.process()?;
        if let Some(ticket) = &mut resumed
            && let Some(run) = ticket.try_wait()?
        {
            resumed = None;
            println!("the VM runs from virtual count {}", run.virt_count);
            armed = Some(arm(queue, run.virt_count + frequency / 20)?);
            continue;
        }
        if let Some(ticket) = &mut armed
            && let Some(set) = ticket.try_wait()?
        {
            armed = None;
            if set.virtual_line {
                // Due by now: the answer says so, and no event will.
                println!("the timer of vCPU 0 expired at once");
                return Ok(frontend.close()?);
            }
            println!("the timer of vCPU 0 is armed, 50 ms ahead");
        }
        while let Some(event) = events.try_next()? {
            match event {
                Event::TimerAsserted {
                    vcpu, count, cval, ..
                } => {
                    println!(
                        "vCPU {vcpu}: the timer expired, {} ticks late",
                        count - cval
                    );
                    // The VMM raises the interrupt. Here it is the end.
                    return Ok(frontend.close()?);
                }
                Event::PhaseChanged { phase, .. } => println!("the VM is {phase}"),
                other => println!("{other:?}"),
            }
        }

        let mut ready = [const { MaybeUninit::uninit() }; 4];
        let (ready, _) = epoll::wait(&epoll, &mut ready, None)?;
        if ready.iter().any(|event| event.data.u64() == CONNECTION) {
            return Err("the backend is gone".into());
        }
    }
}

/// Asks for the virtual timer of vCPU 0 to expire at this count.
fn arm(
    queue: &RequestQueue,
    cval: u64,
) -> Result<Ticket<SetRegs>, vhost_user_timer_frontend::Error> {
    const ENABLE: u64 = 1;
    let values = [
        RegValue::new(Register::TimerCval.id(Abi::Arm64), cval),
        RegValue::new(Register::TimerCtl.id(Abi::Arm64), ENABLE),
    ];
    queue.submit(&Operation::set_regs(0, &values))
}
