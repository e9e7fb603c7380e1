//! One shard's decisions: a completion comes in, operations go out.
//!
//! Nothing here calls the kernel or reads a clock; `shard/mod.rs` does both and passes the results in.
//! So every order of events can be replayed from a seed (`sim.rs`).
//!
//! Within a turn of the loop, completions only fill the slots' output buffers and the list `dirty`;
//! [`Engine::end_turn`] makes one send per connection of it. So a burst of pipelined requests is answered by one
//! send, and a turn costs one entry into the kernel.
//!
//! If you add an operation that completes later: give it an in-flight boolean in `slot.rs`, clear
//! it on the last completion, and add it to `Slot::is_quiet`.

mod bodies;
mod clients;

use std::{
    collections::{HashMap, VecDeque},
    mem,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, SystemTime},
};

use slab::Slab;

pub use self::bodies::{Outgoing, Reserved};

use super::{
    deadlines::{Deadlines, NO_ENTRY, Tick},
    slot::{Slot, Stage},
};
use crate::{
    config::{Config, Limits, Permit},
    disk::{Job, Quota},
    driver::{Chunk, Completion, ListenerIndex, Op, Payload, Peer, RecvEnd, Shutdown, Token},
    exchange::{Exchange, Micros, Progress},
    handler::{Body, BodySource, Handler, Request, Response, Runs},
    http1::{
        Event, Framing, Head, Phase, Refusal, Version,
        response::{self, Context, Framing as BodyFraming, Preamble},
    },
    identity::{Networks, Trust},
    proxy_protocol::Fault,
    stats::Stats,
};

/// One send takes this much at most, so that one fast reader does not hold up the rest of the core.
const SEND_BYTES_MAX: usize = 256 << 10;
/// A shut connection is given this long in all to take notice, however busily it goes on sending.
const LINGER_TOTAL: Micros = 30_000_000;
/// A client that shuts its sending side while its request waits may be half closed, which is legal, or gone,
/// which is commoner. Nothing tells them apart, so it keeps its place this long.
const HALF_CLOSED_WAIT: Micros = 100_000;
/// A connection that comes just when the server drains must begin its request within this time.
const DRAINING_FIRST_WAIT: Micros = 1_000_000;
/// Accepting pauses this long after it failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Micros = 100_000;
/// No more early hints are written for a client that has so many bytes of answers still to read.
const HINTS_BYTES_MAX: usize = 64 << 10;
/// Freed output buffers kept for the next answers, and the largest that is kept.
const BUFFERS_KEPT: usize = 256;
const BUFFER_KEPT_BYTES: usize = 64 << 10;
const BUFFER_BYTES: usize = 4 << 10;
/// Room for what a busy turn brings, from the start.
const TURN: usize = 1024;
/// Used exchanges kept for the next requests.
const EXCHANGES_KEPT: usize = 256;

/// What a shard is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    Serving,
    /// No new connections; requests in progress are finished.
    Draining,
    /// Every connection is ended now.
    Stopping,
}

pub struct Engine {
    /// What the driver is to do. The caller takes them after each turn.
    pub ops: Vec<Op>,
    /// Complete requests for the pool. The caller takes them before [`Engine::end_turn`].
    pub dispatch: Vec<Box<Exchange>>,
    /// What the disk is to do. The caller takes it with `ops`.
    pub disk: Vec<Job>,
    handler: Arc<dyn Handler>,
    limits: Limits,
    permit: Permit,
    forwarded: Trust,
    proxy_protocol: Option<Networks>,
    periods: Periods,
    stats: Arc<Stats>,
    life: Life,
    listeners: Vec<Listener>,
    /// When accepting is tried again after a failure.
    accept_again: Option<Micros>,
    slots: Slab<Slot>,
    /// Connections by client, when they are limited.
    clients: HashMap<IpAddr, usize>,
    /// Connections beyond the limit, accepted in one burst with others: nothing is received from them yet.
    parked: VecDeque<(i32, Peer)>,
    /// Request body bytes in memory, of all connections.
    body_memory: usize,
    /// Response bytes in memory, of all connections.
    response_memory: usize,
    /// What files of bodies may take up, and when to try again after one failed.
    quota: Arc<Quota>,
    spool_again: Option<Micros>,
    generation: u32,
    dirty: Vec<Token>,
    deadlines: Deadlines,
    expired: Vec<(Token, Tick)>,
    preamble: Preamble,
    /// Where heads are parsed into before anybody owns them.
    head: Head,
    buffers: Vec<Vec<u8>>,
    // Boxed all the way: the boxes themselves go to the pool and come back.
    #[allow(clippy::vec_box)]
    exchanges: Vec<Box<Exchange>>,
    pub(super) planted: Planted,
}

#[derive(Clone, Copy, Default)]
struct Listener {
    in_flight: bool,
    stopping: bool,
}

/// The configured times, in [`Micros`].
struct Periods {
    head: Micros,
    /// Until a new connection's first byte: as for its head, and less once the server drains.
    first: Micros,
    body_idle: Micros,
    body_rate_grace: Micros,
    body_rate_min: u64,
    queue: Micros,
    run: Micros,
    send: Micros,
    send_rate_grace: Micros,
    send_rate_min: u64,
    keep_alive: Micros,
    linger: Micros,
    life: Micros,
}

