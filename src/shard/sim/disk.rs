//! The simulated disk: real nameless files, made-up times, and now and then an error.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use super::Scene;
use crate::{
    disk::{Done, Job, Outcome, Work},
    exchange::Micros,
};

#[derive(Default)]
pub struct SimDisk {
    /// Each with the time at which it is done.
    jobs: Vec<(Micros, Job)>,
    done: Vec<Done>,
    /// A job has failed: whatever needs the disk may be refused or cut off from here on.
    pub has_failed: bool,
}

impl SimDisk {
    pub fn submit(&mut self, job: Job, scene: &mut Scene) {
        let Scene { faults, random, now, .. } = scene;
        let time = match random.below(100) {
            0..3 if faults.slow_disk => random.micros(100_000_000),
            0..50 if faults.slow_disk => random.micros(1_000_000),
            _ => random.micros(2_000),
        };
        self.jobs.push((*now + time, job));
    }

    pub fn answer(&mut self) -> Option<Done> {
        self.done.pop()
    }

    pub fn has_answer(&self) -> bool {
        !self.done.is_empty()
    }

    pub fn can_step(&self, now: Micros) -> bool {
        self.next().is_some_and(|at| at <= now)
    }

    pub fn next(&self) -> Option<Micros> {
        self.jobs.iter().map(|(done, _)| *done).min()
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.done.is_empty()
    }

    /// Finishes one job of those whose time has come.
    pub fn step(&mut self, scene: &mut Scene) {
        let Scene { faults, random, now, .. } = scene;
        let due: Vec<usize> = (0..self.jobs.len()).filter(|&index| self.jobs[index].0 <= *now).collect();
        let (_, Job { token, serial, direction, work }) = self.jobs.swap_remove(random.pick(&due));
        let fails = faults.disk_fail && random.chance(10);
        self.has_failed |= fails;
        let result = if fails { fail(work) } else { Ok(carry_out(work)) };
        self.done.insert(0, Done { token, serial, direction, result });
    }
}

/// A full disk; or, when reading, a file that someone has made shorter.
fn fail(work: Work) -> io::Result<Outcome> {
    match work {
        Work::Write { .. } => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        Work::Read { .. } => Ok(Outcome::Read { bytes: Vec::new() }),
    }
}

fn carry_out(work: Work) -> Outcome {
    match work {
        Work::Write { file, offset, bytes } => {
            let file = file.unwrap_or_else(|| Arc::new(new_file()));
            file.write_all_at(&bytes, offset).expect("room for a test's file");
            Outcome::Written { file, length: bytes.len() as u64, buffer: bytes }
        }
        Work::Read { file, offset, length } => {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset).expect("never more is asked for than was written");
            Outcome::Read { bytes }
        }
    }
}

/// In memory where there is such a place, for ten thousand runs make many.
pub fn new_file() -> File {
    tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).expect("a place for a test's file")
}
