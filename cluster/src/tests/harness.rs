//! Sets up volumes and nodes, and watches over the invariants; assertions of scenarios are in the scenarios.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use blockdev::sim::{SimConfig, SimDisk, SimNode};
use blockdev::{AlignedBuf, BlockDevice, FencingKind, IoClass};
use parking_lot::Mutex;
use tokio::time::{Duration, Instant};

use crate::simnet::{SimNet, SimPort};
use crate::*;

pub const GROUPS: u32 = 4;
pub const DOMAINS: u32 = 60;

pub fn layout(nodes: u16) -> Layout {
    let (n, stride) = (u64::from(nodes), 512);
    let slots = 4096;
    let heartbeats = slots + n * stride;
    let doorbells = heartbeats + n * stride;
    let locks = doorbells + n * n * stride;
    Layout {
        volume: 77,
        stride,
        nodes,
        slots,
        heartbeats,
        doorbells,
        locks,
        groups: GROUPS,
        domain_locks: DomainLocks {
            first: locks + u64::from(GROUPS) * stride,
            per_group: DOMAINS / GROUPS,
            distance: u64::from(DOMAINS / GROUPS) * stride,
        },
        plain: None,
    }
}

/// One volume, its device and network.
pub struct World {
    pub disk: Arc<SimDisk>,
    pub net: Arc<SimNet>,
    pub layout: Layout,
    pub timeouts: Timeouts,
    /// Checks I4.
    pub oracle: Arc<Oracle>,
    /// Replays begun and ended.
    pub replays: Arc<Replays>,
    seed: std::sync::atomic::AtomicU64,
}

/// Checks I4 against what the nodes' memories say at the moment of each grant.
#[derive(Default)]
pub struct Oracle {
    nodes: Mutex<BTreeMap<NodeId, Weak<Node>>>,
}

impl Oracle {
    fn add(&self, node: &Arc<Node>) {
        self.nodes.lock().insert(node.id(), Arc::downgrade(node));
    }

    pub fn check(&self, id: LockId) {
        let nodes: Vec<_> = self.nodes.lock().values().filter_map(Weak::upgrade).collect();
        let held: Vec<_> = nodes.iter().filter_map(|n| Some((n.id(), n.held(id)?.mode))).collect();
        let exclusive = held.iter().any(|(_, mode)| *mode == Mode::Exclusive);
        assert!(!exclusive || held.len() == 1, "I4: {id} held by {held:?}");
    }

    /// A dead node's memory says nothing.
    pub fn drop_node(&self, node: NodeId) {
        self.nodes.lock().remove(&node);
    }
}

#[derive(Default)]
pub struct Replays {
    pub log: Mutex<Vec<(NodeId, Instant)>>,
    pub running: Mutex<BTreeMap<Slot, usize>>,
    pub most: Mutex<usize>,
}

pub struct TestRecoverer {
    pub replays: Arc<Replays>,
    pub takes: Duration,
    /// Fail this many times first.
    pub failures: Mutex<u32>,
    /// For replaying with, as the real one does: a write that must not go through once we lapsed.
    pub device: Mutex<Option<Arc<dyn BlockDevice>>>,
}

struct Running<'a>(&'a Replays, Slot);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(n) = self.0.running.lock().get_mut(&self.1) {
            *n -= 1;
        }
    }
}

#[async_trait]
impl Recoverer for TestRecoverer {
    fn attach(&self, guarded: Arc<dyn BlockDevice>) {
        *self.device.lock() = Some(guarded);
    }

    async fn replay(&self, dead: NodeId) -> std::result::Result<(), String> {
        self.replays.log.lock().push((dead, Instant::now()));
        let now = {
            let mut running = self.replays.running.lock();
            let n = running.entry(dead.slot).or_default();
            *n += 1;
            *n
        };
        let _running = Running(&self.replays, dead.slot);
        {
            let mut most = self.replays.most.lock();
            *most = now.max(*most);
        }
        tokio::time::sleep(self.takes).await;
        let mut failures = self.failures.lock();
        if *failures > 0 {
            *failures -= 1;
            return Err("injected".into());
        }
        Ok(())
    }
}

/// How a client reacts to a demand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    /// Release as wanted, after this time.
    Polite(Duration),
    /// Never.
    Stubborn,
}

pub struct Client {
    node: Mutex<Weak<Node>>,
    oracle: Arc<Oracle>,
    pub manners: Manners,
    pub open: Mutex<std::collections::BTreeSet<LockId>>,
    pub demands: Mutex<Vec<(LockId, Mode)>>,
    pub recovered: Mutex<Vec<(NodeId, Instant)>>,
    pub lapsed: Mutex<Option<Instant>>,
    /// Pinned locks are being used: a release waits.
    pub pins: Arc<tokio::sync::Mutex<()>>,
}

impl LockClient for Client {
    fn demand(&self, id: LockId, wanted: Mode) {
        self.demands.lock().push((id, wanted));
        let Manners::Polite(after) = self.manners else { return };
        let Some(node) = self.node.lock().upgrade() else { return };
        let (oracle, pins) = (self.oracle.clone(), self.pins.clone());
        let open = self.open.lock().contains(&id);
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let _pin = pins.lock().await;
            let Some(grant) = node.held(id) else { return };
            let to = (wanted == Mode::Shared && grant.mode == Mode::Exclusive).then_some(Mode::Shared);
            let _ = node.release(id, Release { to, value: None, open, cleaned: true }).await;
            oracle.check(id);
        });
    }

    fn recovered(&self, dead: NodeId) {
        self.recovered.lock().push((dead, Instant::now()));
    }

    fn lapsed(&self) {
        *self.lapsed.lock() = Some(Instant::now());
        if let Some(node) = self.node.lock().upgrade() {
            self.oracle.drop_node(node.id());
        }
    }
}

