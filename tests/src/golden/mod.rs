//! The golden volumes in `images/`: small volumes of this version of the format, made once and kept, so that a change of the
//! format that old volumes do not survive is noticed; and each kind of damage to them, as patches, with what fsck and a mount say
//! of it. `cargo run -p clusterfs-tests --bin clusterfs-images -- DIR` makes them.

pub mod damage;
mod edit;
mod patch;
mod said;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use blockdev::sim::{SimConfig, SimDisk, SimNode};
use blockdev::{BlockDevice, FencingKind, IoClass};
use flate2::read::GzDecoder;
use fs_core::{
    Atime, Caller, Fallocate, MountConfig, NewNode, NoKernelCache, ROOT_INO, Rename, SetAttr, Time, Volume, WallClock,
    WriteOptions, XattrSet,
};

pub use edit::Image;
pub use patch::Patch;
pub use said::{fsck, said};

/// Names of the volumes and how many nodes' journals are to be replayed.
pub const VOLUMES: [(&str, usize); 3] = [("clean", 0), ("one-dead", 1), ("all-dead", 3)];

const SIZE: u64 = 16 << 20;
const WHO: Caller = Caller { uid: 1000, gid: 100 };

pub type Error = Box<dyn std::error::Error + Send + Sync>;

struct Fixed(tokio::time::Instant);

impl WallClock for Fixed {
    fn now(&self) -> Time {
        let t = self.0.elapsed();
        Time { secs: 1_700_000_000 + t.as_secs() as i64, nanos: t.subsec_nanos() }
    }
}

/// A mount of a volume by code, without the kernel.
pub fn mount_config(device: Arc<dyn BlockDevice>, seed: u64) -> MountConfig {
    MountConfig {
        device,
        net: None,
        clock: Arc::new(Fixed(tokio::time::Instant::now())),
        kernel: Arc::new(NoKernelCache),
        host_name: format!("host{seed}"),
        seed,
        read_only: false,
        atime: Atime::Never,
        cache_bytes: 16 << 20,
        dirty_bytes: 8 << 20,
    }
}

/// The bytes of a golden volume, the same each time as long as the code does the same I/O.
pub async fn make(dead: usize) -> Result<Vec<u8>, Error> {
    let mut cfg = SimConfig::new(SIZE, 11);
    cfg.fencing = FencingKind::ProcessLock;
    cfg.write_cache = false;
    let disk = SimDisk::new(cfg);
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let options = mkfs::FormatOptions {
        nodes: Some(3),
        journal_size: Some(1 << 20),
        label: "golden".into(),
        ..mkfs::FormatOptions::seeded(11)
    };
    mkfs::format(&raw, &options, &mut |_| {}).await?;
    let mut nodes: Vec<(Arc<SimNode>, Arc<Volume>)> = Vec::new();
    for i in 0..3u64 {
        let device = disk.open(&format!("host{i}"));
        nodes.push((device.clone(), Volume::mount(mount_config(device, i + 1)).await?));
    }
    for (i, (_, v)) in nodes.iter().enumerate() {
        populate(v, &format!("node{i}")).await?;
    }
    for (i, (device, v)) in nodes.into_iter().enumerate() {
        if i < dead {
            v.fsync(ROOT_INO, false).await?;
            device.crash();
        } else {
            v.unmount().await?;
        }
    }
    Ok(raw.read(IoClass::Meta, 0, SIZE as usize).await?.to_vec())
}

