//! Python applications: worker processes that are given complete requests, and whoever looks after them.
//!
//! ```text
//!                   +-- courier --- thread of worker 1
//!   ring thread ----+-- courier --- thread of worker 1       supervisor --orders--> couriers
//!                   +-- courier --- thread of worker 2           |   ^---reports--- couriers
//!                                                             zygote --fork--> workers
//! ```
//!
//! [`PythonApp`] says what to run. [`Workers`] runs it: one thread, the supervisor, owns the zygote and decides which
//! process serves a *slot* (`worker.rs`). A ring thread has couriers (`courier.rs`, gathered in `dispatch.rs`), each of which
//! carries the requests of one thread of a worker; where a worker runs many requests at a time, a thread of its own does
//! (`multiplexer.rs`). `frames.rs` knows the bytes; `zygote.rs` the process.
//!
//! A slot has at most one worker that serves. Its successor is forked beside it and takes over once it is ready,
//! so recycling costs no request, and no two slots are recycled at a time. A worker that dies is replaced at once
//! when it had been given a request; one that never was is replaced after 0.1 s, then 0.2 s, up to 10 s, so that a crash loop
//! costs neither the machine nor the server. (A request that kills its worker is none: who sends it must not decide
//! how long others wait.)
//!
//! A worker that serves nobody any more *leaves*. Nothing happens to it while a courier still waits for an answer of one of its
//! threads, each of which has its own deadline. Then it gets the signals of its [`Farewell`], until its end is known.

mod courier;
pub mod dispatch;
pub mod frames;
pub mod multiplexer;
pub mod worker;
pub mod zygote;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use core_affinity::CoreId;
use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::RecvFlags,
    process::{Pid, PidfdFlags, Signal, WaitOptions},
};

