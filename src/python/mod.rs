//! Python applications: worker processes that are given complete requests, and whoever looks after them.
//!
//! ```text
//!                     +-- courier --- thread of worker 1
//!   queue of a core --+-- courier --- thread of worker 1       supervisor --orders--> couriers
//!                     +-- courier --- thread of worker 2           |   ^---reports--- couriers
//!                                                               zygote --fork--> workers
//! ```
//!
//! [`PythonApp`] says what to run. [`Workers`] runs it: one thread, the supervisor, owns the zygote and decides which
//! process serves a *slot*; `courier.rs` moves the requests, or `multiplexer.rs` when a worker runs many at a time;
//! `frames.rs` knows the bytes; `zygote.rs` the process.
//!
//! A slot has at most one worker that serves. Its successor is forked beside it and takes over once it is ready,
//! so recycling costs no request, and no two slots are recycled at a time. A worker that dies is replaced at once
//! when it had served anybody; one that never did is replaced after 0.1 s, then 0.2 s, up to 10 s, so that a crash loop costs
//! neither the machine nor the server.
//!
//! A worker that must go is asked first: SIGUSR1 (it writes where each thread is), then SIGTERM, then SIGKILL. SIGABRT instead
//! of SIGTERM, when a hook waits for it.

pub mod courier;
pub mod frames;
pub mod multiplexer;
pub mod zygote;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use core_affinity::CoreId;
use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::RecvFlags,
    process::{Pid, PidfdFlags, Signal},
};

use self::{
    courier::{Courier, Link, Order, Report, Reporter, STATUS_UNKNOWN, Shared, Worker},
    frames::{Event, Reader},
    multiplexer::Multiplexer,
    zygote::{About, Channel, News, Zygote},
};
use crate::{
    config::{Config, quoted},
    driver::waker::Waker,
    error::{Error, Result},
    exchange::Micros,
    pool::{Clock, Pools},
    shard::{Control, engine::Life},
    stats::Stats,
};

/// First and longest pause before a worker that serves nobody is tried again.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// After its traceback was asked for, a worker is given this long to write it.
const TRACEBACK_WAIT: Duration = Duration::from_millis(100);
/// Between SIGTERM and SIGKILL.
const KILL_WAIT: Duration = Duration::from_secs(1);
/// A worker that nobody needs any more ends by itself; after this long it is told to.
const RETIRE_WAIT: Duration = Duration::from_secs(5);
/// While the application is loaded, a stop is noticed this soon.
const STARTING_LOOK: Duration = Duration::from_millis(100);
/// Age and memory are looked at this often.
const CHECK: Duration = Duration::from_secs(1);

/// A Python application, and how it is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PythonApp {
    /// `module:attribute`, `module:attribute.attribute` or `module:factory()`.
    pub app: String,
    pub interpreter: PathBuf,
    /// Processes, spread over the cores; one for each core when not set.
    pub workers: Option<usize>,
    /// Threads of each process.
    pub threads: usize,
    /// Requests run on greenlets of gevent instead, in one thread of each process: so many of them at a time.
    pub greenlets: Option<usize>,
    pub chdir: Option<PathBuf>,
    /// Where modules are looked for first.
    pub pythonpath: Vec<String>,
    /// Added to the workers' environment.
    pub env: BTreeMap<String, String>,
    /// Load the application once and fork the workers from it.
    pub preload: bool,
    /// A worker is replaced after so many requests and up to `max_requests_jitter` more; 0: never.
    pub max_requests: u64,
    pub max_requests_jitter: u64,
    /// A worker is replaced once it has more memory than this, in bytes.
    pub max_rss: Option<u64>,
    /// A worker is replaced once it is older than this.
    pub max_age: Option<Duration>,
    /// `wsgi`, when the application's own looks would say something else.
    pub interface: Option<String>,
    /// Of every request's environ, what is not as usual: `SCRIPT_NAME`, `SERVER_NAME`, `wsgi.url_scheme`.
    pub environ: BTreeMap<&'static str, String>,
    /// A gunicorn.conf.py whose hooks are called: its path, or `python:MODULE`.
    pub config: Option<String>,
    /// It has a hook `worker_abort`, for workers whose request has run too long.
    pub has_worker_abort: bool,
    /// gunicorn's settings, as its hooks are shown them.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl PythonApp {
    /// One worker per core with one thread each, by the interpreter that [`find_interpreter`] finds.
    pub fn new(app: impl Into<String>) -> PythonApp {
        PythonApp {
            app: app.into(),
            interpreter: find_interpreter(None),
            workers: None,
            threads: 1,
            greenlets: None,
            chdir: None,
            pythonpath: Vec::new(),
            env: BTreeMap::new(),
            preload: false,
            max_requests: 0,
            max_requests_jitter: 0,
            max_rss: None,
            max_age: None,
            interface: None,
            environ: BTreeMap::new(),
            config: None,
            has_worker_abort: false,
            settings: serde_json::Map::new(),
        }
    }

    /// Loads it as the zygote would for `--preload`, and lets go of it.
    ///
    /// # Errors
    /// [`Error::Application`] or [`Error::Interpreter`].
    pub fn check(&self) -> Result<About> {
        let interpreter = |source| Error::Interpreter { path: self.interpreter.clone(), source };
        let failed = |told: String| Err(Error::Application { name: self.app.clone(), told });
        let zygote = Zygote::check(self, &base(self, &[])).map_err(interpreter)?;
        let news = zygote.news().map_err(interpreter);
        zygote.end();
        match news? {
            Some(News::Ready(about)) => about.check().map_or_else(failed, |()| Ok(about)),
            Some(News::Failed(told)) => failed(told),
            _ => failed("The Python interpreter ended by itself.".to_owned()),
        }
    }
}

