//! Signals, to one process or to all of a server.

use std::process::Stdio;

use shardmq::embedded::Server;
use tokio::process::Command;

/// Sends a signal, by its name.
pub async fn signal(pid: u32, name: &str) {
    assert!(kill(pid, name).status().await.unwrap().success());
}

/// Sends a signal to a server and all its processes. Suspended with STOP, to its clients it hangs.
pub async fn signal_all(server: &Server, name: &str) {
    let pid = server.pid().unwrap();
    signal(pid, name).await;
    // Linux only; elsewhere just the main process, which takes no new connections then.
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // Behind the name in parentheses: state, then the parent.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
        if parent == Some(pid.to_string().as_str()) {
            // It may have ended since.
            let _ = kill(child, name).stderr(Stdio::null()).status().await.unwrap();
        }
    }
}

fn kill(pid: u32, name: &str) -> Command {
    let mut kill = Command::new("kill");
    kill.args([format!("-{name}"), pid.to_string()]);
    kill
}
