//! Python applications in their worker processes, seen from outside: the real binary, a real interpreter.
//!
//! Each row of what can go wrong with a worker has a test: it dies, hangs, lies, cannot be loaded, grows old. What all of
//! them show is that nobody but the request concerned notices.
//!
//! `URINGD_TEST_PYTHON` names the interpreter (`python3` when not set). Without one the tests print SKIPPED.

use std::{
    collections::HashSet,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

/// Longest wait for anything that should happen at once. Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// The interpreter, or `None` and a line that says so.
fn python(test: &str) -> Option<PathBuf> {
    let python = env::var_os("URINGD_TEST_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    let runs = Command::new(&python).args(["-c", "import sys; sys.exit(sys.version_info < (3, 8))"]).status();
    if runs.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    let _ = writeln!(io::stderr(), "SKIPPED {test}: no Python from 3.8 on");
    None
}

/// Ends the test when there is no interpreter.
macro_rules! python_or_skip {
    () => {
        match python(thread::current().name().unwrap_or("?")) {
            Some(python) => python,
            None => return,
        }
    };
}

fn apps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/apps")
}

fn command(python: &Path, app: &str, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("URINGD_") || ["PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"].contains(&&*name) {
            command.env_remove(name);
        }
    }
    command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command.args(["--bind", "127.0.0.1:0", "--graceful-timeout", "5", "--python"]).arg(python);
    for (name, value) in [("--cores", "1"), ("--workers", "1")] {
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

/// A running uringd. Dropped, it is drained and must end with 0.
struct Server {
    child: Child,
    address: SocketAddr,
    log: Log,
}

#[derive(Clone, Default)]
struct Log(Arc<(Mutex<String>, Condvar)>);

impl Log {
    fn text(&self) -> String {
        self.0.0.lock().expect("no panic").clone()
    }

    /// Waits for a line that holds `what`.
    fn wait_for(&self, what: &str) -> String {
        let until = Instant::now() + PATIENCE;
        let mut text = self.0.0.lock().expect("no panic");
        loop {
            if let Some(line) = text.lines().find(|line| line.contains(what)) {
                return line.to_owned();
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what:?} is not in the log:\n{text}");
            text = self.0.1.wait_timeout(text, left).expect("no panic").0;
        }
    }
}

impl Server {
    fn start(python: &Path, app: &str, options: &[&str]) -> Server {
        let mut child = command(python, app, options).stderr(Stdio::piped()).spawn().expect("uringd can be run");
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
        Server { child, address: address.parse().expect("an address"), log }
    }

    fn behave(python: &Path, options: &[&str]) -> Server {
        Server::start(python, "behave:app", options)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, b"")
    }

    fn ask(&self, method: &str, target: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let head = format!("{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{length}\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).expect("sent");
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        assert!(read.is_ok(), "{target}: {read:?} after {bytes:?}; the log:\n{}", self.log.text());
        Answer::parse(&bytes)
    }

    fn pid(&self) -> i32 {
        self.get("/pid").text().parse().expect("a number")
    }

    fn signal(&self, signal: i32) {
        kill(self.child.id().cast_signed(), signal);
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("its descriptors").count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(libc::SIGTERM);
        let until = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => break Some(status),
                None if Instant::now() > until => break None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let _ = self.child.kill();
        if !thread::panicking() {
            assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", self.log.text());
            assert!(!self.log.text().contains("panicked"), "{}", self.log.text());
        } else {
            let _ = writeln!(io::stderr(), "the log:\n{}", self.log.text());
        }
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: kill(2) takes two integers.
    unsafe { libc::kill(pid, signal) };
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
    /// The framing said where the body ends, and that was its end.
    whole: bool,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Answer {
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

    fn header(&self, name: &str) -> Option<&str> {
        let field = |line: &'_ str| line.split_once(':').filter(|field| field.0.eq_ignore_ascii_case(name)).is_some();
        self.head.lines().find(|line| field(line)).and_then(|line| line.split_once(':')).map(|field| field.1.trim())
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }
}

fn unchunk(mut bytes: &[u8]) -> (Vec<u8>, bool) {
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

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "still not: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie has ended; its parent has only not asked yet.
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

// ---------------------------------------------------------------------------------- answers

#[test]
fn an_application_is_served_and_the_start_up_line_names_it() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--workers", "2"]);
    assert!(server.log.text().contains("2 workers, app behave:app (wsgi)\n"), "{}", server.log.text());
    let answer = server.get("/");
    assert_eq!((answer.status, answer.text(), answer.header("Content-Length")), (200, "hello\n", Some("6")));
    assert_eq!(answer.header("Content-Type"), Some("text/plain"));
}

#[test]
fn bodies_arrive_in_memory_and_as_files() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    for length in [1, 100, 65_536, 65_537, 300_000, 3_000_000] {
        let body: Vec<u8> = (0..length).map(|at: u32| ((at * 7) >> 3) as u8).collect();
        let answer = server.ask("POST", "/echo", &body);
        assert_eq!((answer.status, answer.header("X-Length")), (200, Some(&*length.to_string())));
        assert!(answer.body == body && answer.whole, "{length} bytes");
    }
    let mut stream = server.connect();
    stream
        .write_all(b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .expect("sent");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    let answer = Answer::parse(&bytes);
    assert_eq!((answer.text(), answer.header("X-Length")), ("abc", Some("3")));
}

#[test]
fn streamed_large_and_file_answers_arrive_whole() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let streamed = server.get("/stream?50000");
    assert_eq!((streamed.body.len(), streamed.whole), (350_000, true));
    assert!(streamed.text().ends_with("049999\n"));
    for length in [0, 100_000, 5_000_000] {
        let large = server.get(&format!("/large?{length}"));
        assert_eq!((large.body.len(), large.whole, large.header("Transfer-Encoding")), (length, true, None));
    }
    let file = server.get("/file");
    assert_eq!(file.body, fs::read(apps().join("behave.py")).expect("the file"));
    let head = server.ask("HEAD", "/large?7", b"");
    assert_eq!((head.status, head.header("Content-Length"), head.body.len()), (200, Some("7"), 0));
}

#[test]
fn many_requests_on_many_connections_are_answered_in_their_order() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--cores", "all", "--workers", "2"]);
    thread::scope(|scope| {
        for client in 0..8 {
            let server = &server;
            scope.spawn(move || {
                let mut stream = server.connect();
                let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
                for round in 0..40 {
                    // Pipelined, in several sizes, some with bodies.
                    let bodies: Vec<String> = (0..5).map(|at| format!("{client}.{round}.{at}{}", "x".repeat(at * 700))).collect();
                    let requests: Vec<String> = bodies
                        .iter()
                        .map(|body| format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
                        .collect();
                    stream.write_all(requests.concat().as_bytes()).expect("sent");
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
            });
        }
    });
}

#[test]
fn an_error_of_the_application_is_a_500_with_its_traceback_in_the_log() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    assert_eq!(server.get("/fail").status, 500);
    server.log.wait_for("RuntimeError: this application fails");
    let broken = server.get("/break");
    assert_eq!((broken.status, broken.text(), broken.whole), (200, "the beginning", false));
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn the_http_cases_reach_an_application_as_they_reach_a_native_handler() {
    let python = python_or_skip!();
    let server = Server::start(&python, "conformance:app", &[]);
    let native = Server::start(&python, "builtin:echo", &[]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let corpus = ["http1-cases.jsonl", "more-cases.jsonl"].map(|name| fs::read_to_string(folder.join(name)).expect("the cases")).concat();
    let mut compared = 0;
    for line in corpus.lines() {
        let case: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let (Some(raw), Some(200)) = (case["raw"].as_str(), case["prefer"].as_u64()) else { continue };
        if !["RL", "HD", "CL", "TE", "CK"].contains(&case["group"].as_str().unwrap_or("")) || !case["needs"].is_null() {
            continue;
        }
        let raw: Vec<u8> = raw.chars().map(|letter| letter as u8).collect();
        let ask = |server: &Server| {
            let mut stream = server.connect();
            stream.write_all(&raw).expect("sent");
            first_answer(&mut stream)
        };
        let (ours, theirs) = (ask(&server), ask(&native));
        assert_eq!(ours.status, theirs.status, "{}", case["id"]);
        let read = |answer: &Answer| serde_json::from_slice::<serde_json::Value>(&answer.body).ok();
        if let (Some(ours), Some(theirs)) = (read(&ours), read(&theirs)) {
            for key in ["method", "target", "query", "version", "body"] {
                assert_eq!(ours[key], theirs[key], "{}: {key}", case["id"]);
            }
            compared += 1;
        }
    }
    assert!(compared > 200, "only {compared} cases were compared");
}

/// The first answer on a connection that stays open.
fn first_answer(stream: &mut TcpStream) -> Answer {
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

// ---------------------------------------------------------------------------------- workers that fail

#[test]
fn a_request_whose_worker_is_killed_is_repeated_only_when_that_is_safe() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("once");
    let target = format!("/die?{}", file.display());
    fs::write(&file, "").expect("a file");
    let (before, repeated) = (server.pid(), server.get(&target));
    assert_eq!((repeated.status, repeated.text()), (200, "alive"));
    assert_ne!(server.pid(), before);
    fs::write(&file, "").expect("a file");
    assert_eq!(server.ask("POST", &target, b"x").status, 502);
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/always_die").status, 502, "once again, and no more");
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn a_worker_killed_while_it_is_idle_costs_no_request() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    for _ in 0..5 {
        let pid = server.pid();
        kill(pid, libc::SIGKILL);
        // It may be asked before anybody has noticed.
        assert_eq!(server.get("/").status, 200);
        assert_ne!(server.pid(), pid);
    }
}

#[test]
fn requests_that_wait_outlive_the_workers_that_are_killed_meanwhile() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--workers", "2"]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut answers = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        assert_eq!(server.get("/").status, 200);
                        answers += 1;
                    }
                    answers
                })
            })
            .collect();
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(250));
            kill(server.pid(), libc::SIGKILL);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let answers: usize = clients.into_iter().map(|client| client.join().expect("a client that was always answered")).sum();
        assert!(answers > 50, "{answers}");
    });
}

