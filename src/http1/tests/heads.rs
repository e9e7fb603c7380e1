//! What an accepted head says.

use super::{End, request, run, run_with};
use crate::{
    config::{Limits, Permit},
    http1::{Connection, Event, Framing, Head, Refusal, Version, fuzzing, scan::is_tchar, target::is_host},
};

#[track_caller]
fn refused(bytes: &str, refusal: Refusal) {
    assert_eq!(run(bytes.as_bytes()).end, End::Refused(refusal), "{bytes:?}");
}

fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")
}

fn with_field(field: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")
}

#[test]
fn a_target_is_split_at_its_first_question_mark() {
    for (target, path, query) in [
        ("/", "/", None),
        ("/a/b", "/a/b", None),
        ("/?", "/", Some("")),
        ("/a?b=c?d", "/a", Some("b=c?d")),
        ("/a//b?http://c//", "/a//b", Some("http://c//")),
        ("http://a", "/", None),
        ("http://A?q", "/", Some("q")),
        ("HTTP://a/x/y?q=/", "/x/y", Some("q=/")),
        ("/[a]|{b}", "/[a]|{b}", None),
    ] {
        let request = request(get(target).as_bytes());
        let bytes = &request.head_bytes;
        assert_eq!(request.head.target.of(bytes), target.as_bytes());
        assert_eq!(request.head.path.of(bytes), path.as_bytes(), "{target}");
        assert_eq!(request.head.query.map(|query| query.of(bytes)), query.map(str::as_bytes), "{target}");
    }
}

#[test]
fn a_target_must_have_a_form_that_fits() {
    refused(&get("a/b"), Refusal::TargetForm);
    refused(&get("http:/a"), Refusal::TargetForm);
    refused(&get("1x://a"), Refusal::TargetForm);
    refused(&get("?a=b://c"), Refusal::TargetForm);
    refused(&get("a:80"), Refusal::TargetForm);
    refused(&get("ws://a/"), Refusal::TargetScheme);
    refused(&get("/#a"), Refusal::TargetFragment);
    refused(&get("/?a#b"), Refusal::TargetFragment);
    refused(&get("http:///a"), Refusal::HostBad);
    refused(&get("http://b@a/"), Refusal::TargetUserinfo);
    refused(&get("http://a:80/"), Refusal::AuthorityMismatch);
    refused(&get("/\u{e9}"), Refusal::TargetBad);
}

#[test]
fn a_path_with_two_slashes_first_passes_only_where_permitted() {
    let permit = Permit { double_slash: true, ..Permit::default() };
    for target in ["//evil.example", "//", "///a", "//a?b", "http://a//b"] {
        refused(&get(target), Refusal::TargetDoubleSlash);
        let run = fuzzing::run(get(target).as_bytes(), &[], &Limits::default(), permit);
        assert_eq!((run.requests.len(), run.end), (1, End::Open), "{target}");
        let request = &run.requests[0];
        assert!(request.head.path.of(&request.head_bytes).starts_with(b"//"));
    }
}

#[test]
fn an_https_target_passes_only_where_permitted() {
    let permit = Permit { https_target: true, ..Permit::default() };
    for target in ["https://a/b", "HTTPS://a", "https://a?b"] {
        refused(&get(target), Refusal::TargetHttps);
        let run = fuzzing::run(get(target).as_bytes(), &[], &Limits::default(), permit);
        assert_eq!((run.requests.len(), run.end), (1, End::Open), "{target}");
    }
}

#[test]
fn a_method_of_the_greatest_length_may_end_there() {
    let get = |method: String| format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(run(get("M".repeat(32)).as_bytes()).end, End::Open);
    refused(&get("M".repeat(33)), Refusal::MethodTooLong);
    refused(&get("M".repeat(32) + ":"), Refusal::MethodBad);
}

