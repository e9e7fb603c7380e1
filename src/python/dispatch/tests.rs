//! The couriers of two cores, with everything around them played: the kernel, the engines, the supervisor, and workers that
//! stream, die, hang and talk nonsense. One thread and one seed, so every run can be had again.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::{fs::FileExt, net::UnixStream},
    sync::atomic::AtomicBool,
};

use super::*;
use crate::{
    config::Config,
    disk::Disk,
    driver::{Chunk, RecvEnd},
    exchange::{Progress, Ticket},
    handler::Body,
    pool::{Clock, Desk, Pools},
    python::{
        multiplexer::tests::exchange,
        worker::{Report, Reporter, Worker},
        zygote::Channel,
    },
    shard::sim::random::Random,
    stream::WINDOW_BYTES,
};

const SEEDS: u64 = 12;
const STEPS: usize = 2_500;
const CORES: usize = 2;
/// How long a request may run.
const RUN: Micros = 1_000_000;
/// Where the worker writes what it began last, and how many answers it holds back.
const PAGE_BEGUN: u64 = 8;
const PAGE_HELD: u64 = 12;

#[test]
fn requests_come_home_once_and_with_their_own_answers_whatever_workers_and_kernel_do() {
    let seed = std::env::var("URINGD_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let base = seed.unwrap_or_else(|| u64::from(std::process::id()) * 1_000);
    let mut seen = BTreeMap::new();
    for seed in base..base + if seed.is_some() { 1 } else { SEEDS } {
        println!("URINGD_TEST_SEED={seed}");
        let mut stand = Stand::new(seed);
        for _ in 0..STEPS {
            stand.step();
        }
        stand.calm_down();
        stand.wind_up();
        for (what, times) in stand.seen {
            *seen.entry(what).or_insert(0) += times;
        }
    }
    println!("{seen:#?}");
    if seed.is_none() {
        for what in [
            "whole answers",
            "streams",
            "broken streams",
            "502",
            "overdue",
            "ran twice",
            "held answers",
            "died idle",
            "nonsense",
            "lost clients",
            "left alone",
        ] {
            assert!(seen.contains_key(what), "{what}: never; {seen:?}");
        }
    }
}

#[test]
fn a_request_over_which_worker_after_worker_dies_before_it_begins_is_given_up() {
    let mut stand = Stand::new(7);
    stand.calm = true;
    stand.ask_for("POST", 0);
    let mut deaths = 0;
    while !stand.asked[&1].is_over {
        assert!(deaths < 20, "again and again");
        (0..CORES).for_each(|core| stand.turn(core));
        (0..50).for_each(|_| stand.kernel());
        if let Some(line) = stand.lines.iter_mut().find(|line| !line.dead && !line.inbox.is_empty()) {
            line.dead = true;
            deaths += 1;
        }
        (0..50).for_each(|_| stand.kernel());
        stand.hear();
    }
    assert_eq!((deaths, stand.asked[&1].runs), (9, 0));
}

struct Stand {
    seed: u64,
    random: Random,
    now: Micros,
    shared: Arc<Shared>,
    desks: Vec<Desk>,
    cores: Vec<Dispatch>,
    mail: Vec<Sender<Mail>>,
    reports: Receiver<Report>,
    /// The core of each courier, and its present worker.
    couriers: Vec<(usize, u64)>,
    lines: Vec<Line>,
    workers: u64,
    asked: HashMap<u64, Asked>,
    /// Nothing more goes wrong.
    calm: bool,
    seen: BTreeMap<&'static str, u64>,
}

/// A channel as kernel and worker have it.
struct Line {
    core: usize,
    fd: RawFd,
    worker: Arc<Worker>,
    page: File,
    _ends: [UnixStream; 2],
    receiving: Option<Token>,
    stopping: bool,
    sending: Option<(Token, Chunk)>,
    shut: bool,
    dead: bool,
    hangs: bool,
    /// What the worker has not read, has said, and keeps back.
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    held: Vec<u8>,
}

/// A request, as its client and its engine have it.
struct Asked {
    home: usize,
    ticket: Arc<Ticket>,
    is_post: bool,
    since: Micros,
    runs: u32,
    /// The client has its answer, or does not wait for one.
    is_over: bool,
    is_home: bool,
    credit: Option<Arc<Credit>>,
    /// What came of a stream, and how much of it was taken in.
    body: Vec<u8>,
    taken: usize,
}

fn body_of(serial: u64) -> Vec<u8> {
    let length = match serial % 5 {
        0 => 0,
        1..4 => 10 + serial as usize % 300,
        _ if !serial.is_multiple_of(3) => 5_000,
        _ => serial as usize * 7919 % 600_000,
    };
    (0..length).map(|at| byte_of(serial, at)).collect()
}

fn byte_of(serial: u64, at: usize) -> u8 {
    (at as u64 * 31 + serial) as u8
}

fn frame(out: &mut Vec<u8>, id: u32, kind: u8, flags: u8, status: u16, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&status.to_le_bytes());
    out.extend_from_slice(payload);
}

