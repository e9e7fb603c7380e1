//! One suite for every driver: the promises of the seam, held by a real kernel.
//!
//! A test is a sentence and a function that gets a [`Kernel`]: a driver, the descriptors it was given, and what it
//! has reported so far. [`with_every_driver`] calls it for epoll, for io_uring with all that the machine has, and
//! for io_uring masked down to each older tier. Where io_uring is forbidden, those runs are skipped with a line that says so.
//!
//! If you add a promise to [`super`], add its sentence here.

use std::{
    env,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    Chunk, Completion, Driver, ListenerIndex, Op, Payload, Peer, RecvEnd, Shutdown, Token,
    capabilities::Capabilities,
    epoll::EpollDriver,
    uring::{Sizes, UringDriver},
};

// ---------------------------------------------------------------------------------- receiving

#[test]
fn a_receive_reports_bytes_again_and_again_and_then_the_end() {
    with_every_driver(&[], |kernel| {
        for (mut peer, fd) in [unix_pair(), tcp_pair()] {
            let token = kernel.connection(fd);
            kernel.push(Op::Recv { token, fd });
            for text in ["GET /", " HTTP/1.1\r\n", "\r\n"] {
                peer.write_all(text.as_bytes()).unwrap();
                kernel.until_received(token, text.as_bytes());
            }
            peer.shut(libc::SHUT_WR);
            assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
            kernel.expect_silence();
            kernel.close(fd);
        }
    });
}

#[test]
fn bytes_and_the_end_that_arrived_before_the_receive_are_both_reported() {
    with_every_driver(&[], |kernel| {
        for (mut peer, fd) in [unix_pair(), tcp_pair()] {
            let token = kernel.connection(fd);
            peer.write_all(b"all I have").unwrap();
            drop(peer);
            kernel.push(Op::Recv { token, fd });
            kernel.until_received(token, b"all I have");
            assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
            kernel.close(fd);
        }
    });
}

#[test]
fn bytes_and_the_end_that_arrive_between_two_turns_are_both_reported() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        kernel.turn(Duration::ZERO);
        peer.write_all(b"late").unwrap();
        drop(peer);
        kernel.until_received(token, b"late");
        assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
        kernel.close(fd);
    });
}

#[test]
fn a_reset_of_the_peer_is_the_errno_that_ends_the_receive() {
    with_every_driver(&[], |kernel| {
        let (peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        kernel.turn(Duration::ZERO);
        peer.reset();
        assert_eq!(kernel.until_recv_end(token), RecvEnd::Failed(libc::ECONNRESET));
        kernel.close(fd);
    });
}

#[test]
fn a_stopped_receive_ends_once_and_what_comes_later_waits_for_the_next_one() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        peer.write_all(b"first").unwrap();
        kernel.until_received(token, b"first");
        kernel.stop_recv(token, fd);
        peer.write_all(b"second").unwrap();
        kernel.expect_silence();
        kernel.push(Op::Recv { token, fd });
        kernel.until_received(token, b"second");
        kernel.stop_recv(token, fd);
        kernel.close(fd);
    });
}

#[test]
fn stopping_a_receive_that_is_over_says_nothing() {
    with_every_driver(&[], |kernel| {
        let (peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::RecvStop { token, fd });
        kernel.expect_silence();
        kernel.push(Op::Recv { token, fd });
        drop(peer);
        assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
        kernel.push(Op::RecvStop { token, fd });
        kernel.expect_silence();
        kernel.close(fd);
    });
}

#[test]
fn a_receive_that_is_stopped_and_started_in_one_turn_goes_on() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        for round in 0..20u8 {
            kernel.push(Op::Recv { token, fd });
            kernel.turn(Duration::ZERO);
            kernel.stop_recv(token, fd);
            peer.write_all(&[round]).unwrap();
        }
        kernel.push(Op::Recv { token, fd });
        let all: Vec<u8> = (0..20).collect();
        kernel.until_received(token, &all);
        kernel.stop_recv(token, fd);
        kernel.close(fd);
    });
}

#[test]
fn a_long_upload_arrives_whole_and_in_order() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        let body = pattern(8 << 20);
        let sent = body.clone();
        let writer = thread::spawn(move || peer.write_all(&sent).map(|()| peer));
        kernel.until_received(token, &body);
        let peer = writer.join().unwrap().unwrap();
        peer.shut(libc::SHUT_WR);
        assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
        kernel.close(fd);
    });
}

