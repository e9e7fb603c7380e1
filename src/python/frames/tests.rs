//! Both directions: what a worker's `marshal.loads` will see, and everything a worker could send instead of an answer.

use super::*;
use crate::{
    exchange::Exchange,
    http1::{Connection, Event as HttpEvent, Head},
};

const FACTS: Facts<'_> = Facts {
    request_id: "id",
    queue_seconds: 0.5,
    deadline: 2.0,
    permit: Permit { host_missing: false, underscore_headers: false, double_slash: false, https_target: false },
    marked: false,
};

/// A value of marshal, as far as we write it.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Text(String),
    Float(f64),
}

/// Reads an environ the slow way, and demands that nothing is left over.
fn unmarshal(mut bytes: &[u8]) -> Vec<(String, Value)> {
    fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        taken
    }
    fn value(bytes: &mut &[u8]) -> Option<Value> {
        let long = |bytes: &mut &[u8]| u32::from_le_bytes(*take(bytes, 4).first_chunk().expect("four")) as usize;
        let (length, utf8) = match take(bytes, 1)[0] {
            b'z' | b'Z' => (take(bytes, 1)[0] as usize, false),
            b'a' => (long(bytes), false),
            b'u' => (long(bytes), true),
            b'g' => return Some(Value::Float(f64::from_le_bytes(*take(bytes, 8).first_chunk().expect("eight")))),
            b'0' => return None,
            other => panic!("code {other}"),
        };
        let text = take(bytes, length);
        assert!(utf8 || text.is_ascii());
        Some(Value::Text(String::from_utf8(text.to_vec()).expect("UTF-8")))
    }
    const FIXED: [&str; 10] = [
        "REQUEST_METHOD",
        "PATH_INFO",
        "QUERY_STRING",
        "SERVER_PROTOCOL",
        "REQUEST_URI",
        "REMOTE_ADDR",
        "REMOTE_PORT",
        "uringd.request_id",
        "uringd.queue_seconds",
        "uringd.deadline",
    ];
    assert_eq!(take(&mut bytes, 2), [b')', FIXED.len() as u8 + 1]);
    let mut pairs: Vec<_> = FIXED.iter().map(|key| (key.to_string(), value(&mut bytes).expect("a value"))).collect();
    assert_eq!(take(&mut bytes, 1), b"{");
    while let Some(key) = value(&mut bytes) {
        let Value::Text(key) = key else { panic!("a key that is no text") };
        pairs.push((key, value(&mut bytes).expect("a value")));
    }
    assert_eq!(bytes, b"");
    pairs
}

/// The environ of a request that was sent like this, and what is in the frame behind it.
fn environ_with(text: &str, permit: Permit) -> (Vec<(String, Value)>, Vec<u8>) {
    let limits = crate::config::Limits::default();
    let (mut exchange, mut head) = (Exchange::new(), Head::default());
    let (mut connection, mut at) = (Connection::new(), 0);
    loop {
        let (used, event) = connection.next_event(&text.as_bytes()[at..], &mut head, &limits, permit).expect("well-formed");
        match event {
            HttpEvent::Head => exchange.head_bytes = text.as_bytes()[at..at + used].to_vec(),
            HttpEvent::Body(bytes) => exchange.body.extend_from_slice(bytes),
            HttpEvent::End => break,
            _ => panic!("not complete"),
        }
        at += used;
    }
    exchange.head = head;
    exchange.peer = Peer::Inet("[::ffff:10.0.0.1]:77".parse().expect("an address"));
    let mut frame = vec![9];
    request(&mut frame, 7, &exchange.request(), Facts { permit, ..FACTS });
    let header = &frame[1..=HEADER_BYTES];
    assert_eq!((&header[4..8], header[8], header[9..].to_vec()), (&7_u32.to_le_bytes()[..], REQUEST, vec![0; 3]));
    assert_eq!(u32::from_le_bytes(*header.first_chunk().expect("four")) as usize, frame.len() - 1 - HEADER_BYTES);
    let (environ, body) = split_environ(&frame[1 + HEADER_BYTES..]);
    (unmarshal(environ), body.to_vec())
}

fn split_environ(payload: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = payload.split_first_chunk::<4>().expect("a length");
    rest.split_at(u32::from_le_bytes(*length) as usize)
}

fn environ(text: &str) -> Vec<(String, Value)> {
    environ_with(text, Permit::default()).0
}

fn of<'a>(environ: &'a [(String, Value)], key: &str) -> Option<&'a str> {
    let mut found = environ.iter().filter(|pair| pair.0 == key);
    let value = found.next().map(|pair| match &pair.1 {
        Value::Text(text) => text.as_str(),
        Value::Float(_) => "a float",
    });
    assert!(found.next().is_none(), "{key} twice");
    value
}

