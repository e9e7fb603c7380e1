//! The doorbell of a shard: an eventfd, and a flag that says whether anybody needs to be woken.
//!
//! While the ring thread is at work, ringing costs one atomic operation and no system call. The
//! thread declares that it is about to sleep with [`Waker::sleep`], looks at its inbox once more,
//! and waits in the kernel; whoever puts something into the inbox afterwards sees the flag and writes.
//! Both sides put a sequentially consistent operation between their store and their load, so at
//! least one of them sees the other (Dekker's argument): no wake-up is lost.
//!
//! The write is a plain write(2): sent through a ring it is punted to a kernel thread, which costs more
//! than a whole request (kernel-notes/doorbell.md).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Wakes one ring thread, or another that waits for a descriptor. Cheap to clone; any thread may ring.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Doorbell>);

#[derive(Debug)]
struct Doorbell {
    /// Blocking on purpose: on old kernels a non-blocking eventfd answers a read on the ring with EAGAIN at once.
    eventfd: File,
    sleeping: AtomicBool,
}

impl Waker {
    /// # Errors
    /// EMFILE or ENFILE: no descriptor is left.
    pub fn new() -> io::Result<Waker> {
        // SAFETY: eventfd(2) takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and nobody else owns it.
        let eventfd = unsafe { File::from_raw_fd(fd) };
        Ok(Waker(Arc::new(Doorbell { eventfd, sleeping: AtomicBool::new(false) })))
    }

    /// Ends the thread's sleep, or keeps it from falling asleep. Call it after the message is in the inbox.
    pub fn wake(&self) {
        if self.0.sleeping.swap(false, Ordering::SeqCst) {
            // EAGAIN (the counter is full) and EINTR both mean that a wake-up is already on its way.
            let _ = (&self.0.eventfd).write(&1u64.to_ne_bytes());
        }
    }

    /// The thread is about to sleep. It must look at its inbox after this, and not sleep if there is something.
    pub fn sleep(&self) {
        self.0.sleeping.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// The thread is awake again.
    pub fn awake(&self) {
        self.0.sleeping.store(false, Ordering::Relaxed);
    }

    /// The descriptor to watch; it is readable after a ring.
    pub fn fd(&self) -> RawFd {
        self.0.eventfd.as_raw_fd()
    }

    /// Takes the ring off the bell. Only when [`fd`](Waker::fd) is readable, else this blocks.
    pub fn drain(&self) {
        let _ = (&self.0.eventfd).read(&mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.eventfd.as_fd()
    }
}