#[test]
fn a_peer_that_sends_without_end_does_not_keep_others_waiting() {
    with_every_driver(&[], |kernel| {
        let (mut flood, flooded) = tcp_pair();
        let (mut quiet, waiting) = tcp_pair();
        let (flooded_token, waiting_token) = (kernel.connection(flooded), kernel.connection(waiting));
        kernel.push(Op::Recv { token: flooded_token, fd: flooded });
        kernel.push(Op::Recv { token: waiting_token, fd: waiting });
        // Ends when the connection is shut below.
        let writer = thread::spawn(move || while flood.write_all(&[b'x'; 64 << 10]).is_ok() {});
        kernel.until("the flood", |kernel| kernel.received_bytes(flooded_token) > 4 << 20);
        for round in 0..20 {
            quiet.write_all(b"me too").unwrap();
            let before = kernel.received_bytes(flooded_token);
            kernel.until_received(waiting_token, b"me too");
            let between = kernel.received_bytes(flooded_token) - before;
            // A turn of io_uring takes what lies in its 1,024 buffers of 4 KiB: at most two of those.
            assert!(between <= 16 << 20, "round {round}: {between} bytes of the other were read first");
        }
        for (token, fd) in [(flooded_token, flooded), (waiting_token, waiting)] {
            kernel.push(Op::Shutdown { fd, how: Shutdown::Both });
            kernel.push(Op::RecvStop { token, fd });
        }
        kernel.until_recv_end(flooded_token);
        kernel.until_recv_end(waiting_token);
        // Without a reset, the writer would wait for room in a socket that nobody reads any more (tcp_fin_timeout).
        for fd in [flooded, waiting] {
            kernel.push(Op::Close { fd, reset: true });
        }
        writer.join().unwrap();
    });
}

// ---------------------------------------------------------------------------------- sending

#[test]
fn a_send_gives_its_chunk_back_with_the_number_of_bytes() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        let shared: Arc<[u8]> = Arc::from(&b"<shared>"[..]);
        for chunk in [
            Chunk::owned(b"owned".to_vec()),
            Chunk { payload: Payload::Static(b"..static.."), start: 2, end: 8 },
            Chunk { payload: Payload::Shared(shared), start: 1, end: 7 },
        ] {
            let (bytes, range) = (chunk.bytes().to_vec(), chunk.start..chunk.end);
            kernel.push(Op::Send { token, fd, chunk });
            let (chunk, result) = kernel.until_sent(token);
            assert_eq!((chunk.bytes(), chunk.start..chunk.end, result), (&bytes[..], range, Ok(bytes.len())));
            assert_eq!(peer.read_exactly(bytes.len()), bytes);
        }
        kernel.expect_silence();
        kernel.close(fd);
    });
}

#[test]
fn a_body_larger_than_every_socket_buffer_goes_out_whole() {
    with_every_driver(&[], |kernel| {
        for (mut peer, fd) in [unix_pair(), tcp_pair()] {
            let token = kernel.connection(fd);
            // Twice: the second one starts on a socket that has been full before.
            for round in 0..2 {
                let body = pattern((24 << 20) + round);
                let length = body.len();
                let early = kernel.fill(token, fd, Chunk::owned(body.clone()));
                let reader = thread::spawn(move || {
                    let read = peer.read_exactly(length);
                    (peer, read)
                });
                assert_eq!(early + kernel.until_sent_whole(token, fd), length);
                let (back, read) = reader.join().unwrap();
                assert!(read == body, "the bytes differ");
                peer = back;
            }
            kernel.close(fd);
        }
    });
}

#[test]
fn a_shutdown_ends_a_pending_receive_and_a_pending_send() {
    with_every_driver(&[], |kernel| {
        for (mut peer, fd) in [unix_pair(), tcp_pair()] {
            let token = kernel.connection(fd);
            kernel.push(Op::Recv { token, fd });
            let sent = kernel.fill(token, fd, Chunk::owned(pattern(64 << 20)));
            kernel.push(Op::Shutdown { fd, how: Shutdown::Both });
            assert_eq!(kernel.until_sent(token).1, Err(libc::EPIPE));
            assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
            kernel.expect_silence();
            kernel.close(fd);
            let mut rest = Vec::new();
            peer.read_to_end(&mut rest).unwrap();
            assert_eq!(rest.len(), sent, "what was reported as sent, and what the peer got");
        }
    });
}

/// The shutdown alone is not enough while bytes arrive: the kernel may miss it (kernel-notes/multishot.md).
#[test]
fn a_shutdown_and_a_stop_end_a_receive_in_the_middle_of_a_flood() {
    with_every_driver(&[], |kernel| {
        in_floods(kernel, |kernel, token, fd, round| {
            kernel.push(Op::Recv { token, fd });
            kernel.until("the flood", |kernel| kernel.received_bytes(token) > (1 << 20) + (round << 15));
            // Whoever ends a connection arms no receive on it again, whichever way the last one came to its end.
            kernel.arms_again = false;
            kernel.push(Op::Shutdown { fd, how: Shutdown::Both });
            kernel.push(Op::RecvStop { token, fd });
            let end = kernel.until_recv_end(token);
            assert!(!matches!(end, RecvEnd::Failed(errno) if errno != libc::ECONNRESET), "{end:?}");
        });
    });
}

