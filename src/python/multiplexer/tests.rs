//! A multiplexer between a core's queue and workers that a test plays: by the rules, against them, and by chance.

use std::{
    collections::{HashMap, VecDeque},
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Mutex, atomic::AtomicBool},
    thread::{self, JoinHandle},
    time::Instant,
};

use super::*;
use crate::{
    config::Config,
    disk::Disk,
    exchange::Exchange,
    http1::{Connection, Event as HttpEvent, Head},
    pool::{Clock, Desk, Pools},
    python::{
        worker::{Reporter, Worker},
        zygote::Channel,
    },
    shard::sim::random::Random,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Runs by chance.
const SEEDS: u64 = 6;

/// Queues, multiplexers and what they report; the test is ring thread, supervisor and workers.
struct Stand {
    desks: Vec<Desk>,
    ways: Vec<(Sender<Order>, Waker)>,
    reports: Receiver<Report>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    workers: u64,
    serial: u64,
}

impl Stand {
    /// So many multiplexers, dealt out to so many cores.
    fn new(cores: usize, multiplexers: usize, limit: usize) -> Stand {
        let config = Config { handlers: 0, ..Config::default() };
        let pools = Pools::new(cores, &config, Disk::start(std::env::temp_dir()).expect("threads"));
        let desks = (0..cores).map(|core| pools.desk(core, Waker::new().expect("a descriptor"))).collect();
        let (reports_in, reports) = unbounded();
        let (bell, _) = UnixStream::pair().expect("sockets");
        let shared = Arc::new(Shared {
            pools,
            clock: Clock::new(),
            monotonic_zero: 0.0,
            run: 60_000_000,
            drain: 60_000_000,
            permit: config.permit,
            stats: (0..cores).map(|_| Arc::default()).collect(),
            start: 1,
            stopping: AtomicBool::new(false),
            reporter: Reporter { reports: reports_in, bell: Arc::new(bell) },
        });
        let mut stand = Stand { desks, ways: Vec::new(), reports, shared, threads: Vec::new(), workers: 0, serial: 0 };
        for index in 0..multiplexers {
            let (orders, taken) = unbounded();
            let waker = Waker::new().expect("a descriptor");
            let multiplexer = Multiplexer::new(stand.shared.clone(), index % cores, index as u32, taken, waker.clone(), limit);
            stand.ways.push((orders, waker));
            stand.threads.push(thread::spawn(move || multiplexer.run()));
        }
        stand
    }

    fn order(&self, multiplexer: usize, order: Order) {
        self.ways[multiplexer].0.send(order).expect("it runs");
        self.ways[multiplexer].1.wake();
    }

    /// A new worker for a multiplexer, played by the test.
    fn link(&mut self, multiplexer: usize) -> Played {
        self.workers += 1;
        let worker = Arc::new(Worker::new(self.workers, multiplexer, 0));
        let (channel, data, descriptors, page) = Channel::played();
        data.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let before = self.shared.pools.takers();
        self.order(multiplexer, Order::Link(Link::new(channel, worker, self.shared.reporter.clone())));
        // It may take the place of another one, which has gone or has taken its leave.
        let until = Instant::now() + Duration::from_millis(100);
        while self.shared.pools.takers() == before && Instant::now() < until {
            thread::sleep(Duration::from_micros(100));
        }
        Played { data, _descriptors: descriptors, page }
    }

    /// Puts a request into a queue, and gives its serial.
    fn offer(&mut self, core: usize, method: &str) -> u64 {
        self.serial += 1;
        let exchange = exchange(method, self.serial);
        assert!(self.desks[core].offer(exchange).is_ok(), "there is room");
        self.desks[core].ring();
        self.serial
    }

    /// What comes home next.
    fn answer(&self, core: usize) -> Answer {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = self.desks[core].answer() {
                return answer;
            }
            assert!(Instant::now() < until, "nothing came home");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// The next response: its request, its status and, when it is there, its body.
    fn response(&self, core: usize) -> (u64, u16, Body) {
        let Answer::Response(mut exchange) = self.answer(core) else { panic!("something else came home") };
        let response = exchange.response.take().expect("a response");
        (exchange.serial, response.status, response.body)
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.ways.drain(..).for_each(|(orders, waker)| {
            drop(orders);
            waker.wake();
        });
        let ended = self.threads.drain(..).all(|thread| thread.join().is_ok());
        assert!(ended || thread::panicking(), "a multiplexer panicked");
    }
}

pub(in crate::python) fn exchange(method: &str, serial: u64) -> Box<Exchange> {
    let text = format!("{method} /n{serial}. HTTP/1.1\r\nHost: h\r\n\r\n");
    let (mut exchange, mut head) = (Box::new(Exchange::new()), Head::default());
    let permit = Config::default().permit;
    let parsed = Connection::new().next_event(text.as_bytes(), &mut head, &Config::default().limits, permit);
    assert!(matches!(parsed, Ok((_, HttpEvent::Head))));
    exchange.head_bytes = text.into_bytes();
    exchange.head = head;
    exchange.serial = serial;
    exchange.token = Token { slot: serial as u32, generation: 0 };
    exchange
}

/// The worker's end of a channel.
struct Played {
    data: UnixStream,
    _descriptors: UnixStream,
    page: std::fs::File,
}

/// What a worker is told.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    /// The serial is read from the path.
    Request {
        id: u32,
        serial: u64,
        is_post: bool,
    },
    Word(u8, u32, u32),
}

impl Played {
    fn next(&mut self) -> Option<Told> {
        let mut header = [0; 12];
        self.data.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("four"));
        let mut payload = vec![0; word(0) as usize];
        self.data.read_exact(&mut payload).ok()?;
        if header[8] != 1 {
            assert_eq!((payload.len(), &header[9..]), (4, &[0; 3][..]));
            return Some(Told::Word(header[8], word(4), u32::from_le_bytes(*payload.first_chunk().expect("four"))));
        }
        let path = memchr::memmem::find(&payload, b"/n").expect("a path") + 2;
        let digits = payload[path..].split(|byte| *byte == b'.').next().expect("a serial");
        let serial = std::str::from_utf8(digits).expect("digits").parse().expect("a number");
        Some(Told::Request { id: word(4), serial, is_post: memchr::memmem::find(&payload, b"POST").is_some() })
    }

    /// The next request: its id and serial. Pings are answered on the way.
    fn request(&mut self) -> (u32, u64) {
        loop {
            match self.next().expect("a request") {
                Told::Request { id, serial, .. } => return (id, serial),
                Told::Word(5, 0, number) => self.send(0, 10, 0, 0, &number.to_le_bytes()),
                Told::Word(..) => {}
            }
        }
    }

    fn send(&mut self, id: u32, kind: u8, flags: u8, status: u16, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&id.to_le_bytes());
        frame.extend_from_slice(&[kind, flags]);
        frame.extend_from_slice(&status.to_le_bytes());
        frame.extend_from_slice(payload);
        // It may have been closed for what came before.
        let _ = self.data.write_all(&frame);
    }

    fn respond(&mut self, id: u32, body: &[u8]) {
        self.send(id, 1, 0, 200, &[&4_u32.to_le_bytes()[..], b"OK\r\n", body].concat());
    }

    fn begin(&mut self, id: u32) {
        self.send(id, 2, 0, 200, &[&4_u32.to_le_bytes()[..], b"OK\r\n"].concat());
    }

    fn piece(&mut self, id: u32, bytes: &[u8]) {
        self.send(id, 3, 0, 0, bytes);
    }

    fn has_begun(&self, id: u32) {
        use std::os::unix::fs::FileExt;
        self.page.write_all_at(&id.to_le_bytes(), 8).expect("written");
    }
}

