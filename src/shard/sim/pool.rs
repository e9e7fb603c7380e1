//! The simulated handlers: a bounded queue, a few that work, and answers that come when they come.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use super::{
    Check, Checker, Scene,
    client::{Client, Expected},
    disk::new_file,
    kernel::SimKernel,
    random::Random,
    violation,
};
use crate::{
    driver::{Peer, Token},
    exchange::{Exchange, Micros, Progress},
    handler::{Body, Handler, Request, Response, Runs},
    pool::Answer,
    shard::engine,
    stats::Stats,
    stream::{Credit, StreamWriter},
};

pub struct SimPool {
    handlers: usize,
    queue_max: usize,
    queue: VecDeque<Box<Exchange>>,
    running: Vec<Run>,
    answers: VecDeque<Answer>,
}

/// A handler at work.
struct Run {
    /// When it will do something next.
    at: Micros,
    token: Token,
    serial: u64,
    /// The request, until the response's head goes home with it.
    exchange: Option<Box<Exchange>>,
    /// The body that it streams after that, and whether it comes to its end.
    pieces: Option<(VecDeque<Vec<u8>>, bool)>,
}

impl SimPool {
    pub fn new(handlers: usize, queue_max: usize) -> SimPool {
        SimPool { handlers, queue_max, queue: VecDeque::new(), running: Vec::new(), answers: VecDeque::new() }
    }

    pub fn answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    pub fn has_answer(&self) -> bool {
        !self.answers.is_empty()
    }

    pub fn offer(&mut self, exchange: Box<Exchange>, clients: &mut [Client]) -> Result<(), Box<Exchange>> {
        if self.queue.len() >= self.queue_max {
            fate(&exchange, clients).found_full = true;
            return Err(exchange);
        }
        self.queue.push_back(exchange);
        Ok(())
    }

    /// True when a handler can take up or put down a request now.
    pub fn can_step(&self, now: Micros) -> bool {
        self.can_start() || self.running.iter().any(|run| run.at <= now)
    }

    fn can_start(&self) -> bool {
        !self.queue.is_empty() && self.running.len() < self.handlers
    }

    pub fn next(&self) -> Option<Micros> {
        self.running.iter().map(|run| run.at).min()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.answers.is_empty()
    }

    /// One handler does one thing.
    pub fn step(&mut self, handler: &dyn Handler, stats: &Stats, kernel: &SimKernel, clients: &mut [Client], scene: &mut Scene) -> Check {
        let now = scene.now;
        let due: Vec<usize> = (0..self.running.len()).filter(|&index| self.running[index].at <= now).collect();
        if !due.is_empty() && (!self.can_start() || scene.random.chance(50)) {
            self.go_on(scene.random.pick(&due), clients, scene);
            return Ok(());
        }
        let mut exchange = self.queue.pop_front().expect("there is something to do");
        let (client, index) = place(&exchange);
        if clients[client].has_ended_before(index) {
            return violation(Checker::AfterEnd, format!("request {index} of client {client} is served after the last"));
        }
        let expected = fate(&exchange, clients);
        if !exchange.ticket.start(now) {
            expected.withdrawn = true;
            self.answers.push_back(Answer::Response(exchange));
            return Ok(());
        }
        expected.started_at = Some(now);
        expected.run_as = Some((exchange.token, exchange.serial));
        if !kernel.is_open(exchange.token) {
            return violation(Checker::WithdrawnRuns, format!("request {index} of client {client}, whose connection is gone"));
        }
        let mut response = engine::run(handler, &exchange.request(), stats);
        let source = match &mut response.body {
            Body::Stream(stream) => stream.source.take().map(|source| (source, stream.credit.clone())),
            _ => None,
        };
        // A stream of ours fits into the window, so that all of it can be made at once; it comes home in its time.
        let pieces = source.map(|(source, credit)| {
            let mut pieces = VecDeque::new();
            let mut send = |piece| pieces.push_back(piece);
            let mut writer = StreamWriter::new(credit, Duration::ZERO, &mut send);
            let whole = source(&mut writer).and_then(|()| writer.flush()).is_ok();
            (pieces, whole)
        });
        exchange.response = Some(response);
        let (token, serial) = (exchange.token, exchange.serial);
        let at = now + working_time(scene);
        self.running.push(Run { at, token, serial, exchange: Some(exchange), pieces });
        Ok(())
    }

