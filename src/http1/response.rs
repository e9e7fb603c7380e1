//! Writes response heads: exactly one framing, whatever the handler says (RFC 9112 section 6).
//!
//! A handler's own `Content-Length`, `Transfer-Encoding`, `Connection`, `Keep-Alive`, `Upgrade`,
//! `Trailer` and `Proxy-*` hop-by-hop fields never reach the wire: the bytes that follow decide the length, the
//! server decides about the connection. A field that could end its line early is an error of the
//! handler's and becomes a 500.

use std::time::SystemTime;

use super::{Refusal, Version};
use crate::handler::{Body, Response};

/// What the head depends on besides the response.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    pub version: Version,
    /// The request's method was HEAD: no body follows, whatever its length (RFC 9110 section 9.3.2).
    pub is_head: bool,
    pub keep_alive: bool,
}

/// The handler's fault: its answer cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A field name that is not a token.
    FieldName,
    /// A value, reason or content type with a control character in it.
    FieldValue,
    /// A status outside 200 to 599.
    Status,
}

impl Fault {
    pub fn explain(self) -> &'static str {
        match self {
            Fault::FieldName => "the handler set a header field whose name is not a token",
            Fault::FieldValue => "the handler set a header field with a control character in it",
            Fault::Status => "the handler set a status outside 200 to 599",
        }
    }
}

/// The fields that every answer of the same second shares, written once: `Server` and `Date`.
#[derive(Debug, Default)]
pub struct Preamble {
    server: Option<String>,
    both: Vec<u8>,
    date: String,
}

impl Preamble {
    pub fn new(server: Option<&str>) -> Preamble {
        Preamble { server: server.map(str::to_owned), ..Preamble::default() }
    }

    /// Call it once a second (RFC 9110 section 6.6.1; the form is IMF-fixdate).
    pub fn set_date(&mut self, now: SystemTime) {
        self.date = httpdate::fmt_http_date(now);
        self.both.clear();
        if let Some(server) = &self.server {
            field(&mut self.both, "Server", server.as_bytes());
        }
        field(&mut self.both, "Date", self.date.as_bytes());
    }

    /// Leaves out what the handler has set itself.
    fn write_except(&self, out: &mut Vec<u8>, response: &Response) {
        let set = |name: &str| response.headers.iter().any(|field| field.0.eq_ignore_ascii_case(name));
        if let Some(server) = self.server.as_ref().filter(|_| !set("Server")) {
            field(out, "Server", server.as_bytes());
        }
        if !set("Date") {
            field(out, "Date", self.date.as_bytes());
        }
    }
}

/// How the end of a response's body is told (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body follows.
    None,
    Length(u64),
    Chunked,
    /// By the end of the connection: an HTTP/1.0 client knows no chunks.
    Close,
}

/// Appends the head; says how what follows is framed.
///
/// # Errors
/// [`Fault`]; then nothing was appended.
pub fn write_head(out: &mut Vec<u8>, response: &Response, context: Context, preamble: &Preamble) -> Result<Framing, Fault> {
    check(response)?;
    status_line(out, response);
    if response.headers.is_empty() {
        out.extend_from_slice(&preamble.both);
    } else {
        preamble.write_except(out, response);
    }
    if let Some(content_type) = &response.content_type {
        field(out, "Content-Type", content_type.as_bytes());
    }
    for (name, value) in response.headers.iter().filter(|field| !is_ours(&field.0)) {
        field(out, name, value);
    }
    let framing = framing(response, context);
    // RFC 9110 section 8.6: no Content-Length with 204; 304 has no body but may tell what its length would be.
    if !matches!(response.status, 204 | 304) {
        match (framing, response.body.len()) {
            (Framing::Chunked, _) => field(out, "Transfer-Encoding", b"chunked"),
            (_, Some(length)) => content_length(out, response, length, context.is_head),
            (_, None) => {}
        }
    }
    match (context.keep_alive && framing != Framing::Close, context.version) {
        (true, Version::Http11) => {}
        // RFC 9112 section 9.3: an HTTP/1.0 client must be told that its wish is granted.
        (true, Version::Http10) => out.extend_from_slice(b"Connection: keep-alive\r\n"),
        (false, _) => out.extend_from_slice(b"Connection: close\r\n"),
    }
    out.extend_from_slice(b"\r\n");
    Ok(framing)
}

