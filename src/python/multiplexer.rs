//! A multiplexer: the thread that carries many requests at a time to one Python worker, and their answers home.
//!
//! ```text
//!   queue of the core --take--> multiplexer ==requests, words==> worker: greenlet, greenlet, ...
//!        bell -----------------------^  ^   <==answers, pieces==    |
//!   ring thread <--answers, pieces------+                           in any order
//!        +-----credit of each stream----+
//! ```
//!
//! It is to a worker that runs requests by turns (`--worker-class gevent`) what a courier is to one that runs them one by one.
//! It never waits for one of them: whatever it waits for, one poll(2) waits for all of it, the worker's socket and a bell
//! ([`Waker`]) that is rung for requests, orders and credit.
//!
//! *Who gets a request.* A worker with fewer than its limit in flight, the least busy one first (`Pools::share_of`), and none
//! that is *silent*: behind the requests that it is sent travels a PING, which it answers when all of them have begun. While
//! that takes longer than [`SILENT`], what is waiting is better off where somebody else can take it.
//!
//! *Streams.* A worker may be a window ahead of what the ring thread has taken in of each body; the credit for more is a frame
//! of its own. So a client that does not read costs a window, and holds nobody.
//!
//! *Who answers when something goes wrong.*
//!
//! | | the request | the others of the worker |
//! |---|---|---|
//! | takes too long | 504, by the ring thread, and it is cancelled in the worker | nothing |
//! | and the worker is silent for [`LIFELESS`] | | the worker is replaced: as if it had died |
//! | the worker dies | an early end when something was sent; to another when not begun; once more when repeatable; else 502 | the same |
//!
//! A worker that is to go (it served its number of requests, or is told to end) keeps what it has begun, for as long as a
//! drain may take, while its successor is given what comes.

