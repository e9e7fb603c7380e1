//! The simulated clients: what each says, when, and the only answers that it takes.
//!
//! A client knows every byte that may come: an answer is composed here a second time, by the plainest
//! means, and compared. Where the engine had a choice (503, 504, 408, an early end), the client
//! demands the reason: the queue was full, the handler too slow, enough time had passed.

use std::{borrow::Cow, collections::VecDeque, fmt};

use super::{
    Check, Checker, Faults, Rules, Scene,
    header::Header,
    pool::{Asked, pattern},
    random::Random,
    violation,
};
use crate::{
    driver::{ListenerIndex, Peer, Token},
    exchange::Micros,
    http1::{Refusal, response::reason_phrase},
    shard::engine::Life,
};

/// How long the engine keeps the place of a half-closed client in the queue.
const HALF_CLOSED_WAIT: Micros = 100_000;
/// A deadline is found to be over with the wheel's next tick (`deadlines.rs`), and a turn takes its time.
const HEADER_LATE: Micros = 50_000;

/// What a client does next.
#[derive(Debug)]
enum Action {
    Connect,
    Send(Vec<u8>),
    Pause(Micros),
    /// Waits until it has so many answers, or the server has ended.
    AwaitAnswers(usize),
    /// Waits for `100 Continue`, or a second.
    AwaitContinue,
    HalfClose,
    Reset,
}

/// How a client's story goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Waits until the server has had enough of it.
    Stays,
    /// Asks for the end with its last request.
    Close,
    HalfClose,
    /// Ends its side in the middle of a request.
    Truncated,
    /// Breaks a rule.
    Refused,
    /// Begins with something else than the header that it should begin with, or never finishes it.
    HeaderBroken,
    HeaderIncomplete,
    /// Never finishes its last request.
    Incomplete,
    /// Is gone at some moment.
    Reset,
    /// Ends its side, and is gone a little later.
    Leaves,
    /// Stops reading for ever.
    StopsReading,
}

/// The connection as the network has it.
pub struct Wire {
    pub to_server: VecDeque<u8>,
    /// The client has ended its sending side.
    pub fin: bool,
    /// The client has reset the connection.
    pub reset: bool,
    /// Bytes that the client's side still takes.
    pub window: usize,
    /// The server has shut its side or both.
    pub server_fin: bool,
    pub server_closed: bool,
}

pub struct Client {
    pub index: usize,
    pub listener: ListenerIndex,
    pub ending: Ending,
    pub wire: Wire,
    /// One for each request, up to the one after which the connection ends.
    pub expected: Vec<Expected>,
    /// Stands for all requests after that.
    pub beyond: Expected,
    pub eof_told_at: Option<Micros>,
    pub last_sent_at: Micros,
    /// With that header, it has one connection too many.
    pub may_be_turned_away: bool,
    header: Header,
    script: VecDeque<Action>,
    wake_at: Micros,
    /// Reads in small pieces when it feels like it.
    reads_slowly: bool,
    read_at: Micros,
    /// Goes on with its script after the server's end, and never closes.
    stubborn: bool,
    accepted_at: Option<Micros>,
    /// When the engine began to receive from it, and when its header was whole.
    listened_to_at: Option<Micros>,
    named_at: Option<Micros>,
    /// Bytes that the engine has been given.
    taken_in: usize,
    answers: usize,
    reading: Reading,
    /// Another body that would be as good, and as long.
    or_else: Option<Cow<'static, [u8]>>,
    continued: bool,
    said_close: bool,
    ended: bool,
    /// The connection was ended without this answer, which is right only if the request was withdrawn.
    excuse: Option<usize>,
}

enum Reading {
    Head(Vec<u8>),
    /// A body, all of which is known.
    Body {
        body: Cow<'static, [u8]>,
        at: usize,
        framing: Framing,
    },
}

