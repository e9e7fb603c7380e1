//! Facts about the kernel that uringd is built on, shown on a real ring, without any code of uringd.
//!
//! Each page in kernel-notes/ names the tests here that show what it says. A fact that this kernel is too old for, or that
//! needs what this machine forbids, is skipped with a line that begins with `SKIPPED`. A test that fails on
//! some kernel says that a page is wrong there: mend the page first, then what relies on it.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, ErrorKind, Read, Write},
    mem,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    process::Command,
    ptr,
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use io_uring::{Builder, IoUring, Probe, cqueue, opcode, register::Restriction, squeue, types};

/// Says that a fact was not looked at, and leaves the test.
macro_rules! skip {
    ($($reason:tt)*) => {{
        say(&format!("SKIPPED {}: {}", test_name(), format_args!($($reason)*)));
        return;
    }};
}

/// A ring of so many entries, made with these methods of the builder; without one, the test is skipped.
macro_rules! ring {
    ($entries:expr $(, $($setup:tt)+)?) => {{
        let mut builder: Builder = IoUring::builder();
        $(builder.$($setup)+;)?
        match builder.dontfork().build($entries) {
            Ok(ring) => ring,
            Err(error) => skip!("io_uring_setup: {error}"),
        }
    }};
}

// ---------------------------------------------------------------------------------- setup-flags.md

#[test]
fn deferred_work_is_delivered_only_by_an_enter_that_asks_for_events() {
    let mut ring = ring!(8, setup_single_issuer().setup_defer_taskrun());
    let (mut peer, ours) = tcp_pair();
    let mut buffer = [0u8; 8];
    push(&mut ring, opcode::Recv::new(types::Fd(ours.as_raw_fd()), buffer.as_mut_ptr(), 8).build().user_data(1));
    ring.submit().unwrap();
    peer.write_all(b"ready").unwrap();
    thread::sleep(Duration::from_millis(20));
    // Without TASKRUN_FLAG the crate does not know that there is work, so this enter carries no GETEVENTS.
    ring.submit().unwrap();
    assert!(ring.completion().next().is_none(), "delivered without being asked");
    assert_eq!(wait(&mut ring, 1), [(1, 5, 0)].map(Cqe::from));
}

#[test]
fn the_taskrun_flag_tells_a_submit_that_there_are_events_to_fetch() {
    let mut ring = ring!(8, setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag());
    let (mut peer, ours) = tcp_pair();
    let mut buffer = [0u8; 8];
    push(&mut ring, opcode::Recv::new(types::Fd(ours.as_raw_fd()), buffer.as_mut_ptr(), 8).build().user_data(1));
    ring.submit().unwrap();
    assert!(!ring.submission().taskrun());
    peer.write_all(b"ready").unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(ring.submission().taskrun());
    ring.submit().unwrap();
    assert_eq!(ring.completion().next().map(Cqe::of), Some(Cqe::from((1, 5, 0))));
}

#[test]
fn another_thread_gets_eexist_from_a_ring_with_a_single_issuer() {
    let mut ring = ring!(8, setup_single_issuer());
    push(&mut ring, opcode::Nop::new().build());
    let error = thread::scope(|scope| scope.spawn(|| ring.submit()).join().unwrap()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
    ring.submit().unwrap();
}

#[test]
fn an_operation_outside_the_restrictions_gets_eacces_and_the_probe_does_not_tell() {
    let mut ring = ring!(8, setup_r_disabled());
    // 8 is IORING_REGISTER_PROBE: a register operation needs a permission of its own.
    let mut rules = [Restriction::sqe_op(opcode::Nop::CODE), Restriction::register_op(8)];
    ring.submitter().register_restrictions(&mut rules).unwrap();
    ring.submitter().register_enable_rings().unwrap();
    assert!(has(&ring, opcode::Timeout::CODE));
    push(&mut ring, opcode::Nop::new().build().user_data(1));
    let delay = types::Timespec::new().nsec(1000);
    push(&mut ring, opcode::Timeout::new(&delay).build().user_data(2));
    let mut results = wait(&mut ring, 2);
    results.sort_by_key(|cqe| cqe.name);
    assert_eq!(results, [(1, 0, 0), (2, -libc::EACCES, 0)].map(Cqe::from));
}

// ---------------------------------------------------------------------------------- accept.md

#[test]
fn a_multishot_accept_takes_everything_that_waits_and_goes_on() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_accept(&ring) {
        skip!("no multishot accept");
    }
    let (listener, address) = listener();
    let clients = connect(address, 5);
    push(&mut ring, accept_multi(&listener, 1));
    let accepted = wait(&mut ring, 5);
    assert!(accepted.iter().all(|cqe| cqe.name == 1 && cqe.result >= 0 && cqe.more()), "{accepted:?}");
    let later = connect(address, 1);
    let last = wait(&mut ring, 1);
    assert!(last[0].result >= 0 && last[0].more(), "{last:?}");
    adopt(accepted.iter().chain(&last));
    drop((clients, later));
}

