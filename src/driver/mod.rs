//! The lower seam: what a core asks of the kernel ([`Op`]) and what comes back ([`Completion`]).
//!
//! Both are plain data. The engine (`shard/engine.rs`) makes and takes them without a single system
//! call, so the tests can put a simulated kernel in the place of a driver. Two drivers carry them
//! out: [`uring`] and [`epoll`], with the same behaviour.
//!
//! What every driver promises, and the simulation holds the engine to:
//!
//! - Memory that the kernel may touch belongs to the driver from `push` until the last completion:
//!   `Op::Send` moves its [`Chunk`] in, `Completion::Sent` moves it out.
//! - `Op::Recv` is answered by any number of `Received` and exactly one `RecvEnded`. While that is
//!   missing, the receive is in flight.
//! - `Op::Send` is answered by exactly one `Sent`; there is at most one per connection in flight.
//! - `Op::Accept` is answered by any number of `Accepted` and exactly one `AcceptEnded`.
//! - `Op::Close` has no answer. It is only sent when nothing of the connection is in flight,
//!   because the kernel gives the number of a closed descriptor to the next connection at once.

#[allow(unsafe_code)]
mod buffers;
#[allow(unsafe_code)]
pub mod capabilities;
#[allow(unsafe_code)]
pub mod epoll;
#[allow(unsafe_code)]
pub mod policy;
#[cfg(test)]
#[allow(unsafe_code)]
mod tests;
#[allow(unsafe_code)]
pub mod uring;
#[allow(unsafe_code)]
pub mod waker;

use std::{
    fmt, io,
    mem::ManuallyDrop,
    net::{SocketAddr, TcpStream},
    os::fd::{FromRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

use self::waker::Waker;

/// Names a connection's slot and which of its successive owners is meant. Goes through the kernel
/// as `user_data`, so that a late completion can be told from one of the slot's present owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Index into the slot table of the shard, below [`Token::CHANNELS`]; or, from there on, into its table of channels.
    pub slot: u32,
    /// Counts the slot's owners, modulo 2^24.
    pub generation: u32,
}

impl Token {
    pub const GENERATION_MASK: u32 = 0xff_ffff;
    /// The first slot of a channel: a socket to a worker process, and no client's.
    pub const CHANNELS: u32 = 1 << 31;

    pub fn is_channel(self) -> bool {
        self.slot >= Token::CHANNELS
    }
}

/// What a driver knows of each slot, by [`Token::slot`]; grown when a slot is first named.
struct Slots<T> {
    connections: Vec<T>,
    channels: Vec<T>,
}

impl<T> Slots<T> {
    fn new() -> Slots<T> {
        Slots { connections: Vec::new(), channels: Vec::new() }
    }

    fn get(&mut self, slot: u32) -> Option<&mut T> {
        match slot.checked_sub(Token::CHANNELS) {
            Some(channel) => self.channels.get_mut(channel as usize),
            None => self.connections.get_mut(slot as usize),
        }
    }

    fn named(&mut self, slot: u32, new: impl FnMut() -> T) -> &mut T {
        let (table, index) = match slot.checked_sub(Token::CHANNELS) {
            Some(channel) => (&mut self.channels, channel as usize),
            None => (&mut self.connections, slot as usize),
        };
        if index >= table.len() {
            table.resize_with(index + 1, new);
        }
        &mut table[index]
    }
}

/// Index of a listener in the list the shard was started with.
pub type ListenerIndex = u16;

/// Something that the engine wants done.
#[derive(Debug)]
pub enum Op {
    /// Keep accepting on this listener until `AcceptEnded`.
    Accept { listener: ListenerIndex },
    /// End an `Accept`. Connections accepted until then are still delivered.
    AcceptStop { listener: ListenerIndex },
    /// Keep receiving until `RecvEnded`.
    Recv { token: Token, fd: RawFd },
    /// End a `Recv`. What was received until then is still delivered.
    RecvStop { token: Token, fd: RawFd },
    /// Send the whole chunk, or as much as can be sent.
    Send { token: Token, fd: RawFd, chunk: Chunk },
    /// shutdown(2), at once. Ends what is in flight on the descriptor; gives the peer a FIN.
    Shutdown { fd: RawFd, how: Shutdown },
    /// close(2). With `reset`, the peer gets a RST and no TIME_WAIT remains (SO_LINGER 0).
    Close { fd: RawFd, reset: bool },
}

/// Which directions [`Op::Shutdown`] ends (shutdown(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// SHUT_WR: no more will be sent; the peer's bytes are still read.
    Write,
    /// SHUT_RDWR: a receive and a send in flight end as well.
    Both,
}