/// How the body's end is told, and what is expected next of that.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Framing {
    Length,
    Close,
    /// A chunk's size, as far as it has come.
    ChunkSize(String),
    /// So many bytes of a chunk.
    ChunkData(usize),
    /// What is left of the CRLF behind a chunk.
    ChunkEnd(&'static [u8]),
    /// What is left of the CRLF behind the last chunk.
    LastEnd(&'static [u8]),
}

/// A request, the answer to it, and what became of it on the way.
#[derive(Default)]
pub struct Expected {
    status: u16,
    content_type: bool,
    body: Cow<'static, [u8]>,
    is_head: bool,
    is_http10: bool,
    close: bool,
    /// The answer closes the connection if it is the handler's; the client leaves when it is not.
    handler_closes: bool,
    expects_continue: bool,
    /// Its last byte never comes.
    incomplete: bool,
    pooled: bool,
    /// The handler makes the body while it is sent; `sized`: and has told its length; `fails`: and does not come to its end.
    streams: bool,
    sized: bool,
    fails: bool,
    /// Length of the request's body.
    sent: u64,
    /// The place of its bytes among all that the client sends.
    start: usize,
    end: usize,
    begun_at: Option<Micros>,
    complete_at: Option<Micros>,
    /// Who the handler is to be told asks.
    peer: Option<Peer>,
    pub started_at: Option<Micros>,
    pub finished: bool,
    pub found_full: bool,
    pub withdrawn: bool,
    /// A handler is still at it.
    pub run_as: Option<(Token, u64)>,
}

/// Its story.
impl Client {
    pub fn new(index: usize, listeners: usize, faults: &Faults, rules: &Rules, random: &mut Random) -> Client {
        let mut endings = vec![Ending::Stays, Ending::Close, Ending::Close, Ending::Refused];
        if faults.reset {
            endings.extend([Ending::Reset, Ending::Leaves]);
        }
        if faults.half_close {
            endings.extend([Ending::HalfClose, Ending::HalfClose, Ending::Truncated]);
        }
        if faults.slow_clients {
            endings.extend([Ending::Incomplete, Ending::StopsReading]);
        }
        if faults.proxied {
            endings.extend([Ending::HeaderBroken, Ending::HeaderIncomplete]);
        }
        let reads_slowly = faults.slow_clients && random.chance(30);
        let mut client = Client {
            index,
            listener: random.below(listeners) as ListenerIndex,
            ending: random.pick(&endings),
            wire: Wire {
                to_server: VecDeque::new(),
                fin: false,
                reset: false,
                window: usize::MAX,
                server_fin: false,
                server_closed: false,
            },
            expected: Vec::new(),
            beyond: Expected::default(),
            eof_told_at: None,
            last_sent_at: 0,
            may_be_turned_away: false,
            header: Header::none(),
            script: VecDeque::new(),
            wake_at: 0,
            reads_slowly,
            read_at: 0,
            stubborn: random.chance(20),
            accepted_at: None,
            listened_to_at: None,
            named_at: None,
            taken_in: 0,
            answers: 0,
            reading: Reading::Head(Vec::new()),
            or_else: None,
            continued: false,
            said_close: false,
            ended: false,
            excuse: None,
        };
        match client.ending {
            Ending::StopsReading => client.wire.window = random.below(3_000),
            _ if reads_slowly => client.wire.window = random.below(3_000),
            _ => {}
        }
        let (host, port) = (client.host(), client.port());
        client.header = match client.ending {
            _ if !faults.proxied => Header::none(),
            Ending::HeaderBroken => Header::broken(random),
            Ending::HeaderIncomplete => Header::incomplete(host, port, random),
            _ => Header::whole(host, port, random),
        };
        client.write_script(faults, rules, random);
        client
    }

    fn write_script(&mut self, faults: &Faults, rules: &Rules, random: &mut Random) {
        let start = if random.chance(20) { random.micros(3_000_000) } else { random.micros(5_000) };
        self.script.extend([Action::Pause(start), Action::Connect]);
        let mut batch = self.header.bytes.clone();
        if !batch.is_empty() && random.chance(50) {
            let rest = batch.split_off(1 + random.below(batch.len()));
            self.script.extend([Action::Send(batch), Action::Pause(pause(faults, random))]);
            batch = rest;
        }
        let requests = match self.ending {
            Ending::HeaderBroken | Ending::HeaderIncomplete => return self.write_rest_of_header(batch, faults, random),
            Ending::Stays | Ending::Incomplete | Ending::HalfClose => random.below(5),
            _ => 1 + random.below(5),
        };
        let close_at = match self.ending {
            Ending::Close => requests - 1,
            // A mistake of the client's: what it sends after that is for nobody.
            _ if random.chance(5) => random.below(5),
            _ => usize::MAX,
        };
        let mut written = self.header.bytes.len();
        let mut over = false;
        for index in 0..requests {
            let (mut expected, head, body) = self.write_request(index, index == close_at, rules, random);
            expected.close |= rules.keep_alive_requests_max == index as u64 + 1;
            (expected.start, expected.end) = (written, written + head.len() + body.len());
            written = expected.end;
            if !over {
                over = expected.close || expected.handler_closes;
                self.expected.push(expected);
            }
            let expects_continue = self.expected.last().is_some_and(|expected| expected.expects_continue);
            batch.extend(head);
            if expects_continue && !over {
                self.script.extend([Action::Send(std::mem::take(&mut batch)), Action::AwaitContinue]);
            }
            batch.extend(body);
            if random.chance(40) {
                let cut = if random.chance(20) { random.below(batch.len()) } else { 0 };
                if cut > 0 {
                    let rest = batch.split_off(cut);
                    let first = std::mem::replace(&mut batch, rest);
                    self.script.extend([Action::Send(first), Action::Pause(pause(faults, random))]);
                }
                self.script.push_back(Action::Send(std::mem::take(&mut batch)));
                match random.below(4) {
                    0 | 1 => self.script.push_back(Action::AwaitAnswers(index + 1)),
                    2 => self.script.push_back(Action::Pause(pause(faults, random))),
                    _ => {}
                }
            }
        }
        let last = match self.ending {
            Ending::Refused => Some(refused(rules, random)),
            Ending::Truncated | Ending::Incomplete => Some(incomplete(random)),
            _ => None,
        };
        if let Some((mut expected, bytes)) = last {
            (expected.start, expected.end) = (written, written + bytes.len());
            batch.extend(bytes);
            if !over {
                self.expected.push(expected);
            }
        }
        if !batch.is_empty() {
            self.script.push_back(Action::Send(batch));
        }
        self.write_ending(faults, random);
    }

    /// In pieces that come in time, each by itself.
    fn write_rest_of_header(&mut self, mut bytes: Vec<u8>, faults: &Faults, random: &mut Random) {
        while !bytes.is_empty() {
            let rest = bytes.split_off(1 + random.below(bytes.len()));
            self.script.extend([Action::Send(bytes), Action::Pause(random.micros(6_000_000))]);
            bytes = rest;
        }
        if faults.half_close && random.chance(30) {
            self.script.push_back(Action::HalfClose);
        }
    }

    fn write_ending(&mut self, faults: &Faults, random: &mut Random) {
        match self.ending {
            Ending::HalfClose | Ending::Truncated => {
                if random.chance(30) {
                    self.script.push_back(Action::Pause(pause(faults, random)));
                }
                self.script.push_back(Action::HalfClose);
            }
            Ending::Reset => {
                let at = if random.chance(50) { self.script.len() } else { 2 + random.below(self.script.len() - 1) };
                self.script.insert(at, Action::Reset);
                self.script.insert(at, Action::Pause(random.micros(5_000)));
            }
            Ending::Leaves => {
                let later = if random.chance(50) { random.micros(5_000) } else { random.micros(1_000_000) };
                self.script.extend([Action::Pause(random.micros(5_000)), Action::HalfClose, Action::Pause(later), Action::Reset]);
            }
            _ => {}
        }
    }

    /// A request in two pieces, head and body, and the answer to it.
    fn write_request(&self, index: usize, close: bool, rules: &Rules, random: &mut Random) -> (Expected, Vec<u8>, Vec<u8>) {
        let is_http10 = random.chance(5);
        let kind = match random.below(100) {
            0..20 => b't',
            20..35 => b'T',
            35..55 => b'e',
            55..65 => b'E',
            65..75 => b'o',
            75..80 => b'O',
            80..85 => b's',
            85..88 => b'S',
            88..90 => b'n',
            90..91 => b'c',
            91..93 => b'x',
            93..94 => b'X',
            94..95 => b'F',
            95..96 => b'f',
            96..98 => b'm',
            98..99 => b'z',
            _ => b'q',
        };
        let is_echo = kind.eq_ignore_ascii_case(&b'e');
        let is_head = !is_echo && random.chance(10);
        let streams = matches!(kind, b'm' | b'z' | b'q');
        let size = match random.below(100) {
            // More than the handler may be ahead would need its thread.
            _ if streams => random.below(200_000),
            0..50 => random.below(100),
            50..75 => random.below(4_000),
            75..92 => random.below(40_000),
            _ => (256 << 10) + random.below(300_000),
        };
        let sent = match (is_echo, random.below(10)) {
            (false, _) => 0,
            (true, 0..6) => random.below(200),
            (true, 6..8) => random.below(5_000),
            // A little more than may be ahead of the disk (`engine/bodies.rs`).
            (true, _) if rules.body_memory_bytes_max < 10_000 && random.chance(50) => (256 << 10) + random.below(8_000),
            (true, 8) => random.below(5_000),
            (true, _) => random.below(30_000),
        };
        let asked = Asked { client: self.index, index, kind, size };
        let body = pattern(Asked { size: sent, ..asked });
        let (status, answer) = match kind.to_ascii_lowercase() {
            b'e' => (200, body),
            b'n' => (204, &[][..]),
            b'x' => (500, &b"Internal server error.\n"[..]),
            _ => (200, pattern(asked)),
        };
        let mut expected = Expected {
            status,
            content_type: status == 500,
            body: answer.into(),
            is_head,
            is_http10,
            close,
            handler_closes: kind == b'c' || is_http10 && !is_head && matches!(kind, b'm' | b'q'),
            pooled: kind.is_ascii_lowercase(),
            streams,
            sized: kind != b'm' && kind != b'q',
            fails: kind == b'q',
            sent: sent as u64,
            ..Expected::default()
        };
        let method = if is_echo {
            "POST"
        } else if is_head {
            "HEAD"
        } else {
            "GET"
        };
        let version = if is_http10 { "1.0" } else { "1.1" };
        let mut head = format!("{method} /{}/{index}/{}/{size} HTTP/{version}\r\nHost: a\r\n", self.index, kind as char);
        if random.chance(10) {
            head.insert_str(0, "\r\n");
        }
        if close {
            head.push_str("Connection: close\r\n");
        } else if is_http10 {
            head.push_str("Connection: keep-alive\r\n");
        }
        expected.peer = Some(self.peer());
        if random.chance(10) {
            head.push_str(&format!("X-Forwarded-For: 192.0.2.7, 203.0.113.{}\r\n", self.host()));
            if self.is_trusted() {
                expected.peer = Some(Peer::Inet(([203, 0, 113, self.host()], 0).into()));
            }
        }
        if random.chance(20) {
            head.push_str(&format!("X-Filler: {}\r\n", "x".repeat(random.below(200))));
        }
        let mut bytes = Vec::new();
        if is_echo {
            expected.expects_continue = !is_http10 && sent > 0 && random.chance(20);
            if expected.expects_continue {
                head.push_str("Expect: 100-continue\r\n");
            }
            if is_http10 || random.chance(50) {
                head.push_str(&format!("Content-Length: {sent}\r\n"));
                bytes.extend_from_slice(body);
            } else {
                head.push_str("Transfer-Encoding: chunked\r\n");
                chunked(&mut bytes, body, random);
            }
        }
        head.push_str("\r\n");
        (expected, head.into_bytes(), bytes)
    }

    /// True when it can do something now.
    pub fn can_step(&self, now: Micros) -> bool {
        if self.wire.reset || self.wire.server_closed {
            return false;
        }
        let reads = self.is_starved() && self.read_at <= now;
        reads
            || self.wake_at <= now
                && match self.script.front() {
                    Some(Action::AwaitAnswers(count)) => self.answers >= *count || self.wire.server_fin,
                    Some(_) => true,
                    // A client that has seen the server's end ends its own side.
                    None => self.wire.server_fin && !self.wire.fin && !self.stubborn,
                }
    }

    fn is_starved(&self) -> bool {
        self.reads_slowly && self.ending != Ending::StopsReading && self.wire.window == 0
    }

    /// When it can do something next, if that depends on time alone.
    pub fn next(&self, now: Micros) -> Option<Micros> {
        if self.wire.reset || self.wire.server_closed {
            return None;
        }
        let wake = Some(self.wake_at).filter(|at| *at > now && !self.script.is_empty());
        let read = Some(self.read_at).filter(|at| *at > now && self.is_starved());
        [wake, read].into_iter().flatten().min()
    }

    /// What it is about to do.
    pub fn intention(&self) -> String {
        match self.script.front() {
            _ if self.is_starved() => "reads on".to_owned(),
            Some(Action::Send(bytes)) => format!("sends some of {} bytes", bytes.len()),
            other => format!("{other:?}"),
        }
    }

    /// Does one thing; true when that was to connect.
    pub fn step(&mut self, scene: &mut Scene) -> bool {
        let Scene { faults, random, now, .. } = scene;
        let now = *now;
        if self.is_starved() && self.read_at <= now {
            let most = if random.chance(50) { 500 } else { 64 << 10 };
            self.wire.window = 1 + random.below(most);
            let longest = if random.chance(20) { 500_000 } else { 20_000 };
            self.read_at = now + random.micros(longest);
            return false;
        }
        if self.wire.server_fin && !self.stubborn {
            self.script.clear();
        }
        match self.script.pop_front() {
            Some(Action::Connect) => return true,
            Some(Action::Send(mut bytes)) => {
                if self.wire.fin {
                    return false;
                }
                let length = if faults.split { 1 + random.below(bytes.len()) } else { bytes.len() };
                let rest = bytes.split_off(length);
                self.wire.to_server.extend(bytes);
                if !rest.is_empty() {
                    self.script.push_front(Action::Send(rest));
                }
            }
            Some(Action::Pause(time)) => self.wake_at = now + time,
            Some(Action::AwaitAnswers(_)) => {}
            Some(Action::AwaitContinue) => self.wake_at = if self.continued { now } else { now + 1_000_000 },
            Some(Action::HalfClose) | None => self.wire.fin = true,
            Some(Action::Reset) => {
                self.wire.reset = true;
                self.wire.to_server.clear();
            }
        }
        false
    }
}

/// What is told of it.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends: Vec<_> = self.expected.iter().map(|expected| (expected.end, expected.status, expected.body.len())).collect();
        let Client { index, ending, listener, header, .. } = self;
        write!(f, "client {index} {ending:?} on {listener}, {} bytes of header, expects {ends:?}", header.bytes.len())
    }
}

