//! What can go wrong with a Python application, one test for each way: it dies, hangs, lies, meddles, cannot be loaded,
//! grows. What all of them show is that nobody but the request concerned notices, and that nothing is left behind.
//!
//! docs/python.md has the same rows as a table. `URINGD_TEST_PYTHON` names the interpreter (`python3` when not set).
//! Without one the tests print SKIPPED.

#[path = "python/support.rs"]
mod support;

use std::{
    collections::HashSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use support::{
    PATIENCE, Raise, Server, children, children_of_children, command, descriptors, is_alive, keep_asking, kill, python, state, under_load,
    wait_until, wait_until_within,
};

fn failing(python: &Path, options: &[&str]) -> Server {
    Server::start(python, "failing:app", options)
}

/// A file where requests leave a trace of having run.
struct Trace {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Trace {
    fn new() -> Trace {
        let directory = tempfile::tempdir().expect("a directory");
        Trace { path: directory.path().join("trace"), _directory: directory }
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.path).unwrap_or_default()
    }

    fn wait(&self) {
        wait_until("the request runs", || self.path.exists());
    }
}

/// A directory with an application that the test can change.
struct Source(tempfile::TempDir);

const GOOD: &str = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'ok']\n";

impl Source {
    fn new(text: &str) -> Source {
        let source = Source(tempfile::tempdir().expect("a directory"));
        source.write(text);
        source
    }

    fn write(&self, text: &str) {
        fs::write(self.0.path().join("fragile.py"), text).expect("a file");
    }

    fn start(&self, python: &Path, options: &[&str]) -> Server {
        // Two versions may be of the same second and length.
        let own = ["--chdir", self.0.path().to_str().expect("text"), "--env", "PYTHONDONTWRITEBYTECODE=1"];
        Server::start(python, "fragile:app", &[&own, options].concat())
    }
}

// ---------------------------------------------------------------------------------- it dies

#[test]
fn a_request_whose_worker_is_killed_is_repeated_only_when_that_is_safe() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let trace = Trace::new();
    let target = format!("/die_once?{}", trace.path.display());
    fs::write(&trace.path, "").expect("a file");
    let (before, repeated) = (server.pid(), server.get(&target));
    assert_eq!((repeated.status, repeated.text()), (200, "alive"));
    assert_ne!(server.pid(), before);
    fs::write(&trace.path, "").expect("a file");
    assert_eq!(server.ask("POST", &target, b"x").status, 502);
    assert_eq!(server.get("/echo").status, 200);
    assert_eq!(server.get("/exit?os._exit").status, 502, "once again, and no more");
    assert_eq!(server.get("/echo").status, 200);
}

#[test]
fn a_request_that_its_worker_has_not_begun_goes_to_another_whatever_its_method() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let trace = Trace::new();
    let pid = server.pid();
    kill(pid, libc::SIGSTOP);
    wait_until("it has stopped", || state(pid) == Some('T'));
    let begun = server.begin("POST", "/echo", Some(&trace.path));
    // Until it is in the channel, which nobody can see. Too short a while would make the test easier, not fail.
    thread::sleep(Duration::from_millis(300));
    kill(pid, libc::SIGKILL);
    let answer = begun.answer();
    assert_eq!((answer.status, answer.text()), (200, "x"));
    assert_eq!(trace.text(), "x", "it ran once");
}

#[test]
fn a_worker_killed_while_it_is_idle_costs_no_request() {
    let python = python_or_skip!();
    support::loses_no_request_with_an_idle_worker(&failing(&python, &[]));
}

#[test]
fn a_segmentation_fault_costs_its_request_and_its_worker() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let pid = server.pid();
    assert_eq!(server.ask("POST", "/segfault", b"x").status, 502);
    server.log.wait_for("signal 11");
    assert_ne!(server.pid(), pid);
}

#[test]
fn an_exit_in_a_request_is_a_500_and_a_new_worker() {
    let python = python_or_skip!();
    for threads in ["1", "4"] {
        let server = failing(&python, &["--threads", threads]);
        for how in ["sys.exit", "SystemExit", "KeyboardInterrupt"] {
            let pid = server.pid();
            assert_eq!(server.ask("POST", &format!("/exit?{how}"), b"x").status, 500, "{how}");
            assert_eq!(server.ask("POST", "/echo", b"x").status, 200, "after {how}");
            wait_until("another worker serves", || server.pid() != pid);
        }
    }
}

#[test]
fn an_exit_in_one_thread_lets_the_requests_of_the_others_finish() {
    let python = python_or_skip!();
    let server = failing(&python, &["--threads", "4"]);
    let trace = Trace::new();
    let pid = server.pid();
    let begun = server.begin("POST", "/sleep?2", Some(&trace.path));
    trace.wait();
    assert_eq!(server.ask("POST", "/exit?sys.exit", b"x").status, 500);
    for _ in 0..20 {
        assert_eq!(server.ask("POST", "/echo", b"x").status, 200);
    }
    assert_eq!(begun.answer().text(), "slept");
    wait_until("it has ended", || !is_alive(pid));
}