impl Engine {
    pub fn new(
        config: &Config,
        handler: Arc<dyn Handler>,
        listeners: usize,
        stats: Arc<Stats>,
        quota: Arc<Quota>,
        now: Micros,
        wall: SystemTime,
    ) -> Engine {
        let micros = |duration: Duration| duration.as_micros().min(u128::from(u64::MAX / 4)) as Micros;
        let timeouts = &config.timeouts;
        let mut preamble = Preamble::new(config.server_name.as_deref());
        preamble.set_date(wall);
        let mut engine = Engine {
            ops: Vec::with_capacity(TURN),
            dispatch: Vec::new(),
            disk: Vec::new(),
            handler,
            limits: config.limits.clone(),
            permit: config.permit,
            forwarded: config.forwarded.clone(),
            proxy_protocol: config.proxy_protocol.clone(),
            periods: Periods {
                head: micros(timeouts.head),
                first: micros(timeouts.head),
                body_idle: micros(timeouts.body_idle),
                body_rate_grace: micros(timeouts.body_rate_grace),
                body_rate_min: timeouts.body_rate_min,
                queue: micros(timeouts.queue),
                run: micros(timeouts.run),
                send: micros(timeouts.send),
                send_rate_grace: micros(timeouts.send_rate_grace),
                send_rate_min: timeouts.send_rate_min,
                keep_alive: micros(timeouts.keep_alive),
                linger: micros(timeouts.linger),
                life: timeouts.life.map_or(u64::MAX / 4, micros),
            },
            stats,
            life: Life::Serving,
            listeners: vec![Listener::default(); listeners],
            accept_again: None,
            slots: Slab::new(),
            clients: HashMap::new(),
            parked: VecDeque::new(),
            body_memory: 0,
            response_memory: 0,
            quota,
            spool_again: None,
            generation: 0,
            dirty: Vec::with_capacity(TURN),
            deadlines: Deadlines::new(now),
            expired: Vec::new(),
            preamble,
            head: Head::default(),
            // Made, but not touched: they take no memory before they are used.
            buffers: (0..BUFFERS_KEPT).map(|_| Vec::with_capacity(BUFFER_BYTES)).collect(),
            exchanges: Vec::new(),
            planted: Planted::default(),
        };
        engine.accept_all();
        engine
    }

    /// Takes note of one completion.
    #[inline]
    pub fn handle(&mut self, completion: Completion<'_>, now: Micros) {
        match completion {
            Completion::Received { token, bytes } => self.received(token, bytes, now),
            Completion::Sent { token, chunk, result } => self.sent(token, chunk, result, now),
            Completion::RecvEnded { token, end } => self.recv_ended(token, end, now),
            Completion::Accepted { fd, peer, .. } => self.accepted(fd, peer, now),
            Completion::AcceptEnded { listener, error } => self.accept_ended(listener, error, now),
        }
    }

    /// A handler is done with a request, or found it withdrawn.
    pub fn answered(&mut self, mut exchange: Box<Exchange>, now: Micros) {
        let waits = |slot: &Slot| slot.ticket.is_some() && (slot.serial == exchange.serial || self.planted.is(Canary::OldAnswerTaken));
        let key = self.live(exchange.token).filter(|&key| waits(&self.slots[key]));
        match (exchange.response.take(), key) {
            (Some(response), Some(key)) => {
                self.respond(key, response, now);
                self.proceed(key, now);
            }
            // It was answered for (503, 504) or its client is gone: a handler that is still at the body may stop.
            (Some(Response { body: Body::Stream(stream), .. }), None) => stream.credit.close(),
            _ => {}
        }
        self.recycle(exchange);
    }

    /// A handler has fields for a 103 before its answer. They are a hint: dropped when the client is slow to read.
    pub fn hinted(&mut self, token: Token, serial: u64, fields: &[response::Field], now: Micros) {
        let waits = |slot: &Slot| slot.ticket.is_some() && slot.serial == serial && slot.context.version == Version::Http11;
        let Some(key) = self.live(token).filter(|&key| waits(&self.slots[key])) else { return };
        if self.slots[key].response_bytes() > HINTS_BYTES_MAX {
            return;
        }
        self.prepare_output(key, now);
        if let Err(fault) = response::write_hints(&mut self.slots[key].output, fields) {
            self.stats.faults.add(1);
            tracing::error!("{}; its early hints were not sent", fault.explain());
        }
        self.schedule(key, now);
    }

    /// The pool would not take a request: its queue is full.
    pub fn queue_full(&mut self, exchange: Box<Exchange>, now: Micros) {
        self.stats.queue_full.add(1);
        // Without its ticket, it was withdrawn on its way here.
        if let Some(key) = self.live(exchange.token).filter(|&key| self.slots[key].ticket.is_some()) {
            self.respond(key, Response::unavailable("The server is busy.\n"), now);
            self.proceed(key, now);
        }
        self.recycle(exchange);
    }

    /// Acts on what is due and turns all output of this turn into sends.
    pub fn end_turn(&mut self, now: Micros) {
        self.expire(now);
        self.unpark(now);
        let mut dirty = mem::take(&mut self.dirty);
        for token in dirty.drain(..) {
            self.flush(token, now);
        }
        self.dirty = dirty;
    }

    /// When [`Engine::end_turn`] has to be called again, completions or not.
    pub fn next_deadline(&self) -> Option<Micros> {
        [self.deadlines.next(), self.accept_again].into_iter().flatten().min()
    }

    /// Call it once a second: the answers' date.
    pub fn set_date(&mut self, wall: SystemTime) {
        self.preamble.set_date(wall);
    }