/// What the kernel tells about it.
impl Client {
    /// Some clients share an address.
    pub fn host(&self) -> u8 {
        1 + (self.index % 2) as u8
    }

    /// Nothing more will come from it or to it.
    pub fn is_done(&self) -> bool {
        self.wire.reset || self.wire.server_closed
    }

    fn port(&self) -> u16 {
        self.index as u16 + 1
    }

    /// Who is at the other end of its connection.
    pub fn accepted_from(&self) -> Peer {
        Peer::Inet(([127, 0, 0, self.host()], self.port()).into())
    }

    /// Who it is: that, or whom its header names.
    pub fn peer(&self) -> Peer {
        self.header.source.unwrap_or(self.accepted_from())
    }

    /// It may name others, as proxies at loopback addresses and at unix sockets may.
    fn is_trusted(&self) -> bool {
        matches!(self.header.source, None | Some(Peer::Unix))
    }

    /// The client of each request, by client and index.
    pub fn identities(&self) -> impl Iterator<Item = ((usize, usize), Peer)> {
        let peers = self.expected.iter().enumerate();
        peers.filter_map(|(index, expected)| Some(((self.index, index), expected.peer?)))
    }

    /// Its header is whole, if it needs one.
    pub fn is_named(&self) -> bool {
        self.named_at.is_some()
    }

