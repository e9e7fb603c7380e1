//! What a request and a connection cost, counted and not timed: heap allocations of the ring thread, entries
//! into the kernel, memory of an idle connection.
//!
//! The counts are exact, so these tests hold on a busy machine too. The first ones run the server inside the
//! test, under an allocator that counts; the memory of a connection is measured on the real binary.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uringd::{
    Config, Error, Handler, Request, Response, Running, Runs, Server,
    builtin::Builtin,
    config::{Backend, Cores, Timeouts},
    stats::Stats,
};

const WARM_UP: usize = 200;
const REQUESTS: usize = 10_000;
const REQUEST: &[u8] = b"GET /some/path?with=query HTTP/1.1\r\nHost: localhost\r\nUser-Agent: counting\r\nAccept: */*\r\n\r\n";
/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

/// What a connection that waits for its next request may take, in user memory; and how many of them are measured.
const IDLE_BYTES_MAX: u64 = 1024;
const IDLE_CONNECTIONS: usize = 10_000;

// ---------------------------------------------------------------------------------- allocations

/// The system's allocator, and one more on the count of the thread that asks.
struct Counting;

thread_local! {
    /// Where this thread's allocations are counted, if anywhere. Without a destructor and ready from the start, so
    /// that looking at it never allocates.
    static COUNT: Cell<Option<&'static AtomicU64>> = const { Cell::new(None) };
}

