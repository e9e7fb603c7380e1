//! Each rule of the protocol, provoked in a running server: a mistake in any one of them fails here.
//!
//! First every [`Refusal`], with its status, its own sentence and a close that the client can read; then the rows of
//! `tests/corpus/http1-cases.jsonl` that need a handler that lies. Rows that need steps or time and no such handler are in
//! `tests/it/` (`keep_alive.rs`, `expect.rs`, `half_close.rs`, `slow_peer.rs`, `limits.rs`, `drain.rs`).

mod in_process;

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::Shutdown,
    time::Duration,
};

use uringd::{Body, Config, Request, Response, Server, StreamWriter, http1::Refusal};

use in_process::connect;

/// What a client does to be refused.
enum Provocation {
    Sends(Vec<u8>),
    /// Sends, then shuts its sending side.
    Leaves(&'static str),
    /// Sends, then waits, with a server that has no patience.
    Stalls(&'static str),
    /// Sends, then a byte every 50 ms.
    Drips(&'static str),
}

/// A request with these lines after its Host field.
fn get(lines: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
}

fn target(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")
}

fn chunked(body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
}

fn provocations(refusal: Refusal) -> Vec<Provocation> {
    let long = |bytes: usize| "v".repeat(bytes);
    let sends: Vec<String> = match refusal {
        Refusal::BodyTimeout => return vec![Provocation::Stalls("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")],
        Refusal::BodyTooSlow => return vec![Provocation::Drips("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\nabc")],
        Refusal::HeadTimeout => return vec![Provocation::Stalls("GET / HTTP/1.1\r\nHo"), Provocation::Drips("GET / HTTP/1.1\r\nHo")],
        Refusal::Truncated => {
            let ends = ["GET / HTTP/1.1\r\nHo", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", "\r\nG", "\r"];
            return ends.map(Provocation::Leaves).into();
        }
        Refusal::AuthorityMismatch => vec![target("http://b/"), target("http://a:80/")],
        Refusal::BareCr => vec![get("X: a\rb\r\n"), "GET / HTTP/1.1\rHost: a\r\n\r\n".into(), chunked("5\r5")],
        Refusal::BareLf => {
            vec!["GET / HTTP/1.1\nHost: a\r\n\r\n".into(), get("X: a\n"), get("X: a\r\n\n"), chunked("5\nhello\r\n0\r\n\r\n")]
        }
        Refusal::BodyTooLarge => vec![get("Content-Length: 1048577\r\n"), chunked("100001\r\n"), chunked("1\r\nx\r\n100000\r\n")],
        Refusal::ChunkDataUnterminated => vec![chunked("3\r\nabcd\r\n0\r\n\r\n"), chunked("3\r\nabc\n0\r\n\r\n")],
        Refusal::ChunkExtensionBad => vec![chunked("3;\r\n"), chunked("3;a=\r\n"), chunked("3;a=\"b\r\n"), chunked("3;a\0\r\n")],
        Refusal::ChunkLineTooLong => vec![chunked(&format!("3;{}\r\n", long(2000)))],
        Refusal::ChunkOverhead => vec![chunked(&"1\r\nx\r\n".repeat(25_000))],
        Refusal::ChunkSizeBad => vec![chunked("\r\n"), chunked("0x3\r\n"), chunked("-3\r\n"), chunked(" 3\r\n"), chunked("g\r\n")],
        Refusal::ChunkSizeOverflow => vec![chunked("10000000000000000\r\n"), chunked("00000000000000003\r\n")],
        Refusal::CodingUnsupported => vec![get("Transfer-Encoding: gzip, chunked\r\n")],
        Refusal::ConnectUnsupported => vec!["CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n".into()],
        Refusal::ContentLengthBad => {
            ["+5", "-5", "5, 5", "0x5", "5 5", "", "5;", "\u{a0}5"].map(|length| get(&format!("Content-Length: {length}\r\n"))).into()
        }
        Refusal::ContentLengthOverflow => {
            ["9223372036854775808", "18446744073709551621"].map(|length| get(&format!("Content-Length: {length}\r\n"))).into()
        }
        Refusal::ContentLengthRepeated => {
            vec![get("Content-Length: 5\r\nContent-Length: 5\r\n"), get("content-length: 0\r\nX: y\r\nCONTENT-LENGTH: 5\r\n")]
        }
        Refusal::ContentLengthWithCoding => {
            vec![get("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), get("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n")]
        }
        Refusal::EmptyLines => vec![format!("\r\n\r\n{}", get(""))],
        Refusal::ExpectationUnknown => vec![get("Expect: 200-ok\r\n"), get("Expect: 100-continue\r\nExpect: x\r\n")],
        Refusal::FieldFolded => vec![get("X: a\r\n b\r\n"), "GET / HTTP/1.1\r\n Host: a\r\n\r\n".into(), chunked("0\r\n X: y\r\n\r\n")],
        Refusal::FieldNameBad => {
            vec![get(": a\r\n"), get("X\0: a\r\n"), get("X\u{e9}: a\r\n"), get("(X): a\r\n"), chunked("0\r\nX/Y: a\r\n\r\n")]
        }
        Refusal::FieldNameSpace => vec![get("X : a\r\n"), get("X Y: a\r\n"), get("Transfer-Encoding\t: chunked\r\n")],
        Refusal::FieldRepeated => [
            "Authorization",
            "Content-Range",
            "Content-Type",
            "If-Modified-Since",
            "If-Range",
            "If-Unmodified-Since",
            "Max-Forwards",
            "Proxy-Authorization",
            "Range",
        ]
        .map(|name| get(&format!("{name}: 1\r\nX: y\r\n{}: 1\r\n", name.to_lowercase())))
        .into(),
        Refusal::FieldTooLong => vec![get(&format!("X: {}\r\n", long(9000))), chunked(&format!("0\r\nX: {}\r\n\r\n", long(9000)))],
        Refusal::FieldValueControl => vec![get("X: a\0b\r\n"), get("X: a\u{7f}b\r\n"), get("X: \u{1}\r\n"), get("Host\u{3a}\u{b}\r\n")],
        Refusal::FieldWithoutColon => vec![get("X\r\n"), get("Content-Length\r\n")],
        Refusal::FieldsTooMany => vec![get(&"X: y\r\n".repeat(100)), chunked(&format!("0\r\n{}\r\n", "X: y\r\n".repeat(101)))],
        Refusal::HeadTooLarge => vec![get(&format!("X: {}\r\n", long(6000)).repeat(3))],
        Refusal::HostBad => ["", "a b", "a/", "u@a", "a:99999", "a:x", "a..b", ".a", "[::1", "[x]"]
            .map(|host| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .into_iter()
            .chain([target("http:///")])
            .collect(),
        Refusal::HostMissing => vec!["GET / HTTP/1.1\r\n\r\n".into(), "GET http://a/ HTTP/1.1\r\nX: y\r\n\r\n".into()],
        Refusal::HostRepeated => vec![get("Host: a\r\n"), get("X: y\r\nhOST: b\r\n")],
        Refusal::MethodBad => vec!["G\0T / HTTP/1.1\r\n\r\n".into(), "\u{16}\u{3}\u{1}".into(), "G(T / HTTP/1.1\r\n\r\n".into()],
        Refusal::MethodCase => vec!["get / HTTP/1.1\r\nHost: a\r\n\r\n".into(), "Post / HTTP/1.1\r\nHost: a\r\n\r\n".into()],
        Refusal::MethodTooLong => vec![format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", "M".repeat(33))],
        Refusal::RequestLineBad => {
            vec!["GET /\r\nHost: a\r\n\r\n".into(), "GET  / HTTP/1.1\r\n".into(), " GET / HTTP/1.1\r\n".into(), "GET\r\n\r\n".into()]
        }
        Refusal::RequestLineTooLong => vec![target(&format!("/{}", long(9000)))],
        Refusal::TargetBad => vec![target("/\u{e9}"), target("/\u{7f}"), target("/\ta")],
        Refusal::TargetDoubleSlash => vec![target("//evil.example/%2e%2e"), target("//"), target("http://a//b")],
        Refusal::TargetForm => vec![target("a"), target("*"), target("a:80"), "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n".into()],
        Refusal::TargetFragment => vec![target("/#a"), target("/?a#b"), target("http://a/#b")],
        Refusal::TargetHttps => vec![target("https://a/"), target("HTTPS://a:443?x")],
        Refusal::TargetScheme => vec![target("ftp://a/"), target("ws://a/")],
        Refusal::TargetUserinfo => vec![target("http://u@a/"), target("http://u:p@a/")],
        Refusal::TraceContent => ["Content-Length: 1", "Transfer-Encoding: chunked"]
            .map(|field| format!("TRACE / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n"))
            .into(),
        Refusal::TrailersTooLarge => vec![chunked(&format!("0\r\n{}\r\n", format!("X: {}\r\n", long(6000)).repeat(3)))],
        Refusal::TransferEncodingBad => {
            ["", "x", "chunked, gzip", "chunked, chunked", "chunked,", "\"chunked\"", "chunked;a", "xchunked", "identity", ",chunked"]
                .map(|coding| get(&format!("Transfer-Encoding: {coding}\r\n")))
                .into()
        }
        Refusal::TransferEncodingHttp10 => vec!["POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into()],
        Refusal::TransferEncodingRepeated => vec![get("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n")],
        Refusal::VersionBad => ["HTTP/1.10", "http/1.1", "HTTP/1", "HTTP/1.1 ", "HTTP/ 1.1", "HTTP/1,1"]
            .map(|version| format!("GET / {version}\r\nHost: a\r\n\r\n"))
            .into(),
        Refusal::VersionUnsupported => vec![
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n".into(),
            "GET / HTTP/0.9\r\nHost: a\r\n\r\n".into(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
        ],
        other => panic!("tests/rules.rs does not know how to provoke {other:?}"),
    };
    // One character is one byte, so that bytes above 0x7f can be written down.
    sends.into_iter().map(|text| Provocation::Sends(text.chars().map(|letter| letter as u8).collect())).collect()
}

#[test]
fn every_refusal_is_answered_with_its_status_its_sentence_and_a_readable_close() {
    each_backend(
        |config| {
            config.limits.body_bytes_max = 1 << 20;
            config.timeouts.head = Duration::from_millis(400);
            config.timeouts.body_idle = Duration::from_millis(400);
            config.timeouts.body_rate_grace = Duration::from_millis(800);
            config.timeouts.body_rate_min = 100_000;
        },
        |address| {
            for refusal in Refusal::ALL {
                for (index, provocation) in provocations(*refusal).iter().enumerate() {
                    let answer = provoke(address, provocation).unwrap_or_else(|error| panic!("{refusal:?} {index}: {error}"));
                    let text = String::from_utf8_lossy(&answer);
                    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{refusal:?} {index}: no answer: {text:?}"));
                    assert_eq!(body, format!("{}\n", refusal.explain()), "{refusal:?} {index}");
                    assert!(head.starts_with(&format!("HTTP/1.1 {} ", refusal.status())), "{refusal:?} {index}: {head}");
                    assert!(head.contains("\r\nConnection: close"), "{refusal:?} {index}: {head}");
                    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{refusal:?} {index}: {head}");
                    assert_eq!(head.contains("\r\nAllow: "), refusal.status() == 405, "RFC 9110 section 15.5.6");
                }
            }
        },
    );
}

/// All that the server says. An error, such as a reset before everything was read, is a failure.
fn provoke(address: &str, provocation: &Provocation) -> io::Result<Vec<u8>> {
    let mut stream = connect(address);
    let mut answer = Vec::new();
    match provocation {
        Provocation::Sends(bytes) => {
            stream.write_all(bytes)?;
            // More is on its way while the refusal is: it must not cost the client its answer.
            if bytes.ends_with(b"\r\n\r\n") {
                stream.write_all(&[b'\n'; 20_000])?;
            }
        }
        Provocation::Leaves(bytes) => {
            stream.write_all(bytes.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
        }
        Provocation::Stalls(bytes) => stream.write_all(bytes.as_bytes())?,
        Provocation::Drips(bytes) => {
            stream.write_all(bytes.as_bytes())?;
            stream.set_read_timeout(Some(Duration::from_millis(50)))?;
            let mut piece = [0; 4096];
            loop {
                match stream.read(&mut piece) {
                    Ok(0) => return Ok(answer),
                    Ok(count) => answer.extend_from_slice(&piece[..count]),
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => stream.write_all(b"x")?,
                    Err(error) => return Err(error),
                }
            }
        }
    }
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

#[test]
fn the_list_of_provocations_is_complete() {
    let provoked: BTreeSet<Refusal> = Refusal::ALL.iter().copied().filter(|refusal| !provocations(*refusal).is_empty()).collect();
    assert_eq!(provoked.len(), Refusal::ALL.len());
}

/// Handlers as the RS rows have them.
fn lies(request: &Request<'_>) -> Response {
    let stream = |write: fn(&mut StreamWriter<'_>) -> io::Result<()>| Body::stream(write);
    match request.path() {
        "/status/204" => Response::new(204).header("Content-Length", "5").header("Transfer-Encoding", "chunked").body("extra"),
        "/status/304" => Response::new(304).header("ETag", "\"a\"").body("extra"),
        "/status/204-stream" => Response::new(204).body(stream(|out| out.write_all(b"HTTP/1.1 200 OK\r\n\r\n"))),
        "/status/101" => Response::new(101).header("Upgrade", "foo"),
        "/status/99" => Response::new(99),
        "/handler-sets-crlf-header" => Response::text("x").header("X", "a\r\nSet-Cookie: evil=1"),
        "/crlf/name" => Response::text("x").header("X\r\nEvil: 1\r\nY", "a"),
        "/crlf/lf" => Response::text("x").header("X", "a\nEvil: 1"),
        "/crlf/nul" => Response::text("x").header("X", "a\0"),
        "/crlf/reason" => Response::text("x").reason("OK\r\nEvil: 1"),
        "/crlf/type" => Response::text("x").content_type("text/plain\r\nEvil: 1"),
        "/crlf/space" => Response::text("x").header("X Y", "a"),
        "/handler-cl-too-long" => Response::text("short").header("Content-Length", "100"),
        "/stream-too-short" => Response::new(200).body(Body::stream_sized(100, |out| out.write_all(b"short"))),
        "/handler-cl-too-short" => Response::text("HTTP/1.1 200 OK\r\n\r\n").header("content-length", "2"),
        "/stream-too-long" => Response::new(200).body(Body::stream_sized(2, |out| out.write_all(b"okHTTP/1.1 200 OK\r\n\r\n"))),
        "/handler-sets-te-and-cl" => Response::text("hello")
            .header("Transfer-Encoding", "chunked")
            .header("CONTENT-LENGTH", "1")
            .header("Connection", "keep-alive, x")
            .header("Keep-Alive", "timeout=99"),
        "/stream" => Response::new(200).body(stream(|out| out.write_all(b"streamed"))),
        "/static/index.html" => Response::text("no").status(405).header("Allow", "GET, HEAD"),
        "/handler-panics" => panic!("planned"),
        "/early-4xx" => Response::text("no").status(403),
        path => Response::text(format!("path {path}")),
    }
}

/// The answer to `path` with `/next` pipelined behind it, as far as the connection goes.
fn answers(address: &str, method: &str, path: &str) -> String {
    exchange(address, &format!("{method} {path} HTTP/1.1\r\nHost: a\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
}

fn exchange(address: &str, bytes: &str) -> String {
    let mut stream = connect(address);
    stream.write_all(bytes.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap_or_else(|error| panic!("{bytes:?}: {error}"));
    String::from_utf8_lossy(&answer).into_owned()
}

/// Takes the first answer's head off, and the rest.
fn first<'a>(answers: &'a str, path: &str) -> (&'a str, &'a str) {
    answers.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: no head in {answers:?}"))
}

#[test]
fn rs_01_to_03_answers_without_a_body_have_none_whatever_the_handler_says() {
    each_backend(
        |_| {},
        |address| {
            for (method, path, status) in [
                ("HEAD", "/", "200"),
                ("GET", "/status/204", "204"),
                ("GET", "/status/304", "304"),
                ("GET", "/status/204-stream", "204"),
                ("HEAD", "/stream", "200"),
            ] {
                let all = answers(address, method, path);
                let (head, rest) = first(&all, path);
                assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {head}");
                assert!(rest.starts_with("HTTP/1.1 200 ") && rest.ends_with("\r\n\r\npath /next"), "{path}: {rest}");
                if status == "204" {
                    assert!(!head.contains("Content-Length") && !head.contains("Transfer-Encoding"), "{head}");
                }
            }
            let all = answers(address, "HEAD", "/");
            assert!(first(&all, "/").0.contains("\r\nContent-Length: 6"), "as for GET: {all}");
        },
    );
}

#[test]
fn rs_04_nothing_a_handler_says_can_split_an_answer() {
    each_backend(
        |_| {},
        |address| {
            for path in [
                "/handler-sets-crlf-header",
                "/crlf/name",
                "/crlf/lf",
                "/crlf/nul",
                "/crlf/reason",
                "/crlf/type",
                "/crlf/space",
                "/status/101",
                "/status/99",
            ] {
                let all = answers(address, "GET", path);
                assert!(all.starts_with("HTTP/1.1 500 "), "{path}: {all}");
                assert!(!all.to_lowercase().contains("evil"), "{path}: {all}");
                assert!(all.ends_with("path /next"), "the connection is none the worse for it: {path}: {all}");
            }
        },
    );
}

#[test]
fn rs_05_a_body_that_is_too_short_is_seen_to_be_cut_off() {
    each_backend(
        |_| {},
        |address| {
            // A body that is there at once has the length that it has, whatever the handler says.
            let all = answers(address, "GET", "/handler-cl-too-long");
            assert!(all.contains("\r\nContent-Length: 5\r\n") && !all.contains("100"), "{all}");
            let mut stream = connect(address);
            stream.write_all(b"GET /stream-too-short HTTP/1.1\r\nHost: a\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            let all = String::from_utf8_lossy(&all);
            let body = all.split_once("\r\n\r\n").map_or("", |answer| answer.1);
            assert!(body.len() <= 5 && !all.contains("/next"), "{all}");
        },
    );
}

#[test]
fn rs_06_a_body_that_is_too_long_never_becomes_a_second_answer() {
    each_backend(
        |_| {},
        |address| {
            let all = answers(address, "GET", "/handler-cl-too-short");
            let (head, rest) = first(&all, "/handler-cl-too-short");
            assert!(
                head.contains("\r\nContent-Length: 19") && rest.starts_with("HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 "),
                "framed by its true length: {all}"
            );
            let all = answers(address, "GET", "/stream-too-long");
            let (head, rest) = first(&all, "/stream-too-long");
            assert!(head.contains("\r\nContent-Length: 2"), "{all}");
            assert!(rest == "ok" || rest.starts_with("okHTTP/1.1 200 OK\r\nServer") && rest.ends_with("path /next"), "{all}");
        },
    );
}

#[test]
fn rs_07_there_is_one_framing_field_and_it_is_ours() {
    each_backend(
        |_| {},
        |address| {
            let all = answers(address, "GET", "/handler-sets-te-and-cl").to_lowercase();
            let (head, rest) = first(&all, "/handler-sets-te-and-cl");
            assert_eq!(head.matches("content-length: ").count(), 1, "{head}");
            assert!(head.contains("content-length: 5"), "{head}");
            for name in ["transfer-encoding", "keep-alive", "connection"] {
                assert!(!head.contains(name), "{head}");
            }
            assert!(rest.starts_with("hellohttp/1.1 200 ok"), "{rest}");
        },
    );
}

#[test]
fn rs_08_an_http_1_0_client_gets_no_chunks() {
    each_backend(
        |_| {},
        |address| {
            for fields in ["Host: a\r\n", "Connection: keep-alive\r\n"] {
                let all = exchange(address, &format!("GET /stream HTTP/1.0\r\n{fields}\r\n"));
                let (head, rest) = first(&all, "/stream");
                assert!(!head.contains("Transfer-Encoding") && !head.contains("keep-alive"), "{head}");
                assert_eq!(rest, "streamed");
            }
            let all = answers(address, "GET", "/stream");
            assert!(all.contains("\r\nTransfer-Encoding: chunked\r\n") && all.contains("\r\n\r\n8\r\nstreamed\r\n0\r\n\r\n"), "{all}");
        },
    );
}

#[test]
fn rs_10_a_handlers_405_keeps_its_allow_field() {
    each_backend(
        |_| {},
        |address| {
            let all = answers(address, "DELETE", "/static/index.html");
            assert!(all.starts_with("HTTP/1.1 405 ") && all.contains("\r\nAllow: GET, HEAD\r\n") && all.ends_with("path /next"), "{all}");
        },
    );
}

#[test]
fn rs_12_a_panic_costs_one_request_and_nothing_else() {
    each_backend(
        |_| {},
        |address| {
            let mut other = connect(address);
            let all = answers(address, "GET", "/handler-panics");
            assert!(all.starts_with("HTTP/1.1 500 ") && all.ends_with("path /next") && !all.contains("planned"), "{all}");
            other.write_all(b"GET /other HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            let mut answer = String::new();
            other.read_to_string(&mut answer).expect("an answer");
            assert!(answer.ends_with("path /other"), "{answer}");
        },
    );
}

#[test]
fn rs_13_and_ka_13_a_body_that_the_handler_ignores_is_taken_in_and_never_a_request() {
    each_backend(
        |_| {},
        |address| {
            let body = "GET /evil HTTP/1.1\r\nHost: a\r\n\r\n".repeat(30_000);
            let all = exchange(
                address,
                &format!(
                    "POST /early-4xx HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
                    body.len()
                ),
            );
            assert!(all.starts_with("HTTP/1.1 403 ") && all.ends_with("path /next") && !all.contains("evil"), "{all}");
        },
    );
}

#[test]
fn ka_15_and_16_an_upgrade_is_never_agreed_to() {
    each_backend(
        |_| {},
        |address| {
            for (version, websocket) in [("1.0", "13"), ("1.1", "99"), ("1.1", "13")] {
                let all = exchange(
                    address,
                    &format!(
                        "GET /ws HTTP/{version}\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: {websocket}\r\n\r\n"
                    ),
                );
                assert!(all.starts_with("HTTP/1.1 200 ") && all.ends_with("path /ws"), "{all}");
            }
        },
    );
}

fn each_backend(change: impl Fn(&mut Config), story: impl Fn(&str)) {
    in_process::each_backend(|| Server::new(lies), change, |address, _| story(address));
}
