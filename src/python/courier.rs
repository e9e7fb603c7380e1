//! A courier: the thread that carries requests to one thread of a Python worker, and its answers home.
//!
//! ```text
//!   queue of the core --take--> courier ==frames==> worker
//!                                  ^  <==frames==      |
//!   ring thread <--answers, once per wake-up-----------+
//! ```
//!
//! It takes the place of a native handler thread, so everything around it stays as it is: the queue's bounds, 503
//! and 504 by the ring thread, streams with credit. A slow client holds a stream back, the courier then does not read,
//! and the worker's send waits.
//!
//! *Batches.* Each crossing costs two changes of process, so requests that take microseconds travel together:
//! all frames of a batch in one send, and all answers that one recv brought go home at once. How many that are is
//! learnt: one at first, twice as many while they are quick, one again as soon as one is slow. Only requests that
//! may be repeated (RFC 9110 section 9.2.2) travel together: if the worker dies or stalls over one, the
//! others are given to somebody else, whether it has looked at them or not. A worker may hold back the answers of a batch to
//! send them together, and says in the page how many, so that the one it stalls over is known.
//!
//! *Who answers when something goes wrong.*
//!
//! | | the request that runs | those behind it |
//! |---|---|---|
//! | takes too long | 504, by the ring thread | back into the queue |
//! | the worker dies before it has begun it | back into the queue | back into the queue |
//! | the worker dies, nothing sent yet | once again when it may be repeated, else 502 | back into the queue |
//! | the worker dies in the middle of a stream | the connection ends early | back into the queue |
//!
//! A request that must not run twice is *marked*: the worker writes its id into the page before it calls the application.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fd::OwnedFd,
    io::Errno,
    net::SendFlags,
};

use super::{
    frames::{self, Event, Facts, Reader, Violation},
    zygote::Channel,
};
use crate::{
    config::Permit,
    driver::{Token, policy},
    exchange::{Micros, Progress},
    handler::{Body, Response},
    pool::{Answer, Clock, Errand, Pools},
    stats::Stats,
    stream::{Credit, Stream, StreamWriter},
};

/// Most requests in one batch.
const DEPTH_MAX: usize = 32;
/// Requests stand behind each other for about this long: enough to make the crossing cheap, too short for anybody to mind.
const BATCH: Micros = 1_000;
/// One that takes longer than this ends that for a while.
const SLOW: Micros = 5_000;
/// A batch takes no more requests once its frames are this long, in bytes.
const BATCH_BYTES: usize = 64 << 10;
/// A waiting courier looks up this often: at deadlines, clients that went away, and requests that others could serve.
const STEP: Duration = Duration::from_millis(50);
/// Requests behind one that has run for this long are for others to serve.
const BEHIND_MAX: Micros = 100_000;
/// However often it asks for more time, a request is over after this long.
pub(super) const RUN_MAX: Micros = 3_600_000_000;

/// A [`Worker::status`] before the worker's end is known.
const STATUS_UNKNOWN: i32 = -1;

/// What a courier is told.
pub enum Order {
    /// Work with this worker from now on. The last one's channel is closed after the present batch.
    Link(Link),
    /// This worker is given nothing more, and what it has is waited for.
    Leave(u64),
    /// This worker is dead.
    Drop(u64),
    Stop,
}

/// A way to one thread of a worker. While there is one, the worker is not free.
pub struct Link {
    pub channel: Channel,
    pub worker: Arc<Worker>,
    reporter: Reporter,
}

impl Link {
    pub fn new(channel: Channel, worker: Arc<Worker>, reporter: Reporter) -> Link {
        worker.links.fetch_add(1, Ordering::AcqRel);
        Link { channel, worker, reporter }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.worker.links.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.reporter.send(Report::Free);
        }
    }
}