use std::{
    collections::HashMap,
    io::{self, Seek},
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::{
    frames::{self, Event, Facts, Reader, Violation, Word},
    worker::{Link, Order, RUN_MAX, Report, RequestId, Shared, lost, may_be_repeated},
};
use crate::{
    driver::{Token, waker::Waker},
    exchange::{Micros, Progress},
    handler::{Body, Response},
    pool::{Answer, Errand, Taker},
    stream::{Credit, GRANT_BYTES, Notice, Stream, WINDOW_BYTES},
};

/// Deadlines, and clients that went away, are looked at this often while there are requests.
const STEP: Micros = 50_000;
/// A worker that takes longer than this to answer a PING gets nothing more until it has.
const SILENT: Micros = 50_000;
/// And when a request of it is overdue meanwhile, it is replaced after this long (or as long as a request may take, when that is
/// less): something computes, and lets nobody else run.
const LIFELESS: Micros = 5_000_000;
/// By so long after its time the ring thread has answered a request with 504.
const ANSWERED: Micros = 1_000_000;
/// A worker that has not ended a request this long after it was told to is replaced in order.
const CANCEL_WAIT: Micros = 10_000_000;
/// A worker gets no more requests while so many bytes wait for it to read.
const UNSENT_MAX: usize = 256 << 10;
/// The worker's socket is read so many times before anything else has its turn.
const READS: usize = 4;

pub struct Multiplexer {
    shared: Arc<Shared>,
    core: usize,
    orders: Receiver<Order>,
    waker: Waker,
    /// Most requests in flight to one worker.
    limit: usize,
    taker: Option<Arc<Taker>>,
    /// The worker that requests go to.
    line: Option<Line>,
    /// Those that only finish what they have.
    leaving: Vec<Line>,
    /// Taken, but there was no room for the descriptor of its body.
    held: Option<Errand>,
    notices: Receiver<(u32, Notice)>,
    notices_in: Sender<(u32, Notice)>,
    answers: Vec<(usize, Answer)>,
    last_id: u32,
    request_id: RequestId,
    now: Micros,
    /// When deadlines are looked at again.
    look_at: Micros,
    /// No more workers: it ends with the last of those that leave.
    stopping: bool,
}

/// A worker, what is on its way to it, and what it has.
struct Line {
    link: Link,
    /// Apart while it lends out what it has read.
    reader: Option<Reader>,
    out: Vec<u8>,
    /// How many bytes of `out` have left.
    sent: usize,
    /// How many bytes have left before the first one of `out`.
    sent_before: u64,
    flights: HashMap<u32, Flight>,
    /// When the PING was sent that is not answered yet.
    ping: Option<Micros>,
    pings: u32,
    /// Streams that bytes were gathered of since the last look.
    touched: Vec<u32>,
    leaving_since: Option<Micros>,
}

/// A request that a worker has.
struct Flight {
    what: What,
    /// When it began, or last made progress; moved when it asks for more time.
    since: Micros,
    begun: Micros,
    /// Where on the line its frame begins.
    at: u64,
    /// The worker was told that the client is gone.
    gone: bool,
    /// When the worker was told to end it.
    cancelled: Option<Micros>,
}

enum What {
    /// Nothing was answered yet.
    Errand(Errand),
    Stream(Outlet),
}

/// Where the pieces of a body go.
struct Outlet {
    home: usize,
    token: Token,
    serial: u64,
    credit: Arc<Credit>,
    /// Pieces of one turn travel as one.
    gathered: Vec<u8>,
    /// How many bytes of its window the worker has used up.
    used: u64,
    /// The worker may still be given credit, but nobody wants the bytes.
    wanted: bool,
}

/// Why a worker is not used any more.
enum Break {
    Died,
    Violation(Violation),
    Lifeless,
}

impl From<Violation> for Break {
    fn from(violation: Violation) -> Break {
        Break::Violation(violation)
    }
}

impl Multiplexer {
    pub fn new(shared: Arc<Shared>, core: usize, number: u32, orders: Receiver<Order>, waker: Waker, limit: usize) -> Multiplexer {
        let request_id = RequestId::new(shared.start, number);
        let (notices_in, notices) = unbounded();
        Multiplexer {
            shared,
            core,
            orders,
            waker,
            limit,
            taker: None,
            line: None,
            leaving: Vec::new(),
            held: None,
            notices,
            notices_in,
            answers: Vec::new(),
            last_id: 0,
            request_id,
            now: 0,
            look_at: 0,
            stopping: false,
        }
    }

    /// The thread's life.
    pub fn run(mut self) {
        while self.turn() {}
        self.unlink();
        for line in std::mem::take(&mut self.leaving) {
            line.flights.into_values().for_each(|flight| self.abandon(flight));
        }
        self.flush_home();
    }

    /// One look at everything: waits until something happens or is due. False: the end.
    fn turn(&mut self) -> bool {
        self.now = self.shared.clock.now();
        self.take_orders();
        if self.shared.stopping.load(Ordering::Relaxed) || self.stopping && self.leaving.is_empty() {
            return false;
        }
        if self.line.as_ref().is_some_and(|line| line.leaving_since.is_some()) {
            self.unlink();
        }
        while let Ok((id, notice)) = self.notices.try_recv() {
            self.take_notice(id, notice);
        }
        if self.look_at <= self.now {
            self.look_up();
        }
        self.take_requests();
        self.each_line(Self::send);
        self.flush_home();
        let readable = self.wait();
        self.now = self.shared.clock.now();
        self.receive(&readable);
        true
    }

    /// Waits for the workers, or for the bell. Gives the ids of the workers that have something to say.
    fn wait(&mut self) -> Vec<u64> {
        self.waker.sleep();
        let more = !self.orders.is_empty() || !self.notices.is_empty() || self.has_share();
        let left = self.look_at.saturating_sub(self.now);
        let limit = if more {
            Some(0)
        } else {
            self.lines().any(|line| !line.flights.is_empty() || line.ping.is_some() || line.leaving_since.is_some()).then_some(left)
        };
        let limit = limit.map(Duration::from_micros);
        let limit = limit.map(|left| Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() });
        let room = |waits: bool| if waits { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut polled = vec![PollFd::new(&self.waker, PollFlags::IN)];
        polled.extend(self.lines().map(|line| PollFd::from_borrowed_fd(line.link.channel.data.as_fd(), room(line.unsent() > 0))));
        if let (Some(line), Some(_)) = (&self.line, &self.held) {
            polled.push(PollFd::from_borrowed_fd(line.link.channel.descriptors.as_fd(), PollFlags::OUT));
        }
        let ready = rustix::event::poll(&mut polled, limit.as_ref());
        self.waker.awake();
        if ready.is_err() {
            return Vec::new();
        }
        if !polled[0].revents().is_empty() {
            self.waker.drain();
        }
        let heard = self.lines().zip(&polled[1..]);
        let heard = heard.filter(|(_, polled)| polled.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR));
        heard.map(|(line, _)| line.link.worker.id).collect()
    }

    fn lines(&self) -> impl Iterator<Item = &Line> {
        self.line.iter().chain(&self.leaving)
    }

    /// Does something for each worker. Those for which it fails are lost.
    fn each_line(&mut self, mut act: impl FnMut(&mut Multiplexer, &mut Line) -> Result<(), Break>) {
        if let Some(mut line) = self.line.take() {
            match act(self, &mut line) {
                Ok(()) => self.line = Some(line),
                Err(why) => {
                    self.leave_queue();
                    self.fall_apart(line, &why);
                }
            }
        }
        for mut line in std::mem::take(&mut self.leaving) {
            match act(self, &mut line) {
                Ok(()) => self.leaving.push(line),
                Err(why) => self.fall_apart(line, &why),
            }
        }
        self.leaving.retain(|line| !line.flights.is_empty());
    }

    fn flush_home(&mut self) {
        if !self.answers.is_empty() {
            self.shared.pools.send_home(&mut self.answers);
        }
    }
}

