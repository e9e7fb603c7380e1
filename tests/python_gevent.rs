//! Python applications on greenlets (`--worker-class gevent`), seen from outside: the real binary, a real gevent.
//!
//! gevent is installed into a virtual environment below `target/`, once (`tests/python/gevent-requirements.txt`);
//! `URINGD_TEST_GEVENT_PYTHON` names an interpreter that has it already. Without either the tests print SKIPPED.

#[path = "python/support.rs"]
mod support;

use std::{
    collections::HashSet,
    env, fs,
    io::{self, Read, Write},
    net::Shutdown,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use support::{Answer, Begun, Server, command, is_alive, keep_asking, kill, python, under_load, wait_until};

/// The interpreter that has gevent, or `None` and a line that says why not.
fn green_python(test: &str) -> Option<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(path) = env::var_os("URINGD_TEST_GEVENT_PYTHON") {
        return Some(PathBuf::from(path));
    }
    let python = python(test)?;
    match FOUND.get_or_init(|| install(&python)) {
        Ok(path) => Some(path.clone()),
        Err(why) => {
            let _ = writeln!(io::stderr(), "SKIPPED {test}: gevent could not be installed: {why}");
            None
        }
    }
}

/// Makes the virtual environment, unless an earlier run has.
fn install(python: &Path) -> Result<PathBuf, String> {
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/gevent-requirements.txt");
    let wanted = fs::read_to_string(&requirements).expect("the requirements");
    let run = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
        let last = String::from_utf8_lossy(&output.stderr).trim().lines().next_back().unwrap_or("").to_owned();
        if output.status.success() { Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()) } else { Err(last) }
    };
    let version = run(Command::new(python).args(["-c", "import sys; print(sys.implementation.cache_tag)"]))?;
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("gevent-{version}"));
    let (venv_python, installed) = (place.join("bin/python"), place.join("installed"));
    if fs::read_to_string(&installed).is_ok_and(|text| text == wanted) {
        return Ok(venv_python);
    }
    run(Command::new(python).args(["-m", "venv", "--clear"]).arg(&place))?;
    let options = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--requirement"];
    run(Command::new(&venv_python).args(options).arg(&requirements))?;
    fs::write(&installed, wanted).map_err(|error| error.to_string())?;
    Ok(venv_python)
}

/// Ends the test when there is no such interpreter.
macro_rules! green_or_skip {
    () => {
        match green_python(thread::current().name().unwrap_or("?")) {
            Some(python) => python,
            None => return,
        }
    };
}

fn green(python: &Path, options: &[&str]) -> Server {
    Server::start(python, "green:app", &[&["--worker-class", "gevent"], options].concat())
}

/// Sends a GET, whose answer is read later.
fn begin(server: &Server, target: &str) -> Begun {
    server.begin("GET", target, None)
}

/// Waits until so many requests for /wait have begun.
fn wait_for_waiting(server: &Server, count: usize) {
    wait_until("they have begun", || server.get("/waiting").text() == count.to_string());
}

// ---------------------------------------------------------------------------------- answers

#[test]
fn the_worker_itself_passes_its_tests() {
    let python = green_or_skip!();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/test_gevent.py");
    let output = Command::new(&python).arg("-B").arg(path).stdin(Stdio::null()).output().expect("it can be run");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("\nOK"), "{told}");
}

#[test]
fn an_application_is_served_and_the_start_up_line_names_its_class() {
    let python = green_or_skip!();
    for backend in ["auto", "epoll"] {
        support::is_served(&green(&python, &["--workers", "2", "--backend", backend]), "2 workers, app green:app (wsgi, gevent)\n");
    }
}

#[test]
fn bodies_and_answers_of_all_sizes_arrive_whole() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    support::echoes_bodies_of(&server, &[1, 65_536, 65_537, 300_000, 3_000_000]);
    support::makes_bodies_of(&server, &[0, 131_072, 131_073, 5_000_000]);
    let bulk = server.get("/bulk?100");
    assert_eq!((bulk.body.len(), bulk.whole), (6_553_600, true));
    assert_eq!(server.ask("HEAD", "/bulk?100", b"").status, 200);
    assert_eq!(server.get("/file").body, fs::read(support::apps().join("green.py")).expect("the file"));
}

