//! The handler pools: a bounded queue of complete requests per core, and the threads that take from it.
//!
//! ```text
//!   ring thread --offer--> queue of the core --take--> handler thread --answers + doorbell--> ring thread
//!                              ^   |
//!        an idle neighbour's   |   +-- taken by an idle neighbour when the core's own handlers are all busy
//!        queue instead --------+
//! ```
//!
//! Requests move between cores, connections never do: the answer always goes home. A free
//! handler takes one request at a time, so none waits behind another that has been started.
//!
//! Where worker processes serve, there are no handler threads: a ring thread takes from the queue itself, for its couriers
//! (`python/dispatch.rs`), and a request is a neighbour's only when waiting at home would take longer than [`HOP`].

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};

use core_affinity::CoreId;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};

use crate::{
    config::Config,
    disk::{Disk, Done, Home, Job as DiskJob},
    driver::{Token, waker::Waker},
    exchange::{Exchange, Micros},
    handler::{Body, Handler},
    http1::response::Field,
    shard::engine,
    stats::Stats,
    stream::StreamWriter,
};

/// The clock of the process: microseconds since it was made, on CLOCK_MONOTONIC, so that neither a
/// changed date nor a suspended machine ends anybody's time.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    pub fn new() -> Clock {
        Clock(Instant::now())
    }

    pub fn now(&self) -> Micros {
        // Above the values that mean something else to a ticket.
        self.0.elapsed().as_micros() as Micros + 1_000
    }
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::new()
    }
}

pub(crate) enum Job {
    Run(Errand),
    Stop,
}

/// A request on its way to whoever answers it.
pub(crate) struct Errand {
    pub exchange: Box<Exchange>,
    /// The core that the answer goes to.
    pub home: usize,
    /// Its ticket says already that it runs.
    pub started: bool,
    /// The process that died over it.
    pub lost_with: Option<u64>,
    /// How many processes died that had it and had not begun it.
    pub unbegun: u8,
}

/// What comes home to a ring thread.
pub enum Answer {
    /// A handler is done with a request, or found it withdrawn.
    Response(Box<Exchange>),
    /// A handler has fields for a 103 before its answer.
    Hints { token: Token, serial: u64, fields: Vec<Field> },
    /// A handler has made more of a body.
    Piece { token: Token, serial: u64, bytes: Vec<u8> },
    /// A handler that makes a body has asked for more time: as if it had made the last piece then.
    Extended { token: Token, serial: u64, since: Micros },
    /// A handler has made all of a body; or failed, when it is not whole.
    Ended { token: Token, serial: u64, whole: bool },
    /// The disk is done.
    Disk(Done),
}

/// All cores' queues. Shared by every ring and handler thread.
pub struct Pools {
    cores: Vec<Core>,
    handlers_per_core: usize,
    queue_max: usize,
    /// How long a handler that streams waits for its client.
    send_wait_max: Duration,
    /// How many serve many requests at a time, on all cores.
    takers: AtomicUsize,
    disk: Disk,
}

struct Core {
    jobs: Sender<Job>,
    jobs_taken: Receiver<Job>,
    answers: Sender<Answer>,
    answers_taken: Receiver<Answer>,
    /// Handlers that wait for a job, or couriers.
    idle: AtomicUsize,
    /// How long a request took lately, in microseconds, divided among those that travelled together.
    pace: AtomicU64,
    /// Handlers that could take one. A core without any gives its requests to others.
    able: AtomicUsize,
    takers: RwLock<Vec<Arc<Taker>>>,
    waker: OnceLock<Waker>,
}

/// Somebody who serves many requests at a time, as the others have to know it.
pub(crate) struct Taker {
    waker: Waker,
    /// How many it has; [`TAKES_NONE`]: it takes no more now.
    load: AtomicUsize,
}

const TAKES_NONE: usize = usize::MAX;

impl Taker {
    pub(crate) fn takes(&self) -> bool {
        self.load().is_some()
    }

