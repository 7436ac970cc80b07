//! What the kernel knows of the volume, and making it forget.
//!
//! A domain's inodes lose attributes, pages and listings by `inval_inode`, which may wait for pages that requests are
//! working on: it runs on threads of its own while requests are served. Names lose validity all at once by a new epoch, which
//! waits for nothing. One hole is left: a LOOKUP answered just before may make a new inode in the kernel, with
//! long-lived attributes, after the notification did not find it. Its name is of the old epoch, so only who opens it in the same
//! system call can see them: an open checks (see [`KnownInodes::open_check`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use fs_core::{KernelCache, ROOT_INO};
use fuse_session::Notifier;
use parking_lot::Mutex;

use crate::convert::to_nodeid;
use crate::wake::Taken;
use crate::wake::mark::Threads;

/// Notifications are sent from this many threads at once.
const THREADS: usize = 4;
const DOMAIN_SHIFT: u32 = 40;
/// The kernel may not believe attributes that it asked for before it dropped older ones. It has got its answer after this.
const ASKED_BEFORE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Known {
    /// How often the kernel has been given the inode and has not forgotten it.
    lookups: u64,
    /// Of the inode that was given: the number may come to mean another one when a membership ends with losses.
    generation: u64,
    /// The number does mean another inode, or none: whoever still uses it gets ESTALE.
    stale: bool,
    /// The kernel may have pages of it.
    pages: bool,
    /// When it last dropped what it knows.
    dropped: Option<Instant>,
    /// The kernel takes the file to be as long as this at least, or has been told that it is shorter.
    size: u64,
    /// The round in which its attributes were last given for long.
    round: u64,
}

#[derive(Default)]
struct Inodes {
    known: BTreeMap<u64, Known>,
    /// How many of them are stale.
    stale: usize,
    /// How often each domain has been forgotten.
    rounds: BTreeMap<u32, u64>,
}

/// The kernel's side of a mount.
pub struct KnownInodes {
    inodes: Mutex<Inodes>,
    notifier: OnceLock<Notifier>,
    /// Domains that were forgotten, for those who watch them.
    pub taken: Taken,
    /// Whose requests are not meant in earnest.
    pub helper: Threads,
}

impl Default for KnownInodes {
    /// The kernel knows the root without having looked it up.
    fn default() -> Self {
        let known = BTreeMap::from([(ROOT_INO, Known { lookups: 1, ..Known::default() })]);
        Self {
            inodes: Mutex::new(Inodes { known, ..Inodes::default() }),
            notifier: OnceLock::new(),
            taken: Taken::default(),
            helper: Threads::default(),
        }
    }
}

impl KnownInodes {
    /// Before this, the kernel knows nothing.
    pub fn mounted(&self, notifier: Notifier) {
        // A second mount of the same object would be a bug; the first notifier stays.
        let _ = self.notifier.set(notifier);
    }

    /// The kernel is given a name of the inode. One that it knows with another generation it will not use any more.
    pub fn looked_up(&self, ino: u64, generation: u64, size: u64) {
        let mut i = self.inodes.lock();
        let round = i.rounds.get(&domain(ino)).copied().unwrap_or(0);
        let known = i.known.entry(ino).or_default();
        if known.lookups == 0 || known.generation != generation {
            known.size = size;
        }
        known.lookups += 1;
        known.round = round;
        known.generation = generation;
        if std::mem::take(&mut known.stale) {
            i.stale -= 1;
        }
    }

    /// Whether the kernel means an inode by this number that is gone.
    pub fn is_stale(&self, ino: u64) -> bool {
        let i = self.inodes.lock();
        i.stale > 0 && i.known.get(&ino).is_some_and(|k| k.stale)
    }

    /// What the kernel knows of a domain: numbers and generations.
    pub fn of_domain(&self, domain: u32) -> Vec<(u64, u64)> {
        self.inodes.lock().known.range(numbers(domain)).map(|(ino, k)| (*ino, k.generation)).collect()
    }