#[test]
fn large_bodies_of_many_requests_at_a_time_are_not_mixed_up() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    thread::scope(|scope| {
        for client in 0..40_u32 {
            let server = &server;
            scope.spawn(move || {
                let body: Vec<u8> = (0..200_000).map(|at| ((at * (client + 1)) >> 3) as u8).collect();
                let answer = server.ask("POST", "/echo", &body);
                assert!(answer.status == 200 && answer.body == body, "client {client}");
            });
        }
    });
}

#[test]
fn hundreds_of_requests_sleep_in_one_worker_at_the_same_time() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let begun = Instant::now();
    let streams: Vec<Begun> = (0..500).map(|_| begin(&server, "/sleep?1")).collect();
    let pids: HashSet<String> = streams.into_iter().map(|stream| stream.answer().text().to_owned()).collect();
    assert_eq!(pids.len(), 1);
    // One after the other would take 500 seconds.
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

#[test]
fn answers_come_in_the_order_in_which_they_are_ready() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let mut streams: Vec<_> = (0..20).map(|number| Some(begin(&server, &format!("/wait?{number}")))).collect();
    wait_for_waiting(&server, 20);
    for number in (0..20).rev() {
        server.get(&format!("/open?{number}"));
        let answer = streams[number].take().expect("still there").answer();
        assert_eq!(answer.text(), number.to_string());
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let python = green_or_skip!();
    support::answers_pipelined_requests_in_their_order(&green(&python, &["--workers", "2"]), 20);
}

#[test]
fn an_error_of_the_application_is_a_500_with_its_traceback_in_the_log() {
    let python = green_or_skip!();
    support::answers_errors_with_500_and_logs_them(&green(&python, &[]));
}

#[test]
fn flask_runs_on_greenlets() {
    let python = green_or_skip!();
    let server = Server::start(&python, "green:make_flask()", &["-k", "gevent"]);
    thread::scope(|scope| {
        for client in 0..50 {
            let server = &server;
            scope.spawn(move || {
                let mut stream = server.connect();
                let head = format!("GET /hi/a{client} HTTP/1.1\r\nHost: a\r\nX-From: b{client}\r\nConnection: close\r\n\r\n");
                stream.write_all(head.as_bytes()).expect("sent");
                assert_eq!(Begun(stream).answer().text(), format!("hi a{client} of b{client}"));
                let expected: String = (0..5).map(|number| format!("{number} m{client}\n")).collect();
                assert_eq!(server.get(&format!("/stream?mark=m{client}")).text(), expected);
            });
        }
    });
    let mut form = b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n".to_vec();
    form.resize(form.len() + 3_000_000, b'f');
    form.extend_from_slice(b"\r\n--B--\r\n");
    let mut stream = server.connect();
    let head = "POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary=B\r\n";
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n", form.len()).as_bytes()).expect("sent");
    stream.write_all(&form).expect("sent");
    assert_eq!(Begun(stream).answer().text(), "3000000");
    assert_eq!(server.get("/nowhere").status, 404);
}

// ---------------------------------------------------------------------------------- streams

#[test]
fn events_reach_three_hundred_clients_at_the_same_time() {
    let python = green_or_skip!();
    for backend in ["auto", "epoll"] {
        let server = green(&python, &["--backend", backend]);
        let begun = Instant::now();
        let streams: Vec<Begun> = (0..300).map(|_| begin(&server, "/ticks?20")).collect();
        for stream in streams {
            let answer = stream.answer();
            let events: String = (0..20).map(|number| format!("data: {number}\n\n")).collect();
            assert!(answer.whole && answer.text() == events, "{answer:?}");
        }
        // One client after the other would take 600 seconds.
        assert!(begun.elapsed() < Duration::from_secs(100), "{:?}", begun.elapsed());
    }
}