/// No byte more than that which breaks the rule has to come, or a peer could keep a refusal from being found.
#[test]
fn what_no_later_byte_can_mend_is_refused_at_once() {
    let line = "GET / HTTP/1.1\r\n";
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let size = "5;a=b\r\n";
    let cases = [
        ("", " ", Refusal::RequestLineBad),
        ("\r\n", " ", Refusal::RequestLineBad),
        ("", "\n", Refusal::BareLf),
        ("", "\rG", Refusal::BareCr),
        ("", "\r\n\r", Refusal::EmptyLines),
        ("", "\r\n\n", Refusal::BareLf),
        ("", "(", Refusal::MethodBad),
        ("", "\u{16}", Refusal::MethodBad),
        ("G", "\0", Refusal::MethodBad),
        ("METHODMETHODMETHODMETHODMETHODME", "T", Refusal::MethodTooLong),
        ("GET", "\r\n", Refusal::RequestLineBad),
        ("GET ", " ", Refusal::RequestLineBad),
        ("GET ", "\r", Refusal::RequestLineBad),
        ("GET ", "#", Refusal::TargetFragment),
        ("GET /", "#", Refusal::TargetFragment),
        ("GET ", "\t", Refusal::TargetBad),
        ("GET /", "\u{7f}", Refusal::TargetBad),
        ("GET /", "\r\n", Refusal::RequestLineBad),
        ("GET /", "\rX", Refusal::BareCr),
        ("GET / ", " ", Refusal::VersionBad),
        ("GET / HTTP/1", "1", Refusal::VersionBad),
        ("GET / HTTP/1.1", "0", Refusal::VersionBad),
        ("GET / HTTP/2.0\r", "\n", Refusal::VersionUnsupported),
        ("GET / HTTP/1.1", "\n", Refusal::BareLf),
        ("GET / HTTP/1.1", "\r\r", Refusal::BareCr),
        (line, " ", Refusal::FieldFolded),
        (line, "\t", Refusal::FieldFolded),
        (line, ":", Refusal::FieldNameBad),
        (line, "\n", Refusal::BareLf),
        (line, "\rX", Refusal::BareCr),
        (line, "X(", Refusal::FieldNameBad),
        (line, "X ", Refusal::FieldNameSpace),
        (line, "X\t", Refusal::FieldNameSpace),
        (line, "X\r", Refusal::FieldWithoutColon),
        (line, "X: \0", Refusal::FieldValueControl),
        (line, "X: \n", Refusal::BareLf),
        (line, "X: \rX", Refusal::BareCr),
        (chunked, "\r", Refusal::ChunkSizeBad),
        (chunked, " ", Refusal::ChunkSizeBad),
        (chunked, "5x", Refusal::ChunkSizeBad),
        (chunked, "5;;", Refusal::ChunkExtensionBad),
        (chunked, "5;a=\"\r", Refusal::ChunkExtensionBad),
        (chunked, "5\n", Refusal::BareLf),
        (chunked, "5\r5", Refusal::BareCr),
        (chunked, "10000000000000000", Refusal::ChunkSizeOverflow),
        (chunked, "fffffffff\r\n", Refusal::BodyTooLarge),
        (chunked, &(size.to_owned() + "hellox"), Refusal::ChunkDataUnterminated),
        (chunked, &(size.to_owned() + "hello\n"), Refusal::ChunkDataUnterminated),
        (chunked, &(size.to_owned() + "hello\r\r"), Refusal::ChunkDataUnterminated),
        (chunked, "0\r\n ", Refusal::FieldFolded),
        (chunked, "0\r\n\rX", Refusal::BareCr),
    ];
    for (before, last, refusal) in cases {
        let bytes = [before, last].concat();
        refused(&bytes, refusal);
        let end = run(&bytes.as_bytes()[..bytes.len() - 1]).end;
        assert!(matches!(end, End::Open | End::Refused(Refusal::Truncated)), "{bytes:?} was refused before its last byte: {end:?}");
    }
}

#[test]
fn the_host_comes_from_the_field_or_from_the_target() {
    for (bytes, host) in [
        ("GET / HTTP/1.1\r\nhOST:\t b:1 \r\n\r\n", Some("b:1")),
        ("GET http://B:1/ HTTP/1.1\r\nHost: b:1\r\n\r\n", Some("b:1")),
        ("GET http://b/ HTTP/1.0\r\n\r\n", Some("b")),
        ("GET / HTTP/1.0\r\n\r\n", None),
    ] {
        let request = request(bytes.as_bytes());
        assert_eq!(request.head.host.map(|host| host.of(&request.head_bytes)), host.map(str::as_bytes), "{bytes:?}");
    }
}

#[test]
fn a_missing_host_passes_only_where_permitted() {
    let bytes = b"GET / HTTP/1.1\r\n\r\n";
    assert_eq!(run(bytes).end, End::Refused(Refusal::HostMissing));
    let permit = Permit { host_missing: true, ..Permit::default() };
    let run = fuzzing::run(bytes, &[], &Limits::default(), permit);
    assert_eq!((run.requests.len(), run.end), (1, End::Open));
    assert_eq!(run.requests[0].head.host, None);
}

