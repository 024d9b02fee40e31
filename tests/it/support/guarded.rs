//! Programs that the library does not start itself: each works in a folder of its own, and ends when it is
//! dropped, and with this process.

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Ends the program and removes its folder when the pipe is closed, also by the end of this process.
const WATCHDOG: &str = r#"
trap '' HUP INT QUIT TERM
dir=$1; shift
"$@" </dev/null >"$dir/log" 2>&1 &
pid=$!
read -r _
kill "$pid"
wait "$pid"
rm -rf "$dir"
"#;

pub struct Guarded {
    dir: PathBuf,
    watchdog: Child,
}

impl Guarded {
    /// Starts what `command` names, which may first write into the folder.
    pub fn start(prefix: &str, command: impl FnOnce(&Path) -> Vec<OsString>) -> Self {
        let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap().keep();
        std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", WATCHDOG, "sh"]).arg(&dir).args(command(&dir));
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        shell.current_dir("/").process_group(0);
        Self { watchdog: shell.spawn().unwrap(), dir }
    }

    /// What it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}

/// A port that is free now; another may take it before it is used.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
