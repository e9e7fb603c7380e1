//! RFC 9110 section 10.1.1; the names are those of the cases EX-01 to EX-08.

use crate::support::{CHUNKED, Client, for_each_backend, get};

fn expecting(expectation: &str, framing: &str) -> String {
    format!("POST /echo HTTP/1.1\r\nHost: a\r\nExpect: {expectation}\r\n{framing}\r\n\r\n")
}

/// The next response is a 100, and nothing comes after it by itself.
fn expect_continue(client: &mut Client) {
    assert_eq!(client.read_response().status, 100);
    client.expect_quiet();
}

/// Reads past a 100, which may be there or not.
fn read_final(client: &mut Client) -> crate::support::Response {
    let first = client.read_response();
    if first.status == 100 { client.read_response() } else { first }
}

#[test]
fn ex_01_a_client_that_waits_is_told_to_continue() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(expecting("100-continue", "Content-Length: 5"));
        expect_continue(&mut client);
        client.send("hello");
        assert_eq!(client.read_response().echo().is("body"), "hello");
        client.expect_kept();
    });
}

#[test]
fn ex_01_so_is_one_that_sends_chunks() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(CHUNKED.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n"));
        expect_continue(&mut client);
        client.send("5\r\nhello\r\n0\r\n\r\n");
        assert_eq!(client.read_response().echo().is("body"), "hello");
        client.expect_kept();
    });
}

#[test]
fn ex_01_continue_comes_in_its_turn_behind_a_pipelined_answer() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(get("/first") + &expecting("100-continue", "Content-Length: 5"));
        assert_eq!(client.read_response().echo().is("target"), "/first");
        expect_continue(&mut client);
        client.send("hello");
        assert_eq!(client.read_response().echo().is("body"), "hello");
    });
}

#[test]
fn ex_02_a_body_sent_without_waiting_is_taken() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(expecting("100-continue", "Content-Length: 5") + "hello");
        assert_eq!(read_final(&mut client).echo().is("body"), "hello");
        client.expect_kept();
    });
}

#[test]
fn ex_03_http_1_0_never_gets_a_100() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let head = expecting("100-continue", "Content-Length: 5").replace("HTTP/1.1", "HTTP/1.0");
        let mut client = server.connect();
        client.send(&head);
        server.settle();
        client.expect_quiet();
        client.send("hello");
        assert_eq!(client.read_response().echo().is("body"), "hello");
        client.expect_eof();
    });
}

#[test]
fn ex_04_a_body_that_is_too_large_is_refused_instead_of_asked_for() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(expecting("100-continue", "Content-Length: 99999999999"));
        assert_eq!(client.read_response().status, 413);
        let _ = client.try_send(get("/next"));
        client.expect_eof();
    });
}

#[test]
fn ex_05_an_unknown_expectation_is_refused_or_ignored() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let status = server.ask(expecting("200-ok", "Content-Length: 0")).status;
        assert!([417, 200].contains(&status), "{status}");
    });
}

#[test]
fn ex_06_a_disguised_expectation_does_not_change_the_framing() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(expecting("y 100-continue", "Content-Length: 5") + "hello" + &get("/next"));
        let answer = read_final(&mut client);
        match answer.status {
            200 => {
                assert_eq!(answer.echo().is("body"), "hello");
                assert_eq!(client.read_response().echo().is("target"), "/next");
            }
            400 | 417 if answer.says_close() => client.expect_eof(),
            417 => assert_eq!(client.read_response().echo().is("target"), "/next"),
            status => panic!("{status}"),
        }
    });
}

#[test]
fn ex_07_the_case_of_the_expectation_does_not_matter() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(expecting("100-CONTINUE", "Content-Length: 5"));
        expect_continue(&mut client);
        client.send("hello");
        assert_eq!(client.read_response().echo().is("body"), "hello");
    });
}

#[test]
fn ex_08_without_a_body_there_is_nothing_to_wait_for() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n").status, 200);
        assert_eq!(client.ask(expecting("100-continue", "Content-Length: 0")).status, 200);
        client.expect_kept();
    });
}
