//! What uringd does, seen from outside: the real binary, raw bytes, one file per behaviour.
//!
//! Every test runs once per backend; `URINGD_TEST_BACKENDS` chooses which (see `support::backends`).
//! `URINGD_TEST_SEED` repeats the random splits of a failed run.

mod support;

/// Bytes that are no HTTP, peers that vanish: answered or closed with a reason, never fatal.
mod bad_input;
/// `--bind`: TCP, IPv6, unix sockets, inherited descriptors, and what is in the way.
mod binds;
/// `--cores`: which CPUs get a shard, and that its thread stays there.
mod cores;
/// The shared HTTP/1.1 cases, however their bytes are split.
mod corpus;
/// TERM, INT and a second TERM: who still gets an answer, and with which status the process ends.
mod drain;
/// How the process says that it cannot start, or that it was asked wrongly.
mod exit_status;
/// Expect: 100-continue.
mod expect;
/// Where a request's body ends, however it arrives.
mod framing;
/// Peers that close one direction.
mod half_close;
/// Which connections serve another request.
mod keep_alive;
/// Facts about the kernel that uringd is built on, on a real ring.
mod kernel;
/// Every size limit, on both sides of its edge.
mod limits;
/// Several requests on the wire at once.
mod pipelining;
/// Handler threads: who runs, who waits, who is refused.
mod pool;
/// What every answer looks like, and the built-in targets.
mod responses;
/// Peers that are slow in each phase, and those they must not slow down.
mod slow_peer;
/// Rules about the code.
mod tidy;