/// A worker process, as far as several threads need to know it.
#[derive(Debug)]
pub struct Worker {
    pub id: u64,
    pub slot: usize,
    pub born: Instant,
    /// 0 until the zygote has told it.
    pub pid: AtomicI32,
    /// Signals sent through this never reach another process of the same number.
    pub handle: OnceLock<OwnedFd>,
    /// Ways to it that are in use.
    pub links: AtomicUsize,
    /// It was given a request.
    pub tried: AtomicBool,
    pub served: AtomicU64,
    /// How it ended (waitpid(2)), once that is known.
    pub status: AtomicI32,
    /// After so many requests it is replaced; 0: never.
    pub served_max: u64,
    /// It was asked to be replaced for that.
    pub used: AtomicBool,
}

/// What a courier tells the supervisor.
#[derive(Debug)]
pub enum Report {
    /// The worker is of no use any more.
    Broken {
        worker: Arc<Worker>,
        why: String,
        /// It has ended, or is about to: there is nobody at the other end.
        ended: bool,
    },
    /// A request of it took too long.
    Overdue {
        worker: Arc<Worker>,
    },
    /// It has served its number of requests.
    Used {
        worker: Arc<Worker>,
    },
    /// Nobody waits for anything from one of the workers any more.
    Free,
    /// One worker more, or less.
    Change(isize),
    Stop,
}

impl Worker {
    pub fn new(id: u64, slot: usize, served_max: u64) -> Worker {
        Worker {
            id,
            slot,
            born: Instant::now(),
            pid: AtomicI32::new(0),
            handle: OnceLock::new(),
            links: AtomicUsize::new(0),
            tried: AtomicBool::new(false),
            served: AtomicU64::new(0),
            status: AtomicI32::new(STATUS_UNKNOWN),
            served_max,
            used: AtomicBool::new(false),
        }
    }

    /// It can be sent a signal, and nobody waits for an answer of it.
    pub fn is_free(&self) -> bool {
        self.links.load(Ordering::Acquire) == 0 && self.pid.load(Ordering::Relaxed) != 0
    }

    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }

    /// It is known how it ended.
    pub fn has_status(&self) -> bool {
        self.status.load(Ordering::Acquire) != STATUS_UNKNOWN
    }
}

/// Where reports go.
#[derive(Clone)]
pub struct Reporter {
    pub reports: Sender<Report>,
    pub bell: Arc<std::os::unix::net::UnixStream>,
}

impl Reporter {
    pub fn send(&self, report: Report) {
        // The supervisor may have ended; then nobody has to know. A full socket has rung already.
        let _ = self.reports.send(report);
        let _ = (&*self.bell).write(&[0]);
    }
}

/// What all couriers share.
pub struct Shared {
    pub pools: Arc<Pools>,
    pub clock: Clock,
    /// CLOCK_MONOTONIC at the clock's zero, in seconds.
    pub monotonic_zero: f64,
    pub run: Micros,
    /// How long a worker that is to go may take to finish what it has.
    pub drain: Micros,
    pub permit: Permit,
    /// The counters of each core.
    pub stats: Vec<Arc<Stats>>,
    /// Different for each start of the process, so that request ids are not used twice in a log.
    pub start: u32,
    pub stopping: AtomicBool,
    pub reporter: Reporter,
}

pub struct Courier {
    shared: Arc<Shared>,
    core: usize,
    orders: Receiver<Order>,
    link: Option<Link>,
    /// What the worker has, in its order. The first one runs.
    flights: VecDeque<Flight>,
    /// Taken from the queue, but not fit to stand behind another.
    held: Option<Errand>,
    out: Vec<u8>,
    answers: Vec<(usize, Answer)>,
    depth: usize,
    /// Whether the worker's answers wake this thread while the worker goes on, or once it pauses.
    patient: bool,
    /// How long a wait for the worker is now: less than [`STEP`] when a deadline is nearer.
    step: Duration,
    /// How long the slowest request of the batch took.
    slowest: Micros,
    last_id: u32,
    request_id: RequestId,
    now: Micros,
}

