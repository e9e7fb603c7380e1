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
//! If you add an operation: give it a `Kind`, say in [`Op`] which completions end it, keep what
//! the kernel may touch in `self` until the last of them, and say in [`allowed`] which capability it needs.

use std::{collections::VecDeque, io, os::fd::RawFd, ptr, time::Duration};

use io_uring::{IoUring, cqueue, opcode, register::Restriction, squeue, types};

use super::{
    Chunk, Completion, Driver, Figures, ListenerIndex, Op, Peer, RecvEnd, Shutdown, Slots, Token,
    buffers::Buffers,
    capabilities::{Capabilities, Unavailable},
    waker::Waker,
};

/// One-shot accepts kept in flight where multishot ones are missing.
const ACCEPTS: u16 = 16;
/// io-wq threads that a mistake of ours may start, at most.
const IOWQ_WORKERS: u32 = 2;

/// How large a shard's ring is. Only tests that want it to run full use other values than the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Submission entries: a batch, no more; what does not fit is submitted in between.
    pub submissions: u32,
    /// Completion entries. Overflow costs far more than the 16 bytes each, and ends every multishot operation.
    pub completions: u32,
    /// Receive buffers, a power of two, and the length of each: a request head of a browser fits into one.
    pub buffers: u16,
    pub buffer_bytes: usize,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes { submissions: 1024, completions: 16_384, buffers: 1024, buffer_bytes: 4096 }
    }
}

/// The environment variable that makes rings small, for tests: four numbers, `SUBMISSIONS,COMPLETIONS,BUFFERS,BUFFER_BYTES`.
pub const SIZES_VARIABLE: &str = "URINGD_IO_SIZES";
/// The environment variable that has the kernel itself refuse what the capabilities do not allow, for tests: `1`.
pub const RESTRICT_VARIABLE: &str = "URINGD_IO_RESTRICT";

impl Sizes {
    /// What [`SIZES_VARIABLE`] says; the default when it is absent or no four numbers that a ring can have.
    pub fn from_environment() -> Sizes {
        std::env::var(SIZES_VARIABLE).ok().and_then(|text| Sizes::from_text(&text)).unwrap_or_default()
    }