#[test]
fn a_request_that_takes_too_long_costs_its_worker_and_nobody_else() {
    let python = python_or_skip!();
    for target in ["/sleep?60", "/spin"] {
        let server = Server::behave(&python, &["--workers", "2", "--timeout", "1"]);
        thread::scope(|scope| {
            let hanging = scope.spawn(|| (Instant::now(), server.get(target), Instant::now()));
            thread::sleep(Duration::from_millis(200));
            let pids: HashSet<i32> = (0..20).map(|_| server.pid()).collect();
            assert_eq!(pids.len(), 1, "only the other worker serves");
            let (begun, answer, ended) = hanging.join().expect("an answer");
            assert_eq!(answer.status, 504);
            assert!(ended - begun < Duration::from_secs(4), "{:?}", ended - begun);
            server.log.wait_for("in act_");
            assert!(is_alive(*pids.iter().next().expect("one")), "the other worker is still there");
        });
        // The new worker takes its share again.
        wait_until("two workers serve", || {
            let asked: Vec<_> = thread::scope(|scope| {
                let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| server.get("/sleep?0.05"))).collect();
                clients.into_iter().map(|client| client.join().expect("an answer").status).collect()
            });
            asked == [200, 200]
        });
    }
}

#[test]
fn a_deadline_can_be_moved_by_the_application() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--timeout", "1"]);
    let answer = server.get("/extend?2");
    assert_eq!((answer.status, answer.text()), (200, "in time after all"));
}