#[test]
fn all_workers_killed_at_the_same_time_cost_nobody_an_answer() {
    let python = python_or_skip!();
    let server = failing(&python, &["--workers", "4", "--cores", "all"]);
    let (answers, ()) = under_load(&server, "/echo", || {
        for _ in 0..3 {
            wait_until("all are there", || server.workers().len() == 4);
            server.workers().into_iter().for_each(|pid| kill(pid, libc::SIGKILL));
            assert_eq!(server.get("/echo").status, 200);
        }
    });
    assert!(answers > 0);
    wait_until("all are there again", || server.workers().len() == 4);
}

/// `scripts/kill-workers` runs this with its numbers raised.
#[test]
fn every_client_is_answered_while_workers_are_killed_and_nothing_runs_twice_that_must_not() {
    let python = python_or_skip!();
    let count = number("URINGD_KILL_REQUESTS", 20_000);
    let pause = Duration::from_millis(number("URINGD_KILL_EVERY_MS", 100) as u64);
    let seed = seed();
    let directory = tempfile::tempdir().expect("a directory");
    let ledger = directory.path().join("ledger");
    fs::write(&ledger, vec![0; count]).expect("a file");
    let server = Server::start(
        &python,
        "ledger:app",
        &["--cores", "all", "--workers", "2", "--log-level", "error", "--env", &format!("LEDGER={}", ledger.display())],
    );

    let (next, answers, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let client = || {
        let mut lost = Vec::new();
        let mut stream = server.connect();
        loop {
            let id = next.fetch_add(1, Ordering::Relaxed);
            if id >= count || stop.load(Ordering::Relaxed) {
                return lost;
            }
            let (method, body) = if is_post(id) { ("POST", format!("body of {id}")) } else { ("GET", String::new()) };
            let head = format!("{method} /{id} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(head.as_bytes()).expect("sent");
            let answer = support::first_answer(&mut stream);
            match answer.status {
                200 => assert_eq!(answer.text(), format!("{method} /{id} {body}")),
                502 => lost.push(id),
                _ => panic!("{method} /{id} was answered {answer:?}"),
            }
            answers.fetch_add(1, Ordering::Relaxed);
        }
    };
    let began = Instant::now();
    let mut kills = 0;
    let mut random = random(seed);
    let lost: Vec<usize> = thread::scope(|scope| {
        let _stop = Raise(&stop);
        let clients: Vec<_> = (0..16).map(|_| scope.spawn(client)).collect();
        while !clients.iter().any(|client| client.is_finished()) {
            // Not faster than workers come, however busy the machine is.
            let enough = (answers.load(Ordering::Relaxed) + count / 500).min(count);
            thread::sleep(pause);
            let until = Instant::now() + PATIENCE;
            while answers.load(Ordering::Relaxed) < enough && !clients.iter().any(|client| client.is_finished()) {
                assert!(Instant::now() < until, "nobody is answered; the log:\n{}", server.log.text());
                thread::sleep(Duration::from_millis(1));
            }
            if let Some(worker) = one_of(&server.workers(), &mut random) {
                kill(worker, libc::SIGKILL);
                kills += 1;
            }
        }
        clients.into_iter().flat_map(|client| client.join().expect("a client that was always answered")).collect()
    });
    let seconds = began.elapsed().as_secs_f64();

    let runs = fs::read(&ledger).expect("a file");
    let posts = (0..count).filter(|id| is_post(*id)).count();
    let again = (0..count).filter(|id| runs[*id] > 1).count();
    let unbegun = lost.iter().filter(|id| runs[**id] == 0).count();
    println!("{count} requests ({posts} of them POST) in {seconds:.1} s, {kills} workers killed");
    println!("{} answered 502, {} of them had begun; {again} GETs ran again", lost.len(), lost.len() - unbegun);
    let twice: Vec<usize> = (0..count).filter(|id| is_post(*id) && runs[*id] > 1).collect();
    assert!(twice.is_empty(), "POSTs that ran twice: {twice:?}");
    let never: Vec<usize> = (0..count).filter(|id| runs[*id] == 0 && !lost.contains(id)).collect();
    assert!(never.is_empty(), "answered, and never ran: {never:?}");
    // A kill may fall between the worker's mark and the application's own, a microsecond later.
    assert!(unbegun <= 2 + kills / 50, "{unbegun} requests were given up that had not begun");
    assert!(lost.len() <= kills, "{} requests lost by {kills} kills of one worker each", lost.len());
    assert!(kills > 3, "hardly any worker was killed");
}

#[test]
fn whatever_happens_to_its_processes_at_the_same_time_it_recovers() {
    let python = python_or_skip!();
    let mut random = random(seed());
    let options =
        ["--cores", "all", "--workers", "3", "--threads", "2", "--timeout", "2", "--max-requests", "300", "--max-requests-jitter", "200"];
    let server = failing(&python, &options);
    let ask = |client| {
        let answer = server.ask(if client == 0 { "POST" } else { "GET" }, "/echo", b"x");
        // 502: twice in a worker that was killed. 504: in one that was stopped, or too few were left.
        assert!([200, 502, 504].contains(&answer.status), "{answer:?}; the log:\n{}", server.log.text());
    };
    keep_asking(4, ask, || {
        for _ in 0..60 {
            thread::sleep(Duration::from_millis(random(80)));
            let worker = one_of(&server.workers(), &mut random);
            match (random(12), worker) {
                (0..4, Some(worker)) => kill(worker, libc::SIGKILL),
                (4..6, Some(worker)) => kill(worker, libc::SIGTERM),
                (6, Some(worker)) => kill(worker, libc::SIGSTOP),
                (7..9, _) => server.signal(libc::SIGTTIN),
                (9..11, _) => server.signal(libc::SIGTTOU),
                (11, _) => children(server.child.id().cast_signed()).into_iter().for_each(|zygote| kill(zygote, libc::SIGKILL)),
                _ => {}
            }
        }
    });
    // How many there should be, the log says last; the last signals may still be on their way.
    let wanted = || {
        let log = server.log.text();
        log.lines().filter_map(|line| line.rsplit_once("workers=")?.1.trim().parse().ok()).next_back().unwrap_or(3)
    };
    let states = || server.workers().into_iter().map(|pid| (pid, state(pid))).collect::<Vec<_>>();
    let until = Instant::now() + 2 * PATIENCE;
    while states().len() != wanted() || states().iter().any(|(_, state)| *state == Some('T')) {
        assert!(Instant::now() < until, "{} are wanted, there are {:?}; the log:\n{}", wanted(), states(), server.log.text());
        // One that is stopped and idle is found by the next request that it is given.
        thread::scope(|scope| (0..2 * wanted()).for_each(|_| drop(scope.spawn(|| server.get("/sleep?0.1")))));
    }
    assert_eq!(server.get("/echo").status, 200);
}

/// A generator of numbers below another.
fn random(seed: usize) -> impl FnMut(u64) -> u64 {
    let mut state = seed as u64 | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    }
}

fn seed() -> usize {
    let seed = number("URINGD_TEST_SEED", std::process::id() as usize);
    println!("URINGD_TEST_SEED={seed}");
    seed
}

fn one_of(pids: &[i32], random: &mut impl FnMut(u64) -> u64) -> Option<i32> {
    (!pids.is_empty()).then(|| pids[random(pids.len() as u64) as usize])
}

fn is_post(id: usize) -> bool {
    id.is_multiple_of(3)
}

/// A number as in the environment, or the quick one.
fn number(name: &str, quick: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(quick)
}

#[test]
fn requests_that_kill_their_workers_do_not_make_others_wait_longer_and_longer() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    for _ in 0..9 {
        assert_eq!(server.ask("POST", "/exit?os._exit", b"x").status, 502);
    }
    // With a pause that doubles, it would be 25 seconds by now.
    let begun = Instant::now();
    assert_eq!(server.get("/echo").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_signal_to_the_whole_group_as_of_a_service_manager_costs_no_request() {
    let python = python_or_skip!();
    let mut server = failing(&python, &["--workers", "2", "--graceful-timeout", "20"]);
    let traces: Vec<Trace> = (0..6).map(|_| Trace::new()).collect();
    let begun: Vec<_> = traces.iter().map(|trace| server.begin("POST", "/sleep?0.5", Some(&trace.path))).collect();
    wait_until("two of them run", || traces.iter().filter(|trace| trace.path.exists()).count() == 2);
    // uringd first, as a service manager does, or the workers first: the order is nobody's to choose.
    let everybody: Vec<i32> = [server.child.id().cast_signed(), server.zygote()].into_iter().chain(server.workers()).collect();
    everybody.iter().for_each(|pid| kill(*pid, libc::SIGTERM));
    for (begun, trace) in begun.into_iter().zip(&traces) {
        assert_eq!(begun.answer().text(), "slept", "{}", server.log.text());
        assert_eq!(trace.text(), "x", "it ran once");
    }
    assert_eq!(server.stop(), Some(0));
}

// ---------------------------------------------------------------------------------- it hangs

#[test]
fn a_request_that_takes_too_long_costs_its_worker_and_nobody_else() {
    let python = python_or_skip!();
    // The last one holds the interpreter in C, and still says where it is.
    for (target, place) in
        [("/sleep?60", "in act_sleep"), ("/spin", "in act_spin"), ("/deadlock", "in act_deadlock"), ("/grip", "in act_grip")]
    {
        let server = failing(&python, &["--workers", "2", "--timeout", "1"]);
        thread::scope(|scope| {
            let trace = Trace::new();
            let hanging = server.begin("POST", target, Some(&trace.path));
            let begun = Instant::now();
            trace.wait();
            let pids: HashSet<i32> = (0..20).map(|_| server.pid()).collect();
            assert_eq!(pids.len(), 1, "only the other worker serves");
            let hung = server.workers().into_iter().find(|pid| !pids.contains(pid)).expect("a second worker");
            let answer = scope.spawn(move || (hanging.answer(), Instant::now())).join().expect("an answer");
            assert_eq!(answer.0.status, 504, "{target}");
            assert!(answer.1 - begun < Duration::from_secs(10), "{:?}", answer.1 - begun);
            server.log.wait_for(place);
            wait_until("the one that hangs is gone", || !is_alive(hung));
            assert!(is_alive(*pids.iter().next().expect("one")), "the other worker is still there");
        });
        // The new worker takes its share again.
        wait_until("two workers serve", || server.workers().len() == 2);
    }
}

#[test]
fn a_worker_is_killed_at_its_deadline_and_not_a_second_later() {
    let python = python_or_skip!();
    let server = failing(&python, &["--timeout", "1"]);
    // The best of several, because a busy machine delays any of them.
    let mut best = Duration::MAX;
    for target in ["/spin", "/grip", "/sleep?60", "/deadlock", "/spin", "/grip"] {
        let pid = server.pid();
        let deadline = Instant::now() + Duration::from_secs(1);
        assert_eq!(server.get(target).status, 504);
        let answered = deadline.elapsed();
        let until = Instant::now() + PATIENCE;
        while is_alive(pid) {
            assert!(Instant::now() < until, "it still lives");
            thread::sleep(Duration::from_millis(1));
        }
        println!("{target}: answered {answered:?} after its deadline, its worker dead {:?} after it", deadline.elapsed());
        best = best.min(deadline.elapsed());
    }
    assert!(best < Duration::from_millis(500), "{best:?} after the deadline");
}

#[test]
fn when_one_thread_of_a_worker_hangs_the_requests_of_the_others_finish() {
    let python = python_or_skip!();
    let server = failing(&python, &["--threads", "4", "--timeout", "4"]);
    let pid = server.pid();
    let traces: Vec<Trace> = (0..4).map(|_| Trace::new()).collect();
    let hanging = server.begin("POST", "/deadlock", Some(&traces[0].path));
    traces[0].wait();
    // So that the others are well within their time when the first one's is over.
    thread::sleep(Duration::from_millis(2_500));
    let others: Vec<_> = traces[1..].iter().map(|trace| server.begin("POST", "/sleep?3.2", Some(&trace.path))).collect();
    traces.iter().for_each(Trace::wait);
    assert_eq!(hanging.answer().status, 504);
    for (other, trace) in others.into_iter().zip(&traces[1..]) {
        let answer = other.answer();
        assert_eq!((answer.status, answer.text()), (200, "slept"), "{}", server.log.text());
        assert_eq!(trace.text(), "x");
    }
    wait_until("the worker is gone", || !is_alive(pid));
    assert_eq!(server.get("/echo").status, 200);
}

#[test]
fn requests_in_company_of_one_that_hangs_are_served_by_others() {
    let python = python_or_skip!();
    let server = failing(&python, &["--workers", "2", "--timeout", "8"]);
    let workers = server.workers();
    let stop = AtomicBool::new(false);
    let slowest = thread::scope(|scope| {
        let over = Raise(&stop);
        // So many that the queue is never empty and no worker idle, that batches become long, and that their answers are
        // held back until all of them are there.
        let clients: Vec<_> = (0..24)
            .map(|_| {
                scope.spawn(|| {
                    let (mut stream, mut slowest) = (server.connect(), Duration::ZERO);
                    while !stop.load(Ordering::Relaxed) {
                        let begun = Instant::now();
                        stream.write_all(b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
                        assert_eq!(support::first_answer(&mut stream).status, 200);
                        slowest = slowest.max(begun.elapsed());
                    }
                    slowest
                })
            })
            .collect();
        thread::sleep(Duration::from_secs(1));
        let hanging = server.get("/sleep?60");
        drop(over);
        let slowest = clients.into_iter().map(|client| client.join().expect("a client that was always answered")).max();
        assert_eq!(hanging.status, 504);
        slowest.expect("clients")
    });
    assert!(slowest < Duration::from_secs(5), "{slowest:?}, but nobody else hangs");
    let stayed = || server.workers().iter().filter(|pid| workers.contains(pid)).count();
    wait_until("one is replaced", || server.workers().len() == 2 && stayed() == 1);
}

#[test]
fn a_deadline_can_be_moved_by_the_application() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--timeout", "1"]);
    support::lets_a_request_move_its_deadline(&server);
    assert_eq!(server.get("/extend_stream?1.5").text(), "in time after all");
}

#[test]
fn a_stopped_worker_is_replaced_at_its_deadline() {
    let python = python_or_skip!();
    support::replaces_a_stopped_worker(&failing(&python, &["--timeout", "1"]));
}

#[test]
fn a_zygote_that_is_killed_is_replaced_and_the_requests_of_its_workers_finish() {
    let python = python_or_skip!();
    let server = failing(&python, &["--workers", "2"]);
    let trace = Trace::new();
    let (zygote, workers) = (server.zygote(), server.workers());
    let begun = server.begin("POST", "/sleep?2", Some(&trace.path));
    trace.wait();
    kill(zygote, libc::SIGKILL);
    assert_eq!(begun.answer().text(), "slept", "{}", server.log.text());
    assert_eq!(trace.text(), "x");
    wait_until("two other workers are there", || {
        let now = server.workers();
        now.len() == 2 && now.iter().all(|pid| !workers.contains(pid))
    });
    assert_ne!(server.zygote(), zygote);
    wait_until("the old ones are gone", || workers.iter().all(|pid| !is_alive(*pid)));
    assert_eq!(server.ask("POST", "/echo", b"x").status, 200);
}

#[test]
fn a_zygote_that_hangs_is_replaced_when_a_worker_is_needed() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    kill(server.zygote(), libc::SIGSTOP);
    kill(server.pid(), libc::SIGKILL);
    let answer = server.get("/echo");
    assert_eq!(answer.status, 200, "{}", server.log.text());
}

#[test]
fn workers_of_an_interpreter_behind_a_script_are_killed_and_replaced_like_others() {
    let python = python_or_skip!();
    let source = Source::new("");
    let script = source.0.path().join("python");
    fs::write(&script, format!("#!/bin/sh\n{} \"$@\"\n", python.display())).expect("a file");
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("a mode");
    let server = failing(&script, &["--timeout", "1"]);
    let zygote = || children(server.zygote())[0];
    let pid = server.pid();
    assert_eq!(server.get("/spin").status, 504);
    server.log.wait_for("in act_spin");
    wait_until("it is killed", || !is_alive(pid));
    let old = zygote();
    kill(old, libc::SIGSTOP);
    kill(server.pid(), libc::SIGKILL);
    wait_until("it serves", || server.get("/echo").status == 200);
    wait_until("the old zygote is gone", || !is_alive(old));
}

// ---------------------------------------------------------------------------------- it fails

#[test]
fn errors_of_every_kind_are_a_500_each_and_the_worker_lives_on() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let pid = server.pid();
    for (target, logged) in [
        ("/recurse", "RecursionError"),
        ("/starve", "MemoryError"),
        ("/unprintable", "Unprintable"),
        ("/header?70000", "the headers are 70"),
    ] {
        assert_eq!(server.ask("POST", target, b"x").status, 500, "{target}");
        server.log.wait_for(logged);
        assert_eq!(server.pid(), pid, "after {target}");
    }
    let large = server.get("/header?60000");
    assert_eq!((large.status, large.header("X-Long").map(str::len)), (200, Some(60_000)));
}

