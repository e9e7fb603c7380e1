//! The compact behaviour suite: what must hold on every kernel, tier and backend, in a few seconds.
//!
//! It serves and asks from one process, over loopback, so that it needs nothing but a kernel. `tests/tiers.rs` runs it for
//! every tier, and `examples/kernel_smoke.rs` on real kernels. Each case is a sentence and a function;
//! [`run`] calls them all and reports what became of each.
//!
//! Waiting is always for a condition and bounded by [`WAIT`], which is long: an emulated machine is slow.

use std::{
    any::Any,
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, SockRef, Socket, Type};
use uringd::{
    Body, Config, Handler, Request, Response, Running, Runs, Server,
    config::{Backend, Bind, Cores},
};

const WAIT: Duration = Duration::from_secs(60);

/// A case: a sentence about behaviour, and the function that shows it.
type Case = (&'static str, fn(&Bench));

const CASES: [Case; 11] = [
    ("a connection serves one request after the other", keep_alive),
    ("50 pipelined requests are answered in their order", pipelining),
    ("a chunked body arrives whole", chunked),
    ("a body of 300,000 bytes goes through a file", large_upload),
    ("a client that sends byte by byte is served and holds up nobody", slow_sender),
    ("a streamed answer of 3 MB reaches a slow reader whole", slow_reader),
    ("a file of 1 MB is sent whole", file),
    ("a client that shuts its sending side gets its answer", half_close),
    ("clients that reset in the middle leave nothing behind", resets),
    ("handlers that wait do not hold up the ring thread", pool),
    ("200 clients at once are all served", many),
];

/// What a case works with: one shard with two handler threads.
pub struct Bench {
    address: SocketAddr,
    running: Running,
}

/// Takes note of a case: its sentence, and why it failed.
pub type Report<'a> = &'a mut dyn FnMut(&'static str, Result<(), String>);

/// Runs every case, and at last the drain and the account of what is left. Each is reported as soon as it is over.
///
/// # Errors
/// The server could not be started at all.
pub fn run(backend: Backend, report: Report<'_>) -> uringd::Result<()> {
    let mut config = Config { bind: vec![Bind::Tcp("127.0.0.1:0".to_owned())], cores: Cores::Count(1), backend, ..Config::default() };
    config.timeouts.linger = Duration::from_millis(300);
    let before = descriptors();
    let running = Server::with_handler(Application).config(config).start()?;
    let address = running.addresses()[0].strip_prefix("http://").and_then(|text| text.parse().ok()).expect("a TCP address");
    let bench = Bench { address, running };
    for (sentence, case) in CASES {
        report(sentence, attempt(|| case(&bench)));
    }
    report("a drain answers what was begun and leaves no descriptor", attempt(|| drain(bench, before)));
    Ok(())
}

fn attempt(case: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(case)).map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "a panic without a text".to_owned())
}

// ---------------------------------------------------------------------------------- the cases

