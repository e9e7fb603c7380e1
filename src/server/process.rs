//! What belongs to the process as a whole: whom it runs as, and the file with its id.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{self, Gid, Group, Uid, User};
use rustix::process::Pid;

use crate::error::{Error, Result};

/// A user and a group.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    uid: Uid,
    gid: Gid,
}

impl Owner {
    /// By name or number. Without a group, the one of the user in the system's list; `None`: nobody was named.
    ///
    /// # Errors
    /// [`Error::Owner`]: there is no such user or group.
    pub fn named(user: Option<&str>, group: Option<&str>) -> Result<Option<Owner>> {
        if user.is_none() && group.is_none() {
            return Ok(None);
        }
        let unknown = |option: &str, name: &str| Error::Owner {
            who: format!("{option} {name}"),
            source: io::Error::new(io::ErrorKind::NotFound, "there is no such name on this machine"),
        };
        let user = user.map(|name| match name.parse().map(Uid::from_raw) {
            Ok(uid) => Ok((uid, User::from_uid(uid).ok().flatten().map(|user| user.gid))),
            Err(_) => {
                let user = User::from_name(name).ok().flatten();
                user.map(|user| (user.uid, Some(user.gid))).ok_or_else(|| unknown("--user", name))
            }
        });
        let group = group.map(|name| match name.parse().map(Gid::from_raw) {
            Ok(gid) => Ok(gid),
            Err(_) => Group::from_name(name).ok().flatten().map(|group| group.gid).ok_or_else(|| unknown("--group", name)),
        });
        let (uid, own_group) = user.transpose()?.unwrap_or((unistd::geteuid(), None));
        let gid = group.transpose()?.or(own_group).unwrap_or_else(unistd::getegid);
        Ok(Some(Owner { uid, gid }))
    }

    /// Gives it a file that was made for it, a socket for one.
    ///
    /// # Errors
    /// chown(2)'s.
    pub fn own(self, path: &Path) -> io::Result<()> {
        let found = fs::symlink_metadata(path)?;
        if (found.uid(), found.gid()) == (self.uid.as_raw(), self.gid.as_raw()) {
            return Ok(());
        }
        std::os::unix::fs::lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
    }

    /// Makes the process theirs, every thread of it, with their supplementary groups and none of the former ones.
    /// Nothing happens when it is already.
    ///
    /// # Errors
    /// [`Error::Owner`]: only root may change.
    pub fn assume(self) -> Result<()> {
        let failed =
            |source: nix::errno::Errno| Error::Owner { who: format!("user {} and group {}", self.uid, self.gid), source: source.into() };
        if (unistd::geteuid(), unistd::getegid()) == (self.uid, self.gid) {
            return Ok(());
        }
        let name = User::from_uid(self.uid).ok().flatten().and_then(|user| std::ffi::CString::new(user.name).ok());
        match name {
            Some(name) => unistd::initgroups(&name, self.gid),
            None => unistd::setgroups(&[self.gid]),
        }
        .and_then(|()| unistd::setgid(self.gid))
        .and_then(|()| unistd::setuid(self.uid))
        .map_err(failed)
    }
}

/// A file that has the process's id as long as it serves.
///
/// It is made early, while that is still allowed (a directory like /run is root's), and empty until the server is ready.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// # Errors
    /// [`Error::PidFile`]: the process that the file names is alive, or the file cannot be written.
    pub fn claim(path: &Path, owner: Option<Owner>) -> Result<PidFile> {
        let failed = |source| Error::PidFile { path: path.to_owned(), source };
        let named = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok()).and_then(Pid::from_raw);
        if let Some(other) = named.filter(|pid| Some(*pid) != Pid::from_raw(std::process::id().cast_signed()))
            && !matches!(rustix::process::test_kill_process(other), Err(rustix::io::Errno::SRCH))
        {
            let text = format!("process {} has it", other.as_raw_nonzero());
            return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, text)));
        }
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path).map_err(failed)?;
        owner.map_or(Ok(()), |owner| owner.own(path)).map_err(failed)?;
        Ok(PidFile { path: path.to_owned(), file })
    }

    /// # Errors
    /// [`Error::PidFile`]: a full disk, for one.
    pub fn write(&mut self) -> Result<()> {
        let line = format!("{}\n", std::process::id());
        self.file.write_all(line.as_bytes()).map_err(|source| Error::PidFile { path: self.path.clone(), source })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if fs::remove_file(&self.path).is_err() {
            // The directory may have become another's to change.
            let _ = self.file.set_len(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_named_or_numbered_and_must_exist() {
        assert!(Owner::named(None, None).expect("nobody").is_none());
        let root = Owner::named(Some("root"), None).expect("it exists").expect("an owner");
        assert_eq!((root.uid.as_raw(), root.gid.as_raw()), (0, 0));
        let numbers = Owner::named(Some("12345"), Some("54321")).expect("numbers").expect("an owner");
        assert_eq!((numbers.uid.as_raw(), numbers.gid.as_raw()), (12_345, 54_321));
        for (user, group) in [(Some("no such user"), None), (None, Some("no such group"))] {
            let error = Owner::named(user, group).expect_err("unknown").to_string();
            assert!(error.contains("no such") && error.contains("try:"), "{error}");
        }
    }

    #[test]
    fn a_pid_file_of_a_living_process_is_refused_and_a_dead_ones_is_taken_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        fs::write(&path, format!("{}\n", std::os::unix::process::parent_id())).expect("written");
        let error = PidFile::claim(&path, None).expect_err("its process lives").to_string();
        assert!(error.contains("try:"), "{error}");
        for stale in ["2147483646\n", "nonsense", ""] {
            fs::write(&path, stale).expect("written");
            let mut file = PidFile::claim(&path, None).expect("stale");
            assert_eq!(fs::read_to_string(&path).expect("there"), "", "empty until ready");
            file.write().expect("written");
            assert_eq!(fs::read_to_string(&path).expect("there"), format!("{}\n", std::process::id()));
            drop(file);
            assert!(!path.exists());
        }
    }
}