#[test]
fn a_request_becomes_the_environ_that_pep_3333_describes() {
    let environ = environ("GET /a%20b/%C3%A9%zz?x=%20 HTTP/1.1\r\nHost: h:1\r\nX-Some-Thing: 1\r\nUser-Agent: u\r\n\r\n");
    for (key, value) in [
        ("REQUEST_METHOD", "GET"),
        // Each byte is one character, as PEP 3333 wants it.
        ("PATH_INFO", "/a b/\u{c3}\u{a9}%zz"),
        ("QUERY_STRING", "x=%20"),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("REQUEST_URI", "/a%20b/%C3%A9%zz?x=%20"),
        ("REMOTE_ADDR", "10.0.0.1"),
        ("REMOTE_PORT", "77"),
        ("HTTP_HOST", "h:1"),
        ("HTTP_X_SOME_THING", "1"),
        ("HTTP_USER_AGENT", "u"),
        ("uringd.request_id", "id"),
    ] {
        assert_eq!(of(&environ, key), Some(value), "{key}");
    }
    assert!(environ.contains(&("uringd.queue_seconds".to_owned(), Value::Float(0.5))));
    assert!(environ.contains(&("uringd.deadline".to_owned(), Value::Float(2.0))));
    for absent in ["CONTENT_LENGTH", "CONTENT_TYPE", "wsgi.url_scheme"] {
        assert_eq!(of(&environ, absent), None);
    }
}