fn keep_alive(bench: &Bench) {
    let mut client = bench.connect();
    for round in 0..20 {
        let path = ["/inline", "/pool"][round % 2];
        write!(client, "GET {path}?{round} HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        assert_eq!(client.answer(), (200, format!("{round}").into_bytes()));
    }
    write!(client, "GET /inline HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
    assert_eq!(client.answer().0, 200);
    client.expect_end();
}

fn pipelining(bench: &Bench) {
    let mut client = bench.connect();
    let request = |number: usize| {
        let path = if number.is_multiple_of(3) { "/pool" } else { "/inline" };
        format!("GET {path}?{number} HTTP/1.1\r\nHost: a\r\n\r\n")
    };
    client.write_all((0..50).map(request).collect::<String>().as_bytes()).expect("sent");
    for number in 0..50 {
        assert_eq!(client.answer(), (200, format!("{number}").into_bytes()));
    }
}

fn chunked(bench: &Bench) {
    let mut client = bench.connect();
    write!(client, "POST /sum HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").expect("sent");
    for size in [1usize, 10, 4_096, 50_000] {
        write!(client, "{size:x}\r\n").expect("sent");
        client.write_all(&vec![1; size]).expect("sent");
        client.write_all(b"\r\n").expect("sent");
    }
    client.write_all(b"0\r\n\r\n").expect("sent");
    assert_eq!(client.answer(), (200, b"54107 54107 memory".to_vec()));
}

fn large_upload(bench: &Bench) {
    let body: Vec<u8> = (0..300_000u32).map(|index| (index * 7) as u8).collect();
    let sum: u64 = body.iter().map(|byte| u64::from(*byte)).sum();
    let mut client = bench.connect();
    for _ in 0..2 {
        write!(client, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()).expect("sent");
        client.write_all(&body).expect("sent");
        assert_eq!(client.answer(), (200, format!("300000 {sum} file").into_bytes()));
    }
}

fn slow_sender(bench: &Bench) {
    let request = b"POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01";
    let mut slow = bench.connect();
    slow.stream.set_nodelay(true).expect("a socket");
    for (index, byte) in request.iter().enumerate() {
        slow.write_all(&[*byte]).expect("sent");
        thread::sleep(Duration::from_millis(1));
        if index % 20 == 0 {
            assert_eq!(bench.get("/pool?1"), b"1");
        }
    }
    assert_eq!(slow.answer(), (200, b"20 20 memory".to_vec()));
}

fn slow_reader(bench: &Bench) {
    const LENGTH: usize = 3_000_000;
    let mut slow = bench.connect_with(|socket| socket.set_recv_buffer_size(16 << 10).expect("a socket"));
    write!(slow, "GET /stream?{LENGTH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
    // Nothing is read until the handler is free again, which another request on a handler shows.
    assert_eq!(bench.get("/pool?2"), b"2");
    let (mut received, mut piece) = (Vec::new(), vec![0; 20_000]);
    loop {
        match slow.stream.read(&mut piece).expect("all of it") {
            0 => break,
            count => received.extend_from_slice(&piece[..count]),
        }
        if received.len() % 7 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let end = find(&received, b"\r\n\r\n").expect("a head") + 4;
    let body = unchunk(&received[end..]).expect("a last chunk");
    assert_eq!(body.len(), LENGTH);
    assert!(body.iter().enumerate().all(|(index, byte)| *byte == pattern(index)), "other bytes than were sent");
}

fn file(bench: &Bench) {
    let body = bench.get("/file?1000000");
    assert_eq!(body.len(), 1_000_000);
    assert!(body.iter().enumerate().all(|(index, byte)| *byte == pattern(index)), "other bytes than the file's");
}

fn half_close(bench: &Bench) {
    for path in ["/inline", "/pool"] {
        let mut client = bench.connect();
        write!(client, "GET {path}?7 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        client.stream.shutdown(Shutdown::Write).expect("connected");
        assert_eq!(client.answer(), (200, b"7".to_vec()));
        client.expect_end();
    }
    // The end of an upload that is not complete gets no answer that could be taken for one.
    let mut client = bench.connect();
    write!(client, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345").expect("sent");
    client.stream.shutdown(Shutdown::Write).expect("connected");
    let mut rest = Vec::new();
    client.stream.read_to_end(&mut rest).expect("an end");
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&rest));
}

fn resets(bench: &Bench) {
    for round in 0..40 {
        let mut client = bench.connect();
        match round % 5 {
            0 => {}
            1 => client.write_all(b"GET /inl").expect("sent"),
            2 => write!(client, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n")
                .and_then(|()| client.write_all(&[1; 100_000]))
                .expect("sent"),
            3 => write!(client, "GET /stream?2000000 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent"),
            _ => write!(client, "GET /sleep?30 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent"),
        }
        SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).expect("a socket");
    }
    assert_eq!(bench.get("/pool?3"), b"3");
    bench.until("every connection is gone", || bench.running.stats()[0].open.read() == 0);
}

fn pool(bench: &Bench) {
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert_eq!(bench.get("/sleep?100"), b"slept"));
        }
        bench.until("handlers sleep", || SLEEPING.load(Ordering::SeqCst) > 0);
        assert_eq!(bench.get("/inline?4"), b"4");
    });
}

fn many(bench: &Bench) {
    let mut clients: Vec<Client> = (0..200).map(|_| bench.connect()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let path = ["/inline", "/pool"][number % 2];
        write!(client, "GET {path}?{number} HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    }
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.answer(), (200, format!("{number}").into_bytes()));
    }
}