    /// It is connected although what it began with is no header.
    pub fn is_kept_in_spite_of_its_header(&self) -> bool {
        self.shows_fault() && !self.wire.server_fin && !self.wire.reset
    }

    fn shows_fault(&self) -> bool {
        self.header.fault_at.is_some_and(|at| self.taken_in >= at)
    }

    /// Since when the first request, or the header before it, may take its time.
    fn first_since(&self) -> Option<Micros> {
        self.named_at.or(self.accepted_at)
    }

    pub fn accepted(&mut self, now: Micros) {
        self.accepted_at = Some(now);
        self.last_sent_at = now;
        self.named_at = Some(now).filter(|_| self.header.whole_at == Some(0));
    }

    pub fn listened_to(&mut self, now: Micros) {
        self.listened_to_at.get_or_insert(now);
    }

    /// The engine was given so many more of its bytes. True when they make its header whole.
    pub fn delivered(&mut self, length: usize, now: Micros) -> bool {
        self.taken_in += length;
        for expected in &mut self.expected {
            if expected.start < self.taken_in {
                expected.begun_at.get_or_insert(now);
            }
            if expected.end <= self.taken_in {
                expected.complete_at.get_or_insert(now);
            }
        }
        let named = !self.is_named() && self.header.whole_at.is_some_and(|whole| self.taken_in >= whole);
        if named {
            self.named_at = Some(now);
        }
        named
    }

