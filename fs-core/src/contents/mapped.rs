//! Pages that the kernel writes back from shared memory maps.
//!
//! A process that may write to a mapped page does so without a word to us, also while this node holds the domain in shared
//! mode only; we learn of it when the kernel writes the page back, often because a revocation invalidates it. That write
//! back must be answered before the revocation can go on, so it cannot wait for the exclusive mode: it is kept here, its
//! reply is given at once, and it is carried out under the next exclusive grant. Until then reads on this node see it,
//! and every later change of the domain and every fsync or close on this node wait for it. As on a local disk, nothing is
//! promised to other nodes or after a crash before msync, fsync or the last close.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use super::file::copy_overlap;
use crate::alloc::Purpose;
use crate::domain::Domain;
use crate::error::{FsError, Result};
use crate::format::item::{ino, ino_domain, ino_local};
use crate::txn::Plan;
use crate::types::WriteOptions;
use crate::volume::Volume;

struct MappedWrite {
    local: u64,
    offset: u64,
    data: Vec<u8>,
}

/// What waits to be carried out in one domain, in order.
#[derive(Default)]
pub struct MappedWrites {
    waiting: Mutex<VecDeque<MappedWrite>>,
    /// One at a time carries them out.
    turn: tokio::sync::Mutex<()>,
    /// What went wrong since the last fsync, by inode.
    errors: Mutex<BTreeMap<u64, FsError>>,
}

impl MappedWrites {
    /// Files with pages that wait, by local number.
    pub fn files(&self) -> impl Iterator<Item = u64> {
        let waiting: Vec<u64> = self.waiting.lock().iter().map(|w| w.local).collect();
        waiting.into_iter()
    }

    fn is_empty(&self) -> bool {
        self.waiting.lock().is_empty()
    }

    /// Puts what waits over bytes read from `offset` on.
    pub fn overlay(&self, local: u64, offset: u64, out: &mut [u8]) {
        for w in self.waiting.lock().iter().filter(|w| w.local == local) {
            copy_overlap(out, offset, w.offset, &w.data);
        }
    }
}

impl Volume {
    /// Takes a page written back from a memory map. Returns at once.
    pub fn write_mapped(&self, number: u64, offset: u64, data: Vec<u8>) -> Result<()> {
        self.check()?;
        if self.read_only {
            return Err(FsError::ReadOnly);
        }
        let domain = self.domain(ino_domain(number));
        domain.mapped.waiting.lock().push_back(MappedWrite { local: ino_local(number), offset, data });
        if let Some(volume) = self.me.upgrade() {
            tokio::spawn(async move {
                if let Err(e) = volume.carry_out_mapped(&domain).await {
                    tracing::warn!(node = %volume.node(), domain = domain.id, "pages of memory maps are lost: {e}");
                }
            });
        }
        Ok(())
    }

    /// Carries out what waits in a domain.
    pub(crate) async fn carry_out_mapped(&self, domain: &Domain) -> Result<()> {
        if domain.mapped.is_empty() {
            return Ok(());
        }
        let _turn = domain.mapped.turn.lock().await;
        loop {
            let next = domain.mapped.waiting.lock().front().map(|w| (w.local, w.offset, w.data.clone()));
            let Some((local, offset, data)) = next else { return Ok(()) };
            let done = self.write_within(ino(domain.id, local), offset, &data).await;
            self.check()?;
            match done {
                Ok(()) | Err(FsError::Stale) => {}
                Err(e) => drop(domain.mapped.errors.lock().insert(local, e)),
            }
            domain.mapped.waiting.lock().pop_front();
        }
    }

    async fn write_within(&self, number: u64, offset: u64, data: &[u8]) -> Result<()> {
        self.limit_dirty().await?;
        let how = WriteOptions { within_size: true, ..WriteOptions::default() };
        let mut plan = Plan::write(&[ino_domain(number)], Purpose::Grow).with_pages_of(number);
        loop {
            let mut tx = self.begin_unordered(&plan).await?;
            let r = super::file::write(&mut tx, number, offset, data, how).await;
            if self.finish(tx, r, &mut plan).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// At the close of a file descriptor and before fsync: waits for the file's mapped pages, tells what became of them.
    pub async fn flush_mapped(&self, number: u64) -> Result<()> {
        let domain = self.domain(ino_domain(number));
        self.carry_out_mapped(&domain).await?;
        domain.mapped.errors.lock().remove(&ino_local(number)).map_or(Ok(()), Err)
    }

    pub(crate) async fn carry_out_all_mapped(&self) -> Result<()> {
        let domains: Vec<_> = self.domains.lock().values().cloned().collect();
        for d in domains {
            self.carry_out_mapped(&d).await?;
        }
        Ok(())
    }
}