    /// Stops accepting. Draining, idle connections are closed and others after their answer; stopping, all at once.
    pub fn wind_down(&mut self, life: Life, now: Micros) {
        self.life = self.life.max(life);
        self.accept_again = None;
        self.periods.first = self.periods.first.min(DRAINING_FIRST_WAIT);
        self.accept_stop();
        if self.life == Life::Stopping {
            let parked = self.parked.drain(..).map(|(fd, _)| Op::Close { fd, reset: false });
            self.ops.extend(parked);
        }
        let keys: Vec<usize> = self.slots.iter().map(|(key, _)| key).collect();
        for key in keys {
            let slot = &mut self.slots[key];
            let idle = slot.stage == Stage::Open && slot.http.phase() == Phase::Head && !slot.http.request_begun();
            if self.life == Life::Stopping {
                slot.reset |= !slot.is_done();
                self.terminate(key);
            } else if idle && slot.input.is_empty() {
                slot.last = true;
                if slot.is_done() {
                    self.terminate(key);
                }
            } else {
                self.schedule(key, now);
            }
        }
    }

    /// Connections in any stage.
    pub fn connections(&self) -> usize {
        self.slots.len()
    }

    /// Requests that are not answered yet.
    pub fn unanswered(&self) -> usize {
        self.slots.iter().filter(|(_, slot)| slot.ticket.is_some() || slot.arriving.is_some() || !slot.is_done()).count()
    }

    /// True when no connection will come any more.
    pub fn accepts_nothing(&self) -> bool {
        self.listeners.iter().all(|listener| !listener.in_flight)
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// True when nothing is left that the kernel could report on.
    pub fn is_quiet(&self) -> bool {
        self.slots.is_empty() && self.parked.is_empty() && self.accepts_nothing()
    }
}

/// Accepting.
impl Engine {
    fn accept_all(&mut self) {
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if !listener.in_flight {
                *listener = Listener { in_flight: true, stopping: false };
                self.ops.push(Op::Accept { listener: index as ListenerIndex });
            }
        }
    }

    fn accept_stop(&mut self) {
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if listener.in_flight && !listener.stopping {
                listener.stopping = true;
                self.ops.push(Op::AcceptStop { listener: index as ListenerIndex });
            }
        }
    }

    fn accepted(&mut self, fd: i32, peer: Peer, now: Micros) {
        self.stats.accepted.add(1);
        if self.life == Life::Stopping {
            // Its request has not been seen, so it may be tried again.
            return self.ops.push(Op::Close { fd, reset: false });
        }
        if self.slots.len() >= self.limits.connections_max {
            // The kernel gives all that waits at once; what is too much goes on waiting, here.
            return self.parked.push_back((fd, peer));
        }
        self.open(fd, peer, now);
    }

    fn open(&mut self, fd: i32, peer: Peer, now: Micros) {
        // With the PROXY protocol, the client is not known yet.
        let proxied = self.proxy_protocol.is_some();
        if !self.may_connect(peer) || !proxied && !self.count_client(peer) {
            return self.ops.push(Op::Close { fd, reset: true });
        }
        self.generation = (self.generation + 1) & Token::GENERATION_MASK;
        let entry = self.slots.vacant_entry();
        let token = Token { slot: entry.key() as u32, generation: self.generation };
        let key = entry.key();
        entry.insert(Slot { proxy_awaited: proxied, counted: !proxied, ..Slot::new(token, fd, peer, now) });
        self.stats.open.set(self.slots.len() as u64);
        self.receive(key);
        self.schedule(key, now);
        if self.slots.len() >= self.limits.connections_max {
            self.accept_stop();
        }
    }

    fn accept_ended(&mut self, listener: ListenerIndex, error: i32, now: Micros) {
        self.listeners[usize::from(listener)].in_flight = false;
        if self.life != Life::Serving {
            return;
        }
        if error != 0 {
            // EMFILE, ENFILE, ENOBUFS, ENOMEM: trying again at once would only spin.
            self.stats.accept_pauses.add(1);
            let why = std::io::Error::from_raw_os_error(error);
            tracing::warn!(error = %why, "accepting pauses; try: a higher RLIMIT_NOFILE (ulimit -n) or fewer connections");
            self.accept_again = Some(now + ACCEPT_PAUSE);
        } else {
            self.accept_resume();
        }
    }

    /// Opens connections that wait here, as far as there is room.
    fn unpark(&mut self, now: Micros) {
        while self.slots.len() < self.limits.connections_max
            && let Some((fd, peer)) = self.parked.pop_front()
        {
            self.open(fd, peer, now);
            self.accept_resume();
        }
    }

    /// A slot is free again: there may be room for who waits in the kernel's queue.
    fn accept_resume(&mut self) {
        let room = self.slots.len() < self.limits.connections_max && self.parked.is_empty();
        if self.life == Life::Serving && room && self.accept_again.is_none() {
            self.accept_all();
        }
    }
}

/// Receiving.
impl Engine {
    fn receive(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        slot.recv_in_flight = true;
        slot.recv_stopping = false;
        self.ops.push(Op::Recv { token: slot.token, fd: slot.fd });
    }

    fn received(&mut self, token: Token, bytes: &[u8], now: Micros) {
        let Some(key) = self.find(token) else { return };
        let slot = &mut self.slots[key];
        if slot.stage != Stage::Open || slot.last {
            slot.progress = now;
            return;
        }
        if slot.input.is_empty() {
            let used = self.advance(key, bytes, now);
            self.keep(key, &bytes[used..]);
        } else {
            slot.input.extend_from_slice(bytes);
        }
        self.proceed(key, now);
    }

    /// Puts bytes that could not be used yet aside.
    fn keep(&mut self, key: usize, rest: &[u8]) {
        if !rest.is_empty() {
            let mut input = self.take_buffer();
            input.extend_from_slice(rest);
            self.slots[key].input = input;
        }
    }

