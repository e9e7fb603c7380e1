//! One client connection's side of the protocol: which event the next bytes make.
//!
//! A head that is there at once is parsed at once. Otherwise [`HeadScan`] looks at each byte as it
//! comes, and the head is parsed when its last byte is there. A refusal is always the scan's, if it
//! has one, and else the parser's on exactly the head's bytes; so it is the same for every split.
//!
//! Nothing here keeps bytes, reads a clock or does I/O. No input makes it panic; calling its methods
//! in an order that [`Phase::after`] does not know does, for that is a bug in this server.

use super::{
    body::Body,
    error::Refusal,
    request::{self, Head},
    scan::HeadScan,
    state::{Phase, Step},
};
use crate::config::{Limits, Permit};

/// The protocol state of one client connection.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    /// False once a request said so or was refused: then nothing after it may be read as a request
    /// (RFC 9112 section 9.6).
    persistent: bool,
    scan: HeadScan,
    body: Body,
}

/// What the bytes meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Nothing yet. Come back with more bytes behind those not consumed.
    NeedData,
    /// A request's head is complete. It is never the request's last event: [`Event::End`] follows, at once when
    /// there is no body.
    Head,
    /// A piece of the body, decoded, never empty.
    Body(&'a [u8]),
    /// The request is complete.
    End,
    /// The request is being handled or answered; the bytes have to wait.
    Paused,
}

impl Default for Connection {
    fn default() -> Connection {
        Connection::new()
    }
}

impl Connection {
    pub fn new() -> Connection {
        Connection { phase: Phase::Head, persistent: true, scan: HeadScan::default(), body: Body::Length(0) }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Looks at `input`, all bytes received and not yet consumed, and returns how many of them this event consumed.
    ///
    /// `head` is written by [`Event::Head`], its spans being offsets into the bytes which that call consumed. After a
    /// refusal its contents mean nothing, the phase is `Responding`, and the connection closes after the answer.
    pub fn next_event<'a>(
        &mut self,
        input: &'a [u8],
        head: &mut Head,
        limits: &Limits,
        permit: Permit,
    ) -> Result<(usize, Event<'a>), Refusal> {
        let result = match self.phase {
            Phase::Head => self.next_head(input, head, limits, permit),
            Phase::Body => self.body.next_event(input, limits),
            Phase::Handling | Phase::Responding | Phase::Closing => Ok((0, Event::Paused)),
        };
        match result {
            Ok((_, Event::End)) => self.step(Step::BodyEnd),
            Ok(_) => {}
            Err(_) => self.fail(),
        }
        result
    }

    fn next_head<'a>(&mut self, input: &'a [u8], head: &mut Head, limits: &Limits, permit: Permit) -> Result<(usize, Event<'a>), Refusal> {
        let length = match self.first_look(input, head, limits, permit) {
            Some(length) => length,
            None => match self.scan.run(input, limits)? {
                Some(length) => self.parse_scanned(&input[..length], head, limits, permit)?,
                None => return Ok((0, Event::NeedData)),
            },
        };
        self.persistent = head.keep_alive;
        self.body = Body::new(head.framing);
        self.step(Step::HeadEnd);
        Ok((length, Event::Head))
    }

    /// The short way for a head that came at once and is good. It never refuses: the long way finds the reason.
    fn first_look(&self, input: &[u8], head: &mut Head, limits: &Limits, permit: Permit) -> Option<usize> {
        if input.is_empty() || self.scan.scanned() > 0 {
            return None;
        }
        request::parse(input, head, limits, permit).ok().flatten()
    }

    /// Parses a complete head whose syntax the scan has accepted.
    fn parse_scanned(&self, bytes: &[u8], head: &mut Head, limits: &Limits, permit: Permit) -> Result<usize, Refusal> {
        let parsed = match self.scan.newer_minor_at() {
            None => request::parse(bytes, head, limits, permit),
            // The parser knows HTTP/1.0 and HTTP/1.1 only, so HTTP/1.2 is shown to it as 1.1, in a copy. That is the
            // one place that allocates for a request; nobody sends such requests but to see what happens.
            Some(at) => {
                let mut copy = bytes.to_vec();
                copy[at] = b'1';
                request::parse(&copy, head, limits, permit)
            }
        };
        parsed?.ok_or(Refusal::RequestLineBad)
    }

    /// The peer ended its sending side. To be called after every complete event was taken from the bytes received,
    /// `unconsumed` of which are left.
    ///
    /// `Ok`: no request was under way, or the one under way is complete and can still be answered, as half-closing
    /// is allowed. `Err`: a request was cut short.
    pub fn peer_closed(&mut self, unconsumed: usize) -> Result<(), Refusal> {
        let clean = match self.phase {
            Phase::Head => self.scan.between_requests() && unconsumed == self.scan.scanned(),
            Phase::Body => self.body.is_complete(),
            Phase::Handling | Phase::Responding | Phase::Closing => true,
        };
        if clean {
            return Ok(());
        }
        self.fail();
        Err(Refusal::Truncated)
    }

    /// True once [`Connection::next_event`] has seen a byte of the current or next request, be it of an empty line.
    /// A connection that is given up gets an answer (408) when this is true, and is closed silently when not.
    pub fn request_begun(&self) -> bool {
        self.phase != Phase::Head || self.scan.scanned() > 0
    }

    /// The owner refuses a request that is not complete: a timeout, a limit that is not the protocol's.
    pub fn fail(&mut self) {
        self.persistent = false;
        self.step(Step::Fail);
    }

    /// The complete request is being answered.
    pub fn respond(&mut self) {
        self.step(Step::Respond);
    }

    /// The answer has left. The next request is looked at only if `keep_alive`, the request that was answered and the
    /// absence of a refusal agree.
    pub fn flushed(&mut self, keep_alive: bool) {
        self.step(Step::Flushed { keep_alive: keep_alive && self.persistent });
        self.scan = HeadScan::default();
        self.body = Body::Length(0);
    }

    fn step(&mut self, step: Step) {
        match self.phase.after(step) {
            Some(phase) => self.phase = phase,
            None => panic!("connection asked to make step {step:?} in phase {:?}", self.phase),
        }
    }
}

// Each connection has one, so its size counts a hundred thousand times.
const _: () = assert!(size_of::<Connection>() <= 96);
