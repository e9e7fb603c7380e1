//! The couriers of one core, as its ring thread has them: beside the engine, on the same driver, between the same two waits.
//!
//! ```text
//!   orders, notices ---turn----> couriers              queue of the core --dispatch--> idle courier, last in first out
//!   completions ------handle---> courier of that channel --answers--> engine, or a neighbour's
//! ```
//!
//! A channel to a worker is a socket like a client's: [`Op::Recv`] and [`Op::Send`] under a token of its own kind
//! ([`Token::CHANNELS`]). So a request costs no thread between the ring and the worker, and no wake-up but theirs.
//!
//! The rules of the ring thread hold here: nothing waits, the time is that of the turn. The exceptions are system calls that
//! cannot wait and that no ordinary request needs: descriptors of bodies in files, and the page of a worker that is late.

use std::{
    mem,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use crossbeam_channel::{Receiver, Sender, unbounded};
use slab::Slab;

use super::{
    courier::Courier,
    worker::{Link, Order, RequestId, Shared},
};
use crate::{
    driver::{Completion, Op, Shutdown, Token, waker::Waker},
    exchange::Micros,
    handler::Response,
    pool::{Answer, Errand, HOP},
    stream::{Credit, Notice},
};

/// What the couriers of a core are told: which of them, and what.
pub type Mail = (u32, Order);

/// What a ring thread begins with.
pub struct Mailbox {
    pub shared: Arc<Shared>,
    pub mail: Receiver<Mail>,
}

pub struct Dispatch {
    core: Core,
    mail: Receiver<Mail>,
    notices: Receiver<(usize, u32, Notice)>,
    couriers: Slab<Courier>,
    abroad: Vec<(usize, Answer)>,
}

/// What a courier needs of its ring thread.
pub(super) struct Core {
    pub shared: Arc<Shared>,
    pub index: usize,
    /// The time of this turn.
    pub now: Micros,
    pub ops: Vec<Op>,
    pub answers: Vec<(usize, Answer)>,
    waker: Waker,
    notices_in: Sender<(usize, u32, Notice)>,
    channels: Slab<Owner>,
    opened: u32,
    /// Couriers that wait for requests; the last one was busy last.
    idle: Vec<usize>,
    /// When they have to be looked at.
    look_at: Option<Micros>,
}

/// Who hears what is said on a channel.
enum Owner {
    Courier(usize),
    /// Nobody: it is closed once nothing of it is in flight.
    Nobody(Wire),
}

/// A channel, and what of it is in flight.
pub(super) struct Wire {
    pub link: Link,
    pub token: Token,
    pub receiving: bool,
    pub stopping: bool,
    pub sending: bool,
}

impl Wire {
    pub fn fd(&self) -> RawFd {
        self.link.channel.data.as_raw_fd()
    }

    fn index(&self) -> usize {
        (self.token.slot - Token::CHANNELS) as usize
    }

    fn is_quiet(&self) -> bool {
        !self.receiving && !self.sending
    }
}

impl Dispatch {
    pub fn new(Mailbox { shared, mail }: Mailbox, index: usize, waker: Waker) -> Dispatch {
        let (notices_in, notices) = unbounded();
        let core = Core {
            shared,
            index,
            now: 0,
            ops: Vec::new(),
            answers: Vec::new(),
            waker,
            notices_in,
            channels: Slab::new(),
            opened: 0,
            idle: Vec::new(),
            look_at: None,
        };
        Dispatch { core, mail, notices, couriers: Slab::new(), abroad: Vec::new() }
    }

    /// What the driver is to do.
    pub fn ops(&mut self) -> impl Iterator<Item = Op> + '_ {
        self.core.ops.drain(..)
    }

    /// Hands out the answers for this core, and sends the others to theirs.
    pub fn answers(&mut self, mut each: impl FnMut(Answer)) {
        for (home, answer) in self.core.answers.drain(..) {
            if home == self.core.index { each(answer) } else { self.abroad.push((home, answer)) }
        }
        if !self.abroad.is_empty() {
            self.core.shared.pools.send_home(&mut self.abroad);
        }
    }

    /// Takes up what others have said, and what is due.
    pub fn turn(&mut self, now: Micros) {
        self.core.now = now;
        while let Ok((key, id, notice)) = self.notices.try_recv() {
            if let Some(courier) = self.couriers.get_mut(key) {
                courier.take_notice(id, notice, &mut self.core);
            }
        }
        while let Ok((number, order)) = self.mail.try_recv() {
            self.tell(number, order);
        }
        if self.core.look_at.is_some_and(|at| at <= now) {
            self.look();
        }
    }

    fn tell(&mut self, number: u32, order: Order) {
        let key = match self.couriers.iter().find(|(_, courier)| courier.number == number) {
            Some((key, _)) => key,
            None => {
                let key = self.couriers.vacant_key();
                self.couriers.insert(Courier::new(key, number, RequestId::new(self.core.shared.start, number)))
            }
        };
        self.couriers[key].tell(order, &mut self.core);
        self.sweep();
    }

    /// Forgets couriers that were stopped.
    fn sweep(&mut self) {
        self.couriers.retain(|_, courier| !courier.is_stopped());
    }

    fn look(&mut self) {
        self.core.look_at = None;
        for (_, courier) in &mut self.couriers {
            courier.look(&mut self.core);
        }
        self.sweep();
        if self.oldest_batch().is_some_and(|begun| self.core.now >= begun + HOP) {
            // What waits may as well be served elsewhere.
            self.core.shared.pools.set_pace(self.core.index, HOP);
        }
    }

    fn oldest_batch(&self) -> Option<Micros> {
        self.couriers.iter().filter_map(|(_, courier)| courier.begun()).min()
    }

    /// Gives the requests that wait to couriers that wait.
    pub fn dispatch(&mut self) {
        let core = &mut self.core;
        while !core.idle.is_empty() {
            let Some(errand) = core.shared.pools.errand_now(core.index) else { break };
            let Some(key) = core.idle.pop() else { break };
            core.shared.pools.change_idle(core.index, -1);
            self.couriers[key].start(errand, core);
        }
        // Waiting for the own workers is quicker than a neighbour's, unless they are slower this time than the last.
        if core.shared.pools.keeps_waiting(core.index)
            && let Some(begun) = self.oldest_batch()
        {
            self.core.look_by(begun + HOP);
        }
    }

    /// Something has come since the last turn, and nothing would say so again.
    pub fn has_news(&self) -> bool {
        let core = &self.core;
        !self.mail.is_empty()
            || !self.notices.is_empty()
            || !core.answers.is_empty()
            || !core.ops.is_empty()
            || !core.idle.is_empty() && core.shared.pools.may_take(core.index)
    }

    pub fn next_deadline(&self) -> Option<Micros> {
        self.core.look_at
    }

    /// Every worker is at more than one request: whatever comes now can wait until one of them pauses.
    pub fn is_saturated(&self) -> bool {
        self.core.idle.is_empty() && self.couriers.iter().any(|(_, courier)| courier.has_batch())
    }

    pub fn handle(&mut self, completion: Completion<'_>, now: Micros) {
        self.core.now = now;
        let token = match &completion {
            Completion::Received { token, .. } | Completion::RecvEnded { token, .. } | Completion::Sent { token, .. } => *token,
            Completion::Accepted { .. } | Completion::AcceptEnded { .. } => return,
        };
        let index = (token.slot - Token::CHANNELS) as usize;
        match self.core.channels.get_mut(index) {
            Some(Owner::Courier(key)) => {
                let key = *key;
                self.couriers[key].handle(completion, &mut self.core);
            }
            Some(Owner::Nobody(wire)) => {
                match completion {
                    Completion::RecvEnded { .. } => wire.receiving = false,
                    Completion::Sent { .. } => wire.sending = false,
                    _ => {}
                }
                if wire.is_quiet() {
                    self.core.forget(index);
                }
            }
            None => unreachable!("a channel is forgotten only when nothing of it is in flight"),
        }
    }

    /// Lets go of every worker.
    pub fn wind_up(&mut self, now: Micros) {
        self.core.now = now;
        for (_, courier) in &mut self.couriers {
            courier.stop(&mut self.core);
        }
        self.sweep();
    }

    /// Nothing is in flight in the kernel.
    pub fn is_quiet(&self) -> bool {
        self.core.channels.is_empty()
    }
}