    fn recv_ended(&mut self, token: Token, end: RecvEnd, now: Micros) {
        let Some(key) = self.find(token) else { return };
        let slot = &mut self.slots[key];
        slot.recv_in_flight = false;
        match (slot.stage, end) {
            (Stage::Terminating, _) => return self.free(key),
            (_, RecvEnd::Failed(_)) => {
                self.stats.peer_errors.add(1);
                return self.terminate(key);
            }
            (Stage::Lingering, RecvEnd::Eof) => return self.terminate(key),
            (Stage::Lingering, _) => return self.receive(key),
            (Stage::Open, RecvEnd::Eof) => {
                slot.eof = true;
                if slot.ticket.is_some() {
                    slot.since_eof = now;
                }
            }
            (Stage::Open, RecvEnd::NoBuffers) if self.planted.is(Canary::NotArmedAgain) => return,
            (Stage::Open, RecvEnd::Again | RecvEnd::NoBuffers | RecvEnd::Stopped) => {}
        }
        self.proceed(key, now);
    }

    /// Goes on with a connection after anything that may have cleared its way: takes up bytes put
    /// aside, the peer's end, and the receive.
    fn proceed(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        if slot.stage != Stage::Open {
            return;
        }
        // A body whose last byte is taken may have its end still to be seen: it takes no further byte.
        if (!slot.input.is_empty() || slot.http.phase() == Phase::Body) && !slot.last {
            let mut input = mem::take(&mut slot.input);
            let used = self.advance(key, &input, now);
            input.drain(..used);
            self.put_input(key, input);
        }
        let clogged = self.is_clogged(key);
        let slot = &mut self.slots[key];
        if slot.eof && !slot.last && matches!(slot.http.phase(), Phase::Head | Phase::Body) && !clogged {
            return self.peer_closed(key, now);
        }
        // An answer that was begun before the drain has promised another; it is the last all the same.
        slot.last |= self.life != Life::Serving && slot.http.phase() == Phase::Head && !slot.http.request_begun() && slot.input.is_empty();
        if slot.last && slot.is_done() {
            return self.finish(key, now);
        }
        // One byte more than a head may have has to be seen, for it to be refused and not waited for.
        let full = slot.input.len() > self.limits.head_bytes_max;
        if !slot.recv_in_flight && !slot.eof && !full {
            self.receive(key);
        } else if full && slot.recv_in_flight && !slot.recv_stopping {
            slot.recv_stopping = true;
            self.ops.push(Op::RecvStop { token: slot.token, fd: slot.fd });
        }
        self.schedule(key, now);
    }

    fn put_input(&mut self, key: usize, input: Vec<u8>) {
        if input.is_empty() || self.slots[key].last {
            self.give_buffer(input);
        } else {
            self.slots[key].input = input;
        }
    }

    /// Too much waits to be sent or written down: the connection's next bytes must wait too.
    fn is_clogged(&self, key: usize) -> bool {
        let slot = &self.slots[key];
        let short = self.response_memory > self.limits.response_memory_total_bytes_max && !slot.is_flushed();
        short || slot.is_clogged(&self.limits) || self.is_body_ahead(key)
    }

    /// The peer has sent all that it will, and all of it was looked at.
    fn peer_closed(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        if slot.proxy_awaited {
            self.refuse_proxy_header(key, Fault::Missing);
            return self.terminate(key);
        }
        match slot.http.peer_closed(slot.input.len()) {
            Ok(()) => {
                slot.last = true;
                if slot.is_done() {
                    self.terminate(key);
                } else {
                    self.schedule(key, now);
                }
            }
            Err(refusal) => {
                self.refuse(key, refusal, now);
                self.schedule(key, now);
            }
        }
    }

    /// Takes as many requests from `input` as can be dealt with now; returns how many bytes that were.
    fn advance(&mut self, key: usize, input: &[u8], now: Micros) -> usize {
        let mut at = 0;
        let mut head = 0..0;
        if self.slots[key].proxy_awaited {
            let Some(length) = self.take_proxy_header(key, input, now) else { return 0 };
            at = length;
        }
        loop {
            if self.slots[key].last {
                return input.len();
            }
            if self.is_clogged(key) {
                break;
            }
            let slot = &mut self.slots[key];
            let (used, event) = match slot.http.next_event(&input[at..], &mut self.head, &self.limits, self.permit) {
                Ok(found) => found,
                Err(refusal) => {
                    self.refuse(key, refusal, now);
                    return input.len();
                }
            };
            let start = at;
            at += used;
            match event {
                Event::NeedData | Event::Paused => break,
                Event::Head => {
                    head = start..at;
                    self.head_complete(key, &input[head.clone()], at == input.len(), now);
                }
                Event::Body(bytes) => self.body_arrived(key, bytes, now),
                Event::End if self.body_gathered(key, now) => self.request_ready(key, &input[head.clone()], now),
                Event::End => {}
            }
        }
        let slot = &mut self.slots[key];
        if !slot.begun && slot.http.phase() == Phase::Head && slot.http.request_begun() {
            slot.begun = true;
            // The first head's time runs from the connection's beginning.
            if slot.serial > 0 {
                slot.since = now;
            }
        }
        at
    }
}

