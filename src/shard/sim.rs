//! The engine under a kernel, a pool and clients that are all made up, and a clock that only moves when it is told to.
//!
//! ```text
//!   clients --bytes--> SimKernel --Completion--> Engine --Exchange--> SimPool
//!   clients <-bytes--- SimKernel <----- Op ------ Engine <--Answer---- SimPool
//!                                                Engine --Job--> SimDisk --Done--> Engine
//! ```
//!
//! Engine, slots, deadlines and `http1` are those of production. Around them a seed decides everything:
//! which clients come and what they say, which classes of faults this run has at all (each is on in half
//! of the runs, so that each pair of them meets in a quarter), and at each step which of all the things
//! that could happen happens. A turn here is a turn of `shard::run`, call by call.
//!
//! Every rule of the seam (`driver/mod.rs`) and every promise to a client is a [`Checker`]. The first
//! that is broken ends the run, with its seed. To be sure that the checkers see, a [`Canary`] plants
//! one known bug in the engine, and the run has to fail.
//!
//! - `URINGD_SIM_SEEDS=100000 cargo test --lib shard::sim` runs more seeds,
//! - `URINGD_SIM_SEED=4711 cargo test --lib shard::sim -- --nocapture` runs one, and tells its story.

mod client;
mod disk;
mod header;
mod kernel;
mod pool;
pub mod random;

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use self::{
    client::Client,
    disk::SimDisk,
    kernel::{Delivered, Event, SimKernel},
    pool::{SimHandler, SimPool, is_held_back},
    random::Random,
};
use super::engine::{Canary, Engine, Life};
use crate::{
    config::Config,
    disk::{Done, Outcome, Quota},
    driver::{Completion, Op, Token},
    exchange::Micros,
    handler::Body,
    identity::Networks,
    pool::Answer,
    stats::Stats,
    stream::Credit,
};

/// Runs of a plain `cargo test`. The rarest bug found so far showed in one of 10,000.
const SEEDS: u64 = 20_000;
/// Turns after which a run that is not over never will be.
const TURNS_MAX: usize = 60_000;
/// Turns in which the engine may find nothing to do although it wanted to be woken. Each wait is looked at
/// again at least once per turn of the wheel (`deadlines.rs`), 17 seconds, hence some.
const IDLE_WAKES_MAX: usize = 400;
/// How long `shard::run` lets a drain last.
const DRAIN: Micros = 30_000_000;
/// Turns that everything may take to end once it was told to stop at once.
const STOP_TURNS_MAX: usize = 500;

/// Which promise was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Checker {
    /// Something was sent or received after the end of that direction.
    AfterEnd,
    /// A connection was closed with something in flight.
    CloseInFlight,
    /// An operation named a descriptor that is not open.
    ClosedDescriptor,
    /// A drain kept a connection that nobody waits for.
    Drain,
    /// A client lost its connection, or its answer, without a reason.
    EarlyEnd,
    /// A handler waits for a client that is gone.
    HandlerHeld,
    /// A connection that had to begin with a PROXY protocol header, and did not, was kept.
    HeaderAwaited,
    /// Something was left behind.
    Leak,
    /// The next deadline is not in the future, or comes again and again for nothing.
    Livelock,
    /// Somebody may have something to say, and nothing receives or accepts.
    NotArmed,
    /// The engine panicked.
    Panic,
    RunTwice,
    /// `stats.stale` counted.
    StaleCounted,
    /// An operation named a connection's former or future owner.
    StaleToken,
    /// More connections than the limit.
    TooMany,
    TwoInFlight,
    /// It does not come to an end.
    Unsettled,
    /// A request whose client is gone was run.
    WithdrawnRuns,
    /// A client got a byte, an answer or an end that is not the right one.
    WrongAnswer,
    /// A handler was told another client than the one that asks.
    WrongClient,
}

#[derive(Debug)]
struct Violation {
    checker: Checker,
    what: String,
}

type Check = Result<(), Violation>;

fn violation<T>(checker: Checker, what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { checker, what: what.into() })
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.checker, self.what)
    }
}

