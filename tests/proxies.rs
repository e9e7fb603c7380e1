//! Who the client is when proxies stand between: what handlers are told, and what they are spared.

mod in_process;

use std::{
    io::{Read, Write},
    net::Shutdown,
    thread,
    time::{Duration, Instant},
};

use uringd::{Config, Request, Response, Running, Runs, Server, config::Permit, identity::Networks, stats::Stats};

use in_process::{WAIT, connect, serve};

const V1: &str = "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n";

/// Says who asked, in one line; on the ring thread for paths that begin with /inline.
struct Who;

impl uringd::Handler for Who {
    fn handle(&self, request: &Request<'_>) -> Response {
        let names: Vec<&str> = request.headers().map(|field| field.0).filter(|name| name.to_lowercase().contains("forwarded")).collect();
        let who = (request.peer().to_string(), request.scheme(), request.host(), request.port(), names);
        Response::text(format!("{who:?}"))
    }

    fn runs(&self, request: &Request<'_>) -> Runs {
        if request.path().starts_with("/inline") { Runs::Inline } else { Runs::OnPool }
    }
}

fn each_backend(change: impl Fn(&mut Config), story: impl Fn(&str, &Running)) {
    in_process::each_backend(|| Server::with_handler(Who), change, story);
}

/// Sends these pieces; returns the answers' bodies as far as they go.
fn exchange(address: &str, pieces: &[&[u8]]) -> String {
    let mut stream = connect(address);
    stream.set_nodelay(true).expect("a socket");
    for piece in pieces {
        stream.write_all(piece).expect("sent");
        if pieces.len() > 1 {
            thread::sleep(Duration::from_micros(300));
        }
    }
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer.rsplit_once("\r\n\r\n").map_or(answer.clone(), |answer| answer.1.to_owned())
}

fn ask(address: &str, path: &str, fields: &str) -> String {
    exchange(address, &[format!("GET {path} HTTP/1.1\r\nHost: inner:8000\r\nConnection: close\r\n{fields}\r\n").as_bytes()])
}

fn sum(running: &Running, count: impl Fn(&Stats) -> u64) -> u64 {
    running.stats().iter().map(|stats| count(stats)).sum()
}

const FIELDS: &str = "X-Forwarded-For: 6.6.6.6, 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: a.example\r\n";

#[test]
fn a_trusted_proxys_word_is_what_handlers_are_told() {
    each_backend(
        |_| {},
        |address, running| {
            let names = r#"["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"]"#;
            let wanted = format!(r#"("203.0.113.7:0", "https", "a.example", 443, {names})"#);
            for path in ["/pool", "/inline", "http://inner:8000/inline"] {
                assert_eq!(ask(address, path, FIELDS), wanted, "{path}");
            }
            let body = format!("POST / HTTP/1.1\r\nHost: inner:8000\r\nConnection: close\r\nContent-Length: 2\r\n{FIELDS}\r\nhi");
            assert_eq!(exchange(address, &[body.as_bytes()]), wanted);
            assert_eq!(exchange(address, &body.as_bytes().chunks(1).collect::<Vec<_>>()), wanted, "byte by byte");
            let forwarded = ask(address, "/", "Forwarded: for=\"[2001:db8::1]:9\";proto=https;host=\"b.example:8443\"\r\n");
            assert_eq!(forwarded, r#"("[2001:db8::1]:9", "https", "b.example", 8443, ["Forwarded"])"#);
            assert_eq!(sum(running, |stats| stats.forwarding_removed.read()), 0);
        },
    );
}

#[test]
fn an_untrusted_peers_word_is_removed_and_counted() {
    each_backend(
        |config| config.forwarded.proxies = Networks::from_list("10.0.0.0/8").expect("networks"),
        |address, running| {
            for path in ["/pool", "/inline", "http://inner:8000/"] {
                let told = ask(address, path, FIELDS);
                assert!(told.starts_with("(\"127.0.0.1:") && told.ends_with(", \"http\", \"inner\", 8000, [])"), "{path}: {told}");
            }
            assert_eq!(sum(running, |stats| stats.forwarding_removed.read()), 9);
        },
    );
}

#[test]
fn without_anybodys_word_the_request_says_it() {
    each_backend(
        |_| {},
        |address, _| {
            let told = ask(address, "/", "");
            assert!(told.starts_with("(\"127.0.0.1:") && told.ends_with(", \"http\", \"inner\", 8000, [])"), "{told}");
            for (request, wanted) in [
                ("GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", ", \"http\", \"a\", 80, [])"),
                ("GET http://a:81/ HTTP/1.0\r\n\r\n", ", \"http\", \"a\", 81, [])"),
                ("GET / HTTP/1.0\r\n\r\n", ", \"http\", \"\", 80, [])"),
                ("GET / HTTP/1.1\r\nHost: [::1]:82\r\nConnection: close\r\n\r\n", ", \"http\", \"[::1]\", 82, [])"),
            ] {
                let told = exchange(address, &[request.as_bytes()]);
                assert!(told.ends_with(wanted), "{request}: {told}");
            }
        },
    );
}

fn proxied(config: &mut Config) {
    config.proxy_protocol = Some(Networks::loopback());
    config.timeouts.head = Duration::from_millis(400);
}

fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &(block.len() as u16).to_be_bytes(), block].concat()
}

