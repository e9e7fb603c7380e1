//! Bodies of requests on their way in, and of responses on their way out: what of them is in memory, and what in files.
//!
//! ```text
//!   in:   client -> exchange.body --64 KiB--> file           complete: memory, or the file whole
//!   out:  handler -> held -> output --send--> client
//!                     |        ^
//!                     +-> file-+                             once the output is full, everything goes through the file
//! ```
//!
//! One disk job per body is in flight at a time, so the bytes stay in order. Whatever is written down counts against the
//! process's quota until the file is gone.

use std::{collections::VecDeque, fs::File, mem, sync::Arc};

use super::{Engine, Micros, Token};
use crate::{
    disk::{Direction, Done, Job, Outcome, Quota, Work},
    handler::{Body, Response},
    http1::{
        Phase,
        response::{self, Framing},
    },
    stream::Credit,
};

/// A file is read back in pieces of this size.
const READ_BYTES: u64 = 256 << 10;
/// While the disk is busy, a request body may gather this many times the memory limit before reading pauses.
const BODY_AHEAD: usize = 4;
/// When response memory is scarce, a connection's output takes no more once it holds this much.
const SCARCE_BYTES: usize = 16 << 10;
/// After a write failed (a full disk), large bodies are refused at once for this long.
const SPOOL_PAUSE: Micros = 5_000_000;

/// A share of the spool quota, given back when dropped.
#[derive(Debug)]
pub struct Reserved {
    quota: Arc<Quota>,
    bytes: u64,
}

impl Reserved {
    fn new(quota: Arc<Quota>) -> Reserved {
        Reserved { quota, bytes: 0 }
    }

    fn add(&mut self, bytes: u64) -> bool {
        let fits = self.quota.take(bytes);
        self.bytes += if fits { bytes } else { 0 };
        fits
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.quota.give(self.bytes);
    }
}

/// A response body that is not all in memory, or not all made yet.
pub struct Outgoing {
    framing: Framing,
    /// Allowance of the handler that makes it; `None` for a file.
    credit: Option<Arc<Credit>>,
    /// Pieces that the handler has no credit back for.
    held: VecDeque<Vec<u8>>,
    spool: Option<Spool>,
    /// A disk job is in flight.
    busy: bool,
    /// Everything has come; false: but not as much as there should have been.
    end: Option<bool>,
}

struct Spool {
    file: Option<Arc<File>>,
    read: u64,
    written: u64,
    reserved: Reserved,
}

impl Outgoing {
    /// Nothing to send until the handler makes more.
    pub fn waits_for_handler(&self) -> bool {
        self.end.is_none() && self.held.is_empty() && self.spool.is_none()
    }

    /// Tells the handler that nobody wants the rest.
    pub fn abandon(&self) {
        if let Some(credit) = &self.credit {
            credit.close();
        }
    }

    /// Writes a piece as the framing wants it. False: it was longer than the length that was told.
    fn write(&mut self, output: &mut Vec<u8>, piece: &[u8]) -> bool {
        match &mut self.framing {
            Framing::Chunked => response::write_chunk(output, piece),
            Framing::Close => output.extend_from_slice(piece),
            Framing::None => {}
            Framing::Length(left) => {
                let fits = piece.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                output.extend_from_slice(&piece[..fits]);
                *left -= fits as u64;
                return fits == piece.len();
            }
        }
        true
    }
}

/// Requests.
impl Engine {
    /// A piece of a request body has come.
    pub(super) fn body_arrived(&mut self, key: usize, bytes: &[u8], now: Micros) {
        let slot = &mut self.slots[key];
        slot.progress = now;
        slot.body_bytes += bytes.len() as u64;
        let Some(exchange) = &mut slot.arriving else { return };
        exchange.body.extend_from_slice(bytes);
        slot.charged += bytes.len();
        self.body_memory += bytes.len();
        if self.body_memory > self.limits.body_memory_total_bytes_max {
            self.stats.body_memory_full.add(1);
            return self.reject(key, Response::unavailable("The server has no memory for request bodies just now.\n"), now);
        }
        if exchange.body.len() > self.limits.body_memory_bytes_max {
            self.spool_request(key, now);
        }
    }

    /// True while a request body must not grow: the disk has to catch up first.
    pub(super) fn is_body_ahead(&self, key: usize) -> bool {
        let slot = &self.slots[key];
        let ahead = BODY_AHEAD * self.limits.body_memory_bytes_max.max(READ_BYTES as usize / BODY_AHEAD);
        slot.spooling && slot.arriving.as_ref().is_some_and(|exchange| exchange.body.len() >= ahead)
    }

