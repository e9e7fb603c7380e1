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
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use core_affinity::CoreId;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};

use crate::{
    driver::waker::Waker,
    exchange::{Exchange, Micros},
    handler::Handler,
    shard::engine,
    stats::Stats,
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

/// All cores' queues. Shared by every ring and handler thread.
pub struct Pools {
    cores: Vec<Core>,
    handlers_per_core: usize,
}

struct Core {
    jobs: Sender<Job>,
    jobs_taken: Receiver<Job>,
    answers: Sender<Box<Exchange>>,
    answers_taken: Receiver<Box<Exchange>>,
    /// Handlers that wait for a job.
    idle: AtomicUsize,
    waker: OnceLock<Waker>,
}

impl Pools {
    /// `queue_max` requests may wait per core.
    pub fn new(cores: usize, handlers_per_core: usize, queue_max: usize) -> Arc<Pools> {
        let core = |_| {
            let (jobs, jobs_taken) = bounded(queue_max);
            let (answers, answers_taken) = unbounded();
            Core { jobs, jobs_taken, answers, answers_taken, idle: AtomicUsize::new(0), waker: OnceLock::new() }
        };
        Arc::new(Pools { cores: (0..cores).map(core).collect(), handlers_per_core })
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
        Desk { pools: self.clone(), answers: self.cores[core].answers_taken.clone(), core }
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
        while let Job::Run { mut exchange, home } = self.take(core) {
            if exchange.ticket.start(clock.now()) {
                exchange.response = Some(engine::run(handler, &exchange.request(), stats));
            }
            let home = &self.cores[home];
            // The receiver lives as long as `self`.
            let _ = home.answers.send(exchange);
            home.waker.get().expect("set before the first job").wake();
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

/// A ring thread's side of its pool.
pub struct Desk {
    pools: Arc<Pools>,
    answers: Receiver<Box<Exchange>>,
    core: usize,
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

    /// The next answer that a handler has sent home.
    pub fn answer(&self) -> Option<Box<Exchange>> {
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
