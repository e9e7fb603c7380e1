//! What crosses between uringd and its Python workers, as bytes (docs/worker-protocol.md). No input or output here.
//!
//! ```text
//!   Request --request()--> [header | length | environ, one marshal tuple | body ]    to a worker
//!   Reader  <--bytes------ [header | length | head | body ] [header | ...] ...      from it
//!      +--next_event()--> Event, Event, ...
//! ```
//!
//! The environ is marshal because a worker decodes that with one call in C. The other direction is never unmarshalled:
//! a worker runs somebody's application and may send anything, so each length and byte of its frames is checked,
//! and what breaks a rule is a [`Violation`], after which the channel is closed.
//!
//! A frame that does not fit into the [`Reader`]'s buffer is not refused. Its body is handed on in pieces while it comes, as
//! if the worker had streamed it, so how much memory an answer takes is never the worker's choice.

use std::{borrow::Cow, fmt, net::IpAddr, ops::Range, str, sync::Mutex};

use crate::{
    config::Permit,
    driver::Peer,
    handler::{BodySource, Request, Response},
    http1::{
        Framing, Span, is_forwarding,
        response::{is_ours, reason_phrase},
    },
};

/// Length, id, type, flags, status.
pub const HEADER_BYTES: usize = 12;
/// A reader's buffer. A frame that fits is taken whole, one that does not is passed on in pieces.
const BUFFER_BYTES: usize = 256 << 10;
/// Longest head of an answer, in bytes. Browsers and proxies stop between 8 and 256 KiB.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Longest text of READY and FAILED, in bytes.
const TEXT_BYTES_MAX: usize = 128 << 10;

/// Method, path, query, protocol, target, address, port, request id, seconds in the queue, deadline, dict of the rest.
const ENVIRON_PLACES: u8 = 11;

/// The request's body is a file, and its descriptor comes over the other socket.
const FLAG_FILE: u8 = 1;
/// The worker writes the id into the page when it begins.
const FLAG_MARKED: u8 = 2;
/// The application failed in the middle of its answer.
const FLAG_FAILED: u8 = 1;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 1;
const BEGIN: u8 = 2;
const PIECE: u8 = 3;
const END: u8 = 4;
const FILE: u8 = 5;
const READY: u8 = 6;
const FAILED: u8 = 7;
const HINTS: u8 = 8;
const EXTEND: u8 = 9;
const PONG: u8 = 10;
const RETURN: u8 = 11;

/// What uringd tells an application about a request beside the request itself.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub request_id: &'a str,
    /// How long it waited for a worker.
    pub queue_seconds: f64,
    /// When its time is over, on CLOCK_MONOTONIC.
    pub deadline: f64,
    pub permit: Permit,
    /// The worker is to write down that it begins.
    pub marked: bool,
}

/// Appends the frame of a request. A body in a file is not in it: its descriptor has to be sent apart.
///
/// Returns how many header fields were left out because they could pass for others.
pub fn request(out: &mut Vec<u8>, id: u32, request: &Request<'_>, facts: Facts<'_>) -> u64 {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES + 4]);
    let left_out = environ(out, request, facts);
    let environ_bytes = out.len() - start - HEADER_BYTES - 4;
    let flags = match request.body {
        BodySource::Memory(bytes) => {
            out.extend_from_slice(bytes);
            0
        }
        BodySource::File { length, .. } => {
            out.extend_from_slice(&length.to_le_bytes());
            FLAG_FILE
        }
    };
    let payload = out.len() - start - HEADER_BYTES;
    let header = &mut out[start..start + HEADER_BYTES + 4];
    header[..4].copy_from_slice(&(payload as u32).to_le_bytes());
    header[4..8].copy_from_slice(&id.to_le_bytes());
    header[8] = REQUEST;
    header[9] = flags | if facts.marked { FLAG_MARKED } else { 0 };
    header[12..].copy_from_slice(&(environ_bytes as u32).to_le_bytes());
    left_out
}

