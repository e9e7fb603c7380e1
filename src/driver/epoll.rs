//! The driver for kernels and containers without io_uring: the same [`Op`]s and [`Completion`]s over epoll(7).
//!
//! Every connection is registered once, edge-triggered, and its readiness is remembered here:
//!
//! ```text
//!   push(Recv, Send, RecvStop) --\                        /--> Received, RecvEnded, Sent
//!                                 >--> ready: slot, slot >
//!   epoll_wait -> readable,  ----/     (FIFO)             \--> back into `ready`, if more can be read
//!                 writable
//! ```
//!
//! Edge-triggered, because a request then costs recv(2) and send(2) and its share of one epoll_wait(2):
//! a level-triggered registration would need an epoll_ctl(2) whenever a receive is stopped, started or a
//! send has to wait, or the wait would return at once for bytes that nobody wants now. The price is that a
//! lost readiness is lost for good, so `readable` and `writable` are only cleared where the kernel
//! said that nothing is left: EAGAIN, or a short read with no hang-up announced (epoll(7), question 9).
//! Listeners are level-triggered: a bounded number is accepted per turn, and the kernel remembers the rest.
//!
//! The registration asks for EPOLLIN only. EPOLLOUT joins it when a send first finds the socket full:
//! otherwise every new connection would wake the thread once to say that it can be written to.
//!
//! Fairness: a turn reads at most [`RECV_BYTES`] of each connection and accepts at most
//! [`ACCEPTS_PER_TURN`] of each listener. While the FIFO is not empty the kernel is asked without
//! waiting, and only every second turn.
//!
//! Never blocks except in epoll_wait(2). Never closes a connection on its own: its descriptor is the engine's.

use std::{
    collections::VecDeque,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use super::{Chunk, Completion, Driver, Figures, ListenerIndex, Op, Peer, RecvEnd, Slots, Token, uring, waker::Waker};

/// The driver of one shard. `new` and everything else belong on the shard's thread.
pub struct EpollDriver {
    epoll: OwnedFd,
    waker: Waker,
    listeners: Vec<Listener>,
    /// Some listener has an `AcceptEnded` to report.
    listener_ends: bool,
    slots: Slots<Slot>,
    /// The slot that a descriptor is registered for, or [`NO_SLOT`]. `Op::Close` names only the descriptor.
    slot_of_fd: Vec<u32>,
    /// Slots with something to do, each at most once (`Slot::queued`).
    ready: VecDeque<u32>,
    /// The kernel was not asked in the last turn, so it is asked in the next one.
    poll_due: bool,
    events: Box<[libc::epoll_event]>,
    /// One for all connections: what is read is handed over before the next read, so idle connections hold no buffer.
    buffer: Box<[u8]>,
    figures: Figures,
}

impl EpollDriver {
    /// Watches `listeners`, whose indices are those of [`Op::Accept`]; nothing is accepted before that.
    ///
    /// Makes the listeners non-blocking: accept4(2), unlike recv(2), has no flag for a single call. The mode belongs
    /// to the open file description, so it also holds for other processes that share the listener.
    ///
    /// # Errors
    /// EMFILE or ENFILE when no descriptor is left, EBADF for a listener that is none.
    pub fn new(listeners: &[RawFd]) -> io::Result<EpollDriver> {
        // SAFETY: epoll_create1(2) takes an integer.
        let epoll = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: `epoll` was just opened and nobody else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let waker = Waker::new()?;
        control(&epoll, libc::EPOLL_CTL_ADD, waker.fd(), libc::EPOLLIN as u32, WAKER)?;
        for &fd in listeners {
            // SAFETY: fcntl(2) with F_GETFL and F_SETFL takes integers.
            let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
            // SAFETY: as above.
            check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
        }
        Ok(EpollDriver {
            epoll,
            waker,
            listeners: listeners.iter().map(|&fd| Listener { fd, accepting: false, readable: false, end: None }).collect(),
            listener_ends: false,
            slots: Slots::new(),
            slot_of_fd: Vec::new(),
            ready: VecDeque::new(),
            poll_due: false,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS_PER_WAIT].into_boxed_slice(),
            buffer: vec![0; RECV_BYTES].into_boxed_slice(),
            figures: Figures::default(),
        })
    }
}

