//! An image file (or a kernel block device that is no shared SCSI disk) that several nodes on one host share.
//!
//! Every node is one open file description. Locks of open file descriptions (fcntl, F_OFD_SETLK) do what a SCSI disk
//! does by itself: a lock over the sector makes compare-and-write atomic against other compare-and-writes, and a lock
//! on a byte far behind the contents, one per slot, says that the slot's owner can still write. The kernel drops it
//! when the last descriptor closes, which is after the last system call of a dying process has ended, so that
//! `Gone` means that nothing arrives any more (I4). All of this holds on one host only.
//!
//! I/O is direct where the filesystem says how to align it. Where it goes through the page cache, a read could see a
//! sector half written; there a lock over everything orders reads and writes. Either way the calls run on tokio's
//! blocking threads, one system call per operation.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::{
    AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, FencingKind, Geometry, IoClass, Presence,
    Result, WritePermit, range, sys,
};

/// The lock byte of slot 0: no image is that large.
const SLOT_LOCKS: u64 = 1 << 62;
/// The lock that orders buffered reads and writes.
const IO_LOCK: u64 = SLOT_LOCKS - 1;
/// Less cannot hold a volume.
const MIN_SIZE: u64 = 64 << 10;
/// How long a compare-and-write waits for one of another process on the same sector: far above what a live one takes.
const CAW_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a buffered transfer waits for its turn.
const IO_LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const CAW_SHARDS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    ReadWrite,
    ReadOnly,
}

/// Why an image cannot be opened or created.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{0}: no such file")]
    NotFound(PathBuf),
    #[error("{0}: already exists")]
    Exists(PathBuf),
    #[error("{0}: permission denied")]
    Permission(PathBuf),
    #[error("{0}: neither a regular file nor a block device")]
    NotADevice(PathBuf),
    #[error("{path}: {size} bytes are too small, at least {min} are needed")]
    TooSmall { path: PathBuf, size: u64, min: u64 },
    #[error("{path}: cannot be used with sectors of {wanted} bytes")]
    SectorSize { path: PathBuf, wanted: u32 },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl OpenError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::NotFound => Self::NotFound(path),
            ErrorKind::AlreadyExists => Self::Exists(path),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Self::Permission(path),
            ErrorKind::IsADirectory => Self::NotADevice(path),
            _ => Self::Io { path, source },
        }
    }
}

type Permit = Option<Arc<dyn WritePermit>>;

/// What the blocking threads need.
struct Inner {
    file: File,
    /// Taken around every transfer where I/O is buffered; its lock belongs to a description of its own, so that
    /// this one's locks stay as they are.
    ordered: Option<parking_lot::Mutex<File>>,
}

impl Inner {
    fn transfer<T>(&self, exclusive: bool, work: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let Some(ordered) = &self.ordered else { return work(&self.file) };
        let lock = ordered.lock();
        // Whoever holds it for that long has been stopped, and not within a system call: nothing is half written.
        sys::lock_within(&lock, exclusive, IO_LOCK, 1, IO_LOCK_TIMEOUT)?;
        let result = work(&self.file);
        sys::unlock(&lock, IO_LOCK, 1)?;
        result
    }

    fn read(&self, offset: u64, bufs: &mut [AlignedBuf]) -> io::Result<()> {
        self.transfer(false, |file| sys::read(file, offset, bufs))
    }

    fn write(&self, offset: u64, bufs: &[Arc<AlignedBuf>], fua: bool, permit: &Permit) -> io::Result<()> {
        self.transfer(true, |file| sys::write(file, offset, bufs, fua, permit.as_deref()))
    }

    /// Under the lock of the sector. `Err` of the outer: nothing was written; of the inner: nobody knows (I9).
    fn compare_and_write(
        &self,
        offset: u64,
        expect: &[u8],
        new: &[u8],
        permit: &Permit,
    ) -> io::Result<std::result::Result<Caw, io::Error>> {
        let len = expect.len();
        if !sys::lock_within(&self.file, true, offset, len as u64, CAW_TIMEOUT)? {
            return Err(ErrorKind::TimedOut.into());
        }
        let mut found = [AlignedBuf::zeroed(len)];
        let result = match self.read(offset, &mut found) {
            Err(e) => Err(e),
            Ok(()) if found[0][..] != *expect => Ok(Ok(Caw::Mismatch(found[0].to_vec()))),
            Ok(()) => {
                Ok(self.write(offset, &[Arc::new(AlignedBuf::copy_of(new))], false, permit).map(|()| Caw::Written))
            }
        };
        sys::unlock(&self.file, offset, len as u64)?;
        result
    }
}

/// An image file or kernel block device, opened by one node.
pub struct ImageFile {
    inner: Arc<Inner>,
    geometry: Geometry,
    /// As last seen.
    size: AtomicU64,
    writable: bool,
    direct: bool,
    /// A block device of the kernel.
    block: bool,
    /// Locks of one description do not exclude each other: compare-and-writes of this node queue here, by sector. The
    /// guard travels with the blocking work, which goes on when its caller is dropped.
    caw: Vec<Arc<Mutex<()>>>,
    /// The slot whose lock byte this description holds.
    slot: Arc<Mutex<Option<u16>>>,
    permit: parking_lot::Mutex<Permit>,
    stats: DeviceStats,
}

