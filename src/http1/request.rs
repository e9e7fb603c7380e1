//! A request's head: from bytes to a [`Head`] that has one meaning.
//!
//! `httparse` finds the tokens. It is more lenient than we are, so each of its leniences is undone
//! here, by a check on the offsets of what it found and not by a second pass over the bytes:
//!
//! - it takes a line feed alone for the end of a line: each field must begin after CRLF;
//! - it skips any number of empty lines before the request line: none is left when it is called;
//! - it lets bytes above 0x7f pass in the target: `target.rs` does not.
//!
//! Above that stand the rules about what fields mean together, framing first. Whatever is in doubt is
//! refused, never guessed. The bytes are not kept: a [`Head`] holds offsets into them.

use std::mem::MaybeUninit;

use super::{
    body::Framing,
    error::Refusal,
    scan::METHOD_BYTES_MAX,
    target::{Target, is_host},
};
use crate::config::{Limits, Permit};

/// A request's head. Made once and used again for each request, so that its list of fields is allocated once.
///
/// All spans are offsets into the bytes that [`Event::Head`](super::Event::Head) consumed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub method: Span,
    /// The target as it was sent.
    pub target: Span,
    /// The target's path, as sent; `*` for `OPTIONS *`. Never empty.
    pub path: Span,
    /// The target's query, without the question mark.
    pub query: Option<Span>,
    pub version: Version,
    /// All fields, in their order, without the whitespace around their values. Names are as sent.
    pub fields: Vec<Field>,
    /// Whom the request is for, `host` or `host:port`. `None` only for HTTP/1.0 or where [`Permit`] says so.
    pub host: Option<Span>,
    pub framing: Framing,
    /// Whether the client lets the connection go on after the answer (RFC 9112 section 9.3).
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends its body.
    pub expect_continue: bool,
    /// There is a field by which proxies name the client: `Forwarded`, `X-Forwarded-` something, `X-Real-IP`. Whether
    /// to believe it is for `identity.rs` to say.
    pub forwarding: bool,
    /// The method is HEAD, so the answer has no content.
    pub is_head: bool,
    /// Length of the head, in bytes, everything included.
    pub bytes: u32,
}

/// A header field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Field {
    pub name: Span,
    pub value: Span,
}

/// A piece of the head, as offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

/// The version to answer with. HTTP/1.2 and up are treated as 1.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    Http10,
    #[default]
    Http11,
}

impl Head {
    /// Whether a body follows that is not known to be empty.
    fn has_content(&self) -> bool {
        !matches!(self.framing, Framing::None | Framing::Length(0))
    }
}

impl Span {
    /// Offsets fit into 32 bits because no head is longer; `parse` sees to it.
    pub(super) fn new(start: usize, end: usize) -> Span {
        Span { start: start as u32, end: end as u32 }
    }

    /// Where `piece`, a part of the `bytes` at address `base`, is in them.
    fn within(base: usize, piece: &[u8]) -> Span {
        let start = piece.as_ptr() as usize - base;
        Span::new(start, start + piece.len())
    }

    fn moved_by(self, offset: u32) -> Span {
        Span { start: self.start + offset, end: self.end + offset }
    }

    /// The piece itself. `bytes` are those the span was made from.
    pub fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.start as usize..self.end as usize]
    }

    pub fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    pub fn is_empty(self) -> bool {
        self.start == self.end
    }
}

/// Parses a head at the beginning of `input`; returns its length, or `None` when it is not complete.
///
/// The refusals are exact only for input that the scan of `scan.rs` has accepted.
#[inline(always)]
pub(super) fn parse(input: &[u8], head: &mut Head, limits: &Limits, permit: Permit) -> Result<Option<usize>, Refusal> {
    let input = &input[..input.len().min(limits.head_bytes_max).min(u32::MAX as usize)];
    let mut few = [const { MaybeUninit::uninit() }; FIELDS_ON_STACK];
    let room = limits.fields_max.min(FIELDS_ON_STACK);
    match parse_into(&mut few[..room], input, head, limits, permit) {
        Err(Refusal::FieldsTooMany) if limits.fields_max > room => {
            let mut many = vec![MaybeUninit::uninit(); limits.fields_max];
            parse_into(&mut many, input, head, limits, permit)
        }
        result => result,
    }
}