    /// A handler has done all that it will.
    pub fn handler_done(&mut self, token: Token, serial: u64) {
        for expected in self.expected.iter_mut().filter(|expected| expected.run_as == Some((token, serial))) {
            expected.run_as = None;
        }
    }

    /// A complete request of it waits for its answer, or a handler is at one.
    pub fn is_owed(&self) -> bool {
        let waits = self.expected.get(self.answers).is_some_and(|next| next.end <= self.taken_in && !next.incomplete);
        waits || self.expected.iter().any(|expected| expected.run_as.is_some())
    }

    /// Everything it has sent is answered.
    pub fn is_idle(&self) -> bool {
        self.expected.get(self.answers).is_none_or(|next| self.taken_in <= next.start)
    }

    /// It had what it wanted, and nobody is at anything for it.
    pub fn is_at_rest(&self) -> bool {
        self.taken_in > 0
            && self.is_named()
            && self.is_idle()
            && self.wire.to_server.is_empty()
            && self.expected.iter().all(|expected| expected.run_as.is_none())
    }

    /// The connection was to end before this request, whatever became of those before it.
    pub fn has_ended_before(&self, index: usize) -> bool {
        index >= self.expected.len() && !self.expected.last().is_some_and(|last| last.handler_closes)
    }

    /// It keeps to the rules of reading and staying, so it has a right to all its answers.
    fn is_faithful(&self) -> bool {
        !self.wire.reset && self.ending != Ending::StopsReading
    }

    /// The server has shut or closed the connection; `orderly`: and the client sees that as an end like any other.
    pub fn server_ends(&mut self, orderly: bool, rules: &Rules, now: Micros) -> Check {
        self.wire.server_fin = true;
        if let Reading::Body { body, at, framing: Framing::Close } = &self.reading
            && orderly
            && !self.ended
            && !self.wire.reset
            && (*at < body.len() || self.expected[self.answers].fails)
        {
            return violation(Checker::WrongAnswer, format!("client {} takes {at} bytes for all of its answer", self.index));
        }
        if std::mem::replace(&mut self.ended, true) || !self.is_faithful() {
            return Ok(());
        }
        self.justify(rules, now)
    }