#[test]
fn a_receive_that_is_armed_and_stopped_in_one_turn_ends_however_much_there_is_to_read() {
    with_every_driver(&[], |kernel| {
        in_floods(kernel, |kernel, token, fd, _| {
            kernel.arms_again = false;
            kernel.push(Op::Recv { token, fd });
            kernel.push(Op::RecvStop { token, fd });
            let end = kernel.until_recv_end(token);
            assert!(matches!(end, RecvEnd::Stopped | RecvEnd::Again | RecvEnd::NoBuffers), "{end:?}");
        });
    });
}

/// Twenty connections, one after the other, whose peers send without end until they are reset.
fn in_floods(kernel: &mut Kernel, mut body: impl FnMut(&mut Kernel, Token, RawFd, usize)) {
    for round in 0..20 {
        let (mut flood, fd) = tcp_pair();
        let token = kernel.connection(fd);
        let writer = thread::spawn(move || while flood.write_all(&[b'x'; 64 << 10]).is_ok() {});
        body(kernel, token, fd, round);
        kernel.arms_again = true;
        kernel.push(Op::Close { fd, reset: true });
        writer.join().unwrap();
        kernel.events.clear();
    }
}

/// Two buffers for twenty connections, each of which has more to read than both can take.
#[test]
fn receives_that_found_no_buffer_are_tried_in_turn_and_can_be_stopped_before_theirs() {
    let caps = match Capabilities::probe() {
        Ok(caps) if caps.buffer_ring => caps,
        _ => return eprintln!("SKIPPED: there is no ring of buffers here"),
    };
    let sizes = Sizes { buffers: 2, buffer_bytes: 100, ..Sizes::default() };
    let mut kernel = Kernel::new("two buffers", Box::new(UringDriver::with_sizes(&[], caps, sizes).unwrap()));
    let text = pattern(1_000);
    let mut connections = Vec::new();
    for _ in 0..20 {
        let (mut peer, fd) = unix_pair();
        peer.write_all(&text).unwrap();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        connections.push((peer, token, fd));
    }
    // All are tried, and asked for again.
    kernel.turn(Duration::ZERO);
    let (_, last, fd) = connections[19];
    kernel.arms_again = false;
    kernel.push(Op::RecvStop { token: last, fd });
    kernel.until_recv_end(last);
    kernel.arms_again = true;
    for (_, token, fd) in &connections {
        let ended = |event: &Event| matches!(event, Event::RecvEnded { token: of, .. } if of == token);
        if kernel.take(ended).is_some() || *token == last {
            kernel.push(Op::Recv { token: *token, fd: *fd });
        }
    }
    connections.iter().for_each(|(_, token, _)| kernel.until_received(*token, &text));
    let no_buffers = kernel.driver.figures().no_buffers;
    assert!((10..400).contains(&no_buffers), "{no_buffers} tries for 200 buffers full of bytes");
}

#[test]
fn a_send_into_a_connection_that_was_shut_is_epipe() {
    with_every_driver(&[], |kernel| {
        let (_peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Shutdown { fd, how: Shutdown::Write });
        kernel.push(Op::Send { token, fd, chunk: Chunk::owned(b"too late".to_vec()) });
        assert_eq!(kernel.until_sent(token).1, Err(libc::EPIPE));
        kernel.close(fd);
    });
}

#[test]
fn a_reset_of_the_peer_ends_a_pending_send() {
    with_every_driver(&[], |kernel| {
        let (peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.fill(token, fd, Chunk::owned(pattern(64 << 20)));
        peer.reset();
        let result = kernel.until_sent(token).1;
        assert!(matches!(result, Err(libc::ECONNRESET | libc::EPIPE)), "{result:?}");
        kernel.close(fd);
    });
}

#[test]
fn shutting_the_write_side_gives_the_peer_the_end_and_still_receives() {
    with_every_driver(&[], |kernel| {
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        kernel.push(Op::Send { token, fd, chunk: Chunk::owned(b"bye".to_vec()) });
        assert_eq!(kernel.until_sent(token).1, Ok(3));
        kernel.push(Op::Shutdown { fd, how: Shutdown::Write });
        let mut read = Vec::new();
        peer.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"bye");
        peer.write_all(b"a late body").unwrap();
        kernel.until_received(token, b"a late body");
        peer.shut(libc::SHUT_WR);
        assert_eq!(kernel.until_recv_end(token), RecvEnd::Eof);
        kernel.close(fd);
    });
}

// ---------------------------------------------------------------------------------- closing

#[test]
fn a_close_gives_the_peer_the_end_and_a_close_with_reset_econnreset() {
    with_every_driver(&[], |kernel| {
        for reset in [false, true] {
            let (mut peer, fd) = tcp_pair();
            let token = kernel.connection(fd);
            kernel.push(Op::Recv { token, fd });
            peer.write_all(b"hello").unwrap();
            kernel.until_received(token, b"hello");
            kernel.stop_recv(token, fd);
            kernel.push(Op::Close { fd, reset });
            kernel.expect_silence();
            match peer.read(&mut [0; 8]) {
                Ok(count) => assert!(!reset && count == 0),
                Err(error) => assert!(reset && error.raw_os_error() == Some(libc::ECONNRESET), "{error}"),
            }
        }
    });
}