/// Requests and their answers.
impl Engine {
    /// A head is parsed into `self.head`. If a body follows, the head is copied: its bytes will be gone by then.
    fn head_complete(&mut self, key: usize, head_bytes: &[u8], input_is_used_up: bool, now: Micros) {
        let announced = match self.head.framing {
            Framing::None => None,
            Framing::Length(length) => Some(length),
            Framing::Chunked => Some(0),
        };
        let mut exchange = announced.map(|_| self.take_exchange());
        let slot = &mut self.slots[key];
        slot.begun = false;
        slot.serial += 1;
        let requests_left = self.limits.keep_alive_requests_max == 0 || slot.serial < self.limits.keep_alive_requests_max;
        let keep_alive = self.head.keep_alive && requests_left && now - slot.born < self.periods.life;
        slot.context = Context { version: self.head.version, is_head: self.head.is_head, keep_alive };
        if let Some(exchange) = &mut exchange {
            exchange.head_bytes.extend_from_slice(head_bytes);
            mem::swap(&mut exchange.head, &mut self.head);
            slot.since = now;
            slot.progress = now;
            slot.body_bytes = 0;
            // RFC 9110 section 10.1.1: not needed when the body is already on its way.
            if exchange.head.expect_continue && input_is_used_up {
                self.write(key, b"HTTP/1.1 100 Continue\r\n\r\n", now);
            }
        }
        self.slots[key].arriving = exchange;
        if let Some(length) = announced {
            self.body_announced(key, length, now);
        }
    }

    /// The whole request is here: a handler may see it.
    fn request_ready(&mut self, key: usize, head_bytes: &[u8], now: Micros) {
        self.stats.requests.add(1);
        let slot = &mut self.slots[key];
        let (mut arriving, mut peer, mut origin) = (slot.arriving.take(), slot.peer, None);
        if arriving.as_ref().map_or(&self.head, |exchange| &exchange.head).forwarding {
            origin = match &mut arriving {
                Some(exchange) => self.settle_origin(key, &mut exchange.head, &exchange.head_bytes),
                None => {
                    let mut head = mem::take(&mut self.head);
                    let origin = self.settle_origin(key, &mut head, head_bytes);
                    self.head = head;
                    origin
                }
            };
            peer = origin.map_or(peer, |origin| origin.remote);
        }
        let request = match &arriving {
            Some(exchange) => Request { peer, origin, ..exchange.request() },
            None => Request { head: &self.head, bytes: head_bytes, body: BodySource::Memory(&[]), peer, origin, ticket: None },
        };
        match self.handler.runs(&request) {
            Runs::Inline => {
                let response = run(&*self.handler, &request, &self.stats);
                self.respond(key, response, now);
                if let Some(exchange) = arriving {
                    self.recycle(exchange);
                }
            }
            Runs::OnPool => {
                let mut exchange = arriving.unwrap_or_else(|| {
                    let mut exchange = self.take_exchange();
                    exchange.head_bytes.extend_from_slice(head_bytes);
                    mem::swap(&mut exchange.head, &mut self.head);
                    exchange
                });
                (exchange.peer, exchange.origin) = (peer, origin);
                self.dispatch(key, exchange, now);
            }
        }
    }

    fn dispatch(&mut self, key: usize, mut exchange: Box<Exchange>, now: Micros) {
        let slot = &mut self.slots[key];
        exchange.token = slot.token;
        exchange.serial = slot.serial;
        exchange.since = now;
        slot.ticket = Some(exchange.ticket.clone());
        slot.since = now;
        slot.since_eof = now;
        self.dispatch.push(exchange);
    }

    /// Answers the request that is in `Handling`.
    fn respond(&mut self, key: usize, response: Response, now: Micros) {
        let slot = &mut self.slots[key];
        slot.ticket = None;
        slot.http.respond();
        self.answer(key, response, now);
        if self.slots[key].outgoing.is_some() {
            self.pump(key, now);
        }
    }

    /// Answers a request that broke a rule (`http` is in `Responding` already), and serves nothing after it.
    fn refuse(&mut self, key: usize, refusal: Refusal, now: Micros) {
        self.stats.refused(refusal);
        let slot = &mut self.slots[key];
        tracing::info!(reason = refusal.reason(), status = refusal.status(), peer = %slot.peer, "refused: {}", refusal.explain());
        self.answer_last(key, Response::refusal(refusal), now);
    }

    /// Answers a request whose body cannot be taken in, and serves nothing after it.
    fn reject(&mut self, key: usize, response: Response, now: Micros) {
        let http = &mut self.slots[key].http;
        match http.phase() {
            Phase::Handling => http.respond(),
            _ => http.fail(),
        }
        self.answer_last(key, response, now);
    }

    fn answer_last(&mut self, key: usize, response: Response, now: Micros) {
        let slot = &mut self.slots[key];
        slot.context = Context { version: Version::Http11, is_head: false, keep_alive: false };
        slot.gathered = false;
        let (arriving, input) = (slot.arriving.take(), mem::take(&mut slot.input));
        if let Some(exchange) = arriving {
            self.recycle(exchange);
        }
        self.give_buffer(input);
        self.answer(key, response, now);
    }

    /// Writes an answer behind the others of the connection.
    fn answer(&mut self, key: usize, mut response: Response, now: Micros) {
        self.prepare_output(key, now);
        self.uncharge(key);
        if matches!(&response.body, Body::Stream(stream) if stream.source.is_some()) {
            tracing::error!("an inline handler cannot make a stream: it would hold up the ring thread; answered 500");
            self.stats.faults.add(1);
            response = internal_error();
        }
        let slot = &mut self.slots[key];
        let keep_alive = slot.context.keep_alive && self.life == Life::Serving && !response::wants_close(response.made());
        let context = Context { keep_alive, ..slot.context };
        let framing = response::write_head(&mut slot.output, response.made(), context, &self.preamble).unwrap_or_else(|fault| {
            self.stats.faults.add(1);
            tracing::error!("{}; answered 500", fault.explain());
            let body = mem::take(&mut response.body);
            if let Body::Stream(stream) = body {
                stream.credit.close();
            }
            response = internal_error();
            response::write_head(&mut slot.output, response.made(), context, &self.preamble).expect("our own answer is valid")
        });
        self.stats.answers[usize::from(response.status / 100)].add(1);
        slot.since = now;
        slot.keep_alive = keep_alive && framing != BodyFraming::Close;
        slot.last = !slot.keep_alive;
        match response.body {
            Body::Stream(_) | Body::File { .. } => self.send_later(key, response.body, framing),
            Body::Owned(bytes) if framing != BodyFraming::None && self.response_memory > self.limits.response_memory_total_bytes_max => {
                self.send_through_file(key, bytes, framing);
            }
            body if framing != BodyFraming::None => slot.put_body(body),
            _ => {}
        }
        let slot = &mut self.slots[key];
        if slot.body.is_none() && slot.outgoing.is_none() {
            slot.http.flushed(slot.keep_alive);
        }
    }