#[test]
fn a_name_that_is_nearly_known_is_another_name() {
    for name in [
        "Host",
        "Range",
        "Expect",
        "If-Range",
        "Forwarded",
        "X-Real-IP",
        "Connection",
        "Content-Type",
        "Max-Forwards",
        "Authorization",
        "Content-Range",
        "Content-Length",
        "Transfer-Encoding",
        "If-Modified-Since",
        "If-Unmodified-Since",
        "Proxy-Authorization",
    ] {
        for at in 0..name.len() {
            // Letters with the same low five bits (which is what is looked at first), and a neighbour.
            let byte = name.as_bytes()[at];
            for other in [byte & 31 | 0x20, byte & 31 | 0x40, byte & 31 | 0x60, byte ^ 1] {
                let mut nearly = name.as_bytes().to_vec();
                nearly[at] = other;
                if !is_tchar(other) || nearly.eq_ignore_ascii_case(name.as_bytes()) {
                    continue;
                }
                let nearly = String::from_utf8(nearly).expect("ASCII");
                let text = format!("GET / HTTP/1.1\r\nHost: a\r\n{nearly}: close\r\n{nearly}: 5\r\n\r\n");
                let head = request(text.as_bytes()).head;
                let other_than_default = (head.forwarding, head.keep_alive, head.framing);
                assert_eq!(other_than_default, (false, true, Framing::None), "{nearly}");
            }
        }
    }
}

#[test]
fn forwarding_fields_are_noticed_whatever_their_length_and_case() {
    let long = format!("X-Forwarded-{}", "a".repeat(100));
    for name in ["Forwarded", "FORWARDED", "x-forwarded-for", "X-Forwarded-Proto", "X-FORWARDED-", "X-Real-Ip", &long] {
        for field in [format!("{name}: a"), format!("A: b\r\n{name}:")] {
            assert!(request(with_field(&field).as_bytes()).head.forwarding, "{field}");
        }
    }
    for name in ["X-Forwarded", "Forwarded-For", "X_Forwarded_For", "X-Real-IPs", "X", "Via"] {
        assert!(!request(with_field(&format!("{name}: a")).as_bytes()).head.forwarding, "{name}");
    }
}