/// Fields that a head may have without an allocation. 128 of them take 4 KiB.
const FIELDS_ON_STACK: usize = 128;

#[inline(never)]
fn parse_into<'a>(
    room: &mut [MaybeUninit<httparse::Header<'a>>],
    input: &'a [u8],
    head: &mut Head,
    limits: &Limits,
    permit: Permit,
) -> Result<Option<usize>, Refusal> {
    // One empty line may stand before the request line (RFC 9112 section 2.2).
    let line_start = if input.starts_with(b"\r\n") { 2 } else { 0 };
    let line = &input[line_start..];
    if matches!(line.first(), Some(b'\r' | b'\n')) {
        return Err(Refusal::EmptyLines);
    }
    let mut request = httparse::Request::new(&mut []);
    let length = match request.parse_with_uninit_headers(line, room) {
        Ok(httparse::Status::Complete(length)) => line_start + length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::FieldsTooMany),
        Err(_) => return Err(Refusal::RequestLineBad),
    };
    let (Some(method), Some(target)) = (request.method, request.path) else {
        return Err(Refusal::RequestLineBad);
    };
    let version = if request.version == Some(0) { Version::Http10 } else { Version::Http11 };

    let base = input.as_ptr() as usize;
    check_method(method.as_bytes())?;
    let parts = Target::parse(method.as_bytes(), target.as_bytes(), permit)?;
    head.version = version;
    head.method = Span::within(base, method.as_bytes());
    head.is_head = method == "HEAD";
    head.target = Span::within(base, target.as_bytes());
    head.path = parts.path.moved_by(head.target.start);
    head.query = parts.query.map(|query| query.moved_by(head.target.start));
    head.bytes = length as u32;

    let mut meaning = Meaning::default();
    read_fields(&input[..length], line_start, request.headers, &mut head.fields, &mut meaning, limits)?;
    let authority = parts.authority.map(|authority| authority.moved_by(head.target.start));
    head.host = meaning.host(authority, version, input, permit)?;
    head.framing = meaning.framing(version, input, limits)?;
    // "A client MUST NOT send content in a TRACE request" (RFC 9110 section 9.3.8).
    if head.has_content() && method == "TRACE" {
        return Err(Refusal::TraceContent);
    }
    head.forwarding = meaning.forwarding;
    head.keep_alive = match version {
        Version::Http11 => !meaning.close,
        Version::Http10 => meaning.keep_alive && !meaning.close,
    };
    head.expect_continue = meaning.expects_continue(head)?;
    Ok(Some(length))
}