/// As keys and values of the configuration file.
impl fmt::Display for PythonApp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |texts: &mut dyn Iterator<Item = String>| format!("[{}]", texts.map(|text| quoted(&text)).collect::<Vec<_>>().join(", "));
        if let Some(workers) = self.workers {
            writeln!(f, "workers = {workers}")?;
        }
        writeln!(f, "threads = {}", self.threads)?;
        if let Some(greenlets) = self.greenlets {
            writeln!(f, "greenlets = {greenlets}")?;
        }
        writeln!(f, "python = {}", quoted(&self.interpreter.to_string_lossy()))?;
        if let Some(path) = &self.chdir {
            writeln!(f, "chdir = {}", quoted(&path.to_string_lossy()))?;
        }
        writeln!(f, "pythonpath = {}", quoted(&self.pythonpath.join(",")))?;
        writeln!(f, "env = {}", list(&mut self.env.iter().map(|(name, value)| format!("{name}={value}"))))?;
        writeln!(f, "preload = {}", self.preload)?;
        writeln!(f, "max-requests = {}", self.max_requests)?;
        writeln!(f, "max-requests-jitter = {}", self.max_requests_jitter)?;
        writeln!(f, "max-rss = {}", self.max_rss.unwrap_or(0))?;
        writeln!(f, "max-age = {}", self.max_age.unwrap_or_default().as_secs_f64())?;
        for (option, key) in [("script-name", "SCRIPT_NAME"), ("url-scheme", "wsgi.url_scheme"), ("server-name", "SERVER_NAME")] {
            if let Some(value) = self.environ.get(key) {
                writeln!(f, "{option} = {}", quoted(value))?;
            }
        }
        Ok(())
    }
}

impl PythonApp {
    /// How many channels each process has.
    fn channels(&self) -> usize {
        if self.greenlets.is_some() { 1 } else { self.threads }
    }
}

/// The interpreter of the virtual environment that is active, or that lies in the application's directory; else the
/// one that `python3` means.
pub fn find_interpreter(chdir: Option<&Path>) -> PathBuf {
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let here = chdir.map_or_else(PathBuf::new, Path::to_path_buf);
    let places = active.into_iter().chain([here.join(".venv"), here.join("venv")]);
    let mut interpreters = places.map(|place| place.join("bin/python"));
    let found = interpreters.find(|interpreter| interpreter.exists());
    // Absolute, because the zygote changes its directory; not canonical, because a link's place says whose it is.
    found.and_then(|found| std::path::absolute(found).ok()).unwrap_or_else(|| PathBuf::from("python3"))
}

/// The server around an application.
pub struct Surroundings<'a> {
    pub pools: Arc<Pools>,
    pub config: &'a Config,
    /// Where the couriers of each core run.
    pub cpus: &'a [CoreId],
    /// Where it listens.
    pub addresses: &'a [String],
    pub clock: Clock,
    pub stats: &'a [Arc<Stats>],
    /// Says when loading the application should be given up.
    pub control: &'a Control,
}

/// A running application. Ends when told to, not when dropped.
pub struct Workers {
    reporter: Reporter,
    supervisor: JoinHandle<()>,
    shared: Arc<Shared>,
    count: usize,
    description: String,
}