#[test]
fn clients_that_do_not_read_hold_nobody() {
    let python = green_or_skip!();
    // Little room in the spool, so that the worker's streams come to a stop.
    let server = green(&python, &["--limit-response-spool", "1000000"]);
    let mut stuck: Vec<Begun> = (0..10).map(|_| begin(&server, "/bulk?400")).collect();
    for stream in &mut stuck {
        stream.wait_for(100);
    }
    for _ in 0..50 {
        assert_eq!(server.get("/").status, 200);
    }
    let other = server.get("/bulk?100");
    assert_eq!((other.body.len(), other.whole), (6_553_600, true));
    for stream in stuck {
        let bytes = stream.rest();
        assert!(bytes.len() > 26_214_400 && bytes.ends_with(b"0\r\n\r\n"), "{} bytes", bytes.len());
    }
}

#[test]
fn a_stream_ends_when_its_client_is_gone_and_the_others_go_on() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let begin = |name: &str| {
        let mut stream = begin(&server, &format!("/endless?{}", path(name).display()));
        stream.wait_for(20);
        stream
    };
    let (stays, leaves) = (begin("stays"), begin("leaves"));
    leaves.leave();
    wait_until("its generator is closed", || path("leaves").exists());
    assert!(!path("stays").exists());
    stays.leave();
    wait_until("the other one is, too", || path("stays").exists());
    assert!(!server.log.text().contains("Traceback"), "{}", server.log.text());
}

#[test]
fn a_stream_that_makes_nothing_more_is_cut_off_and_ended() {
    let python = green_or_skip!();
    let server = green(&python, &["--timeout", "1"]);
    let stalled = server.get("/stall");
    assert_eq!((stalled.status, stalled.text(), stalled.whole), (200, "the beginning", false));
    server.log.wait_for("in act_stall");
    assert_eq!(server.workers().len(), 1);
}

// ---------------------------------------------------------------------------------- clients that leave

#[test]
fn an_application_can_see_that_its_client_is_gone() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let paths: Vec<PathBuf> = (0..3).map(|number| directory.path().join(number.to_string())).collect();
    let mut streams: Vec<Begun> = paths.iter().map(|path| begin(&server, &format!("/gone?{}", path.display()))).collect();
    let waiting = begin(&server, "/wait?x");
    wait_for_waiting(&server, 1);
    streams.remove(1).leave();
    wait_until("the application has noticed", || paths[1].exists());
    assert!(!paths[0].exists() && !paths[2].exists(), "each has its own client");
    streams.into_iter().for_each(Begun::leave);
    wait_until("and so have the others", || paths[0].exists() && paths[2].exists());
    server.get("/open?x");
    assert_eq!(waiting.answer().text(), "x");
}

#[test]
fn a_request_whose_client_left_while_it_waited_is_never_started() {
    let python = green_or_skip!();
    let server = green(&python, &["--greenlets", "1"]);
    let directory = tempfile::tempdir().expect("a directory");
    let marks = directory.path().join("marks");
    let mut busy = begin(&server, "/ticks?15");
    busy.wait_for(20);
    let leaving = begin(&server, &format!("/mark?{}", marks.display()));
    leaving.0.shutdown(Shutdown::Both).expect("left");
    leaving.leave();
    let rest = busy.rest();
    assert!(rest.ends_with(b"data: 14\n\n\r\n0\r\n\r\n"));
    assert_eq!(server.get("/").status, 200);
    assert!(!marks.exists(), "nobody was there to want it");
}

// ---------------------------------------------------------------------------------- limits

#[test]
fn no_more_requests_run_at_a_time_than_was_said() {
    let python = green_or_skip!();
    let server = green(&python, &["--greenlets", "3"]);
    let begun = Instant::now();
    let streams: Vec<Begun> = (0..9).map(|_| begin(&server, "/sleep?0.5")).collect();
    assert!(streams.into_iter().all(|stream| stream.answer().status == 200));
    assert!(begun.elapsed() >= Duration::from_millis(1_500), "{:?}", begun.elapsed());
}

