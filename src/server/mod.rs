//! The process around the shards: listeners, cores, threads, signals, and the end of it all.
//!
//! Listeners are made here, once, and live as long as the process: closing one of a SO_REUSEPORT
//! group resets the connections that wait in it (kernel-notes/reuseport.md).

pub mod listeners;
pub mod process;

use std::{
    fmt, fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, OnceLock, mpsc},
    thread,
    time::SystemTime,
};

use core_affinity::CoreId;
use rustix::fs::Mode;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2},
    iterator::{Handle, Signals},
};

use self::{
    listeners::Listeners,
    process::{Owner, PidFile},
};
use crate::{
    config::{Backend, Bind, Config, Cores},
    disk::{Disk, Quota},
    driver::{
        Driver,
        capabilities::{Capabilities, MASK_VARIABLE},
        epoll::EpollDriver,
        uring::{Sizes, UringDriver},
        waker::Waker,
    },
    error::{Error, Result},
    handler::{Handler, Request, Response},
    pool::{Clock, Pools},
    python::{
        PythonApp, Surroundings, Workers,
        dispatch::{Dispatch, Mailbox},
        worker::{Report, Reporter},
    },
    shard::{
        self, Control,
        engine::{Engine, Life},
    },
    stats::Stats,
};

/// Descriptors that are not connections: listeners, rings, logs, the terminal.
const DESCRIPTORS_RESERVED: u64 = 32;

/// A server that has not been started.
///
/// ```no_run
/// use uringd::{Request, Response, Server};
///
/// fn main() -> uringd::Result<()> {
///     Server::new(|request: &Request| Response::text(format!("hello {}\n", request.path())))
///         .bind("127.0.0.1:8000")
///         .run()
/// }
/// ```
pub struct Server {
    config: Config,
    handler: Arc<dyn Handler>,
    /// What answers instead of `handler`.
    python: Option<PythonApp>,
    /// What answers, for the start-up line.
    target: String,
}

/// Where the worker processes of this server can be counted up and down, once there are any.
type WorkerCount = Arc<OnceLock<Reporter>>;