#[test]
fn rules_about_fields_hold_in_heads_of_any_length() {
    let limits = Limits { fields_max: 200, ..Limits::default() };
    for others in [0, 1, 61, 62, 63, 64, 65, 126, 127, 128, 129, 150] {
        let fields = "X: y\r\n".repeat(others);
        for (text, wanted) in [
            (format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n"), End::Open),
            (format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}Host: a\r\n\r\n"), End::Refused(Refusal::HostRepeated)),
            (format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}Connection: close\r\n\r\n"), End::Closing),
            (format!("GET / HTTP/1.1\r\nConnection: close\r\n{fields}Host: a\r\n\r\n"), End::Closing),
            (format!("GET / HTTP/1.1\r\n{fields}Host: a\r\nA: b\n\r\n"), End::Refused(Refusal::BareLf)),
        ] {
            assert_eq!(run_with(text.as_bytes(), &limits).end, wanted, "{others}");
        }
    }
}

#[test]
fn long_names_are_read_like_short_ones() {
    // Every byte at every place of names around the lengths at which they are read eight bytes at a time.
    for length in 1..=26 {
        for at in 0..length {
            for byte in 0..=0xff_u8 {
                let mut name = vec![b'a'; length];
                name[at] = byte;
                let allowed = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(&byte);
                let wanted = match byte {
                    b'.' => at > 0,
                    b':' => at > 0 && at + 1 == length,
                    b'%' => at + 2 < length,
                    _ => allowed,
                };
                assert_eq!(is_host(&name), wanted, "{:?}", String::from_utf8_lossy(&name));
            }
            if at > 0 {
                let mut name = vec![b'a'; length];
                (name[at - 1], name[at]) = (b'.', b'.');
                assert!(!is_host(&name), "{:?}", String::from_utf8_lossy(&name));
            }
        }
    }
}

#[test]
fn hosts_are_names_addresses_and_ports() {
    for host in ["a", "a.", "a-b_c.d", "1.2.3.4", "%41b", "[::]", "[1:2:3:4:5:6:7:8]:65535", "a:", "a:0", "a:00080"] {
        request(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
    }
    for host in [
        "",
        ":80",
        "a..",
        ".a",
        "%4",
        "%zz",
        "a:65536",
        "a:000080",
        "a:-1",
        "[]",
        "[::1%25eth0]",
        "[v1.a]",
        "[::1]:x",
        "a:b:1",
        "a/",
        "a\"b",
        "a b",
        "\u{e9}",
    ] {
        refused(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"), Refusal::HostBad);
    }
}

#[test]
fn keep_alive_follows_version_and_connection_options() {
    for (version, connection, keep_alive) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: foo ,\tClose\r\n", false),
        ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", false),
        ("1.1", "Connection: closed, not-close\r\n", true),
        ("1.1", "Proxy-Connection: close\r\n", true),
        ("1.2", "", true),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
        ("1.0", "Connection: keep-alive, close\r\n", false),
    ] {
        let request = request(format!("GET / HTTP/{version}\r\nHost: a\r\n{connection}\r\n").as_bytes());
        assert_eq!(request.head.keep_alive, keep_alive, "{version} {connection}");
    }
}

#[test]
fn a_newer_minor_version_is_read_as_http11() {
    let request = request(b"\r\nGET /?x HTTP/1.7\r\nHost: a\r\nX: y\r\n\r\n");
    assert_eq!(request.head.version, Version::Http11);
    assert_eq!(request.head.fields[1].value.of(&request.head_bytes), b"y");
    assert!(request.head_bytes.starts_with(b"\r\nGET /?x HTTP/1.7\r\n"));
}

#[test]
fn a_method_that_nobody_registered_reaches_the_handler() {
    let request = request(b"Purge!x / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(request.head.method.of(&request.head_bytes), b"Purge!x");
    assert!(!request.head.is_head);
}

#[test]
fn fields_keep_their_order_their_case_and_their_duplicates() {
    let request = request(b"GET / HTTP/1.1\r\nHost: a\r\nX-a: 1\r\nx_A:\r\nX-A:\t2 3\t \r\n\r\n");
    let fields: Vec<(&[u8], &[u8])> =
        request.head.fields.iter().map(|field| (field.name.of(&request.head_bytes), field.value.of(&request.head_bytes))).collect();
    assert_eq!(fields, [(&b"Host"[..], &b"a"[..]), (b"X-a", b"1"), (b"x_A", b""), (b"X-A", b"2 3")]);
}

#[test]
fn single_fields_may_not_be_repeated_and_others_may() {
    for name in ["Authorization", "Content-Type", "Range", "Max-Forwards", "If-Modified-Since", "proxy-authorization"] {
        refused(&with_field(&format!("{name}: a\r\n{}: a", name.to_lowercase())), Refusal::FieldRepeated);
    }
    for name in ["Cookie", "X", "Referer", "Accept", "Connection"] {
        request(with_field(&format!("{name}: a\r\n{name}: b")).as_bytes());
    }
}

#[test]
fn a_client_waits_for_100_only_with_a_body_and_http11() {
    let body = "Content-Length: 1\r\nExpect: 100-Continue\r\n\r\nx";
    for (bytes, waits) in [
        (format!("POST / HTTP/1.1\r\nHost: a\r\n{body}"), true),
        (format!("POST / HTTP/1.0\r\nHost: a\r\n{body}"), false),
        ("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n".to_owned(), false),
        ("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n".to_owned(), false),
    ] {
        assert_eq!(request(bytes.as_bytes()).head.expect_continue, waits, "{bytes:?}");
    }
}

#[test]
fn codings_other_than_chunked_are_told_from_nonsense() {
    for (coding, refusal) in [
        ("gzip, chunked", Refusal::CodingUnsupported),
        ("gzip;level=1,CHUNKED", Refusal::CodingUnsupported),
        ("chunked, chunked", Refusal::TransferEncodingBad),
        ("chunked, gzip", Refusal::TransferEncodingBad),
        (", chunked", Refusal::TransferEncodingBad),
        ("chunked,", Refusal::TransferEncodingBad),
        ("identity", Refusal::TransferEncodingBad),
        ("", Refusal::TransferEncodingBad),
    ] {
        refused(&with_field(&format!("Transfer-Encoding: {coding}")), refusal);
    }
}

#[test]
fn a_body_too_large_by_its_own_account_is_refused_before_it_arrives() {
    let limits = Limits { body_bytes_max: 5, ..Limits::default() };
    let head = |length: &str| format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    assert_eq!(run_with(head("6").as_bytes(), &limits).end, End::Refused(Refusal::BodyTooLarge));
    assert_eq!(run_with((head("0005") + "hello").as_bytes(), &limits).requests[0].body, b"hello");
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
    assert_eq!(run_with(format!("{chunked}3\r\n").as_bytes(), &limits).end, End::Refused(Refusal::BodyTooLarge));
    assert_eq!(run_with(format!("{chunked}2\r\nde\r\n0\r\n\r\n").as_bytes(), &limits).requests[0].body, b"abcde");
}

/// One byte less than what is sent is refused, the exact length passes; whole and byte by byte.
#[track_caller]
fn check_limit(bytes: &str, refusal: Refusal, limits: impl Fn(usize) -> Limits, exact: usize) {
    let everywhere: Vec<usize> = (1..bytes.len()).collect();
    for cuts in [&[][..], &everywhere] {
        let passes = fuzzing::run(bytes.as_bytes(), cuts, &limits(exact), Permit::default());
        assert_eq!(passes.end, End::Open);
        let refused = fuzzing::run(bytes.as_bytes(), cuts, &limits(exact - 1), Permit::default());
        assert_eq!(refused.end, End::Refused(refusal));
    }
}

#[test]
fn limits_are_exact() {
    let none = Limits::default;
    let bytes = "\r\nGET /0123456789 HTTP/1.1\r\nHost: a\r\nX:   0123456789   \r\nLast: 0123456789\r\n\r\n";
    check_limit(bytes, Refusal::HeadTooLarge, |n| Limits { head_bytes_max: n, ..none() }, bytes.len());
    check_limit(bytes, Refusal::RequestLineTooLong, |n| Limits { request_line_bytes_max: n, ..none() }, 24);
    check_limit(bytes, Refusal::FieldTooLong, |n| Limits { field_bytes_max: n, ..none() }, 18);
    check_limit(bytes, Refusal::FieldsTooMany, |n| Limits { fields_max: n, ..none() }, 3);
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunked = format!("{head}5;name=\"val\"\r\nhello\r\n0\r\n\r\n");
    check_limit(&chunked, Refusal::ChunkLineTooLong, |n| Limits { chunk_line_bytes_max: n, ..none() }, 12);
    check_limit(&chunked, Refusal::BodyTooLarge, |n| Limits { body_bytes_max: n as u64, ..none() }, 5);
    let trailers = format!("{head}0\r\n{}\r\n", "T: 0123456789\r\n".repeat(6));
    check_limit(&trailers, Refusal::TrailersTooLarge, |n| Limits { head_bytes_max: n, ..none() }, 92);
    check_limit(&trailers, Refusal::FieldsTooMany, |n| Limits { fields_max: n, ..none() }, 6);
}

#[test]
fn more_fields_than_the_stack_has_room_for_are_still_parsed() {
    let limits = Limits { fields_max: 1000, ..Limits::default() };
    let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(999));
    check_limit(&bytes, Refusal::FieldsTooMany, |n| Limits { fields_max: n, ..limits.clone() }, 1000);
}

#[test]
fn small_chunks_are_fine_until_they_are_most_of_the_body() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let body = |chunk: &str, count: usize| [head, &chunk.repeat(count), "0\r\n\r\n"].concat();
    let limits = Limits::default();
    assert_eq!(run_with(body("1\r\nx\r\n", 20_000).as_bytes(), &limits).end, End::Open);
    assert_eq!(run_with(body("3\r\nxyz\r\n", 200_000).as_bytes(), &limits).end, End::Open);
    assert_eq!(run_with(body("a\r\n0123456789\r\n", 100_000).as_bytes(), &limits).end, End::Open);
    assert_eq!(run_with(body("1\r\nx\r\n", 25_000).as_bytes(), &limits).end, End::Refused(Refusal::ChunkOverhead));
}

#[test]
fn trailers_never_become_fields() {
    let request =
        request(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n1\r\nx\r\n0\r\nHost: evil\r\nX: y\r\n\r\n");
    assert_eq!(request.head.fields.len(), 3);
    assert_eq!(request.head.framing, Framing::Chunked);
    assert_eq!(request.body, b"x");
}

#[test]
fn a_warm_head_is_used_again_without_leftovers() {
    let mut head = Head::default();
    let mut bytes = b"HEAD http://b/?q HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\nX: y\r\n\r\nGET / HTTP/1.0\r\n\r\n".to_vec();
    let mut connection = Connection::new();
    for _ in 0..2 {
        let (count, event) = connection.next_event(&bytes, &mut head, &Limits::default(), Permit::default()).expect("a good head");
        assert_eq!(event, Event::Head);
        bytes.drain(..count);
        let end = connection.next_event(&[], &mut head, &Limits::default(), Permit::default());
        assert_eq!(end, Ok((0, Event::End)));
        connection.respond();
        connection.flushed(true);
    }
    let mut fresh = Head::default();
    Connection::new().next_event(b"GET / HTTP/1.0\r\n\r\n", &mut fresh, &Limits::default(), Permit::default()).expect("a good head");
    assert_eq!(head, fresh);
}
