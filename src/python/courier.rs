//! A courier: what carries requests to one thread of a Python worker, and its answers home.
//!
//! ```text
//!   queue of the core --start--> courier --Op::Send--> channel ==frames==> worker
//!                                   ^                                         |
//!   engine <--answers, pieces-------+----Received----- channel <==frames======+
//! ```
//!
//! It is no thread but a state of the ring thread's (`dispatch.rs` has all of a core): what the driver completes moves it on,
//! and it never waits. It takes the place of a native handler thread, so everything around it stays as it is: the queue's
//! bounds, 503 and 504 by the engine, streams with credit. A slow client holds a stream back, the courier then does not
//! receive, and the worker's send waits.
//!
//! *Batches.* Each crossing costs two changes of process, so requests that take microseconds travel together:
//! all frames of a batch in one send, and all answers that one receive brought go home in one turn. How many that are is
//! learnt: one at first, twice as many while they are quick, one again as soon as one is slow. Only requests that
//! may be repeated (RFC 9110 section 9.2.2) travel together: if the worker dies or stalls over one, the
//! others are given to somebody else, whether it has looked at them or not. A worker may hold back the answers of a batch to
//! send them together, and says in the page how many, so that the one it stalls over is known.
//!
//! *Who answers when something goes wrong.*
//!
//! | | the request that runs | those behind it |
//! |---|---|---|
//! | takes too long | 504, by the engine | back into the queue |
//! | the worker dies before it has begun it | back into the queue | back into the queue |
//! | the worker dies, nothing sent yet | once again when it may be repeated, else 502 | back into the queue |
//! | the worker dies in the middle of a stream | the connection ends early | back into the queue |
//!
//! A request that must not run twice is *marked*: the worker writes its id into the page before it calls the application.

use std::{
    collections::VecDeque,
    io, mem,
    sync::{Arc, atomic::Ordering},
};

use super::{
    dispatch::{Core, Wire},
    frames::{self, Event, Facts, Reader, Violation},
    worker::{Order, RUN_MAX, Report, RequestId, is_marked, lost, may_be_repeated},
};
use crate::{
    driver::{Chunk, Completion, Op, Payload, RecvEnd, Token},
    exchange::{Micros, Progress},
    handler::{Body, Response},
    pool::{Answer, Errand, HOP},
    stream::{Credit, Notice, Stream, WINDOW_BYTES},
};

/// Most requests in one batch.
const DEPTH_MAX: usize = 32;
/// Requests stand behind each other for about this long: enough to make the crossing cheap, too short for anybody to mind.
const BATCH: Micros = 1_000;
/// One that takes longer than this ends that for a while.
const SLOW: Micros = 5_000;
/// A batch takes no more requests once its frames are this long, in bytes.
const BATCH_BYTES: usize = 64 << 10;
/// A busy courier is looked at this often: for deadlines, clients that went away, and requests that others could serve.
const STEP: Micros = 50_000;
/// Requests behind one that has run for this long are for others to serve.
const BEHIND_MAX: Micros = 100_000;
/// So many workers may die over a request that none of them has begun: then it is the request.
const UNBEGUN_MAX: u8 = 8;
/// Pieces of a body are gathered up to this size before they go home, or until nothing more has come.
const PIECE_BYTES: usize = 64 << 10;

pub(super) struct Courier {
    /// Its place among those of its core, and what the supervisor calls it.
    key: usize,
    pub number: u32,
    /// What it was told and is not at rest to do yet.
    orders: VecDeque<Order>,
    /// `None`: there is no worker for it.
    wire: Option<Wire>,
    /// It waits for requests.
    is_idle: bool,
    /// It will have no worker any more.
    is_stopped: bool,
    /// What the worker has, in its order. The first one runs.
    flights: VecDeque<Flight>,
    /// The body that the first one's answer has, in pieces.
    outlet: Option<Outlet>,
    /// Taken from the queue, but not fit to stand behind another.
    held: Option<Errand>,
    reader: Reader,
    out: Vec<u8>,
    /// The worker says no more.
    ended: bool,
    /// It was told to be dead already at the last look.
    was_dead: bool,
    depth: usize,
    batch: Option<Batch>,
    last_id: u32,
    request_id: RequestId,
}

