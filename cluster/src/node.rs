//! One mount's membership: what its parts share, and its public face.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use blockdev::{AlignedBuf, BlockDevice, Caw, DevError, IoClass};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use crate::format::SlotBlock;
use crate::hints::ReplayWindow;
use crate::lease::{Guarded, Lease};
use crate::locks::Local;
use crate::plain::PlainLocks;
use crate::stats::{Counters, LockStats};
use crate::table::{Life, SlotTable};
use crate::watched::Watched;
use crate::{
    ClusterError, Grant, HintNet, JoinConfig, Layout, LockBlock, LockClient, LockId, LockValue, Mode, NodeId,
    Recoverer, Release, Result, Slot, Timeouts, doorbell, transitions,
};

/// The life of a mount as it sees it itself. Moves only rightwards: `Live` to `Leaving` to `Left`, any to `Lapsed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Live,
    /// Unmounting: no new waits, held locks still count.
    Leaving,
    Left,
    /// The lease is over, or another node took the slot.
    Lapsed,
}

/// What the tasks of a node share. Tasks hold this, not [`Node`], so that dropping the node ends them.
pub(crate) struct Shared {
    pub me: NodeId,
    pub dev: Arc<Guarded>,
    /// Where compare-and-write is our own.
    pub plain: Option<PlainLocks>,
    pub lease: Arc<Lease>,
    pub layout: Layout,
    pub timeouts: Timeouts,
    pub hint_key: [u8; 32],
    pub net: Option<Arc<dyn HintNet>>,
    pub recoverer: Arc<dyn Recoverer>,
    pub client: OnceLock<Arc<dyn LockClient>>,
    pub state: Watched<State>,
    pub rng: Mutex<StdRng>,
    pub table: Mutex<SlotTable>,
    /// Bumped when the table learned that something ended, or of new nodes.
    pub table_version: Watched<u64>,
    pub locks: Mutex<BTreeMap<LockId, Local>>,
    pub bells: Mutex<BTreeMap<Slot, Arc<doorbell::Bell>>>,
    /// Hints of these nodes' slots arrive; the doorbell can wait a little.
    pub hints_work: Mutex<BTreeMap<Slot, bool>>,
    pub hint_counter: Mutex<u64>,
    pub hint_windows: Mutex<BTreeMap<Slot, ReplayWindow>>,
    /// Recoveries under way here, by victim.
    pub recovering: Watched<std::collections::BTreeSet<Slot>>,
    /// Slots whose locks nobody can free for now, and why: waiting for them is given up.
    pub stuck: Mutex<BTreeMap<Slot, ClusterError>>,
    pub stats: Counters,
    pub tasks: Mutex<JoinSet<()>>,
}

impl Shared {
    /// Never another node's, whatever the seeds: the low bits are the slot's (I9).
    pub fn nonce(&self) -> u64 {
        self.rng.lock().next_u64() << 8 | u64::from(self.me.slot)
    }

    pub fn jitter(&self, most: Duration) -> Duration {
        let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(self.rng.lock().random_range(0..micros))
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while let Some(ended) = tasks.try_join_next() {
            if let Err(e) = ended
                && e.is_panic()
            {
                tracing::error!(node = %self.me, "a task of the cluster layer failed: {e}");
            }
        }
        tasks.spawn(task);
    }

    pub fn live(&self) -> Result<()> {
        match *self.state.borrow() {
            State::Live if self.lease.valid() => Ok(()),
            State::Live | State::Lapsed => Err(ClusterError::Lapsed),
            State::Leaving | State::Left => Err(ClusterError::Leaving),
        }
    }

    /// Like [`live`](Self::live), but a leaving node may still give up what it holds.
    pub fn may_release(&self) -> Result<()> {
        match *self.state.borrow() {
            State::Live | State::Leaving if self.lease.valid() => Ok(()),
            State::Live | State::Leaving | State::Lapsed => Err(ClusterError::Lapsed),
            State::Left => Err(ClusterError::Leaving),
        }
    }

    /// Why the node is no member any more: it may have left in order while something was under way.
    pub fn ended(&self) -> ClusterError {
        match *self.state.borrow() {
            State::Left => ClusterError::Leaving,
            _ => ClusterError::Lapsed,
        }
    }