use self::{
    dispatch::{Mail, Mailbox},
    frames::{Event, Reader},
    multiplexer::Multiplexer,
    worker::{Link, Order, Report, Reporter, Shared, Worker},
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
/// After its traceback was asked for, a worker is given this long to write it: half of the 100 ms after its deadline that it may
/// live.
const TRACEBACK_WAIT: Duration = Duration::from_millis(50);
/// Between being told to end and SIGKILL.
const KILL_WAIT: Duration = Duration::from_secs(1);
/// A worker that nobody needs any more ends by itself; after this long it is told to.
const RETIRE_WAIT: Duration = Duration::from_secs(5);
/// The zygote forks in milliseconds, or hangs.
const ZYGOTE_WAIT: Duration = Duration::from_secs(10);
/// A worker may load the application for this long, and ten times as long as any before it. The first ones may take
/// however long they want.
const LOAD_WAIT: Duration = Duration::from_secs(10);
/// Workers that SIGKILL does not end (a file server that is gone makes them wait where no signal comes) are replaced
/// until there are so many for each that should be.
const UNDEAD_MAX: usize = 2;
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
    /// Where the multiplexers of each core run.
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
    /// What the couriers of each core are told.
    mail: Vec<Receiver<Mail>>,
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
        let (mail, mailboxes): (Vec<_>, Vec<_>) = cpus.iter().map(|_| unbounded()).unzip();
        let mut supervisor = Supervisor {
            app,
            mail,
            base,
            zygote: Some(zygote),
            about: None,
            zygote_failures: 0,
            zygote_at: None,
            shared: shared.clone(),
            cpus: cpus.to_vec(),
            slots: Vec::new(),
            numbers: 0,
            pending: Vec::new(),
            leaving: Vec::new(),
            longest_load: Duration::ZERO,
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
        Ok(Workers { reporter, supervisor: thread, mail: mailboxes, shared, count, description })
    }

    /// For the start-up line: `2 workers, app hello:app (wsgi)`.
    pub fn describe(&self) -> String {
        let workers = if self.count == 1 { "worker" } else { "workers" };
        format!("{} {workers}, {}", self.count, self.description)
    }

    /// What the ring thread of a core has to know to serve its workers.
    pub fn mailbox(&self, core: usize) -> Mailbox {
        Mailbox { shared: self.shared.clone(), mail: self.mail[core].clone() }
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
    /// Where the couriers of each core are told what to do.
    mail: Vec<Sender<Mail>>,
    slots: Vec<Slot>,
    /// Couriers and multiplexers so far.
    numbers: u32,
    /// Workers that load the application.
    pending: Vec<Pending>,
    leaving: Vec<Leaving>,
    /// How long a worker took to load the application, at most.
    longest_load: Duration,
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
enum Orders {
    Courier { core: usize, number: u32, mail: Sender<Mail> },
    Multiplexer { orders: Sender<Order>, bell: Waker, thread: JoinHandle<()> },
}

impl Orders {
    fn send(&self, order: Order, pools: &Pools) {
        // Its thread may have ended already.
        match self {
            Orders::Courier { core, number, mail } => {
                let _ = mail.send((*number, order));
                pools.wake(*core);
            }
            Orders::Multiplexer { orders, bell, .. } => {
                let _ = orders.send(order);
                bell.wake();
            }
        }
    }
}

impl Slot {
    fn is_due(&self, now: Instant) -> bool {
        self.fork_at.is_none_or(|at| at <= now)
    }
}

struct Pending {
    worker: Arc<Worker>,
    channels: Vec<Channel>,
    reader: Reader,
}

/// A worker that serves nobody any more, until its end is known.
struct Leaving {
    worker: Arc<Worker>,
    farewell: Farewell,
    since: Instant,
    /// Signals still to be sent, each with the wait before it.
    steps: &'static [(Duration, Signal)],
    /// When the first of them is due. `None`: there is none, or a courier still waits for an answer.
    due: Option<Instant>,
}

/// Why a worker leaves; the more urgent, the later in this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Farewell {
    /// It has a successor, or is one too many.
    Retired,
    /// It has closed its channel, so it is ending.
    Ended,
    /// A request of it took too long, and there is a hook for that. Where each thread is, it was asked when that was found.
    Aborted,
    /// The same without a hook.
    Overdue,
    /// What it says cannot be understood.
    Broken,
}

impl Farewell {
    fn steps(self) -> &'static [(Duration, Signal)] {
        match self {
            Farewell::Retired => &[(RETIRE_WAIT, Signal::TERM), (KILL_WAIT, Signal::KILL)],
            Farewell::Ended => &[(KILL_WAIT, Signal::KILL)],
            Farewell::Aborted => &[(TRACEBACK_WAIT, Signal::ABORT), (KILL_WAIT, Signal::KILL)],
            Farewell::Overdue => &[(TRACEBACK_WAIT, Signal::KILL)],
            Farewell::Broken => &[(Duration::ZERO, Signal::KILL)],
        }
    }
}

impl Leaving {
    fn new(worker: Arc<Worker>, farewell: Farewell) -> Leaving {
        Leaving { worker, farewell, since: Instant::now(), steps: farewell.steps(), due: None }
    }

    /// Sends what is due.
    fn act(&mut self, now: Instant) {
        if self.due.is_none() && self.worker.is_free() {
            self.due = self.steps.first().map(|step| now + step.0);
        }
        while let (Some((_, signal)), Some(_)) = (self.steps.first(), self.due.filter(|due| *due <= now)) {
            send_signal(&self.worker, *signal);
            self.steps = &self.steps[1..];
            self.due = self.steps.first().map(|step| now + step.0);
        }
    }

