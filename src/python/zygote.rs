//! The one Python process that uringd starts itself, and the socket to it.
//!
//! uringd has many threads and holds rings, so it must never fork Python from itself. It starts a zygote, single-threaded and
//! idle, which forks the workers when it is told to. Their ends of the sockets travel with the order.
//!
//! The program that the zygote runs is part of this binary, so the two sides of the protocol cannot differ in version, and
//! nothing has to be installed where the application lives.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::MemfdFlags,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType,
    },
    process::{Pid, PidfdFlags, Signal},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::PythonApp;

/// What the zygote and its workers run.
const SOURCE: &str = include_str!("../../python/uringd_worker.py");
/// The ordinary request of it as an extension module, made by build.rs; empty where that could not be done. The program
/// is whole without it.
const NATIVE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/uringd_native.so"));
/// The program finds its control socket as descriptor 3. A child is given one as its standard input without unsafe code, so
/// the first lines move it; not when the program runs itself again, for then it is there already.
const PRELUDE: &str = "import os, stat
if stat.S_ISSOCK(os.fstat(0).st_mode):
    os.dup2(0, 3)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
";
/// The version of the protocol that this side speaks.
const PROTOCOL: u32 = 1;
/// Longest record on the control socket, in bytes.
const RECORD_BYTES_MAX: usize = 64 << 10;
/// Most threads of a worker: the kernel lets 253 descriptors travel together (SCM_MAX_FD), and each thread has three.
pub const THREADS_MAX: usize = 64;
const PAGE_BYTES: u64 = 4096;
/// Where in the page the id of the request stands whose client is gone.
const PAGE_GONE: u64 = 0;
/// Where it says that the worker should end.
const PAGE_END: u64 = 4;
/// Where the worker says which request it began last: which marked one, unless it has many at a time.
const PAGE_BEGUN: u64 = 8;
/// How many answers of a batch it keeps back, to send them together; one byte.
const PAGE_HELD: u64 = 12;
/// A zygote that was told to end is given this long.
const END_WAIT: Duration = Duration::from_secs(5);
/// And gives this to its workers, in seconds. By then no request is left that anybody waits for.
const GRACE_SECONDS: u64 = 2;

/// uringd's ends of what joins it with one thread of a worker.
#[derive(Debug)]
pub struct Channel {
    pub data: UnixStream,
    /// Descriptors of bodies, both ways.
    pub descriptors: UnixStream,
    /// Memory that the worker has mapped. Written like a file, which needs no mapping here and no unsafe code.
    page: File,
}

/// What the zygote says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum News {
    Ready(About),
    Failed(String),
    #[serde(untagged)]
    Forked {
        forked: u64,
        pid: i32,
    },
    #[serde(untagged)]
    Unforked {
        forked: u64,
        error: String,
    },
    #[serde(untagged)]
    Exited {
        exited: i32,
        status: i32,
    },
}

/// The interpreter, as it names itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct About {
    pub pid: i32,
    pub python: String,
    pub implementation: String,
    pub protocol: u32,
    pub interface: Option<String>,
    /// What the operator should know.
    #[serde(default)]
    pub warning: Option<String>,
}

/// What the program says of a gunicorn.conf.py.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Evaluated {
    Settings(Map<String, Value>),
    Failed(String),
}

#[derive(Serialize)]
struct Start<'a> {
    app: &'a str,
    chdir: Option<&'a str>,
    pythonpath: &'a [String],
    env: &'a BTreeMap<String, String>,
    preload: bool,
    threads: usize,
    base: &'a BTreeMap<&'static str, String>,
    worker_class: Option<&'static str>,
    interface: Option<&'a str>,
    graceful_timeout: u64,
    config: Option<&'a str>,
    settings: &'a Map<String, Value>,
    workers: usize,
    /// This process.
    pid: u32,
    /// Nothing is forked and no hook is called.
    check: bool,
}

pub struct Zygote {
    child: Child,
    control: OwnedFd,
    /// The process at the other end, by number and by handle, once it has introduced itself. What was started may be a script
    /// around the interpreter.
    itself: Option<(i32, OwnedFd)>,
}