impl Stand {
    fn new(seed: u64) -> Stand {
        let config = Config { handlers: 0, ..Config::default() };
        let pools = Pools::new(CORES, &config, Disk::start(std::env::temp_dir()).expect("threads"));
        let (reports_in, reports) = unbounded();
        let (bell, _) = UnixStream::pair().expect("sockets");
        bell.set_nonblocking(true).expect("a socket");
        let shared = Arc::new(Shared {
            pools: pools.clone(),
            clock: Clock::new(),
            monotonic_zero: 0.0,
            run: RUN,
            drain: RUN,
            permit: config.permit,
            stats: (0..CORES).map(|_| Arc::default()).collect(),
            start: 1,
            stopping: AtomicBool::new(false),
            reporter: Reporter { reports: reports_in, bell: Arc::new(bell) },
        });
        let (mut desks, mut cores, mut mail) = (Vec::new(), Vec::new(), Vec::new());
        for core in 0..CORES {
            let (way, mailbox) = unbounded();
            let waker = Waker::new().expect("a descriptor");
            desks.push(pools.desk(core, waker.clone()));
            cores.push(Dispatch::new(Mailbox { shared: shared.clone(), mail: mailbox }, core, waker));
            mail.push(way);
        }
        let mut stand = Stand {
            seed,
            random: Random::new(seed),
            now: 1_000_000,
            shared,
            desks,
            cores,
            mail,
            reports,
            couriers: Vec::new(),
            lines: Vec::new(),
            workers: 0,
            asked: HashMap::new(),
            calm: false,
            seen: BTreeMap::new(),
        };
        let couriers = 1 + stand.random.below(4);
        for number in 0..couriers {
            let core = stand.random.below(CORES);
            stand.couriers.push((core, 0));
            stand.link(number);
        }
        stand
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_insert(0) += 1;
    }

