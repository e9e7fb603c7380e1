//! Starts the real binary, speaks to it in raw bytes, and stops it.
//!
//! A test asks [`for_each_backend`] for backends, starts a [`Server`] on a port of the kernel's choice,
//! and talks to it through a [`Client`]. Waiting is always for a condition and always bounded; a server
//! that goes out of scope is drained, and must then exit with 0 and without a panic in its log.

use std::{
    collections::HashMap,
    env, fmt, fs,
    fs::File,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

/// Longest wait for anything that should happen at once. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(20);

// ---------------------------------------------------------------------------------- backends

/// How a server under test asks the kernel: `--backend`, and which features are masked.
#[derive(Clone, Debug)]
pub struct Backend {
    name: String,
    flag: &'static str,
    mask: Option<String>,
}

/// Kernel tiers that the uring driver tells apart, as `URINGD_IO_MASK` names them. They stand in
/// `URINGD_TEST_BACKENDS` as `all`, together with the unmasked backends.
const TIERS: [&str; 5] = ["tier=5.15", "tier=5.19", "tier=6.0", "tier=6.1", "tier=6.6"];

/// Backends that a test runs with at the same time: most of its time it waits.
const AT_ONCE: usize = 2;

/// Runs `body` with every backend, the others too when it fails with one.
///
/// A backend that this machine refuses is skipped, with a line that says so.
pub fn for_each_backend(body: impl Fn(&Backend) + Sync) {
    let test = thread::current().name().unwrap_or("?").to_owned();
    let failed = Mutex::new(Vec::new());
    let run = |backend: &Backend| {
        if let Some(reason) = backend.refusal() {
            skipped(&test, &reason);
        } else if panic::catch_unwind(AssertUnwindSafe(|| body(backend))).is_err() {
            failed.lock().unwrap().push(backend.to_string());
        }
    };
    for some in backends().chunks(AT_ONCE) {
        thread::scope(|scope| {
            for backend in some {
                let thread = thread::Builder::new().name(format!("{test} with {backend}"));
                thread.spawn_scoped(scope, || run(backend)).expect("a thread");
            }
        });
    }
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "failed with {}", failed.join(" and with "));
}

/// Says that a test did not run, past the capture of the test harness.
pub fn skipped(test: &str, reason: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED {test}: {reason}");
}

/// `URINGD_TEST_BACKENDS`: words of `uring`, `epoll`, `uring:MASK` (MASK as in `URINGD_IO_MASK`) or `all`.
fn backends() -> Vec<Backend> {
    let masked = |mask: &str| Backend { name: format!("uring:{mask}"), flag: "uring", mask: Some(mask.to_owned()) };
    let plain = |flag: &'static str| Backend { name: flag.to_owned(), flag, mask: None };
    let chosen = env::var("URINGD_TEST_BACKENDS").unwrap_or_else(|_| "uring epoll".to_owned());
    let mut backends = Vec::new();
    for word in chosen.split_whitespace() {
        match word.split_once(':') {
            None if word == "uring" => backends.push(plain("uring")),
            None if word == "epoll" => backends.push(plain("epoll")),
            None if word == "all" => {
                backends.extend([plain("uring"), plain("epoll")]);
                backends.extend(TIERS.map(masked));
            }
            Some(("uring", mask)) => backends.push(masked(mask)),
            _ => panic!("URINGD_TEST_BACKENDS: {word:?} is not uring, epoll, uring:MASK or all"),
        }
    }
    backends
}

impl Backend {
    /// Starts a server and waits until it accepts. Options that the test does not set: a free port of
    /// loopback, one core, a short drain.
    pub fn serve(&self, target: &str, options: &[&str]) -> Server {
        Server::start(self.command(target, options)).unwrap_or_else(|end| panic!("uringd did not start: {end}"))
    }

