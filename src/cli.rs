//! The command line, the environment and the configuration file, and what they mean together.
//!
//! [`Options`] is what was typed; [`Options::config`] and [`Options::python_app`] say what it means. Where all of it is
//! looked for, and what wins, is in `sources.rs`.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::Parser;
use serde::Deserialize;

use crate::{
    builtin::Builtin,
    config::{Backend, Bind, Config, Cores, HEAD_BYTES_CEILING, Limits, quoted},
    identity::{Fields, Networks},
    python::{PythonApp, find_interpreter, zygote::THREADS_MAX},
};

/// Of a head, what is neither its request line nor its longest field.
const HEAD_REST_BYTES: usize = 4 << 10;
/// Requests that a process of class gevent runs at a time, when nothing is said. gunicorn's worker_connections says 1,000 too.
const GREENLETS: usize = 1000;

const ABOUT: &str = "\
A Linux-native HTTP server: one io_uring ring per core receives and sends, and only complete requests reach the \
handlers, so no client, however slow, can hold them.";

const EXAMPLES: &str = "\
Targets:
  builtin:welcome      a page that says what is running (when no target is given)
  builtin:hello        Hello, World!, answered on the ring thread
  builtin:hello-pool   the same, answered by a handler thread
  builtin:echo         JSON of the request as it was understood
  builtin:sleep        sleeps ?ms=N on a handler thread, then answers
  builtin:stream       streams ?bytes=N from a handler thread
  module:attribute     a Python application (WSGI); module:factory() calls what makes one, module alone has `application`

Examples:
  uringd                                      the welcome page on http://127.0.0.1:8000
  uringd --bind :8080 --cores 2 builtin:echo  all interfaces, two cores
  uringd --workers 4 --chdir site app:app     four processes of the Flask application in site/app.py
  uringd -k gevent app:app                    each process runs its requests on greenlets, a thousand at a time
  uringd --check --config uringd.toml         says what would run, and exits

Every option is also an environment variable, URINGD_ and its name in capitals (URINGD_KEEP_ALIVE=5), and a key
of the configuration file (keep-alive = 5). Exit status: 0 after a drained stop, 1 could not start, 2 usage,
3 requests were lost at the drain limit.

The options of gunicorn and waitress-serve, gunicorn.conf.py and GUNICORN_CMD_ARGS are accepted too; what of them is
not honoured is named in a warning, and by --check. docs/migrating.md has the list.";

