//! Command lines and configuration files of gunicorn and waitress, as people have them, through the real binary.
//!
//! `URINGD_TEST_PYTHON` names the interpreter (`python3` when not set). Without one, or without Flask and Django where they
//! are asked for, a test prints SKIPPED. With `URINGD_WRITE_DOCS` set, the table of docs/migrating.md is written, not compared.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use uringd::compat::{self, Here, Program, Setting, Takes};

/// Longest wait for anything that should happen at once. Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

const APP: &str = r#"
import json, os, time

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/sleep":
        time.sleep(60)
    start_response("200 OK", [("Content-Type", "application/json")])
    shown = {k: v for k, v in environ.items() if isinstance(v, str)}
    shown.update(COLOUR=os.environ.get("COLOUR"), threads=environ["wsgi.multithread"], uid=os.getuid(), gid=os.getgid(), groups=os.getgroups())
    return [json.dumps(shown).encode()]

application = app

def make():
    return app
"#;

/// A directory with an application in it.
struct Site {
    directory: tempfile::TempDir,
    python: PathBuf,
}

/// A site, or the end of the test when there is no interpreter, or one without this module.
macro_rules! site_or_skip {
    ($module:literal) => {
        match Site::new($module, thread::current().name().unwrap_or("?")) {
            Some(site) => site,
            None => return,
        }
    };
}

impl Site {
    fn new(module: &str, test: &str) -> Option<Site> {
        let python = env::var_os("URINGD_TEST_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
        let probe = format!("import sys, {module}; sys.exit(sys.version_info < (3, 8))");
        let runs = Command::new(&python).args(["-c", &probe]).stderr(Stdio::null()).status();
        if !runs.is_ok_and(|status| status.success()) {
            let _ = writeln!(io::stderr(), "SKIPPED {test}: no Python from 3.8 on with the module {module}");
            return None;
        }
        let site = Site { directory: tempfile::tempdir().expect("a directory"), python };
        site.file("app.py", APP);
        Some(site)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> &Site {
        fs::write(self.path(name), text).expect("written");
        self
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let read = ["PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "GUNICORN_CMD_ARGS", "SCRIPT_NAME", "VIRTUAL_ENV"];
            if name.starts_with("URINGD_") || read.contains(&&*name) {
                command.env_remove(name);
            }
        }
        command.env("URINGD_PYTHON", &self.python).env("URINGD_CORES", "1").env("PYTHONDONTWRITEBYTECODE", "1");
        command.current_dir(self.directory.path()).stdin(Stdio::null()).args(words);
        command
    }

    /// Runs it to its end.
    fn run(&self, words: &[&str]) -> Ended {
        run(self.command(words))
    }

    /// What `--check` prints. It must say that all is well.
    fn check(&self, words: &[&str]) -> String {
        let ended = self.run(&[words, &["--check"]].concat());
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.stdout
    }

    fn serve(&self, words: &[&str]) -> Server {
        Server::start(self.command(words))
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(mut command: Command) -> Ended {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("uringd can be run");
    let pid = child.id().cast_signed();
    let ended = Arc::new((Mutex::new(false), Condvar::new()));
    let watched = ended.clone();
    let watchdog = thread::spawn(move || {
        let over = watched.1.wait_timeout_while(watched.0.lock().expect("no panic"), PATIENCE, |over| !*over).expect("no panic");
        if !*over.0 {
            kill(pid, libc::SIGKILL);
        }
    });
    let Output { status, stdout, stderr } = child.wait_with_output().expect("a child");
    *ended.0.lock().expect("no panic") = true;
    ended.1.notify_all();
    watchdog.join().expect("no panic");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: kill(2) takes two integers.
    unsafe { libc::kill(pid, signal) };
}

/// A running uringd. Dropped, it is drained and must end with 0.
struct Server {
    child: Child,
    address: String,
    log: Log,
    /// Says when nobody has its standard error any more.
    log_ended: mpsc::Receiver<()>,
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
            if left.is_zero() {
                // Whoever drops the server looks at the log again.
                drop(text);
                panic!("{what:?} is not in the log");
            }
            text = self.0.1.wait_timeout(text, left).expect("no panic").0;
        }
    }
}

impl Server {
    fn start(mut command: Command) -> Server {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("uringd can be run");
        let log = Log::default();
        let (stderr, kept) = (child.stderr.take().expect("piped"), log.clone());
        let (ended, log_ended) = mpsc::channel();
        thread::spawn(move || {
            let _ended = ended;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut text = kept.0.0.lock().expect("no panic");
                text.push_str(&line);
                text.push('\n');
                kept.0.1.notify_all();
            }
        });
        // Before it is waited for, so that it is stopped when that is in vain.
        let mut server = Server { child, address: String::new(), log, log_ended };
        let ready = server.log.wait_for(" ready: ");
        let told = ready.split_once(" ready: ").expect("just found").1;
        server.address = told.split([',', ' ']).next().expect("an address").to_owned();
        server
    }

    /// The whole answer.
    fn get(&self, target: &str, fields: &str) -> String {
        let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{fields}\r\n");
        let mut answer = String::new();
        let read = match self.address.strip_prefix("http://") {
            Some(address) => exchange(TcpStream::connect(address).expect("it accepts"), &request, &mut answer),
            None => {
                let path = self.address.strip_prefix("unix:").expect("a path");
                exchange(UnixStream::connect(path).expect("it accepts"), &request, &mut answer)
            }
        };
        assert!(read.is_ok(), "{target}: {read:?}; the log:\n{}", self.log.text());
        answer
    }

    /// What the application said about the request.
    fn environ(&self, target: &str, fields: &str) -> BTreeMap<String, serde_json::Value> {
        let answer = self.get(target, fields);
        let body = answer.split_once("\r\n\r\n").expect("a head").1;
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}\n{}", self.log.text()))
    }