#[test]
fn requests_are_spread_over_the_workers() {
    let python = green_or_skip!();
    let server = green(&python, &["--workers", "4", "--cores", "1"]);
    let streams: Vec<Begun> = (0..40).map(|_| begin(&server, "/sleep?1")).collect();
    let mut served = std::collections::HashMap::<String, usize>::new();
    for stream in streams {
        *served.entry(stream.answer().text().to_owned()).or_default() += 1;
    }
    assert_eq!(served.len(), 4, "{served:?}");
    assert!(served.values().all(|count| (5..=15).contains(count)), "{served:?}");
}

#[test]
fn a_worker_that_computes_is_given_nothing_while_another_one_is_free() {
    let python = green_or_skip!();
    for cores in ["1", "all"] {
        let server = green(&python, &["--workers", "2", "--cores", cores]);
        let directory = tempfile::tempdir().expect("a directory");
        let (enough, begun) = (directory.path().join("enough"), directory.path().join("enough.begun"));
        let spinning = begin(&server, &format!("/spin_until?{}", enough.display()));
        wait_until("it computes", || begun.exists());
        // So long a worker may be silent before anybody minds.
        thread::sleep(Duration::from_millis(60));
        // One that is given to the busy one is answered when it has enough, and this is after them.
        let pids: HashSet<i32> = (0..50).map(|_| server.pid()).collect();
        fs::write(enough, "").expect("a file");
        assert_eq!(pids.len(), 1);
        assert!(!pids.contains(&spinning.answer().text().parse().expect("a number")), "only the other worker serves");
    }
}

#[test]
fn an_overdue_request_is_ended_alone() {
    let python = green_or_skip!();
    let server = green(&python, &["--timeout", "4"]);
    let pid = server.pid();
    let overdue: Vec<Begun> = (0..5).map(|number| begin(&server, &format!("/wait?{number}"))).collect();
    let mut ticks = begin(&server, "/ticks?60");
    ticks.wait_for(20);
    for stream in overdue {
        assert_eq!(stream.answer().status, 504);
    }
    server.log.wait_for("Overdue: the request takes longer than --timeout");
    server.log.wait_for("in act_wait");
    let rest = ticks.rest();
    assert!(rest.ends_with(b"0\r\n\r\n"), "the stream went on to its end");
    assert_eq!(server.pid(), pid);
    assert!(!server.log.text().contains("is replaced"), "{}", server.log.text());
}

#[test]
fn a_deadline_can_be_moved_by_the_application() {
    let python = green_or_skip!();
    support::lets_a_request_move_its_deadline(&green(&python, &["--timeout", "1"]));
}

#[test]
fn what_a_request_left_running_may_still_speak_of_it() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let pid = server.pid();
    assert_eq!(server.get("/late").text(), "soon");
    wait_until("it has spoken", || server.get("/seen").text() == "late");
    assert_eq!(server.pid(), pid);
}

#[test]
fn a_stopped_worker_is_replaced_at_its_deadline() {
    let python = green_or_skip!();
    support::replaces_a_stopped_worker(&green(&python, &["--timeout", "1"]));
}

#[test]
fn a_request_that_will_not_end_costs_its_place_until_the_worker_is_replaced_in_order() {
    let python = green_or_skip!();
    let server = green(&python, &["--timeout", "1", "--graceful-timeout", "2"]);
    let pid = server.pid();
    assert_eq!(server.get("/stubborn").status, 504);
    wait_until("it was told to end", || server.get("/seen").text() == "Overdue");
    under_load(&server, "/", || wait_until("another worker serves", || server.pid() != pid));
    wait_until("the old one is gone", || !is_alive(pid));
}