// In the help texts, brackets are brackets.
#[allow(rustdoc::broken_intra_doc_links)]
/// Everything that can be typed. `None`: not said.
#[derive(Clone, Debug, Default, Parser, Deserialize)]
#[command(name = "uringd", version, about = ABOUT, after_help = EXAMPLES, max_term_width = 110)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// What answers requests
    #[arg(env = "URINGD_TARGET")]
    pub target: Option<String>,

    /// Where to listen: host:port, [v6]:port, :port, unix:PATH or fd://N; repeatable [default: 127.0.0.1:8000, or
    /// 0.0.0.0:$PORT]
    #[arg(short, long, alias = "listen", value_name = "ADDR", env = "URINGD_BIND", value_delimiter = ',', help_heading = "Running")]
    pub bind: Vec<String>,
    /// CPUs to serve on: all, a count (2) or a list (0,2-5; one CPU: 3-3) [default: all]
    #[arg(long, value_name = "LIST", env = "URINGD_CORES", help_heading = "Running")]
    pub cores: Option<String>,
    /// Handler threads per core [default: 2]
    #[arg(long, value_name = "N", env = "URINGD_HANDLERS", help_heading = "Running")]
    pub handlers: Option<usize>,
    /// CPUs of the handler threads, in turn by core [default: the core of their ring]
    #[arg(long, value_name = "LIST", env = "URINGD_HANDLER_CORES", help_heading = "Running")]
    pub handler_cores: Option<String>,
    /// How the kernel is asked: auto, uring or epoll [default: auto]
    #[arg(long, value_name = "NAME", env = "URINGD_BACKEND", help_heading = "Running")]
    pub backend: Option<String>,
    /// Read settings from this file, uringd.toml or gunicorn.conf.py, or from python:MODULE [default: ./uringd.toml if
    /// present, else ./gunicorn.conf.py]
    #[arg(short, long, value_name = "FILE", env = "URINGD_CONFIG", help_heading = "Running")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Load the application, print the effective configuration and exit: 0 when it would start
    #[arg(long, help_heading = "Running")]
    #[serde(skip)]
    pub check: bool,
    /// Say what this machine offers and costs, with the remedy for each finding, and exit: 0 without a problem, else 1
    #[arg(long, help_heading = "Running")]
    #[serde(skip)]
    pub doctor: bool,
    /// Connections that wait in the kernel for each listener [default: 4096]
    #[arg(long, value_name = "N", env = "URINGD_BACKLOG", help_heading = "Running")]
    pub backlog: Option<u32>,
    /// Least level of the log lines: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", env = "URINGD_LOG_LEVEL", help_heading = "Running")]
    pub log_level: Option<String>,
    /// Form of the log lines: text or json [default: text]
    #[arg(long, value_name = "FORM", env = "URINGD_LOG_FORMAT", help_heading = "Running")]
    pub log_format: Option<String>,
    /// Run as this user, by name or number, once the sockets listen [default: unchanged]
    #[arg(short, long, value_name = "NAME", env = "URINGD_USER", help_heading = "Running")]
    pub user: Option<String>,
    /// Run as this group [default: the group of --user]
    #[arg(short, long, value_name = "NAME", env = "URINGD_GROUP", help_heading = "Running")]
    pub group: Option<String>,
    /// Permissions that new files, unix sockets among them, do not get: 022 is octal, 18 decimal [default: unchanged]
    #[arg(short = 'm', long, value_name = "MASK", env = "URINGD_UMASK", help_heading = "Running")]
    pub umask: Option<String>,
    /// Write the process id here once ready, and remove it at the end
    #[arg(short, long, value_name = "PATH", env = "URINGD_PID", help_heading = "Running")]
    pub pid: Option<PathBuf>,
    /// Permissions of unix sockets, octal [default: what --umask leaves, or 666]
    #[arg(long, value_name = "MODE", env = "URINGD_UNIX_SOCKET_PERMS", help_heading = "Running")]
    pub unix_socket_perms: Option<String>,
    /// Value of the Server field of answers that have none of their own; empty: no field [default: uringd]
    #[arg(long, value_name = "TEXT", env = "URINGD_SERVER_HEADER", help_heading = "Running")]
    pub server_header: Option<String>,
    /// waitress's way to write --bind.
    #[arg(long, hide = true)]
    pub host: Option<String>,
    #[arg(long, hide = true)]
    pub port: Option<u16>,

    /// A request may run this long, in seconds; then 504; 0: any time [default: 30]
    #[arg(short, long, value_name = "SECS", env = "URINGD_TIMEOUT", help_heading = "Time limits")]
    pub timeout: Option<Seconds>,
    /// A request may wait this long for a handler; then 503 [default: 30]
    #[arg(long, value_name = "SECS", env = "URINGD_QUEUE_TIMEOUT", help_heading = "Time limits")]
    pub queue_timeout: Option<Seconds>,
    /// A request head may take this long in all; then 408 [default: 10]
    #[arg(long, value_name = "SECS", env = "URINGD_HEAD_TIMEOUT", help_heading = "Time limits")]
    pub head_timeout: Option<Seconds>,
    /// A request body may pause this long; then 408 [default: 60]
    #[arg(long, value_name = "SECS", env = "URINGD_BODY_TIMEOUT", help_heading = "Time limits")]
    pub body_timeout: Option<Seconds>,
    /// A request body must come this fast on average, in bytes a second, after 10 seconds; else 408 [default: 500]
    #[arg(long, value_name = "BYTES", env = "URINGD_BODY_RATE", help_heading = "Time limits")]
    pub body_rate: Option<u64>,
    /// An answer may go without progress this long; then the connection is reset [default: 60]
    #[arg(long, value_name = "SECS", env = "URINGD_SEND_TIMEOUT", help_heading = "Time limits")]
    pub send_timeout: Option<Seconds>,
    /// A client must read waiting answers this fast on average, in bytes a second, after 10 seconds; else the connection is
    /// reset [default: 500]
    #[arg(long, value_name = "BYTES", env = "URINGD_SEND_RATE", help_heading = "Time limits")]
    pub send_rate: Option<u64>,
    /// A connection may idle this long between requests [default: 15]
    #[arg(long, alias = "keepalive", value_name = "SECS", env = "URINGD_KEEP_ALIVE", help_heading = "Time limits")]
    pub keep_alive: Option<Seconds>,
    /// A connection's answer after this long is its last; 0: any time [default: 0]
    #[arg(long, value_name = "SECS", env = "URINGD_CONNECTION_LIFE", help_heading = "Time limits")]
    pub connection_life: Option<Seconds>,
    /// A stop waits this long for requests in progress [default: 30]
    #[arg(long, value_name = "SECS", env = "URINGD_GRACEFUL_TIMEOUT", help_heading = "Time limits")]
    pub graceful_timeout: Option<Seconds>,

    /// Complete requests that may wait for a handler, per core; more get 503 [default: 1024]
    #[arg(long, value_name = "N", env = "URINGD_QUEUE", help_heading = "Limits")]
    pub queue: Option<usize>,
    /// Connections per core; more wait in the kernel [default: 16384]
    #[arg(long, aliases = ["connection-limit", "worker-connections"], value_name = "N", env = "URINGD_LIMIT_CONNECTIONS", help_heading = "Limits")]
    pub limit_connections: Option<usize>,
    /// Bytes of a request line; more get 414; 0: as --limit-head [default: 8192]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_REQUEST_LINE", help_heading = "Limits")]
    pub limit_request_line: Option<usize>,
    /// Fields of a request head; more get 431 [default: 100]
    #[arg(long, value_name = "N", env = "URINGD_LIMIT_REQUEST_FIELDS", help_heading = "Limits")]
    pub limit_request_fields: Option<usize>,
    /// Bytes of one field; more get 431; 0: as --limit-head [default: 8192]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_REQUEST_FIELD_SIZE", help_heading = "Limits")]
    pub limit_request_field_size: Option<usize>,
    /// Bytes of a request head in all; more get 431 [default: 16384, or what the longest line and field need]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_HEAD", help_heading = "Limits")]
    pub limit_head: Option<usize>,
    /// Bytes of the line before a chunk, size and extensions; more get 400 [default: 1024]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_CHUNK_LINE", help_heading = "Limits")]
    pub limit_chunk_line: Option<usize>,
    /// Bytes of a request body; more get 413 [default: 1073741824]
    #[arg(long, alias = "max-request-body-size", value_name = "BYTES", env = "URINGD_LIMIT_BODY", help_heading = "Limits")]
    pub limit_body: Option<u64>,
    /// Bytes of a request body kept in memory; a longer one goes into an unlinked file [default: 65536]
    #[arg(long, value_name = "BYTES", env = "URINGD_BODY_MEMORY", help_heading = "Limits")]
    pub body_memory: Option<usize>,
    /// Bytes of request bodies in memory, per core; beyond it, requests with bodies get 503 [default: 268435456]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_BODY_MEMORY", help_heading = "Limits")]
    pub limit_body_memory: Option<usize>,
    /// Bytes of responses in memory, per core; beyond it, they go through files [default: 268435456]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_RESPONSE_MEMORY", help_heading = "Limits")]
    pub limit_response_memory: Option<usize>,
    /// Bytes of one streamed response in its file; beyond it, its handler waits [default: 1073741824]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_RESPONSE_SPOOL", help_heading = "Limits")]
    pub limit_response_spool: Option<u64>,
    /// Bytes of all files of bodies; beyond it, large request bodies get 507 [default: 17179869184]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_SPOOL", help_heading = "Limits")]
    pub limit_spool: Option<u64>,
    /// Where those files are made [default: $TMPDIR or /var/tmp]
    #[arg(long, value_name = "DIR", env = "URINGD_SPOOL_DIR", help_heading = "Limits")]
    pub spool_dir: Option<PathBuf>,
    /// Connections of one client address, per core; more are reset; 0: any number [default: 0]
    #[arg(long, value_name = "N", env = "URINGD_LIMIT_PER_IP", help_heading = "Limits")]
    pub limit_per_ip: Option<usize>,
    /// Requests on one connection before it is closed; 0: any number [default: 0]
    #[arg(long, value_name = "N", env = "URINGD_KEEP_ALIVE_REQUESTS", help_heading = "Limits")]
    pub keep_alive_requests: Option<u64>,
    /// Proxies that may say who the client is, by X-Forwarded-For and its like or by Forwarded: addresses and networks,
    /// `*` for all; from others these fields are removed [default: loopback, or $FORWARDED_ALLOW_IPS]
    #[arg(long, value_name = "LIST", env = "URINGD_FORWARDED_ALLOW_IPS", help_heading = "Proxies")]
    pub forwarded_allow_ips: Option<String>,
    /// Proxies between client and server: so many of the addresses they wrote are believed [default: 1]
    #[arg(long, value_name = "N", env = "URINGD_FORWARDED_HOPS", help_heading = "Proxies")]
    pub forwarded_hops: Option<usize>,
    /// Which fields the proxies write: x-forwarded, forwarded, or auto for the first of them that is there [default: auto]
    #[arg(long, value_name = "KIND", env = "URINGD_FORWARDED_FIELDS", help_heading = "Proxies")]
    pub forwarded_fields: Option<String>,
    /// Every connection begins with a PROXY protocol header, version 1 or 2: on or off [default: off]
    #[arg(long, value_name = "on|off", env = "URINGD_PROXY_PROTOCOL", num_args = 0..=1, default_missing_value = "on", help_heading = "Proxies")]
    pub proxy_protocol: Option<String>,
    /// Who may connect when it is on: addresses and networks, `*` for all [default: loopback]
    #[arg(long, value_name = "LIST", env = "URINGD_PROXY_ALLOW_FROM", help_heading = "Proxies")]
    pub proxy_allow_from: Option<String>,
    /// Python processes in all, spread over the cores [default: $WEB_CONCURRENCY, or one per core]
    #[arg(short, long, value_name = "N", env = "URINGD_WORKERS", help_heading = "Python")]
    pub workers: Option<usize>,
    /// Threads of each Python process [default: 1]
    #[arg(long, value_name = "N", env = "URINGD_THREADS", help_heading = "Python")]
    pub threads: Option<usize>,
    /// The interpreter [default: that of $VIRTUAL_ENV, ./.venv or ./venv, else python3]
    #[arg(long, value_name = "PATH", env = "URINGD_PYTHON", help_heading = "Python")]
    pub python: Option<PathBuf>,
    /// Load the application from this directory
    #[arg(long, value_name = "DIR", env = "URINGD_CHDIR", help_heading = "Python")]
    pub chdir: Option<PathBuf>,
    /// Directories in which modules are looked for, with commas between
    #[arg(long, value_name = "LIST", env = "URINGD_PYTHONPATH", help_heading = "Python")]
    pub pythonpath: Option<String>,
    /// Set a variable of the application's environment; repeatable
    #[arg(short, long, value_name = "K=V", help_heading = "Python")]
    pub env: Vec<String>,
    /// Load the application once, and fork the processes from it
    #[arg(long, value_name = "BOOL", env = "URINGD_PRELOAD", num_args = 0..=1, default_missing_value = "true", require_equals = true, help_heading = "Python")]
    pub preload: Option<bool>,
    /// Replace a process after so many requests; 0: never [default: 0]
    #[arg(long, value_name = "N", env = "URINGD_MAX_REQUESTS", help_heading = "Python")]
    pub max_requests: Option<u64>,
    /// And up to so many more, so that they do not all fall due together [default: 0]
    #[arg(long, value_name = "N", env = "URINGD_MAX_REQUESTS_JITTER", help_heading = "Python")]
    pub max_requests_jitter: Option<u64>,
    /// Replace a process that has more memory than this; 0: never [default: 0]
    #[arg(long, value_name = "BYTES", env = "URINGD_MAX_RSS", help_heading = "Python")]
    pub max_rss: Option<u64>,
    /// Replace a process that is older than this; 0: never [default: 0]
    #[arg(long, value_name = "SECS", env = "URINGD_MAX_AGE", help_heading = "Python")]
    pub max_age: Option<Seconds>,
    /// Where the application is mounted: its SCRIPT_NAME, taken from the path [default: $SCRIPT_NAME]
    #[arg(long, value_name = "PATH", env = "URINGD_SCRIPT_NAME", help_heading = "Python")]
    pub script_name: Option<String>,
    /// What clients use when no proxy says it: http or https [default: http]
    #[arg(long, value_name = "SCHEME", env = "URINGD_URL_SCHEME", help_heading = "Python")]
    pub url_scheme: Option<String>,
    /// SERVER_NAME of the environ, for requests without a Host field [default: the address]
    #[arg(long, value_name = "NAME", env = "URINGD_SERVER_NAME", help_heading = "Python")]
    pub server_name: Option<String>,
    /// waitress's way to write `module:factory()`.
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub call: bool,
    /// What the application is, when its looks would say something else: wsgi
    #[arg(long, value_name = "NAME", env = "URINGD_INTERFACE", help_heading = "Python")]
    pub interface: Option<String>,
    /// How requests run: on --threads (sync and gthread, as gunicorn calls them), or gevent: many at a time in each process,
    /// each on a greenlet
    #[arg(short = 'k', long, value_name = "NAME", env = "URINGD_WORKER_CLASS", help_heading = "Python")]
    pub worker_class: Option<String>,
    /// Requests that a process of class gevent runs at a time; more wait, or go to another [default: 1000]
    #[arg(long, value_name = "N", env = "URINGD_GREENLETS", help_heading = "Python")]
    pub greenlets: Option<usize>,
    /// Relax one rule of the strict request profile: double-slash, host-missing, https-target, underscore-headers; repeatable
    #[arg(long, value_name = "RULE", env = "URINGD_PERMIT", value_delimiter = ',', help_heading = "Limits")]
    pub permit: Vec<String>,
}