/// What is learnt from.
struct Batch {
    begun: Micros,
    requests: u64,
    /// How long the slowest request took.
    slowest: Micros,
}

/// A request that a worker has.
struct Flight {
    id: u32,
    /// `None`: whatever the worker answers to it, nobody wants it; or it is at home, and its body follows.
    errand: Option<Errand>,
    /// When it became the first.
    since: Micros,
    /// When that was before it asked for more time.
    begun: Micros,
    /// The worker was told that the client is gone.
    gone: bool,
}

/// Where the pieces of a body go.
struct Outlet {
    home: usize,
    token: Token,
    serial: u64,
    /// `None`: nobody has ever wanted it.
    credit: Option<Arc<Credit>>,
    /// How many bytes the engine has not taken in yet.
    ahead: u64,
    gathered: Vec<u8>,
    /// Somebody takes what comes.
    wanted: bool,
}

impl Flight {
    /// The limit counts from a beginning, so that is what moves; never beyond the longest time there is.
    fn extend(&mut self, milliseconds: u32, core: &Core) {
        let until = (core.now + Micros::from(milliseconds) * 1_000).min(self.begun + RUN_MAX);
        self.since = until.saturating_sub(core.shared.run).max(self.since);
    }
}

/// Why a worker is not used any more.
enum Break {
    /// Nothing of the batch was sent.
    Unsent,
    Died,
    Violation(Violation),
    Overdue,
    Stopped,
}

impl Courier {
    pub fn new(key: usize, number: u32, request_id: RequestId) -> Courier {
        Courier {
            key,
            number,
            orders: VecDeque::new(),
            wire: None,
            is_idle: false,
            is_stopped: false,
            flights: VecDeque::new(),
            outlet: None,
            held: None,
            reader: Reader::new(),
            out: Vec::new(),
            ended: false,
            was_dead: false,
            depth: 1,
            batch: None,
            last_id: 0,
            request_id,
        }
    }

    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// More than one request is on its way, so what comes next can wait until the worker pauses.
    pub fn has_batch(&self) -> bool {
        self.flights.len() > 1
    }

    pub fn begun(&self) -> Option<Micros> {
        self.batch.as_ref().map(|batch| batch.begun)
    }

    /// Does what it is told, once it is at rest.
    pub fn tell(&mut self, order: Order, core: &mut Core) {
        self.orders.push_back(order);
        self.settle(core);
    }

    /// Makes a batch of this request and of others that wait, and sends it.
    pub fn start(&mut self, first: Errand, core: &mut Core) {
        self.is_idle = false;
        self.collect(first, core);
        let Some(wire) = self.wire.as_mut().filter(|_| !self.flights.is_empty()) else { return self.settle(core) };
        let worker = &wire.link.worker;
        if !worker.was_tried() {
            worker.tried.store(true, Ordering::Relaxed);
        }
        self.batch = Some(Batch { begun: core.now, requests: self.flights.len() as u64, slowest: 0 });
        core.look_by(core.now + STEP.min(core.shared.run));
        if self.send_files().is_err() {
            return self.fail(&Break::Unsent, core);
        }
        let chunk = Chunk::owned(mem::take(&mut self.out));
        self.send(chunk, core);
    }

    fn send(&mut self, chunk: Chunk, core: &mut Core) {
        if let Some(wire) = &mut self.wire {
            wire.sending = true;
            core.ops.push(Op::Send { token: wire.token, fd: wire.fd(), chunk });
        }
    }

    fn collect(&mut self, first: Errand, core: &mut Core) {
        let alone = !may_be_repeated(&first);
        self.add(first, true, core);
        let others = if alone || self.flights.is_empty() { 0 } else { (self.depth - 1).min(core.shared.pools.share(core.index)) };
        for _ in 0..others {
            if self.out.len() >= BATCH_BYTES {
                break;
            }
            let Some(errand) = core.shared.pools.another_errand(core.index) else { break };
            if !may_be_repeated(&errand) {
                self.held = Some(errand);
                break;
            }
            self.add(errand, false, core);
        }
    }

