//! The io_uring driver: one ring, entered at most once per turn of the loop.
//!
//! ```text
//!   push(op) -> submission queue -+                    +-> each(Completion)
//!                                 +-- io_uring_enter --+
//!   buffers given back -----------+                    +-- completion queue
//! ```
//!
//! Accepting and receiving stay armed in the kernel (multishot) where it can; receive buffers
//! are picked by the kernel from a ring when data is there, so an idle connection pins none.
//! What a kernel lacks is replaced here, unseen by the engine: one-shot operations are armed again,
//! and without a buffer ring a receive is a poll followed by recv(2).
//!
//! `user_data` is `kind:8 | generation:24 | slot:32`. Kind 0 is never used, so that a forgotten
//! one shows.
//!
//! If you add an operation: give it a `Kind`, say in [`Op`] which completions end it, and keep what
//! the kernel may touch in `self` until the last of them.

use std::{
    collections::VecDeque,
    io,
    os::fd::RawFd,
    ptr,
    time::Duration,
};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{
    Chunk, Completion, Driver, Figures, ListenerIndex, Op, Peer, RecvEnd, Shutdown, Token,
    buffers::Buffers,
    capabilities::{Capabilities, Unavailable},
    waker::Waker,
};

/// Submission entries: a batch, no more; what does not fit is submitted in between.
const SUBMISSIONS: u32 = 1024;
/// Completion entries. Overflow costs far more than the 16 bytes each, and ends every multishot operation.
const COMPLETIONS: u32 = 16_384;
/// Receive buffers of a shard, and their size: a request head of a browser fits into one.
const BUFFERS: u16 = 1024;
const BUFFER_BYTES: usize = 4096;
/// One-shot accepts kept in flight where multishot ones are missing.
const ACCEPTS: u16 = 16;
/// io-wq threads that a mistake of ours may start, at most.
const IOWQ_WORKERS: u32 = 2;

/// First byte of `user_data`: what the completion is of.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Accept = 1,
    Recv,
    Poll,
    Send,
    Cancel,
    Doorbell,
}

pub struct UringDriver {
    ring: IoUring,
    caps: Capabilities,
    listeners: Vec<Listener>,
    /// `None` without the buffer ring; then `scratch` takes what recv(2) brings.
    buffers: Option<Buffers>,
    scratch: Vec<u8>,
    /// What the kernel works on, by slot.
    slots: Vec<InFlight>,
    /// Entries that found the submission queue full, in order.
    waiting: VecDeque<squeue::Entry>,
    /// Completions of one turn, copied out so that the queue is free again.
    completions: Vec<cqueue::Entry>,
    waker: Waker,
    /// The kernel writes the doorbell's counter here. Boxed: its address must not change.
    doorbell: Box<u64>,
    doorbell_armed: bool,
    figures: Figures,
}

#[derive(Default)]
struct InFlight {
    /// The kernel reads it until `Sent`.
    chunk: Option<Chunk>,
    /// The connection's descriptor, where receiving is a poll and a recv(2).
    fd: RawFd,
}

struct Listener {
    fd: RawFd,
    /// Accepts in flight: one multishot, or up to [`ACCEPTS`].
    in_flight: u16,
    /// The engine wants no more connections.
    stopping: bool,
    /// The errno that ended an accept, 0 so far.
    error: i32,
}

impl UringDriver {
    /// The ring belongs to the calling thread: no other may ever use it.
    ///
    /// # Errors
    /// [`Unavailable`], when a ring that was possible at the probe no longer is.
    pub fn new(listeners: &[RawFd], caps: Capabilities) -> Result<UringDriver, Unavailable> {
        let failed = |error: io::Error| Unavailable::setup(&error);
        let ring = setup(&caps).map_err(failed)?;
        // EINVAL before 5.15 (5.10.162): then a stray punt may start more threads than it should.
        let _ = ring.submitter().register_iowq_max_workers(&mut [IOWQ_WORKERS, IOWQ_WORKERS]);
        let buffers = caps.buffer_ring.then(|| Buffers::new(BUFFERS, BUFFER_BYTES));
        if let Some(buffers) = &buffers {
            // SAFETY: the memory lives in `self` and is freed after the ring (field order).
            unsafe { ring.submitter().register_buf_ring_with_flags(buffers.address(), buffers.count(), 0, 0) }.map_err(failed)?;
        }
        let listener = |&fd| Listener { fd, in_flight: 0, stopping: false, error: 0 };
        Ok(UringDriver {
            ring,
            caps,
            listeners: listeners.iter().map(listener).collect(),
            scratch: if buffers.is_some() { Vec::new() } else { vec![0; 4 * BUFFER_BYTES] },
            buffers,
            slots: Vec::new(),
            waiting: VecDeque::new(),
            completions: Vec::with_capacity(COMPLETIONS as usize),
            waker: Waker::new().map_err(failed)?,
            doorbell: Box::new(0),
            doorbell_armed: false,
            figures: Figures::default(),
        })
    }