/// A time in seconds, with decimals where wanted: `30`, `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub struct Seconds(pub Duration);

impl TryFrom<f64> for Seconds {
    type Error = String;

    fn try_from(seconds: f64) -> Result<Seconds, String> {
        // A year is longer than any of these should be, and shorter than what overflows.
        let valid = (0.0..=31_536_000.0).contains(&seconds);
        let duration = valid.then(|| Duration::from_secs_f64(seconds));
        duration.map(Seconds).ok_or_else(|| format!("{seconds} is no number of seconds between 0 and 31536000"))
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Seconds, String> {
        let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds, like 30 or 0.5"))?;
        Seconds::try_from(seconds)
    }
}

/// What was typed cannot be meant. Its text is a sentence.
#[derive(Debug, PartialEq, Eq)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// What a target is, told by its form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Builtin(Builtin),
    /// A Python application: `module:attribute`.
    Python(String),
    /// A form that is understood but cannot be served yet: what it is.
    Unsupported(&'static str),
}

impl Target {
    /// # Errors
    /// [`Usage`], when it has no known form.
    pub fn from_text(text: &str) -> Result<Target, Usage> {
        if let Some(builtin) = Builtin::named(text) {
            return Ok(Target::Builtin(builtin));
        }
        if text.starts_with("builtin:") {
            let names: Vec<_> = Builtin::NAMES.iter().map(|pair| pair.0).collect();
            return Err(Usage(format!("{text} is no built-in target; try: {}", names.join(", "))));
        }
        let is_name = |name: &str| !name.is_empty() && name.chars().all(|letter| letter.is_alphanumeric() || letter == '_');
        let is_module = |name: &str| name.split('.').all(is_name);
        let is_app = match text.split_once(':') {
            Some((module, attribute)) => is_module(module) && !attribute.is_empty() && !attribute.starts_with('/'),
            // As Django's documentation has it for gunicorn: `mysite.wsgi`.
            None => is_module(text) && !Path::new(text).is_dir(),
        };
        if is_app {
            return Ok(Target::Python(text.to_owned()));
        }
        let unsupported = if text.starts_with("http://") || text.starts_with("https://") || text.starts_with("unix:") {
            "a reverse proxy"
        } else if text.contains('/') || Path::new(text).is_dir() {
            "a directory of static files"
        } else {
            return Err(Usage(format!("{text:?} is no target; try: builtin:welcome, or --help for the forms there are")));
        };
        Ok(Target::Unsupported(unsupported))
    }
}

impl Options {
    /// Fills what was not said from `file`.
    pub fn over(self, file: Options) -> Options {
        /// Every field, so that none is forgotten when one is added.
        macro_rules! merge {
            ($($field:ident)*; $($list:ident)*; $($flag:ident)*) => {
                Options {
                    $($field: self.$field.or(file.$field),)*
                    $($list: if self.$list.is_empty() { file.$list } else { self.$list },)*
                    $($flag: self.$flag || file.$flag,)*
                }
            };
        }
        merge! {
            target cores handlers handler_cores backend backlog log_level log_format
            timeout queue_timeout head_timeout body_timeout body_rate send_timeout keep_alive graceful_timeout
            queue limit_connections limit_request_line limit_request_fields limit_request_field_size limit_head
            limit_chunk_line limit_body keep_alive_requests send_rate body_memory limit_body_memory limit_response_memory
            connection_life limit_response_spool limit_spool spool_dir limit_per_ip
            forwarded_allow_ips forwarded_hops forwarded_fields proxy_protocol proxy_allow_from
            workers threads python chdir pythonpath preload max_requests max_requests_jitter max_rss max_age interface
            worker_class greenlets user group umask pid unix_socket_perms server_header host port script_name url_scheme server_name
            config;
            bind permit env;
            check doctor call
        }
    }