/// Which classes of faults a run has.
#[derive(Debug)]
struct Faults {
    /// Receives end anywhere in the client's bytes.
    split: bool,
    short_send: bool,
    /// Receives end for lack of buffers.
    no_buffers: bool,
    /// Multishot operations end for no reason.
    again: bool,
    reset: bool,
    half_close: bool,
    accept_fail: bool,
    /// A receive that was stopped still brings bytes or the peer's end.
    recv_stop_race: bool,
    accept_stop_race: bool,
    /// The thread is held up for seconds.
    late_timers: bool,
    slow_handlers: bool,
    slow_disk: bool,
    disk_fail: bool,
    /// Clients that pause, read slowly, or stop.
    slow_clients: bool,
    few_connections: bool,
    short_queue: bool,
    few_per_ip: bool,
    small_limits: bool,
    /// Bodies go through files.
    small_memory: bool,
    /// Connections must begin with a PROXY protocol header, and not all do.
    proxied: bool,
}

impl Faults {
    fn new(random: &mut Random) -> Faults {
        let mut half = || random.chance(50);
        Faults {
            split: half(),
            short_send: half(),
            no_buffers: half(),
            again: half(),
            reset: half(),
            half_close: half(),
            accept_fail: half(),
            recv_stop_race: half(),
            accept_stop_race: half(),
            late_timers: half(),
            slow_handlers: half(),
            slow_disk: half(),
            disk_fail: half(),
            slow_clients: half(),
            few_connections: half(),
            short_queue: half(),
            few_per_ip: half() && half(),
            small_limits: half(),
            small_memory: half(),
            proxied: half(),
        }
    }

    /// What the kernel and the clock do of their own accord is over. What clients and handlers have begun goes on.
    fn stop(&mut self) {
        (self.split, self.short_send, self.no_buffers, self.again) = (false, false, false, false);
        (self.accept_fail, self.late_timers, self.disk_fail, self.slow_disk) = (false, false, false, false);
    }
}

/// What clients may hold the engine to.
struct Rules {
    life: Life,
    drain_since: Option<Micros>,
    head: Micros,
    /// The earliest that a 408 can be right.
    head_or_body: Micros,
    keep_alive: Micros,
    send: Micros,
    queue: Micros,
    run: Micros,
    body_idle: Micros,
    send_rate_grace: Micros,
    disk_has_failed: bool,
    /// When the disk was last seen at work.
    disk_idle_since: Micros,
    /// Readers may be slower than allowed, or seem so.
    reads_may_stall: bool,
    keep_alive_requests_max: u64,
    body_bytes_max: u64,
    body_memory_bytes_max: u64,
    connections_max: usize,
    connections_per_ip_max: usize,
}

/// What everything in a run goes by.
struct Scene {
    random: Random,
    faults: Faults,
    rules: Rules,
    now: Micros,
}

/// One run.
struct World {
    scene: Scene,
    stats: Arc<Stats>,
    handler: Arc<SimHandler>,
    engine: Engine,
    kernel: SimKernel,
    pool: SimPool,
    disk: SimDisk,
    /// What files of bodies take up.
    quota: Arc<Quota>,
    clients: Vec<Client>,
    /// Bodies that handlers are at, and whose.
    streams: Vec<(Token, u64, Arc<Credit>)>,
    /// Turns that were taken, and those of them in which there was nothing to do for the engine.
    turns: usize,
    idle_wakes: usize,
    /// At which turn the end comes, if it comes before the clients have gone.
    wind_down_at: usize,
    wind_down_to: Life,
    drain_until: Option<Micros>,
    stop_turns: usize,
    told: Story,
    /// What can happen next; kept for its memory.
    events: Vec<Event>,
}

/// What happened, as one number to compare two runs by, and as text for who asks.
struct Story {
    digest: u64,
    aloud: bool,
}

impl Story {
    fn tell(&mut self, now: Micros, what: fmt::Arguments<'_>) {
        if self.aloud {
            eprintln!("{now:>12} {what}");
        }
    }