    /// The command line that [`Backend::serve`] runs, for tests that change it or expect it to fail.
    pub fn command(&self, target: &str, options: &[&str]) -> Command {
        let mut command = uringd();
        command.args(["--backend", self.flag]);
        if let Some(mask) = &self.mask {
            command.env("URINGD_IO_MASK", mask);
        }
        // One core each, in turn, so that tests that run at the same time do not share it.
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let cpus = allowed_cpus();
        let cpu = cpus[STARTED.fetch_add(1, Ordering::Relaxed) % cpus.len()];
        let core = format!("{cpu}-{cpu}");
        for (name, value) in [("--bind", "127.0.0.1:0"), ("--cores", &core), ("--graceful-timeout", "5")] {
            if !options.contains(&name) {
                command.args([name, value]);
            }
        }
        command.args(options).arg(target);
        command
    }

    /// Why this machine cannot run the backend; asked once, by starting a server.
    fn refusal(&self) -> Option<String> {
        static KNOWN: OnceLock<Mutex<HashMap<String, Option<String>>>> = OnceLock::new();
        let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap();
        known.entry(self.name.clone()).or_insert_with(|| self.find_refusal()).clone()
    }

    fn find_refusal(&self) -> Option<String> {
        match Server::start(self.command("builtin:hello", &[])) {
            Err(end) if end.status.code() == Some(1) && end.stderr.contains("io_uring") => Some(end.stderr.trim().to_owned()),
            // Any other failure is the test's to report.
            Ok(mut server) => {
                server.kill();
                None
            }
            Err(_) => None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The bare binary, in an empty directory and with none of the environment that it reads.
pub fn uringd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
    command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("URINGD_") || ["PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"].contains(&&*name) {
            command.env_remove(name);
        }
    }
    // SAFETY: prctl(2) is async-signal-safe. A server must not outlive the test that started it.
    unsafe { command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(drop)) };
    command
}