impl ImageFile {
    /// Makes a sparse image file of `size` bytes; an existing file is left alone.
    pub fn create(path: impl AsRef<Path>, size: u64) -> std::result::Result<(), OpenError> {
        let path = path.as_ref();
        let file = File::create_new(path).map_err(|e| OpenError::new(path, e))?;
        file.set_len(size).map_err(|e| OpenError::new(path, e))
    }

    /// Opens with the smallest sector size that the device allows: 512 or 4096 bytes.
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> std::result::Result<Arc<Self>, OpenError> {
        Self::open_inner(path.as_ref(), mode, None)
    }

    /// Opens with the sector size that the volume was made with, direct I/O given up if need be: an image
    /// may have moved to a filesystem with another alignment.
    pub fn open_with_sector_size(
        path: impl AsRef<Path>,
        mode: OpenMode,
        sector_size: u32,
    ) -> std::result::Result<Arc<Self>, OpenError> {
        Self::open_inner(path.as_ref(), mode, Some(sector_size))
    }

    fn open_inner(path: &Path, mode: OpenMode, wanted: Option<u32>) -> std::result::Result<Arc<Self>, OpenError> {
        let error = |e| OpenError::new(path, e);
        // Before it is opened: opening a FIFO or a terminal can hang or have effects.
        let kind = std::fs::metadata(path).map_err(error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NotADevice(path.to_owned()));
        }
        let open = |flags| {
            let writable = mode == OpenMode::ReadWrite;
            File::options().read(true).write(writable).custom_flags(flags | libc::O_NONBLOCK).open(path)
        };
        let (file, accepted) = match open(libc::O_DIRECT) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0).map_err(error)?, false),
            other => (other.map_err(error)?, true),
        };
        let least = if kind.is_block_device() { sys::block_sector_size(&file).map_err(error)? } else { 512 };
        // Block devices are direct on kernels that do not tell, too: other hosts write past this one's page cache.
        let told = || sys::direct_alignment(&file).or(kind.is_block_device().then_some(least));
        let alignment = if accepted { told() } else { None };
        let sector_size = match wanted {
            Some(wanted) => wanted,
            None => alignment.filter(|a| *a <= 4096).unwrap_or(512).max(least).next_power_of_two(),
        };
        if !matches!(sector_size, 512 | 1024 | 2048 | 4096) || sector_size < least {
            return Err(OpenError::SectorSize { path: path.to_owned(), wanted: sector_size });
        }
        let direct = alignment.is_some_and(|a| a <= sector_size);
        if accepted && !direct {
            sys::set_buffered(&file).map_err(error)?;
        }
        let size = sys::size_of(&file, sector_size).map_err(error)?;
        if size < MIN_SIZE {
            let end = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(error)?;
            return Err(OpenError::TooSmall { path: path.to_owned(), size: end, min: MIN_SIZE });
        }
        let ordered = if direct { None } else { Some(parking_lot::Mutex::new(open(0).map_err(error)?)) };
        Ok(Arc::new(Self {
            inner: Arc::new(Inner { file, ordered }),
            geometry: Geometry {
                sector_size,
                size,
                write_cache: true,
                fencing: FencingKind::ProcessLock,
                others_unseen: kind.is_block_device(),
            },
            size: AtomicU64::new(size),
            writable: mode == OpenMode::ReadWrite,
            direct,
            block: kind.is_block_device(),
            caw: (0..CAW_SHARDS).map(|_| Arc::default()).collect(),
            slot: Arc::default(),
            permit: parking_lot::Mutex::default(),
            stats: DeviceStats::default(),
        }))
    }

    /// Whether I/O bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Runs `work` on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        op: &'static str,
        offset: u64,
        len: usize,
        work: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => Err(io_error(op, offset, len, e)),
            // The runtime shut down before or while it ran.
            Err(_) => Err(DevError::Unknown { op, offset, len }),
        }
    }

    fn check(&self, op: &'static str, offset: u64, lens: impl IntoIterator<Item = usize>) -> Result<usize> {
        let lens: Vec<usize> = lens.into_iter().collect();
        match range::check(op, &self.geometry(), offset, lens.iter().copied()) {
            Err(DevError::Range { .. }) => range::check(op, &self.measure(op)?, offset, lens),
            checked => checked,
        }
    }

    /// Looks how large the file is now.
    fn measure(&self, op: &'static str) -> Result<Geometry> {
        let size = sys::size_of(&self.inner.file, self.geometry.sector_size).map_err(|e| io_error(op, 0, 0, e))?;
        self.size.store(size, Relaxed);
        Ok(self.geometry())
    }

    fn permit(&self) -> Permit {
        self.permit.lock().clone()
    }

    fn check_writable(&self, op: &'static str, offset: u64, len: usize) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(io_error(op, offset, len, ErrorKind::ReadOnlyFilesystem.into()))
    }
}

