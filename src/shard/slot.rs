//! One client connection: what the engine knows of it, and when its slot is free again.
//!
//! ```text
//!   Open --last answer sent--> Lingering --peer's end, or time--> Terminating --nothing in flight--> free
//!     +-------------------- error, timeout, peer's end --------------^
//! ```
//!
//! A slot leaves `Terminating` only when neither its receive nor its send is in flight, because the number of a closed
//! descriptor goes to the next connection at once (kernel-notes/cancel-and-close.md).

use std::{os::fd::RawFd, sync::Arc};

use super::{
    deadlines::{NO_ENTRY, Tick},
    engine::Outgoing,
};
use crate::{
    config::Limits,
    driver::{Chunk, Payload, Peer, Token},
    exchange::{Exchange, Micros, Ticket},
    handler::Body,
    http1::{Connection, Version, response::Context},
};

/// Bodies up to this size are copied behind their head.
const BODY_COPIED_BYTES_MAX: usize = 16 << 10;

/// Where a connection stands between accept and close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Open,
    /// The last answer is sent and our side shut; what still comes is dropped, so that the peer can
    /// read the answer before it meets a reset (RFC 9112 section 9.6).
    Lingering,
    /// Waits for what is in flight to end.
    Terminating,
}

pub struct Slot {
    pub token: Token,
    pub fd: RawFd,
    /// The client; the other end of the connection, unless that said another with the PROXY protocol.
    pub peer: Peer,
    /// The other end of the connection.
    pub accepted_from: Peer,
    /// It counts among the connections of `peer`.
    pub counted: bool,
    /// The PROXY protocol header has not come yet.
    pub proxy_awaited: bool,
    pub stage: Stage,
    pub http: Connection,
    /// Bytes received and not yet consumed. Without capacity while empty, so that idle connections cost none.
    pub input: Vec<u8>,
    /// Answers not yet handed to the driver. Without capacity while empty.
    pub output: Vec<u8>,
    /// A large body that follows `output`; the next request waits until it is sent.
    pub body: Option<Chunk>,
    /// A response body that is not all in memory.
    pub outgoing: Option<Box<Outgoing>>,
    /// The request whose body is arriving.
    pub arriving: Option<Box<Exchange>>,
    /// Something of that body is on its way to the disk; `gathered`: and nothing more will come of it.
    pub spooling: bool,
    pub gathered: bool,
    /// Bytes of it that count against the core's memory for bodies.
    pub charged: usize,
    /// Bytes of the send in flight, and all answer bytes that count against the core's memory for responses.
    pub in_flight_bytes: usize,
    pub owed: usize,
    /// The request that a handler has.
    pub ticket: Option<Arc<Ticket>>,
    /// Counts the requests, complete or refused.
    pub serial: u64,

    /// A receive is in flight; `recv_stopping`: and it was told to stop.
    pub recv_in_flight: bool,
    pub recv_stopping: bool,
    /// A send is in flight; `sending_body`: and it is of `body`.
    pub send_in_flight: bool,
    pub sending_body: bool,
    /// In the engine's list of slots to look at before the turn ends.
    pub dirty: bool,
    /// The peer has ended its sending side.
    pub eof: bool,
    /// The last answer is in `output`: nothing is served after it.
    pub last: bool,
    /// What the answer to the present request depends on.
    pub context: Context,
    /// Whether another request may follow the answer being sent.
    pub keep_alive: bool,
    /// A byte of the next request's head has come.
    pub begun: bool,
    /// Close with a RST: the peer does not read, so nothing polite would reach it.
    pub reset: bool,

    /// When it was accepted.
    pub born: Micros,
    /// When the present phase began: the connection or request head, the body, the wait for a handler, the idling.
    pub since: Micros,
    /// When the peer ended its side while a handler had its request.
    pub since_eof: Micros,
    /// When bytes last came (body) or went (answer).
    pub progress: Micros,
    /// Since when answers have been waiting without a break, and the bytes that went out since.
    pub busy_since: Micros,
    pub busy_bytes: u64,
    /// Body bytes since `since`.
    pub body_bytes: u64,
    /// When the present lingering is over for good.
    pub linger_until: Micros,
    /// The entry in the wheel.
    pub entry: Tick,
}

impl Slot {
    pub fn new(token: Token, fd: RawFd, peer: Peer, now: Micros) -> Slot {
        Slot {
            token,
            fd,
            peer,
            accepted_from: peer,
            counted: false,
            proxy_awaited: false,
            stage: Stage::Open,
            http: Connection::new(),
            input: Vec::new(),
            output: Vec::new(),
            body: None,
            outgoing: None,
            arriving: None,
            spooling: false,
            gathered: false,
            in_flight_bytes: 0,
            owed: 0,
            charged: 0,
            ticket: None,
            serial: 0,
            recv_in_flight: false,
            recv_stopping: false,
            send_in_flight: false,
            sending_body: false,
            dirty: false,
            eof: false,
            last: false,
            context: Context { version: Version::Http11, is_head: false, keep_alive: false },
            keep_alive: false,
            begun: false,
            reset: false,
            born: now,
            since: now,
            since_eof: now,
            progress: now,
            busy_since: now,
            busy_bytes: 0,
            body_bytes: 0,
            linger_until: 0,
            entry: NO_ENTRY,
        }
    }

    /// Nothing the kernel could still touch, write or report.
    pub fn is_quiet(&self) -> bool {
        !self.recv_in_flight && !self.send_in_flight
    }

    /// Too much waits for the peer to read, or a large body does: the next request must wait too.
    pub fn is_clogged(&self, limits: &Limits) -> bool {
        let body = self.body.is_some() || self.send_in_flight && self.sending_body;
        body || self.output.len() >= limits.response_buffer_bytes_max
    }

    /// Puts a body behind the head in `output`: a copy when it is small, so that both leave in one send.
    pub fn put_body(&mut self, body: Body) {
        let payload = match body {
            Body::Static(bytes) => Payload::Static(bytes),
            Body::Owned(bytes) => Payload::Owned(bytes),
            Body::Shared(bytes) => Payload::Shared(bytes),
            Body::Empty | Body::File { .. } | Body::Stream(_) => return,
        };
        let bytes = payload.bytes();
        if bytes.len() <= BODY_COPIED_BYTES_MAX {
            self.output.extend_from_slice(bytes);
        } else {
            self.body = Some(Chunk { start: 0, end: bytes.len(), payload });
        }
    }

    /// Answer bytes that it has in memory.
    pub fn response_bytes(&self) -> usize {
        self.output.len() + self.body.as_ref().map_or(0, Chunk::payload_len) + self.in_flight_bytes
    }

    /// Every answer is made and with the kernel.
    pub fn is_done(&self) -> bool {
        self.is_flushed() && self.outgoing.is_none()
    }

    /// Every byte that was to be sent is with the kernel.
    pub fn is_flushed(&self) -> bool {
        !self.send_in_flight && self.output.is_empty() && self.body.is_none()
    }
}