impl Zygote {
    /// Starts the interpreter and tells it about the application, of which there will be so many workers. What comes of it
    /// arrives as [`News`].
    ///
    /// # Errors
    /// Those of socketpair(2), memfd_create(2) and execve(2).
    pub fn start(app: &PythonApp, base: &BTreeMap<&'static str, String>, workers: usize) -> io::Result<Zygote> {
        let zygote = Zygote::spawn(&app.interpreter, true)?;
        zygote.begin(app, base, workers, false)?;
        Ok(zygote)
    }

    /// Starts the interpreter to load the application, whatever `preload` says, and for nothing else.
    ///
    /// # Errors
    /// As [`Zygote::start`].
    pub fn check(app: &PythonApp, base: &BTreeMap<&'static str, String>) -> io::Result<Zygote> {
        // It hears Ctrl-C: nobody else would end it.
        let zygote = Zygote::spawn(&app.interpreter, false)?;
        zygote.begin(app, base, 0, true)?;
        Ok(zygote)
    }

    /// Has a gunicorn.conf.py evaluated, a path or `python:MODULE`: those of the names that it sets, and their values. What
    /// is not plain data is an object whose only key is `type`.
    ///
    /// # Errors
    /// As [`Zygote::start`]; within, what Python told when it failed.
    pub fn settings(interpreter: &Path, config: &str, names: &[&str]) -> io::Result<Result<Map<String, Value>, String>> {
        let mut zygote = Zygote::spawn(interpreter, false)?;
        zygote.send(&serde_json::json!({ "settings": { "config": config, "names": names } }), &[])?;
        let record = zygote.record()?;
        let _ = zygote.child.wait();
        let Some(record) = record else {
            return Ok(Err("The Python interpreter ended before it had read the file.".to_owned()));
        };
        match serde_json::from_slice(&record) {
            Ok(Evaluated::Settings(settings)) => Ok(Ok(settings)),
            Ok(Evaluated::Failed(told)) => Ok(Err(told)),
            Err(_) => Err(invalid("the Python interpreter said something unknown")),
        }
    }