    /// Waits until the node is no longer live and tells why.
    pub async fn not_live(&self) -> ClusterError {
        match self.state.wait_for(|s| *s != State::Live).await {
            State::Leaving | State::Left => ClusterError::Leaving,
            _ => ClusterError::Lapsed,
        }
    }

    /// Writes stop now, the locks are gone, the client is told (I12).
    pub fn lapse(&self, why: &str) {
        self.lease.end();
        let first = self.state.modify_if(|s| {
            let first = !matches!(s, State::Lapsed | State::Left);
            if first {
                *s = State::Lapsed;
            }
            first
        });
        if !first {
            return;
        }
        tracing::error!(node = %self.me, "lapsed: {why}");
        self.locks.lock().clear();
        if let Some(client) = self.client.get() {
            client.lapsed();
        }
    }

    /// Puts device errors into our terms; being fenced means to lapse.
    pub fn device_error(&self, e: DevError) -> ClusterError {
        if matches!(e, DevError::Fenced) {
            self.lapse("the device refuses our writes");
            return self.ended();
        }
        e.into()
    }

    /// Takes in a slot block.
    pub fn learn(&self, block: SlotBlock) {
        if self.table.lock().learn(block) {
            self.table_version.modify(|v| *v += 1);
            if let Some(client) = self.client.get() {
                client.slots_changed();
            }
        }
    }

    /// Changes a slot block from `expect` to `new`. `Ok(None)`: done. `Ok(Some)`: it holds something else.
    pub async fn change_slot(&self, expect: &SlotBlock, new: &SlotBlock) -> Result<Option<SlotBlock>> {
        let pause = self.timeouts.doorbell();
        change_slot(&*self.dev, &self.layout, expect, new, pause).await.map_err(|e| match e {
            ClusterError::Device(e) => self.device_error(e),
            e => e,
        })
    }

    /// Gives up the device's registration once nothing of ours can arrive any more, so that others need not wait for
    /// our lease.
    pub async fn unregister_when_quiet(&self) {
        self.unregister_when(Lease::quiet).await;
    }

    async fn unregister_when(&self, harmless: impl Fn(&Lease) -> bool) {
        // After this long nothing is gained by it: the others have waited out the lease.
        let end = Instant::now() + self.timeouts.dead_unfenced();
        while Instant::now() < end {
            if harmless(&self.lease) {
                if let Err(e) = self.dev.inner.unregister().await {
                    tracing::warn!(node = %self.me, "cannot take back the registration: {e}");
                }
                return;
            }
            tokio::time::sleep(self.timeouts.heartbeat() / 4).await;
        }
    }
}

/// The sector of slot `slot`, decoded.
pub(crate) fn decode_slot(layout: &Layout, slot: Slot, sector: &[u8]) -> Result<SlotBlock> {
    SlotBlock::decode(sector, layout.volume, slot).map_err(|e| ClusterError::Damaged {
        what: format!("block of slot {slot} ({e})"),
        offset: layout.slot_block(slot),
    })
}

/// Reads one record per node from `offset`, in one operation.
pub(crate) async fn read_table(
    dev: &dyn BlockDevice,
    layout: &Layout,
    offset: u64,
) -> std::result::Result<Vec<AlignedBuf>, DevError> {
    let lens = vec![usize::try_from(layout.stride).unwrap_or(usize::MAX); usize::from(layout.nodes)];
    dev.readv(IoClass::Liveness, offset, &lens).await
}

