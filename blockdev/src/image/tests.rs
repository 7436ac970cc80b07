use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::*;

const META: IoClass = IoClass::Meta;
const MIB: u64 = 1 << 20;

struct Fixture {
    dir: TempDir,
}

impl Fixture {
    /// On the disk that the build uses: /tmp may be a filesystem without direct I/O.
    fn new() -> Self {
        let dir = TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        ImageFile::create(dir.path().join("image"), MIB).unwrap();
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn open(&self) -> Arc<ImageFile> {
        ImageFile::open(self.path(), OpenMode::ReadWrite).unwrap()
    }

    /// Through the page cache, whatever the filesystem can do.
    fn open_buffered(&self) -> Arc<ImageFile> {
        let mut image = ImageFile::open_with_sector_size(self.path(), OpenMode::ReadWrite, 512).unwrap();
        let this = Arc::get_mut(&mut image).unwrap();
        this.direct = false;
        let inner = Arc::get_mut(&mut this.inner).unwrap();
        sys::set_buffered(&inner.file).unwrap();
        let lock = File::options().read(true).write(true).open(self.path()).unwrap();
        inner.ordered = Some(parking_lot::Mutex::new(lock));
        image
    }

    /// Runs one of the child functions below in a process of its own; returns when it has said that it is ready.
    fn spawn(&self, function: &str) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", &format!("image::tests::{function}")])
            .env("BLOCKDEV_TEST_IMAGE", self.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("READY")), "the child said nothing");
        std::thread::spawn(move || lines.count());
        child
    }
}

/// `None` where nobody started the child: `cargo test -- --include-ignored`.
fn child_image() -> Option<Arc<ImageFile>> {
    let path = std::env::var_os("BLOCKDEV_TEST_IMAGE")?;
    Some(ImageFile::open(path, OpenMode::ReadWrite).unwrap())
}

fn buf(byte: u8, len: usize) -> Arc<AlignedBuf> {
    let mut b = AlignedBuf::zeroed(len);
    b.fill(byte);
    Arc::new(b)
}

fn key(slot: u16) -> FenceKey {
    FenceKey { slot, incarnation: 1 }
}

/// Adds 1 to a counter in the sector at 4096 by compare-and-write, `times` times.
async fn count(image: &ImageFile, times: u64) {
    let sector = image.geometry().sector_size as usize;
    for _ in 0..times {
        let mut seen = image.read(META, 4096, sector).await.unwrap().to_vec();
        loop {
            let n = u64::from_le_bytes(seen[..8].try_into().unwrap());
            let mut new = seen.clone();
            new[..8].copy_from_slice(&(n + 1).to_le_bytes());
            match image.compare_and_write(4096, &seen, &new).await.unwrap() {
                Caw::Written => break,
                Caw::Mismatch(now) => seen = now,
            }
        }
    }
}

async fn counted(image: &ImageFile) -> u64 {
    let sector = image.read(META, 4096, 4096).await.unwrap();
    u64::from_le_bytes(sector[..8].try_into().unwrap())
}

#[tokio::test]
#[ignore = "runs in a process of its own, started by another test"]
async fn child_counts() {
    let Some(image) = child_image() else { return };
    println!("READY");
    count(&image, 100).await;
}

#[tokio::test]
#[ignore = "runs in a process of its own, started by another test"]
async fn child_registers_and_stays() {
    let Some(image) = child_image() else { return };
    image.register(key(3)).await.unwrap();
    println!("READY");
    // Ends by itself should the parent die.
    std::thread::sleep(Duration::from_secs(60));
}