    /// Appends bytes to the connection's output.
    fn write(&mut self, key: usize, bytes: &[u8], now: Micros) {
        self.prepare_output(key, now);
        self.slots[key].output.extend_from_slice(bytes);
    }

    fn prepare_output(&mut self, key: usize, now: Micros) {
        if self.slots[key].output.capacity() == 0 {
            self.slots[key].output = self.take_buffer();
        }
        let slot = &mut self.slots[key];
        if slot.is_flushed() {
            // The time for sending begins with the first byte that waits.
            slot.progress = now;
            slot.busy_since = now;
            slot.busy_bytes = 0;
        }
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(slot.token);
        }
    }
}

/// Sending.
impl Engine {
    /// Hands what waits on a connection to the driver, unless something of it is already there.
    fn flush(&mut self, token: Token, now: Micros) {
        let Some(key) = self.live(token) else { return };
        let slot = &mut self.slots[key];
        slot.dirty = false;
        if slot.send_in_flight || slot.stage != Stage::Open {
            return;
        }
        slot.sending_body = slot.output.is_empty();
        let chunk = match slot.sending_body {
            true => slot.body.take(),
            false => Some(Chunk::owned(mem::take(&mut slot.output))),
        };
        if let Some(mut chunk) = chunk {
            chunk.end = chunk.end.min(SEND_BYTES_MAX);
            slot.send_in_flight = true;
            slot.in_flight_bytes = chunk.payload_len();
            self.ops.push(Op::Send { token, fd: slot.fd, chunk });
            self.account(key);
            self.schedule(key, now);
        }
    }

    fn sent(&mut self, token: Token, mut chunk: Chunk, result: Result<usize, i32>, now: Micros) {
        let Some(key) = self.find(token) else { return };
        let slot = &mut self.slots[key];
        slot.send_in_flight = false;
        if slot.stage == Stage::Terminating {
            self.give_chunk(chunk);
            return self.free(key);
        }
        let sent = match result {
            Ok(sent @ 1..) => sent,
            Ok(0) | Err(_) => {
                self.stats.peer_errors.add(1);
                self.give_chunk(chunk);
                return self.terminate(key);
            }
        };
        slot.progress = now;
        chunk.start += self.planted.sent(sent, chunk.len());
        slot.busy_bytes += sent as u64;
        if chunk.is_empty() {
            chunk.end = (chunk.start + SEND_BYTES_MAX).min(chunk.payload_len());
        }
        if !chunk.is_empty() {
            slot.send_in_flight = true;
            return self.ops.push(Op::Send { token, fd: slot.fd, chunk });
        }
        if slot.sending_body {
            let keep_alive = slot.keep_alive;
            slot.http.flushed(keep_alive);
            slot.since = now;
        }
        slot.in_flight_bytes = 0;
        self.give_chunk(chunk);
        self.account(key);
        self.pump(key, now);
        let slot = &mut self.slots[key];
        if !slot.is_flushed() && !slot.dirty {
            slot.dirty = true;
            self.dirty.push(token);
        }
        if !self.planted.is(Canary::NextRequestForgotten) {
            self.proceed(key, now);
        }
    }
}

/// The end of a connection.
impl Engine {
    /// The last answer is with the kernel: shuts our side, and gives the peer time to read it.
    fn finish(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        if slot.eof || slot.reset {
            return self.terminate(key);
        }
        slot.stage = Stage::Lingering;
        slot.progress = now;
        slot.linger_until = now + LINGER_TOTAL;
        self.ops.push(Op::Shutdown { fd: slot.fd, how: Shutdown::Write });
        if !slot.recv_in_flight {
            self.receive(key);
        }
        self.schedule(key, now);
    }

    /// Ends everything that is in flight on the connection, then closes it.
    fn terminate(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        if slot.stage == Stage::Terminating {
            return;
        }
        slot.stage = Stage::Terminating;
        if let Some(ticket) = slot.ticket.take() {
            ticket.disconnect();
            if !self.planted.is(Canary::NotWithdrawn) && ticket.withdraw() {
                self.stats.withdrawn.add(1);
            }
        }
        if slot.reset && slot.recv_in_flight && !slot.send_in_flight {
            // A shutdown would show the peer an orderly end before the reset, and a body that was cut off as whole.
            self.ops.push(Op::RecvStop { token: slot.token, fd: slot.fd });
        } else if !slot.is_quiet() {
            self.ops.push(Op::Shutdown { fd: slot.fd, how: Shutdown::Both });
            if slot.recv_in_flight {
                // A multishot receive can miss the shutdown while bytes are arriving (kernel-notes/cancel-and-close.md).
                self.ops.push(Op::RecvStop { token: slot.token, fd: slot.fd });
            }
        }
        let (input, output, arriving) = (mem::take(&mut slot.input), mem::take(&mut slot.output), slot.arriving.take());
        slot.body = None;
        if let Some(outgoing) = slot.outgoing.take() {
            outgoing.abandon();
        }
        slot.in_flight_bytes = 0;
        self.uncharge(key);
        self.account(key);
        self.give_buffer(input);
        self.give_buffer(output);
        if let Some(exchange) = arriving {
            self.recycle(exchange);
        }
        self.free(key);
    }

