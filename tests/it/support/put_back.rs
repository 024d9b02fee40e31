//! A server that is put back to an earlier copy of its data, as an asynchronous standby is that was
//! promoted: what was written since is gone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use shardmq::embedded::{Server, StopMode};

/// What a server will be put back to.
pub struct Snapshot(PathBuf);

/// Stops a server at once and keeps a copy of its data.
pub async fn snapshot(server: &Server) -> Snapshot {
    static COPIES: AtomicU32 = AtomicU32::new(0);
    server.stop_server(StopMode::Immediate).await.unwrap();
    let number = COPIES.fetch_add(1, Ordering::Relaxed);
    let copy = server.data_dir().with_extension(format!("copy{number}"));
    shell(&["cp", "-a", path(&server.data_dir()), path(&copy)]);
    server.start_server().await.unwrap();
    Snapshot(copy)
}

/// Puts a server back to a copy: what was written since is gone.
pub async fn put_back(server: &Server, snapshot: &Snapshot) {
    server.stop_server(StopMode::Immediate).await.unwrap();
    shell(&["rm", "-rf", path(&server.data_dir())]);
    shell(&["cp", "-a", path(&snapshot.0), path(&server.data_dir())]);
    server.start_server().await.unwrap();
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn shell(words: &[&str]) {
    assert!(Command::new(words[0]).args(&words[1..]).status().unwrap().success(), "{words:?}");
}