/// Orders and notices.
impl Multiplexer {
    fn take_orders(&mut self) {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Link(link)) => self.obey_link(link),
                Ok(Order::Drop(id)) => {
                    // It is dead, but what it said before may still be there. A child of it may keep the socket open.
                    self.each_line(|this, line| {
                        if line.link.worker.id != id {
                            return Ok(());
                        }
                        while this.receive_once(line)? {}
                        Err(Break::Died)
                    });
                }
                Ok(Order::Leave(id)) if self.line.as_ref().is_some_and(|line| line.link.worker.id == id) => self.unlink(),
                Ok(Order::Leave(_)) => {}
                // Who gave orders may be gone with the last one.
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) if !self.stopping => {
                    self.stopping = true;
                    self.unlink();
                }
                Ok(Order::Stop) | Err(_) => return,
            }
        }
    }

    fn obey_link(&mut self, link: Link) {
        self.unlink();
        let channel = &link.channel;
        if channel.data.set_nonblocking(true).and_then(|()| channel.descriptors.set_nonblocking(true)).is_ok() {
            self.line = Some(Line::new(link));
            self.taker = Some(self.shared.pools.add_taker(self.core, self.waker.clone()));
        }
    }

    /// The worker gets no more requests, and finishes those it has.
    fn unlink(&mut self) {
        self.leave_queue();
        if let Some(mut line) = self.line.take().filter(|line| !line.flights.is_empty()) {
            line.leaving_since.get_or_insert(self.now);
            self.leaving.push(line);
        }
    }

    fn leave_queue(&mut self) {
        if let Some(errand) = self.held.take() {
            self.shared.pools.give_back(errand);
        }
        if let Some(taker) = self.taker.take() {
            self.shared.pools.remove_taker(self.core, &taker);
        }
    }

    /// What the ring thread did to the body of a stream.
    fn take_notice(&mut self, id: u32, notice: Notice) {
        let line = self.line.iter_mut().chain(&mut self.leaving).find(|line| line.flights.contains_key(&id));
        let Some(line) = line else { return };
        let Some(Flight { what: What::Stream(outlet), since, gone, .. }) = line.flights.get_mut(&id) else { return };
        match notice {
            Notice::Taken(bytes) => {
                *since = self.now.max(*since);
                outlet.used = outlet.used.saturating_sub(bytes);
                frames::word(&mut line.out, id, Word::Credit, u32::try_from(bytes).unwrap_or(u32::MAX));
            }
            Notice::Closed if !*gone => {
                *gone = true;
                outlet.wanted = false;
                frames::word(&mut line.out, id, Word::Gone, 0);
            }
            Notice::Closed => {}
            Notice::Discarded => {
                outlet.wanted = false;
                let used = std::mem::take(&mut outlet.used);
                frames::word(&mut line.out, id, Word::Credit, u32::try_from(used).unwrap_or(u32::MAX));
            }
        }
    }
}

