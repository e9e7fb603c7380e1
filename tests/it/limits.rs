//! Each limit of `Limits`: what just fits is served, one more has its status, and the client can read it.

use std::{thread, time::Duration};

use crate::support::{CHUNKED, Client, End, PATIENCE, Server, for_each_backend, get, post};

/// `fits` is served, `beyond` gets `status`, and its connection closes in order.
fn expect_edge(server: &Server, fits: impl AsRef<[u8]>, beyond: impl AsRef<[u8]>, status: u16) {
    assert_eq!(server.ask(fits).status, 200, "what just fits");
    let mut client = server.connect();
    let refusal = client.ask(beyond);
    assert_eq!(refusal.status, status, "one beyond");
    assert!(refusal.says_close());
    client.expect_eof();
}

/// A request whose head has exactly `bytes` bytes, spread over fields that are small themselves.
fn head_of(bytes: usize) -> String {
    let mut head = "GET / HTTP/1.1\r\nHost: test\r\n".to_owned();
    while bytes - head.len() > 300 {
        head += &format!("X:{}\r\n", "v".repeat(196));
    }
    head += &format!("X:{}\r\n\r\n", "v".repeat(bytes - head.len() - 6));
    assert_eq!(head.len(), bytes);
    head
}

/// A GET request with a request line of exactly `bytes` bytes.
fn line_of(bytes: usize) -> String {
    get(&format!("/{}", "a".repeat(bytes - "GET / HTTP/1.1".len())))
}

/// A GET request with `count` fields.
fn fields_of(count: usize) -> String {
    get("/").replace("\r\n\r\n", &format!("{}\r\n\r\n", "\r\nX: v".repeat(count - 1)))
}

#[test]
fn a_request_line_beyond_the_limit_is_a_414() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-request-line", "1000"]);
        expect_edge(&server, line_of(1000), line_of(1001), 414);
        let server = backend.serve("builtin:hello", &[]);
        expect_edge(&server, line_of(8192), line_of(8193), 414);
    });
}

#[test]
fn a_request_line_without_end_is_refused_before_it_ends() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-request-line", "1000"]);
        let mut client = server.connect();
        client.send_byte_by_byte(format!("GET /{}", "a".repeat(1100)).as_bytes());
        assert_eq!(client.read_response().status, 414);
        client.expect_eof();
    });
}

#[test]
fn fields_beyond_the_limit_are_a_431() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-request-fields", "5"]);
        expect_edge(&server, fields_of(5), fields_of(6), 431);
        let server = backend.serve("builtin:hello", &[]);
        expect_edge(&server, fields_of(100), fields_of(101), 431);
    });
}

#[test]
fn a_field_beyond_the_limit_is_a_431() {
    for_each_backend(|backend| {
        let with_field = |bytes: usize| get("/").replace("\r\n\r\n", &format!("\r\nX:{}\r\n\r\n", "v".repeat(bytes - 2)));
        let server = backend.serve("builtin:hello", &["--limit-request-field-size", "1000"]);
        expect_edge(&server, with_field(1000), with_field(1001), 431);
        let server = backend.serve("builtin:hello", &[]);
        expect_edge(&server, with_field(8192), with_field(8193), 431);
    });
}

#[test]
fn a_head_beyond_the_limit_is_a_431() {
    for_each_backend(|backend| {
        let small = ["--limit-head", "4000", "--limit-request-line", "1000", "--limit-request-field-size", "1000"];
        let server = backend.serve("builtin:hello", &small);
        expect_edge(&server, head_of(4000), head_of(4001), 431);
        let server = backend.serve("builtin:hello", &[]);
        expect_edge(&server, head_of(16384), head_of(16385), 431);
    });
}

#[test]
fn a_head_that_grows_byte_by_byte_meets_the_same_limit() {
    for_each_backend(|backend| {
        let small = ["--limit-head", "1200", "--limit-request-line", "1000", "--limit-request-field-size", "1000"];
        let server = backend.serve("builtin:hello", &small);
        let mut client = server.connect();
        client.send_byte_by_byte(head_of(1200));
        assert_eq!(client.read_response().status, 200);
        client.send_byte_by_byte(&head_of(1300).as_bytes()[..1201]);
        assert_eq!(client.read_response().status, 431);
        client.expect_eof();
    });
}