    fn signal(&self, signal: i32) {
        kill(self.child.id().cast_signed(), signal);
    }

    /// Drains it; what it logged.
    fn stop(mut self) -> String {
        let status = self.end();
        assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", self.log.text());
        self.log.text()
    }

    fn end(&mut self) -> Option<ExitStatus> {
        self.signal(libc::SIGTERM);
        let until = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => {
                    // Its workers had its standard error, too.
                    let _ = self.log_ended.recv_timeout(PATIENCE);
                    return Some(status);
                }
                None if Instant::now() > until => return None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let status = self.end();
        let _ = self.child.kill();
        if thread::panicking() {
            let _ = writeln!(io::stderr(), "the log:\n{}", self.log.text());
        } else {
            assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", self.log.text());
        }
    }
}

fn exchange(mut stream: impl Read + Write, request: &str, answer: &mut String) -> io::Result<usize> {
    stream.write_all(request.as_bytes())?;
    stream.read_to_string(answer)
}

/// The value of a key that `--check` printed.
fn value<'a>(check: &'a str, key: &str) -> &'a str {
    let line = check.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
    line.unwrap_or_else(|| panic!("no {key} in\n{check}"))
}

/// The warnings that name a setting.
fn complaints(log: &str) -> Vec<&str> {
    let is_one = |line: &&str| line.contains(" is not honoured: ") || line.contains(" is not needed: ");
    log.lines().filter(|line| line.contains("WARN")).filter(is_one).collect()
}

// The file.

/// As it stands in many a repository.
const CONF: &str = r#"
import multiprocessing, os

bind = "127.0.0.1:0"
workers = multiprocessing.cpu_count() * 2 + 1
worker_class = "gthread"
threads = int(os.environ.get("GUNICORN_THREADS", 2))
timeout = os.environ.get("GUNICORN_TIMEOUT", "20")
graceful_timeout = 10
keepalive = 5
max_requests = 1000
max_requests_jitter = 50
raw_env = ["COLOUR=blue", "DJANGO_SETTINGS_MODULE=a.b"]
limit_request_line = 4094
forwarded_allow_ips = "*"
preload_app = True
accesslog = "-"
errorlog = "-"
loglevel = "INFO"
worker_tmp_dir = "/dev/shm"
proc_name = None
daemon = False
tmp_upload_dir = None
wsgi_app = "app"
my_own = object()
"#;

#[test]
fn a_gunicorn_conf_py_is_found_by_itself_and_its_application_with_it() {
    let site = site_or_skip!("json");
    let server = site.file("gunicorn.conf.py", CONF).serve(&["--workers", "1"]);
    assert!(server.log.text().contains("1 workers, app app (wsgi)") || server.log.text().contains("1 worker, app app (wsgi)"));
    let environ = server.environ("/", "X-Forwarded-Proto: https\r\n");
    assert_eq!(environ["COLOUR"], "blue");
    assert_eq!(environ["threads"], true);
    assert_eq!(environ["wsgi.url_scheme"], "https");
}

#[test]
fn what_is_honoured_and_what_is_not_is_listed_by_a_check() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", CONF);
    let check = site.check(&["--threads", "3"]);
    let workers = (2 * thread::available_parallelism().expect("a count").get() + 1).to_string();
    // The machine may have more CPUs than this process may use.
    assert!(value(&check, "workers").parse::<usize>().expect("a number") >= 3, "{workers}: {check}");
    for (key, expected) in [
        ("target", "\"app\""),
        ("threads", "3"),
        ("timeout", "20"),
        ("graceful-timeout", "10"),
        ("keep-alive", "5"),
        ("max-requests", "1000"),
        ("max-requests-jitter", "50"),
        ("env", r#"["COLOUR=blue", "DJANGO_SETTINGS_MODULE=a.b"]"#),
        ("limit-request-line", "4094"),
        ("limit-head", "16384"),
        ("forwarded-allow-ips", "\"*\""),
        ("preload", "true"),
        ("worker-class", "\"gthread\""),
    ] {
        assert_eq!(value(&check, key), expected, "{key}");
    }
    let (honoured, vain) = check.split_once("# and those that are not:\n").expect("two lists");
    assert!(honoured.contains("#   threads (gunicorn.conf.py): threads = 3\n"), "the effective value: {check}");
    assert!(honoured.contains("#   daemon (gunicorn.conf.py): as it is anyway\n"), "{check}");
    let names: Vec<&str> = vain.lines().filter_map(|line| line.strip_prefix("#   ")?.split(' ').next()).collect();
    assert_eq!(names, ["accesslog", "worker_tmp_dir"], "{check}");
    assert!(!check.contains("my_own") && !check.contains("proc_name"), "{check}");
}