    /// Of an inode that the kernel knows.
    pub fn generation(&self, ino: u64) -> Option<u64> {
        self.inodes.lock().known.get(&ino).map(|k| k.generation)
    }

    pub fn is_gone(&self, ino: u64) {
        let mut i = self.inodes.lock();
        if let Some(known) = i.known.get_mut(&ino)
            && !std::mem::replace(&mut known.stale, true)
        {
            i.stale += 1;
        }
    }

    /// The kernel is given attributes only. False: they are those of another inode than the kernel means by the number,
    /// and are not to be given.
    pub fn attributes_given(&self, ino: u64, generation: u64) -> bool {
        let mut i = self.inodes.lock();
        let round = i.rounds.get(&domain(ino)).copied().unwrap_or(0);
        let Some(known) = i.known.get_mut(&ino) else { return true };
        // The kernel has the root from nobody.
        if known.generation != generation && ino != ROOT_INO {
            let new = !std::mem::replace(&mut known.stale, true);
            i.stale += usize::from(new);
            return false;
        }
        known.round = round;
        true
    }

    pub fn forgotten(&self, ino: u64, n: u64) {
        let mut i = self.inodes.lock();
        if let Some(known) = i.known.get_mut(&ino) {
            known.lookups = known.lookups.saturating_sub(n);
            if known.lookups == 0
                && let Some(gone) = i.known.remove(&ino)
                && gone.stale
            {
                i.stale -= 1;
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

    /// The kernel is about to be given contents, which it may keep.
    pub fn pages_given(&self, ino: u64) {
        if let Some(known) = self.inodes.lock().known.get_mut(&ino) {
            known.pages = true;
        }
    }

    pub fn may_have_pages(&self, ino: u64) -> bool {
        self.inodes.lock().known.get(&ino).is_some_and(|k| k.pages)
    }

    /// The file is so long: true if the kernel must learn first that it has grown (see [`crate::growth`]).
    pub fn has_grown(&self, ino: u64, size: u64) -> bool {
        let mut i = self.inodes.lock();
        let Some(known) = i.known.get_mut(&ino).filter(|k| k.lookups > 0) else { return false };
        known.size = known.size.min(size);
        known.size < size && (known.pages || known.dropped.is_some_and(|at| at.elapsed() < ASKED_BEFORE))
    }

    /// Makes the kernel take the file to be at least as long as `size`, by giving it the last byte of that; may wait for requests on
    /// its page.
    pub fn grow(&self, ino: u64, size: u64, last: u8) {
        self.pages_given(ino);
        let Some(n) = self.notifier.get() else { return };
        match n.store(to_nodeid(ino), size - 1, &[last]) {
            Ok(_) => {
                if let Some(known) = self.inodes.lock().known.get_mut(&ino) {
                    known.size = known.size.max(size);
                }
            }
            Err(e) => tracing::warn!(ino, "the kernel does not learn that a file has grown: {e}"),
        }
    }

    /// Drops attributes and pages of one inode; may wait for requests on those pages.
    pub fn drop_pages(&self, ino: u64) {
        self.drop_range(ino, 0, 0);
    }

    /// As [`KnownInodes::drop_pages`], of `len` bytes from `first`; 0: to the end.
    pub fn drop_range(&self, ino: u64, first: i64, len: i64) {
        if let Some(known) = self.inodes.lock().known.get_mut(&ino) {
            known.dropped = Some(Instant::now());
        }
        if let Some(n) = self.notifier.get()
            && let Err(e) = n.inval_inode(to_nodeid(ino), first, len)
        {
            tracing::warn!(ino, "the kernel does not drop pages: {e}");
        }
    }

    /// Everything at once, after a membership ended: all that was given under it is suspect.
    pub fn forget_all(&self) {
        let inodes: Vec<u64> = {
            let mut i = self.inodes.lock();
            let domains: BTreeSet<u32> = i.known.keys().map(|ino| domain(*ino)).collect();
            for d in &domains {
                *i.rounds.entry(*d).or_default() += 1;
            }
            self.taken.note(domains);
            i.known.keys().copied().collect()
        };
        self.new_epoch();
        std::thread::scope(|s| {
            for part in inodes.chunks(inodes.len().div_ceil(THREADS).max(1)) {
                s.spawn(|| part.iter().for_each(|ino| self.drop_pages(*ino)));
            }
        });
        // Names that were being given meanwhile.
        self.new_epoch();
    }

    fn new_epoch(&self) {
        if let Some(n) = self.notifier.get()
            && let Err(e) = n.inc_epoch()
            // The mount is gone, and what the kernel knew with it: cleaning up at an unmount may revoke locks.
            && e.raw_os_error() != Some(libc::ENOTCONN)
        {
            tracing::error!("the kernel does not forget names: {e}");
        }
    }
}

fn domain(ino: u64) -> u32 {
    (ino >> DOMAIN_SHIFT) as u32
}

/// All inode numbers of a domain.
fn numbers(domain: u32) -> std::ops::RangeInclusive<u64> {
    let first = u64::from(domain) << DOMAIN_SHIFT;
    first..=first | ((1 << DOMAIN_SHIFT) - 1)
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
            i.known.range(numbers(domain)).map(|(ino, _)| *ino).collect()
        };
        let known = !inodes.is_empty();
        self.drop_all(inodes).await;
        self.0.new_epoch();
        if known {
            self.0.taken.note([domain]);
        }
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
        k.looked_up(5, 1, 0);
        k.looked_up(5, 1, 0);
        k.forgotten(5, 1);
        assert!(k.inodes.lock().known.contains_key(&5));
        k.forgotten(5, 1);
        assert!(!k.inodes.lock().known.contains_key(&5));
    }

    #[tokio::test]
    async fn forgetting_a_domain_makes_older_attributes_suspect() {
        let k = Arc::new(KnownInodes::default());
        let ino = 3 << DOMAIN_SHIFT | 8;
        k.looked_up(ino, 1, 0);
        KernelView(k.clone()).forget_domain(3).await;
        let rounds = |k: &KnownInodes| k.inodes.lock().known[&ino].round;
        assert_eq!(rounds(&k), 0);
        k.open_check(ino);
        assert_eq!(rounds(&k), 1);
    }

    #[test]
    fn a_file_has_grown_beyond_what_the_kernel_was_told_for_sure() {
        let k = KnownInodes::default();
        assert!(!k.has_grown(5, 100), "not known");
        k.looked_up(5, 1, 10);
        assert!(!k.has_grown(5, 100), "nothing of it is in the kernel's cache");
        k.pages_given(5);
        assert!(!k.has_grown(5, 10) && k.has_grown(5, 11));
        // It was shorter in between.
        assert!(!k.has_grown(5, 7) && k.has_grown(5, 10));
        k.looked_up(6, 1, 10);
        k.drop_range(6, 0, 1);
        assert!(k.has_grown(6, 11), "its attributes may have been on their way");
    }

    #[test]
    fn attributes_of_another_generation_are_not_given() {
        let k = KnownInodes::default();
        k.looked_up(5, 1, 0);
        assert!(k.attributes_given(5, 1) && !k.is_stale(5));
        assert!(!k.attributes_given(5, 2) && k.is_stale(5));
        k.looked_up(5, 2, 0);
        assert!(k.attributes_given(5, 2) && !k.is_stale(5));
        assert!(k.attributes_given(ROOT_INO, 7));
    }

    #[test]
    fn a_number_is_stale_until_it_is_given_again_or_forgotten() {
        let k = KnownInodes::default();
        for ino in [5, 6] {
            k.looked_up(ino, 1, 0);
            k.is_gone(ino);
            k.is_gone(ino);
            assert!(k.is_stale(ino));
        }
        k.looked_up(5, 2, 0);
        assert!(!k.is_stale(5) && k.is_stale(6));
        k.forgotten(6, 1);
        assert!(!k.is_stale(6));
        assert_eq!(k.inodes.lock().stale, 0);
        assert_eq!(k.of_domain(0), [(5, 2)]);
    }
}
