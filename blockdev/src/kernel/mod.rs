//! SCSI disks of the host's kernel (`/dev/sdX`, dm-multipath) that several hosts share.
//!
//! | file | job |
//! |---|---|
//! | [`topology`] | which block devices are whole SCSI disks, and by which paths |
//! | [`sg`] | SG_IO |
//! | [`pass`] | commands by SG_IO, for [`crate::scsi`] |
//!
//! Reads, writes, flushes and discards are the kernel's, which chooses paths and repeats what failed on one; compare-and-write
//! and reservations are commands of our own, the same as for iSCSI disks. Two things differ from those:
//!
//! - **The kernel keeps writes for as long as it likes** (minutes, while paths are down). None of ours may be on its way when
//!   this host registers with a device, or it would be accepted although its node was fenced meanwhile: all that may write holds
//!   [`KernelDisk::gate`] for reading, and registering takes it for writing (I4, I12).
//! - **A registration is the path's**, not the mount's: this host has one key, so it has one node. The device is opened
//!   exclusively (O_EXCL), which the kernel grants once per device until the last descriptor is closed, with nothing of a dead
//!   process under way any more. By a path that came later, or came back, nothing is registered: the first write by it is
//!   refused, and if the device still has our key we register by that path too.
//!
//! A disk that announces no COMPARE AND WRITE, and everything that is not a SCSI disk, is [`crate::image`]'s, for one host.

mod pass;
mod sg;
mod topology;

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::RwLock;
use tokio::time::Instant;

use crate::image::OpenMode;
use crate::open::User;
use crate::scsi::disk::{ScsiDisk, What};
use crate::scsi::{Reply, Transfer, cdb};
use crate::{
    Abilities, AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, Geometry, IoClass, Presence,
    Registrations, Result, WritePermit, range, sys,
};
use pass::Pass;
use topology::Kind;

/// How often a heartbeat also looks at our registration.
const LOOK: Duration = Duration::from_secs(1);
/// Refusals that one operation goes through, of paths that were not registered.
const TRIES: usize = 4;

/// A shared SCSI disk of the kernel, opened by one node.
pub(crate) struct KernelDisk {
    scsi: Arc<ScsiDisk>,
    file: Arc<File>,
    /// Held for reading while something that may write is under way.
    gate: Arc<RwLock<()>>,
    permit: Mutex<Option<Arc<dyn WritePermit>>>,
    /// When our registration was last looked at.
    looked: Mutex<Instant>,
}

/// Whether a device announces COMPARE AND WRITE; asked before anything else, so that disks that are not shared (of any kind and
/// age) are asked for nothing that their own driver does not ask.
fn announces_compare_and_write(name: &Path) -> std::result::Result<bool, String> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(name).map_err(|e| e.to_string())?;
    let answer = || Transfer::In(vec![AlignedBuf::zeroed(252)]);
    match sg::execute(&file, cdb::inquiry(Some(0xb0)), answer()) {
        Ok(Reply::Good { bufs, received }) => {
            let page = bufs.first().map(|b| &b[..received.min(b.len())]).unwrap_or_default();
            Ok(cdb::limits(page).compare_and_write > 0)
        }
        Ok(Reply::Lost { .. } | Reply::Busy) => Err("the device does not answer".into()),
        Ok(_) => Ok(false),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Err("SCSI commands are root's to send".into()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(false),
        Err(e) => Err(e.to_string()),
    }
}

/// Opens a SCSI disk that can be shared; `None`: it is another kind of device, or there is none. Errors are sentences for the user.
pub(crate) async fn open(
    name: &Path,
    user: User,
    mode: OpenMode,
) -> std::result::Result<Option<Arc<KernelDisk>>, String> {
    let Ok(meta) = fs::metadata(name) else { return Ok(None) };
    if !meta.file_type().is_block_device() {
        return Ok(None);
    }
    let multipath = match topology::kind(meta.rdev()) {
        Kind::Disk => None,
        Kind::Multipath { sysfs } => Some(sysfs),
        Kind::Other => return Ok(None),
    };
    let asked = name.to_owned();
    let shared = tokio::task::spawn_blocking(move || announces_compare_and_write(&asked)).await;
    if !shared.map_err(|e| e.to_string())?? {
        return Ok(None);
    }
    let alone = match user {
        User::Node | User::Tool => libc::O_EXCL,
        User::BesideNode | User::Reader => 0,
    };
    let file = File::options()
        .read(true)
        .write(mode == OpenMode::ReadWrite)
        .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK | alone)
        .open(name)
        .map_err(|e| match e.kind() {
            ErrorKind::ResourceBusy => "this host uses the device already: it is mounted, checked, or part of another \
                                        device (a SCSI disk of the kernel is one node's per host, see docs/SAN.md)"
                .to_string(),
            _ => e.to_string(),
        })?;
    let end = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let (file, gate) = (Arc::new(file), Arc::new(RwLock::new(())));
    let pass = Arc::new(Pass::new(file.clone(), multipath, gate.clone()));
    let scsi = ScsiDisk::open(pass, mode).await.map_err(|e| match e {
        DevError::Io { source, len: 0, .. } => source.to_string(),
        e => e.to_string(),
    })?;
    // Commands that go to another device than reads and writes would be the end of both.
    if scsi.geometry().size != end {
        return Err(format!("the kernel says {end} bytes, the device {}: rescan it", scsi.geometry().size));
    }
    if scsi.check_for_nodes().is_err() {
        return Ok(None);
    }
    let looked = Mutex::new(Instant::now());
    Ok(Some(Arc::new(KernelDisk { scsi, file, gate, permit: Mutex::default(), looked })))
}