    fn hurry(&mut self, farewell: Farewell) {
        if farewell > self.farewell {
            *self = Leaving::new(self.worker.clone(), farewell);
        }
    }
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
        let checks = (self.has_checks() || !self.leaving.is_empty()).then_some(self.check_at);
        let signals = self.leaving.iter().filter_map(|leaving| leaving.due);
        let loads = self.pending.iter().map(|pending| self.load_limit(&pending.worker));
        // While the application is loaded, nothing else would notice that all of this is to stop.
        let look = self.starting.then(|| Instant::now() + STARTING_LOOK);
        forks.chain(look).chain(checks).chain(signals).chain(loads).chain(self.zygote_at).min()
    }

    fn has_checks(&self) -> bool {
        self.app.max_rss.is_some() || self.app.max_age.is_some() || is_first_process()
    }

    /// Does what is due.
    fn act(&mut self, now: Instant) {
        self.leaving.iter_mut().for_each(|leaving| leaving.act(now));
        if self.zygote_at.is_some_and(|at| at <= now) {
            self.zygote_at = None;
            self.start_zygote();
        }
        if self.check_at <= now {
            self.check_at = now + CHECK;
            self.check(now);
        }
        self.give_up_loading(now);
        if self.about.is_some() {
            self.fork_due(now);
        }
    }

    /// Looks for workers that are too old or too large, and for ends that nobody has told.
    fn check(&mut self, now: Instant) {
        for slot in &mut self.slots {
            let Some(worker) = &slot.current else { continue };
            let old = self.app.max_age.is_some_and(|limit| now.duration_since(worker.born) >= limit);
            // One that was never given anything is as large as the application: its successor would be, too.
            let large = self.app.max_rss.is_some_and(|limit| worker.was_tried() && resident_bytes(worker) > limit);
            if (old || large) && !slot.recycle {
                tracing::info!(
                    pid = worker.pid.load(Ordering::Relaxed),
                    "the worker is replaced: {}",
                    if old { "it is old enough" } else { "it has too much memory" }
                );
                slot.recycle = true;
            }
        }
        // Their zygote may have ended before them.
        self.leaving.retain(|leaving| !has_ended(&leaving.worker));
        if is_first_process() {
            reap_strays(self.zygote.as_ref().map(Zygote::child));
        }
    }

    /// Until when a worker may load the application.
    fn load_limit(&self, worker: &Worker) -> Instant {
        let is_forked = worker.pid.load(Ordering::Relaxed) != 0;
        worker.born + if is_forked { LOAD_WAIT + 10 * self.longest_load } else { ZYGOTE_WAIT }
    }

    /// An import may wait for something that never comes, and nobody else would load the application in its place.
    fn give_up_loading(&mut self, now: Instant) {
        while let Some(index) = self.pending.iter().position(|pending| self.load_limit(&pending.worker) <= now) {
            if self.pending[index].worker.pid.load(Ordering::Relaxed) == 0 {
                return self.zygote_lost("It does not fork workers any more.");
            }
            if self.starting {
                return;
            }
            let worker = self.pending.swap_remove(index).worker;
            send_signal(&worker, Signal::USR1);
            self.loading_failed(worker, Farewell::Overdue, "Loading it takes far longer than before. Its traceback says where it is.");
        }
    }

    fn fork_due(&mut self, now: Instant) {
        if !may_fork(self.leaving.iter().filter(|leaving| leaving.steps.is_empty()).count(), self.open_slots()) {
            return;
        }
        let is_loading = |index| self.pending.iter().any(|pending| pending.worker.slot == index);
        let is_missing = |(index, slot): &(usize, &Slot)| !slot.closed && slot.current.is_none() && slot.is_due(now) && !is_loading(*index);
        let missing: Vec<usize> = self.slots.iter().enumerate().filter(is_missing).map(|(index, _)| index).collect();
        missing.into_iter().for_each(|index| self.fork(index));
        if self.may_recycle(now) {
            // The oldest first, or that of a busy slot would have its next turn before others had one.
            let wanted = self.slots.iter().enumerate().filter(|(_, slot)| slot.recycle && slot.is_due(now));
            let oldest = wanted.min_by_key(|(_, slot)| slot.current.as_ref().map(|worker| worker.born));
            oldest.map(|(index, _)| index).into_iter().for_each(|index| self.fork(index));
        }
    }

    /// One at a time: not while another one is loaded, nor while its predecessor is ending, unless that takes long. And with fewer
    /// workers than wanted, nobody is replaced for a lesser reason.
    fn may_recycle(&self, now: Instant) -> bool {
        let ending = self.leaving.iter().any(|leaving| leaving.farewell == Farewell::Retired && now < leaving.since + RETIRE_WAIT);
        self.pending.is_empty() && self.is_complete() && !ending
    }

    fn fork(&mut self, slot: usize) {
        self.slots[slot].fork_at = None;
        let Some(zygote) = &self.zygote else { return };
        let id = self.next_id;
        self.next_id += 1;
        let jitter = match self.app.max_requests_jitter {
            0 => 0,
            most => self.shared.start.wrapping_mul(2_654_435_761).wrapping_add(id as u32).wrapping_mul(40_503) as u64 % (most + 1),
        };
        let served_max = if self.app.max_requests == 0 { 0 } else { self.app.max_requests + jitter };
        let worker = Worker::new(id, slot, served_max);
        match zygote.fork(id, self.app.channels()) {
            Ok(channels) => self.pending.push(Pending { worker: Arc::new(worker), channels, reader: Reader::new() }),
            Err(error) => {
                tracing::error!(%error, "a worker could not be forked");
                self.try_later(slot);
            }
        }
    }

    /// The slot's worker was of no use to anybody.
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
            Ok((0, _)) => Some((Farewell::Ended, "The worker ended before it had loaded the application.".to_owned())),
            Ok((bytes, _)) => {
                pending.reader.add(bytes);
                match pending.reader.next_event() {
                    Ok(None) => return,
                    Ok(Some((_, Event::Ready(_)))) => None,
                    Ok(Some((_, Event::Failed(text)))) => Some((Farewell::Ended, String::from_utf8_lossy(text).into_owned())),
                    Ok(Some(_)) => Some((Farewell::Broken, "The worker said something else than that it is ready.".to_owned())),
                    Err(violation) => Some((Farewell::Broken, format!("The worker sent {violation}."))),
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(error) => Some((Farewell::Ended, format!("The worker ended before it had loaded the application ({error})."))),
        };
        let pending = self.pending.swap_remove(index);
        match failure {
            None if pending.reader.is_inside() => {
                self.loading_failed(pending.worker, Farewell::Broken, "The worker said more than that it is ready.");
            }
            None => self.install(pending),
            Some((farewell, why)) => self.loading_failed(pending.worker, farewell, &why),
        }
    }

    /// A worker is ready: the slot's couriers go over to it.
    fn install(&mut self, pending: Pending) {
        let Pending { worker, channels, .. } = pending;
        self.longest_load = self.longest_load.max(worker.born.elapsed());
        let slot = &mut self.slots[worker.slot];
        for (orders, channel) in slot.orders.iter().zip(channels) {
            let link = Link::new(channel, worker.clone(), self.shared.reporter.clone());
            orders.send(Order::Link(link), &self.shared.pools);
        }
        slot.recycle = false;
        if let Some(old) = slot.current.replace(worker) {
            slot.failures = 0;
            self.leave(old, Farewell::Retired);
        }
    }

    fn loading_failed(&mut self, worker: Arc<Worker>, farewell: Farewell, why: &str) {
        if self.starting {
            self.failure.get_or_insert_with(|| why.to_owned());
            return;
        }
        tracing::error!(
            pid = worker.pid.load(Ordering::Relaxed),
            "a new worker could not load the application; those that serve go on:\n{why}"
        );
        self.try_later(worker.slot);
        self.leave(worker, farewell);
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
                    self.zygote.iter_mut().for_each(|zygote| zygote.meet(&about));
                    self.about = Some(about);
                }
                Err(why) => self.zygote_lost(&why),
            },
            Ok(Some(News::Failed(why))) => self.zygote_lost(&why),
            Ok(Some(News::Forked { forked, pid })) => self.forked(forked, pid),
            Ok(Some(News::Unforked { forked, error })) => {
                if let Some(index) = self.pending.iter().position(|pending| pending.worker.id == forked) {
                    let pending = self.pending.swap_remove(index);
                    let hint = "a higher limit (ulimit -u), or fewer --workers";
                    pending.worker.status.store(0, Ordering::Release);
                    self.loading_failed(
                        pending.worker,
                        Farewell::Ended,
                        &format!("The worker could not be forked: {error}.\nhint: {hint}"),
                    );
                }
            }
            Ok(Some(News::Exited { exited, status })) => self.exited(exited, status),
            Ok(None) => self.zygote_lost("The Python interpreter ended by itself."),
            Err(error) => self.zygote_lost(&format!("{error}.")),
        }
    }

    fn forked(&mut self, id: u64, pid: i32) {
        let Some(zygote) = &self.zygote else { return };
        let Some(worker) = self.known().find(|worker| worker.id == id) else { return };
        worker.pid.store(pid, Ordering::Relaxed);
        if let Some(handle) = open_handle(pid, zygote.pid()) {
            let _ = worker.handle.set(handle);
        }
    }

    /// Every worker whose end is not known.
    fn known(&self) -> impl Iterator<Item = &Arc<Worker>> {
        let pending = self.pending.iter().map(|pending| &pending.worker);
        let current = self.slots.iter().filter_map(|slot| slot.current.as_ref());
        pending.chain(current).chain(self.leaving.iter().map(|leaving| &leaving.worker))
    }

    fn exited(&mut self, pid: i32, status: i32) {
        let is_it = |worker: &Arc<Worker>| worker.pid.load(Ordering::Relaxed) == pid;
        let Some(worker) = self.known().find(|worker| is_it(worker)).cloned() else { return };
        // Its last words are heard first: they say more than the status.
        self.hear(worker.id);
        worker.status.store(status, Ordering::Release);
        if let Some(index) = self.leaving.iter().position(|leaving| is_it(&leaving.worker)) {
            let leaving = self.leaving.swap_remove(index);
            // A courier has found it first, and could not say how it ended. What we ended ourselves is no news.
            if leaving.farewell == Farewell::Ended && !leaving.steps.is_empty() && status != 0 {
                tracing::warn!(pid, "the worker ended ({})", describe(status));
            }
        }
        if let Some(index) = self.pending.iter().position(|pending| is_it(&pending.worker)) {
            self.pending.swap_remove(index);
            let why = format!("The worker ended while it loaded the application ({}).", describe(status));
            return self.loading_failed(worker, Farewell::Ended, &why);
        }
        if self.is_current(&worker) {
            tracing::warn!(pid, "a worker ended ({}) and is replaced", describe(status));
            self.lose(&worker, Farewell::Ended);
        }
    }

    fn is_current(&self, worker: &Worker) -> bool {
        self.slots[worker.slot].current.as_ref().is_some_and(|current| current.id == worker.id)
    }

    /// A worker is of no use any more: its slot needs another.
    fn lose(&mut self, worker: &Arc<Worker>, farewell: Farewell) {
        if self.is_current(worker) {
            let slot = &mut self.slots[worker.slot];
            slot.current = None;
            slot.recycle = false;
            for orders in &slot.orders {
                let order = if worker.has_status() { Order::Drop(worker.id) } else { Order::Leave(worker.id) };
                orders.send(order, &self.shared.pools);
            }
            if worker.was_tried() {
                slot.failures = 0;
                slot.fork_at = None;
            } else {
                self.try_later(worker.slot);
            }
        }
        self.leave(worker.clone(), farewell);
    }

    fn leave(&mut self, worker: Arc<Worker>, farewell: Farewell) {
        if worker.has_status() {
            return;
        }
        match self.leaving.iter_mut().find(|leaving| leaving.worker.id == worker.id) {
            Some(leaving) => leaving.hurry(farewell),
            None => self.leaving.push(Leaving::new(worker, farewell)),
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Broken { worker, why, ended } => {
                if self.is_current(&worker) {
                    tracing::error!(pid = worker.pid.load(Ordering::Relaxed), "a worker is replaced: {why}");
                }
                self.lose(&worker, if ended { Farewell::Ended } else { Farewell::Broken });
            }
            Report::Overdue { worker } => {
                // Also for those of its threads that go on.
                send_signal(&worker, Signal::USR1);
                self.lose(&worker, if self.app.has_worker_abort { Farewell::Aborted } else { Farewell::Overdue });
            }
            Report::Used { worker } => {
                let is_current = self.is_current(&worker);
                self.slots[worker.slot].recycle |= is_current;
            }
            Report::Change(more) if more > 0 => {
                self.add_slot();
                self.say_workers();
                tracing::info!(workers = self.open_slots(), "one worker more");
            }
            Report::Change(_) => self.remove_slot(),
            Report::Free | Report::Stop => {}
        }
    }

    fn open_slots(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.closed).count()
    }

    /// For the hook `nworkers_changed`.
    fn say_workers(&self) {
        self.zygote.iter().for_each(|zygote| zygote.say_workers(self.open_slots()));
    }

    fn add_slot(&mut self) {
        // A slot that was closed is opened again, so that coming and going leaves nothing behind.
        let closed = self.slots.iter().position(|slot| slot.closed);
        let index = closed.unwrap_or(self.slots.len());
        let core = index % self.cpus.len();
        let mut orders = Vec::new();
        for _ in 0..self.app.channels() {
            let number = self.numbers;
            self.numbers += 1;
            match self.app.greenlets {
                None => orders.push(Orders::Courier { core, number, mail: self.mail[core].clone() }),
                Some(limit) => match self.start_multiplexer(core, number, limit) {
                    Ok(multiplexer) => orders.push(multiplexer),
                    Err(error) => tracing::error!(%error, "a thread for a worker could not be started; try: a higher limit (ulimit -u)"),
                },
            }
        }
        let slot = Slot { orders, current: None, failures: 0, fork_at: None, recycle: false, closed: false };
        match closed {
            Some(index) => self.slots[index] = slot,
            None => self.slots.push(slot),
        }
    }

    fn start_multiplexer(&self, core: usize, number: u32, limit: usize) -> io::Result<Orders> {
        let (orders, taken) = unbounded();
        let (shared, cpu) = (self.shared.clone(), self.cpus[core]);
        let bell = Waker::new()?;
        let waker = bell.clone();
        let work = move || {
            core_affinity::set_for_current(cpu);
            Multiplexer::new(shared, core, number, taken, waker, limit).run();
        };
        let thread = thread::Builder::new().name(format!("multiplexer-{number}")).spawn(work)?;
        Ok(Orders::Multiplexer { orders, bell, thread })
    }

    fn remove_slot(&mut self) {
        if self.open_slots() <= 1 {
            tracing::warn!("there is only one worker; it stays");
            return;
        }
        let index = self.slots.iter().rposition(|slot| !slot.closed).expect("counted above");
        let slot = &mut self.slots[index];
        slot.closed = true;
        slot.orders.drain(..).for_each(|orders| orders.send(Order::Stop, &self.shared.pools));
        let current = slot.current.take();
        let pending = self.pending.iter().position(|pending| pending.worker.slot == index);
        // Its channels close, so it ends by itself.
        let pending = pending.map(|at| self.pending.swap_remove(at).worker);
        current.into_iter().chain(pending).for_each(|worker| self.leave(worker, Farewell::Retired));
        self.say_workers();
        tracing::info!(workers = self.open_slots(), "one worker less");
    }

    fn start_zygote(&mut self) {
        match Zygote::start(&self.app, &self.base, self.open_slots()) {
            Ok(zygote) => self.zygote = Some(zygote),
            Err(error) => self.zygote_lost(&format!("{error}.")),
        }
    }

    /// Without the zygote its workers end too (PR_SET_PDEATHSIG), after what they are at: everything starts again.
    fn zygote_lost(&mut self, why: &str) {
        if self.starting {
            self.failure.get_or_insert_with(|| why.to_owned());
            return;
        }
        tracing::error!("the Python zygote is started again:\n{why}");
        self.about = None;
        if let Some(zygote) = self.zygote.take() {
            zygote.kill();
        }
        let loading: Vec<Arc<Worker>> = self.pending.drain(..).map(|pending| pending.worker).collect();
        let serving: Vec<Arc<Worker>> = self.slots.iter().filter_map(|slot| slot.current.clone()).collect();
        loading.into_iter().for_each(|worker| self.leave(worker, Farewell::Ended));
        serving.iter().for_each(|worker| self.lose(worker, Farewell::Ended));
        // Nobody will tell what becomes of those that were to be forked, or of which there is no handle.
        self.leaving.retain(|leaving| leaving.worker.handle.get().is_some());
        self.zygote_at = Some(Instant::now() + pause(self.zygote_failures));
        self.zygote_failures = self.zygote_failures.saturating_add(1);
    }

    fn end(mut self) {
        for orders in self.slots.iter().flat_map(|slot| &slot.orders) {
            orders.send(Order::Stop, &self.shared.pools);
        }
        for orders in self.slots.iter_mut().flat_map(|slot| slot.orders.drain(..)) {
            if let Orders::Multiplexer { thread, .. } = orders {
                let _ = thread.join();
            }
        }
        let workers: Vec<Arc<Worker>> = self.known().cloned().collect();
        self.pending.clear();
        if let Some(zygote) = self.zygote.take() {
            zygote.end();
        }
        // A zygote ends its workers before itself, unless it was killed.
        workers.iter().for_each(|worker| send_signal(worker, Signal::KILL));
    }
}