#[test]
fn a_check_prints_what_could_be_the_configuration_file() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", CONF);
    let check = site.check(&["--pid", "x.pid", "--umask", "022", "--script-name", "/a", "--server-header", ""]);
    site.file("uringd.toml", &check);
    let again = site.check(&[]);
    let settings = |text: &str| text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(settings(&check), settings(&again));
    assert!(!again.contains("gunicorn"), "and then it comes first: {again}");
}

#[test]
fn what_is_not_honoured_is_named_in_one_line_each_and_nothing_else_is() {
    let site = site_or_skip!("json");
    let log = site.file("gunicorn.conf.py", CONF).serve(&["--workers", "1", "--spew", "--no-sendfile"]).stop();
    let warned = complaints(&log);
    assert_eq!(warned.len(), 4, "{log}");
    for (line, expected) in warned.iter().zip([
        "spew (command line) is not honoured: ",
        "sendfile (command line) is not needed: ",
        "accesslog (gunicorn.conf.py) is not honoured: there is no access log yet; ",
        "worker_tmp_dir (gunicorn.conf.py) is not needed: ",
    ]) {
        assert!(line.contains(expected), "{line}");
    }
}

#[test]
fn the_command_line_wins_over_the_environment_over_gunicorns_arguments_over_the_file() {
    let site = site_or_skip!("json");
    site.file(
        "gunicorn.conf.py",
        "backlog = 1\nkeepalive = 1\ntimeout = 1\nthreads = 1\nforwarded_allow_ips = '10.0.0.1'\nbind = ['a:1']\n",
    );
    let mut command = site.command(&["app:app", "--check", "--backlog", "4", "--max-request-header-size", "40000"]);
    command.env("GUNICORN_CMD_ARGS", "--backlog=2 --keep-alive 2 -t '2' --max-requests=9 other:app");
    command.env("URINGD_BACKLOG", "3").env("URINGD_KEEP_ALIVE", "3").env("URINGD_LIMIT_HEAD", "3000");
    command.env("FORWARDED_ALLOW_IPS", "10.0.0.2").env("PORT", "5000").env("WEB_CONCURRENCY", "7");
    let ended = run(command);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for (key, expected) in [
        ("target", "\"app:app\""),
        ("backlog", "4"),
        ("limit-head", "40000"),
        ("limit-request-line", "40000"),
        ("keep-alive", "3"),
        ("timeout", "2"),
        ("max-requests", "9"),
        ("threads", "1"),
        ("bind", "[\"a:1\"]"),
        ("forwarded-allow-ips", "\"10.0.0.1/32\""),
        ("workers", "7"),
    ] {
        assert_eq!(value(&ended.stdout, key), expected, "{key}");
    }
}

#[test]
fn what_nobody_knows_in_gunicorns_arguments_is_named() {
    let site = site_or_skip!("json");
    let with = |arguments: &str| {
        let mut command = site.command(&["builtin:hello", "--check"]);
        command.env("GUNICORN_CMD_ARGS", arguments);
        run(command)
    };
    let ended = with("--no-such-thing=3 --keep-alive=4 --neither 5 -w 2 -y");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(value(&ended.stdout, "keep-alive"), "4");
    for word in ["--no-such-thing=3", "--neither", "-y"] {
        assert!(ended.stdout.contains(&format!("#   {word} (GUNICORN_CMD_ARGS): no option ")), "{word}: {ended:?}");
    }
    for (wrong, why) in [("--timeout=soon", "soon"), ("--bind 'a", "quotation"), ("--timeout", "--timeout")] {
        let ended = with(wrong);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.starts_with("uringd: GUNICORN_CMD_ARGS: ") && ended.stderr.contains(why), "{ended:?}");
    }
}