#[test]
fn garbage_on_the_channel_is_a_502_and_a_new_worker() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let pid = server.pid();
    let begun = Instant::now();
    assert_eq!(server.ask("POST", "/garbage", b"x").status, 502);
    assert!(begun.elapsed() < Duration::from_secs(4), "not only at its end");
    server.log.wait_for("its channel brought");
    assert_ne!(server.pid(), pid);
}

#[test]
fn an_exit_in_a_request_is_a_500_and_a_new_worker() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let pid = server.pid();
    assert_eq!(server.get("/exit").status, 500);
    assert_eq!(server.get("/").status, 200);
    assert_ne!(server.pid(), pid);
}

#[test]
fn a_stopped_worker_is_replaced_at_its_deadline() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--timeout", "1"]);
    let pid = server.pid();
    kill(pid, libc::SIGSTOP);
    assert_eq!(server.get("/").status, 504);
    assert_eq!(server.get("/").status, 200);
    wait_until("the stopped worker is gone", || !is_alive(pid));
}

#[test]
fn an_application_that_cannot_be_imported_ends_the_start_with_its_traceback_and_a_hint() {
    let python = python_or_skip!();
    for (app, options, told, hint) in [
        ("crashing:app", &[][..], "ModuleNotFoundError: No module named 'a_module_that_is_not_there'", "try: "),
        ("crashing:app", &["--preload"], "ModuleNotFoundError: No module named 'a_module_that_is_not_there'", "try: "),
        ("not_there:app", &[], "not_there", "--chdir"),
        ("behave:nothing", &[], "has no attribute 'nothing'", "try: behave has: "),
    ] {
        let ended = command(&python, app, options).output().expect("uringd can be run");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{stderr}");
        let last = stderr.lines().next_back().unwrap_or("");
        assert!(
            stderr.contains(told) && last.starts_with(&format!("uringd: cannot load the application {app}")) && last.contains(hint),
            "{stderr}"
        );
        assert!(!stderr.contains(" ready: "), "{stderr}");
    }
    let ended = command(Path::new("/nowhere/python"), "behave:app", &[]).output().expect("uringd can be run");
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("try: --python"));
}