    /// Writes a request's frame behind those of the batch, unless nobody wants it any more.
    fn add(&mut self, mut errand: Errand, is_first: bool, core: &mut Core) {
        let exchange = &errand.exchange;
        let wanted = match errand.started {
            true => !exchange.ticket.client_disconnected(),
            false if is_first => exchange.ticket.start(core.now),
            false => exchange.ticket.progress() != Progress::Withdrawn,
        };
        if !wanted {
            return core.send_home(errand, None);
        }
        errand.started |= is_first;
        let exchange = &errand.exchange;
        self.last_id = self.last_id.wrapping_add(1);
        let shared = &core.shared;
        let waited = core.now.saturating_sub(exchange.since);
        let facts = Facts {
            request_id: self.request_id.next(),
            queue_seconds: waited as f64 / 1e6,
            deadline: shared.monotonic_zero + (core.now + shared.run) as f64 / 1e6,
            permit: shared.permit,
            marked: is_marked(&errand),
        };
        let left_out = frames::request(&mut self.out, self.last_id, &exchange.request(), facts);
        if left_out > 0 {
            shared.stats[core.index].names_dropped.add_shared(left_out);
            tracing::info!(
                left_out,
                "header fields were left out of the environ: a client could pass them off as others; try: --permit underscore-headers"
            );
        }
        let since = match exchange.ticket.progress() {
            Progress::RunningSince(since) => since,
            _ => core.now,
        };
        self.flights.push_back(Flight { id: self.last_id, errand: Some(errand), since, begun: since, gone: false });
    }

    /// Bodies in files go first, so that the worker finds each when it meets its frame. All that went before were taken, so
    /// there is room for those of a batch.
    fn send_files(&self) -> io::Result<()> {
        let Some(wire) = &self.wire else { return Ok(()) };
        for errand in self.flights.iter().filter_map(|flight| flight.errand.as_ref()) {
            if let Some(file) = &errand.exchange.file {
                // The worker shares our place in the file, and another worker may have moved it.
                io::Seek::rewind(&mut &**file)?;
                wire.link.channel.send_descriptor(file)?;
            }
        }
        Ok(())
    }
}

/// What the driver completes.
impl Courier {
    pub fn handle(&mut self, completion: Completion<'_>, core: &mut Core) {
        let Some(wire) = &mut self.wire else { return };
        match completion {
            Completion::Received { bytes, .. } => {
                self.reader.push(bytes);
                self.take_events(core);
            }
            Completion::RecvEnded { end, .. } => {
                (wire.receiving, wire.stopping) = (false, false);
                self.ended |= matches!(end, RecvEnd::Eof | RecvEnd::Failed(_));
                if self.ended && wire.sending {
                    // Whether anything of it was taken says what its requests are due.
                    core.shut_down(wire);
                }
                self.go_on(core);
            }
            Completion::Sent { chunk, result, .. } => {
                wire.sending = false;
                self.sent(chunk, result, core);
            }
            Completion::Accepted { .. } | Completion::AcceptEnded { .. } => {}
        }
    }

    fn sent(&mut self, mut chunk: Chunk, result: Result<usize, i32>, core: &mut Core) {
        match result {
            Ok(bytes) if bytes > 0 && bytes < chunk.len() && !self.ended => {
                chunk.start += bytes;
                return self.send(chunk, core);
            }
            Ok(bytes) if bytes == chunk.len() => {}
            Err(_) if chunk.start == 0 => return self.fail(&Break::Unsent, core),
            Ok(_) | Err(_) => return self.fail(&Break::Died, core),
        }
        if let Payload::Owned(mut out) = chunk.payload {
            out.clear();
            out.shrink_to(4 * BATCH_BYTES);
            self.out = out;
        }
        self.go_on(core);
    }

    /// Acts on everything that has come.
    fn take_events(&mut self, core: &mut Core) {
        let mut reader = mem::take(&mut self.reader);
        let result = self.take_all(&mut reader, core);
        self.reader = reader;
        self.flush_pieces(core);
        match result {
            Ok(()) => self.go_on(core),
            Err(violation) => self.fail(&Break::Violation(violation), core),
        }
    }

    fn take_all(&mut self, reader: &mut Reader, core: &mut Core) -> Result<(), Violation> {
        while !self.is_held_back() {
            let Some((id, event)) = reader.next_event()? else { break };
            match self.outlet {
                Some(_) => self.take_piece(id, event, core)?,
                None => self.take_event(id, event, core)?,
            }
        }
        Ok(())
    }

