//! HTTP/1.1 on the server's side: bytes in, events out. No I/O, no clock, no allocation per request
//! once warm, no unsafe code.
//!
//! ```text
//!              bytes                                 handler's answer
//!                |                                          |
//!                v                                          v
//!   Head --head complete--> Body --last byte--> Handling --> Responding --flushed--> Head
//!     |                      |                                  |
//!     +------ Refusal -------+--- an answer like any other -----+--- or Closing, when it was the last
//! ```
//!
//! One [`Connection`] per client connection. Its owner holds the bytes and calls, in a loop,
//! [`Connection::next_event`] with those not yet consumed:
//!
//! - [`Event::Head`]: the head is in the [`Head`] that was passed in, as offsets into the bytes consumed by this call.
//! - [`Event::Body`]: a decoded piece of the body.
//! - [`Event::End`]: the request is complete; only now may a handler see it.
//! - [`Event::NeedData`]: come back with more bytes after those left over.
//! - [`Event::Paused`]: a request is being answered. The next one is looked at after
//!   [`Connection::flushed`].
//!
//! or gets a [`Refusal`]: the peer broke a rule. It knows its status and its reason; the connection
//! is `Responding` from then on, and closes after the answer.
//!
//! How the bytes were split on their way never changes the events (`http1/tests/corpus.rs`).

pub mod body;
pub mod connection;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod request;
pub mod response;
mod scan;
pub mod state;
mod target;
#[cfg(test)]
mod tests;

pub(crate) use self::target::is_host;
pub use self::{
    body::Framing,
    connection::{Connection, Event},
    error::Refusal,
    request::{Field, Head, Span, Version, is_forwarding},
    state::Phase,
};