#[test]
fn a_multishot_accept_ends_with_emfile_and_the_connection_keeps_its_place() {
    if in_child("a_multishot_accept_ends_with_emfile_and_the_connection_keeps_its_place") {
        return;
    }
    let mut ring = ring!(8);
    if !multishot_accept(&ring) {
        skip!("no multishot accept");
    }
    let (listener, address) = listener();
    let clients = connect(address, 4);
    let spare: Vec<_> = (0..2).map(|_| listener.try_clone().unwrap()).collect();
    let lowest_free = spare.iter().map(AsRawFd::as_raw_fd).max().unwrap() + 1;
    drop(spare);
    let before = limit_descriptors(lowest_free as libc::rlim_t);
    push(&mut ring, accept_multi(&listener, 1));
    let mut got = vec![next(&mut ring)];
    while got.last().is_some_and(Cqe::more) {
        got.push(next(&mut ring));
    }
    limit_descriptors(before);
    let last = got.pop().unwrap();
    assert_eq!((last.result, last.flags), (-libc::EMFILE, 0));
    assert!(got.len() < 4, "{got:?}");
    push(&mut ring, accept_multi(&listener, 2));
    let rest = wait(&mut ring, 4 - got.len());
    assert!(rest.iter().all(|cqe| cqe.result >= 0), "{rest:?}");
    drop(clients);
}

#[test]
fn a_multishot_accept_ends_with_einval_when_its_listener_is_shut() {
    let mut ring = ring!(8);
    if !multishot_accept(&ring) {
        skip!("no multishot accept");
    }
    let (listener, _) = listener();
    push(&mut ring, accept_multi(&listener, 1));
    ring.submit().unwrap();
    shutdown(listener.as_raw_fd(), libc::SHUT_RDWR);
    assert_eq!(wait(&mut ring, 1), [(1, -libc::EINVAL, 0)].map(Cqe::from));
}

#[test]
fn a_port_goes_on_accepting_after_close_while_an_accept_is_in_flight() {
    let mut ring = ring!(8);
    if !multishot_accept(&ring) {
        skip!("no multishot accept");
    }
    let (listener, address) = listener();
    push(&mut ring, accept_multi(&listener, 1));
    ring.submit().unwrap();
    drop(listener);
    let _client = TcpStream::connect(address).unwrap();
    let accepted = wait(&mut ring, 1);
    assert!(accepted[0].result >= 0 && accepted[0].more(), "{accepted:?}");
    adopt(&accepted);
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(2));
    let mut ended = wait(&mut ring, 2);
    ended.sort_by_key(|cqe| cqe.name);
    assert_eq!(ended, [(1, -libc::ECANCELED, 0), (2, 0, 0)].map(Cqe::from));
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn an_accept_pends_on_a_listener_that_is_non_blocking() {
    let mut ring = ring!(8);
    let (listener, address) = listener();
    listener.set_nonblocking(true).unwrap();
    push(&mut ring, opcode::Accept::new(types::Fd(listener.as_raw_fd()), ptr::null_mut(), ptr::null_mut()).build());
    let early = take(&mut ring, 1, Duration::from_millis(20));
    if early.first().is_some_and(|cqe| cqe.result == -libc::EAGAIN) {
        skip!("this kernel answers EAGAIN, as those before early 2023 do");
    }
    assert_eq!(early, []);
    let _client = TcpStream::connect(address).unwrap();
    adopt(&wait(&mut ring, 1));
}

// ---------------------------------------------------------------------------------- cq-overflow.md

#[test]
fn an_overflow_ends_a_multishot_accept_with_a_valid_result_and_nothing_is_lost() {
    let mut ring = ring!(1, setup_cqsize(2));
    if !multishot_accept(&ring) {
        skip!("no multishot accept");
    }
    let (listener, address) = listener();
    let clients = connect(address, 8);
    let (mut accepted, mut armed) = (Vec::new(), 0);
    while accepted.len() < clients.len() {
        armed += 1;
        push(&mut ring, accept_multi(&listener, armed));
        ring.submit().unwrap();
        loop {
            let one = next(&mut ring);
            assert!(one.result >= 0 && one.name == armed, "{one:?} after {accepted:?}");
            let more = one.more();
            accepted.push(one);
            if !more || accepted.len() == clients.len() {
                break;
            }
        }
    }
    adopt(&accepted);
    assert!(armed > 1, "a queue of two did not overflow with eight connections");
}