#[test]
fn a_crash_loop_stops_neither_the_server_nor_the_machine() {
    let python = python_or_skip!();
    let directory = tempfile::tempdir().expect("a directory");
    let source = directory.path().join("fragile.py");
    let app = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'ok']\n";
    fs::write(&source, app).expect("a file");
    let chdir = directory.path().to_str().expect("text");
    let server = Server::start(&python, "fragile:app", &["--chdir", chdir, "--queue-timeout", "1", "--env", "PYTHONDONTWRITEBYTECODE=1"]);
    assert_eq!(server.get("/").status, 200);
    fs::write(&source, "raise SystemError('not today')\n").expect("a file");
    let worker = children_of_children(server.child.id());
    worker.iter().for_each(|pid| kill(*pid, libc::SIGKILL));
    server.log.wait_for("SystemError: not today");
    assert_eq!(server.get("/").status, 503, "it waits for a worker, and no longer than it may");
    let tries = server.log.text().matches("SystemError: not today").count();
    assert!(tries <= 8, "{tries} workers were tried in about a second");
    fs::write(&source, app).expect("a file");
    wait_until("it serves again", || server.get("/").status == 200);
}

/// The workers of a server: its zygote's children.
fn children_of_children(pid: u32) -> Vec<i32> {
    let children = |pid: i32| -> Vec<i32> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
    };
    children(pid.cast_signed()).into_iter().flat_map(children).collect()
}

#[test]
fn workers_end_with_a_server_that_is_killed() {
    let python = python_or_skip!();
    let server = std::mem::ManuallyDrop::new(Server::behave(&python, &["--workers", "2"]));
    let workers = children_of_children(server.child.id());
    assert_eq!(workers.len(), 2);
    server.signal(libc::SIGKILL);
    wait_until("no worker is left", || !workers.iter().any(|pid| is_alive(*pid)));
}

