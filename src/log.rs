//! Log lines: made by `tracing`, written to standard error by a thread of their own.
//!
//! A ring thread must never wait for a terminal, a pipe or a disk: lines go through a bounded queue,
//! and when that is full they are dropped.

use std::io;

use tracing::Level;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use crate::cli::Usage;

/// Lines that may wait for a slow reader of the log.
const LINES_WAITING_MAX: usize = 16_384;

/// Starts logging. Keep the guard: dropping it writes what is still waiting.
///
/// # Errors
/// [`Usage`], when a level or format is unknown.
pub fn start(level: Option<&str>, format: Option<&str>) -> Result<WorkerGuard, Usage> {
    let level: Level = match level.unwrap_or("info").to_ascii_lowercase().as_str() {
        // gunicorn's names.
        "warning" => Level::WARN,
        "critical" => Level::ERROR,
        name => name.parse().map_err(|_| Usage(format!("--log-level {name}: try error, warn, info, debug or trace")))?,
    };
    let (writer, guard) = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_WAITING_MAX).finish(io::stderr());
    let lines = tracing_subscriber::fmt().with_writer(writer).with_max_level(level).with_target(false).with_ansi(false);
    match format.unwrap_or("text") {
        "text" => lines.init(),
        "json" => lines.json().flatten_event(true).init(),
        name => return Err(Usage(format!("--log-format {name}: try text or json"))),
    }
    Ok(guard)
}
