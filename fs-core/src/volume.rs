//! The volume: what a mount is, below FUSE. Joining and leaving, admission, and the loop that every operation runs in.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};

use blockdev::{BlockDevice, IoClass, StatsSnapshot};
use cluster::{ClusterError, JoinConfig, LockId, LockStats, Mode, Node, NodeId};
use journal::{Journal, JournalStats, RecordNo};
use lru::LruCache;
use parking_lot::Mutex;

use crate::alloc::Allocator;
use crate::contents::Tails;
use crate::domain::Domain;
use crate::error::{FsError, Result};
use crate::format::item::{Time, ino as make_ino, ino_domain, ino_local};
use crate::format::layout::{BLOCK, slot_domain};
use crate::format::superblock::{RO_COMPAT_KNOWN, Superblock, SuperblockError};
use crate::grow::Size;
use crate::hold::{Entry, Hold, Ticket};
use crate::locks::WaitsFor;
use crate::recovery::JournalRecoverer;
use crate::store::Store;
use crate::txn::{Plan, Txn};
use crate::types::*;

/// As many files may be between their fsync and the name that makes them known.
const SYNCED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// The root directory's inode number.
pub const ROOT_INO: u64 = (1 << 40) | 1;

/// A result that is valid while the node holds the domains it came from. Keep it until the reply has been given to the
/// kernel: a revocation waits for that, so that nothing stale is cached afterwards.
#[derive(Debug)]
pub struct Leased<T> {
    pub value: T,
    /// The kernel may cache it without limit; false while a revocation is under way.
    pub cacheable: bool,
    /// A file that was synced got its first name since: who is told of it may take the file to be safe under that name, without a sync
    /// of the directory. Delivery agents do (Postfix's local(8) and virtual(8), procmail, maildrop). See [`Volume::commit_name`].
    pub names_synced: bool,
    pub(crate) tickets: Vec<Ticket>,
}

impl<T> Leased<T> {
    pub(crate) fn new(value: T, tickets: Vec<Ticket>) -> Self {
        Self { value, cacheable: tickets.iter().all(Ticket::cacheable), names_synced: false, tickets }
    }

    /// What was so a moment ago, after the operation had begun: true enough as its result, and not to be cached.
    pub fn past(value: T) -> Self {
        Self { value, cacheable: false, names_synced: false, tickets: Vec::new() }
    }

    /// Another value, still under the same tickets.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Leased<U> {
        let Self { value, cacheable, names_synced, tickets } = self;
        Leased { value: f(value), cacheable, names_synced, tickets }
    }
}

/// What an abandoned volume leaves to its successor on the same mount.
#[derive(Clone, Debug, Default)]
pub struct Remains {
    /// Open files and directories by inode number, and how often each is open.
    pub open: BTreeMap<u64, u32>,
    /// Domains with acknowledged changes that were not durable yet: whoever asks for their durability must get an error.
    pub lost: BTreeSet<u32>,
    /// Files whose contents were not all written.
    pub lost_files: BTreeSet<u64>,
    /// Files on which processes had locks: others may have had them since.
    pub unlocked: BTreeSet<u64>,
}

/// Why a volume cannot be mounted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MountError {
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("the device has {have} bytes, the volume needs {need}: it was truncated, or the wrong device is named")]
    TooSmall { have: u64, need: u64 },
    #[error(
        "the volume has features that this clusterfs does not know ({features:#x}): upgrade this host's clusterfs, or mount it with -o ro"
    )]
    ReadOnlyFeatures { features: u64 },
    #[error("the volume was made for {volume}-byte sectors, the device has {device}-byte ones")]
    SectorSize { volume: u32, device: u32 },
    #[error(
        "slot {slot} was not unmounted{}, and a read-only mount replays no journal: mount the volume read-write once, or run fsck.clusterfs -p",
        if host.is_empty() { String::new() } else { format!(" (host {host})") }
    )]
    Unclean { slot: u16, host: String },
}

