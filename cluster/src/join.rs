//! Joining: finding a slot and starting a life in it.
//!
//! A free slot is taken at once. If there is none, a dead node's slot is adopted: its journal is replayed by the joining
//! node while the block says so, and only then its incarnation ends and ours begins. The device knows our key and the
//! heartbeat is written before the block names us, so nobody can find us dead from the start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use blockdev::{BlockDevice, DevError, IoClass};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::format::{SlotBlock, SlotState};
use crate::heartbeat::Pulse;
use crate::lease::{Guarded, Lease};
use crate::node::{Shared, State, change_slot};
use crate::plain::PlainLocks;
use crate::table::SlotTable;
use crate::transitions::{self, next_life};
use crate::watch::{Round, Verdict, Watches};
use crate::watched::Watched;
use crate::{ClusterError, JoinConfig, MAX_NODES, NodeId, Result, one_host};

/// How an attempt at one slot ended.
enum Attempt {
    Joined(Box<(Arc<Guarded>, Pulse, SlotBlock)>),
    /// Somebody else was faster, or the device says that the slot is in use.
    Taken,
}

pub(crate) async fn join(cfg: JoinConfig) -> Result<Arc<Shared>> {
    let layout = cfg.layout;
    let timeouts = cfg.timeouts;
    let geometry = cfg.device.geometry();
    if layout.nodes == 0 || usize::from(layout.nodes) > MAX_NODES || layout.stride != u64::from(geometry.sector_size) {
        let what = format!("layout ({} nodes, sectors of {} bytes)", layout.nodes, layout.stride);
        return Err(ClusterError::Damaged { what, offset: layout.slots });
    }
    let mut rng = StdRng::seed_from_u64(cfg.seed);
    let plain = layout.plain.map(|at| PlainLocks::new(cfg.device.clone(), layout, at, timeouts, rng.next_u64()));
    let device = plain.clone().map_or_else(|| cfg.device.clone(), |p| Arc::new(p));
    let mut joiner = Joiner { rng, cfg: JoinConfig { device, ..cfg }, plain };
    one_host::refuse_others(&*joiner.cfg.device, &layout, &timeouts).await?;
    let mut watches = Watches::default();
    let end = Instant::now() + timeouts.dead_unfenced() + 2 * timeouts.dead_after();
    loop {
        // Read errors are the caller's to see: without the device there is nothing to join.
        let round = Round::read(&*joiner.cfg.device, &layout).await?;
        if let Some(plain) = &joiner.plain {
            plain.watch().await;
        }
        if let Some(shared) = joiner.free_slot(&round).await? {
            return Ok(shared);
        }
        let accepted = watches.accept(&round, &timeouts);
        let mut undecided = !accepted;
        let claimer = crate::claim::claimer(round.slots.iter().flatten());
        for block in round.slots.iter().flatten() {
            if !accepted || block.writer().is_none() {
                undecided = true;
                continue;
            }
            let key = NodeId { slot: block.slot, incarnation: next_life(block) }.fence_key();
            match watches.judge(&*joiner.cfg.device, &timeouts, block, &round, Some(key)).await {
                Verdict::Alive if claimer == Some(block.slot) => {
                    return Err(ClusterError::Claimed { slot: block.slot, host: block.host_name.clone() });
                }
                Verdict::Alive => {}
                Verdict::Elsewhere => return Err(ClusterError::OtherHost { host: block.host_name.clone() }),
                Verdict::Undecided => undecided = true,
                Verdict::Dead => {
                    if let (Some(plain), Some(writer)) = (&joiner.plain, block.writer()) {
                        plain.found_dead(writer);
                    }
                    match joiner.adopt(block).await? {
                        Attempt::Joined(won) => return joiner.finish(*won, &round).await,
                        Attempt::Taken => undecided = true,
                    }
                }
            }
        }
        if !undecided || Instant::now() >= end {
            // The slot behind a damaged block may be free: that is what is to be repaired.
            let damaged = round.slots.into_iter().find_map(std::result::Result::err);
            return Err(damaged.unwrap_or(ClusterError::Full { nodes: layout.nodes }));
        }
        tokio::time::sleep(timeouts.heartbeat()).await;
    }
}

