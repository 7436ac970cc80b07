//! Finding unnamed files whose last user died, without looking through all domains.
//!
//! Who makes an unnamed file notes its domain in his slot's own domain, in the same transaction. So when a node is gone, what it alone had
//! open is in a domain that one of these has noted:
//!
//! - the dead node: whoever recovered it goes through its notes;
//! - a node that lives: it goes through its own when it learns of the end of another;
//! - a node that has left: whoever recovers the dead one goes through the notes of all slots that nobody lives in.
//!
//! A node may leave between the other's death and its recovery: it goes through its notes no more, and who recovers takes it for alive. So whoever
//! learns that a slot has become vacant goes through its notes, if a crash is known of.
//!
//! Who recovered the dead one may end before he is through, or be mounted read-only. So whoever mounts goes through the notes of all slots
//! that nobody lives in, too, if the latest life of one ended by a crash.
//!
//! Going through them frees what nobody has open any more. A note stays until its domain has no unnamed file.

use std::collections::BTreeSet;

use cluster::{LockId, Mode, NodeId};

use crate::alloc::Purpose;
use crate::error::{FsError, Result};
use crate::format::item::{Key, Kind};
use crate::format::layout::slot_domain;
use crate::txn::{Plan, Txn};
use crate::volume::Volume;

/// Notes read at once.
const AT_ONCE: usize = 256;

impl Txn<'_> {
    /// An unnamed file is made in the domain.
    pub async fn note_unnamed(&mut self, domain: u32) -> Result<()> {
        if self.vol.unnamed.lock().contains(&domain) {
            return Ok(());
        }
        let own = self.vol.own_domain();
        self.put(own, &Key::new(0, Kind::Leftover, domain.into()), &[]).await?;
        let vol = self.vol.me.clone();
        self.on_install(move || {
            if let Some(vol) = vol.upgrade() {
                vol.unnamed.lock().insert(domain);
            }
        });
        Ok(())
    }
}

impl Volume {
    /// At the start: notes of this slot's earlier lives, and those of all the gone if one of them ended by a crash. Who recovered it may
    /// have ended before it had gone through them.
    pub(crate) async fn unnamed_from_before(&self) {
        self.free_unnamed_noted_by(self.own_domain()).await;
        if self.node.crashed_before() {
            self.free_unnamed_of_the_gone().await;
        }
    }

    /// Another node ended, perhaps.
    pub(crate) fn look_for_unnamed(&self) {
        let held: Vec<u32> = self.domains.lock().values().filter(|d| d.open_elsewhere()).map(|d| d.id).collect();
        let left = self.left_after_a_crash();
        if self.read_only || held.is_empty() && left.is_empty() && self.unnamed.lock().is_empty() {
            return;
        }
        // An unmount that has begun gives everything up anyway.
        let Ok(unmount_waits) = self.closing.clone().try_read_owned() else { return };
        if let Some(volume) = self.me.upgrade() {
            tokio::spawn(async move {
                for d in held {
                    volume.ask_again_who_has_open(d).await;
                }
                if !volume.unnamed.lock().is_empty() {
                    volume.free_unnamed_noted_by(volume.own_domain()).await;
                }
                for gone in left {
                    volume.free_unnamed_noted_by(slot_domain(gone.slot)).await;
                }
                drop(unmount_waits);
            });
        }
    }

    /// Slots that have become vacant since this was last asked; none if no crash is known of, when nobody can have died with files open.
    fn left_after_a_crash(&self) -> Vec<NodeId> {
        let vacant = BTreeSet::from_iter(self.node.vacant_slots());
        let before = std::mem::replace(&mut *self.seen_vacant.lock(), vacant.clone());
        if self.node.crashed_before() { vacant.difference(&before).copied().collect() } else { Vec::new() }
    }

    /// A domain that this node has held since before the end of another may say of that one that it has files open: what is removed
    /// would stay, as nobody closes it. The next grant tells how it is.
    async fn ask_again_who_has_open(&self, domain: u32) {
        if self.domain(domain).open_elsewhere() {
            self.give_up(LockId::Domain(domain)).await;
        }
    }

