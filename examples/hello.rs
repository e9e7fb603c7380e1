//! The smallest server: one closure answers every request.
//!
//! ```text
//! cargo run --release --example hello
//! curl --include http://127.0.0.1:8000/world
//! ```
//!
//! The closure runs on the handler threads of each core, never on a ring thread: it may wait, compute or read
//! files, and a client that sends or reads slowly does not hold it. It sees only complete requests. A panic
//! in it is a 500 for that request alone.
//!
//! Control-C stops it at once; SIGTERM finishes what was begun first.

use uringd::{Request, Response, Server};

fn main() -> uringd::Result<()> {
    Server::new(|request: &Request| Response::text(format!("hello {}\n", request.path()))).bind("127.0.0.1:8000").run()
}