struct Listener {
    /// Owned by the main thread, which keeps listeners open as long as the process lives.
    fd: RawFd,
    /// An `Accept` is in flight: the listener is in the epoll set, or `end` is to be reported.
    accepting: bool,
    /// epoll_wait(2) named it in this turn.
    readable: bool,
    /// The `error` of the `AcceptEnded` that the next turn reports.
    end: Option<i32>,
}

/// A connection, as far as this driver knows it. Lives from its first operation to `Op::Close`.
struct Slot {
    generation: u32,
    /// -1 when the slot has no connection.
    fd: RawFd,
    /// The events it is registered for.
    interest: u32,
    /// The errno of the registration, reported instead of every operation; 0 when there is none.
    error: i32,
    /// In `EpollDriver::ready`.
    queued: bool,
    /// recv(2) may find something: bytes, the end or an error.
    readable: bool,
    /// send(2) may find room. True at first: a new socket's buffer is empty.
    writable: bool,
    /// The kernel announced an end (EPOLLRDHUP, EPOLLHUP or EPOLLERR), so a short read does not mean that nothing follows.
    hung_up: bool,
    /// An `Op::Recv` is in flight.
    receiving: bool,
    /// It is to be ended.
    recv_stop: bool,
    /// The `Op::Send` in flight.
    sending: Option<Chunk>,
}

impl Slot {
    const EMPTY: Slot = Slot {
        generation: 0,
        fd: -1,
        interest: 0,
        error: 0,
        queued: false,
        readable: false,
        writable: true,
        hung_up: false,
        receiving: false,
        recv_stop: false,
        sending: None,
    };

    /// There is something that can be done now.
    fn has_work(&self) -> bool {
        let broken = self.error != 0;
        (self.receiving && (self.readable || self.recv_stop || broken)) || (self.sending.is_some() && (self.writable || broken))
    }
}

