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

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use core_affinity::CoreId;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};

use crate::{
    config::Config,
    driver::{Token, waker::Waker},
    exchange::{Exchange, Micros},
    disk::{Disk, Done, Home, Job as DiskJob},
    handler::{Body, Handler},
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

enum Job {
    Run { exchange: Box<Exchange>, home: usize },
    Stop,
}

/// What comes home to a ring thread.
pub enum Answer {
    /// A handler is done with a request, or found it withdrawn.
    Response(Box<Exchange>),
    /// A handler has made more of a body.
    Piece { token: Token, serial: u64, bytes: Vec<u8> },
    /// A handler has made all of a body; or failed, when it is not whole.
    Ended { token: Token, serial: u64, whole: bool },
    /// The disk is done.
    Disk(Done),
}

/// All cores' queues. Shared by every ring and handler thread.
pub struct Pools {
    cores: Vec<Core>,
    handlers_per_core: usize,
    /// How long a handler that streams waits for its client.
    send_wait_max: Duration,
    disk: Disk,
}

struct Core {
    jobs: Sender<Job>,
    jobs_taken: Receiver<Job>,
    answers: Sender<Answer>,
    answers_taken: Receiver<Answer>,
    /// Handlers that wait for a job.
    idle: AtomicUsize,
    waker: OnceLock<Waker>,
}

impl Pools {
    pub fn new(cores: usize, config: &Config, disk: Disk) -> Arc<Pools> {
        let core = |_| {
            let (jobs, jobs_taken) = bounded(config.limits.queue_max);
            let (answers, answers_taken) = unbounded();
            Core { jobs, jobs_taken, answers, answers_taken, idle: AtomicUsize::new(0), waker: OnceLock::new() }
        };
        Arc::new(Pools {
            cores: (0..cores).map(core).collect(),
            handlers_per_core: config.handlers,
            send_wait_max: config.timeouts.send,
            disk,
        })
    }

    /// Starts the handler threads. `place` says which CPU those of a core run on.
    pub fn start(self: &Arc<Pools>, handler: &Arc<dyn Handler>, stats: &[Arc<Stats>], clock: Clock, place: impl Fn(usize) -> Option<CoreId>) {
        for (core, stats) in stats.iter().enumerate() {
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
        while let Job::Run { exchange, home } = self.take(core) {
            self.serve(exchange, &self.cores[home], handler, stats, clock);
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
        let own = &self.cores[core];
        if let Ok(job) = own.jobs_taken.try_recv() {
            return job;
        }
        let neighbours = self.cores.iter().enumerate().filter(|(index, _)| *index != core);
        for (_, neighbour) in neighbours {
            // A stop is for the neighbour's own threads; `stop` empties the queue before it puts them in.
            if neighbour.idle.load(Ordering::Relaxed) == 0
                && let Ok(job) = neighbour.jobs_taken.try_recv()
            {
                match job {
                    Job::Run { .. } => return job,
                    Job::Stop => drop(neighbour.jobs.try_send(Job::Stop)),
                }
            }
        }
        own.idle.fetch_add(1, Ordering::Relaxed);
        let job = own.jobs_taken.recv().unwrap_or(Job::Stop);
        own.idle.fetch_sub(1, Ordering::Relaxed);
        job
    }
}

impl Core {
    fn send(&self, answer: Answer) {
        // The receiver lives as long as `self`.
        let _ = self.answers.send(answer);
        self.waker.get().expect("set before the first job").wake();
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
        let job = Job::Run { exchange, home: self.core };
        let core = self.least_busy();
        core.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => match job {
                Job::Run { exchange, .. } => exchange,
                Job::Stop => unreachable!("this was a request"),
            },
        })
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

    fn least_busy(&self) -> &Core {
        let own = &self.pools.cores[self.core];
        let free = |core: &Core| core.idle.load(Ordering::Relaxed) > core.jobs_taken.len();
        if self.pools.cores.len() == 1 || own.idle.load(Ordering::Relaxed) > 0 || own.jobs_taken.is_empty() {
            return own;
        }
        self.pools.cores.iter().find(|core| free(core)).unwrap_or(own)
    }
}
