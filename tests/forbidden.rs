//! The real binary where io_uring is forbidden or broken, in each way that can be made here without touching the machine:
//! it says so in one line that ends with a remedy and serves through epoll; `--backend uring` ends with 1
//! and the same line. And the other way round: under the container profile in deploy/, both backends serve.
//!
//! The sysctl (`kernel.io_uring_disabled`) belongs to the whole machine; `examples/kernel_smoke.rs` sets it, in an emulated one.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_secs(20);
/// io_uring_setup, io_uring_enter, io_uring_register: the same numbers on every architecture (since 5.1).
const IO_URING: [u32; 3] = [425, 426, 427];

/// The errno that a filter chooses, and words of the line it leads to.
const FILTERS: [(i32, &str); 5] = [
    (libc::EPERM, "a seccomp filter forbids io_uring (EPERM)"),
    (libc::ENOSYS, "a seccomp filter forbids io_uring (ENOSYS)"),
    (libc::EINVAL, "this kernel's io_uring is too old"),
    (libc::ENOMEM, "ulimit -l unlimited"),
    (libc::EMFILE, "io_uring_setup failed: Too many open files"),
];

#[test]
fn each_way_to_forbid_io_uring_is_told_in_one_line_with_a_remedy_and_served_through_epoll() {
    for (errno, words) in FILTERS {
        if errno == libc::EPERM && is_disabled() {
            say("SKIPPED a filter with EPERM: kernel.io_uring_disabled is set on this machine and takes the blame");
            continue;
        }
        let mut command = uringd(&["builtin:hello"]);
        filtered(&mut command, deny(errno));
        let mut server = Server::start(command);
        assert!(server.ready.contains(" epoll"), "{errno}: {}", server.ready);
        assert!(server.get().ends_with("Hello, World!"), "{errno}");
        assert_eq!(server.stop(), Some(0), "{errno}");
        // The log has a thread of its own: its lines may come before or after the start-up line.
        let log = server.log();
        let told: Vec<&String> = log.iter().filter(|line| line.contains("io_uring") || line.contains("a ring")).collect();
        assert_eq!(told.len(), 1, "{errno}: {log:?}");
        assert!(told[0].contains(words) && told[0].contains("try:"), "{errno}: {}", told[0]);
    }
}

#[test]
fn a_forced_uring_backend_ends_with_1_and_the_same_line() {
    for (errno, words) in FILTERS {
        if errno == libc::EPERM && is_disabled() {
            say("SKIPPED a filter with EPERM: kernel.io_uring_disabled is set on this machine and takes the blame");
            continue;
        }
        let mut command = uringd(&["--backend", "uring", "builtin:hello"]);
        filtered(&mut command, deny(errno));
        let output = command.output().expect("uringd can be run");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errno}: {text}");
        assert!(text.contains(words) && text.contains("try:") && text.trim_end().lines().count() == 1, "{errno}: {text}");
    }
}

#[test]
fn the_doctor_calls_a_forbidden_io_uring_a_problem_unless_epoll_is_wanted() {
    let mut command = uringd(&["--doctor"]);
    filtered(&mut command, deny(libc::ENOSYS));
    let output = command.output().expect("uringd can be run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.lines().any(|line| line.starts_with("problem  a seccomp filter forbids io_uring (ENOSYS)") && line.contains("; try: ")),
        "{text}"
    );
    let mut command = uringd(&["--backend", "epoll", "--doctor"]);
    filtered(&mut command, deny(libc::ENOSYS));
    let text = String::from_utf8_lossy(&command.output().expect("uringd can be run").stdout).into_owned();
    assert!(text.lines().any(|line| line.starts_with("note     a seccomp filter forbids io_uring")), "{text}");
}

/// From 5.12 on (and in 5.10.162) rings do not count against RLIMIT_MEMLOCK; before, the line names it.
#[test]
fn without_locked_memory_it_serves_on_any_kernel() {
    let mut command = uringd(&["builtin:hello"]);
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit(2) and prctl(2) are async-signal-safe, and `none` is moved into the closure.
    unsafe { command.pre_exec(move || check(libc::setrlimit(libc::RLIMIT_MEMLOCK, &none))) };
    let mut server = Server::start(command);
    assert!(server.get().ends_with("Hello, World!"));
    assert_eq!(server.stop(), Some(0));
    let log = server.log();
    assert!(server.ready.contains(" io_uring") || log.iter().any(|line| line.contains("try:")), "{}: {log:?}", server.ready);
}

