//! What only shows after a while, in a form short enough for every change: connections that come and go, resets, too few
//! descriptors, a ring that is far too small. `scripts/soak` runs the same with its numbers raised.
//!
//! At the end of each, nothing may be left: no connection, no descriptor, and no completion that came for a connection
//! that was gone (the `stale` counter).

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::{
        fd::AsRawFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};
use uringd::{
    Config, Request, Response, Running, Server,
    config::{Backend, Bind, Cores},
    driver::{
        Completion, Driver, Op, RecvEnd, Token,
        capabilities::Capabilities,
        uring::{Sizes, UringDriver},
    },
};

const WAIT: Duration = Duration::from_secs(60);
/// Tells a process of this test that it is the one with the small ring.
const SMALL: &str = "URINGD_TEST_SOAK_SMALL";

/// A number of the soak: as in the environment (`scripts/soak` sets it), or the quick one.
fn number(name: &str, quick: usize) -> usize {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(quick)
}

#[test]
fn connections_that_come_and_go_leave_nothing_behind() {
    let count = number("URINGD_SOAK_CONNECTIONS", 20_000);
    each_backend(|address, running| {
        thread::scope(|scope| {
            for client in 0..2 {
                scope.spawn(move || (0..count / 2).for_each(|round| come_and_go(address, client * count / 2 + round)));
            }
        });
        assert!(running.stats()[0].accepted.read() > (count / 2) as u64, "hardly any was accepted");
    });
}

/// One connection, in one of the ways that clients have.
fn come_and_go(address: SocketAddr, round: usize) {
    let mut stream = connect(address, round);
    let request: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    match round % 8 {
        0 => {}
        1 => stream.write_all(&request[..9]).expect("sent"),
        2 => {
            stream.write_all(request).expect("sent");
            reset(&stream);
        }
        3 => {
            stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc").expect("sent");
            reset(&stream);
        }
        4 => {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("an answer and its end");
            assert!(answer.ends_with(b"ok"), "{}", String::from_utf8_lossy(&answer));
        }
        _ => {
            for _ in 0..round % 3 + 1 {
                stream.write_all(request).expect("sent");
                read_answer(&mut stream);
            }
            // Without TIME_WAIT, or the ports of a million connections would not suffice.
            reset(&stream);
        }
    }
}

#[test]
fn two_thousand_resets_a_second_leave_nothing_behind() {
    const RATE: u32 = 2_000;
    let seconds = number("URINGD_SOAK_RESET_SECONDS", 2) as u32;
    each_backend(|address, _| {
        let begun = Instant::now();
        for round in 0..RATE * seconds {
            let mut stream = connect(address, round as usize);
            let _ = match round % 3 {
                0 => stream.write_all(b"GET / HT"),
                1 => stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
                _ => stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
            };
            reset(&stream);
            drop(stream);
            // As fast as that, and no faster.
            thread::sleep((begun + (round + 1) * Duration::from_secs(1) / RATE).saturating_duration_since(Instant::now()));
        }
        let mut stream = connect(address, 0);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        read_answer(&mut stream);
    });
}

#[test]
fn with_fewer_descriptors_than_clients_everybody_is_served_in_turn() {
    let clients = number("URINGD_SOAK_CLIENTS", 400);
    for backend in backends() {
        for limit in [64, 256] {
            let mut server = Process::start(backend, limit);
            let mut streams: Vec<TcpStream> = (0..clients).map(|round| connect(server.address, round)).collect();
            for stream in &mut streams {
                stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            }
            for mut stream in streams {
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).expect("an answer and its end");
                assert!(answer.starts_with(b"HTTP/1.1 200 "), "{backend:?} {limit}: {}", String::from_utf8_lossy(&answer));
            }
            assert_eq!(server.stop(), Some(0), "{backend:?} {limit}");
        }
    }
}

