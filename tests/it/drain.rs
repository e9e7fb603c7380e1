//! How a server ends: exit statuses and signals of the interface.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::support::{Client, PATIENCE, Server, eventually, for_each_backend, get, post};

/// Sends a request that takes `ms` milliseconds, and returns once it has reached the shard.
fn begin(server: &Server, ms: u32) -> Client {
    let mut client = server.connect();
    client.send(get(&format!("/?ms={ms}")));
    server.settle();
    client
}

/// TERM; returns once the server has begun to drain, as an idle connection can tell.
fn begin_drain(server: &mut Server) {
    let mut idle = server.connect();
    server.settle();
    server.signal(libc::SIGTERM);
    idle.expect_eof();
}

#[test]
fn an_idle_server_ends_at_once_with_0() {
    for_each_backend(|backend| {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT] {
            let mut server = backend.serve("builtin:hello", &["--graceful-timeout", "600"]);
            server.expect_alive();
            server.signal(signal);
            assert_eq!(server.wait().code(), Some(0), "after signal {signal}");
        }
    });
}

#[test]
fn term_closes_idle_connections() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:hello", &["--graceful-timeout", "600"]);
        let (mut kept, mut silent) = (server.connect(), server.connect());
        assert_eq!(kept.ask(get("/")).status, 200);
        server.settle();
        server.signal(libc::SIGTERM);
        kept.expect_eof();
        silent.expect_eof();
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn term_lets_a_running_request_finish_and_says_close() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &[]);
        let mut running = begin(&server, 1000);
        server.signal(libc::SIGTERM);
        let answer = running.read_response();
        assert_eq!(answer.status, 200);
        assert!(answer.says_close(), "{answer:?}");
        running.expect_eof();
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn term_lets_queued_requests_finish_too() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &["--handlers", "1"]);
        let mut clients = [begin(&server, 400), begin(&server, 200), begin(&server, 200)];
        server.signal(libc::SIGTERM);
        for client in &mut clients {
            let answer = client.read_response();
            assert_eq!((answer.status, answer.says_close()), (200, true));
        }
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn term_lets_a_large_answer_be_read_to_its_end() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:echo", &["--graceful-timeout", "15"]);
        let mut client = server.connect();
        client.send(post("/", vec![b'x'; 16 << 20]));
        assert!(client.readable(PATIENCE));
        begin_drain(&mut server);
        assert_eq!(client.read_response().echo().is("body").len(), 16 << 20);
        client.expect_eof();
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn term_lets_a_request_on_its_way_arrive() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:echo", &["--graceful-timeout", "15"]);
        let mut client = server.connect();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello");
        server.settle();
        begin_drain(&mut server);
        client.send("world");
        let answer = client.read_response();
        assert!(answer.says_close(), "{answer:?}");
        assert_eq!(answer.echo().is("body"), "helloworld");
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn term_refuses_new_connections_while_old_requests_run() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &[]);
        let mut running = begin(&server, 2000);
        server.signal(libc::SIGTERM);
        eventually("new connections are refused", || TcpStream::connect(server.address()).is_err());
        running.expect_quiet();
        assert_eq!(running.read_response().status, 200);
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn a_second_term_does_not_wait() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &["--graceful-timeout", "600"]);
        let mut running = begin(&server, 25_000);
        begin_drain(&mut server);
        running.expect_quiet();
        let began = Instant::now();
        server.signal(libc::SIGTERM);
        let code = server.wait().code();
        assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
        assert_eq!(code, Some(3), "a request was lost; the log: {}", server.log.text());
    });
}

#[test]
fn int_stops_at_once() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &["--graceful-timeout", "600"]);
        let mut running = begin(&server, 25_000);
        let began = Instant::now();
        server.signal(libc::SIGINT);
        let code = server.wait().code();
        assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
        assert_eq!(code, Some(3), "a request was lost; the log: {}", server.log.text());
        running.expect_closed();
    });
}

#[test]
fn the_drain_limit_ends_in_3_and_says_how_many_were_lost() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:sleep", &["--handlers", "2", "--graceful-timeout", "1"]);
        let running = [begin(&server, 25_000), begin(&server, 25_000), begin(&server, 25_000)];
        server.signal(libc::SIGTERM);
        assert_eq!(server.wait().code(), Some(3));
        let log = server.log.text();
        assert!(log.lines().any(|line| line.contains("requests") && line.contains(" 3 ")), "{log}");
        drop(running);
    });
}

#[test]
fn a_server_is_drained_by_the_reader_of_a_stalled_answer_or_by_the_limit() {
    for_each_backend(|backend| {
        let mut server = backend.serve("builtin:echo", &["--graceful-timeout", "1"]);
        let mut stalled = server.connect();
        stalled.send(post("/", vec![b'x'; 16 << 20]));
        assert!(stalled.readable(PATIENCE));
        server.signal(libc::SIGTERM);
        assert_eq!(server.wait().code(), Some(3), "its answer was cut");
    });
}