    /// What they mean for a Python application. `concurrency` is the environment's WEB_CONCURRENCY.
    ///
    /// # Errors
    /// [`Usage`], for the first that means nothing.
    pub fn python_app(&self, app: &str, concurrency: Option<&str>) -> Result<PythonApp, Usage> {
        let usage = |text: String| Err(Usage(text));
        match self.interface.as_deref() {
            None | Some("auto" | "wsgi") => {}
            Some("asgi") => {
                return usage("--interface asgi: this version runs WSGI applications only; try: an adapter such as a2wsgi".to_owned());
            }
            Some(other) => return usage(format!("--interface {other}: try wsgi")),
        }
        let greenlets = match self.worker_class.as_deref().map(class_name) {
            None | Some("sync" | "gthread") => None,
            Some("gevent" | "gevent_pywsgi" | "gevent_wsgi") => Some(self.greenlets.unwrap_or(GREENLETS)),
            Some(class @ ("eventlet" | "tornado")) => {
                let why = if class == "eventlet" { "its makers advise against it" } else { "tornado runs applications of its own kind" };
                return usage(format!("--worker-class {class} is not available: {why}; try: --worker-class gevent, or --threads 8"));
            }
            Some(other) => return usage(format!("--worker-class {other} is not available; try: gevent, or --threads 8, which is gthread")),
        };
        if greenlets == Some(0) {
            return usage("--greenlets 0: try 1 or more".to_owned());
        }
        let said = concurrency.filter(|_| self.workers.is_none());
        let concurrency = said.map(|text| text.parse().map_err(|_| Usage(format!("WEB_CONCURRENCY={text} is no number")))).transpose()?;
        let workers = self.workers.or(concurrency);
        if workers == Some(0) {
            return usage("--workers 0: try 1 or more".to_owned());
        }
        let threads = self.threads.unwrap_or(1);
        if !(1..=THREADS_MAX).contains(&threads) {
            return usage(format!("--threads {threads}: try 1 to {THREADS_MAX}, and more --workers"));
        }
        let pair = |text: &String| {
            let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
            let pair = pair.map(|(name, value)| (name.to_owned(), value.to_owned()));
            pair.ok_or_else(|| Usage(format!("--env {text}: try NAME=VALUE")))
        };
        Ok(PythonApp {
            interpreter: self.interpreter(),
            workers,
            threads,
            greenlets,
            chdir: self.chdir.clone(),
            pythonpath: self
                .pythonpath
                .iter()
                .flat_map(|list| list.split([',', ':']))
                .filter(|path| !path.is_empty())
                .map(str::to_owned)
                .collect(),
            env: self.env.iter().map(pair).collect::<Result<_, Usage>>()?,
            preload: self.preload.unwrap_or(false),
            max_requests: self.max_requests.unwrap_or(0),
            max_requests_jitter: self.max_requests_jitter.unwrap_or(0),
            max_rss: self.max_rss.filter(|limit| *limit > 0),
            max_age: self.max_age.map(|seconds| seconds.0).filter(|limit| !limit.is_zero()),
            interface: self.interface.clone().filter(|name| name != "auto"),
            environ: self.environ()?,
            app: if self.call && !app.ends_with(')') { format!("{app}()") } else { app.to_owned() },
            ..PythonApp::new("")
        })
    }