#[test]
fn the_target_of_a_whole_server_has_no_path() {
    let environ = environ("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!((of(&environ, "PATH_INFO"), of(&environ, "REQUEST_URI")), (Some(""), Some("*")));
}

#[test]
fn a_request_can_be_marked() {
    let exchange = Exchange::new();
    for (marked, flags) in [(false, 0), (true, FLAG_MARKED)] {
        let mut frame = Vec::new();
        request(&mut frame, 1, &exchange.request(), Facts { marked, ..FACTS });
        assert_eq!(frame[9], flags);
    }
}

#[test]
fn fields_of_one_name_are_joined_and_cookies_with_a_semicolon() {
    let environ = environ("GET / HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nCookie: a=1\r\nx-a: 2\r\nX-B: 9\r\nX-A: 3\r\ncookie: b=2\r\n\r\n");
    assert_eq!(of(&environ, "HTTP_X_A"), Some("1,2,3"));
    assert_eq!(of(&environ, "HTTP_COOKIE"), Some("a=1; b=2"));
    assert_eq!(of(&environ, "HTTP_X_B"), Some("9"));
}

#[test]
fn a_name_that_could_pass_for_another_is_left_out() {
    let request = "GET / HTTP/1.1\r\nHost: h\r\nX_Real_IP: evil\r\nX_Other: o\r\nX-Real-IP: 1.2.3.4\r\nProxy: evil\r\n\r\n";
    let strict = environ(request);
    assert_eq!((of(&strict, "HTTP_X_REAL_IP"), of(&strict, "HTTP_X_OTHER"), of(&strict, "HTTP_PROXY")), (Some("1.2.3.4"), None, None));
    let (lax, _) = environ_with(request, Permit { underscore_headers: true, ..Permit::default() });
    assert_eq!((of(&lax, "HTTP_X_REAL_IP"), of(&lax, "HTTP_X_OTHER"), of(&lax, "HTTP_PROXY")), (Some("1.2.3.4"), Some("o"), None));
}

#[test]
fn a_body_has_its_length_whatever_its_framing_was() {
    for body in [
        "Content-Length: 3\r\nContent-Type: a/b\r\n\r\nabc",
        "Transfer-Encoding: chunked\r\ncontent-type: a/b\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ] {
        let (environ, body) = environ_with(&format!("POST / HTTP/1.1\r\nHost: h\r\n{body}"), Permit::default());
        assert_eq!(body, b"abc");
        assert_eq!((of(&environ, "CONTENT_LENGTH"), of(&environ, "CONTENT_TYPE")), (Some("3"), Some("a/b")));
        for absent in ["HTTP_CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_TYPE"] {
            assert_eq!(of(&environ, absent), None);
        }
    }
}

#[test]
fn long_texts_and_bytes_above_ascii_have_codes_of_their_own() {
    let long = "v".repeat(300);
    let environ = environ(&format!("GET / HTTP/1.1\r\nHost: h\r\nX-Long: {long}\r\nX-{long}: 1\r\nX-Wide: \u{e9}\r\n\r\n"));
    assert_eq!(of(&environ, "HTTP_X_LONG"), Some(&*long));
    assert_eq!(of(&environ, &format!("HTTP_X_{}", long.to_uppercase())), Some("1"));
    // The two bytes of its UTF-8 are two characters to WSGI.
    assert_eq!(of(&environ, "HTTP_X_WIDE"), Some("\u{c3}\u{a9}"));
}

fn frame(kind: u8, flags: u8, status: u16, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(&id.to_le_bytes());
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&status.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn with_head(head: &[u8], rest: &[u8]) -> Vec<u8> {
    [&(head.len() as u32).to_le_bytes(), head, rest].concat()
}

/// Everything that a reader makes of these bytes when they come in pieces of this size: a text for each event, pieces
/// of bodies joined.
fn events(bytes: &[u8], step: usize) -> Result<Vec<String>, Violation> {
    let (mut reader, mut seen) = (Reader::new(), Vec::new());
    let (mut at, mut body): (usize, Option<usize>) = (0, None);
    loop {
        while let Some((id, event)) = reader.next_event()? {
            if let Event::Piece(bytes) = event {
                body = Some(body.unwrap_or(0) + bytes.len());
                continue;
            }
            seen.extend(body.take().map(|bytes| format!("{bytes} bytes")));
            seen.push(format!("{id} {event:?}"));
        }
        if at == bytes.len() {
            seen.extend(body.take().map(|bytes| format!("{bytes} bytes")));
            return Ok(seen);
        }
        let room = reader.room();
        let length = step.min(bytes.len() - at).min(room.len());
        assert!(length > 0, "no room, and nothing to take");
        room[..length].copy_from_slice(&bytes[at..at + length]);
        reader.add(length);
        at += length;
    }
}

#[test]
fn frames_are_found_however_their_bytes_come() {
    let head = b"OK\r\nX: y\r\n";
    let bytes = [
        frame(READY, 0, 0, 0, b"{}"),
        frame(RESPONSE, 0, 200, 1, &with_head(head, b"body")),
        frame(HINTS, 0, 103, 2, &with_head(b"Early Hints\r\n", b"")),
        frame(EXTEND, 0, 0, 2, &500_u32.to_le_bytes()),
        frame(BEGIN, 0, 404, 2, &with_head(head, b"")),
        frame(PIECE, 0, 0, 2, b"abc"),
        frame(PIECE, 0, 0, 2, b""),
        frame(END, 1, 0, 2, b""),
        frame(FILE, 0, 206, 3, &with_head(head, &[7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])),
    ]
    .concat();
    let whole = events(&bytes, bytes.len()).expect("well-formed");
    assert_eq!(whole.len(), 8);
    assert!(whole[5] == "3 bytes" && whole[6] == "2 End { whole: false }" && whole[7].ends_with("offset: 7, length: 9 }"), "{whole:?}");
    for step in [1, 2, 3, 5, 11, 12, 13, 17] {
        assert_eq!(events(&bytes, step).as_ref(), Ok(&whole), "in steps of {step}");
    }
}

#[test]
fn what_is_larger_than_the_buffer_comes_in_pieces() {
    let body = vec![b'x'; 3 * BUFFER_BYTES];
    let bytes = [
        frame(RESPONSE, 0, 200, 1, &with_head(b"OK\r\n", &body)),
        frame(BEGIN, 0, 200, 2, &with_head(b"OK\r\n", b"")),
        frame(PIECE, 0, 0, 2, &body),
        frame(PIECE, 0, 0, 2, b"tail"),
        frame(END, 0, 0, 2, b""),
    ]
    .concat();
    for step in [4096, 65_537, usize::MAX] {
        let seen = events(&bytes, step).expect("well-formed");
        assert!(seen[0].ends_with(&format!("length: Some({}) }}", body.len())), "{}", seen[0]);
        assert_eq!(seen[1..3], [format!("{} bytes", body.len()), "1 End { whole: true }".to_owned()]);
        assert_eq!(seen[4..], [format!("{} bytes", body.len() + 4), "2 End { whole: true }".to_owned()]);
    }
}

#[test]
fn what_is_no_frame_is_a_violation() {
    let long_head = (HEAD_BYTES_MAX as u32 + 1).to_le_bytes();
    for (what, bytes) in [
        ("type 0", frame(0, 0, 0, 1, b"")),
        ("type 10", frame(10, 0, 0, 1, b"")),
        ("no status", frame(RESPONSE, 0, 0, 1, &with_head(b"OK\r\n", b""))),
        ("status 1000", frame(RESPONSE, 0, 1000, 1, &with_head(b"OK\r\n", b""))),
        ("flags", frame(RESPONSE, 1, 200, 1, &with_head(b"OK\r\n", b""))),
        ("other flags", frame(END, 2, 0, 1, b"")),
        ("an end with bytes", frame(END, 0, 0, 1, b"x")),
        ("no head", frame(RESPONSE, 0, 200, 1, b"abc")),
        ("a head beyond its frame", frame(RESPONSE, 0, 200, 1, &[5, 0, 0, 0, b'x'])),
        ("a head beyond all", frame(RESPONSE, 0, 200, 1, &[&long_head[..], &vec![b'x'; HEAD_BYTES_MAX + 1]].concat())),
        ("bytes behind a head", frame(BEGIN, 0, 200, 1, &with_head(b"OK\r\n", b"x"))),
        ("half a place", frame(FILE, 0, 200, 1, &with_head(b"OK\r\n12345678", &[0; 8]))),
        ("a place beyond all", frame(FILE, 0, 200, 1, &with_head(b"OK\r\n", &[0xff; 16]))),
        ("a short deadline", frame(EXTEND, 0, 0, 1, b"abc")),
        ("a long text", frame(READY, 0, 0, 1, &vec![b' '; TEXT_BYTES_MAX + 1])),
    ] {
        for step in [1, 7, usize::MAX] {
            assert!(events(&bytes, step).is_err(), "{what} in steps of {step}");
        }
    }
    // Larger than the buffer, so that it is looked at before it is complete.
    let mut huge = frame(RESPONSE, 0, 200, 1, &long_head);
    huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(events(&huge, 1).is_err());
}

#[test]
fn no_bytes_of_a_worker_make_the_reader_panic() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize % below
    };
    for round in 0..4_000 {
        let mut bytes = Vec::new();
        for _ in 0..random(6) {
            let payload: Vec<u8> = (0..random(40)).map(|_| random(256) as u8).collect();
            let payload = if random(2) == 0 { with_head(&payload, b"rest") } else { payload };
            bytes.extend(frame(random(11) as u8, random(3) as u8 / 2, 100 + random(600) as u16, random(4) as u32, &payload));
        }
        for _ in 0..random(4) {
            if !bytes.is_empty() {
                let at = random(bytes.len());
                bytes[at] = random(256) as u8;
            }
        }
        bytes.truncate(random(bytes.len() + 1));
        let whole = events(&bytes, usize::MAX);
        assert_eq!(events(&bytes, 1 + random(20)), whole, "round {round}: {bytes:?}");
    }
}