    /// The client takes no more of the body for now.
    fn is_held_back(&self) -> bool {
        self.outlet.as_ref().is_some_and(|outlet| outlet.wanted && outlet.ahead >= WINDOW_BYTES)
    }

    /// Receives, or does not, and ends what has come to its end.
    fn go_on(&mut self, core: &mut Core) {
        let held_back = self.is_held_back();
        let Some(wire) = &mut self.wire else { return };
        if held_back {
            core.stop_receiving(wire);
        } else if !self.ended {
            core.receive(wire);
        } else if !wire.sending {
            return self.fail(&Break::Died, core);
        }
        self.settle(core);
    }

    fn take_event(&mut self, id: u32, event: Event<'_>, core: &mut Core) -> Result<(), Violation> {
        match event {
            // Each thread of a worker may say that it is there.
            Event::Ready(_) => return Ok(()),
            Event::Failed(_) => return Err(Violation("a worker that was ready could not load the application")),
            // A thread of the application may speak of a request that is over.
            Event::Extend(_) | Event::Hints(_) if self.flights.front().is_none_or(|first| first.id != id) => return Ok(()),
            _ => {}
        }
        let first = self.flights.front_mut().filter(|first| first.id == id).ok_or(Violation("an answer that nobody asked for"))?;
        let response = match event {
            Event::Response { status, head, body } => {
                if first.errand.is_none() {
                    self.land(core);
                    return Ok(());
                }
                let (mut response, _) = frames::response(status, head, body.is_empty())?;
                response.body = if body.is_empty() { Body::Empty } else { Body::Owned(body.to_vec()) };
                response
            }
            Event::File { status, head, offset, length } => {
                let file = self.wire.as_ref().and_then(|wire| wire.link.channel.receive_file());
                let file = file.ok_or(Violation("a file answer without a regular file"))?;
                let (mut response, _) = frames::response(status, head, false)?;
                response.body = Body::File { file: Arc::new(file), offset, length };
                response
            }
            Event::Begin { status, head, length } => {
                let parsed = if first.errand.is_some() { Some(frames::response(status, head, false)?) } else { None };
                self.begin_stream(parsed, length, core);
                return Ok(());
            }
            Event::Extend(milliseconds) => {
                first.extend(milliseconds, core);
                if let Some(errand) = &first.errand {
                    errand.exchange.ticket.restart(first.since);
                }
                return Ok(());
            }
            Event::Hints(head) => {
                let (hints, _) = frames::response(103, head, true)?;
                if let Some(errand) = &first.errand {
                    let (token, serial) = (errand.exchange.token, errand.exchange.serial);
                    core.answers.push((errand.home, Answer::Hints { token, serial, fields: hints.headers }));
                }
                return Ok(());
            }
            Event::Piece(_) | Event::End { .. } => return Err(Violation("a piece of an answer that was not begun")),
            Event::Pong(_) | Event::Return => return Err(Violation("a frame that belongs to another kind of channel")),
            Event::Ready(_) | Event::Failed(_) => return Ok(()),
        };
        if let Some(errand) = first.errand.take() {
            core.send_home(errand, Some(response));
        }
        self.land(core);
        Ok(())
    }

    /// An answer whose body follows. Without its parsed head, nobody wants it.
    fn begin_stream(&mut self, parsed: Option<(Response, Option<u64>)>, length: Option<u64>, core: &mut Core) {
        let (Some(first), Some(wire)) = (self.flights.front_mut(), &self.wire) else { return };
        let mut outlet = Outlet {
            home: core.index,
            token: Token { slot: 0, generation: 0 },
            serial: 0,
            credit: None,
            ahead: 0,
            gathered: Vec::new(),
            wanted: false,
        };
        match (first.errand.take(), parsed) {
            (Some(errand), Some((mut response, told))) => {
                let credit = core.credit(self.key, first.id);
                response.body = Body::Stream(Stream { length: length.or(told), source: None, credit: credit.clone() });
                (outlet.home, outlet.token, outlet.serial) = (errand.home, errand.exchange.token, errand.exchange.serial);
                (outlet.credit, outlet.wanted) = (Some(credit), true);
                core.send_home(errand, Some(response));
            }
            _ => wire.link.channel.client_gone(first.id),
        }
        self.outlet = Some(outlet);
    }