/// A request that a worker has.
struct Flight {
    id: u32,
    /// `None`: whatever the worker answers to it, nobody wants it; or it is at home, and its body follows.
    errand: Option<Errand>,
    /// The body that follows, and whether somebody still wants it.
    credit: Option<Arc<Credit>>,
    /// When it became the first.
    since: Micros,
    /// When that was before it asked for more time.
    begun: Micros,
    /// The worker was told that the client is gone.
    gone: bool,
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

impl From<Violation> for Break {
    fn from(violation: Violation) -> Break {
        Break::Violation(violation)
    }
}

/// What is to be done after an event.
enum Then {
    NextEvent,
    /// Pieces follow.
    Pieces(Option<Pieces>),
}

/// Where the pieces of a body go.
struct Pieces {
    home: usize,
    token: Token,
    serial: u64,
    credit: Arc<Credit>,
}

impl Courier {
    pub fn new(shared: Arc<Shared>, core: usize, number: u32, orders: Receiver<Order>) -> Courier {
        let request_id = RequestId::new(shared.start, number);
        Courier {
            shared,
            core,
            orders,
            link: None,
            flights: VecDeque::new(),
            held: None,
            out: Vec::new(),
            answers: Vec::new(),
            depth: 1,
            patient: false,
            step: STEP,
            slowest: 0,
            last_id: 0,
            request_id,
            now: 0,
        }
    }

    /// The thread's life.
    pub fn run(mut self) {
        let mut reader = Reader::new();
        while let Some(errand) = self.next_errand(&mut reader) {
            self.collect(errand);
            if self.flights.is_empty() {
                continue;
            }
            let (begun, requests) = (self.now, self.flights.len() as u64);
            self.slowest = 0;
            match self.converse(&mut reader) {
                Ok(()) => self.learn(begun, requests),
                Err(why) => self.fall_apart(why),
            }
            self.out.clear();
            self.out.shrink_to(4 * BATCH_BYTES);
        }
        if let Some(errand) = self.held.take() {
            self.shared.pools.give_back(errand);
        }
        self.unlink();
    }