impl Channel {
    /// A channel, and the worker's ends of it.
    pub(in crate::python) fn played() -> (Channel, UnixStream, UnixStream, std::fs::File) {
        let (channel, theirs) = Channel::pair().expect("sockets");
        let [data, descriptors, page]: [OwnedFd; 3] = theirs;
        (channel, data.into(), descriptors.into(), page.into())
    }
}

#[test]
fn a_worker_has_many_requests_up_to_its_limit_and_answers_in_any_order() {
    let mut stand = Stand::new(1, 1, 5);
    let mut worker = stand.link(0);
    let offered: Vec<u64> = (0..8).map(|_| stand.offer(0, "GET")).collect();
    let mut given: Vec<(u32, u64)> = (0..5).map(|_| worker.request()).collect();
    assert_eq!(given.iter().map(|request| request.1).collect::<Vec<_>>(), offered[..5]);
    for at in [3, 0, 2] {
        let (id, serial) = given[at];
        worker.respond(id, b"done");
        assert!(matches!(stand.response(0), (home, 200, Body::Owned(body)) if home == serial && body == b"done"));
        given.push(worker.request());
    }
    assert_eq!(given[5..].iter().map(|request| request.1).collect::<Vec<_>>(), offered[5..]);
}

#[test]
fn more_time_or_hints_for_a_request_that_is_over_mean_nothing() {
    let mut stand = Stand::new(1, 1, 5);
    let mut worker = stand.link(0);
    let serial = stand.offer(0, "GET");
    let (id, _) = worker.request();
    worker.send(id + 7, 9, 0, 0, &[0; 4]);
    worker.send(id + 7, 8, 0, 0, &[&4_u32.to_le_bytes()[..], b"OK\r\n"].concat());
    worker.respond(id, b"");
    assert_eq!(stand.response(0).0, serial);
}

