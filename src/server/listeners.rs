//! Listening sockets: one per core and TCP address, in a SO_REUSEPORT group; one in all for a unix socket or an
//! inherited descriptor.

use std::{
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    config::Bind,
    error::{Error, Result},
};

/// The port when an address names none, as with gunicorn.
const PORT: u16 = 8000;

/// What a connection may have in the kernel unsent, in bytes: enough to keep a fast path full between two turns.
const NOT_SENT_BYTES: u32 = 256 << 10;

/// Every listening socket of the process.
#[derive(Debug)]
pub struct Listeners {
    /// By address, then by shard; an address with one socket for all shards has one only.
    sockets: Vec<Vec<OwnedFd>>,
    addresses: Vec<String>,
    /// Removed at the end.
    paths: Vec<PathBuf>,
}

impl Bind {
    /// Reads an address as `--bind` takes it. What looks like none of the other forms is taken for a host.
    pub fn from_text(text: &str) -> Bind {
        if let Some(path) = text.strip_prefix("unix:") {
            Bind::Unix(PathBuf::from(path))
        } else if let Some(Ok(fd)) = text.strip_prefix("fd://").map(str::parse) {
            Bind::Fd(fd)
        } else if text.starts_with(':') {
            Bind::Tcp(format!("0.0.0.0{text}"))
        } else if text.ends_with(']') || !text.contains(':') {
            Bind::Tcp(format!("{text}:{PORT}"))
        } else {
            Bind::Tcp(text.to_owned())
        }
    }
}

impl Listeners {
    /// Opens all of them, or none.
    ///
    /// # Errors
    /// [`Error::Bind`] for the first that cannot be had.
    pub fn open(binds: &[Bind], shards: usize, backlog: u32) -> Result<Listeners> {
        let mut listeners = Listeners { sockets: Vec::new(), addresses: Vec::new(), paths: Vec::new() };
        let backlog = backlog.min(i32::MAX as u32) as i32;
        for bind in binds {
            match bind {
                Bind::Tcp(text) => listeners.open_tcp(text, shards, backlog).map_err(failed(text.clone()))?,
                Bind::Unix(path) => {
                    let name = format!("unix:{}", path.display());
                    listeners.open_unix(path, backlog).map_err(failed(name))?;
                }
                Bind::Fd(number) => listeners.adopt(*number).map_err(failed(format!("fd://{number}")))?,
            }
        }
        Ok(listeners)
    }

    /// The descriptors on which this shard accepts; they stay open as long as `self`.
    pub fn of_shard(&self, shard: usize) -> Vec<RawFd> {
        self.sockets.iter().map(|group| group[shard.min(group.len() - 1)].as_raw_fd()).collect()
    }

    /// Where a client connects: `http://127.0.0.1:8000`, `unix:/run/x.sock`, ...
    pub fn addresses(&self) -> Vec<String> {
        self.addresses.clone()
    }

    fn open_tcp(&mut self, text: &str, shards: usize, backlog: i32) -> io::Result<()> {
        let address = text.to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
        if address.port() != 0 {
            // A group would let another process of this user's join in silence, and take half of the
            // connections; a socket outside of any group finds out.
            tcp_socket(address, false)?.bind(&address.into())?;
        }
        let mut address = address;
        let mut group = Vec::new();
        for _ in 0..shards {
            let socket = tcp_socket(address, true)?;
            socket.bind(&address.into())?;
            socket.listen(backlog)?;
            // With port 0, the first socket decides for all.
            address = socket.local_addr()?.as_socket().unwrap_or(address);
            group.push(OwnedFd::from(socket));
        }
        self.sockets.push(group);
        self.addresses.push(format!("http://{address}"));
        Ok(())
    }

