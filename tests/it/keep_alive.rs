//! RFC 9112 sections 9.3 and 9.6.

use std::time::Duration;

use crate::support::{Client, End, Response, for_each_backend, get, post};

/// Sends `head` and returns the answer; `Host` is added.
fn answer_to(client: &mut Client, request_line: &str, fields: &str) -> Response {
    client.ask(format!("{request_line}\r\nHost: test\r\n{fields}\r\n"))
}

#[test]
fn a_connection_serves_one_request_after_another() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        for number in 0..100 {
            let answer = client.ask(get(&format!("/{number}")));
            assert_eq!(answer.echo().is("target"), format!("/{number}"));
            assert!(!answer.says_close());
        }
        client.expect_quiet();
    });
}

#[test]
fn inline_and_pool_handlers_keep_the_connection_alike() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool", "builtin:welcome"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            for _ in 0..3 {
                assert_eq!(client.ask(get("/")).status, 200, "{target}");
            }
        }
    });
}

#[test]
fn http_1_0_closes_after_its_answer() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        let answer = answer_to(&mut client, "GET / HTTP/1.0", "");
        assert_eq!(answer.echo().is("version"), "HTTP/1.0");
        client.expect_eof();
    });
}

#[test]
fn http_1_0_needs_no_host() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        assert_eq!(client.ask("GET / HTTP/1.0\r\n\r\n").status, 200);
        client.expect_eof();
    });
}

#[test]
fn http_1_0_with_keep_alive_is_kept_and_told_so() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        for option in ["keep-alive", "Keep-Alive"] {
            let answer = answer_to(&mut client, "GET / HTTP/1.0", &format!("Connection: {option}\r\n"));
            assert!(answer.connection_option("keep-alive"), "{answer:?}");
        }
        client.expect_kept();
    });
}

#[test]
fn connection_close_is_answered_with_close_and_closed() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            let answer = answer_to(&mut client, "GET / HTTP/1.1", "Connection: close\r\n");
            assert!(answer.says_close(), "{target}: {answer:?}");
            assert_eq!(answer.text(), "Hello, World!");
            client.expect_eof();
        }
    });
}

#[test]
fn close_wins_in_a_list_whatever_its_case_and_place() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        for fields in [
            "Connection: CLOSE\r\n",
            "Connection: keep-alive, Close\r\n",
            "Connection: ,, close ,\r\n",
            "Connection:\tclose\t\r\n",
            "Connection: keep-alive\r\nConnection: close\r\n",
        ] {
            let mut client = server.connect();
            let answer = answer_to(&mut client, "GET / HTTP/1.1", fields);
            assert!(answer.says_close(), "{fields:?}: {answer:?}");
            client.expect_eof();
        }
    });
}

#[test]
fn an_option_that_only_contains_close_does_not_close() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let mut client = server.connect();
        for options in ["closed, xclose", "close-me", "\"close\"", "keep-alive", "x"] {
            let answer = answer_to(&mut client, "GET / HTTP/1.1", &format!("Connection: {options}\r\n"));
            assert!(!answer.says_close(), "{options:?}: {answer:?}");
        }
        client.expect_kept();
    });
}

#[test]
fn nothing_behind_a_request_that_closes_is_served() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        for first in ["GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "GET / HTTP/1.0\r\nHost: a\r\n\r\n"] {
            let mut client = server.connect();
            client.send(format!("{first}{}", get("/next")));
            assert_eq!(client.read_response().echo().is("target"), "/");
            client.expect_eof();
        }
    });
}

#[test]
fn an_idle_connection_is_closed_without_a_word() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--keep-alive", "1"]);
        let mut client = server.connect();
        assert_eq!(client.ask(get("/")).status, 200);
        assert_eq!(client.end_within(Duration::from_millis(200)), End::Open, "closed long before its time");
        client.expect_eof();
    });
}

#[test]
fn each_request_gives_the_connection_its_whole_time_again() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--keep-alive", "2"]);
        let mut client = server.connect();
        for _ in 0..4 {
            assert_eq!(client.ask(get("/")).status, 200);
            assert_eq!(client.end_within(Duration::from_millis(700)), End::Open);
        }
        client.expect_kept();
    });
}

/// KA-17.
#[test]
fn the_last_request_that_a_connection_may_have_is_told_so() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--keep-alive-requests", "3"]);
        let mut client = server.connect();
        client.send(get("/").repeat(1000));
        assert_eq!([(); 3].map(|()| client.read_response().says_close()), [false, false, true]);
        client.expect_eof();
    });
}

#[test]
fn a_body_that_the_handler_ignores_is_never_taken_for_a_request() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            let smuggled = get("/evil").repeat(3000);
            client.send([post("/", &smuggled), get("/next").into()].concat());
            assert_eq!([client.read_response().status, client.read_response().status], [200, 200]);
            client.expect_quiet();
        }
    });
}

#[test]
fn an_upgrade_that_nobody_offers_is_ignored() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{upgrade}\r\n{}", get("/next")));
        assert_eq!(client.read_response().echo().is("target"), "/");
        assert_eq!(client.read_response().echo().is("target"), "/next");

        let mut client = server.connect();
        assert_eq!(answer_to(&mut client, "GET / HTTP/1.0", upgrade).status, 200);
        client.expect_eof();
    });
}
