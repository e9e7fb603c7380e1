//! Bodies too large for memory: unlinked files, written and read on threads of their own.
//!
//! A disk may take its time, and a ring thread must not wait for it. So the engine emits [`Job`]s as it
//! emits operations for the driver, one at a time per file, and gets a [`Done`] back with its answers.
//! The files have no name (O_TMPFILE): they vanish with their last descriptor, whatever happens to the process.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::driver::Token;

/// Threads that wait for the disk, for all cores: a second one, so that a slow file does not hold up the next.
const THREADS: usize = 2;

/// What is to be done for a connection.
#[derive(Debug)]
pub struct Job {
    pub token: Token,
    /// The request that it belongs to.
    pub serial: u64,
    pub direction: Direction,
    pub work: Work,
}

/// Whose body it is about: on its way in, the request's; on its way out, the response's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

#[derive(Debug)]
pub enum Work {
    /// Writes the bytes at this place. `None`: of a file that is made first.
    Write { file: Option<Arc<File>>, offset: u64, bytes: Vec<u8> },
    /// Reads up to `length` bytes from this place.
    Read { file: Arc<File>, offset: u64, length: usize },
}

/// What became of a [`Job`].
#[derive(Debug)]
pub struct Done {
    pub token: Token,
    pub serial: u64,
    pub direction: Direction,
    pub result: Result<Outcome, io::Error>,
}

#[derive(Debug)]
pub enum Outcome {
    /// All of it is written; the buffer comes back.
    Written { file: Arc<File>, length: u64, buffer: Vec<u8> },
    /// Fewer bytes than asked for: the file is shorter.
    Read { bytes: Vec<u8> },
}

/// What all spooled bodies of the process take up, in bytes.
#[derive(Debug)]
pub struct Quota {
    used: AtomicU64,
    limit: u64,
}

impl Quota {
    pub fn new(limit: u64) -> Quota {
        Quota { used: AtomicU64::new(0), limit }
    }

    /// Takes so many bytes of the quota; false when that would exceed it.
    pub fn take(&self, bytes: u64) -> bool {
        let fits = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.limit;
        if !fits {
            self.give(bytes);
        }
        fits
    }

    pub fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// The threads. They end with the last clone of this.
#[derive(Clone)]
pub struct Disk {
    jobs: Sender<(Job, Home)>,
}

/// Where an outcome goes: called on the disk's thread.
pub type Home = Arc<dyn Fn(Done) + Send + Sync>;

impl Disk {
    /// Files are made in `directory`.
    ///
    /// # Errors
    /// Threads that could not be started.
    pub fn start(directory: PathBuf) -> io::Result<Disk> {
        let (jobs, taken) = unbounded();
        for index in 0..THREADS {
            let (taken, directory) = (taken.clone(), directory.clone());
            thread::Builder::new().name(format!("disk-{index}")).spawn(move || work(&taken, &directory))?;
        }
        Ok(Disk { jobs })
    }

    pub fn submit(&self, job: Job, home: &Home) {
        // The threads outlive `self`.
        let _ = self.jobs.send((job, home.clone()));
    }
}

fn work(jobs: &Receiver<(Job, Home)>, directory: &Path) {
    for (job, home) in jobs {
        let Job { token, serial, direction, work } = job;
        home(Done { token, serial, direction, result: carry_out(work, directory) });
    }
}

fn carry_out(work: Work, directory: &Path) -> Result<Outcome, io::Error> {
    match work {
        Work::Write { file, offset, bytes } => {
            let file = file.map_or_else(|| tempfile::tempfile_in(directory).map(Arc::new), Ok)?;
            file.write_all_at(&bytes, offset)?;
            Ok(Outcome::Written { file, length: bytes.len() as u64, buffer: bytes })
        }
        Work::Read { file, offset, length } => {
            let mut bytes = vec![0; length];
            let mut filled = 0;
            while filled < length {
                match file.read_at(&mut bytes[filled..], offset + filled as u64) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            bytes.truncate(filled);
            Ok(Outcome::Read { bytes })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(work: Work) -> Result<Outcome, io::Error> {
        let disk = Disk::start(std::env::temp_dir()).expect("threads");
        let (home, came) = unbounded();
        let home: Home = Arc::new(move |done| home.send(done).expect("a test that waits"));
        disk.submit(Job { token: Token { slot: 1, generation: 2 }, serial: 3, direction: Direction::Out, work }, &home);
        let done = came.recv().expect("an outcome");
        assert_eq!((done.token.slot, done.serial, done.direction), (1, 3, Direction::Out));
        done.result
    }

    #[test]
    fn what_was_written_is_read_back_from_the_same_nameless_file() {
        let Ok(Outcome::Written { file, length, .. }) = done(Work::Write { file: None, offset: 0, bytes: b"abc".to_vec() }) else {
            panic!("not written");
        };
        assert_eq!(length, 3);
        let more = Work::Write { file: Some(file.clone()), offset: 3, bytes: b"defg".to_vec() };
        assert!(matches!(done(more), Ok(Outcome::Written { length: 4, .. })));
        let Ok(Outcome::Read { bytes }) = done(Work::Read { file, offset: 2, length: 100 }) else { panic!("not read") };
        assert_eq!(bytes, b"cdefg");
    }

    #[test]
    fn a_full_disk_is_told() {
        let full = Arc::new(File::options().write(true).open("/dev/full").expect("Linux has /dev/full"));
        let error = done(Work::Write { file: Some(full), offset: 0, bytes: vec![0; 9] }).expect_err("full");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn the_quota_is_never_exceeded_and_comes_back() {
        let quota = Quota::new(10);
        assert!(quota.take(6) && !quota.take(5) && quota.take(4));
        quota.give(6);
        assert_eq!(quota.used(), 4);
        assert!(quota.take(6));
    }
}
