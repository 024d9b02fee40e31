//! What a process keeps on disk, to start without the control database: where the nodes are, and
//! how the topics that it uses are divided.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::id::NodeId;
use crate::name::TopicName;
use crate::store::control::Listed;
use crate::topology::{Relation, Topology, Version};

/// How long another writer is waited for.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The topology as it was at some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    /// The control database that it was read from: `host:port/database`.
    pub(super) control: String,
    pub(super) cluster: Uuid,
    pub(super) version: Version,
    /// The nodes, with their addresses.
    pub(super) nodes: BTreeMap<NodeId, Listed>,
    /// The settings of the cluster.
    #[serde(default)]
    pub(super) settings: BTreeMap<String, String>,
    pub(super) topics: BTreeMap<TopicName, Topology>,
}

impl Snapshot {
    /// With what an earlier one of the same cluster has more: topics of other processes, and nodes
    /// where it is of a later version.
    fn over(mut self, before: Self) -> Self {
        if (&before.control, before.cluster) != (&self.control, self.cluster) {
            return self;
        }
        if before.version.after(&self.version) == Relation::Later {
            self.version = before.version;
            self.nodes = before.nodes;
            self.settings = before.settings;
        }
        for (name, topology) in before.topics {
            self.topics.entry(name).or_insert(topology);
        }
        self
    }
}

/// The file. Processes may share it.
#[derive(Debug, Clone)]
pub(super) struct TopologyFile {
    path: PathBuf,
    /// What this process wrote last. Locked while writing, so that an older snapshot does not
    /// follow a newer one.
    written: Arc<Mutex<Option<Snapshot>>>,
}

impl TopologyFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, written: Arc::default() }
    }

    /// What is in the file of this control database; none where there is no such file, or nothing
    /// of use in it.
    pub(super) fn read(&self, control: &str) -> Option<Snapshot> {
        let found = read(&self.path).unwrap_or_else(|error| {
            let path = self.path.display();
            tracing::warn!(%path, %error, "the topology file is of no use");
            None
        })?;
        if found.control == control {
            return Some(found);
        }
        let (path, is_of) = (self.path.display(), &found.control);
        tracing::warn!(%path, is_of, control, "the topology file is of another control database");
        None
    }

    /// Writes what `current` returns, unless that is there already. Blocks.
    pub(super) fn write(&self, current: impl FnOnce() -> Snapshot) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let current = current();
        if written.as_ref() == Some(&current) {
            return;
        }
        match write(&self.path, current.clone()) {
            Ok(()) => *written = Some(current),
            Err(error) => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "the topology file can't be written");
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Option<Snapshot>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
}

/// Replaces the file as a whole, so that whoever reads it finds the old or the new one.
fn write(path: &Path, current: Snapshot) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    // One writer at a time, so that each keeps what the others have added; let go when it is
    // closed. Where a file system knows no locks, or another writer hangs, what one of two has
    // added may be lost until it writes again.
    let lock = File::open(folder)?;
    for _ in 0..LOCK_TRIES {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            _ => break,
        }
    }
    // One that can't be read is replaced.
    let before = read(path).ok().flatten();
    let next = match before.clone() {
        Some(before) => current.over(before),
        None => current,
    };
    if before.as_ref() == Some(&next) {
        return Ok(());
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = folder.join(name);
    // Addresses are nobody else's business.
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    serde_json::to_writer_pretty(&mut file, &next)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::timeline::Primary;

    fn snapshot(version: i64, topics: &[&str]) -> Snapshot {
        let topology = |name: &str| Topology {
            topic: TopicName::new(name).unwrap(),
            id: Uuid::nil(),
            generation: 1,
            partitions: Vec::new(),
            slots: Vec::new(),
        };
        let node = NodeId::new(7).unwrap();
        let listed = Listed {
            url: format!("postgresql://db/v{version}"),
            registration: Uuid::nil(),
            primary: Some(Primary { system: 1, timeline: version }),
        };
        Snapshot {
            control: "db:5432/control".to_owned(),
            cluster: Uuid::nil(),
            version: Version { number: version, token: Uuid::nil(), history: Vec::new() },
            nodes: BTreeMap::from([(node, listed)]),
            settings: BTreeMap::from([("notifier".to_owned(), format!("v{version}"))]),
            topics: topics
                .iter()
                .map(|name| (TopicName::new(name).unwrap(), topology(name)))
                .collect(),
        }
    }

    #[test]
    fn what_was_written_is_read_and_other_processes_topics_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("topology.json");
        let [one, two] = [(); 2].map(|()| TopologyFile::new(path.clone()));
        assert_eq!(one.read("db:5432/control"), None);
        one.write(|| snapshot(3, &["a"]));
        two.write(|| snapshot(2, &["b"]));
        assert_eq!(one.read("db:5432/control"), Some(snapshot(3, &["a", "b"])));
        two.write(|| snapshot(4, &["b"]));
        assert_eq!(one.read("db:5432/control"), Some(snapshot(4, &["a", "b"])));
        assert_eq!(one.read("elsewhere:5432/control"), None);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn another_clusters_file_and_one_that_is_cut_off_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = TopologyFile::new(folder.path().join("topology.json"));
        file.write(|| Snapshot { cluster: Uuid::max(), ..snapshot(9, &["a"]) });
        file.write(|| snapshot(2, &["b"]));
        assert_eq!(file.read("db:5432/control"), Some(snapshot(2, &["b"])));
        fs::write(&file.path, "{\"control\": \"db").unwrap();
        assert_eq!(file.read("db:5432/control"), None);
        file.write(|| snapshot(3, &["c"]));
        assert_eq!(file.read("db:5432/control"), Some(snapshot(3, &["c"])));
    }
}