#[test]
fn completions_that_overflow_are_kept_and_come_in_order() {
    let mut ring = ring!(8, setup_cqsize(8));
    for batch in 0..4u64 {
        for name in 0..8 {
            push(&mut ring, opcode::Nop::new().build().user_data(batch * 8 + name));
        }
        match ring.submit() {
            Ok(count) => assert_eq!(count, 8),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => skip!("EBUSY until drained, before 5.19"),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(ring.submission().cq_overflow());
    let names: Vec<_> = wait(&mut ring, 32).iter().map(|cqe| cqe.name).collect();
    assert_eq!(names, (0..32).collect::<Vec<_>>());
    assert_eq!(ring.completion().overflow(), 0, "IORING_FEAT_NODROP: none was dropped");
    assert!(!ring.submission().cq_overflow());
}

// ---------------------------------------------------------------------------------- cancel-and-close.md

#[test]
fn a_close_neither_ends_a_receive_in_flight_nor_tells_the_peer() {
    let mut ring = ring!(8);
    let (mut peer, ours) = tcp_pair();
    let mut buffer = [0u8; 8];
    push(&mut ring, opcode::Recv::new(types::Fd(ours.as_raw_fd()), buffer.as_mut_ptr(), 8).build().user_data(1));
    ring.submit().unwrap();
    drop(ours);
    assert_eq!(take(&mut ring, 1, Duration::from_millis(30)), []);
    peer.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
    let error = peer.read(&mut [0; 8]).expect_err("an end, although the receive still holds the socket");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(2));
    let mut ended = wait(&mut ring, 2);
    ended.sort_by_key(|cqe| cqe.name);
    assert_eq!(ended, [(1, -libc::ECANCELED, 0), (2, 0, 0)].map(Cqe::from));
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_shutdown_ends_a_pending_receive_with_zero() {
    let mut ring = ring!(8);
    let (mut peer, ours) = tcp_pair();
    let mut buffer = [0u8; 8];
    push(&mut ring, opcode::Recv::new(types::Fd(ours.as_raw_fd()), buffer.as_mut_ptr(), 8).build().user_data(1));
    ring.submit().unwrap();
    shutdown(ours.as_raw_fd(), libc::SHUT_RDWR);
    assert_eq!((next(&mut ring).name, peer.read(&mut [0; 8]).unwrap()), (1, 0));
}

#[test]
fn two_cancellations_of_one_name_in_one_batch_end_one_request() {
    let mut ring = ring!(8);
    let (listener, _) = listener();
    let accept = || opcode::Accept::new(types::Fd(listener.as_raw_fd()), ptr::null_mut(), ptr::null_mut()).build().user_data(1);
    push(&mut ring, accept());
    push(&mut ring, accept());
    ring.submit().unwrap();
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(2));
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(3));
    let ended = take(&mut ring, 4, Duration::from_millis(100));
    let accepts = ended.iter().filter(|cqe| cqe.name == 1 && cqe.result == -libc::ECANCELED).count();
    assert_eq!((ended.len(), accepts), (3, 1), "{ended:?}");
    // One more, after the first was collected, finds the second.
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(4));
    let ended = wait(&mut ring, 2);
    assert!(ended.contains(&Cqe::from((1, -libc::ECANCELED, 0))), "{ended:?}");
}

#[test]
fn a_close_on_the_ring_runs_inline_and_a_shutdown_on_the_ring_starts_a_worker() {
    let mut ring = ring!(8);
    if !has(&ring, opcode::Shutdown::CODE) {
        skip!("no IORING_OP_SHUTDOWN");
    }
    let (_peer, ours) = tcp_pair();
    push(&mut ring, opcode::Close::new(types::Fd(ours.into_raw_fd())).build().user_data(1));
    assert_eq!((next(&mut ring).result, workers()), (0, 0));
    let (_peer, ours) = tcp_pair();
    push(&mut ring, opcode::Shutdown::new(types::Fd(ours.as_raw_fd()), libc::SHUT_RDWR).build().user_data(2));
    assert_eq!(next(&mut ring).result, 0);
    assert!(workers() > 0, "a shutdown on the ring ran inline: then it could replace the system call");
}

// ---------------------------------------------------------------------------------- send.md

#[test]
fn a_send_completes_short_when_the_socket_is_full_and_the_next_one_pends() {
    let mut ring = ring!(8);
    let (_peer, ours) = tcp_pair();
    let bytes = vec![b'x'; 32 << 20];
    push(&mut ring, send(&ours, &bytes, 0).user_data(1));
    let first = next(&mut ring);
    assert!(first.result > 0 && (first.result as usize) < bytes.len(), "{first:?}");
    let mut quiet = false;
    while !quiet {
        // Growing buffers may take some more.
        push(&mut ring, send(&ours, &bytes, 0).user_data(2));
        quiet = take(&mut ring, 1, Duration::from_millis(50)).is_empty();
    }
    shutdown(ours.as_raw_fd(), libc::SHUT_RDWR);
    assert_eq!(wait(&mut ring, 1), [(2, -libc::EPIPE, 0)].map(Cqe::from));
}

#[test]
fn a_pending_send_with_waitall_reports_what_went_out_when_it_is_shut_reset_or_cancelled() {
    for end in ["shutdown", "reset", "cancel"] {
        let mut ring = ring!(8);
        let (peer, ours) = tcp_pair();
        let bytes = vec![b'x'; 32 << 20];
        push(&mut ring, send(&ours, &bytes, libc::MSG_WAITALL).user_data(1));
        if let [early] = take(&mut ring, 1, Duration::from_millis(50))[..] {
            skip!("MSG_WAITALL is not retried before 5.19 (and early 2023): {early:?}");
        }
        match end {
            "shutdown" => shutdown(ours.as_raw_fd(), libc::SHUT_RDWR),
            "reset" => {
                linger(peer.as_raw_fd());
                drop(peer);
            }
            _ => push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(2)),
        }
        let ended = wait(&mut ring, if end == "cancel" { 2 } else { 1 });
        let sent = ended.iter().find(|cqe| cqe.name == 1).unwrap();
        if end == "cancel" && sent.result == -libc::ECANCELED && !has(&ring, opcode::SendZc::CODE) {
            skip!("before 6.0 a cancelled send does not say what went out");
        }
        assert!(sent.result > 0 && (sent.result as usize) < bytes.len(), "{end}: {sent:?}");
    }
}

