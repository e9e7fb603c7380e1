//! Servers in the test's own process, on one core and on a port of the kernel's choice.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::{
    net::TcpStream,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Duration,
};

use uringd::{
    Config, Error, Result, Running, Server,
    config::{Backend, Bind, Cores},
};

/// Longest wait for anything that should happen at once.
pub const WAIT: Duration = Duration::from_secs(20);

/// Runs the story against a server on each backend that this machine allows. It is told the address.
pub fn each_backend(make: impl Fn() -> Server, change: impl Fn(&mut Config), story: impl Fn(&str, &Running)) {
    for backend in [Backend::Uring, Backend::Epoll] {
        let change = |config: &mut Config| {
            config.backend = backend;
            change(config);
        };
        match catch_unwind(AssertUnwindSafe(|| serve(make(), change, &story))) {
            Ok(Ok(())) => {}
            Ok(Err(error @ Error::NoUring(_))) => eprintln!("SKIPPED io_uring: {error}"),
            Ok(Err(error)) => panic!("{backend:?}: {error}"),
            Err(panic) => {
                eprintln!("with {backend:?}");
                resume_unwind(panic);
            }
        }
    }
}

/// Runs the story against this server, which must come to a clean end.
///
/// # Errors
/// It could not be started.
pub fn serve(server: Server, change: impl Fn(&mut Config), story: impl Fn(&str, &Running)) -> Result<()> {
    let mut config = Config { bind: vec![Bind::Tcp("127.0.0.1:0".to_owned())], cores: Cores::Count(1), ..Config::default() };
    change(&mut config);
    let running = server.config(config).start()?;
    let address = running.addresses()[0].strip_prefix("http://").expect("TCP").to_owned();
    story(&address, &running);
    running.stop();
    running.wait().expect("a clean end");
    Ok(())
}

pub fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a server");
    stream.set_read_timeout(Some(WAIT)).expect("a socket");
    stream.set_write_timeout(Some(WAIT)).expect("a socket");
    stream
}