/// What is said to a worker that has many requests at a time, about one of them or all. Each is a frame of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Word {
    /// So many more bytes of its body will be taken in.
    Credit = 2,
    /// Its client is gone.
    Gone = 3,
    /// Its time is over: it is to be ended.
    Cancel = 4,
    /// To be answered with the same number.
    Ping = 5,
}

/// Appends the frame of a word.
pub fn word(out: &mut Vec<u8>, id: u32, word: Word, number: u32) {
    out.extend_from_slice(&4_u32.to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&[word as u8, 0, 0, 0]);
    out.extend_from_slice(&number.to_le_bytes());
}

/// A key of the dict, interned, as a constant: marshal's `Z`, one byte of length, ASCII.
macro_rules! key {
    ($name:literal) => {{
        const NAME: &[u8] = $name.as_bytes();
        const KEY: [u8; NAME.len() + 2] = {
            let mut key = [0; NAME.len() + 2];
            key[0] = b'Z';
            key[1] = NAME.len() as u8;
            let mut at = 0;
            while at < NAME.len() {
                key[at + 2] = NAME[at];
                at += 1;
            }
            key
        };
        &KEY
    }};
}

/// The environ of a request, without what is the same for all of them, which is in the zygote's `base`: one tuple whose
/// first places have a fixed meaning (docs/worker-protocol.md), and last a dict of what not every request has. A key that
/// crosses costs the worker three times its value: a string is made, hashed and looked up in the table of all names.
fn environ(out: &mut Vec<u8>, request: &Request<'_>, facts: Facts<'_>) -> u64 {
    out.extend_from_slice(&[b')', ENVIRON_PLACES]);
    text(out, request.method().as_bytes());
    // The target of `OPTIONS *` has no path (RFC 9110 section 7.1), and CGI's is empty or begins with a slash.
    percent_decoded(out, if request.path() == "*" { b"" } else { request.path().as_bytes() });
    text(out, request.query().as_bytes());
    text(out, request.version().as_bytes());
    text(out, request.target().as_bytes());
    peer(out, request.peer);
    text(out, facts.request_id.as_bytes());
    float(out, facts.queue_seconds);
    float(out, facts.deadline);
    out.push(b'{');
    if request.head.framing != Framing::None {
        // The body is complete and decoded, so its length is known however it came.
        out.extend_from_slice(key!("CONTENT_LENGTH"));
        text(out, itoa::Buffer::new().format(request.body().len()).as_bytes());
    }
    if request.scheme() != "http" {
        // Else it is in the base.
        out.extend_from_slice(key!("wsgi.url_scheme"));
        text(out, request.scheme().as_bytes());
    }
    let left_out = fields(out, request, facts.permit);
    out.push(b'0');
    left_out
}

/// Address and port of the client. PEP 3333 lets the address be empty, and gunicorn's is behind a unix socket: whoever may
/// open its path.
fn peer(out: &mut Vec<u8>, peer: Peer) {
    let Peer::Inet(address) = peer else {
        text(out, b"");
        return text(out, b"");
    };
    // An IPv4 client of an IPv6 listener is shown as what it is.
    match address.ip().to_canonical() {
        // By hand, since `Display` takes longer than the rest of the environ.
        IpAddr::V4(ip) => {
            let start = out.len();
            string_header(out, 0);
            for (index, octet) in ip.octets().iter().enumerate() {
                if index > 0 {
                    out.push(b'.');
                }
                out.extend_from_slice(itoa::Buffer::new().format(*octet).as_bytes());
            }
            out[start + 1] = (out.len() - start - 2) as u8;
        }
        IpAddr::V6(ip) => text(out, ip.to_string().as_bytes()),
    }
    text(out, itoa::Buffer::new().format(address.port()).as_bytes());
}