#[test]
fn a_head_becomes_the_response_that_it_tells() {
    let head = b"Fine\r\nContent-Type: text/html\r\nSet-Cookie: a=1\r\nset-cookie: b\r\nX-Latin:  \xe9 \r\nContent-Length: 12\r\n";
    let (made, told) = response(200, head, true).expect("a head");
    assert_eq!((made.status, made.reason.as_deref(), made.content_type.as_deref(), told), (200, Some("Fine"), Some("text/html"), Some(12)));
    let fields: Vec<(&str, &[u8])> = made.headers.iter().map(|field| (&*field.0, &*field.1)).collect();
    assert_eq!(fields, [("Set-Cookie", &b"a=1"[..]), ("set-cookie", b"b"), ("X-Latin", b"\xe9"), ("Content-Length", b"12")]);
    let (plain, _) = response(200, b"OK\r\n", true).expect("a head");
    assert!(plain.reason.is_none() && plain.headers.is_empty());
    // With a body, its own length is the only one there is.
    let (counted, told) = response(200, b"OK\r\nContent-Length: 5\r\n", false).expect("a head");
    assert_eq!((counted.headers.len(), told), (0, Some(5)));
}

#[test]
fn a_head_of_another_form_is_a_violation() {
    for head in [&b""[..], b"OK", b"OK\r\nno colon\r\n", b"OK\r\nX: y", b"OK\r\n\r\n"] {
        assert!(response(200, head, true).is_err(), "{head:?}");
    }
}

#[test]
fn a_field_that_http_does_not_have_is_found_when_the_answer_is_written() {
    use crate::http1::response::{Context, Preamble, write_head};
    let context = Context { version: crate::http1::Version::Http11, is_head: false, keep_alive: true };
    for head in [
        &b"OK\r\nX: a\nb\r\n"[..],
        b"OK\r\nX: a\rb\r\n",
        b"OK\r\nX\n: a\r\n",
        b"O\nK\r\n",
        b"OK\r\nX: a\0\r\n",
        b"OK\r\nContent-Type: a\nb\r\n",
        b"OK\r\n: a\r\n",
        b"OK\r\n\xff: a\r\n",
        b"OK\r\nContent-Type:X: a\r\n",
    ] {
        let (made, _) = response(200, head, true).expect("of a head's form");
        assert!(write_head(&mut Vec::new(), made.made(), context, &Preamble::default()).is_err(), "{head:?}");
    }
}
