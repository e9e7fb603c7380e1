//! What every answer looks like, and what the built-in targets answer.

use std::time::{Duration, SystemTime};

use crate::support::{Response, for_each_backend, get, post};

/// Seconds since the epoch of an IMF-fixdate, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 section 5.6.7).
fn seconds_of(date: &str) -> u64 {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    assert_eq!(date.len(), 29, "{date:?}");
    let number = |from: usize, to: usize| date[from..to].parse::<u64>().unwrap_or_else(|_| panic!("{date:?}"));
    let (day, month, year) = (number(5, 7), &date[8..11], number(12, 16));
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let february = if leap(year) { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let month = MONTHS.iter().position(|name| *name == month).unwrap_or_else(|| panic!("{date:?}"));
    let years: u64 = (1970..year).map(|year| if leap(year) { 366 } else { 365 }).sum();
    let days = years + lengths[..month].iter().sum::<u64>() + day - 1;
    let weekday = DAYS[usize::try_from(days % 7).unwrap()];
    let seconds = days * 86400 + number(17, 19) * 3600 + number(20, 22) * 60 + number(23, 25);
    let again =
        format!("{weekday}, {day:02} {} {year} {:02}:{:02}:{:02} GMT", MONTHS[month], number(17, 19), number(20, 22), number(23, 25));
    assert_eq!(date, again);
    seconds
}

fn expect_common_fields(answer: &Response) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let date = Duration::from_secs(seconds_of(answer.field("date").unwrap()));
    let off = now.abs_diff(date);
    assert!(off < Duration::from_secs(10), "Date is off by {off:?}");
    assert_eq!(answer.field("server"), Some("uringd"));
}

#[test]
fn every_answer_says_when_it_was_made_and_by_what() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool", "builtin:echo", "builtin:sleep", "builtin:welcome"] {
            let server = backend.serve(target, &[]);
            expect_common_fields(&server.ask(get("/")));
            expect_common_fields(&server.ask("GARBAGE\r\n\r\n"));
        }
    });
}

#[test]
fn the_date_goes_with_the_time() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--keep-alive", "60"]);
        let mut client = server.connect();
        let first = seconds_of(client.ask(get("/")).field("date").unwrap());
        crate::support::eventually("a later Date", || seconds_of(client.ask(get("/")).field("date").unwrap()) > first);
        // After a pause without any event, too.
        std::thread::sleep(Duration::from_millis(2500));
        expect_common_fields(&client.ask(get("/")));
    });
}

#[test]
fn the_answer_to_head_is_that_to_get_without_its_body() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool", "builtin:welcome", "builtin:sleep"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            let whole = client.ask(get("/"));
            let head = client.ask("HEAD / HTTP/1.1\r\nHost: test\r\n\r\n");
            assert_eq!(head.status, 200);
            for name in ["content-length", "content-type"] {
                assert_eq!(head.field(name), whole.field(name), "{target}: {name}");
            }
            assert_eq!(whole.field("content-length"), Some(&*whole.body.len().to_string()), "{target}");
            client.expect_kept();
        }
    });
}

#[test]
fn pipelined_answers_to_head_stay_aligned() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(format!("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n{}", get("/next")));
        assert_eq!(client.read_response_to_head().status, 200);
        assert_eq!(client.read_response().echo().is("target"), "/next");
        client.expect_quiet();
    });
}

#[test]
fn refusals_have_a_framing_and_a_text() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--limit-body", "10"]);
        let too_long = get(&"/a".repeat(9000));
        for (request, status, reason) in [
            ("GARBAGE\r\n\r\n".to_owned(), 400, "Bad Request"),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), 505, "HTTP Version Not Supported"),
            (too_long, 414, "URI Too Long"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n".to_owned(), 413, "Content Too Large"),
        ] {
            let refusal = server.ask(&request);
            assert_eq!((refusal.status, &*refusal.reason), (status, reason));
            assert!(refusal.says_close(), "{refusal:?}");
            assert_eq!(refusal.field("content-length"), Some(&*refusal.body.len().to_string()), "{refusal:?}");
            assert!(refusal.field("content-type").is_some_and(|kind| kind.starts_with("text/")), "{refusal:?}");
        }
    });
}