/// Runs a command that is expected to end by itself, and returns how it did.
pub fn run(mut command: Command) -> Ended {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("uringd can be run");
    let mut process = Process { child };
    let (mut stdout, mut stderr) = (process.child.stdout.take().unwrap(), process.child.stderr.take().unwrap());
    let stdout = thread::spawn(move || read_all(&mut stdout));
    let stderr = thread::spawn(move || read_all(&mut stderr));
    let status = process.wait(PATIENCE).unwrap_or_else(|| {
        process.kill();
        panic!("{command:?} was still running after {PATIENCE:?}")
    });
    Ended { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn read_all(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A process that is over.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nstdout: {}\nstderr: {}", self.status, self.stdout, self.stderr)
    }
}

// ---------------------------------------------------------------------------------- server

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A running uringd. Dropped, it is drained and must end with 0.
pub struct Server {
    process: Process,
    /// From the start-up line, in its order.
    pub addresses: Vec<Address>,
    pub log: Log,
    expected_to_end: bool,
}

impl Server {
    /// Runs `command` and waits for its start-up line.
    pub fn start(mut command: Command) -> Result<Server, Ended> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("uringd can be run");
        let mut process = Process { child };
        let log = Log::follow(process.child.stderr.take().unwrap());
        let Some(ready) = log.wait_for(|line| line.contains(" ready: ")) else {
            let Some(status) = process.wait(PATIENCE) else {
                process.kill();
                panic!("no start-up line after {PATIENCE:?}; the log: {}", log.text());
            };
            return Err(Ended { status, stdout: String::new(), stderr: log.text() });
        };
        Ok(Server { process, addresses: addresses_in(&ready), log, expected_to_end: false })
    }

    /// The first TCP address.
    pub fn address(&self) -> SocketAddr {
        let tcp = |address: &Address| if let Address::Tcp(tcp) = address { Some(*tcp) } else { None };
        self.addresses.iter().find_map(tcp).unwrap_or_else(|| panic!("no TCP address in {}", self.log.text()))
    }

    pub fn connect(&self) -> Client {
        Client::connect(&Address::Tcp(self.address()))
    }

    /// Sends one request on a connection of its own and returns the answer.
    pub fn ask(&self, request: impl AsRef<[u8]>) -> Response {
        self.connect().ask(request)
    }

    /// Returns once the shard has looked at everything that reached it before: a request that it
    /// refuses itself, without the pool, has been answered.
    pub fn settle(&self) {
        assert_eq!(self.ask("?\r\n\r\n").status, 400);
    }

    /// The server still does its work.
    pub fn expect_alive(&self) {
        assert_eq!(self.ask(get("/alive")).status, 200, "{}", self.log.text());
    }

    pub fn pid(&self) -> i32 {
        self.process.child.id().cast_signed()
    }

    pub fn signal(&mut self, signal: i32) {
        self.process.signal(signal);
        self.expected_to_end = true;
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.expected_to_end = true;
        let status = self.process.wait(PATIENCE);
        status.unwrap_or_else(|| panic!("still running after {PATIENCE:?}; the log: {}", self.log.text()))
    }

    /// TERM, and the exit status.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(libc::SIGTERM);
        self.wait().code()
    }

    /// KILL: for servers whose end is of no interest.
    pub fn kill(&mut self) {
        self.expected_to_end = true;
        self.process.kill();
    }

    /// Most memory that was ever resident, in bytes.
    pub fn peak_resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Time on a CPU so far, of all threads, in user and kernel.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1;
        let ticks: Vec<u64> = after_name.split_whitespace().skip(11).take(2).map(|n| n.parse().unwrap()).collect();
        // SAFETY: sysconf(3) takes an integer.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.cast_unsigned();
        Duration::from_millis((ticks[0] + ticks[1]) * 1000 / per_second)
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// How often handler threads went to sleep so far, waiting for a request or within `builtin:sleep`.
    /// `None`: one of them is awake.
    pub fn handler_sleeps(&self) -> Option<u64> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let status = |task: io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("status")).ok();
        let handlers = tasks.filter_map(status).filter(|status| status.starts_with("Name:\thandler"));
        let sleeps = |status: String| {
            let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
            let count = value("voluntary_ctxt_switches:")?.parse::<u64>().ok();
            count.filter(|_| value("State:").is_some_and(|state| state.starts_with('S')))
        };
        handlers.map(sleeps).sum()
    }

    /// Name and allowed CPUs (as in `0,2-3`) of every thread.
    pub fn threads(&self) -> Vec<(String, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let thread = |task: io::Result<fs::DirEntry>| {
            let path = task.unwrap().path();
            let status = fs::read_to_string(path.join("status")).ok()?;
            let value = |key: &str| Some(status.lines().find_map(|line| line.strip_prefix(key))?.trim().to_owned());
            Some((value("Name:")?, value("Cpus_allowed_list:")?))
        };
        tasks.filter_map(thread).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.process.wait(Duration::ZERO).is_some() || thread::panicking() {
            self.process.kill();
            if thread::panicking() {
                eprintln!("--- the end of uringd's log:\n{}---", self.log.tail());
            }
            assert!(self.expected_to_end || thread::panicking(), "uringd ended by itself: {}", self.log.text());
            return;
        }
        let code = self.stop();
        assert_eq!(code, Some(0), "exit status after TERM; the log: {}", self.log.text());
        assert!(!self.log.text().contains("panicked at"), "{}", self.log.text());
    }
}

/// The addresses in a start-up line: `uringd 0.1.0 ready: http://127.0.0.1:8000, 2 cores (0-1), ...`.
fn addresses_in(line: &str) -> Vec<Address> {
    let words = line.split(" ready: ").nth(1).unwrap_or("").split([' ', ',']);
    let address = |word: &str| match word.strip_prefix("http://") {
        Some(tcp) => Some(Address::Tcp(tcp.trim_end_matches('/').parse().ok()?)),
        None => Some(Address::Unix(PathBuf::from(word.strip_prefix("unix:")?))),
    };
    words.filter_map(address).collect()
}

/// A child that does not outlive its owner.
struct Process {
    child: Child,
}