/// Requests.
impl Multiplexer {
    /// Takes what is this worker's to take of the requests that wait.
    fn take_requests(&mut self) {
        let (Some(mut line), Some(taker)) = (self.line.take(), self.taker.clone()) else { return };
        let pools = self.shared.pools.clone();
        let before = line.flights.len();
        if let Some(errand) = self.held.take() {
            self.add(&mut line, errand);
        }
        if self.has_room(&line) {
            pools.set_load(self.core, &taker, Some(line.flights.len()));
            for _ in 0..pools.share_of(self.core, &taker) {
                if !self.has_room(&line) {
                    break;
                }
                let Some(errand) = pools.another_errand(self.core) else { break };
                self.add(&mut line, errand);
            }
            if self.has_room(&line)
                && let Some(errand) = pools.stranded_errand(self.core)
            {
                self.add(&mut line, errand);
            }
        }
        if line.flights.len() > before && line.ping.is_none() {
            line.ping(self.now);
        }
        pools.set_load(self.core, &taker, self.has_room(&line).then_some(line.flights.len()));
        pools.pass_on(self.core);
        if self.look_at <= self.now && !line.flights.is_empty() {
            self.look_at = self.now + STEP;
        }
        self.line = Some(line);
    }

    fn has_room(&self, line: &Line) -> bool {
        line.flights.len() < self.limit && line.unsent() < UNSENT_MAX && !line.is_silent(self.now) && self.held.is_none()
    }

    fn has_share(&self) -> bool {
        let pools = &self.shared.pools;
        self.taker.as_ref().is_some_and(|taker| pools.share_of(self.core, taker) > 0 || taker.takes() && pools.has_stranded(self.core))
    }

    /// Writes a request's frame behind the others, unless nobody wants it any more.
    fn add(&mut self, line: &mut Line, mut errand: Errand) {
        let ticket = &errand.exchange.ticket;
        let wanted = if errand.started { !ticket.client_disconnected() } else { ticket.start(self.now) };
        if !wanted {
            return self.send_home(errand, None);
        }
        errand.started = true;
        if let Some(file) = &errand.exchange.file {
            // The worker shares our place in the file, and another worker may have moved it.
            match (&**file).rewind().and_then(|()| line.link.channel.send_descriptor(file)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.held = Some(errand);
                    return;
                }
                // The worker is gone, as its socket will say.
                Err(_) => return self.shared.pools.give_back(errand),
            }
        }
        let exchange = &errand.exchange;
        let since = match exchange.ticket.progress() {
            Progress::RunningSince(since) => since,
            _ => self.now,
        };
        self.last_id = self.last_id.wrapping_add(1).max(1);
        while self.lines().any(|line| line.flights.contains_key(&self.last_id)) || line.flights.contains_key(&self.last_id) {
            self.last_id = self.last_id.wrapping_add(1).max(1);
        }
        let shared = &self.shared;
        let facts = Facts {
            request_id: self.request_id.next(),
            queue_seconds: since.saturating_sub(exchange.since) as f64 / 1e6,
            deadline: shared.monotonic_zero + (since + shared.run) as f64 / 1e6,
            permit: shared.permit,
            marked: false,
        };
        let at = line.sent_before + line.out.len() as u64;
        let left_out = frames::request(&mut line.out, self.last_id, &exchange.request(), facts);
        if left_out > 0 {
            shared.stats[self.core].names_dropped.add_shared(left_out);
            tracing::info!(
                left_out,
                "header fields were left out of the environ: a client could pass them off as others; try: --permit underscore-headers"
            );
        }
        let flight = Flight { what: What::Errand(errand), since, begun: since, at, gone: false, cancelled: None };
        line.flights.insert(self.last_id, flight);
        line.link.worker.tried.store(true, Ordering::Relaxed);
    }

    /// As much as the socket has room for. The rest waits for more.
    fn send(&mut self, line: &mut Line) -> Result<(), Break> {
        while line.unsent() > 0 {
            match rustix::net::send(&line.link.channel.data, &line.out[line.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(bytes) => line.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => {
                    // What it said before is heard first.
                    while self.receive_once(line)? {}
                    return Err(Break::Died);
                }
            }
        }
        line.sent_before += line.sent as u64;
        line.sent = 0;
        line.out.clear();
        line.out.shrink_to(UNSENT_MAX);
        Ok(())
    }
}

