//! The phases of a connection, and the one function that changes them.
//!
//! ```text
//!          HeadEnd         BodyEnd           Respond            Flushed, keep-alive
//!   Head ----------> Body ---------> Handling -------> Responding ----------------> Head
//!     |               |                                  ^     |
//!     +---- Fail -----+----------------------------------+     +---- Flushed ----> Closing
//! ```
//!
//! A request without a body passes through `Body` as well, so that every request ends the same way.

/// Where a connection is in its current request. In the order that a request meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A request's head is awaited or has arrived in part.
    Head,
    /// The head is known; the body (perhaps an empty one) is not complete.
    Body,
    /// The request is complete and somebody works on it.
    Handling,
    /// An answer, or a refusal, is on its way.
    Responding,
    /// Nothing more is read as HTTP. There is no way out.
    Closing,
}

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    HeadEnd,
    BodyEnd,
    Respond,
    /// The peer broke a rule, or the owner's patience ended, before the request was complete.
    Fail,
    Flushed {
        keep_alive: bool,
    },
}

impl Phase {
    pub const ALL: [Phase; 5] = [Phase::Head, Phase::Body, Phase::Handling, Phase::Responding, Phase::Closing];

    /// The only place a connection changes phase. `None` is a bug in the caller, not in the peer.
    pub fn after(self, step: Step) -> Option<Phase> {
        Some(match (self, step) {
            (Phase::Head, Step::HeadEnd) => Phase::Body,
            (Phase::Body, Step::BodyEnd) => Phase::Handling,
            (Phase::Handling, Step::Respond) => Phase::Responding,
            (Phase::Head | Phase::Body, Step::Fail) => Phase::Responding,
            (Phase::Responding, Step::Flushed { keep_alive: true }) => Phase::Head,
            (Phase::Responding, Step::Flushed { keep_alive: false }) => Phase::Closing,
            _ => return None,
        })
    }
}

impl Step {
    pub const ALL: [Step; 6] =
        [Step::HeadEnd, Step::BodyEnd, Step::Respond, Step::Fail, Step::Flushed { keep_alive: true }, Step::Flushed { keep_alive: false }];
}