impl Process {
    /// `None`: still running.
    fn wait(&mut self, within: Duration) -> Option<ExitStatus> {
        let mut status = None;
        wait_until(within, || {
            status = self.child.try_wait().expect("waitpid");
            status.is_some()
        });
        status
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill(2) takes two integers; the child was not waited for yet, so the number is still its own.
        check(unsafe { libc::kill(self.child.id().cast_signed(), signal) }).expect("kill");
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a server wrote to standard error, line by line.
#[derive(Clone)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn follow(stderr: impl Read + Send + 'static) -> Log {
        let log = Log(Arc::default());
        let writer = log.clone();
        thread::spawn(move || {
            let (lines, changed) = &*writer.0;
            for line in BufReader::new(stderr).lines() {
                let Ok(line) = line else { break };
                lines.lock().unwrap().lines.push(line);
                changed.notify_all();
            }
            lines.lock().unwrap().ended = true;
            changed.notify_all();
        });
        log
    }

    /// The first line that `wanted` accepts. `None`: the process ended, or patience did.
    pub fn wait_for(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let (lines, changed) = &*self.0;
        let missing = |lines: &mut Lines| !lines.ended && !lines.lines.iter().any(|line| wanted(line));
        let (lines, _) = changed.wait_timeout_while(lines.lock().unwrap(), PATIENCE, missing).unwrap();
        lines.lines.iter().find(|line| wanted(line)).cloned()
    }

    /// The last lines; a refusal each, there can be many.
    fn tail(&self) -> String {
        let text = self.text();
        let skipped = text.lines().count().saturating_sub(12);
        text.lines().skip(skipped).map(|line| line.to_owned() + "\n").collect()
    }

    pub fn text(&self) -> String {
        self.0.0.lock().unwrap().lines.iter().map(|line| line.clone() + "\n").collect()
    }
}

// ---------------------------------------------------------------------------------- client

/// A connection to a server, in raw bytes.
pub struct Client {
    /// A socket; read(2) and write(2) are all that is needed of it.
    socket: File,
    /// Received and not yet looked at.
    received: Vec<u8>,
}

/// How a connection stands when nothing more of an answer is expected.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The server closed it in order (FIN).
    Eof,
    /// The server broke it off (RST).
    Reset,
    /// It is open, and nothing came within the time.
    Open,
    /// There was more to read.
    More(String),
}

impl Client {
    pub fn connect(address: &Address) -> Client {
        Client::try_connect(address).unwrap_or_else(|error| panic!("connecting to {address:?}: {error}"))
    }

    pub fn try_connect(address: &Address) -> io::Result<Client> {
        let socket = match address {
            Address::Tcp(tcp) => {
                let stream = TcpStream::connect_timeout(tcp, PATIENCE)?;
                stream.set_nodelay(true)?;
                OwnedFd::from(stream)
            }
            Address::Unix(path) => OwnedFd::from(UnixStream::connect(path)?),
        };
        let client = Client { socket: File::from(socket), received: Vec::new() };
        let patience = libc::timeval { tv_sec: PATIENCE.as_secs().cast_signed(), tv_usec: 0 };
        client.set_option(libc::SO_SNDTIMEO, patience);
        client.set_option(libc::SO_RCVTIMEO, patience);
        Ok(client)
    }