fn drain(bench: Bench, descriptors_before: usize) {
    let mut idle = bench.connect();
    write!(idle, "GET /inline HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    assert_eq!(idle.answer().0, 200);
    let mut busy = bench.connect();
    write!(busy, "GET /sleep?200 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    bench.until("the handler sleeps", || SLEEPING.load(Ordering::SeqCst) > 0);
    bench.running.stop();
    idle.expect_end();
    assert_eq!(busy.answer(), (200, b"slept".to_vec()));
    busy.expect_end();
    drop((idle, busy));
    let stats = bench.running.stats().to_vec();
    bench.running.wait().expect("nothing is lost");
    assert_eq!(stats[0].open.read(), 0, "connections left open");
    assert_eq!(stats[0].stale.read(), 0, "completions for connections that were gone");
    assert_eq!(stats[0].faults.read(), 0, "faults");
    // A ring's own descriptor is given back by a task of the kernel's, a little later (io_uring_setup(2)).
    let begun = Instant::now();
    while descriptors() > descriptors_before {
        assert!(begun.elapsed() < WAIT, "{descriptors_before} descriptors before, {} after", descriptors());
        thread::sleep(Duration::from_millis(5));
    }
}

// ---------------------------------------------------------------------------------- the server's side

/// Handlers that sleep at this moment.
static SLEEPING: AtomicUsize = AtomicUsize::new(0);

struct Application;

impl Handler for Application {
    fn handle(&self, request: &Request<'_>) -> Response {
        let number = || request.query().parse::<usize>().unwrap_or(0);
        match request.path() {
            "/inline" | "/pool" => Response::text(request.query().to_owned()),
            "/sum" => {
                let (mut body, mut sum, mut piece) = (request.body(), 0u64, [0; 8192]);
                loop {
                    match body.read(&mut piece).expect("a complete body") {
                        0 => break,
                        count => sum += piece[..count].iter().map(|byte| u64::from(*byte)).sum::<u64>(),
                    }
                }
                let place = if request.body_bytes().is_some() { "memory" } else { "file" };
                Response::text(format!("{} {sum} {place}", body.len()))
            }
            "/stream" => {
                let length = number();
                Response::new(200).body(Body::stream(move |out| {
                    let bytes: Vec<u8> = (0..length).map(pattern).collect();
                    bytes.chunks(1000).try_for_each(|piece| out.write_all(piece))
                }))
            }
            "/file" => {
                let path = std::env::temp_dir().join(format!("uringd-behaviour-{}", std::process::id()));
                fs::write(&path, (0..number()).map(pattern).collect::<Vec<u8>>()).expect("a temporary file");
                let opened = fs::File::open(&path).expect("just written");
                fs::remove_file(&path).expect("just written");
                Response::new(200).body(Body::file(opened).expect("a regular file"))
            }
            "/sleep" => {
                SLEEPING.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(number() as u64));
                SLEEPING.fetch_sub(1, Ordering::SeqCst);
                Response::text("slept")
            }
            _ => Response::new(404),
        }
    }

    fn runs(&self, request: &Request<'_>) -> Runs {
        if request.path() == "/inline" { Runs::Inline } else { Runs::OnPool }
    }
}

/// A byte that depends on its place, with a period that no buffer has.
fn pattern(index: usize) -> u8 {
    (index % 251) as u8
}

/// Open descriptors of this process.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

// ---------------------------------------------------------------------------------- the clients' side

impl Bench {
    fn connect(&self) -> Client {
        self.connect_with(|_| {})
    }

    fn connect_with(&self, prepare: impl FnOnce(&Socket)) -> Client {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        prepare(&socket);
        socket.connect(&self.address.into()).expect("a server");
        socket.set_read_timeout(Some(WAIT)).expect("a socket");
        socket.set_write_timeout(Some(WAIT)).expect("a socket");
        Client { stream: socket.into(), ahead: Vec::new() }
    }

    /// The body of the answer to a request on a connection of its own.
    fn get(&self, target: &str) -> Vec<u8> {
        let mut client = self.connect();
        write!(client, "GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        let (status, body) = client.answer();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        body
    }

    fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < WAIT, "waited in vain until {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

struct Client {
    stream: TcpStream,
    /// Read and not yet looked at.
    ahead: Vec<u8>,
}

impl Client {
    /// Status and body of the next answer, which must have a Content-Length.
    fn answer(&mut self) -> (u16, Vec<u8>) {
        let end = loop {
            match find(&self.ahead, b"\r\n\r\n") {
                Some(end) => break end + 4,
                None => self.read_more(),
            }
        };
        let head = String::from_utf8(self.ahead[..end].to_vec()).expect("ASCII");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("a length");
        let length: usize = length.parse().expect("a number");
        while self.ahead.len() < end + length {
            self.read_more();
        }
        let body = self.ahead[end..end + length].to_vec();
        self.ahead.drain(..end + length);
        (status, body)
    }

    fn read_more(&mut self) {
        let mut piece = [0; 16 << 10];
        let count = self.stream.read(&mut piece).expect("an answer");
        assert!(count > 0, "the connection ended; so far: {}", String::from_utf8_lossy(&self.ahead));
        self.ahead.extend_from_slice(&piece[..count]);
    }

    fn expect_end(&mut self) {
        assert_eq!(self.ahead, b"");
        assert_eq!(self.stream.read(&mut [0; 64]).expect("an orderly end"), 0);
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Decodes chunks; `None` when the last one is missing.
fn unchunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = find(bytes, b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).ok()?, 16).ok()?;
        bytes = &bytes[end + 2..];
        if size == 0 {
            return (bytes == b"\r\n").then_some(body);
        }
        body.extend_from_slice(bytes.get(..size)?);
        bytes = bytes.get(size + 2..)?;
    }
}
