//! The model as a device: its host counter turned by hand, its answers in the queues' order.

use std::collections::VecDeque;

use vhost_user_timer_kit::contract::Queues;
use vhost_user_timer_kit::raw_driver::{Layout, POISON, Used};
use vhost_user_timer_model::vm::{
    Effects, Handled, Incoming, Notice, Now, PageOrder, Profile, Token, Vm,
};
use vhost_user_timer_protocol::CounterSource;
use zerocopy::IntoBytes;

use super::{Device, HZ, Options, REQUEST_QUEUES};

/// Host counter and CLOCK_MONOTONIC when a scenario begins.
const START: u64 = 5 * HZ;

/// CLOCK_REALTIME when a scenario begins, ns.
const REALTIME: u64 = 1_800_000_000 * HZ;

/// A request, or a buffer for an event, that was not given back yet.
#[derive(Clone, Debug)]
struct Chain {
    head: u16,
    room: usize,
}

/// The model, and what a shell keeps for it.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) vm: Vm,
    pub(crate) effects: Effects,
    host: u64,
    monotonic: u64,
    realtime: u64,
    next_head: u16,
    /// WAIT_RUNs that wait.
    held: Vec<Chain>,
    /// Buffers for events.
    buffers: VecDeque<Chain>,
    /// By queue, what was given back.
    used: Vec<VecDeque<Used>>,
    page_at: Option<u64>,
}

fn used(chain: &Chain, bytes: &[u8]) -> Used {
    assert!(bytes.len() <= chain.room, "more than there was room for");
    let mut writable = bytes.to_vec();
    writable.resize(chain.room, POISON);
    Used {
        head: chain.head,
        len: bytes.len() as u32,
        writable,
    }
}

impl Model {
    pub(super) fn new(options: Options) -> Self {
        let profile = Profile {
            max_vcpus: options.max_vcpus,
            request_queues: REQUEST_QUEUES,
            frequency: options.frequency.unwrap_or(HZ),
            frequency_fixed: options.frequency.is_some(),
            source: CounterSource::Monotonic,
        };
        let queues = usize::from(REQUEST_QUEUES) + 1;
        Model {
            vm: Vm::new(profile),
            effects: Effects::default(),
            host: START,
            monotonic: START,
            realtime: REALTIME,
            next_head: 0,
            held: Vec::new(),
            buffers: VecDeque::new(),
            used: (0..queues).map(|_| VecDeque::new()).collect(),
            page_at: None,
        }
    }

    /// This instant.
    pub(crate) fn now(&self) -> Now {
        let host = match self.vm.anchor() {
            None => self.host,
            Some(anchor) => anchor.host(self.monotonic, self.vm.frequency()),
        };
        Now {
            host,
            realtime_ns: self.realtime,
        }
    }

    /// Time passes, and the VM does not notice before its next call.
    pub(crate) fn drift(&mut self, ticks: u64) {
        self.host = self.host.wrapping_add(ticks);
        let ns = u128::from(ticks) * u128::from(HZ) / u128::from(self.vm.frequency());
        self.monotonic = self.monotonic.wrapping_add(ns as u64);
        self.realtime = self.realtime.wrapping_add(ns as u64);
    }

    /// Ticks to the next instant at which the VM wants to be called.
    pub(crate) fn ticks_to_next(&self) -> Option<u64> {
        self.vm.ticks_to_next(self.now())
    }

    /// What was to be logged since the last call.
    pub(crate) fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.effects.notices)
    }

    fn take_chain(&mut self, room: usize) -> Chain {
        let head = self.next_head;
        self.next_head = self.next_head.wrapping_add(1);
        Chain { head, room }
    }

    /// Carries out what the last call brought, as the shell does.
    fn carry_out(&mut self) {
        for released in std::mem::take(&mut self.effects.released) {
            let mut bytes = released.header.as_bytes().to_vec();
            bytes.extend(released.run.iter().flat_map(|run| run.as_bytes()));
            for Token { queue, head } in released.waiters {
                let at = self.held.iter().position(|chain| chain.head == head);
                let chain = self.held.swap_remove(at.expect("a chain that is held"));
                self.used[usize::from(queue)].push_back(used(&chain, &bytes));
            }
        }
        let now = self.now();
        while !self.buffers.is_empty()
            && let Some(event) = self.vm.next_event(now)
        {
            let buffer = self.buffers.pop_front().expect("a buffer");
            self.used[0].push_back(used(&buffer, event.as_bytes()));
        }
    }
}

impl Queues for Model {
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, _layout: &Layout) -> u16 {
        let chain = self.take_chain(room);
        let head = chain.head;
        if queue == 0 {
            assert!(room >= 32, "the model is given events' buffers only");
            self.buffers.push_back(chain);
        } else {
            assert!(room >= 16, "the model is given what can be answered only");
            let call = Incoming::parse(request, room, Token { queue, head });
            match self.vm.handle(self.now(), &call, &mut self.effects) {
                Handled::Answered => {
                    let answer = used(&chain, &self.effects.response);
                    self.carry_out();
                    self.used[usize::from(queue)].push_back(answer);
                }
                Handled::Waiting => self.held.push(chain),
            }
            match self.effects.page.take() {
                Some(PageOrder::WriteAt { address, .. }) => self.page_at = Some(address),
                Some(PageOrder::Stop) => self.page_at = None,
                None => {}
            }
        }
        self.carry_out();
        head
    }

    fn used(&mut self, queue: u16) -> Used {
        loop {
            if let Some(used) = self.used_already(queue) {
                return used;
            }
            let ticks = self.ticks_to_next();
            self.pass(ticks.expect("nothing was given back, and time alone changes nothing"));
        }
    }

    fn used_already(&mut self, queue: u16) -> Option<Used> {
        self.used[usize::from(queue)].pop_front()
    }
}

impl Device for Model {
    fn pass(&mut self, ticks: u64) {
        self.drift(ticks);
        self.vm.advance(self.now(), &mut self.effects);
        self.carry_out();
    }

    fn reset(&mut self) {
        self.vm.reset(&mut self.effects);
        self.reconnect();
    }

    fn reconnect(&mut self) {
        self.vm.disconnect(self.now());
        self.held.clear();
        self.buffers.clear();
        self.used.iter_mut().for_each(VecDeque::clear);
        self.page_at = None;
    }

    fn stop(&mut self, queue: u16) {
        if queue == 0 {
            self.buffers.clear();
        } else {
            self.vm.cancel_queue(queue, &mut self.effects);
            self.carry_out();
        }
    }

    fn start(&mut self, queue: u16) {
        self.used[usize::from(queue)].clear();
    }

    fn page(&mut self, address: u64) -> Vec<u8> {
        assert_eq!(self.page_at, Some(address), "the page was named");
        self.vm.time_page().as_bytes().to_vec()
    }

    fn monotonic(&self) -> u64 {
        self.monotonic
    }

    fn realtime(&self) -> u64 {
        self.realtime
    }

    fn model(&mut self) -> Option<&mut Model> {
        Some(self)
    }
}