pub struct Volume {
    pub(crate) size: Mutex<Size>,
    /// As it was at the mount.
    pub(crate) superblock: Superblock,
    pub(crate) node: Arc<Node>,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) journal: Arc<Journal>,
    pub(crate) store: Store,
    pub(crate) alloc: Allocator,
    pub(crate) kernel: Arc<dyn KernelCache>,
    pub(crate) clock: Arc<dyn WallClock>,
    pub(crate) read_only: bool,
    pub(crate) atime: Atime,
    pub(crate) dirty_limit: usize,
    /// Bytes of contents that the journal has not got yet.
    pub(crate) dirty_bytes: AtomicUsize,
    /// Inodes synced lately and not named since, by [`Volume::fsync`] and `named`; directories among them.
    pub(crate) synced: Mutex<LruCache<u64, ()>>,
    pub(crate) tails: Arc<Tails>,
    pub(crate) domains: Mutex<BTreeMap<u32, Arc<Domain>>>,
    pub(crate) groups: Mutex<BTreeMap<u32, Arc<Hold>>>,
    /// Whom processes here wait for with their file locks.
    pub(crate) waits_for: WaitsFor,
    /// Domains that this slot's own one notes (see [`crate::unnamed`]).
    pub(crate) unnamed: Mutex<BTreeSet<u32>>,
    /// Lives of vacant slots that are known to have ended.
    pub(crate) seen_vacant: Mutex<BTreeSet<NodeId>>,
    /// One search for space at a time.
    pub(crate) searching: tokio::sync::Mutex<()>,
    /// When the frees of slots that nobody lives in were last carried out, for want of space.
    pub(crate) freed_for_the_gone: Mutex<Option<tokio::time::Instant>>,
    /// One flush for want of memory at a time.
    pub(crate) flushing: tokio::sync::Mutex<()>,
    /// Why the volume can do nothing any more.
    failed: tokio::sync::watch::Sender<Option<FsError>>,
    pub(crate) stop: tokio::sync::watch::Sender<bool>,
    /// Shared by what goes on after last closes and deaths: an unmount waits for that, as nobody else would free what was left later.
    pub(crate) closing: Arc<tokio::sync::RwLock<()>>,
    pub(crate) me: Weak<Volume>,
}

/// Reads and checks the superblock of a device.
pub async fn read_superblock(device: &dyn BlockDevice) -> std::result::Result<Superblock, MountError> {
    // A mount that becomes a node again has had its device open for long.
    let geometry = device.look_at_size().await.map_err(FsError::from)?;
    if geometry.size < BLOCK {
        return Err(SuperblockError::Absent.into());
    }
    let block = device.read(IoClass::Meta, 0, BLOCK as usize).await.map_err(FsError::from)?;
    let sb = Superblock::decode(&block)?;
    let need = sb.blocks * BLOCK;
    if geometry.size < need {
        return Err(MountError::TooSmall { have: geometry.size, need });
    }
    if sb.sector_size < geometry.sector_size {
        return Err(MountError::SectorSize { volume: sb.sector_size, device: geometry.sector_size });
    }
    Ok(sb)
}

impl Volume {
    /// Joins the volume: claims a slot, takes over a dead one's if none is free.
    pub async fn mount(cfg: MountConfig) -> std::result::Result<Arc<Self>, MountError> {
        let superblock = read_superblock(cfg.device.as_ref()).await?;
        let unknown = superblock.ro_compat & !RO_COMPAT_KNOWN;
        if unknown != 0 && !cfg.read_only {
            return Err(MountError::ReadOnlyFeatures { features: unknown });
        }
        let layout = superblock.layout();
        let recoverer = Arc::new(JournalRecoverer::new(cfg.device.clone(), layout));
        let node = Node::join(JoinConfig {
            device: cfg.device.clone(),
            layout: layout.cluster(),
            timeouts: superblock.timeouts,
            hint_key: superblock.hint_key,
            net: cfg.net,
            host_name: cfg.host_name,
            recoverer,
            seed: cfg.seed,
        })
        .await
        .map_err(FsError::from)?;
        let device = node.guarded_device();
        let journal =
            Journal::open(device.clone(), layout.journal(node.id().slot), node.id()).await.map_err(FsError::from)?;
        let store = Store::new(device.clone(), journal.clone(), layout.volume, cfg.cache_bytes);
        let volume = Arc::new_cyclic(|me| Self {
            size: Mutex::new(Size::of(&superblock)),
            superblock,
            node: node.clone(),
            device,
            journal,
            store,
            alloc: Allocator::new(layout),
            kernel: cfg.kernel,
            clock: cfg.clock,
            read_only: cfg.read_only,
            atime: cfg.atime,
            dirty_limit: cfg.dirty_bytes,
            dirty_bytes: AtomicUsize::new(0),
            synced: Mutex::new(LruCache::new(SYNCED)),
            tails: Arc::default(),
            domains: Mutex::new(BTreeMap::new()),
            groups: Mutex::new(BTreeMap::new()),
            waits_for: WaitsFor::default(),
            unnamed: Mutex::new(BTreeSet::new()),
            seen_vacant: Mutex::new(BTreeSet::new()),
            searching: tokio::sync::Mutex::new(()),
            freed_for_the_gone: Mutex::new(None),
            flushing: tokio::sync::Mutex::new(()),
            failed: tokio::sync::watch::channel(None).0,
            stop: tokio::sync::watch::channel(false).0,
            closing: Arc::default(),
            me: me.clone(),
        });
        node.start(Arc::new(crate::revoke::Client { volume: volume.me.clone() }));
        // The root must be readable: a mount that cannot serve says so now.
        if let Err(e) = volume.getattr(ROOT_INO).await {
            let _ = volume.node.leave().await;
            return Err(e.into());
        }
        volume.start_background();
        Ok(volume)
    }