// ---------------------------------------------------------------------------------- recv-and-provided-buffers.md

#[test]
fn a_receive_without_a_buffer_ends_with_enobufs_and_the_next_gets_the_rest_in_order() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    let mut buffers = BufferRing::new(&ring, 4, 16);
    let (mut peer, ours) = tcp_pair();
    let text: Vec<u8> = (0..200).collect();
    peer.write_all(&text).unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    let (mut got, mut starved) = (Vec::new(), 0);
    loop {
        push(&mut ring, recv_multi(&ours, 1));
        let mut ended = None;
        while ended.is_none() {
            let cqe = next(&mut ring);
            if let Some(id) = cqe.buffer() {
                got.extend_from_slice(buffers.bytes(id, cqe.result));
                buffers.used.push(id);
            }
            ended = (!cqe.more()).then_some(cqe.result);
        }
        match ended.unwrap() {
            // All four are with us; now they go back, in another order than they came.
            result if result == -libc::ENOBUFS => {
                starved += 1;
                assert_eq!(buffers.used.len(), 4);
                buffers.used.reverse();
                buffers.give_all_back();
            }
            0 => break,
            result => panic!("{result}"),
        }
    }
    assert!(got == text, "{} bytes, or in another order", got.len());
    assert!(starved >= 3, "{starved}");
}

#[test]
fn recycling_every_buffer_in_any_order_leaves_the_tail_intact() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    let mut buffers = BufferRing::new(&ring, 2, 1);
    let (mut peer, ours) = tcp_pair();
    // The tail counts modulo 65,536 and shares memory with entry 0: past one turn of it.
    let total = 70_000u32;
    let writer = thread::spawn(move || {
        let bytes: Vec<u8> = (0..total).map(|at| at as u8).collect();
        peer.write_all(&bytes).map(|()| peer)
    });
    let mut seen = 0u32;
    push(&mut ring, recv_multi(&ours, 1));
    while seen < total {
        let cqe = next(&mut ring);
        if let Some(id) = cqe.buffer() {
            assert_eq!(buffers.bytes(id, cqe.result), [seen as u8], "byte {seen}");
            seen += 1;
            buffers.used.push(id);
        }
        if !cqe.more() {
            buffers.give_all_back();
            push(&mut ring, recv_multi(&ours, 1));
        } else if seen.is_multiple_of(3) {
            buffers.give_all_back();
        }
    }
    writer.join().unwrap().unwrap();
}

#[test]
fn idle_receives_hold_no_buffer() {
    let mut ring = ring!(16, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    // Two for eight receives. With one, 6.1 ends each receive: having used it, it looks for the next one before it waits.
    let mut buffers = BufferRing::new(&ring, 2, 16);
    let pairs: Vec<_> = (0..8).map(|_| tcp_pair()).collect();
    for (name, (_, ours)) in pairs.iter().enumerate() {
        push(&mut ring, recv_multi(ours, name as u64));
    }
    ring.submit().unwrap();
    for (name, (peer, _)) in pairs.iter().enumerate().rev() {
        (&*peer).write_all(b"mine").unwrap();
        let cqe = next(&mut ring);
        assert_eq!((cqe.name, buffers.bytes(cqe.buffer().unwrap(), cqe.result)), (name as u64, &b"mine"[..]));
        buffers.used.push(cqe.buffer().unwrap());
        buffers.give_all_back();
    }
}

#[test]
fn a_multishot_receive_with_a_length_is_einval_or_capped() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    let _buffers = BufferRing::new(&ring, 8, 64);
    let (mut peer, ours) = tcp_pair();
    peer.write_all(&[b'x'; 60]).unwrap();
    push(&mut ring, opcode::RecvMulti::new(types::Fd(ours.as_raw_fd()), 0).len(16).build().user_data(1));
    let first = next(&mut ring);
    assert!(first.result == -libc::EINVAL || (1..=16).contains(&first.result), "{first:?}");
}

// ---------------------------------------------------------------------------------- multishot.md

#[test]
fn a_multishot_receive_reports_until_it_is_cancelled_by_its_name() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    let mut buffers = BufferRing::new(&ring, 8, 64);
    let (mut peer, ours) = tcp_pair();
    push(&mut ring, recv_multi(&ours, 1));
    for text in ["one", "two", "three"] {
        peer.write_all(text.as_bytes()).unwrap();
        let cqe = next(&mut ring);
        assert!(cqe.more(), "{cqe:?}");
        assert_eq!(buffers.bytes(cqe.buffer().unwrap(), cqe.result), text.as_bytes());
        buffers.used.push(cqe.buffer().unwrap());
    }
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(2));
    let mut ended = wait(&mut ring, 2);
    ended.sort_by_key(|cqe| cqe.name);
    assert_eq!(ended, [(1, -libc::ECANCELED, 0), (2, 0, 0)].map(Cqe::from));
    push(&mut ring, opcode::AsyncCancel::new(1).build().user_data(3));
    assert_eq!(wait(&mut ring, 1), [(3, -libc::ENOENT, 0)].map(Cqe::from));
}