/// The header fields as CGI names them (RFC 3875 section 4.1.18). Several of one name are joined as RFC 9110 section 5.3
/// says, Cookie as RFC 9113 section 8.2.3.
fn fields(out: &mut Vec<u8>, request: &Request<'_>, permit: Permit) -> u64 {
    let mut left_out = 0;
    let bytes = request.bytes;
    let fields = &request.head.fields;
    for (index, field) in fields.iter().enumerate() {
        let name = field.name.of(bytes);
        if could_pass_for_another(name, permit) {
            left_out += 1;
            continue;
        }
        let is_same = |other: Span| {
            let other = other.of(bytes);
            other.len() == name.len() && other.iter().zip(name).all(|(a, b)| cgi(*a) == cgi(*b)) && !could_pass_for_another(other, permit)
        };
        if fields[..index].iter().any(|earlier| is_same(earlier.name)) {
            continue;
        }
        if !field_key(out, name) {
            continue;
        }
        let mut others = fields[index + 1..].iter().filter(|later| is_same(later.name)).peekable();
        if others.peek().is_none() {
            text(out, field.value.of(bytes));
            continue;
        }
        let separator: &[u8] = if name.eq_ignore_ascii_case(b"Cookie") { b"; " } else { b"," };
        let mut joined = field.value.of(bytes).to_vec();
        for other in others {
            joined.extend_from_slice(separator);
            joined.extend_from_slice(other.value.of(bytes));
        }
        text(out, &joined);
    }
    left_out
}

/// The rule of [`Request::cgi_headers`].
fn could_pass_for_another(name: &[u8], permit: Permit) -> bool {
    if memchr::memchr(b'_', name).is_none() {
        return name.len() == 5 && name.eq_ignore_ascii_case(b"proxy");
    }
    let with_hyphens: Vec<u8> = name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect();
    !permit.underscore_headers || is_forwarding(&with_hyphens)
}

/// Field names that most requests have, so that the worker's dict gets a string that it knows already.
const KNOWN: [(&[u8], &[u8]); 24] = [
    (b"accept", key!("HTTP_ACCEPT")),
    (b"accept-encoding", key!("HTTP_ACCEPT_ENCODING")),
    (b"accept-language", key!("HTTP_ACCEPT_LANGUAGE")),
    (b"authorization", key!("HTTP_AUTHORIZATION")),
    (b"cache-control", key!("HTTP_CACHE_CONTROL")),
    (b"connection", key!("HTTP_CONNECTION")),
    (b"content-type", key!("CONTENT_TYPE")),
    (b"cookie", key!("HTTP_COOKIE")),
    (b"host", key!("HTTP_HOST")),
    (b"if-modified-since", key!("HTTP_IF_MODIFIED_SINCE")),
    (b"if-none-match", key!("HTTP_IF_NONE_MATCH")),
    (b"origin", key!("HTTP_ORIGIN")),
    (b"pragma", key!("HTTP_PRAGMA")),
    (b"range", key!("HTTP_RANGE")),
    (b"referer", key!("HTTP_REFERER")),
    (b"sec-fetch-dest", key!("HTTP_SEC_FETCH_DEST")),
    (b"sec-fetch-mode", key!("HTTP_SEC_FETCH_MODE")),
    (b"sec-fetch-site", key!("HTTP_SEC_FETCH_SITE")),
    (b"upgrade-insecure-requests", key!("HTTP_UPGRADE_INSECURE_REQUESTS")),
    (b"user-agent", key!("HTTP_USER_AGENT")),
    (b"x-forwarded-for", key!("HTTP_X_FORWARDED_FOR")),
    (b"x-forwarded-proto", key!("HTTP_X_FORWARDED_PROTO")),
    (b"x-real-ip", key!("HTTP_X_REAL_IP")),
    (b"x-request-id", key!("HTTP_X_REQUEST_ID")),
];