    /// Keeps the sum of response memory true.
    #[inline]
    fn account(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let owed = slot.response_bytes();
        self.response_memory = self.response_memory + owed - slot.owed;
        slot.owed = owed;
    }

    /// The connection's request body no longer counts.
    fn uncharge(&mut self, key: usize) {
        self.body_memory -= mem::take(&mut self.slots[key].charged);
    }

    /// Closes a terminating connection once nothing of it is in flight.
    fn free(&mut self, key: usize) {
        if self.slots[key].is_quiet() || self.planted.is(Canary::ClosedInFlight) {
            let slot = self.slots.remove(key);
            self.forget_client(&slot);
            self.ops.push(Op::Close { fd: slot.fd, reset: slot.reset });
            self.stats.open.set(self.slots.len() as u64);
            self.accept_resume();
        }
    }
}

/// Deadlines.
impl Engine {
    #[inline]
    fn schedule(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        if let Some(due) = self.periods.due(slot, now) {
            self.deadlines.schedule(slot.token, due, &mut slot.entry);
        }
    }

    fn expire(&mut self, now: Micros) {
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept_again = None;
            self.accept_resume();
        }
        let mut expired = mem::take(&mut self.expired);
        self.deadlines.expire(now, &mut expired);
        for (token, tick) in expired.drain(..) {
            let Some(key) = self.slots.get(token.slot as usize).filter(|slot| slot.token == token).map(|_| token.slot as usize) else {
                continue;
            };
            if self.slots[key].entry == tick {
                self.slots[key].entry = NO_ENTRY;
                if !self.planted.is(Canary::DeadlineMissed) {
                    self.expire_slot(key, now);
                }
            }
        }
        self.expired = expired;
    }

    /// A connection's entry came up: acts when its time is really over, else puts it in again.
    fn expire_slot(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        let periods = &self.periods;
        if slot.stage == Stage::Terminating {
            return;
        }
        if slot.stage == Stage::Lingering {
            if periods.due(slot, now).is_some_and(|due| due <= now) {
                // It had its time to read the answer, and goes on sending or holding.
                slot.reset = true;
                return self.terminate(key);
            }
        } else if !slot.is_flushed() && (slot.progress + periods.send <= now || periods.is_read_too_slowly(slot, now)) {
            self.stats.send_timeouts.add(1);
            tracing::info!(peer = %slot.peer, "reset: the client does not read its answer");
            slot.reset = true;
            return self.terminate(key);
        } else if slot.ticket.is_some() {
            return self.expire_handling(key, now);
        } else if slot.outgoing.as_ref().is_some_and(|outgoing| outgoing.waits_for_handler()) {
            if slot.since + periods.run <= now {
                self.stats.run_timeouts.add(1);
                self.cut_off(key, "its handler made no more of it; try: a longer --timeout");
                self.pump(key, now);
                return self.proceed(key, now);
            }
        } else if slot.spooling && slot.gathered {
            if slot.progress + periods.body_idle <= now {
                self.reject(key, Response::unavailable("The server's disk does not keep up.\n"), now);
            }
        } else if slot.http.phase() == Phase::Body {
            let elapsed = now - slot.since;
            let too_slow = u128::from(slot.body_bytes) * 1_000_000 < u128::from(periods.body_rate_min) * u128::from(elapsed);
            if slot.progress + periods.body_idle <= now {
                slot.http.fail();
                self.refuse(key, Refusal::BodyTimeout, now);
            } else if elapsed >= periods.body_rate_grace && too_slow {
                slot.http.fail();
                self.refuse(key, Refusal::BodyTooSlow, now);
            }
        } else if slot.http.phase() == Phase::Head && slot.is_flushed() {
            if slot.begun && slot.since + periods.head <= now {
                slot.http.fail();
                self.refuse(key, Refusal::HeadTimeout, now);
            } else if !slot.begun && slot.since + periods.idle(slot) <= now {
                if slot.proxy_awaited {
                    self.refuse_proxy_header(key, Fault::Missing);
                }
                return self.terminate(key);
            }
        }
        self.schedule(key, now);
    }

    fn expire_handling(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        let ticket = slot.ticket.clone().expect("a request with a handler");
        match ticket.progress() {
            Progress::Waiting if slot.eof && slot.is_flushed() && slot.since_eof + HALF_CLOSED_WAIT <= now => return self.terminate(key),
            Progress::Waiting if slot.since + self.periods.queue <= now && ticket.withdraw() => {
                self.stats.queue_timeouts.add(1);
                tracing::warn!(peer = %slot.peer, "answered 503: no handler was free in time; try: more --handlers, or a longer --queue-timeout");
                self.respond(key, Response::unavailable("The server is busy.\n"), now);
            }
            Progress::RunningSince(since) if since + self.periods.run <= now => {
                self.stats.run_timeouts.add(1);
                tracing::warn!(peer = %slot.peer, "answered 504: the handler takes too long; try: a longer --timeout");
                ticket.disconnect();
                self.respond(key, Response::text("The application took too long to answer.\n").status(504), now);
            }
            _ => return self.schedule(key, now),
        }
        self.proceed(key, now);
    }
}

