//! What is no HTTP, and peers that vanish. The server answers or closes, and goes on.

use std::{os::unix::process::CommandExt, thread, time::Duration};

use crate::support::{Backend, CHUNKED, Client, End, PATIENCE, Random, Server, check, eventually, for_each_backend, get, post};

/// The beginning of a TLS 1.3 hello, as a browser sends it to an `https://` address by mistake.
const TLS_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x5a\xa5\x0f\xf0";

#[test]
fn a_tls_hello_gets_a_400_at_once() {
    for_each_backend(|backend| {
        // With a deadline so long that waiting for the end of the line would fail the test.
        let server = backend.serve("builtin:hello", &["--head-timeout", "600"]);
        let mut client = server.connect();
        let refusal = client.ask(TLS_HELLO);
        assert_eq!(refusal.status, 400);
        assert!(refusal.says_close());
        client.expect_eof();
    });
}

#[test]
fn the_preface_of_http_2_is_refused() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let mut client = server.connect();
        let status = client.ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").status;
        assert!([400, 505].contains(&status), "{status}");
        client.expect_eof();
    });
}

#[test]
fn random_bytes_are_refused_or_closed() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let mut random = Random::new();
        for _ in 0..200 {
            let length = 1 + random.below(2000);
            let bytes: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
            let mut client = server.connect();
            let _ = client.try_send(bytes);
            client.finish_sending();
            let (answer, end) = client.read_to_end();
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
            assert_eq!(end, End::Eof);
        }
        server.expect_alive();
    });
}

#[test]
fn a_good_request_with_one_byte_changed_never_hurts_the_server() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut random = Random::new();
        let good = format!("{CHUNKED}5;x=1\r\nhello\r\n0\r\nX-T: v\r\n\r\n").into_bytes();
        for _ in 0..300 {
            let mut bytes = good.clone();
            bytes[random.below(good.len())] = random.below(256) as u8;
            let mut client = server.connect();
            client.send(bytes);
            client.finish_sending();
            let (answer, _) = client.read_to_end();
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "), "{answer:?}");
        }
        server.expect_alive();
    });
}

#[test]
fn a_reset_at_any_moment_is_harmless() {
    for_each_backend(|backend| {
        for target in ["builtin:echo", "builtin:hello", "builtin:sleep"] {
            let server = backend.serve(target, &["--handlers", "2"]);
            let mut random = Random::new();
            let whole = [post("/?ms=5", vec![b'x'; 3000]), get("/?ms=5").repeat(20).into()].concat();
            for _ in 0..200 {
                let mut client = server.connect();
                client.send(&whole[..random.below(whole.len())]);
                if random.below(2) == 0 {
                    client.readable(Duration::from_millis(2));
                }
                client.reset();
            }
            server.expect_alive();
        }
    });
}

#[test]
fn a_reset_while_a_large_answer_is_sent_is_harmless() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        for _ in 0..5 {
            let mut client = server.connect();
            client.send(post("/", vec![b'x'; 12_000_000]));
            assert!(client.readable(PATIENCE));
            client.reset();
        }
        server.expect_alive();
    });
}

#[test]
fn connections_that_ended_leave_no_descriptor_behind() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        server.expect_alive();
        let mut kept: Vec<Client> = (0..3).map(|_| server.connect()).collect();
        kept.iter_mut().for_each(Client::expect_kept);
        let before = server.descriptors();
        for number in 0..100 {
            let mut client = server.connect();
            match number % 5 {
                0 => drop(client.ask(get("/"))),
                1 => client.send("GET / HTTP/1.1\r\n"),
                2 => drop(client.ask("GARBAGE\r\n\r\n")),
                3 => client.send(post("/", "x")),
                _ => {}
            }
            if number % 2 == 0 { client.reset() } else { drop(client) }
        }
        eventually("all closed but the three kept", || server.descriptors() <= before);
        kept.iter_mut().for_each(Client::expect_kept);
    });
}

/// Leaves the process few descriptors (RLIMIT_NOFILE).
fn with_few_descriptors(backend: &Backend) -> Server {
    let mut command = backend.command("builtin:hello", &["--keep-alive", "60", "--head-timeout", "60"]);
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: setrlimit(2) is async-signal-safe, and the limit is the closure's own.
    unsafe { command.pre_exec(move || check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)).map(drop)) };
    Server::start(command).unwrap_or_else(|end| panic!("64 descriptors should do for a small server: {end}"))
}

#[test]
fn without_descriptors_new_connections_wait_and_nothing_spins() {
    for_each_backend(|backend| {
        let server = with_few_descriptors(backend);
        let mut clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(get("/")));
        assert_eq!(clients[0].read_response().status, 200, "the first connections are served");
        let busy = server.cpu_time();
        thread::sleep(Duration::from_secs(2));
        let busy = server.cpu_time() - busy;
        assert!(busy < Duration::from_millis(400), "{busy:?} of CPU time in 2 s without anything to do");

        // Each one that closes lets another in, until all have been served.
        clients[0].expect_kept();
        drop(clients.remove(0));
        for mut client in clients {
            assert_eq!(client.read_response().status, 200);
        }
    });
}

#[test]
fn a_server_that_ran_out_of_descriptors_takes_new_connections_later() {
    for_each_backend(|backend| {
        let server = with_few_descriptors(backend);
        let clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
        drop(clients);
        server.expect_alive();
    });
}
