//! Every setting and every limit: its unit, its default and the reason for it.
//!
//! This is what a server runs with, whoever filled it in (`cli.rs` from the command line, the
//! environment and a file; a library user by hand). Nothing here does I/O.

use std::{fmt, path::PathBuf, time::Duration};

use crate::identity::{Fields, Networks, Trust};

/// What a [`Server`](crate::Server) runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen. Each core has a listening socket of its own for each TCP address.
    pub bind: Vec<Bind>,
    /// Which CPUs get a shard.
    pub cores: Cores,
    /// Threads that run handlers, per core. Two, so that one request that waits does not stop the
    /// next; a handler that only computes gains nothing from more.
    pub handlers: usize,
    /// CPUs that the handler threads run on; the core of their shard when not set.
    pub handler_cores: Option<Cores>,
    /// How the kernel is asked.
    pub backend: Backend,
    pub limits: Limits,
    pub timeouts: Timeouts,
    /// Where files of large bodies are made: on a disk, not in memory. They have no name, so none is ever left behind.
    pub spool_directory: PathBuf,
    /// Length of each listener's queue in the kernel, in connections (listen(2), capped by
    /// net.core.somaxconn). 4,096 is the kernel's own cap since 5.4; nginx says 511, gunicorn 2,048.
    pub backlog: u32,
    /// Value of the `Server` field of responses that have none; `None` sends none.
    pub server_name: Option<String>,
    /// Which proxies may say who the client is.
    pub forwarded: Trust,
    /// Every connection begins with a PROXY protocol header, and these may connect; `None`: no connection does.
    pub proxy_protocol: Option<Networks>,
    /// Requests that malformed-request rules let pass; see [`Permit`].
    pub permit: Permit,
    /// Whom the process runs as once its sockets listen: a name or a number. Unchanged when not set.
    pub user: Option<String>,
    /// The group; that of `user` when not set.
    pub group: Option<String>,
    /// What umask(2) is given.
    pub umask: Option<u32>,
    /// Permissions of unix sockets; what the umask leaves when not set.
    pub unix_socket_mode: Option<u32>,
    /// Has the process's id once it serves.
    pub pid_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            bind: vec![Bind::Tcp("127.0.0.1:8000".to_owned())],
            cores: Cores::All,
            handlers: 2,
            handler_cores: None,
            backend: Backend::Auto,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            spool_directory: PathBuf::from("/var/tmp"),
            backlog: 4096,
            server_name: Some("uringd".to_owned()),
            forwarded: Trust::default(),
            proxy_protocol: None,
            permit: Permit::default(),
            user: None,
            group: None,
            umask: None,
            unix_socket_mode: None,
            pid_file: None,
        }
    }
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// `host:port` or `[v6]:port`, resolved when the server starts.
    Tcp(String),
    /// A unix stream socket. A dead one is replaced, a live one is an error.
    Unix(PathBuf),
    /// A listening socket that was inherited under this number.
    Fd(i32),
}

/// A choice among the CPUs that this process may run on (sched_getaffinity(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cores {
    All,
    /// The first so many.
    Count(usize),
    /// These, by number.
    List(Vec<usize>),
}

/// How the kernel is asked for input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where it may be used, epoll otherwise.
    Auto,
    Uring,
    Epoll,
}

