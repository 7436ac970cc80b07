//! A filesystem in memory that answers everything the tests ask, and remembers what it was asked.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_session::{
    Attr, DirBuffer, DirPlusBuffer, EntryOut, FileLock, Forget, Handler, InitConfig, InitFlags, InitRequest, LockKind,
    Negotiated, Op, Reply, Request, SetTime, Setattr, Statfs, Statx, Time, abi,
};
use parking_lot::Mutex;

pub const HOUR: Duration = Duration::from_secs(3600);

#[derive(Default)]
pub struct Node {
    pub attr: Attr,
    pub data: Vec<u8>,
    pub children: BTreeMap<Vec<u8>, u64>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub nlookup: u64,
}

struct Held {
    nodeid: u64,
    flock: bool,
    owner: u64,
    kind: LockKind,
}

/// A waiting SETLKW; the reply is taken by whoever answers first, the grant or the interrupt.
struct Parked {
    nodeid: u64,
    flock: bool,
    owner: u64,
    kind: LockKind,
    reply: Arc<Mutex<Option<Reply>>>,
}

#[derive(Default)]
pub struct State {
    pub nodes: BTreeMap<u64, Node>,
    next: u64,
    held: Vec<Held>,
    parked: Vec<Parked>,
    /// How often each name was looked up.
    pub lookups: BTreeMap<Vec<u8>, usize>,
    /// Lengths of READ and WRITE requests.
    pub reads: Vec<u32>,
    pub writes: Vec<usize>,
    /// `flock` of each lock request.
    pub lock_requests: Vec<bool>,
    /// Names of operations that came, for those that leave no other trace.
    pub seen: Vec<&'static str>,
    /// `groups` of the last MKDIR.
    pub mkdir_groups: Vec<u32>,
    pub destroyed: usize,
    pub negotiated: Option<Negotiated>,
}

pub struct MemFs {
    pub state: Mutex<State>,
}

fn now() -> Time {
    let t = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Time { sec: t.as_secs() as i64, nsec: t.subsec_nanos() }
}

impl State {
    pub fn add(&mut self, parent: u64, name: &[u8], mode: u32, uid: u32, gid: u32) -> u64 {
        let ino = self.add_unnamed(mode, uid, gid);
        self.nodes.get_mut(&parent).unwrap().children.insert(name.to_vec(), ino);
        self.nodes.get_mut(&ino).unwrap().attr.nlink = 1;
        ino
    }

    fn add_unnamed(&mut self, mode: u32, uid: u32, gid: u32) -> u64 {
        self.next += 1;
        let ino = self.next;
        let (atime, mtime, ctime) = (now(), now(), now());
        let attr = Attr { ino, mode, nlink: 0, uid, gid, blksize: 4096, atime, mtime, ctime, ..Attr::default() };
        self.nodes.insert(ino, Node { attr, ..Node::default() });
        ino
    }

    /// Changes a file behind the kernel's back.
    pub fn set_data(&mut self, nodeid: u64, data: &[u8]) {
        let node = self.nodes.get_mut(&nodeid).unwrap();
        node.data = data.to_vec();
        node.attr.size = data.len() as u64;
    }

    pub fn child(&self, parent: u64, name: &str) -> u64 {
        self.nodes[&parent].children[name.as_bytes()]
    }

    pub fn lookups_of(&self, name: &str) -> usize {
        self.lookups.get(name.as_bytes()).copied().unwrap_or(0)
    }

    pub fn parked(&self) -> usize {
        self.parked.iter().filter(|p| p.reply.lock().is_some()).count()
    }

    fn entry(&mut self, nodeid: u64) -> EntryOut {
        let node = self.nodes.get_mut(&nodeid).unwrap();
        node.nlookup += 1;
        EntryOut { nodeid, generation: 0, entry_valid: HOUR, attr_valid: HOUR, attr: node.attr }
    }