#[test]
fn the_end_of_the_peer_is_a_last_completion_of_zero_without_a_buffer() {
    let mut ring = ring!(8, setup_cqsize(64));
    if !multishot_recv(&ring) {
        skip!("no multishot receive");
    }
    let _buffers = BufferRing::new(&ring, 8, 64);
    let (mut peer, ours) = tcp_pair();
    push(&mut ring, recv_multi(&ours, 1));
    peer.write_all(b"bye").unwrap();
    drop(peer);
    let got = wait(&mut ring, 2);
    assert!(got[0].more() && got[0].result == 3, "{got:?}");
    assert!(!got[1].more() && got[1].result == 0 && got[1].buffer().is_none(), "{got:?}");
}

/// The kernel merges a wake-up by shutdown(2) with one by bytes, and may then look at the bytes only. How often that
/// happens depends on the machine; that the cancellation mends it does not.
#[test]
fn a_cancellation_ends_a_multishot_receive_even_where_a_shutdown_was_missed() {
    const ROUNDS: usize = 20;
    for deferred in [false, true] {
        let mut missed = 0;
        for round in 0..ROUNDS {
            let mut ring = if deferred {
                ring!(8, setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_cqsize(8192))
            } else {
                ring!(8, setup_coop_taskrun().setup_taskrun_flag().setup_cqsize(8192))
            };
            if !multishot_recv(&ring) {
                skip!("no multishot receive");
            }
            missed += usize::from(shut_in_a_flood(&mut ring, round % 10));
        }
        let work = if deferred { "deferred" } else { "cooperative" };
        say(&format!("{}: {missed} of {ROUNDS} shutdowns were missed, task work being {work}", test_name()));
    }
}

/// Shuts a socket while its peer sends as fast as it can. True when the receive had to be cancelled.
fn shut_in_a_flood(ring: &mut IoUring, turns: usize) -> bool {
    let mut buffers = BufferRing::new(ring, 1024, 4096);
    let (mut peer, ours) = tcp_pair();
    let writer = thread::spawn(move || while peer.write_all(&[b'x'; 64 << 10]).is_ok() {});
    push(ring, recv_multi(&ours, 1));
    ring.submit().unwrap();
    let (mut turn, mut ended, mut missed) = (0, false, false);
    while !ended {
        if turn <= turns {
            // At work for a while, without a system call in which the kernel could deliver anything.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(2) {
                std::hint::spin_loop();
            }
        }
        if turn == turns {
            shutdown(ours.as_raw_fd(), libc::SHUT_RDWR);
        }
        turn += 1;
        let got = take(ring, 1, Duration::from_millis(200));
        if got.is_empty() && turn > turns {
            assert!(!missed, "the cancellation did not end the receive");
            missed = true;
            push(ring, opcode::AsyncCancel::new(1).build().user_data(2));
        }
        for cqe in got.iter().filter(|cqe| cqe.name == 1) {
            buffers.used.extend(cqe.buffer());
            if !cqe.more() && (cqe.result > 0 || cqe.result == -libc::ENOBUFS) {
                push(ring, recv_multi(&ours, 1));
            } else {
                ended |= !cqe.more();
            }
        }
        buffers.give_all_back();
    }
    linger(ours.as_raw_fd());
    drop(ours);
    writer.join().unwrap();
    missed
}

// ---------------------------------------------------------------------------------- timeouts.md

#[test]
fn a_wait_with_a_timeout_ends_with_etime() {
    let ring = ring!(8);
    if !ring.params().is_feature_ext_arg() {
        skip!("no IORING_FEAT_EXT_ARG");
    }
    let start = Instant::now();
    let timespec = types::Timespec::from(Duration::from_millis(20));
    let error = ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ETIME));
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn a_wait_that_submitted_something_does_not_tell_of_its_timeout() {
    let mut ring = ring!(8);
    if !ring.params().is_feature_ext_arg() {
        skip!("no IORING_FEAT_EXT_ARG");
    }
    let (_peer, ours) = tcp_pair();
    let mut buffer = [0u8; 8];
    push(&mut ring, opcode::Recv::new(types::Fd(ours.as_raw_fd()), buffer.as_mut_ptr(), 8).build().user_data(1));
    let timespec = types::Timespec::from(Duration::from_millis(20));
    let submitted = ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec));
    assert_eq!(submitted.unwrap(), 1);
    assert!(ring.completion().next().is_none());
    shutdown(ours.as_raw_fd(), libc::SHUT_RDWR);
    wait(&mut ring, 1);
}

// ---------------------------------------------------------------------------------- doorbell.md

