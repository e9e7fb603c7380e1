//! uringd
#![deny(unsafe_code)]
pub mod builtin;
pub mod cli;
pub mod config;
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

pub use crate::{
    config::Config,
    error::{Error, Result},
    handler::{Body, Handler, Request, Response, Runs},
    server::{Running, Server},
};
