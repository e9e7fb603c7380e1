//! The memory ceiling of `--check` is held: every kind of bad client at once, and the process stays below it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_secs(20);

/// Small limits, so that a few hundred clients reach every one of them.
const OPTIONS: [&str; 16] = [
    "--cores",
    "1",
    "--limit-connections",
    "300",
    "--limit-body-memory",
    "4194304",
    "--limit-response-memory",
    "4194304",
    "--queue",
    "64",
    "--limit-spool",
    "50000000",
    "--log-level",
    "error",
    "--limit-head",
    "16384",
];

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(backend: &str) -> Option<Server> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_uringd"))
            .args(OPTIONS)
            .args(["--bind", "127.0.0.1:0", "--backend", backend, "builtin:echo"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary");
        let mut line = String::new();
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        stderr.read_line(&mut line).expect("a line");
        let Some(rest) = line.split_once("ready: http://").map(|parts| parts.1) else {
            eprintln!("SKIPPED {backend}: {}", line.trim());
            let _ = child.wait();
            return None;
        };
        let address = rest.split(',').next().expect("an address").to_owned();
        // The rest of the log must not stop the server.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Some(Server { child, address })
    }

    /// Resident memory that belongs to the process alone, in bytes.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("alive");
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("Linux 4.5");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `--check` says: each core's ceiling and the process's base, in bytes.
fn ceiling() -> u64 {
    let output = Command::new(env!("CARGO_BIN_EXE_uringd")).args(OPTIONS).arg("--check").output().expect("the binary");
    let text = String::from_utf8(output.stdout).expect("text");
    let line = text.lines().find(|line| line.contains(" in all, and ")).expect("the sum");
    let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ((numbers[0] + numbers[1]) * (1 << 20) as f64) as u64
}

/// Opens a connection, sends what it is given as far as the server takes it, and holds on.
fn hold(address: &str, bytes: &[u8]) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_write_timeout(Some(Duration::from_millis(200))).ok()?;
    let _ = stream.write_all(bytes);
    Some(stream)
}

#[test]
fn the_process_stays_below_the_ceiling_that_check_prints_whatever_clients_do() {
    let ceiling = ceiling();
    for backend in ["uring", "epoll"] {
        let Some(server) = Server::start(backend) else { continue };
        let big_head = format!("GET / HTTP/1.1\r\nHost: a\r\n{}X: ", "Y: z\r\n".repeat(90)).into_bytes();
        let nearly_full_head = [big_head.as_slice(), &vec![b'x'; 8000]].concat();
        let body = |length: usize, sent: usize| {
            [format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n").into_bytes(), vec![b'b'; sent]].concat()
        };
        let pipelined = "GET /some/path HTTP/1.1\r\nHost: a\r\n\r\n".repeat(20_000).into_bytes();
        let kinds = [nearly_full_head, body(60_000, 59_000), body(10_000_000, 3_000_000), body(1_000_000, 1_000_000), pipelined];
        let mut held = Vec::new();
        let mut highest = 0;
        for round in 0..40 {
            held.extend(hold(&server.address, &kinds[round % kinds.len()]));
            for _ in 0..6 {
                // Silent ones and trickled heads.
                held.extend(hold(&server.address, if round % 2 == 0 { b"" } else { b"GET / HT" }));
            }
            highest = highest.max(server.memory());
        }
        eprintln!("{backend}: {:.1} MiB of {:.1} MiB with {} clients", highest as f64 / 1e6, ceiling as f64 / 1e6, held.len());
        assert!(highest < ceiling, "{backend}: {highest} of {ceiling}");
        drop(held);
        // And it still serves.
        let begun = Instant::now();
        loop {
            let mut stream = TcpStream::connect(&server.address).expect("a server");
            stream.set_read_timeout(Some(WAIT)).expect("a socket");
            stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            if answer.starts_with("HTTP/1.1 200") {
                break;
            }
            assert!(begun.elapsed() < WAIT, "no service again: {answer}");
        }
    }
}