// ---------------------------------------------------------------------------------- it meddles

#[test]
fn noise_on_standard_output_reaches_no_client() {
    let python = python_or_skip!();
    for how in ["print", "write", "sys.stdout.close", "close"] {
        let server = failing(&python, &[]);
        for _ in 0..3 {
            let (pid, answer) = (server.pid(), server.ask("POST", &format!("/noise?{how}"), b"x"));
            assert!(answer.status == 200 && answer.text() == "quiet again" || answer.status == 500, "{how}: {answer:?}");
            assert_eq!(server.pid(), pid, "{how}");
        }
    }
}

#[test]
fn a_worker_that_closes_its_channels_is_replaced() {
    let python = python_or_skip!();
    for threads in ["1", "4"] {
        let server = failing(&python, &["--threads", threads]);
        let pid = server.pid();
        assert_eq!(server.ask("POST", "/noise?closerange", b"x").status, 502);
        // Its other threads are as deaf, and each may be given a request before that shows.
        wait_until("another serves", || server.ask("POST", "/echo", b"x").status == 200);
        assert_ne!(server.pid(), pid);
        wait_until("it is gone", || !is_alive(pid));
    }
}

#[test]
fn garbage_on_the_channel_is_a_502_and_a_new_worker() {
    let python = python_or_skip!();
    for threads in ["1", "4"] {
        let server = failing(&python, &["--threads", threads]);
        let pid = server.pid();
        let begun = Instant::now();
        assert_eq!(server.ask("POST", "/garbage", b"x").status, 502);
        assert!(begun.elapsed() < Duration::from_secs(4), "not only at its end");
        server.log.wait_for("its channel brought");
        assert_eq!(server.get("/echo").status, 200);
        wait_until("it is gone", || !is_alive(pid));
    }
}