    fn conflict(&self, nodeid: u64, flock: bool, owner: u64, kind: LockKind) -> Option<&Held> {
        self.held.iter().find(|h| {
            let other = h.nodeid == nodeid && h.flock == flock && h.owner != owner;
            other && (h.kind == LockKind::Write || kind == LockKind::Write)
        })
    }

    fn set_lock(&mut self, nodeid: u64, flock: bool, owner: u64, kind: LockKind) {
        self.held.retain(|h| (h.nodeid, h.flock, h.owner) != (nodeid, flock, owner));
        if kind != LockKind::Unlock {
            self.held.push(Held { nodeid, flock, owner, kind });
        }
        for i in 0..self.parked.len() {
            let p = &self.parked[i];
            let (nodeid, flock, owner, kind) = (p.nodeid, p.flock, p.owner, p.kind);
            if self.conflict(nodeid, flock, owner, kind).is_none()
                && let Some(reply) = p.reply.clone().lock().take()
            {
                self.held.push(Held { nodeid, flock, owner, kind });
                reply.ok();
            }
        }
        self.parked.retain(|p| p.reply.lock().is_some());
    }
}

impl MemFs {
    pub fn new() -> Arc<MemFs> {
        let mut state = State::default();
        let root = state.add_unnamed(libc::S_IFDIR | 0o755, 0, 0);
        assert_eq!(root, abi::ROOT_ID);
        Arc::new(MemFs { state: Mutex::new(state) })
    }

    fn setattr(s: &mut State, nodeid: u64, set: &Setattr) {
        let node = s.nodes.get_mut(&nodeid).unwrap();
        let time = |t: SetTime| match t {
            SetTime::Now => now(),
            SetTime::At(t) => t,
        };
        if let Some(mode) = set.mode {
            node.attr.mode = node.attr.mode & libc::S_IFMT | mode & !libc::S_IFMT;
        }
        if let Some(size) = set.size {
            node.data.resize(size as usize, 0);
            node.attr.size = size;
        }
        node.attr.uid = set.uid.unwrap_or(node.attr.uid);
        node.attr.gid = set.gid.unwrap_or(node.attr.gid);
        node.attr.atime = set.atime.map_or(node.attr.atime, time);
        node.attr.mtime = set.mtime.map_or(node.attr.mtime, time);
        node.attr.ctime = set.ctime.unwrap_or_else(now);
    }

    fn rename(s: &mut State, dir: u64, name: &[u8], newdir: u64, newname: &[u8], flags: u32) -> Result<(), i32> {
        let node = *s.nodes[&dir].children.get(name).ok_or(libc::ENOENT)?;
        let target = s.nodes[&newdir].children.get(newname).copied();
        if flags & libc::RENAME_NOREPLACE != 0 && target.is_some() {
            return Err(libc::EEXIST);
        }
        s.nodes.get_mut(&dir).unwrap().children.remove(name);
        s.nodes.get_mut(&newdir).unwrap().children.insert(newname.to_vec(), node);
        if flags & libc::RENAME_EXCHANGE != 0 {
            let target = target.ok_or(libc::ENOENT)?;
            s.nodes.get_mut(&dir).unwrap().children.insert(name.to_vec(), target);
        }
        Ok(())
    }

    fn remove(s: &mut State, dir: u64, name: &[u8], directory: bool) -> Result<(), i32> {
        let node = *s.nodes[&dir].children.get(name).ok_or(libc::ENOENT)?;
        if directory && !s.nodes[&node].children.is_empty() {
            return Err(libc::ENOTEMPTY);
        }
        s.nodes.get_mut(&dir).unwrap().children.remove(name);
        s.nodes.get_mut(&node).unwrap().attr.nlink -= 1;
        Ok(())
    }

    fn write(s: &mut State, nodeid: u64, offset: u64, data: &[u8]) {
        let node = s.nodes.get_mut(&nodeid).unwrap();
        let end = offset as usize + data.len();
        if node.data.len() < end {
            node.data.resize(end, 0);
        }
        node.data[offset as usize..end].copy_from_slice(data);
        node.attr.size = node.data.len() as u64;
    }