#[test]
fn a_zygote_that_is_killed_is_replaced_with_its_workers() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let worker = server.pid();
    let stat = fs::read_to_string(format!("/proc/{worker}/stat")).expect("a worker");
    let zygote: i32 = stat.rsplit_once(") ").expect("a name").1.split(' ').nth(1).expect("a parent").parse().expect("a number");
    kill(zygote, libc::SIGKILL);
    wait_until("another worker serves", || {
        let answer = server.get("/pid");
        answer.status == 200 && answer.text() != worker.to_string()
    });
}

// ---------------------------------------------------------------------------------- clients

#[test]
fn a_client_that_reads_slowly_does_not_hold_a_worker() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let mut slow: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(b"GET /bulk?2000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            stream
        })
        .collect();
    // 14 MB each, of which nothing has been read: the only worker is free all the same.
    assert_eq!(server.get("/").status, 200);
    for stream in &mut slow {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("all of it");
        let answer = Answer::parse(&bytes);
        assert_eq!((answer.body.len(), answer.whole), (14_000_000, true));
    }
}

#[test]
fn a_request_whose_client_left_while_it_waited_is_never_started() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let marks = directory.path().join("marks");
    let mut busy = server.connect();
    busy.write_all(b"GET /sleep?1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
    thread::sleep(Duration::from_millis(300));
    let mut leaving = server.connect();
    let target = format!("GET /mark?{} HTTP/1.1\r\nHost: a\r\n\r\n", marks.display());
    leaving.write_all(target.as_bytes()).expect("sent");
    leaving.shutdown(Shutdown::Both).expect("left");
    drop(leaving);
    let mut bytes = Vec::new();
    busy.read_to_end(&mut bytes).expect("an answer");
    assert_eq!(Answer::parse(&bytes).text(), "slept");
    assert_eq!(server.get("/").status, 200);
    assert!(!marks.exists(), "nobody was there to want it");
}

#[test]
fn an_application_can_see_that_its_client_is_gone() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let marks = directory.path().join("marks");
    let mut leaving = server.connect();
    leaving.write_all(format!("GET /gone?{} HTTP/1.1\r\nHost: a\r\n\r\n", marks.display()).as_bytes()).expect("sent");
    thread::sleep(Duration::from_millis(300));
    // With a RST, which is no half-closed connection.
    socket2::SockRef::from(&leaving).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(leaving);
    wait_until("the application has noticed", || marks.exists());
}

// ---------------------------------------------------------------------------------- how workers run

#[test]
fn a_stream_that_says_nothing_learns_that_its_client_is_gone() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--threads", "2"]);
    let mut stream = server.connect();
    stream.write_all(b"GET /silent_stream HTTP/1.1\r\nHost: h\r\n\r\n").expect("sent");
    read_until(&mut stream, b"one\n");
    drop(stream);
    assert_eq!(server.get("/left").text(), "True");
}

#[test]
fn early_hints_reach_an_http11_client_while_the_application_works_and_no_other() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--threads", "2"]);
    let mut hinted = server.connect();
    hinted.write_all(b"GET /hints HTTP/1.1\r\nHost: h\r\n\r\n").expect("sent");
    // Fields about the connection are not the application's to hint at.
    read_until(&mut hinted, b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n");
    assert_eq!(server.get("/release").text(), "released\n");
    assert_eq!(first_answer(&mut hinted).text(), "hinted\n");
    let mut old = server.connect();
    old.write_all(b"GET /hints HTTP/1.0\r\n\r\n").expect("sent");
    assert_eq!(first_answer(&mut old).text(), "hinted\n");
}

/// Reads one byte at a time until what was read ends with this, or panics with what was read instead.
fn read_until(stream: &mut TcpStream, end: &[u8]) {
    let mut read = Vec::new();
    while !read.ends_with(end) {
        let mut byte = [0];
        let count = stream.read(&mut byte).expect("in time");
        assert!(count == 1 && read.len() < 4096, "{}", String::from_utf8_lossy(&read));
        read.push(byte[0]);
    }
}

