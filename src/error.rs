//! What can keep a server from starting or from ending well. Every text ends with what to try.

use std::{fmt, io};

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
    /// The drain limit was over before every request was answered.
    DrainLimit { lost: usize },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Bind { address, source } => {
                let remedy = match source.kind() {
                    io::ErrorKind::AddrInUse => "stop what listens there (ss -ltnp shows it), or choose another address with --bind",
                    io::ErrorKind::PermissionDenied => "a port from 1024 up, a directory that this user may write to, or CAP_NET_BIND_SERVICE",
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
            Error::DrainLimit { lost } => {
                write!(f, "stopped with {lost} requests unanswered; try: a longer --graceful-timeout")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Bind { source, .. } | Error::Start { source, .. } | Error::Driver(source) => Some(source),
            Error::NoUring(why) => Some(why),
            Error::Cores { .. } | Error::Mask(_) | Error::DrainLimit { .. } => None,
        }
    }
}
