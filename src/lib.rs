//! A Linux-native HTTP server: one io_uring ring per core receives and sends, and only complete requests
//! reach the handlers. So no client, however slow or hostile, can hold the thing that does the work.
//!
//! This page is the map. To serve, see [`Server`]; for the program's options, `uringd --help`.
//!
//! # Bird's eye
//!
//! ```text
//!                         one shard per core, nothing shared on a request's way
//!              +--------------------------------------------------------------------------+
//!   client ----> driver ----Completion---> engine ----complete request----> pool: queue    |
//!   client <---- uring                     slots, deadlines       |          handler threads|
//!              | or epoll <------Op------- http1: bytes, events   v              |          |
//!              |                              ^      Runs::Inline: at once       |          |
//!              |                              +------- response, doorbell --------+         |
//!              +------^------------------------------^--------------------------------------+
//!                     |                              |
//!        couriers, on the same driver:      disk threads: bodies too large for memory
//!        Python worker processes
//! ```
//!
//! Two seams are plain data. Above, [`http1`] speaks bytes and events; below, [`driver`] takes `Op`s and
//! gives `Completion`s. Nothing between them makes a system call or reads a clock, so any order of events can be
//! replayed from a seed (`shard/sim.rs`).
//!
//! # One request, file by file
//!
//! 1. `server/mod.rs` opens a listening socket per core and starts the threads; each runs
//! 2. `shard/mod.rs`, the loop: answers in, requests out, operations to the driver, wait, completions in.
//! 3. `driver/uring.rs` turns completion queue entries into `Accepted`, `Received`, `Sent`.
//! 4. `shard/engine.rs` finds the slot, hands the bytes to
//! 5. `http1/connection.rs`, which parses the head in place (`request.rs`), decodes the body (`body.rs`) and moves
//!    the phase (`state.rs`). What breaks a rule becomes a `Refusal` (`error.rs`), answered like any request.
//! 6. A complete request is an `Exchange` (`exchange.rs`) and waits in its core's queue (`pool.rs`); or its handler
//!    runs inline.
//! 7. The handler (`handler.rs`) makes a `Response`; a streamed body follows in pieces (`stream.rs`).
//!    A Python application's request goes to a worker process instead: the ring thread itself writes it to the worker's socket and
//!    reads the answer (`python/dispatch.rs`, `python/courier.rs`); `python/multiplexer.rs` is a thread that does so where a worker has
//!    many requests at a time.
//! 8. `http1/response.rs` writes the head, the engine makes one send per connection and turn.
//! 9. Sent, the slot is back in `Head`; or the connection ends, politely (`slot.rs` draws it).
//!
//! Before the first request, `sources.rs` gathers the settings, gunicorn's and waitress's (`compat/`) among them.
//!
//! Bodies larger than memory should hold go through unlinked files on threads of their own (`disk.rs`,
//! `shard/engine/bodies.rs`).
//!
//! # Reading order
//!
//! `tests/it/keep_alive.rs` for what it does, `http1/state.rs`, `shard/engine.rs`, `driver/mod.rs`, `driver/uring.rs`; beside it
//! `kernel-notes/`, one page for each feature of the kernel that is relied on.
//!
//! # Invariants
//!
//! - A request reaches a handler only when it is complete and well-formed.
//! - Memory the kernel may touch belongs to the driver until its last completion; a slot is used again only when
//!   nothing of it is in flight; completions carry slot and generation. shutdown(2) before close.
//! - No lock, allocation, clock call or formatting per request on the ring thread (`tests/counting.rs`). Where a worker process
//!   answers, that thread makes the response that a handler would have made elsewhere, and allocates its fields and its body.
//! - Every queue, buffer and wait has a bound, and every bound an outcome that the client can see.
//! - `unsafe` only in `driver/`, where a descriptor is adopted, and in what the interpreter loads
//!   (`python/uringd_native.rs`). `http1` does no I/O and knows no clock.
//! - Errors are answers: a refusal goes out the way every answer does.
//!
//! # Panics
//!
//! The program unwinds. A handler's panic is caught where it is called, and is a 500 for that request alone. A panic on
//! a ring thread is a bug of ours and ends the process at once: the kernel may be writing into buffers that
//! unwinding would free.
//!
//! # Decisions that measurements changed
//!
//! - *Sends do not ask for MSG_WAITALL.* A short send is progress that the send limit can see, and the
//!   engine has to go on after a short send anyway; with it, a slow reader looks stuck for a whole piece.
//! - *The queue of a core is a lock-free channel, not a list of the engine's.* Handing 64 requests over costs one wake-up;
//!   a request that waits is taken back by a compare-and-swap on its ticket (`exchange.rs`), so what was refused never runs.
//! - *A ring thread whose requests could only wait does not interrupt a Python worker that computes* (SCHED_BATCH,
//!   `driver/policy.rs`). Where both share a CPU, each answer of a batch had cost three changes of process; a Flask request went from
//!   79 to 53 us of CPU.
//! - *The environ crosses as a tuple, not as a dict*: a key costs the worker three times its value. 0.9 us of 3.4 per request.
//! - *The ring thread speaks to the workers itself*, on the driver that it has for its clients. A thread between them, the first
//!   design, meant four threads to wake one after the other for a request that found everybody asleep: 88 us with one
//!   connection where this takes 74, and at 64 connections 8.9 us of CPU a request where this takes 7.8.
//! - *A request is left to a neighbour core only when its own workers would take longer than the hop* (1 ms, `pool.rs`). Given
//!   away whenever a neighbour was idle, requests of microseconds travelled alone and woke a thread each.
//! - *What a worker does for an ordinary request is also there in machine code* (`python/uringd_native.rs`), and what is not
//!   ordinary only in Python. A framework leaves no cache to the loop around it: of 54 us of CPU for a Flask request it saves
//!   seven, of which two show when the loop runs alone.
//! - *Disk work is done by threads, not on the ring*, so that both drivers and the simulation share one way.

#![deny(unsafe_code)]
// Comments speak to readers of the source, who can follow a link to what is private.
#![allow(rustdoc::private_intra_doc_links)]

pub mod builtin;
pub mod cli;
pub mod compat;
pub mod config;
pub mod disk;
pub mod doctor;
pub mod driver;
pub mod error;
pub mod exchange;
pub mod handler;
pub mod http1;
pub mod identity;
pub mod log;
pub mod pool;
pub mod proxy_protocol;
pub mod python;
pub mod server;
pub mod shard;
pub mod sources;
pub mod stats;
pub mod stream;

pub use crate::{
    config::Config,
    error::{Error, Result},
    handler::{Body, Handler, Request, RequestBody, Response, Runs},
    python::PythonApp,
    server::{Running, Server},
    stream::StreamWriter,
};