#[test]
fn a_read_of_an_eventfd_pends_on_the_ring_and_completes_on_a_write() {
    let mut ring = ring!(8);
    let (bell, mut counter) = (eventfd(), 0u64);
    for rings in 1..4u64 {
        push(&mut ring, opcode::Read::new(types::Fd(bell.as_raw_fd()), ptr::from_mut(&mut counter).cast(), 8).build());
        assert_eq!(take(&mut ring, 1, Duration::from_millis(20)), []);
        let mut file = fs::File::from(bell.try_clone().unwrap());
        (0..rings).for_each(|_| file.write_all(&1u64.to_ne_bytes()).unwrap());
        assert_eq!(next(&mut ring).result, 8);
        // What is written after the kernel has read is left for the next reading.
        let mut rest = [0; 8];
        if counter < rings {
            file.read_exact(&mut rest).unwrap();
        }
        assert_eq!(counter + u64::from_ne_bytes(rest), rings);
    }
    assert_eq!(workers(), 0, "a read of an eventfd was given to a worker");
}

#[test]
fn a_write_to_an_eventfd_through_a_ring_starts_a_worker() {
    let mut ring = ring!(8);
    let (bell, one) = (eventfd(), 1u64);
    push(&mut ring, opcode::Write::new(types::Fd(bell.as_raw_fd()), ptr::from_ref(&one).cast(), 8).build());
    assert_eq!(next(&mut ring).result, 8);
    assert!(workers() > 0, "it ran inline: then the ring could ring the bell");
}

// ---------------------------------------------------------------------------------- disabled-and-seccomp.md

#[test]
fn a_seccomp_filter_is_the_errno_it_chooses_and_shows_in_the_status_file() {
    if in_child("a_seccomp_filter_is_the_errno_it_chooses_and_shows_in_the_status_file") {
        return;
    }
    let _ring = ring!(8);
    if let Err(error) = forbid_setup(libc::EPERM) {
        skip!("seccomp: {error}");
    }
    assert_eq!(IoUring::new(8).map(drop).unwrap_err().raw_os_error(), Some(libc::EPERM));
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])), "{status}");
}

// ---------------------------------------------------------------------------------- reuseport.md

#[test]
fn closing_a_listener_of_a_group_resets_the_connections_that_wait_in_it() {
    if fs::read_to_string("/proc/sys/net/ipv4/tcp_migrate_req").is_ok_and(|value| value.trim() == "1") {
        skip!("net.ipv4.tcp_migrate_req=1 moves them to another member");
    }
    let first = reuseport("127.0.0.1:0".parse().unwrap());
    let address = first.local_addr().unwrap();
    let second = reuseport(address);
    let clients = connect(address, 64);
    drop(first);
    second.set_nonblocking(true).unwrap();
    let survivors: BTreeSet<_> = std::iter::from_fn(|| second.accept().ok()).map(|(_, peer)| peer).collect();
    assert!(!survivors.is_empty() && survivors.len() < clients.len(), "{} of 64 were the second's", survivors.len());
    for mut client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let survives = survivors.contains(&client.local_addr().unwrap());
        let errno = client.read(&mut [0; 1]).map_err(|error| error.raw_os_error());
        // The survivors were accepted above and closed at once: an end, not a reset.
        assert_eq!(errno, if survives { Ok(0) } else { Err(Some(libc::ECONNRESET)) });
    }
}

// ---------------------------------------------------------------------------------- epoll.md

#[test]
fn an_edge_is_told_once_and_again_when_more_arrives() {
    let set = epoll();
    let (mut peer, ours) = UnixStream::pair().unwrap();
    control(&set, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET).unwrap();
    assert_eq!(ready(&set), 0);
    for text in ["one", "two"] {
        peer.write_all(text.as_bytes()).unwrap();
        assert_eq!((ready(&set), ready(&set)), (libc::EPOLLIN, 0), "{text} was told once");
    }
    drop(peer);
    assert_eq!((ready(&set) & libc::EPOLLRDHUP, ready(&set)), (libc::EPOLLRDHUP, 0));
}

#[test]
fn changing_a_registration_tells_what_is_ready_already() {
    let set = epoll();
    let (mut peer, ours) = UnixStream::pair().unwrap();
    let events = libc::EPOLLIN | libc::EPOLLET;
    control(&set, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), events).unwrap();
    peer.write_all(b"x").unwrap();
    assert_eq!((ready(&set), ready(&set)), (libc::EPOLLIN, 0));
    control(&set, libc::EPOLL_CTL_MOD, ours.as_raw_fd(), events | libc::EPOLLOUT).unwrap();
    assert_eq!((ready(&set), ready(&set)), (libc::EPOLLIN | libc::EPOLLOUT, 0));
}

#[test]
fn closing_the_last_descriptor_takes_a_socket_out_of_the_set_and_closing_one_of_two_does_not() {
    let set = epoll();
    for copies in [0, 1] {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        control(&set, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), libc::EPOLLIN).unwrap();
        let copy = (copies == 1).then(|| ours.try_clone().unwrap());
        drop(ours);
        let _ = peer.write(b"x");
        assert_eq!(ready(&set) & libc::EPOLLIN != 0, copies == 1);
        drop(copy);
        assert_eq!(ready(&set), 0);
    }
}

#[test]
fn a_shutdown_of_our_own_side_is_told_as_a_hang_up() {
    let set = epoll();
    let (_peer, ours) = tcp_pair();
    control(&set, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET).unwrap();
    assert_eq!(ready(&set), 0);
    shutdown(ours.as_raw_fd(), libc::SHUT_RDWR);
    let told = libc::EPOLLHUP | libc::EPOLLRDHUP;
    assert_eq!(ready(&set) & told, told);
}