    fn note(&mut self, number: u64) {
        self.digest = (self.digest ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
    }
}

impl World {
    fn new(seed: u64, canary: Option<Canary>, aloud: bool) -> World {
        let mut random = Random::new(seed);
        let faults = Faults::new(&mut random);
        let mut config = Config::default();
        config.limits.body_bytes_max = 1 << 20;
        if faults.few_connections {
            config.limits.connections_max = 1 + random.below(3);
        }
        if faults.small_limits {
            config.limits.head_bytes_max = 512;
            config.limits.response_buffer_bytes_max = 2_000;
            config.limits.keep_alive_requests_max = random.pick(&[0, 0, 2, 3]);
            config.timeouts.body_idle = Duration::from_secs(5);
        }
        if faults.small_memory {
            config.limits.body_memory_bytes_max = random.pick(&[50, 1_000, 20_000]);
            config.limits.response_memory_total_bytes_max = random.pick(&[0, 1_000, 100_000]);
        }
        if faults.few_per_ip {
            config.limits.connections_per_ip_max = Some(1 + random.below(3));
        }
        if faults.proxied {
            config.proxy_protocol = Some(Networks::loopback());
        }
        let timeouts = &config.timeouts;
        let micros = |time: Duration| time.as_micros() as Micros;
        let rules = Rules {
            life: Life::Serving,
            drain_since: None,
            head: micros(timeouts.head),
            head_or_body: micros(timeouts.head.min(timeouts.body_idle).min(timeouts.body_rate_grace)),
            keep_alive: micros(timeouts.keep_alive),
            send: micros(timeouts.send),
            queue: micros(timeouts.queue),
            run: micros(timeouts.run),
            body_idle: micros(timeouts.body_idle),
            send_rate_grace: micros(timeouts.send_rate_grace),
            disk_has_failed: false,
            disk_idle_since: 0,
            reads_may_stall: faults.late_timers,
            keep_alive_requests_max: config.limits.keep_alive_requests_max,
            body_bytes_max: config.limits.body_bytes_max,
            body_memory_bytes_max: config.limits.body_memory_bytes_max as u64,
            connections_max: config.limits.connections_max,
            connections_per_ip_max: config.limits.connections_per_ip_max.unwrap_or(usize::MAX),
        };
        let listeners = 1 + random.below(2);
        let clients: Vec<Client> =
            (0..1 + random.below(7)).map(|index| Client::new(index, listeners, &faults, &rules, &mut random)).collect();
        let queue_max = if faults.short_queue { 1 + random.below(2) } else { 64 };
        let now = 1_000 + random.micros(1 << 40);
        let handler = Arc::new(SimHandler::new(clients.iter().flat_map(Client::identities).collect()));
        let (stats, quota) = (Arc::new(Stats::default()), Arc::new(Quota::new(1 << 40)));
        let mut engine = Engine::new(&config, handler.clone(), listeners, stats.clone(), quota.clone(), now, SystemTime::UNIX_EPOCH);
        engine.planted.0 = canary;
        World {
            pool: SimPool::new(1 + random.below(3), queue_max),
            kernel: SimKernel::new(listeners),
            wind_down_at: if random.chance(50) { random.below(300) } else { usize::MAX },
            wind_down_to: if random.chance(60) { Life::Draining } else { Life::Stopping },
            scene: Scene { random, faults, rules, now },
            quota,
            disk: SimDisk::default(),
            stats,
            handler,
            engine,
            clients,
            streams: Vec::new(),
            turns: 0,
            idle_wakes: 0,
            drain_until: None,
            stop_turns: 0,
            told: Story { digest: seed, aloud },
            events: Vec::new(),
        }
    }

    /// From the first connection to the last, or to the first broken promise.
    fn run(&mut self) -> Check {
        if self.told.aloud {
            eprintln!("{:?}", self.scene.faults);
            self.clients.iter().for_each(|client| eprintln!("{client:?}"));
        }
        while !self.turn()? {
            self.turns += 1;
            if self.turns == TURNS_MAX {
                return violation(Checker::Unsettled, format!("after {TURNS_MAX} turns"));
            }
        }
        self.check_end()
    }