    /// What runs Python.
    pub fn interpreter(&self) -> PathBuf {
        match &self.python {
            // A path with a slash is ours to resolve: the zygote changes its directory.
            Some(path) if path.components().count() > 1 => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            Some(name) => name.clone(),
            None => find_interpreter(self.chdir.as_deref()),
        }
    }

    /// What stands neither in a [`Config`] nor in a [`PythonApp`], as keys and values of the configuration file.
    pub fn rest(&self) -> String {
        let settings = [
            ("log-level", self.log_level.as_deref().or(Some("info"))),
            ("log-format", self.log_format.as_deref().or(Some("text"))),
            ("worker-class", self.worker_class.as_deref()),
        ];
        settings.iter().filter_map(|(key, value)| value.map(|value| format!("{key} = {}\n", quoted(value)))).collect()
    }

    /// What the options say about every request's environ.
    fn environ(&self) -> Result<BTreeMap<&'static str, String>, Usage> {
        let scheme = self.url_scheme.as_deref();
        if let Some(other) = scheme.filter(|scheme| !["http", "https"].contains(scheme)) {
            return Err(Usage(format!("--url-scheme {other}: try http or https")));
        }
        let said =
            [("SCRIPT_NAME", self.script_name.as_deref()), ("wsgi.url_scheme", scheme), ("SERVER_NAME", self.server_name.as_deref())];
        Ok(said.into_iter().filter_map(|(key, value)| value.map(|value| (key, value.to_owned()))).collect())
    }