fn framing(response: &Response, context: Context) -> Framing {
    match response.body.len() {
        _ if context.is_head || matches!(response.status, 204 | 304) => Framing::None,
        Some(0) => Framing::None,
        Some(length) => Framing::Length(length),
        None if context.version == Version::Http10 => Framing::Close,
        None => Framing::Chunked,
    }
}

/// Appends a piece of a body in chunks (RFC 9112 section 7.1). An empty one would be the end, so it is left out.
pub fn write_chunk(out: &mut Vec<u8>, piece: &[u8]) {
    if !piece.is_empty() {
        out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        out.extend_from_slice(piece);
        out.extend_from_slice(b"\r\n");
    }
}

/// The end of a body in chunks, without trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// True when the handler asked for the end of the connection.
pub fn wants_close(response: &Response) -> bool {
    let is_close = |token: &[u8]| token.trim_ascii().eq_ignore_ascii_case(b"close");
    let mut connection = response.headers.iter().filter(|field| field.0.eq_ignore_ascii_case("Connection"));
    connection.any(|field| field.1.split(|&byte| byte == b',').any(is_close))
}

/// The answer to a refused request: what was wrong, in a sentence.
pub fn refusal(refusal: Refusal) -> Response {
    let response = Response::text(format!("{}\n", refusal.explain())).status(refusal.status());
    // RFC 9110 section 15.5.6: a 405 lists what is allowed.
    if refusal.status() == 405 { response.header("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS") } else { response }
}

/// The answer to a request that could not be served just now; asks to come back (RFC 9110 section 10.2.3).
pub fn unavailable(why: &'static str) -> Response {
    Response::text(why).status(503).header("Retry-After", "1")
}

/// The registered words for a status (RFC 9110 section 15 and the IANA registry).
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        511 => "Network Authentication Required",
        _ => "",
    }
}

fn check(response: &Response) -> Result<(), Fault> {
    if !(200..600).contains(&response.status) {
        return Err(Fault::Status);
    }
    let texts = response.reason.iter().chain(&response.content_type);
    if !texts.map(|text| text.as_bytes()).all(is_field_value) {
        return Err(Fault::FieldValue);
    }
    for (name, value) in &response.headers {
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(Fault::FieldName);
        }
        if !is_field_value(value) {
            return Err(Fault::FieldValue);
        }
    }
    Ok(())
}