/// Writes down where the fields are and what they mean, and checks that each line of the head ends with CRLF and is
/// not too long. A line ends where the next begins, so that takes one look at one byte of each.
///
/// "a recipient MAY recognize a single LF as a line terminator and ignore any preceding CR" (RFC 9112 section 2.2).
/// We do not: where two readers differ about the end of a line, requests are smuggled.
///
/// This loop is what parsing costs above `httparse`: some thirty instructions a field (benches/README.md).
fn read_fields(
    head: &[u8],
    request_line_start: usize,
    headers: &[httparse::Header<'_>],
    fields: &mut Vec<Field>,
    meaning: &mut Meaning,
    limits: &Limits,
) -> Result<(), Refusal> {
    let end = head.len() - 2;
    let first = headers.first().map_or(end, |first| first.name.as_ptr() as usize - head.as_ptr() as usize);
    // Not cleared and pushed to: a warm list often has its length already.
    if fields.len() != headers.len() {
        fields.resize(headers.len(), Field::default());
    }
    note_fields(head, headers, fields, meaning)?;
    if head[end - 2] != b'\r' || head[end] != b'\r' {
        return Err(Refusal::BareLf);
    }
    if first - 2 - request_line_start > limits.request_line_bytes_max {
        return Err(Refusal::RequestLineTooLong);
    }
    // In a head that is shorter than any field may be, none is too long.
    if head.len() > limits.field_bytes_max && longest_line(fields, end) > limits.field_bytes_max {
        return Err(Refusal::FieldTooLong);
    }
    Ok(())
}

/// Writes down where the fields are, and what those with a known name say.
// Not inlined, so that it has all registers for itself.
#[inline(never)]
fn note_fields(head: &[u8], headers: &[httparse::Header<'_>], fields: &mut [Field], meaning: &mut Meaning) -> Result<(), Refusal> {
    let base = head.as_ptr() as usize;
    for (field, header) in fields.iter_mut().zip(headers) {
        let start = header.name.as_ptr() as usize - base;
        let value = Span::within(base, header.value);
        *field = Field { name: Span::new(start, start + header.name.len()), value };
        if head[start - 2] != b'\r' {
            return Err(Refusal::BareLf);
        }
        if may_be_known(header.name.as_bytes()) {
            meaning.note(header, value)?;
        }
    }
    Ok(())
}

/// Length of the longest field, without its CRLF; the last of them ends at `end`.
fn longest_line(fields: &[Field], end: usize) -> usize {
    let starts = fields.iter().map(|field| field.name.start as usize);
    let ends = starts.clone().skip(1).chain([end]);
    starts.zip(ends).map(|(start, end)| end - start - 2).max().unwrap_or(0)
}

/// "The method token is case-sensitive" (RFC 9110 section 9.1), so `get` is not GET. It is no method that anybody
/// has registered either, and a handler that compares carelessly would take it for GET: refused. Other names that
/// we do not know pass; whether they exist is for the handler to say.
fn check_method(method: &[u8]) -> Result<(), Refusal> {
    if matches!(method, b"GET" | b"POST" | b"HEAD") {
        return Ok(());
    }
    if method.len() > METHOD_BYTES_MAX {
        return Err(Refusal::MethodTooLong);
    }
    match METHODS.iter().find(|known| known.eq_ignore_ascii_case(method)) {
        Some(known) if *known != method => Err(Refusal::MethodCase),
        _ => Ok(()),
    }
}

/// RFC 9110 section 9.3 and RFC 5789.
const METHODS: [&[u8]; 9] = [b"CONNECT", b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"TRACE"];

/// What the fields say about the request as a whole.
#[derive(Default)]
struct Meaning {
    host: Option<Span>,
    length: Option<Span>,
    coding: Option<Span>,
    close: bool,
    keep_alive: bool,
    expect_continue: bool,
    expect_other: bool,
    forwarding: bool,
    /// One bit for each [`Single`].
    single: u16,
}

/// Fields that are allowed once, because who asks, what is sent or what is answered depends on them, and of two
/// values one server takes the first and the next one the last. The framing fields and Host have reasons of their
/// own. Others of a single value (User-Agent, Referer, From) are repeated by real clients, and nothing hangs on them.
#[derive(Clone, Copy)]
enum Single {
    Authorization,
    ContentRange,
    ContentType,
    IfModifiedSince,
    IfRange,
    IfUnmodifiedSince,
    MaxForwards,
    ProxyAuthorization,
    Range,
}

/// Whether this is a field by which a proxy names the client: RFC 7239's, or one of the `X-` fields before it.
pub fn is_forwarding(name: &[u8]) -> bool {
    const PREFIX: &[u8; 12] = b"x-forwarded-";
    let forwarded = name.first_chunk::<12>().is_some_and(|start| is(start, PREFIX));
    forwarded || is(name, b"forwarded") || is(name, b"x-real-ip")
}

/// For each length, the first letters of the names that [`Meaning::note`] knows, as bits.
static KNOWN: [u32; 32] = {
    let names: [&[u8]; 16] = [
        b"authorization",
        b"connection",
        b"content-length",
        b"content-range",
        b"content-type",
        b"expect",
        b"forwarded",
        b"host",
        b"if-modified-since",
        b"if-range",
        b"if-unmodified-since",
        b"max-forwards",
        b"proxy-authorization",
        b"range",
        b"transfer-encoding",
        b"x-real-ip",
    ];
    let mut known = [0; 32];
    let mut index = 0;
    while index < names.len() {
        known[names[index].len()] |= 1 << (names[index][0] & 31);
        index += 1;
    }
    // X-Forwarded-Anything, of any length: the index is a length's low five bits, and names may have more.
    let mut length = 0;
    while length < known.len() {
        known[length] |= 1 << (b'x' & 31);
        length += 1;
    }
    known
};

/// False for most names, which need no second look. The low five bits of a letter are the same in both cases.
#[inline(always)]
fn may_be_known(name: &[u8]) -> bool {
    name.first().is_some_and(|first| KNOWN[name.len() & 31] >> (first & 31) & 1 == 1)
}

/// Compares a field's name with one in small letters. Bit 5 is what tells the cases of a letter apart; of the bytes
/// that a name may have, no other becomes a letter or a hyphen when it is set.
///
/// Eight bytes at a time, the last eight overlapping those before: two or three comparisons for any name here.
#[inline(always)]
fn is<const LENGTH: usize>(name: &[u8], known: &[u8; LENGTH]) -> bool {
    let Ok(name) = <&[u8; LENGTH]>::try_from(name) else {
        return false;
    };
    let same_at = |at: usize| word(name, at) == word(known, at);
    match LENGTH {
        4..=7 => half_word(name, 0) == half_word(known, 0) && half_word(name, LENGTH - 4) == half_word(known, LENGTH - 4),
        8..=16 => same_at(0) && same_at(LENGTH - 8),
        17..=24 => same_at(0) && same_at(8) && same_at(LENGTH - 8),
        _ => name.eq_ignore_ascii_case(known),
    }
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word) | 0x2020_2020_2020_2020)
}