#[test]
fn the_next_owner_of_a_slot_and_of_a_descriptor_hears_nothing_of_the_last() {
    with_every_driver(&[], |kernel| {
        for generation in 0..50u32 {
            let (mut peer, fd) = tcp_pair();
            let token = Token { slot: 3, generation };
            let greeting = format!("generation {generation}");
            kernel.push(Op::Recv { token, fd });
            peer.write_all(greeting.as_bytes()).unwrap();
            kernel.until_received(token, greeting.as_bytes());
            kernel.push(Op::Send { token, fd, chunk: Chunk::owned(greeting.clone().into_bytes()) });
            assert_eq!(kernel.until_sent(token).1, Ok(greeting.len()));
            // What the peer still says belongs to a connection that is closed in the same turn.
            peer.write_all(b"not for the next one").unwrap();
            kernel.push(Op::Shutdown { fd, how: Shutdown::Both });
            kernel.until_recv_end(token);
            kernel.close(fd);
            let theirs = |event: &Event| matches!(event, Event::Received { token: of, .. } if *of == token);
            while kernel.take(theirs).is_some() {}
            assert!(kernel.events.is_empty(), "{:?}", kernel.events);
        }
    });
}

// ---------------------------------------------------------------------------------- accepting

#[test]
fn every_connection_is_accepted_with_the_address_of_its_peer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = unix_listener("accept");
    with_every_driver(&[listener.as_raw_fd(), unix.as_raw_fd()], |kernel| {
        kernel.push(Op::Accept { listener: 0 });
        kernel.push(Op::Accept { listener: 1 });
        let clients = connect(&listener, 100);
        let mut expected: Vec<_> = clients.iter().map(|client| Peer::Inet(client.local_addr().unwrap())).collect();
        let mut accepted: Vec<_> = kernel.until_accepted(0, 100).into_iter().map(|(_fd, peer)| peer).collect();
        let by_port = |peer: &Peer| matches!(peer, Peer::Inet(address) if address.port() > 0).then(|| format!("{peer:?}"));
        expected.sort_by_key(by_port);
        accepted.sort_by_key(by_port);
        assert_eq!(accepted, expected);
        let _client = UnixStream::connect_addr(&unix.local_addr().unwrap()).unwrap();
        assert_eq!(kernel.until_accepted(1, 1)[0].1, Peer::Unix);
        kernel.stop_accept(0);
        kernel.stop_accept(1);
    });
}

#[test]
fn a_stopped_accept_ends_once_and_connections_wait_for_the_next_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    with_every_driver(&[listener.as_raw_fd()], |kernel| {
        for round in 0..3 {
            kernel.push(Op::Accept { listener: 0 });
            let _clients = connect(&listener, 3);
            kernel.until_accepted(0, 3);
            kernel.stop_accept(0);
            let _waiting = connect(&listener, 2);
            kernel.expect_silence();
            kernel.push(Op::Accept { listener: 0 });
            kernel.until_accepted(0, 2);
            kernel.stop_accept(0);
            assert!(kernel.events.is_empty(), "round {round}: {:?}", kernel.events);
        }
    });
}

#[test]
fn a_shut_listener_ends_its_accept_with_einval() {
    for_every_driver(|name, driver| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let Some(driver) = driver(&[listener.as_raw_fd()]) else { return };
        let mut kernel = Kernel::new(name, driver);
        kernel.push(Op::Accept { listener: 0 });
        kernel.expect_silence();
        // SAFETY: shutdown(2) takes integers, and the listener is open.
        unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        assert_eq!(kernel.until_accept_end(0), libc::EINVAL);
        kernel.expect_silence();
    });
}

/// In a process of its own: RLIMIT_NOFILE is everybody's.
#[test]
fn an_accept_without_a_free_descriptor_ends_with_emfile_and_loses_nobody() {
    const CHILD: &str = "URINGD_DRIVER_TESTS_CHILD";
    if env::var_os(CHILD).is_none() {
        // Without the name of the crate, as the harness names tests.
        let module = module_path!().split_once("::").map_or("", |(_, rest)| rest);
        let name = format!("{module}::an_accept_without_a_free_descriptor_ends_with_emfile_and_loses_nobody");
        let mut child = Command::new(env::current_exe().unwrap());
        let output = child.args(["--exact", &name, "--nocapture"]).env(CHILD, "1").output().unwrap();
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.contains("1 passed"), "{out}{errors}");
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    with_every_driver(&[listener.as_raw_fd()], |kernel| {
        let clients = connect(&listener, 8);
        let spare: Vec<_> = (0..3).map(|_| listener.try_clone().unwrap()).collect();
        let lowest_free = spare.iter().map(AsRawFd::as_raw_fd).max().unwrap() + 1;
        drop(spare);
        let before = limit_descriptors(lowest_free as libc::rlim_t);
        kernel.push(Op::Accept { listener: 0 });
        let error = kernel.until_accept_end(0);
        limit_descriptors(before);
        let early = kernel.take_accepted(0);
        assert_eq!((error, early.len() < 8), (libc::EMFILE, true), "{} accepted", early.len());
        kernel.push(Op::Accept { listener: 0 });
        kernel.until_accepted(0, clients.len() - early.len());
        kernel.stop_accept(0);
    });
}

