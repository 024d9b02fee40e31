//! Private Postgres and Redis servers, started from the binaries that are installed on this machine.
//!
//! For development and tests: a [`Server`] has its own temporary folder, a port of its own on
//! `127.0.0.1`, and a random password, which is in its [address](Server::url): who has none does not get
//! in, other users of this machine included. It is ready about a third of a second after
//! [`ServerBuilder::start`]; the first one on a machine takes longer, since it has to make the cluster
//! that the later ones copy.
//!
//! A server never outlives the process that started it, however that process ends: a small shell
//! process waits for the other end of a pipe to close, then stops the server and removes its folder.
//!
//! Postgres refuses to run as root. When this process is root, then all that belongs to the server
//! runs as the user `postgres`, or `nobody` where there is no such user.
//!
//! A [`Redis`] lives in the same way, and is ready after some hundredths of a second. It is for tests
//! of what runs over Redis, and keeps nothing on disk.
//!
//! All async functions here need a tokio runtime with I/O and time enabled.
//!
//! ```no_run
//! # async fn example() -> shardmq::Result<()> {
//! use shardmq::embedded::Server;
//!
//! let server = Server::builder().durable(false).start().await?;
//! server.create_database("app").await?;
//! println!("{}", server.url("app"));
//! server.stop().await
//! # }
//! ```

mod account;
mod binaries;
mod builder;
mod cluster;
mod database;
mod faults;
mod folder;
mod life;
mod password;
mod port;
mod postmaster;
mod process;
mod redis_builder;
mod redis_program;
mod redis_server;
mod server;
mod watchdog;

pub use binaries::Binaries;
pub use builder::ServerBuilder;
pub use life::StopMode;
pub use redis_builder::RedisBuilder;
pub use redis_server::Redis;
pub use server::Server;

use std::io;

use crate::{Error, ErrorKind, Result};

/// For `map_err`: something on this machine did not work while doing what the words say.
fn failed(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    move |cause| Error::with_source(ErrorKind::Unavailable, doing, cause)
}

/// Does work that blocks where it delays nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let doing = "work on the files of the embedded server";
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|cause| Error::with_source(ErrorKind::Closed, doing, cause))?
}