impl Workers {
    /// Starts the zygote and the workers, and returns when each of them has loaded the application.
    ///
    /// # Errors
    /// [`Error::Application`], when it cannot be loaded.
    pub fn start(app: PythonApp, surroundings: Surroundings<'_>) -> Result<Workers> {
        let Surroundings { pools, config, cpus, addresses, clock, stats, control } = surroundings;
        let (reports, taken) = unbounded();
        let (bell, rung) = UnixStream::pair().map_err(cannot_start)?;
        bell.set_nonblocking(true).and_then(|()| rung.set_nonblocking(true)).map_err(cannot_start)?;
        let reporter = Reporter { reports, bell: Arc::new(bell) };
        let random = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let shared = Arc::new(Shared {
            pools,
            clock,
            monotonic_zero: monotonic() - clock.now() as f64 / 1e6,
            run: micros(config.timeouts.run),
            drain: micros(config.timeouts.drain),
            permit: config.permit,
            stats: stats.to_vec(),
            start: (random ^ random >> 32) as u32 ^ std::process::id().rotate_left(16),
            stopping: AtomicBool::new(false),
            reporter: reporter.clone(),
        });
        if app.greenlets.is_some() && app.threads > 1 {
            tracing::warn!("greenlets share one thread, so --threads is not used; try: more --workers for more CPUs");
        }
        let count = app.workers.unwrap_or(cpus.len());
        let name = app.app.clone();
        let base = base(&app, addresses);
        let zygote = Zygote::start(&app, &base, count).map_err(|source| Error::Interpreter { path: app.interpreter.clone(), source })?;
        let mut supervisor = Supervisor {
            app,
            base,
            zygote: Some(zygote),
            about: None,
            zygote_failures: 0,
            zygote_at: None,
            shared: shared.clone(),
            cpus: cpus.to_vec(),
            slots: Vec::new(),
            couriers: 0,
            pending: Vec::new(),
            retired: Vec::new(),
            lost: Vec::new(),
            signals: Vec::new(),
            next_id: 1,
            check_at: Instant::now() + CHECK,
            reports: taken,
            bell: rung,
            starting: true,
            failure: None,
        };
        for _ in 0..count {
            supervisor.add_slot();
        }
        while !supervisor.is_complete() && supervisor.failure.is_none() {
            supervisor.turn();
            if control.life() > Life::Serving {
                shared.stopping.store(true, Ordering::Relaxed);
                supervisor.end();
                return Err(Error::Stopped);
            }
        }
        if let Some(told) = supervisor.failure.take() {
            shared.stopping.store(true, Ordering::Relaxed);
            supervisor.end();
            return Err(Error::Application { name, told });
        }
        supervisor.starting = false;
        let about = supervisor.about.clone().unwrap_or_default();
        let interface = about.interface.as_deref().unwrap_or("wsgi");
        let class = if supervisor.app.greenlets.is_some() { ", gevent" } else { "" };
        let description = format!("app {name} ({interface}{class})");
        tracing::debug!(python = about.python, implementation = about.implementation, "the Python workers are ready");
        let thread = thread::Builder::new().name("supervisor".to_owned()).spawn(move || supervisor.run()).map_err(cannot_start)?;
        Ok(Workers { reporter, supervisor: thread, shared, count, description })
    }

    /// For the start-up line: `2 workers, app hello:app (wsgi)`.
    pub fn describe(&self) -> String {
        let workers = if self.count == 1 { "worker" } else { "workers" };
        format!("{} {workers}, {}", self.count, self.description)
    }

    /// Something that can tell the supervisor to have one worker more, or less.
    pub fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// Ends the workers, and waits for their end. The ring threads must have ended, so that no request is left.
    pub fn stop(self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.reporter.send(Report::Stop);
        let _ = self.supervisor.join();
    }
}

fn cannot_start(source: io::Error) -> Error {
    Error::Start { what: "what looks after the Python workers", source }
}

fn micros(duration: Duration) -> Micros {
    duration.as_micros().min(u128::from(u64::MAX / 4)) as Micros
}

/// CLOCK_MONOTONIC in seconds, as Python's `time.monotonic` tells it.
fn monotonic() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// The part of the environ that is the same for every request.
fn base(app: &PythonApp, addresses: &[String]) -> BTreeMap<&'static str, String> {
    let tcp = addresses.iter().find_map(|address| address.strip_prefix("http://")).and_then(|address| address.rsplit_once(':'));
    // PEP 3333: neither may be empty; behind a unix socket nobody knows better than this.
    let (name, port) = tcp.unwrap_or(("localhost", "80"));
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let mut base = BTreeMap::from([
        ("SCRIPT_NAME", String::new()),
        ("SERVER_NAME", name.to_owned()),
        ("SERVER_PORT", port.to_owned()),
        ("SERVER_SOFTWARE", concat!("uringd/", env!("CARGO_PKG_VERSION")).to_owned()),
        ("wsgi.url_scheme", "http".to_owned()),
    ]);
    base.extend(app.environ.clone());
    base
}

