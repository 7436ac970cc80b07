//! Requests about file locks. The kernel keeps none itself: it asks for each, and tells when a process closes a file and when the
//! last descriptor of an open file is gone; whose open file description locks end then is for us to know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fs_core::{FileLock, FsError, Space, TO_THE_END, Volume};
use fuse_session::{LockKind, Reply};

use parking_lot::Mutex;

use crate::handler::{Job, fail, plain};
use crate::interrupt::Interrupt;

/// The kernel tells of the last close of an open file, which ends its locks, when the close has returned already: a try that
/// fails because of a lock on this node is repeated once, after this.
const CLOSE_ON_ITS_WAY: Duration = Duration::from_millis(2);

/// How long a close waits for the end of the locks that it ends.
const PATIENCE: Duration = Duration::from_secs(1);

/// Of one lock request.
pub(crate) struct LockRequest {
    pub ino: u64,
    /// Of the open file: the owner of a `flock`.
    pub handle: u64,
    /// Of a record lock, as the kernel numbers them.
    pub owner: u64,
    pub lock: fuse_session::FileLock,
    pub flock: bool,
}

impl LockRequest {
    fn wanted(&self) -> FileLock {
        let (space, first, last) = match self.flock {
            true => (Space::Flock, 0, TO_THE_END),
            false => (Space::Record, self.lock.start, self.lock.end.min(TO_THE_END)),
        };
        // The kernel numbers open files by where they are in its memory, and may use a place again before we hear that the open
        // file that was there is gone. No handle is given twice.
        let owner = if self.flock { self.handle } else { self.owner };
        let exclusive = self.lock.kind == LockKind::Write;
        FileLock { space, owner, first, last, exclusive, pid: self.lock.pid }
    }
}

impl Job {
    pub(crate) async fn getlk(&self, q: LockRequest, reply: Reply) {
        match self.volume.test_lock(q.ino, q.wanted()).await {
            Ok(Some(held)) => {
                let kind = if held.exclusive { LockKind::Write } else { LockKind::Read };
                // A process of another host has no number here.
                let pid = held.pid.unwrap_or(0);
                reply.lk(&fuse_session::FileLock { start: held.first, end: held.last, kind, pid });
            }
            Ok(None) => drop(reply.lk(&fuse_session::FileLock { kind: LockKind::Unlock, ..q.lock })),
            Err(e) => fail(&e, reply),
        }
    }

    pub(crate) async fn setlk(&self, q: LockRequest, wait: bool, reply: Reply, interrupt: &Interrupt) {
        let want = q.wanted();
        if want.first > want.last {
            return fail(&FsError::Invalid, reply);
        }
        if !q.flock && q.lock.kind != LockKind::Unlock {
            self.pass.membership.locked_through.locks(q.handle, q.ino, q.owner);
        }
        let result = match (q.lock.kind, wait) {
            (LockKind::Unlock, _) => match self.volume.begin_unlock(q.ino, want) {
                true => finish(&self.volume, q.ino, Some(interrupt)).await,
                false => Ok(()),
            },
            (_, true) => self.volume.lock(q.ino, want, interrupt.came()).await,
            (_, false) => self.try_lock(q.ino, want).await,
        };
        match result {
            // Nothing is wrong.
            Err(FsError::Locked) => drop(reply.err(libc::EAGAIN)),
            r => plain(r, reply),
        }
    }

    async fn try_lock(&self, ino: u64, want: FileLock) -> Result<(), FsError> {
        let first = self.volume.try_lock(ino, want).await;
        if !matches!(first, Err(FsError::Locked)) {
            return first;
        }
        match self.volume.test_lock(ino, want).await? {
            Some(held) if held.pid.is_some() => tokio::time::sleep(CLOSE_ON_ITS_WAY).await,
            _ => {}
        }
        self.volume.try_lock(ino, want).await
    }
}

/// Through which open files `fcntl` locks were set, by whom, since that owner last closed the file. A process has closed the file
/// before its last descriptor is gone; so owners that are left then are the open file itself.
#[derive(Default)]
pub struct LockedThrough(Mutex<Owners>);

#[derive(Default)]
struct Owners {
    of_handle: BTreeMap<u64, BTreeSet<(u64, u64)>>,
    handles: BTreeMap<(u64, u64), BTreeSet<u64>>,
}