/// Appends the key of a field. False: it has none, because the environ says it otherwise.
fn field_key(out: &mut Vec<u8>, name: &[u8]) -> bool {
    let first = name.first().map_or(0, u8::to_ascii_lowercase);
    let known = KNOWN.iter().find(|known| known.0.len() == name.len() && known.0[0] == first && known.0.eq_ignore_ascii_case(name));
    if let Some((_, key)) = known {
        out.extend_from_slice(key);
        return true;
    }
    // Told above; and the body that is passed on has no coding any more.
    if name.eq_ignore_ascii_case(b"Content-Length") || name.eq_ignore_ascii_case(b"Transfer-Encoding") {
        return false;
    }
    string_header(out, name.len() + 5);
    out.extend_from_slice(b"HTTP_");
    out.extend(name.iter().map(|byte| cgi(*byte)));
    true
}

fn cgi(byte: u8) -> u8 {
    if byte == b'-' { b'_' } else { byte.to_ascii_uppercase() }
}

/// A string of which each byte is one code point (latin-1), as PEP 3333 wants native strings.
fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    if bytes.is_ascii() {
        string_header(out, bytes.len());
        out.extend_from_slice(bytes);
        return;
    }
    let above = bytes.iter().filter(|byte| !byte.is_ascii()).count();
    out.push(b'u');
    out.extend_from_slice(&((bytes.len() + above) as u32).to_le_bytes());
    for &byte in bytes {
        // U+0080 to U+00FF take two bytes of UTF-8.
        match byte {
            0..0x80 => out.push(byte),
            _ => out.extend_from_slice(&[0xc0 | byte >> 6, 0x80 | byte & 0x3f]),
        }
    }
}

/// What stands before the bytes of an ASCII string.
fn string_header(out: &mut Vec<u8>, length: usize) {
    match u8::try_from(length) {
        Ok(short) => out.extend_from_slice(&[b'z', short]),
        Err(_) => {
            out.push(b'a');
            out.extend_from_slice(&(length as u32).to_le_bytes());
        }
    }
}

fn float(out: &mut Vec<u8>, number: f64) {
    out.push(b'g');
    out.extend_from_slice(&number.to_le_bytes());
}

/// A path without its percent-encoding. A `%` without two hexadecimal digits stands for itself.
fn percent_decoded(out: &mut Vec<u8>, path: &[u8]) {
    if !path.contains(&b'%') {
        return text(out, path);
    }
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.first().zip(after.get(1)).and_then(|(high, low)| Some((digit(*high)?, digit(*low)?)));
        match digits {
            Some((high, low)) if byte == b'%' => {
                decoded.push(high << 4 | low);
                rest = &after[2..];
            }
            _ => {
                decoded.push(byte);
                rest = after;
            }
        }
    }
    text(out, &decoded);
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