#[test]
fn what_is_said_about_a_request_that_is_over_harms_no_other() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let trace = Trace::new();
    let pid = server.pid();
    assert_eq!(server.ask("POST", &format!("/late?{}", trace.path.display()), b"x").text(), "over");
    trace.wait();
    for _ in 0..3 {
        assert_eq!(server.ask("POST", "/echo", b"x").status, 200);
    }
    assert_eq!(server.pid(), pid, "{}", server.log.text());
}

#[test]
fn an_application_that_takes_all_signals_is_stopped_and_killed_all_the_same() {
    let python = python_or_skip!();
    let mut server = failing(&python, &["--timeout", "1"]);
    assert_eq!(server.get("/handlers").text(), "deaf");
    let pid = server.pid();
    assert_eq!(server.get("/spin").status, 504);
    wait_until("it is killed", || !is_alive(pid));
    assert_eq!(server.get("/handlers").text(), "deaf");
    let pid = server.pid();
    assert_eq!(server.stop(), Some(0));
    assert!(!is_alive(pid));
}

#[test]
fn a_preloaded_application_may_have_taken_signals_and_standard_output() {
    let python = python_or_skip!();
    let text = "import os, signal, sys\nfor number in range(1, signal.NSIG):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nsys.stdout.close()\n";
    let source = Source::new(&format!("{text}{GOOD}"));
    let server = source.start(&python, &["--preload"]);
    for _ in 0..2 {
        let pid = server.workers()[0];
        kill(pid, libc::SIGKILL);
        assert_eq!(server.get("/").status, 200);
        wait_until("another one is there", || server.workers().iter().any(|other| *other != pid));
        assert_eq!(children_of_children(server.child.id()).len(), 1, "no zombie");
    }
}

