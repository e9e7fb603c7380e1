//! Starts uringd with an application of `tests/python/apps`, asks it things, looks at its processes, and stops it.
//!
//! A server that goes out of scope is drained, and must then exit with 0 and without a panic in its log.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::{
    collections::HashSet,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Longest wait for anything that should happen at once. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The interpreter, or `None` and a line that says so.
pub fn python(test: &str) -> Option<PathBuf> {
    let python = env::var_os("URINGD_TEST_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    // Itself, and not a script that may stand before it: the tests look at who is whose child.
    let code = "import sys; print(sys.executable); sys.exit(sys.version_info < (3, 8))";
    if let Ok(told) = Command::new(&python).args(["-c", code]).output()
        && told.status.success()
    {
        return Some(PathBuf::from(String::from_utf8_lossy(&told.stdout).trim()));
    }
    let _ = writeln!(io::stderr(), "SKIPPED {test}: no Python from 3.8 on");
    None
}

/// Ends the test when there is no interpreter.
#[macro_export]
macro_rules! python_or_skip {
    () => {
        match python(thread::current().name().unwrap_or("?")) {
            Some(python) => python,
            None => return,
        }
    };
}

pub fn apps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/apps")
}

pub fn command(python: &Path, app: &str, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("URINGD_") || ["PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"].contains(&&*name) {
            command.env_remove(name);
        }
    }
    command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command.args(["--bind", "127.0.0.1:0", "--python"]).arg(python);
    for (name, value) in [("--cores", "1"), ("--workers", "1"), ("--graceful-timeout", "5")] {
        if !options.contains(&name) {
            command.args([name, value]);
        }
    }
    if !options.contains(&"--chdir") {
        command.arg("--chdir").arg(apps());
    }
    command.args(options).arg(app);
    command
}

/// A running uringd. Dropped, it is drained and must end with `expected`, which is 0 unless a test says otherwise.
pub struct Server {
    pub child: Child,
    pub expected: i32,
    pub address: SocketAddr,
    pub log: Log,
}

#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<String>, Condvar)>);

impl Log {
    pub fn text(&self) -> String {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a line that holds `what`.
    pub fn wait_for(&self, what: &str) -> String {
        let until = Instant::now() + PATIENCE;
        let mut text = self.0.0.lock().expect("no panic");
        loop {
            if let Some(line) = text.lines().find(|line| line.contains(what)) {
                return line.to_owned();
            }
            let left = until.saturating_duration_since(Instant::now());
            // The lock is poisoned by this, and nobody but the destructor looks again.
            assert!(!left.is_zero(), "{what:?} is not in the log:\n{text}");
            text = self.0.1.wait_timeout(text, left).expect("no panic").0;
        }
    }
}

impl Server {
    pub fn start(python: &Path, app: &str, options: &[&str]) -> Server {
        Server::spawn(&mut command(python, app, options))
    }

    pub fn spawn(command: &mut Command) -> Server {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("uringd can be run");
        let log = Log::default();
        let (stderr, kept) = (child.stderr.take().expect("piped"), log.clone());
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut text = kept.0.0.lock().expect("no panic");
                text.push_str(&line);
                text.push('\n');
                kept.0.1.notify_all();
            }
        });
        let ready = log.wait_for(" ready: ");
        let address = ready.split_once("http://").expect("an address").1.split(',').next().expect("an address");
        Server { child, expected: 0, address: address.parse().expect("an address"), log }
    }

    pub fn behave(python: &Path, options: &[&str]) -> Server {
        Server::start(python, "behave:app", options)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    pub fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, b"")
    }

    pub fn ask(&self, method: &str, target: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let head = format!("{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{length}\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).expect("sent");
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        assert!(read.is_ok(), "{target}: {read:?} after {bytes:?}; the log:\n{}", self.log.text());
        Answer::parse(&bytes)
    }

    pub fn pid(&self) -> i32 {
        self.get("/pid").text().parse().expect("a number")
    }

    /// Drains it, and tells how it ended, if it did.
    pub fn stop(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        let mut status = self.child.try_wait().expect("a child");
        if status.is_none() {
            self.signal(libc::SIGTERM);
        }
        while status.is_none() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
            status = self.child.try_wait().expect("a child");
        }
        status?.code()
    }

    pub fn signal(&self, signal: i32) {
        kill(self.child.id().cast_signed(), signal);
    }

    /// Sends a request, with a body of one byte unless it is a GET, whose answer is read later. Once it runs, there is a file
    /// at `mark`.
    pub fn begin(&self, method: &str, target: &str, mark: Option<&Path>) -> Begun {
        let mut stream = self.connect();
        let mark = mark.map_or_else(String::new, |mark| format!("X-Mark: {}\r\n", mark.display()));
        let (length, body) = if method == "GET" { ("", "") } else { ("Content-Length: 1\r\n", "x") };
        let request = format!("{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{length}{mark}\r\n{body}");
        stream.write_all(request.as_bytes()).expect("sent");
        Begun(stream)
    }

    pub fn descriptors(&self) -> usize {
        descriptors(self.child.id().cast_signed())
    }

    /// The workers that are alive: its zygote's children.
    pub fn workers(&self) -> Vec<i32> {
        children_of_children(self.child.id()).into_iter().filter(|pid| is_alive(*pid)).collect()
    }

    pub fn zygote(&self) -> i32 {
        *children(self.child.id().cast_signed()).iter().find(|pid| is_alive(**pid)).expect("a zygote")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let status = self.stop();
        let _ = self.child.kill();
        if !thread::panicking() {
            assert_eq!(status, Some(self.expected), "{}", self.log.text());
            assert!(!self.log.text().contains("panicked"), "{}", self.log.text());
        } else {
            let _ = writeln!(io::stderr(), "the log:\n{}", self.log.text());
        }
    }
}

