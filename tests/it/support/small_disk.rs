//! A disk that can be filled up: a file system of its own, in memory.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use shardmq::embedded::Server;
use tempfile::TempDir;
use tokio::process::Command;

/// Mounted until it is dropped.
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// One of so many MiB, for a server's data. None, and the reason on stdout, where we may mount
    /// nothing: not being root, in a container without that right, or on another system than Linux.
    pub async fn mount(server: &Server, mebibytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let owner = server.data_dir().metadata().unwrap();
        let options = format!("size={mebibytes}m,mode=700,uid={},gid={}", owner.uid(), owner.gid());
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "shardmq-test"]).arg(folder.path());
        match mount.output().await {
            Ok(output) if output.status.success() => Some(Self { folder }),
            Ok(output) => {
                println!("no disk to fill: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("no disk to fill: mount: {error}");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves no room for anybody.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        while file.write_all(&[0; 4 << 10]).is_ok() {}
    }

    /// There is room again.
    pub fn empty(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.folder.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: its server may not have ended yet.
        let unmounted = std::process::Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}