#[test]
fn what_a_process_has_only_once_can_be_changed_by_the_application() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let pid = server.pid();
    assert_eq!(server.get("/settle").text(), "settled");
    // Larger than memory should hold, so that a file is made.
    let body = vec![b'a'; 300_000];
    assert!(server.ask("POST", "/echo", &body).body == body);
    assert_eq!(server.pid(), pid);
    kill(pid, libc::SIGKILL);
    assert!(server.ask("POST", "/echo", &body).body == body, "nor does the next worker mind");
}

// ---------------------------------------------------------------------------------- it starts what stays

#[test]
fn processes_that_an_application_forks_do_not_answer_and_do_not_hold_its_worker() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let pid = server.pid();
    let returned = server.ask("POST", "/fork?return", b"x");
    assert_ne!(returned.text(), "the child's answer");
    assert_eq!(server.ask("POST", "/fork?multiprocessing", b"x").text(), "0");
    let lingering: i32 = server.ask("POST", "/fork?linger", b"x").text().parse().expect("a number");
    assert_eq!(server.pid(), pid);
    // With its child alive, the worker's end is still an end.
    kill(pid, libc::SIGKILL);
    assert_eq!(server.ask("POST", "/echo", b"x").status, 200);
    assert_ne!(server.pid(), pid);
    assert!(is_alive(lingering), "it is the application's own");
    kill(lingering, libc::SIGKILL);
}