    fn from_text(text: &str) -> Option<Sizes> {
        let mut numbers = text.split(',').map(|number| number.trim().parse::<u32>().ok().filter(|number| *number > 0));
        let mut next = || numbers.next().flatten();
        let (submissions, completions) = (next()?, next()?);
        let buffers = next().and_then(|count| u16::try_from(count).ok()).filter(|count| count.is_power_of_two())?;
        Some(Sizes { submissions, completions, buffers, buffer_bytes: next()? as usize })
    }
}

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
    buffer_bytes: usize,
    listeners: Vec<Listener>,
    /// `None` without the buffer ring; then `scratch` takes what recv(2) brings.
    buffers: Option<Buffers>,
    scratch: Vec<u8>,
    /// The last turn had too few buffers. Receives that are asked for wait in `starved` then, and no more of them are tried
    /// in a turn than there are buffers: each of the others would end at once, again and again.
    scarce: bool,
    starved: VecDeque<squeue::Entry>,
    /// What the kernel works on, by slot.
    slots: Slots<InFlight>,
    /// Entries that found the submission queue full, in order.
    waiting: VecDeque<squeue::Entry>,
    /// Completions of one turn, copied out so that the queue is free again.
    completions: Vec<cqueue::Entry>,
    waker: Waker,
    /// The kernel writes the doorbell's counter here. Leaked, eight bytes a shard: the read is still in flight when the
    /// ring is dropped, and the kernel ends it whenever it likes.
    doorbell: &'static mut u64,
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
        UringDriver::with_sizes(listeners, caps, Sizes::default())
    }

    /// The same with a ring of another size, and restricted if [`RESTRICT_VARIABLE`] says so.
    ///
    /// # Errors
    /// As [`UringDriver::new`].
    pub fn with_sizes(listeners: &[RawFd], caps: Capabilities, sizes: Sizes) -> Result<UringDriver, Unavailable> {
        let failed = |error: io::Error| Unavailable::setup(&error);
        let restricted = std::env::var(RESTRICT_VARIABLE).is_ok_and(|value| value == "1");
        let ring = setup(&caps, sizes, restricted).map_err(failed)?;
        if restricted {
            restrict(&ring, &caps).map_err(failed)?;
        }
        // EINVAL before 5.15 (5.10.162): then a stray punt may start more threads than it should.
        let _ = ring.submitter().register_iowq_max_workers(&mut [IOWQ_WORKERS, IOWQ_WORKERS]);
        let buffers = caps.buffer_ring.then(|| Buffers::new(sizes.buffers, sizes.buffer_bytes));
        if let Some(buffers) = &buffers {
            // SAFETY: the memory lives in `self` and is freed after the ring (field order).
            unsafe { ring.submitter().register_buf_ring_with_flags(buffers.address(), buffers.count(), 0, 0) }.map_err(failed)?;
        }
        let listener = |&fd| Listener { fd, in_flight: 0, stopping: false, error: 0 };
        Ok(UringDriver {
            ring,
            caps,
            buffer_bytes: sizes.buffer_bytes,
            listeners: listeners.iter().map(listener).collect(),
            scratch: if buffers.is_some() { Vec::new() } else { vec![0; 4 * sizes.buffer_bytes] },
            buffers,
            scarce: false,
            starved: VecDeque::new(),
            slots: Slots::new(),
            waiting: VecDeque::new(),
            completions: Vec::with_capacity(sizes.completions as usize),
            waker: Waker::new().map_err(failed)?,
            doorbell: Box::leak(Box::new(0)),
            doorbell_armed: false,
            figures: Figures::default(),
        })
    }

    fn submit_entry(&mut self, entry: squeue::Entry) {
        debug_assert_eq!(check(&entry, &self.caps), Ok(()));
        // SAFETY: whatever an entry points to is kept in `self` until its last completion: chunks in
        // `slots`, the doorbell's counter in `doorbell`, receive buffers in `buffers`.
        if !self.waiting.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.waiting.push_back(entry);
        }
    }

    fn slot(&mut self, token: Token) -> &mut InFlight {
        self.slots.named(token.slot, InFlight::default)
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
        self.listeners[usize::from(index)].stopping = true;
        // A cancellation ends one operation of this name. Where several are in flight, the end of each asks for the
        // next one's: all at once would find the same one again and again, because it keeps its name until it is reported.
        self.cancel(user_data(Kind::Accept, u32::from(index), 0));
    }

    fn recv(&mut self, token: Token, fd: RawFd) {
        let (kind, entry) = match (&self.buffers, self.caps.multishot_recv) {
            // A length of zero: anything else is EINVAL before 6.17.
            (Some(_), true) => (Kind::Recv, opcode::RecvMulti::new(types::Fd(fd), 0).build()),
            (Some(_), false) => {
                let recv = opcode::Recv::new(types::Fd(fd), ptr::null_mut(), self.buffer_bytes as u32).buf_group(0).build();
                (Kind::Recv, recv.flags(squeue::Flags::BUFFER_SELECT))
            }
            (None, _) => {
                self.slot(token).fd = fd;
                let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
                (Kind::Poll, opcode::PollAdd::new(types::Fd(fd), events).build())
            }
        };
        let entry = entry.user_data(user_data(kind, token.slot, token.generation));
        match self.scarce {
            true => self.starved.push_back(entry),
            false => self.submit_entry(entry),
        }
    }

    fn recv_stop(&mut self, token: Token) {
        let kind = if self.buffers.is_some() { Kind::Recv } else { Kind::Poll };
        let target = user_data(kind, token.slot, token.generation);
        // One that waits for its turn has it now, so that it comes to an end.
        if let Some(index) = self.starved.iter().position(|entry| entry.get_user_data() == target)
            && let Some(entry) = self.starved.remove(index)
        {
            self.submit_entry(entry);
        }
        self.cancel(target);
    }

    /// All buffers are back: shows them to the kernel, and tries receives that had none.
    fn feed(&mut self) {
        let Some(buffers) = &mut self.buffers else { return };
        buffers.publish();
        for _ in 0..buffers.count() {
            let Some(entry) = self.starved.pop_front() else { break };
            self.submit_entry(entry);
        }
        self.scarce = !self.starved.is_empty();
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
                self.scarce = true;
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
        } else {
            self.accept_stop(index);
        }
    }
}