/// What keeps the number of workers what it should be.
struct Supervisor {
    app: PythonApp,
    base: BTreeMap<&'static str, String>,
    zygote: Option<Zygote>,
    /// What the zygote is, once it is ready to fork.
    about: Option<About>,
    zygote_failures: u32,
    zygote_at: Option<Instant>,
    shared: Arc<Shared>,
    cpus: Vec<CoreId>,
    slots: Vec<Slot>,
    /// Courier threads started so far.
    couriers: u32,
    /// Workers that load the application.
    pending: Vec<Pending>,
    /// Workers that serve nobody and should end, and since when only this list knows them.
    retired: Vec<(Arc<Worker>, Option<Instant>)>,
    /// Workers that were lost and whose end has not been reported.
    lost: Vec<Arc<Worker>>,
    /// Signals to be sent later.
    signals: Vec<(Instant, Arc<Worker>, Signal)>,
    next_id: u64,
    check_at: Instant,
    reports: Receiver<Report>,
    bell: UnixStream,
    /// Any failure is final.
    starting: bool,
    failure: Option<String>,
}

/// The place of one worker.
struct Slot {
    orders: Vec<Orders>,
    couriers: Vec<JoinHandle<()>>,
    current: Option<Arc<Worker>>,
    /// Workers in a row that served nobody.
    failures: u32,
    /// When one is forked; `None`: when one is needed.
    fork_at: Option<Instant>,
    /// A successor is wanted, although there is a worker.
    recycle: bool,
    closed: bool,
}

/// Where the orders for a courier, or for a multiplexer, are put.
struct Orders {
    orders: Sender<Order>,
    /// A multiplexer waits for other things too.
    bell: Option<Waker>,
}

impl Orders {
    fn send(&self, order: Order) {
        // Its thread may have ended already.
        let _ = self.orders.send(order);
        self.bell.iter().for_each(Waker::wake);
    }
}

struct Pending {
    worker: Arc<Worker>,
    channels: Vec<Channel>,
    reader: Reader,
}

impl Supervisor {
    fn run(mut self) {
        while !self.shared.stopping.load(Ordering::Relaxed) {
            self.turn();
        }
        self.end();
    }

    fn is_complete(&self) -> bool {
        self.slots.iter().all(|slot| slot.closed || slot.current.is_some())
    }

