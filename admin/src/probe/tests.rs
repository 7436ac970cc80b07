//! Probing simulated devices that do what they must or do one thing wrong, and image files.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockdev::image::{ImageFile, OpenMode};
use blockdev::open::TOOL_SLOT;
use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{
    AlignedBuf, BlockDevice, Caw, DeviceStats, FenceKey, Fenced, FencingKind, Geometry, IoClass, Presence, Result,
};
use mkfs::FormatOptions;
use serde_json::Value;

use super::report::{Finding, Level};
use super::{Args, scratch, write};

const SIZE: u64 = 64 << 20;

/// What a device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// It looks, and writes a little later.
    NotAtomic,
    /// It compares all but the last byte.
    ShortCompare,
    /// It writes the sector after the right one, too.
    TooMuch,
    /// It accepts a preemption and does nothing.
    KeepsWriting,
    /// Fencing one cuts off all the others.
    FencesAll,
    /// It acknowledges writes and does nothing.
    Forgets,
}

struct Faulty {
    inner: Arc<dyn BlockDevice>,
    all: Vec<FenceKey>,
    fault: Fault,
}

#[async_trait]
impl BlockDevice for Faulty {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        Ok(self.geometry())
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        self.inner.readv(class, offset, lens).await
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        // Of a page alone: what the check of durable writes writes.
        if self.fault == Fault::Forgets && bufs.iter().all(|b| b.len() == 4096) {
            return Ok(());
        }
        self.inner.writev(class, offset, bufs, fua).await
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.inner.flush(class).await
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let len = expect.len();
        match self.fault {
            Fault::NotAtomic => {
                let found = self.inner.read(IoClass::Lock, offset, len).await?;
                if found[..] != *expect {
                    return Ok(Caw::Mismatch(found.to_vec()));
                }
                let new = Arc::new(AlignedBuf::copy_of(new));
                self.inner.write(IoClass::Lock, offset, new, false).await.map(|()| Caw::Written)
            }
            Fault::ShortCompare => {
                let found = self.inner.read(IoClass::Lock, offset, len).await?;
                let mut expect = expect.to_vec();
                if found[..len - 1] == expect[..len - 1] {
                    expect[len - 1] = found[len - 1];
                }
                self.inner.compare_and_write(offset, &expect, new).await
            }
            Fault::TooMuch => {
                let done = self.inner.compare_and_write(offset, expect, new).await?;
                if done == Caw::Written {
                    let beside = Arc::new(AlignedBuf::copy_of(new));
                    self.inner.write(IoClass::Lock, offset + len as u64, beside, false).await?;
                }
                Ok(done)
            }
            _ => self.inner.compare_and_write(offset, expect, new).await,
        }
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        self.inner.register(key).await
    }

    async fn unregister(&self) -> Result<()> {
        self.inner.unregister().await
    }

    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        self.inner.presence(key).await
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        match self.fault {
            Fault::KeepsWriting => return Ok(Fenced::Done),
            Fault::FencesAll => {
                for other in &self.all {
                    self.inner.fence(*other).await?;
                }
            }
            _ => {}
        }
        self.inner.fence(key).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.discard(offset, len).await
    }

    fn stats(&self) -> &DeviceStats {
        self.inner.stats()
    }
}

/// The findings of a write check on a blank device with this fault, and whether the device is as it was.
async fn check(fault: Fault) -> (Vec<Finding>, bool) {
    let disk = SimDisk::new(SimConfig { fencing: FencingKind::Reservations, ..SimConfig::new(SIZE, 7) });
    let before = disk.read_raw(0, SIZE as usize);
    let keys = write::keys(4);
    let devices: Vec<Arc<dyn BlockDevice>> = (0..4)
        .map(|i| {
            let inner = disk.open(&format!("connection {i}"));
            Arc::new(Faulty { inner, all: keys[2..].to_vec(), fault }) as Arc<dyn BlockDevice>
        })
        .collect();
    let place = scratch::find(devices[0].as_ref()).await.unwrap();
    let found = write::check_with(&devices, &keys, place).await;
    (found, disk.read_raw(0, SIZE as usize) == before)
}

fn failed(found: &[Finding]) -> Vec<&str> {
    found.iter().filter(|f| f.level == Level::Fail).map(|f| f.check).collect()
}

#[tokio::test(start_paused = true)]
async fn a_device_that_does_what_it_must_is_left_as_it_was() {
    let (found, same) = check(Fault::None).await;
    assert_eq!(failed(&found), Vec::<&str>::new(), "{found:?}");
    let checks: Vec<&str> = found.iter().map(|f| f.check).collect();
    assert_eq!(checks, ["compare-and-write race", "miscompare", "durable writes", "fencing", "put back"]);
    assert!(found[0].text.starts_with("800 increments by 4 connections"), "{}", found[0].text);
    assert_eq!(found[0].level, Level::Ok);
    assert!(same);
}