    /// Sends all of `bytes`.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("sending to the server");
    }

    /// Sends as much of `bytes` as the server lets it.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.socket.write_all(bytes.as_ref())
    }

    /// Sends as many of the bytes as fit at the moment; how many those were.
    pub fn send_what_fits(&mut self, bytes: &[u8]) -> usize {
        // SAFETY: the slice is readable for its length, and the descriptor is open.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
        match usize::try_from(sent) {
            Ok(sent) => sent,
            Err(_) if io::Error::last_os_error().kind() == ErrorKind::WouldBlock => 0,
            Err(_) => panic!("sending to the server: {}", io::Error::last_os_error()),
        }
    }

    /// Sends `bytes` one by one.
    pub fn send_byte_by_byte(&mut self, bytes: impl AsRef<[u8]>) {
        self.send_pieces(bytes.as_ref().chunks(1));
    }

    /// Sends `bytes` cut at random places.
    pub fn send_split(&mut self, bytes: impl AsRef<[u8]>, random: &mut Random) {
        self.send_pieces(random.pieces(bytes.as_ref(), 6).into_iter());
    }

    /// Sends each piece on its own, with a moment between them so that the kernel does not join them.
    pub fn send_pieces<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) {
        for piece in pieces {
            self.send(piece);
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sends a request and reads its answer.
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Response {
        let head_only = request.as_ref().starts_with(b"HEAD ");
        self.send(request);
        if head_only { self.read_response_to_head() } else { self.read_response() }
    }

    /// Reads the next response, an interim one too.
    pub fn read_response(&mut self) -> Response {
        self.read_message(false)
    }

    /// Reads the response to a HEAD request: its fields speak of a body that is not there.
    pub fn read_response_to_head(&mut self) -> Response {
        self.read_message(true)
    }

    fn read_message(&mut self, to_head: bool) -> Response {
        let head_length = loop {
            if let Some(end) = find(&self.received, b"\r\n\r\n") {
                break end + 4;
            }
            self.receive("the head of a response");
        };
        let head = text(&self.received.drain(..head_length).collect::<Vec<_>>());
        let mut response = Response::parse(&head);
        response.body = match response.framing(to_head) {
            Framing::None => Vec::new(),
            Framing::Length(length) => self.read_exactly(length),
            Framing::Chunked => self.read_chunks(),
            Framing::Close => {
                while self.fill().expect("reading a body that the server ends by closing") > 0 {}
                std::mem::take(&mut self.received)
            }
        };
        response
    }

    pub fn read_exactly(&mut self, length: usize) -> Vec<u8> {
        while self.received.len() < length {
            self.receive("a body");
        }
        self.received.drain(..length).collect()
    }

    fn read_chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = self.read_line();
            let size = usize::from_str_radix(line.trim_end(), 16).unwrap_or_else(|_| panic!("chunk size {line:?}"));
            body.extend(self.read_exactly(size));
            assert_eq!(self.read_exactly(2), b"\r\n", "after a chunk, or instead of a trailer");
            if size == 0 {
                return body;
            }
        }
    }

    fn read_line(&mut self) -> String {
        loop {
            if let Some(end) = find(&self.received, b"\r\n") {
                return text(&self.received.drain(..end + 2).collect::<Vec<_>>());
            }
            self.receive("a line");
        }
    }

    /// Receives once; there must be something.
    fn receive(&mut self, part: &str) {
        let so_far = |client: &Client| text(&client.received[..client.received.len().min(200)]);
        match self.fill() {
            Ok(0) => panic!("the server closed before {part} was complete; it sent {:?}", so_far(self)),
            Ok(_) => {}
            Err(error) => panic!("waiting for {part}: {error}; the server sent {:?}", so_far(self)),
        }
    }

    /// Appends what there is to `received`; 0 is the end of the stream.
    fn fill(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 65536];
        let length = loop {
            match self.socket.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => break done?,
            }
        };
        self.received.extend_from_slice(&bytes[..length]);
        Ok(length)
    }

    /// Bytes that come until the connection ends, and how it ends.
    pub fn read_to_end(&mut self) -> (Vec<u8>, End) {
        loop {
            match self.fill() {
                Ok(0) => return (std::mem::take(&mut self.received), End::Eof),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return (std::mem::take(&mut self.received), End::Reset);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return (std::mem::take(&mut self.received), End::Open);
                }
                Err(error) => panic!("reading to the end: {error}"),
            }
        }
    }

    /// How the connection stands after at most `within`.
    pub fn end_within(&mut self, within: Duration) -> End {
        if self.received.is_empty() {
            if !self.readable(within) {
                return End::Open;
            }
            match self.fill() {
                Ok(0) => return End::Eof,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return End::Reset,
                Err(error) => panic!("waiting for the end: {error}"),
            }
        }
        End::More(text(&std::mem::take(&mut self.received)))
    }

    /// The server closes in order, with nothing more said.
    pub fn expect_eof(&mut self) {
        assert_eq!(self.end_within(PATIENCE), End::Eof);
    }

    /// The server closes, in order or not, with nothing more said.
    pub fn expect_closed(&mut self) {
        let end = self.end_within(PATIENCE);
        assert!(end == End::Eof || end == End::Reset, "{end:?}");
    }

    /// The connection is open and there is nothing to read.
    pub fn expect_quiet(&mut self) {
        assert_eq!(self.end_within(Duration::ZERO), End::Open);
    }

    /// The connection serves a further request.
    pub fn expect_kept(&mut self) {
        assert_eq!(self.ask(get("/again")).status, 200);
    }

    /// Waits until there is something to read, be it the end.
    pub fn readable(&self, within: Duration) -> bool {
        self.poll(libc::POLLIN, within) != 0
    }

    /// Waits a while until something can be sent.
    pub fn writable(&self, within: Duration) -> bool {
        self.poll(libc::POLLOUT, within) != 0
    }

    /// Waits until the connection was reset, without reading from it.
    pub fn broken_off(&self, within: Duration) -> bool {
        self.poll(0, within) & libc::POLLERR != 0
    }

    fn poll(&self, events: i16, within: Duration) -> i16 {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd, which outlives the call.
        check(unsafe { libc::poll(&raw mut poll, 1, i32::try_from(within.as_millis()).unwrap()) }).expect("poll");
        poll.revents
    }

    /// Closes the sending direction (FIN).
    pub fn finish_sending(&self) {
        // SAFETY: shutdown(2) takes two integers.
        check(unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_WR) }).expect("shutdown");
    }

    /// Breaks the connection off (RST).
    pub fn reset(self) {
        self.set_option(libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 });
    }

    fn set_option<T>(&self, option: i32, value: T) {
        let length = libc::socklen_t::try_from(size_of::<T>()).unwrap();
        // SAFETY: `value` is readable for its size.
        let done = unsafe { libc::setsockopt(self.socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), length) };
        check(done).expect("setsockopt");
    }
}