/// The default ends the process with SIGSYS here, not with EPERM as in the profile, so that a call that is missing shows.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_container_profile_allows_all_that_both_backends_need() {
    let profile = profile();
    let numbers: Vec<u32> =
        profile.iter().map(|name| number(name).unwrap_or_else(|| panic!("{name}: no call of this architecture"))).collect();
    for call in IO_URING {
        assert!(numbers.contains(&call));
    }
    for backend in ["uring", "epoll"] {
        for target in ["builtin:hello", "builtin:echo"] {
            let mut command = uringd(&["--backend", backend, target]);
            filtered(&mut command, allow(&numbers));
            let mut server = match Server::try_start(command) {
                Ok(server) => server,
                Err(log) if backend == "uring" && log.contains("io_uring") => {
                    say(&format!("SKIPPED the profile with io_uring: {log}"));
                    continue;
                }
                Err(log) => panic!("{backend} {target}: {log}"),
            };
            assert!(server.get().starts_with("HTTP/1.1 200 "), "{backend} {target}");
            // Large enough for a file.
            let request =
                format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n{}", "x".repeat(200_000));
            assert!(server.ask(&request).starts_with("HTTP/1.1 200 "), "{backend} {target}");
            assert_eq!(server.stop(), Some(0), "{backend} {target}");
        }
    }
    let mut doctor = uringd(&["--doctor"]);
    filtered(&mut doctor, allow(&numbers));
    let output = doctor.output().expect("uringd can be run");
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}: {}", output.status, String::from_utf8_lossy(&output.stdout));
}

// ---------------------------------------------------------------------------------- filters

/// One instruction of classic BPF (seccomp(2), <linux/bpf_common.h>).
fn instruction(code: u32, yes: u8, no: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: yes, jf: no, k: value }
}

/// Puts the number of the call into the accumulator: the first word of struct seccomp_data.
fn load_number() -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)
}

fn answer(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

/// The three calls of io_uring get this errno, all others pass.
fn deny(errno: i32) -> Vec<libc::sock_filter> {
    let mut program = vec![load_number()];
    for call in IO_URING {
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call));
        program.push(answer(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()));
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

/// These calls pass, all others end the process.
fn allow(calls: &[u32]) -> Vec<libc::sock_filter> {
    let mut program = vec![load_number()];
    for call in calls {
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, *call));
        program.push(answer(libc::SECCOMP_RET_ALLOW));
    }
    program.push(answer(libc::SECCOMP_RET_KILL_PROCESS));
    program
}

/// Has the command run under a filter.
fn filtered(command: &mut Command, program: Vec<libc::sock_filter>) {
    let install = move || {
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        // SAFETY: prctl(2) is async-signal-safe; the kernel copies the program, which the closure owns, and only reads it.
        unsafe {
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program))
        }
    };
    // SAFETY: `install` only calls prctl(2) and allocates nothing.
    unsafe { command.pre_exec(install) };
}

fn check(result: i32) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// The calls that deploy/seccomp.json allows the server, without those for the container runtime.
fn profile() -> Vec<String> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/seccomp.json")).expect("the profile");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["defaultAction"], "SCMP_ACT_ERRNO");
    let groups = json["syscalls"].as_array().expect("a list").iter();
    let own = groups.filter(|group| !group["comment"].as_str().expect("a comment").contains("container runtime"));
    own.flat_map(|group| group["names"].as_array().expect("a list")).map(|name| name.as_str().expect("a name").to_owned()).collect()
}

