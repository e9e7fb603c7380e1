//! Each route where it belongs: a health check on the ring thread, work that waits on the handler threads.
//!
//! ```text
//! cargo run --release --example per_route
//! curl --include http://127.0.0.1:8000/healthz
//! curl --include http://127.0.0.1:8000/report
//! ```
//!
//! A [`Handler`] is asked twice about every request: [`Handler::runs`] says where, [`Handler::handle`] answers.
//! Start forty clients on `/report`, which takes a fifth of a second each: `/healthz` still answers at once, because it
//! waits for no handler thread.
//!
//! ```text
//! for client in $(seq 40); do curl --silent http://127.0.0.1:8000/report & done
//! curl --silent --write-out '%{time_total} s\n' http://127.0.0.1:8000/healthz
//! ```

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use uringd::{Handler, Request, Response, Runs, Server};

/// One value for all cores: what it holds is shared by every handler thread.
struct Site {
    reports: AtomicU64,
}

impl Handler for Site {
    /// Asked on the ring thread, so it looks at the path and at nothing else.
    fn runs(&self, request: &Request<'_>) -> Runs {
        match request.path() {
            "/report" => Runs::OnPool,
            // Answered in microseconds and without waiting. Anything else does not belong here: every
            // other connection of the core waits meanwhile.
            _ => Runs::Inline,
        }
    }

    fn handle(&self, request: &Request<'_>) -> Response {
        match (request.method(), request.path()) {
            ("GET" | "HEAD", "/healthz") => Response::text("ok\n").header("Cache-Control", "no-store"),
            ("GET" | "HEAD", "/report") => self.report(),
            (_, "/healthz" | "/report") => Response::text("Only GET and HEAD.\n").status(405).header("Allow", "GET, HEAD"),
            _ => Response::text("Try /healthz or /report.\n").status(404),
        }
    }
}

impl Site {
    /// Stands for a query to a database: it waits, and only its own thread.
    fn report(&self) -> Response {
        thread::sleep(Duration::from_millis(200));
        let number = self.reports.fetch_add(1, Ordering::Relaxed) + 1;
        Response::json(format!("{{\"report\": {number}}}\n"))
    }
}

fn main() -> uringd::Result<()> {
    Server::with_handler(Site { reports: AtomicU64::new(0) }).bind("127.0.0.1:8000").target("examples/per_route.rs").run()
}