// ---------------------------------------------------------------------------------- responses

/// One response, taken apart and checked for what every response must keep to.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub reason: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// How a response's body ends (RFC 9112 section 6.3).
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    None,
    Length(usize),
    Chunked,
    Close,
}

impl Response {
    fn parse(head: &str) -> Response {
        let mut lines = head.strip_suffix("\r\n\r\n").expect("a head").split("\r\n");
        let status_line = lines.next().unwrap();
        let mut words = status_line.splitn(3, ' ');
        let (version, status) = (words.next().unwrap(), words.next().unwrap_or(""));
        let reason = words.next().unwrap_or_else(|| panic!("status line {status_line:?}"));
        assert!(version == "HTTP/1.1" || version == "HTTP/1.0", "status line {status_line:?}");
        assert!(status.len() == 3, "status line {status_line:?}");
        let field = |line: &str| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("field line {line:?}"));
            assert!(!name.is_empty() && !name.contains([' ', '\t']), "field line {line:?}");
            (name.to_owned(), value.trim_matches([' ', '\t']).to_owned())
        };
        let response = Response {
            status: status.parse().unwrap_or_else(|_| panic!("status line {status_line:?}")),
            reason: reason.to_owned(),
            fields: lines.map(field).collect(),
            body: Vec::new(),
        };
        response.check_fields(head);
        response
    }

    /// What a client could misread.
    fn check_fields(&self, head: &str) {
        let (lengths, codings) = (self.all("content-length").len(), self.all("transfer-encoding").len());
        assert!(lengths + codings <= 1, "more than one framing: {head:?}");
        if self.status < 200 || self.status == 204 {
            assert_eq!(lengths + codings, 0, "a framing where there is no body: {head:?}");
        }
        for single in ["date", "server", "content-type", "connection"] {
            assert!(self.all(single).len() <= 1, "several {single} fields: {head:?}");
        }
        assert!(self.status < 200 || self.field("date").is_some(), "no Date: {head:?}");
    }

    fn framing(&self, to_head: bool) -> Framing {
        if to_head || self.status < 200 || self.status == 204 || self.status == 304 {
            Framing::None
        } else if self.field("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            Framing::Chunked
        } else if let Some(length) = self.field("content-length") {
            Framing::Length(length.parse().unwrap_or_else(|_| panic!("Content-Length: {length:?}")))
        } else {
            Framing::Close
        }
    }

    /// The value of the first field of this name, whatever its case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        let named = self.fields.iter().filter(|field| field.0.eq_ignore_ascii_case(name));
        named.map(|field| field.1.as_str()).collect()
    }

    /// It says that the connection closes after it.
    pub fn says_close(&self) -> bool {
        self.connection_option("close")
    }

    pub fn connection_option(&self, option: &str) -> bool {
        self.field("connection").is_some_and(|list| list.split(',').any(|o| o.trim().eq_ignore_ascii_case(option)))
    }

    pub fn text(&self) -> String {
        text(&self.body)
    }

    /// The body of `builtin:echo`.
    pub fn echo(&self) -> Echo {
        assert_eq!(self.status, 200, "{self:?}");
        Echo(serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text())))
    }
}