    /// One turn of `shard::run`. True when it would return.
    fn turn(&mut self) -> Result<bool, Violation> {
        let now = self.scene.now;
        while let Some(done) = self.disk.answer() {
            self.told.tell(now, format_args!("{}", brief_done(&done)));
            self.engine.disk_done(done, now);
        }
        while let Some(answer) = self.pool.answer() {
            self.answer(answer);
        }
        self.wind_down();
        let over = self.scene.rules.life > Life::Serving;
        if over && self.engine.is_quiet() && self.engine.ops.is_empty() {
            return Ok(true);
        }
        for exchange in std::mem::take(&mut self.engine.dispatch) {
            self.told.tell(now, format_args!("offered {} of {:?} #{}", exchange.request().path(), exchange.token, exchange.serial));
            if let Err(exchange) = self.pool.offer(exchange, &mut self.clients) {
                self.engine.queue_full(exchange, now);
            }
        }
        self.engine.end_turn(now);
        let idle = self.push_ops()? == 0;
        for job in std::mem::take(&mut self.engine.disk) {
            self.disk.submit(job, &mut self.scene);
        }
        self.check_turn()?;
        self.wait(idle)?;
        Ok(false)
    }

    fn answer(&mut self, answer: Answer) {
        let now = self.scene.now;
        match answer {
            Answer::Response(exchange) => {
                if let Some(Body::Stream(stream)) = exchange.response.as_ref().map(|response| &response.body) {
                    self.streams.push((exchange.token, exchange.serial, stream.credit.clone()));
                }
                self.told.tell(now, format_args!("answered {:?} #{}", exchange.token, exchange.serial));
                self.engine.answered(exchange, now);
            }
            Answer::Extended { .. } => unreachable!("no handler here asks for more time"),
            Answer::Hints { token, serial, fields } => {
                self.told.tell(now, format_args!("hints for {token:?} #{serial}"));
                self.engine.hinted(token, serial, &fields, now);
            }
            Answer::Piece { token, serial, bytes } => {
                self.told.tell(now, format_args!("a piece of {} for {token:?} #{serial}", bytes.len()));
                self.engine.piece(token, serial, bytes, now);
            }
            Answer::Ended { token, serial, whole } => {
                self.told.tell(now, format_args!("the end of {token:?} #{serial}, whole: {whole}"));
                self.streams.retain(|stream| (stream.0, stream.1) != (token, serial));
                self.engine.ended(token, serial, whole, now);
            }
            Answer::Disk(done) => self.engine.disk_done(done, now),
        }
    }

    /// The end, when it is time for it: as the seed says, or when the clients have gone.
    fn wind_down(&mut self) {
        let done = self.are_clients_done() && self.pool.is_empty() && self.disk.is_empty();
        let serving = self.scene.rules.life == Life::Serving;
        if serving && (self.turns >= self.wind_down_at || done) {
            self.drain_until = Some(self.scene.now + DRAIN);
            self.begin(Life::Draining);
            if !done && self.wind_down_to == Life::Stopping {
                self.begin(Life::Stopping);
            }
        }
        if done {
            self.scene.faults.stop();
        }
        if self.scene.rules.life == Life::Draining && self.drain_until.is_some_and(|until| until <= self.scene.now) {
            self.begin(Life::Stopping);
        }
    }

    fn are_clients_done(&self) -> bool {
        self.clients.iter().all(Client::is_done)
    }

    fn begin(&mut self, life: Life) {
        self.told.tell(self.scene.now, format_args!("{life:?}"));
        if life == Life::Stopping {
            self.scene.faults.stop();
        }
        self.scene.rules.life = life;
        self.scene.rules.drain_since.get_or_insert(self.scene.now);
        self.engine.wind_down(life, self.scene.now);
    }

    fn push_ops(&mut self) -> Result<usize, Violation> {
        let ops: Vec<Op> = self.engine.ops.drain(..).collect();
        let count = ops.len();
        for op in ops {
            self.told.tell(self.scene.now, format_args!("  -> {}", brief(&op)));
            self.kernel.push(op, &mut self.clients, &self.scene)?;
        }
        Ok(count)
    }