/// The number of a call by its name in the profile. If you add one there, add it here.
#[cfg(target_arch = "x86_64")]
fn number(name: &str) -> Option<u32> {
    macro_rules! table {
        ($($name:literal $number:ident)*) => { [$(($name, libc::$number)),*] };
    }
    let known = table! {
        "accept4" SYS_accept4 "access" SYS_access "arch_prctl" SYS_arch_prctl "bind" SYS_bind "brk" SYS_brk
        "clock_gettime" SYS_clock_gettime "clock_nanosleep" SYS_clock_nanosleep "clone" SYS_clone "clone3" SYS_clone3
        "close" SYS_close "connect" SYS_connect "epoll_create1" SYS_epoll_create1 "epoll_ctl" SYS_epoll_ctl
        "epoll_wait" SYS_epoll_wait "eventfd2" SYS_eventfd2 "execve" SYS_execve "exit" SYS_exit
        "exit_group" SYS_exit_group "fcntl" SYS_fcntl "fstat" SYS_fstat "futex" SYS_futex "getdents64" SYS_getdents64
        "getpeername" SYS_getpeername "getpid" SYS_getpid "getrandom" SYS_getrandom "getsockname" SYS_getsockname
        "getsockopt" SYS_getsockopt "gettid" SYS_gettid "io_uring_enter" SYS_io_uring_enter
        "io_uring_register" SYS_io_uring_register "io_uring_setup" SYS_io_uring_setup "ioctl" SYS_ioctl
        "kill" SYS_kill "listen" SYS_listen "lseek" SYS_lseek "lstat" SYS_lstat "madvise" SYS_madvise "mmap" SYS_mmap
        "mprotect" SYS_mprotect "mremap" SYS_mremap "munmap" SYS_munmap "nanosleep" SYS_nanosleep
        "newfstatat" SYS_newfstatat "open" SYS_open "openat" SYS_openat "poll" SYS_poll "prctl" SYS_prctl
        "pread64" SYS_pread64 "prlimit64" SYS_prlimit64 "pwrite64" SYS_pwrite64 "read" SYS_read
        "readlink" SYS_readlink "recvfrom" SYS_recvfrom "restart_syscall" SYS_restart_syscall "rseq" SYS_rseq
        "rt_sigaction" SYS_rt_sigaction "rt_sigprocmask" SYS_rt_sigprocmask "rt_sigreturn" SYS_rt_sigreturn
        "sched_getaffinity" SYS_sched_getaffinity "sched_setaffinity" SYS_sched_setaffinity
        "sched_yield" SYS_sched_yield "sendto" SYS_sendto "set_robust_list" SYS_set_robust_list
        "set_tid_address" SYS_set_tid_address "setsockopt" SYS_setsockopt "shutdown" SYS_shutdown
        "sigaltstack" SYS_sigaltstack "socket" SYS_socket "socketpair" SYS_socketpair "stat" SYS_stat
        "statx" SYS_statx "sysinfo" SYS_sysinfo "tgkill" SYS_tgkill "uname" SYS_uname "unlink" SYS_unlink
        "unlinkat" SYS_unlinkat "write" SYS_write
    };
    known.iter().find(|row| row.0 == name).map(|row| row.1 as u32)
}

/// This machine's sysctl forbids io_uring already.
fn is_disabled() -> bool {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok_and(|value| value.trim() != "0")
}

// ---------------------------------------------------------------------------------- processes

/// The bare binary with these options, on a port of the kernel's choice, and with none of the environment that it reads.
fn uringd(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uringd"));
    command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("URINGD_") || name == "PORT") {
        command.env_remove(name);
    }
    command.args(["--bind", "127.0.0.1:0", "--cores", "1"]).args(options);
    command
}

struct Server {
    child: Child,
    ready: String,
    /// The lines before the start-up line, and the thread that reads those behind it.
    before: Vec<String>,
    behind: Option<thread::JoinHandle<Vec<String>>>,
}

impl Server {
    fn start(command: Command) -> Server {
        Server::try_start(command).unwrap_or_else(|log| panic!("uringd did not start: {log}"))
    }

    /// Waits for the start-up line; the error is what was written instead.
    fn try_start(mut command: Command) -> Result<Server, String> {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("uringd can be run");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut before = Vec::new();
        for line in lines.by_ref().map_while(Result::ok) {
            if line.contains(" ready: ") {
                let behind = thread::spawn(move || lines.map_while(Result::ok).collect());
                return Ok(Server { child, ready: line, before, behind: Some(behind) });
            }
            before.push(line);
        }
        let status = child.wait().expect("a child");
        Err(format!("{}; {status}", before.join(" / ")))
    }

    fn get(&self) -> String {
        self.ask("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    }

    /// Everything that the server answers until it closes.
    fn ask(&self, request: &str) -> String {
        let address = self.ready.split("http://").nth(1).and_then(|rest| rest.split(',').next()).expect("an address");
        let mut stream = TcpStream::connect(address).expect("a server");
        stream.set_read_timeout(Some(WAIT)).expect("a socket");
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer and its end");
        answer
    }

    /// Every line but the start-up line, once the process is over.
    fn log(&mut self) -> Vec<String> {
        let behind = self.behind.take().map(|thread| thread.join().expect("no panic"));
        self.before.iter().cloned().chain(behind.unwrap_or_default()).collect()
    }

    /// TERM, and the exit status.
    fn stop(&mut self) -> Option<i32> {
        // SAFETY: kill(2) takes integers, and the child has not been waited for.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let begun = Instant::now();
        while begun.elapsed() < WAIT {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code();
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("still running after {WAIT:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Past the capture of the test harness.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
