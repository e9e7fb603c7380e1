//! What an application sees: a complete [`Request`], and the [`Response`] it makes of it.
//!
//! A handler never sees a socket, an unfinished request or a slow client; that is the ring thread's work.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    str,
    sync::Arc,
};

use crate::{
    driver::Peer,
    exchange::Ticket,
    http1::{Head, Version},
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

    /// Who sent it.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// True once the client is known to be gone: nobody will read the answer.
    pub fn client_disconnected(&self) -> bool {
        self.ticket.is_some_and(Ticket::client_disconnected)
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
    pub(crate) headers: Vec<(Cow<'static, str>, Cow<'static, [u8]>)>,
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
    File { file: Arc<File>, offset: u64, length: u64 },
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