    /// Lets some of all that can happen happen. What the engine is told meanwhile, it hears in one go, as from `Driver::wait`.
    fn wait(&mut self, idle: bool) -> Check {
        let now = self.scene.now;
        let mut happened = 0;
        for _ in 0..1 + self.scene.random.below(6) {
            if !self.happen()? {
                break;
            }
            happened += 1;
        }
        self.scene.rules.disk_has_failed |= self.disk.has_failed;
        if !self.disk.is_empty() {
            self.scene.rules.disk_idle_since = self.scene.now;
        }
        let more = self.pool.has_answer() || self.disk.has_answer() || !self.engine.dispatch.is_empty();
        if happened == 0 && !more {
            self.idle_wakes += usize::from(idle);
            return self.sleep();
        }
        self.idle_wakes = 0;
        self.scene.now = now + self.scene.random.micros(300);
        if self.scene.faults.late_timers && self.scene.random.chance(1) {
            self.scene.now += self.scene.random.micros(20_000_000);
            self.told.tell(self.scene.now, format_args!("(held up)"));
        }
        Ok(())
    }

    /// One thing happens, if anything can.
    fn happen(&mut self) -> Result<bool, Violation> {
        let now = self.scene.now;
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.kernel.events(&self.clients, &self.scene.faults, &mut events);
        let of_clients = self.clients.iter().filter(|client| client.can_step(now)).count();
        let of_pool = usize::from(self.pool.can_step(now));
        let of_disk = usize::from(self.disk.can_step(now));
        // Faults come while something goes on, and only now and then when nothing does, or time would never pass.
        if events.len() + of_clients + of_pool + of_disk > 0 || self.scene.random.chance(20) {
            self.kernel.faults(&self.clients, &mut self.scene, &mut events);
        }
        let all = events.len() + of_clients + of_pool + of_disk;
        let choice = if all == 0 { 0 } else { self.scene.random.below(all) };
        let event = events.get(choice).copied();
        self.events = events;
        self.told.note(choice as u64);
        if all == 0 {
            return Ok(false);
        }
        if let Some(event) = event {
            self.deliver(event)?;
        } else if choice < all - of_pool - of_disk {
            let nth = choice - (all - of_pool - of_disk - of_clients);
            let client = self.clients.iter_mut().filter(|client| client.can_step(now)).nth(nth).expect("it was counted");
            self.told.tell(now, format_args!("client {} {}", client.index, client.intention()));
            if client.step(&mut self.scene) {
                self.kernel.connect(client.listener, client.index);
            }
        } else if choice < all - of_pool {
            self.disk.step(&mut self.scene);
        } else {
            self.pool.step(&*self.handler, &self.stats, &self.kernel, &mut self.clients, &mut self.scene)?;
        }
        Ok(true)
    }

    fn deliver(&mut self, event: Event) -> Check {
        let now = self.scene.now;
        self.told.tell(now, format_args!("{event:?}"));
        match self.kernel.deliver(event, &mut self.clients, &mut self.scene)? {
            Delivered::Received(token, bytes) => self.engine.handle(Completion::Received { token, bytes: &bytes }, now),
            Delivered::Other(completion) => self.engine.handle(completion, now),
            Delivered::Nothing => {}
        }
        Ok(())
    }

    /// Nothing can happen unless time passes: it does, up to the next moment that anybody waits for.
    fn sleep(&mut self) -> Check {
        let now = self.scene.now;
        let room = self.scene.rules.life == Life::Serving && self.engine.connections() < self.scene.rules.connections_max;
        let pausing = self.engine.next_deadline().is_some_and(|next| next <= now + 200_000);
        // While the disk is behind, a body may have to wait with its bytes unread.
        if self.disk.is_empty() {
            self.kernel.check_armed(&self.clients, room && !pausing)?;
        }
        if self.scene.rules.life == Life::Draining {
            self.kernel.check_drained(&self.clients)?;
        }
        if self.idle_wakes > IDLE_WAKES_MAX {
            return violation(Checker::Livelock, format!("woken {IDLE_WAKES_MAX} times for nothing"));
        }
        let drain_until = self.drain_until.filter(|_| self.scene.rules.life == Life::Draining);
        let others =
            self.clients.iter().filter_map(|client| client.next(now)).chain(self.pool.next()).chain(self.disk.next()).chain(drain_until);
        match others.chain(self.engine.next_deadline()).min() {
            Some(next) => self.scene.now = next.max(now),
            None if self.are_clients_done() || self.engine.is_quiet() => {}
            // Nobody would ever come back to it.
            None => return violation(Checker::Unsettled, format!("{} connections wait for nothing", self.engine.connections())),
        }
        if self.scene.faults.late_timers && self.scene.random.chance(10) {
            self.scene.now += self.scene.random.micros(5_000_000);
        }
        self.told.tell(self.scene.now, format_args!("(slept {} us)", self.scene.now - now));
        Ok(())
    }