    /// A handler sends its answer, or a piece of it, or is done.
    fn go_on(&mut self, index: usize, clients: &mut [Client], scene: &mut Scene) {
        let run = &mut self.running[index];
        let (token, serial) = (run.token, run.serial);
        run.at = scene.now + working_time(scene);
        if run.exchange.is_some() && scene.random.chance(10) {
            let fields = vec![("Link".into(), (&b"</a.css>; rel=preload"[..]).into())];
            self.answers.push_back(Answer::Hints { token, serial, fields });
        } else if let Some(exchange) = run.exchange.take() {
            fate(&exchange, clients).finished = true;
            self.answers.push_back(Answer::Response(exchange));
        } else if let Some((pieces, whole)) = &mut run.pieces {
            match pieces.pop_front() {
                Some(bytes) => self.answers.push_back(Answer::Piece { token, serial, bytes }),
                None => {
                    self.answers.push_back(Answer::Ended { token, serial, whole: *whole });
                    run.pieces = None;
                }
            }
        }
        if run.exchange.is_none() && run.pieces.is_none() {
            for client in clients {
                client.handler_done(token, serial);
            }
            self.running.swap_remove(index);
        }
    }

    /// At the end of a run: notes which requests were taken back and never reached a handler's hand.
    pub fn note_withdrawn(&self, clients: &mut [Client]) {
        let sent_back = self.answers.iter().filter_map(|answer| match answer {
            Answer::Response(exchange) => Some(exchange),
            _ => None,
        });
        for exchange in self.queue.iter().chain(sent_back) {
            if exchange.ticket.progress() == Progress::Withdrawn {
                fate(exchange, clients).withdrawn = true;
            }
        }
    }
}

/// Mostly short, sometimes beyond all limits.
fn working_time(scene: &mut Scene) -> Micros {
    let Scene { faults, rules, random, .. } = scene;
    match random.below(100) {
        0..5 if faults.slow_handlers => rules.run + random.micros(2 * rules.run),
        0..30 if faults.slow_handlers => random.micros(3_000_000),
        _ => random.micros(3_000),
    }
}

/// Whose request it is, and which of theirs.
fn place(exchange: &Exchange) -> (usize, usize) {
    let asked = Asked::of(exchange.request().path());
    (asked.client, asked.index)
}

/// Where to note what became of a request.
fn fate<'a>(exchange: &Exchange, clients: &'a mut [Client]) -> &'a mut Expected {
    let (client, index) = place(exchange);
    let Client { expected, beyond, .. } = &mut clients[client];
    expected.get_mut(index).unwrap_or(beyond)
}

/// The application under test: does what the path says, `/client/index/kind/size`.
pub struct SimHandler {
    /// Who asks, by client and index.
    peers: HashMap<(usize, usize), Peer>,
    ran: Mutex<HashSet<(usize, usize)>>,
    ran_twice: Mutex<Option<(usize, usize)>>,
    mistaken: Mutex<Option<(usize, usize)>>,
}

/// A path, taken apart.
#[derive(Clone, Copy)]
pub struct Asked {
    pub client: usize,
    pub index: usize,
    pub kind: u8,
    pub size: usize,
}

impl Asked {
    fn of(path: &str) -> Asked {
        let mut parts = path.split('/').skip(1);
        let mut part = || parts.next().expect("a path of ours");
        let number = |text: &str| text.parse().expect("a number of ours");
        Asked { client: number(part()), index: number(part()), kind: part().as_bytes()[0], size: number(part()) }
    }
}