impl Server {
    /// A server whose requests this closure answers, on the handler threads.
    pub fn new<F, R>(handler: F) -> Server
    where
        F: Fn(&Request<'_>) -> R + Send + Sync + 'static,
        R: Into<Response>,
    {
        Server::with_handler(handler)
    }

    /// A server with a [`Handler`] that decides more than the answer: where it runs, for one.
    pub fn with_handler(handler: impl Handler) -> Server {
        Server { config: Config::default(), handler: Arc::new(handler), python: None, target: "a handler".to_owned() }
    }

    /// A server whose requests a Python application answers, in processes of its own.
    pub fn with_python(app: PythonApp) -> Server {
        // Never called: its requests are for the couriers of the workers, not for handler threads.
        let nobody = |_: &Request<'_>| Response::new(500);
        Server { python: Some(app), ..Server::with_handler(nobody) }
    }

    /// Replaces every setting.
    pub fn config(mut self, config: Config) -> Server {
        self.config = config;
        self
    }

    /// Listens here and nowhere else: `host:port`, `[v6]:port`, `:port`, `unix:PATH` or `fd://N`.
    pub fn bind(mut self, address: &str) -> Server {
        self.config.bind = vec![Bind::from_text(address)];
        self
    }

    /// Says in the start-up line what answers.
    pub fn target(mut self, name: impl Into<String>) -> Server {
        self.target = name.into();
        self
    }

    /// Serves until SIGTERM (finish what was begun) or SIGINT, SIGQUIT, a second SIGTERM (stop at once). Prints the
    /// start-up line on standard error.
    ///
    /// # Errors
    /// What kept it from starting, or [`Error::DrainLimit`] when requests were lost at the end.
    pub fn run(self) -> Result<()> {
        // Before any thread, so that each inherits the disposition and only this process's own thread is told.
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2, SIGTTIN, SIGTTOU])
            .map_err(|source| Error::Start { what: "the signal handler", source })?;
        let handle = signals.handle();
        let (control, count) = (Arc::new(Control::default()), WorkerCount::default());
        let told = (control.clone(), count.clone());
        let listener = thread::Builder::new().name("signals".to_owned()).spawn(move || obey(&mut signals, &told.0, &told.1));
        let listener = listener.map_err(|source| Error::Start { what: "the signal thread", source })?;
        let running = self.start_with(control, &count)?;
        eprintln!("uringd {} ready: {running}", env!("CARGO_PKG_VERSION"));
        let ended = running.wait();
        Handle::close(&handle);
        let _ = listener.join();
        ended
    }

    /// Starts every shard and returns when each of them accepts.
    ///
    /// # Errors
    /// What kept it from starting; then nothing is left running.
    pub fn start(self) -> Result<Running> {
        self.start_with(Arc::default(), &WorkerCount::default())
    }

    fn start_with(mut self, control: Arc<Control>, count: &WorkerCount) -> Result<Running> {
        let cpus = choose_cores(&self.config.cores)?;
        let handler_cpus = self.config.handler_cores.as_ref().map(choose_cores).transpose()?;
        if let Some(mask) = self.config.umask {
            rustix::process::umask(Mode::from_bits_truncate(mask));
        }
        // While it may still do what only root may: low ports, sockets and files in root's directories, higher limits.
        let owner = Owner::named(self.config.user.as_deref(), self.config.group.as_deref())?;
        let listeners = Listeners::open(&self.config.bind, cpus.len(), self.config.backlog)?;
        hand_over(&self.config, owner)?;
        let pid_file = self.config.pid_file.as_deref().map(|path| PidFile::claim(path, owner)).transpose()?;
        limit_connections(&mut self.config, cpus.len());
        owner.map_or(Ok(()), Owner::assume)?;
        // As who serves: io_uring may be root's alone.
        let capabilities = choose_backend(self.config.backend)?;

        let clock = Clock::new();
        let stats: Vec<Arc<Stats>> = cpus.iter().map(|_| Arc::default()).collect();
        let disk =
            Disk::start(self.config.spool_directory.clone()).map_err(|source| Error::Start { what: "the disk's threads", source })?;
        let quota = Arc::new(Quota::new(self.config.limits.spool_bytes_max));
        if self.python.is_some() {
            self.config.handlers = 0;
        }
        let pools = Pools::new(cpus.len(), &self.config, disk);
        let workers = match self.python {
            Some(app) => {
                let places = handler_cpus.as_ref().unwrap_or(&cpus);
                let places: Vec<CoreId> = (0..cpus.len()).map(|core| places[core % places.len()]).collect();
                let workers = Workers::start(
                    app,
                    Surroundings {
                        pools: pools.clone(),
                        config: &self.config,
                        cpus: &places,
                        addresses: &listeners.addresses(),
                        clock,
                        stats: &stats,
                        control: &control,
                    },
                )?;
                let _ = count.set(workers.reporter());
                Some(workers)
            }
            None => None,
        };
        let (started, starts) = mpsc::channel();
        let config = Arc::new(self.config);
        let mut shards = Vec::new();
        for (index, cpu) in cpus.iter().enumerate() {
            let shard = Shard {
                index,
                cpu: *cpu,
                capabilities,
                listeners: listeners.of_shard(index),
                config: config.clone(),
                handler: self.handler.clone(),
                stats: stats[index].clone(),
                pools: pools.clone(),
                quota: quota.clone(),
                workers: workers.as_ref().map(|workers| workers.mailbox(index)),
                control: control.clone(),
                clock,
            };
            let started = started.clone();
            let thread = thread::Builder::new().name(format!("shard-{index}")).spawn(move || shard.run(&started));
            shards.push(thread.map_err(|source| Error::Start { what: "a shard's thread", source })?);
        }
        drop(started);
        let addresses = listeners.addresses();
        control.listen(listeners, cpus.len());
        let mut running = Running {
            shards,
            control,
            pools: pools.clone(),
            addresses,
            cpus: cpus.clone(),
            backend: capabilities.map_or("epoll".to_owned(), |caps| format!("io_uring tier {}", caps.tier())),
            handlers: config.handlers,
            workers,
            target: self.target,
            stats: stats.clone(),
            pid_file,
        };
        for start in starts.iter().take(cpus.len()) {
            if let Err(error) = start {
                running.control.wind_down(Life::Stopping);
                let _ = running.wait();
                return Err(error);
            }
        }
        pools.start(&self.handler, &stats, clock, |core| match &handler_cpus {
            Some(cpus) => Some(cpus[core % cpus.len()]),
            None => Some(cpus[core]),
        });
        if let Some(Err(error)) = running.pid_file.as_mut().map(PidFile::write) {
            running.control.wind_down(Life::Stopping);
            let _ = running.wait();
            return Err(error);
        }
        Ok(running)
    }
}

