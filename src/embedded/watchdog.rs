//! The process that ends a server when its parent is gone.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use super::account::{self, Account, Exit};
use super::failed;
use super::folder::Folder;
use crate::Result;

/// Reads lines, of which only the last counts, until the parent closes the pipe or dies. Then stops
/// whatever server runs in the folder, whoever started it, and removes the folder.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
dir=$1 data=$1/data pid_file=$1/data/$2 name=$3 signal=$4 state=settled tries=0

# Whether the pid in the file is that of a server in this folder. A crash leaves the file
# behind, and the pid may be somebody else's by now. Linux can tell exactly, by the folder in which
# the process works; elsewhere the name must do.
ours() {
    { read -r pid <"$pid_file"; } 2>/dev/null || return 1
    if [ -d /proc/self ]; then
        [ "/proc/$pid/cwd" -ef "$data" ]
    else
        case $(ps -o comm= -p "$pid") in *"$name"*) return 0 ;; *) return 1 ;; esac
    fi
}

while read -r line; do state=$line; done

# A server that was just being started has not written its file yet.
while [ "$state" = starting ] && ! ours && [ "$tries" -lt 50 ]; do
    tries=$((tries + 1))
    sleep 0.1
done

# More than once, since a child that was preparing the folder may still write to it. A server that
# is suspended would not end.
tries=0
while [ -e "$dir" ] && [ "$tries" -lt 100 ]; do
    if ours; then
        kill -CONT "$pid"
        kill -"$signal" "$pid"
        looks=0
        while ours && [ "$looks" -lt 400 ]; do
            looks=$((looks + 1))
            sleep 0.05
        done
    fi
    rm -rf "$dir"
    tries=$((tries + 1))
    [ ! -e "$dir" ] || sleep 0.1
done
"#;

/// By what a server in a folder is known, and how it is ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trace<'a> {
    /// The file in `data` whose first line is the id of its process.
    pub(super) pid_file: &'a str,
    /// Part of the name of its program.
    pub(super) name: &'a str,
    /// Ends it at once.
    pub(super) signal: &'a str,
}

/// Our end of the pipe. To drop it ends the server.
#[derive(Debug)]
pub(super) struct Watchdog {
    pipe: File,
    exit: Exit,
}

impl Watchdog {
    /// Starts a watchdog for a folder. From here on that, and not we, removes the folder: a process that is
    /// killed before leaves it, with an empty log in it and no server.
    pub(super) fn start(folder: &mut Folder, account: Account, trace: Trace<'_>) -> Result<Self> {
        let doing = "start the watchdog of the embedded server";
        let words = [trace.pid_file, trace.name, trace.signal].map(Path::new);
        let mut command = account.shell(SCRIPT, &[&[folder.path()], &words[..]].concat());
        command.stdin(Stdio::piped());
        let mut child = account::spawn(command, false).map_err(failed(doing))?;
        let pipe = child.stdin.take().ok_or_else(|| std::io::Error::other("there is no pipe"));
        let pipe =
            pipe.and_then(tokio::process::ChildStdin::into_owned_fd).map_err(failed(doing))?;
        folder.leave();
        Ok(Self { pipe: pipe.into(), exit: Exit::of(child) })
    }

    /// Says that a server may be about to write its file.
    pub(super) fn starting(&self) -> Result<()> {
        self.tell("starting")
    }

    /// Says that the server runs or has ended.
    pub(super) fn settled(&self) -> Result<()> {
        self.tell("settled")
    }

    /// Lets go, and returns when the watchdog has done its work.
    pub(super) async fn release(self) {
        drop(self.pipe);
        self.exit.wait().await;
    }

    /// Does not block, since the watchdog reads each line at once, and a pipe holds thousands.
    fn tell(&self, line: &str) -> Result<()> {
        writeln!(&self.pipe, "{line}")
            .map_err(failed("tell the watchdog of the embedded server, which is gone"))
    }
}