impl SimHandler {
    pub fn new(peers: HashMap<(usize, usize), Peer>) -> SimHandler {
        SimHandler { peers, ran: Mutex::default(), ran_twice: Mutex::default(), mistaken: Mutex::default() }
    }

    /// A request whose handler was told another client.
    pub fn mistaken(&self) -> Option<(usize, usize)> {
        *self.mistaken.lock().expect("no panic while it is held")
    }

    /// A request that was run more than once.
    pub fn ran_twice(&self) -> Option<(usize, usize)> {
        *self.ran_twice.lock().expect("no panic while it is held")
    }
}

impl Handler for SimHandler {
    fn handle(&self, request: &Request<'_>) -> Response {
        let asked = Asked::of(request.path());
        if !self.ran.lock().expect("no panic while it is held").insert((asked.client, asked.index)) {
            *self.ran_twice.lock().expect("no panic while it is held") = Some((asked.client, asked.index));
        }
        if self.peers.get(&(asked.client, asked.index)).is_some_and(|peer| *peer != request.peer()) {
            *self.mistaken.lock().expect("no panic while it is held") = Some((asked.client, asked.index));
        }
        let body = pattern(asked);
        match asked.kind.to_ascii_lowercase() {
            b'e' => {
                let mut bytes = Vec::new();
                request.body().read_to_end(&mut bytes).expect("a body that is all there");
                Response::new(200).body(bytes)
            }
            b'f' => {
                let (file, length) = (PATTERN_FILE.clone(), body.len() as u64);
                Response::new(200).body(Body::File { file, offset: start(asked) as u64, length })
            }
            b'm' => Response::new(200).body(Body::stream(move |out| write_pieces(out, body))),
            b'z' => Response::new(200).body(Body::stream_sized(body.len() as u64, move |out| write_pieces(out, body))),
            b'q' => Response::new(200).body(Body::stream(move |out| {
                write_pieces(out, body)?;
                Err(io::ErrorKind::Other.into())
            })),
            b't' => Response::new(200).body(body),
            b'o' => Response::new(200).body(body.to_vec()),
            b's' => Response::new(200).body(Body::Shared(body.into())),
            b'n' => Response::new(204),
            b'c' => Response::new(200).header("Connection", "close").body(body),
            // Not panic!: its message would fill the test's output.
            b'x' => std::panic::resume_unwind(Box::new("a handler that fails")),
            _ => unreachable!("a kind of ours"),
        }
    }

    /// Capital letters are for the ring thread.
    fn runs(&self, request: &Request<'_>) -> Runs {
        match Asked::of(request.path()).kind.is_ascii_uppercase() {
            true => Runs::Inline,
            false => Runs::OnPool,
        }
    }
}

/// A body that belongs to this request and, at any place, to no other.
pub fn pattern(asked: Asked) -> &'static [u8] {
    &PATTERN[start(asked)..start(asked) + asked.size]
}

fn start(asked: Asked) -> usize {
    asked.client * 1009 + asked.index * 101
}

fn write_pieces(out: &mut StreamWriter<'_>, body: &[u8]) -> io::Result<()> {
    for piece in body.chunks(body.len() / 3 + 1) {
        out.write_all(piece)?;
        out.flush()?;
    }
    Ok(())
}

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(7);
    std::iter::repeat_with(|| random.next().to_le_bytes()).take(PATTERN_BYTES / 8).flatten().collect()
});

static PATTERN_FILE: LazyLock<Arc<File>> = LazyLock::new(|| {
    let file = new_file();
    file.write_all_at(&PATTERN, 0).expect("room for a test's file");
    Arc::new(file)
});

const PATTERN_BYTES: usize = 1 << 20;

/// True when a handler that streams would wait for a client's credit.
pub fn is_held_back(credit: &Arc<Credit>) -> bool {
    let mut send = |_| ();
    let mut writer = StreamWriter::new(credit.clone(), Duration::ZERO, &mut send);
    writer.write_all(&[0; PATTERN_BYTES]).is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
}