#[test]
fn a_request_that_lets_nobody_else_run_costs_its_worker() {
    let python = green_or_skip!();
    let server = green(&python, &["--timeout", "1", "--workers", "2"]);
    let spinning = begin(&server, "/spin?60");
    thread::sleep(Duration::from_millis(200));
    let pid = server.pid();
    assert_eq!(spinning.answer().status, 504);
    server.log.wait_for("in act_spin");
    server.log.wait_for("gives no other request its turn");
    assert!(is_alive(pid), "the other worker is still there");
    wait_until("two workers serve", || {
        let streams: Vec<Begun> = (0..8).map(|_| begin(&server, "/sleep?0.3")).collect();
        let pids: HashSet<String> = streams.into_iter().map(|stream| stream.answer().text().to_owned()).collect();
        pids.len() == 2
    });
}

// ---------------------------------------------------------------------------------- workers that end

#[test]
fn requests_in_a_worker_that_is_killed_are_repeated_only_when_that_is_safe() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("once");
    let before = server.pid();
    let gets: Vec<Begun> = (0..10).map(|number| begin(&server, &format!("/wait?get{number}"))).collect();
    let posts: Vec<Begun> = (0..3).map(|number| server.begin("POST", &format!("/wait?{number}"), None)).collect();
    let mut stream = begin(&server, "/ticks?1000");
    stream.wait_for(20);
    wait_for_waiting(&server, 13);
    fs::write(&file, "").expect("a file");
    assert_eq!(server.get(&format!("/die?{}", file.display())).text(), "alive", "repeated itself");
    wait_for_waiting(&server, 10);
    assert_ne!(server.pid(), before);
    for (number, get) in gets.into_iter().enumerate() {
        server.get(&format!("/open?get{number}"));
        assert_eq!(get.answer().text(), format!("get{number}"));
    }
    for post in posts {
        assert_eq!(post.answer().status, 502);
    }
    let mut rest = Vec::new();
    let _ = stream.0.read_to_end(&mut rest);
    assert!(!rest.ends_with(b"0\r\n\r\n"), "the end is missing, and the client can tell");
    assert_eq!(server.get("/crash").status, 502, "once again, and no more");
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn a_worker_killed_while_it_is_idle_costs_no_request() {
    let python = green_or_skip!();
    support::loses_no_request_with_an_idle_worker(&green(&python, &[]));
}

#[test]
fn requests_outlive_the_workers_that_are_killed_or_ended_meanwhile() {
    let python = green_or_skip!();
    let server = green(&python, &["--workers", "2", "--cores", "all"]);
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let ask = |client: usize| {
            // Ended in order, a worker gives back what it has not begun: a POST, too.
            let quick = client.is_multiple_of(2);
            let method = if signal == libc::SIGTERM && quick { "POST" } else { "GET" };
            let answer = server.ask(method, if quick { "/pid" } else { "/sleep?0.05" }, b"");
            assert_eq!(answer.status, 200, "{method} {answer:?}");
        };
        let (answers, ()) = keep_asking(8, ask, || {
            for _ in 0..6 {
                thread::sleep(Duration::from_millis(400));
                kill(server.pid(), signal);
            }
        });
        assert!(answers > 50, "{answers}");
    }
}

#[test]
fn a_worker_that_is_told_to_end_finishes_what_it_has_while_another_one_serves() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let pid = server.pid();
    let mut ticks = begin(&server, "/ticks?30");
    ticks.wait_for(20);
    kill(pid, libc::SIGTERM);
    wait_until("another one serves", || server.pid() != pid);
    let rest = ticks.rest();
    assert!(String::from_utf8_lossy(&rest).contains("data: 29\n") && rest.ends_with(b"0\r\n\r\n"));
    wait_until("then it ends", || !is_alive(pid));
}

#[test]
fn recycling_costs_no_request_and_no_stream() {
    let python = green_or_skip!();
    let server = green(&python, &["--workers", "2", "--max-requests", "50", "--max-requests-jitter", "20"]);
    support::is_served_by_eight_workers_in_turn(6, |client| {
        if client == 0 {
            assert!(server.get("/ticks?10").whole);
            return None;
        }
        // POST, because a lost GET would be repeated in silence.
        let answer = server.ask("POST", "/sleep?0.005", b"x");
        assert_eq!(answer.status, 200);
        Some(answer.text().to_owned())
    });
}

