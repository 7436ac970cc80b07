//! A lock domain in memory: its admission, the order of its operations, and the file contents that wait to be written.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockdev::AlignedBuf;
use cluster::{LockId, Tenure};
use journal::RecordNo;
use parking_lot::Mutex;
use tokio::sync::RwLock;

use crate::contents::MappedWrites;
use crate::format::item::{Inode, Time};
use crate::hold::Hold;
use crate::locks::DomainLocks;

/// Bytes of a page: the unit in which file contents wait in memory, equal to a block.
pub const PAGE: u64 = 4096;

pub struct Domain {
    pub id: u32,
    pub hold: Arc<Hold>,
    /// Readers of the domain share it, an operation that changes the domain has it alone.
    pub ops: Arc<RwLock<()>>,
    pub files: Mutex<BTreeMap<u64, FileState>>,
    /// Tenure under which the store's blocks of this domain were read.
    pub cached_tenure: Mutex<Option<Tenure>>,
    /// An earlier revocation left the open flag in the lock block.
    pub open_flagged: Mutex<bool>,
    /// Under this tenure there may be unnamed files that only dead nodes had open.
    pub leftovers: Mutex<Option<Tenure>>,
    /// Version of its tree, if it changed since the lock block last said which it is.
    pub changed_to: Mutex<Option<u64>>,
    pub mapped: MappedWrites,
    pub locks: DomainLocks,
}

/// Contents of one page that the device does not have yet.
#[derive(Clone, Debug)]
pub struct Page {
    pub buf: Arc<AlignedBuf>,
    /// `None`: not handed to the journal yet. `Some`: goes out with this record; kept until that is durable.
    pub record: Option<RecordNo>,
}

/// Attributes that changed with contents still in memory; they reach the tree with those.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    pub size: u64,
    pub mtime: Time,
    pub ctime: Time,
    pub clear_suid: bool,
}

/// What is known of an inode beyond its items in the tree.
#[derive(Debug, Default)]
pub struct FileState {
    pub opens: u32,
    pub pages: BTreeMap<u64, Page>,
    pub live: Option<Live>,
    /// Blocks promised by the allocator to the dirty pages.
    pub reserved: u64,
}

impl FileState {
    pub fn dirty(&self) -> bool {
        self.live.is_some() || self.pages.values().any(|p| p.record.is_none())
    }

    /// Something acknowledged would be lost by a crash.
    pub fn unsaved(&self) -> bool {
        self.live.is_some() || !self.pages.is_empty()
    }

    fn idle(&self) -> bool {
        self.opens == 0 && self.pages.is_empty() && self.live.is_none()
    }

    /// The inode as users see it.
    pub fn overlay(&self, inode: &mut Inode) {
        if let Some(live) = &self.live {
            inode.size = live.size;
            inode.mtime = live.mtime;
            inode.ctime = live.ctime;
            if live.clear_suid {
                inode.mode = without_suid(inode.mode);
            }
        }
    }
}

/// As a write by an unprivileged user leaves the mode.
pub fn without_suid(mode: u32) -> u32 {
    let group_exec = mode & 0o010 != 0;
    let mode = mode & !0o4000;
    if group_exec { mode & !0o2000 } else { mode }
}

impl Domain {
    pub fn new(id: u32) -> Arc<Self> {
        Arc::new(Self {
            id,
            hold: Hold::new(LockId::Domain(id)),
            ops: Arc::new(RwLock::new(())),
            files: Mutex::new(BTreeMap::new()),
            cached_tenure: Mutex::new(None),
            open_flagged: Mutex::new(false),
            leftovers: Mutex::new(None),
            changed_to: Mutex::new(None),
            mapped: MappedWrites::default(),
            locks: DomainLocks::new(id),
        })
    }

    pub fn lock_id(&self) -> LockId {
        LockId::Domain(self.id)
    }

    /// Works on the state of an inode, which is made if need be and dropped when nothing is left in it.
    pub fn with_file<T>(&self, local: u64, f: impl FnOnce(&mut FileState) -> T) -> T {
        let mut files = self.files.lock();
        let state = files.entry(local).or_default();
        let out = f(state);
        if state.idle() {
            files.remove(&local);
        }
        out
    }

    /// Reads the state of an inode, if there is any.
    pub fn file<T>(&self, local: u64, f: impl FnOnce(&FileState) -> T) -> Option<T> {
        self.files.lock().get(&local).map(f)
    }

    pub fn overlay(&self, local: u64, inode: &mut Inode) {
        self.file(local, |s| s.overlay(inode));
    }

    pub fn has_leftovers(&self) -> bool {
        self.leftovers.lock().is_some()
    }

    /// Whether other nodes had files of it open when this one got the lock that it has.
    pub fn open_elsewhere(&self) -> bool {
        self.hold.grant().is_some_and(|g| g.open_elsewhere)
    }

    pub fn has_opens(&self) -> bool {
        self.files.lock().values().any(|s| s.opens > 0)
    }

    pub fn dirty_files(&self) -> Vec<u64> {
        self.files.lock().iter().filter(|(_, s)| s.dirty()).map(|(l, _)| *l).collect()
    }

    /// Drops pages whose record is durable.
    pub fn reap_pages(&self, durable: RecordNo) {
        self.files.lock().retain(|_, s| {
            s.pages.retain(|_, p| p.record.is_none_or(|r| r > durable));
            !s.idle()
        });
    }
}