    /// Waits for a request while there is a worker for it, and for a worker while there is none. `None`: the end.
    fn next_errand(&mut self, reader: &mut Reader) -> Option<Errand> {
        loop {
            match self.orders.try_recv() {
                Ok(order) => self.obey(Some(order), reader)?,
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            if self.link.is_none() {
                if let Some(errand) = self.held.take() {
                    self.shared.pools.give_back(errand);
                }
                let order = self.orders.recv().ok();
                self.obey(order, reader)?;
                continue;
            }
            let pools = &self.shared.pools;
            if let Some(errand) = self.held.take().or_else(|| pools.errand_now(self.core)) {
                return Some(errand);
            }
            self.set_patient(false);
            let pools = &self.shared.pools;
            if let Some(order) = pools.errand_or(self.core, &self.orders) {
                self.obey(order, reader)?;
            }
        }
    }

    /// `None`: the end.
    fn obey(&mut self, order: Option<Order>, reader: &mut Reader) -> Option<()> {
        match order? {
            Order::Stop => return None,
            Order::Leave(id) | Order::Drop(id) if self.link.as_ref().is_some_and(|link| link.worker.id == id) => self.unlink(),
            Order::Leave(_) | Order::Drop(_) => {}
            Order::Link(link) => {
                self.unlink();
                reader.clear();
                self.depth = 1;
                self.step = STEP;
                if link.channel.data.set_read_timeout(Some(STEP)).is_ok() {
                    self.link = Some(link);
                    self.shared.pools.change_able(self.core, 1);
                }
            }
        }
        Some(())
    }

    fn unlink(&mut self) {
        if let Some(link) = self.link.take() {
            link.channel.end_soon();
            self.shared.pools.change_able(self.core, -1);
        }
    }

    /// Makes a batch of this request and of others that wait.
    fn collect(&mut self, first: Errand) {
        self.now = self.shared.clock.now();
        let alone = !may_be_repeated(&first);
        self.add(first, true);
        let others = if alone || self.flights.is_empty() { 0 } else { (self.depth - 1).min(self.shared.pools.share(self.core)) };
        for _ in 0..others {
            if self.out.len() >= BATCH_BYTES {
                break;
            }
            let Some(errand) = self.shared.pools.another_errand(self.core) else { break };
            if !may_be_repeated(&errand) {
                self.held = Some(errand);
                break;
            }
            self.add(errand, false);
        }
    }

    /// Writes a request's frame behind those of the batch, unless nobody wants it any more.
    fn add(&mut self, mut errand: Errand, is_first: bool) {
        let exchange = &errand.exchange;
        let wanted = match errand.started {
            true => !exchange.ticket.client_disconnected(),
            false if is_first => exchange.ticket.start(self.now),
            false => exchange.ticket.progress() != Progress::Withdrawn,
        };
        if !wanted {
            self.send_home(errand, None);
            return self.flush_home();
        }
        errand.started |= is_first;
        let exchange = &errand.exchange;
        self.last_id = self.last_id.wrapping_add(1);
        let shared = &self.shared;
        let waited = self.now.saturating_sub(exchange.since);
        let facts = Facts {
            request_id: self.request_id.next(),
            queue_seconds: waited as f64 / 1e6,
            deadline: shared.monotonic_zero + (self.now + shared.run) as f64 / 1e6,
            permit: shared.permit,
            marked: is_marked(&errand),
        };
        let left_out = frames::request(&mut self.out, self.last_id, &exchange.request(), facts);
        if left_out > 0 {
            shared.stats[self.core].names_dropped.add_shared(left_out);
            tracing::info!(
                left_out,
                "header fields were left out of the environ: a client could pass them off as others; try: --permit underscore-headers"
            );
        }
        let since = match exchange.ticket.progress() {
            Progress::RunningSince(since) => since,
            _ => self.now,
        };
        self.flights.push_back(Flight { id: self.last_id, errand: Some(errand), credit: None, since, begun: since, gone: false });
    }

    /// Sends the batch and takes its answers.
    fn converse(&mut self, reader: &mut Reader) -> Result<(), Break> {
        if self.flights.len() > 1 {
            self.set_patient(true);
        }
        let link = self.link.as_ref().expect("a batch has a worker");
        if !link.worker.was_tried() {
            link.worker.tried.store(true, Ordering::Relaxed);
        }
        self.send_files()?;
        self.send(reader)?;
        while !self.flights.is_empty() {
            self.receive(reader)?;
            self.take_events(reader)?;
        }
        Ok(())
    }

    /// A patient courier does not interrupt its worker for each answer of a batch when both share a CPU, but takes all that
    /// came once the worker pauses or its time slice is over (`driver/policy.rs`). One that hands over a request is not
    /// patient: whoever has the CPU is not the one that will serve it.
    fn set_patient(&mut self, patient: bool) {
        if self.patient != patient {
            self.patient = patient;
            // Where it is forbidden, everything is only slower.
            let _ = policy::interrupt_others(!patient);
        }
    }

    /// Bodies in files go first, so that the worker finds each when it meets its frame.
    fn send_files(&mut self) -> Result<(), Break> {
        let link = self.link.as_ref().expect("a batch has a worker");
        for errand in self.flights.iter().filter_map(|flight| flight.errand.as_ref()) {
            if let Some(file) = &errand.exchange.file {
                // The worker shares our place in the file, and another worker may have moved it.
                let sent = io::Seek::rewind(&mut &**file).and_then(|()| link.channel.send_descriptor(file));
                sent.map_err(|_| Break::Unsent)?;
            }
        }
        Ok(())
    }

    /// One system call when the socket has room. When it has not, the worker may be waiting for us to read, so that
    /// goes on meanwhile.
    fn send(&mut self, reader: &mut Reader) -> Result<(), Break> {
        let mut sent = 0;
        while sent < self.out.len() {
            let link = self.link.as_ref().expect("a batch has a worker");
            match rustix::net::send(&link.channel.data, &self.out[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(bytes) => sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let ready = self.wait_for_room()?;
                    if ready {
                        self.receive(reader)?;
                        self.take_events(reader)?;
                    }
                }
                Err(_) if sent == 0 => return Err(Break::Unsent),
                Err(_) => return Err(Break::Died),
            }
        }
        Ok(())
    }

    /// True when there is something to read.
    fn wait_for_room(&mut self) -> Result<bool, Break> {
        let link = self.link.as_ref().expect("a batch has a worker");
        let mut polled = [PollFd::from_borrowed_fd(link.channel.data.as_fd(), PollFlags::IN | PollFlags::OUT)];
        let step = Timespec { tv_sec: 0, tv_nsec: STEP.subsec_nanos().into() };
        let count = rustix::event::poll(&mut polled, Some(&step)).unwrap_or(0);
        let readable = polled[0].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        if count == 0 {
            self.look_up()?;
        }
        Ok(count > 0 && readable)
    }

    /// Waits for the worker's next bytes.
    fn receive(&mut self, reader: &mut Reader) -> Result<(), Break> {
        loop {
            let link = self.link.as_ref().expect("a batch has a worker");
            match (&link.channel.data).read(reader.room()) {
                Ok(0) => return Err(Break::Died),
                Ok(bytes) => {
                    reader.add(bytes);
                    self.now = self.shared.clock.now();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.look_up()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Break::Died),
            }
        }
    }

    /// The worker has said nothing for a while.
    fn look_up(&mut self) -> Result<(), Break> {
        self.now = self.shared.clock.now();
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(Break::Stopped);
        }
        let runs = self.runs();
        if runs > 0 {
            self.begin(runs);
        }
        let (Some(link), Some(runner)) = (&self.link, self.flights.get_mut(runs)) else { return Ok(()) };
        if link.worker.has_status() {
            // Nothing is left in the socket, and a child of the worker may hold it open for years.
            return Err(Break::Died);
        }
        let due = runner.since + self.shared.run;
        if self.now >= due {
            return Err(Break::Overdue);
        }
        let step = STEP.min(Duration::from_micros(due - self.now));
        if step != self.step && link.channel.data.set_read_timeout(Some(step)).is_ok() {
            self.step = step;
        }
        let asker_left = runner.errand.as_ref().is_some_and(|errand| errand.exchange.ticket.client_disconnected());
        let reader_left = runner.credit.as_ref().is_some_and(|credit| credit.is_closed());
        if !runner.gone && (asker_left || reader_left) {
            runner.gone = true;
            link.channel.client_gone(runner.id);
        }
        let hangs = self.now >= runner.since + BEHIND_MAX;
        let pools = &self.shared.pools;
        if pools.is_anyone_idle() || hangs && pools.has_others() {
            self.give_back_waiting(runs);
        }
        Ok(())
    }