    /// One look at everything: waits until something happens or is due.
    fn turn(&mut self) {
        let now = Instant::now();
        self.act(now);
        let due = self.next_due();
        let wait = due.map(|due| {
            let left = due.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        let mut polled = vec![PollFd::new(&self.bell, PollFlags::IN)];
        polled.extend(self.zygote.iter().map(|zygote| PollFd::from_borrowed_fd(zygote.control(), PollFlags::IN)));
        polled.extend(self.pending.iter().map(|pending| PollFd::from_borrowed_fd(pending.channels[0].data.as_fd(), PollFlags::IN)));
        if rustix::event::poll(&mut polled, wait.as_ref()).is_err() {
            return;
        }
        let ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        drop(polled);
        let has_zygote = usize::from(self.zygote.is_some());
        let heard: Vec<u64> =
            self.pending.iter().zip(&ready[1 + has_zygote..]).filter(|(_, ready)| **ready).map(|(pending, _)| pending.worker.id).collect();
        if ready[0] {
            while rustix::net::recv(&self.bell, &mut [0_u8; 64][..], RecvFlags::DONTWAIT).is_ok_and(|received| received.0 > 0) {}
        }
        // Before the zygote's news, so that what a worker said with its last breath is heard first.
        for id in heard {
            self.hear(id);
        }
        while let Ok(report) = self.reports.try_recv() {
            self.take_report(report);
        }
        if has_zygote == 1 && ready[1] {
            self.take_news();
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let forks = self.slots.iter().filter_map(|slot| slot.fork_at).filter(|_| self.about.is_some());
        let checks = (self.has_checks() || !self.retired.is_empty()).then_some(self.check_at);
        let signals = self.signals.iter().map(|signal| signal.0);
        // While the application is loaded, nothing else would notice that all of this is to stop.
        let look = self.starting.then(|| Instant::now() + STARTING_LOOK);
        forks.chain(look).chain(checks).chain(signals).chain(self.zygote_at).min()
    }

    fn has_checks(&self) -> bool {
        self.app.max_rss.is_some() || self.app.max_age.is_some()
    }

    /// Does what is due.
    fn act(&mut self, now: Instant) {
        let (due, later) = std::mem::take(&mut self.signals).into_iter().partition(|signal| signal.0 <= now);
        self.signals = later;
        let due: Vec<(Instant, Arc<Worker>, Signal)> = due;
        for (_, worker, signal) in due {
            send_signal(&worker, signal);
        }
        if self.zygote_at.is_some_and(|at| at <= now) {
            self.zygote_at = None;
            self.start_zygote();
        }
        if self.check_at <= now {
            self.check_at = now + CHECK;
            self.check(now);
        }
        if self.about.is_some() {
            self.fork_due(now);
        }
    }

    /// Looks for workers that are too old or too large, and for those that do not end.
    fn check(&mut self, now: Instant) {
        for slot in &mut self.slots {
            let Some(worker) = &slot.current else { continue };
            let old = self.app.max_age.is_some_and(|limit| now.duration_since(worker.born) >= limit);
            let large = self.app.max_rss.is_some_and(|limit| resident_bytes(worker) > limit);
            if (old || large) && !slot.recycle {
                tracing::info!(
                    pid = worker.pid.load(Ordering::Relaxed),
                    "the worker is replaced: {}",
                    if old { "it is old enough" } else { "it has too much memory" }
                );
                slot.recycle = true;
            }
        }
        let mut overdue = Vec::new();
        for (worker, since) in &mut self.retired {
            // Otherwise a courier still finishes its batch with it.
            if since.is_none() && Arc::strong_count(worker) == 1 {
                *since = Some(now);
            } else if since.is_some_and(|since| now.duration_since(since) >= RETIRE_WAIT) {
                *since = Some(now);
                overdue.push(worker.clone());
            }
        }
        for worker in overdue {
            self.terminate(&worker, Signal::TERM, now);
        }
    }

    fn fork_due(&mut self, now: Instant) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.closed || self.pending.iter().any(|pending| pending.worker.slot == index) {
                continue;
            }
            let missing = slot.current.is_none() && slot.fork_at.is_none_or(|at| at <= now);
            // One at a time: with fewer workers than wanted, nobody is replaced for a lesser reason.
            let recycles = slot.recycle && self.pending.is_empty() && self.is_complete();
            if missing || recycles {
                self.slots[index].fork_at = None;
                self.fork(index);
            }
        }
    }

    fn fork(&mut self, slot: usize) {
        let Some(zygote) = &self.zygote else { return };
        let id = self.next_id;
        self.next_id += 1;
        let jitter = match self.app.max_requests_jitter {
            0 => 0,
            most => self.shared.start.wrapping_mul(2_654_435_761).wrapping_add(id as u32).wrapping_mul(40_503) as u64 % (most + 1),
        };
        let worker = Worker {
            id,
            slot,
            born: Instant::now(),
            pid: AtomicI32::new(0),
            handle: OnceLock::new(),
            served: AtomicU64::new(0),
            status: AtomicI32::new(STATUS_UNKNOWN),
            served_max: if self.app.max_requests == 0 { 0 } else { self.app.max_requests + jitter },
            used: AtomicBool::new(false),
        };
        match zygote.fork(id, self.app.channels()) {
            Ok(channels) => self.pending.push(Pending { worker: Arc::new(worker), channels, reader: Reader::new() }),
            Err(error) => {
                tracing::error!(%error, "a worker could not be forked");
                self.try_later(slot);
            }
        }
    }

    /// The slot's worker failed to serve anybody.
    fn try_later(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        slot.fork_at = Some(Instant::now() + pause(slot.failures));
        slot.failures = slot.failures.saturating_add(1);
    }

    /// A worker that loads has said something, or died over it.
    fn hear(&mut self, id: u64) {
        let Some(index) = self.pending.iter().position(|pending| pending.worker.id == id) else { return };
        let pending = &mut self.pending[index];
        let received = rustix::net::recv(&pending.channels[0].data, pending.reader.room(), RecvFlags::DONTWAIT);
        let failure = match received {
            Ok((0, _)) => Some("The worker ended before it had loaded the application.".to_owned()),
            Ok((bytes, _)) => {
                pending.reader.add(bytes);
                match pending.reader.next_event() {
                    Ok(None) => return,
                    Ok(Some((_, Event::Ready(_)))) => None,
                    Ok(Some((_, Event::Failed(text)))) => Some(String::from_utf8_lossy(text).into_owned()),
                    Ok(Some(_)) => Some("The worker said something else than that it is ready.".to_owned()),
                    Err(violation) => Some(format!("The worker sent {violation}.")),
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(error) => Some(format!("The worker ended before it had loaded the application ({error}).")),
        };
        let pending = self.pending.swap_remove(index);
        match failure {
            None if pending.reader.is_inside() => self.loading_failed(pending.worker, "The worker said more than that it is ready."),
            None => self.install(pending),
            Some(why) => self.loading_failed(pending.worker, &why),
        }
    }

    /// A worker is ready: the slot's couriers go over to it.
    fn install(&mut self, pending: Pending) {
        let Pending { worker, channels, .. } = pending;
        let slot = &mut self.slots[worker.slot];
        for (orders, channel) in slot.orders.iter().zip(channels) {
            orders.send(Order::Link(Link { channel, worker: worker.clone() }));
        }
        slot.recycle = false;
        if let Some(old) = slot.current.replace(worker) {
            self.retired.push((old, None));
        }
    }

    fn loading_failed(&mut self, worker: Arc<Worker>, why: &str) {
        if self.starting {
            self.failure.get_or_insert_with(|| why.to_owned());
            return;
        }
        tracing::error!(
            pid = worker.pid.load(Ordering::Relaxed),
            "a new worker could not load the application; those that serve go on:\n{why}"
        );
        send_signal(&worker, Signal::KILL);
        self.try_later(worker.slot);
    }

    fn take_news(&mut self) {
        let Some(zygote) = &self.zygote else { return };
        match zygote.news() {
            Ok(Some(News::Ready(about))) => match about.check() {
                Ok(()) => {
                    if let Some(warning) = &about.warning {
                        tracing::warn!("{warning}");
                    }
                    self.zygote_failures = 0;
                    self.about = Some(about);
                }
                Err(why) => self.zygote_lost(&why),
            },
            Ok(Some(News::Failed(why))) => self.zygote_lost(&why),
            Ok(Some(News::Forked { forked, pid })) => self.forked(forked, pid),
            Ok(Some(News::Unforked { forked, error })) => {
                if let Some(index) = self.pending.iter().position(|pending| pending.worker.id == forked) {
                    let pending = self.pending.swap_remove(index);
                    self.loading_failed(
                        pending.worker,
                        &format!("The worker could not be forked: {error}.\nhint: a higher limit (ulimit -u), or fewer --workers"),
                    );
                }
            }
            Ok(Some(News::Exited { exited, status })) => self.exited(exited, status),
            Ok(None) => self.zygote_lost("The Python interpreter ended by itself."),
            Err(error) => self.zygote_lost(&format!("{error}.")),
        }
    }

    fn forked(&mut self, id: u64, pid: i32) {
        let pending = self.pending.iter().map(|pending| &pending.worker);
        let others = self.slots.iter().filter_map(|slot| slot.current.as_ref()).chain(self.retired.iter().map(|retired| &retired.0));
        let Some(worker) = pending.chain(others).find(|worker| worker.id == id) else { return };
        worker.pid.store(pid, Ordering::Relaxed);
        if let Some(handle) = Pid::from_raw(pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()) {
            let _ = worker.handle.set(handle);
        }
    }

    fn exited(&mut self, pid: i32, status: i32) {
        let is_it = |worker: &Arc<Worker>| worker.pid.load(Ordering::Relaxed) == pid;
        self.signals.retain(|signal| !is_it(&signal.1));
        if let Some(worker) = self.lost.iter().position(is_it).map(|index| self.lost.swap_remove(index)) {
            worker.status.store(status, Ordering::Release);
        }
        if let Some(index) = self.retired.iter().position(|retired| is_it(&retired.0)) {
            self.retired.swap_remove(index);
            return;
        }
        // Its last words are heard first: they say more than the status.
        if let Some(id) = self.pending.iter().map(|pending| &pending.worker).find(|worker| is_it(worker)).map(|worker| worker.id) {
            self.hear(id);
        }
        if let Some(index) = self.pending.iter().position(|pending| is_it(&pending.worker)) {
            let pending = self.pending.swap_remove(index);
            return self
                .loading_failed(pending.worker, &format!("The worker ended while it loaded the application ({}).", describe(status)));
        }
        let current = self.slots.iter().filter_map(|slot| slot.current.as_ref()).find(|worker| is_it(worker)).cloned();
        if let Some(worker) = current {
            worker.status.store(status, Ordering::Release);
            tracing::warn!(pid, "a worker ended ({}) and is replaced", describe(status));
            self.lose(&worker);
        }
    }

    /// A worker is of no use any more: its slot needs another.
    fn lose(&mut self, worker: &Arc<Worker>) {
        let Some(slot) =
            self.slots.get_mut(worker.slot).filter(|slot| slot.current.as_ref().is_some_and(|current| current.id == worker.id))
        else {
            return;
        };
        slot.current = None;
        slot.recycle = false;
        // Its couriers may ask how it ended.
        self.lost.retain(|worker| Arc::strong_count(worker) > 1);
        self.lost.push(worker.clone());
        for orders in &slot.orders {
            orders.send(Order::Drop(worker.id));
        }
        if worker.served.load(Ordering::Relaxed) > 0 {
            slot.failures = 0;
            slot.fork_at = None;
        } else {
            self.try_later(worker.slot);
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Broken { worker, why } => {
                if self.slots[worker.slot].current.as_ref().is_some_and(|current| current.id == worker.id) {
                    tracing::error!(pid = worker.pid.load(Ordering::Relaxed), "a worker is replaced: {why}");
                }
                self.lose(&worker);
                send_signal(&worker, Signal::KILL);
            }
            Report::Overdue { worker } => {
                // It had its chance, but others of its kind have not: no pause.
                worker.served.fetch_add(1, Ordering::Relaxed);
                self.lose(&worker);
                let now = Instant::now();
                send_signal(&worker, Signal::USR1);
                let first = if self.app.has_worker_abort { Signal::ABORT } else { Signal::TERM };
                self.terminate(&worker, first, now + TRACEBACK_WAIT);
            }
            Report::Used { worker } => {
                let slot = &mut self.slots[worker.slot];
                slot.recycle |= slot.current.as_ref().is_some_and(|current| current.id == worker.id);
            }
            Report::Change(more) if more > 0 => {
                self.add_slot();
                self.say_workers();
                tracing::info!(workers = self.open_slots(), "one worker more");
            }
            Report::Change(_) => self.remove_slot(),
            Report::Stop => {}
        }
    }

    fn terminate(&mut self, worker: &Arc<Worker>, first: Signal, at: Instant) {
        self.signals.push((at, worker.clone(), first));
        self.signals.push((at + KILL_WAIT, worker.clone(), Signal::KILL));
    }

    fn open_slots(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.closed).count()
    }

    /// For the hook `nworkers_changed`.
    fn say_workers(&self) {
        self.zygote.iter().for_each(|zygote| zygote.say_workers(self.open_slots()));
    }

    fn add_slot(&mut self) {
        let index = self.slots.len();
        let core = index % self.cpus.len();
        let (mut orders, mut couriers) = (Vec::new(), Vec::new());
        for thread in 0..self.app.channels() {
            match self.start_courier(core, format!("courier-{index}.{thread}")) {
                Ok((way, courier)) => {
                    orders.push(way);
                    couriers.push(courier);
                }
                Err(error) => tracing::error!(%error, "a thread for a worker could not be started; try: a higher limit (ulimit -u)"),
            }
        }
        self.slots.push(Slot { orders, couriers, current: None, failures: 0, fork_at: None, recycle: false, closed: false });
    }

    fn start_courier(&mut self, core: usize, name: String) -> io::Result<(Orders, JoinHandle<()>)> {
        let (orders, taken) = unbounded();
        let (shared, cpu, number) = (self.shared.clone(), self.cpus[core], self.couriers);
        self.couriers += 1;
        let many = self.app.greenlets.map(|limit| Waker::new().map(|bell| (bell, limit))).transpose()?;
        let bell = many.as_ref().map(|(bell, _)| bell.clone());
        let work = move || {
            core_affinity::set_for_current(cpu);
            match many {
                Some((bell, limit)) => Multiplexer::new(shared, core, number, taken, bell, limit).run(),
                None => Courier::new(shared, core, number, taken).run(),
            }
        };
        Ok((Orders { orders, bell }, thread::Builder::new().name(name).spawn(work)?))
    }

    fn remove_slot(&mut self) {
        if self.open_slots() <= 1 {
            tracing::warn!("there is only one worker; it stays");
            return;
        }
        let index = self.slots.iter().rposition(|slot| !slot.closed).expect("counted above");
        let slot = &mut self.slots[index];
        slot.closed = true;
        slot.orders.drain(..).for_each(|orders| orders.send(Order::Stop));
        if let Some(worker) = slot.current.take() {
            self.retired.push((worker, None));
        }
        if let Some(at) = self.pending.iter().position(|pending| pending.worker.slot == index) {
            // Its channels close, so it ends by itself.
            self.retired.push((self.pending.swap_remove(at).worker, None));
        }
        self.say_workers();
        tracing::info!(workers = self.open_slots(), "one worker less");
    }

    fn start_zygote(&mut self) {
        match Zygote::start(&self.app, &self.base, self.open_slots()) {
            Ok(zygote) => self.zygote = Some(zygote),
            Err(error) => self.zygote_lost(&format!("{error}.")),
        }
    }

    /// Without the zygote its workers end too (PR_SET_PDEATHSIG): everything starts again.
    fn zygote_lost(&mut self, why: &str) {
        if self.starting {
            self.failure.get_or_insert_with(|| why.to_owned());
            return;
        }
        tracing::error!("the Python zygote is started again:\n{why}");
        self.about = None;
        self.pending.clear();
        let workers: Vec<Arc<Worker>> = self.slots.iter().filter_map(|slot| slot.current.clone()).collect();
        for worker in workers {
            self.lose(&worker);
            send_signal(&worker, Signal::KILL);
        }
        if let Some(zygote) = self.zygote.take() {
            zygote.end();
        }
        self.zygote_at = Some(Instant::now() + pause(self.zygote_failures));
        self.zygote_failures = self.zygote_failures.saturating_add(1);
    }

    fn end(self) {
        for slot in &self.slots {
            slot.orders.iter().for_each(|orders| orders.send(Order::Stop));
        }
        for slot in self.slots {
            slot.couriers.into_iter().for_each(|courier| drop(courier.join()));
        }
        drop(self.pending);
        if let Some(zygote) = self.zygote {
            zygote.end();
        }
    }
}

/// 0.1 s, doubled for each failure before, 10 s at most.
fn pause(failures: u32) -> Duration {
    PAUSE_MIN.saturating_mul(1 << failures.min(16)).min(PAUSE_MAX)
}

fn send_signal(worker: &Worker, signal: Signal) {
    if let Some(handle) = worker.handle.get() {
        // ESRCH: it has ended by itself.
        let _ = rustix::process::pidfd_send_signal(handle, signal);
    }
}

/// What of a worker is in memory; 0 when it is gone.
fn resident_bytes(worker: &Worker) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{}/statm", worker.pid.load(Ordering::Relaxed))).unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// A wait status (waitpid(2)) in words.
fn describe(status: i32) -> String {
    match (status & 0x7f, status >> 8 & 0xff) {
        (0, code) => format!("exit status {code}"),
        (signal, _) => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_ten_seconds() {
        let pauses: Vec<u128> = [0, 1, 2, 6, 7, 40, u32::MAX].iter().map(|failures| pause(*failures).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 6_400, 10_000, 10_000, 10_000]);
    }

    #[test]
    fn the_base_names_the_address_that_is_listened_on() {
        let of = |address: &str| {
            let base = base(&PythonApp::new("a:b"), &[address.to_owned()]);
            (base["SERVER_NAME"].clone(), base["SERVER_PORT"].clone())
        };
        assert_eq!(of("http://127.0.0.1:8000"), ("127.0.0.1".to_owned(), "8000".to_owned()));
        assert_eq!(of("http://[::1]:80"), ("::1".to_owned(), "80".to_owned()));
        assert_eq!(of("unix:/run/app"), ("localhost".to_owned(), "80".to_owned()));
    }

    #[test]
    fn the_base_is_what_the_options_say_it_is() {
        let mut app = PythonApp::new("a:b");
        app.environ.insert("wsgi.url_scheme", "https".to_owned());
        let base = base(&app, &[]);
        assert_eq!((base["wsgi.url_scheme"].as_str(), base["SERVER_NAME"].as_str()), ("https", "localhost"));
    }

    #[test]
    fn a_virtual_environment_in_the_directory_of_the_application_is_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let bin = directory.path().join(".venv/bin");
        fs::create_dir_all(&bin).expect("a directory");
        fs::write(bin.join("python"), "").expect("a file");
        // The active one wins, and whoever runs the tests may have one.
        if std::env::var_os("VIRTUAL_ENV").is_none() {
            assert_eq!(find_interpreter(Some(directory.path())), bin.join("python"));
        }
    }

    #[test]
    fn a_wait_status_is_told_in_words() {
        assert_eq!(describe(9), "signal 9");
        assert_eq!(describe(3 << 8), "exit status 3");
    }
}