    /// Where it costs no lock.
    pub(crate) async fn free_unnamed_at_hand(&self) {
        let noted: Vec<u32> = self.unnamed.lock().iter().copied().collect();
        for d in noted {
            if self.domain(d).hold.grant().is_some_and(|g| g.mode == Mode::Exclusive) {
                self.logged(d, self.free_unnamed(self.own_domain(), d).await);
            }
        }
    }

    /// Goes through the notes of all slots that nobody lives in.
    pub(crate) async fn free_unnamed_of_the_gone(&self) {
        for gone in self.node.vacant_slots() {
            self.free_unnamed_noted_by(slot_domain(gone.slot)).await;
        }
    }

    pub(crate) async fn free_unnamed_noted_by(&self, slot_domain: u32) {
        match self.noted(slot_domain).await {
            Ok(noted) => {
                if slot_domain == self.own_domain() {
                    self.unnamed.lock().extend(&noted);
                }
                for d in noted {
                    self.ask_again_who_has_open(d).await;
                    self.logged(d, self.free_unnamed(slot_domain, d).await);
                }
            }
            Err(e) => self.logged(slot_domain, Err(e)),
        }
        if slot_domain != self.own_domain() {
            self.give_up(LockId::Domain(slot_domain)).await;
        }
    }

    fn logged(&self, domain: u32, r: Result<()>) {
        if let Err(e) = r
            && !e.is_leaving()
        {
            tracing::warn!(node = %self.node(), domain, "unnamed files of a dead node may stay for now: {e}");
        }
    }

    async fn noted(&self, slot_domain: u32) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        loop {
            let after = all.last().map_or(0, |d| u64::from(*d) + 1);
            let mut plan = Plan::read(&[slot_domain]);
            let batch = loop {
                let mut tx = self.begin(&plan).await?;
                let r = notes(&mut tx, slot_domain, after).await;
                if let Some(done) = self.finish(tx, r, &mut plan).await? {
                    break done.value;
                }
            };
            let more = batch.len() == AT_ONCE;
            all.extend(batch);
            if !more {
                return Ok(all);
            }
        }
    }

    async fn free_unnamed(&self, slot_domain: u32, domain: u32) -> Result<()> {
        match self.reclaim_orphans(domain).await {
            Ok(()) | Err(FsError::Stale) => {}
            Err(e) => return Err(e),
        }
        let mut plan = Plan::write(&[slot_domain, domain], Purpose::Reclaim);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = drop_note(&mut tx, slot_domain, domain).await;
            if self.finish(tx, r, &mut plan).await?.is_some() {
                return Ok(());
            }
        }
    }
}

async fn notes(tx: &mut Txn<'_>, slot_domain: u32, after: u64) -> Result<Vec<u32>> {
    let items = tx.kept_for_slot(slot_domain, Kind::Leftover, after, AT_ONCE).await?;
    items
        .iter()
        .map(|(key, _)| {
            let number = u32::try_from(key.offset).ok().filter(|d| *d > 0 && *d < tx.vol.layout().max_domains());
            number.ok_or_else(|| FsError::damaged(LockId::Domain(slot_domain), "a note of a domain that cannot be"))
        })
        .collect()
}

/// The domain is held, so nobody makes an unnamed file in it now.
async fn drop_note(tx: &mut Txn<'_>, slot_domain: u32, domain: u32) -> Result<()> {
    match tx.header(domain).await.map(|h| h.orphans) {
        Ok(0) | Err(FsError::Stale) => {}
        Ok(_) => return Ok(()),
        Err(e) => return Err(e),
    }
    tx.del(slot_domain, &Key::new(0, Kind::Leftover, domain.into())).await?;
    let vol = tx.vol.me.clone();
    tx.on_install(move || {
        if let Some(vol) = vol.upgrade().filter(|v| v.own_domain() == slot_domain) {
            vol.unnamed.lock().remove(&domain);
        }
    });
    Ok(())
}