// ---------------------------------------------------------------------------------- the ring

/// Longest wait for what must come. Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// struct io_uring_cqe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cqe {
    name: u64,
    result: i32,
    flags: u32,
}

impl Cqe {
    fn of(entry: cqueue::Entry) -> Cqe {
        Cqe { name: entry.user_data(), result: entry.result(), flags: entry.flags() }
    }

    fn more(&self) -> bool {
        cqueue::more(self.flags)
    }

    fn buffer(&self) -> Option<u16> {
        cqueue::buffer_select(self.flags)
    }
}

impl From<(u64, i32, u32)> for Cqe {
    fn from((name, result, flags): (u64, i32, u32)) -> Cqe {
        Cqe { name, result, flags }
    }
}

fn push(ring: &mut IoUring, entry: squeue::Entry) {
    // SAFETY: every test keeps what its entries point to until their completions, or until the ring is gone.
    unsafe { ring.submission().push(&entry) }.expect("room for an entry");
}

/// Submits, and collects completions until there are `count` or the time is over.
fn take(ring: &mut IoUring, count: usize, time: Duration) -> Vec<Cqe> {
    let deadline = Instant::now() + time;
    let mut taken = Vec::new();
    loop {
        ring.submit().expect("a submit");
        taken.extend(ring.completion().map(Cqe::of));
        let left = deadline.saturating_duration_since(Instant::now());
        if taken.len() >= count || left.is_zero() {
            return taken;
        }
        let timespec = types::Timespec::from(left);
        let waited = ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec));
        if let Err(error) = waited {
            assert!(matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)), "{error}");
        }
    }
}

/// The next completion; those behind it stay in the queue.
fn next(ring: &mut IoUring) -> Cqe {
    if ring.completion().is_empty() {
        ring.submit_and_wait(1).expect("a wait");
    }
    ring.completion().next().map(Cqe::of).expect("a completion")
}

/// Submits, and collects what must come.
fn wait(ring: &mut IoUring, count: usize) -> Vec<Cqe> {
    let taken = take(ring, count, PATIENCE);
    assert!(taken.len() >= count, "{} completions, not {count}: {taken:?}", taken.len());
    taken
}

fn has(ring: &IoUring, operation: u8) -> bool {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(operation)
}

/// Came with the same release (5.19) as IORING_OP_SOCKET, which a probe can see.
fn multishot_accept(ring: &IoUring) -> bool {
    has(ring, opcode::Socket::CODE)
}

/// Came with the same release (6.0) as IORING_OP_SEND_ZC.
fn multishot_recv(ring: &IoUring) -> bool {
    has(ring, opcode::SendZc::CODE)
}

fn accept_multi(listener: &TcpListener, name: u64) -> squeue::Entry {
    opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd())).flags(libc::SOCK_CLOEXEC).build().user_data(name)
}

fn recv_multi(socket: &impl AsRawFd, name: u64) -> squeue::Entry {
    opcode::RecvMulti::new(types::Fd(socket.as_raw_fd()), 0).build().user_data(name)
}

fn send(socket: &impl AsRawFd, bytes: &[u8], flags: i32) -> squeue::Entry {
    let length = u32::try_from(bytes.len()).expect("below 4 GiB");
    opcode::Send::new(types::Fd(socket.as_raw_fd()), bytes.as_ptr(), length).flags(flags | libc::MSG_NOSIGNAL).build()
}

/// Closes what was accepted.
fn adopt<'a>(accepted: impl IntoIterator<Item = &'a Cqe>) {
    for cqe in accepted {
        assert!(cqe.result >= 0, "{cqe:?}");
        // SAFETY: the kernel just opened the descriptor for this test.
        drop(unsafe { OwnedFd::from_raw_fd(cqe.result) });
    }
}

/// How many io-wq threads work for rings of the calling thread: they are named after it.
fn workers() -> usize {
    // SAFETY: gettid(2) takes nothing and cannot fail.
    let name = format!("iou-wrk-{}", unsafe { libc::gettid() });
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter(|task| {
            let comm = fs::read_to_string(task.as_ref().unwrap().path().join("comm")).unwrap_or_default();
            // A name has 15 letters at most.
            !comm.trim().is_empty() && comm.starts_with("iou-wrk-") && name.starts_with(comm.trim())
        })
        .count()
}

/// Provided buffers of group 0, through a ring shared with the kernel (io_uring_register_buf_ring(3)).
struct BufferRing {
    /// Leaked, as is `memory`: the kernel may look at them until its ring is gone, which is not when the test drops it.
    entries: *mut types::BufRingEntry,
    memory: *mut u8,
    count: u16,
    size: usize,
    tail: u16,
    /// Buffers that completions named and that were not given back yet.
    used: Vec<u16>,
}