#[test]
fn a_fork_unknown_to_python_that_holds_the_channel_does_not_hide_its_workers_end() {
    let python = python_or_skip!();
    let server = failing(&python, &["--timeout", "60"]);
    let trace = Trace::new();
    let begun = Instant::now();
    assert_eq!(server.ask("POST", &format!("/fork?{}", trace.path.display()), b"x").status, 502);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!(server.get("/echo").status, 200);
    kill(trace.text().parse().expect("a child"), libc::SIGKILL);
}

#[test]
fn programs_that_an_application_starts_inherit_no_descriptor_of_uringd() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let answer = server.get("/descriptors");
    // Of whoever runs the tests there may be others.
    let ours = |line: &&str| line.contains("socket:") || line.contains("memfd:") || line.contains("anon_inode:");
    assert_eq!(answer.text().lines().find(ours), None, "{}", answer.text());
}

#[test]
fn a_thread_that_never_ends_holds_up_neither_a_stop_nor_a_replacement() {
    let python = python_or_skip!();
    let mut server = failing(&python, &["--max-requests", "2"]);
    let first = server.get("/thread").text().parse().expect("a number");
    wait_until("another one serves", || server.pid() != first);
    wait_until("the first is gone", || !is_alive(first));
    let last: i32 = server.get("/thread").text().parse().expect("a number");
    assert_eq!(server.stop(), Some(0));
    assert!(!is_alive(last));
}

// ---------------------------------------------------------------------------------- it cannot be loaded

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
    let source = Source::new(GOOD);
    let server = source.start(&python, &["--queue-timeout", "1"]);
    assert_eq!(server.get("/").status, 200);
    source.write("raise SystemError('not today')\n");
    server.workers().into_iter().for_each(|pid| kill(pid, libc::SIGKILL));
    server.log.wait_for("SystemError: not today");
    assert_eq!(server.get("/").status, 503, "it waits for a worker, and no longer than it may");
    let tries = server.log.text().matches("SystemError: not today").count();
    assert!(tries <= 8, "{tries} workers were tried in about a second");
    source.write(GOOD);
    wait_until("it serves again", || server.get("/").status == 200);
}

#[test]
fn when_a_successor_cannot_be_loaded_the_old_worker_serves_on_and_the_next_try_waits() {
    let python = python_or_skip!();
    let source = Source::new(GOOD);
    let server = source.start(&python, &["--max-requests", "3"]);
    let pid = server.workers()[0];
    source.write("raise SystemError('not today')\n");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(server.ask("POST", "/", b"x").status, 200);
    }
    server.log.wait_for("SystemError: not today");
    let tries = server.log.text().matches("SystemError: not today").count();
    // 0.1, 0.2, 0.4, 0.8, 1.6 seconds apart.
    assert!(tries <= 2 + 5 * begun.elapsed().as_secs() as usize / 2, "{tries} workers were tried in {:?}", begun.elapsed());
    assert!(server.workers().contains(&pid));
    source.write(GOOD);
    wait_until("another one serves", || !server.workers().contains(&pid));
}

#[test]
fn a_successor_that_does_not_come_to_the_end_of_its_import_is_given_up() {
    let python = python_or_skip!();
    let source = Source::new(GOOD);
    let server = source.start(&python, &["--queue-timeout", "1"]);
    let pid = server.workers()[0];
    let mark = source.0.path().join("mark");
    source.write(&format!("open({:?}, 'w').close()\nimport time\ntime.sleep(3600)\n", mark.display()));
    kill(pid, libc::SIGKILL);
    wait_until("its import hangs", || mark.exists());
    source.write(GOOD);
    // Ten seconds are the least that every import is given.
    wait_until_within(3 * PATIENCE, "it serves", || server.get("/").status == 200);
}

// ---------------------------------------------------------------------------------- it grows

#[test]
fn a_worker_that_grows_is_replaced_and_costs_no_request() {
    let python = python_or_skip!();
    let server = failing(&python, &["--max-rss", "200000000"]);
    let pid = server.pid();
    let (_, ()) = under_load(&server, "/grow?1000000", || {
        wait_until("another one serves", || !server.workers().contains(&pid));
    });
    server.log.wait_for("it has too much memory");
}