#[test]
fn four_threads_serve_four_requests_at_a_time() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--threads", "4"]);
    let begun = Instant::now();
    let names: HashSet<String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| server.get("/thread"))).collect();
        clients.into_iter().map(|client| client.join().expect("an answer").text().to_owned()).collect()
    });
    assert_eq!(names.len(), 4, "{names:?} in {:?}", begun.elapsed());
    // One of them dies: the others' requests are GETs, so nobody notices.
    let pid = server.pid();
    kill(pid, libc::SIGKILL);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn a_preloaded_application_is_forked_and_not_loaded_again() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--preload", "--workers", "2", "--env", "WORD=from outside"]);
    assert_eq!(server.get("/variable?WORD").text(), "from outside");
    let pid = server.pid();
    kill(pid, libc::SIGKILL);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn an_application_can_be_the_result_of_a_factory() {
    let python = python_or_skip!();
    let server = Server::start(&python, "behave:factory(\"so made\")", &[]);
    assert_eq!(server.get("/").text(), "so made");
}

#[test]
fn recycling_costs_no_request() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--workers", "2", "--max-requests", "20", "--max-requests-jitter", "10"]);
    let pids = Mutex::new(HashSet::new());
    let until = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // POST, because a lost GET would be repeated in silence.
                while pids.lock().expect("no panic").len() < 8 && Instant::now() < until {
                    let answer = server.ask("POST", "/pid", b"x");
                    assert_eq!(answer.status, 200);
                    pids.lock().expect("no panic").insert(answer.text().to_owned());
                }
            });
        }
    });
    let pids = pids.into_inner().expect("no panic");
    assert!(pids.len() >= 8, "{pids:?}");
    let before = server.descriptors();
    wait_until("the old workers have ended", || pids.iter().filter(|pid| is_alive(pid.parse().expect("a number"))).count() <= 2);
    wait_until("their descriptors are closed", || server.descriptors() <= before);
}

#[test]
fn a_worker_that_is_old_or_large_is_replaced() {
    let python = python_or_skip!();
    for options in [["--max-age", "0.5"], ["--max-rss", "1000000"]] {
        let server = Server::behave(&python, &options);
        let pid = server.pid();
        wait_until("another worker serves", || server.pid() != pid);
    }
}

#[test]
fn signals_make_one_worker_more_and_one_less() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let workers = || children_of_children(server.child.id()).into_iter().filter(|pid| is_alive(*pid)).count();
    assert_eq!(workers(), 1);
    server.signal(libc::SIGTTIN);
    wait_until("two workers", || workers() == 2);
    server.signal(libc::SIGTTOU);
    wait_until("one worker", || workers() == 1);
    server.signal(libc::SIGTTOU);
    server.log.wait_for("it stays");
    assert_eq!((server.get("/").status, workers()), (200, 1));
}

#[test]
fn a_drain_lets_requests_in_workers_finish() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let mut stream = server.connect();
    stream.write_all(b"GET /sleep?1 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    thread::sleep(Duration::from_millis(300));
    server.signal(libc::SIGTERM);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    assert_eq!(Answer::parse(&bytes).text(), "slept");
}

#[test]
fn an_import_that_hangs_can_be_stopped() {
    let python = python_or_skip!();
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("hangs.py"), "import time\ntime.sleep(60)\n").expect("a file");
    let chdir = directory.path().to_str().expect("text");
    let mut child = command(&python, "hangs:app", &["--chdir", chdir]).stderr(Stdio::null()).spawn().expect("uringd can be run");
    thread::sleep(Duration::from_millis(500));
    kill(child.id().cast_signed(), libc::SIGTERM);
    let begun = Instant::now();
    assert_eq!(child.wait().expect("a child").code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(10));
}