fn io_error(op: &'static str, offset: u64, len: usize, source: io::Error) -> DevError {
    if sys::is_refusal(&source) {
        return DevError::Fenced;
    }
    DevError::Io { op, offset, len, source: Arc::new(source) }
}

fn slot_lock(slot: u16) -> u64 {
    SLOT_LOCKS + u64::from(slot)
}

#[async_trait]
impl BlockDevice for ImageFile {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Relaxed), ..self.geometry }
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        self.measure("measuring")
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let total = self.check("read", offset, lens.iter().copied())?;
        self.stats.count_read(class, total);
        // Made here: what a blocking thread allocates and others free stays with that thread, and there are many of them.
        let mut bufs: Vec<_> = lens.iter().map(|len| AlignedBuf::zeroed(*len)).collect();
        self.blocking("read", offset, total, move |inner| inner.read(offset, &mut bufs).map(|()| bufs)).await
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        let total = self.check("write", offset, bufs.iter().map(|b| b.len()))?;
        self.check_writable("write", offset, total)?;
        self.stats.count_write(class, total);
        let permit = self.permit();
        self.blocking("write", offset, total, move |inner| inner.write(offset, &bufs, fua, &permit)).await
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.stats.count_flush(class);
        self.blocking("flush", 0, 0, |inner| inner.file.sync_data()).await
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let op = "compare-and-write";
        let sector = self.geometry.sector_size as usize;
        self.check(op, offset, [sector])?;
        if expect.len() != sector || new.len() != sector {
            let len = if expect.len() == sector { new.len() } else { expect.len() };
            return Err(DevError::Range { op, offset, len, size: self.geometry().size });
        }
        self.check_writable(op, offset, sector)?;
        self.stats.count_compare_and_write(sector);
        let shard = &self.caw[(offset / sector as u64) as usize % CAW_SHARDS];
        let guard = shard.clone().lock_owned().await;
        let (expect, new, permit) = (expect.to_vec(), new.to_vec(), self.permit());
        let outcome = self
            .blocking(op, offset, sector, move |inner| {
                let outcome = inner.compare_and_write(offset, &expect, &new, &permit);
                drop(guard);
                outcome
            })
            .await?;
        outcome.map_err(|error| {
            if sys::is_refusal(&error) {
                return DevError::Fenced;
            }
            tracing::warn!(offset, %error, "compare-and-write failed while writing");
            DevError::Unknown { op, offset, len: sector }
        })
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        let (op, at) = ("register", slot_lock(key.slot));
        self.check_writable(op, at, 1)?;
        let mut slot = self.slot.clone().lock_owned().await;
        self.blocking(op, at, 1, move |inner| {
            if *slot == Some(key.slot) {
                return Ok(());
            }
            if !sys::try_lock(&inner.file, true, at, 1)? {
                return Err(io::Error::new(
                    ErrorKind::ResourceBusy,
                    format!("another process of this host has slot {}", key.slot),
                ));
            }
            match slot.replace(key.slot) {
                Some(old) => sys::unlock(&inner.file, slot_lock(old), 1),
                None => Ok(()),
            }
        })
        .await
    }

    fn set_permit(&self, permit: Arc<dyn WritePermit>) {
        *self.permit.lock() = Some(permit);
    }

    async fn unregister(&self) -> Result<()> {
        let mut slot = self.slot.clone().lock_owned().await;
        let Some(old) = *slot else { return Ok(()) };
        let at = slot_lock(old);
        self.blocking("unregister", at, 1, move |inner| {
            sys::unlock(&inner.file, at, 1)?;
            *slot = None;
            Ok(())
        })
        .await
    }

    /// By slot only: whoever holds the slot now, of whatever incarnation, counts as present.
    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        let at = slot_lock(key.slot);
        // Held through the query: between two keys of this node its own lock would go unseen.
        let slot = self.slot.clone().lock_owned().await;
        let present =
            self.blocking("presence", at, 1, move |inner| {
                Ok(*slot == Some(key.slot) || sys::is_locked(&inner.file, at, 1)?)
            })
            .await?;
        Ok(if present { Presence::Present } else { Presence::Gone })
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        Ok(match self.presence(key).await? {
            Presence::Gone => Fenced::Done,
            Presence::Present | Presence::Unknown => Fenced::MustWait,
        })
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let op = "discard";
        let size = self.geometry().size;
        let short = usize::try_from(len).map_err(|_| DevError::Range { op, offset, len: usize::MAX, size })?;
        self.check(op, offset, [short])?;
        self.check_writable(op, offset, short)?;
        if len == 0 {
            return Ok(());
        }
        let permit = self.permit();
        let block = self.block;
        let punch = move |file: &File| match block {
            true => sys::discard(file, offset, len, permit.as_deref()),
            false => sys::punch(file, offset, len, permit.as_deref()),
        };
        self.blocking(op, offset, short, move |inner| inner.transfer(true, punch)).await
    }

    fn stats(&self) -> &DeviceStats {
        &self.stats
    }
}
