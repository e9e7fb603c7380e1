//! The simulated kernel: holds what is in flight, and lets it end in any order that a real one could.
//!
//! A descriptor that is closed goes to the next connection at once, as accept(2) does it. So an
//! engine that closes too early talks to a stranger here as well, and is seen doing it.

use std::{
    collections::{HashSet, VecDeque},
    os::fd::RawFd,
};

use super::{Check, Checker, Faults, Rules, Scene, Violation, client::Client, violation};
use crate::{
    driver::{Chunk, Completion, ListenerIndex, Op, Peer, RecvEnd, Shutdown, Token},
    exchange::Micros,
};

/// Receive buffers have this size (`driver/uring.rs`).
const BUFFER_BYTES: usize = 4096;
const FD_FIRST: RawFd = 10;

pub struct SimKernel {
    listeners: Vec<Listener>,
    /// Accepted connections, by descriptor from [`FD_FIRST`] on.
    sockets: Vec<Option<Socket>>,
    /// Every token that was ever used: none may come back within one run.
    tokens: HashSet<Token>,
    /// Receives that the engine stopped.
    pub stops: u64,
}

#[derive(Default)]
struct Listener {
    in_flight: bool,
    stopping: bool,
    /// Clients that have connected and were not accepted yet.
    queue: VecDeque<usize>,
}

struct Socket {
    client: usize,
    token: Option<Token>,
    recv: Option<Recv>,
    send: Option<Send>,
    /// The engine was told that nothing more will come.
    eof_told: bool,
    shut_write: bool,
    shut_both: bool,
}

#[derive(Default)]
struct Recv {
    stopping: bool,
}

struct Send {
    chunk: Chunk,
    /// Bytes that the peer's side has taken.
    taken: usize,
}

/// Something that can happen next.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    Accept(ListenerIndex),
    AcceptEnd(ListenerIndex, i32),
    Receive(RawFd),
    RecvEnd(RawFd, RecvEnd),
    /// The peer takes bytes; the send is over when it has taken all.
    Take(RawFd),
    /// The send is over although bytes of it are left.
    SendShort(RawFd),
    SendFail(RawFd, i32),
}

/// A completion that owns what the driver would lend.
pub enum Delivered {
    Received(Token, Vec<u8>),
    Other(Completion<'static>),
    /// Nothing to report yet.
    Nothing,
}

impl SimKernel {
    pub fn new(listeners: usize) -> SimKernel {
        SimKernel {
            listeners: (0..listeners).map(|_| Listener::default()).collect(),
            sockets: Vec::new(),
            tokens: HashSet::new(),
            stops: 0,
        }
    }

    pub fn connect(&mut self, listener: ListenerIndex, client: usize) {
        self.listeners[usize::from(listener)].queue.push_back(client);
    }