impl Core {
    /// The next look is not later than this.
    pub fn look_by(&mut self, at: Micros) {
        self.look_at = Some(self.look_at.map_or(at, |before| before.min(at)));
    }

    pub fn send_home(&mut self, mut errand: Errand, response: Option<Response>) {
        errand.exchange.response = response;
        self.answers.push((errand.home, Answer::Response(errand.exchange)));
    }

    /// Credit for the body of the answer to request `id`, whose notices come to the courier `key`.
    pub fn credit(&self, key: usize, id: u32) -> Arc<Credit> {
        let (notices, waker) = (self.notices_in.clone(), self.waker.clone());
        Arc::new(Credit::told(move |notice| {
            // The receiver may have ended, and then nobody has to know.
            let _ = notices.send((key, id, notice));
            waker.wake();
        }))
    }

    pub fn change_idle(&mut self, key: usize, idle: bool) {
        if idle {
            self.idle.push(key);
        } else {
            self.idle.retain(|other| *other != key);
        }
        self.shared.pools.change_idle(self.index, if idle { 1 } else { -1 });
    }

    /// Begins to receive from a worker. `None`: its channel is of no use.
    pub fn open(&mut self, key: usize, link: Link) -> Option<Wire> {
        link.channel.descriptors.set_nonblocking(true).ok()?;
        self.opened = self.opened.wrapping_add(1);
        let slot = Token::CHANNELS + self.channels.insert(Owner::Courier(key)) as u32;
        let token = Token { slot, generation: self.opened & Token::GENERATION_MASK };
        let mut wire = Wire { link, token, receiving: false, stopping: false, sending: false };
        self.receive(&mut wire);
        self.shared.pools.change_able(self.index, 1);
        Some(wire)
    }

