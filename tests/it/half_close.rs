//! A FIN ends what the peer sends, not what it wants to read (RFC 9112 section 9.6).

use crate::support::{CHUNKED, End, for_each_backend, get, post};

#[test]
fn a_client_that_closes_its_side_still_gets_the_full_answer() {
    for_each_backend(|backend| {
        for (target, request) in [
            ("builtin:hello", get("/").into_bytes()),
            ("builtin:hello-pool", get("/").into_bytes()),
            ("builtin:sleep", get("/?ms=300").into_bytes()),
            ("builtin:echo", post("/", vec![b'x'; 2_000_000])),
        ] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            client.send(request);
            client.finish_sending();
            assert_eq!(client.read_response().status, 200, "{target}");
            client.expect_eof();
        }
    });
}

#[test]
fn every_request_before_the_fin_is_answered() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &[]);
        let mut client = server.connect();
        client.send(get("/?ms=200") + &get("/?ms=0") + &get("/?ms=0"));
        client.finish_sending();
        for _ in 0..3 {
            assert_eq!(client.read_response().status, 200);
        }
        client.expect_eof();
    });
}

#[test]
fn a_fin_between_requests_closes_without_a_word() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let mut client = server.connect();
        assert_eq!(client.ask(get("/")).status, 200);
        client.finish_sending();
        client.expect_eof();

        let mut silent = server.connect();
        silent.finish_sending();
        silent.expect_eof();
    });
}

/// CK-06, and its likes in a head and in a body with a length: no handler sees what is incomplete.
#[test]
fn a_fin_within_a_request_is_refused_or_closed() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let short = "POST /evil HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello";
        let chunk_cut = format!("{CHUNKED}5\r\nhel");
        let no_last_chunk = format!("{CHUNKED}3\r\nfoo\r\n");
        let trailer_cut = format!("{CHUNKED}3\r\nfoo\r\n0\r\nX: y\r\n");
        for part in ["GET", "GET /evil HTTP/1.1\r\nHost: a\r\n", short, &chunk_cut, &no_last_chunk, &trailer_cut] {
            let mut client = server.connect();
            client.send(part);
            client.finish_sending();
            let (answer, end) = client.read_to_end();
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{part:?}: {answer:?}");
            assert_eq!(end, End::Eof, "{part:?}");
        }
        server.expect_alive();
    });
}

#[test]
fn a_fin_within_a_pipelined_request_does_not_cost_the_answer_before_it() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(get("/first") + "GET /half HTTP/1.1\r\n");
        client.finish_sending();
        assert_eq!(client.read_response().echo().is("target"), "/first");
        let (rest, end) = client.read_to_end();
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400 "), "{rest:?}");
        assert_eq!(end, End::Eof);
    });
}