impl Driver for UringDriver {
    fn push(&mut self, op: Op) {
        match op {
            Op::Send { token, fd, chunk } => self.send(token, fd, chunk),
            Op::Recv { token, fd } => self.recv(token, fd),
            Op::RecvStop { token, .. } => self.recv_stop(token),
            Op::Accept { listener } => self.accept(listener),
            Op::AcceptStop { listener } => self.accept_stop(listener),
            Op::Shutdown { fd, how } => shutdown(fd, how),
            Op::Close { fd, reset } => close(fd, reset),
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, each: &mut dyn FnMut(Completion<'_>)) -> io::Result<()> {
        if !self.doorbell_armed {
            self.doorbell_armed = true;
            let read = opcode::Read::new(types::Fd(self.waker.fd()), ptr::from_mut(self.doorbell).cast(), 8).build();
            self.submit_entry(read.user_data(user_data(Kind::Doorbell, 0, 0)));
        }
        self.feed();
        while !self.fill() {
            self.enter(Some(Duration::ZERO))?;
        }
        // Those that are still to be tried must not wait for anybody.
        self.enter(if self.scarce { Some(Duration::ZERO) } else { timeout })?;
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
fn setup(caps: &Capabilities, sizes: Sizes, restricted: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // A child of a fork must not share the rings; CLAMP takes what the kernel allows of the sizes asked for.
    builder.dontfork().setup_clamp().setup_cqsize(sizes.completions);
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
    if restricted {
        builder.setup_r_disabled();
    }
    builder.build(sizes.submissions)
}

/// The operations that a ring with these capabilities is asked for, and no others.
fn allowed(caps: &Capabilities) -> [u8; 5] {
    let receive = if caps.buffer_ring { opcode::Recv::CODE } else { opcode::PollAdd::CODE };
    [opcode::Accept::CODE, opcode::Send::CODE, opcode::AsyncCancel::CODE, opcode::Read::CODE, receive]
}

/// Has the kernel answer EACCES to every operation, flag and registration that the capabilities do not allow
/// (io_uring_register(2), IORING_REGISTER_RESTRICTIONS, since 5.10), then enables the ring, which makes
/// the calling thread its single issuer.
fn restrict(ring: &IoUring, caps: &Capabilities) -> io::Result<()> {
    let mut rules: Vec<Restriction> = allowed(caps).into_iter().map(Restriction::sqe_op).collect();
    // Numbers of enum io_uring_register_op, which the crate keeps to itself.
    const PBUF_RING: u8 = 22;
    const IOWQ_MAX_WORKERS: u8 = 19;
    rules.push(Restriction::register_op(IOWQ_MAX_WORKERS));
    if caps.buffer_ring {
        rules.push(Restriction::register_op(PBUF_RING));
        rules.push(Restriction::sqe_flags_allowed(squeue::Flags::BUFFER_SELECT.bits()));
    }
    ring.submitter().register_restrictions(&mut rules)?;
    ring.submitter().register_enable_rings()
}

/// Finds an entry that the capabilities do not allow. The kernel's restrictions know operations; the flags inside
/// them (`ioprio` of an accept or a receive) are only seen here. In debug builds every entry passes through.
fn check(entry: &squeue::Entry, caps: &Capabilities) -> Result<(), String> {
    const BYTES: usize = size_of::<squeue::Entry>();
    const { assert!(BYTES == 64, "struct io_uring_sqe") };
    // SAFETY: the entry is `repr(C)` around the kernel's 64-byte structure, and the crate makes all of it
    // from zeroes, so every byte is initialised.
    let bytes: &[u8; BYTES] = unsafe { &*ptr::from_ref(entry).cast() };
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (operation, flags, priority) = (bytes[0], bytes[1], u16::from_ne_bytes([bytes[2], bytes[3]]));
    let (length, operation_flags) = (word(24), word(28));
    let refuse = |what: &str| Err(format!("{what} (operation {operation}, flags {flags:#x}, ioprio {priority:#x}) with {caps}"));
    if !allowed(caps).contains(&operation) {
        return refuse("an operation that is not allowed");
    }
    if split(word(32) as u64 | (word(36) as u64) << 32).0.is_none() {
        return refuse("an entry without a kind");
    }
    let selects = flags & squeue::Flags::BUFFER_SELECT.bits() != 0;
    if flags & !squeue::Flags::BUFFER_SELECT.bits() != 0 || selects != (operation == opcode::Recv::CODE) {
        return refuse("flags that are not used");
    }
    /// IORING_ACCEPT_MULTISHOT and IORING_RECV_MULTISHOT of <linux/io_uring.h>.
    const ACCEPT_MULTISHOT: u16 = 1;
    const RECV_MULTISHOT: u16 = 2;
    match (operation, priority) {
        (_, 0) => {}
        (opcode::Accept::CODE, ACCEPT_MULTISHOT) if caps.multishot_accept => {}
        (opcode::Recv::CODE, RECV_MULTISHOT) if !caps.multishot_recv => return refuse("a multishot receive"),
        (opcode::Recv::CODE, RECV_MULTISHOT) if length == 0 => {}
        _ => return refuse("an ioprio that is not allowed"),
    }
    // Multishot polls came with 5.13, flags of a cancellation with 5.19.
    if operation == opcode::PollAdd::CODE && length != 0 || operation == opcode::AsyncCancel::CODE && operation_flags != 0 {
        return refuse("flags of a later kernel");
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Capabilities = Capabilities {
        buffer_ring: false,
        multishot_recv: false,
        multishot_accept: false,
        coop_taskrun: false,
        single_issuer: false,
        defer_taskrun: false,
        submit_all: false,
        no_sqarray: false,
        min_timeout: false,
    };
    const NEW: Capabilities = Capabilities { buffer_ring: true, multishot_recv: true, multishot_accept: true, ..OLD };

    fn named(entry: squeue::Entry) -> squeue::Entry {
        entry.user_data(user_data(Kind::Accept, 0, 0))
    }

    #[test]
    fn an_entry_that_the_tier_does_not_have_is_found_before_the_kernel_sees_it() {
        let fd = types::Fd(0);
        let multishot_accept = || named(opcode::AcceptMulti::new(fd).build());
        let multishot_recv = || named(opcode::RecvMulti::new(fd, 0).build());
        let poll = || named(opcode::PollAdd::new(fd, 1).build());
        let multishot_poll = named(opcode::PollAdd::new(fd, 1).multi(true).build());
        let received = || opcode::Recv::new(fd, ptr::null_mut(), 4096).buf_group(0).build();
        assert_eq!(check(&multishot_accept(), &NEW), Ok(()));
        assert!(check(&multishot_accept(), &OLD).is_err());
        assert_eq!(check(&multishot_recv(), &NEW), Ok(()));
        assert!(check(&multishot_recv(), &Capabilities { multishot_recv: false, ..NEW }).is_err());
        assert!(check(&multishot_recv(), &OLD).is_err());
        assert_eq!(check(&poll(), &OLD), Ok(()));
        assert!(check(&multishot_poll, &OLD).is_err() && check(&poll(), &NEW).is_err());
        assert_eq!(check(&named(received().flags(squeue::Flags::BUFFER_SELECT)), &NEW), Ok(()));
        assert!(check(&named(received()), &NEW).is_err(), "a receive into no buffer");
        assert!(check(&named(received().flags(squeue::Flags::IO_LINK)), &NEW).is_err());
        assert!(check(&named(opcode::Nop::new().build()), &NEW).is_err(), "never used");
        assert!(check(&opcode::Read::new(fd, ptr::null_mut(), 8).build(), &NEW).is_err(), "no kind");
    }

    #[test]
    fn a_restricted_ring_refuses_what_its_tier_does_not_have_and_does_the_rest() {
        let caps = match Capabilities::probe() {
            Ok(caps) => caps,
            Err(why) => return eprintln!("SKIPPED: {why}"),
        };
        let old = caps.masked("tier=5.15").expect("a tier");
        let mut ring = setup(&old, Sizes::default(), true).expect("a disabled ring");
        restrict(&ring, &old).expect("restrictions came with 5.10");
        for (entry, expected) in [
            (opcode::PollAdd::new(types::Fd(-1), 1).build(), -libc::EBADF),
            (opcode::Nop::new().build(), -libc::EACCES),
            (opcode::Recv::new(types::Fd(-1), ptr::null_mut(), 0).build(), -libc::EACCES),
        ] {
            // SAFETY: no entry points to memory.
            unsafe { ring.submission().push(&entry) }.expect("an empty queue");
            // The kernel before 5.18 stops a batch at a refused entry; a batch here is one.
            ring.submit_and_wait(1).expect("submitted");
            assert_eq!(ring.completion().next().map(|entry| entry.result()), Some(expected));
        }
        let page = Buffers::new(2, 64);
        // SAFETY: the page outlives the ring's use, and the registration is refused.
        let refused = unsafe { ring.submitter().register_buf_ring_with_flags(page.address(), 2, 0, 0) };
        assert_eq!(refused.map_err(|error| error.raw_os_error()), Err(Some(libc::EACCES)));
    }

    #[test]
    fn sizes_are_four_numbers_that_a_ring_can_have() {
        let sizes = Sizes { submissions: 8, completions: 64, buffers: 4, buffer_bytes: 256 };
        assert_eq!(Sizes::from_text("8,64, 4,256"), Some(sizes));
        for bad in ["", "8,64,4", "8,64,3,256", "0,64,4,256", "8,64,70000,256", "a,b,c,d"] {
            assert_eq!(Sizes::from_text(bad), None, "{bad}");
        }
    }
}