/// A completion queue of 64 entries and four buffers of 256 bytes for 1,000 clients: it overflows and starves all the time.
#[test]
fn a_ring_that_is_far_too_small_serves_everybody_all_the_same() {
    if env::var_os(SMALL).is_some() {
        return small_ring();
    }
    if Capabilities::probe().is_err() {
        return say("SKIPPED the small ring: there is no io_uring here");
    }
    for mask in ["", "tier=5.19", "tier=5.15"] {
        let mut command = Command::new(env::current_exe().expect("this test"));
        command.args(["--exact", "a_ring_that_is_far_too_small_serves_everybody_all_the_same", "--nocapture"]);
        command.env(SMALL, "1").env("URINGD_IO_SIZES", "8,64,4,256").env("URINGD_IO_MASK", mask);
        let output = command.output().expect("this test can be run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mask {mask:?}: {}\n{text}", output.status);
    }
}

fn small_ring() {
    let clients = number("URINGD_SOAK_CLIENTS", 1_000);
    serve(Backend::Uring, |address, _| {
        let mut streams: Vec<TcpStream> = (0..clients).map(|round| connect(address, round)).collect();
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nX: {}\r\nContent-Length: 2000\r\n\r\n{}", "x".repeat(500), "y".repeat(2_000));
        for _ in 0..3 {
            for stream in &mut streams {
                stream.write_all(request.as_bytes()).expect("sent");
            }
            streams.iter_mut().for_each(read_answer);
        }
    });
}

/// The same without a server, where the driver's own figures show that it did overflow and starve.
#[test]
fn overflow_and_starvation_lose_no_byte() {
    const CONNECTIONS: usize = 200;
    const BYTES: usize = 5_000;
    let Ok(caps) = Capabilities::probe() else { return say("SKIPPED overflow and starvation: there is no io_uring here") };
    let sizes = Sizes { submissions: 8, completions: 64, buffers: 4, buffer_bytes: 256 };
    let mut driver = UringDriver::with_sizes(&[], caps, sizes).expect("a ring");
    let pairs: Vec<(UnixStream, UnixStream)> = (0..CONNECTIONS).map(|_| UnixStream::pair().expect("a pair")).collect();
    let op = |slot: usize| Op::Recv { token: Token { slot: slot as u32, generation: 7 }, fd: pairs[slot].0.as_raw_fd() };
    for (slot, (_, peer)) in pairs.iter().enumerate() {
        let bytes: Vec<u8> = (0..BYTES).map(|index| (index * 13 + slot) as u8).collect();
        (&mut &*peer).write_all(&bytes).expect("room for so little");
        peer.shutdown(std::net::Shutdown::Write).expect("connected");
        driver.push(op(slot));
    }
    let mut received = vec![Vec::new(); CONNECTIONS];
    let mut left = CONNECTIONS;
    let begun = Instant::now();
    while left > 0 {
        assert!(begun.elapsed() < WAIT, "{left} receives have not come to their end");
        let mut again = Vec::new();
        let each = &mut |completion: Completion<'_>| match completion {
            Completion::Received { token, bytes } => received[token.slot as usize].extend_from_slice(bytes),
            Completion::RecvEnded { token, end: RecvEnd::Eof } => {
                assert_eq!(token.generation, 7);
                left -= 1;
            }
            Completion::RecvEnded { token, end: RecvEnd::Again | RecvEnd::NoBuffers } => again.push(token.slot as usize),
            other => panic!("{other:?}"),
        };
        driver.wait(Some(Duration::from_millis(100)), each).expect("a ring");
        again.into_iter().for_each(|slot| driver.push(op(slot)));
    }
    for (slot, bytes) in received.iter().enumerate() {
        assert!(bytes.iter().copied().eq((0..BYTES).map(|index| (index * 13 + slot) as u8)), "connection {slot}");
    }
    let figures = driver.figures();
    assert!(!caps.buffer_ring || figures.no_buffers > 0, "it never starved: {figures:?}");
    let pieces = (CONNECTIONS * BYTES.div_ceil(sizes.buffer_bytes)) as u64;
    assert!(figures.no_buffers < 2 * pieces, "tried again and again without a buffer: {figures:?}");
    // What a task brings in while it waits overflows only where completions are not deferred.
    say(&format!("overflow and starvation: {figures:?}"));
}

// ---------------------------------------------------------------------------------- servers

