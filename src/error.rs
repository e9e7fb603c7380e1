//! What can keep a server from starting or from ending well. Every text ends with what to try.

use std::{fmt, io, path::PathBuf};

use crate::driver::capabilities::Unavailable;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An address could not be listened on.
    Bind { address: String, source: io::Error },
    /// `cores` names CPUs that this process may not run on.
    Cores { wanted: String, allowed: String },
    /// `backend` is `Uring` and io_uring cannot be used.
    NoUring(Unavailable),
    /// `URINGD_IO_MASK` cannot be understood.
    Mask(String),
    /// A thread, an eventfd, an epoll instance: something a shard needs could not be made.
    Start { what: &'static str, source: io::Error },
    /// A shard's driver failed while serving.
    Driver(io::Error),
    /// The Python interpreter could not be started.
    Interpreter { path: PathBuf, source: io::Error },
    /// The Python application could not be loaded; and what Python told about it, a traceback for the most part.
    Application { name: String, told: String },
    /// gunicorn's configuration file could not be evaluated; and what Python told about it.
    Settings { place: String, told: String },
    /// The process could not become another user's.
    Owner { who: String, source: io::Error },
    /// The file for the process id could not be had.
    PidFile { path: PathBuf, source: io::Error },
    /// It was told to stop before it served.
    Stopped,
    /// The drain limit was over before every request was answered.
    DrainLimit { lost: usize },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Bind { address, source } => {
                let remedy = match source.kind() {
                    io::ErrorKind::AddrInUse => "stop what listens there (ss -ltnp shows it), or choose another address with --bind",
                    io::ErrorKind::PermissionDenied => {
                        "a port from 1024 up, a directory that this user may write to, or CAP_NET_BIND_SERVICE"
                    }
                    io::ErrorKind::AddrNotAvailable => "an address of this machine (ip addr shows them)",
                    io::ErrorKind::InvalidInput => "--bind host:port, [v6]:port, :port, unix:PATH or fd://N",
                    _ => "another address with --bind",
                };
                write!(f, "cannot listen on {address}: {source}; try: {remedy}")
            }
            Error::Cores { wanted, allowed } => {
                write!(f, "--cores {wanted}: this process may run on CPUs {allowed} only; try: --cores all")
            }
            Error::NoUring(why) => write!(f, "--backend uring: {why}, or --backend auto"),
            Error::Mask(why) => write!(f, "{why}; try: without it"),
            Error::Start { what, source } => {
                write!(f, "cannot make {what}: {source}; try: higher limits (ulimit -n, ulimit -u), or fewer --cores and --handlers")
            }
            Error::Driver(source) => write!(f, "the kernel interface failed while serving: {source}; try: --backend epoll"),
            Error::Interpreter { path, source } => {
                write!(f, "cannot run the Python interpreter {}: {source}; try: --python with the path of one", path.display())
            }
            Error::Application { name, told } => {
                let (last, hint) = summary(told);
                write!(f, "cannot load the application {name} ({last}); try: {hint}")
            }
            Error::Settings { place, told } => {
                let (last, hint) = summary(told);
                write!(f, "cannot read the settings of {place} ({last}); try: {hint}")
            }
            Error::Owner { who, source } => {
                write!(f, "cannot run as {who}: {source}; try: a user and group that exist (getent passwd), with uringd started by root")
            }
            Error::PidFile { path, source } => {
                let remedy = match source.kind() {
                    io::ErrorKind::AlreadyExists => "stop that one, or another --pid",
                    _ => "--pid with a path that this user may write to",
                };
                write!(f, "cannot use {} for the process id: {source}; try: {remedy}", path.display())
            }
            Error::Stopped => write!(f, "stopped before it was ready to serve; try: again, when nothing stops it"),
            Error::DrainLimit { lost } => {
                write!(f, "stopped with {lost} requests unanswered; try: a longer --graceful-timeout")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Bind { source, .. }
            | Error::Interpreter { source, .. }
            | Error::Start { source, .. }
            | Error::Owner { source, .. }
            | Error::PidFile { source, .. }
            | Error::Driver(source) => Some(source),
            Error::NoUring(why) => Some(why),
            Error::Cores { .. }
            | Error::Mask(_)
            | Error::Application { .. }
            | Error::Settings { .. }
            | Error::Stopped
            | Error::DrainLimit { .. } => None,
        }
    }
}

impl Error {
    /// What Python told before, as it shows it: to be printed above the line that this error is.
    pub fn told(&self) -> Option<&str> {
        match self {
            Error::Application { told, .. } | Error::Settings { told, .. } => Some(split_hint(told).0),
            _ => None,
        }
    }
}

/// The last line of what Python told, and what to try.
fn summary(told: &str) -> (&str, &str) {
    let (said, hint) = split_hint(told);
    (said.trim_end().lines().next_back().unwrap_or("").trim(), hint)
}

/// What Python told about an application that could not be loaded, and what to try: its last line, when that is a hint.
fn split_hint(told: &str) -> (&str, &str) {
    told.rsplit_once("hint: ").map_or((told, "python3 -c 'import MODULE' in the same directory"), |(said, hint)| (said, hint.trim()))
}
