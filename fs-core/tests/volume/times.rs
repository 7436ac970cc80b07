//! Times of files.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use crate::common::{WHO, config, disk, file};
use fs_core::{Atime, MountConfig, ROOT_INO, Time, Volume, WallClock, WriteOptions};

/// Never shows the same time twice.
#[derive(Default)]
struct Ticks(AtomicU32);

impl WallClock for Ticks {
    fn now(&self) -> Time {
        Time { secs: 1000, nanos: self.0.fetch_add(1, Relaxed) }
    }
}

/// The first of two reads that follow each other renews the access time, the second finds it new.
#[tokio::test(start_paused = true)]
async fn one_read_renews_the_access_time() {
    let disk = disk(64 << 20).await;
    let clock = Arc::new(Ticks::default());
    let cfg = MountConfig { atime: Atime::Relative, clock: clock.clone(), ..config(disk.open("a"), "a") };
    let v = Volume::mount(cfg).await.expect("mount");
    let f = v.mknod(WHO, ROOT_INO, b"f", file(), false).await.expect("create").value.ino;
    for round in 0..2 {
        // What has been written is in memory still, and so is its time.
        v.write(f, 0, &[round; 9000], WriteOptions::default()).await.expect("write");
        let first = clock.0.load(Relaxed);
        for _ in 0..2 {
            assert_eq!(v.read(f, 0, 9000).await.expect("read").value, [round; 9000]);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let atime = v.getattr(f).await.expect("getattr").value.inode.atime;
        assert_eq!(atime, Time { secs: 1000, nanos: first }, "round {round}");
    }
    v.unmount().await.expect("unmount");
}