    /// Refuses a body at its head when it cannot be taken in anyway.
    pub(super) fn body_announced(&mut self, key: usize, length: u64, now: Micros) {
        let large = length > self.limits.body_memory_bytes_max as u64;
        if large && self.spool_again.is_some_and(|again| now < again) {
            self.reject(key, insufficient_storage(), now);
        } else if self.body_memory >= self.limits.body_memory_total_bytes_max {
            self.stats.body_memory_full.add(1);
            self.reject(key, Response::unavailable("The server has no memory for request bodies just now.\n"), now);
        }
    }

    /// Sends what is in memory of a request body to the disk, unless something of it is on its way.
    fn spool_request(&mut self, key: usize, now: Micros) {
        let slot = &mut self.slots[key];
        let Some(exchange) = slot.arriving.as_mut().filter(|_| !slot.spooling) else { return };
        let quota = &self.quota;
        let reserved = exchange.reserved.get_or_insert_with(|| Reserved::new(quota.clone()));
        if !reserved.add(exchange.body.len() as u64) {
            self.stats.spool_full.add(1);
            return self.reject(key, insufficient_storage(), now);
        }
        slot.spooling = true;
        let work = Work::Write { file: exchange.file.clone(), offset: exchange.file_bytes, bytes: mem::take(&mut exchange.body) };
        self.disk.push(Job { token: slot.token, serial: slot.serial, direction: Direction::In, work });
    }

    /// The body's last byte has come. True: all of it is in one place; else the rest is on its way to the file.
    pub(super) fn body_gathered(&mut self, key: usize, now: Micros) -> bool {
        let slot = &mut self.slots[key];
        let Some(exchange) = &slot.arriving else { return true };
        if exchange.file.is_none() && !slot.spooling {
            return true;
        }
        slot.gathered = true;
        if !slot.spooling && exchange.body.is_empty() {
            return true;
        }
        self.spool_request(key, now);
        false
    }

    fn request_spooled(&mut self, key: usize, outcome: Result<Outcome, std::io::Error>, now: Micros) {
        let slot = &mut self.slots[key];
        slot.spooling = false;
        let Some(exchange) = &mut slot.arriving else { return };
        match outcome {
            Ok(Outcome::Written { file, length, mut buffer }) => {
                exchange.file = Some(file);
                exchange.file_bytes += length;
                slot.progress = now;
                slot.charged -= length as usize;
                self.body_memory -= length as usize;
                if exchange.body.is_empty() {
                    buffer.clear();
                    exchange.body = buffer;
                }
                let over = exchange.body.len() > self.limits.body_memory_bytes_max;
                if slot.gathered && exchange.body.is_empty() {
                    slot.gathered = false;
                    self.request_ready(key, &[], now);
                } else if slot.gathered || over {
                    self.spool_request(key, now);
                }
            }
            Ok(Outcome::Read { .. }) => unreachable!("nothing of a request is read before it is complete"),
            Err(error) => self.spool_failed(key, &error, now),
        }
        self.proceed(key, now);
    }

    fn spool_failed(&mut self, key: usize, error: &std::io::Error, now: Micros) {
        self.stats.spool_errors.add(1);
        self.spool_again = Some(now + SPOOL_PAUSE);
        tracing::error!(%error, "a body could not be written to the spool; try: --spool-dir on a disk with room");
        self.reject(key, insufficient_storage(), now);
    }
}

/// Responses.
impl Engine {
    /// The rest of the body whose head was just written: from a file, or from a handler at work.
    pub(super) fn send_later(&mut self, key: usize, body: Body, framing: Framing) {
        let mut outgoing = Outgoing { framing, credit: None, held: VecDeque::new(), spool: None, busy: false, end: None };
        match body {
            Body::Stream(stream) if framing == Framing::None => {
                // HEAD, 204, 304: the handler may go on, but nothing is sent of it.
                return stream.credit.discard();
            }
            Body::Stream(stream) => outgoing.credit = Some(stream.credit),
            Body::File { file, offset, length } if framing != Framing::None => {
                let reserved = Reserved::new(self.quota.clone());
                outgoing.spool = Some(Spool { file: Some(file), read: offset, written: offset + length, reserved });
                outgoing.end = Some(true);
            }
            _ => return,
        }
        self.slots[key].outgoing = Some(Box::new(outgoing));
    }