    /// Which of the flights the worker is at.
    fn runs(&self) -> usize {
        let held = self.link.as_ref().map_or(0, |link| link.channel.held());
        held.min(self.flights.len().saturating_sub(1))
    }

    /// What the worker is not at is for others to serve: it may be repeated, or would not stand here.
    fn give_back_waiting(&mut self, runs: usize) {
        let flights = self.flights.iter_mut().enumerate().filter(|(index, _)| *index != runs);
        for errand in flights.filter_map(|(_, flight)| flight.errand.take()).chain(self.held.take()) {
            self.shared.pools.give_back(errand);
        }
    }

    /// Acts on everything that has come, and hands the answers home.
    fn take_events(&mut self, reader: &mut Reader) -> Result<(), Break> {
        loop {
            let result = match reader.next_event() {
                Ok(Some((id, event))) => self.take_event(id, event),
                Ok(None) => break,
                Err(violation) => Err(violation),
            };
            match result {
                Ok(Then::NextEvent) => {}
                Ok(Then::Pieces(pieces)) => {
                    self.flush_home();
                    match pieces {
                        Some(pieces) => self.stream(pieces, reader)?,
                        None => self.pass_over(reader)?,
                    }
                    self.land();
                }
                Err(violation) => {
                    self.flush_home();
                    return Err(violation.into());
                }
            }
        }
        self.flush_home();
        Ok(())
    }