/// A node with everything around it.
pub struct Peer {
    pub node: Arc<Node>,
    pub dev: Arc<SimNode>,
    pub port: Option<Arc<SimPort>>,
    pub client: Arc<Client>,
    oracle: Arc<Oracle>,
}

impl Peer {
    pub fn id(&self) -> NodeId {
        self.node.id()
    }

    /// Acquires and tells the oracle.
    pub async fn take(&self, id: LockId, mode: Mode) -> Grant {
        let grant = self.node.acquire(id, mode).await.unwrap();
        self.oracle.check(id);
        grant
    }

    pub async fn give(&self, id: LockId, to: Option<Mode>) {
        self.give_with(id, Release { to, value: None, open: false, cleaned: true }).await;
    }

    pub async fn give_with(&self, id: LockId, how: Release) {
        self.node.release(id, how).await.unwrap();
    }

    pub fn io(&self) -> blockdev::ClassStats {
        self.dev.stats().snapshot().class(IoClass::Lock)
    }

    /// The process dies.
    pub fn crash(self) -> NodeId {
        let id = self.id();
        self.dev.crash();
        self.oracle.drop_node(id);
        id
    }
}

pub struct Options {
    pub hints: bool,
    pub manners: Manners,
    pub replay_takes: Duration,
    pub failures: u32,
    pub name: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hints: true,
            manners: Manners::Polite(Duration::ZERO),
            replay_takes: Duration::from_millis(50),
            failures: 0,
            name: "host",
        }
    }
}

impl World {
    pub async fn new(nodes: u16, seed: u64) -> Self {
        Self::with(nodes, seed, |_| {}).await
    }

    pub async fn fenced_by(nodes: u16, seed: u64, fencing: FencingKind) -> Self {
        Self::with(nodes, seed, |cfg| cfg.fencing = fencing).await
    }

    /// A volume that is locked without compare-and-write.
    pub async fn plain(nodes: u16, seed: u64, change: impl FnOnce(&mut SimConfig)) -> Self {
        let mut w = Self::with(nodes, seed, |cfg| {
            cfg.fencing = FencingKind::None;
            change(cfg);
        })
        .await;
        w.layout.plain = Some(512 << 10);
        w
    }

    pub async fn with(nodes: u16, seed: u64, change: impl FnOnce(&mut SimConfig)) -> Self {
        let mut cfg = SimConfig::new(1 << 20, seed);
        change(&mut cfg);
        let disk = SimDisk::new(cfg);
        let layout = layout(nodes);
        let raw = disk.open_raw();
        for slot in 0..nodes {
            put(&*raw, layout.slot_block(slot), initial_slot_block(&layout, slot)).await;
        }
        let domains = (0..DOMAINS / 2).map(LockId::Domain);
        for id in (0..GROUPS).map(LockId::Group).chain(domains) {
            let block = initial_lock_block(&layout, id, LockValue { root: 1000, next_local: 7, version: 0 });
            put(&*raw, layout.lock_block(id).unwrap(), block).await;
        }
        Self {
            disk,
            net: SimNet::new(seed ^ 1),
            layout,
            timeouts: Timeouts { queue_ms: 20_000, ..Timeouts::default() },
            oracle: Arc::default(),
            replays: Arc::default(),
            seed: (seed << 8).into(),
        }
    }

    pub async fn peer(&self) -> Peer {
        self.peer_with(Options::default()).await.unwrap()
    }

    pub async fn peer_with(&self, options: Options) -> Result<Peer> {
        let dev = self.disk.open(options.name);
        self.peer_on(dev, options).await
    }

    pub async fn peer_on(&self, dev: Arc<SimNode>, options: Options) -> Result<Peer> {
        let port = options.hints.then(|| self.net.open());
        let recoverer = Arc::new(TestRecoverer {
            replays: self.replays.clone(),
            takes: options.replay_takes,
            failures: Mutex::new(options.failures),
            device: Mutex::new(None),
        });
        let cfg = JoinConfig {
            device: dev.clone(),
            layout: self.layout,
            timeouts: self.timeouts,
            hint_key: [5; 32],
            net: port.clone().map(|p| p as Arc<dyn HintNet>),
            host_name: options.name.into(),
            recoverer: recoverer.clone(),
            seed: self.seed.fetch_add(1, std::sync::atomic::Ordering::SeqCst),
        };
        let node = Node::join(cfg).await?;
        let client = Arc::new(Client {
            node: Mutex::new(Arc::downgrade(&node)),
            oracle: self.oracle.clone(),
            manners: options.manners,
            open: Mutex::default(),
            demands: Mutex::default(),
            recovered: Mutex::default(),
            lapsed: Mutex::default(),
            pins: Arc::default(),
        });
        self.oracle.add(&node);
        node.start(client.clone());
        Ok(Peer { node, dev, port, client, oracle: self.oracle.clone() })
    }

    pub fn slot(&self, slot: Slot) -> SlotBlock {
        let sector = self.disk.read_raw(self.layout.slot_block(slot), 512);
        SlotBlock::decode(&sector, self.layout.volume, slot).unwrap()
    }

    pub fn lock(&self, id: LockId) -> LockBlock {
        let sector = self.disk.read_raw(self.layout.lock_block(id).unwrap(), 512);
        LockBlock::decode(&sector, self.layout.volume, id).unwrap()
    }
}

pub async fn put(dev: &dyn BlockDevice, offset: u64, bytes: Vec<u8>) {
    dev.write(IoClass::Meta, offset, Arc::new(AlignedBuf::copy_of(&bytes)), true).await.unwrap();
}

/// Waits until `done`, at most `limit`.
pub async fn until(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