    /// A whole body for which there is no room in memory.
    pub(super) fn send_through_file(&mut self, key: usize, bytes: Vec<u8>, framing: Framing) {
        let spool = Spool { file: None, read: 0, written: 0, reserved: Reserved::new(self.quota.clone()) };
        let held = VecDeque::from([bytes]);
        let outgoing = Outgoing { framing, credit: None, held, spool: Some(spool), busy: false, end: Some(true) };
        self.slots[key].outgoing = Some(Box::new(outgoing));
        if !self.spool_response(key) {
            self.stats.spool_full.add(1);
            self.cut_off(key, "there is room for it neither in memory nor in the spool; try: a larger --limit-spool");
        }
    }

    /// A handler has made another piece of the body that is being sent.
    pub fn piece(&mut self, token: Token, serial: u64, piece: Vec<u8>, now: Micros) {
        if let Some(key) = self.streaming(token, serial) {
            let slot = &mut self.slots[key];
            slot.since = slot.since.max(now);
            if let Some(outgoing) = &mut slot.outgoing {
                outgoing.held.push_back(piece);
            }
            self.pump(key, now);
        }
    }

    /// Whoever makes the next piece may take longer over it.
    pub fn extended(&mut self, token: Token, serial: u64, since: Micros, now: Micros) {
        if let Some(key) = self.streaming(token, serial) {
            let slot = &mut self.slots[key];
            slot.since = slot.since.max(since);
            self.schedule(key, now);
        }
    }

    /// A handler has made the last piece; not `whole`: it failed before the end.
    pub fn ended(&mut self, token: Token, serial: u64, whole: bool, now: Micros) {
        if let Some(key) = self.streaming(token, serial) {
            if let Some(outgoing) = &mut self.slots[key].outgoing {
                outgoing.end = Some(whole);
            }
            self.pump(key, now);
            self.proceed(key, now);
        }
    }

    /// A disk job is over.
    pub fn disk_done(&mut self, done: Done, now: Micros) {
        let Some(key) = self.slots.get(done.token.slot as usize).filter(|slot| slot.token == done.token).map(|_| done.token.slot as usize)
        else {
            return; // The connection is gone, and its file with this.
        };
        let slot = &mut self.slots[key];
        if slot.serial != done.serial {
            return;
        }
        match done.direction {
            Direction::In => self.request_spooled(key, done.result, now),
            Direction::Out => self.response_spooled(key, done.result, now),
        }
    }

    fn streaming(&self, token: Token, serial: u64) -> Option<usize> {
        let key = token.slot as usize;
        let slot = self.slots.get(key)?;
        (slot.token == token && slot.serial == serial && slot.outgoing.is_some()).then_some(key)
    }

    fn response_spooled(&mut self, key: usize, outcome: Result<Outcome, std::io::Error>, now: Micros) {
        let slot = &mut self.slots[key];
        let Some(outgoing) = &mut slot.outgoing else { return };
        outgoing.busy = false;
        let spool = outgoing.spool.as_mut().expect("a disk job has a file");
        match outcome {
            Ok(Outcome::Written { file, length, .. }) => {
                spool.file = Some(file);
                spool.written += length;
                if let Some(credit) = &outgoing.credit {
                    credit.take(length);
                }
            }
            Ok(Outcome::Read { bytes }) if !bytes.is_empty() => {
                spool.read += bytes.len() as u64;
                self.write_piece(key, &bytes, now);
            }
            // A file that was made shorter meanwhile, or a disk that fails: the client must see that the end is missing.
            Ok(Outcome::Read { .. }) => self.cut_off(key, "the file became shorter while it was sent"),
            Err(error) => {
                self.stats.spool_errors.add(1);
                tracing::error!(%error, "a response could not go through its file");
                self.cut_off(key, "its file failed");
            }
        }
        self.pump(key, now);
        self.proceed(key, now);
    }

    fn write_piece(&mut self, key: usize, piece: &[u8], now: Micros) {
        self.prepare_output(key, now);
        let slot = &mut self.slots[key];
        let outgoing = slot.outgoing.as_mut().expect("a body on its way");
        if !outgoing.write(&mut slot.output, piece) && outgoing.end.is_none() {
            self.stats.faults.add(1);
            tracing::error!("the handler made more than the length it had told; the rest was cut off");
        }
    }