#[tokio::test]
async fn what_is_written_is_read_by_every_opener() {
    let f = Fixture::new();
    let images = [f.open(), f.open(), f.open_buffered()];
    if images[0].is_direct() {
        assert!(matches!(images[0].geometry().sector_size, 512 | 4096));
    }
    assert_eq!((images[0].geometry().size, images[0].geometry().fencing), (MIB, FencingKind::ProcessLock));
    for (i, a) in images.iter().enumerate() {
        for b in &images {
            let (one, two) = (buf(i as u8 + 1, 4096), buf(i as u8 + 101, 8192));
            a.writev(META, 8192, vec![one.clone(), Arc::new(AlignedBuf::zeroed(0)), two.clone()], i == 0)
                .await
                .unwrap();
            a.flush(META).await.unwrap();
            let got = b.readv(META, 4096, &[4096, 8192, 4096, 0, 4096]).await.unwrap();
            assert_eq!(got.iter().map(|b| b.len()).collect::<Vec<_>>(), [4096, 8192, 4096, 0, 4096]);
            assert!(got[0].iter().chain(got[4].iter()).all(|b| *b == 0));
            assert!(got[1][..4096] == one[..] && got[1][4096..] == two[..4096] && got[2][..] == two[4096..]);
        }
    }
}

#[tokio::test]
async fn more_buffers_than_one_system_call_takes() {
    let f = Fixture::new();
    let image = f.open_buffered();
    let bufs: Vec<_> = (0..1500).map(|i| buf(i as u8, 512)).collect();
    image.writev(META, 0, bufs.clone(), false).await.unwrap();
    let got = image.readv(META, 0, &[512; 1500]).await.unwrap();
    assert!(got.iter().zip(&bufs).all(|(a, b)| a[..] == b[..]));
}

