//! A bounded queue and few handlers per core: who runs, who waits, who is refused.
//!
//! The order in which requests reach the shard is made sure of with `Server::settle`, and that one is run with `run`.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::support::{Client, End, Server, eventually, for_each_backend, get};

/// Sends a request that takes `ms` milliseconds to an idle server, and returns once a handler has taken it.
fn run(server: &Server, ms: u32) -> Client {
    let mut sleeps = None;
    eventually("all handlers wait", || {
        let before = sleeps;
        thread::sleep(Duration::from_millis(20));
        sleeps = server.handler_sleeps();
        sleeps.is_some() && sleeps == before
    });
    let client = begin(server, ms);
    eventually("a handler takes the request", || server.handler_sleeps() > sleeps);
    client
}

/// Sends a request that takes `ms` milliseconds, and returns once it has reached the shard.
fn begin(server: &Server, ms: u32) -> Client {
    let mut client = server.connect();
    client.send(get(&format!("/?ms={ms}")));
    server.settle();
    client
}

#[test]
fn two_handlers_run_two_requests_at_the_same_time() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "2"]);
        let mut slow = begin(&server, 1500);
        let mut quick = begin(&server, 10);
        assert_eq!(quick.read_response().status, 200);
        slow.expect_quiet();
        assert_eq!(slow.read_response().status, 200);
    });
}

#[test]
fn a_third_request_waits_for_one_of_two_handlers() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "2"]);
        let began = Instant::now();
        let mut running = [begin(&server, 700), begin(&server, 700)];
        let mut waiting = begin(&server, 400);
        assert_eq!(waiting.read_response().status, 200);
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(1100), "it ran beside the two: answered after {took:?}");
        running.iter_mut().for_each(|client| assert_eq!(client.read_response().status, 200));
    });
}

#[test]
fn many_requests_share_few_handlers_and_all_are_answered() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "3"]);
        let mut clients: Vec<Client> = (0..60).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(get("/?ms=10")));
        clients.iter_mut().for_each(|client| assert_eq!(client.read_response().status, 200));
    });
}

#[test]
fn a_full_queue_refuses_at_once_and_says_when_to_come_back() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--queue", "1"]);
        let (mut running, mut waiting) = (run(&server, 1500), begin(&server, 0));
        let refusal = server.ask(get("/?ms=0"));
        assert_eq!(refusal.status, 503);
        let seconds = refusal.field("retry-after").expect("Retry-After");
        assert!(seconds.parse::<u32>().is_ok(), "Retry-After: {seconds:?}");
        running.expect_quiet();
        assert_eq!(running.read_response().status, 200);
        assert_eq!(waiting.read_response().status, 200);
    });
}

#[test]
fn a_request_that_waited_too_long_is_refused() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--queue-timeout", "1"]);
        let (mut running, mut waiting) = (begin(&server, 4000), begin(&server, 0));
        let refusal = waiting.read_response();
        assert_eq!(refusal.status, 503);
        assert!(refusal.field("retry-after").is_some(), "{refusal:?}");
        running.expect_quiet();
        assert_eq!(running.read_response().status, 200);
    });
}

#[test]
fn a_request_that_runs_too_long_is_answered_with_504() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--timeout", "1"]);
        let mut running = begin(&server, 2500);
        assert_eq!(running.read_response().status, 504);
        // What the handler says in the end reaches nobody; it then works on.
        assert_eq!(server.ask(get("/?ms=0")).status, 200);
        let end = running.end_within(Duration::ZERO);
        assert!([End::Open, End::Eof].contains(&end), "a second answer: {end:?}");
    });
}

#[test]
fn waiting_does_not_count_as_running() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--timeout", "2"]);
        let (mut first, mut second) = (begin(&server, 1300), begin(&server, 1300));
        assert_eq!([first.read_response().status, second.read_response().status], [200, 200]);
    });
}

#[test]
fn a_client_that_left_while_queued_is_never_served() {
    for_each_backend(|backend| {
        for leave in [Client::reset, drop] {
            let server = backend.serve("builtin:sleep", &["--handlers", "1"]);
            let (mut running, leaving) = (begin(&server, 1500), begin(&server, 8000));
            leave(leaving);
            let mut next = begin(&server, 0);
            assert_eq!(running.read_response().status, 200);
            let began = Instant::now();
            assert_eq!(next.read_response().status, 200);
            assert!(began.elapsed() < Duration::from_secs(6), "the request of the one that left was run");
        }
    });
}

#[test]
fn inline_handlers_are_not_held_up_by_a_full_pool() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--queue", "1"]);
        let mut clients = [run(&server, 1000), begin(&server, 0)];
        // Refusals are the shard's own work, as inline answers are.
        for _ in 0..50 {
            server.settle();
        }
        clients[0].expect_quiet();
        clients.iter_mut().for_each(|client| assert_eq!(client.read_response().status, 200));
    });
}

#[test]
fn a_refused_request_leaves_the_server_as_it_was() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "1", "--queue", "1"]);
        let mut clients = [run(&server, 700), begin(&server, 0)];
        for _ in 0..20 {
            assert_eq!(server.ask(get("/?ms=0")).status, 503);
        }
        clients.iter_mut().for_each(|client| assert_eq!(client.read_response().status, 200));
        for _ in 0..20 {
            assert_eq!(server.ask(get("/?ms=0")).status, 200);
        }
    });
}
