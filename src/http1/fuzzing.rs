//! Drives a [`Connection`] over arbitrary bytes and checks what must hold for all of them.
//!
//! [`run`] is what the unit tests use; [`fuzz_connection`] and [`fuzz_chunked`] are for a fuzzer
//! (`tests/fuzz`). A broken invariant panics. Not part of the server: nothing outside tests calls this.

use super::{Connection, Event, Framing, Head, Phase, Refusal};
use crate::config::{Limits, Permit};

/// What came of a connection's bytes, its end included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The complete requests, which are all that a handler would see.
    pub requests: Vec<Request>,
    pub end: End,
}

/// A complete request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub head: Head,
    /// What the spans of `head` point into.
    pub head_bytes: Vec<u8>,
    pub body: Vec<u8>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Another request could have followed.
    Open,
    /// The last request said that none follows; bytes behind it were not looked at.
    Closing,
    Refused(Refusal),
}

/// Feeds `bytes` in the pieces that `cuts` (ascending) make of them, each request being answered at once, and then
/// closes the peer's side.
pub fn run(bytes: &[u8], cuts: &[usize], limits: &Limits, permit: Permit) -> Run {
    let mut driver = Driver::new(limits, permit);
    let mut consumed = 0;
    for end in cuts.iter().copied().chain([bytes.len()]) {
        match driver.feed(&bytes[consumed..end]) {
            Ok(count) => consumed += count,
            Err(end) => {
                return Run { requests: driver.requests, end };
            }
        }
    }
    let end = match driver.connection.peer_closed(bytes.len() - consumed) {
        Ok(()) => End::Open,
        Err(refusal) => End::Refused(refusal),
    };
    Run { requests: driver.requests, end }
}

struct Driver<'a> {
    connection: Connection,
    head: Head,
    limits: &'a Limits,
    permit: Permit,
    requests: Vec<Request>,
    /// The request whose head is complete.
    current: Option<Request>,
}

impl<'a> Driver<'a> {
    fn new(limits: &'a Limits, permit: Permit) -> Driver<'a> {
        Driver { connection: Connection::new(), head: Head::default(), limits, permit, requests: Vec::new(), current: None }
    }

    /// Takes all events out of `input`; returns how many bytes they consumed.
    fn feed(&mut self, input: &[u8]) -> Result<usize, End> {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            let phase = self.connection.phase();
            let event = self.connection.next_event(rest, &mut self.head, self.limits, self.permit);
            let (count, event) = match event {
                Ok(happened) => happened,
                Err(refusal) => {
                    self.refused();
                    return Err(End::Refused(refusal));
                }
            };
            assert!(count <= rest.len(), "consumed more than there was");
            at += count;
            match event {
                Event::NeedData => {
                    assert!(phase == Phase::Body || count == 0, "an incomplete head was consumed");
                    assert!(phase == Phase::Head || at == input.len(), "body bytes were left over");
                    assert_eq!(self.connection.phase(), phase);
                    assert_eq!(self.connection.request_begun(), phase == Phase::Body || !rest.is_empty());
                    return Ok(at);
                }
                Event::Head => self.head_complete(&rest[..count]),
                Event::Body(data) => {
                    assert!(!data.is_empty());
                    let request = self.current.as_mut().expect("a body has a head");
                    request.body.extend_from_slice(data);
                    assert!(request.body.len() as u64 <= self.limits.body_bytes_max);
                }
                Event::End => {
                    self.request_complete();
                    if self.connection.phase() == Phase::Closing {
                        return Err(End::Closing);
                    }
                }
                Event::Paused => panic!("paused although every request was answered"),
            }
        }
    }

    fn head_complete(&mut self, bytes: &[u8]) {
        assert_eq!(self.connection.phase(), Phase::Body);
        assert!(self.current.is_none());
        check_head(&self.head, bytes, self.limits);
        self.current = Some(Request { head: self.head.clone(), head_bytes: bytes.to_vec(), body: Vec::new() });
    }

    fn request_complete(&mut self) {
        let request = self.current.take().expect("an end has a head");
        match request.head.framing {
            Framing::None => assert!(request.body.is_empty()),
            Framing::Length(length) => assert_eq!(request.body.len() as u64, length),
            Framing::Chunked => {}
        }
        let keep_alive = request.head.keep_alive;
        self.requests.push(request);
        assert_eq!(self.connection.phase(), Phase::Handling);
        self.paused();
        self.connection.respond();
        self.paused();
        self.connection.flushed(true);
        assert_eq!(self.connection.phase() == Phase::Head, keep_alive);
        assert_eq!(self.connection.request_begun(), !keep_alive);
    }

    /// After a refusal nothing is looked at any more, whatever the owner says.
    fn refused(&mut self) {
        assert_eq!(self.connection.phase(), Phase::Responding);
        self.paused();
        self.connection.flushed(true);
        assert_eq!(self.connection.phase(), Phase::Closing);
        self.paused();
    }

    fn paused(&mut self) {
        let event = self.connection.next_event(b"GET /evil HTTP/1.1\r\n\r\n", &mut self.head, self.limits, self.permit);
        assert_eq!(event, Ok((0, Event::Paused)));
    }
}

