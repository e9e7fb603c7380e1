//! Each deadline of `Timeouts`: its phase, its outcome, and that nobody else waits for the slow one.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::support::{Client, End, PATIENCE, for_each_backend, get, post};

/// A body that does not fit into the buffers of the kernel, on both sides of a connection.
const MORE_THAN_THE_KERNEL_HOLDS: usize = 16 << 20;

/// Sends `piece` again and again until the server answers or closes.
fn drip(client: &mut Client, piece: &str, pause: Duration) {
    let end = Instant::now() + PATIENCE;
    while !client.readable(pause) && client.try_send(piece).is_ok() {
        assert!(Instant::now() < end, "nothing came back while dripping for {PATIENCE:?}");
    }
}

#[test]
fn a_connection_that_sends_nothing_is_closed_without_a_word() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--head-timeout", "1", "--keep-alive", "60"]);
        let mut client = server.connect();
        assert_eq!(client.end_within(Duration::from_millis(300)), End::Open, "closed long before its time");
        client.expect_eof();
    });
}

#[test]
fn half_a_head_gets_a_408() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--head-timeout", "1"]);
        for part in ["G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: a\r\n", "\r\nGET / HT"] {
            let mut client = server.connect();
            client.send(part);
            let refusal = client.read_response();
            assert_eq!(refusal.status, 408, "{part:?}");
            assert!(refusal.says_close());
            client.expect_eof();
        }
    });
}

#[test]
fn a_trickling_head_does_not_renew_its_deadline() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--head-timeout", "1"]);
        let mut client = server.connect();
        client.send("GET / HTTP/1.1\r\nX: ");
        drip(&mut client, "v", Duration::from_millis(100));
        assert_eq!(client.read_response().status, 408);
    });
}

#[test]
fn the_head_of_a_later_request_has_the_same_deadline() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--head-timeout", "1", "--keep-alive", "60"]);
        let mut client = server.connect();
        assert_eq!(client.ask(get("/")).status, 200);
        // Longer than the head may take: the pause between two requests does not count for it.
        assert_eq!(client.end_within(Duration::from_millis(1500)), End::Open);
        assert_eq!(client.ask(get("/")).status, 200);
        client.send("GET / HTTP/1.1\r\n");
        assert_eq!(client.read_response().status, 408);
        client.expect_eof();
    });
}

#[test]
fn a_body_that_stops_gets_a_408() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--body-timeout", "1"]);
        for part in ["Content-Length: 100\r\n\r\nsome", "Content-Length: 100\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n5\r\nhe"] {
            let mut client = server.connect();
            client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{part}"));
            assert_eq!(client.read_response().status, 408, "{part:?}");
            client.expect_eof();
        }
    });
}

#[test]
fn a_body_that_goes_on_is_not_idle() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--body-timeout", "2", "--head-timeout", "1"]);
        let mut client = server.connect();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n");
        for _ in 0..12 {
            thread::sleep(Duration::from_millis(250));
            client.send("x");
        }
        assert_eq!(client.read_response().echo().is("body"), "xxxxxxxxxxxx");
    });
}

/// KA-10. Takes as long as the default grace of the rate, which has no option.
#[test]
fn a_body_below_the_slowest_rate_gets_a_408() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--body-rate", "500", "--body-timeout", "60"]);
        let mut client = server.connect();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n");
        drip(&mut client, "x", Duration::from_millis(500));
        assert_eq!(client.read_response().status, 408);
        client.expect_closed();
    });
}

#[test]
fn a_reader_that_stops_is_cut_off() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--send-timeout", "1"]);
        let mut client = server.connect();
        client.send(post("/", vec![b'x'; MORE_THAN_THE_KERNEL_HOLDS]));
        assert!(client.broken_off(PATIENCE), "the connection is still there");
        server.expect_alive();
    });
}

#[test]
fn a_slow_reader_that_goes_on_gets_everything() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--send-timeout", "2"]);
        let mut client = server.connect();
        let body = vec![b'x'; MORE_THAN_THE_KERNEL_HOLDS];
        client.send(post("/", &body));
        let mut received = 0;
        // For longer than the deadline, by pieces large enough to be progress; then the rest.
        for _ in 0..12 {
            assert!(client.readable(PATIENCE));
            received += client.read_exactly(1 << 20).len();
            thread::sleep(Duration::from_millis(250));
        }
        client.send("GET / HTTP/1.0\r\n\r\n");
        let (rest, end) = client.read_to_end();
        assert_eq!(end, End::Eof);
        assert!(received + rest.len() > body.len());
    });
}

#[test]
fn readers_that_stop_do_not_hold_up_the_others() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &["--handlers", "1"]);
        let stalled: Vec<Client> = (0..4)
            .map(|_| {
                let mut client = server.connect();
                client.send(post("/", vec![b'x'; MORE_THAN_THE_KERNEL_HOLDS]));
                assert!(client.readable(PATIENCE), "its answer begins");
                client
            })
            .collect();
        let mut client = server.connect();
        for _ in 0..100 {
            assert_eq!(client.ask(get("/")).status, 200);
        }
        drop(stalled);
    });
}

#[test]
fn slow_senders_do_not_hold_a_handler() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello-pool", &["--handlers", "1"]);
        let slow: Vec<Client> = (0..50)
            .map(|number| {
                let mut client = server.connect();
                match number % 3 {
                    0 => {}
                    1 => client.send("GET / HTTP/1.1\r\nHo"),
                    _ => client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"),
                }
                client
            })
            .collect();
        let mut client = server.connect();
        for _ in 0..100 {
            assert_eq!(client.ask(get("/")).status, 200);
        }
        drop(slow);
    });
}
