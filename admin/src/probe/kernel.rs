//! What this host's kernel knows of a block device, from sysfs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Queue {
    /// `write back`: completed writes may be lost before a flush; `write through`.
    pub write_cache: String,
    pub fua: Option<bool>,
    pub physical_sector: u32,
    /// Bytes.
    pub max_transfer: u64,
}

/// `None`: not a block device, or the kernel does not tell.
pub fn queue(path: &Path) -> Option<Queue> {
    let dev = fs::metadata(path).ok()?.rdev();
    let name = format!("{}:{}", libc::major(dev), libc::minor(dev));
    queue_in(&Path::new("/sys/dev/block").join(name))
}

/// A partition has its disk's queue.
fn queue_in(device: &Path) -> Option<Queue> {
    let real = fs::canonicalize(device).ok()?;
    let dirs: [Option<PathBuf>; 2] = [Some(real.join("queue")), real.parent().map(|p| p.join("queue"))];
    let dir = dirs.into_iter().flatten().find(|d| d.is_dir())?;
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok().map(|s| s.trim().to_string());
    Some(Queue {
        write_cache: read("write_cache")?,
        fua: read("fua").map(|s| s == "1"),
        physical_sector: read("physical_block_size")?.parse().ok()?,
        max_transfer: read("max_sectors_kb")?.parse::<u64>().ok()? << 10,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_the_queue_of_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let queue = dir.path().join("sda/queue");
        fs::create_dir_all(&queue).unwrap();
        fs::create_dir_all(dir.path().join("sda/sda1")).unwrap();
        for (name, text) in [
            ("write_cache", "write back\n"),
            ("fua", "0\n"),
            ("physical_block_size", "4096\n"),
            ("max_sectors_kb", "512\n"),
        ] {
            fs::write(queue.join(name), text).unwrap();
        }
        let told = queue_in(&dir.path().join("sda/sda1")).unwrap();
        assert_eq!((told.write_cache.as_str(), told.fua), ("write back", Some(false)));
        assert_eq!((told.physical_sector, told.max_transfer), (4096, 512 << 10));
        assert_eq!(queue_in(&dir.path().join("sda")), Some(told));
        assert_eq!(queue_in(&dir.path().join("none")), None);
        assert_eq!(super::queue(dir.path()), None);
    }
}
