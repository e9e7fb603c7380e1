//! Writes response heads: exactly one framing, whatever the handler says (RFC 9112 section 6).
//!
//! A handler's own `Content-Length`, `Transfer-Encoding`, `Connection`, `Keep-Alive`, `Upgrade`,
//! `Trailer` and `Proxy-*` hop-by-hop fields never reach the wire: the bytes that follow decide the length, the
//! server decides about the connection. A field that could end its line early is an error of the
//! handler's and becomes a 500.

use std::{borrow::Cow, fmt::Write, time::SystemTime};

use super::Version;

/// What the head depends on besides the response.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    pub version: Version,
    /// The request's method was HEAD: no body follows, whatever its length (RFC 9110 section 9.3.2).
    pub is_head: bool,
    pub keep_alive: bool,
}

/// A response's head as its handler made it, and the length of its body; `None`: only its end will tell.
#[derive(Clone, Copy, Debug)]
pub struct Made<'a> {
    pub status: u16,
    pub reason: Option<&'a str>,
    pub content_type: Option<&'a str>,
    pub headers: &'a [Field],
    pub length: Option<u64>,
}

/// A header field: name and value.
pub type Field = (Cow<'static, str>, Cow<'static, [u8]>);

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
        // Into the text that is there: this is done every second for as long as the server runs.
        self.date.clear();
        let _ = write!(self.date, "{}", httpdate::HttpDate::from(now));
        self.both.clear();
        if let Some(server) = &self.server {
            field(&mut self.both, "Server", server.as_bytes());
        }
        field(&mut self.both, "Date", self.date.as_bytes());
    }

    /// Leaves out what the handler has set itself.
    fn write_except(&self, out: &mut Vec<u8>, response: Made<'_>) {
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
pub fn write_head(out: &mut Vec<u8>, response: Made<'_>, context: Context, preamble: &Preamble) -> Result<Framing, Fault> {
    check(response)?;
    status_line(out, response);
    if response.headers.is_empty() {
        out.extend_from_slice(&preamble.both);
    } else {
        preamble.write_except(out, response);
    }
    if let Some(content_type) = response.content_type {
        field(out, "Content-Type", content_type.as_bytes());
    }
    for (name, value) in response.headers.iter().filter(|field| !is_ours(&field.0)) {
        field(out, name, value);
    }
    let framing = framing(response, context);
    // RFC 9110 section 8.6: no Content-Length with 204; 304 has no body but may tell what its length would be.
    if !matches!(response.status, 204 | 304) {
        match (framing, response.length) {
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

fn framing(response: Made<'_>, context: Context) -> Framing {
    match response.length {
        _ if context.is_head || matches!(response.status, 204 | 304) => Framing::None,
        Some(0) => Framing::None,
        Some(length) => Framing::Length(length),
        None if context.version == Version::Http10 => Framing::Close,
        None => Framing::Chunked,
    }
}

/// Appends a 103 answer, which goes before the answer itself (RFC 8297). Never for HTTP/1.0 (RFC 9110 section 15.2).
///
/// # Errors
/// [`Fault`]; then nothing was appended.
pub fn write_hints(out: &mut Vec<u8>, fields: &[Field]) -> Result<(), Fault> {
    check_fields(fields)?;
    out.extend_from_slice(b"HTTP/1.1 103 Early Hints\r\n");
    for (name, value) in fields.iter().filter(|field| !is_ours(&field.0)) {
        field(out, name, value);
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
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
pub fn wants_close(response: Made<'_>) -> bool {
    let is_close = |token: &[u8]| token.trim_ascii().eq_ignore_ascii_case(b"close");
    let mut connection = response.headers.iter().filter(|field| field.0.eq_ignore_ascii_case("Connection"));
    connection.any(|field| field.1.split(|&byte| byte == b',').any(is_close))
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

fn check(response: Made<'_>) -> Result<(), Fault> {
    if !(200..600).contains(&response.status) {
        return Err(Fault::Status);
    }
    let texts = response.reason.iter().chain(&response.content_type);
    if !texts.map(|text| text.as_bytes()).all(is_field_value) {
        return Err(Fault::FieldValue);
    }
    check_fields(response.headers)
}

fn check_fields(fields: &[Field]) -> Result<(), Fault> {
    for (name, value) in fields {
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
pub fn is_ours(name: &str) -> bool {
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

fn status_line(out: &mut Vec<u8>, response: Made<'_>) {
    match (response.status, response.reason) {
        (200, None) => out.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
        (status, reason) => {
            out.extend_from_slice(b"HTTP/1.1 ");
            out.extend_from_slice(itoa::Buffer::new().format(status).as_bytes());
            out.push(b' ');
            out.extend_from_slice(reason.unwrap_or(reason_phrase(status)).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

fn content_length(out: &mut Vec<u8>, response: Made<'_>, length: u64, is_head: bool) {
    // A handler may answer HEAD without making the body, and say how long it would have been.
    let told = response.headers.iter().find(|field| field.0.eq_ignore_ascii_case("Content-Length"));
    match (told, length) {
        (Some((_, value)), 0) if is_head && !value.is_empty() && value.iter().all(u8::is_ascii_digit) => {
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