#[inline(always)]
fn half_word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word) | 0x2020_2020)
}

impl Meaning {
    /// Names with an underscore never get here by another name: only `-` is `-` (RFC 9110 section 5.1).
    // Not inlined: the loop that calls it for a few of its fields needs the registers.
    #[inline(never)]
    fn note(&mut self, header: &httparse::Header<'_>, at: Span) -> Result<(), Refusal> {
        let (name, value) = (header.name.as_bytes(), header.value);
        match name.len() {
            4 if is(name, b"host") => return once(&mut self.host, at, Refusal::HostRepeated),
            5 if is(name, b"range") => return self.note_single(Single::Range),
            6 if is(name, b"expect") => self.note_expect(value),
            8 if is(name, b"if-range") => return self.note_single(Single::IfRange),
            9 => self.forwarding |= is(name, b"forwarded") || is(name, b"x-real-ip"),
            10 if is(name, b"connection") => self.note_connection(value),
            12 if is(name, b"content-type") => return self.note_single(Single::ContentType),
            12 if is(name, b"max-forwards") => return self.note_single(Single::MaxForwards),
            13 if is(name, b"authorization") => return self.note_single(Single::Authorization),
            13 if is(name, b"content-range") => return self.note_single(Single::ContentRange),
            14 if is(name, b"content-length") => return once(&mut self.length, at, Refusal::ContentLengthRepeated),
            17 if is(name, b"transfer-encoding") => return once(&mut self.coding, at, Refusal::TransferEncodingRepeated),
            17 if is(name, b"if-modified-since") => return self.note_single(Single::IfModifiedSince),
            19 if is(name, b"if-unmodified-since") => return self.note_single(Single::IfUnmodifiedSince),
            19 if is(name, b"proxy-authorization") => return self.note_single(Single::ProxyAuthorization),
            _ => self.forwarding |= is_forwarding(name),
        }
        Ok(())
    }

    fn note_single(&mut self, field: Single) -> Result<(), Refusal> {
        let bit = 1 << field as u16;
        let before = self.single;
        self.single |= bit;
        if before & bit == 0 { Ok(()) } else { Err(Refusal::FieldRepeated) }
    }