    fn take_event(&mut self, id: u32, event: Event<'_>) -> Result<Then, Violation> {
        match event {
            // Each thread of a worker may say that it is there.
            Event::Ready(_) => return Ok(Then::NextEvent),
            Event::Failed(_) => return Err(Violation("a worker that was ready could not load the application")),
            // A thread of the application may speak of a request that is over.
            Event::Extend(_) | Event::Hints(_) if self.flights.front().is_none_or(|first| first.id != id) => return Ok(Then::NextEvent),
            _ => {}
        }
        let first = self.flights.front_mut().filter(|first| first.id == id).ok_or(Violation("an answer that nobody asked for"))?;
        let response = match event {
            Event::Response { status, head, body } => {
                if first.errand.is_none() {
                    self.land();
                    return Ok(Then::NextEvent);
                }
                let (mut response, _) = frames::response(status, head, body.is_empty())?;
                response.body = if body.is_empty() { Body::Empty } else { Body::Owned(body.to_vec()) };
                response
            }
            Event::File { status, head, offset, length } => {
                let link = self.link.as_ref().expect("an answer has a worker");
                let file = link.channel.receive_file().ok_or(Violation("a file answer without a regular file"))?;
                let (mut response, _) = frames::response(status, head, false)?;
                response.body = Body::File { file: Arc::new(file), offset, length };
                response
            }
            Event::Begin { status, head, length } => {
                let Some(mut errand) = first.errand.take() else { return Ok(Then::Pieces(None)) };
                let (mut response, told) = match frames::response(status, head, false) {
                    Ok(parsed) => parsed,
                    Err(violation) => {
                        first.errand = Some(errand);
                        return Err(violation);
                    }
                };
                let credit = Arc::new(Credit::default());
                response.body = Body::Stream(Stream { length: length.or(told), source: None, credit: credit.clone() });
                let exchange = &mut errand.exchange;
                exchange.response = Some(response);
                let (token, serial) = (exchange.token, exchange.serial);
                let home = errand.home;
                self.answers.push((home, Answer::Response(errand.exchange)));
                first.credit = Some(credit.clone());
                return Ok(Then::Pieces(Some(Pieces { home, token, serial, credit })));
            }
            Event::Extend(milliseconds) => {
                // The limit counts from a beginning, so that is what moves; never beyond the longest time there is.
                let until = (self.now + Micros::from(milliseconds) * 1_000).min(first.begun + RUN_MAX);
                first.since = until.saturating_sub(self.shared.run).max(first.since);
                if let Some(errand) = &first.errand {
                    errand.exchange.ticket.restart(first.since);
                }
                return Ok(Then::NextEvent);
            }
            Event::Hints(head) => {
                let (hints, _) = frames::response(103, head, true)?;
                if let Some(errand) = &first.errand {
                    let (token, serial) = (errand.exchange.token, errand.exchange.serial);
                    self.answers.push((errand.home, Answer::Hints { token, serial, fields: hints.headers }));
                }
                return Ok(Then::NextEvent);
            }
            Event::Piece(_) | Event::End { .. } => return Err(Violation("a piece of an answer that was not begun")),
            Event::Pong(_) | Event::Return => return Err(Violation("a frame that belongs to another kind of channel")),
            Event::Ready(_) | Event::Failed(_) => return Ok(Then::NextEvent),
        };
        if let Some(errand) = first.errand.take() {
            self.send_home(errand, Some(response));
        }
        self.land();
        Ok(Then::NextEvent)
    }

    /// Passes the pieces of a body on until its end, as fast as they are taken in.
    fn stream(&mut self, pieces: Pieces, reader: &mut Reader) -> Result<(), Break> {
        let shared = self.shared.clone();
        let Pieces { home, token, serial, credit } = pieces;
        let mut answers = Vec::new();
        let mut send = |bytes| {
            answers.push((home, Answer::Piece { token, serial, bytes }));
            shared.pools.send_home(&mut answers);
        };
        let mut writer = StreamWriter::new(credit, shared.pools.send_wait_max(), &mut send);
        let ended = self.stream_pieces(&mut writer, reader);
        let whole = matches!(ended, Ok(true));
        self.answers.push((home, Answer::Ended { token, serial, whole }));
        self.flush_home();
        ended.map(|_| ())
    }