// ---------------------------------------------------------------------------------- waiting

#[test]
fn the_doorbell_ends_a_wait_from_another_thread() {
    with_every_driver(&[], |kernel| {
        for _round in 0..20 {
            let waker = kernel.driver.waker();
            waker.sleep();
            let ringer = thread::spawn(move || {
                thread::sleep(Duration::from_millis(2));
                waker.wake();
            });
            kernel.driver.wait(None, &mut |completion| panic!("{completion:?}")).unwrap();
            ringer.join().unwrap();
        }
    });
}

#[test]
fn a_ring_before_the_wait_is_not_lost() {
    with_every_driver(&[], |kernel| {
        for _round in 0..20 {
            let waker = kernel.driver.waker();
            waker.sleep();
            waker.wake();
            kernel.driver.wait(None, &mut |completion| panic!("{completion:?}")).unwrap();
        }
    });
}

#[test]
fn a_wait_lasts_its_timeout_and_a_timeout_of_zero_does_not_wait() {
    with_every_driver(&[], |kernel| {
        kernel.turn(Duration::ZERO);
        let start = Instant::now();
        kernel.turn(Duration::from_millis(30));
        assert!(start.elapsed() >= Duration::from_millis(30), "{:?}", start.elapsed());
        let start = Instant::now();
        for _ in 0..100 {
            kernel.turn(Duration::ZERO);
        }
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        // Below the millisecond that epoll_wait(2) counts in.
        let start = Instant::now();
        kernel.turn(Duration::from_micros(300));
        assert!(start.elapsed() >= Duration::from_micros(300), "{:?}", start.elapsed());
    });
}

#[test]
fn every_turn_is_counted() {
    with_every_driver(&[], |kernel| {
        let before = kernel.driver.figures();
        let (mut peer, fd) = tcp_pair();
        let token = kernel.connection(fd);
        kernel.push(Op::Recv { token, fd });
        peer.write_all(b"count me").unwrap();
        kernel.until_received(token, b"count me");
        let after = kernel.driver.figures();
        assert!(after.enters > before.enters && after.completions > before.completions, "{before:?} {after:?}");
        kernel.stop_recv(token, fd);
        kernel.close(fd);
    });
}

// ---------------------------------------------------------------------------------- everything at once

/// Sixty connections echo what they hear, in pieces of random sizes, while their peers send, read and leave as they like.
#[test]
fn many_connections_at_once_each_get_back_exactly_what_they_sent() {
    const CONNECTIONS: usize = 60;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    with_every_driver(&[listener.as_raw_fd()], |kernel| {
        let address = listener.local_addr().unwrap();
        let clients: Vec<_> = (0..CONNECTIONS).map(|number| thread::spawn(move || echo_client(address, number as u32))).collect();
        kernel.push(Op::Accept { listener: 0 });
        let mut echoes: Vec<Echo> = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while echoes.len() < CONNECTIONS || echoes.iter().any(|echo| !echo.closed) {
            assert!(Instant::now() < deadline, "{} accepted", echoes.len());
            kernel.turn(Duration::from_millis(50));
            for event in std::mem::take(&mut kernel.events) {
                echo(kernel, &mut echoes, event);
            }
        }
        clients.into_iter().for_each(|client| client.join().unwrap());
        kernel.stop_accept(0);
    });
}

struct Echo {
    fd: RawFd,
    unsent: Vec<u8>,
    sending: bool,
    receiving: bool,
    closed: bool,
}