/// A golden volume's bytes, from where they are kept.
pub fn unpack(dir: &Path, name: &str) -> Result<Vec<u8>, Error> {
    let path = dir.join(format!("{name}.img.gz"));
    let packed = std::fs::File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut bytes = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Every kind of thing that a volume can hold.
async fn populate(v: &Volume, name: &str) -> Result<(), Error> {
    let dir = NewNode { mode: 0o2750, umask: 0o027, rdev: 0 };
    let file = |mode| NewNode { mode: libc::S_IFREG | mode, umask: 0, rdev: 0 };
    let top = v.mkdir(WHO, ROOT_INO, name.as_bytes(), dir).await?.value.ino;
    let mut parts = Vec::new();
    for part in ["tmp", "new", "cur"] {
        parts.push(v.mkdir(WHO, top, part.as_bytes(), dir).await?.value.ino);
    }
    for i in 0..150usize {
        let message = format!("{i}.message,S={}", i * 97);
        let f = v.mknod(WHO, parts[0], message.as_bytes(), file(0o600), true).await?.value.ino;
        let body: Vec<u8> = (0..i * 97).map(|k| (k * 31 + i) as u8).collect();
        v.write(f, 0, &body, WriteOptions::default()).await?;
        v.fsync(f, false).await?;
        v.release(f).await;
        v.rename(parts[0], message.as_bytes(), parts[1], message.as_bytes(), Rename::NoReplace).await?;
    }
    for i in (0..150usize).step_by(5) {
        v.unlink(parts[1], format!("{i}.message,S={}", i * 97).as_bytes()).await?;
    }
    let f = v.mknod(WHO, top, b"sparse", file(0o4755), true).await?.value.ino;
    v.write(f, 1 << 40, b"end", WriteOptions::default()).await?;
    v.write(f, 70_000, &[7; 9000], WriteOptions::default()).await?;
    v.fallocate(f, 1 << 20, 1 << 16, Fallocate { keep_size: true, ..Default::default() }).await?;
    v.setxattr(f, b"user.long", &[5; 5000], XattrSet::Any).await?;
    v.link(f, ROOT_INO, format!("{name}.link").as_bytes()).await?;
    v.setattr(f, SetAttr { size: Some(100_000), ..Default::default() }).await?;
    v.release(f).await;
    v.symlink(WHO, top, b"symlink", b"new/0.message").await?;
    v.mknod(WHO, top, b"fifo", NewNode { mode: libc::S_IFIFO | 0o622, umask: 0, rdev: 0 }, false).await?;
    v.mknod(WHO, top, b"names may have any bytes: \xff\n\x01", file(0o644), false).await?;
    v.fsync(top, false).await?;
    Ok(())
}

/// What is in a volume, a line each: path, type and mode, owner, links, size, contents' checksum, attributes.
pub async fn listing(v: &Volume) -> Result<String, Error> {
    let lines = walk(v, true).await?;
    Ok(lines.into_iter().map(|l| l + "\n").collect())
}

/// As [`listing`], with the error where something cannot be read; in order.
pub async fn names(v: &Volume) -> Vec<String> {
    walk(v, false).await.unwrap_or_default().into_iter().collect()
}

async fn walk(v: &Volume, strict: bool) -> Result<BTreeSet<String>, Error> {
    let mut lines = BTreeSet::new();
    let mut seen = BTreeSet::from([ROOT_INO]);
    let mut todo = vec![(String::new(), ROOT_INO)];
    while let Some((path, dir)) = todo.pop() {
        let mut after = 0;
        loop {
            let batch = match v.readdir(dir, after, 100, false).await {
                Ok(b) => b.value,
                Err(e) if strict => return Err(e.into()),
                Err(e) => {
                    lines.insert(format!("{path}/ cannot be listed: {e}"));
                    break;
                }
            };
            let Some(last) = batch.last() else { break };
            after = last.cookie;
            for e in batch {
                let path = format!("{path}/{}", e.name.escape_ascii());
                let line = match describe(v, e.ino).await {
                    Ok(text) => format!("{path} {text}"),
                    Err(e) if strict => return Err(e),
                    Err(e) => format!("{path} cannot be read: {e}"),
                };
                lines.insert(line);
                // A damaged volume may have directories in circles.
                let is_dir = v.getattr(e.ino).await.is_ok_and(|a| a.value.inode.is_dir());
                if is_dir && seen.insert(e.ino) {
                    todo.push((path, e.ino));
                }
            }
        }
    }
    Ok(lines)
}

async fn describe(v: &Volume, ino: u64) -> Result<String, Error> {
    let i = v.getattr(ino).await?.value.inode;
    let mut out = format!("{:o} {}:{} links {} size {}", i.mode, i.uid, i.gid, i.links, i.size);
    if i.is_file() {
        let bytes = v.read(ino, 0, 1 << 20).await?.value;
        write!(out, " contents {}", &blake3::hash(&bytes).to_hex()[..16])?;
    }
    if i.is_symlink() {
        write!(out, " to {}", v.readlink(ino).await?.value.escape_ascii())?;
    }
    for name in v.listxattr(ino).await?.value {
        let value = v.getxattr(ino, &name).await?.value;
        write!(out, " {}={}", name.escape_ascii(), &blake3::hash(&value).to_hex()[..16])?;
    }
    Ok(out)
}