/// What every accepted head has, whatever it says.
fn check_head(head: &Head, bytes: &[u8], limits: &Limits) {
    assert_eq!(head.bytes as usize, bytes.len());
    assert!(bytes.len() <= limits.head_bytes_max);
    assert!(bytes.ends_with(b"\r\n\r\n"));
    assert!(head.fields.len() <= limits.fields_max);
    assert!(!head.method.is_empty() && !head.target.is_empty() && !head.path.is_empty());
    assert_eq!(head.is_head, head.method.of(bytes) == b"HEAD");
    assert!(head.target.start <= head.path.start && head.path.end <= head.target.end);
    assert!(head.query.is_none_or(|query| query.end == head.target.end && bytes[query.start as usize - 1] == b'?'));
    let line_feeds = bytes.iter().filter(|byte| **byte == b'\n').count();
    let empty_lines = if bytes.starts_with(b"\r\n") { 2 } else { 1 };
    assert_eq!(line_feeds, 1 + head.fields.len() + empty_lines, "a line was hidden in another");
    let mut end = head.target.end;
    for field in &head.fields {
        assert!(end < field.name.start && field.name.end < field.value.start && field.value.start <= field.value.end);
        assert_eq!(bytes[field.name.end as usize], b':');
        end = field.value.end;
        let value = field.value.of(bytes);
        assert!(!value.starts_with(b" ") && !value.ends_with(b"\t"));
        assert!(!value.iter().any(|byte| b"\r\n\0".contains(byte)));
    }
}

/// The first byte says how many cuts follow and which limits hold, two bytes each say where; the rest is what the
/// peer sends. Whatever it is, cutting it must not change what comes of it.
pub fn fuzz_connection(data: &[u8]) {
    let Some((limits, cuts, bytes)) = instructions(data) else {
        return;
    };
    let permit = Permit::default();
    let whole = run(bytes, &[], &limits, permit);
    assert_eq!(whole, run(bytes, &cuts, &limits, permit), "cut at {cuts:?}");
    if bytes.len() <= 1024 {
        let everywhere: Vec<usize> = (1..bytes.len()).collect();
        assert_eq!(whole, run(bytes, &everywhere, &limits, permit), "byte by byte");
    }
    if whole.end == End::Open {
        let longer = [bytes, b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"].concat();
        let more = run(&longer, &cuts, &limits, permit);
        let (last, before) = more.requests.split_last().expect("another request was welcome");
        assert_eq!(before, whole.requests, "what follows changed what was there");
        assert!(last.body.is_empty());
    }
}

/// The same for what follows the head of a chunked request, and the way back: the rest, put into chunks of the sizes
/// that the cuts make, must come out as it was.
pub fn fuzz_chunked(data: &[u8]) {
    let Some((limits, cuts, bytes)) = instructions(data) else {
        return;
    };
    let permit = Permit::default();
    let sent = [CHUNKED_HEAD, bytes].concat();
    let shifted: Vec<usize> = cuts.iter().map(|cut| cut + CHUNKED_HEAD.len()).collect();
    assert_eq!(run(&sent, &[], &limits, permit), run(&sent, &shifted, &limits, permit), "cut at {cuts:?}");

    let mut encoded = CHUNKED_HEAD.to_vec();
    let mut start = 0;
    for end in cuts.iter().copied().chain([bytes.len()]) {
        if start < end {
            encoded.extend_from_slice(format!("{:x};n=\"v\"\r\n", end - start).as_bytes());
            encoded.extend_from_slice(&bytes[start..end]);
            encoded.extend_from_slice(b"\r\n");
        }
        start = end;
    }
    encoded.extend_from_slice(b"0\r\nX-Trailer: v\r\n\r\n");
    let decoded = run(&encoded, &cuts, &Limits::default(), permit);
    assert_eq!(decoded.end, End::Open);
    assert_eq!(decoded.requests.len(), 1);
    assert_eq!(decoded.requests[0].body, bytes);
}

const CHUNKED_HEAD: &[u8] = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Limits, places to cut, and what the peer sends, as `data` has them.
pub fn instructions(data: &[u8]) -> Option<(Limits, Vec<usize>, &[u8])> {
    let (first, rest) = data.split_first()?;
    let limits = match first & 1 {
        0 => Limits::default(),
        _ => Limits {
            request_line_bytes_max: 40,
            fields_max: 4,
            field_bytes_max: 60,
            head_bytes_max: 160,
            body_bytes_max: 40,
            chunk_line_bytes_max: 20,
            ..Limits::default()
        },
    };
    let (places, bytes) = rest.split_at_checked(usize::from(first >> 1 & 7) * 2)?;
    let place = |pair: &[u8]| usize::from(u16::from_be_bytes([pair[0], pair[1]])) % (bytes.len() + 1);
    let mut cuts: Vec<usize> = places.chunks_exact(2).map(place).collect();
    cuts.sort_unstable();
    Some((limits, cuts, bytes))
}
