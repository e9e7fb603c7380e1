//! `--bind` in all its forms.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixListener, process::CommandExt},
    },
    path::Path,
};

use crate::support::{Address, Backend, Client, Ended, Scratch, Server, check, for_each_backend, get, run, skipped};

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// The process gives up with 1 and one line, which names `words` and ends in what to try.
fn expect_refusal(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code(), Some(1), "{ended}");
    assert_eq!(ended.stderr.lines().count(), 1, "one line, please: {ended}");
    for word in words {
        assert!(ended.stderr.contains(word), "no {word:?}: {ended}");
    }
    assert!(ended.stderr.contains("try: "), "nothing to try: {ended}");
}

#[test]
fn several_addresses_serve_alike() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let socket = unix(&scratch.path().join("socket"));
        let server = backend.serve("builtin:hello", &["--bind", "127.0.0.1:0", "--bind", "127.0.0.1:0", "--bind", &socket]);
        assert_eq!(server.addresses.len(), 3, "{}", server.log.text());
        for address in &server.addresses {
            assert_eq!(Client::connect(address).ask(get("/")).text(), "Hello, World!");
        }
    });
}

#[test]
fn an_address_of_ip_version_6_is_served() {
    for_each_backend(|backend| {
        if TcpListener::bind("[::1]:0").is_err() {
            return skipped("an_address_of_ip_version_6_is_served", "this machine has no ::1");
        }
        let server = backend.serve("builtin:echo", &["--bind", "[::1]:0"]);
        assert!(server.address().is_ipv6(), "{}", server.log.text());
        assert!(server.ask(get("/")).echo().is("remote").contains("::1"));
    });
}

#[test]
fn a_name_is_resolved() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &["--bind", "localhost:0"]);
        server.expect_alive();
    });
}

#[test]
fn aliases_of_bind_are_accepted() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let sockets = [unix(&scratch.path().join("b")), unix(&scratch.path().join("l"))];
        let mut command = backend.command("builtin:hello", &["-b", &sockets[0], "--listen", &sockets[1]]);
        command.args(["--bind", "127.0.0.1:0"]);
        let _server = Server::start(command).unwrap_or_else(|end| panic!("{end}"));
        for socket in ["b", "l"] {
            let address = Address::Unix(scratch.path().join(socket));
            assert_eq!(Client::connect(&address).ask(get("/")).status, 200);
        }
    });
}

#[test]
fn the_file_of_a_dead_unix_socket_is_replaced() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let path = scratch.path().join("socket");
        drop(UnixListener::bind(&path).expect("a socket"));
        assert!(path.exists(), "closing a listener leaves its file");
        let server = backend.serve("builtin:hello", &["--bind", &unix(&path)]);
        assert_eq!(Client::connect(&Address::Unix(path)).ask(get("/")).status, 200);
        drop(server);
    });
}

#[test]
fn a_drained_server_removes_the_file_of_its_socket() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let path = scratch.path().join("socket");
        let mut server = backend.serve("builtin:hello", &["--bind", &unix(&path)]);
        assert!(path.exists());
        assert_eq!(server.stop(), Some(0));
        assert!(!path.exists(), "the file is still there");
    });
}

#[test]
fn a_live_unix_socket_is_left_alone() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let path = scratch.path().join("socket");
        let first = backend.serve("builtin:hello", &["--bind", &unix(&path)]);
        let ended = run(backend.command("builtin:hello", &["--bind", &unix(&path)]));
        expect_refusal(&ended, &[&path.display().to_string()]);
        assert_eq!(Client::connect(&Address::Unix(path)).ask(get("/")).status, 200, "the first one lives on");
        drop(first);
    });
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let path = scratch.path().join("precious");
        fs::write(&path, "data").unwrap();
        let ended = run(backend.command("builtin:hello", &["--bind", &unix(&path)]));
        expect_refusal(&ended, &[&path.display().to_string()]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    });
}

/// Runs the server as nobody, whom permissions hold; root they do not.
#[test]
fn a_directory_without_permission_is_refused() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let path = scratch.path().join("socket");
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o555)).unwrap();
        let mut command = backend.command("builtin:hello", &["--bind", &unix(&path)]);
        // SAFETY: geteuid(2) only returns a number.
        if unsafe { libc::geteuid() } == 0 {
            command.uid(65534).gid(65534).current_dir("/");
            if command.spawn().and_then(|mut child| child.wait()).is_err() {
                return skipped("a_directory_without_permission_is_refused", "nobody cannot run the binary here");
            }
        }
        let ended = run(command);
        expect_refusal(&ended, &[&path.display().to_string()]);
    });
}

