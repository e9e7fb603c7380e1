//! What an application sees: a complete [`Request`], and the [`Response`] it makes of it.
//!
//! A handler never sees a socket, an unfinished request or a slow client; that is the ring thread's work.

use std::{
    borrow::Cow,
    fmt::{self, Write},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    str,
    sync::Arc,
};

use crate::{
    config::Permit,
    driver::Peer,
    exchange::Ticket,
    http1::{
        Head, Refusal, Version, is_forwarding,
        response::{self, Made},
    },
    identity::{self, Origin},
    stats::Stats,
    stream::{Credit, Stream, StreamWriter},
};

/// Answers requests. Closures `Fn(&Request) -> impl Into<Response>` are handlers.
pub trait Handler: Send + Sync + 'static {
    /// Makes the answer. A panic becomes a 500 for this request alone.
    fn handle(&self, request: &Request<'_>) -> Response;

    /// Where this request's [`handle`](Handler::handle) runs. Asked for every request, on the ring thread: it must
    /// not block.
    fn runs(&self, _request: &Request<'_>) -> Runs {
        Runs::OnPool
    }
}

/// Where a handler runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// On a handler thread of the core's pool: it may wait and take its time.
    OnPool,
    /// On the ring thread itself, at once: only what never blocks and takes microseconds, for every
    /// other connection of the core waits meanwhile.
    Inline,
}

impl<F, R> Handler for F
where
    F: Fn(&Request<'_>) -> R + Send + Sync + 'static,
    R: Into<Response>,
{
    fn handle(&self, request: &Request<'_>) -> Response {
        self(request).into()
    }
}

/// A complete, well-formed request. Borrowed: copy what outlives the call.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub(crate) head: &'a Head,
    /// The bytes that the head's spans point into.
    pub(crate) bytes: &'a [u8],
    pub(crate) body: BodySource<'a>,
    pub(crate) peer: Peer,
    pub(crate) origin: Option<Origin>,
    pub(crate) ticket: Option<&'a Ticket>,
}