/// RS-11.
#[test]
fn refusals_do_not_repeat_what_the_peer_sent() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let refusal = server.ask("GET /<script>alert(1)</script> HTTP/1.1\r\nHost: a b\r\n<script>: 1\r\n\r\n");
        assert_eq!(refusal.status, 400);
        assert!(!refusal.text().contains("<script>"), "{}", refusal.text());
    });
}

/// RS-08.
#[test]
fn an_http_1_0_client_never_gets_chunks() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:echo", "builtin:welcome"] {
            let server = backend.serve(target, &[]);
            let mut client = server.connect();
            let answer = client.ask("GET / HTTP/1.0\r\n\r\n");
            assert_eq!(answer.field("transfer-encoding"), None, "{target}");
            assert!(!answer.body.is_empty());
        }
    });
}

#[test]
fn hello_says_hello() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &[]);
            for request in [get("/"), get("/any/other?path"), get("http://test/absolute")] {
                let answer = server.ask(request);
                assert_eq!((answer.status, &*answer.reason), (200, "OK"));
                assert_eq!(answer.text(), "Hello, World!");
                assert!(answer.field("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{answer:?}");
            }
        }
    });
}

#[test]
fn echo_repeats_the_whole_request() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        let fields = "Host: test\r\nX-One:  spaced \r\nCookie: a=1\r\nx-one: again\r\nContent-Length: 4\r\n";
        let answer = client.ask(format!("PUT /a%20b/c?d=e&f HTTP/1.1\r\n{fields}\r\nbody"));
        assert!(answer.field("content-type").is_some_and(|kind| kind.starts_with("application/json")), "{answer:?}");
        let echo = answer.echo();
        let told = ["method", "target", "path", "query", "version", "body"].map(|key| echo.is(key).to_owned());
        // The path may be decoded or not: the contract leaves it open.
        assert!(["/a%20b/c", "/a b/c"].contains(&&*told[2]), "{told:?}");
        assert_eq!((&*told[0], &*told[1], &*told[3]), ("PUT", "/a%20b/c?d=e&f", "d=e&f"));
        assert_eq!((&*told[4], &*told[5]), ("HTTP/1.1", "body"));
        let expected = [("host", "test"), ("x-one", "spaced"), ("cookie", "a=1"), ("x-one", "again"), ("content-length", "4")];
        let expected: Vec<_> = expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert_eq!(echo.fields(), expected);
        assert!(echo.is("remote").contains("127.0.0.1"), "{echo:?}");
    });
}

#[test]
fn echo_writes_any_byte_as_json() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let body: Vec<u8> = (0..=255).rev().collect();
        assert_eq!(server.ask(post("/\"\\", &body)).echo().is("body"), crate::support::text(&body));
        let answer = server.ask(get("/").replace("\r\n\r\n", "\r\nX: \u{e9}\u{a0}\"\\\r\n\r\n"));
        assert_eq!(answer.echo().field("x").unwrap(), crate::support::text("\u{e9}\u{a0}\"\\".as_bytes()));
    });
}

#[test]
fn welcome_tells_a_newcomer_what_to_do_next() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:welcome", &[]);
        let answer = server.ask(get("/"));
        assert!(answer.field("content-type").is_some_and(|kind| kind.starts_with("text/html")), "{answer:?}");
        for word in ["<!doctype html>", "uringd", "--bind"] {
            assert!(answer.text().to_lowercase().contains(word), "no {word:?} in:\n{}", answer.text());
        }
    });
}

#[test]
fn without_a_target_the_welcome_page_is_served() {
    for_each_backend(|backend| {
        let named = backend.serve("builtin:welcome", &[]);
        let mut command = backend.command("builtin:welcome", &[]);
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let environment: Vec<_> = command.get_envs().filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned()))).collect();
        command = crate::support::uringd();
        command.args(&arguments[..arguments.len() - 1]).envs(environment);
        let unnamed = crate::support::Server::start(command).unwrap_or_else(|end| panic!("{end}"));
        assert_eq!(unnamed.ask(get("/")).field("content-type"), named.ask(get("/")).field("content-type"));
    });
}

#[test]
fn sleep_sleeps_as_long_as_it_is_told() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:sleep", &[]);
        let began = std::time::Instant::now();
        assert_eq!(server.ask(get("/?ms=300")).status, 200);
        assert!(began.elapsed() >= Duration::from_millis(300));
    });
}