/// What one connection, request or core may take up. Every limit has an outcome a client can see.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest request line, in bytes without its CRLF; beyond it: 414. nginx 8 KiB, gunicorn 4,094.
    pub request_line_bytes_max: usize,
    /// Most header fields in a request; beyond it: 431. gunicorn 100, nginx 1,000, h11 none.
    pub fields_max: usize,
    /// Longest header field, name, colon and value, in bytes; beyond it: 431. gunicorn 8,190, nginx 8 KiB.
    pub field_bytes_max: usize,
    /// Longest request head, request line and empty line included, in bytes; beyond it: 431.
    /// h11 and IIS 16 KiB, node.js 16 KiB, Tomcat 8 KiB. Trailer sections and PROXY protocol headers have the same limit.
    pub head_bytes_max: usize,
    /// Longest request body, in bytes after decoding; beyond it: 413. waitress 1 GiB, nginx 1 MiB, gunicorn none.
    pub body_bytes_max: u64,
    /// Of a request body, this much is kept in memory, in bytes; a longer one goes into an unlinked file. nginx 16 KiB,
    /// waitress 512 KiB.
    pub body_memory_bytes_max: usize,
    /// Request body bytes in memory per core, all connections together; beyond it, requests with bodies get 503.
    pub body_memory_total_bytes_max: usize,
    /// What files of request and response bodies may take up, in bytes, in the whole process; beyond it, request
    /// bodies get 507 and handlers that stream wait.
    pub spool_bytes_max: u64,
    /// What one streamed response may take up in its file, in bytes, when its client reads slowly; beyond it, its
    /// handler waits.
    pub response_spool_bytes_max: u64,
    /// Longest line that introduces a chunk (size and extensions), in bytes; beyond it: 400.
    pub chunk_line_bytes_max: usize,
    /// Connections per core; more wait in the kernel's queue. Bounded by RLIMIT_NOFILE as well.
    pub connections_max: usize,
    /// Connections per client address and core, if limited; more are reset at once.
    pub connections_per_ip_max: Option<usize>,
    /// Complete requests that wait for a handler, per core; more get 503 with Retry-After.
    pub queue_max: usize,
    /// Response bytes that one connection may have waiting in memory before its next pipelined request is
    /// looked at, in bytes.
    pub response_buffer_bytes_max: usize,
    /// Response bytes waiting in memory per core, all connections together; beyond it, bodies go through files however
    /// small, and a connection's next request waits until its last answer is sent.
    pub response_memory_total_bytes_max: usize,
    /// Requests on one connection before it is closed; 0 for no limit. nginx 1,000, for the memory that its
    /// connections gather; ours gather none.
    pub keep_alive_requests_max: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_line_bytes_max: 8 << 10,
            fields_max: 100,
            field_bytes_max: 8 << 10,
            head_bytes_max: 16 << 10,
            body_bytes_max: 1 << 30,
            body_memory_bytes_max: 64 << 10,
            body_memory_total_bytes_max: 256 << 20,
            spool_bytes_max: 16 << 30,
            response_spool_bytes_max: 1 << 30,
            chunk_line_bytes_max: 1 << 10,
            connections_max: 16_384,
            connections_per_ip_max: None,
            queue_max: 1024,
            response_buffer_bytes_max: 1 << 20,
            response_memory_total_bytes_max: 256 << 20,
            keep_alive_requests_max: 0,
        }
    }
}

/// How long each phase of a connection may last. Measured on CLOCK_MONOTONIC.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// From a request's first byte (or the connection's beginning) to the end of its head; then 408,
    /// or a silent close when nothing was sent at all. A total, so a trickle does not renew it.
    pub head: Duration,
    /// Longest pause within a body; then 408.
    pub body_idle: Duration,
    /// Slowest body, in bytes per second, looked at once the body has lasted `body_rate_grace`; then 408.
    pub body_rate_min: u64,
    pub body_rate_grace: Duration,
    /// Longest wait for a handler; then 503 with Retry-After.
    pub queue: Duration,
    /// Longest run of a handler; then 504.
    pub run: Duration,
    /// Longest time without progress in sending; then the connection is reset.
    pub send: Duration,
    /// Slowest reading of answers that wait, in bytes per second, looked at once they have waited `send_rate_grace`; then
    /// the connection is reset.
    pub send_rate_min: u64,
    pub send_rate_grace: Duration,
    /// Longest pause between two requests of a connection; then it is closed.
    pub keep_alive: Duration,
    /// Longest life of a connection, if limited: its next answer is its last. For balancers that should spread anew.
    pub life: Option<Duration>,
    /// Longest time that a stop waits for requests in progress.
    pub drain: Duration,
    /// After a refusal: how long the peer's remaining bytes are read and dropped, so that it can read
    /// the answer (RFC 9112 section 9.6).
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            head: Duration::from_secs(10),
            body_idle: Duration::from_secs(60),
            body_rate_min: 500,
            body_rate_grace: Duration::from_secs(10),
            queue: Duration::from_secs(30),
            run: Duration::from_secs(30),
            send: Duration::from_secs(60),
            send_rate_min: 500,
            send_rate_grace: Duration::from_secs(10),
            keep_alive: Duration::from_secs(15),
            life: None,
            drain: Duration::from_secs(30),
            linger: Duration::from_secs(2),
        }
    }
}

