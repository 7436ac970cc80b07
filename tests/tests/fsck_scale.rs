//! fsck of many files: how much it reads, how much memory it takes, and with CLUSTERFS_SCALE=full that a million files are checked
//! within a minute. Needs the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::image::{ImageFile, OpenMode};
use blockdev::{BlockDevice, IoClass};
use clusterfs_tests::cluster;
use clusterfs_tests::golden::{self, Image};
use fs_core::format::item::{Key, Kind, ino_domain, ino_local};
use fs_core::{Caller, NewNode, ROOT_INO, Volume, WriteOptions};

const WHO: Caller = Caller { uid: 1000, gid: 1000 };
const PER_BOX: usize = 500;
/// Resident memory of fsck, for checking and for repairing one mailbox: what is read at once (256 domains, 4096 nodes) bounds it, not
/// the number of files; the smaller volume has fewer than that. Measured: 26 and 41 MiB, of a million files 148 and 179 MiB.
fn memory_mib() -> u64 {
    if full() { 220 } else { 80 }
}

fn full() -> bool {
    std::env::var("CLUSTERFS_SCALE").as_deref() == Ok("full")
}

/// Mailboxes of 500 messages each: most of them small, every tenth of two blocks.
async fn make(path: &Path, files: usize) {
    ImageFile::create(path, (256 << 20) + files as u64 * 4096).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(path, OpenMode::ReadWrite).unwrap();
    let options = mkfs::FormatOptions { nodes: Some(2), ..mkfs::FormatOptions::seeded(3) };
    mkfs::format(&dev, &options, &mut |_| {}).await.unwrap();
    drop(dev);
    let v = Volume::mount(golden::mount_config(ImageFile::open(path, OpenMode::ReadWrite).unwrap(), 1)).await.unwrap();
    let dir = NewNode { mode: 0o755, umask: 0, rdev: 0 };
    let file = NewNode { mode: 0o100600, umask: 0, rdev: 0 };
    for b in 0..files / PER_BOX {
        let top = v.mkdir(WHO, ROOT_INO, format!("box{b}").as_bytes(), dir).await.unwrap().value.ino;
        let new = v.mkdir(WHO, top, b"new", dir).await.unwrap().value.ino;
        for i in 0..PER_BOX {
            let f = v.mknod(WHO, new, format!("{i}.message.of.box{b}").as_bytes(), file, true).await.unwrap().value.ino;
            let len = if i % 10 == 0 { 5000 } else { 100 };
            v.write(f, 0, &vec![i as u8; len], WriteOptions::default()).await.unwrap();
            v.release(f).await;
        }
    }
    v.unmount().await.unwrap();
}

struct Ran {
    code: i32,
    out: String,
    took: Duration,
    memory_mib: u64,
}

fn fsck(option: &str, image: &Path) -> Ran {
    let bin = cluster::programs().unwrap_or_else(|e| panic!("{e}")).join("fsck.clusterfs");
    let out = image.with_extension("out");
    let started = Instant::now();
    let mut command = Command::new(bin);
    command.arg(option).arg(image).stdout(File::create(&out).unwrap()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let (mut memory_mib, status) = (0, format!("/proc/{}/status", child.id()));
    let code = loop {
        if let Some(s) = child.try_wait().unwrap() {
            break s.code().unwrap();
        }
        // The peak so far; what getrusage gives counts this process before the exec too.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let peak = text.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        memory_mib = memory_mib.max(peak.unwrap_or(0) >> 10);
        std::thread::sleep(Duration::from_millis(2));
    };
    Ran { code, out: std::fs::read_to_string(&out).unwrap(), took: started.elapsed(), memory_mib }
}

#[test]
fn many_files_are_checked_and_repaired_in_bounded_memory_and_time() {
    let files = if full() { 1_000_000 } else { 20_000 };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    rt.block_on(make(&image, files));

    // What is read: metadata once, in large pieces.
    let dev = ImageFile::open(&image, OpenMode::ReadOnly).unwrap();
    let report = rt.block_on(fs_core::check::check(&(dev.clone() as Arc<dyn BlockDevice>), None)).unwrap();
    assert!(report.is_clean(), "{:?}", report.violations);
    assert_eq!(report.files, files as u64);
    let io = dev.stats().snapshot();
    let metadata = report.tree_nodes + report.domains;
    let meta = io.class(IoClass::Meta);
    let (reads, bytes) = (meta.reads, meta.bytes_read);
    println!("{files} files, {metadata} blocks of trees: {reads} reads of {} MiB", bytes >> 20);
    assert!(bytes / 4096 < 2 * metadata + 4000, "{bytes} bytes read for {metadata} blocks");
    assert!(reads < metadata / 8 + 500, "{reads} reads for {metadata} blocks");

    let n = fsck("-n", &image);
    println!("fsck -n: {:.1} s, {} MiB: {}", n.took.as_secs_f64(), n.memory_mib, n.out.trim());
    assert_eq!(n.code, 0, "{}", n.out);
    assert!(n.memory_mib > 0, "nothing was measured");
    assert!(n.memory_mib < memory_mib(), "{} MiB", n.memory_mib);
    assert!(!full() || n.took < Duration::from_secs(60), "{:?} for a million files", n.took);

    // One damaged mailbox: only its items are in memory.
    let v = Image::new(std::fs::read(&image).unwrap());
    let inbox = v.at("box7/new");
    // Cookies have 63 bits: from the middle of the names, so that the leaf holds nothing else.
    let leaf = v.leaf(ino_domain(inbox), &Key::new(ino_local(inbox), Kind::Dirent, 1 << 62)).0;
    drop(v);
    File::options().write(true).open(&image).unwrap().write_all_at(&[0xee; 64], leaf * 4096 + 4000).unwrap();
    let y = fsck("-y", &image);
    println!("fsck -y: {:.1} s, {} MiB", y.took.as_secs_f64(), y.memory_mib);
    assert_eq!(y.code, 1, "{}", y.out);
    assert!(y.memory_mib < memory_mib(), "{} MiB", y.memory_mib);
    assert!(y.out.contains(&format!("{files} files")), "no file is lost with some names: {}", y.out);
    let again = fsck("-y", &image);
    assert_eq!(again.code, 0, "a second run finds something: {}", again.out);
}
