//! Bodies that a handler makes while they are sent: its [`StreamWriter`], and the credit that holds it back.
//!
//! ```text
//!   handler --piece--> ring thread --memory, up to a mark--> client
//!      ^                   |   +---- then a file, up to a limit
//!      +-----credit--------+         then no more credit: the handler waits
//! ```
//!
//! The handler may be ahead of what the ring thread has taken in by [`WINDOW_BYTES`]. Taken in means: in the
//! connection's buffer or in its file. So a handler is done at memory's or the disk's speed, not the client's.
//!
//! A handler waits on its thread. Whoever carries many bodies at a time cannot, and is told instead ([`Credit::told`]).

use std::{
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

/// How far a handler may be ahead, in bytes.
pub(crate) const WINDOW_BYTES: u64 = 256 << 10;
/// Whoever is told of credit is told of so much at a time, in bytes. Less than a window, or nobody would go on.
pub(crate) const GRANT_BYTES: u64 = WINDOW_BYTES / 4;
/// What a handler writes is gathered up to this size before it crosses over, unless it flushes.
const PIECE_BYTES: usize = 16 << 10;

/// What a handler is allowed to send. Shared by both sides.
#[derive(Default)]
pub struct Credit {
    state: Mutex<State>,
    changed: Condvar,
    /// Called instead of waking whoever waits.
    tell: Option<Tell>,
}

/// What a ring thread did to a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// So many more bytes were taken in.
    Taken(u64),
    /// The client is gone.
    Closed,
    /// No body is wanted, or no more of it.
    Discarded,
}

/// Takes a notice, on the ring thread: must not wait.
type Tell = Box<dyn Fn(Notice) + Send + Sync>;

impl fmt::Debug for Credit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credit").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Bytes taken in so far.
    taken: u64,
    /// How many of them were told.
    told: u64,
    /// Nothing needs to be told any more.
    over: bool,
    /// Nobody wants the rest.
    closed: bool,
    /// The rest is not sent, and that is right so: the answer to HEAD.
    discarded: bool,
}

impl Credit {
    /// Credit for somebody who does not wait for it.
    pub(crate) fn told(tell: impl Fn(Notice) + Send + Sync + 'static) -> Credit {
        Credit { tell: Some(Box::new(tell)), ..Credit::default() }
    }

    /// The ring thread has taken so many bytes in.
    pub fn take(&self, bytes: u64) {
        let mut state = self.state();
        state.taken += bytes;
        let news = state.taken - state.told;
        if self.tell.is_some() && news >= GRANT_BYTES {
            state.told = state.taken;
            return self.notify(state, Notice::Taken(news));
        }
        self.changed.notify_one();
    }

    /// The client is gone: the handler's next write fails.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        self.notify(state, Notice::Closed);
    }

    /// No body is wanted: the handler writes into the void.
    pub fn discard(&self) {
        let mut state = self.state();
        state.discarded = true;
        self.notify(state, Notice::Discarded);
    }

    /// All of the body has been made: nothing need be told any more.
    pub(crate) fn finish(&self) {
        self.state().over = true;
    }

    fn notify(&self, state: MutexGuard<'_, State>, notice: Notice) {
        let over = state.over;
        drop(state);
        match &self.tell {
            Some(_) if over => {}
            Some(tell) => tell(notice),
            None => self.changed.notify_one(),
        }
    }

    /// True when nobody wants the rest.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Where a [`Body::stream`](crate::Body::stream) is written to.
///
/// Bytes are gathered and cross over in pieces; [`flush`](io::Write::flush) sends what there is at once.
///
/// # Errors
/// `BrokenPipe` when the client is gone; `TimedOut` when it has not read for the send limit and the
/// space for its answer is full. Nothing more can be sent after either.
pub struct StreamWriter<'a> {
    gathered: Vec<u8>,
    sent: u64,
    credit: Arc<Credit>,
    wait_max: Duration,
    send: &'a mut dyn FnMut(Vec<u8>),
}