    /// What the options mean. `port` is the environment's PORT.
    ///
    /// # Errors
    /// [`Usage`], for the first that means nothing.
    pub fn config(&self, port: Option<&str>) -> Result<Config, Usage> {
        let mut config = Config::default();
        let waitress = (self.host.is_some() || self.port.is_some()).then(|| {
            let host = self.host.as_deref().unwrap_or("0.0.0.0");
            let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
            format!("{host}:{}", self.port.unwrap_or(8080))
        });
        let binds: Vec<Bind> = self.bind.iter().chain(&waitress).map(|text| bind(text)).collect();
        if !binds.is_empty() {
            config.bind = binds;
        } else if let Some(port) = port {
            let port: u16 = port.parse().map_err(|_| Usage(format!("PORT={port} is no port number")))?;
            config.bind = vec![Bind::Tcp(format!("0.0.0.0:{port}"))];
        }
        if let Some(text) = &self.cores {
            config.cores = cores(text)?;
        }
        config.handler_cores = self.handler_cores.as_deref().map(cores).transpose()?;
        config.backend = match self.backend.as_deref() {
            None | Some("auto") => Backend::Auto,
            Some("uring") => Backend::Uring,
            Some("epoll") => Backend::Epoll,
            Some(other) => return Err(Usage(format!("--backend {other}: try auto, uring or epoll"))),
        };
        for rule in &self.permit {
            match rule.as_str() {
                "double-slash" => config.permit.double_slash = true,
                "host-missing" => config.permit.host_missing = true,
                "https-target" => config.permit.https_target = true,
                "underscore-headers" => config.permit.underscore_headers = true,
                other => {
                    return Err(Usage(format!("--permit {other}: try double-slash, host-missing, https-target or underscore-headers")));
                }
            }
        }
        let networks = |option: &str, text: &str| {
            let bad = |part| Usage(format!("--{option}: {part} is no address and no network; try: 127.0.0.1,10.0.0.0/8"));
            Networks::from_list(text).map_err(bad)
        };
        if let Some(list) = self.forwarded_allow_ips.clone().or_else(forwarded_allow_ips) {
            config.forwarded.proxies = networks("forwarded-allow-ips", &list)?;
        }
        set(&mut config.forwarded.hops, self.forwarded_hops);
        config.forwarded.fields = match self.forwarded_fields.as_deref() {
            None | Some("auto") => Fields::Auto,
            Some("x-forwarded") => Fields::XForwarded,
            Some("forwarded") => Fields::Forwarded,
            Some(other) => return Err(Usage(format!("--forwarded-fields {other}: try auto, x-forwarded or forwarded"))),
        };
        let allowed = self.proxy_allow_from.as_deref().map(|list| networks("proxy-allow-from", list)).transpose()?;
        config.proxy_protocol = match self.proxy_protocol.as_deref() {
            None | Some("off" | "false") => None,
            // Both versions are always understood.
            Some("on" | "true" | "auto" | "v1" | "v2") => Some(allowed.unwrap_or_else(Networks::loopback)),
            Some(other) => return Err(Usage(format!("--proxy-protocol {other}: try on or off"))),
        };
        config.pid_file.clone_from(&self.pid);
        config.user.clone_from(&self.user);
        config.group.clone_from(&self.group);
        config.umask = self.umask.as_deref().map(umask).transpose()?;
        config.unix_socket_mode = self.unix_socket_perms.as_deref().map(unix_socket_perms).transpose()?;
        if let Some(text) = &self.server_header {
            if text.chars().any(|letter| !(' '..='~').contains(&letter)) {
                return Err(Usage(format!("--server-header {text:?}: try ASCII letters, digits and spaces")));
            }
            config.server_name = Some(text.clone()).filter(|text| !text.is_empty());
        }
        set(&mut config.handlers, self.handlers);
        set(&mut config.backlog, self.backlog);
        let limits = &mut config.limits;
        set(&mut limits.queue_max, self.queue);
        set(&mut limits.connections_max, self.limit_connections);
        set(&mut limits.request_line_bytes_max, self.limit_request_line);
        set(&mut limits.fields_max, self.limit_request_fields);
        set(&mut limits.field_bytes_max, self.limit_request_field_size);
        // Who allows a longer part wants the head to hold it.
        let usual = Limits::default();
        if limits.request_line_bytes_max > usual.request_line_bytes_max || limits.field_bytes_max > usual.field_bytes_max {
            let needed = limits.request_line_bytes_max.saturating_add(limits.field_bytes_max).saturating_add(HEAD_REST_BYTES);
            limits.head_bytes_max = needed.clamp(usual.head_bytes_max, HEAD_BYTES_CEILING);
        }
        set(&mut limits.head_bytes_max, self.limit_head);
        for part in [&mut limits.request_line_bytes_max, &mut limits.field_bytes_max] {
            if *part == 0 {
                *part = limits.head_bytes_max;
            }
        }
        set(&mut limits.chunk_line_bytes_max, self.limit_chunk_line);
        set(&mut limits.body_bytes_max, self.limit_body);
        set(&mut limits.keep_alive_requests_max, self.keep_alive_requests);
        set(&mut limits.body_memory_bytes_max, self.body_memory);
        set(&mut limits.body_memory_total_bytes_max, self.limit_body_memory);
        set(&mut limits.response_memory_total_bytes_max, self.limit_response_memory);
        set(&mut limits.response_spool_bytes_max, self.limit_response_spool);
        set(&mut limits.spool_bytes_max, self.limit_spool);
        limits.connections_per_ip_max = self.limit_per_ip.filter(|limit| *limit > 0);
        let temporary = std::env::var_os("TMPDIR").map(PathBuf::from);
        set(&mut config.spool_directory, self.spool_dir.clone().or(temporary));
        let timeouts = &mut config.timeouts;
        let seconds = |option: Option<Seconds>| option.map(|seconds| seconds.0);
        // A year, for no limit: nobody waits as long.
        set(&mut timeouts.run, seconds(self.timeout).map(|limit| if limit.is_zero() { Duration::from_secs(31_536_000) } else { limit }));
        set(&mut timeouts.queue, seconds(self.queue_timeout));
        set(&mut timeouts.head, seconds(self.head_timeout));
        set(&mut timeouts.body_idle, seconds(self.body_timeout));
        set(&mut timeouts.body_rate_min, self.body_rate);
        set(&mut timeouts.send, seconds(self.send_timeout));
        set(&mut timeouts.send_rate_min, self.send_rate);
        set(&mut timeouts.keep_alive, seconds(self.keep_alive));
        timeouts.life = seconds(self.connection_life).filter(|life| !life.is_zero());
        set(&mut timeouts.drain, seconds(self.graceful_timeout));
        config.checked().map_err(Usage)
    }
}

/// What `--bind` means, in gunicorn's and waitress's forms, too: `tcp://host:port`, `*:port`.
fn bind(text: &str) -> Bind {
    let text = text.trim().trim_start_matches("tcp://");
    match text.strip_prefix('*') {
        Some(port) if port.is_empty() || port.starts_with(':') => Bind::from_text(&format!("0.0.0.0{port}")),
        _ => Bind::from_text(text),
    }
}

/// gunicorn's own classes by their short names.
fn class_name(class: &str) -> &str {
    match class {
        "gunicorn.workers.sync.SyncWorker" => "sync",
        "gunicorn.workers.gthread.ThreadWorker" => "gthread",
        "gunicorn.workers.ggevent.GeventWorker" => "gevent",
        other => other,
    }
}

/// As gunicorn reads it: a leading 0 makes it octal.
fn umask(text: &str) -> Result<u32, Usage> {
    let octal = text.strip_prefix("0o").or_else(|| text.strip_prefix('0').filter(|rest| !rest.is_empty()));
    let mask = octal.map_or_else(|| text.parse(), |digits| u32::from_str_radix(digits, 8)).ok().filter(|mask| *mask <= 0o777);
    mask.ok_or_else(|| Usage(format!("--umask {text}: try 022, which is octal")))
}

/// As waitress reads it: octal.
fn unix_socket_perms(text: &str) -> Result<u32, Usage> {
    let mode = u32::from_str_radix(text.trim_start_matches("0o"), 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| Usage(format!("--unix-socket-perms {text}: try 660, which is octal")))
}

/// gunicorn's name for it.
pub fn forwarded_allow_ips() -> Option<String> {
    std::env::var("FORWARDED_ALLOW_IPS").ok()
}

