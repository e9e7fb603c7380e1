//! The smoke suite that `scripts/kernels` runs inside of an emulated machine, once per kernel. Not shipped.
//!
//! Usage: `kernel_smoke URINGD`, the path of the binary under test. It says what the kernel offers, runs the compact
//! behaviour suite (`tests/behaviour`) on both backends with rings restricted to their tier, has the real binary
//! drain on SIGTERM, and forbids io_uring by sysctl where there is one. What the script's table needs is on lines
//! that begin with `RESULT`. The sysctl is only touched when
//! `KERNEL_SMOKE_OWNS_MACHINE` is set, as in there.

#[path = "../tests/behaviour/mod.rs"]
mod behaviour;

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::process::CommandExt,
    process::{Child, Command, ExitCode, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use uringd::{
    config::Backend,
    driver::capabilities::{Capabilities, feature_bits},
};

const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
/// An unprivileged user: 65,534 is nobody.
const NOBODY: u32 = 65_534;
/// Longest wait for a process. An emulated machine is slow.
const WAIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let passed = match words[..] {
        ["suite", "uring"] => suite(Backend::Uring),
        ["suite", "epoll"] => suite(Backend::Epoll),
        [uringd] => everything(uringd),
        _ => {
            eprintln!("usage: kernel_smoke URINGD");
            return ExitCode::from(2);
        }
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn suite(backend: Backend) -> bool {
    let mut passed = true;
    let begun = behaviour::run(backend, &mut |sentence, result| match result {
        Ok(()) => println!("ok     {sentence}"),
        Err(why) => {
            println!("FAILED {sentence}: {why}");
            passed = false;
        }
    });
    begun.map_err(|error| println!("FAILED to start: {error}")).is_ok() && passed
}

fn everything(uringd: &str) -> bool {
    // Debian's release (5.10.0-32-cloud-amd64) hides the version, which stands last, behind those of the tools.
    let version = fs::read_to_string("/proc/version").unwrap_or_default();
    let debian = version.rsplit("Debian ").find(|rest| rest.starts_with(|first: char| first.is_ascii_digit()));
    let release = version.split(' ').nth(2).unwrap_or("unknown");
    println!("RESULT kernel={}", debian.and_then(|rest| rest.split_whitespace().next()).unwrap_or(release));
    match Capabilities::probe() {
        Ok(caps) => {
            println!("capabilities: {caps}");
            println!("RESULT features={:#x} tier={}", feature_bits().unwrap_or(0), caps.tier());
        }
        Err(why) => println!("RESULT features=none tier=none\nio_uring: {why}"),
    }
    // What the doctor finds wrong with a machine without a disk is not what is tested here; that it can look, is.
    let doctor = Command::new(uringd).arg("--doctor").status();
    let mut passed = said("doctor", doctor.is_ok_and(|status| matches!(status.code(), Some(0 | 1))));
    for backend in ["uring", "epoll"] {
        let suite =
            Command::new(env::current_exe().expect("this program")).args(["suite", backend]).env("URINGD_IO_RESTRICT", "1").status();
        let whole = suite.is_ok_and(|status| status.success());
        passed &= said(backend, whole & drains(uringd, backend));
    }
    if env::var_os("KERNEL_SMOKE_OWNS_MACHINE").is_some() && fs::exists(SYSCTL).unwrap_or(false) {
        passed &= said("sysctl", sysctl(uringd));
    }
    passed
}

fn said(what: &str, passed: bool) -> bool {
    println!("RESULT {what}={}", if passed { "ok" } else { "FAILED" });
    passed
}

/// SIGTERM while a handler has a request: the answer still comes, and the exit status is 0.
fn drains(uringd: &str, backend: &str) -> bool {
    let mut command = Command::new(uringd);
    command.args(["--bind", "127.0.0.1:0", "--backend", backend, "--cores", "1", "builtin:sleep"]);
    let Some((mut child, ready, _)) = start(command) else { return false };
    println!("start-up line: {ready}");
    let address = ready.split("http://").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
    let mut client = TcpStream::connect(address).expect("a server");
    client.set_read_timeout(Some(WAIT)).expect("a socket");
    write!(client, "GET /?ms=500 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    // Long enough for the request to be read, even here; if it was not, the answer is missing and this fails.
    std::thread::sleep(Duration::from_millis(200));
    let _ = kill_process(Pid::from_child(&child), Signal::TERM);
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    let code = wait(&mut child);
    let passed = answer.contains("slept 500 ms") && code == Some(0);
    if !passed {
        println!("FAILED to drain: exit status {code:?}, answer {answer:?}");
    }
    passed
}

/// Both values of the sysctl, for an ordinary user: served through epoll after one line that names it, and refused with
/// `--backend uring`.
fn sysctl(uringd: &str) -> bool {
    let mut passed = true;
    for value in ["1", "2"] {
        let set = fs::write(SYSCTL, value);
        let remedy = format!("kernel.io_uring_disabled={value}");
        let mut auto = Command::new(uringd);
        auto.args(["--bind", "127.0.0.1:0", "--cores", "1", "builtin:hello"]).uid(NOBODY).gid(NOBODY);
        let served = start(auto).is_some_and(|(mut child, ready, log)| {
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            let drained = wait(&mut child) == Some(0);
            let log = log.join().unwrap_or_default();
            ready.contains("epoll") && log.iter().filter(|line| line.contains(&remedy)).count() == 1 && drained
        });
        let mut forced = Command::new(uringd);
        forced.args(["--bind", "127.0.0.1:0", "--backend", "uring", "builtin:hello"]).uid(NOBODY).gid(NOBODY);
        let refused = forced.output().is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stderr);
            println!("{SYSCTL} {value}: {}", text.trim());
            output.status.code() == Some(1) && text.contains(&remedy) && text.contains("try:")
        });
        passed &= set.is_ok() && served && refused;
    }
    fs::write(SYSCTL, "0").is_ok() && passed
}

/// Starts a server; its start-up line, and a thread that gathers all the others: the log may come before or after it.
fn start(mut command: Command) -> Option<(Child, String, JoinHandle<Vec<String>>)> {
    let mut child = command.stderr(Stdio::piped()).spawn().ok()?;
    let mut lines = BufReader::new(child.stderr.take()?).lines().map_while(Result::ok);
    let mut gathered = Vec::new();
    for line in lines.by_ref() {
        if line.contains(" ready: ") {
            gathered.iter().for_each(|line| println!("{line}"));
            let rest = std::thread::spawn(move || gathered.into_iter().chain(lines).collect());
            return Some((child, line, rest));
        }
        gathered.push(line);
    }
    let _ = child.wait();
    println!("FAILED to start: {}", gathered.join(" / "));
    None
}

fn wait(child: &mut Child) -> Option<i32> {
    let begun = Instant::now();
    while begun.elapsed() < WAIT {
        if let Ok(Some(status)) = child.try_wait() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    None
}