    /// Whether the server had a reason for the end.
    fn justify(&mut self, rules: &Rules, now: Micros) -> Check {
        let who = format!("client {} ({:?}) after {} of {} answers", self.index, self.ending, self.answers, self.expected.len());
        if self.may_be_turned_away || self.shows_fault() {
            return Ok(());
        }
        let waited = self.listened_to_at.map_or(0, |at| now - at);
        if !self.is_named() && waited > rules.head + HEADER_LATE && !rules.reads_may_stall {
            return violation(Checker::HeaderAwaited, format!("{who}: its header was waited for {waited} us"));
        }
        let slow = self.reads_slowly || rules.reads_may_stall;
        let reads_too_slowly = slow && self.accepted_at.is_some_and(|at| at + rules.send_rate_grace <= now);
        if rules.life == Life::Stopping || self.last_sent_at + rules.send <= now || reads_too_slowly {
            return Ok(());
        }
        let whole = match &self.reading {
            Reading::Head(bytes) => bytes.is_empty(),
            Reading::Body { framing: Framing::Close, .. } => true,
            Reading::Body { .. } => self.expected[self.answers].may_be_cut(rules, now),
        };
        if !whole {
            return violation(Checker::EarlyEnd, format!("{who} is cut off in the middle of one"));
        }
        if matches!(self.reading, Reading::Body { .. }) || self.said_close {
            return Ok(());
        }
        if self.answers == self.expected.len() && self.eof_told_at.is_some() {
            return Ok(());
        }
        let (since, limit) = match self.answers {
            0 => (self.first_since(), rules.head),
            count => (self.expected[count - 1].complete_at, rules.keep_alive),
        };
        // What comes after the drain began may be too late, like what comes while an idle connection is closed.
        let too_late = rules
            .drain_since
            .is_some_and(|since| self.expected.get(self.answers).and_then(|next| next.begun_at).is_some_and(|at| at >= since));
        // All of an answer may be there, and its handler be at it still; when its time is over, so is the connection.
        let hangs = self.expected.iter().any(|before| before.run_as.is_some() && before.may_be_cut(rules, now));
        if too_late || hangs {
            return Ok(());
        }
        if self.is_idle() && (rules.life == Life::Draining || since.is_some_and(|since| since + limit <= now)) {
            return Ok(());
        }
        if self.eof_told_at.is_some_and(|at| at + HALF_CLOSED_WAIT <= now) {
            self.excuse = Some(self.answers);
            return Ok(());
        }
        violation(Checker::EarlyEnd, who)
    }

    /// At the end of a run.
    pub fn check_excuse(&self) -> Check {
        match self.excuse {
            Some(index) if !self.expected[index].withdrawn => {
                violation(Checker::EarlyEnd, format!("client {} never got answer {index}", self.index))
            }
            _ => Ok(()),
        }
    }
}

/// What it reads.
impl Client {
    /// Takes bytes of the server's, all of which must be right.
    pub fn receive(&mut self, mut bytes: &[u8], rules: &Rules, now: Micros) -> Check {
        while !bytes.is_empty() && !self.wire.reset {
            match &mut self.reading {
                Reading::Head(head) => {
                    if self.said_close {
                        return violation(Checker::AfterEnd, format!("client {} gets more after its last answer", self.index));
                    }
                    let before = head.len().saturating_sub(3);
                    let length = head.len();
                    head.extend_from_slice(&bytes[..bytes.len().min(2048)]);
                    match head[before..].windows(4).position(|window| window == b"\r\n\r\n") {
                        Some(at) => {
                            head.truncate(before + at + 4);
                            bytes = &bytes[head.len() - length..];
                            let head = std::mem::take(head);
                            self.read_head(&head, rules, now)?;
                        }
                        None if head.len() > 4096 => return violation(Checker::WrongAnswer, "an endless head"),
                        None => bytes = &bytes[head.len() - length..],
                    }
                }
                Reading::Body { body, at, framing } => {
                    let (rest, over) = match (read_body(bytes, body, at, framing), self.or_else.take()) {
                        (Some(read), or_else) => {
                            self.or_else = or_else;
                            read
                        }
                        (None, Some(other)) if other[..*at] == body[..*at] => {
                            *body = other;
                            continue;
                        }
                        (None, _) => {
                            let text = format!("client {}, answer {}: the body differs after byte {at}", self.index, self.answers);
                            return violation(Checker::WrongAnswer, text);
                        }
                    };
                    bytes = rest;
                    if over {
                        self.answer_complete();
                    }
                }
            }
        }
        Ok(())
    }

    fn answer_complete(&mut self) {
        self.reading = Reading::Head(Vec::new());
        self.answers += 1;
        self.continued = false;
    }