    fn readdir(s: &mut State, nodeid: u64, offset: u64, size: u32, reply: Reply) -> bool {
        let mut out = DirBuffer::new(size);
        let children = s.nodes[&nodeid].children.clone();
        for (i, (name, ino)) in children.iter().enumerate().skip(offset as usize) {
            let dtype = (s.nodes[ino].attr.mode >> 12) as u8;
            if !out.push(*ino, i as u64 + 1, dtype, name) {
                break;
            }
        }
        reply.dir(&out)
    }

    fn readdirplus(s: &mut State, nodeid: u64, offset: u64, size: u32, reply: Reply) -> bool {
        let mut out = DirPlusBuffer::new(size);
        let children = s.nodes[&nodeid].children.clone();
        for (i, (name, ino)) in children.iter().enumerate().skip(offset as usize) {
            let dtype = (s.nodes[ino].attr.mode >> 12) as u8;
            let entry = s.entry(*ino);
            if !out.push(&entry, *ino, i as u64 + 1, dtype, name) {
                s.nodes.get_mut(ino).unwrap().nlookup -= 1;
                break;
            }
        }
        reply.dir_plus(&out)
    }

    fn setlk(s: &mut State, nodeid: u64, owner: u64, lock: FileLock, flock: bool, wait: bool, reply: Reply) -> bool {
        s.lock_requests.push(flock);
        if lock.kind == LockKind::Unlock || s.conflict(nodeid, flock, owner, lock.kind).is_none() {
            s.set_lock(nodeid, flock, owner, lock.kind);
            return reply.ok();
        }
        if !wait {
            return reply.err(libc::EAGAIN);
        }
        let handle = reply.interrupt_handle().unwrap();
        let parked = Arc::new(Mutex::new(Some(reply)));
        let mine = parked.clone();
        handle.on_interrupt(move || {
            if let Some(reply) = mine.lock().take() {
                reply.err(libc::EINTR);
            }
        });
        s.parked.push(Parked { nodeid, flock, owner, kind: lock.kind, reply: parked });
        true
    }

    fn getlk(s: &mut State, nodeid: u64, owner: u64, lock: FileLock, flock: bool, reply: Reply) -> bool {
        let held = s.conflict(nodeid, flock, owner, lock.kind);
        let kind = held.map_or(LockKind::Unlock, |h| h.kind);
        reply.lk(&FileLock { kind, ..lock })
    }

    fn statx(s: &State, nodeid: u64, reply: Reply) -> bool {
        let a = &s.nodes[&nodeid].attr;
        let statx = Statx {
            mask: libc::STATX_BASIC_STATS | libc::STATX_BTIME,
            blksize: a.blksize,
            nlink: a.nlink,
            uid: a.uid,
            gid: a.gid,
            mode: a.mode,
            ino: a.ino,
            size: a.size,
            atime: a.atime,
            btime: Time { sec: 1234, nsec: 5678 },
            ctime: a.ctime,
            mtime: a.mtime,
            ..Statx::default()
        };
        reply.statx(HOUR, &statx)
    }

    fn done(result: Result<(), i32>, reply: Reply) -> bool {
        match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.err(errno),
        }
    }
}

impl Handler for MemFs {
    fn init(&self, offer: &InitRequest) -> InitConfig {
        let flags = InitFlags::ASYNC_READ
            | InitFlags::POSIX_LOCKS
            | InitFlags::FLOCK_LOCKS
            | InitFlags::PARALLEL_DIROPS
            | InitFlags::DO_READDIRPLUS
            | InitFlags::EXPLICIT_INVAL_DATA
            | InitFlags::SETXATTR_EXT
            | InitFlags::HAS_EXPIRE_ONLY
            | InitFlags::CREATE_SUPP_GROUP
            | InitFlags::DONT_MASK
            | if crate::URING { InitFlags::OVER_IO_URING } else { InitFlags::default() };
        assert!(offer.flags.contains(InitFlags::INIT_EXT));
        InitConfig { flags, ..InitConfig::default() }
    }

