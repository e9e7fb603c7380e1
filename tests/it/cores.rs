//! `--cores`: one shard per CPU, of those the process may use, each on its own.

use std::os::unix::process::CommandExt;

use crate::support::{Backend, Client, Ended, Server, allowed_cpus, check, eventually, for_each_backend, get, run, skipped};

/// There is one shard for each of these CPUs, and its thread may run nowhere else.
fn expect_shards(server: &Server, cpus: &[usize]) {
    let mut expected: Vec<String> = cpus.iter().map(ToString::to_string).collect();
    expected.sort();
    let shards = server.threads().into_iter().filter(|(name, _)| name.starts_with("shard"));
    let mut found: Vec<String> = shards.map(|(_, cpus)| cpus).collect();
    found.sort();
    assert_eq!(found, expected, "{:?}", server.threads());
}

#[test]
fn all_gives_every_allowed_cpu_one_pinned_shard() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--cores", "all"]);
        expect_shards(&server, &allowed_cpus());
    });
}

#[test]
fn a_count_takes_so_many() {
    for_each_backend(|backend| {
        for count in 1..=allowed_cpus().len().min(3) {
            let server = backend.serve("builtin:hello", &["--cores", &count.to_string()]);
            expect_shards(&server, &allowed_cpus()[..count]);
        }
    });
}

#[test]
fn a_list_takes_these() {
    for_each_backend(|backend| {
        let last = *allowed_cpus().last().unwrap();
        let server = backend.serve("builtin:hello", &["--cores", &format!("{last}-{last}")]);
        expect_shards(&server, &[last]);

        let [first, .., last] = allowed_cpus()[..] else { return };
        let server = backend.serve("builtin:hello", &["--cores", &format!("{last},{first}")]);
        expect_shards(&server, &[first, last]);
    });
}

#[test]
fn handlers_run_on_the_core_of_their_shard() {
    for_each_backend(|backend| {
        let last = allowed_cpus().last().unwrap().to_string();
        let server = backend.serve("builtin:sleep", &["--cores", &format!("{last}-{last}"), "--handlers", "3"]);
        // A handler thread may still be on its way to its core when the server is ready.
        eventually("one shard and three handlers on their core", || server.threads().iter().filter(|(_, cpus)| *cpus == last).count() >= 4);
    });
}

#[test]
fn only_the_allowed_cpus_are_used() {
    for_each_backend(|backend| {
        let last = *allowed_cpus().last().unwrap();
        let server = Server::start(on_one_cpu(backend, last, "all")).unwrap_or_else(|end| panic!("{end}"));
        expect_shards(&server, &[last]);
        server.expect_alive();
    });
}

#[test]
fn a_cpu_that_is_not_allowed_is_refused() {
    for_each_backend(|backend| {
        let [first, .., last] = allowed_cpus()[..] else {
            return skipped("a_cpu_that_is_not_allowed_is_refused", "one CPU only");
        };
        expect_refusal(&run(on_one_cpu(backend, last, &format!("{first}-{first}"))), &first.to_string());
    });
}

#[test]
fn a_cpu_that_is_not_there_is_refused() {
    for_each_backend(|backend| {
        for list in ["4095-4095", "0,4095"] {
            expect_refusal(&run(backend.command("builtin:hello", &["--cores", list])), "4095");
        }
    });
}

#[test]
fn more_cores_than_there_are_is_refused() {
    for_each_backend(|backend| {
        expect_refusal(&run(backend.command("builtin:hello", &["--cores", "4000"])), "4000");
    });
}

#[test]
fn a_list_that_is_none_is_refused() {
    for_each_backend(|backend| {
        for list in ["0", "x", "3-1", "1,", "-", ""] {
            let ended = run(backend.command("builtin:hello", &["--cores", list]));
            assert!([Some(1), Some(2)].contains(&ended.code()), "{list:?}: {ended}");
            assert!(ended.stderr.contains("cores"), "{list:?}: {ended}");
        }
    });
}

#[test]
fn every_connection_is_served_whichever_shard_it_reaches() {
    for_each_backend(|backend| {
        for target in ["builtin:hello", "builtin:hello-pool"] {
            let server = backend.serve(target, &["--cores", "all"]);
            let mut clients: Vec<Client> = (0..64).map(|_| server.connect()).collect();
            for _ in 0..3 {
                clients.iter_mut().for_each(|client| client.send(get("/")));
                clients.iter_mut().for_each(|client| assert_eq!(client.read_response().status, 200));
            }
        }
    });
}

/// A command that may run on one CPU only.
fn on_one_cpu(backend: &Backend, cpu: usize, cores: &str) -> std::process::Command {
    let mut command = backend.command("builtin:hello", &["--cores", cores]);
    // SAFETY: an empty set is all zero bits; CPU_SET stays within it.
    let set = unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        libc::CPU_SET(cpu, &mut set);
        set
    };
    // SAFETY: sched_setaffinity(2) is async-signal-safe, and the set is the closure's own.
    unsafe { command.pre_exec(move || check(libc::sched_setaffinity(0, size_of_val(&set), &raw const set)).map(drop)) };
    command
}

/// The process gives up with 1 and a sentence that names the CPU.
fn expect_refusal(ended: &Ended, cpu: &str) {
    assert_eq!(ended.code(), Some(1), "{ended}");
    assert_eq!(ended.stderr.lines().count(), 1, "one line, please: {ended}");
    assert!(ended.stderr.contains(cpu) && ended.stderr.contains("try: "), "{ended}");
}