    /// The interpreter with the program. `apart`: in a process group of its own, so that Ctrl-C is for uringd alone, which
    /// then ends its workers in order.
    fn spawn(interpreter: &Path, apart: bool) -> io::Result<Zygote> {
        let (control, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(interpreter);
        command.args(["-c", &[PRELUDE, SOURCE].concat()]).stdin(Stdio::from(theirs));
        if apart {
            command.process_group(0);
        }
        Ok(Zygote { child: command.spawn()?, control, itself: None })
    }

    fn begin(&self, app: &PythonApp, base: &BTreeMap<&'static str, String>, workers: usize, check: bool) -> io::Result<()> {
        let start = Start {
            app: &app.app,
            chdir: app.chdir.as_ref().and_then(|path| path.to_str()),
            pythonpath: &app.pythonpath,
            env: &app.env,
            preload: app.preload || check,
            threads: app.threads,
            base,
            worker_class: app.greenlets.map(|_| "gevent"),
            interface: app.interface.as_deref(),
            graceful_timeout: GRACE_SECONDS,
            config: app.config.as_deref(),
            settings: &app.settings,
            workers,
            pid: std::process::id(),
            check,
        };
        let native = native_module();
        let descriptors: Vec<BorrowedFd<'_>> = native.iter().map(AsFd::as_fd).collect();
        self.send(&serde_json::json!({ "start": start }), &descriptors)
    }

    /// Tells it how many workers there are to be from now on, for its hook.
    pub fn say_workers(&self, count: usize) {
        // A zygote that is gone is noticed by the end of its socket.
        let _ = self.send(&serde_json::json!({ "workers": count }), &[]);
    }

    /// Has a worker forked. Its channels can be used at once; the kernel keeps what is sent early.
    ///
    /// # Errors
    /// The zygote is gone, or there are no descriptors left.
    pub fn fork(&self, id: u64, threads: usize) -> io::Result<Vec<Channel>> {
        let mut channels = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..threads {
            let (channel, ends) = Channel::pair()?;
            theirs.extend(ends);
            channels.push(channel);
        }
        let theirs: Vec<BorrowedFd<'_>> = theirs.iter().map(AsFd::as_fd).collect();
        self.send(&serde_json::json!({ "fork": id }), &theirs)?;
        Ok(channels)
    }

    /// The next record; `None`: the zygote is gone. Waits, so ask poll(2) first.
    ///
    /// # Errors
    /// recvmsg(2)'s; or `InvalidData`, when it is no record of the protocol.
    pub fn news(&self) -> io::Result<Option<News>> {
        let Some(record) = self.record()? else { return Ok(None) };
        serde_json::from_slice(&record).map(Some).map_err(|_| invalid("the Python zygote said something unknown"))
    }

    /// The next record, whatever it is.
    fn record(&self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; RECORD_BYTES_MAX];
        let mut control = RecvAncillaryBuffer::default();
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            match rustix::net::recvmsg(&self.control, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result?,
            }
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(invalid("a record of the Python zygote is too long"));
        }
        bytes.truncate(received.bytes);
        Ok(Some(bytes))
    }

    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    pub fn meet(&mut self, about: &About) {
        let handle = Pid::from_raw(about.pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
        self.itself = handle.map(|handle| (about.pid, handle));
    }

    /// The parent of the workers, once that is known.
    pub fn pid(&self) -> Option<i32> {
        self.itself.as_ref().map(|itself| itself.0)
    }

    /// The process that was started.
    pub fn child(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Ends a zygote that is of no use. Its workers end after what they are at.
    pub fn kill(mut self) {
        kill(&mut self.child, self.itself.as_ref());
    }

    /// Ends the zygote, and with it what is left of its workers.
    pub fn end(self) {
        let Zygote { mut child, control, itself } = self;
        drop(control);
        let until = Instant::now() + END_WAIT;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= until {
                tracing::warn!("the Python zygote did not end by itself; killed");
                return kill(&mut child, itself.as_ref());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn send(&self, record: &serde_json::Value, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = record.to_string();
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(invalid("the settings for the Python application are longer than 64 KiB"));
        }
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3 * THREADS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(invalid("too many threads in a worker"));
        }
        rustix::net::sendmsg(&self.control, &[IoSlice::new(bytes.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl About {
    /// # Errors
    /// A sentence, when the two sides do not understand each other.
    pub fn check(&self) -> Result<(), String> {
        if self.protocol == PROTOCOL {
            Ok(())
        } else {
            Err(format!("the worker program speaks protocol {}, not {PROTOCOL}", self.protocol))
        }
    }
}

impl Channel {
    /// A channel, and the worker's ends of it: data, descriptors, page.
    ///
    /// # Errors
    /// Those of socketpair(2) and memfd_create(2): mostly that no descriptors are left.
    pub fn pair() -> io::Result<(Channel, [OwnedFd; 3])> {
        let (data, worker_data) = UnixStream::pair()?;
        let (descriptors, worker_descriptors) = UnixStream::pair()?;
        let page = memory_file("uringd-page", MemfdFlags::NOEXEC_SEAL)?;
        page.set_len(PAGE_BYTES)?;
        let theirs = [worker_data.into(), worker_descriptors.into(), page.try_clone()?.into()];
        Ok((Channel { data, descriptors, page }, theirs))
    }

    /// Tells the worker that nobody waits for the answer to this request.
    pub fn client_gone(&self, id: u32) {
        // It is a hint: a worker that does not get it works in vain, no more.
        let _ = self.page.write_all_at(&id.to_le_bytes(), PAGE_GONE);
    }

    /// Which request the worker began last. When its channel has ended, what it has not begun it never will. 0: none.
    pub fn last_begun(&self) -> u32 {
        let mut id = [0; 4];
        self.page.read_exact_at(&mut id, PAGE_BEGUN).map_or(u32::MAX, |()| u32::from_le_bytes(id))
    }

    /// Tells the worker to end after its present request.
    pub fn end_soon(&self) {
        let _ = self.page.write_all_at(&1_u32.to_le_bytes(), PAGE_END);
    }

    /// How many of the requests that it has not answered the worker is done with.
    pub fn held(&self) -> usize {
        let mut held = [0];
        self.page.read_exact_at(&mut held, PAGE_HELD).map_or(0, |()| held[0].into())
    }

    /// Passes a descriptor to the worker, ahead of the frame that is about it.
    ///
    /// # Errors
    /// sendmsg(2)'s: the worker is gone.
    pub fn send_descriptor(&self, file: &File) -> io::Result<()> {
        let files = [file.as_fd()];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)), "there is room for one");
        rustix::net::sendmsg(&self.descriptors, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The descriptor that the worker sent ahead of its frame. `None`: it did not, or it is not a file whose bytes
    /// can be read without waiting.
    pub fn receive_file(&self) -> Option<File> {
        let mut byte = [0];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = rustix::net::recvmsg(&self.descriptors, &mut [IoSliceMut::new(&mut byte)], &mut control, flags).ok()?;
        if received.bytes != 1 || received.flags.contains(ReturnFlags::CTRUNC) {
            return None;
        }
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next().map(File::from),
            _ => None,
        })?;
        file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)
    }
}

/// A file of memory, which says whether it may be executed: since 6.3 the kernel asks, and may insist (sysctl vm.memfd_noexec).
fn memory_file(name: &str, may_be_executed: MemfdFlags) -> io::Result<File> {
    let file = match rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | may_be_executed) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?,
        file => file?,
    };
    Ok(File::from(file))
}