impl Periods {
    /// When the connection has to be looked at again, if ever.
    #[inline]
    fn due(&self, slot: &Slot, now: Micros) -> Option<Micros> {
        match slot.stage {
            Stage::Terminating => return None,
            Stage::Lingering => return Some((slot.progress + self.linger).min(slot.linger_until)),
            Stage::Open => {}
        }
        let send = if slot.is_flushed() {
            None
        } else {
            Some((slot.progress + self.send).min((slot.busy_since + self.send_rate_grace).max(now + 1_000_000)))
        };
        let phase = match &slot.ticket {
            Some(ticket) => match ticket.progress() {
                Progress::RunningSince(since) => Some(since + self.run),
                // It may start at any moment, and the shortest limit must not be missed then.
                _ if slot.eof && slot.is_flushed() => Some((slot.since_eof + HALF_CLOSED_WAIT).max(now)),
                _ => Some((slot.since + self.queue).min(now + self.run)),
            },
            None => match slot.http.phase() {
                Phase::Head if slot.begun => Some(slot.since + self.head),
                Phase::Head => Some(slot.since + self.idle(slot)),
                Phase::Body => {
                    let rate = (slot.since + self.body_rate_grace).max(now + 1_000_000);
                    Some((slot.progress + self.body_idle).min(rate))
                }
                Phase::Handling => Some(slot.progress + self.body_idle),
                Phase::Responding if slot.outgoing.as_ref().is_some_and(|outgoing| outgoing.waits_for_handler()) => {
                    Some(slot.since + self.run)
                }
                Phase::Responding | Phase::Closing => None,
            },
        };
        [send, phase].into_iter().flatten().min()
    }

    /// The answers that wait go out more slowly than allowed.
    fn is_read_too_slowly(&self, slot: &Slot, now: Micros) -> bool {
        let elapsed = now - slot.busy_since;
        elapsed >= self.send_rate_grace && u128::from(slot.busy_bytes) * 1_000_000 < u128::from(self.send_rate_min) * u128::from(elapsed)
    }

    /// How long a connection may say nothing between requests, or before the first.
    fn idle(&self, slot: &Slot) -> Micros {
        if slot.serial == 0 { self.first } else { self.keep_alive }
    }
}

/// Things used again.
impl Engine {
    /// The slot that a completion is about. `None`: it is already someone else's, which must not happen.
    #[inline]
    fn find(&self, token: Token) -> Option<usize> {
        let key = self.live(token);
        if key.is_none() {
            self.stats.stale.add(1);
        }
        key
    }

    /// The slot of a connection that may be gone by now.
    #[inline]
    fn live(&self, token: Token) -> Option<usize> {
        let key = token.slot as usize;
        self.slots.get(key).filter(|slot| slot.token == token).map(|_| key)
    }

    fn take_buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES))
    }

    fn give_buffer(&mut self, mut buffer: Vec<u8>) {
        if (1..=BUFFER_KEPT_BYTES).contains(&buffer.capacity()) && self.buffers.len() < BUFFERS_KEPT {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    fn give_chunk(&mut self, chunk: Chunk) {
        if let Payload::Owned(buffer) = chunk.payload {
            self.give_buffer(buffer);
        }
    }

    fn take_exchange(&mut self) -> Box<Exchange> {
        self.exchanges.pop().unwrap_or_default()
    }

    fn recycle(&mut self, mut exchange: Box<Exchange>) {
        if self.exchanges.len() < EXCHANGES_KEPT && Arc::get_mut(&mut exchange.ticket).is_some() {
            exchange.ticket.reset();
            exchange.head_bytes.clear();
            exchange.body.clear();
            exchange.body.shrink_to(BUFFER_KEPT_BYTES);
            exchange.file = None;
            exchange.file_bytes = 0;
            exchange.reserved = None;
            self.exchanges.push(exchange);
        }
    }
}

/// Bugs that the simulation plants, to be sure that it would find them (`sim.rs`).
#[cfg_attr(not(test), allow(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Canary {
    ClosedInFlight,
    DeadlineMissed,
    HeaderFaultForgiven,
    HeaderRenewsTime,
    NextRequestForgotten,
    NotArmedAgain,
    NotWithdrawn,
    OldAnswerTaken,
    ShortSendLosesRest,
    ShortSendRepeats,
    StrangerBelieved,
}

/// The one that is planted: none outside of tests, so that the compiler drops what hangs on it.
#[derive(Default)]
pub(super) struct Planted(#[cfg(test)] pub(super) Option<Canary>);

impl Planted {
    #[inline(always)]
    fn is(&self, _which: Canary) -> bool {
        #[cfg(test)]
        return self.0 == Some(_which);
        #[cfg(not(test))]
        false
    }

    /// How many bytes of a chunk have gone out.
    #[inline(always)]
    fn sent(&self, sent: usize, length: usize) -> usize {
        match sent < length {
            true if self.is(Canary::ShortSendLosesRest) => length,
            true if self.is(Canary::ShortSendRepeats) => 0,
            _ => sent,
        }
    }
}

/// Calls a handler. Whatever it does, there is an answer.
pub fn run(handler: &dyn Handler, request: &Request<'_>, stats: &Stats) -> Response {
    // A handler may leave its own state in disorder when it panics; ours is not touched by it.
    catch_unwind(AssertUnwindSafe(|| handler.handle(request))).unwrap_or_else(|_| {
        stats.panics.add_shared(1);
        tracing::error!(method = request.method(), path = request.path(), "the handler panicked; answered 500");
        internal_error()
    })
}

fn internal_error() -> Response {
    Response::text("Internal server error.\n").status(500)
}