#[test]
fn a_worker_that_does_not_answer_its_ping_gets_nothing_more_until_it_does() {
    let mut stand = Stand::new(1, 2, 100);
    let (mut silent, mut other) = (stand.link(0), stand.link(1));
    // One each: whoever has fewer is given the next.
    stand.offer(0, "GET");
    stand.offer(0, "GET");
    let ping = loop {
        match silent.next().expect("told") {
            Told::Word(5, 0, number) => break number,
            Told::Request { .. } => {}
            Told::Word(..) => panic!("nothing else is said"),
        }
    };
    other.request();
    thread::sleep(Duration::from_millis(150));
    let more: Vec<u64> = (0..10).map(|_| stand.offer(0, "GET")).collect();
    assert_eq!((0..10).map(|_| other.request().1).collect::<Vec<_>>(), more);
    silent.send(0, 10, 0, 0, &ping.to_le_bytes());
    thread::sleep(Duration::from_millis(50));
    let next = stand.offer(0, "GET");
    assert_eq!(silent.request().1, next, "it has fewer than the other");
}

#[test]
fn a_stream_is_given_credit_as_the_ring_thread_takes_its_bytes_in() {
    let mut stand = Stand::new(1, 1, 5);
    let mut worker = stand.link(0);
    stand.offer(0, "GET");
    let (id, _) = worker.request();
    worker.begin(id);
    let (_, 200, Body::Stream(stream)) = stand.response(0) else { panic!("a stream") };
    for _ in 0..WINDOW_BYTES / 1024 {
        worker.piece(id, &[7; 1024]);
    }
    let mut bytes = 0;
    while bytes < WINDOW_BYTES {
        let Answer::Piece { bytes: piece, .. } = stand.answer(0) else { panic!("a piece") };
        bytes += piece.len() as u64;
    }
    stream.credit.take(GRANT_BYTES - 1);
    stream.credit.take(1);
    loop {
        match worker.next().expect("told") {
            Told::Word(2, of, granted) => break assert_eq!((of, u64::from(granted)), (id, GRANT_BYTES)),
            Told::Word(5, ..) => {}
            other => panic!("{other:?}"),
        }
    }
    worker.piece(id, &[7; GRANT_BYTES as usize]);
    while bytes < WINDOW_BYTES + GRANT_BYTES {
        let Answer::Piece { bytes: piece, .. } = stand.answer(0) else { panic!("a piece") };
        bytes += piece.len() as u64;
    }
    stream.credit.close();
    assert_eq!(worker.next(), Some(Told::Word(3, id, 0)), "the client is gone");
    worker.send(id, 4, 1, 0, b"");
    assert!(matches!(stand.answer(0), Answer::Ended { whole: false, .. }));
}