    pub fn receive(&mut self, wire: &mut Wire) {
        if !mem::replace(&mut wire.receiving, true) {
            self.ops.push(Op::Recv { token: wire.token, fd: wire.fd() });
        }
    }

    pub fn stop_receiving(&mut self, wire: &mut Wire) {
        if wire.receiving && !mem::replace(&mut wire.stopping, true) {
            self.ops.push(Op::RecvStop { token: wire.token, fd: wire.fd() });
        }
    }

    /// Ends what is in flight.
    pub fn shut_down(&mut self, wire: &mut Wire) {
        self.ops.push(Op::Shutdown { fd: wire.fd(), how: Shutdown::Both });
        self.stop_receiving(wire);
    }

    /// The worker is given nothing more on this channel, which is closed as soon as it can be.
    pub fn close(&mut self, mut wire: Wire) {
        let (index, is_quiet) = (wire.index(), wire.is_quiet());
        if !is_quiet {
            self.shut_down(&mut wire);
        }
        self.channels[index] = Owner::Nobody(wire);
        if is_quiet {
            self.forget(index);
        }
    }

    /// Closes a channel of which nothing is in flight. What was still to be done to its descriptor would be done to the next
    /// owner of the number.
    fn forget(&mut self, index: usize) {
        if let Owner::Nobody(wire) = self.channels.remove(index) {
            let fd = wire.fd();
            self.ops.retain(|op| !matches!(op, Op::Shutdown { fd: of, .. } | Op::RecvStop { fd: of, .. } if *of == fd));
        }
    }
}

#[cfg(test)]
mod tests;