    /// True: all of it came and was passed on.
    fn stream_pieces(&mut self, writer: &mut StreamWriter<'_>, reader: &mut Reader) -> Result<bool, Break> {
        let mut wanted = true;
        let mut progress = self.now;
        loop {
            while let Some((id, event)) = reader.next_event()? {
                match event {
                    Event::Extend(_) | Event::Hints(_) => {}
                    _ if id != self.flights[0].id => return Err(Violation("a piece of another answer").into()),
                    Event::Piece(bytes) if wanted => wanted = writer.write_all(bytes).is_ok(),
                    Event::Piece(_) => {}
                    Event::End { whole } => return Ok(wanted && writer.flush().is_ok() && whole),
                    _ => return Err(Violation("another answer in the middle of one").into()),
                }
            }
            wanted = wanted && writer.flush().is_ok();
            if wanted {
                progress = self.shared.clock.now();
            } else if !self.flights[0].gone {
                // The application may notice; in any case it has only so long to come to its end.
                self.flights[0].gone = true;
                self.link.as_ref().expect("a stream has a worker").channel.client_gone(self.flights[0].id);
            }
            self.flights[0].since = progress;
            if self.shared.clock.now() >= progress + self.shared.run {
                return Err(Break::Overdue);
            }
            self.receive(reader)?;
        }
    }

    /// Takes the pieces of an answer that nobody wants.
    fn pass_over(&mut self, reader: &mut Reader) -> Result<(), Break> {
        let first = self.flights[0].id;
        self.link.as_ref().expect("an answer has a worker").channel.client_gone(first);
        loop {
            while let Some((id, event)) = reader.next_event()? {
                match event {
                    Event::End { .. } if id == first => return Ok(()),
                    Event::Piece(_) if id == first => {}
                    Event::Extend(_) | Event::Hints(_) => {}
                    _ => return Err(Violation("another answer in the middle of one").into()),
                }
            }
            if self.shared.clock.now() >= self.flights[0].since + self.shared.run {
                return Err(Break::Overdue);
            }
            self.receive(reader)?;
        }
    }

    /// The first request is done with: the next one begins.
    fn land(&mut self) {
        if let Some(first) = self.flights.pop_front() {
            self.slowest = self.slowest.max(self.now.saturating_sub(first.begun));
        }
        if let Some(next) = self.flights.front_mut().filter(|next| next.errand.is_none()) {
            (next.since, next.begun) = (self.now, self.now);
        }
        self.begin(0);
    }

    /// The worker is at this one, so that its time counts; unless nobody wants it any more.
    fn begin(&mut self, index: usize) {
        let Some(flight) = self.flights.get_mut(index) else { return };
        let Some(mut errand) = flight.errand.take() else { return };
        if errand.started {
            flight.errand = Some(errand);
        } else if errand.exchange.ticket.start(self.now) {
            errand.started = true;
            (flight.since, flight.begun) = (self.now, self.now);
            flight.errand = Some(errand);
        } else {
            (flight.since, flight.begun) = (self.now, self.now);
            self.send_home(errand, None);
            self.flush_home();
        }
    }

    fn send_home(&mut self, mut errand: Errand, response: Option<Response>) {
        errand.exchange.response = response;
        self.answers.push((errand.home, Answer::Response(errand.exchange)));
    }

    fn flush_home(&mut self) {
        if !self.answers.is_empty() {
            self.shared.pools.send_home(&mut self.answers);
        }
    }

    /// How long a batch took says how long the next may be: for about [`BATCH`], twice the last one's at most.
    fn learn(&mut self, begun: Micros, requests: u64) {
        let each = (self.now.saturating_sub(begun) / requests).max(1);
        let fitting = usize::try_from(BATCH / each).unwrap_or(DEPTH_MAX);
        self.depth = if self.slowest > SLOW { 1 } else { fitting.min(2 * self.depth).clamp(1, DEPTH_MAX) };
        let Some(link) = &self.link else { return };
        let served = link.worker.served.fetch_add(requests, Ordering::Relaxed) + requests;
        if link.worker.served_max > 0 && served >= link.worker.served_max && !link.worker.used.swap(true, Ordering::Relaxed) {
            self.shared.reporter.send(Report::Used { worker: link.worker.clone() });
        }
    }