impl BufferRing {
    fn new(ring: &IoUring, count: u16, size: usize) -> BufferRing {
        let layout = std::alloc::Layout::from_size_align(usize::from(count) * 16, 4096).unwrap();
        // SAFETY: the size is not zero, and zeroes are valid entries.
        let entries = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<types::BufRingEntry>();
        assert!(!entries.is_null());
        let memory = Box::leak(vec![0u8; usize::from(count) * size].into_boxed_slice()).as_mut_ptr();
        // SAFETY: both live for ever, aligned to a page.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries as u64, count, 0, 0) }.expect("a buffer ring");
        let mut buffers = BufferRing { entries, memory, count, size, tail: 0, used: (0..count).collect() };
        buffers.give_all_back();
        buffers
    }

    fn bytes(&self, id: u16, length: i32) -> &[u8] {
        let length = usize::try_from(length).expect("a length");
        assert!(id < self.count && length <= self.size && !self.used.contains(&id));
        // SAFETY: in bounds; the kernel gave the buffer to us and gets it back in `give_all_back`, which borrows mutably.
        unsafe { std::slice::from_raw_parts(self.memory.add(usize::from(id) * self.size), length) }
    }

    fn give_all_back(&mut self) {
        for id in mem::take(&mut self.used) {
            let index = usize::from(self.tail & (self.count - 1));
            // SAFETY: `index` and `id` are below `count`; the kernel does not look at an entry before the tail passes it.
            unsafe {
                let entry = &mut *self.entries.add(index);
                entry.set_addr(self.memory.add(usize::from(id) * self.size) as u64);
                entry.set_len(self.size as u32);
                entry.set_bid(id);
            }
            self.tail = self.tail.wrapping_add(1);
        }
        // SAFETY: the tail lies inside entry 0, and is only written here.
        let tail = unsafe { AtomicU16::from_ptr(types::BufRingEntry::tail(self.entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

// ---------------------------------------------------------------------------------- sockets and the rest

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| TcpStream::connect(address).unwrap()).collect()
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let (listener, address) = listener();
    let peer = TcpStream::connect(address).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    (peer, listener.accept().unwrap().0)
}

fn shutdown(fd: RawFd, how: i32) {
    // SAFETY: shutdown(2) takes integers; the caller's socket is open.
    assert_eq!(unsafe { libc::shutdown(fd, how) }, 0);
}

/// Makes the next close(2) of the socket a reset.
fn linger(fd: RawFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: `linger` lives for the call and has the size that is given.
    let set = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, ptr::from_ref(&linger).cast(), size) };
    assert_eq!(set, 0);
}

/// A listener in a SO_REUSEPORT group.
fn reuseport(address: SocketAddr) -> TcpListener {
    let SocketAddr::V4(address) = address else { panic!("IPv4 only") };
    // SAFETY: socket(2) takes integers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: just opened, owned by nobody else.
    let listener = unsafe { TcpListener::from_raw_fd(fd) };
    let name = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let on = 1i32;
    // SAFETY: `on` and `name` live for the calls and have the sizes that are given.
    unsafe {
        assert_eq!(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, ptr::from_ref(&on).cast(), 4), 0);
        let size = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        assert_eq!(libc::bind(fd, ptr::from_ref(&name).cast(), size), 0);
        assert_eq!(libc::listen(fd, 128), 0);
    }
    listener
}

fn eventfd() -> OwnedFd {
    // SAFETY: eventfd(2) takes integers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just opened, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn epoll() -> OwnedFd {
    // SAFETY: epoll_create1(2) takes an integer.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just opened, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn control(set: &OwnedFd, operation: i32, fd: RawFd, events: i32) -> io::Result<()> {
    let mut event = libc::epoll_event { events: events as u32, u64: 0 };
    // SAFETY: `event` lives for the call.
    match unsafe { libc::epoll_ctl(set.as_raw_fd(), operation, fd, &mut event) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What one epoll_wait(2) tells of the only socket in the set, after a moment for the loopback device.
fn ready(set: &OwnedFd) -> i32 {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event, as is said.
    let count = unsafe { libc::epoll_wait(set.as_raw_fd(), &mut event, 1, 20) };
    assert!(count >= 0);
    if count == 0 { 0 } else { event.events as i32 }
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

/// Has io_uring_setup(2) fail with `errno` in this thread from now on, as a container's profile does.
fn forbid_setup(errno: i32) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        // Loads the number of the system call, which is the first word of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: prctl(2) reads `filter` and `program`, which live for the call.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, ptr::from_ref(&filter), 0, 0) == 0
    };
    if set { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs the test again in a process of its own, for what a process has only one of. True in the parent, when that is over.
fn in_child(test: &str) -> bool {
    const CHILD: &str = "URINGD_KERNEL_TEST_CHILD";
    if env::var_os(CHILD).is_some() {
        return false;
    }
    let module = module_path!().split_once("::").map_or("", |(_, rest)| rest);
    let mut child = Command::new(env::current_exe().unwrap());
    let output = child.args(["--exact", &format!("{module}::{test}"), "--nocapture"]).env(CHILD, "1").output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}{errors}");
    errors.lines().filter(|line| line.starts_with("SKIPPED ")).for_each(say);
    true
}

fn test_name() -> String {
    thread::current().name().unwrap_or("?").to_owned()
}

/// Past the capture of the test harness.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