/// What a worker did that no worker of ours does. Its text is for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What a worker says. The id of the request that it is about comes with it.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole answer.
    Response {
        status: u16,
        head: &'a [u8],
        body: &'a [u8],
    },
    /// An answer whose body follows in pieces; its length, when it is known.
    Begin {
        status: u16,
        head: &'a [u8],
        length: Option<u64>,
    },
    Piece(&'a [u8]),
    /// The last piece was the last; or, not `whole`, the application failed.
    End {
        whole: bool,
    },
    /// An answer whose body is a part of the file that comes over the other socket.
    File {
        status: u16,
        head: &'a [u8],
        offset: u64,
        length: u64,
    },
    /// The application is loaded.
    Ready(&'a [u8]),
    /// The application could not be loaded.
    Failed(&'a [u8]),
    /// Fields of a 103 answer.
    Hints(&'a [u8]),
    /// So many milliseconds more, from now on.
    Extend(u32),
    /// The answer to a ping of this number.
    Pong(u32),
    /// The application has not seen this request, and will not; of id 0, it will see no more of them.
    Return,
}

/// Takes a worker's bytes and finds the frames in them.
#[derive(Default)]
pub struct Reader {
    /// As long as it had to be so far.
    buffer: Vec<u8>,
    /// What of the buffer is filled and not yet looked at.
    filled: Range<usize>,
    /// A frame that is passed on in pieces.
    large: Option<Large>,
}

struct Large {
    id: u32,
    left: usize,
    /// It is an answer of its own, so its last byte is its end.
    is_response: bool,
}

#[derive(Clone, Copy)]
struct Header {
    length: usize,
    id: u32,
    kind: u8,
    flags: u8,
    status: u16,
}

impl Reader {
    pub fn new() -> Reader {
        Reader::default()
    }

    /// Takes bytes that were read. However many: somebody who wants no more than fit stops reading.
    pub fn push(&mut self, bytes: &[u8]) {
        self.move_to_front();
        let end = self.filled.end + bytes.len();
        if end > self.buffer.len() {
            self.buffer.resize(end, 0);
        } else if end <= BUFFER_BYTES && self.buffer.len() > BUFFER_BYTES {
            self.buffer.truncate(BUFFER_BYTES);
            self.buffer.shrink_to_fit();
        }
        self.buffer[self.filled.end..end].copy_from_slice(bytes);
        self.filled.end = end;
    }

    /// Where the next bytes are read to. Never empty once [`Reader::next_event`] has returned `None`.
    pub fn room(&mut self) -> &mut [u8] {
        self.move_to_front();
        if self.buffer.len() < BUFFER_BYTES {
            self.buffer.resize(BUFFER_BYTES, 0);
        }
        &mut self.buffer[self.filled.end..]
    }

    fn move_to_front(&mut self) {
        if self.filled.is_empty() {
            self.filled = 0..0;
        } else if self.filled.start > 0 {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
    }

    /// So many bytes were put there.
    pub fn add(&mut self, bytes: usize) {
        self.filled.end += bytes;
    }

    /// True in the middle of a frame.
    pub fn is_inside(&self) -> bool {
        !self.filled.is_empty() || self.large.is_some()
    }

    /// The next thing in the bytes, and which request it is about.
    ///
    /// # Errors
    /// [`Violation`]; nothing after it can be trusted.
    pub fn next_event(&mut self) -> Result<Option<(u32, Event<'_>)>, Violation> {
        if let Some(large) = &mut self.large {
            let id = large.id;
            if large.left == 0 {
                // The pieces of a PIECE frame have no end of their own.
                let is_response = large.is_response;
                self.large = None;
                if is_response {
                    return Ok(Some((id, Event::End { whole: true })));
                }
                return self.next_event();
            }
            let piece = large.left.min(self.filled.len());
            if piece == 0 {
                return Ok(None);
            }
            large.left -= piece;
            return Ok(Some((id, Event::Piece(self.take(piece)))));
        }
        let bytes = &self.buffer[self.filled.clone()];
        let Some(first) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::read(first)?;
        if bytes.len() - HEADER_BYTES < header.length {
            return self.begin_large(header);
        }
        let frame = self.take(HEADER_BYTES + header.length);
        event(header, &frame[HEADER_BYTES..]).map(|event| Some((header.id, event)))
    }

    /// A frame is not complete. When it never could be in this buffer, its beginning is taken now.
    fn begin_large(&mut self, header: Header) -> Result<Option<(u32, Event<'_>)>, Violation> {
        if HEADER_BYTES + header.length <= BUFFER_BYTES {
            return Ok(None);
        }
        let Header { id, status, .. } = header;
        if header.kind == PIECE {
            self.large = Some(Large { id, left: header.length, is_response: false });
            self.take(HEADER_BYTES);
            return self.next_event();
        }
        let bytes = &self.buffer[self.filled.clone()][HEADER_BYTES..];
        let Some(first) = bytes.first_chunk::<4>() else { return Ok(None) };
        let head_bytes = u32::from_le_bytes(*first) as usize;
        if head_bytes > HEAD_BYTES_MAX {
            return Err(Violation("a head that is too long"));
        }
        if bytes.len() < 4 + head_bytes {
            return Ok(None);
        }
        let left = header.length - 4 - head_bytes;
        self.large = Some(Large { id, left, is_response: true });
        let head = &self.take(HEADER_BYTES + 4 + head_bytes)[HEADER_BYTES + 4..];
        Ok(Some((id, Event::Begin { status, head, length: Some(left as u64) })))
    }

    fn take(&mut self, bytes: usize) -> &[u8] {
        let start = self.filled.start;
        self.filled.start += bytes;
        &self.buffer[start..start + bytes]
    }
}

impl Header {
    fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Violation> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let status = u16::from_le_bytes([bytes[10], bytes[11]]);
        let header = Header { length: word(0) as usize, id: word(4), kind: bytes[8], flags: bytes[9], status };
        let length_is_right = match header.kind {
            RESPONSE => header.length >= 4,
            PIECE => true,
            BEGIN | HINTS => (4..=4 + HEAD_BYTES_MAX).contains(&header.length),
            FILE => (20..=20 + HEAD_BYTES_MAX).contains(&header.length),
            END | RETURN => header.length == 0,
            EXTEND | PONG => header.length == 4,
            READY | FAILED => header.length <= TEXT_BYTES_MAX,
            _ => return Err(Violation("a frame of no known type")),
        };
        if !length_is_right {
            return Err(Violation("a frame of a length that its type cannot have"));
        }
        if header.flags & !FLAG_FAILED != 0 || header.flags != 0 && header.kind != END {
            return Err(Violation("a frame with flags that its type does not have"));
        }
        let has_status = matches!(header.kind, RESPONSE | BEGIN | FILE);
        // What is from 600 on is the application's mistake, not the worker's, and becomes a 500 when it is written.
        if has_status && !(200..=999).contains(&header.status) {
            return Err(Violation("a status that no answer has"));
        }
        Ok(header)
    }
}

/// What a complete frame means.
fn event(header: Header, payload: &[u8]) -> Result<Event<'_>, Violation> {
    let status = header.status;
    Ok(match header.kind {
        RESPONSE => {
            let (head, body) = split_head(payload)?;
            Event::Response { status, head, body }
        }
        BEGIN => match split_head(payload)? {
            (head, b"") => Event::Begin { status, head, length: None },
            _ => return Err(Violation("bytes behind a head")),
        },
        HINTS => match split_head(payload)? {
            (head, b"") => Event::Hints(head),
            _ => return Err(Violation("bytes behind a head")),
        },
        FILE => {
            let (head, rest) = split_head(payload)?;
            let (Some(offset), Some(length), 16) = (rest.first_chunk::<8>(), rest.last_chunk::<8>(), rest.len()) else {
                return Err(Violation("a file without its place"));
            };
            let (offset, length) = (u64::from_le_bytes(*offset), u64::from_le_bytes(*length));
            if offset.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
                return Err(Violation("a file that ends beyond the end of all files"));
            }
            Event::File { status, head, offset, length }
        }
        PIECE => Event::Piece(payload),
        END => Event::End { whole: header.flags & FLAG_FAILED == 0 },
        READY => Event::Ready(payload),
        FAILED => Event::Failed(payload),
        EXTEND => Event::Extend(number(payload)?),
        PONG => Event::Pong(number(payload)?),
        RETURN => Event::Return,
        _ => return Err(Violation("a frame of no known type")),
    })
}

fn number(payload: &[u8]) -> Result<u32, Violation> {
    payload.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes)).ok_or(Violation("a frame without its number"))
}

