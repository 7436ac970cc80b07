//! Whom to tell that acknowledged changes were lost with a membership.
//!
//! What was not durable is gone, as after a crash, but here those who made the changes may live and ask for their durability.
//! Vouching for what is gone would lose mail; refusing to vouch for what others do since would make them deliver it twice.
//! So it is remembered which process changed which domain lately, and which files had unwritten contents:
//!
//! - an fsync of such a file through a descriptor from before fails, always (as on a local disk, it has to be opened anew);
//! - a file on which processes here had locks, which others may have had since, cannot be used any more through a descriptor
//!   from before;
//! - the next fsync in a domain with losses by a process that changed it before fails, once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fs_core::{Remains, ino_domain};
use fuse_session::abi::WRITE_CACHE;
use fuse_session::{LockKind, Op};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::convert::to_ino;
use crate::membership::epoch_of;

/// Changes are durable after this long: several times the interval of writing back.
const RECENT: Duration = Duration::from_secs(60);
/// Changes to remember before old ones are looked for.
const MANY: usize = 4096;

#[derive(Default)]
struct Tables {
    /// Which thread changed which domain, and when last.
    changes: BTreeMap<(u32, u32), Instant>,
    /// Processes that have not been told, by domain.
    untold: BTreeSet<(u32, u32)>,
    /// Files that lost contents, and the last epoch whose descriptors cannot be trusted.
    files: BTreeMap<u64, u64>,
    /// Files that lost locks, likewise.
    unlocked: BTreeMap<u64, u64>,
}

#[derive(Default)]
pub struct Losses(Mutex<Tables>);

impl Losses {
    /// Before a request is served: notes what it is going to change.
    pub fn note(&self, op: &Op, ino: u64, thread: u32) {
        if !changes(op) {
            return;
        }
        let mut t = self.0.lock();
        let now = Instant::now();
        t.changes.insert((ino_domain(ino), thread), now);
        if let Op::Rename { newdir, .. } = op {
            t.changes.insert((ino_domain(to_ino(*newdir)), thread), now);
        }
        if t.changes.len() > MANY {
            t.changes.retain(|_, at| now - *at < RECENT);
        }
    }

    /// A membership ended.
    pub fn happened(&self, left: &Remains, epoch: u64) {
        let mut t = self.0.lock();
        let now = Instant::now();
        let changes = std::mem::take(&mut t.changes);
        for ((domain, thread), at) in changes {
            if left.lost.contains(&domain) && now - at < RECENT {
                t.untold.insert((domain, process_of(thread)));
            }
        }
        t.files.extend(left.lost_files.iter().map(|ino| (*ino, epoch)));
        t.unlocked.extend(left.unlocked.iter().map(|ino| (*ino, epoch)));
    }

    /// Whether the request uses a file as if locks on it had been kept that were not.
    pub fn lost_lock(&self, op: &Op, ino: u64) -> bool {
        let handle = match op {
            Op::Read { fh, .. } | Op::Write { fh, .. } | Op::Fsync { fh, .. } | Op::Fallocate { fh, .. } => *fh,
            Op::Getlk { fh, .. } => *fh,
            Op::Setlk { fh, lock, .. } | Op::Setlkw { fh, lock, .. } if lock.kind != LockKind::Unlock => *fh,
            _ => return false,
        };
        let t = self.0.lock();
        t.unlocked.get(&ino).is_some_and(|last| epoch_of(handle) <= *last)
    }

    /// Whether an fsync of this inode must fail.
    pub fn tell(&self, ino: u64, epoch: u64, thread: u32) -> bool {
        let mut t = self.0.lock();
        if t.files.get(&ino).is_some_and(|last| epoch <= *last) {
            return true;
        }
        !t.untold.is_empty() && t.untold.remove(&(ino_domain(ino), process_of(thread)))
    }

    /// An fsync succeeded: nothing of this thread in the domain can be lost any more.
    pub fn durable(&self, ino: u64, thread: u32) {
        self.0.lock().changes.remove(&(ino_domain(ino), thread));
    }
}

fn changes(op: &Op) -> bool {
    match op {
        Op::Write { write_flags, .. } => write_flags & WRITE_CACHE == 0,
        Op::Setattr(_)
        | Op::Symlink { .. }
        | Op::Mknod { .. }
        | Op::Mkdir { .. }
        | Op::Unlink { .. }
        | Op::Rmdir { .. }
        | Op::Rename { .. }
        | Op::Link { .. }
        | Op::Create { .. }
        | Op::Tmpfile { .. }
        | Op::Setxattr { .. }
        | Op::Removexattr { .. }
        | Op::Fallocate { .. } => true,
        _ => false,
    }
}

/// The process of a thread; the thread's own number when it cannot be told (it has ended, or is in a namespace of its own).
fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("Tgid:"));
    line.and_then(|tgid| tgid.trim().parse().ok()).unwrap_or(thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_domain(domain: u64) -> u64 {
        domain << 40 | 7
    }

    fn unlink() -> Op {
        Op::Unlink { name: b"x".to_vec() }
    }

    #[tokio::test]
    async fn who_changed_a_domain_that_lost_changes_is_told_once() {
        let losses = Losses::default();
        let (me, somebody) = (std::process::id(), u32::MAX - 1);
        losses.note(&unlink(), in_domain(3), me);
        losses.note(&unlink(), in_domain(4), me);
        losses.note(&unlink(), in_domain(5), me);
        losses.durable(in_domain(5), me);
        losses.happened(&Remains { lost: [3, 5].into(), ..Remains::default() }, 0);
        assert!(!losses.tell(in_domain(3), 1, somebody), "had no part in it");
        assert!(!losses.tell(in_domain(4), 1, me), "nothing was lost there");
        assert!(!losses.tell(in_domain(5), 1, me), "was durable");
        assert!(losses.tell(in_domain(3), 1, me));
        assert!(!losses.tell(in_domain(3), 1, me), "once is enough");
    }

    #[tokio::test]
    async fn another_thread_of_the_process_is_told_too() {
        let losses = Losses::default();
        let (tx, rx) = std::sync::mpsc::channel::<()>();
        let (id, ids) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: asks for a number.
            let _ = id.send(unsafe { libc::gettid() });
            let _ = rx.recv();
        });
        let other = ids.recv().expect("the thread's number") as u32;
        losses.note(&unlink(), in_domain(3), other);
        losses.happened(&Remains { lost: [3].into(), ..Remains::default() }, 0);
        assert!(losses.tell(in_domain(3), 1, std::process::id()));
        drop(tx);
        thread.join().expect("thread");
    }

    #[tokio::test]
    async fn a_file_that_lost_contents_has_to_be_opened_anew() {
        let losses = Losses::default();
        losses.happened(&Remains { lost_files: [in_domain(3)].into(), ..Remains::default() }, 2);
        assert!(losses.tell(in_domain(3), 1, 1) && losses.tell(in_domain(3), 2, 1) && losses.tell(in_domain(3), 2, 1));
        assert!(!losses.tell(in_domain(3), 3, 1));
    }
}