#[test]
fn the_proxy_protocol_names_the_client_however_it_is_split() {
    each_backend(proxied, |address, _| {
        let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let addresses = [192, 0, 2, 1, 198, 51, 100, 1, 0xdc, 0x04, 1, 187, 4, 0, 0];
        for (header, wanted) in [
            (V1.as_bytes().to_vec(), "192.0.2.1:56324"),
            (v2(0x21, 0x11, &addresses), "192.0.2.1:56324"),
            (v2(0x21, 0x31, &[0; 216]), "unix"),
            (v2(0x20, 0, &[]), "127.0.0.1:"),
            (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1:"),
        ] {
            let all = [&header[..], request].concat();
            let split = all.split_at(header.len());
            for pieces in [vec![&all[..]], all.chunks(1).collect(), vec![split.0, split.1], vec![&all[..5], &all[5..]]] {
                let told = exchange(address, &pieces);
                assert!(told.starts_with(&format!("(\"{wanted}")), "{wanted}, {} pieces: {told}", pieces.len());
            }
        }
    });
}

#[test]
fn the_client_stays_the_same_for_all_requests_of_a_connection() {
    each_backend(proxied, |address, _| {
        let mut stream = connect(address);
        let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let last = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        stream.write_all(format!("{V1}{request}{request}{last}").as_bytes()).expect("sent");
        let mut all = String::new();
        stream.read_to_string(&mut all).expect("answers");
        assert_eq!(all.matches("192.0.2.1:56324").count(), 3, "{all}");
        // A second header is no request.
        assert!(exchange(address, &[format!("{V1}{V1}{last}").as_bytes()]).contains("RFC 9112"));
    });
}

#[test]
fn a_connection_without_a_proxy_header_is_closed_without_a_word() {
    each_backend(proxied, |address, running| {
        let begun = Instant::now();
        let cases: [&[u8]; 5] =
            [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PROXY nonsense\r\n", b"PROXY TCP4 1", b"", &v2(0x21, 0x11, &[0; 3])];
        for bytes in cases {
            assert_eq!(exchange(address, &[bytes]), "", "{bytes:?}");
        }
        assert!(begun.elapsed() < WAIT);
        let mut stream = connect(address);
        stream.write_all(b"PROXY TC").expect("sent");
        stream.shutdown(Shutdown::Write).expect("a socket");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
        assert_eq!(sum(running, |stats| stats.proxy_refused.read()), 6);
        assert_eq!(sum(running, |stats| stats.requests.read()), 0);
    });
}

#[test]
fn a_proxy_header_longer_than_a_head_may_be_is_closed_at_once_and_not_waited_for() {
    let small = |config: &mut Config| {
        proxied(config);
        config.limits.head_bytes_max = 64;
        config.timeouts.head = 10 * WAIT;
    };
    each_backend(small, |address, running| {
        let block = v2(0x21, 0x31, &[0; 216]);
        let line = format!("PROXY UNKNOWN {}\r\n", "x".repeat(60));
        for pieces in [vec![&block[..]], block[..17].chunks(1).collect(), vec![line.as_bytes()], line.as_bytes()[..65].chunks(1).collect()]
        {
            assert_eq!(exchange(address, &pieces), "");
        }
        assert_eq!(sum(running, |stats| stats.proxy_refused.read()), 4);
        let fits = [v2(0x21, 0x11, &[7; 48]), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_vec()].concat();
        assert!(exchange(address, &[&fits[..]]).starts_with("(\"7.7.7.7:1799"));
    });
}

#[test]
fn only_listed_proxies_may_connect_where_the_proxy_protocol_is_on() {
    each_backend(
        |config| config.proxy_protocol = Some(Networks::from_list("10.0.0.0/8").expect("networks")),
        |address, running| {
            let mut stream = connect(address);
            let _ = stream.write_all(V1.as_bytes());
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert_eq!(answer, b"");
            assert_eq!(sum(running, |stats| stats.proxy_refused.read()), 1);
        },
    );
}

#[test]
fn connections_per_client_are_counted_for_the_client_and_not_for_the_proxy() {
    each_backend(
        |config| {
            proxied(config);
            config.limits.connections_per_ip_max = Some(2);
        },
        |address, running| {
            let client = |ip: u8| {
                let mut stream = connect(address);
                let request = format!("PROXY TCP4 192.0.2.{ip} 198.51.100.1 1 2\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
                stream.write_all(request.as_bytes()).expect("sent");
                let mut byte = [0];
                let served = stream.read(&mut byte).is_ok_and(|count| count == 1);
                (stream, served)
            };
            let four = [client(1), client(1), client(2), client(2)];
            assert!(four.iter().all(|client| client.1));
            assert!(!client(1).1 && !client(2).1);
            assert_eq!(sum(running, |stats| stats.ip_limited.read()), 2);
            drop(four);
            let patience = Instant::now() + WAIT;
            while !client(1).1 {
                assert!(Instant::now() < patience, "connections that ended still count");
                thread::sleep(Duration::from_millis(10));
            }
        },
    );
}

/// Says under which CGI-style names the fields are passed on.
fn environment(permit: Permit) -> impl Fn(&Request<'_>) -> Response + Send + Sync + 'static {
    let stats = Stats::default();
    move |request| {
        let names: Vec<String> =
            request.cgi_headers(permit, &stats).map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(value))).collect();
        Response::text(format!("{} {}", names.join(" "), stats.names_dropped.read()))
    }
}

#[test]
fn names_with_underscores_do_not_reach_environments_unless_permitted() {
    let fields = "Content-Type: t\r\nContent_Length: 5\r\nX_Forwarded_For: 1.1.1.1\r\nX-A: 1\r\nX_A: 2\r\nProxy: p\r\n";
    let strict = "HTTP_HOST=inner:8000 HTTP_CONNECTION=close CONTENT_TYPE=t HTTP_X_A=1 4";
    let relaxed = "HTTP_HOST=inner:8000 HTTP_CONNECTION=close CONTENT_TYPE=t HTTP_CONTENT_LENGTH=5 HTTP_X_A=1 HTTP_X_A=2 2";
    for (underscore_headers, wanted) in [(false, strict), (true, relaxed)] {
        let permit = Permit { underscore_headers, ..Permit::default() };
        let story = |address: &str, _: &Running| assert_eq!(ask(address, "/", fields), wanted);
        serve(Server::new(environment(permit)), |_| {}, story).expect("started");
    }
}
