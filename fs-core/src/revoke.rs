//! Acquiring locks for the operations that wait, and giving them up when another node wants them.
//!
//! The order of a revocation is that of [`crate::hold`]; what a lock covers is in its place before the lock block changes
//! (I3). A domain given up keeps its cached blocks: if nobody held it exclusively in between, they are still good.

use std::sync::{Arc, Weak};
use std::time::Duration;

use cluster::{Grant, LockClient, LockId, LockValue, Mode, NodeId, Release, Tenure};

use crate::alloc::Group;
use crate::error::{FsError, Result};
use crate::format::layout::slot_domain;
use crate::hold::Hold;
use crate::volume::Volume;

/// How long a revocation waits for an operation that was granted the lock but has not got round to using it.
const STARVING_WAIT: Duration = Duration::from_millis(50);

/// The volume as the cluster sees it.
pub struct Client {
    pub volume: Weak<Volume>,
}

impl LockClient for Client {
    fn demand(&self, id: LockId, wanted: Mode) {
        let Some(volume) = self.volume.upgrade() else { return };
        let hold = volume.hold(id);
        if hold.demand(wanted) {
            tokio::spawn(async move { volume.revoke(hold).await });
        }
    }

    fn recovered(&self, dead: NodeId) {
        let Some(volume) = self.volume.upgrade() else { return };
        // Unless it has begun: then the next mount does it.
        let unmount_waits = volume.closing.clone().try_read_owned();
        tokio::spawn(async move {
            volume.clean_after(dead).await;
            drop(unmount_waits);
        });
    }

    fn woken(&self, id: LockId) {
        if let Some(volume) = self.volume.upgrade() {
            volume.look_if_waiting(id);
        }
    }

    fn slots_changed(&self) {
        if let Some(volume) = self.volume.upgrade() {
            volume.look_everywhere();
            volume.look_for_unnamed();
        }
    }

    fn lapsed(&self) {
        if let Some(volume) = self.volume.upgrade() {
            volume.fail(FsError::Cluster(cluster::ClusterError::Lapsed));
        }
    }
}

impl Volume {
    fn hold(&self, id: LockId) -> Arc<Hold> {
        match id {
            LockId::Domain(d) => self.domain(d).hold.clone(),
            LockId::Group(g) => self.group_hold(g),
        }
    }

    /// Runs one acquire to its end.
    pub(crate) async fn acquire(&self, hold: Arc<Hold>, mode: Mode) {
        match self.acquire_covering(&hold, mode).await {
            Ok(()) => {}
            Err(e) => hold.acquire_failed(e),
        }
    }

    async fn acquire_covering(&self, hold: &Arc<Hold>, mode: Mode) -> Result<()> {
        loop {
            self.check()?;
            self.node.acquire(hold.id, mode).await?;
            let _turn = hold.turn.lock().await;
            // A revocation of the shared mode that was held before may have given up the new mode with it.
            let Some(grant) = self.node.held(hold.id).filter(|g| g.mode >= mode) else { continue };
            // A new directory may have taken the domain's number, and its lock, meanwhile: that grant stands.
            let taken_over = hold.grant().filter(|g| g.mode >= mode && g.tenure == grant.tenure);
            if taken_over.is_none()
                && let Err(e) = self.take_over(hold, grant).await
            {
                let keep = Release { to: None, value: None, open: false, cleaned: false };
                let _ = self.node.release(hold.id, keep).await;
                return Err(e);
            }
            let grant = taken_over.unwrap_or(grant);
            let demanded = hold.granted(grant);
            let Some(volume) = self.me.upgrade() else { return Ok(()) };
            if demanded {
                let (volume, hold) = (volume.clone(), hold.clone());
                tokio::spawn(async move { volume.revoke(hold).await });
            }
            if grant.mode == Mode::Exclusive {
                self.look_if_waiting(hold.id);
            }
            if let LockId::Domain(d) = hold.id
                && self.domain(d).has_leftovers()
            {
                tokio::spawn(async move { volume.clear_leftovers(d, grant.tenure).await });
            }
            return Ok(());
        }
    }

    /// Before operations are admitted: what was cached under an older tenure is forgotten, a group's bitmap is read.
    async fn take_over(&self, hold: &Arc<Hold>, grant: Grant) -> Result<()> {
        match hold.id {
            LockId::Domain(d) => {
                let domain = self.domain(d);
                let known = domain.cached_tenure.lock().replace(grant.tenure);
                if known != Some(grant.previous_tenure) {
                    self.store.forget(hold.id);
                }
                *domain.open_flagged.lock() = false;
                *domain.changed_to.lock() = None;
                let may_clean = grant.mode == Mode::Exclusive && !self.read_only;
                *domain.leftovers.lock() = (may_clean && grant.after_crash).then_some(grant.tenure);
                Ok(())
            }
            LockId::Group(g) => {
                self.store.forget(hold.id);
                let group = Group::load(&self.store, &self.layout(), g, hold.clone(), &grant).await?;
                self.alloc.add(g, group);
                // The volume may have been noticed to have grown meanwhile.
                self.alloc.grow(&self.layout());
                Ok(())
            }
        }
    }