/// Rules of the strict request profile that may be relaxed, one by one, for clients that need it.
/// All off; each opens the door that its documentation names.
#[derive(Clone, Copy, Debug, Default)]
pub struct Permit {
    /// An HTTP/1.1 request without a `Host` field (RFC 9112 section 3.2 demands 400). Danger: whatever
    /// chooses by host, here or behind, sees none.
    pub host_missing: bool,
    /// Field names with an underscore reach CGI-style environments. Danger: `X_Forwarded_For` and
    /// `X-Forwarded-For` become the same name there, so a client can write what only a proxy should.
    pub underscore_headers: bool,
    /// A target whose path begins with `//` (RFC 3986 section 3.3). Danger: a handler that redirects to the path it was
    /// asked for sends the client to whatever host is named there.
    pub double_slash: bool,
    /// A target `https://...` although the connection is not secured (RFC 9110 section 7.4), as a gateway in front may send
    /// it. Danger: a handler that looks at the target instead of the scheme it is told takes it for secured.
    pub https_target: bool,
}

impl Config {
    /// Refuses what could not work together.
    ///
    /// # Errors
    /// A sentence with what to try.
    pub fn checked(self) -> Result<Config, String> {
        let limits = &self.limits;
        let least = [
            ("--handlers", self.handlers, 1),
            ("--queue", limits.queue_max, 1),
            ("--limit-connections", limits.connections_max, 1),
            ("--limit-request-line", limits.request_line_bytes_max, 16),
            ("--limit-request-fields", limits.fields_max, 1),
            ("--limit-request-field-size", limits.field_bytes_max, 16),
            ("--limit-head", limits.head_bytes_max, 64),
            ("--limit-chunk-line", limits.chunk_line_bytes_max, 16),
        ];
        for (option, value, least) in least {
            if value < least {
                return Err(format!("{option} {value}: try {least} or more"));
            }
        }
        if limits.head_bytes_max > HEAD_BYTES_CEILING {
            return Err(format!("--limit-head {}: try {HEAD_BYTES_CEILING} or less", limits.head_bytes_max));
        }
        if self.bind.is_empty() {
            return Err("there is no address to listen on; try: --bind 127.0.0.1:8000".to_owned());
        }
        Ok(self)
    }
}