#[test]
fn a_worker_that_breaks_a_rule_is_given_up_and_each_of_its_requests_gets_its_due() {
    type Rule = (&'static str, fn(&mut Played, u32));
    let rules: [Rule; 8] = [
        ("more of a body", |worker, id| {
            worker.begin(id);
            (0..5).for_each(|_| worker.piece(id, &[0; 65_536]));
        }),
        ("nobody asked for", |worker, id| worker.respond(id + 1000, b"")),
        ("not begun", |worker, id| worker.piece(id, b"x")),
        ("in the middle", |worker, id| {
            worker.begin(id);
            worker.respond(id, b"");
        }),
        ("too long for a channel", |worker, id| worker.respond(id, &vec![0; 300_000])),
        ("was not sent", |worker, _| worker.send(0, 10, 0, 0, &[9; 4])),
        ("no known type", |worker, id| worker.send(id, 99, 0, 0, b"")),
        ("without a regular file", |worker, id| worker.send(id, 5, 0, 200, &[&4_u32.to_le_bytes()[..], b"OK\r\n", &[0; 16]].concat())),
    ];
    for (why, act) in rules {
        let mut stand = Stand::new(1, 1, 5);
        let mut worker = stand.link(0);
        let (get, post) = (stand.offer(0, "GET"), stand.offer(0, "POST"));
        let culprit = stand.offer(0, "POST");
        let ids: Vec<u32> = (0..3).map(|_| worker.request().0).collect();
        act(&mut worker, ids[2]);
        let report = stand.reports.recv_timeout(PATIENCE).expect("a report");
        assert!(matches!(&report, Report::Broken { why: told, .. } if told.contains(why)), "{why}: {report:?}");
        let mut lost = Vec::new();
        while lost.len() < 2 {
            match stand.answer(0) {
                Answer::Response(exchange) => match &exchange.response {
                    Some(Response { status: 502, .. }) => lost.push(exchange.serial),
                    Some(Response { body: Body::Stream(_), .. }) => assert_eq!(exchange.serial, culprit),
                    _ => panic!("{why}: another answer"),
                },
                Answer::Ended { serial, whole, .. } => {
                    assert!(!whole);
                    lost.push(serial);
                }
                _ => {}
            }
        }
        lost.sort_unstable();
        assert_eq!(lost, [post, culprit], "{why}");
        assert_eq!(stand.link(0).request().1, get, "what may be repeated is");
    }
}

#[test]
fn what_a_worker_that_died_had_not_begun_is_anothers() {
    let mut stand = Stand::new(1, 1, 10);
    let mut worker = stand.link(0);
    let posts: Vec<u64> = (0..4).map(|_| stand.offer(0, "POST")).collect();
    let ids: Vec<u32> = (0..4).map(|_| worker.request().0).collect();
    worker.has_begun(ids[1]);
    drop(worker);
    let mut lost = [stand.response(0), stand.response(0)].map(|(serial, status, _)| (serial, status));
    lost.sort_unstable();
    assert_eq!(lost, [(posts[0], 502), (posts[1], 502)]);
    let mut other = stand.link(0);
    let mut again = [other.request().1, other.request().1];
    again.sort_unstable();
    assert_eq!(again, posts[2..]);
}

#[test]
fn a_request_that_workers_die_of_before_they_begin_it_ends() {
    let mut stand = Stand::new(1, 1, 10);
    let mut worker = stand.link(0);
    let post = stand.offer(0, "POST");
    assert_eq!(worker.request().1, post);
    drop(worker);
    let mut other = stand.link(0);
    assert_eq!(other.request().1, post, "somebody may have killed the first one");
    drop(other);
    assert!(matches!(stand.response(0), (serial, 502, _) if serial == post));
}

#[test]
fn a_worker_that_takes_its_leave_finishes_what_it_has_beside_its_successor() {
    let mut stand = Stand::new(1, 1, 10);
    let mut worker = stand.link(0);
    let first = stand.offer(0, "POST");
    let (id, _) = worker.request();
    worker.send(0, 11, 0, 0, b"");
    assert!(matches!(stand.reports.recv_timeout(PATIENCE), Ok(Report::Used { .. })));
    let second = stand.offer(0, "POST");
    let mut successor = stand.link(0);
    assert_eq!(successor.request().1, second);
    worker.respond(id, b"");
    assert_eq!(stand.response(0).0, first);
    // What is left is a ping; then the channel ends.
    while worker.next().is_some() {}
}

#[test]
fn a_returned_request_goes_to_another_worker() {
    let mut stand = Stand::new(2, 2, 1);
    let mut worker = stand.link(0);
    let serial = stand.offer(0, "POST");
    let (id, _) = worker.request();
    let mut other = stand.link(1);
    worker.send(0, 11, 0, 0, b"");
    worker.send(id, 11, 0, 0, b"");
    let (id, again) = other.request();
    assert_eq!(again, serial);
    other.respond(id, b"");
    assert_eq!(stand.response(0).0, serial, "the answer goes home all the same");
}

// ---------------------------------------------------------------------------------- by chance

/// What a body must be, whoever makes it.
fn body_of(serial: u64) -> Vec<u8> {
    let length = (serial * 7_919) as usize % if serial.is_multiple_of(4) { 400_000 } else { 2_000 };
    [serial.to_le_bytes(), (!serial).to_le_bytes()].concat().into_iter().cycle().take(length).collect()
}

/// A worker that does what the rules allow, in any order, and sometimes dies or says nonsense.
fn play(mut worker: Played, seed: u64, begun: &Mutex<HashMap<u64, usize>>) {
    struct Open {
        id: u32,
        body: Vec<u8>,
        streams: bool,
        at: usize,
        credit: usize,
        gone: bool,
    }
    let mut random = Random::new(seed);
    let (mut waiting, mut open) = (VecDeque::new(), Vec::<Open>::new());
    worker.data.set_read_timeout(Some(Duration::from_micros(200))).expect("a timeout");
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        // Frames come whole: the multiplexer sends them so, and they are short.
        let readable = worker.data.set_nonblocking(true).and_then(|()| rustix_peek(&worker.data));
        worker.data.set_nonblocking(false).expect("blocking");
        match readable {
            Ok(true) => {
                worker.data.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                match worker.next() {
                    Some(Told::Request { id, serial, is_post }) => waiting.push_back((id, serial, is_post)),
                    Some(Told::Word(5, _, number)) => worker.send(0, 10, 0, 0, &number.to_le_bytes()),
                    Some(Told::Word(kind, id, number)) => {
                        if let Some(open) = open.iter_mut().find(|open| open.id == id) {
                            open.credit += if kind == 2 { number as usize } else { 0 };
                            open.gone |= kind == 3;
                        }
                    }
                    None => return,
                }
            }
            Ok(false) if waiting.is_empty() && open.is_empty() => thread::sleep(Duration::from_micros(100)),
            Ok(false) => {}
            Err(_) => return,
        }
        if random.below(2_000) == 0 {
            return worker.send(random.next() as u32 | 1 << 31, 3, 0, 0, b"nonsense");
        }
        if random.below(2_000) == 0 {
            return;
        }
        if random.chance(30)
            && let Some((id, serial, is_post)) = waiting.pop_front()
        {
            if random.chance(5) {
                worker.send(id, 11, 0, 0, b"");
            } else {
                worker.has_begun(id);
                *begun.lock().expect("no panic").entry(serial).or_default() += if is_post { 100 } else { 1 };
                open.push(Open { id, body: body_of(serial), streams: false, at: 0, credit: WINDOW_BYTES as usize, gone: false });
            }
        }
        if open.is_empty() {
            continue;
        }
        let at = random.below(open.len());
        let Open { id, streams, at: sent, credit, gone, ref body } = open[at];
        if !streams && body.len() < 100_000 && random.chance(50) {
            worker.respond(id, body);
            open.swap_remove(at);
        } else if !streams {
            worker.begin(id);
            open[at].streams = true;
        } else if gone || sent == body.len() {
            let failed = sent < body.len();
            worker.send(id, 4, u8::from(failed), 0, b"");
            open.swap_remove(at);
        } else {
            let length = random.below(40_000).min(credit).min(body.len() - sent);
            if length > 0 {
                worker.piece(id, &body[sent..sent + length]);
            }
            (open[at].at, open[at].credit) = (sent + length, credit - length);
        }
    }
}