    /// What must hold after each turn.
    fn check_turn(&mut self) -> Check {
        if self.stats.stale.read() > 0 {
            return violation(Checker::StaleCounted, format!("{}", self.stats.stale.read()));
        }
        let kernel = &self.kernel;
        let gone = self.streams.extract_if(.., |(token, ..)| !kernel.is_open(*token));
        for (token, _, credit) in gone {
            if is_held_back(&credit) {
                return violation(Checker::HandlerHeld, format!("the client of {token:?} is gone"));
            }
        }
        if let Some((client, index)) = self.handler.ran_twice() {
            return violation(Checker::RunTwice, format!("request {index} of client {client}"));
        }
        if let Some((client, index)) = self.handler.mistaken() {
            return violation(Checker::WrongClient, format!("request {index} of client {client}"));
        }
        if let Some(client) = self.clients.iter().find(|client| client.is_kept_in_spite_of_its_header()) {
            return violation(Checker::HeaderAwaited, format!("the header of client {} shows its fault", client.index));
        }
        if let Some(next) = self.engine.next_deadline().filter(|next| *next <= self.scene.now) {
            return violation(Checker::Livelock, format!("the next deadline, {next}, is past at {}", self.scene.now));
        }
        if self.scene.rules.life == Life::Stopping {
            self.stop_turns += 1;
            if self.stop_turns > STOP_TURNS_MAX {
                return violation(Checker::Unsettled, format!("{} connections outlive a stop", self.engine.connections()));
            }
        }
        self.kernel.check_accepting(self.engine.connections(), self.scene.rules.connections_max)
    }

    /// What must hold when all is over.
    fn check_end(&mut self) -> Check {
        if !self.kernel.is_quiet() || self.engine.connections() > 0 || self.stats.open.read() > 0 {
            return violation(Checker::Leak, "the engine says that it is quiet, and is not");
        }
        let World { pool, disk, engine, quota, .. } = self;
        if pool.is_empty() && disk.is_empty() && engine.dispatch.is_empty() && engine.disk.is_empty() && quota.used() > 0 {
            return violation(Checker::Leak, format!("{} bytes of files that are gone", quota.used()));
        }
        self.pool.note_withdrawn(&mut self.clients);
        self.clients.iter().try_for_each(Client::check_excuse)
    }
}

/// An operation without its bytes.
fn brief(op: &Op) -> String {
    match op {
        Op::Send { fd, chunk, .. } => format!("Send {fd}, {} bytes", chunk.len()),
        other => format!("{other:?}"),
    }
}

fn brief_done(done: &Done) -> String {
    let what = match &done.result {
        Ok(Outcome::Written { length, .. }) => format!("wrote {length}"),
        Ok(Outcome::Read { bytes }) => format!("read {}", bytes.len()),
        Err(error) => error.to_string(),
    };
    format!("the disk {what} for {:?} #{}, {:?}", done.token, done.serial, done.direction)
}

/// Runs a seed; the digest of all that happened, or what was broken.
fn run(seed: u64, canary: Option<Canary>, aloud: bool) -> Result<u64, Violation> {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, canary, aloud);
        world.run().map(|()| world.told.digest ^ world.scene.now)
    }));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        violation(Checker::Panic, text.unwrap_or_default())
    })
}

/// Runs so many seeds on two threads, and stops at the first broken promise.
fn run_all(seeds: u64) {
    let next = AtomicU64::new(1);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > seeds {
                return;
            }
            if let Err(violation) = run(seed, None, false) {
                next.store(seeds + 1, Ordering::Relaxed);
                panic!("{violation}; rerun: URINGD_SIM_SEED={seed} cargo test --lib shard::sim -- --nocapture");
            }
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        work();
        other.join().expect("a seed that keeps every promise");
    });
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