#[test]
fn the_file_may_be_named_in_every_way_that_gunicorn_knows() {
    let site = site_or_skip!("json");
    fs::create_dir(site.path("conf")).expect("made");
    site.file("conf/settings.py", "keepalive = 11\n").file("gunicorn_settings", "keepalive = 11\n");
    for location in ["conf/settings.py", "file:conf/settings.py", "python:conf.settings", "gunicorn_settings"] {
        let check = site.check(&["-c", location, "app:app"]);
        assert_eq!(value(&check, "keep-alive"), "11", "{location}");
    }
    let mut command = site.command(&["app:app", "--check"]);
    command.env("GUNICORN_CMD_ARGS", "-c conf/settings.py");
    assert_eq!(value(&run(command).stdout, "keep-alive"), "11");
    site.file("other.toml", "keep-alive = 12\n").file("gunicorn.conf.py", "keepalive = 13\n");
    assert_eq!(value(&site.check(&["-c", "other.toml", "app:app"]), "keep-alive"), "12");
    assert_eq!(value(&site.check(&["app:app"]), "keep-alive"), "13");
    assert_eq!(value(&site.check(&["builtin:hello"]), "keep-alive"), "15", "it is about Python applications");
}

#[test]
fn a_file_that_cannot_be_read_ends_the_start_with_what_python_shows_and_what_to_try() {
    let site = site_or_skip!("json");
    for (text, shown, hint) in [
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'", "try: 'no_such_thing' is not installed"),
        ("workers = 1 / 0\n", "ZeroDivisionError", "try: mend the file"),
        ("workers = = 2\n", "SyntaxError", "try: the interpreter is"),
        ("raise SystemExit('no')\n", "SystemExit: no", "try: mend the file"),
    ] {
        let ended = site.file("gunicorn.conf.py", text).run(&["app:app"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains(shown) && ended.stderr.contains("gunicorn.conf.py\", line 1"), "{ended:?}");
        let last = ended.stderr.lines().last().expect("a line");
        assert!(last.starts_with("uringd: cannot read the settings of gunicorn.conf.py (") && last.contains(hint), "{last}");
    }
    for (text, name) in [("timeout = 'soon'\n", "timeout = \"soon\": "), ("def workers(): pass\n", "workers = {\"type\":\"function\"}: ")] {
        let ended = site.file("gunicorn.conf.py", text).run(&["app:app"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.starts_with(&format!("uringd: gunicorn.conf.py: {name}invalid value ")), "{ended:?}");
    }
    let ended = site.run(&["-c", "missing.py", "app:app"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("there is no file missing.py; try: "), "{ended:?}");
}

#[test]
fn an_interpreter_that_says_nothing_ends_the_start() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", "import os\nos._exit(0)\n");
    let ended = site.run(&["app:app"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("ended before it had read the file"), "{ended:?}");
    let ended = site.run(&["app:app", "--python", "/no/such/python"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("cannot run the Python interpreter /no/such/python") && ended.stderr.contains("try: "), "{ended:?}");
}

// The check.

#[test]
fn a_check_loads_the_application_and_says_what_it_is() {
    let site = site_or_skip!("json");
    // The port is taken, and nobody minds; the hooks write, and are not called.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let bind = taken.local_addr().expect("bound").to_string();
    site.file("gunicorn.conf.py", "def on_starting(server): open('called', 'w').close()\non_exit = when_ready = on_starting\n");
    let check = site.check(&["app:app", "--bind", &bind]);
    let last = check.lines().last().expect("a line");
    assert!(last.starts_with("# the application app:app loads: wsgi, Python 3."), "{last}");
    assert!(!site.path("called").exists());

    site.file("broken.py", "import no_such_thing\n");
    for (target, shown) in [("broken:app", "No module named 'no_such_thing'"), ("app:nothing", "no attribute 'nothing'")] {
        let ended = site.run(&[target, "--check"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains(shown) && ended.stderr.lines().last().expect("a line").contains("try: "), "{ended:?}");
    }
    assert!(site.check(&["builtin:hello"]).contains("target = \"builtin:hello\""), "nothing to load");
}

// The hooks.

/// Says what it was given, on a line of its own.
const HOOKS: &str = r#"
def on_starting(server): server.log.info("on_starting %s %s", server.cfg.workers, server.pid)
def when_ready(server): server.log.info("when_ready %s", server.address[0][0])
def nworkers_changed(server, new, old): server.log.info("nworkers_changed %s %s", new, old)
def pre_fork(server, worker): server.log.info("pre_fork %s", worker.age)
def post_fork(server, worker): server.log.info("post_fork %s", worker.age)
def post_worker_init(worker): worker.log.info("post_worker_init %s %s", worker.age, worker.wsgi is not None)
def pre_request(worker, req): worker.log.info("pre_request %s %s %s", req.method, req.uri, dict(req.headers)["HOST"])
def post_request(worker, req, environ, resp): worker.log.info("post_request %s %s %s", req.path, resp.status, worker.nr)
def worker_abort(worker): worker.log.info("worker_abort %s", worker.age)
def worker_exit(server, worker): server.log.info("worker_exit %s", worker.age)
def child_exit(server, worker): server.log.info("child_exit %s", worker.age)
def on_exit(server): server.log.info("on_exit")
"#;

/// What the hooks said, in order.
fn hooks(log: &str) -> Vec<&str> {
    log.lines().filter_map(|line| line.split_once("[INFO] ")).map(|parts| parts.1).collect()
}

#[test]
fn the_hooks_are_called_in_gunicorns_order() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", HOOKS);
    let server = site.serve(&["--bind", "127.0.0.1:0", "--workers", "1", "app:app"]);
    server.environ("/path?query", "");
    server.log.wait_for("post_request");
    let starting = format!("on_starting 1 {}", server.child.id());
    let log = server.stop();
    assert_eq!(
        hooks(&log),
        [
            "nworkers_changed 1 None",
            &starting,
            "when_ready 127.0.0.1",
            "pre_fork 1",
            "post_fork 1",
            "post_worker_init 1 True",
            "pre_request GET /path?query a",
            "post_request /path 200 OK 1",
            "worker_exit 1",
            "child_exit 1",
            "on_exit",
        ],
        "{log}"
    );
    assert!(complaints(&log).is_empty(), "{log}");
}

#[test]
fn worker_abort_is_called_when_a_request_runs_too_long() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", HOOKS);
    let server = site.serve(&["--bind", "127.0.0.1:0", "--workers", "1", "--timeout", "1", "app:app"]);
    assert!(server.get("/sleep", "").starts_with("HTTP/1.1 504 "));
    server.log.wait_for("worker_abort 1");
    server.log.wait_for("child_exit 1");
    assert_eq!(server.environ("/", "")["PATH_INFO"], "/", "by its successor");
    let log = server.stop();
    assert!(!log.contains("worker_abort 2") && log.contains("worker_exit 2"), "{log}");
}

#[test]
fn nworkers_changed_is_called_for_one_worker_more_and_one_less() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", HOOKS);
    let server = site.serve(&["--bind", "127.0.0.1:0", "--workers", "1", "app:app"]);
    server.signal(libc::SIGTTIN);
    server.log.wait_for("nworkers_changed 2 1");
    server.log.wait_for("post_worker_init 2 True");
    server.signal(libc::SIGTTOU);
    server.log.wait_for("nworkers_changed 1 2");
    server.log.wait_for("child_exit 2");
    server.signal(libc::SIGTTOU);
    server.log.wait_for("there is only one worker; it stays");
    assert_eq!(server.stop().matches("nworkers_changed").count(), 3);
}

#[test]
fn a_hook_that_cannot_run_in_a_worker_ends_the_start() {
    let site = site_or_skip!("json");
    site.file("gunicorn.conf.py", "def post_fork(server, worker): 1 / 0\n");
    let ended = site.run(&["--bind", "127.0.0.1:0", "app:app"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("ZeroDivisionError") && ended.stderr.contains("in post_fork"), "{ended:?}");
}

#[test]
fn hooks_that_do_not_exist_here_are_named() {
    let site = site_or_skip!("json");
    let text = "def on_reload(server): pass\nworker_int = pre_exec = on_dirty_starting = on_reload\ndef ssl_context(config, f): pass\n";
    let check = site.file("gunicorn.conf.py", text).check(&["app:app"]);
    let vain = check.split_once("# and those that are not:\n").expect("a list").1;
    for name in ["on_reload", "worker_int", "pre_exec", "on_dirty_starting", "ssl_context"] {
        assert!(vain.contains(&format!("#   {name} (gunicorn.conf.py): ")), "{name}: {check}");
    }
}

// The command lines.

#[test]
fn every_option_of_both_programs_is_accepted_and_what_is_in_vain_is_named() {
    let site = site_or_skip!("json");
    site.file("x.toml", "").file("x.ini", "[app:main]\n");
    let value_of = |setting: &Setting| match setting.name {
        "bind" | "listen" => "127.0.0.1:0",
        "config" => "x.toml",
        "user" | "group" => "root",
        "raw_env" => "A=b",
        "loglevel" => "info",
        "forwarded_allow_ips" | "proxy_allow_ips" | "trusted_proxy" => "127.0.0.1",
        "proxy_protocol" => "v2",
        "header_map" => "dangerous",
        "trusted_proxy_headers" => "x-forwarded-for",
        "worker_class" => "sync",
        "url_scheme" => "https",
        "limit_request_line" | "limit_request_field_size" | "max_request_header_size" => "9000",
        // What is not there is asked for.
        _ => "1",
    };
    for setting in compat::settings() {
        for name in setting.cli {
            let mut words = vec!["--check", "builtin:hello"];
            words.push(name);
            if setting.takes == Takes::Value {
                words.push(value_of(setting));
            }
            let ended = site.run(&words);
            // Those two are named and end the start: see below.
            if matches!(setting.name, "certfile" | "keyfile") {
                assert_eq!(ended.code, Some(2), "{name}: {ended:?}");
                continue;
            }
            assert_eq!(ended.code, Some(0), "{name}: {ended:?}");
            let named = ended.stdout.contains(&format!("#   {} (command line): ", setting.name));
            match setting.here {
                Here::Option(_) => assert!(!named, "{name}: {ended:?}"),
                Here::Missing(_) if setting.takes == Takes::Switch => {
                    let other = site.run(&["--check", "builtin:hello", setting.cli[usize::from(*name == setting.cli[0])]]);
                    let both = [&ended, &other].map(|ended| ended.stdout.contains("# and those that are not:"));
                    assert!(both[0] != both[1], "{name}: one of the two is as it is anyway");
                }
                Here::Missing(_) | Here::Needless => {
                    assert!(named && ended.stdout.contains("# and those that are not:"), "{name}: {ended:?}");
                }
                Here::Words(_) | Here::Worker | Here::Anyway => {
                    assert!(named && !ended.stdout.contains("# and those that are not:"), "{name}: {ended:?}");
                }
            }
        }
    }
}

#[test]
fn a_command_line_of_gunicorn_runs_with_one_word_changed() {
    let site = site_or_skip!("json");
    let server = site.serve(&[
        "-w",
        "1",
        "-b",
        "127.0.0.1:0",
        "-k",
        "gthread",
        "--threads",
        "2",
        "-t",
        "60",
        "--graceful-timeout",
        "30",
        "--keep-alive",
        "5",
        "--max-requests",
        "1000",
        "--max-requests-jitter",
        "100",
        "-e",
        "COLOUR=red",
        "--access-logfile",
        "-",
        "--error-logfile",
        "-",
        "--log-file=-",
        "--log-level",
        "info",
        "--worker-tmp-dir",
        "/dev/shm",
        "-n",
        "web",
        "--preload",
        "--forwarded-allow-ips=*",
        "--limit-request-field_size",
        "8190",
        "app",
    ]);
    assert_eq!(server.environ("/", "")["COLOUR"], "red");
    let log = server.stop();
    let warned = complaints(&log);
    assert_eq!(warned.len(), 3, "{log}");
    for name in ["accesslog", "worker_tmp_dir", "proc_name"] {
        assert!(log.contains(&format!("WARN {name} (command line) is not ")), "{log}");
    }
}

#[test]
fn a_command_line_of_waitress_runs_with_one_word_changed() {
    let site = site_or_skip!("json");
    let server = site.serve(&[
        "--host=127.0.0.1",
        "--port=0",
        "--threads=4",
        "--url-scheme=https",
        "--url-prefix=/mounted/",
        "--ident=me",
        "--call",
        "--trusted-proxy=127.0.0.1,192.0.2.2",
        "--trusted-proxy-count=2",
        "--trusted-proxy-headers=x-forwarded-for",
        "--no-expose-tracebacks",
        "--channel-timeout=30",
        "--connection-limit=1000",
        "--max-request-body-size=1000000",
        "--server-name=named",
        "--asyncore-use-poll",
        "--clear-untrusted-proxy-headers",
        "app:make",
    ]);
    let answer = server.get("/mounted/x", "");
    assert!(answer.contains("\r\nServer: me\r\n"), "{answer}");
    let environ = server.environ("/mounted/x", "X-Forwarded-For: 192.0.2.1, 192.0.2.2\r\n");
    for (key, expected) in [
        ("SCRIPT_NAME", "/mounted"),
        ("PATH_INFO", "/x"),
        ("wsgi.url_scheme", "https"),
        ("REMOTE_ADDR", "192.0.2.1"),
        ("SERVER_NAME", "named"),
        ("RAW_URI", "/mounted/x"),
    ] {
        assert_eq!(environ[key], expected, "{key}");
    }
    assert_eq!(environ["threads"], true);
    let outside = server.environ("/mountedx", "");
    assert_eq!((&outside["SCRIPT_NAME"], &outside["PATH_INFO"]), (&"".into(), &"/mountedx".into()));
    let log = server.stop();
    assert_eq!(complaints(&log).len(), 1, "{log}");
    assert!(log.contains("asyncore_use_poll (command line) is not needed: "), "{log}");
}

#[test]
fn a_paste_file_is_refused_with_what_to_write_instead() {
    let site = site_or_skip!("json");
    let ended = site.run(&["--paste", "development.ini"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("loadapp('config:"), "{ended:?}");
}

// The process.

#[test]
fn the_pid_file_has_the_id_when_the_server_is_ready_and_is_gone_at_its_end() {
    let site = site_or_skip!("json");
    let path = site.path("uringd.pid");
    let server = site.serve(&["--bind", "127.0.0.1:0", "-p", "uringd.pid", "app"]);
    assert_eq!(fs::read_to_string(&path).expect("there"), format!("{}\n", server.child.id()));
    let ended = site.run(&["--bind", "127.0.0.1:0", "-p", "uringd.pid", "app"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains(&format!("process {} has it", server.child.id())), "{ended:?}");
    assert!(path.exists(), "still the other's");
    server.stop();
    assert!(!path.exists());
    let ended = site.run(&["--bind", "127.0.0.1:0", "-p", "no/such/uringd.pid", "app"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("no/such/uringd.pid") && ended.stderr.contains("try: "), "{ended:?}");
}

#[test]
fn who_asks_for_encryption_does_not_get_a_server_without_it() {
    let site = site_or_skip!("json");
    for words in [&["--certfile=cert.pem", "--keyfile=key.pem"][..], &["--check", "--certfile=cert.pem"]] {
        let ended = site.run(&[&["--bind", "127.0.0.1:0"], words, &["app"]].concat());
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains("file (command line)") && ended.stderr.contains("there is no TLS yet"), "{ended:?}");
    }
}

#[test]
fn unix_sockets_have_the_permissions_that_umask_or_mode_leave() {
    let site = site_or_skip!("json");
    for (option, expected) in [("--workers=1", 0o666), ("--umask=007", 0o770), ("-m0", 0o777), ("--unix-socket-perms=660", 0o660)] {
        let server = site.serve(&["--unix-socket=socket", option, "app"]);
        let mode = fs::metadata(site.path("socket")).expect("there").mode();
        assert_eq!(mode & 0o777, expected, "{option}");
        server.stop();
    }
}

/// Numbers that nobody has: neither a password entry nor a group is needed.
const STRANGER: (u32, u32) = (54_321, 54_322);

/// Whether this test may become somebody else; or a line that says why not.
fn is_root(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        let _ = writeln!(io::stderr(), "SKIPPED {test}: only root may become another user");
    }
    is_root
}

#[test]
fn the_process_becomes_the_users_once_it_listens() {
    let site = site_or_skip!("json");
    if !is_root("the_process_becomes_the_users_once_it_listens") {
        return;
    }
    let (user, group) = STRANGER;
    let server = site.serve(&[
        "--bind",
        &format!("unix:{}", site.path("socket").display()),
        "--user",
        &user.to_string(),
        "--group",
        &group.to_string(),
        "-p",
        "pid",
        "--spool-dir",
        "/tmp",
        "builtin:hello",
    ]);
    assert!(server.get("/", "").ends_with("Hello, World!"));
    for name in ["socket", "pid"] {
        let found = fs::metadata(site.path(name)).expect("there");
        assert_eq!((found.uid(), found.gid()), (user, group), "{name}");
    }
    for thread in fs::read_dir(format!("/proc/{}/task", server.child.id())).expect("its threads") {
        let status = fs::read_to_string(thread.expect("a thread").path().join("status")).expect("alive");
        assert!(status.contains(&format!("Uid:\t{user}\t{user}\t{user}\t{user}\nGid:\t{group}\t{group}\t{group}\t{group}\n")), "{status}");
        let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).expect("a line");
        assert_eq!(groups.trim(), group.to_string(), "none of root's");
    }
    // The directory is root's, so the file stays, and says nothing.
    server.stop();
    assert_eq!(fs::read_to_string(site.path("pid")).expect("there"), "");
    for name in ["--user", "--group"] {
        let ended = site.run(&["--bind", "127.0.0.1:0", name, "nobody at all", "builtin:hello"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains(&format!("cannot run as {name} nobody at all")) && ended.stderr.contains("try: "), "{ended:?}");
    }
}

#[test]
fn the_workers_are_the_users_too() {
    let mut site = site_or_skip!("json");
    if !is_root("the_workers_are_the_users_too") {
        return;
    }
    let (user, group) = STRANGER;
    // An interpreter below /root is for nobody else.
    site.python = "/usr/bin/python3".into();
    if !site.python.exists() {
        let _ = writeln!(io::stderr(), "SKIPPED the_workers_are_the_users_too: there is no /usr/bin/python3");
        return;
    }
    fs::set_permissions(site.directory.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    let server = site.serve(&["--bind", "127.0.0.1:0", "-u", &user.to_string(), "-g", &group.to_string(), "app"]);
    let environ = server.environ("/", "");
    assert_eq!((&environ["uid"], &environ["gid"], &environ["groups"]), (&user.into(), &group.into(), &serde_json::json!([group])));
}

#[test]
fn signals_that_do_nothing_yet_say_so() {
    let site = site_or_skip!("json");
    let server = site.serve(&["--bind", "127.0.0.1:0", "app"]);
    for (signal, line) in [(libc::SIGHUP, "SIGHUP is ignored"), (libc::SIGUSR1, "SIGUSR1: "), (libc::SIGUSR2, "SIGUSR2 is ignored")] {
        server.signal(signal);
        server.log.wait_for(line);
    }
}

// Frameworks.

#[test]
fn flask_runs_under_a_gunicorn_conf_py_with_its_logging() {
    let site = site_or_skip!("flask");
    site.file(
        "hello.py",
        r#"
import logging
from flask import Flask, request

app = Flask(__name__)
gunicorn_logger = logging.getLogger("gunicorn.error")
app.logger.handlers = gunicorn_logger.handlers
app.logger.setLevel(gunicorn_logger.level)

@app.route("/")
def hi():
    app.logger.info("flask says hi to %s", request.remote_addr)
    logging.getLogger("own").info("of its own")
    return "hi"
"#,
    );
    site.file(
        "gunicorn.conf.py",
        r#"
bind = "127.0.0.1:0"
workers = 1
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "root": {"level": "INFO", "handlers": ["console"]},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "mine", "stream": "ext://sys.stderr"}},
    "formatters": {"mine": {"format": "mine: %(name)s %(message)s"}},
    "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["console"], "propagate": False}},
}
def post_fork(server, worker):
    server.log.info("Worker spawned")
"#,
    );
    let server = site.serve(&["hello:app"]);
    assert!(server.get("/", "").ends_with("\r\n\r\nhi"));
    for line in ["mine: gunicorn.error Worker spawned", "mine: hello flask says hi to 127.0.0.1", "mine: own of its own"] {
        server.log.wait_for(line);
    }
}

#[test]
fn django_runs_as_its_own_documentation_has_it_for_gunicorn() {
    let site = site_or_skip!("django");
    let made = Command::new(&site.python).args(["-m", "django", "startproject", "mysite", "."]).current_dir(site.directory.path()).status();
    assert!(made.is_ok_and(|status| status.success()));
    site.file(
        "gunicorn.conf.py",
        "import os\nbind = os.environ.get('BIND', '127.0.0.1:0')\nworkers = 1\npreload_app = True\nwsgi_app = 'mysite.wsgi:application'\n",
    );
    for words in [&["mysite.wsgi"][..], &[]] {
        let server = site.serve(words);
        let answer = server.get("/", "").replace("Host: a", "");
        // Django answers to the names of this machine only; either way, it was Django.
        assert!(answer.contains("Django") || answer.contains("DisallowedHost"), "{answer}");
    }
}

// The page.

#[test]
fn the_table_has_every_setting_and_every_option_of_the_versions_it_names() {
    for (program, list) in
        [(Program::Gunicorn, include_str!("compat/gunicorn-27.0.1.txt")), (Program::Waitress, include_str!("compat/waitress-3.0.2.txt"))]
    {
        let theirs: BTreeMap<&str, Vec<&str>> = list
            .lines()
            .map(|line| {
                let mut words = line.split(' ');
                (words.next().expect("a name"), words.collect())
            })
            .collect();
        let ours: BTreeMap<&str, Vec<&str>> = compat::sections(program)
            .iter()
            .flat_map(|section| section.1)
            // Not a setting of waitress's, but of what runs it.
            .filter(|setting| setting.name != "call")
            .map(|setting| (setting.name, setting.cli.to_vec()))
            .collect();
        assert_eq!(ours, theirs, "{program:?}");
    }
    let count = |program| compat::settings().filter(|setting| setting.program == program).count();
    assert_eq!((count(Program::Gunicorn), count(Program::Waitress)), (120, 35));
}

#[test]
fn the_page_has_the_table_as_it_is() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/migrating.md");
    let page = fs::read_to_string(&path).expect("the page");
    let mut expected = page.clone();
    for (program, name) in [(Program::Gunicorn, "gunicorn"), (Program::Waitress, "waitress")] {
        let (begin, end) = (format!("<!-- {name}'s settings -->\n"), format!("<!-- end of {name}'s settings -->\n"));
        let start = expected.find(&begin).expect("a mark") + begin.len();
        let stop = expected.find(&end).expect("a mark");
        expected.replace_range(start..stop, &table(program));
    }
    if env::var_os("URINGD_WRITE_DOCS").is_some() {
        fs::write(&path, &expected).expect("written");
    }
    let first = page.lines().zip(expected.lines()).find(|(there, wanted)| there != wanted);
    assert!(page == expected || env::var_os("URINGD_WRITE_DOCS").is_some(), "docs/migrating.md is behind the table: {first:?}");
}

fn table(program: Program) -> String {
    let mut text = "\n| setting | command line | in uringd |\n|---|---|---|\n".to_owned();
    let sections = compat::sections(program);
    for (section, settings) in sections {
        if sections.len() > 1 {
            text += &format!("| **{section}** | | |\n");
        }
        for setting in *settings {
            let cli: Vec<String> = setting.cli.iter().map(|name| format!("`{name}`")).collect();
            text += &format!("| `{}` | {} | {} |\n", setting.name, cli.join(", "), setting.documented().replace('|', "\\|"));
        }
    }
    text + "\n"
}