/// The smallest engine: one send in flight, close when the peer has ended and everything is sent.
fn echo(kernel: &mut Kernel, echoes: &mut Vec<Echo>, event: Event) {
    let token = match event {
        Event::Accepted { fd, .. } => {
            let token = Token { slot: echoes.len() as u32, generation: 7 };
            echoes.push(Echo { fd, unsent: Vec::new(), sending: false, receiving: true, closed: false });
            kernel.push(Op::Recv { token, fd });
            token
        }
        Event::Received { token, bytes } => {
            echoes[token.slot as usize].unsent.extend(bytes);
            token
        }
        Event::RecvEnded { token, end } => {
            assert_eq!(end, RecvEnd::Eof);
            echoes[token.slot as usize].receiving = false;
            token
        }
        Event::Sent { token, chunk, result } => {
            let echo = &mut echoes[token.slot as usize];
            let rest = chunk.bytes()[result.unwrap()..].to_vec();
            echo.unsent.splice(0..0, rest);
            echo.sending = false;
            token
        }
        Event::AcceptEnded { error, .. } => panic!("accepting ended with {error}"),
    };
    let echo = &mut echoes[token.slot as usize];
    let fd = echo.fd;
    if !echo.sending && !echo.unsent.is_empty() {
        echo.sending = true;
        let chunk = Chunk::owned(std::mem::take(&mut echo.unsent));
        kernel.push(Op::Send { token, fd, chunk });
    } else if !echo.sending && !echo.receiving {
        echo.closed = true;
        kernel.push(Op::Close { fd, reset: false });
    }
}

/// Sends up to 1 MiB while reading it back, half-closes, and expects the rest and then the end.
fn echo_client(address: SocketAddr, seed: u32) {
    let mut stream = TcpStream::connect(address).unwrap();
    let mut random = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = move |below: usize| {
        // xorshift32: enough to vary sizes, and the same in every run.
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        random as usize % below
    };
    let bytes = pattern(1 + next(1 << 20));
    let mut read_side = stream.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut read = Vec::new();
        read_side.read_to_end(&mut read).map(|_| read)
    });
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(1 + next(40_000)));
        stream.write_all(piece).unwrap();
        rest = after;
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let read = reader.join().unwrap().unwrap();
    assert!(read == bytes, "client {seed}: {} of {} bytes came back, or other ones", read.len(), bytes.len());
}

// ---------------------------------------------------------------------------------- the drivers under test

/// Makes a driver for these listeners, or says why there is none.
type Construct<'a> = &'a dyn Fn(&[RawFd]) -> Option<Box<dyn Driver>>;

/// Calls `body` with a fresh driver of each kind; `listeners` survive all of them.
fn with_every_driver(listeners: &[RawFd], body: impl Fn(&mut Kernel)) {
    for_every_driver(|name, construct| {
        if let Some(driver) = construct(listeners) {
            body(&mut Kernel::new(name, driver));
        }
    });
}