    /// Takes an operation, and refuses what a real kernel would take amiss or, worse, would not notice.
    pub fn push(&mut self, op: Op, clients: &mut [Client], scene: &Scene) -> Check {
        let (rules, now) = (&scene.rules, scene.now);
        match op {
            Op::Accept { listener } => {
                let listener = &mut self.listeners[usize::from(listener)];
                if listener.in_flight {
                    return violation(Checker::TwoInFlight, "a second accept on one listener");
                }
                *listener = Listener { in_flight: true, stopping: false, queue: std::mem::take(&mut listener.queue) };
            }
            // It may find nothing any more: the accept ended meanwhile.
            Op::AcceptStop { listener } => self.listeners[usize::from(listener)].stopping = true,
            Op::Recv { token, fd } => {
                let socket = self.adopt(token, fd)?;
                if socket.recv.is_some() {
                    return violation(Checker::TwoInFlight, format!("a second receive on {fd}"));
                }
                if socket.eof_told || socket.shut_both {
                    return violation(Checker::AfterEnd, format!("a receive on {fd} after its end"));
                }
                socket.recv = Some(Recv::default());
                clients[socket.client].listened_to(now);
            }
            // It may find nothing any more, like an AcceptStop.
            Op::RecvStop { token, fd } => {
                self.stops += 1;
                if let Some(recv) = &mut self.adopt(token, fd)?.recv {
                    recv.stopping = true;
                }
            }
            Op::Send { token, fd, chunk } => {
                let socket = self.adopt(token, fd)?;
                if socket.send.is_some() {
                    return violation(Checker::TwoInFlight, format!("a second send on {fd}"));
                }
                if socket.shut_write || socket.shut_both {
                    return violation(Checker::AfterEnd, format!("a send on {fd} after its end"));
                }
                if chunk.is_empty() || chunk.end > chunk.payload_len() {
                    return violation(Checker::WrongAnswer, format!("an impossible chunk on {fd}: {}..{}", chunk.start, chunk.end));
                }
                socket.send = Some(Send { chunk, taken: 0 });
            }
            Op::Shutdown { fd, how } => {
                let Some(socket) = self.socket(fd) else {
                    return violation(Checker::ClosedDescriptor, format!("shutdown of {fd}"));
                };
                match how {
                    Shutdown::Write => socket.shut_write = true,
                    Shutdown::Both => socket.shut_both = true,
                }
                // With bytes on their way, the reset that follows overtakes the end.
                let orderly = socket.send.is_none();
                return clients[socket.client].server_ends(orderly, rules, now);
            }
            Op::Close { fd, reset } => {
                let Some(socket) = self.socket(fd) else {
                    return violation(Checker::ClosedDescriptor, format!("close of {fd}"));
                };
                if socket.recv.is_some() || socket.send.is_some() {
                    return violation(Checker::CloseInFlight, format!("close of {fd}"));
                }
                let (index, unheard) = (socket.client, socket.token.is_none());
                let host = clients[index].host();
                let of_host = self.sockets.iter().flatten().filter(|socket| clients[socket.client].host() == host).count();
                self.sockets[(fd - FD_FIRST) as usize] = None;
                clients[index].wire.server_closed = true;
                // Turned away at the door: it has as many connections as it may.
                if unheard && reset && of_host > rules.connections_per_ip_max {
                    return Ok(());
                }
                return clients[index].server_ends(!reset, rules, now);
            }
        }
        Ok(())
    }

    fn socket(&mut self, fd: RawFd) -> Option<&mut Socket> {
        self.sockets.get_mut(usize::try_from(fd - FD_FIRST).ok()?)?.as_mut()
    }

    /// The open socket that an operation names, which has to be the one it means.
    fn adopt(&mut self, token: Token, fd: RawFd) -> Result<&mut Socket, Violation> {
        let index = usize::try_from(fd - FD_FIRST).unwrap_or(usize::MAX);
        let Some(Some(socket)) = self.sockets.get_mut(index) else {
            return violation(Checker::ClosedDescriptor, format!("{token:?} on {fd}"));
        };
        match socket.token {
            None if self.tokens.insert(token) => socket.token = Some(token),
            Some(known) if known == token => {}
            known => return violation(Checker::StaleToken, format!("{token:?} on {fd}, which belongs to {known:?}")),
        }
        Ok(socket)
    }

    /// True while the connection is neither closed nor shut.
    pub fn is_open(&self, token: Token) -> bool {
        self.sockets.iter().flatten().any(|socket| socket.token == Some(token) && !socket.shut_both)
    }

    /// Nothing is in flight and every descriptor is closed.
    pub fn is_quiet(&self) -> bool {
        self.sockets.iter().all(Option::is_none) && self.listeners.iter().all(|listener| !listener.in_flight)
    }

    /// What a well-behaved kernel could report now.
    pub fn events(&self, clients: &[Client], faults: &Faults, events: &mut Vec<Event>) {
        for (index, listener) in self.listeners.iter().enumerate().filter(|(_, listener)| listener.in_flight) {
            let index = index as ListenerIndex;
            if !listener.queue.is_empty() && (!listener.stopping || faults.accept_stop_race) {
                events.push(Event::Accept(index));
            }
            if listener.stopping {
                events.push(Event::AcceptEnd(index, 0));
            }
        }
        for (fd, socket) in self.open() {
            let wire = &clients[socket.client].wire;
            if let Some(recv) = &socket.recv {
                let racing = !recv.stopping || faults.recv_stop_race;
                if wire.reset {
                    events.push(Event::RecvEnd(fd, RecvEnd::Failed(libc::ECONNRESET)));
                } else if !wire.to_server.is_empty() && racing {
                    events.push(Event::Receive(fd));
                } else if (wire.fin || socket.shut_both) && wire.to_server.is_empty() && racing {
                    events.push(Event::RecvEnd(fd, RecvEnd::Eof));
                }
                if recv.stopping {
                    events.push(Event::RecvEnd(fd, RecvEnd::Stopped));
                }
            }
            if let Some(send) = &socket.send {
                if wire.reset {
                    events.push(Event::SendFail(fd, libc::ECONNRESET));
                } else if socket.shut_both {
                    events.push(Event::SendFail(fd, libc::EPIPE));
                } else if wire.window > 0 {
                    events.push(Event::Take(fd));
                } else if send.taken > 0 && faults.short_send {
                    events.push(Event::SendShort(fd));
                }
            }
        }
    }