#[test]
fn no_two_workers_are_recycled_at_a_time() {
    let python = python_or_skip!();
    let server = failing(&python, &["--workers", "4", "--max-requests", "50"]);
    let before: HashSet<i32> = server.workers().into_iter().collect();
    let mut most = 0;
    under_load(&server, "/echo", || {
        wait_until("all have been replaced", || {
            let now = server.workers();
            most = most.max(now.len());
            now.iter().all(|pid| !before.contains(pid))
        });
    });
    // One that is loaded, or one that is ending.
    assert!(most <= 5, "{most} workers at the same time");
    wait_until("there are as many as there should be", || server.workers().len() == 4);
}

// ---------------------------------------------------------------------------------- streams

#[test]
fn a_generator_without_end_is_closed_when_its_client_leaves() {
    let python = python_or_skip!();
    for pause in ["0", "0.05"] {
        let server = failing(&python, &["--timeout", "60"]);
        let trace = Trace::new();
        let pid = server.pid();
        let mut begun = server.begin("GET", &format!("/endless?{pause},{}", trace.path.display()), None);
        begun.wait_for(200);
        drop(begun);
        trace.wait();
        assert_eq!(trace.text(), "x", "closed once");
        assert_eq!(server.pid(), pid, "its worker is free and alive");
    }
}

#[test]
fn an_application_that_streams_nothing_for_a_while_sees_its_client_leave() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let trace = Trace::new();
    let pid = server.pid();
    let mut begun = server.begin("GET", &format!("/waiting?{}", trace.path.display()), None);
    begun.wait_for(150);
    begun.leave();
    trace.wait();
    assert_eq!(server.pid(), pid);
}

#[test]
fn a_stop_does_not_wait_for_a_client_that_reads_nothing() {
    let python = python_or_skip!();
    let mut server = failing(&python, &["--graceful-timeout", "1"]);
    let trace = Trace::new();
    let mut begun = server.begin("GET", &format!("/endless?0,{}", trace.path.display()), None);
    begun.wait_for(200);
    // The send limit, which the generator would wait for, is longer than anybody waits here.
    server.expected = 3;
    assert_eq!(server.stop(), Some(3));
}

// ---------------------------------------------------------------------------------- nothing is left

#[test]
fn a_stop_ends_workers_and_zygote_that_are_stopped() {
    let python = python_or_skip!();
    for zygote_too in [false, true] {
        let mut server = failing(&python, &["--workers", "2"]);
        let (zygote, workers) = (server.zygote(), server.workers());
        workers.iter().for_each(|pid| kill(*pid, libc::SIGSTOP));
        if zygote_too {
            kill(zygote, libc::SIGSTOP);
        }
        assert_eq!(server.stop(), Some(0));
        wait_until("all have ended", || workers.iter().chain([&zygote]).all(|pid| !is_alive(*pid)));
    }
}

#[test]
fn workers_end_with_a_server_that_is_killed_whatever_they_do() {
    let python = python_or_skip!();
    for target in ["/echo", "/spin", "/grip"] {
        let server = std::mem::ManuallyDrop::new(failing(&python, &["--workers", "2"]));
        let trace = Trace::new();
        let begun = server.begin("GET", target, Some(&trace.path));
        trace.wait();
        let everybody: Vec<i32> = server.workers().into_iter().chain([server.zygote()]).collect();
        assert_eq!(everybody.len(), 3);
        server.signal(libc::SIGKILL);
        wait_until("nobody is left", || !everybody.iter().any(|pid| is_alive(*pid)));
        drop(begun);
    }
}

#[test]
fn an_import_that_hangs_ends_with_a_server_that_is_killed() {
    let python = python_or_skip!();
    for options in [&[][..], &["--preload"]] {
        let source = Source::new("");
        let mark = source.0.path().join("mark");
        source.write(&format!("open({:?}, 'w').close()\nimport time\ntime.sleep(3600)\n", mark.display()));
        let chdir = ["--chdir", source.0.path().to_str().expect("text")];
        let mut server =
            command(&python, "fragile:app", &[&chdir, options].concat()).stderr(Stdio::null()).spawn().expect("uringd can be run");
        wait_until("it is imported", || mark.exists());
        let zygotes = children(server.id().cast_signed());
        let everybody: Vec<i32> = zygotes.iter().copied().chain(children_of_children(server.id())).collect();
        server.kill().expect("a child");
        server.wait().expect("a child");
        wait_until("nobody is left", || !everybody.iter().any(|pid| is_alive(*pid)));
    }
}

#[test]
fn processes_can_be_told_apart_and_leave_no_zombie() {
    let python = python_or_skip!();
    let server = failing(&python, &["--workers", "2"]);
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    assert_eq!(name(server.zygote()), "uringd-zygote");
    assert!(server.workers().into_iter().all(|pid| name(pid) == "uringd-worker"));
    for _ in 0..5 {
        kill(server.pid(), libc::SIGKILL);
        assert_eq!(server.get("/echo").status, 200);
    }
    let all = || [children(server.child.id().cast_signed()), children_of_children(server.child.id())].concat();
    wait_until("a zygote and two workers, and no other", || all().len() == 3);
}