impl<'a> Request<'a> {
    /// The method, case-sensitive: `GET`, `POST`, ... (RFC 9110 section 9.1).
    pub fn method(&self) -> &'a str {
        ascii(self.head.method.of(self.bytes))
    }

    /// The request target as it was sent (RFC 9112 section 3.2).
    pub fn target(&self) -> &'a str {
        ascii(self.head.target.of(self.bytes))
    }

    /// The target's path as it was sent, percent-encoding and all; `*` for `OPTIONS *`.
    pub fn path(&self) -> &'a str {
        ascii(self.head.path.of(self.bytes))
    }

    /// What follows the path's `?`; empty when there is none.
    pub fn query(&self) -> &'a str {
        self.head.query.map_or("", |query| ascii(query.of(self.bytes)))
    }

    /// `HTTP/1.1` or `HTTP/1.0`.
    pub fn version(&self) -> &'static str {
        match self.head.version {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        }
    }

    /// The header fields in the order they came, duplicates kept. Names are tokens, spelt as sent; values may hold
    /// bytes above 0x7f (RFC 9110 section 5.5).
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let bytes = self.bytes;
        self.head.fields.iter().map(move |field| (ascii(field.name.of(bytes)), field.value.of(bytes)))
    }

    /// The first field of this name, whatever its case.
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers().find(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1)
    }

    /// The whole body, decoded, to be read from the start. It never waits for the client.
    pub fn body(&self) -> RequestBody<'a> {
        RequestBody { source: self.body, position: 0 }
    }

    /// The whole body at once, when it is in memory: always, up to 64 KiB (`--body-memory`). `None`: it is in a file.
    pub fn body_bytes(&self) -> Option<&'a [u8]> {
        match self.body {
            BodySource::Memory(bytes) => Some(bytes),
            BodySource::File { .. } => None,
        }
    }

    /// Who sent it: the client, also when trusted proxies stand between (`--forwarded-allow-ips`, `--proxy-protocol`). Its
    /// port is 0 where they did not say it.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// How the client asked: `https` when a trusted proxy says so, else `http`. What the target says does not count: a
    /// client that sends `GET https://a/` over a plain connection has no secure one (RFC 9110 section 7.4).
    pub fn scheme(&self) -> &'static str {
        if self.origin.and_then(|origin| origin.https) == Some(true) { "https" } else { "http" }
    }

    /// Whom it is for, without the port; an IPv6 address in its brackets. From a trusted proxy's word for it, else the Host
    /// field, which agrees with the target. Empty: an HTTP/1.0 client did not say.
    pub fn host(&self) -> &'a str {
        identity::split_port(self.authority()).0
    }

    /// The port that the client asked for: a trusted proxy's word, else the one beside the host, else that of the scheme.
    pub fn port(&self) -> u16 {
        let forwarded = self.origin.and_then(|origin| origin.port);
        let default = if self.scheme() == "https" { 443 } else { 80 };
        forwarded.or(identity::split_port(self.authority()).1).unwrap_or(default)
    }

    /// `host` or `host:port`.
    fn authority(&self) -> &'a str {
        let forwarded = self.origin.and_then(|origin| origin.host);
        forwarded.or(self.head.host).map_or("", |host| ascii(host.of(self.bytes)))
    }

    /// The header fields for environments in the manner of CGI (RFC 3875 section 4.1.18; PEP 3333), where a hyphen becomes
    /// an underscore.
    ///
    /// So names with an underscore are left out, unless permitted: `X_Forwarded_For` would become what only a proxy should
    /// write. Those of forwarding fields are left out even then. So is `Proxy`, which would become HTTP_PROXY, by which
    /// programs are told their own proxy (CVE-2016-5385). Each is logged, and counted in `stats`.
    pub fn cgi_headers(&self, permit: Permit, stats: &'a Stats) -> impl Iterator<Item = (CgiName<'a>, &'a [u8])> + use<'a> {
        self.headers()
            .filter(move |(name, _)| {
                let danger = if name.contains('_') {
                    !permit.underscore_headers || is_forwarding(name.replace('_', "-").as_bytes())
                } else {
                    name.eq_ignore_ascii_case("proxy")
                };
                if danger {
                    stats.names_dropped.add_shared(1);
                    tracing::info!(
                        name,
                        "left out of the environment: a client could pass it off as another; try: --permit underscore-headers"
                    );
                }
                !danger
            })
            .map(|(name, value)| (CgiName(name), value))
    }

    /// True once the client is known to be gone: nobody will read the answer.
    pub fn client_disconnected(&self) -> bool {
        self.ticket.is_some_and(Ticket::client_disconnected)
    }
}

/// A field's name as CGI has it: `HTTP_ACCEPT`, `CONTENT_TYPE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgiName<'a>(&'a str);

impl fmt::Display for CgiName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = ["content-type", "content-length"].iter().any(|name| self.0.eq_ignore_ascii_case(name));
        f.write_str(if own { "" } else { "HTTP_" })?;
        self.0.chars().try_for_each(|letter| f.write_char(if letter == '-' { '_' } else { letter.to_ascii_uppercase() }))
    }
}

/// Where a request's body is.
#[derive(Clone, Copy)]
pub(crate) enum BodySource<'a> {
    Memory(&'a [u8]),
    File { file: &'a File, length: u64 },
}

/// A request's body: complete, so that reading it never waits for the client.
#[derive(Clone)]
pub struct RequestBody<'a> {
    source: BodySource<'a>,
    position: u64,
}