    /// Writes everything back, gives every lock up and leaves.
    pub async fn unmount(&self) -> Result<()> {
        self.stop.send_replace(true);
        let result = self.write_back_all().await;
        // What still runs in the background ends here; what it did last is lost whole.
        self.fail(FsError::Cluster(ClusterError::Leaving));
        match result {
            Ok(()) => self.node.leave().await.map_err(FsError::from),
            Err(e) => Err(e),
        }
    }

    pub fn has_failed(&self) -> bool {
        self.failed.borrow().is_some()
    }

    /// Waits until the volume can do nothing any more, and says why.
    pub async fn failed(&self) -> FsError {
        let mut failed = self.failed.subscribe();
        match failed.wait_for(Option::is_some).await.map(|e| e.clone()) {
            Ok(Some(e)) => e,
            // Not while `self` is there.
            _ => FsError::Cluster(ClusterError::Leaving),
        }
    }

    /// Ends this membership like a crash, after a failure or a lapse: no write follows (I12), the journal is left to recovery.
    pub fn abandon(&self) {
        self.stop.send_replace(true);
        self.fail(FsError::Cluster(ClusterError::Lapsed));
        self.node.abandon();
    }

    /// Once nobody uses an abandoned volume: what a new membership has to know, for those who go on using the mount.
    pub fn remains(&self) -> Remains {
        let mut left = Remains::default();
        let unsaved = self.journal.not_durable();
        for d in self.domains.lock().values() {
            let files = d.files.lock();
            for (local, file) in files.iter().filter(|(_, f)| f.opens > 0) {
                left.open.insert(make_ino(d.id, *local), file.opens);
            }
            left.unlocked.extend(d.locks.files_of(self.node()).into_iter().map(|local| make_ino(d.id, local)));
            let before = left.lost_files.len();
            left.lost_files.extend(files.iter().filter(|(_, f)| f.unsaved()).map(|(local, _)| make_ino(d.id, *local)));
            left.lost_files.extend(d.mapped.files().map(|local| make_ino(d.id, local)));
            if left.lost_files.len() > before || unsaved.contains(&d.lock_id()) {
                left.lost.insert(d.id);
            }
        }
        left
    }

    /// Counts files as open here that are open from before. One that is gone meanwhile stays gone: its users get errors.
    pub fn adopt_open(&self, open: &BTreeMap<u64, u32>) {
        for (ino, opens) in open {
            self.domain(ino_domain(*ino)).with_file(ino_local(*ino), |f| f.opens += opens);
        }
    }

    async fn write_back_all(&self) -> Result<()> {
        self.check()?;
        drop(self.closing.write().await);
        self.carry_out_all_mapped().await?;
        self.flush_everything().await?;
        self.clean_own_slot().await;
        self.flush_everything().await?;
        self.discard().await?;
        self.journal.close().await?;
        Ok(())
    }

    pub fn node(&self) -> NodeId {
        self.node.id()
    }

    /// As it was at the mount: the volume may have grown since.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Device counters of this node.
    pub fn device_stats(&self) -> StatsSnapshot {
        self.device.stats().snapshot()
    }

    pub fn lock_stats(&self) -> LockStats {
        self.node.stats()
    }

    pub fn journal_stats(&self) -> JournalStats {
        self.journal.stats()
    }

    /// The domain that this node keeps for itself.
    pub(crate) fn own_domain(&self) -> u32 {
        slot_domain(self.node().slot)
    }

    pub(crate) fn now(&self) -> Time {
        self.clock.now()
    }

