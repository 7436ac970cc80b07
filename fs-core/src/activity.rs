//! What this node does with each domain, for administrators: which directories are busy, which ones nodes pass to and fro.

use cluster::Mode;

use crate::error::{FsError, Result};
use crate::format::item::{DIR_LOCAL, ino};
use crate::format::layout::FIRST_SLOT_DOMAIN;
pub use crate::hold::Usage;
use crate::volume::{ROOT_INO, Volume};

/// One domain that this node has used since it joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainActivity {
    pub domain: u32,
    /// In which mode this node holds it now.
    pub held: Option<Mode>,
    pub usage: Usage,
}

/// Entries looked at per step of a search for a directory's name.
const BATCH: usize = 1024;
/// Deeper trees than this are cut short by path name limits long before.
const DEEPEST: usize = 4096;

impl Volume {
    /// All domains of directories that were used, in the order of their numbers. No device I/O.
    pub fn activity(&self) -> Vec<DomainActivity> {
        let of_slots = FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(self.superblock.nodes);
        let domains = self.domains.lock();
        domains
            .values()
            .filter(|d| !of_slots.contains(&d.id))
            .map(|d| DomainActivity { domain: d.id, held: d.hold.grant().map(|g| g.mode), usage: d.hold.usage() })
            .collect()
    }

    /// The locks that something is going on with, a line each: on this node, and in the lock block as this node last saw it.
    pub fn busy_locks(&self) -> Vec<String> {
        let mut holds: Vec<_> = self.domains.lock().values().map(|d| d.hold.clone()).collect();
        holds.extend(self.groups.lock().values().cloned());
        holds.into_iter().filter_map(|h| Some(format!("{}; {}", h.busy()?, self.node.told_of(h.id)))).collect()
    }

    /// The path from the root of the directory that a domain was made for: `/` for the root's. Takes the locks of the directories
    /// above it (shared) one after the other, so that it may be outdated when it is returned.
    pub async fn path_of_domain(&self, domain: u32) -> Result<Vec<u8>> {
        let mut at = ino(domain, DIR_LOCAL);
        let mut names: Vec<Vec<u8>> = Vec::new();
        while at != ROOT_INO && names.len() < DEEPEST {
            let parent = self.parent(at).await?;
            names.push(self.name_in(parent, at).await?);
            at = parent;
        }
        if names.is_empty() {
            return Ok(b"/".to_vec());
        }
        Ok(names.iter().rev().flat_map(|n| [b"/".as_slice(), n].concat()).collect())
    }

    async fn name_in(&self, parent: u64, child: u64) -> Result<Vec<u8>> {
        let mut after = 0;
        loop {
            let batch = self.readdir(parent, after, BATCH, false).await?.value;
            let Some(last) = batch.last() else { return Err(FsError::NotFound) };
            after = last.cookie;
            if let Some(found) = batch.into_iter().find(|e| e.ino == child) {
                return Ok(found.name);
            }
        }
    }
}
