//! The ends of servers: whatever happens to them and to their parents, nothing is left.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use shardmq::embedded::{Binaries, Server, StopMode};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command as AsyncCommand};

use super::redis_server;
use super::{eventually, eventually_gone, folder_of, is_alive, kill, server, show};

/// Set for a copy of this test program that is to be killed.
const VICTIM: &str = "SHARDMQ_TEST_EMBEDDED_VICTIM";

#[tokio::test]
async fn stop_leaves_nothing() {
    let server = server().await;
    let (pid, folder) = (server.pid().unwrap(), folder_of(&server));
    assert!(is_alive(pid) && folder.exists());
    server.stop().await.unwrap();
    assert!(!is_alive(pid) && !folder.exists());
}

#[tokio::test]
async fn drop_leaves_nothing_even_of_a_suspended_server() {
    let server = server().await;
    let (pid, folder) = (server.pid().unwrap(), folder_of(&server));
    kill(pid, "STOP");
    drop(server);
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn pg_ctl_brings_the_same_server_back_and_drop_ends_that_too() {
    let server = server().await;
    let (port, folder) = (server.port(), folder_of(&server));
    pg_ctl(&server, &["stop", "-m", "fast"]);
    server.exited().await;
    assert_eq!(server.pid(), None);
    pg_ctl(&server, &["start"]);
    assert_eq!(show(&server, "port").await, port.to_string());
    // We can stop it and start our own again, and the other way round.
    server.restart(StopMode::Fast).await.unwrap();
    server.stop_server(StopMode::Fast).await.unwrap();
    pg_ctl(&server, &["start"]);
    let pid = server.pid().unwrap();
    drop(server);
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_nothing() {
    let base = shared_tempdir();
    for milliseconds in [5, 20, 50, 100, 150, 200] {
        // In another process, but only because of the variable that says where to put the folder.
        let mut victim = victim("dropped", base.path(), milliseconds);
        assert!(victim.wait().await.unwrap().success());
        assert!(servers_in(base.path()).is_empty());
        eventually("no process is left", || async { !is_used(base.path()) }).await;
    }
}

#[tokio::test]
async fn a_killed_parent_takes_its_server_along() {
    let base = shared_tempdir();
    let mut victim = victim("runs", base.path(), 0);
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let (pid, folder) = loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if let Some((pid, folder)) = line.strip_prefix("pid ").and_then(|l| l.split_once(' ')) {
            break (pid.parse().unwrap(), PathBuf::from(folder));
        }
    };
    assert!(is_alive(pid) && folder.exists());
    victim.kill().await.unwrap();
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn a_parent_killed_during_the_start_takes_its_server_along() {
    let base = shared_tempdir();
    // The first has to make the cluster. Then something else each time is what it was doing.
    for seen in ["fresh/data", "server.log", "data/PG_VERSION", "data/postmaster.pid"] {
        let mut victim = victim("runs", base.path(), 0);
        // Who is killed before its watchdog runs leaves a folder with nothing in it.
        let is_there = |server: &PathBuf| {
            let is_made = |path: &&str| server.join(path).exists();
            [seen, "data/postmaster.pid"].iter().any(is_made) && is_used(server)
        };
        eventually(seen, || async { servers_in(base.path()).iter().any(is_there) }).await;
        victim.kill().await.unwrap();
        eventually("nothing is left", || async { servers_in(base.path()).is_empty() }).await;
        eventually("no process is left", || async { !is_used(base.path()) }).await;
        if seen == "fresh/data" {
            assert!(victim_succeeds(base.path()).await, "the next one is not disturbed");
        }
    }
}

/// Not a test: what the copies of this program do that other tests start.
#[tokio::test]
async fn victim_of_other_tests() {
    let Ok(what) = std::env::var(VICTIM) else {
        return;
    };
    let (what, milliseconds) = what.rsplit_once(' ').unwrap();
    if what.ends_with("dropped") {
        let limit = Duration::from_millis(milliseconds.parse().unwrap());
        if what == "dropped" {
            tokio::time::timeout(limit, server()).await.ok();
        } else {
            tokio::time::timeout(limit, redis_server::be_a_victim()).await.ok();
        }
        let base = std::env::temp_dir();
        return eventually("nothing is left", || async { servers_in(&base).is_empty() }).await;
    }
    if what == "redis" {
        return redis_server::be_a_victim().await;
    }
    let server = server().await;
    println!("\npid {} {}", server.pid().unwrap(), folder_of(&server).display());
    if what == "runs" {
        std::future::pending::<()>().await;
    }
    server.stop().await.unwrap();
}

/// What somebody at a terminal does, as the user that the data belongs to.
fn pg_ctl(server: &Server, arguments: &[&str]) {
    let owner = server.data_dir().metadata().unwrap();
    let log = folder_of(server).join("outside.log");
    let mut command = Command::new(Binaries::find().unwrap().dir().join("pg_ctl"));
    command.gid(owner.gid()).uid(owner.uid()).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.arg("-D").arg(server.data_dir()).arg("-l").arg(log).args(arguments);
    assert!(command.status().unwrap().success());
}

/// A copy of this program that starts a server below `base`.
pub fn victim(what: &str, base: &Path, milliseconds: u32) -> Child {
    victim_command(what, base, milliseconds).spawn().unwrap()
}

pub fn victim_command(what: &str, base: &Path, milliseconds: u32) -> AsyncCommand {
    let module = module_path!().split_once("::").unwrap().1;
    let mut command = AsyncCommand::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", &format!("{module}::victim_of_other_tests")])
        .env(VICTIM, format!("{what} {milliseconds}"))
        .env("TMPDIR", base)
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn victim_succeeds(base: &Path) -> bool {
    victim("stops", base, 0).wait().await.unwrap().success()
}

/// A folder for temporary files that all users may use, like `/tmp`.
pub fn shared_tempdir() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    // The mode that it is made with would be cut by the umask.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o1777)).unwrap();
    dir
}

pub fn servers_in(base: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(base).unwrap().map(|entry| entry.unwrap().path());
    let is_cache = |path: &PathBuf| path.to_str().unwrap().contains("shardmq-pg-cache");
    entries.filter(|path| !is_cache(path)).collect()
}

/// Whether a process has that path in its arguments.
pub fn is_used(path: &Path) -> bool {
    let output = Command::new("ps").args(["-ww", "-A", "-o", "args="]).output().unwrap();
    let arguments = String::from_utf8_lossy(&output.stdout).into_owned();
    arguments.lines().any(|line| line.contains(path.to_str().unwrap()))
}