/// What `builtin:echo` says about the request it was given.
#[derive(Debug)]
pub struct Echo(serde_json::Value);

impl Echo {
    /// `method`, `target`, `path`, `query`, `version`, `body` or `remote`.
    pub fn is(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_else(|| panic!("no text {key:?} in {}", self.0))
    }

    /// Name and value of every field, in order.
    pub fn fields(&self) -> Vec<(String, String)> {
        serde_json::from_value(self.0["headers"].clone()).expect("headers are pairs of texts")
    }

    pub fn field(&self, name: &str) -> Option<String> {
        self.fields().into_iter().find(|field| field.0 == name).map(|field| field.1)
    }
}

// ---------------------------------------------------------------------------------- requests

/// A GET request without anything special.
pub fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: test\r\n\r\n")
}

/// A POST request with a Content-Length.
pub fn post(target: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!("POST {target} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// The head of a POST request with a chunked body.
pub const CHUNKED: &str = "POST /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n";

// ---------------------------------------------------------------------------------- small things

/// A fixed sequence of numbers per seed (SplitMix64). When the test fails, it says how to repeat it.
pub struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    /// Seeded by `URINGD_TEST_SEED`, else by the clock.
    pub fn new() -> Random {
        let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs() ^ u64::from(time.subsec_nanos()));
        let seed = env::var("URINGD_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(now);
        Random { seed, state: seed }
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(bound).unwrap()).unwrap()
    }

    /// Cuts `bytes` into at most `count` pieces, none empty.
    pub fn pieces<'a>(&mut self, bytes: &'a [u8], count: usize) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = (1..count).map(|_| self.below(bytes.len().max(1))).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect()
    }
}

impl Drop for Random {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- repeat with URINGD_TEST_SEED={}", self.seed);
        }
    }
}

/// Waits for a condition, for [`PATIENCE`] at most.
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    assert!(wait_until(PATIENCE, condition), "not within {PATIENCE:?}: {what}");
}

fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A directory of its own for a test, removed at the end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        // Not below the target directory: a unix socket's path may have 107 bytes only.
        let name = format!("uringd-it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).expect("a directory for the test");
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// CPUs that this process, and so a server it starts, may run on.
pub fn allowed_cpus() -> Vec<usize> {
    let mut set = std::mem::MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the set is as large as is said.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) }).expect("affinity");
    // SAFETY: all zero bits are an empty set, and the call above filled it.
    let set = unsafe { set.assume_init() };
    // SAFETY: the numbers are below the size of the set.
    (0..libc::CPU_SETSIZE.cast_unsigned() as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect()
}

/// Each byte as one character, as the cases and `builtin:echo` write them.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

pub fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Turns -1 of a system call into its error.
pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