    fn load(&self) -> Option<usize> {
        Some(self.load.load(Ordering::SeqCst)).filter(|load| *load != TAKES_NONE)
    }
}

impl Pools {
    pub fn new(cores: usize, config: &Config, disk: Disk) -> Arc<Pools> {
        let core = |_| {
            // The spare room is for requests that come back from a worker process that died; see `Pools::give_back`.
            let (jobs, jobs_taken) = bounded(config.limits.queue_max + COMING_BACK);
            let (answers, answers_taken) = unbounded();
            Core {
                jobs,
                jobs_taken,
                answers,
                answers_taken,
                idle: AtomicUsize::new(0),
                pace: AtomicU64::new(HOP),
                able: AtomicUsize::new(0),
                takers: RwLock::default(),
                waker: OnceLock::new(),
            }
        };
        Arc::new(Pools {
            cores: (0..cores).map(core).collect(),
            handlers_per_core: config.handlers,
            queue_max: config.limits.queue_max,
            send_wait_max: config.timeouts.send,
            takers: AtomicUsize::new(0),
            disk,
        })
    }

    /// Starts the handler threads. `place` says which CPU those of a core run on.
    pub fn start(
        self: &Arc<Pools>,
        handler: &Arc<dyn Handler>,
        stats: &[Arc<Stats>],
        clock: Clock,
        place: impl Fn(usize) -> Option<CoreId>,
    ) {
        for (core, stats) in stats.iter().enumerate() {
            self.cores[core].able.fetch_add(self.handlers_per_core, Ordering::Relaxed);
            for index in 0..self.handlers_per_core {
                let (pools, handler, stats, cpu) = (self.clone(), handler.clone(), stats.clone(), place(core));
                let work = move || {
                    if let Some(cpu) = cpu {
                        core_affinity::set_for_current(cpu);
                    }
                    pools.work(core, &*handler, &stats, clock);
                };
                thread::Builder::new().name(format!("handler-{core}.{index}")).spawn(work).expect("a thread for a handler");
            }
        }
    }

    /// The end of a core that its ring thread holds.
    pub fn desk(self: &Arc<Pools>, core: usize, waker: Waker) -> Desk {
        let _ = self.cores[core].waker.set(waker);
        let pools = self.clone();
        let home: Home = Arc::new(move |done| pools.cores[core].send(Answer::Disk(done)));
        Desk { pools: self.clone(), answers: self.cores[core].answers_taken.clone(), core, home }
    }

    /// Ends every handler thread after what it is at. Requests still in a queue are not run.
    pub fn stop(&self) {
        for core in &self.cores {
            while core.jobs_taken.try_recv().is_ok() {}
            for _ in 0..self.handlers_per_core {
                // A full queue cannot be: it was just emptied, and the ring threads have ended.
                let _ = core.jobs.try_send(Job::Stop);
            }
        }
    }

    /// A handler thread's life.
    fn work(&self, core: usize, handler: &dyn Handler, stats: &Stats, clock: Clock) {
        while let Job::Run(errand) = self.take(core) {
            self.serve(errand.exchange, &self.cores[errand.home], handler, stats, clock);
        }
    }