#[tokio::test(start_paused = true)]
async fn each_fault_is_found_by_its_name() {
    for (fault, check_name, what) in [
        (Fault::NotAtomic, "compare-and-write race", "not atomic"),
        (Fault::ShortCompare, "miscompare", "last byte"),
        (Fault::TooMuch, "miscompare", "else than its sector"),
        (Fault::KeepsWriting, "fencing", "can still write"),
        (Fault::FencesAll, "fencing", "harmed another"),
        (Fault::Forgets, "durable writes", "does not see"),
    ] {
        let (found, same) = check(fault).await;
        let f = found.iter().find(|f| f.check == check_name).unwrap();
        assert_eq!(f.level, Level::Fail, "{fault:?}: {found:?}");
        assert!(f.text.contains(what), "{fault:?}: {}", f.text);
        assert!(same, "{fault:?} leaves something behind");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_written_between_the_look_and_the_registration_is_seen() {
    let disk = SimDisk::new(SimConfig::new(SIZE, 1));
    let devices: Vec<Arc<dyn BlockDevice>> = (0..4).map(|_| disk.open("c") as Arc<dyn BlockDevice>).collect();
    let place = scratch::find(devices[0].as_ref()).await.unwrap();
    disk.write_raw(place + 100, b"somebody's");
    let before = disk.read_raw(0, SIZE as usize);
    let found = write::check(&devices, place, false).await;
    assert!(found.len() == 1 && found[0].text.contains("meanwhile"), "{found:?}");
    assert!(disk.read_raw(0, SIZE as usize) == before);
}

async fn run(path: &Path, write: bool) -> (Value, bool) {
    let (text, fit) = super::run(&Args { write, json: true, device: path.into() }).await.unwrap();
    (serde_json::from_str(&text).unwrap(), fit)
}

fn finding<'a>(report: &'a Value, check: &str) -> &'a str {
    let all = report["findings"].as_array().unwrap();
    all.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("no {check} in {report}"))["text"]
        .as_str()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_file_is_probed_and_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, SIZE).unwrap();
    let (r, fit) = run(&path, false).await;
    assert!(fit && r["written"] == false, "{r}");
    assert_eq!((&r["kind"], &r["size"]), (&"image file".into(), &SIZE.into()));
    let p = |name: &str| r["reads"][name].as_u64().unwrap();
    assert!(p("p50_us") <= p("p99_us") && p("per_second_32") > 0 && p("count") > 100, "{r}");
    let (r, fit) = run(&path, true).await;
    assert!(fit && r["written"] == true, "{r}");
    assert!(finding(&r, "compare-and-write race").starts_with("800 increments"), "{r}");
    assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0));
    let args = Args { write: true, json: false, device: path };
    let (text, _) = super::run(&args).await.unwrap();
    assert!(text.ends_with("verdict: fit for one host with several mounts\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_to_a_device_that_carries_something() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, SIZE).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let refuse = async |what: &str| {
        let before = std::fs::read(&path).unwrap();
        let (r, fit) = run(&path, true).await;
        assert!(!fit && r["written"] == false, "{r}");
        assert!(finding(&r, "scratch").contains(what), "{r}");
        assert!(r["verdict"].as_str().unwrap().starts_with("not tried"), "{r}");
        assert!(std::fs::read(&path).unwrap() == before);
        let (_, fit) = run(&path, false).await;
        assert!(fit, "what it holds says nothing about the device");
    };
    mkfs::format(&dev, &FormatOptions::seeded(1), &mut |_| ()).await.unwrap();
    refuse("a clusterfs volume").await;
    let put = async |offset: u64, bytes: &[u8]| {
        dev.write(IoClass::Meta, offset, Arc::new(AlignedBuf::copy_of(bytes)), true).await.unwrap();
    };
    for at in (0..SIZE).step_by(1 << 20) {
        put(at, &vec![0; 1 << 20]).await;
    }
    let mut ext4 = vec![0; 4096];
    ext4[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
    put(0, &ext4).await;
    refuse("ext4").await;
    // Without any signature.
    for at in (0..SIZE).step_by(1 << 20) {
        put(at, &vec![0x33; 1 << 20]).await;
    }
    refuse("blank").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_probes_at_once_do_not_write_both() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, SIZE).unwrap();
    let other = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    other.register(FenceKey { slot: TOOL_SLOT, incarnation: 1 }).await.unwrap();
    let (r, fit) = run(&path, true).await;
    assert!(!fit && finding(&r, "scratch").contains("another process"), "{r}");
    assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_too_small_is_not_fit_and_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, 4 << 20).unwrap();
    let (r, fit) = run(&path, true).await;
    assert!(!fit && r["verdict"] == "not fit: size", "{r}");
    assert!(finding(&r, "writes").contains("not tried"), "{r}");
}

/// Reads that take as long as a heartbeat.
#[tokio::test(start_paused = true)]
async fn a_device_slower_than_heartbeats_is_not_fit() {
    for (latency, level) in
        [(200..=900, Level::Ok), (200_000..=300_000, Level::Warn), (1_500_000..=1_600_000, Level::Fail)]
    {
        let disk = SimDisk::new(SimConfig { latency_us: latency, ..SimConfig::new(SIZE, 1) });
        let dev: Arc<dyn BlockDevice> = disk.open("reader");
        let mut report = super::Report::new("sim".into(), super::Kind::Image, dev.as_ref());
        let started = tokio::time::Instant::now();
        super::look::look(&dev, &mut report).await;
        let reads = report.findings.iter().find(|f| f.check == "reads").unwrap();
        assert_eq!(reads.level, level, "{reads:?} {:?}", report.reads);
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        let reads = report.reads.unwrap();
        assert!(
            reads.per_second_32 > 4 * reads.per_second_1,
            "32 in flight on a device without a queue limit: {reads:?}"
        );
    }
}