/// [`NATIVE`] as a file that an interpreter can load.
fn native_module() -> Option<File> {
    if NATIVE.is_empty() {
        return None;
    }
    let file = memory_file("uringd-native", MemfdFlags::EXEC).ok()?;
    file.write_all_at(NATIVE, 0).ok()?;
    Some(file)
}

fn kill(child: &mut Child, itself: Option<&(i32, OwnedFd)>) {
    // Errors: it has ended by itself.
    if let Some((_, handle)) = itself {
        let _ = rustix::process::pidfd_send_signal(handle, Signal::KILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fits_into_one_argument() {
        // MAX_ARG_STRLEN is 32 pages.
        assert!(PRELUDE.len() + SOURCE.len() < 32 * 4096);
    }

    #[test]
    fn nothing_in_the_program_looks_like_a_call_of_pip_to_pyenv() {
        // Its `python3` looks for these words among the arguments, and would run a script between us and Python.
        let words: Vec<&str> = SOURCE.split_whitespace().collect();
        assert!(!words.windows(2).any(|pair| pair == ["-m", "pip"]));
    }

    fn news(text: &str) -> Option<News> {
        serde_json::from_str(text).ok()
    }

    #[test]
    fn the_zygotes_records_are_understood_and_nothing_else() {
        let ready = r#"{"ready": {"pid": 7, "python": "3.11.7", "implementation": "cpython", "protocol": 1, "interface": null}}"#;
        assert!(matches!(news(ready), Some(News::Ready(about)) if about.check().is_ok() && about.interface.is_none()));
        assert!(matches!(news(r#"{"failed": "why"}"#), Some(News::Failed(why)) if why == "why"));
        assert!(matches!(news(r#"{"forked": 3, "pid": 77}"#), Some(News::Forked { forked: 3, pid: 77 })));
        assert!(matches!(news(r#"{"exited": 77, "status": 9}"#), Some(News::Exited { exited: 77, status: 9 })));
        for other in ["", "{}", "[]", r#"{"forked": "x", "pid": 1}"#, r#"{"ready": 1}"#, "null", "\u{0}"] {
            assert!(news(other).is_none(), "{other}");
        }
    }

    #[test]
    fn only_a_regular_file_is_taken_from_a_worker() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let (data, _worker) = UnixStream::pair().expect("sockets");
        let page = tempfile::tempfile().expect("a file");
        let channel = Channel { data, descriptors: ours, page: page.try_clone().expect("a descriptor") };
        assert!(channel.receive_file().is_none(), "nothing was sent");
        let worker = Channel { data: theirs.try_clone().expect("a descriptor"), descriptors: theirs, page };
        worker.send_descriptor(&File::open("/dev/null").expect("a device")).expect("sent");
        assert!(channel.receive_file().is_none(), "a device could make the server wait");
        worker.send_descriptor(&tempfile::tempfile().expect("a file")).expect("sent");
        assert!(channel.receive_file().is_some());
    }
}