    /// Serves the demands of other nodes for one lock until none is left.
    pub(crate) async fn revoke(&self, hold: Arc<Hold>) {
        let _turn = hold.turn.lock().await;
        while let Some(to) = hold.next_target() {
            let result = match hold.id {
                LockId::Domain(d) => self.lower_domain(d, &hold, to).await,
                LockId::Group(g) => self.give_up_group(g, &hold).await,
            };
            if let Err(e) = result {
                // What the lock covers is not in its place, so it must stay held (I3): only our end can free it.
                if !e.is_leaving() {
                    tracing::error!(node = %self.node(), lock = %hold.id, "cannot give the lock up: {e}");
                }
                self.fail(e);
                return;
            }
        }
    }

    async fn lower_domain(&self, id: u32, hold: &Arc<Hold>, to: Option<Mode>) -> Result<()> {
        let domain = self.domain(id);
        self.let_one_in(hold).await;
        hold.serve_uncached().await;
        if to.is_none() {
            self.kernel.forget_domain(id).await;
        }
        while let Some(touched) = hold.block_or_touched() {
            if to.is_none() {
                self.kernel.forget_inodes(touched).await;
            }
        }
        hold.drained().await;
        self.check()?;
        self.flush_domain(&domain).await?;
        self.store_locks(&domain).await?;
        self.journal.settle(hold.id).await.map_err(|e| self.journal_failed(e))?;
        self.reap();
        let open = to.is_none() && domain.has_opens();
        // An older state of the header in its place is known as such by this.
        let changed = domain.changed_to.lock().take().zip(hold.grant());
        let value = changed.map(|(version, grant)| LockValue { version, ..grant.value });
        self.node.release(hold.id, Release { to, value, open, cleaned: !domain.has_leftovers() }).await?;
        *domain.open_flagged.lock() = open;
        hold.lowered(to);
        Ok(())
    }

    async fn give_up_group(&self, group: u32, hold: &Arc<Hold>) -> Result<()> {
        self.let_one_in(hold).await;
        hold.serve_uncached().await;
        if !self.alloc.begin_leaving(group) {
            // Contents in memory were promised blocks that are about to go away. Later promises are not of this group.
            self.flush_everything().await?;
        }
        while hold.block_or_touched().is_some() {}
        hold.drained().await;
        self.check()?;
        self.journal.settle(hold.id).await.map_err(|e| self.journal_failed(e))?;
        self.reap();
        let value = self.alloc.remove(group);
        self.node.release(hold.id, Release { to: None, value, open: false, cleaned: true }).await?;
        hold.lowered(None);
        Ok(())
    }

    /// A grant serves somebody who waited for it before it goes on, or two nodes could pass a lock to and fro for nothing.
    async fn let_one_in(&self, hold: &Arc<Hold>) {
        let served = hold.wait_until(|| (!hold.starving()).then_some(()));
        let _ = tokio::time::timeout(STARVING_WAIT, served).await;
    }

    /// Gives a lock up that nobody demands.
    pub(crate) async fn give_up(&self, id: LockId) {
        let hold = self.hold(id);
        if hold.begin_giving_up() {
            self.revoke(hold).await;
        }
    }

    /// Nodes that had unnamed files of the domain open have died: what only they had open is freed. Ended early by a
    /// revocation it starts over with the next exclusive grant, here or elsewhere.
    async fn clear_leftovers(&self, domain: u32, tenure: Tenure) {
        match self.reclaim_orphans(domain).await {
            Ok(()) => {
                let domain = self.domain(domain);
                let mut leftovers = domain.leftovers.lock();
                if *leftovers == Some(tenure) {
                    *leftovers = None;
                }
            }
            Err(e) if e.is_leaving() => {}
            Err(e) => tracing::warn!(node = %self.node(), domain, "unnamed files of a dead node stay for now: {e}"),
        }
    }

    /// What a dead node left behind: its deferred frees and unnamed files.
    async fn clean_after(&self, dead: NodeId) {
        if self.read_only {
            return;
        }
        let domain = slot_domain(dead.slot);
        if let Err(e) = self.reclaim_slot(domain).await
            && !e.is_leaving()
        {
            tracing::warn!(node = %self.node(), slot = dead.slot, "cannot clean up after the dead node: {e}");
        }
        self.free_unnamed_noted_by(domain).await;
        self.free_unnamed_of_the_gone().await;
        // Their blocks lie in groups of the dead node, and need not wait until more has come together.
        self.clean_own_slot().await;
        // Nobody else needs it; whoever takes the slot next wants it at once.
        if domain != self.own_domain() {
            self.give_up(LockId::Domain(domain)).await;
        }
    }
}