impl LockedThrough {
    pub fn locks(&self, handle: u64, ino: u64, owner: u64) {
        let mut o = self.0.lock();
        o.of_handle.entry(handle).or_default().insert((ino, owner));
        o.handles.entry((ino, owner)).or_default().insert(handle);
    }

    /// A process closed a descriptor of the file.
    pub fn closed(&self, ino: u64, owner: u64) {
        let mut o = self.0.lock();
        for handle in o.handles.remove(&(ino, owner)).unwrap_or_default() {
            if let Some(owners) = o.of_handle.get_mut(&handle) {
                owners.remove(&(ino, owner));
                if owners.is_empty() {
                    o.of_handle.remove(&handle);
                }
            }
        }
    }

    /// The open file is gone: `ends` is told, before anybody else's lock is noted, whose locks go with it. An owner that has
    /// locked through another one since is not: the kernel numbers the two alike, and which lock is whose cannot be told.
    pub fn released(&self, handle: u64, mut ends: impl FnMut(u64)) {
        let mut o = self.0.lock();
        for who in o.of_handle.remove(&handle).unwrap_or_default() {
            if let Some(handles) = o.handles.get_mut(&who) {
                handles.remove(&handle);
                if handles.is_empty() {
                    o.handles.remove(&who);
                    ends(who.1);
                }
            }
        }
    }
}

/// The owner closed a descriptor of the file, which ends all its record locks on it.
pub(crate) async fn closed(volume: &Arc<Volume>, ino: u64, owner: u64) {
    if volume.begin_unlock(ino, FileLock::all_of(Space::Record, owner)) {
        finish_patiently(volume, ino).await;
    }
}

/// The last descriptor of an open file is gone, and with it the locks that are its own.
pub(crate) async fn released(volume: &Arc<Volume>, through: &LockedThrough, ino: u64, handle: u64, flock: bool) {
    let mut any = flock && volume.begin_unlock(ino, FileLock::all_of(Space::Flock, handle));
    through.released(handle, |owner| any |= volume.begin_unlock(ino, FileLock::all_of(Space::Record, owner)));
    if any {
        finish_patiently(volume, ino).await;
    }
}

async fn finish_patiently(volume: &Arc<Volume>, ino: u64) {
    // A failure is the end of this node's membership, and of its locks. A process that is being killed cannot interrupt its
    // closes: it must not wait for a node that hangs.
    let _ended = tokio::time::timeout(PATIENCE, finish(volume, ino, None)).await;
}

/// Carries begun unlocks to the end, also if nobody waits for that any more: locks of a process that is gone would stay for
/// ever. A process that gets a signal is told that it is done, which it is as soon as it can be.
async fn finish(volume: &Arc<Volume>, ino: u64, interrupt: Option<&Interrupt>) -> Result<(), FsError> {
    let v = volume.clone();
    let mut work = Box::pin(async move { v.finish_unlocks(ino).await });
    let at_once = tokio::select! {
        biased;
        done = &mut work => Some(done),
        () = std::future::ready(()) => None,
    };
    if let Some(done) = at_once {
        return done;
    }
    let work = tokio::spawn(work);
    let interrupted = async {
        match interrupt {
            Some(i) => i.came().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        done = work => done.unwrap_or(Ok(())),
        () = interrupted => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released(through: &LockedThrough, handle: u64) -> Vec<u64> {
        let mut ended = Vec::new();
        through.released(handle, |owner| ended.push(owner));
        ended
    }

    #[test]
    fn the_open_files_own_locks_are_left_at_its_end() {
        let through = LockedThrough::default();
        let (process, description) = (7, 8);
        for handle in [1, 2] {
            through.locks(handle, 5, process);
        }
        through.locks(1, 5, description);
        through.closed(5, process);
        // Locked again, through the other descriptor only.
        through.locks(2, 5, process);
        assert_eq!(released(&through, 1), [description]);
        assert!(released(&through, 1).is_empty());
        through.closed(5, process);
        assert!(released(&through, 2).is_empty());
        assert!(through.0.lock().of_handle.is_empty() && through.0.lock().handles.is_empty());
    }

    #[test]
    fn the_end_of_an_open_file_leaves_the_locks_of_one_of_the_same_number() {
        let through = LockedThrough::default();
        through.locks(1, 5, 8);
        through.locks(2, 5, 8);
        assert!(released(&through, 1).is_empty());
        assert_eq!(released(&through, 2), [8]);
        assert!(through.0.lock().of_handle.is_empty() && through.0.lock().handles.is_empty());
    }
}
