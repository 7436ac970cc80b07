//! A simulated device with a volume on it, and mounts of it.

use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::FencingKind;
use blockdev::sim::{SimConfig, SimDisk, SimNode};
use fs_core::{Atime, Caller, MountConfig, MountError, NewNode, NoKernelCache, Time, Volume, WallClock};

struct SimClock(tokio::time::Instant);

impl WallClock for SimClock {
    fn now(&self) -> Time {
        let t = self.0.elapsed();
        Time { secs: 1_000_000 + t.as_secs() as i64, nanos: t.subsec_nanos() }
    }
}

pub fn file() -> NewNode {
    NewNode { mode: 0o100644, umask: 0, rdev: 0 }
}

pub fn dir() -> NewNode {
    NewNode { mode: 0o755, umask: 0, rdev: 0 }
}

pub const WHO: Caller = Caller { uid: 1000, gid: 1000 };

pub async fn disk(size: u64) -> Arc<SimDisk> {
    let mut cfg = SimConfig::new(size, 7);
    cfg.fencing = FencingKind::ProcessLock;
    let disk = SimDisk::new(cfg);
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let opts = mkfs::FormatOptions { nodes: Some(4), ..mkfs::FormatOptions::seeded(7) };
    mkfs::format(&raw, &opts, &mut |_| {}).await.expect("mkfs");
    disk
}

pub async fn mount(disk: &Arc<SimDisk>, name: &str) -> Arc<Volume> {
    mount_on(disk.open(name), name).await
}

pub async fn mount_on(device: Arc<SimNode>, name: &str) -> Arc<Volume> {
    Volume::mount(config(device, name)).await.expect("mount")
}

pub async fn mount_read_only(disk: &Arc<SimDisk>, name: &str) -> Arc<Volume> {
    let cfg = MountConfig { read_only: true, ..config(disk.open(name), name) };
    Volume::mount(cfg).await.expect("mount")
}

/// For volumes that may be damaged.
pub async fn try_mount(disk: &Arc<SimDisk>, name: &str) -> Result<Arc<Volume>, MountError> {
    Volume::mount(config(disk.open(name), name)).await
}

pub fn config(device: Arc<SimNode>, name: &str) -> MountConfig {
    MountConfig {
        device,
        net: None,
        clock: Arc::new(SimClock(tokio::time::Instant::now())),
        kernel: Arc::new(NoKernelCache),
        host_name: name.into(),
        seed: name.bytes().fold(1, |s, b| s * 31 + u64::from(b)),
        read_only: false,
        atime: Atime::Never,
        cache_bytes: 16 << 20,
        dirty_bytes: 8 << 20,
    }
}

/// fsck of the volume, as it lies on the device.
pub async fn check_clean(disk: &Arc<SimDisk>, seed: u64) {
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let report = fs_core::check::check(&raw, None).await.unwrap_or_else(|e| panic!("seed {seed}: check: {e}"));
    let violations: Vec<String> = report.violations.iter().map(|v| format!("{v:?}")).collect();
    assert!(violations.is_empty(), "seed {seed}: {}", violations.join("\n"));
}