    fn initialized(&self, negotiated: &Negotiated) {
        self.state.lock().negotiated = Some(*negotiated);
    }

    fn request(&self, request: Request, reply: Reply) {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let nodeid = request.nodeid;
        if !s.nodes.contains_key(&nodeid) {
            reply.err(libc::ESTALE);
            return;
        }
        match request.op {
            Op::Lookup { name } => {
                *s.lookups.entry(name.clone()).or_default() += 1;
                match name.as_slice() {
                    b"unanswered" => drop(reply),
                    b"panic" => panic!("asked to panic"),
                    _ => {
                        let child = s.nodes[&nodeid].children.get(&name).copied();
                        reply.entry(&child.map_or(EntryOut::negative(HOUR), |ino| s.entry(ino)));
                    }
                }
            }
            Op::Getattr { .. } => {
                reply.attr(HOUR, &s.nodes[&nodeid].attr);
            }
            Op::Setattr(set) => {
                Self::setattr(s, nodeid, &set);
                reply.attr(HOUR, &s.nodes[&nodeid].attr);
            }
            Op::Readlink => {
                reply.readlink(&s.nodes[&nodeid].data);
            }
            Op::Symlink { name, target } => {
                let ino = s.add(nodeid, &name, libc::S_IFLNK | 0o777, request.uid, request.gid);
                s.set_data(ino, &target);
                reply.entry(&s.entry(ino));
            }
            Op::Mknod { name, mode, rdev, umask } => {
                let ino = s.add(nodeid, &name, mode & !umask, request.uid, request.gid);
                s.nodes.get_mut(&ino).unwrap().attr.rdev = rdev;
                reply.entry(&s.entry(ino));
            }
            Op::Mkdir { name, mode, umask } => {
                s.mkdir_groups = request.groups;
                let ino = s.add(nodeid, &name, libc::S_IFDIR | mode & !umask, request.uid, request.gid);
                reply.entry(&s.entry(ino));
            }
            Op::Unlink { name } => {
                Self::done(Self::remove(s, nodeid, &name, false), reply);
            }
            Op::Rmdir { name } => {
                Self::done(Self::remove(s, nodeid, &name, true), reply);
            }
            Op::Rename { name, newdir, newname, flags } => {
                Self::done(Self::rename(s, nodeid, &name, newdir, &newname, flags), reply);
            }
            Op::Link { oldnode, newname } => {
                s.nodes.get_mut(&nodeid).unwrap().children.insert(newname, oldnode);
                s.nodes.get_mut(&oldnode).unwrap().attr.nlink += 1;
                reply.entry(&s.entry(oldnode));
            }
            Op::Open { .. } => {
                reply.open(0, abi::FOPEN_KEEP_CACHE);
            }
            Op::Opendir { .. } => {
                reply.open(0, 0);
            }
            Op::Create { name, mode, umask, .. } => {
                let ino = s.add(nodeid, &name, mode & !umask, request.uid, request.gid);
                reply.create(&s.entry(ino), 0, abi::FOPEN_KEEP_CACHE);
            }
            Op::Tmpfile { mode, umask, .. } => {
                s.seen.push("tmpfile");
                let ino = s.add_unnamed(mode & !umask, request.uid, request.gid);
                reply.create(&s.entry(ino), 0, abi::FOPEN_KEEP_CACHE);
            }
            Op::Read { offset, size, .. } => {
                s.reads.push(size);
                let data = &s.nodes[&nodeid].data;
                let from = data.len().min(offset as usize);
                let part = &data[from..data.len().min(from + size as usize)];
                let (a, b) = part.split_at(part.len() / 2);
                reply.data_vectored(&[IoSlice::new(a), IoSlice::new(b)]);
            }
            Op::Write { offset, data, .. } => {
                s.writes.push(data.len());
                Self::write(s, nodeid, offset, &data);
                reply.write(data.len() as u32);
            }
            Op::Statfs => {
                let totals = Statfs {
                    blocks: 1000,
                    bfree: 600,
                    bavail: 500,
                    files: 70,
                    ffree: 60,
                    bsize: 4096,
                    namelen: 255,
                    frsize: 512,
                };
                reply.statfs(&totals);
            }
            Op::Release { flock_release, lock_owner, .. } => {
                if flock_release {
                    s.seen.push("release with flock");
                    s.set_lock(nodeid, true, lock_owner, LockKind::Unlock);
                }
                reply.ok();
            }
            Op::Flush { lock_owner, .. } => {
                s.set_lock(nodeid, false, lock_owner, LockKind::Unlock);
                reply.ok();
            }
            Op::Fsync { datasync, .. } => {
                s.seen.push(if datasync { "fdatasync" } else { "fsync" });
                reply.ok();
            }
            Op::Releasedir { .. } | Op::Fsyncdir { .. } | Op::Access { .. } | Op::Syncfs => {
                reply.ok();
            }
            Op::Readdir { offset, size, .. } => {
                Self::readdir(s, nodeid, offset, size, reply);
            }
            Op::Readdirplus { offset, size, .. } => {
                s.seen.push("readdirplus");
                Self::readdirplus(s, nodeid, offset, size, reply);
            }
            Op::Setxattr { name, value, .. } => {
                s.nodes.get_mut(&nodeid).unwrap().xattrs.insert(name, value);
                reply.ok();
            }
            Op::Getxattr { name, size } => {
                match s.nodes[&nodeid].xattrs.get(&name) {
                    Some(value) => reply.xattr(size, value),
                    None => reply.err(libc::ENODATA),
                };
            }
            Op::Listxattr { size } => {
                let names: Vec<u8> =
                    s.nodes[&nodeid].xattrs.keys().flat_map(|n| [n.as_slice(), &[0]].concat()).collect();
                reply.xattr(size, &names);
            }
            Op::Removexattr { name } => {
                let removed = s.nodes.get_mut(&nodeid).unwrap().xattrs.remove(&name);
                Self::done(removed.map(drop).ok_or(libc::ENODATA), reply);
            }
            Op::Getlk { owner, lock, flock, .. } => {
                Self::getlk(s, nodeid, owner, lock, flock, reply);
            }
            Op::Setlk { owner, lock, flock, .. } => {
                Self::setlk(s, nodeid, owner, lock, flock, false, reply);
            }
            Op::Setlkw { owner, lock, flock, .. } => {
                Self::setlk(s, nodeid, owner, lock, flock, true, reply);
            }
            Op::CopyFileRange { off_in, nodeid_out, off_out, len, .. } => {
                s.seen.push("copy_file_range");
                let data = &s.nodes[&nodeid].data;
                let from = data.len().min(off_in as usize);
                let part = data[from..data.len().min(from + len as usize)].to_vec();
                Self::write(s, nodeid_out, off_out, &part);
                reply.copied(part.len() as u64);
            }
            Op::Fallocate { offset, length, .. } => {
                let node = s.nodes.get_mut(&nodeid).unwrap();
                node.data.resize((offset + length) as usize, 0);
                node.attr.size = node.data.len() as u64;
                reply.ok();
            }
            Op::Lseek { offset, .. } => {
                reply.lseek(offset + 7);
            }
            Op::Statx { .. } => {
                Self::statx(s, nodeid, reply);
            }
            Op::Ioctl { out_size, .. } => {
                reply.ioctl(0, &0x20u64.to_ne_bytes()[..out_size as usize]);
            }
            Op::Poll { .. } => {
                reply.poll(libc::POLLPRI as u32);
            }
            Op::Bmap { .. } => {
                reply.err(libc::ENOSYS);
            }
        }
    }

    fn forget(&self, forgets: Vec<Forget>) {
        let mut s = self.state.lock();
        for f in forgets {
            if let Some(node) = s.nodes.get_mut(&f.nodeid) {
                assert!(node.nlookup >= f.nlookup, "more forgotten than looked up");
                node.nlookup -= f.nlookup;
            }
        }
    }

    fn destroy(&self) {
        self.state.lock().destroyed += 1;
    }
}