    fn serve(&self, mut exchange: Box<Exchange>, home: &Core, handler: &dyn Handler, stats: &Stats, clock: Clock) {
        if !exchange.ticket.start(clock.now()) {
            return home.send(Answer::Response(exchange));
        }
        let mut response = engine::run(handler, &exchange.request(), stats);
        let source = match &mut response.body {
            Body::Stream(stream) => stream.source.take().map(|source| (source, stream.credit.clone())),
            _ => None,
        };
        exchange.response = Some(response);
        let (token, serial) = (exchange.token, exchange.serial);
        home.send(Answer::Response(exchange));
        if let Some((source, credit)) = source {
            let mut send = |bytes| home.send(Answer::Piece { token, serial, bytes });
            let mut writer = StreamWriter::new(credit, self.send_wait_max, &mut send);
            let made = catch_unwind(AssertUnwindSafe(|| source(&mut writer).and_then(|()| writer.flush())));
            match &made {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "a streamed body was not finished"),
                Err(_) => stats.panics.add_shared(1),
            }
            home.send(Answer::Ended { token, serial, whole: matches!(made, Ok(Ok(()))) });
        }
    }

    /// The next job: of the own core, else of a neighbour whose handlers are all busy, else waits.
    fn take(&self, core: usize) -> Job {
        if let Some(job) = self.take_now(core) {
            return job;
        }
        let own = &self.cores[core];
        own.idle.fetch_add(1, Ordering::Relaxed);
        let job = own.jobs_taken.recv().unwrap_or(Job::Stop);
        own.idle.fetch_sub(1, Ordering::Relaxed);
        job
    }

    /// The next job without waiting.
    fn take_now(&self, core: usize) -> Option<Job> {
        if let Ok(job) = self.cores[core].jobs_taken.try_recv() {
            return Some(job);
        }
        let neighbours = self.cores.iter().enumerate().filter(|(index, _)| *index != core);
        for (_, neighbour) in neighbours {
            // A stop is for the neighbour's own threads; `stop` empties the queue before it puts them in.
            if neighbour.needs_help()
                && let Ok(job) = neighbour.jobs_taken.try_recv()
            {
                match job {
                    Job::Run(_) => return Some(job),
                    Job::Stop => drop(neighbour.jobs.try_send(Job::Stop)),
                }
            }
        }
        None
    }
}

/// What a ring thread does for its couriers of worker processes (`python/dispatch.rs`), instead of [`Pools::work`].
impl Pools {
    /// The next request without waiting.
    pub(crate) fn errand_now(&self, core: usize) -> Option<Errand> {
        match self.take_now(core)? {
            Job::Run(errand) => Some(errand),
            // Couriers are told apart, and a stop that was meant for a handler has nobody to find.
            Job::Stop => None,
        }
    }

    /// Another request of the core's own queue, for a batch that has begun.
    pub(crate) fn another_errand(&self, core: usize) -> Option<Errand> {
        match self.cores[core].jobs_taken.try_recv() {
            Ok(Job::Run(errand)) => Some(errand),
            Ok(Job::Stop) | Err(_) => None,
        }
    }

    /// True when there is a request to take, here or with a neighbour.
    pub(crate) fn may_take(&self, core: usize) -> bool {
        let others = self.cores.iter().enumerate().filter(|(index, _)| *index != core);
        !self.cores[core].jobs_taken.is_empty() || others.into_iter().any(|(_, other)| other.needs_help())
    }

    /// One more courier (or less, with -1) waits for requests.
    pub(crate) fn change_idle(&self, core: usize, change: isize) {
        self.cores[core].idle.fetch_add(change.cast_unsigned(), Ordering::SeqCst);
    }

    /// Says how long a request took lately.
    pub(crate) fn set_pace(&self, core: usize, pace: Micros) {
        self.cores[core].pace.store(pace, Ordering::Relaxed);
    }

    /// True when requests wait for this core's own couriers, and others could take them.
    pub(crate) fn keeps_waiting(&self, core: usize) -> bool {
        let own = &self.cores[core];
        self.cores.len() > 1 && !own.jobs_taken.is_empty() && !own.needs_help()
    }

    /// Wakes whoever should take of the requests of this core: its own ring thread; or, when all of its couriers are busy, as
    /// many neighbours as there are requests for.
    fn ring(&self, core: &Core) {
        // Either this look sees that somebody waits, or that one's sees what was just put in.
        fence(Ordering::SeqCst);
        let mut waiting = core.jobs_taken.len();
        if self.takers.load(Ordering::Relaxed) > 0 {
            return self.ring_takers(core, waiting);
        }
        if waiting > 0 && core.idle.load(Ordering::SeqCst) > 0 {
            return core.wake();
        }
        if !core.needs_help() {
            return;
        }
        for neighbour in &self.cores {
            let idle = neighbour.idle.load(Ordering::SeqCst);
            if waiting > 0 && idle > 0 {
                neighbour.wake();
                waiting = waiting.saturating_sub(idle);
            }
        }
    }

