//! What happens when something the server needs is used up or stuck, beyond what the other suites show: a log that nobody
//! reads, a spool directory that is full.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

const WAIT: Duration = Duration::from_secs(20);

struct Server {
    child: Child,
    address: String,
    /// Kept open, and not read any further.
    stderr: BufReader<ChildStderr>,
}

/// Starts the server on each backend that this machine allows.
fn each_backend(options: &[&str], story: impl Fn(&mut Server)) {
    for backend in ["uring", "epoll"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_uringd"))
            .args(["--bind", "127.0.0.1:0", "--cores", "1", "--backend", backend])
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("a line");
        let Some((_, rest)) = line.split_once("ready: http://") else {
            assert_eq!(backend, "uring", "{line}");
            eprintln!("SKIPPED {backend}: {}", line.trim());
            let _ = child.wait();
            continue;
        };
        let address = rest.split(',').next().expect("an address").to_owned();
        story(&mut Server { child, address, stderr });
    }
}

impl Server {
    fn ask(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("a server");
        stream.set_read_timeout(Some(WAIT)).expect("a socket");
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer and its end");
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    each_backend(&["builtin:hello"], |server| {
        // Each is refused and logged; the pipe holds 64 KiB, a few hundred lines.
        for _ in 0..2_000 {
            assert!(server.ask(b"GARBAGE\r\n\r\n").starts_with("HTTP/1.1 400 "));
        }
        assert!(server.ask(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ends_with("Hello, World!"));
        // And the log is as it should be: whole lines, each with its reason.
        let mut first = String::new();
        server.stderr.read_line(&mut first).expect("a line");
        assert!(first.contains("refused") && first.contains("reason=\"request-line-bad\""), "{first}");
    });
}

#[test]
fn a_full_spool_directory_gives_507_and_small_requests_go_on() {
    // A tmpfs of a page or two, in a mount namespace of the test's own.
    let script = "mount -t tmpfs -o size=64k none /mnt && exec \"$@\"";
    let allowed = Command::new("unshare").args(["--mount", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED a full spool directory: needs root and unshare(1)");
        return;
    }
    for backend in ["uring", "epoll"] {
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_uringd"), "--bind", "127.0.0.1:0", "--cores", "1"])
            .args(["--backend", backend, "--spool-dir", "/mnt", "builtin:echo"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("a line");
        let Some((_, rest)) = line.split_once("ready: http://") else {
            eprintln!("SKIPPED {backend}: {}", line.trim());
            let _ = child.wait();
            continue;
        };
        let address = rest.split(',').next().expect("an address").to_owned();
        let server = Server { child, address, stderr };
        let large = [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n".as_slice(), &[b'x'; 300_000]].concat();
        assert!(server.ask(&large).starts_with("HTTP/1.1 507 "));
        let small = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
        assert!(server.ask(small).contains("\"body\":\"hi\""));
    }
}