/// False when that many workers cannot be killed.
fn may_fork(undead: usize, slots: usize) -> bool {
    undead < UNDEAD_MAX * slots
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

/// Something to signal the process through, if it is a child of the zygote. Its number alone may mean another by now.
fn open_handle(pid: i32, zygote: Option<i32>) -> Option<OwnedFd> {
    let handle = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = stat.rsplit_once(") ").and_then(|(_, fields)| fields.split(' ').nth(1)?.parse::<i32>().ok());
    parent.is_none_or(|parent| zygote.is_none_or(|zygote| parent == zygote)).then_some(handle)
}

/// A process of which there is a handle is known to have ended even when nobody says so.
fn has_ended(worker: &Worker) -> bool {
    let Some(handle) = worker.handle.get() else { return worker.has_status() };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

fn is_first_process() -> bool {
    std::process::id() == 1
}

/// The first process of a container becomes the parent of every process there that loses its own (pid_namespaces(7)): those that
/// a worker left, and the workers that a zygote left. Somebody has to ask how they ended.
fn reap_strays(zygote: Option<i32>) {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for children in tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok()) {
        let children = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
        for child in children.filter(|pid| Some(*pid) != zygote) {
            // An error: somebody else has asked.
            let _ = rustix::process::waitpid(Pid::from_raw(child), WaitOptions::NOHANG);
        }
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
        (libc::SIGKILL, _) => "signal 9; try: dmesg, for the kernel kills when memory runs out".to_owned(),
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
    fn workers_that_cannot_be_killed_are_replaced_only_so_often() {
        assert!(may_fork(0, 1) && may_fork(1, 1) && may_fork(7, 4));
        assert!(!may_fork(2, 1) && !may_fork(8, 4));
    }

    #[test]
    fn a_process_of_another_parent_gets_no_handle() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let pid = child.id().cast_signed();
        let parent = Some(std::process::id().cast_signed());
        assert!(open_handle(pid, parent).is_some());
        assert!(open_handle(pid, Some(1)).is_none());
        child.kill().expect("a child");
        child.wait().expect("a child");
        assert!(open_handle(pid, parent).is_none());
    }

    #[test]
    fn a_leaving_worker_is_left_alone_while_it_is_used_and_hurried_only_forward() {
        let worker = Arc::new(Worker::new(1, 0, 0));
        let now = Instant::now();
        worker.links.store(1, Ordering::Relaxed);
        let mut leaving = Leaving::new(worker.clone(), Farewell::Retired);
        leaving.act(now + RETIRE_WAIT);
        assert_eq!((leaving.due, leaving.steps.len()), (None, 2));
        leaving.hurry(Farewell::Aborted);
        leaving.hurry(Farewell::Ended);
        assert_eq!(leaving.farewell, Farewell::Aborted);
        // Nobody has told its number yet: nothing could be sent.
        worker.links.store(0, Ordering::Relaxed);
        leaving.act(now);
        assert_eq!(leaving.due, None);
        worker.pid.store(1, Ordering::Relaxed);
        leaving.act(now);
        assert_eq!(leaving.due, Some(now + TRACEBACK_WAIT));
        leaving.act(now + TRACEBACK_WAIT);
        assert_eq!(leaving.due, Some(now + TRACEBACK_WAIT + KILL_WAIT));
        leaving.act(now + TRACEBACK_WAIT + KILL_WAIT);
        assert_eq!((leaving.due, leaving.steps.len()), (None, 0));
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
        assert_eq!(describe(11), "signal 11");
        assert!(describe(9).starts_with("signal 9; try: dmesg"));
        assert_eq!(describe(3 << 8), "exit status 3");
    }
}