    /// Wakes a core's ring thread for anything that is not a request.
    pub(crate) fn wake(&self, core: usize) {
        self.cores[core].wake();
    }

    /// One more (or less, with -1) that can take requests of this core. The last one to leave sends those that wait to
    /// other cores.
    pub(crate) fn change_able(&self, core: usize, change: isize) {
        let own = &self.cores[core];
        let before = own.able.fetch_add(change.cast_unsigned(), Ordering::AcqRel);
        if before.wrapping_add_signed(change) == 0 && self.cores.iter().any(|core| core.able.load(Ordering::Relaxed) > 0) {
            for _ in 0..own.jobs_taken.len() {
                if let Some(errand) = self.another_errand(core) {
                    self.give_back(errand);
                }
            }
        }
    }

    /// How many of the waiting requests somebody should take who has just taken one: those who wait get theirs.
    pub(crate) fn share(&self, core: usize) -> usize {
        let own = &self.cores[core];
        own.jobs_taken.len() / (1 + own.idle.load(Ordering::Relaxed))
    }

    /// True when somebody waits for a request, on any core.
    pub(crate) fn is_anyone_idle(&self) -> bool {
        self.cores.iter().any(|core| core.idle.load(Ordering::Relaxed) > core.jobs_taken.len())
    }

    /// True when somebody else takes requests, too.
    pub(crate) fn has_others(&self) -> bool {
        self.cores.iter().map(|core| core.able.load(Ordering::Relaxed)).sum::<usize>() > 1
    }

    /// Puts a request that was taken and not begun (or is to be tried again) back into a queue. It was let in once, so
    /// it finds the queue's spare room when the queue itself is full.
    pub(crate) fn give_back(&self, errand: Errand) {
        let home = errand.home;
        let core = self.least_busy(home);
        let put = core.jobs.try_send(Job::Run(errand));
        self.ring(core);
        if let Err(TrySendError::Full(Job::Run(mut errand)) | TrySendError::Disconnected(Job::Run(mut errand))) = put {
            // Many workers died at once under full queues.
            if errand.started || errand.exchange.ticket.withdraw() {
                errand.exchange.response = Some(crate::handler::Response::unavailable("The server is busy.\n"));
            }
            self.send_home(&mut vec![(home, Answer::Response(errand.exchange))]);
        }
    }

    /// Hands answers over, with one ring of the doorbell for each core. Leaves the list empty.
    pub(crate) fn send_home(&self, answers: &mut Vec<(usize, Answer)>) {
        // One bit for each core; those beyond are woken for each answer, which is only slower.
        let mut wanted = 0_u128;
        for (home, answer) in answers.drain(..) {
            // The receiver lives as long as `self`.
            let _ = self.cores[home].answers.send(answer);
            match 1_u128.checked_shl(home as u32) {
                Some(bit) => wanted |= bit,
                None => self.cores[home].wake(),
            }
        }
        while wanted != 0 {
            self.cores[wanted.trailing_zeros() as usize].wake();
            wanted &= wanted - 1;
        }
    }
}

/// What those do who serve many requests at a time (`python/multiplexer.rs`).
///
/// The requests of a core that wait are spread like water: whoever has fewer than the level that all would come to takes
/// what is missing, so nobody gets one that a less busy one could begin sooner. Those without any count as `idle`.
impl Pools {
    /// From now on requests of this core may be left to it. It takes none yet.
    pub(crate) fn add_taker(&self, core: usize, waker: Waker) -> Arc<Taker> {
        let taker = Arc::new(Taker { waker, load: AtomicUsize::new(TAKES_NONE) });
        self.cores[core].takers.write().unwrap_or_else(PoisonError::into_inner).push(taker.clone());
        self.takers.fetch_add(1, Ordering::Relaxed);
        self.change_able(core, 1);
        taker
    }