fn set<T>(setting: &mut T, said: Option<T>) {
    if let Some(value) = said {
        *setting = value;
    }
}

/// `all`, `2`, `0,2-5`.
fn cores(text: &str) -> Result<Cores, Usage> {
    let bad = || Usage(format!("--cores {text}: try all, a count (2) or a list (0,2-5; one CPU: 3-3)"));
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| bad());
    if text == "all" {
        return Ok(Cores::All);
    }
    if !text.contains([',', '-']) {
        return number(text).map(Cores::Count);
    }
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last > 65_535 {
            return Err(bad());
        }
        list.extend((first..=last).filter(|cpu| !list.contains(cpu)).collect::<Vec<_>>());
    }
    Ok(Cores::List(list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Permit;

    fn parse(words: &str) -> Options {
        Options::try_parse_from(std::iter::once("uringd").chain(words.split_whitespace())).expect("valid options")
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn what_the_page_of_refusals_says_to_try_exists() {
        use clap::CommandFactory;
        let page = include_str!("../docs/refusals.md");
        let command = Options::command();
        let options: Vec<&str> = command.get_arguments().filter_map(|argument| argument.get_long()).collect();
        let named: Vec<&str> = page.split(['`', ' ', '\n']).filter_map(|word| word.strip_prefix("--")).collect();
        assert!(named.len() > 20, "{named:?}");
        let unknown: Vec<&&str> = named.iter().filter(|option| !options.contains(option)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");

        let rows = page.lines().filter_map(|line| line.strip_prefix("| `--permit ")?.split('`').next());
        let permits: Vec<&str> = rows.collect();
        let config = parse(&format!("--permit {}", permits.join(","))).config(None).expect("permits that exist");
        let Permit { double_slash, host_missing, https_target, underscore_headers } = config.permit;
        assert!(double_slash && host_missing && https_target && underscore_headers, "{permits:?}");
    }

    #[test]
    fn what_is_typed_wins_over_the_file() {
        let file: Options = toml::from_str("handlers = 7\nkeep-alive = 2.5\nbind = ['unix:/x']\n").expect("valid");
        let config = parse("--handlers 3").over(file).config(None).expect("valid");
        assert_eq!((config.handlers, config.timeouts.keep_alive), (3, Duration::from_millis(2500)));
        assert_eq!(config.bind, [Bind::Unix("/x".into())]);
    }

    #[test]
    fn an_unknown_key_in_the_file_is_an_error() {
        assert!(toml::from_str::<Options>("handlrs = 7\n").is_err());
    }

    #[test]
    fn gunicorns_and_waitresss_names_are_understood() {
        let config =
            parse("--keepalive 5 --worker-connections 10 --max-request-body-size 9 -t 3 --listen :80").config(None).expect("valid");
        assert_eq!(config.timeouts.keep_alive, Duration::from_secs(5));
        assert_eq!((config.limits.connections_max, config.limits.body_bytes_max), (10, 9));
        assert_eq!(config.timeouts.run, Duration::from_secs(3));
        assert_eq!(config.bind, [Bind::Tcp("0.0.0.0:80".into())]);
    }

    #[test]
    fn zero_means_no_limit_where_gunicorn_has_it_so() {
        let config = parse("--timeout 0 --limit-request-line 0 --limit-request-field-size 0").config(None).expect("valid");
        assert!(config.timeouts.run > Duration::from_secs(10_000_000));
        let limits = config.limits;
        assert_eq!((limits.request_line_bytes_max, limits.field_bytes_max), (limits.head_bytes_max, limits.head_bytes_max));
    }

    #[test]
    fn a_longer_part_makes_room_in_the_head_unless_the_head_has_its_own_limit() {
        let head = |words: &str| parse(words).config(None).expect("valid").limits.head_bytes_max;
        assert_eq!(head("--limit-request-line 4094 --limit-request-field-size 8190"), 16 << 10);
        assert_eq!(head("--limit-request-field-size 65536"), (64 << 10) + (8 << 10) + (4 << 10));
        assert_eq!(head("--limit-request-field-size 65536 --limit-head 20000"), 20_000);
        assert_eq!(head("--limit-request-line 99999999"), HEAD_BYTES_CEILING);
    }

    #[test]
    fn addresses_are_written_as_gunicorn_and_waitress_have_them() {
        let binds = |words: &str| parse(words).config(None).expect("valid").bind.iter().map(Bind::to_string).collect::<Vec<_>>();
        assert_eq!(binds("--listen *:8080 -b tcp://127.0.0.1:1 -b *"), ["0.0.0.0:8080", "127.0.0.1:1", "0.0.0.0:8000"]);
        assert_eq!(binds("--port 1"), ["0.0.0.0:1"]);
        assert_eq!(binds("--host ::1"), ["[::1]:8080"]);
        assert_eq!(binds("--host a --port 2 -b unix:/x"), ["unix:/x", "a:2"]);
    }

    #[test]
    fn masks_and_modes_are_octal_as_their_programs_read_them() {
        let of = |words: &str| parse(words).config(None).map(|config| (config.umask, config.unix_socket_mode));
        assert_eq!(of("-m 022"), Ok((Some(0o22), None)));
        assert_eq!(of("--umask 0o7 --unix-socket-perms 660"), Ok((Some(7), Some(0o660))));
        assert_eq!(of("--umask 18"), Ok((Some(0o22), None)));
        assert_eq!(of("--umask 0"), Ok((Some(0), None)));
        for bad in ["--umask 09", "--umask x", "--umask 01777", "--unix-socket-perms 8", "--unix-socket-perms 10000"] {
            assert!(of(bad).is_err_and(|usage| usage.0.contains("try ")), "{bad}");
        }
    }

    #[test]
    fn the_server_field_is_what_was_said() {
        let name = |words: &str| parse(words).config(None).map(|config| config.server_name);
        assert_eq!(name(""), Ok(Some("uringd".to_owned())));
        assert_eq!(name("--server-header=me/1"), Ok(Some("me/1".to_owned())));
        assert_eq!(name("--server-header="), Ok(None));
        assert!(name("--server-header=a\u{e9}").is_err());
    }

    #[test]
    fn an_application_may_be_mounted_called_and_reached_by_https() {
        let app = parse("--script-name /a --url-scheme https --call").python_app("a:b", None).expect("valid");
        assert_eq!((app.environ["SCRIPT_NAME"].as_str(), app.environ["wsgi.url_scheme"].as_str()), ("/a", "https"));
        assert_eq!(app.app, "a:b()");
        assert_eq!(parse("--call").python_app("a:b()", None).expect("valid").app, "a:b()");
        assert!(parse("--url-scheme gopher").python_app("a:b", None).is_err());
    }

    #[test]
    fn proxies_are_trusted_by_address_and_network() {
        let config = parse("--forwarded-allow-ips 10.0.0.0/8 --forwarded-hops 2 --proxy-protocol on").config(None).expect("valid");
        assert_eq!((config.forwarded.proxies.to_string(), config.forwarded.hops), ("10.0.0.0/8".to_owned(), 2));
        assert_eq!(config.proxy_protocol, Some(Networks::loopback()));
        assert_eq!(parse("--proxy-allow-from *").config(None).expect("valid").proxy_protocol, None);
        for on in ["--proxy-protocol", "--proxy-protocol=v1", "--proxy-protocol auto"] {
            assert!(parse(on).config(None).expect("valid").proxy_protocol.is_some(), "{on}");
        }
        for bad in ["--forwarded-allow-ips x", "--proxy-allow-from 1.2.3.4/40", "--proxy-protocol maybe", "--forwarded-fields both"] {
            assert!(parse(bad).config(None).is_err(), "{bad}");
        }
    }

    #[test]
    fn cores_are_all_a_count_or_a_list() {
        assert_eq!(cores("all"), Ok(Cores::All));
        assert_eq!(cores("2"), Ok(Cores::Count(2)));
        assert_eq!(cores("3-3"), Ok(Cores::List(vec![3])));
        assert_eq!(cores("0,2-4,3"), Ok(Cores::List(vec![0, 2, 3, 4])));
        for bad in ["", "x", "2-1", "1,,2", "-1", "0-9999999"] {
            assert!(cores(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_port_of_the_environment_means_every_interface() {
        assert_eq!(parse("").config(Some("5000")).expect("valid").bind, [Bind::Tcp("0.0.0.0:5000".into())]);
        assert_eq!(parse("-b :1").config(Some("5000")).expect("valid").bind, [Bind::Tcp("0.0.0.0:1".into())]);
        assert!(parse("").config(Some("x")).is_err());
    }

    #[test]
    fn targets_are_told_apart_by_their_form() {
        assert_eq!(Target::from_text("builtin:hello"), Ok(Target::Builtin(Builtin::Hello)));
        for app in ["app:application", "site.wsgi:make(\"a/b\")", "a:b.c", "mysite.wsgi", "word"] {
            assert_eq!(Target::from_text(app), Ok(Target::Python(app.to_owned())));
        }
        assert_eq!(Target::from_text("./public"), Ok(Target::Unsupported("a directory of static files")));
        assert_eq!(Target::from_text("http://127.0.0.1:1"), Ok(Target::Unsupported("a reverse proxy")));
        assert_eq!(Target::from_text("src"), Ok(Target::Unsupported("a directory of static files")), "it is one here");
        assert!(
            Target::from_text("builtin:nothing").is_err() && Target::from_text("two words").is_err() && Target::from_text("a.").is_err()
        );
    }

    #[test]
    fn gunicorns_options_for_workers_are_understood() {
        let app =
            parse("-w 3 --threads 4 -k gthread -e A=b=c -e D= --preload --max-requests 9 --pythonpath x,y").python_app("a:b", Some("7"));
        let app = app.expect("valid");
        assert_eq!((app.workers, app.threads, app.preload, app.max_requests), (Some(3), 4, true, 9));
        assert_eq!((app.env["A"].as_str(), app.env["D"].as_str(), app.pythonpath), ("b=c", "", vec!["x".to_owned(), "y".to_owned()]));
        assert_eq!(parse("").python_app("a:b", Some("7")).expect("valid").workers, Some(7));
        for bad in ["-w 0", "--threads 0", "--threads 65", "-k asgi", "--interface asgi", "-e A"] {
            assert!(parse(bad).python_app("a:b", None).is_err(), "{bad}");
        }
        assert!(parse("").python_app("a:b", Some("many")).is_err());
    }

    #[test]
    fn the_class_gevent_runs_many_requests_at_a_time_and_others_of_its_kind_are_refused_in_words() {
        let greenlets = |text: &str| parse(text).python_app("a:b", None).map(|app| app.greenlets).map_err(|usage| usage.0);
        assert_eq!(greenlets("-k gthread --greenlets 5"), Ok(None));
        for class in ["gevent", "gevent_pywsgi"] {
            assert_eq!(greenlets(&format!("--worker-class {class}")), Ok(Some(1000)));
            assert_eq!(greenlets(&format!("-k {class} --greenlets 5")), Ok(Some(5)));
        }
        assert!(greenlets("-k gevent --greenlets 0").is_err());
        for class in ["eventlet", "tornado"] {
            let why = greenlets(&format!("-k {class}")).expect_err("not available");
            assert!(why.contains(class) && why.ends_with("try: --worker-class gevent, or --threads 8"), "{why}");
        }
    }

    #[test]
    fn seconds_may_have_decimals_and_must_make_sense() {
        assert_eq!("0.25".parse(), Ok(Seconds(Duration::from_millis(250))));
        for bad in ["-1", "nan", "inf", "1e300", "ten", ""] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad}");
        }
    }
}