    fn read_head(&mut self, head: &[u8], rules: &Rules, now: Micros) -> Check {
        let head = String::from_utf8_lossy(head);
        let wrong = |why: &str| violation(Checker::WrongAnswer, format!("client {}, answer {}: {why}: {head:?}", self.index, self.answers));
        let Some(expected) = self.expected.get(self.answers) else {
            return wrong("to no request");
        };
        if head == "HTTP/1.1 100 Continue\r\n\r\n" {
            if !expected.expects_continue || self.continued {
                return wrong("not asked for");
            }
            self.continued = true;
            return Ok(());
        }
        if head == "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n" {
            // Those of a request that was answered for meanwhile must not go before another's answer.
            return if expected.started_at.is_some() { Ok(()) } else { wrong("hints before the request runs") };
        }
        let status = head.get(9..12).and_then(|status| status.parse::<u16>().ok()).unwrap_or(0);
        let closes = head.contains("\r\nConnection: close\r\n");
        let passed = |since: Option<Micros>, limit: Micros| since.is_some_and(|since| since + limit <= now);
        let (mut refused, mut rejected) = (false, false);
        let spooled = expected.sent > rules.body_memory_bytes_max;
        // A request that has been all there for a while is late only when its answers are not read, or the disk holds it up.
        let lately = |at: Micros| rules.reads_may_stall || at + 4_000_000 > now;
        let incomplete = expected.incomplete || expected.complete_at.is_none_or(lately);
        let may_be_late = incomplete || self.wire.window != usize::MAX || spooled && lately(rules.disk_idle_since);
        let mut text = |refusal: Refusal| {
            refused = true;
            Some(refusal_text(refusal))
        };
        let begun_at = if self.answers == 0 { self.first_since() } else { expected.begun_at };
        let served = if expected.pooled { expected.finished && !expected.found_full } else { expected.complete_at.is_some() };
        let body = match status {
            408 if passed(begun_at, rules.head_or_body) && may_be_late => {
                let length = |refusal: Refusal| head.contains(&format!("Content-Length: {}\r\n", refusal.explain().len() + 1));
                // The two about bodies are of the same length.
                text(if length(Refusal::HeadTimeout) { Refusal::HeadTimeout } else { Refusal::BodyTimeout })
            }
            400 if expected.incomplete && self.eof_told_at.is_some() => text(Refusal::Truncated),
            503 if head.contains("Content-Length: 36\r\n") && spooled && passed(begun_at, rules.body_idle) => {
                rejected = true;
                Some(Cow::from(&b"The server's disk does not keep up.\n"[..]))
            }
            507 if spooled && rules.disk_has_failed => {
                rejected = true;
                Some(Cow::from(&b"The server has no room for request bodies of this size just now.\n"[..]))
            }
            503 if expected.found_full || passed(expected.complete_at, rules.queue) && expected.started_at.is_none() => {
                Some(Cow::from(&b"The server is busy.\n"[..]))
            }
            504 if passed(expected.started_at, rules.run) => Some(Cow::from(&b"The application took too long to answer.\n"[..])),
            _ if status == expected.status && !expected.incomplete && expected.is_refused() => {
                rejected = true;
                Some(expected.body.clone())
            }
            _ if status == expected.status && !expected.incomplete && served => Some(expected.body.clone()),
            _ => None,
        };
        let Some(body) = body else {
            return wrong("no reason for this status");
        };
        refused |= rejected;
        let as_asked = !refused && status == expected.status;
        let handler_closes = expected.handler_closes && as_asked;
        if !closes && (refused || expected.close || handler_closes) {
            return wrong("the connection should end here");
        }
        if closes && !refused && !expected.close && !handler_closes && rules.life == Life::Serving {
            return wrong("the connection should go on");
        }
        let content_type = expected.content_type || matches!(status, 503 | 504) || refused;
        let framing = match as_asked && !expected.sized {
            false => Framing::Length,
            true if expected.is_http10 => Framing::Close,
            true => Framing::ChunkSize(String::new()),
        };
        let length = match &framing {
            _ if status == 204 => String::new(),
            Framing::Length => format!("Content-Length: {}\r\n", body.len()),
            Framing::ChunkSize(_) if !expected.is_head => "Transfer-Encoding: chunked\r\n".to_owned(),
            _ => String::new(),
        };
        let connection = match (closes, expected.is_http10) {
            (true, _) => "Connection: close\r\n",
            (false, true) => "Connection: keep-alive\r\n",
            (false, false) => "",
        };
        let whole = format!(
            "HTTP/1.1 {status} {}\r\nServer: uringd\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n{}{}{length}{connection}\r\n",
            reason_phrase(status),
            if content_type { "Content-Type: text/plain; charset=utf-8\r\n" } else { "" },
            if status == 503 { "Retry-After: 1\r\n" } else { "" },
        );
        if head != whole {
            return wrong(&format!("instead of {whole:?}"));
        }
        if expected.handler_closes && !closes {
            self.wire.reset = true;
            self.wire.to_server.clear();
        }
        self.said_close = closes;
        self.or_else = (status == 408).then(|| refusal_text(Refusal::BodyTooSlow));
        let bodiless = body.is_empty() && framing == Framing::Length || expected.is_head && !refused;
        self.reading = Reading::Body { body, at: 0, framing };
        if bodiless {
            self.answer_complete();
        }
        Ok(())
    }
}