fn for_every_driver(body: impl Fn(&str, Construct<'_>)) {
    body("epoll", &|listeners| Some(Box::new(EpollDriver::new(listeners).unwrap())));
    for mask in ["", "tier=5.15", "tier=5.19", "tier=6.0", "tier=6.1", "-multishot_recv", "-multishot_accept"] {
        body(&format!("uring {mask}"), &|listeners| {
            let driver = Capabilities::probe().and_then(|caps| UringDriver::new(listeners, caps.masked(mask).expect("a known mask")));
            match driver {
                Ok(driver) => Some(Box::new(driver)),
                Err(reason) => {
                    let test = thread::current().name().unwrap_or("?").to_owned();
                    // Not eprintln!, which the harness catches.
                    let _ = writeln!(io::stderr(), "SKIPPED {test} (uring {mask}): {reason}");
                    None
                }
            }
        });
    }
}

/// What a driver reported, with the bytes it lent.
#[derive(Debug)]
enum Event {
    Accepted { listener: ListenerIndex, fd: RawFd, peer: Peer },
    AcceptEnded { listener: ListenerIndex, error: i32 },
    Received { token: Token, bytes: Vec<u8> },
    RecvEnded { token: Token, end: RecvEnd },
    Sent { token: Token, chunk: Chunk, result: Result<usize, i32> },
}

/// The last events, without megabytes of bytes.
fn summary(events: &[Event]) -> String {
    let one = |event: &Event| format!("{event:?}").chars().take(120).collect::<String>();
    let last: Vec<_> = events.iter().rev().take(8).rev().map(one).collect();
    format!("{} events, the last ones {last:#?}", events.len())
}

/// A driver, and what it has reported that no test has looked at yet.
struct Kernel {
    name: String,
    driver: Box<dyn Driver>,
    events: Vec<Event>,
    /// Descriptors of receives in flight: a driver may ask for them to be armed again.
    receiving: Vec<(Token, RawFd)>,
    /// Whether it gets what it asks for.
    arms_again: bool,
    next_slot: u32,
}

/// Longest wait for anything. Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

impl Kernel {
    fn new(name: &str, driver: Box<dyn Driver>) -> Kernel {
        Kernel { name: name.to_owned(), driver, events: Vec::new(), receiving: Vec::new(), arms_again: true, next_slot: 0 }
    }

    /// A token for a new connection.
    fn connection(&mut self, _fd: RawFd) -> Token {
        self.next_slot += 1;
        Token { slot: self.next_slot, generation: Token::GENERATION_MASK }
    }

    fn push(&mut self, op: Op) {
        if let Op::Recv { token, fd } = op {
            self.receiving.push((token, fd));
        }
        self.driver.push(op);
    }

    fn close(&mut self, fd: RawFd) {
        self.push(Op::Close { fd, reset: false });
    }

    /// One turn of a shard's loop. Arms again what the driver wants armed again, as the engine does.
    fn turn(&mut self, timeout: Duration) {
        let mut events = Vec::new();
        let mut each = |completion: Completion<'_>| {
            events.push(match completion {
                Completion::Accepted { listener, fd, peer } => Event::Accepted { listener, fd, peer },
                Completion::AcceptEnded { listener, error } => Event::AcceptEnded { listener, error },
                Completion::Received { token, bytes } => {
                    assert!(!bytes.is_empty(), "an empty receive");
                    Event::Received { token, bytes: bytes.to_vec() }
                }
                Completion::RecvEnded { token, end } => Event::RecvEnded { token, end },
                Completion::Sent { token, chunk, result } => Event::Sent { token, chunk, result },
            });
        };
        self.driver.wait(Some(timeout), &mut each).unwrap();
        let mut again = Vec::new();
        for event in events {
            if let Event::RecvEnded { token, end } = event {
                let at = self.receiving.iter().position(|receive| receive.0 == token);
                let at = at.unwrap_or_else(|| panic!("{}: a receive that is over ended again: {end:?}", self.name));
                let receive = self.receiving.swap_remove(at);
                if self.arms_again && matches!(end, RecvEnd::Again | RecvEnd::NoBuffers) {
                    again.push(receive);
                    continue;
                }
            }
            self.events.push(event);
        }
        for (token, fd) in again {
            self.push(Op::Recv { token, fd });
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Kernel) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "{}: no {what}; reported: {}; receiving: {:?}",
                self.name,
                summary(&self.events),
                self.receiving
            );
            self.turn(Duration::from_millis(50));
        }
    }

    /// Nothing more is reported: several turns, because an answer may take two.
    fn expect_silence(&mut self) {
        let before = self.events.len();
        for timeout in [0, 0, 5, 5] {
            self.turn(Duration::from_millis(timeout));
        }
        assert_eq!(self.events.len(), before, "{}: {}", self.name, summary(&self.events));
    }

    fn received_bytes(&mut self, token: Token) -> usize {
        let length = |event: &Event| match event {
            Event::Received { token: of, bytes } if *of == token => bytes.len(),
            _ => 0,
        };
        self.events.iter().map(length).sum()
    }

    /// Exactly these bytes, in any number of pieces.
    fn until_received(&mut self, token: Token, expected: &[u8]) {
        let mut received = Vec::new();
        let name = format!("{} bytes of {token:?}", expected.len());
        self.until(&name, |kernel| {
            kernel.events.retain(|event| match event {
                Event::Received { token: of, bytes } if *of == token => {
                    received.extend_from_slice(bytes);
                    false
                }
                _ => true,
            });
            received.len() >= expected.len()
        });
        assert!(received == expected, "{}: {} bytes, or other ones", self.name, received.len());
    }

    fn until_recv_end(&mut self, token: Token) -> RecvEnd {
        let mut found = None;
        self.until("end of a receive", |kernel| {
            found = kernel.take(|event| matches!(event, Event::RecvEnded { token: of, .. } if *of == token));
            found.is_some()
        });
        match found {
            Some(Event::RecvEnded { end, .. }) => end,
            _ => unreachable!(),
        }
    }

    /// Stops a receive. If it ended by itself at the same moment, as with a one-shot one, it has been armed again: then once more.
    fn stop_recv(&mut self, token: Token, fd: RawFd) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.push(Op::RecvStop { token, fd });
            for timeout in [0, 0, 5, 5] {
                self.turn(Duration::from_millis(timeout));
                if let Some(event) = self.take(|event| matches!(event, Event::RecvEnded { token: of, .. } if *of == token)) {
                    assert!(matches!(event, Event::RecvEnded { end: RecvEnd::Stopped, .. }), "{event:?}");
                    return;
                }
            }
        }
        panic!("{}: the receive did not stop", self.name);
    }

    fn until_sent(&mut self, token: Token) -> (Chunk, Result<usize, i32>) {
        let mut found = None;
        self.until("end of a send", |kernel| {
            found = kernel.take(|event| matches!(event, Event::Sent { token: of, .. } if *of == token));
            found.is_some()
        });
        match found {
            Some(Event::Sent { chunk, result, .. }) => (chunk, result),
            _ => unreachable!(),
        }
    }

    /// The send in flight and what follows it, as the engine does it: after a short send, the rest.
    fn until_sent_whole(&mut self, token: Token, fd: RawFd) -> usize {
        let mut total = 0;
        loop {
            let (chunk, result) = self.until_sent(token);
            match self.send_rest(token, fd, chunk, result) {
                (count, true) => total += count,
                (count, false) => return total + count,
            }
        }
    }

    /// Sends until a send stays pending because the peer does not read; how many bytes went out before.
    fn fill(&mut self, token: Token, fd: RawFd, chunk: Chunk) -> usize {
        self.push(Op::Send { token, fd, chunk });
        let mut total = 0;
        let mut quiet = 0;
        while quiet < 4 {
            self.turn(Duration::from_millis(5));
            quiet += 1;
            while let Some(event) = self.take(|event| matches!(event, Event::Sent { token: of, .. } if *of == token)) {
                let Event::Sent { chunk, result, .. } = event else { unreachable!() };
                let (count, pending) = self.send_rest(token, fd, chunk, result);
                assert!(pending, "{}: the peer's buffers took everything", self.name);
                total += count;
                quiet = 0;
            }
        }
        total
    }

    /// How much was sent, and whether there is a rest, which is then in flight.
    fn send_rest(&mut self, token: Token, fd: RawFd, mut chunk: Chunk, result: Result<usize, i32>) -> (usize, bool) {
        let count = result.unwrap();
        assert!(count > 0, "{}: a send of nothing", self.name);
        chunk.start += count;
        let pending = !chunk.is_empty();
        if pending {
            self.push(Op::Send { token, fd, chunk });
        }
        (count, pending)
    }

    fn take_accepted(&mut self, listener: ListenerIndex) -> Vec<(OwnedFd, Peer)> {
        let mut accepted = Vec::new();
        self.events.retain(|event| match *event {
            Event::Accepted { listener: of, fd, peer } if of == listener => {
                // SAFETY: the driver just gave the descriptor to us, as it gives it to the engine.
                accepted.push((unsafe { OwnedFd::from_raw_fd(fd) }, peer));
                false
            }
            _ => true,
        });
        accepted
    }

    fn until_accepted(&mut self, listener: ListenerIndex, count: usize) -> Vec<(OwnedFd, Peer)> {
        let mut accepted = Vec::new();
        self.until("connection", |kernel| {
            accepted.extend(kernel.take_accepted(listener));
            accepted.len() >= count
        });
        assert_eq!(accepted.len(), count);
        accepted
    }

    fn until_accept_end(&mut self, listener: ListenerIndex) -> i32 {
        let mut found = None;
        self.until("end of an accept", |kernel| {
            found = kernel.take(|event| matches!(event, Event::AcceptEnded { listener: of, .. } if *of == listener));
            found.is_some()
        });
        match found {
            Some(Event::AcceptEnded { error, .. }) => error,
            _ => unreachable!(),
        }
    }

    fn stop_accept(&mut self, listener: ListenerIndex) {
        self.push(Op::AcceptStop { listener });
        assert_eq!(self.until_accept_end(listener), 0);
        self.expect_silence();
    }

    fn take(&mut self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let at = self.events.iter().position(wanted)?;
        Some(self.events.remove(at))
    }
}