/// A server that serves. Dropping it does not stop it; [`Running::stop`] does.
pub struct Running {
    shards: Vec<thread::JoinHandle<Result<usize>>>,
    control: Arc<Control>,
    pools: Arc<Pools>,
    addresses: Vec<String>,
    cpus: Vec<CoreId>,
    backend: String,
    handlers: usize,
    workers: Option<Workers>,
    target: String,
    stats: Vec<Arc<Stats>>,
    /// Removed when this is dropped.
    pid_file: Option<PidFile>,
}

impl Running {
    /// Where it listens, as URLs.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// The counters of each shard.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// Stops accepting and finishes what was begun, for as long as the drain limit allows.
    pub fn stop(&self) {
        self.control.wind_down(Life::Draining);
    }

    /// Waits for the end of every shard.
    ///
    /// # Errors
    /// [`Error::Driver`], or [`Error::DrainLimit`] when requests were left unanswered.
    pub fn wait(self) -> Result<()> {
        let mut lost = 0;
        let mut failed = Ok(());
        for shard in self.shards {
            match shard.join().expect("a shard's panic ends the process") {
                Ok(unanswered) => lost += unanswered,
                Err(error) => failed = Err(error),
            }
        }
        self.pools.stop();
        if let Some(workers) = self.workers {
            workers.stop();
        }
        failed?;
        if lost > 0 { Err(Error::DrainLimit { lost }) } else { Ok(()) }
    }
}

/// The start-up line, without the name of the program.
impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus: Vec<usize> = self.cpus.iter().map(|cpu| cpu.id).collect();
        let cores = if cpus.len() == 1 { "core" } else { "cores" };
        write!(f, "{}, {} {cores} ({}), {}", self.addresses.join(" "), cpus.len(), ranges(&cpus), self.backend)?;
        match &self.workers {
            Some(workers) => write!(f, ", {}", workers.describe()),
            None => write!(f, ", {} handlers per core, {}", self.handlers, self.target),
        }
    }
}

/// What a shard's thread starts with.
struct Shard {
    index: usize,
    cpu: CoreId,
    capabilities: Option<Capabilities>,
    listeners: Vec<std::os::fd::RawFd>,
    config: Arc<Config>,
    handler: Arc<dyn Handler>,
    stats: Arc<Stats>,
    pools: Arc<Pools>,
    quota: Arc<Quota>,
    workers: Option<Mailbox>,
    control: Arc<Control>,
    clock: Clock,
}

/// A panic on a ring thread is a bug of ours, and the kernel may be writing into its buffers: nothing may be
/// unwound past it. (A handler's panic is caught where it is called.)
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

impl Shard {
    fn run(self, started: &mpsc::Sender<Result<()>>) -> Result<usize> {
        let _guard = AbortOnPanic;
        if !core_affinity::set_for_current(self.cpu) {
            tracing::warn!(cpu = self.cpu.id, "this thread could not be pinned; try: a CPU of the allowed set");
        }
        // Made after pinning, so that its memory is near; and on this thread, the only one that may use it.
        let mut driver = match self.driver() {
            Ok(driver) => driver,
            Err(error) => {
                let _ = started.send(Err(error));
                return Ok(0);
            }
        };
        let waker: Waker = driver.waker();
        self.control.register(waker.clone());
        let desk = self.pools.desk(self.index, waker.clone());
        let mut workers = self.workers.map(|mailbox| Dispatch::new(mailbox, self.index, waker));
        let now = self.clock.now();
        let stats = self.stats.clone();
        let quota = self.quota.clone();
        let wall = SystemTime::now();
        let mut engine = Engine::new(&self.config, self.handler.clone(), self.listeners.len(), stats, quota, now, wall);
        let _ = started.send(Ok(()));
        drop(self.handler);
        let drain = self.config.timeouts.drain;
        let ended = shard::run(&mut *driver, &mut engine, &desk, workers.as_mut(), &self.control, self.clock, drain).map_err(Error::Driver);
        if !engine.is_quiet() || workers.is_some_and(|workers| !workers.is_quiet()) {
            // The kernel may still write into the driver's memory: it is left alone for the rest of the process.
            std::mem::forget(driver);
        }
        if ended.is_err() {
            self.control.wind_down(Life::Stopping);
        }
        ended
    }

    fn driver(&self) -> Result<Box<dyn Driver>> {
        match self.capabilities {
            Some(caps) => Ok(Box::new(UringDriver::with_sizes(&self.listeners, caps, Sizes::from_environment()).map_err(Error::NoUring)?)),
            None => {
                let made = EpollDriver::new(&self.listeners);
                Ok(Box::new(made.map_err(|source| Error::Start { what: "an epoll instance", source })?))
            }
        }
    }
}