/// Reads on in a body. What is left of the bytes, and whether the body is complete; `None` when a byte is wrong.
fn read_body<'a>(bytes: &'a [u8], body: &[u8], at: &mut usize, framing: &mut Framing) -> Option<(&'a [u8], bool)> {
    let (first, rest) = bytes.split_first()?;
    match framing {
        Framing::Length | Framing::Close | Framing::ChunkData(_) => {
            let most = if let Framing::ChunkData(left) = framing { *left } else { bytes.len() };
            let length = most.min(bytes.len()).min(body.len() - *at);
            if length == 0 || bytes[..length] != body[*at..*at + length] {
                return None;
            }
            *at += length;
            match framing {
                Framing::ChunkData(left) if *left == length => *framing = Framing::ChunkEnd(b"\r\n"),
                Framing::ChunkData(left) => *left -= length,
                _ => {}
            }
            Some((&bytes[length..], *framing == Framing::Length && *at == body.len()))
        }
        Framing::ChunkSize(line) => {
            line.push(char::from(*first));
            if let Some(digits) = line.strip_suffix("\r\n") {
                *framing = match usize::from_str_radix(digits, 16).ok()? {
                    0 if *at < body.len() => return None,
                    0 => Framing::LastEnd(b"\r\n"),
                    size => Framing::ChunkData(size),
                };
            }
            Some((rest, false))
        }
        Framing::ChunkEnd(end) | Framing::LastEnd(end) => {
            let (wanted, left) = end.split_first()?;
            if first != wanted {
                return None;
            }
            *end = left;
            let over = left.is_empty() && matches!(framing, Framing::LastEnd(_));
            if left.is_empty() {
                *framing = Framing::ChunkSize(String::new());
            }
            Some((rest, over))
        }
    }
}

impl Expected {
    /// The handler, its time or the disk may end the body before its end.
    fn may_be_cut(&self, rules: &Rules, now: Micros) -> bool {
        let late = self.started_at.is_some_and(|at| at + rules.run <= now);
        self.fails || self.streams && late || rules.disk_has_failed
    }

    fn is_refused(&self) -> bool {
        self.close && !self.pooled && self.content_type && self.status != 500
    }
}

/// Mostly too short to matter, sometimes longer than any patience.
fn pause(faults: &Faults, random: &mut Random) -> Micros {
    match random.below(10) {
        0 | 1 if faults.slow_clients => random.micros(25_000_000),
        2 => random.micros(1_000_000),
        _ => random.micros(3_000),
    }
}

fn chunked(out: &mut Vec<u8>, mut body: &[u8], random: &mut Random) {
    while !body.is_empty() {
        let length = (1 + random.below(body.len())).max(body.len().min(20));
        let extension = if random.chance(20) { ";a=b" } else { "" };
        out.extend_from_slice(format!("{length:x}{extension}\r\n").as_bytes());
        out.extend_from_slice(&body[..length]);
        out.extend_from_slice(b"\r\n");
        body = &body[length..];
    }
    out.extend_from_slice(if random.chance(20) { b"0\r\nX-Trailer: y\r\n\r\n" } else { b"0\r\n\r\n" });
}

fn refusal_text(refusal: Refusal) -> Cow<'static, [u8]> {
    format!("{}\n", refusal.explain()).into_bytes().into()
}

/// A request that breaks a rule, sometimes with a good one behind it that must not be served.
fn refused(rules: &Rules, random: &mut Random) -> (Expected, Vec<u8>) {
    let too_large = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", rules.body_bytes_max + 1);
    let (refusal, bytes) = match random.below(6) {
        0 => (Refusal::HostMissing, "GET / HTTP/1.1\r\n\r\n"),
        1 => (Refusal::MethodCase, "get / HTTP/1.1\r\nHost: a\r\n\r\n"),
        2 => (Refusal::VersionUnsupported, "GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
        3 => (Refusal::ContentLengthWithCoding, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
        4 => (Refusal::ChunkSizeBad, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\nz\r\n"),
        _ => (Refusal::BodyTooLarge, &*too_large),
    };
    let mut bytes = bytes.as_bytes().to_vec();
    if random.chance(50) {
        bytes.extend_from_slice(b"GET /0/0/T/10 HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    let body = refusal_text(refusal);
    (Expected { status: refusal.status(), content_type: true, close: true, body, ..Expected::default() }, bytes)
}

/// The beginning of a request.
fn incomplete(random: &mut Random) -> (Expected, Vec<u8>) {
    let whole = b"POST /0/0/e/0 HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\nabcdefghijklmnopqrstuvwxyz";
    let bytes = whole[..1 + random.below(whole.len())].to_vec();
    (Expected { incomplete: true, close: true, sent: 5_000, ..Expected::default() }, bytes)
}