fn split_head(payload: &[u8]) -> Result<(&[u8], &[u8]), Violation> {
    let (length, rest) = payload.split_first_chunk::<4>().ok_or(Violation("an answer without a head"))?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > HEAD_BYTES_MAX {
        return Err(Violation("a head that is too long"));
    }
    rest.split_at_checked(length).ok_or(Violation("a head longer than its frame"))
}

/// The response that a head tells, without its body; and the length that the application told, which only stays among the
/// fields of an answer that is `bodiless`, as one to HEAD may be.
///
/// Names and values are looked at again when the answer is written; here only what would be misread.
///
/// # Errors
/// [`Violation`]: it is not of the form of a head.
pub fn response(status: u16, head: &[u8], bodiless: bool) -> Result<(Response, Option<u64>), Violation> {
    let mut response = Response::new(status);
    let mut told = None;
    let mut lines = Lines(head);
    let reason = lines.next().ok_or(Violation("a head without a reason"))??;
    if reason != reason_phrase(status).as_bytes() {
        // Not UTF-8, by RFC 9110 section 15 opaque: nobody misses it.
        response.reason = str::from_utf8(reason).ok().map(|reason| Cow::Owned(reason.to_owned()));
    }
    for line in lines {
        let line = line?;
        // Of a name with a colon in it, all of it is the name: it must not pass for another one.
        let mut colons = memchr::memchr_iter(b':', line).filter(|colon| line.get(colon + 1) == Some(&b' '));
        let colon = colons.next().ok_or(Violation("a field without a colon"))?;
        let (name, value) = (&line[..colon], line[colon + 2..].trim_ascii());
        match name.len() {
            12 if name.eq_ignore_ascii_case(b"Content-Type") && response.content_type.is_none() && value.is_ascii() => {
                response.content_type = Some(content_type(value));
                continue;
            }
            14 if name.eq_ignore_ascii_case(b"Content-Length") => {
                told = length(value);
                // Whoever writes the answer counts for itself, but nobody can count a body that is not there.
                if !bodiless {
                    continue;
                }
            }
            _ => {}
        }
        let known = RESPONSE_NAMES.iter().find(|known| known.as_bytes() == name);
        let name = known.map_or_else(|| other_name(name, value), |known| Cow::Borrowed(*known));
        response.headers.push((name, Cow::Owned(value.to_owned())));
    }
    Ok((response, told))
}