    #[cfg(test)]
    pub(crate) fn idle(&self) -> usize {
        self.cores.iter().map(|core| core.idle.load(Ordering::SeqCst)).sum()
    }

    #[cfg(test)]
    pub(crate) fn takers(&self) -> usize {
        self.takers.load(Ordering::SeqCst)
    }

    pub(crate) fn remove_taker(&self, core: usize, taker: &Arc<Taker>) {
        self.set_load(core, taker, None);
        self.cores[core].takers.write().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, taker));
        self.takers.fetch_sub(1, Ordering::Relaxed);
        self.change_able(core, -1);
    }

    /// How many requests it has; `None`: it takes no more now, and what waits is for others.
    pub(crate) fn set_load(&self, core: usize, taker: &Taker, load: Option<usize>) {
        let own = &self.cores[core];
        let before = taker.load.swap(load.unwrap_or(TAKES_NONE), Ordering::SeqCst);
        match (before == 0, load == Some(0)) {
            (false, true) => drop(own.idle.fetch_add(1, Ordering::SeqCst)),
            (true, false) => drop(own.idle.fetch_sub(1, Ordering::SeqCst)),
            _ => {}
        }
        if load.is_none() && before != TAKES_NONE && !own.jobs_taken.is_empty() {
            self.ring(own);
        }
    }

    /// How many of the requests that wait it should take. When that is none although some wait, they are others' to take.
    pub(crate) fn share_of(&self, core: usize, taker: &Taker) -> usize {
        let own = &self.cores[core];
        let waiting = own.jobs_taken.len();
        let (Some(load), true) = (taker.load(), waiting > 0) else { return 0 };
        level(&own.takers(), waiting).saturating_sub(load)
    }

    /// Wakes whoever should take of this core's requests, again: one that left them to others does so in case they were
    /// about to leave them to it.
    pub(crate) fn pass_on(&self, core: usize) {
        let own = &self.cores[core];
        if !own.jobs_taken.is_empty() {
            self.ring(own);
        }
    }

    /// A request of another core where nobody takes any now.
    pub(crate) fn stranded_errand(&self, core: usize) -> Option<Errand> {
        self.stranded(core).find_map(|core| self.another_errand(core))
    }

    pub(crate) fn has_stranded(&self, core: usize) -> bool {
        self.stranded(core).next().is_some()
    }

    fn stranded(&self, core: usize) -> impl Iterator<Item = usize> {
        let others = self.cores.iter().enumerate().filter(move |(index, other)| *index != core && !other.jobs_taken.is_empty());
        others.filter(|(_, other)| !other.takers().iter().any(|taker| taker.takes())).map(|(index, _)| index)
    }

    fn ring_takers(&self, core: &Core, waiting: usize) {
        let mut woken = false;
        let takers = core.takers();
        let level = level(&takers, waiting);
        for taker in takers.iter().filter(|taker| taker.load().is_some_and(|load| load < level)) {
            taker.waker.wake();
            woken = true;
        }
        drop(takers);
        if waiting > 0 && !woken {
            let takers = self.cores.iter().flat_map(|core| core.takers().clone());
            let least = takers.filter_map(|taker| Some((taker.load()?, taker))).min_by_key(|(load, _)| *load);
            least.into_iter().for_each(|(_, taker)| taker.waker.wake());
        }
    }
}

/// How many requests each would have if those that wait were spread.
fn level(takers: &[Arc<Taker>], waiting: usize) -> usize {
    let loads = takers.iter().filter_map(|taker| taker.load());
    let (count, sum) = loads.fold((0, waiting), |(count, sum), load| (count + 1, sum + load));
    if count == 0 { 0 } else { sum.div_ceil(count) }
}