    /// A new worker for a courier.
    fn link(&mut self, number: usize) {
        let core = self.couriers[number].0;
        self.workers += 1;
        self.couriers[number].1 = self.workers;
        let worker = Arc::new(Worker::new(self.workers, number, 0));
        let (channel, data, descriptors, page) = Channel::played();
        let fd = channel.data.as_raw_fd();
        // The kernel gave the number again, so nobody has the old one.
        let before = self.lines.iter().position(|line| line.fd == fd);
        let before = before.map(|at| self.lines.swap_remove(at));
        assert!(before.is_none_or(|line| line.receiving.is_none() && line.sending.is_none()), "closed in flight; seed {}", self.seed);
        self.lines.push(Line {
            core,
            fd,
            worker: worker.clone(),
            page,
            _ends: [data, descriptors],
            receiving: None,
            stopping: false,
            sending: None,
            shut: false,
            dead: false,
            hangs: false,
            inbox: Vec::new(),
            outbox: Vec::new(),
            held: Vec::new(),
        });
        let link = Link::new(channel, worker, self.shared.reporter.clone());
        self.mail[core].send((number as u32, Order::Link(link))).expect("a courier");
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..16 => self.ask(),
            16..40 => {
                let core = self.random.below(CORES);
                self.turn(core);
            }
            40..70 => (0..3).for_each(|_| self.kernel()),
            70..92 => (0..3).for_each(|_| self.work()),
            92..95 => self.engine(),
            95 => {
                let jump = self.random.pick(&[100, 5_000, 60_000, 300_000]);
                self.pass(jump);
            }
            96 => {
                // A successor takes over, or a worker is told to be dead that is so.
                let number = self.random.below(self.couriers.len());
                self.link(number);
            }
            97 if self.random.chance(30) => {
                // Some couriers, or all, are left without one.
                for number in 0..self.couriers.len() {
                    let (core, worker) = self.couriers[number];
                    if worker > 0 && self.random.chance(60) {
                        self.mail[core].send((number as u32, Order::Leave(worker))).expect("a courier");
                        self.couriers[number].1 = 0;
                        self.saw("left alone");
                    }
                }
            }
            _ => self.pass(20),
        }
        self.hear();
    }

    fn pass(&mut self, time: Micros) {
        self.now += time;
        for asked in self.asked.values_mut().filter(|asked| !asked.is_over) {
            // The engine's own limit of a request.
            if let Progress::RunningSince(since) = asked.ticket.progress()
                && self.now >= since + RUN
                && asked.credit.is_none()
            {
                asked.ticket.disconnect();
                asked.is_over = true;
                *self.seen.entry("overdue").or_insert(0) += 1;
            }
        }
    }

    fn ask(&mut self) {
        let (method, core) = (self.random.pick(&["GET", "GET", "POST"]), self.random.below(CORES));
        self.ask_for(method, core);
    }

    fn ask_for(&mut self, method: &str, core: usize) {
        let serial = self.asked.len() as u64 + 1;
        let mut exchange = exchange(method, serial);
        exchange.since = self.now;
        let ticket = exchange.ticket.clone();
        assert!(self.desks[core].offer(exchange).is_ok(), "there is room");
        let asked = Asked {
            home: core,
            ticket,
            is_post: method == "POST",
            since: self.now,
            runs: 0,
            is_over: false,
            is_home: false,
            credit: None,
            body: Vec::new(),
            taken: 0,
        };
        self.asked.insert(serial, asked);
    }

    /// A turn of a ring thread, as `shard::run` has it.
    fn turn(&mut self, core: usize) {
        self.cores[core].turn(self.now);
        let mut answers = Vec::new();
        self.cores[core].answers(|answer| answers.push(answer));
        answers.extend(std::iter::from_fn(|| self.desks[core].answer()));
        answers.into_iter().for_each(|answer| self.take(core, answer));
        self.cores[core].dispatch();
        let ops: Vec<Op> = self.cores[core].ops().collect();
        ops.into_iter().for_each(|op| self.push(op));
        self.desks[core].ring();
    }

    fn line(&mut self, fd: RawFd) -> &mut Line {
        self.lines.iter_mut().find(|line| line.fd == fd).expect("a channel")
    }

    fn push(&mut self, op: Op) {
        let seed = self.seed;
        match op {
            Op::Recv { token, fd } => {
                let line = self.line(fd);
                assert!(line.receiving.replace(token).is_none(), "two receives; seed {seed}");
            }
            Op::RecvStop { token, fd } => {
                let line = self.line(fd);
                line.stopping = line.receiving == Some(token);
            }
            Op::Send { token, fd, chunk } => {
                let line = self.line(fd);
                assert!(line.sending.replace((token, chunk)).is_none(), "two sends; seed {seed}");
            }
            Op::Shutdown { fd, .. } => self.line(fd).shut = true,
            Op::Accept { .. } | Op::AcceptStop { .. } | Op::Close { .. } => panic!("not for a channel; seed {seed}"),
        }
    }

    /// One completion of one channel.
    fn kernel(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        let at = self.random.below(self.lines.len());
        let (chance, part) = (self.random.chance(50), self.random.next() as usize);
        let line = &mut self.lines[at];
        let core = line.core;
        let is_gone = line.dead || line.shut;
        if let Some((token, chunk)) = line.sending.take_if(|_| chance) {
            let result = if is_gone {
                Err(libc::EPIPE)
            } else {
                let bytes = chunk.bytes();
                let taken = if part % 4 == 0 { 1 + part % bytes.len() } else { bytes.len() };
                line.inbox.extend_from_slice(&bytes[..taken]);
                Ok(taken)
            };
            return self.cores[core].handle(Completion::Sent { token, chunk, result }, self.now);
        }
        let Some(token) = line.receiving else { return };
        if line.stopping || line.shut || line.outbox.is_empty() && line.dead {
            line.receiving = None;
            let end = if mem::take(&mut line.stopping) { RecvEnd::Stopped } else { RecvEnd::Eof };
            return self.cores[core].handle(Completion::RecvEnded { token, end }, self.now);
        }
        if !line.outbox.is_empty() {
            let length = (1 + part % (64 << 10)).min(line.outbox.len());
            let bytes: Vec<u8> = line.outbox.drain(..length).collect();
            self.cores[core].handle(Completion::Received { token, bytes: &bytes }, self.now);
            if part % 7 == 0
                && let Some(token) = self.lines[at].receiving.take()
            {
                self.lines[at].stopping = false;
                self.cores[core].handle(Completion::RecvEnded { token, end: RecvEnd::Again }, self.now);
            }
        }
    }

    /// A worker does something.
    fn work(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        let at = self.random.below(self.lines.len());
        let (fate, part) = (if self.calm { 99 } else { self.random.below(100) }, self.random.next());
        let line = &mut self.lines[at];
        if line.dead || line.hangs && !self.calm {
            return;
        }
        line.hangs = false;
        let complete = |inbox: &[u8]| {
            let length = u32::from_le_bytes(*inbox.first_chunk()?) as usize + 12;
            (inbox.len() >= length).then_some(length)
        };
        let Some(length) = complete(&line.inbox) else {
            let held = mem::take(&mut line.held);
            line.outbox.extend_from_slice(&held);
            line.page.write_all_at(&[0], PAGE_HELD).expect("written");
            if fate == 0 && line.inbox.is_empty() && !line.shut {
                line.dead = true;
                self.saw("died idle");
            }
            return;
        };
        let bytes: Vec<u8> = line.inbox.drain(..length).collect();
        let id = u32::from_le_bytes(*bytes[4..].first_chunk().expect("four"));
        let path = memchr::memmem::find(&bytes, b"/n").expect("a path") + 2;
        let digits = bytes[path..].split(|byte| *byte == b'.').next().expect("a serial");
        let serial: u64 = std::str::from_utf8(digits).expect("digits").parse().expect("a number");
        if fate == 1 {
            // Before it has begun.
            line.dead = true;
            return;
        }
        if bytes[9] & 2 != 0 {
            line.page.write_all_at(&id.to_le_bytes(), PAGE_BEGUN).expect("written");
        }
        let asked = self.asked.get_mut(&serial).expect("a request that was asked");
        asked.runs += 1;
        let body = body_of(serial);
        let head = [&4_u32.to_le_bytes()[..], b"OK\r\n"].concat();
        match fate {
            2..5 => line.dead = true,
            5 if part.is_multiple_of(3) => line.hangs = true,
            6 => {
                frame(&mut line.outbox, id + 1, 1, 0, 200, &head);
                self.saw("nonsense");
            }
            7..40 if line.held.len() < 1_000 && body.len() < 1_000 => {
                frame(&mut line.held, id, 1, 0, 200, &[&head[..], &body].concat());
                let mut held = [0];
                line.page.read_exact_at(&mut held, PAGE_HELD).expect("read");
                line.page.write_all_at(&[held[0] + 1], PAGE_HELD).expect("written");
                self.saw("held answers");
            }
            _ => {
                let held = mem::take(&mut line.held);
                line.outbox.extend_from_slice(&held);
                line.page.write_all_at(&[0], PAGE_HELD).expect("written");
                if body.len() < 200_000 && part % 2 == 0 {
                    frame(&mut line.outbox, id, 1, 0, 200, &[&head[..], &body].concat());
                    return self.saw("whole answers");
                }
                frame(&mut line.outbox, id, 2, 0, 200, &head);
                let pieces = body.chunks(1 + part as usize % 50_000);
                let cut = if fate < 45 { Some(part as usize % (1 + pieces.len())) } else { None };
                for piece in pieces.take(cut.unwrap_or(usize::MAX)) {
                    frame(&mut line.outbox, id, 3, 0, 0, piece);
                }
                if cut.is_some() {
                    line.dead = true;
                    return self.saw("broken streams");
                }
                frame(&mut line.outbox, id, 4, 0, 0, b"");
                self.saw("streams");
            }
        }
    }

    /// What engines do by themselves: take in bodies, lose clients.
    fn engine(&mut self) {
        for serial in 1..=self.asked.len() as u64 {
            let lost = !self.calm && self.random.below(300) == 0;
            let asked = self.asked.get_mut(&serial).expect("counted above");
            if asked.taken < asked.body.len()
                && let Some(credit) = &asked.credit
            {
                credit.take((asked.body.len() - asked.taken) as u64);
                asked.taken = asked.body.len();
            }
            if lost && !asked.is_over {
                asked.is_over = true;
                asked.ticket.disconnect();
                let withdrawn = asked.ticket.withdraw();
                if let Some(credit) = &asked.credit {
                    credit.close();
                }
                assert!(!(withdrawn && asked.runs > 0 && asked.is_post), "a POST began before its time counted; seed {}", self.seed);
                self.saw("lost clients");
            }
        }
    }

    fn take(&mut self, core: usize, answer: Answer) {
        let seed = self.seed;
        match answer {
            Answer::Response(mut exchange) => {
                let serial = exchange.serial;
                let asked = self.asked.get_mut(&serial).expect("a request that was asked");
                assert_eq!(asked.home, core, "not its home; seed {seed}");
                assert!(!mem::replace(&mut asked.is_home, true), "{serial} came home twice; seed {seed}");
                let Some(response) = exchange.response.take() else {
                    assert!(asked.is_over, "{serial} has no answer and somebody waits; seed {seed}");
                    return;
                };
                if asked.runs > 1 {
                    *self.seen.entry("ran twice").or_insert(0) += 1;
                }
                match response.body {
                    Body::Stream(stream) => {
                        asked.credit = Some(stream.credit.clone());
                        if asked.is_over {
                            stream.credit.close();
                        }
                    }
                    body if response.status == 200 => {
                        let body = if let Body::Owned(bytes) = body { bytes } else { Vec::new() };
                        assert!(body == body_of(serial), "{serial} has another's answer; seed {seed}");
                        asked.is_over = true;
                    }
                    _ => {
                        assert_eq!(response.status, 502, "{serial}; seed {seed}");
                        // A worker that talks nonsense may still begin what it has.
                        let is_odd = self.calm || self.seen.contains_key("nonsense");
                        assert!(asked.runs > 0 || is_odd, "{serial} never ran and is refused; seed {seed}");
                        *self.seen.entry("502").or_insert(0) += 1;
                        asked.is_over = true;
                    }
                }
            }
            Answer::Piece { serial, bytes, .. } => {
                let asked = self.asked.get_mut(&serial).expect("a request that was asked");
                let as_expected = bytes.iter().enumerate().all(|(at, byte)| *byte == byte_of(serial, asked.body.len() + at));
                assert!(as_expected, "{serial} has another's body; seed {seed}");
                asked.body.extend_from_slice(&bytes);
                let ahead = asked.body.len() - asked.taken;
                // What one receive brings beyond the window is no matter.
                assert!(ahead < WINDOW_BYTES as usize + (128 << 10), "{ahead} bytes ahead; seed {seed}");
            }
            Answer::Ended { serial, whole, .. } => {
                let asked = self.asked.get_mut(&serial).expect("a request that was asked");
                assert!(!whole || asked.is_over || asked.body == body_of(serial), "{serial} is not whole; seed {seed}");
                asked.is_over = true;
            }
            Answer::Hints { .. } | Answer::Extended { .. } | Answer::Disk(_) => panic!("nobody does; seed {seed}"),
        }
    }

    /// The supervisor.
    fn hear(&mut self) {
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::Free => {}
                Report::Broken { worker, why, .. } => {
                    let line = self.lines.iter_mut().find(|line| line.worker.id == worker.id);
                    assert!(
                        line.is_none_or(|line| mem::replace(&mut line.dead, true) || why.contains("nobody asked") || why.contains("piece")),
                        "{why}; seed {}",
                        self.seed
                    );
                    self.replace(&worker);
                }
                Report::Overdue { worker } => {
                    self.lines.iter_mut().filter(|line| line.worker.id == worker.id).for_each(|line| line.dead = true);
                    self.replace(&worker);
                }
                Report::Used { .. } | Report::Change(_) | Report::Stop => panic!("nobody does; seed {}", self.seed),
            }
        }
    }

    fn replace(&mut self, worker: &Arc<Worker>) {
        if self.couriers[worker.slot].1 == worker.id {
            self.link(worker.slot);
        }
    }

    /// Nothing goes wrong any more: everything comes to its end.
    fn calm_down(&mut self) {
        self.calm = true;
        if self.couriers.iter().all(|courier| courier.1 == 0) {
            let number = self.random.below(self.couriers.len());
            self.link(number);
        }
        let mut rounds = 0;
        while self.asked.values().any(|asked| !asked.is_over || !asked.is_home) {
            rounds += 1;
            let open = || self.asked.iter().filter(|(_, asked)| !asked.is_over || !asked.is_home);
            assert!(
                rounds < 5_000,
                "never over: {:?}; seed {}",
                open()
                    .map(|(serial, asked)| (serial, asked.is_over, asked.is_home, asked.runs, self.now - asked.since))
                    .collect::<Vec<_>>(),
                self.seed
            );
            (0..CORES).for_each(|core| self.turn(core));
            for _ in 0..40 {
                self.kernel();
                self.work();
            }
            self.engine();
            // Mostly quick, so that requests wait at home.
            self.pass(if rounds % 50 == 0 { 60_000 } else { 5 });
            self.hear();
        }
        for (serial, asked) in &self.asked {
            // Another may be repeated as often as it stands beside one that kills its worker.
            assert!(!asked.is_post || asked.runs <= 1, "{serial} ran {} times; seed {}", asked.runs, self.seed);
        }
    }

    /// The server ends, and with it all channels.
    fn wind_up(&mut self) {
        (0..CORES).for_each(|core| self.cores[core].wind_up(self.now));
        for _ in 0..2_000 {
            for core in 0..CORES {
                let ops: Vec<Op> = self.cores[core].ops().collect();
                ops.into_iter().for_each(|op| self.push(op));
            }
            self.kernel();
        }
        assert!(self.cores.iter().all(Dispatch::is_quiet), "something is in flight; seed {}", self.seed);
        assert!(self.cores.iter().all(|core| core.couriers.is_empty() && core.core.idle.is_empty()), "seed {}", self.seed);
        assert_eq!(self.shared.pools.idle(), 0, "seed {}", self.seed);
    }
}
