//! uringd
#![deny(unsafe_code)]
pub mod builtin;
pub mod cli;
pub mod config;
pub mod disk;
pub mod driver;
pub mod error;
pub mod exchange;
pub mod handler;
pub mod http1;
pub mod log;
pub mod pool;
pub mod server;
pub mod shard;
pub mod stats;
pub mod stream;

pub use crate::{
    config::Config,
    error::{Error, Result},
    handler::{Body, Handler, Request, RequestBody, Response, Runs},
    server::{Running, Server},
    stream::StreamWriter,
};