/// Compare-and-write of a slot block whose outcome is certain when it returns (I9): after an unknown outcome the same
/// attempt is repeated until the sector shows its nonce or something else.
pub(crate) async fn change_slot(
    dev: &dyn BlockDevice,
    layout: &Layout,
    expect: &SlotBlock,
    new: &SlotBlock,
    pause: Duration,
) -> Result<Option<SlotBlock>> {
    let offset = layout.slot_block(new.slot);
    let (old, sector) = (expect.encode(layout.stride), new.encode(layout.stride));
    let mut tries = 0;
    loop {
        let found = match dev.compare_and_write(offset, &old, &sector).await {
            Ok(Caw::Written) => return Ok(None),
            Ok(Caw::Mismatch(found)) => found,
            Err(e @ (DevError::Fenced | DevError::Range { .. })) => return Err(e.into()),
            Err(e) => {
                tracing::warn!(slot = new.slot, "slot block: {e}");
                tokio::time::sleep(pause).await;
                match dev.read(IoClass::Lock, offset, old.len()).await {
                    Ok(found) => found.to_vec(),
                    // Nothing is known: the lease bounds how long this goes on.
                    Err(_) => old.clone(),
                }
            }
        };
        tries += 1;
        if found == old {
            // A miscompare under load, or an attempt that has not arrived.
            if tries > 100 {
                let e = DevError::Unknown { op: "compare-and-write", offset, len: old.len() };
                return Err(e.into());
            }
            tokio::time::sleep(pause.min(Duration::from_millis(5))).await;
            continue;
        }
        let found = decode_slot(layout, new.slot, &found)?;
        return Ok((found.nonce != new.nonce).then_some(found));
    }
}

/// One mount's membership of a volume. Dropping it ends its tasks, like a crash: the others recover its slot.
pub struct Node {
    pub(crate) shared: Arc<Shared>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.lease.end();
        self.shared.tasks.lock().abort_all();
    }
}

impl Node {
    /// Claims a slot: a free one, or else that of a dead node, whose journal is replayed first. Starts the heartbeat.
    pub async fn join(cfg: JoinConfig) -> Result<Arc<Node>> {
        crate::join::join(cfg).await.map(|shared| Arc::new(Node { shared }))
    }

    /// From here on other nodes' demands reach `client`, and dead nodes are recovered. Only the first call counts.
    pub fn start(self: &Arc<Self>, client: Arc<dyn LockClient>) {
        let shared = &self.shared;
        if shared.client.set(client.clone()).is_err() {
            return;
        }
        if shared.live().is_err() {
            client.lapsed();
            return;
        }
        shared.spawn(crate::monitor::run(shared.clone()));
        shared.spawn(doorbell::poll(shared.clone()));
        if let Some(net) = &shared.net {
            shared.spawn(crate::hints::receive(shared.clone(), net.clone()));
        }
    }

    pub fn id(&self) -> NodeId {
        self.shared.me
    }

    pub fn layout(&self) -> Layout {
        self.shared.layout
    }

    /// Waits until `id` is held in a mode that covers `mode`. A held grant that covers it is returned at once. One call
    /// per lock at a time. Dropping the future stops waiting; what is granted after that is given up when demanded.
    pub async fn acquire(&self, id: LockId, mode: Mode) -> Result<Grant> {
        self.shared.acquire(id, mode).await
    }

    /// Gives `id` up or lowers it, handing it to those who wait. Does nothing if it is not held. While an upgrade is in
    /// flight it keeps waiting. After an error the lock is no longer held here, whatever the disk says. The future is to be
    /// awaited to its end: dropped early, the value may not have been written.
    pub async fn release(&self, id: LockId, how: Release) -> Result<()> {
        self.shared.release(id, how).await
    }

    /// First use of a lock block, or reuse after its domain was freed: whatever is in the sector is replaced. The lock is
    /// held exclusively afterwards, with `value.root` as given and `next_local` carried on (I8).
    pub async fn create(&self, id: LockId, value: LockValue) -> Result<Grant> {
        self.shared.create(id, value).await
    }

    /// Takes back that this node has files of the domain open, said when it gave the lock up.
    pub async fn clear_open(&self, id: LockId) -> Result<()> {
        self.shared.clear_open(id).await
    }

    /// Asks another node to look at what this one changed under a lock (its client's [`LockClient::woken`]). It may come late,
    /// twice, or not at all if that node cannot be reached.
    pub fn wake(&self, node: NodeId, id: LockId) {
        self.shared.wake(node, id);
    }

    /// Whether that incarnation is known to have ended.
    pub fn has_ended(&self, node: NodeId) -> bool {
        self.shared.table.lock().ended(node)
    }

    /// What became of an incarnation, as far as is known.
    pub fn life(&self, node: NodeId) -> Life {
        self.shared.table.lock().life(node)
    }

    /// The latest lives of slots that nobody lives in now, as far as is known.
    pub fn vacant_slots(&self) -> Vec<NodeId> {
        self.shared.table.lock().vacant()
    }