/// A request that was sent.
pub struct Begun(pub TcpStream);

impl Begun {
    pub fn answer(self) -> Answer {
        Answer::parse(&self.rest())
    }

    /// Waits for so many bytes of its answer.
    pub fn wait_for(&mut self, bytes: usize) {
        self.0.read_exact(&mut vec![0; bytes]).expect("it has begun");
    }

    /// What there is to read until its end.
    pub fn rest(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).expect("an answer");
        bytes
    }

    /// Ends the connection with a RST, which is no half-closed one.
    pub fn leave(self) {
        socket2::SockRef::from(&self.0).set_linger(Some(Duration::ZERO)).expect("an option");
    }
}

pub fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

pub fn kill(pid: i32, signal: i32) {
    // SAFETY: kill(2) takes two integers.
    unsafe { libc::kill(pid, signal) };
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// The framing said where the body ends, and that was its end.
    pub whole: bool,
}

impl Answer {
    pub fn parse(bytes: &[u8]) -> Answer {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no head in {bytes:?}"));
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let mut answer = Answer { status, head, body: bytes[end + 4..].to_vec(), whole: true };
        if answer.header("Transfer-Encoding").is_some() {
            (answer.body, answer.whole) = unchunk(&answer.body);
        } else if let Some(length) = answer.header("Content-Length") {
            answer.whole = length.parse() == Ok(answer.body.len());
        }
        answer
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let field = |line: &'_ str| line.split_once(':').filter(|field| field.0.eq_ignore_ascii_case(name)).is_some();
        self.head.lines().find(|line| field(line)).and_then(|line| line.split_once(':')).map(|field| field.1.trim())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }
}

pub fn unchunk(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") else { return (body, false) };
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).expect("ASCII"), 16).expect("a size");
        if size == 0 {
            return (body, &bytes[end..] == b"\r\n\r\n");
        }
        let Some(piece) = bytes.get(end + 2..end + 2 + size) else { return (body, false) };
        body.extend_from_slice(piece);
        bytes = bytes.get(end + 4 + size..).unwrap_or_default();
    }
}

pub fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    wait_until_within(PATIENCE, what, holds);
}

pub fn wait_until_within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < until, "still not: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A zombie has ended; its parent has only not asked yet.
pub fn is_alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z'))
}

/// R, S, T, Z...: proc_pid_stat(5). `None`: there is no such process.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The workers of a server: its zygote's children.
pub fn children_of_children(pid: u32) -> Vec<i32> {
    children(pid.cast_signed()).into_iter().flat_map(children).collect()
}

pub fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// The first answer on a connection that stays open.
pub fn first_answer(stream: &mut TcpStream) -> Answer {
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut piece).expect("an answer");
        bytes.extend_from_slice(&piece[..read]);
        if bytes.windows(4).any(|four| four == b"\r\n\r\n") {
            let mut answer = Answer::parse(&bytes);
            let length = answer.header("Content-Length").and_then(|length| length.parse().ok()).unwrap_or(0);
            if answer.body.len() >= length || read == 0 {
                answer.body.truncate(length);
                return answer;
            }
        }
        assert!(read > 0, "the connection ended after {bytes:?}");
    }
}