#[test]
fn every_promise_is_kept_whatever_happens_in_whatever_order() {
    match number("URINGD_SIM_SEED") {
        Some(seed) => {
            if let Err(violation) = run(seed, None, true) {
                panic!("{violation}; this was seed {seed}");
            }
        }
        None => run_all(number("URINGD_SIM_SEEDS").unwrap_or(SEEDS)),
    }
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in 1..50 {
        assert_eq!(run(seed, None, false).ok(), run(seed, None, false).ok(), "seed {seed}");
    }
}

/// A bug, and the checkers that may be the first to see it.
const CANARIES: [(Canary, &[Checker]); 11] = [
    (Canary::ClosedInFlight, &[Checker::CloseInFlight, Checker::StaleCounted]),
    (Canary::DeadlineMissed, &[Checker::HeaderAwaited, Checker::Unsettled]),
    (Canary::HeaderFaultForgiven, &[Checker::HeaderAwaited]),
    (Canary::HeaderRenewsTime, &[Checker::HeaderAwaited]),
    (Canary::NextRequestForgotten, &[Checker::Drain, Checker::EarlyEnd, Checker::NotArmed, Checker::Unsettled, Checker::WrongAnswer]),
    (Canary::NotArmedAgain, &[Checker::NotArmed]),
    (Canary::NotWithdrawn, &[Checker::WithdrawnRuns, Checker::EarlyEnd]),
    (Canary::OldAnswerTaken, &[Checker::WrongAnswer]),
    (Canary::ShortSendLosesRest, &[Checker::WrongAnswer, Checker::EarlyEnd]),
    (Canary::ShortSendRepeats, &[Checker::WrongAnswer]),
    (Canary::StrangerBelieved, &[Checker::WrongClient]),
];

#[test]
fn each_planted_bug_is_caught() {
    for (canary, checkers) in CANARIES {
        let mut catches: BTreeMap<Checker, u32> = BTreeMap::new();
        let caught = (1..=400).filter_map(|seed| run(seed, Some(canary), false).err());
        caught.for_each(|violation| *catches.entry(violation.checker).or_default() += 1);
        println!("{canary:?} in 400 runs: {catches:?}");
        assert!(!catches.is_empty(), "{canary:?} was not caught");
        assert!(catches.keys().all(|checker| checkers.contains(checker)), "{canary:?} was caught by {catches:?}");
    }
}

/// A simulation in which nothing goes wrong any more would pass as well.
#[test]
fn everything_that_can_go_wrong_does() {
    let mut met: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 1..=1_500 {
        let mut world = World::new(seed, None, false);
        world.run().unwrap_or_else(|violation| panic!("{violation}; rerun: URINGD_SIM_SEED={seed} cargo test --lib shard::sim"));
        let stats = &world.stats;
        let counters = [
            ("accepting paused", &stats.accept_pauses),
            ("a client had its fill of connections", &stats.ip_limited),
            ("a client left with its request in the queue", &stats.withdrawn),
            ("a client was reset for not reading", &stats.send_timeouts),
            ("a connection failed", &stats.peer_errors),
            ("a connection had no header", &stats.proxy_refused),
            ("a handler panicked", &stats.panics),
            ("a stranger named the client", &stats.forwarding_removed),
            ("the disk failed", &stats.spool_errors),
            ("the queue was full", &stats.queue_full),
            ("408 or a refusal", &stats.answers[4]),
            ("503 after a wait", &stats.queue_timeouts),
            ("504", &stats.run_timeouts),
        ];
        counters.into_iter().for_each(|(name, counter)| *met.entry(name).or_default() += counter.read());
        stats.refusals().into_iter().for_each(|(reason, count)| *met.entry(reason).or_default() += count);
        *met.entry("a receive was stopped").or_default() += world.kernel.stops;
    }
    println!("{met:#?}");
    let refusals = ["body-timeout", "body-too-large", "body-too-slow", "chunk-size-bad", "head-timeout", "host-missing", "truncated"];
    refusals.into_iter().for_each(|reason| assert!(met.contains_key(reason), "{reason} is never met"));
    met.iter().for_each(|(name, count)| assert!(*count > 0, "{name} is never met"));
}