    fn open_unix(&mut self, path: &Path, backlog: i32) -> io::Result<()> {
        if path.as_os_str().is_empty() {
            // bind(2) would choose an abstract name that nobody knows.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is empty"));
        }
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            match UnixStream::connect(path) {
                Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
                // Left behind by a process that is gone.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
                Err(error) => return Err(error),
            }
        }
        let listener = UnixListener::bind(path)?;
        // Again, for the length of the queue (listen(2) may be called twice).
        socket2::SockRef::from(&listener).listen(backlog)?;
        self.sockets.push(vec![OwnedFd::from(listener)]);
        self.addresses.push(format!("unix:{}", path.display()));
        self.paths.push(path.to_owned());
        Ok(())
    }

    /// Takes over a listening socket that was inherited.
    #[allow(unsafe_code)]
    fn adopt(&mut self, number: i32) -> io::Result<()> {
        if number < 3 || fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such descriptor was inherited"));
        }
        // SAFETY: the descriptor is open (just looked at), and whoever starts the process hands it over by naming it.
        let socket = unsafe { Socket::from_raw_fd(number) };
        if !socket.is_listener()? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a listening socket"));
        }
        socket.set_cloexec(true)?;
        socket.set_nonblocking(false)?;
        let local = socket.local_addr()?;
        if local.as_socket().is_some() {
            socket.set_tcp_nodelay(true)?;
            socket.set_tcp_notsent_lowat(NOT_SENT_BYTES)?;
        }
        self.addresses.push(match (local.as_socket(), local.as_pathname()) {
            (Some(address), _) => format!("http://{address}"),
            (None, Some(path)) => format!("unix:{}", path.display()),
            (None, None) => format!("fd://{number}"),
        });
        self.sockets.push(vec![OwnedFd::from(socket)]);
        Ok(())
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// A blocking socket on purpose: before 5.10.162, a non-blocking one makes an accept on the ring fail with EAGAIN
/// (kernel-notes/accept.md). Accepted connections inherit TCP_NODELAY, so that answers leave in one send, and
/// TCP_NOTSENT_LOWAT, so that a client that does not read costs the kernel little: without it, its socket takes
/// megabytes (tcp(7); inherited since 3.12, when the option came).
fn tcp_socket(address: SocketAddr, reuse_port: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(NOT_SENT_BYTES)?;
    Ok(socket)
}

fn failed(address: String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Bind { address, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart_by_their_form() {
        let tcp = |text: &str| Bind::Tcp(text.to_owned());
        assert_eq!(Bind::from_text("unix:/run/a.sock"), Bind::Unix("/run/a.sock".into()));
        assert_eq!(Bind::from_text("fd://3"), Bind::Fd(3));
        assert_eq!(Bind::from_text(":80"), tcp("0.0.0.0:80"));
        assert_eq!(Bind::from_text("localhost"), tcp("localhost:8000"));
        assert_eq!(Bind::from_text("[::1]"), tcp("[::1]:8000"));
        assert_eq!(Bind::from_text("[::1]:81"), tcp("[::1]:81"));
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_refused() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = taken.local_addr().expect("bound").to_string();
        let error = Listeners::open(&[Bind::Tcp(address)], 2, 16).expect_err("taken").to_string();
        assert!(error.contains("cannot listen on 127.0.0.1:") && error.contains("try:"), "{error}");
    }

    #[test]
    fn a_group_that_uringd_listens_on_is_refused_too() {
        let first = Listeners::open(&[Bind::Tcp("127.0.0.1:0".into())], 2, 16).expect("a free port");
        let address = first.addresses()[0].strip_prefix("http://").expect("TCP").to_owned();
        assert!(Listeners::open(&[Bind::Tcp(address)], 2, 16).is_err());
    }

    #[test]
    fn each_shard_has_a_socket_of_its_own_on_the_same_port() {
        let listeners = Listeners::open(&[Bind::Tcp("127.0.0.1:0".into())], 3, 16).expect("a free port");
        let mut fds: Vec<_> = (0..3).flat_map(|shard| listeners.of_shard(shard)).collect();
        fds.dedup();
        assert_eq!(fds.len(), 3);
    }
}