/// Keeps so many clients at `ask`, which is told which of them it is, while `body` runs; returns how often they were.
pub fn keep_asking<T>(clients: usize, ask: impl Fn(usize) + Sync, body: impl FnOnce() -> T) -> (usize, T) {
    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let told = thread::scope(|scope| {
        // Also when it fails: a scope waits for its threads.
        let _stop = Raise(&stop);
        for client in 0..clients {
            let (stop, asked, ask) = (&stop, &asked, &ask);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    ask(client);
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        body()
    });
    (asked.into_inner(), told)
}

/// Keeps four clients asking while `body` runs. Every answer must be a 200; returns how many there were.
pub fn under_load<T>(server: &Server, target: &str, body: impl FnOnce() -> T) -> (usize, T) {
    let ask = |_| {
        let answer = server.get(target);
        assert_eq!(answer.status, 200, "{answer:?}; the log:\n{}", server.log.text());
    };
    keep_asking(4, ask, body)
}

/// Raises a flag when it goes out of scope.
pub struct Raise<'a>(pub &'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// ---------------------------------------------------------------------------------- what workers of every class do

pub fn is_served(server: &Server, named: &str) {
    assert!(server.log.text().contains(named), "{}", server.log.text());
    let answer = server.get("/");
    assert_eq!((answer.status, answer.text(), answer.header("Content-Length")), (200, "hello\n", Some("6")));
}

pub fn echoes_bodies_of(server: &Server, lengths: &[u32]) {
    for length in lengths {
        let body: Vec<u8> = (0..*length).map(|at| ((at * 7) >> 3) as u8).collect();
        let answer = server.ask("POST", "/echo", &body);
        assert_eq!((answer.status, answer.header("X-Length")), (200, Some(&*length.to_string())));
        assert!(answer.body == body && answer.whole, "{length} bytes");
    }
}

pub fn makes_bodies_of(server: &Server, lengths: &[usize]) {
    for length in lengths {
        let large = server.get(&format!("/large?{length}"));
        assert_eq!((large.body.len(), large.whole, large.header("Transfer-Encoding")), (*length, true, None));
        let head = server.ask("HEAD", &format!("/large?{length}"), b"");
        assert_eq!((head.status, head.header("Content-Length"), head.body.len()), (200, Some(&*length.to_string()), 0));
    }
}

/// Eight clients pipeline five requests at a time, in several sizes.
pub fn answers_pipelined_requests_in_their_order(server: &Server, rounds: usize) {
    let client = |client: usize| {
        let mut stream = server.connect();
        let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
        for round in 0..rounds {
            let bodies: Vec<String> = (0..5).map(|at| format!("{client}.{round}.{at}{}", "x".repeat(at * 700))).collect();
            let request = |body: &String| format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(bodies.iter().map(request).collect::<String>().as_bytes()).expect("sent");
            for body in &bodies {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a status line");
                assert_eq!(line, "HTTP/1.1 200 OK\r\n");
                while line != "\r\n" {
                    line.clear();
                    reader.read_line(&mut line).expect("a field");
                }
                let mut answered = vec![0; body.len()];
                reader.read_exact(&mut answered).expect("a body");
                assert!(answered == body.as_bytes(), "{body} was answered {}", String::from_utf8_lossy(&answered));
            }
        }
    };
    thread::scope(|scope| (0..8).for_each(|number| drop(scope.spawn(move || client(number)))));
}

pub fn answers_errors_with_500_and_logs_them(server: &Server) {
    assert_eq!(server.get("/fail").status, 500);
    server.log.wait_for("RuntimeError: this application fails");
    let broken = server.get("/break");
    assert_eq!((broken.status, broken.text(), broken.whole), (200, "the beginning", false));
    assert_eq!(server.get("/").status, 200);
}

pub fn loses_no_request_with_an_idle_worker(server: &Server) {
    for _ in 0..5 {
        let pid = server.pid();
        kill(pid, libc::SIGKILL);
        // It may be asked before anybody has noticed.
        assert_eq!(server.ask("POST", "/echo", b"x").status, 200);
        assert_ne!(server.pid(), pid);
    }
}

/// Its timeout is a second.
pub fn lets_a_request_move_its_deadline(server: &Server) {
    let answer = server.get("/extend?2");
    assert_eq!((answer.status, answer.text()), (200, "in time after all"));
}

/// Its timeout is a second.
pub fn replaces_a_stopped_worker(server: &Server) {
    let pid = server.pid();
    kill(pid, libc::SIGSTOP);
    assert_eq!(server.get("/echo").status, 504);
    assert_eq!(server.get("/echo").status, 200);
    wait_until("the stopped worker is gone", || !is_alive(pid));
}

/// Keeps so many clients at `ask`, which returns the number of the worker that answered, until eight workers have; two serve
/// at a time.
pub fn is_served_by_eight_workers_in_turn(clients: usize, ask: impl Fn(usize) -> Option<String> + Sync) {
    let pids = Mutex::new(HashSet::new());
    let count = || pids.lock().expect("no panic").len();
    let ask = |client| {
        if let Some(pid) = ask(client) {
            pids.lock().expect("no panic").insert(pid);
        }
    };
    keep_asking(clients, ask, || wait_until_within(3 * PATIENCE, "eight workers have served", || count() >= 8));
    let pids = pids.into_inner().expect("no panic");
    wait_until("the old workers have ended", || pids.iter().filter(|pid| is_alive(pid.parse().expect("a number"))).count() <= 2);
}