    /// What an ill-disposed kernel could report instead.
    pub fn faults(&self, clients: &[Client], scene: &mut Scene, events: &mut Vec<Event>) {
        let Scene { faults, random, .. } = scene;
        for (index, _) in self.listeners.iter().enumerate().filter(|(_, listener)| listener.in_flight) {
            if faults.accept_fail && random.chance(3) {
                let errno = random.pick(&[libc::EMFILE, libc::ENFILE, libc::ECONNABORTED, libc::ENOBUFS]);
                events.push(Event::AcceptEnd(index as ListenerIndex, errno));
            }
            if faults.again && random.chance(3) {
                events.push(Event::AcceptEnd(index as ListenerIndex, 0));
            }
        }
        for (fd, socket) in self.open() {
            let wire = &clients[socket.client].wire;
            if socket.recv.is_some() && faults.again && random.chance(10) {
                events.push(Event::RecvEnd(fd, RecvEnd::Again));
            }
            // Without bytes to put somewhere, no buffer is missed.
            if socket.recv.is_some() && faults.no_buffers && !wire.to_server.is_empty() && random.chance(20) {
                events.push(Event::RecvEnd(fd, RecvEnd::NoBuffers));
            }
            let some = |send: &Send| send.taken > 0 || wire.window > 0 && send.chunk.len() > 1;
            if socket.send.as_ref().is_some_and(some) && faults.short_send && !wire.reset && !socket.shut_both && random.chance(30) {
                events.push(Event::SendShort(fd));
            }
        }
    }

    fn open(&self) -> impl Iterator<Item = (RawFd, &Socket)> {
        let sockets = self.sockets.iter().enumerate();
        sockets.filter_map(|(index, socket)| Some((index as RawFd + FD_FIRST, socket.as_ref()?)))
    }

    /// Lets an event happen.
    pub fn deliver(&mut self, event: Event, clients: &mut [Client], scene: &mut Scene) -> Result<Delivered, Violation> {
        let Scene { faults, rules, random, now } = scene;
        let now = *now;
        let fd = match event {
            Event::Accept(listener) => return Ok(Delivered::Other(self.accept(listener, clients, now))),
            Event::AcceptEnd(listener, error) => {
                let ended = &mut self.listeners[usize::from(listener)];
                (ended.in_flight, ended.stopping) = (false, false);
                return Ok(Delivered::Other(Completion::AcceptEnded { listener, error }));
            }
            Event::Receive(fd) | Event::RecvEnd(fd, _) | Event::Take(fd) | Event::SendShort(fd) | Event::SendFail(fd, _) => fd,
        };
        let socket = self.socket(fd).expect("an event of an open socket");
        let token = socket.token.expect("something is in flight");
        let client = &mut clients[socket.client];
        Ok(match event {
            Event::Receive(_) => {
                let most = client.wire.to_server.len().min(BUFFER_BYTES);
                let length = match (faults.split, random.below(3)) {
                    (false, _) => most,
                    (true, 0) => 1,
                    (true, _) => 1 + random.below(most),
                };
                let bytes: Vec<u8> = client.wire.to_server.drain(..length).collect();
                if client.delivered(length, now) {
                    let index = socket.client;
                    self.named(index, clients, rules);
                }
                Delivered::Received(token, bytes)
            }
            Event::RecvEnd(_, end) => {
                socket.recv = None;
                socket.eof_told = matches!(end, RecvEnd::Eof | RecvEnd::Failed(_));
                if end == RecvEnd::Eof && !socket.shut_both {
                    client.eof_told_at = Some(now);
                }
                Delivered::Other(Completion::RecvEnded { token, end })
            }
            Event::Take(_) | Event::SendShort(_) => {
                let send = socket.send.as_mut().expect("a send in flight");
                let left = send.chunk.len() - send.taken;
                let mut amount = left.min(client.wire.window);
                if matches!(event, Event::SendShort(_)) {
                    amount = random.below(amount.min(left - 1) + 1).max(usize::from(send.taken == 0));
                }
                let bytes = &send.chunk.bytes()[send.taken..send.taken + amount];
                client.receive(bytes, rules, now)?;
                if client.wire.window != usize::MAX {
                    client.wire.window -= amount;
                }
                send.taken += amount;
                let over = send.taken == send.chunk.len() || matches!(event, Event::SendShort(_));
                match over {
                    false => Delivered::Nothing,
                    true => {
                        client.last_sent_at = now;
                        Delivered::Other(socket.end_send(token, None))
                    }
                }
            }
            Event::SendFail(_, errno) => Delivered::Other(socket.end_send(token, Some(errno))),
            Event::Accept(_) | Event::AcceptEnd(..) => unreachable!("returned above"),
        })
    }