impl Pools {
    /// Where a request of this core waits: in its own queue, unless a neighbour has somebody free for it.
    fn least_busy(&self, core: usize) -> &Core {
        let own = &self.cores[core];
        let free = |core: &Core| core.idle.load(Ordering::Relaxed) > core.jobs_taken.len();
        if self.cores.len() == 1 || own.idle.load(Ordering::Relaxed) > 0 {
            return own;
        }
        if own.able.load(Ordering::Relaxed) == 0 {
            let able = self.cores.iter().filter(|core| core.able.load(Ordering::Relaxed) > 0);
            return able.min_by_key(|core| core.jobs_taken.len()).unwrap_or(own);
        }
        if own.jobs_taken.is_empty() && self.handlers_per_core > 0 || own.wait(1) < HOP {
            return own;
        }
        self.cores.iter().find(|core| free(core)).unwrap_or(own)
    }
}

/// Room in each queue beyond its limit for requests that come back. More than the couriers of a core can hold, unless
/// it has dozens of them.
const COMING_BACK: usize = 1024;
/// To be served by a neighbour costs as much as to wait for so long, in microseconds.
pub(crate) const HOP: Micros = 1_000;

impl Core {
    fn takers(&self) -> RwLockReadGuard<'_, Vec<Arc<Taker>>> {
        self.takers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, answer: Answer) {
        // The receiver lives as long as `self`.
        let _ = self.answers.send(answer);
        self.wake();
    }

    /// One that has not begun looks into its queue when it begins.
    fn wake(&self) {
        self.waker.get().into_iter().for_each(Waker::wake);
    }

    /// How long the last of those that wait will have waited, if `more` join them, as far as anybody knows.
    fn wait(&self, more: usize) -> Micros {
        ((self.jobs_taken.len() + more) as u64).saturating_mul(self.pace.load(Ordering::Relaxed))
    }

    /// Requests wait for nobody; or for somebody who is busy, and for longer than it takes to have them served elsewhere.
    fn needs_help(&self) -> bool {
        let is_deserted = self.able.load(Ordering::SeqCst) == 0 && !self.jobs_taken.is_empty();
        is_deserted || self.idle.load(Ordering::SeqCst) == 0 && self.wait(0) >= HOP
    }
}

/// A ring thread's side of its pool.
pub struct Desk {
    pools: Arc<Pools>,
    answers: Receiver<Answer>,
    core: usize,
    home: Home,
}

impl Desk {
    /// Puts a request into the queue; into an idle neighbour's when no handler of this core is free.
    ///
    /// # Errors
    /// Gives the request back when the queue is full.
    pub fn offer(&self, exchange: Box<Exchange>) -> Result<(), Box<Exchange>> {
        let core = self.pools.least_busy(self.core);
        if core.jobs_taken.len() >= self.pools.queue_max {
            return Err(exchange);
        }
        let errand = Errand { exchange, home: self.core, started: false, lost_with: None, unbegun: 0 };
        core.jobs.try_send(Job::Run(errand)).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => match job {
                Job::Run(errand) => errand.exchange,
                Job::Stop => unreachable!("this was a request"),
            },
        })
    }

    /// Wakes those who wait for what was offered. Call it once after all offers of a turn.
    pub fn ring(&self) {
        if self.pools.handlers_per_core == 0 {
            // What was offered may wait in any core's queue.
            self.pools.cores.iter().filter(|core| !core.jobs_taken.is_empty()).for_each(|core| self.pools.ring(core));
        }
    }

    /// True when requests wait and nobody of this core is free for them: more of them would be of no use before somebody is done.
    ///
    /// Only worker processes are looked at, whose answers come in batches.
    pub fn is_saturated(&self) -> bool {
        let own = &self.pools.cores[self.core];
        self.pools.handlers_per_core == 0 && !own.jobs_taken.is_empty() && own.idle.load(Ordering::Relaxed) == 0
    }

    /// Gives the disk something to do; its outcome comes as an answer.
    pub fn spool(&self, job: DiskJob) {
        self.pools.disk.submit(job, &self.home);
    }

    /// The next thing that was sent home.
    pub fn answer(&self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }

    pub fn has_answer(&self) -> bool {
        !self.answers.is_empty()
    }
}
