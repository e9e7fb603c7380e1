//! RFC 9112 section 9.3.2: answers in the order of the requests, and no request lost or invented.

use std::time::Duration;

use crate::support::{CHUNKED, Random, for_each_backend, get, post};

/// What the server may gain in memory for one connection that pipelines and does not read.
const GROWTH_BYTES_MAX: u64 = 16 << 20;

#[test]
fn second_pipelined_request_is_answered_after_the_first() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(get("/first") + &get("/second"));
        assert_eq!(client.read_response().echo().is("target"), "/first");
        assert_eq!(client.read_response().echo().is("target"), "/second");
        client.expect_quiet();
    });
}

#[test]
fn a_hundred_pipelined_requests_are_answered_in_order() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut random = Random::new();
        let requests: String = (0..100).map(|number| get(&format!("/{number}"))).collect();
        for _ in 0..10 {
            let mut client = server.connect();
            client.send_split(&requests, &mut random);
            for number in 0..100 {
                assert_eq!(client.read_response().echo().is("target"), format!("/{number}"));
            }
            client.expect_quiet();
        }
    });
}

#[test]
fn a_slow_answer_holds_back_the_quick_one_behind_it() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &["--handlers", "2"]);
        let mut client = server.connect();
        client.send(format!("{}GET /?ms=0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", get("/?ms=300")));
        assert!(!client.read_response().says_close(), "the second answer came first");
        assert!(client.read_response().says_close());
        client.expect_eof();
    });
}

#[test]
fn pipelined_requests_with_bodies_keep_to_their_framing() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut random = Random::new();
        let chunked = format!("{CHUNKED}3\r\nfoo\r\n0\r\n\r\n");
        let requests = [post("/", "one"), chunked.into(), get("/x").into(), post("/", ""), post("/", "last")].concat();
        for _ in 0..20 {
            let mut client = server.connect();
            client.send_split(&requests, &mut random);
            for body in ["one", "foo", "", "", "last"] {
                assert_eq!(client.read_response().echo().is("body"), body);
            }
            client.expect_quiet();
        }
    });
}

#[test]
fn garbage_behind_a_good_request_is_refused_after_its_answer() {
    for_each_backend(|backend| {
        for target in ["builtin:echo", "builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            client.send(get("/good") + "GARBAGE\r\n\r\n" + &get("/never"));
            assert_eq!(client.read_response().status, 200, "{target}");
            let refusal = client.read_response();
            assert_eq!(refusal.status, 400, "{target}");
            assert!(refusal.says_close());
            client.expect_eof();
        }
    });
}

#[test]
fn an_empty_line_before_a_request_is_skipped() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(format!("\r\n{}\r\n{}", get("/first"), get("/second")));
        assert_eq!(client.read_response().echo().is("target"), "/first");
        assert_eq!(client.read_response().echo().is("target"), "/second");
    });
}

#[test]
fn a_hundred_thousand_unread_requests_are_bounded_and_all_answered_once_read() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &[]);
            assert_eq!(server.ask(get("/")).status, 200);
            let before = server.peak_resident_bytes();

            const REQUESTS: usize = 100_000;
            let bytes = get("/").repeat(REQUESTS).into_bytes();
            let mut client = server.connect();
            let mut sent = 0;
            // Until nothing has fitted for a while: then the server has paused.
            while sent < bytes.len() && client.writable(Duration::from_secs(1)) {
                sent += client.send_what_fits(&bytes[sent..]);
            }
            let growth = server.peak_resident_bytes().saturating_sub(before);
            assert!(growth < GROWTH_BYTES_MAX, "{target}: {growth} bytes more after {sent} bytes of requests");
            server.expect_alive();

            for _ in 0..REQUESTS {
                assert_eq!(client.read_response().status, 200);
                if sent < bytes.len() {
                    sent += client.send_what_fits(&bytes[sent..]);
                }
            }
            client.expect_quiet();
            let growth = server.peak_resident_bytes().saturating_sub(before);
            assert!(growth < GROWTH_BYTES_MAX, "{target}: {growth} bytes more after all answers");
        }
    });
}