#[tokio::test]
async fn compare_and_write_tells_what_it_found() {
    let f = Fixture::new();
    let image = f.open();
    let n = image.geometry().sector_size as usize;
    assert_eq!(image.compare_and_write(0, &vec![0; n], &vec![1; n]).await.unwrap(), Caw::Written);
    assert_eq!(image.compare_and_write(0, &vec![0; n], &vec![2; n]).await.unwrap(), Caw::Mismatch(vec![1; n]));
    assert_eq!(image.read(META, 0, n).await.unwrap()[..], vec![1; n][..]);
    assert!(!sys::is_locked(&f.open().inner.file, 0, 4096).unwrap(), "the sector is unlocked again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compare_and_write_is_atomic_among_opens_and_tasks() {
    let f = Fixture::new();
    let shared = f.open();
    let images = [shared.clone(), shared, f.open(), f.open()];
    let tasks: Vec<_> = images.into_iter().map(|image| tokio::spawn(async move { count(&image, 50).await })).collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(counted(&f.open()).await, 200);
}

#[tokio::test]
async fn compare_and_write_is_atomic_among_processes() {
    let f = Fixture::new();
    let children: Vec<_> = (0..3).map(|_| f.spawn("child_counts")).collect();
    count(&f.open(), 100).await;
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(counted(&f.open()).await, 400);
}

#[tokio::test]
async fn a_dropped_compare_and_write_still_excludes_others_of_its_node() {
    let f = Fixture::new();
    let (a, blocker) = (f.open(), f.open());
    let n = a.geometry().sector_size as usize;
    assert!(sys::try_lock(&blocker.inner.file, true, 0, n as u64).unwrap());
    let (zeros, ones) = (vec![0; n], vec![1; n]);
    let first = a.compare_and_write(0, &zeros, &ones);
    assert!(tokio::time::timeout(Duration::from_millis(20), first).await.is_err());
    sys::unlock(&blocker.inner.file, 0, n as u64).unwrap();
    assert_eq!(a.compare_and_write(0, &zeros, &vec![2; n]).await.unwrap(), Caw::Mismatch(ones));
}

#[tokio::test]
async fn a_slot_has_one_owner() {
    let f = Fixture::new();
    let (a, b) = (f.open(), f.open());
    a.register(key(3)).await.unwrap();
    assert_eq!(a.presence(key(3)).await.unwrap(), Presence::Present);
    assert_eq!(b.presence(key(3)).await.unwrap(), Presence::Present);
    assert_eq!(b.fence(key(3)).await.unwrap(), Fenced::MustWait);
    assert_eq!(b.presence(key(2)).await.unwrap(), Presence::Gone);
    let refused = b.register(key(3)).await.unwrap_err();
    assert!(refused.to_string().contains("slot 3"), "{refused}");
    a.register(FenceKey { slot: 3, incarnation: 2 }).await.unwrap();
    a.register(key(4)).await.unwrap();
    assert_eq!(b.presence(key(3)).await.unwrap(), Presence::Gone);
    b.register(key(3)).await.unwrap();
    a.unregister().await.unwrap();
    a.unregister().await.unwrap();
    assert_eq!(b.fence(key(4)).await.unwrap(), Fenced::Done);
    drop(b);
    assert_eq!(a.presence(key(3)).await.unwrap(), Presence::Gone);
    let reader = ImageFile::open(f.path(), OpenMode::ReadOnly).unwrap();
    a.register(key(5)).await.unwrap();
    assert_eq!(reader.presence(key(5)).await.unwrap(), Presence::Present);
}

#[tokio::test]
async fn a_killed_process_is_gone() {
    let f = Fixture::new();
    let image = f.open();
    let mut child = f.spawn("child_registers_and_stays");
    assert_eq!(image.presence(key(3)).await.unwrap(), Presence::Present);
    assert!(image.register(key(3)).await.is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(image.presence(key(3)).await.unwrap(), Presence::Gone);
    assert_eq!(image.fence(key(3)).await.unwrap(), Fenced::Done);
    image.register(key(3)).await.unwrap();
}

#[tokio::test]
async fn misaligned_and_outside_operations_are_refused_and_not_counted() {
    let f = Fixture::new();
    let image = f.open();
    let range = |r: Result<()>| assert!(matches!(r, Err(DevError::Range { .. })));
    range(image.read(META, 100, 4096).await.map(|_| ()));
    range(image.read(META, MIB, 4096).await.map(|_| ()));
    range(image.write(META, 0, buf(0, 100), false).await);
    range(image.write(META, MIB - 4096, buf(0, 8192), false).await);
    range(image.compare_and_write(0, &[0; 100], &[0; 100]).await.map(|_| ()));
    range(image.compare_and_write(MIB, &[0; 512], &[0; 512]).await.map(|_| ()));
    range(image.discard(u64::MAX - 4095, 8192).await);
    assert_eq!(image.stats().snapshot(), Default::default());
    image.read(IoClass::Data, 0, 8192).await.unwrap();
    image.write(IoClass::Journal, 0, buf(1, 4096), true).await.unwrap();
    image.flush(IoClass::Journal).await.unwrap();
    let s = image.stats().snapshot();
    assert_eq!((s.class(IoClass::Data).reads, s.class(IoClass::Data).bytes_read), (1, 8192));
    assert_eq!((s.class(IoClass::Journal).writes, s.class(IoClass::Journal).flushes), (1, 1));
}

#[tokio::test]
async fn discard_punches_a_hole() {
    use std::os::unix::fs::MetadataExt;
    let f = Fixture::new();
    let image = f.open();
    image.write(META, 0, buf(1, 65536), true).await.unwrap();
    let before = std::fs::metadata(f.path()).unwrap();
    image.discard(4096, 32768).await.unwrap();
    let got = image.read(META, 0, 65536).await.unwrap();
    assert!(got[..4096].iter().chain(&got[36864..]).all(|b| *b == 1));
    let after = std::fs::metadata(f.path()).unwrap();
    assert_eq!(after.len(), before.len());
    // Unless the filesystem cannot punch holes, in which case nothing may have changed.
    assert!(
        got[4096..36864].iter().all(|b| *b == 0) && after.blocks() < before.blocks() || got[..] == buf(1, 65536)[..]
    );
}

#[tokio::test]
async fn a_reader_cannot_write() {
    let f = Fixture::new();
    let image = ImageFile::open(f.path(), OpenMode::ReadOnly).unwrap();
    image.read(META, 0, 4096).await.unwrap();
    let n = image.geometry().sector_size as usize;
    assert!(matches!(image.write(META, 0, buf(1, n), false).await, Err(DevError::Io { .. })));
    assert!(image.compare_and_write(0, &vec![0; n], &vec![1; n]).await.is_err());
    assert!(image.register(key(0)).await.is_err());
    assert!(image.discard(0, 4096).await.is_err());
    assert!(image.read(META, 0, 4096).await.unwrap().iter().all(|b| *b == 0));
}

#[tokio::test]
async fn a_truncated_image_gives_an_error_not_zeros() {
    let f = Fixture::new();
    let image = f.open();
    File::options().write(true).open(f.path()).unwrap().set_len(MIB / 2).unwrap();
    assert!(matches!(image.read(META, MIB - 4096, 4096).await, Err(DevError::Io { .. })));
}

#[tokio::test]
async fn buffered_transfers_do_not_wait_for_ever_for_a_stopped_process() {
    let f = Fixture::new();
    let (image, stopped) = (f.open_buffered(), f.open_buffered());
    assert!(sys::try_lock(&stopped.inner.ordered.as_ref().unwrap().lock(), true, IO_LOCK, 1).unwrap());
    image.write(META, 0, buf(1, 512), false).await.unwrap();
}

#[test]
fn what_cannot_be_opened_says_why_in_one_line() {
    let f = Fixture::new();
    let say = |path: &Path| match ImageFile::open(path, OpenMode::ReadWrite) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(e) => {
            let text = e.to_string();
            assert!(text.starts_with(&path.display().to_string()) && !text.contains('\n'), "{text}");
            text
        }
    };
    assert!(say(&f.dir.path().join("nothing")).ends_with(": no such file"));
    assert!(say(f.dir.path()).ends_with(": neither a regular file nor a block device"));
    assert!(say(Path::new("/dev/null")).ends_with(": neither a regular file nor a block device"));
    let small = f.dir.path().join("small");
    ImageFile::create(&small, 1000).unwrap();
    assert!(say(&small).contains("1000 bytes are too small"));
    assert!(matches!(ImageFile::create(&small, MIB), Err(OpenError::Exists(_))));
    assert!(matches!(
        ImageFile::open_with_sector_size(f.path(), OpenMode::ReadWrite, 700),
        Err(OpenError::SectorSize { wanted: 700, .. })
    ));
}

#[test]
fn an_odd_tail_is_left_out() {
    let f = Fixture::new();
    let path = f.dir.path().join("odd");
    ImageFile::create(&path, MIB + 700).unwrap();
    assert_eq!(ImageFile::open_with_sector_size(&path, OpenMode::ReadWrite, 4096).unwrap().geometry().size, MIB);
}

struct Switch(std::sync::atomic::AtomicBool);

impl WritePermit for Switch {
    fn valid(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// What was decided to be written while the permit was valid is not submitted after it has ended.
#[tokio::test]
async fn nothing_is_written_without_a_permit() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("img");
    ImageFile::create(&path, 1 << 20).unwrap();
    let dev = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let sector = dev.geometry().sector_size as usize;
    let permit = Arc::new(Switch(true.into()));
    dev.set_permit(permit.clone());
    let write = |byte: u8| dev.write(IoClass::Data, 0, Arc::new(AlignedBuf::copy_of(&vec![byte; sector])), false);
    write(1).await.unwrap();
    permit.0.store(false, std::sync::atomic::Ordering::SeqCst);
    assert!(matches!(write(2).await, Err(DevError::Fenced)));
    let swap = dev.compare_and_write(0, &vec![1; sector], &vec![3; sector]).await;
    assert!(matches!(swap, Err(DevError::Fenced)));
    assert!(matches!(dev.discard(0, 4096).await, Err(DevError::Fenced)));
    assert_eq!(dev.read(IoClass::Data, 0, sector).await.unwrap()[..], vec![1; sector]);
}