impl Driver for EpollDriver {
    fn push(&mut self, op: Op) {
        match op {
            Op::Accept { listener } => self.accept_start(listener),
            Op::AcceptStop { listener } => self.accept_end(listener, 0),
            Op::Recv { token, fd } => {
                let slot = self.adopt(token, fd);
                assert!(!slot.receiving, "two receives in flight on one connection");
                slot.receiving = true;
                self.queue(token.slot);
            }
            Op::RecvStop { token, .. } => {
                // A receive that is already over has reported its end, and there is nothing to stop.
                if let Some(slot) = self.slots.get(token.slot)
                    && slot.generation == token.generation
                    && slot.receiving
                {
                    slot.recv_stop = true;
                    self.queue(token.slot);
                }
            }
            Op::Send { token, fd, chunk } => {
                let slot = self.adopt(token, fd);
                assert!(slot.sending.is_none(), "two sends in flight on one connection");
                slot.sending = Some(chunk);
                self.queue(token.slot);
            }
            // What is in flight learns of it through EPOLLHUP: the kernel wakes whoever polls the socket
            // (inet_shutdown, unix_shutdown).
            Op::Shutdown { fd, how } => uring::shutdown(fd, how),
            Op::Close { fd, reset } => self.close(fd, reset),
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, each: &mut dyn FnMut(Completion<'_>)) -> io::Result<()> {
        let mut rung = false;
        loop {
            let idle = self.ready.is_empty() && !self.listener_ends;
            if idle {
                rung |= self.poll(timeout_ms(timeout))?;
            } else if self.poll_due {
                rung |= self.poll(0)?;
            } else {
                self.poll_due = true;
            }
            let mut reported = self.turn_connections(each);
            reported |= self.turn_listeners(each);
            // After a wait in the kernel the caller gets its turn in any case: for its timers, a signal. And whoever rang
            // must be heard now: the bell is drained, it will not ring again.
            if reported || idle || rung {
                // Not before: while this may still sleep, a ring has to be written.
                self.waker.awake();
                return Ok(());
            }
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn figures(&self) -> Figures {
        self.figures
    }
}

impl EpollDriver {
    /// Asks the kernel what has become ready, and remembers it. True when the doorbell rang.
    fn poll(&mut self, timeout_ms: i32) -> io::Result<bool> {
        self.poll_due = false;
        self.figures.enters += 1;
        // SAFETY: `events` holds EVENTS_PER_WAIT entries, belongs to this driver and is not moved during the call.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), EVENTS_PER_WAIT as i32, timeout_ms) };
        let mut rung = false;
        let count = match check(count) {
            Ok(count) => count as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        self.figures.completions += count as u64;
        for index in 0..count {
            let libc::epoll_event { events, u64: data } = self.events[index];
            match data & KIND_MASK {
                WAKER => {
                    self.waker.drain();
                    rung = true;
                }
                LISTENER => self.listeners[(data & !KIND_MASK) as usize].readable = true,
                _ => self.poll_connection(data, events),
            }
        }
        Ok(rung)
    }

    fn poll_connection(&mut self, data: u64, events: u32) {
        let token = token_of(data);
        // A descriptor that was closed can still report while a child between fork and exec holds a copy of it.
        let Some(slot) = self.slots.get(token.slot) else { return };
        if slot.fd < 0 || slot.generation != token.generation {
            return;
        }
        let ended = events & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0;
        let dead = events & (libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0;
        slot.readable |= ended || events & libc::EPOLLIN as u32 != 0;
        slot.writable |= dead || events & libc::EPOLLOUT as u32 != 0;
        slot.hung_up |= ended;
        self.queue(token.slot);
    }

    /// The slot of `token`, registered for `fd` when its owner is new.
    fn adopt(&mut self, token: Token, fd: RawFd) -> &mut Slot {
        let slot = self.slots.named(token.slot, || Slot::EMPTY);
        if slot.fd == fd && slot.generation == token.generation {
            return slot;
        }
        assert!(!slot.receiving && slot.sending.is_none(), "a slot changed hands with something in flight");
        let interest = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let error = match control(&self.epoll, libc::EPOLL_CTL_ADD, fd, interest, data_of(token)) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        // `queued` tells about the FIFO, not about the owner.
        *slot = Slot { generation: token.generation, fd, interest, error, queued: slot.queued, ..Slot::EMPTY };
        // The kernel takes no negative descriptor for an open one; the slot answers with EBADF.
        if let Ok(fd) = usize::try_from(fd) {
            if fd >= self.slot_of_fd.len() {
                self.slot_of_fd.resize(fd + 1, NO_SLOT);
            }
            self.slot_of_fd[fd] = token.slot;
        }
        slot
    }

    /// Puts the slot into the FIFO if there is something to do.
    fn queue(&mut self, index: u32) {
        let Some(slot) = self.slots.get(index) else { return };
        if !slot.queued && slot.has_work() {
            slot.queued = true;
            self.ready.push_back(index);
        }
    }

    /// Serves every slot that is in the FIFO now, once. True when something was reported.
    fn turn_connections(&mut self, each: &mut dyn FnMut(Completion<'_>)) -> bool {
        let mut reported = false;
        for _ in 0..self.ready.len() {
            let Some(index) = self.ready.pop_front() else { break };
            let Some(slot) = self.slots.get(index) else { continue };
            slot.queued = false;
            let token = Token { slot: index, generation: slot.generation };
            // Answers first: they free buffers and end requests, while bytes received make more work.
            reported |= turn_send(&self.epoll, slot, token, each);
            reported |= turn_recv(slot, token, &mut self.buffer, each);
            self.queue(index);
        }
        reported
    }

    fn close(&mut self, fd: RawFd, reset: bool) {
        let index = usize::try_from(fd).ok().and_then(|fd| self.slot_of_fd.get_mut(fd)).map(|index| mem::replace(index, NO_SLOT));
        if let Some(slot) = self.slots.get(index.unwrap_or(NO_SLOT)) {
            assert!(!slot.receiving && slot.sending.is_none(), "a connection was closed with something in flight");
            slot.fd = -1;
        }
        // No EPOLL_CTL_DEL: closing the last descriptor of a socket takes it out of the set (epoll(7), question 6).
        uring::close(fd, reset);
    }

    fn accept_start(&mut self, index: ListenerIndex) {
        let listener = &mut self.listeners[usize::from(index)];
        assert!(!listener.accepting, "two accepts in flight on one listener");
        listener.accepting = true;
        // EPOLLEXCLUSIVE: when shards share a listener (a unix socket), one connection wakes one of them.
        let interest = (libc::EPOLLIN | libc::EPOLLEXCLUSIVE) as u32;
        if let Err(error) = control(&self.epoll, libc::EPOLL_CTL_ADD, listener.fd, interest, LISTENER | u64::from(index)) {
            listener.end = Some(error.raw_os_error().unwrap_or(libc::EIO));
            self.listener_ends = true;
        }
    }

    /// Takes the listener out of the set, or its connections would end every wait at once. The next turn reports it.
    fn accept_end(&mut self, index: ListenerIndex, error: i32) {
        let listener = &mut self.listeners[usize::from(index)];
        if listener.accepting && listener.end.is_none() {
            // ENOENT cannot be: what is `accepting` without an `end` was added.
            let _ = control(&self.epoll, libc::EPOLL_CTL_DEL, listener.fd, 0, 0);
            listener.readable = false;
            listener.end = Some(error);
            self.listener_ends = true;
        }
    }

    /// Accepts what is waiting and reports what has ended. True when something was reported.
    fn turn_listeners(&mut self, each: &mut dyn FnMut(Completion<'_>)) -> bool {
        let mut reported = false;
        for at in 0..self.listeners.len() {
            let index = at as ListenerIndex;
            if mem::take(&mut self.listeners[at].readable) {
                reported |= self.turn_accept(index, each);
            }
            if let Some(error) = self.listeners[at].end.take() {
                self.listeners[at].accepting = false;
                each(Completion::AcceptEnded { listener: index, error });
                reported = true;
            }
        }
        self.listener_ends = false;
        reported
    }

    fn turn_accept(&mut self, index: ListenerIndex, each: &mut dyn FnMut(Completion<'_>)) -> bool {
        let mut reported = false;
        for _ in 0..ACCEPTS_PER_TURN {
            let listener = self.listeners[usize::from(index)].fd;
            // SAFETY: accept4(2) allows null for an address that is not wanted; the listener is open (main thread).
            let fd = unsafe { libc::accept4(listener, ptr::null_mut(), ptr::null_mut(), libc::SOCK_CLOEXEC) };
            if fd >= 0 {
                // SAFETY: the kernel just opened it for us and nobody else knows it.
                let peer = unsafe { Peer::of(fd) };
                each(Completion::Accepted { listener: index, fd, peer });
                reported = true;
                continue;
            }
            match errno() {
                libc::EAGAIN => break,
                error if accept_skips(error) => {}
                // Nothing can be accepted for now (EMFILE, ENFILE, ENOBUFS, ENOMEM) or any more (EINVAL after shutdown(2)).
                error => {
                    self.accept_end(index, error);
                    break;
                }
            }
        }
        reported
    }
}

/// Gives the socket as much of the chunk as it takes at once, as a send on the ring does: a short count is progress that
/// the engine sees, and it sends the rest. True when the send is over.
fn turn_send(epoll: &OwnedFd, slot: &mut Slot, token: Token, each: &mut dyn FnMut(Completion<'_>)) -> bool {
    let Some(chunk) = &slot.sending else { return false };
    let result = match slot.error {
        0 if !slot.writable => return false,
        0 => send(slot.fd, chunk.bytes()),
        error => Err(error),
    };
    let result = match result {
        Err(libc::EAGAIN) => {
            slot.writable = false;
            match want_writable(epoll, slot.fd, &mut slot.interest, token) {
                0 => return false,
                error => Err(error),
            }
        }
        result => result,
    };
    if let Some(chunk) = slot.sending.take() {
        each(Completion::Sent { token, chunk, result });
    }
    true
}

/// Adds EPOLLOUT to the registration, for good. Room that appeared since the EAGAIN is reported, because changing a
/// registration looks at the socket's state (ep_modify). Returns the errno, 0 when all is well.
fn want_writable(epoll: &OwnedFd, fd: RawFd, interest: &mut u32, token: Token) -> i32 {
    if *interest & libc::EPOLLOUT as u32 != 0 {
        return 0;
    }
    *interest |= libc::EPOLLOUT as u32;
    match control(epoll, libc::EPOLL_CTL_MOD, fd, *interest, data_of(token)) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Reads once. True when something was reported.
fn turn_recv(slot: &mut Slot, token: Token, buffer: &mut [u8], each: &mut dyn FnMut(Completion<'_>)) -> bool {
    if !slot.receiving {
        return false;
    }
    let end = if slot.error != 0 {
        RecvEnd::Failed(slot.error)
    } else if slot.recv_stop {
        RecvEnd::Stopped
    } else if slot.readable {
        match recv(slot.fd, buffer) {
            Ok(0) => RecvEnd::Eof,
            Ok(count) => {
                slot.readable = count == buffer.len() || slot.hung_up;
                each(Completion::Received { token, bytes: &buffer[..count] });
                return true;
            }
            Err(libc::EAGAIN) => {
                slot.readable = false;
                return false;
            }
            Err(error) => RecvEnd::Failed(error),
        }
    } else {
        return false;
    };
    slot.receiving = false;
    slot.recv_stop = false;
    each(Completion::RecvEnded { token, end });
    true
}

/// recv(2) that neither blocks nor gives up on a signal; the error is the errno.
fn recv(fd: RawFd, buffer: &mut [u8]) -> Result<usize, i32> {
    loop {
        // SAFETY: `buffer` is writable for its length during the call, and bytes of any value are valid in it.
        let count = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
        if count >= 0 {
            return Ok(count as usize);
        }
        match errno() {
            libc::EINTR => {}
            error => return Err(error),
        }
    }
}

/// send(2) that neither blocks nor gives up on a signal; the error is the errno.
fn send(fd: RawFd, bytes: &[u8]) -> Result<usize, i32> {
    loop {
        // SAFETY: `bytes` can be read for its length during the call; the kernel copies what it takes.
        let count = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if count >= 0 {
            return Ok(count as usize);
        }
        match errno() {
            libc::EINTR => {}
            error => return Err(error),
        }
    }
}

/// accept(2), "Error handling": the next connection in the queue is already broken, or was refused by a firewall; the one after it may be well.
fn accept_skips(error: i32) -> bool {
    matches!(
        error,
        libc::EINTR
            | libc::ECONNABORTED
            | libc::EPERM
            | libc::EPROTO
            | libc::ENOPROTOOPT
            | libc::EOPNOTSUPP
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
    )
}

/// epoll_wait(2) counts milliseconds. Rounded up, so that a deadline has passed when the wait is over.
fn timeout_ms(timeout: Option<Duration>) -> i32 {
    match timeout {
        None => -1,
        Some(timeout) => timeout.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(i32::MAX),
    }
}

fn control(epoll: &OwnedFd, operation: i32, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: `event` lives for the call; a descriptor that is not open gives EBADF.
    check(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd, &mut event) }).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// What a registration carries: 8 bits of kind, 24 of generation, 32 of slot; after a kind, the rest is an index.
fn data_of(token: Token) -> u64 {
    u64::from(token.generation & Token::GENERATION_MASK) << 32 | u64::from(token.slot)
}

fn token_of(data: u64) -> Token {
    Token { slot: data as u32, generation: (data >> 32) as u32 & Token::GENERATION_MASK }
}

const KIND_MASK: u64 = 0xff << 56;
const LISTENER: u64 = 1 << 56;
const WAKER: u64 = 2 << 56;

/// No slot has this index: the engine's limit on connections lies far below.
const NO_SLOT: u32 = u32::MAX;

/// The most that one connection is read in one turn. A request head is 16 KiB at most and mostly 500 bytes; larger reads
/// make uploads cheaper and everybody else's turn longer.
const RECV_BYTES: usize = 16 << 10;

/// The most connections that one listener gives in one turn: about 64 x 10 us.
const ACCEPTS_PER_TURN: usize = 64;

/// More events than this stay with the kernel until the next call, in their order.
const EVENTS_PER_WAIT: usize = 512;