    /// Ends a body before its time.
    pub(super) fn cut_off(&mut self, key: usize, why: &str) {
        tracing::warn!("a response was cut off: {why}");
        if let Some(outgoing) = &mut self.slots[key].outgoing {
            outgoing.abandon();
            outgoing.held.clear();
            outgoing.spool = None;
            outgoing.end = Some(false);
        }
    }

    /// Moves a body on: into the output while that has room, else into the file, and out of it again.
    pub(super) fn pump(&mut self, key: usize, now: Micros) {
        loop {
            let slot = &mut self.slots[key];
            let Some(outgoing) = slot.outgoing.as_mut().filter(|outgoing| !outgoing.busy) else { return };
            let mark = match self.response_memory > self.limits.response_memory_total_bytes_max {
                true => SCARCE_BYTES,
                false => self.limits.response_buffer_bytes_max / 2,
            };
            let room = slot.output.len() < mark;
            let (token, serial) = (slot.token, slot.serial);
            match &mut outgoing.spool {
                Some(spool) if spool.read < spool.written => {
                    if room {
                        let length = READ_BYTES.min(spool.written - spool.read) as usize;
                        let file = spool.file.clone().expect("written to before");
                        let work = Work::Read { file, offset: spool.read, length };
                        self.disk.push(Job { token, serial, direction: Direction::Out, work });
                        outgoing.busy = true;
                    } else if !self.spool_response(key) {
                        return;
                    }
                }
                Some(_) if room || outgoing.held.is_empty() => outgoing.spool = None,
                Some(_) => {
                    if !self.spool_response(key) {
                        return;
                    }
                }
                None => match outgoing.held.pop_front() {
                    Some(piece) if room => {
                        if let Some(credit) = &outgoing.credit {
                            credit.take(piece.len() as u64);
                        }
                        self.write_piece(key, &piece, now);
                    }
                    Some(piece) => {
                        outgoing.held.push_front(piece);
                        let reserved = Reserved::new(self.quota.clone());
                        outgoing.spool = Some(Spool { file: None, read: 0, written: 0, reserved });
                    }
                    None => break,
                },
            }
        }
        self.finish_body(key, now);
    }

    /// Writes everything held behind what is in the file. False: there is nothing, or no room; then the handler waits.
    fn spool_response(&mut self, key: usize) -> bool {
        let slot = &mut self.slots[key];
        let Some(outgoing) = &mut slot.outgoing else { return false };
        let Some(spool) = &mut outgoing.spool else { return false };
        let length: u64 = outgoing.held.iter().map(|piece| piece.len() as u64).sum();
        if length == 0 || spool.written + length > self.limits.response_spool_bytes_max || !spool.reserved.add(length) {
            return false;
        }
        let bytes = outgoing.held.drain(..).reduce(|mut all, piece| {
            all.extend_from_slice(&piece);
            all
        });
        let work = Work::Write { file: spool.file.clone(), offset: spool.written, bytes: bytes.unwrap_or_default() };
        self.disk.push(Job { token: slot.token, serial: slot.serial, direction: Direction::Out, work });
        outgoing.busy = true;
        true
    }

    /// Ends the response when all of its body is in the output.
    fn finish_body(&mut self, key: usize, now: Micros) {
        let Some(outgoing) = &self.slots[key].outgoing else { return };
        // A length that was told is kept once its last byte is here, whatever the handler still does.
        let whole = match (outgoing.framing, outgoing.end) {
            (Framing::Length(0), _) => true,
            (_, None) => return,
            (Framing::Length(_), Some(_)) => false,
            (_, Some(end)) => end,
        };
        if let Some(credit) = &outgoing.credit {
            credit.discard();
        }
        self.prepare_output(key, now);
        let slot = &mut self.slots[key];
        let framing = slot.outgoing.take().map_or(Framing::None, |outgoing| outgoing.framing);
        if whole && framing == Framing::Chunked {
            slot.output.extend_from_slice(response::LAST_CHUNK);
        }
        if !whole {
            // Without the last chunk or the last byte, an orderly end tells enough; without any framing only a reset does.
            slot.reset |= framing == Framing::Close;
            slot.keep_alive = false;
            slot.last = true;
        }
        slot.since = now;
        if slot.http.phase() == Phase::Responding {
            slot.http.flushed(slot.keep_alive);
        }
    }
}

fn insufficient_storage() -> Response {
    Response::text("The server has no room for request bodies of this size just now.\n").status(507)
}