#[test]
fn an_exit_in_a_request_is_a_500_and_a_new_worker_and_others_are_finished() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    let pid = server.pid();
    let other = begin(&server, "/sleep?1");
    let waits = begin(&server, "/wait?z");
    wait_for_waiting(&server, 1);
    assert_eq!(server.get("/exit").status, 500);
    assert_eq!(server.get("/").status, 200);
    assert_eq!(other.answer().text(), pid.to_string());
    waits.leave();
    assert_ne!(server.pid(), pid);
}

#[test]
fn a_drain_lets_requests_and_streams_finish() {
    let python = green_or_skip!();
    let mut server = green(&python, &[]);
    let sleeping = begin(&server, "/sleep?1");
    let mut ticks = begin(&server, "/ticks?15");
    ticks.wait_for(20);
    let reading = thread::spawn(move || (sleeping.answer(), ticks.rest()));
    assert_eq!(server.stop(), Some(0));
    let (slept, ticks) = reading.join().expect("answers");
    assert_eq!(slept.status, 200);
    assert!(ticks.ends_with(b"0\r\n\r\n"));
}

#[test]
fn workers_come_and_go_by_signal_with_requests_in_them() {
    let python = green_or_skip!();
    let server = green(&python, &[]);
    server.signal(libc::SIGTTIN);
    let serve = |seconds: &str| -> Vec<Begun> { (0..10).map(|_| begin(&server, &format!("/sleep?{seconds}"))).collect() };
    let workers = |streams: Vec<Begun>| streams.into_iter().map(|stream| stream.answer().text().to_owned()).collect::<HashSet<_>>().len();
    wait_until("two workers serve", || workers(serve("0.1")) == 2);
    let mut streams: Vec<(Begun, Vec<u8>)> = (0..10).map(|_| (begin(&server, "/ticks?20"), vec![0; 200])).collect();
    streams.iter_mut().for_each(|(stream, bytes)| stream.0.read_exact(bytes).expect("it has begun"));
    server.signal(libc::SIGTTOU);
    let finish = |(stream, mut bytes): (Begun, Vec<u8>)| {
        bytes.extend(stream.rest());
        let answer = Answer::parse(&bytes);
        assert!(answer.whole && answer.text().ends_with("data: 19\n\n"), "{answer:?}");
        answer.header("X-Pid").expect("a number").to_owned()
    };
    let pids: HashSet<String> = streams.into_iter().map(finish).collect();
    assert_eq!(pids.len(), 2, "both were at work, and finished");
    wait_until("one worker", || server.workers().len() == 1);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn a_preloaded_application_is_forked_and_not_loaded_again() {
    let python = green_or_skip!();
    let server = green(&python, &["--preload", "--workers", "2"]);
    let streams: Vec<Begun> = (0..50).map(|_| begin(&server, "/sleep?0.5")).collect();
    assert!(streams.into_iter().all(|stream| stream.answer().status == 200));
    kill(server.pid(), libc::SIGKILL);
    assert_eq!(server.get("/").status, 200);
    assert!(!server.log.text().contains("not preloaded"), "{}", server.log.text());
}

#[test]
fn an_interpreter_without_gevent_is_told_at_the_start() {
    let test = "an_interpreter_without_gevent_is_told_at_the_start";
    let Some(python) = python(test) else { return };
    let has_it = Command::new(&python).args(["-c", "import gevent"]).stderr(Stdio::null()).status();
    if has_it.is_ok_and(|status| status.success()) {
        let _ = writeln!(io::stderr(), "SKIPPED {test}: {} has gevent", python.display());
        return;
    }
    let ended = command(&python, "green:app", &["-k", "gevent"]).output().expect("uringd can be run");
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(stderr.lines().next_back().is_some_and(|last| last.contains("try: ") && last.contains("pip install gevent")), "{stderr}");
}