    fn take_piece(&mut self, id: u32, event: Event<'_>, core: &mut Core) -> Result<(), Violation> {
        let (Some(first), Some(outlet)) = (self.flights.front_mut(), &mut self.outlet) else { return Ok(()) };
        match event {
            Event::Hints(_) => {}
            Event::Extend(_) if id != first.id => {}
            Event::Extend(milliseconds) => {
                first.extend(milliseconds, core);
                if outlet.wanted {
                    let Outlet { home, token, serial, .. } = *outlet;
                    core.answers.push((home, Answer::Extended { token, serial, since: first.since }));
                }
            }
            _ if id != first.id => return Err(Violation("a piece of another answer")),
            Event::Piece(bytes) if outlet.wanted => {
                first.since = first.since.max(core.now);
                outlet.ahead += bytes.len() as u64;
                outlet.gathered.extend_from_slice(bytes);
                if outlet.gathered.len() >= PIECE_BYTES {
                    self.flush_pieces(core);
                }
            }
            Event::Piece(_) => {}
            Event::End { whole } => {
                self.end_stream(whole, core);
                self.land(core);
            }
            _ => return Err(Violation("another answer in the middle of one")),
        }
        Ok(())
    }

    /// Sends home what was gathered of a body.
    fn flush_pieces(&mut self, core: &mut Core) {
        if let Some(outlet) = self.outlet.as_mut().filter(|outlet| !outlet.gathered.is_empty()) {
            let bytes = mem::take(&mut outlet.gathered);
            core.answers.push((outlet.home, Answer::Piece { token: outlet.token, serial: outlet.serial, bytes }));
        }
    }

    fn end_stream(&mut self, whole: bool, core: &mut Core) {
        self.flush_pieces(core);
        if let Some(Outlet { home, token, serial, credit: Some(credit), .. }) = self.outlet.take() {
            credit.finish();
            core.answers.push((home, Answer::Ended { token, serial, whole }));
        }
    }

    /// What the engine did to the body of a stream.
    pub fn take_notice(&mut self, id: u32, notice: Notice, core: &mut Core) {
        let Some(first) = self.flights.front_mut().filter(|first| first.id == id) else { return };
        let (Some(outlet), Some(wire)) = (&mut self.outlet, &self.wire) else { return };
        match notice {
            Notice::Taken(bytes) => {
                first.since = first.since.max(core.now);
                outlet.ahead = outlet.ahead.saturating_sub(bytes);
            }
            Notice::Discarded => outlet.wanted = false,
            Notice::Closed => {
                // The application may notice; in any case it has only so long to come to its end.
                outlet.wanted = false;
                if !mem::replace(&mut first.gone, true) {
                    wire.link.channel.client_gone(id);
                }
            }
        }
        self.take_events(core);
    }

    /// The first request is done with: the next one begins.
    fn land(&mut self, core: &mut Core) {
        if let (Some(first), Some(batch)) = (self.flights.pop_front(), &mut self.batch) {
            batch.slowest = batch.slowest.max(core.now.saturating_sub(first.begun));
        }
        if let Some(next) = self.flights.front_mut().filter(|next| next.errand.is_none()) {
            (next.since, next.begun) = (core.now, core.now);
        }
        self.begin(0, core);
    }

    /// The worker is at this one, so that its time counts; unless nobody wants it any more.
    fn begin(&mut self, index: usize, core: &mut Core) {
        let Some(flight) = self.flights.get_mut(index) else { return };
        let Some(mut errand) = flight.errand.take() else { return };
        if errand.started {
            flight.errand = Some(errand);
        } else if errand.exchange.ticket.start(core.now) {
            errand.started = true;
            (flight.since, flight.begun) = (core.now, core.now);
            flight.errand = Some(errand);
        } else {
            (flight.since, flight.begun) = (core.now, core.now);
            core.send_home(errand, None);
        }
    }
}