    /// Whether the latest life of a vacant slot, or of this node's before its own, ended by a crash.
    pub fn crashed_before(&self) -> bool {
        self.shared.table.lock().crashed_before(self.id())
    }

    /// What this node knows of a lock block, in words.
    pub fn told_of(&self, id: LockId) -> String {
        self.shared.with_local(id, |l| {
            let held = l.held.as_ref().map(|h| (h.grant.mode, h.grant.tenure, h.demanded.map(|(mode, _)| mode)));
            let entries = l.block.as_ref().map(|b| &b.entries);
            let outdated = if l.stale { ", outdated" } else { "" };
            format!("holds (mode, tenure, demanded) {held:?}, waits for {:?}, entries{outdated} {entries:?}", l.waiting)
        })
    }

    /// The lock block as it is on disk now.
    pub async fn read_lock(&self, id: LockId) -> Result<LockBlock> {
        self.shared.read_block(id).await
    }

    /// What is held at this moment.
    pub fn held(&self, id: LockId) -> Option<Grant> {
        self.shared.live().ok()?;
        self.shared.locks.lock().get(&id)?.held.as_ref().map(|h| h.grant)
    }

    /// Ends this membership like a crash: nothing is written any more, the others recover the slot.
    pub fn abandon(&self) {
        self.shared.lapse("abandoned");
        self.shared.tasks.lock().abort_all();
        let shared = self.shared.clone();
        tokio::spawn(async move { shared.unregister_when_quiet().await });
    }

    /// The device, refusing to write once this node lapsed or left (I12).
    pub fn guarded_device(&self) -> Arc<dyn BlockDevice> {
        self.shared.dev.clone()
    }

    /// Whether this node may still use what it holds.
    pub fn is_live(&self) -> bool {
        self.shared.live().is_ok()
    }

    /// The user of the locks failed and cannot bring what they cover to its place (I3): this node ends as one that lost its lease
    /// does, and another replays its journal.
    pub fn lapse(&self) {
        self.shared.lapse("what its locks cover cannot be written");
    }

    pub fn stats(&self) -> LockStats {
        self.shared.stats.snapshot()
    }

    /// Clean unmount: ends the incarnation, and with it all its locks at once. Everything must be in its place before.
    pub async fn leave(&self) -> Result<()> {
        let shared = &self.shared;
        let begun = shared.state.modify_if(|s| {
            let live = *s == State::Live;
            if live {
                *s = State::Leaving;
            }
            live
        });
        if !begun {
            return Err(shared.live().err().unwrap_or(ClusterError::Leaving));
        }
        // A replay that we are doing must not go on after others think that we ended.
        shared.recovering.wait_for(|r| r.is_empty()).await;
        let result = shared.end_own_incarnation().await;
        if result.is_ok() {
            shared.state.replace(State::Left);
        } else {
            shared.lapse("the slot could not be given up");
        }
        shared.lease.end();
        shared.locks.lock().clear();
        // Stray writes are no reason to wait: after a write to journal or home with unknown outcome nobody leaves cleanly, and
        // compare-and-writes that arrive late change nothing (I9).
        shared.unregister_when(Lease::idle).await;
        shared.tasks.lock().abort_all();
        result
    }
}

impl Shared {
    async fn end_own_incarnation(&self) -> Result<()> {
        let offset = self.layout.slot_block(self.me.slot);
        let mut block = None;
        for _ in 0..5 {
            match self.dev.read(IoClass::Lock, offset, self.layout.stride as usize).await {
                Ok(sector) => {
                    block = Some(decode_slot(&self.layout, self.me.slot, &sector)?);
                    break;
                }
                Err(e) => {
                    tracing::warn!(node = %self.me, "own slot block: {e}");
                    tokio::time::sleep(self.timeouts.doorbell()).await;
                }
            }
        }
        let mut block = block.ok_or(ClusterError::Lapsed)?;
        loop {
            let new = transitions::left(&block, self.me, self.nonce()).ok_or(ClusterError::Lapsed)?;
            match self.change_slot(&block, &new).await? {
                None => return Ok(()),
                Some(other) => block = other,
            }
        }
    }
}