    /// `Connection = #connection-option`, compared whole and without regard to case (RFC 9110 section 7.6.1).
    fn note_connection(&mut self, value: &[u8]) {
        if value == b"keep-alive" {
            self.keep_alive = true;
            return;
        }
        for option in value.split(|byte| *byte == b',') {
            let option = trim_ows(option);
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }

    /// `Expect = #expectation` (RFC 9110 section 10.1.1): a list, of which empty members are skipped (section 5.6.1.2).
    fn note_expect(&mut self, value: &[u8]) {
        for expectation in value.split(|byte| *byte == b',').map(trim_ows).filter(|member| !member.is_empty()) {
            let known = expectation.eq_ignore_ascii_case(b"100-continue");
            self.expect_continue |= known;
            self.expect_other |= !known;
        }
    }

    /// "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks a Host
    /// header field and to any request message that contains more than one Host header field line or a Host header
    /// field with an invalid field value" (RFC 9112 section 3.2).
    ///
    /// An absolute-form target names a host as well. An origin server "MUST ignore the received Host header field
    /// (if any) and instead replace it" (section 3.2.2); but the field stays in the list that handlers get, so one
    /// that says otherwise is refused.
    // Inlined, like `framing`: their results are of a shape that is slow to hand over in memory.
    #[inline(always)]
    fn host(&self, authority: Option<Span>, version: Version, input: &[u8], permit: Permit) -> Result<Option<Span>, Refusal> {
        let Some(host) = self.host else {
            return match version {
                Version::Http11 if !permit.host_missing => Err(Refusal::HostMissing),
                _ => Ok(authority),
            };
        };
        if !is_host(host.of(input)) {
            return Err(Refusal::HostBad);
        }
        match authority {
            Some(authority) if !authority.of(input).eq_ignore_ascii_case(host.of(input)) => Err(Refusal::AuthorityMismatch),
            _ => Ok(Some(host)),
        }
    }

    /// RFC 9112 section 6.3, with each choice that it leaves decided for refusal.
    #[inline(always)]
    fn framing(&self, version: Version, input: &[u8], limits: &Limits) -> Result<Framing, Refusal> {
        match (self.length, self.coding) {
            (None, None) => Ok(Framing::None),
            // "A server MAY reject a request that contains both Content-Length and Transfer-Encoding or process such
            // a request in accordance with the Transfer-Encoding alone" (section 6.1).
            (Some(_), Some(_)) => Err(Refusal::ContentLengthWithCoding),
            // "A server or client that receives an HTTP/1.0 message containing a Transfer-Encoding header field MUST
            // treat the message as if the framing is faulty" (section 6.1).
            (None, Some(_)) if version == Version::Http10 => Err(Refusal::TransferEncodingHttp10),
            (None, Some(coding)) => check_coding(coding.of(input)).map(|()| Framing::Chunked),
            (Some(length), None) => match content_length(length.of(input))? {
                length if length > limits.body_bytes_max => Err(Refusal::BodyTooLarge),
                length => Ok(Framing::Length(length)),
            },
        }
    }

    /// "A server that receives a 100-continue expectation in an HTTP/1.0 request MUST ignore that expectation", and
    /// "A server that receives an Expect field value containing a member other than 100-continue MAY respond with a
    /// 417 (Expectation Failed) status code" (RFC 9110 section 10.1.1).
    fn expects_continue(&self, head: &Head) -> Result<bool, Refusal> {
        if self.expect_other {
            return Err(Refusal::ExpectationUnknown);
        }
        Ok(self.expect_continue && head.has_content() && head.version == Version::Http11)
    }
}

/// Keeps `at` in `place`, which must be free.
fn once(place: &mut Option<Span>, at: Span, repeated: Refusal) -> Result<(), Refusal> {
    match place.replace(at) {
        None => Ok(()),
        Some(_) => Err(repeated),
    }
}

/// `Content-Length = 1*DIGIT` (RFC 9110 section 8.6). A list of equal numbers, which a recipient may accept, is not
/// accepted. Beyond 2^63 - 1 lies no file, only an attempt at an overflow.
fn content_length(value: &[u8]) -> Result<u64, Refusal> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::ContentLengthBad);
    }
    value
        .iter()
        .try_fold(0_i64, |length, digit| length.checked_mul(10)?.checked_add(i64::from(digit - b'0')))
        .map(i64::unsigned_abs)
        .ok_or(Refusal::ContentLengthOverflow)
}

/// "If any transfer coding other than chunked is applied to a request's content, the sender MUST apply chunked as the
/// final transfer coding", "A sender MUST NOT apply the chunked transfer coding more than once", and "A server that
/// receives a request message with a transfer coding it does not understand SHOULD respond with 501" (RFC 9112
/// section 6.1). Only chunked is understood here.
fn check_coding(value: &[u8]) -> Result<(), Refusal> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let mut codings = value.rsplit(|byte| *byte == b',').map(trim_ows);
    let chunked_last = codings.next().is_some_and(|last| last.eq_ignore_ascii_case(b"chunked"));
    let others_plausible = codings.all(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"chunked"));
    Err(if chunked_last && others_plausible { Refusal::CodingUnsupported } else { Refusal::TransferEncodingBad })
}

/// Without the spaces and tabs around it (RFC 9110 section 5.6.3).
fn trim_ows(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}