/// Answers.
impl Multiplexer {
    /// Hears what these workers have to say.
    fn receive(&mut self, readable: &[u64]) {
        self.each_line(|this, line| {
            if !readable.contains(&line.link.worker.id) {
                return Ok(());
            }
            for _ in 0..READS {
                if !this.receive_once(line)? {
                    break;
                }
            }
            Ok(())
        });
        self.flush_home();
    }

    /// False: there is nothing more for now.
    fn receive_once(&mut self, line: &mut Line) -> Result<bool, Break> {
        let reader = line.reader.as_mut().expect("put back below");
        let room = reader.room();
        let size = room.len();
        let received = match rustix::net::recv(&line.link.channel.data, room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Break::Died),
            Ok((bytes, _)) => bytes,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(_) => return Err(Break::Died),
        };
        reader.add(received);
        let mut reader = line.reader.take().expect("looked at above");
        let mut taken = Ok(());
        while taken.is_ok() {
            taken = match reader.next_event() {
                Ok(Some((id, event))) => self.take_event(line, id, event),
                Ok(None) => break,
                Err(violation) => Err(violation),
            };
        }
        line.reader = Some(reader);
        self.flush_pieces(line);
        taken?;
        Ok(received == size)
    }

    fn take_event(&mut self, line: &mut Line, id: u32, event: Event<'_>) -> Result<(), Violation> {
        match event {
            Event::Ready(_) => return Ok(()),
            Event::Failed(_) => return Err(Violation("a worker that was ready could not load the application")),
            Event::Pong(number) if line.ping.is_some() && number == line.pings => {
                line.ping = None;
                return Ok(());
            }
            Event::Pong(_) => return Err(Violation("an answer to a ping that was not sent")),
            Event::Return if id == 0 => {
                line.leaving_since.get_or_insert(self.now);
                self.replace(line);
                return Ok(());
            }
            // What the application has begun in the background may speak of a request that is over.
            Event::Extend(_) | Event::Hints(_) if !line.flights.contains_key(&id) => return Ok(()),
            _ => {}
        }
        let flight = line.flights.get_mut(&id).ok_or(Violation("an answer that nobody asked for"))?;
        match (event, &mut flight.what) {
            (Event::Hints(head), What::Errand(errand)) => {
                let (hints, _) = frames::response(103, head, true)?;
                let (token, serial) = (errand.exchange.token, errand.exchange.serial);
                self.answers.push((errand.home, Answer::Hints { token, serial, fields: hints.headers }));
            }
            (Event::Hints(_), What::Stream(_)) => {}
            (Event::Response { status, head, body }, What::Errand(_)) => {
                let (mut response, _) = frames::response(status, head, body.is_empty())?;
                response.body = if body.is_empty() { Body::Empty } else { Body::Owned(body.to_vec()) };
                self.answer(line, id, response);
            }
            (Event::File { status, head, offset, length }, What::Errand(_)) => {
                let file = line.link.channel.receive_file().ok_or(Violation("a file answer without a regular file"))?;
                let (mut response, _) = frames::response(status, head, false)?;
                response.body = Body::File { file: Arc::new(file), offset, length };
                self.answer(line, id, response);
            }
            (Event::Begin { length: Some(_), .. }, _) => return Err(Violation("an answer too long for a channel that others share")),
            (Event::Begin { status, head, length: None }, What::Errand(_)) => {
                let (response, told) = frames::response(status, head, false)?;
                self.begin(flight, id, response, told);
            }
            (Event::Piece(bytes), What::Stream(outlet)) => {
                outlet.used += bytes.len() as u64;
                if outlet.used > WINDOW_BYTES {
                    return Err(Violation("more of a body than there was credit for"));
                }
                if outlet.wanted {
                    flight.since = flight.since.max(self.now);
                    if outlet.gathered.is_empty() {
                        line.touched.push(id);
                    }
                    outlet.gathered.extend_from_slice(bytes);
                } else if outlet.used >= GRANT_BYTES && !flight.gone {
                    // Nobody wants it, and the application may come to its end.
                    let used = std::mem::take(&mut outlet.used);
                    frames::word(&mut line.out, id, Word::Credit, u32::try_from(used).unwrap_or(u32::MAX));
                }
            }
            (Event::End { whole }, What::Stream(outlet)) => {
                outlet.credit.finish();
                let Outlet { home, token, serial, .. } = *outlet;
                if !outlet.gathered.is_empty() {
                    let bytes = std::mem::take(&mut outlet.gathered);
                    self.answers.push((home, Answer::Piece { token, serial, bytes }));
                }
                self.answers.push((home, Answer::Ended { token, serial, whole }));
                line.flights.remove(&id);
                self.count(line);
            }
            (Event::Return, What::Errand(_)) => self.returned(line, id),
            (Event::Extend(milliseconds), what) => {
                // The limit counts from a beginning, so that is what moves; never beyond the longest time there is.
                let until = (self.now + Micros::from(milliseconds) * 1_000).min(flight.begun + RUN_MAX);
                flight.since = until.saturating_sub(self.shared.run).max(flight.since);
                match what {
                    What::Errand(errand) => errand.exchange.ticket.restart(flight.since),
                    What::Stream(Outlet { home, token, serial, .. }) => {
                        let (token, serial, since) = (*token, *serial, flight.since);
                        self.answers.push((*home, Answer::Extended { token, serial, since }));
                    }
                }
            }
            (_, What::Errand(_)) => return Err(Violation("a piece of an answer that was not begun")),
            (_, What::Stream(_)) => return Err(Violation("another answer in the middle of one")),
        }
        Ok(())
    }

    fn answer(&mut self, line: &mut Line, id: u32, response: Response) {
        if let Some(Flight { what: What::Errand(errand), .. }) = line.flights.remove(&id) {
            self.send_home(errand, Some(response));
        }
        self.count(line);
    }

    /// An answer whose body follows in pieces.
    fn begin(&mut self, flight: &mut Flight, id: u32, mut response: Response, told: Option<u64>) {
        let (notices, waker) = (self.notices_in.clone(), self.waker.clone());
        let credit = Arc::new(Credit::told(move |notice| {
            // The receiver may have ended, and then nobody has to know.
            let _ = notices.send((id, notice));
            waker.wake();
        }));
        let What::Errand(Errand { exchange, home, .. }) = &flight.what else { return };
        let (home, token, serial) = (*home, exchange.token, exchange.serial);
        let outlet = Outlet { home, token, serial, credit: credit.clone(), gathered: Vec::new(), used: 0, wanted: true };
        response.body = Body::Stream(Stream { length: told, source: None, credit });
        flight.since = self.now;
        if let What::Errand(errand) = std::mem::replace(&mut flight.what, What::Stream(outlet)) {
            self.send_home(errand, Some(response));
        }
    }

    /// Sends home what was gathered of the streams.
    fn flush_pieces(&mut self, line: &mut Line) {
        for id in line.touched.drain(..) {
            let Some(Flight { what: What::Stream(outlet), .. }) = line.flights.get_mut(&id) else { continue };
            let Outlet { home, token, serial, .. } = *outlet;
            let bytes = std::mem::take(&mut outlet.gathered);
            if !bytes.is_empty() {
                self.answers.push((home, Answer::Piece { token, serial, bytes }));
            }
        }
    }

    /// The worker has not begun this request, and will not.
    fn returned(&mut self, line: &mut Line, id: u32) {
        let Some(Flight { what: What::Errand(errand), .. }) = line.flights.remove(&id) else { return };
        if errand.exchange.ticket.client_disconnected() {
            return self.send_home(errand, None);
        }
        self.shared.pools.give_back(errand);
    }

    /// One more was answered.
    fn count(&mut self, line: &Line) {
        let worker = &line.link.worker;
        let served = worker.served.fetch_add(1, Ordering::Relaxed) + 1;
        if worker.served_max > 0 && served >= worker.served_max {
            self.replace(line);
        }
    }

    /// Has a successor made, that takes over once it is ready.
    fn replace(&self, line: &Line) {
        let worker = &line.link.worker;
        if !worker.used.swap(true, Ordering::Relaxed) {
            self.shared.reporter.send(Report::Used { worker: worker.clone() });
        }
    }

    fn send_home(&mut self, mut errand: Errand, response: Option<Response>) {
        errand.exchange.response = response;
        self.answers.push((errand.home, Answer::Response(errand.exchange)));
    }
}