fn count_one() {
    if let Ok(Some(count)) = COUNT.try_with(Cell::get) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    /// # Safety
    /// As for [`System`].
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_one();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    /// # Safety
    /// As for [`System`].
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_one();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    /// # Safety
    /// As for [`System`].
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_one();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    /// # Safety
    /// As for [`System`].
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A handler whose ring thread's allocations are counted: [`Handler::runs`] is always asked on that thread, and
/// tells the allocator.
struct Watched<H> {
    handler: H,
    count: &'static AtomicU64,
    /// While somebody holds it, the ring thread stands still at the next request.
    gate: Arc<Mutex<()>>,
}

impl<H: Handler> Handler for Watched<H> {
    fn runs(&self, request: &Request<'_>) -> Runs {
        COUNT.set(Some(self.count));
        drop(self.gate.lock());
        self.handler.runs(request)
    }

    fn handle(&self, request: &Request<'_>) -> Response {
        self.handler.handle(request)
    }
}

/// What the ring thread of a new server allocates while it answers [`REQUESTS`] requests, `depth` of them at once on
/// each of `connections`, after [`WARM_UP`] of them.
fn allocations(backend: Backend, handler: impl Handler, connections: usize, depth: usize) -> uringd::Result<u64> {
    let served = Served::start(backend, handler)?;
    let mut clients: Vec<Client> = (0..connections).map(|_| served.connect()).collect();
    let rounds = |requests: usize| requests.div_ceil(connections * depth);
    exchange(&mut clients, depth, rounds(WARM_UP));
    // The most that can come in one turn comes once: the ring thread stands still at a stranger's request until
    // every connection has sent its own.
    let mut stranger = served.connect();
    let gate = served.gate.lock();
    stranger.send(1);
    thread::sleep(Duration::from_millis(100));
    clients.iter_mut().for_each(|client| client.send(depth));
    thread::sleep(Duration::from_millis(100));
    drop(gate);
    stranger.receive(1);
    clients.iter_mut().for_each(|client| client.receive(depth));

    let before = served.count.load(Ordering::Relaxed);
    exchange(&mut clients, depth, rounds(REQUESTS / 2));
    // The date in the answers is made anew once a second; that belongs to the cost of a request.
    thread::sleep(Duration::from_millis(1_100));
    exchange(&mut clients, depth, rounds(REQUESTS / 2));
    let counted = served.count.load(Ordering::Relaxed) - before;
    served.stop();
    Ok(counted)
}

#[test]
fn a_keep_alive_request_allocates_nothing() {
    for_each_backend("a_keep_alive_request_allocates_nothing", |backend| {
        for connections in [1, 64] {
            let counted = allocations(backend, Builtin::Hello, connections, 1)?;
            assert_eq!(counted, 0, "{backend:?}, {connections} connections");
        }
        Ok(())
    });
}

#[test]
fn pipelined_requests_allocate_nothing() {
    for_each_backend("pipelined_requests_allocate_nothing", |backend| {
        for connections in [1, 16] {
            let counted = allocations(backend, Builtin::Hello, connections, 16)?;
            assert_eq!(counted, 0, "{backend:?}, {connections} connections, 16 requests deep");
        }
        Ok(())
    });
}

/// The count works: the same measurement sees the one allocation of a handler that makes its text.
#[test]
fn an_allocation_per_request_would_be_seen() {
    struct Formats;
    impl Handler for Formats {
        fn runs(&self, _request: &Request<'_>) -> Runs {
            Runs::Inline
        }
        fn handle(&self, request: &Request<'_>) -> Response {
            Response::text(request.path().to_owned())
        }
    }
    for_each_backend("an_allocation_per_request_would_be_seen", |backend| {
        assert_eq!(allocations(backend, Formats, 1, 1)?, REQUESTS as u64, "{backend:?}");
        Ok(())
    });
}

// ---------------------------------------------------------------------------------- entries into the kernel

/// Requests, turns of the loop and entries into the kernel, from here to the end of the server.
fn turns_and_enters(served: Served, load: impl FnOnce(&Served)) -> (u64, u64, u64) {
    let stats = served.stats.clone();
    // A round trip, so that the counters have caught up with the start.
    exchange(&mut [served.connect()], 1, 10);
    let read = |stats: &Stats| (stats.requests.read(), stats.turns.read(), stats.enters.read());
    let before = read(&stats);
    load(&served);
    served.stop();
    let after = read(&stats);
    (after.0 - before.0, after.1 - before.1, after.2 - before.2)
}

#[test]
fn a_turn_of_the_loop_enters_the_kernel_at_most_once() {
    for_each_backend("a_turn_of_the_loop_enters_the_kernel_at_most_once", |backend| {
        for builtin in [Builtin::Hello, Builtin::HelloPool] {
            for (connections, depth) in [(1, 1), (64, 1), (1, 16), (64, 16)] {
                let served = Served::start(backend, builtin)?;
                let (requests, turns, enters) = turns_and_enters(served, |served| {
                    let mut clients: Vec<Client> = (0..connections).map(|_| served.connect()).collect();
                    exchange(&mut clients, depth, REQUESTS / (connections * depth));
                });
                let load = format!("{backend:?}, {}, {connections} connections, {depth} deep", builtin.name());
                assert!(enters > 0, "{load}: the counter stands still");
                assert!(enters <= turns, "{load}: {enters} enters in {turns} turns for {requests} requests");
            }
        }
        Ok(())
    });
}

/// Alone, a request costs the ring two enters: one sends the answer and comes back with the word that it is sent,
/// the other waits for the next request. In company they are shared, by all connections that are ready.
#[test]
fn requests_of_many_connections_share_their_enters() {
    /// Connecting, and the end of the server.
    const OTHER_ENTERS: u64 = 200;
    for_each_backend("requests_of_many_connections_share_their_enters", |backend| {
        let enters_per = |connections: usize| -> uringd::Result<(u64, u64)> {
            let (requests, _, enters) = turns_and_enters(Served::start(backend, Builtin::Hello)?, |served| {
                let mut clients: Vec<Client> = (0..connections).map(|_| served.connect()).collect();
                exchange(&mut clients, 1, REQUESTS / connections);
            });
            Ok((requests, enters))
        };
        let (requests, enters) = enters_per(1)?;
        assert!(enters <= 2 * requests + OTHER_ENTERS, "{backend:?}: {enters} enters for {requests} requests of one connection");
        let (requests, enters) = enters_per(64)?;
        assert!(enters <= requests, "{backend:?}: {enters} enters for {requests} requests of 64 connections");
        Ok(())
    });
}

// ---------------------------------------------------------------------------------- memory

#[test]
fn an_idle_connection_takes_at_most_a_kibibyte() {
    const NAME: &str = "an_idle_connection_takes_at_most_a_kibibyte";
    let wanted = IDLE_CONNECTIONS as u64 + 256;
    if let Err(why) = allow_descriptors(wanted) {
        return skipped(NAME, &why);
    }
    for backend in ["uring", "epoll"] {
        let server = match Process::start(backend) {
            Ok(server) => server,
            Err(said) if said.contains("io_uring") => {
                skipped(NAME, said.trim());
                continue;
            }
            Err(said) => panic!("uringd did not start: {said}"),
        };
        // What a shard has once and for all, whatever the number of its connections, is there before: each of its
        // receive buffers has been written to.
        exchange(&mut [Client::connect(server.address)], 1, 4_096);
        let before = server.resident_bytes();
        let clients: Vec<Client> = (0..IDLE_CONNECTIONS)
            .map(|_| {
                let mut client = Client::connect(server.address);
                client.exchange(1);
                client
            })
            .collect();
        let after = server.resident_bytes();
        assert!(server.descriptors_of_sockets() > IDLE_CONNECTIONS, "some of them were closed");
        let each = after.saturating_sub(before) / IDLE_CONNECTIONS as u64;
        say(&format!("{backend}: {each} bytes for each of {IDLE_CONNECTIONS} idle connections ({before} before, {after} after)"));
        assert!(each <= IDLE_BYTES_MAX, "{backend}: {each} bytes for each idle connection");
        clients.into_iter().for_each(Client::reset);
    }
}

// ---------------------------------------------------------------------------------- servers

/// A server in this process, on one core.
struct Served {
    running: Running,
    stats: Arc<Stats>,
    count: &'static AtomicU64,
    gate: Arc<Mutex<()>>,
    address: SocketAddr,
}

impl Served {
    fn start(backend: Backend, handler: impl Handler) -> uringd::Result<Served> {
        let count: &'static AtomicU64 = Box::leak(Box::default());
        let gate = Arc::<Mutex<()>>::default();
        let watched = Watched { handler, count, gate: gate.clone() };
        // No connection is looked at for its deadline while it is measured.
        let timeouts = Timeouts { head: HOUR, keep_alive: HOUR, ..Timeouts::default() };
        let config = Config { backend, cores: Cores::Count(1), timeouts, ..Config::default() };
        let running = Server::with_handler(watched).config(config).bind("127.0.0.1:0").start()?;
        let address = address_in(&running.addresses()[0]);
        Ok(Served { stats: running.stats()[0].clone(), running, count, gate, address })
    }

    fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    fn stop(self) {
        self.running.stop();
        self.running.wait().expect("nothing was left unanswered");
    }
}

/// Runs `body` with each backend; one that this machine refuses is skipped, with a line that says so.
fn for_each_backend(test: &str, body: impl Fn(Backend) -> uringd::Result<()>) {
    for backend in [Backend::Uring, Backend::Epoll] {
        match body(backend) {
            Ok(()) => {}
            Err(error @ Error::NoUring(_)) => skipped(test, &error.to_string()),
            Err(error) => panic!("{backend:?}: {error}"),
        }
    }
}

/// The real binary, on one core.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    /// The error is what the program said instead of starting.
    fn start(backend: &str) -> Result<Process, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("URINGD_")) {
            command.env_remove(name);
        }
        command.args(["--backend", backend, "--bind", "127.0.0.1:0", "--cores", "1", "--keep-alive", "3600", "builtin:hello"]);
        command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("uringd can be run");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let mut said = String::new();
        let ready = lines.by_ref().find_map(|line| {
            said = said.clone() + &line + "\n";
            line.split_once(" ready: ").map(|(_, rest)| rest.to_owned())
        });
        match ready {
            Some(rest) => {
                // So that the server never has to wait for somebody to read.
                thread::spawn(move || lines.for_each(drop));
                Ok(Process { child, address: address_in(rest.split([',', ' ']).next().unwrap_or_default()) })
            }
            None => {
                let _ = child.wait();
                Err(said)
            }
        }
    }

    /// Memory that is resident, of every kind (proc_pid_status(5), VmRSS).
    fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the server runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
    }

    fn descriptors_of_sockets(&self) -> usize {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("the server runs");
        let is_socket = |path: &fs::DirEntry| fs::read_link(path.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        descriptors.filter_map(Result::ok).filter(is_socket).count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Raises RLIMIT_NOFILE to `wanted`, for this process and those that it starts.
fn allow_descriptors(wanted: u64) -> Result<(), String> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = limit.maximum.map(|maximum| maximum.max(wanted));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
        .map_err(|error| format!("RLIMIT_NOFILE cannot be raised to {wanted}: {error}"))
}

fn address_in(url: &str) -> SocketAddr {
    url.trim_start_matches("http://").parse().unwrap_or_else(|_| panic!("{url:?} is no address of TCP"))
}

// ---------------------------------------------------------------------------------- clients

/// A keep-alive connection that knows how long an answer is: all of them are equally long.
struct Client {
    stream: TcpStream,
    answer_bytes: usize,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("the server accepts");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Client { stream, answer_bytes: 0, buffer: Vec::new() }
    }

    fn send(&mut self, depth: usize) {
        self.stream.write_all(&REQUEST.repeat(depth)).expect("the server reads");
    }

    fn receive(&mut self, depth: usize) {
        if self.answer_bytes == 0 {
            self.measure();
            if depth > 1 {
                self.read(depth - 1);
            }
        } else {
            self.read(depth);
        }
    }

    /// Reads one answer byte by byte, to learn where it ends.
    fn measure(&mut self) {
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n\r\n") {
            self.stream.read_exact(&mut byte).expect("an answer");
            answer.push(byte[0]);
        }
        let head = String::from_utf8(answer).expect("a head is ASCII").to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200 "), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
        let length: usize = length.parse().expect("a number");
        self.stream.read_exact(&mut vec![0; length]).expect("a body");
        self.answer_bytes = head.len() + length;
    }

    fn read(&mut self, answers: usize) {
        self.buffer.resize(self.answer_bytes * answers, 0);
        self.stream.read_exact(&mut self.buffer).expect("answers");
        let statuses = self.buffer.chunks(self.answer_bytes).all(|answer| answer.starts_with(b"HTTP/1.1 200 "));
        assert!(statuses, "{}", String::from_utf8_lossy(&self.buffer));
    }

    fn exchange(&mut self, depth: usize) {
        self.send(depth);
        self.receive(depth);
    }

    /// Closes without leaving the port in TIME_WAIT.
    fn reset(self) {
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }
}

/// Every client sends `depth` requests, then each reads its answers; so often.
fn exchange(clients: &mut [Client], depth: usize, rounds: usize) {
    for _ in 0..rounds {
        clients.iter_mut().for_each(|client| client.send(depth));
        clients.iter_mut().for_each(|client| client.receive(depth));
    }
}

/// Past the capture of the test harness.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn skipped(test: &str, reason: &str) {
    say(&format!("SKIPPED {test}: {reason}"));
}