/// What is not UTF-8 is not a token either, and becomes a 500 when it is written.
fn other_name(name: &[u8], value: &[u8]) -> Cow<'static, str> {
    let name = String::from_utf8_lossy(name).into_owned();
    // Of those that never reach the client, the length and the wish to close are heard.
    let is_heard =
        name.eq_ignore_ascii_case("Content-Length") || name.eq_ignore_ascii_case("Connection") && value.eq_ignore_ascii_case(b"close");
    if is_ours(&name) && !is_heard {
        say_that_it_is_dropped(&name);
    }
    Cow::Owned(name)
}

/// Once for each name: an application that sets one sets it with every answer.
fn say_that_it_is_dropped(name: &str) {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !said.iter().any(|said| said.eq_ignore_ascii_case(name)) {
        said.push(name.to_owned());
        tracing::warn!(name, "the application sets a field that is the server's alone: it is dropped; try: leave it out");
    }
}

/// Spelt as applications spell them, so that they need no memory of their own.
const RESPONSE_NAMES: [&str; 9] =
    ["Content-Length", "Set-Cookie", "Cache-Control", "Vary", "Location", "ETag", "Last-Modified", "Expires", "X-Frame-Options"];

fn content_type(value: &[u8]) -> Cow<'static, str> {
    const COMMON: [&str; 5] = ["text/html; charset=utf-8", "text/plain", "application/json", "text/plain; charset=utf-8", "text/html"];
    let known = COMMON.iter().find(|known| known.as_bytes() == value);
    // Only ASCII gets here.
    known.map_or_else(|| Cow::Owned(String::from_utf8_lossy(value).into_owned()), |known| Cow::Borrowed(*known))
}

fn length(value: &[u8]) -> Option<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()
}

/// The lines of a head, each ended by CRLF.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = Result<&'a [u8], Violation>;

    fn next(&mut self) -> Option<Result<&'a [u8], Violation>> {
        if self.0.is_empty() {
            return None;
        }
        // A CR or LF elsewhere stays in the value, where the answer's writer finds it.
        let Some(end) = memchr::memmem::find(self.0, b"\r\n") else {
            self.0 = &[];
            return Some(Err(Violation("a head whose last line does not end")));
        };
        let line = &self.0[..end];
        self.0 = &self.0[end + 2..];
        Some(Ok(line))
    }
}

#[cfg(test)]
mod tests;