#[test]
fn the_limit_of_a_head_is_per_request() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let mut client = server.connect();
        client.send(head_of(16_000).repeat(5));
        for _ in 0..5 {
            assert_eq!(client.read_response().status, 200);
        }
    });
}

#[test]
fn a_length_beyond_the_limit_is_a_413() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-body", "1000"]);
        expect_edge(&server, post("/", [b'x'; 1000]), post("/", [b'x'; 1001]), 413);
    });
}

#[test]
fn a_length_beyond_the_limit_is_refused_before_the_body_comes() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-body", "1000"]);
        let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n";
        assert_eq!(server.ask(head).status, 413);
    });
}

/// CK-10: the decoded size counts, as it grows.
#[test]
fn chunks_beyond_the_limit_are_a_413() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--limit-body", "65536"]);
        let chunks = |last: &str| format!("{CHUNKED}ffff\r\n{}\r\n{last}", "x".repeat(0xffff));
        let fits = chunks("1\r\nx\r\n0\r\n\r\n");
        expect_edge(&server, fits, chunks("2\r\nxx\r\n0\r\n\r\n"), 413);
        assert_eq!(server.ask(chunks("ffffffffff\r\n")).status, 413, "known from the chunk's size alone");
    });
}

#[test]
fn a_chunk_line_beyond_the_limit_is_a_400() {
    for_each_backend(|backend| {
        let with_line = |bytes: usize| format!("{CHUNKED}1;{}\r\nx\r\n0\r\n\r\n", "a".repeat(bytes - 2));
        let server = backend.serve("builtin:hello", &["--limit-chunk-line", "5000"]);
        expect_edge(&server, with_line(5000), with_line(5001), 400);
        let server = backend.serve("builtin:hello", &["--limit-chunk-line", "16"]);
        expect_edge(&server, with_line(16), with_line(17), 400);
        let server = backend.serve("builtin:hello", &[]);
        expect_edge(&server, with_line(1024), with_line(1025), 400);
    });
}

/// KA-12: the whole answer reaches a client that sends on and on before it reads.
#[test]
fn a_413_reaches_a_client_that_sends_its_fifty_megabytes_first() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--limit-body", "1000000"]);
        let mut client = server.connect();
        client.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 50000000\r\n\r\n");
        let piece = [b'x'; 50_000];
        for _ in 0..1000 {
            client.send(piece);
        }
        assert_eq!(client.read_response().status, 413);
        client.expect_eof();
    });
}

#[test]
fn a_client_that_never_stops_sending_is_cut_off() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--limit-body", "1000"]);
        let mut client = server.connect();
        client.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999\r\n\r\n");
        assert_eq!(client.read_response().status, 413);
        // The server reads on for a while, so that the answer is safe; then no more.
        let cut_off = (0..600).any(|_| {
            thread::sleep(Duration::from_millis(100));
            client.try_send([b'x'; 1000]).is_err()
        });
        assert!(cut_off, "still reading after a minute");
    });
}

#[test]
fn connections_beyond_the_limit_wait_until_one_closes() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-connections", "2"]);
        let (mut first, mut second) = (server.connect(), server.connect());
        assert_eq!([first.ask(get("/")).status, second.ask(get("/")).status], [200, 200]);
        let mut third = server.connect();
        third.send(get("/"));
        assert_eq!(third.end_within(Duration::from_millis(300)), End::Open, "it should wait");
        second.expect_kept();
        drop(first);
        assert_eq!(third.read_response().status, 200);
        second.expect_kept();
    });
}

#[test]
fn connections_that_come_all_at_once_do_not_pass_the_limit() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-connections", "2"]);
        let mut clients: Vec<Client> = (0..20).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(get("/")));
        assert!(clients[0].readable(PATIENCE));
        // Those beyond the limit are not served while nobody leaves.
        thread::sleep(Duration::from_millis(300));
        let served = clients.iter().filter(|client| client.readable(Duration::ZERO)).count();
        assert!(served <= 2, "{served} connections at the same time");
        for mut client in clients {
            assert_eq!(client.read_response().status, 200);
        }
    });
}