/// Between two batches.
impl Courier {
    /// With nothing under way, it does what it was told meanwhile, and waits for requests.
    fn settle(&mut self, core: &mut Core) {
        if !self.flights.is_empty() || self.wire.as_ref().is_some_and(|wire| wire.sending) {
            return;
        }
        if let Some(batch) = self.batch.take() {
            self.learn(&batch, core);
        }
        while let Some(order) = self.orders.pop_front() {
            self.obey(order, core);
        }
        if self.wire.is_none() {
            self.held.take().into_iter().for_each(|errand| core.shared.pools.give_back(errand));
        } else if let Some(errand) = self.held.take() {
            self.set_idle(false, core);
            self.start(errand, core);
        } else {
            self.set_idle(true, core);
        }
    }

    fn set_idle(&mut self, idle: bool, core: &mut Core) {
        if self.is_idle != idle {
            self.is_idle = idle;
            core.change_idle(self.key, idle);
        }
    }

    fn obey(&mut self, order: Order, core: &mut Core) {
        match order {
            Order::Link(link) => {
                self.unlink(core);
                self.reader = Reader::new();
                self.depth = 1;
                self.wire = core.open(self.key, link);
            }
            Order::Leave(id) | Order::Drop(id) if self.wire.as_ref().is_none_or(|wire| wire.link.worker.id != id) => {}
            Order::Leave(_) | Order::Drop(_) => self.unlink(core),
            Order::Stop => {
                self.unlink(core);
                self.is_stopped = true;
            }
        }
    }

    fn unlink(&mut self, core: &mut Core) {
        self.set_idle(false, core);
        if let Some(wire) = self.wire.take() {
            wire.link.channel.end_soon();
            core.shared.pools.change_able(core.index, -1);
            core.close(wire);
        }
    }

    /// How long a batch took says how long the next may be: for about [`BATCH`], twice the last one's at most.
    fn learn(&mut self, batch: &Batch, core: &mut Core) {
        let each = (core.now.saturating_sub(batch.begun) / batch.requests).max(1);
        let fitting = usize::try_from(BATCH / each).unwrap_or(DEPTH_MAX);
        self.depth = if batch.slowest > SLOW { 1 } else { fitting.min(2 * self.depth).clamp(1, DEPTH_MAX) };
        core.shared.pools.set_pace(core.index, if batch.slowest > SLOW { HOP } else { each });
        let Some(wire) = &self.wire else { return };
        let worker = &wire.link.worker;
        let served = worker.served.fetch_add(batch.requests, Ordering::Relaxed) + batch.requests;
        if worker.served_max > 0 && served >= worker.served_max && !worker.used.swap(true, Ordering::Relaxed) {
            core.shared.reporter.send(Report::Used { worker: worker.clone() });
        }
    }
}

/// What takes too long, and what goes wrong.
impl Courier {
    /// Called at least every [`STEP`] while it is busy.
    pub fn look(&mut self, core: &mut Core) {
        let Some(begun) = self.begun() else { return };
        let runs = self.runs();
        if runs > 0 {
            self.begin(runs, core);
        }
        let held_back = self.is_held_back();
        let Some(wire) = &self.wire else { return };
        let is_dead = wire.link.worker.has_status();
        let was_dead = mem::replace(&mut self.was_dead, is_dead);
        if is_dead && was_dead && !held_back {
            // What it said before has come since the last look, and a child of the worker may hold the socket open for years.
            return self.fail(&Break::Died, core);
        }
        let Some(runner) = self.flights.get_mut(runs) else {
            // All is answered, but it does not take what it was sent.
            return if core.now >= begun + core.shared.run { self.fail(&Break::Overdue, core) } else { core.look_by(core.now + STEP) };
        };
        if held_back {
            // It is the client that is slow, and has a limit of its own.
            runner.since = runner.since.max(core.now);
        }
        let due = runner.since + core.shared.run;
        if core.now >= due {
            return self.fail(&Break::Overdue, core);
        }
        core.look_by(due.min(core.now + STEP));
        if !runner.gone && runner.errand.as_ref().is_some_and(|errand| errand.exchange.ticket.client_disconnected()) {
            runner.gone = true;
            wire.link.channel.client_gone(runner.id);
        }
        let hangs = core.now >= runner.since + BEHIND_MAX;
        let pools = &core.shared.pools;
        if pools.is_anyone_idle() || hangs && pools.has_others() {
            self.give_back_waiting(runs, core);
        }
    }