/// What takes too long, and what goes wrong.
impl Multiplexer {
    /// Looks at every request: is it overdue, is its client still there?
    fn look_up(&mut self) {
        self.look_at = self.now + STEP;
        self.each_line(Self::look_at_line);
    }

    fn look_at_line(&mut self, line: &mut Line) -> Result<(), Break> {
        let (now, run) = (self.now, self.shared.run);
        let drained_out = line.leaving_since.is_some_and(|since| now >= since + self.shared.drain);
        let (mut overdue, mut stuck) = (false, false);
        for (&id, flight) in &mut line.flights {
            // The ring thread answers 504 first, for the worker's own answer is none.
            let mut due = flight.since + run;
            match &flight.what {
                // While it waits for its client, it is the client that is slow.
                What::Stream(outlet) if outlet.wanted && outlet.used >= WINDOW_BYTES => flight.since = now.max(flight.since),
                What::Stream(_) => {}
                What::Errand(errand) if !errand.exchange.ticket.client_disconnected() => due += ANSWERED,
                What::Errand(_) if now < due && !flight.gone => {
                    flight.gone = true;
                    frames::word(&mut line.out, id, Word::Gone, 0);
                }
                What::Errand(_) => {}
            }
            if now < due && !drained_out {
                continue;
            }
            overdue = true;
            match flight.cancelled {
                None => {
                    flight.cancelled = Some(now);
                    frames::word(&mut line.out, id, Word::Cancel, 0);
                    let (pid, request) = (line.link.worker.pid.load(Ordering::Relaxed), flight.name());
                    tracing::info!(pid, request, "the request takes too long and is ended in its worker; try: a longer --timeout");
                }
                Some(since) => stuck |= now >= since + CANCEL_WAIT,
            }
        }
        if overdue && line.ping.is_none() {
            line.ping(now);
        }
        // One that has nothing to do has no request to be overdue.
        let patience = if overdue { run.min(LIFELESS) } else { run.max(LIFELESS) };
        if (overdue || line.flights.is_empty()) && line.ping.is_some_and(|since| now >= since + patience) {
            return Err(Break::Lifeless);
        }
        if stuck && drained_out {
            return Err(Break::Lifeless);
        }
        if stuck {
            // It lives, but a request that cannot be ended takes up its place for ever.
            self.replace(line);
        }
        Ok(())
    }