#[test]
fn as_the_first_process_of_a_container_it_leaves_no_zombie_either() {
    let python = python_or_skip!();
    let works = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).stderr(Stdio::null()).status();
    if !works.is_ok_and(|status| status.success()) {
        println!("SKIPPED as_the_first_process_of_a_container_it_leaves_no_zombie_either: unshare(1) may not make a pid namespace");
        return;
    }
    let server = Server::spawn(&mut in_a_namespace(command(&python, "failing:app", &[])));
    let uringd = || children(server.child.id().cast_signed())[0];
    let zygote = || children(uringd())[0];
    let lingering: i32 = server.ask("POST", "/fork?linger", b"x").text().parse().expect("a number");
    assert!(lingering > 1);
    let worker = children(zygote())[0];
    // The child of a worker that ends is the first process's.
    let orphan = children(worker)[0];
    kill(worker, libc::SIGKILL);
    assert_eq!(server.get("/echo").status, 200);
    kill(orphan, libc::SIGKILL);
    wait_until("nobody asks for it but uringd", || state(orphan).is_none());
    // So are the workers of a zygote that ends.
    let (old, worker) = (zygote(), children(zygote())[0]);
    kill(old, libc::SIGKILL);
    wait_until("the zygote and its worker are gone", || state(old).is_none() && state(worker).is_none());
    wait_until("it serves", || server.get("/echo").status == 200);
    kill(uringd(), libc::SIGTERM);
}

/// The same command in a pid namespace of its own, as the first process there.
fn in_a_namespace(command: Command) -> Command {
    let mut outer = Command::new("unshare");
    outer.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(command.get_program()).args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        outer.current_dir(directory);
    }
    outer
}

#[test]
fn one_worker_more_and_one_less_again_and_again_leave_no_thread_behind() {
    let python = python_or_skip!();
    let server = failing(&python, &[]);
    let threads = || fs::read_dir(format!("/proc/{}/task", server.child.id())).expect("its threads").count();
    let mut before = None;
    for _ in 0..6 {
        server.signal(libc::SIGTTIN);
        wait_until("two workers", || server.workers().len() == 2);
        server.signal(libc::SIGTTOU);
        wait_until("one worker", || server.workers().len() == 1);
        let before = *before.get_or_insert_with(|| (threads(), server.descriptors(), mapped(server.child.id())));
        wait_until("as many threads and descriptors as after the first round", || {
            (threads(), server.descriptors()) <= (before.0, before.1)
        });
        assert!(mapped(server.child.id()) < before.2 + (6 << 20), "the stacks of ended threads are given back");
    }
}

/// What a process has mapped, in bytes.
fn mapped(pid: u32) -> usize {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).expect("a process");
    statm.split(' ').next().and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
}

#[test]
fn many_requests_of_every_kind_leave_no_descriptor_behind() {
    let python = python_or_skip!();
    let requests = number("URINGD_LEAK_REQUESTS", 100_000);
    let server = Server::behave(&python, &[]);
    let body = vec![b'a'; 100_000];
    let round = |count: usize| {
        thread::scope(|scope| {
            for client in 0..4 {
                let (server, body) = (&server, &body);
                scope.spawn(move || {
                    let mut stream = server.connect();
                    for number in 0..count / 4 {
                        // Files both ways are rarer, and the ones that take descriptors.
                        let (target, body) = match number % 50 {
                            0 => ("/file", &b""[..]),
                            1 => ("/echo", &body[..]),
                            2 => ("/fail", &b""[..]),
                            _ => ("/", &b""[..]),
                        };
                        let head = format!("POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
                        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("sent");
                        let answer = support::first_answer(&mut stream);
                        assert_eq!(answer.status, if target == "/fail" { 500 } else { 200 });
                        if client == 0 && number % 1000 == 999 {
                            stream = server.connect();
                        }
                    }
                });
            }
        });
    };
    round(400);
    let (worker, zygote) = (server.pid(), server.zygote());
    let counts = || (server.descriptors(), descriptors(worker), descriptors(zygote));
    let before = counts();
    round(requests);
    assert_eq!(server.pid(), worker);
    wait_until("there are no more than before", || {
        let now = counts();
        now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2
    });
}

#[test]
fn every_row_of_the_table_names_a_test_and_every_test_has_a_row() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).expect("a file");
    let table = read("docs/python.md");
    let tests = |text: &str| -> HashSet<String> {
        let names = text.lines().filter_map(|line| line.strip_prefix("fn ")?.split_once("() {"));
        names.map(|(name, _)| name.to_owned()).filter(|name| text.contains(&format!("#[test]\nfn {name}()"))).collect()
    };
    let ours = tests(&read("tests/python_failures.rs"));
    let known: HashSet<String> = tests(&read("tests/python_workers.rs")).into_iter().chain(ours.clone()).collect();
    let is_name = |word: &&str| word.matches('_').count() > 3;
    let named: HashSet<&str> = table.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').filter(is_name).collect();
    let unknown: Vec<_> = named.iter().filter(|name| !known.contains(**name)).collect();
    assert!(unknown.is_empty(), "named in the table, and no test: {unknown:?}");
    let missing: Vec<_> = ours.iter().filter(|name| !named.contains(&***name) && !name.starts_with("every_row")).collect();
    assert!(missing.is_empty(), "tests without a row: {missing:?}");
}
