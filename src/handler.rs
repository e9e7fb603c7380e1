//! What an application sees: a complete [`Request`], and the [`Response`] it makes of it.
//!
//! A handler never sees a socket, an unfinished request or a slow client; that is the ring thread's work.

use std::{borrow::Cow, str, sync::Arc};

use crate::{
    driver::Peer,
    exchange::Ticket,
    http1::{Head, Version},
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
    pub(crate) body: &'a [u8],
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

    /// The whole body, decoded; empty when there is none.
    pub fn body(&self) -> &'a [u8] {
        self.body
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
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Body::Empty => &[],
            Body::Static(bytes) => bytes,
            Body::Owned(bytes) => bytes,
            Body::Shared(bytes) => bytes,
        }
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
