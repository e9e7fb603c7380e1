//! The command line, the environment and the configuration file, and what they mean together.
//!
//! [`Options`] is what was typed; [`Options::config`] says what it means. The command line wins over the
//! environment, the environment over the file.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use clap::Parser;
use serde::Deserialize;

use crate::{
    builtin::Builtin,
    config::{Backend, Bind, Config, Cores},
    identity::{Fields, Networks},
    python::{PythonApp, find_interpreter, zygote::THREADS_MAX},
};

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
  module:attribute     a Python application (WSGI); module:factory() calls what makes one

Examples:
  uringd                                      the welcome page on http://127.0.0.1:8000
  uringd --bind :8080 --cores 2 builtin:echo  all interfaces, two cores
  uringd --workers 4 --chdir site app:app     four processes of the Flask application in site/app.py
  uringd --check --config uringd.toml         says what would run, and exits

Every option is also an environment variable, URINGD_ and its name in capitals (URINGD_KEEP_ALIVE=5), and a key
of the configuration file (keep-alive = 5). Exit status: 0 after a drained stop, 1 could not start, 2 usage,
3 requests were lost at the drain limit.";

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
    /// Read settings from this TOML file [default: ./uringd.toml if present]
    #[arg(short, long, value_name = "FILE", env = "URINGD_CONFIG", help_heading = "Running")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print the effective configuration and exit: 0 when it would start
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

    /// A request may run this long, in seconds; then 504 [default: 30]
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
    /// Bytes of a request line; more get 414 [default: 8192]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_REQUEST_LINE", help_heading = "Limits")]
    pub limit_request_line: Option<usize>,
    /// Fields of a request head; more get 431 [default: 100]
    #[arg(long, value_name = "N", env = "URINGD_LIMIT_REQUEST_FIELDS", help_heading = "Limits")]
    pub limit_request_fields: Option<usize>,
    /// Bytes of one field; more get 431 [default: 8192]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_REQUEST_FIELD_SIZE", help_heading = "Limits")]
    pub limit_request_field_size: Option<usize>,
    /// Bytes of a request head in all; more get 431 [default: 16384]
    #[arg(long, value_name = "BYTES", env = "URINGD_LIMIT_HEAD", help_heading = "Limits")]
    pub limit_head: Option<usize>,
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
    #[arg(long, value_name = "on|off", env = "URINGD_PROXY_PROTOCOL", help_heading = "Proxies")]
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
    /// What the application is, when its looks would say something else: wsgi
    #[arg(long, value_name = "NAME", env = "URINGD_INTERFACE", help_heading = "Python")]
    pub interface: Option<String>,
    /// gunicorn's name for how requests run: sync or gthread; both are --threads here
    #[arg(short = 'k', long, value_name = "NAME", env = "URINGD_WORKER_CLASS", help_heading = "Python")]
    pub worker_class: Option<String>,
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
        let is_module =
            |name: &str| !name.is_empty() && name.chars().all(|letter| letter.is_alphanumeric() || letter == '_' || letter == '.');
        if text.split_once(':').is_some_and(|(module, attribute)| is_module(module) && !attribute.is_empty() && !attribute.starts_with('/'))
        {
            return Ok(Target::Python(text.to_owned()));
        }
        let unsupported = if text.starts_with("http://") || text.starts_with("https://") || text.starts_with("unix:") {
            "a reverse proxy"
        } else if text.contains('/') || text == "." || text == ".." {
            "a directory of static files"
        } else {
            return Err(Usage(format!("{text:?} is no target; try: builtin:welcome, or --help for the forms there are")));
        };
        Ok(Target::Unsupported(unsupported))
    }
}

impl Options {
    /// Fills what was not said from `file`.
    pub fn over(mut self, file: Options) -> Options {
        // The environment wins over the file under gunicorn's name, too.
        self.forwarded_allow_ips = self.forwarded_allow_ips.or_else(forwarded_allow_ips);
        /// Every field, so that none is forgotten when one is added.
        macro_rules! merge {
            ($($field:ident)*; $($list:ident)*; $($own:ident)*) => {
                Options {
                    $($field: self.$field.or(file.$field),)*
                    $($list: if self.$list.is_empty() { file.$list } else { self.$list },)*
                    $($own: self.$own,)*
                }
            };
        }
        merge! {
            target cores handlers handler_cores backend backlog log_level log_format
            timeout queue_timeout head_timeout body_timeout body_rate send_timeout keep_alive graceful_timeout
            queue limit_connections limit_request_line limit_request_fields limit_request_field_size limit_head
            limit_body keep_alive_requests send_rate body_memory limit_body_memory limit_response_memory
            connection_life limit_response_spool limit_spool spool_dir limit_per_ip
            forwarded_allow_ips forwarded_hops forwarded_fields proxy_protocol proxy_allow_from
            workers threads python chdir pythonpath preload max_requests max_requests_jitter max_rss max_age interface
            worker_class;
            bind permit env;
            config check doctor
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
        match self.worker_class.as_deref() {
            None | Some("sync" | "gthread") => {}
            Some(other) => return usage(format!("--worker-class {other} is not available; try: --threads 8, which is gunicorn's gthread")),
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
            // A path with a slash is ours to resolve: the zygote changes its directory.
            interpreter: match &self.python {
                Some(path) if path.components().count() > 1 => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
                Some(name) => name.clone(),
                None => find_interpreter(self.chdir.as_deref()),
            },
            workers,
            threads,
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
            app: app.to_owned(),
        })
    }