/// True: there is something to read. An error: the end.
fn rustix_peek(data: &UnixStream) -> io::Result<bool> {
    match rustix::net::recv(data, &mut [0_u8; 12][..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((bytes, _)) => Ok(bytes == 12),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Every request comes home exactly once, with its own answer, and begins no more often than it may, whatever the workers do.
#[test]
fn requests_come_home_once_and_with_their_own_answers_whatever_the_workers_do() {
    let seed = std::env::var("URINGD_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let base = seed.unwrap_or_else(|| std::process::id() as u64 * 1_000);
    for seed in base..base + if seed.is_some() { 1 } else { SEEDS } {
        println!("URINGD_TEST_SEED={seed}");
        run(seed);
    }
}

fn run(seed: u64) {
    const REQUESTS: usize = 400;
    let mut random = Random::new(seed);
    let (cores, count) = (1 + random.below(2), 1 + random.below(3));
    let mut stand = Stand::new(cores, count, 1 + random.below(30));
    let begun = Arc::new(Mutex::new(HashMap::new()));
    let mut players = Vec::new();
    let mut seeds = seed << 20;
    let mut start = |stand: &mut Stand, multiplexer| {
        let (played, begun) = (stand.link(multiplexer), begun.clone());
        seeds += 1;
        let seed = seeds;
        players.push(thread::spawn(move || play(played, seed, &begun)));
    };
    (0..count).for_each(|multiplexer| start(&mut stand, multiplexer));
    let (mut offered, mut home) = (0, 0);
    // Serial of a stream: its credit, what came of it, whether its client stays.
    let mut streams = HashMap::<u64, (Arc<Credit>, Vec<u8>, bool)>::new();
    let mut answered = HashMap::<u64, u16>::new();
    let until = Instant::now() + PATIENCE;
    while home < REQUESTS || !streams.is_empty() {
        assert!(Instant::now() < until, "{home} of {offered} came home, {} streams are open; seed {seed}", streams.len());
        if offered < REQUESTS && offered < home + 100 {
            stand.offer(random.below(cores), random.pick(&["GET", "POST"]));
            offered += 1;
        }
        while let Ok(report) = stand.reports.try_recv() {
            match report {
                Report::Free => {}
                Report::Broken { worker, why, .. } => {
                    // A player dies or talks of a request that there is not; nothing else is against the rules.
                    assert!(why.contains("it ended") || why.contains("nobody asked for"), "{why}; seed {seed}");
                    stand.order(worker.slot, Order::Drop(worker.id));
                    start(&mut stand, worker.slot);
                }
                other => panic!("{other:?}; seed {seed}"),
            }
        }
        let Some(answer) = stand.desks.iter().find_map(Desk::answer) else { continue };
        match answer {
            Answer::Response(mut exchange) => {
                let serial = exchange.serial;
                let response = exchange.response.take().expect("an answer");
                assert_eq!(answered.insert(serial, response.status), None, "twice: {serial}; seed {seed}");
                home += 1;
                match response.body {
                    Body::Stream(stream) => {
                        let stays = random.chance(90);
                        if !stays {
                            stream.credit.close();
                        }
                        streams.insert(serial, (stream.credit, Vec::new(), stays));
                    }
                    Body::Owned(body) if response.status == 200 => assert!(body == body_of(serial), "{serial}; seed {seed}"),
                    Body::Empty => assert!(body_of(serial).is_empty(), "{serial}; seed {seed}"),
                    _ => assert_eq!(response.status, 502, "{serial}; seed {seed}"),
                }
            }
            Answer::Hints { .. } | Answer::Extended { .. } => panic!("nobody does; seed {seed}"),
            Answer::Piece { serial, bytes, .. } => {
                let (credit, body, _) = streams.get_mut(&serial).unwrap_or_else(|| panic!("a piece of nothing; seed {seed}"));
                credit.take(bytes.len() as u64);
                body.extend_from_slice(&bytes);
            }
            Answer::Ended { serial, whole, .. } => {
                let (_, body, stays) = streams.remove(&serial).unwrap_or_else(|| panic!("the end of nothing; seed {seed}"));
                let expected = body_of(serial);
                assert!(!stays || expected.starts_with(&body) && (!whole || body == expected), "{serial}; seed {seed}");
            }
            Answer::Disk(_) => unreachable!("nothing goes to the disk"),
        }
    }
    for (serial, times) in begun.lock().expect("no panic").iter() {
        // A POST counts a hundred.
        assert!([1, 2, 100].contains(times), "{serial} was begun {times} times; seed {seed}");
    }
    drop(stand);
    players.into_iter().for_each(|player| player.join().expect("a player that did not panic"));
}