/// What an error of the kernel says of a write or a flush.
fn of_write(what: What, error: io::Error) -> DevError {
    if sys::is_refusal(&error) {
        return DevError::Fenced;
    }
    match error.raw_os_error() {
        // The device's own word, or the kernel's before it sent anything.
        Some(libc::EREMOTEIO | libc::ENODATA | libc::EILSEQ | libc::ENOSPC | libc::EOPNOTSUPP | libc::EINVAL) => {
            what.error(error)
        }
        _ => {
            tracing::warn!("{} of {} bytes at offset {}: {error}", what.op, what.len, what.offset);
            what.unknown()
        }
    }
}

/// RESERVATION CONFLICT, as the block layer puts it.
fn is_conflict(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADE)
}

impl KernelDisk {
    /// Runs `work` on a blocking thread, which goes on when the caller is dropped. `under_way` tells that it may write.
    async fn blocking<T: Send + 'static>(
        &self,
        what: What,
        writes: bool,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<io::Result<T>> {
        let under_way = if writes { Some(self.gate.clone().read_owned().await) } else { None };
        let file = self.file.clone();
        let run = move || {
            let done = work(&file);
            drop(under_way);
            done
        };
        tokio::task::spawn_blocking(run).await.map_err(|_| what.unknown())
    }

    /// The rule of all devices; what lies beyond the end may be there since the disk was enlarged.
    async fn check(&self, op: &'static str, offset: u64, lens: &[usize]) -> Result<usize> {
        match range::check(op, &self.geometry(), offset, lens.iter().copied()) {
            Err(DevError::Range { .. }) => range::check(op, &self.look_at_size().await?, offset, lens.iter().copied()),
            checked => checked,
        }
    }

    /// What changes the device, with [`sys`]: tried again by paths that were not registered.
    async fn change(
        &self,
        what: What,
        work: impl Fn(&File, Option<&dyn WritePermit>) -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<()> {
        self.scsi.check_writable(what)?;
        for _ in 0..TRIES {
            if self.scsi.is_cut_off() {
                return Err(DevError::Fenced);
            }
            let (work, permit) = (work.clone(), self.permit.lock().clone());
            match self.blocking(what, true, move |file| work(file, permit.as_deref())).await? {
                Ok(()) => return Ok(()),
                Err(e) if is_conflict(&e) => self.register_by_new_paths(what).await?,
                Err(e) => return Err(of_write(what, e)),
            }
        }
        Err(self.scsi.reserved(what))
    }

    /// After a refusal. An error: it was not for a path that is not registered.
    async fn register_by_new_paths(&self, what: What) -> Result<()> {
        let _nothing_under_way = self.gate.write().await;
        if self.permit.lock().as_ref().is_some_and(|p| !p.valid()) {
            return Err(DevError::Fenced);
        }
        if !self.scsi.is_registered() {
            return Err(self.scsi.reserved(what));
        }
        self.scsi.register_again().await?;
        tracing::warn!(
            "the device refused a write of this node, but knows its registration: registered by each path again"
        );
        Ok(())
    }

    /// With a heartbeat now and then: a device that lost its registrations would let everybody write.
    async fn look_now_and_then(&self) -> Result<()> {
        {
            let mut looked = self.looked.lock();
            if looked.elapsed() < LOOK {
                return Ok(());
            }
            *looked = Instant::now();
        }
        match self.scsi.look_at_registration().await {
            Err(e) if !matches!(e, DevError::Fenced) => {
                tracing::warn!("{e}");
                Ok(())
            }
            looked => looked,
        }
    }
}

#[async_trait]
impl BlockDevice for KernelDisk {
    fn geometry(&self) -> Geometry {
        self.scsi.geometry()
    }