// ---------------------------------------------------------------------------------- peers

/// The other end of a connection: blocking, as simple as can be.
struct PeerEnd(TcpStream);

impl PeerEnd {
    fn new(fd: OwnedFd) -> PeerEnd {
        // A TcpStream around any stream socket: only read, write and shutdown are used, which do not care.
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        PeerEnd(stream)
    }

    fn read_exactly(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn shut(&self, how: i32) {
        // SAFETY: shutdown(2) takes integers, and the stream is open.
        assert_eq!(unsafe { libc::shutdown(self.0.as_raw_fd(), how) }, 0);
    }

    /// Closes with a RST.
    fn reset(self) {
        super::uring::close(self.0.into_raw_fd(), true);
    }
}

impl Read for PeerEnd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for PeerEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The peer's end, and the descriptor that the driver works on; the test closes it through the driver.
fn unix_pair() -> (PeerEnd, RawFd) {
    let (peer, ours) = UnixStream::pair().unwrap();
    (PeerEnd::new(peer.into()), ours.into_raw_fd())
}

fn tcp_pair() -> (PeerEnd, RawFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    (PeerEnd::new(peer.into()), ours.into_raw_fd())
}

/// In the abstract name space, so that no file remains.
fn unix_listener(name: &str) -> UnixListener {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("uringd-driver-tests-{name}-{}", std::process::id());
    UnixListener::bind_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}

fn connect(listener: &TcpListener, count: usize) -> Vec<TcpStream> {
    let address = listener.local_addr().unwrap();
    (0..count).map(|_| TcpStream::connect(address).unwrap()).collect()
}

/// Bytes whose order shows: no two positions within 251 x 256 look alike.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ (at / 251) as u8).collect()
}

/// Sets the soft RLIMIT_NOFILE and returns what it was.
fn limit_descriptors(soft: libc::rlim_t) -> libc::rlim_t {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit(2) writes into `limit`, setrlimit(2) reads it; it lives for both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        let before = limit.rlim_cur;
        limit.rlim_cur = soft;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        before
    }
}