    /// The worker is lost. Each of its requests gets what it is due.
    fn fall_apart(&mut self, why: Break) {
        let index = if matches!(why, Break::Unsent) { 0 } else { self.runs() };
        self.begin(index);
        let Some(link) = self.link.take() else { return };
        let worker = link.worker.clone();
        self.shared.pools.change_able(self.core, -1);
        self.give_back_waiting(index);
        let flight = self.flights.remove(index);
        self.flights.clear();
        let id = flight.as_ref().map_or(0, |flight| flight.id);
        let runs = flight.and_then(|flight| flight.errand);
        let request = runs.as_ref().map_or_else(String::new, |errand| {
            let request = errand.exchange.request();
            format!("{} {}", request.method(), request.path())
        });
        if let Some(mut errand) = runs {
            let unbegun = matches!(why, Break::Died) && is_marked(&errand) && link.channel.last_begun() != id;
            // Each thread of a worker may have met the same death.
            let first_time = errand.lost_with.is_none_or(|id| id == worker.id);
            let again = !errand.exchange.ticket.client_disconnected() && (unbegun || first_time && may_be_repeated(&errand));
            match &why {
                Break::Unsent => {
                    errand.started = true;
                    self.shared.pools.give_back(errand);
                }
                // The ring thread has answered, or is about to.
                Break::Overdue | Break::Stopped => self.send_home(errand, None),
                Break::Died | Break::Violation(_) if again => {
                    errand.started = true;
                    if !unbegun {
                        errand.lost_with = Some(worker.id);
                    }
                    self.shared.pools.give_back(errand);
                }
                Break::Died | Break::Violation(_) => {
                    let text = "The application's process ended before it had answered.\n";
                    self.send_home(errand, Some(Response::text(text).status(502)));
                }
            }
        }
        self.flush_home();
        let pid = worker.pid.load(Ordering::Relaxed);
        let broken = |why, ended| Report::Broken { worker: worker.clone(), why, ended };
        let report = match why {
            Break::Stopped => return,
            Break::Overdue => {
                tracing::error!(
                    pid,
                    request,
                    "the worker took too long and is replaced; try: a longer --timeout, or see where it was in the traceback"
                );
                Report::Overdue { worker: worker.clone() }
            }
            Break::Unsent => broken("it ended while it was idle".to_owned(), true),
            Break::Died if request.is_empty() => broken("it ended".to_owned(), true),
            Break::Died => broken(format!("it ended while it had {request}"), true),
            Break::Violation(violation) => broken(format!("its channel brought {violation}"), false),
        };
        self.shared.reporter.send(report);
        // Only now, so that a worker that ends because of it is known to be replaced already.
        drop(link);
    }
}

/// Safe to give to a second worker when the first may have begun it (RFC 9110 section 9.2.2).
pub(super) fn may_be_repeated(errand: &Errand) -> bool {
    matches!(errand.exchange.request().method(), "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

/// The worker has to write down that it begins this one: only so is it known, should the worker die, whether another may have
/// it. One that may be repeated is repeated once without asking.
fn is_marked(errand: &Errand) -> bool {
    !may_be_repeated(errand) || errand.lost_with.is_some()
}

/// Makes request ids: the start of the process, the courier, and a number that counts.
pub(super) struct RequestId {
    text: [u8; 20],
    count: u32,
}

impl RequestId {
    pub(super) fn new(start: u32, courier: u32) -> RequestId {
        let mut text = [b'0'; 20];
        hex(&mut text[..8], start);
        hex(&mut text[8..12], courier);
        RequestId { text, count: 0 }
    }

    pub(super) fn next(&mut self) -> &str {
        self.count = self.count.wrapping_add(1);
        hex(&mut self.text[12..], self.count);
        std::str::from_utf8(&self.text).unwrap_or_default()
    }
}

/// Fills all of `digits`, from the right.
fn hex(digits: &mut [u8], mut number: u32) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_count_and_tell_couriers_apart() {
        let mut ids = RequestId::new(0xabcd_ef01, 0x1_0002);
        assert_eq!(ids.next(), "abcdef01000200000001");
        assert_eq!(ids.next(), "abcdef01000200000002");
        ids.count = u32::MAX;
        assert_eq!(ids.next(), "abcdef01000200000000");
    }
}
