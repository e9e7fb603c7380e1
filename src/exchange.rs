//! One request on its way through a handler and back: what crosses between a ring thread and its pool.
//!
//! The ring thread fills an [`Exchange`], a handler thread puts the response in, and the box goes home to be used
//! again. Its [`Ticket`] is the one thing that both look at meanwhile:
//!
//! ```text
//!   waiting --start (handler)--> running
//!      |
//!      +--withdraw (ring: client gone, waited too long)--> withdrawn, never run
//! ```
//!
//! Both steps are one compare-and-swap, so exactly one side wins: what was refused is never run.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    driver::{Peer, Token},
    handler::{BodySource, Request, Response},
    http1::Head,
    identity::Origin,
    shard::engine::Reserved,
};

/// Microseconds on CLOCK_MONOTONIC since the process began to serve; never 0 or 1.
pub type Micros = u64;

/// A complete request, and later its response.
#[derive(Debug)]
pub struct Exchange {
    /// The connection that asked.
    pub token: Token,
    /// Which of the connection's requests this is.
    pub serial: u64,
    pub head: Head,
    /// The bytes of the head; its spans point in here.
    pub head_bytes: Vec<u8>,
    /// The body, or what of it is not in `file` yet.
    pub body: Vec<u8>,
    /// Where a large body goes, and how much of it is there.
    pub file: Option<Arc<File>>,
    pub file_bytes: u64,
    /// What the file takes of the quota.
    pub reserved: Option<Reserved>,
    pub peer: Peer,
    /// What trusted proxies say about it.
    pub origin: Option<Origin>,
    /// When it was complete.
    pub since: Micros,
    pub ticket: Arc<Ticket>,
    /// `None` until a handler has answered; stays so when it was withdrawn.
    pub response: Option<Response>,
}

impl Exchange {
    pub fn new() -> Exchange {
        Exchange {
            token: Token { slot: 0, generation: 0 },
            serial: 0,
            head: Head::default(),
            head_bytes: Vec::new(),
            body: Vec::new(),
            file: None,
            file_bytes: 0,
            reserved: None,
            peer: Peer::Unix,
            origin: None,
            since: 0,
            ticket: Arc::default(),
            response: None,
        }
    }

    pub fn request(&self) -> Request<'_> {
        let body = match &self.file {
            Some(file) => BodySource::File { file, length: self.file_bytes },
            None => BodySource::Memory(&self.body),
        };
        Request { head: &self.head, bytes: &self.head_bytes, body, peer: self.peer, origin: self.origin, ticket: Some(&self.ticket) }
    }
}

impl Default for Exchange {
    fn default() -> Exchange {
        Exchange::new()
    }
}

/// Whether a request still waits, runs, or is no longer wanted.
#[derive(Debug, Default)]
pub struct Ticket {
    /// [`WAITING`], [`WITHDRAWN`], or the time at which a handler began.
    state: AtomicU64,
    disconnected: AtomicBool,
}

const WAITING: u64 = 0;
const WITHDRAWN: u64 = 1;

/// What a [`Ticket`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Waiting,
    Withdrawn,
    RunningSince(Micros),
}

impl Ticket {
    /// A handler takes the request. False: it was withdrawn and must not run.
    pub fn start(&self, now: Micros) -> bool {
        self.state.compare_exchange(WAITING, now.max(WITHDRAWN + 1), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The handler goes on with the request as if it had begun at `since`: its run limit counts from there.
    pub fn restart(&self, since: Micros) {
        self.state.store(since.max(WITHDRAWN + 1), Ordering::Release);
    }

    /// The ring thread takes the request back. False: a handler was faster.
    pub fn withdraw(&self) -> bool {
        self.state.compare_exchange(WAITING, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    pub fn progress(&self) -> Progress {
        match self.state.load(Ordering::Acquire) {
            WAITING => Progress::Waiting,
            WITHDRAWN => Progress::Withdrawn,
            since => Progress::RunningSince(since),
        }
    }

    /// Tells the handler that nobody will read its answer.
    pub fn disconnect(&self) {
        self.disconnected.store(true, Ordering::Relaxed);
    }

    pub fn client_disconnected(&self) -> bool {
        self.disconnected.load(Ordering::Relaxed)
    }

    /// Makes a ticket new again. Only when nobody else holds it.
    pub fn reset(&self) {
        self.state.store(WAITING, Ordering::Relaxed);
        self.disconnected.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_run_or_withdrawn_but_never_both() {
        for _ in 0..2_000 {
            let ticket = Arc::new(Ticket::default());
            let other = ticket.clone();
            let handler = std::thread::spawn(move || other.start(7));
            let withdrawn = ticket.withdraw();
            let started = handler.join().expect("no panic");
            assert!(started != withdrawn);
            assert_eq!(ticket.progress(), if started { Progress::RunningSince(7) } else { Progress::Withdrawn });
        }
    }
}
