//! A worker process, as the threads that have to do with it know it, and what they say to each other about it.

use std::{
    io::Write,
    os::fd::OwnedFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use crossbeam_channel::Sender;

use super::zygote::Channel;
use crate::{
    config::Permit,
    exchange::Micros,
    handler::Response,
    pool::{Clock, Errand, Pools},
    stats::Stats,
};

/// However often it asks for more time, a request is over after this long.
pub(super) const RUN_MAX: Micros = 3_600_000_000;
/// A [`Worker::status`] before the worker's end is known.
const STATUS_UNKNOWN: i32 = -1;

/// What a courier is told.
pub enum Order {
    /// Work with this worker from now on. The last one's channel is closed after the present batch.
    Link(Link),
    /// This worker is given nothing more, and what it has is waited for.
    Leave(u64),
    /// This worker is dead.
    Drop(u64),
    Stop,
}

/// A way to one thread of a worker. While there is one, the worker is not free.
pub struct Link {
    pub channel: Channel,
    pub worker: Arc<Worker>,
    reporter: Reporter,
}

impl Link {
    pub fn new(channel: Channel, worker: Arc<Worker>, reporter: Reporter) -> Link {
        worker.links.fetch_add(1, Ordering::AcqRel);
        Link { channel, worker, reporter }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.worker.links.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.reporter.send(Report::Free);
        }
    }
}

/// A worker process, as far as several threads need to know it.
#[derive(Debug)]
pub struct Worker {
    pub id: u64,
    pub slot: usize,
    pub born: Instant,
    /// 0 until the zygote has told it.
    pub pid: AtomicI32,
    /// Signals sent through this never reach another process of the same number.
    pub handle: OnceLock<OwnedFd>,
    /// Ways to it that are in use.
    pub links: AtomicUsize,
    /// It was given a request.
    pub tried: AtomicBool,
    pub served: AtomicU64,
    /// How it ended (waitpid(2)), once that is known.
    pub status: AtomicI32,
    /// After so many requests it is replaced; 0: never.
    pub served_max: u64,
    /// It was asked to be replaced for that.
    pub used: AtomicBool,
}

/// What a courier tells the supervisor.
#[derive(Debug)]
pub enum Report {
    /// The worker is of no use any more.
    Broken {
        worker: Arc<Worker>,
        why: String,
        /// It has ended, or is about to: there is nobody at the other end.
        ended: bool,
    },
    /// A request of it took too long.
    Overdue {
        worker: Arc<Worker>,
    },
    /// It has served its number of requests.
    Used {
        worker: Arc<Worker>,
    },
    /// Nobody waits for anything from one of the workers any more.
    Free,
    /// One worker more, or less.
    Change(isize),
    Stop,
}

impl Worker {
    pub fn new(id: u64, slot: usize, served_max: u64) -> Worker {
        Worker {
            id,
            slot,
            born: Instant::now(),
            pid: AtomicI32::new(0),
            handle: OnceLock::new(),
            links: AtomicUsize::new(0),
            tried: AtomicBool::new(false),
            served: AtomicU64::new(0),
            status: AtomicI32::new(STATUS_UNKNOWN),
            served_max,
            used: AtomicBool::new(false),
        }
    }

    /// It can be sent a signal, and nobody waits for an answer of it.
    pub fn is_free(&self) -> bool {
        self.links.load(Ordering::Acquire) == 0 && self.pid.load(Ordering::Relaxed) != 0
    }

    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }

    /// It is known how it ended.
    pub fn has_status(&self) -> bool {
        self.status.load(Ordering::Acquire) != STATUS_UNKNOWN
    }
}

/// Where reports go.
#[derive(Clone)]
pub struct Reporter {
    pub reports: Sender<Report>,
    pub bell: Arc<std::os::unix::net::UnixStream>,
}

impl Reporter {
    pub fn send(&self, report: Report) {
        // The supervisor may have ended; then nobody has to know. A full socket has rung already.
        let _ = self.reports.send(report);
        let _ = (&*self.bell).write(&[0]);
    }
}

/// What all couriers share.
pub struct Shared {
    pub pools: Arc<Pools>,
    pub clock: Clock,
    /// CLOCK_MONOTONIC at the clock's zero, in seconds.
    pub monotonic_zero: f64,
    pub run: Micros,
    /// How long a worker that is to go may take to finish what it has.
    pub drain: Micros,
    pub permit: Permit,
    /// The counters of each core.
    pub stats: Vec<Arc<Stats>>,
    /// Different for each start of the process, so that request ids are not used twice in a log.
    pub start: u32,
    pub stopping: AtomicBool,
    pub reporter: Reporter,
}

/// Safe to give to a second worker when the first may have begun it (RFC 9110 section 9.2.2).
pub(super) fn may_be_repeated(errand: &Errand) -> bool {
    matches!(errand.exchange.request().method(), "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

/// The worker has to write down that it begins this one: only so is it known, should the worker die, whether another may have
/// it. One that may be repeated is repeated once without asking.
pub(super) fn is_marked(errand: &Errand) -> bool {
    !may_be_repeated(errand) || errand.lost_with.is_some()
}

/// The answer to a request that its worker took along.
pub(super) fn lost() -> Response {
    Response::text("The application's process ended before it had answered.\n").status(502)
}

/// Makes request ids: the start of the process, the courier, and a number that counts.
pub(super) struct RequestId {
    text: [u8; 20],
    count: u32,
}

impl RequestId {
    pub(super) fn new(start: u32, courier: u32) -> RequestId {
        let mut text = [b'0'; 20];
        hex(&mut text[..8], start);
        hex(&mut text[8..12], courier);
        RequestId { text, count: 0 }
    }

    pub(super) fn next(&mut self) -> &str {
        self.count = self.count.wrapping_add(1);
        hex(&mut self.text[12..], self.count);
        std::str::from_utf8(&self.text).unwrap_or_default()
    }
}

/// Fills all of `digits`, from the right.
fn hex(digits: &mut [u8], mut number: u32) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_count_and_tell_couriers_apart() {
        let mut ids = RequestId::new(0xabcd_ef01, 0x1_0002);
        assert_eq!(ids.next(), "abcdef01000200000001");
        assert_eq!(ids.next(), "abcdef01000200000002");
        ids.count = u32::MAX;
        assert_eq!(ids.next(), "abcdef01000200000000");
    }
}