/// What became of an [`Op`], or what happened at all.
#[derive(Debug)]
pub enum Completion<'a> {
    /// A connection: the engine owns `fd` from here on, whatever it does next.
    Accepted { listener: ListenerIndex, fd: RawFd, peer: Peer },
    /// The `Accept` is over. `error` is the errno, 0 when it was stopped or simply has to be armed again.
    AcceptEnded { listener: ListenerIndex, error: i32 },
    /// Bytes of the peer, never empty; the slice is the driver's and lives for this call.
    Received { token: Token, bytes: &'a [u8] },
    /// The `Recv` is over.
    RecvEnded { token: Token, end: RecvEnd },
    /// The `Send` is over: `sent` bytes of the chunk went out, or an errno.
    Sent { token: Token, chunk: Chunk, result: Result<usize, i32> },
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Inet(SocketAddr),
    /// A unix socket: whoever may open its path.
    Unix,
}

impl Peer {
    /// Asks the kernel (getpeername(2)); a connection that is already gone counts as unknown, 0.0.0.0:0.
    ///
    /// # Safety
    /// - `fd` is an open socket for the length of the call.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn of(fd: RawFd) -> Peer {
        // SAFETY: the caller keeps `fd` open, and ManuallyDrop keeps this borrowed view from closing it.
        let socket = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
        match socket.peer_addr() {
            Ok(address) => Peer::Inet(address),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Peer::Unix,
            Err(_) => Peer::Inet(SocketAddr::from(([0, 0, 0, 0], 0))),
        }
    }
}

/// The address, or `unix`.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Inet(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

/// Why an [`Op::Recv`] came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvEnd {
    /// The driver wants to be asked again (a one-shot receive, or a multishot one that the kernel ended).
    Again,
    /// The driver had no buffer left (ENOBUFS). Nothing is lost: ask again, and it is tried when buffers are back.
    NoBuffers,
    /// The peer closed its sending side.
    Eof,
    /// It was stopped by `RecvStop`.
    Stopped,
    /// An errno: ECONNRESET, ETIMEDOUT, ...
    Failed(i32),
}

/// Bytes on their way out: what they are, and which part of them is still to be sent.
#[derive(Debug)]
pub struct Chunk {
    pub payload: Payload,
    pub start: usize,
    pub end: usize,
}

/// Where the bytes of a [`Chunk`] are.
#[derive(Debug)]
pub enum Payload {
    /// An output buffer of the shard's pool, or a body made by a handler.
    Owned(Vec<u8>),
    /// Part of the program.
    Static(&'static [u8]),
    /// A body that several answers share.
    Shared(Arc<[u8]>),
}

impl Chunk {
    pub fn owned(bytes: Vec<u8>) -> Chunk {
        let end = bytes.len();
        Chunk { payload: Payload::Owned(bytes), start: 0, end }
    }

    /// What is still to be sent.
    pub fn bytes(&self) -> &[u8] {
        &self.payload.bytes()[self.start..self.end]
    }

    /// Length of all the payload, beyond `end` as well.
    pub fn payload_len(&self) -> usize {
        self.payload.bytes().len()
    }

    pub fn len(&self) -> usize {
        self.end - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

impl Payload {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Payload::Owned(bytes) => bytes,
            Payload::Static(bytes) => bytes,
            Payload::Shared(bytes) => bytes,
        }
    }
}

/// A driver: carries out [`Op`]s and reports [`Completion`]s. Lives on the thread of its shard.
pub trait Driver {
    /// Takes an operation. It may wait for the next `wait` to reach the kernel.
    fn push(&mut self, op: Op);

    /// Submits what was pushed, waits until there is something to report, the doorbell rings or
    /// `timeout` passes (`None`: no limit; zero: does not wait at all), then hands every completion to `each`.
    ///
    /// # Errors
    /// Only what ends the shard: the ring is unusable. Whatever concerns one connection is a completion.
    fn wait(&mut self, timeout: Option<Duration>, each: &mut dyn FnMut(Completion<'_>)) -> io::Result<()>;

    /// The doorbell that ends a `wait` from another thread.
    fn waker(&self) -> Waker;

    /// Says how often the kernel was entered and so on, for the counters.
    fn figures(&self) -> Figures;
}

/// What a driver counts. All of them only grow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Calls of io_uring_enter(2) or epoll_wait(2).
    pub enters: u64,
    /// Entries submitted to the ring (uring only).
    pub submissions: u64,
    /// Completions, or ready events.
    pub completions: u64,
    /// Times the completion queue overflowed (uring only).
    pub overflows: u64,
    /// Receives that ended because no buffer was left (uring only).
    pub no_buffers: u64,
}