    /// Which of the flights the worker is at.
    fn runs(&self) -> usize {
        let held = self.wire.as_ref().map_or(0, |wire| wire.link.channel.held());
        held.min(self.flights.len().saturating_sub(1))
    }

    /// What the worker is not at is for others to serve: it may be repeated, or would not stand here.
    fn give_back_waiting(&mut self, runs: usize, core: &Core) {
        let flights = self.flights.iter_mut().enumerate().filter(|(index, _)| *index != runs);
        for errand in flights.filter_map(|(_, flight)| flight.errand.take()).chain(self.held.take()) {
            core.shared.pools.give_back(errand);
        }
    }

    /// The server ends: whoever still waits for this worker is gone.
    pub fn stop(&mut self, core: &mut Core) {
        self.orders.clear();
        self.is_stopped = true;
        if self.batch.is_some() {
            self.fail(&Break::Stopped, core);
        } else {
            self.unlink(core);
        }
    }

    /// The worker is lost. Each of its requests gets what it is due.
    fn fail(&mut self, why: &Break, core: &mut Core) {
        let index = if matches!(why, Break::Unsent) { 0 } else { self.runs() };
        self.begin(index, core);
        self.end_stream(false, core);
        self.set_idle(false, core);
        let Some(wire) = self.wire.take() else { return };
        let worker = wire.link.worker.clone();
        core.shared.pools.change_able(core.index, -1);
        self.give_back_waiting(index, core);
        let flight = self.flights.remove(index);
        self.flights.clear();
        self.out.clear();
        (self.batch, self.ended, self.was_dead) = (None, false, false);
        let id = flight.as_ref().map_or(0, |flight| flight.id);
        let was_idle = flight.is_none();
        let runs = flight.and_then(|flight| flight.errand);
        let request = runs.as_ref().map_or_else(String::new, |errand| {
            let request = errand.exchange.request();
            format!("{} {}", request.method(), request.path())
        });
        if let Some(mut errand) = runs {
            let unbegun =
                matches!(why, Break::Died) && is_marked(&errand) && wire.link.channel.last_begun() != id && errand.unbegun < UNBEGUN_MAX;
            // Each thread of a worker may have met the same death.
            let first_time = errand.lost_with.is_none_or(|id| id == worker.id);
            let again = !errand.exchange.ticket.client_disconnected() && (unbegun || first_time && may_be_repeated(&errand));
            match why {
                Break::Unsent => {
                    errand.started = true;
                    core.shared.pools.give_back(errand);
                }
                // The engine has answered, or is about to.
                Break::Overdue | Break::Stopped => core.send_home(errand, None),
                Break::Died | Break::Violation(_) if again => {
                    errand.started = true;
                    match unbegun {
                        true => errand.unbegun += 1,
                        false => errand.lost_with = Some(worker.id),
                    }
                    core.shared.pools.give_back(errand);
                }
                Break::Died | Break::Violation(_) => {
                    core.send_home(errand, Some(lost()));
                }
            }
        }
        let pid = worker.pid.load(Ordering::Relaxed);
        let broken = |why, ended| Report::Broken { worker: worker.clone(), why, ended };
        let report = match why {
            Break::Stopped => None,
            Break::Overdue => {
                tracing::error!(
                    pid,
                    request,
                    "the worker took too long and is replaced; try: a longer --timeout, or see where it was in the traceback"
                );
                Some(Report::Overdue { worker: worker.clone() })
            }
            Break::Unsent => Some(broken("it ended while it was idle".to_owned(), true)),
            Break::Died if was_idle => Some(broken("it ended while it was idle".to_owned(), true)),
            Break::Died if request.is_empty() => Some(broken("it ended".to_owned(), true)),
            Break::Died => Some(broken(format!("it ended while it had {request}"), true)),
            Break::Violation(violation) => Some(broken(format!("its channel brought {violation}"), false)),
        };
        report.into_iter().for_each(|report| core.shared.reporter.send(report));
        // Only now, so that a worker that ends because of it is known to be replaced already.
        core.close(wire);
        self.settle(core);
    }
}