impl<'a> StreamWriter<'a> {
    pub(crate) fn new(credit: Arc<Credit>, wait_max: Duration, send: &'a mut dyn FnMut(Vec<u8>)) -> StreamWriter<'a> {
        StreamWriter { gathered: Vec::new(), sent: 0, credit, wait_max, send }
    }

    fn send_gathered(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let waits = |state: &mut State| self.sent - state.taken.min(self.sent) >= WINDOW_BYTES && !state.closed && !state.discarded;
        let waited = self.credit.changed.wait_timeout_while(self.credit.state(), self.wait_max, waits);
        let (state, timeout) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        let (closed, discarded) = (state.closed, state.discarded);
        drop(state);
        if closed {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone"));
        }
        if discarded {
            self.gathered.clear();
            return Ok(());
        }
        if timeout.timed_out() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its answer"));
        }
        let piece = std::mem::take(&mut self.gathered);
        self.sent += piece.len() as u64;
        (self.send)(piece);
        Ok(())
    }
}

impl io::Write for StreamWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A large write crosses over in pieces, so that each finds its credit.
        let room = PIECE_BYTES.saturating_sub(self.gathered.len()).max(1);
        let taken = bytes.len().min(room);
        self.gathered.extend_from_slice(&bytes[..taken]);
        if self.gathered.len() >= PIECE_BYTES {
            self.send_gathered()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_gathered()
    }
}

/// The handler's side of a body: called once, on its thread, after the head is on its way.
pub(crate) type Source = Box<dyn FnOnce(&mut StreamWriter<'_>) -> io::Result<()> + Send>;

/// A body being made. Without its function once that has gone to work.
pub struct Stream {
    /// Known in advance or not; told to the client as Content-Length, and kept to.
    pub(crate) length: Option<u64>,
    pub(crate) source: Option<Source>,
    pub(crate) credit: Arc<Credit>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const WAIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_handler_waits_once_it_is_a_window_ahead_and_goes_on_when_bytes_are_taken() {
        let credit = Arc::new(Credit::default());
        let (sent, came) = std::sync::mpsc::channel();
        let writer = std::thread::spawn({
            let credit = credit.clone();
            move || {
                let mut send = |piece: Vec<u8>| sent.send(piece.len()).expect("a test that waits");
                StreamWriter::new(credit, WAIT, &mut send).write_all(&vec![7; 2 * WINDOW_BYTES as usize])
            }
        });
        let mut total = 0;
        while total < 2 * WINDOW_BYTES as usize {
            let piece = came.recv().expect("more to come");
            total += piece;
            credit.take(piece as u64);
        }
        assert!(writer.join().expect("no panic").is_ok());
    }

    #[test]
    fn a_client_that_never_reads_costs_the_wait_and_no_more() {
        let credit = Arc::new(Credit::default());
        let mut pieces = 0;
        let mut send = |_| pieces += 1;
        let error = StreamWriter::new(credit, Duration::from_millis(20), &mut send).write_all(&vec![7; 1 << 20]).expect_err("stuck");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(pieces, WINDOW_BYTES as usize / PIECE_BYTES);
    }

    #[test]
    fn whoever_does_not_wait_is_told_of_what_matters_until_the_end() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let notices = told.clone();
        let credit = Credit::told(move |notice| notices.lock().expect("no panic").push(notice));
        let since = || std::mem::take(&mut *told.lock().expect("no panic"));
        (0..GRANT_BYTES - 1).for_each(|_| credit.take(1));
        assert_eq!(since(), [], "a grant is worth a message");
        credit.take(2);
        assert_eq!(since(), [Notice::Taken(GRANT_BYTES + 1)]);
        credit.discard();
        credit.close();
        assert_eq!(since(), [Notice::Discarded, Notice::Closed]);
        credit.finish();
        credit.take(WINDOW_BYTES);
        credit.discard();
        assert_eq!(since(), []);
    }

    #[test]
    fn writing_to_a_client_that_is_gone_fails_and_into_the_void_succeeds() {
        let credit = Arc::new(Credit::default());
        credit.close();
        let mut nobody = |_| panic!("sent");
        let error = StreamWriter::new(credit, WAIT, &mut nobody).write_all(&[0; PIECE_BYTES]).expect_err("gone");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let credit = Arc::new(Credit::default());
        credit.discard();
        assert!(StreamWriter::new(credit, WAIT, &mut nobody).write_all(&vec![0; 9 << 20]).is_ok());
    }
}