impl Config {
    /// What the limits add up to for one core, in bytes: name and amount. The whole process has this for each core, and
    /// [`MEMORY_BASE_BYTES`] once.
    ///
    /// A soak with every kind of bad client stays below it (`tests/memory.rs`).
    pub fn memory_ceiling(&self) -> [(&'static str, u64); 6] {
        let limits = &self.limits;
        let head = limits.head_bytes_max as u64 + 16 * limits.fields_max as u64 + EXCHANGE_BYTES;
        let connection = CONNECTION_BYTES + limits.head_bytes_max as u64 + RECEIVE_BYTES;
        let at_handlers = (limits.queue_max + self.handlers) as u64;
        [
            ("ring and receive buffers", RING_BYTES),
            ("connections, each with a request head", limits.connections_max as u64 * connection),
            ("requests queued and in handlers", at_handlers * head),
            ("request bodies", limits.body_memory_total_bytes_max as u64),
            ("responses", limits.response_memory_total_bytes_max as u64),
            ("streams of handlers", self.handlers as u64 * STREAM_BYTES),
        ]
    }
}

/// A process that serves nobody: program, stacks, logging.
pub const MEMORY_BASE_BYTES: u64 = 32 << 20;
/// The io_uring queues and 1,024 receive buffers of 4 KiB.
const RING_BYTES: u64 = 6 << 20;
/// A connection's slots in engine and driver and its entry in the wheel, and one output buffer.
const CONNECTION_BYTES: u64 = 2 << 10;
/// What one turn may bring beyond a full head.
const RECEIVE_BYTES: u64 = 16 << 10;
const EXCHANGE_BYTES: u64 = 1 << 10;
/// A handler's window and the file pieces made of it.
const STREAM_BYTES: u64 = 1 << 20;

/// A head larger than this is nobody's: it is read into memory whole.
pub(crate) const HEAD_BYTES_CEILING: usize = 1 << 20;

/// As keys and values of the configuration file.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (limits, timeouts) = (&self.limits, &self.timeouts);
        let binds: Vec<String> = self.bind.iter().map(|bind| quoted(&bind.to_string())).collect();
        writeln!(f, "bind = [{}]", binds.join(", "))?;
        writeln!(f, "cores = \"{}\"", self.cores)?;
        writeln!(f, "handlers = {}", self.handlers)?;
        if let Some(cores) = &self.handler_cores {
            writeln!(f, "handler-cores = \"{cores}\"")?;
        }
        writeln!(f, "backend = \"{}\"", format!("{:?}", self.backend).to_lowercase())?;
        writeln!(f, "backlog = {}", self.backlog)?;
        for (key, text) in [("user", &self.user), ("group", &self.group)] {
            if let Some(text) = text {
                writeln!(f, "{key} = {}", quoted(text))?;
            }
        }
        for (key, mode) in [("umask", self.umask), ("unix-socket-perms", self.unix_socket_mode)] {
            if let Some(mode) = mode {
                writeln!(f, "{key} = \"0{mode:o}\"")?;
            }
        }
        if let Some(path) = &self.pid_file {
            writeln!(f, "pid = {}", quoted(&path.to_string_lossy()))?;
        }
        writeln!(f, "server-header = {}", quoted(self.server_name.as_deref().unwrap_or("")))?;
        for (key, time) in [
            ("timeout", timeouts.run),
            ("queue-timeout", timeouts.queue),
            ("head-timeout", timeouts.head),
            ("body-timeout", timeouts.body_idle),
            ("send-timeout", timeouts.send),
            ("keep-alive", timeouts.keep_alive),
            ("connection-life", timeouts.life.unwrap_or_default()),
            ("graceful-timeout", timeouts.drain),
        ] {
            writeln!(f, "{key} = {}", time.as_secs_f64())?;
        }
        for (key, value) in [
            ("body-rate", timeouts.body_rate_min),
            ("queue", limits.queue_max as u64),
            ("limit-connections", limits.connections_max as u64),
            ("limit-request-line", limits.request_line_bytes_max as u64),
            ("limit-request-fields", limits.fields_max as u64),
            ("limit-request-field-size", limits.field_bytes_max as u64),
            ("limit-head", limits.head_bytes_max as u64),
            ("limit-chunk-line", limits.chunk_line_bytes_max as u64),
            ("limit-body", limits.body_bytes_max),
            ("body-memory", limits.body_memory_bytes_max as u64),
            ("limit-body-memory", limits.body_memory_total_bytes_max as u64),
            ("limit-response-memory", limits.response_memory_total_bytes_max as u64),
            ("limit-response-spool", limits.response_spool_bytes_max),
            ("limit-spool", limits.spool_bytes_max),
            ("limit-per-ip", limits.connections_per_ip_max.unwrap_or(0) as u64),
            ("send-rate", timeouts.send_rate_min),
            ("keep-alive-requests", limits.keep_alive_requests_max),
        ] {
            writeln!(f, "{key} = {value}")?;
        }
        writeln!(f, "spool-dir = {}", quoted(&self.spool_directory.to_string_lossy()))?;
        let forwarded = &self.forwarded;
        let fields = match forwarded.fields {
            Fields::Auto => "auto",
            Fields::XForwarded => "x-forwarded",
            Fields::Forwarded => "forwarded",
        };
        writeln!(f, "forwarded-allow-ips = \"{}\"", forwarded.proxies)?;
        writeln!(f, "forwarded-hops = {}", forwarded.hops)?;
        writeln!(f, "forwarded-fields = \"{fields}\"")?;
        writeln!(f, "proxy-protocol = \"{}\"", if self.proxy_protocol.is_some() { "on" } else { "off" })?;
        if let Some(allowed) = &self.proxy_protocol {
            writeln!(f, "proxy-allow-from = \"{allowed}\"")?;
        }
        let permit = self.permit;
        let permits = [
            ("double-slash", permit.double_slash),
            ("https-target", permit.https_target),
            ("host-missing", permit.host_missing),
            ("underscore-headers", permit.underscore_headers),
        ];
        let permits: Vec<String> = permits.iter().filter(|rule| rule.1).map(|rule| format!("\"{}\"", rule.0)).collect();
        writeln!(f, "permit = [{}]", permits.join(", "))
    }
}

/// A text as TOML and JSON have it.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bind::Tcp(address) => f.write_str(address),
            Bind::Unix(path) => write!(f, "unix:{}", path.display()),
            Bind::Fd(number) => write!(f, "fd://{number}"),
        }
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cores::All => f.write_str("all"),
            Cores::Count(count) => count.fmt(f),
            Cores::List(list) => {
                let list: Vec<String> = list.iter().map(|cpu| format!("{cpu}-{cpu}")).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}