/// RFC 9110 section 5.5: visible characters, space, tab, and bytes above 0x7f.
fn is_field_value(value: &[u8]) -> bool {
    value.iter().all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

/// RFC 9110 section 5.6.2: tchar.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Fields about this connection and this message's framing, which only the server may set
/// (RFC 9110 section 7.6.1, RFC 9112 section 6).
fn is_ours(name: &str) -> bool {
    const OURS: [&str; 9] = [
        "Connection",
        "Content-Length",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    ];
    OURS.iter().any(|ours| ours.eq_ignore_ascii_case(name))
}

fn status_line(out: &mut Vec<u8>, response: &Response) {
    match (response.status, &response.reason) {
        (200, None) => out.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
        (status, reason) => {
            out.extend_from_slice(b"HTTP/1.1 ");
            out.extend_from_slice(itoa::Buffer::new().format(status).as_bytes());
            out.push(b' ');
            out.extend_from_slice(reason.as_deref().unwrap_or(reason_phrase(status)).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

fn content_length(out: &mut Vec<u8>, response: &Response, length: u64, is_head: bool) {
    // A handler may answer HEAD without making the body, and say how long it would have been.
    let told = response.headers.iter().find(|field| field.0.eq_ignore_ascii_case("Content-Length"));
    match (told, &response.body) {
        (Some((_, value)), Body::Empty) if is_head && !value.is_empty() && value.iter().all(u8::is_ascii_digit) => {
            field(out, "Content-Length", value);
        }
        _ => field(out, "Content-Length", itoa::Buffer::new().format(length).as_bytes()),
    }
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Context = Context { version: Version::Http11, is_head: false, keep_alive: true };

    /// The head without status line, Server and Date; and whether a body follows.
    fn written(response: &Response, context: Context) -> Result<(String, Framing), Fault> {
        let mut preamble = Preamble::new(Some("uringd"));
        preamble.set_date(SystemTime::UNIX_EPOCH);
        let mut out = Vec::new();
        let body = write_head(&mut out, response, context, &preamble)?;
        let text = String::from_utf8(out).expect("ASCII");
        Ok((text.replace("Server: uringd\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n", ""), body))
    }

    #[test]
    fn a_plain_answer_has_its_length_and_nothing_about_the_connection() {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 2\r\n\r\n".to_owned();
        assert_eq!(written(&Response::text("hi"), PLAIN), Ok((head, Framing::Length(2))));
    }

    #[test]
    fn framing_and_hop_by_hop_fields_of_a_handler_do_not_reach_the_wire() {
        let lying = Response::new(200).header("content-length", "99").header("Transfer-Encoding", "chunked");
        let lying = lying.header("Connection", "upgrade").header("Keep-Alive", "1").header("X", "y").body("abc");
        assert_eq!(written(&lying, PLAIN), Ok(("HTTP/1.1 200 OK\r\nX: y\r\nContent-Length: 3\r\n\r\n".into(), Framing::Length(3))));
    }

    #[test]
    fn no_body_follows_head_204_and_304() {
        let head = Context { is_head: true, ..PLAIN };
        assert_eq!(written(&Response::new(200).body("abc"), head), Ok(("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n".into(), Framing::None)));
        for (status, line) in [(204, "204 No Content"), (304, "304 Not Modified")] {
            let response = Response::new(status).body("abc");
            assert_eq!(written(&response, PLAIN), Ok((format!("HTTP/1.1 {line}\r\n\r\n"), Framing::None)));
        }
    }

    #[test]
    fn a_head_answer_may_tell_a_length_without_making_the_body() {
        let response = Response::new(200).header("Content-Length", "1234");
        let head = Context { is_head: true, ..PLAIN };
        assert_eq!(written(&response, head), Ok(("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n".into(), Framing::None)));
    }

    #[test]
    fn a_field_that_would_split_the_response_is_a_fault() {
        for value in ["a\r\nSet-Cookie: x", "a\nb", "a\0", "\u{7f}"] {
            assert_eq!(written(&Response::new(200).header("X", value), PLAIN), Err(Fault::FieldValue));
            assert_eq!(written(&Response::new(200).content_type(value), PLAIN), Err(Fault::FieldValue));
            assert_eq!(written(&Response::new(200).reason(value), PLAIN), Err(Fault::FieldValue));
        }
        for name in ["", "a b", "a:", "a\r\n"] {
            assert_eq!(written(&Response::new(200).header(name, "v"), PLAIN), Err(Fault::FieldName));
        }
        for status in [0, 100, 199, 600, 65_535] {
            assert_eq!(written(&Response::new(status), PLAIN), Err(Fault::Status));
        }
    }

    #[test]
    fn the_end_of_the_connection_is_told_and_so_is_keeping_it_in_http_1_0() {
        let close = Context { keep_alive: false, ..PLAIN };
        assert!(written(&Response::new(200), close).is_ok_and(|w| w.0.contains("\r\nConnection: close\r\n")));
        let old = Context { version: Version::Http10, ..PLAIN };
        assert!(written(&Response::new(200), old).is_ok_and(|w| w.0.contains("\r\nConnection: keep-alive\r\n")));
    }

    #[test]
    fn a_body_of_unknown_length_is_chunked_or_ends_with_the_connection() {
        let response = || Response::new(200).body(Body::stream(|_| Ok(())));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
        assert_eq!(written(&response(), PLAIN), Ok((chunked, Framing::Chunked)));
        let close = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_owned();
        assert_eq!(written(&response(), Context { version: Version::Http10, ..PLAIN }), Ok((close, Framing::Close)));
    }

    #[test]
    fn an_empty_piece_is_not_the_end() {
        let mut out = Vec::new();
        ["", "a", "", "bcdefghijklmnopq"].iter().for_each(|piece| write_chunk(&mut out, piece.as_bytes()));
        out.extend_from_slice(LAST_CHUNK);
        assert_eq!(out, b"1\r\na\r\n10\r\nbcdefghijklmnopq\r\n0\r\n\r\n");
    }

    #[test]
    fn a_handler_that_sets_server_or_date_is_heard_once() {
        let (head, _) = written(&Response::new(200).header("server", "mine").header("DATE", "now"), PLAIN).expect("valid");
        assert_eq!(head, "HTTP/1.1 200 OK\r\nserver: mine\r\nDATE: now\r\nContent-Length: 0\r\n\r\n");
    }
}
