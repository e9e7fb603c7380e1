//! Counters of one shard, which any thread may read and only the shard's own thread writes (but for [`Counter::add_shared`]).

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::http1::Refusal;

/// A number that one thread changes and others read: no lock, no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub fn add(&self, amount: u64) {
        self.set(self.read() + amount);
    }

    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The same from any thread, at the price of a locked instruction.
    pub fn add_shared(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one shard counts.
#[derive(Debug, Default)]
pub struct Stats {
    /// Connections accepted, and those open now.
    pub accepted: Counter,
    pub open: Counter,
    /// Complete requests, and answers begun, by the first digit of their status.
    pub requests: Counter,
    pub answers: [Counter; 6],
    /// Requests refused because the peer broke a rule, by the rule's place in [`Refusal::ALL`].
    refused: Refused,
    /// Requests answered 503: the queue was full, or the wait too long.
    pub queue_full: Counter,
    pub queue_timeouts: Counter,
    /// Requests answered 504: the handler took too long.
    pub run_timeouts: Counter,
    /// Requests never run because the client left first.
    pub withdrawn: Counter,
    /// Handlers that panicked (counted on their threads), and answers of theirs that could not be sent.
    pub panics: Counter,
    pub faults: Counter,
    /// Requests refused for lack of memory or room for their body, and disk jobs that failed.
    pub body_memory_full: Counter,
    pub spool_full: Counter,
    pub spool_errors: Counter,
    /// Fields by which somebody untrusted named the client, taken from requests.
    pub forwarding_removed: Counter,
    /// Fields left out of CGI-style environments (counted on handler threads).
    pub names_dropped: Counter,
    /// Connections closed because they did not begin with a PROXY protocol header, or not from where one is expected.
    pub proxy_refused: Counter,
    /// Connections closed at once because their client has as many as it may.
    pub ip_limited: Counter,
    /// Connections reset because the peer did not read its answer.
    pub send_timeouts: Counter,
    /// Connections that ended with an error of the peer's (ECONNRESET and the like).
    pub peer_errors: Counter,
    /// Pauses of accepting for lack of descriptors or memory.
    pub accept_pauses: Counter,
    /// Completions for a connection that was already gone: a bug if it is ever not 0.
    pub stale: Counter,
    /// Turns of the shard's loop begun, and the driver's entries into the kernel up to then.
    pub turns: Counter,
    pub enters: Counter,
}

/// One counter for each of [`Refusal::ALL`].
#[derive(Debug)]
struct Refused([Counter; Refusal::ALL.len()]);

impl Default for Refused {
    fn default() -> Refused {
        Refused([const { Counter(AtomicU64::new(0)) }; Refusal::ALL.len()])
    }
}

impl Stats {
    pub fn refused(&self, refusal: Refusal) {
        let index = Refusal::ALL.iter().position(|other| other.reason() == refusal.reason());
        if let Some(index) = index {
            self.refused.0[index].add(1);
        }
    }

    /// Reasons with their counts, those that never happened left out.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        let counts = Refusal::ALL.iter().zip(&self.refused.0).map(|(refusal, counter)| (refusal.reason(), counter.read()));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_counter_of_its_own() {
        let stats = Stats::default();
        Refusal::ALL.iter().for_each(|refusal| stats.refused(*refusal));
        assert_eq!(stats.refusals().len(), Refusal::ALL.len());
        assert!(stats.refusals().values().all(|count| *count == 1));
    }
}
