//! Free space on several nodes: how others see it; frees that a node put off because another had the group: their space comes back, whoever
//! dies, and whoever recovers him.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{WHO, check_clean, disk, file, mount, mount_on, mount_read_only};
use blockdev::sim::SimDisk;
use fs_core::{FsError, ROOT_INO, Volume, WriteOptions};

const SIZE: usize = 20 << 20;
const PIECE: usize = 1 << 20;

async fn write_file(v: &Volume, name: &[u8], size: usize) -> Result<usize, FsError> {
    let f = v.mknod(WHO, ROOT_INO, name, file(), true).await.expect("create").value.ino;
    let mut written = 0;
    let mut result = Ok(());
    while written < size && result.is_ok() {
        result = v.write(f, written as u64, &[7; PIECE], WriteOptions::default()).await.map(drop);
        written += if result.is_ok() { PIECE } else { 0 };
    }
    v.fsync(f, false).await.expect("what was accepted has its place");
    v.release(f).await;
    match result {
        Ok(()) | Err(FsError::NoSpace) => Ok(written),
        Err(e) => Err(e),
    }
}

/// How much the volume takes, from a fresh mount.
async fn room(disk: &Arc<SimDisk>) -> usize {
    let v = mount(disk, "filler").await;
    let written = write_file(&v, b"filler", usize::MAX).await.expect("until it is full");
    v.unmount().await.expect("unmount");
    check_clean(disk, 0).await;
    written
}

/// A read-only node recovers, but cleans nothing up; the slot is not used again.
#[tokio::test(start_paused = true)]
async fn a_full_volume_finds_what_a_dead_node_had_put_off() {
    let fresh = room(&disk(64 << 20).await).await;
    let disk = disk(64 << 20).await;
    let (dev_a, dev_b) = (disk.open("a"), disk.open("b"));
    let a = mount_on(dev_a.clone(), "a").await;
    let b = mount_on(dev_b.clone(), "b").await;
    let looker = mount_read_only(&disk, "looker").await;
    assert_eq!(write_file(&a, b"large", SIZE).await.expect("fits"), SIZE);
    b.unlink(ROOT_INO, b"large").await.expect("unlink");
    b.sync().await.expect("sync");
    dev_a.crash();
    dev_b.crash();
    drop((a, b));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(looker.lookup(ROOT_INO, b"large").await.expect("lookup").value.is_none());
    looker.unmount().await.expect("unmount");
    let later = room(&disk).await;
    assert!(later + PIECE >= fresh, "{later} bytes found room, {fresh} on a fresh volume");
}

/// What one node takes and frees, the others' `df` shows within seconds, though nobody asks for the group.
#[tokio::test(start_paused = true)]
async fn free_space_is_seen_by_others() {
    const BYTES: u64 = 8 << 20;
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let free = async || b.statfs().await.expect("statfs").free * 4096;
    let before = free().await;
    let f = a.mknod(WHO, ROOT_INO, b"large", file(), false).await.expect("create").value.ino;
    a.write(f, 0, &vec![7; BYTES as usize], WriteOptions::default()).await.expect("write");
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(before.abs_diff(free().await + BYTES) < 1 << 20, "{} of {before} bytes are free", free().await);
    a.unlink(ROOT_INO, b"large").await.expect("unlink");
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(before.abs_diff(free().await) < 1 << 20, "{} of {before} bytes are free", free().await);
}