    fn accept(&mut self, listener: ListenerIndex, clients: &mut [Client], now: Micros) -> Completion<'static> {
        let client = self.listeners[usize::from(listener)].queue.pop_front().expect("a client waits");
        let free = self.sockets.iter().position(Option::is_none).unwrap_or(self.sockets.len());
        if free == self.sockets.len() {
            self.sockets.push(None);
        }
        let socket = Socket { client, token: None, recv: None, send: None, eof_told: false, shut_write: false, shut_both: false };
        self.sockets[free] = Some(socket);
        clients[client].accepted(now);
        Completion::Accepted { listener, fd: free as RawFd + FD_FIRST, peer: clients[client].accepted_from() }
    }

    /// A proxy has said who this client is, which may have as many connections as it may already.
    fn named(&self, index: usize, clients: &mut [Client], rules: &Rules) {
        let Peer::Inet(address) = clients[index].peer() else { return };
        let same = |client: &Client| client.is_named() && matches!(client.peer(), Peer::Inet(other) if other.ip() == address.ip());
        let connections = self.open().filter(|(_, socket)| same(&clients[socket.client])).count();
        clients[index].may_be_turned_away = connections > rules.connections_per_ip_max;
    }

    /// What must hold after each turn: a shard that is full does not go on accepting.
    pub fn check_accepting(&self, connections: usize, connections_max: usize) -> Check {
        let accepting = self.listeners.iter().any(|listener| listener.in_flight && !listener.stopping);
        match connections >= connections_max && accepting {
            true => violation(Checker::TooMany, format!("{connections} connections, and still accepting")),
            false => Ok(()),
        }
    }

    /// What must hold when nothing more can happen without time passing: whoever may still say something is listened to.
    pub fn check_armed(&self, clients: &[Client], room: bool) -> Check {
        for (fd, socket) in self.open() {
            let client = &clients[socket.client];
            // One that was accepted beyond the limit waits, unheard, until there is room.
            let parked = socket.token.is_none() && !room;
            if socket.recv.is_none() && !socket.eof_told && !socket.shut_both && !client.is_owed() && !parked {
                return violation(Checker::NotArmed, format!("nothing receives on {fd}, client {}", client.index));
            }
        }
        let forgotten = |listener: &Listener| !listener.in_flight && !listener.queue.is_empty();
        match room && self.listeners.iter().any(forgotten) {
            true => violation(Checker::NotArmed, "nothing accepts, though there is room and somebody waits"),
            false => Ok(()),
        }
    }

    /// The first connection that is only open because the engine forgot that it drains.
    pub fn check_drained(&self, clients: &[Client]) -> Check {
        for (fd, socket) in self.open() {
            let client = &clients[socket.client];
            let idle = client.is_at_rest() && socket.send.is_none() && !socket.shut_write;
            if idle {
                return violation(Checker::Drain, format!("{fd}, client {}, is idle and stays open", client.index));
            }
        }
        Ok(())
    }
}

impl Socket {
    fn end_send(&mut self, token: Token, errno: Option<i32>) -> Completion<'static> {
        let Send { chunk, taken } = self.send.take().expect("a send in flight");
        let result = match errno {
            Some(errno) if taken == 0 => Err(errno),
            _ => Ok(taken),
        };
        Completion::Sent { token, chunk, result }
    }
}