    pub(crate) fn fail(&self, why: FsError) {
        let leaving = why.is_leaving();
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert(why);
            first
        });
        for d in self.domains.lock().values() {
            d.hold.lost();
        }
        for g in self.groups.lock().values() {
            g.lost();
        }
        if !leaving {
            // What it held would stay locked as long as its heart beats: the others must take over.
            self.node.lapse();
        }
    }

    /// The reason why nothing can be done any more, if there is one (I12).
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.failed.borrow() {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    pub(crate) fn domain(&self, id: u32) -> Arc<Domain> {
        self.domains.lock().entry(id).or_insert_with(|| Domain::new(id)).clone()
    }

    pub(crate) fn group_hold(&self, group: u32) -> Arc<Hold> {
        self.groups.lock().entry(group).or_insert_with(|| Hold::new(LockId::Group(group))).clone()
    }

    // ---- admission ---------------------------------------------------------------------------------------------

    /// Admits an operation, acquiring the lock if need be (I1).
    pub(crate) async fn enter(&self, hold: &Arc<Hold>, mode: Mode) -> Result<Ticket> {
        self.enter_with_pages(hold, mode, None).await
    }

    /// ... that may give the kernel pages of an inode.
    pub(crate) async fn enter_with_pages(&self, hold: &Arc<Hold>, mode: Mode, pages_of: Option<u64>) -> Result<Ticket> {
        self.check()?;
        if let Entry::Admitted(t) = self.enter_or_acquire(hold, mode, pages_of) {
            return Ok(t);
        }
        let _waiting = hold.waiting();
        hold.wait_until(|| {
            if let Err(e) = self.check() {
                return Some(Err(e));
            }
            if let Some(e) = hold.error() {
                return Some(Err(e));
            }
            match self.enter_or_acquire(hold, mode, pages_of) {
                Entry::Admitted(t) => Some(Ok(t)),
                _ => None,
            }
        })
        .await
    }

    /// Admits a revocation to another domain that it needs exclusively.
    pub(crate) async fn enter_revoking(&self, hold: &Arc<Hold>) -> Result<Ticket> {
        // Operations that the other domain's own revocation waits for may in turn wait for this one.
        tokio::select! {
            biased;
            t = self.enter(hold, Mode::Exclusive) => t,
            t = hold.wait_until(|| hold.join()) => Ok(t),
        }
    }

    fn enter_or_acquire(&self, hold: &Arc<Hold>, mode: Mode, pages_of: Option<u64>) -> Entry {
        let entry = hold.try_enter_with_pages(mode, pages_of);
        if let (Entry::Acquire(mode), Some(volume)) = (&entry, self.me.upgrade()) {
            let (mode, hold) = (*mode, hold.clone());
            tokio::spawn(async move { volume.acquire(hold, mode).await });
        }
        entry
    }

    // ---- the loop of every operation ---------------------------------------------------------------------------

    pub(crate) async fn begin(&self, plan: &Plan) -> Result<Txn<'_>> {
        if plan.writes() {
            for d in plan.domains.keys() {
                self.carry_out_mapped(&self.domain(*d)).await?;
            }
        }
        self.begin_unordered(plan).await
    }

    /// Without waiting for pages of memory maps that came before.
    pub(crate) async fn begin_unordered(&self, plan: &Plan) -> Result<Txn<'_>> {
        if plan.writes() {
            if self.read_only {
                return Err(FsError::ReadOnly);
            }
            self.journal.throttle().await.map_err(|e| self.journal_failed(e))?;
        }
        Txn::begin(self, plan).await
    }

    /// Installs a finished operation; `None`: the plan has been widened, start over.
    pub(crate) async fn finish<T>(
        &self,
        mut tx: Txn<'_>,
        result: Result<T>,
        plan: &mut Plan,
    ) -> Result<Option<Leased<T>>> {
        let result = match result {
            Ok(v) => tx.prepare().await.map(|()| v),
            e => e,
        };
        match result {
            Ok(v) => {
                let (_, tickets) = tx.install();
                Ok(Some(Leased::new(v, tickets)))
            }
            Err(FsError::NeedDomain(d)) => {
                drop(tx);
                let mode = if plan.writes() { Mode::Exclusive } else { Mode::Shared };
                plan.domains.insert(d, mode);
                Ok(None)
            }
            Err(FsError::NeedSpace(blocks)) => {
                drop(tx);
                plan.space_tries += 1;
                plan.kept = None;
                plan.kept = self.find_space(blocks, plan).await?;
                Ok(None)
            }
            Err(FsError::NeedGroup(group)) => {
                drop(tx);
                // Only to have it: the ticket is taken again when the operation starts over.
                self.enter(&self.group_hold(group), Mode::Exclusive).await?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    pub(crate) fn journal_failed(&self, e: journal::JournalError) -> FsError {
        if matches!(e, journal::JournalError::Closed) {
            return FsError::Cluster(ClusterError::Leaving);
        }
        let e = FsError::Journal(e);
        tracing::error!(node = %self.node(), "{e}");
        self.fail(e.clone());
        e
    }

    /// Makes everything installed so far durable.
    pub(crate) async fn commit(&self) -> Result<RecordNo> {
        self.check()?;
        let record = self.journal.commit().await.map_err(|e| self.journal_failed(e))?;
        self.reap();
        Ok(record)
    }

    /// Lets go of what was kept until a record is durable.
    pub(crate) fn reap(&self) {
        let durable = self.journal.durable();
        self.alloc.reap(durable);
        let domains: Vec<_> = self.domains.lock().values().cloned().collect();
        for d in domains {
            d.reap_pages(durable);
        }
    }
}
