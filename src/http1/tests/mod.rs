//! Tests of the protocol core. `fuzzing::run` is the one function here that knows the API of
//! `Connection`; a test says which bytes it sends and what must come of them.

mod against_oracle;
mod corpus;
mod heads;
mod refusals;
mod states;

#[path = "../../../tests/fuzz/compare.rs"]
mod compare;
#[path = "../../../tests/it/oracle.rs"]
mod oracle;

use super::fuzzing::{self, End, Request, Run};
use crate::config::{Limits, Permit};

/// What `compare` takes from the crate, by the name that it has outside.
mod uringd {
    pub(super) use crate::{config, http1};
}

/// What comes of `bytes` with the default limits, once it is clear that the way they are cut makes no difference.
fn run(bytes: &[u8]) -> Run {
    let whole = run_with(bytes, &Limits::default());
    let everywhere: Vec<usize> = (1..bytes.len()).collect();
    assert_eq!(whole, fuzzing::run(bytes, &everywhere, &Limits::default(), Permit::default()), "byte by byte");
    whole
}

fn run_with(bytes: &[u8], limits: &Limits) -> Run {
    fuzzing::run(bytes, &[], limits, Permit::default())
}

/// The one request in `bytes`.
fn request(bytes: &[u8]) -> Request {
    let mut run = run(bytes);
    assert_eq!(run.requests.len(), 1, "{run:?}");
    run.requests.remove(0)
}

/// A small generator of random numbers (SplitMix64); the same seed gives the same run everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// Up to `count` places to cut `length` bytes, in their order.
    fn cuts(&mut self, count: usize, length: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> = (0..count).map(|_| self.below(length + 1)).collect();
        cuts.sort_unstable();
        cuts
    }
}
