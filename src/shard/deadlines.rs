//! A wheel of deadlines, one per connection, kept lazily.
//!
//! ```text
//!   buckets   [ . | . | A C | . | B | . . . ]      1,024 ticks of 16 ms: 16.8 seconds around
//!                   ^ now
//! ```
//!
//! A connection has at most one entry that counts, at or before its deadline. Moving a deadline back
//! therefore costs nothing: when the entry comes up too early, the owner puts it in again. Only an
//! earlier deadline makes a new entry; the old one is recognised as stale by its tick. Nothing here reads a clock.

use crate::{driver::Token, exchange::Micros};

const TICK_SHIFT: u32 = 14;
const BUCKETS: usize = 1024;
/// A bucket that held more than this many entries gives its memory back when it is emptied.
const BUCKET_KEPT: usize = 64;

/// What a connection remembers of its entry: the tick that it is in, or [`NO_ENTRY`].
pub type Tick = u64;
pub const NO_ENTRY: Tick = u64::MAX;

pub struct Deadlines {
    /// Everything up to this tick has come up.
    tick: Tick,
    buckets: Vec<Vec<(Token, Tick)>>,
    /// One bit per bucket with an entry.
    occupied: [u64; BUCKETS / 64],
}

impl Deadlines {
    pub fn new(now: Micros) -> Deadlines {
        Deadlines { tick: now >> TICK_SHIFT, buckets: vec![Vec::new(); BUCKETS], occupied: [0; BUCKETS / 64] }
    }

    /// Makes sure that the connection comes up at `due`, or earlier. `entry` is what it remembers.
    #[inline]
    pub fn schedule(&mut self, token: Token, due: Micros, entry: &mut Tick) {
        // Rounded up, so that what comes up is due; at most one turn of the wheel ahead.
        let tick = ((due >> TICK_SHIFT) + 1).clamp(self.tick + 1, self.tick + BUCKETS as u64 - 1);
        if tick < *entry {
            *entry = tick;
            let bucket = tick as usize % BUCKETS;
            self.buckets[bucket].push((token, tick));
            self.occupied[bucket / 64] |= 1 << (bucket % 64);
        }
    }

    /// Moves every entry that has come up into `due`. The owner of each compares its tick with what it
    /// remembers, and sets that to [`NO_ENTRY`] before it schedules again.
    pub fn expire(&mut self, now: Micros, due: &mut Vec<(Token, Tick)>) {
        let target = now >> TICK_SHIFT;
        let steps = target.saturating_sub(self.tick).min(BUCKETS as u64);
        for step in 1..=steps {
            let bucket = (self.tick + step) as usize % BUCKETS;
            if self.occupied[bucket / 64] & 1 << (bucket % 64) == 0 {
                continue;
            }
            self.occupied[bucket / 64] &= !(1 << (bucket % 64));
            due.append(&mut self.buckets[bucket]);
            if self.buckets[bucket].capacity() > BUCKET_KEPT {
                self.buckets[bucket] = Vec::new();
            }
        }
        self.tick = self.tick.max(target);
    }

    /// When the next entry comes up, if there is one.
    pub fn next(&self) -> Option<Micros> {
        let start = (self.tick as usize + 1) % BUCKETS;
        let (word, bit) = (start / 64, start % 64);
        for step in 0..=self.occupied.len() {
            let index = (word + step) % self.occupied.len();
            let mask = match step {
                0 => !0 << bit,
                _ if step == self.occupied.len() => !(!0 << bit),
                _ => !0,
            };
            let found = self.occupied[index] & mask;
            if found != 0 {
                let bucket = index * 64 + found.trailing_zeros() as usize;
                let ahead = (bucket + BUCKETS - start) % BUCKETS;
                return Some((self.tick + 1 + ahead as u64) << TICK_SHIFT);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Micros = 1_000_000;

    fn token(slot: u32) -> Token {
        Token { slot, generation: 1 }
    }

    fn expired(deadlines: &mut Deadlines, now: Micros) -> Vec<u32> {
        let mut due = Vec::new();
        deadlines.expire(now, &mut due);
        due.iter().map(|(token, _)| token.slot).collect()
    }

    #[test]
    fn entries_come_up_once_when_due_and_in_order() {
        let mut deadlines = Deadlines::new(5 * SECOND);
        let mut entries = [NO_ENTRY; 3];
        for (slot, due) in [(0, 7 * SECOND), (1, 6 * SECOND), (2, 9 * SECOND)] {
            deadlines.schedule(token(slot), due, &mut entries[slot as usize]);
        }
        assert!(expired(&mut deadlines, 5_900_000).is_empty());
        assert_eq!(expired(&mut deadlines, 7_050_000), [1, 0]);
        assert!(expired(&mut deadlines, 7_060_000).is_empty());
        assert_eq!(expired(&mut deadlines, 20 * SECOND), [2]);
        assert_eq!(deadlines.next(), None);
    }

    #[test]
    fn a_later_deadline_costs_no_entry_and_an_earlier_one_makes_one() {
        let mut deadlines = Deadlines::new(0);
        let mut entry = NO_ENTRY;
        deadlines.schedule(token(0), 2 * SECOND, &mut entry);
        let first = entry;
        deadlines.schedule(token(0), 9 * SECOND, &mut entry);
        assert_eq!(entry, first);
        deadlines.schedule(token(0), SECOND, &mut entry);
        assert!(entry < first);
        assert_eq!(expired(&mut deadlines, 3 * SECOND), [0, 0], "the stale one comes up too, told by its tick");
    }

    #[test]
    fn a_far_deadline_comes_up_within_one_turn_of_the_wheel() {
        let mut deadlines = Deadlines::new(0);
        let mut entry = NO_ENTRY;
        deadlines.schedule(token(3), 3_600 * SECOND, &mut entry);
        let next = deadlines.next().expect("an entry");
        assert!(next < 17 * SECOND);
        assert_eq!(expired(&mut deadlines, next), [3]);
    }

    #[test]
    fn next_agrees_with_a_slow_search_wherever_the_wheel_stands() {
        for start in (0..3 * BUCKETS as u64).step_by(37) {
            for ahead in [1, 2, 63, 64, 65, 500, BUCKETS as u64 - 2] {
                let mut deadlines = Deadlines::new(start << TICK_SHIFT);
                let mut entry = NO_ENTRY;
                deadlines.schedule(token(0), (start + ahead) << TICK_SHIFT, &mut entry);
                assert_eq!(deadlines.next(), Some(entry << TICK_SHIFT), "{start} + {ahead}");
            }
        }
    }

    #[test]
    fn a_long_sleep_loses_no_entry() {
        let mut deadlines = Deadlines::new(0);
        let mut entry = NO_ENTRY;
        deadlines.schedule(token(0), SECOND, &mut entry);
        assert_eq!(expired(&mut deadlines, 86_400 * SECOND), [0]);
        let mut again = NO_ENTRY;
        deadlines.schedule(token(0), 86_401 * SECOND, &mut again);
        assert_eq!(expired(&mut deadlines, 86_402 * SECOND), [0]);
    }
}