impl RequestBody<'_> {
    /// Length of the whole body, in bytes.
    pub fn len(&self) -> u64 {
        match self.source {
            BodySource::Memory(bytes) => bytes.len() as u64,
            BodySource::File { length, .. } => length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The unlinked file that a large body is in; its own offset means nothing.
    pub fn file(&self) -> Option<&File> {
        match self.source {
            BodySource::Memory(_) => None,
            BodySource::File { file, .. } => Some(file),
        }
    }
}

impl Read for RequestBody<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.len().saturating_sub(self.position);
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = match self.source {
            BodySource::Memory(bytes) => {
                let start = bytes.len() - left as usize;
                buffer[..wanted].copy_from_slice(&bytes[start..start + wanted]);
                wanted
            }
            BodySource::File { file, .. } => file.read_at(&mut buffer[..wanted], self.position)?,
        };
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for RequestBody<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Spans of method, target and names hold ASCII only: the parser let nothing else pass.
fn ascii(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap_or_default()
}

/// An answer. Its framing (Content-Length and so on) is uringd's; fields for it are dropped.
#[derive(Debug)]
pub struct Response {
    pub(crate) status: u16,
    pub(crate) reason: Option<Cow<'static, str>>,
    /// Apart from the rest, so that the commonest answers need no list.
    pub(crate) content_type: Option<Cow<'static, str>>,
    pub(crate) headers: Vec<response::Field>,
    pub(crate) body: Body,
}

/// The body of a [`Response`].
#[derive(Debug, Default)]
pub enum Body {
    #[default]
    Empty,
    Static(&'static [u8]),
    Owned(Vec<u8>),
    /// Sent to many without a copy each.
    Shared(Arc<[u8]>),
    /// `length` bytes of a file from `offset` on, read off the ring thread while they are sent.
    File {
        file: Arc<File>,
        offset: u64,
        length: u64,
    },
    /// Made while it is sent: see [`Body::stream`].
    Stream(Stream),
}

impl Response {
    /// An empty answer with this status, 200 to 599; anything else becomes a 500.
    pub fn new(status: u16) -> Response {
        Response { status, reason: None, content_type: None, headers: Vec::new(), body: Body::Empty }
    }

    /// `200 OK` with `text/plain; charset=utf-8`.
    pub fn text(text: impl Into<Cow<'static, str>>) -> Response {
        Response::new(200).content_type("text/plain; charset=utf-8").body(text.into())
    }

    /// `200 OK` with `text/html; charset=utf-8`.
    pub fn html(text: impl Into<Cow<'static, str>>) -> Response {
        Response::new(200).content_type("text/html; charset=utf-8").body(text.into())
    }

    /// `200 OK` with `application/json`; `text` is sent as it is.
    pub fn json(text: impl Into<Cow<'static, str>>) -> Response {
        Response::new(200).content_type("application/json").body(text.into())
    }

    pub fn status(mut self, status: u16) -> Response {
        self.status = status;
        self
    }

    /// The words after the status code; the registered ones when not set.
    pub fn reason(mut self, reason: impl Into<Cow<'static, str>>) -> Response {
        self.reason = Some(reason.into());
        self
    }

    pub fn content_type(mut self, value: impl Into<Cow<'static, str>>) -> Response {
        self.content_type = Some(value.into());
        self
    }

    /// Adds a field; several of one name stay several. A name that is no token, or a value with CR,
    /// LF or NUL in it, makes the whole answer a 500 (RFC 9110 section 5.5).
    pub fn header(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Cow<'static, str>>) -> Response {
        let value = match value.into() {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        };
        self.headers.push((name.into(), value));
        self
    }

    pub fn body(mut self, body: impl Into<Body>) -> Response {
        self.body = body.into();
        self
    }

    /// The answer to a refused request: what was wrong, in a sentence.
    pub(crate) fn refusal(refusal: Refusal) -> Response {
        let response = Response::text(format!("{}\n", refusal.explain())).status(refusal.status());
        // RFC 9110 section 15.5.6: a 405 lists what is allowed.
        if refusal.status() == 405 { response.header("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS") } else { response }
    }

    /// The answer to a request that could not be served just now; asks to come back (RFC 9110 section 10.2.3).
    pub(crate) fn unavailable(why: &'static str) -> Response {
        Response::text(why).status(503).header("Retry-After", "1")
    }

    /// What its head is written from.
    pub(crate) fn made(&self) -> Made<'_> {
        Made {
            status: self.status,
            reason: self.reason.as_deref(),
            content_type: self.content_type.as_deref(),
            headers: &self.headers,
            length: self.body.len(),
        }
    }
}

impl Body {
    /// A body of unknown length that `write` makes on the handler's thread, while what is there is being sent.
    ///
    /// The thread is free as soon as the last byte is taken in: in memory first, then in a file, so it works
    /// at the disk's speed, not the client's. An error of `write`, or a panic, ends the connection before the body's end,
    /// so that the client can tell.
    ///
    /// ```
    /// use std::io::Write;
    /// use uringd::{Body, Response};
    ///
    /// let response = Response::new(200).content_type("text/plain").body(Body::stream(|out| {
    ///     (0..1000).try_for_each(|line| writeln!(out, "line {line}"))
    /// }));
    /// ```
    pub fn stream(write: impl FnOnce(&mut StreamWriter<'_>) -> io::Result<()> + Send + 'static) -> Body {
        Body::Stream(Stream { length: None, source: Some(Box::new(write)), credit: Arc::new(Credit::default()) })
    }

    /// The same with a length that is known, and told to the client. More is cut off; less ends the connection.
    pub fn stream_sized(length: u64, write: impl FnOnce(&mut StreamWriter<'_>) -> io::Result<()> + Send + 'static) -> Body {
        Body::Stream(Stream { length: Some(length), source: Some(Box::new(write)), credit: Arc::new(Credit::default()) })
    }

    /// All of a regular file as it is now.
    ///
    /// # Errors
    /// fstat(2)'s.
    pub fn file(file: File) -> io::Result<Body> {
        let length = file.metadata()?.len();
        Ok(Body::File { file: Arc::new(file), offset: 0, length })
    }

    /// Length in bytes; `None` when only its end will tell.
    pub fn len(&self) -> Option<u64> {
        match self {
            Body::Empty => Some(0),
            Body::Static(bytes) => Some(bytes.len() as u64),
            Body::Owned(bytes) => Some(bytes.len() as u64),
            Body::Shared(bytes) => Some(bytes.len() as u64),
            Body::File { length, .. } => Some(*length),
            Body::Stream(stream) => stream.length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

impl From<Cow<'static, str>> for Body {
    fn from(text: Cow<'static, str>) -> Body {
        match text {
            Cow::Borrowed(text) => Body::Static(text.as_bytes()),
            Cow::Owned(text) => Body::Owned(text.into_bytes()),
        }
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Body {
        Body::Static(text.as_bytes())
    }
}

impl From<String> for Body {
    fn from(text: String) -> Body {
        Body::Owned(text.into_bytes())
    }
}

impl From<&'static [u8]> for Body {
    fn from(bytes: &'static [u8]) -> Body {
        Body::Static(bytes)
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body::Owned(bytes)
    }
}

impl From<Arc<[u8]>> for Body {
    fn from(bytes: Arc<[u8]>) -> Body {
        Body::Shared(bytes)
    }
}

impl From<&'static str> for Response {
    fn from(text: &'static str) -> Response {
        Response::text(text)
    }
}

impl From<String> for Response {
    fn from(text: String) -> Response {
        Response::text(text)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::http1::response::{Context, Fault, Framing, LAST_CHUNK, Preamble, write_chunk, write_head};

    const PLAIN: Context = Context { version: Version::Http11, is_head: false, keep_alive: true };

    /// The head without status line, Server and Date; and whether a body follows.
    fn written(response: &Response, context: Context) -> Result<(String, Framing), Fault> {
        let mut preamble = Preamble::new(Some("uringd"));
        preamble.set_date(SystemTime::UNIX_EPOCH);
        let mut out = Vec::new();
        let body = write_head(&mut out, response.made(), context, &preamble)?;
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
        assert_eq!(
            written(&Response::new(200).body("abc"), head),
            Ok(("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n".into(), Framing::None))
        );
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