    /// What counts is how large the kernel takes the disk to be: reads and writes go through it. It looks again when told to
    /// (`rescan` in the device's directory in /sys).
    async fn look_at_size(&self) -> Result<Geometry> {
        let (what, sector_size) = (What::new("measuring"), self.geometry().sector_size);
        let size = self.blocking(what, false, move |file| sys::size_of(file, sector_size)).await?;
        self.scsi.has_size(size.map_err(|e| what.error(e))?);
        Ok(self.geometry())
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let op = "read";
        let len = self.check(op, offset, lens).await?;
        self.stats().count_read(class, len);
        let mut bufs: Vec<_> = lens.iter().map(|len| AlignedBuf::zeroed(*len)).collect();
        let what = What { op, offset, len };
        let read = self.blocking(what, false, move |file| sys::read(file, offset, &mut bufs).map(|()| bufs)).await?;
        read.map_err(|e| if is_conflict(&e) { self.scsi.reserved(what) } else { what.error(e) })
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        let op = "write";
        let lens: Vec<usize> = bufs.iter().map(|b| b.len()).collect();
        let len = self.check(op, offset, &lens).await?;
        self.stats().count_write(class, len);
        let fua = fua && self.geometry().write_cache;
        let bufs = Arc::new(bufs);
        self.change(What { op, offset, len }, move |file, permit| sys::write(file, offset, &bufs, fua, permit)).await?;
        if class == IoClass::Liveness { self.look_now_and_then().await } else { Ok(()) }
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.stats().count_flush(class);
        if !self.geometry().write_cache {
            return Ok(());
        }
        if self.scsi.is_cut_off() {
            return Err(DevError::Fenced);
        }
        let what = What::new("flush");
        for _ in 0..TRIES {
            match self.blocking(what, true, File::sync_data).await? {
                // Found while it ran: what it was to make durable may be gone.
                Ok(()) if self.scsi.is_cut_off() => return Err(DevError::Fenced),
                Ok(()) => return Ok(()),
                Err(e) if is_conflict(&e) => self.register_by_new_paths(what).await?,
                Err(e) => return Err(what.error(e)),
            }
        }
        Err(self.scsi.reserved(what))
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let what = What { op: "compare-and-write", offset, len: new.len() };
        if self.scsi.is_cut_off() {
            return Err(DevError::Fenced);
        }
        let mut done = self.scsi.compare_and_write(offset, expect, new).await;
        for _ in 0..TRIES {
            match done {
                Err(DevError::Fenced) => self.register_by_new_paths(what).await?,
                done => return done,
            }
            done = self.scsi.compare_and_write(offset, expect, new).await;
        }
        done
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        let _nothing_under_way = self.gate.write().await;
        self.scsi.register(key).await
    }

    fn set_permit(&self, permit: Arc<dyn WritePermit>) {
        *self.permit.lock() = Some(permit.clone());
        self.scsi.set_permit(permit);
    }

    async fn unregister(&self) -> Result<()> {
        let _nothing_under_way = self.gate.write().await;
        self.scsi.unregister().await
    }

    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        self.scsi.presence(key).await
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        self.scsi.fence(key).await
    }

    async fn evict_others(&self) -> Result<()> {
        self.scsi.evict_others().await
    }

    async fn registrations(&self) -> Result<Option<Registrations>> {
        self.scsi.registrations().await
    }

    fn abilities(&self) -> Option<Abilities> {
        self.scsi.abilities()
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let op = "discard";
        let size = self.geometry().size;
        let short = usize::try_from(len).map_err(|_| DevError::Range { op, offset, len: usize::MAX, size })?;
        range::check(op, &self.geometry(), offset, [short])?;
        if len == 0 {
            return Ok(());
        }
        let what = What { op, offset, len: short };
        self.change(what, move |file, permit| sys::discard(file, offset, len, permit)).await
    }

    fn stats(&self) -> &DeviceStats {
        self.scsi.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_writes_are_certain_or_unknown() {
        let what = What { op: "write", offset: 4096, len: 512 };
        let told = |errno| of_write(what, io::Error::from_raw_os_error(errno));
        for errno in [libc::EREMOTEIO, libc::ENODATA, libc::ENOSPC, libc::EINVAL] {
            assert!(matches!(told(errno), DevError::Io { offset: 4096, .. }), "{errno}");
        }
        for errno in [libc::EIO, libc::ETIMEDOUT, libc::ENOLINK, libc::EAGAIN, libc::ENODEV] {
            assert!(matches!(told(errno), DevError::Unknown { .. }), "{errno}");
        }
        assert!(matches!(of_write(what, io::Error::other(sys::Refused)), DevError::Fenced));
    }

    #[tokio::test]
    async fn what_is_no_scsi_disk_is_left_to_others() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for name in [file.path(), Path::new("/no/such/device"), Path::new("/dev/null")] {
            assert!(open(name, User::Node, OpenMode::ReadWrite).await.unwrap().is_none(), "{}", name.display());
        }
    }
}