    /// The worker is lost. Each of its requests gets what it is due.
    fn fall_apart(&mut self, line: Line, why: &Break) {
        let Line { link, flights, sent_before, sent, .. } = line;
        let worker = link.worker.clone();
        let sent = sent_before + sent as u64;
        let (mut running, begun) = (flights.len(), link.channel.last_begun());
        let overdue = flights.values().find(|flight| flight.cancelled.is_some()).or_else(|| flights.values().next());
        let request = overdue.map_or_else(String::new, Flight::name);
        for (id, flight) in flights {
            let Flight { what: What::Errand(mut errand), at, cancelled: None, .. } = flight else {
                self.abandon(flight);
                continue;
            };
            let first_time = errand.lost_with.is_none_or(|id| id == worker.id);
            let is_unbegun = matches!(why, Break::Died) && id.wrapping_sub(begun).cast_signed() > 0;
            // Of what a worker had that never began anything, any may be why it died.
            if at >= sent || is_unbegun && (begun > 0 || first_time) {
                running -= 1;
                if at < sent && begun == 0 {
                    errand.lost_with = Some(worker.id);
                }
                self.shared.pools.give_back(errand);
                continue;
            }
            if first_time && may_be_repeated(&errand) && !errand.exchange.ticket.client_disconnected() {
                errand.lost_with = Some(worker.id);
                self.shared.pools.give_back(errand);
            } else {
                self.send_home(errand, Some(lost()));
            }
        }
        self.flush_home();
        let pid = worker.pid.load(Ordering::Relaxed);
        let report = match why {
            Break::Lifeless => {
                tracing::error!(
                    pid,
                    request,
                    requests = running,
                    "the worker gives no other request its turn, and is replaced; try: no long computation on a greenlet, or see where it \
                     was in the traceback"
                );
                Report::Overdue { worker }
            }
            Break::Died if running == 0 => Report::Broken { worker, why: "it ended".to_owned(), ended: true },
            Break::Died => {
                let why = format!("it ended while it had {running} requests, {request} among them");
                Report::Broken { worker, why, ended: true }
            }
            Break::Violation(violation) => Report::Broken { worker, why: format!("its channel brought {violation}"), ended: false },
        };
        self.shared.reporter.send(report);
        // Only now, so that a worker that ends because of it is known to be replaced already.
        drop(link);
    }