    fn submit_entry(&mut self, entry: squeue::Entry) {
        // SAFETY: whatever an entry points to is kept in `self` until its last completion: chunks in
        // `slots`, the doorbell's counter in `doorbell`, receive buffers in `buffers`.
        if !self.waiting.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.waiting.push_back(entry);
        }
    }

    fn slot(&mut self, token: Token) -> &mut InFlight {
        let index = token.slot as usize;
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, InFlight::default);
        }
        &mut self.slots[index]
    }

    fn accept(&mut self, index: ListenerIndex) {
        let multishot = self.caps.multishot_accept;
        let listener = &mut self.listeners[usize::from(index)];
        let fd = types::Fd(listener.fd);
        let missing = (if multishot { 1 } else { ACCEPTS }) - listener.in_flight;
        listener.in_flight += missing;
        for _ in 0..missing {
            let entry = if multishot {
                opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build()
            } else {
                opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
            };
            self.submit_entry(entry.user_data(user_data(Kind::Accept, u32::from(index), 0)));
        }
    }

    fn accept_stop(&mut self, index: ListenerIndex) {
        let listener = &mut self.listeners[usize::from(index)];
        listener.stopping = true;
        // A cancellation ends one operation of this name.
        for _ in 0..listener.in_flight {
            self.cancel(user_data(Kind::Accept, u32::from(index), 0));
        }
    }

    fn recv(&mut self, token: Token, fd: RawFd) {
        let (kind, entry) = match (&self.buffers, self.caps.multishot_recv) {
            // A length of zero: anything else is EINVAL before 6.17.
            (Some(_), true) => (Kind::Recv, opcode::RecvMulti::new(types::Fd(fd), 0).build()),
            (Some(_), false) => {
                let recv = opcode::Recv::new(types::Fd(fd), ptr::null_mut(), BUFFER_BYTES as u32).buf_group(0).build();
                (Kind::Recv, recv.flags(squeue::Flags::BUFFER_SELECT))
            }
            (None, _) => {
                self.slot(token).fd = fd;
                let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
                (Kind::Poll, opcode::PollAdd::new(types::Fd(fd), events).build())
            }
        };
        self.submit_entry(entry.user_data(user_data(kind, token.slot, token.generation)));
    }

    fn send(&mut self, token: Token, fd: RawFd, chunk: Chunk) {
        let bytes = chunk.bytes();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let entry = opcode::Send::new(types::Fd(fd), bytes.as_ptr(), length).flags(libc::MSG_NOSIGNAL).build();
        // Moving the chunk does not move its bytes.
        let before = self.slot(token).chunk.replace(chunk);
        assert!(before.is_none(), "two sends in flight on slot {}", token.slot);
        self.submit_entry(entry.user_data(user_data(Kind::Send, token.slot, token.generation)));
    }

    fn cancel(&mut self, target: u64) {
        self.submit_entry(opcode::AsyncCancel::new(target).build().user_data(user_data(Kind::Cancel, 0, 0)));
    }

    /// Moves what waits into the submission queue; true when all of it found room.
    fn fill(&mut self) -> bool {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.waiting.front() {
            // SAFETY: as in `submit_entry`.
            if unsafe { queue.push(entry) }.is_err() {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// One io_uring_enter(2): submits, and waits for a completion unless `timeout` is zero.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.figures.enters += 1;
        let submitter = self.ring.submitter();
        let entered = match timeout {
            Some(Duration::ZERO) => submitter.submit(),
            None => submitter.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
            }
        };
        match entered {
            Ok(submitted) => {
                self.figures.submissions += submitted as u64;
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // The time is over; a signal came; completions or memory must be made room for first.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Hands one completion to `each`, as one or two of ours.
    fn complete(&mut self, entry: &cqueue::Entry, each: &mut dyn FnMut(Completion<'_>)) {
        let (kind, slot, generation) = split(entry.user_data());
        let (result, more) = (entry.result(), cqueue::more(entry.flags()));
        let token = Token { slot, generation };
        match kind {
            Some(Kind::Recv) => self.complete_recv(token, result, more, cqueue::buffer_select(entry.flags()), each),
            Some(Kind::Send) => {
                let chunk = self.slot(token).chunk.take().expect("a send in flight has its chunk here");
                let result = usize::try_from(result).map_err(|_| -result);
                each(Completion::Sent { token, chunk, result });
            }
            Some(Kind::Accept) => self.complete_accept(slot as ListenerIndex, result, more, each),
            Some(Kind::Poll) => self.complete_poll(token, result, each),
            Some(Kind::Doorbell) => self.doorbell_armed = false,
            // ENOENT and EALREADY: the target's own completion tells what became of it.
            Some(Kind::Cancel) => {}
            None => unreachable!("user_data {:#x} is not ours", entry.user_data()),
        }
    }

    fn complete_recv(&mut self, token: Token, result: i32, more: bool, buffer: Option<u16>, each: &mut dyn FnMut(Completion<'_>)) {
        let buffers = self.buffers.as_mut().expect("a receive with a buffer ring");
        if let Some(id) = buffer {
            if result > 0 {
                // SAFETY: the kernel just handed out `id`; it goes back below, after the slice is gone.
                let bytes = unsafe { buffers.bytes(id, result as usize) };
                each(Completion::Received { token, bytes });
            }
            buffers.give_back(id);
        }
        if more {
            return;
        }
        let end = match -result {
            0 => RecvEnd::Eof,
            ..0 => RecvEnd::Again,
            libc::ECANCELED => RecvEnd::Stopped,
            libc::ENOBUFS => {
                self.figures.no_buffers += 1;
                RecvEnd::NoBuffers
            }
            errno => RecvEnd::Failed(errno),
        };
        each(Completion::RecvEnded { token, end });
    }

    fn complete_poll(&mut self, token: Token, result: i32, each: &mut dyn FnMut(Completion<'_>)) {
        if result < 0 {
            let end = if result == -libc::ECANCELED { RecvEnd::Stopped } else { RecvEnd::Failed(-result) };
            return each(Completion::RecvEnded { token, end });
        }
        let fd = self.slot(token).fd;
        // SAFETY: the scratch buffer is ours, and the engine keeps `fd` open until this receive has ended.
        let received = unsafe { libc::recv(fd, self.scratch.as_mut_ptr().cast(), self.scratch.len(), libc::MSG_DONTWAIT) };
        let end = match received {
            0 => RecvEnd::Eof,
            1.. => {
                each(Completion::Received { token, bytes: &self.scratch[..received as usize] });
                RecvEnd::Again
            }
            _ => match io::Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) | None => RecvEnd::Again,
                Some(errno) => RecvEnd::Failed(errno),
            },
        };
        each(Completion::RecvEnded { token, end });
    }

    fn complete_accept(&mut self, index: ListenerIndex, result: i32, more: bool, each: &mut dyn FnMut(Completion<'_>)) {
        if result >= 0 {
            // A descriptor is a resource in any state of ours: the engine takes it even while it stops.
            // SAFETY: the kernel just opened it for us and nobody else knows it.
            let peer = unsafe { Peer::of(result) };
            each(Completion::Accepted { listener: index, fd: result, peer });
        }
        if more {
            return;
        }
        let listener = &mut self.listeners[usize::from(index)];
        listener.in_flight -= 1;
        match -result {
            // A connection that was gone before it was accepted is no fault of the listener (accept(2)).
            libc::ECANCELED | libc::ECONNABORTED | libc::EPROTO | libc::EINTR => {}
            errno if errno > 0 => listener.error = errno,
            _ => {}
        }
        if listener.error == 0 && !listener.stopping {
            return self.accept(index);
        }
        // With several in flight, the last one speaks for all: the others fail the same way or are ended here.
        if listener.in_flight == 0 {
            let error = std::mem::take(&mut listener.error);
            listener.stopping = false;
            each(Completion::AcceptEnded { listener: index, error });
        } else if !listener.stopping {
            self.accept_stop(index);
        }
    }
}

impl Driver for UringDriver {
    fn push(&mut self, op: Op) {
        match op {
            Op::Send { token, fd, chunk } => self.send(token, fd, chunk),
            Op::Recv { token, fd } => self.recv(token, fd),
            Op::RecvStop { token, .. } => {
                let kind = if self.buffers.is_some() { Kind::Recv } else { Kind::Poll };
                self.cancel(user_data(kind, token.slot, token.generation));
            }
            Op::Accept { listener } => self.accept(listener),
            Op::AcceptStop { listener } => self.accept_stop(listener),
            Op::Shutdown { fd, how } => shutdown(fd, how),
            Op::Close { fd, reset } => close(fd, reset),
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, each: &mut dyn FnMut(Completion<'_>)) -> io::Result<()> {
        if !self.doorbell_armed {
            self.doorbell_armed = true;
            let read = opcode::Read::new(types::Fd(self.waker.fd()), ptr::from_mut(self.doorbell.as_mut()).cast(), 8).build();
            self.submit_entry(read.user_data(user_data(Kind::Doorbell, 0, 0)));
        }
        if let Some(buffers) = &mut self.buffers {
            buffers.publish();
        }
        while !self.fill() {
            self.enter(Some(Duration::ZERO))?;
        }
        self.enter(timeout)?;
        self.waker.awake();
        if self.ring.submission().cq_overflow() {
            // Nothing is lost (NODROP): the kernel holds the rest until it is asked again.
            self.figures.overflows += 1;
        }
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion());
        self.figures.completions += completions.len() as u64;
        for entry in completions.drain(..) {
            self.complete(&entry, each);
        }
        self.completions = completions;
        Ok(())
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn figures(&self) -> Figures {
        self.figures
    }
}

/// Creates a ring with everything that helps and is there.
fn setup(caps: &Capabilities) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // A child of a fork must not share the rings; CLAMP takes what the kernel allows of the sizes asked for.
    builder.dontfork().setup_clamp().setup_cqsize(COMPLETIONS);
    if caps.coop_taskrun || caps.defer_taskrun {
        // Without the flag, a submit that does not wait would not know that there is work to fetch.
        builder.setup_taskrun_flag();
    }
    if caps.coop_taskrun && !caps.defer_taskrun {
        builder.setup_coop_taskrun();
    }
    if caps.single_issuer {
        builder.setup_single_issuer();
    }
    if caps.defer_taskrun {
        builder.setup_defer_taskrun();
    }
    if caps.submit_all {
        builder.setup_submit_all();
    }
    if caps.no_sqarray {
        builder.setup_no_sqarray();
    }
    builder.build(SUBMISSIONS)
}

/// shutdown(2) as a system call: the ring's own operation always goes to a kernel thread.
pub(super) fn shutdown(fd: RawFd, how: Shutdown) {
    let how = match how {
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // ENOTCONN: the peer was faster. Either way the descriptor is shut.
    // SAFETY: the engine owns `fd` and has not closed it.
    unsafe { libc::shutdown(fd, how) };
}

/// close(2). With `reset`, what is unsent is thrown away and the peer gets a RST (socket(7), SO_LINGER).
pub(super) fn close(fd: RawFd, reset: bool) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the engine owns `fd`, gives it up with this call, and has nothing in flight on it.
    unsafe {
        if reset {
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, ptr::from_ref(&linger).cast(), size_of::<libc::linger>() as u32);
        }
        libc::close(fd);
    }
}

fn user_data(kind: Kind, slot: u32, generation: u32) -> u64 {
    debug_assert!(generation <= Token::GENERATION_MASK);
    (kind as u64) << 56 | u64::from(generation) << 32 | u64::from(slot)
}

fn split(user_data: u64) -> (Option<Kind>, u32, u32) {
    const KINDS: [Kind; 6] = [Kind::Accept, Kind::Recv, Kind::Poll, Kind::Send, Kind::Cancel, Kind::Doorbell];
    let kind = KINDS.into_iter().find(|kind| *kind as u64 == user_data >> 56);
    (kind, user_data as u32, (user_data >> 32) as u32 & Token::GENERATION_MASK)
}
