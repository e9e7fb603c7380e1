//! Python applications in their worker processes, seen from outside: the real binary, a real interpreter.
//!
//! What can go wrong with a worker is in `tests/python_failures.rs`.
//!
//! `URINGD_TEST_PYTHON` names the interpreter (`python3` when not set). Without one the tests print SKIPPED.

#[path = "python/support.rs"]
mod support;

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use support::{Answer, Begun, Server, apps, children_of_children, command, first_answer, is_alive, kill, python, wait_until};

// ---------------------------------------------------------------------------------- answers

#[test]
fn an_application_is_served_and_the_start_up_line_names_it() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--workers", "2"]);
    support::is_served(&server, "2 workers, app behave:app (wsgi)\n");
    assert_eq!(server.get("/").header("Content-Type"), Some("text/plain"));
}

#[test]
fn workers_have_the_native_module_unless_it_is_turned_off() {
    let python = python_or_skip!();
    for (options, expected) in [
        (&[][..], "True"),
        (&["--preload"], "True"),
        // An application with threads: the zygote begins anew.
        (&["--preload", "--env", "THREAD=1"], "True"),
        (&["--env", "URINGD_NATIVE=0"], "False"),
    ] {
        let server = Server::behave(&python, options);
        let answer = server.get("/native");
        assert!([expected, "not for this interpreter"].contains(&answer.text()), "{options:?}: {}", answer.text());
    }
}

#[test]
fn bodies_arrive_in_memory_and_as_files() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    support::echoes_bodies_of(&server, &[1, 100, 65_536, 65_537, 300_000, 3_000_000]);
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
    support::makes_bodies_of(&server, &[0, 7, 100_000, 5_000_000]);
    let file = server.get("/file");
    assert_eq!(file.body, fs::read(apps().join("behave.py")).expect("the file"));
}

#[test]
fn many_requests_on_many_connections_are_answered_in_their_order() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &["--cores", "all", "--workers", "2"]);
    support::answers_pipelined_requests_in_their_order(&server, 40);
}

#[test]
fn an_error_of_the_application_is_a_500_with_its_traceback_in_the_log() {
    let python = python_or_skip!();
    support::answers_errors_with_500_and_logs_them(&Server::behave(&python, &[]));
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

// ---------------------------------------------------------------------------------- clients

#[test]
fn a_client_that_reads_slowly_does_not_hold_a_worker() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let slow: Vec<Begun> = (0..4).map(|_| server.begin("GET", "/bulk?2000", None)).collect();
    // 14 MB each, of which nothing has been read: the only worker is free all the same.
    assert_eq!(server.get("/").status, 200);
    for begun in slow {
        let answer = begun.answer();
        assert_eq!((answer.body.len(), answer.whole), (14_000_000, true));
    }
}

#[test]
fn a_request_whose_client_left_while_it_waited_is_never_started() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let marks = directory.path().join("marks");
    let busy = server.begin("GET", "/sleep?1", None);
    thread::sleep(Duration::from_millis(300));
    let leaving = server.begin("GET", &format!("/mark?{}", marks.display()), None);
    leaving.0.shutdown(Shutdown::Both).expect("left");
    drop(leaving);
    assert_eq!(busy.answer().text(), "slept");
    assert_eq!(server.get("/").status, 200);
    assert!(!marks.exists(), "nobody was there to want it");
}

#[test]
fn an_application_can_see_that_its_client_is_gone() {
    let python = python_or_skip!();
    let server = Server::behave(&python, &[]);
    let directory = tempfile::tempdir().expect("a directory");
    let marks = directory.path().join("marks");
    let leaving = server.begin("GET", &format!("/gone?{}", marks.display()), None);
    thread::sleep(Duration::from_millis(300));
    leaving.leave();
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
    let before = server.descriptors();
    support::is_served_by_eight_workers_in_turn(4, |_| {
        // POST, because a lost GET would be repeated in silence.
        let answer = server.ask("POST", "/pid", b"x");
        assert_eq!(answer.status, 200);
        Some(answer.text().to_owned())
    });
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
    let begun = server.begin("GET", "/sleep?1", None);
    thread::sleep(Duration::from_millis(300));
    server.signal(libc::SIGTERM);
    assert_eq!(begun.answer().text(), "slept");
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