    /// Nobody will finish this request.
    fn abandon(&mut self, flight: Flight) {
        match flight.what {
            What::Errand(errand) => {
                // One that was overdue has its answer.
                let unanswered = !errand.exchange.ticket.client_disconnected();
                self.send_home(errand, unanswered.then(lost));
            }
            What::Stream(Outlet { home, token, serial, credit, .. }) => {
                credit.finish();
                self.answers.push((home, Answer::Ended { token, serial, whole: false }));
            }
        }
    }
}

impl Line {
    fn new(link: Link) -> Line {
        Line {
            link,
            reader: Some(Reader::new()),
            out: Vec::new(),
            sent: 0,
            sent_before: 0,
            flights: HashMap::new(),
            ping: None,
            pings: 0,
            touched: Vec::new(),
            leaving_since: None,
        }
    }

    fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    fn ping(&mut self, now: Micros) {
        self.pings = self.pings.wrapping_add(1);
        self.ping = Some(now);
        frames::word(&mut self.out, 0, Word::Ping, self.pings);
    }

    /// It has not answered for so long that a request had better go elsewhere, or wait.
    fn is_silent(&self, now: Micros) -> bool {
        self.leaving_since.is_some() || self.ping.is_some_and(|since| now >= since + SILENT)
    }
}

impl Flight {
    /// For the log.
    fn name(&self) -> String {
        match &self.what {
            What::Errand(errand) => {
                let request = errand.exchange.request();
                format!("{} {}", request.method(), request.path())
            }
            What::Stream(_) => "a streamed answer".to_owned(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
