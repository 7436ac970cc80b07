//! What the kernel knows of the volume, and making it forget.
//!
//! A domain's inodes lose attributes, pages and listings by `inval_inode`, which may wait for pages that requests are
//! working on: it runs on threads of its own while requests are served. Names lose validity all at once by a new epoch, which
//! waits for nothing. One hole is left: a LOOKUP answered just before may make a new inode in the kernel, with
//! long-lived attributes, after the notification did not find it. Its name is of the old epoch, so only who opens it in the same
//! system call can see them: an open checks (see [`KnownInodes::open_check`]).

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use fs_core::{KernelCache, ROOT_INO};
use fuse_session::Notifier;
use parking_lot::Mutex;

use crate::convert::to_nodeid;

/// Notifications are sent from this many threads at once.
const THREADS: usize = 4;
const DOMAIN_SHIFT: u32 = 40;

#[derive(Default)]
struct Known {
    /// How often the kernel has been given the inode and has not forgotten it.
    lookups: u64,
    /// The round in which its attributes were last given for long.
    round: u64,
}

#[derive(Default)]
struct Inodes {
    known: BTreeMap<u64, Known>,
    /// How often each domain has been forgotten.
    rounds: BTreeMap<u32, u64>,
}

/// The kernel's side of a mount.
pub struct KnownInodes {
    inodes: Mutex<Inodes>,
    notifier: OnceLock<Notifier>,
}

impl Default for KnownInodes {
    /// The kernel knows the root without having looked it up.
    fn default() -> Self {
        let known = BTreeMap::from([(ROOT_INO, Known { lookups: 1, round: 0 })]);
        Self { inodes: Mutex::new(Inodes { known, rounds: BTreeMap::new() }), notifier: OnceLock::new() }
    }
}

impl KnownInodes {
    /// Before this, the kernel knows nothing.
    pub fn mounted(&self, notifier: Notifier) {
        // A second mount of the same object would be a bug; the first notifier stays.
        let _ = self.notifier.set(notifier);
    }

    /// The kernel is given a name of the inode.
    pub fn looked_up(&self, ino: u64) {
        let mut i = self.inodes.lock();
        let round = i.rounds.get(&domain(ino)).copied().unwrap_or(0);
        let known = i.known.entry(ino).or_default();
        known.lookups += 1;
        known.round = round;
    }

    /// The kernel is given attributes only.
    pub fn attributes_given(&self, ino: u64) {
        let mut i = self.inodes.lock();
        let round = i.rounds.get(&domain(ino)).copied().unwrap_or(0);
        if let Some(known) = i.known.get_mut(&ino) {
            known.round = round;
        }
    }

    pub fn forgotten(&self, ino: u64, n: u64) {
        let mut i = self.inodes.lock();
        if let Some(known) = i.known.get_mut(&ino) {
            known.lookups = known.lookups.saturating_sub(n);
            if known.lookups == 0 {
                i.known.remove(&ino);
            }
        }
    }

    /// Drops attributes that were given before the domain was last forgotten.
    pub fn open_check(&self, ino: u64) {
        let old = {
            let mut i = self.inodes.lock();
            let round = i.rounds.get(&domain(ino)).copied().unwrap_or(0);
            match i.known.get_mut(&ino) {
                Some(known) if known.round != round => {
                    known.round = round;
                    true
                }
                _ => false,
            }
        };
        if old {
            self.drop_attributes(ino);
        }
    }

    fn drop_attributes(&self, ino: u64) {
        if let Some(n) = self.notifier.get()
            && let Err(e) = n.inval_inode(to_nodeid(ino), -1, 0)
        {
            tracing::warn!(ino, "the kernel does not drop attributes: {e}");
        }
    }

    /// Drops attributes and pages of one inode; may wait for requests on those pages.
    pub fn drop_pages(&self, ino: u64) {
        if let Some(n) = self.notifier.get()
            && let Err(e) = n.inval_inode(to_nodeid(ino), 0, 0)
        {
            tracing::warn!(ino, "the kernel does not drop pages: {e}");
        }
    }

    fn new_epoch(&self) {
        if let Some(n) = self.notifier.get()
            && let Err(e) = n.inc_epoch()
        {
            tracing::error!("the kernel does not forget names: {e}");
        }
    }
}

fn domain(ino: u64) -> u32 {
    (ino >> DOMAIN_SHIFT) as u32
}

/// The kernel cache as the volume sees it.
pub struct KernelView(pub Arc<KnownInodes>);

impl KernelView {
    async fn drop_all(&self, inodes: Vec<u64>) {
        let share = inodes.len().div_ceil(THREADS).max(1);
        let mut jobs = Vec::new();
        for part in inodes.chunks(share) {
            let (known, part) = (self.0.clone(), part.to_vec());
            jobs.push(tokio::task::spawn_blocking(move || part.iter().for_each(|ino| known.drop_pages(*ino))));
        }
        for job in jobs {
            if let Err(e) = job.await {
                tracing::error!("a thread that notifies the kernel ended: {e}");
            }
        }
    }
}

#[async_trait]
impl KernelCache for KernelView {
    async fn forget_domain(&self, domain: u32) {
        let inodes: Vec<u64> = {
            let mut i = self.0.inodes.lock();
            *i.rounds.entry(domain).or_default() += 1;
            let first = u64::from(domain) << DOMAIN_SHIFT;
            let last = first | ((1 << DOMAIN_SHIFT) - 1);
            i.known.range(first..=last).map(|(ino, _)| *ino).collect()
        };
        self.drop_all(inodes).await;
        self.0.new_epoch();
    }

    async fn forget_inodes(&self, inodes: Vec<u64>) {
        self.drop_all(inodes).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_known_until_forgotten_as_often_as_looked_up() {
        let k = KnownInodes::default();
        k.looked_up(5);
        k.looked_up(5);
        k.forgotten(5, 1);
        assert!(k.inodes.lock().known.contains_key(&5));
        k.forgotten(5, 1);
        assert!(!k.inodes.lock().known.contains_key(&5));
    }

    #[tokio::test]
    async fn forgetting_a_domain_makes_older_attributes_suspect() {
        let k = Arc::new(KnownInodes::default());
        let ino = 3 << DOMAIN_SHIFT | 8;
        k.looked_up(ino);
        KernelView(k.clone()).forget_domain(3).await;
        let rounds = |k: &KnownInodes| k.inodes.lock().known[&ino].round;
        assert_eq!(rounds(&k), 0);
        k.open_check(ino);
        assert_eq!(rounds(&k), 1);
    }
}