/// Turns signals into ends, until the handle is closed.
fn obey(signals: &mut Signals, control: &Control, count: &WorkerCount) {
    for signal in signals.forever() {
        match signal {
            SIGTTIN | SIGTTOU if count.get().is_some() => {
                let change = if signal == SIGTTIN { 1 } else { -1 };
                count.get().into_iter().for_each(|workers| workers.send(Report::Change(change)));
            }
            SIGTERM if control.life() == Life::Serving => control.wind_down(Life::Draining),
            SIGTERM | SIGINT | SIGQUIT => control.wind_down(Life::Stopping),
            SIGHUP => tracing::warn!("SIGHUP is ignored: there is no reload yet; try: a restart"),
            SIGUSR1 => tracing::info!("SIGUSR1: log lines go to standard error, so there is no file to open again"),
            SIGUSR2 => tracing::warn!("SIGUSR2 is ignored: there is no upgrade yet; try: a restart"),
            other => tracing::warn!(signal = other, "ignored: only Python applications have workers to count"),
        }
    }
}

/// Whoever may reach a unix socket may connect, like gunicorn's and nginx's: the proxy before it is another user's.
const UNIX_SOCKET_MODE: u32 = 0o666;

/// Gives unix sockets the permissions and the owner that were asked for.
fn hand_over(config: &Config, owner: Option<Owner>) -> Result<()> {
    for bind in &config.bind {
        let Bind::Unix(path) = bind else { continue };
        // With a umask, they were made as it says.
        let mode = config.unix_socket_mode.or_else(|| config.umask.is_none().then_some(UNIX_SOCKET_MODE));
        let mode = mode.map_or(Ok(()), |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
        let owned = mode.and_then(|()| owner.map_or(Ok(()), |owner| owner.own(path)));
        owned.map_err(|source| Error::Bind { address: bind.to_string(), source })?;
    }
    Ok(())
}

/// `None` for epoll.
fn choose_backend(backend: Backend) -> Result<Option<Capabilities>> {
    if backend == Backend::Epoll {
        return Ok(None);
    }
    match Capabilities::probe() {
        Ok(caps) => {
            let mask = std::env::var(MASK_VARIABLE).unwrap_or_default();
            caps.masked(&mask).map(Some).map_err(Error::Mask)
        }
        Err(why) if backend == Backend::Uring => Err(Error::NoUring(why)),
        Err(why) => {
            tracing::warn!("serving through epoll, which is slower: {why}");
            Ok(None)
        }
    }
}

/// The CPUs of the choice, each checked against those that this process may run on.
fn choose_cores(cores: &Cores) -> Result<Vec<CoreId>> {
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    let ids: Vec<usize> = allowed.iter().map(|cpu| cpu.id).collect();
    let refuse = |wanted: String| Error::Cores { wanted, allowed: ranges(&ids) };
    let chosen = match cores {
        Cores::All => allowed,
        Cores::Count(count) if (1..=allowed.len()).contains(count) => allowed[..*count].to_vec(),
        Cores::Count(count) => return Err(refuse(count.to_string())),
        Cores::List(list) if !list.is_empty() && list.iter().all(|cpu| ids.contains(cpu)) => list.iter().map(|&id| CoreId { id }).collect(),
        Cores::List(list) => return Err(refuse(ranges(list))),
    };
    // Where the affinity cannot be read, one unpinned shard is better than none.
    Ok(if chosen.is_empty() { vec![CoreId { id: 0 }] } else { chosen })
}

/// Raises RLIMIT_NOFILE as far as allowed, and keeps the connections of all cores within it.
fn limit_connections(config: &mut Config, cores: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = (config.limits.connections_max * cores) as u64 + DESCRIPTORS_RESERVED;
    let current = limit.current.unwrap_or(u64::MAX);
    if current < wanted {
        let raised = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)).max(current);
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: limit.maximum });
        if raised < wanted {
            tracing::debug!(
                "RLIMIT_NOFILE allows {raised} descriptors; {wanted} would be needed for {} connections per core; try: ulimit -n {wanted}",
                config.limits.connections_max
            );
        }
    }
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let text = |&(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn a_cpu_that_is_not_allowed_is_refused_with_those_that_are() {
        let error = choose_cores(&Cores::List(vec![4_095])).expect_err("no such CPU");
        assert!(error.to_string().contains("--cores 4095") && error.to_string().contains("try:"), "{error}");
    }
}