#[test]
fn a_directory_that_is_not_there_is_refused() {
    for_each_backend(|backend| {
        let ended = run(backend.command("builtin:hello", &["--bind", "unix:/nonexistent/uringd/socket"]));
        expect_refusal(&ended, &["/nonexistent/uringd"]);
    });
}

/// A command whose server inherits `listener` as descriptor 123.
fn with_descriptor(backend: &Backend, listener: &impl AsRawFd) -> std::process::Command {
    let mut command = backend.command("builtin:hello", &["--bind", "fd://123"]);
    let fd = listener.as_raw_fd();
    // SAFETY: dup2(2) is async-signal-safe; the copy is inherited, other than the listener itself.
    unsafe { command.pre_exec(move || check(libc::dup2(fd, 123)).map(drop)) };
    command
}

#[test]
fn an_inherited_listener_is_served() {
    for_each_backend(|backend| {
        let scratch = Scratch::new();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(tcp.local_addr().unwrap());
        let server = Server::start(with_descriptor(backend, &tcp)).unwrap_or_else(|end| panic!("{end}"));
        assert_eq!(Client::connect(&address).ask(get("/")).text(), "Hello, World!");
        drop(server);

        let path = scratch.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let server = Server::start(with_descriptor(backend, &unix)).unwrap_or_else(|end| panic!("{end}"));
        assert_eq!(Client::connect(&Address::Unix(path.clone())).ask(get("/")).text(), "Hello, World!");
        drop(server);
        assert!(path.exists(), "the file belongs to whoever made the socket");
    });
}

#[test]
fn a_descriptor_that_is_no_listener_is_refused() {
    for_each_backend(|backend| {
        expect_refusal(&run(backend.command("builtin:hello", &["--bind", "fd://124"])), &["124"]);
        let file = fs::File::open("/dev/null").unwrap();
        expect_refusal(&run(with_descriptor(backend, &file)), &["123"]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        expect_refusal(&run(with_descriptor(backend, &connected)), &["123"]);
    });
}

#[test]
fn a_port_in_use_is_refused() {
    for_each_backend(|backend| {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        expect_refusal(&run(backend.command("builtin:hello", &["--bind", &address])), &[&address, "in use"]);
    });
}

/// SO_REUSEPORT would let the two share the port, each getting some of the connections.
#[test]
fn a_port_in_use_by_another_uringd_is_refused() {
    for_each_backend(|backend| {
        let first = backend.serve("builtin:hello", &[]);
        let address = first.address().to_string();
        expect_refusal(&run(backend.command("builtin:hello", &["--bind", &address])), &[&address, "in use"]);
        first.expect_alive();
    });
}

#[test]
fn a_port_is_free_again_at_once() {
    for_each_backend(|backend| {
        let mut first = backend.serve("builtin:hello", &[]);
        let address = first.address().to_string();
        let mut client = first.connect();
        assert_eq!(client.ask(get("/")).status, 200);
        assert_eq!(first.stop(), Some(0));
        // The connection above is in TIME_WAIT on the server's side now.
        backend.serve("builtin:hello", &["--bind", &address]).expect_alive();
    });
}

#[test]
fn an_address_of_another_machine_is_refused() {
    for_each_backend(|backend| {
        expect_refusal(&run(backend.command("builtin:hello", &["--bind", "192.0.2.1:8000"])), &["192.0.2.1:8000"]);
    });
}

#[test]
fn a_bind_that_is_none_is_refused() {
    for_each_backend(|backend| {
        for bind in ["fd://x", "127.0.0.1:99999", "unix:", "[::1"] {
            let ended = run(backend.command("builtin:hello", &["--bind", bind]));
            assert!([Some(1), Some(2)].contains(&ended.code()), "{bind:?}: {ended}");
            assert!(ended.stderr.contains(bind), "{bind:?}: {ended}");
        }
    });
}

/// The line is the only thing a script has to wait for.
#[test]
fn the_start_up_line_has_the_form_of_the_interface() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:hello", &[]);
        let log = server.log.text();
        let line = log.lines().find(|line| line.contains(" ready: ")).unwrap();
        let head = format!("uringd {} ready: http://{}, 1 core (", env!("CARGO_PKG_VERSION"), server.address());
        assert!(line.starts_with(&head), "{line:?} should begin with {head:?}");
        let driver = if backend.to_string() == "epoll" { "epoll" } else { "io_uring tier " };
        assert!(line.contains(driver), "{line:?} should name {driver:?}");
        assert!(line.contains("builtin:hello"), "{line:?} should name what is served");
        let ready = BufReader::new(log.as_bytes()).lines().filter(|line| line.as_ref().unwrap().contains("ready:"));
        assert_eq!(ready.count(), 1, "{log}");
    });
}