struct Joiner {
    cfg: JoinConfig,
    plain: Option<PlainLocks>,
    rng: StdRng,
}

impl Joiner {
    async fn free_slot(&mut self, round: &Round) -> Result<Option<Arc<Shared>>> {
        let mut free: Vec<&SlotBlock> = round.slots.iter().flatten().filter(|b| b.state == SlotState::Free).collect();
        // Our own last slot first: its host name tells administrators more than a shuffled table.
        free.sort_by_key(|b| (b.host_name != self.cfg.host_name, b.slot));
        let mut error = None;
        for block in free {
            match self.claim(block).await {
                Ok(Attempt::Joined(won)) => return self.finish(*won, round).await.map(Some),
                Ok(Attempt::Taken) => {}
                Err(e) => error = Some(e),
            }
        }
        error.map_or(Ok(None), Err)
    }

    /// Registers as the next life of the slot and writes its first heartbeat.
    async fn begin(&mut self, block: &SlotBlock) -> Result<Option<(Arc<Guarded>, Pulse)>> {
        let node = NodeId { slot: block.slot, incarnation: next_life(block) };
        match self.cfg.device.register(node.fence_key()).await {
            Ok(()) => {}
            Err(DevError::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy => return Ok(None),
            Err(DevError::Fenced) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let lease = Lease::new();
        let mut pulse = Pulse {
            dev: self.cfg.device.clone(),
            layout: self.cfg.layout,
            timeouts: self.cfg.timeouts,
            node,
            nonce: self.rng.next_u64(),
            counter: 0,
            lease: lease.clone(),
        };
        // The first lease counts from the first heartbeat that arrived.
        lease.renew(Instant::now() + self.cfg.timeouts.lease());
        self.cfg.device.set_permit(lease.clone());
        pulse.beat().await?;
        Ok(Some((Arc::new(Guarded::new(self.cfg.device.clone(), lease)), pulse)))
    }

    /// Puts our name on a changed block.
    fn signed(&self, mut new: SlotBlock) -> SlotBlock {
        new.host_name = clip(&self.cfg.host_name);
        new.address = self.cfg.net.as_ref().map(|net| net.address()).filter(|a| a.len() <= 64).unwrap_or_default();
        new
    }

    async fn claim(&mut self, block: &SlotBlock) -> Result<Attempt> {
        let Some((dev, pulse)) = self.begin(block).await? else { return Ok(Attempt::Taken) };
        let new = transitions::claimed(block, self.rng.next_u64());
        let new = self.signed(new);
        self.change(dev, pulse, block, new).await
    }

    async fn change(
        &mut self,
        dev: Arc<Guarded>,
        mut pulse: Pulse,
        block: &SlotBlock,
        new: SlotBlock,
    ) -> Result<Attempt> {
        let pause = self.cfg.timeouts.doorbell();
        // A change may take longer than a lease where a dead node has to be waited out first.
        let changed = tokio::select! {
            biased;
            changed = change_slot(&*dev, &self.cfg.layout, block, &new, pause) => changed,
            why = pulse.run() => {
                tracing::warn!(node = %pulse.node, "joining: {why}");
                Err(ClusterError::Lapsed)
            }
        };
        match changed {
            Ok(None) => Ok(Attempt::Joined(Box::new((dev, pulse, new)))),
            Ok(Some(_)) => {
                self.cfg.device.unregister().await?;
                Ok(Attempt::Taken)
            }
            Err(e) => {
                // Whether the block names us is unknown: if it does, we are found dead in time.
                pulse.lease.end();
                Err(e)
            }
        }
    }

    /// Takes over the slot of a dead node, whose writes cannot arrive any more.
    async fn adopt(&mut self, block: &SlotBlock) -> Result<Attempt> {
        let dead = NodeId { slot: block.slot, incarnation: block.incarnation };
        let Some((dev, pulse)) = self.begin(block).await? else { return Ok(Attempt::Taken) };
        let adopting = transitions::adopting(block, self.rng.next_u64());
        let adopting = self.signed(adopting);
        let (dev, mut pulse, adopting) = match self.change(dev, pulse, block, adopting).await? {
            Attempt::Joined(won) => *won,
            Attempt::Taken => return Ok(Attempt::Taken),
        };
        tracing::info!(node = %dead, "no slot is free: replaying the journal of a dead node to take over its slot");
        self.cfg.recoverer.attach(dev.clone());
        let replayed = tokio::select! {
            biased;
            why = pulse.run() => Err(why.to_string()),
            replayed = self.cfg.recoverer.replay(dead) => replayed,
        };
        if let Err(reason) = replayed {
            pulse.lease.end();
            self.cfg.device.unregister().await?;
            return Err(ClusterError::Recovery { slot: dead.slot, reason });
        }
        let live = transitions::adopted(&adopting, pulse.node.incarnation, self.rng.next_u64());
        let live = self.signed(live);
        match self.change(dev, pulse, &adopting, live).await? {
            Attempt::Joined(won) => Ok(Attempt::Joined(won)),
            // Somebody took us for dead while we replayed.
            Attempt::Taken => Err(ClusterError::Lapsed),
        }
    }

    /// On a device that keeps no hosts apart: whether no other host joined while we did.
    async fn prove_alone(&self, dev: &Guarded, pulse: &mut Pulse, block: &SlotBlock, round: &Round) -> Result<()> {
        if !one_host::applies(dev) || one_host::others_of_this_host(dev, round, pulse.node).await? {
            return Ok(());
        }
        let (node, nonce) = (pulse.node, pulse.nonce);
        tokio::select! {
            biased;
            why = pulse.run() => {
                tracing::warn!(%node, "joining: {why}");
                Err(ClusterError::Lapsed)
            }
            proved = one_host::prove_alone(dev, &self.cfg.layout, &self.cfg.timeouts, block, nonce) => proved,
        }
    }

    async fn finish(&mut self, won: (Arc<Guarded>, Pulse, SlotBlock), round: &Round) -> Result<Arc<Shared>> {
        let (dev, mut pulse, block) = won;
        // I8 across a power loss of the device: no record of this life may be durable before the block that starts it.
        dev.flush(IoClass::Lock).await?;
        if let Err(e) = self.prove_alone(&dev, &mut pulse, &block, round).await {
            let free = transitions::left(&block, pulse.node, self.rng.next_u64());
            if let Some(free) = free {
                let pause = self.cfg.timeouts.doorbell();
                if let Err(e) = change_slot(&*dev, &self.cfg.layout, &block, &free, pause).await {
                    tracing::warn!(node = %pulse.node, "the slot could not be given back: {e}");
                }
            }
            pulse.lease.end();
            self.cfg.device.unregister().await?;
            return Err(e);
        }
        self.cfg.recoverer.attach(dev.clone());
        let mut table = SlotTable::default();
        for other in round.slots.iter().flatten() {
            table.learn(other.clone());
        }
        table.learn(block);
        let shared = Arc::new(Shared {
            me: pulse.node,
            lease: dev.lease.clone(),
            dev,
            plain: self.plain.clone(),
            layout: self.cfg.layout,
            timeouts: self.cfg.timeouts,
            hint_key: self.cfg.hint_key,
            net: self.cfg.net.clone(),
            recoverer: self.cfg.recoverer.clone(),
            client: OnceLock::new(),
            state: Watched::new(State::Live),
            rng: Mutex::new(StdRng::seed_from_u64(self.rng.next_u64())),
            table: Mutex::new(table),
            table_version: Watched::new(0),
            locks: Mutex::new(BTreeMap::new()),
            bells: Mutex::new(BTreeMap::new()),
            hints_work: Mutex::new(BTreeMap::new()),
            hint_counter: Mutex::new(0),
            hint_windows: Mutex::new(BTreeMap::new()),
            recovering: Watched::new(BTreeSet::new()),
            stuck: Mutex::new(BTreeMap::new()),
            stats: Default::default(),
            tasks: Mutex::new(JoinSet::new()),
        });
        tracing::info!(node = %shared.me, "joined the volume");
        let beating = shared.clone();
        shared.spawn(async move {
            let why = pulse.run().await;
            beating.lapse(why);
            beating.unregister_when_quiet().await;
        });
        Ok(shared)
    }
}

fn clip(name: &str) -> String {
    let mut name = name.to_string();
    while name.len() > 64 {
        name.pop();
    }
    name
}