    /// What the options mean. `port` is the environment's PORT.
    ///
    /// # Errors
    /// [`Usage`], for the first that means nothing.
    pub fn config(&self, port: Option<&str>) -> Result<Config, Usage> {
        let mut config = Config::default();
        if !self.bind.is_empty() {
            config.bind = self.bind.iter().map(|text| Bind::from_text(text)).collect();
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
            None | Some("off") => None,
            Some("on") => Some(allowed.unwrap_or_else(Networks::loopback)),
            Some(other) => return Err(Usage(format!("--proxy-protocol {other}: try on or off"))),
        };
        set(&mut config.handlers, self.handlers);
        set(&mut config.backlog, self.backlog);
        let limits = &mut config.limits;
        set(&mut limits.queue_max, self.queue);
        set(&mut limits.connections_max, self.limit_connections);
        set(&mut limits.request_line_bytes_max, self.limit_request_line);
        set(&mut limits.fields_max, self.limit_request_fields);
        set(&mut limits.field_bytes_max, self.limit_request_field_size);
        set(&mut limits.head_bytes_max, self.limit_head);
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
        set(&mut timeouts.run, seconds(self.timeout));
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

/// gunicorn's name for it.
fn forwarded_allow_ips() -> Option<String> {
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

    fn parse(words: &str) -> Options {
        Options::try_parse_from(std::iter::once("uringd").chain(words.split_whitespace())).expect("valid options")
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Options::command().debug_assert();
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
    fn proxies_are_trusted_by_address_and_network() {
        let config = parse("--forwarded-allow-ips 10.0.0.0/8 --forwarded-hops 2 --proxy-protocol on").config(None).expect("valid");
        assert_eq!((config.forwarded.proxies.to_string(), config.forwarded.hops), ("10.0.0.0/8".to_owned(), 2));
        assert_eq!(config.proxy_protocol, Some(Networks::loopback()));
        assert_eq!(parse("--proxy-allow-from *").config(None).expect("valid").proxy_protocol, None);
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
        for app in ["app:application", "site.wsgi:make(\"a/b\")", "a:b.c"] {
            assert_eq!(Target::from_text(app), Ok(Target::Python(app.to_owned())));
        }
        assert_eq!(Target::from_text("./public"), Ok(Target::Unsupported("a directory of static files")));
        assert_eq!(Target::from_text("http://127.0.0.1:1"), Ok(Target::Unsupported("a reverse proxy")));
        assert!(Target::from_text("builtin:nothing").is_err() && Target::from_text("word").is_err());
    }

    #[test]
    fn gunicorns_options_for_workers_are_understood() {
        let app =
            parse("-w 3 --threads 4 -k gthread -e A=b=c -e D= --preload --max-requests 9 --pythonpath x,y").python_app("a:b", Some("7"));
        let app = app.expect("valid");
        assert_eq!((app.workers, app.threads, app.preload, app.max_requests), (Some(3), 4, true, 9));
        assert_eq!((app.env["A"].as_str(), app.env["D"].as_str(), app.pythonpath), ("b=c", "", vec!["x".to_owned(), "y".to_owned()]));
        assert_eq!(parse("").python_app("a:b", Some("7")).expect("valid").workers, Some(7));
        for bad in ["-w 0", "--threads 0", "--threads 65", "-k gevent", "--interface asgi", "-e A"] {
            assert!(parse(bad).python_app("a:b", None).is_err(), "{bad}");
        }
        assert!(parse("").python_app("a:b", Some("many")).is_err());
    }

    #[test]
    fn seconds_may_have_decimals_and_must_make_sense() {
        assert_eq!("0.25".parse(), Ok(Seconds(Duration::from_millis(250))));
        for bad in ["-1", "nan", "inf", "1e300", "ten", ""] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad}");
        }
    }
}