fn backends() -> Vec<Backend> {
    match Capabilities::probe() {
        Ok(_) => vec![Backend::Uring, Backend::Epoll],
        Err(why) => {
            say(&format!("SKIPPED io_uring: {why}"));
            vec![Backend::Epoll]
        }
    }
}

/// The soaks count connections and descriptors of the process: one at a time.
fn each_backend(story: impl Fn(SocketAddr, &Running)) {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    backends().into_iter().for_each(|backend| serve(backend, &story));
}

/// Serves in this process while the story runs, and then looks at what is left.
fn serve(backend: Backend, story: impl Fn(SocketAddr, &Running)) {
    let config = Config { bind: vec![Bind::Tcp("127.0.0.1:0".to_owned())], cores: Cores::Count(1), backend, ..Config::default() };
    let running = Server::new(|_: &Request<'_>| Response::text("ok")).config(config).start().expect("a server");
    let address = running.addresses()[0].strip_prefix("http://").and_then(|text| text.parse().ok()).expect("TCP");
    story(address, &running);
    let stats = running.stats().to_vec();
    let begun = Instant::now();
    while stats[0].open.read() > 0 {
        assert!(begun.elapsed() < WAIT, "{backend:?}: {} connections left", stats[0].open.read());
        thread::sleep(Duration::from_millis(5));
    }
    running.stop();
    running.wait().expect("nothing is lost");
    assert_eq!(stats[0].stale.read(), 0, "{backend:?}: completions for connections that were gone");
    let begun = Instant::now();
    while sockets_of(address.port()) > 0 {
        // A close that the kernel has not carried out yet is no leak.
        assert!(begun.elapsed() < WAIT, "{backend:?}: sockets of the server left open");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sockets with this local port that some process still holds (an inode of 0: none does, as in TIME_WAIT).
fn sockets_of(port: u16) -> usize {
    let table = fs::read_to_string("/proc/self/net/tcp").expect("/proc");
    let of_port = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}"))) && words.get(9) != Some(&"0")
    };
    table.lines().filter(of_port).count()
}

/// The real binary with few descriptors.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(backend: Backend, descriptors: u64) -> Process {
        let name = if backend == Backend::Epoll { "epoll" } else { "uring" };
        let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
        command.args(["--bind", "127.0.0.1:0", "--cores", "1", "--backend", name, "builtin:hello-pool"]);
        command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null()).stderr(Stdio::piped());
        let limit = libc::rlimit { rlim_cur: descriptors, rlim_max: descriptors };
        let install = move || {
            // SAFETY: setrlimit(2) is async-signal-safe and reads `limit`, which the closure owns.
            if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: `install` makes one system call and allocates nothing.
        unsafe { command.pre_exec(install) };
        let mut child = command.spawn().expect("uringd can be run");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let ready = lines.find(|line| line.contains(" ready: ")).expect("a start-up line");
        thread::spawn(move || lines.for_each(drop));
        let address = ready.split("http://").nth(1).and_then(|rest| rest.split(',').next()).and_then(|text| text.parse().ok());
        Process { child, address: address.expect("an address") }
    }

    fn stop(&mut self) -> Option<i32> {
        // SAFETY: kill(2) takes integers, and the child has not been waited for.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        self.child.wait().expect("a child").code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// ---------------------------------------------------------------------------------- clients

/// From one of many addresses of loopback, so that no pair of addresses runs out of ports.
fn connect(address: SocketAddr, round: usize) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let source = Ipv4Addr::new(127, 1, (round / 250 % 200) as u8, (round % 250 + 1) as u8);
    socket.bind(&SocketAddr::from((source, 0)).into()).expect("an address of loopback");
    socket.connect(&address.into()).expect("a server");
    socket.set_read_timeout(Some(WAIT)).expect("a socket");
    socket.set_write_timeout(Some(WAIT)).expect("a socket");
    socket.into()
}

/// Has the close that follows send a RST.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("a socket");
}

/// Reads one answer whose body is `ok`.
fn read_answer(stream: &mut TcpStream) {
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    while !answer.ends_with(b"\r\n\r\nok") {
        let count = stream.read(&mut piece).expect("an answer");
        assert!(count > 0, "the connection ended: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&piece[..count]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
}

/// Past the capture of the test harness.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
