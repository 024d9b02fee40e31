//! Ends the process when a test hangs, and says which and what its library and servers were doing: otherwise
//! the whole suite would wait for it, and nobody would learn why.

// A test may stop tokio's clock, and its thread has a runtime of its own.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Far beyond what any test takes, also on a busy machine.
const LIMIT: Duration = Duration::from_mins(4);
/// How much is shown of what the library said last.
const LAST_WORDS: usize = 20;

/// The tests under way, by the names of their threads, which are theirs.
static UNDER_WAY: LazyLock<Mutex<BTreeMap<String, Instant>>> = LazyLock::new(|| {
    thread::Builder::new().name("watchdog".to_owned()).spawn(watch).expect("a thread");
    Mutex::default()
});

/// The servers that were started, some of which have ended since.
static SERVERS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    static THIS: OnceCell<UnderWay> = const { OnceCell::new() };
}

/// A test, until its thread ends.
struct UnderWay(String);

impl Drop for UnderWay {
    fn drop(&mut self) {
        tests().remove(&self.0);
    }
}

fn tests() -> std::sync::MutexGuard<'static, BTreeMap<String, Instant>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The test of this thread is to end in time. Once is enough.
pub fn watched() {
    THIS.with(|this| {
        this.get_or_init(|| {
            let name = thread::current().name().unwrap_or_default().to_owned();
            // Only libtest's threads have names with modules.
            if name.contains("::") {
                tests().insert(name.clone(), Instant::now());
            }
            UnderWay(name)
        });
    });
}

/// What this server does is shown where a test hangs.
pub fn serves(url: String) {
    SERVERS.lock().unwrap_or_else(PoisonError::into_inner).push(url);
}

/// What a server's clients are at, by psql: nothing here may hang as well.
fn activity(url: &str) -> String {
    let ask = "select pid, datname, state, wait_event, now() - state_change as since, left(query, 100)
                 from pg_stat_activity where backend_type = 'client backend' order by 5 desc limit 40";
    let said = Command::new("timeout").args(["5", "psql", url, "-Xwc", ask]).output();
    said.map_or_else(
        |error| error.to_string(),
        |said| {
            let text = if said.status.success() { said.stdout } else { said.stderr };
            String::from_utf8_lossy(&text).into_owned()
        },
    )
}

fn watch() {
    loop {
        thread::sleep(Duration::from_secs(1));
        let hung = tests()
            .iter()
            .filter(|(_, since)| since.elapsed() > LIMIT)
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>();
        if hung.is_empty() {
            continue;
        }
        // Past libtest, which would keep it to itself.
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "\nthe library said at last:");
        for said in super::said::last(LAST_WORDS) {
            let _ = writeln!(err, "  {said:?}");
        }
        for url in SERVERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = writeln!(err, "{}", activity(url));
        }
        let _ = writeln!(err, "hung for more than {LIMIT:?}: {}", hung.join(", "));
        std::process::exit(101);
    }
}
