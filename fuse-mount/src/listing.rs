//! READDIR and READDIRPLUS. Cookies: 1 and 2 for "." and "..", those of the volume for names (they are larger).

use fs_core::{DirEntry, Leased};
use fuse_session::{DirBuffer, DirPlusBuffer, EntryOut, Reply};

use crate::convert::{self, to_ino};
use crate::handler::{Job, fail};

/// Bytes of an entry with a short name, as the kernel packs them.
const SMALL_ENTRY: usize = 48;
const SMALL_PLUS_ENTRY: usize = 176;
const DOT: u64 = 1;
const DOTDOT: u64 = 2;

type Result<T> = std::result::Result<T, fs_core::FsError>;

/// "." and "..", as far as `offset` has not passed them: (inode, cookie, name).
async fn dots(job: &Job, ino: u64, offset: u64) -> Result<Vec<(u64, u64, &'static [u8])>> {
    let mut out: Vec<(u64, u64, &'static [u8])> = Vec::new();
    if offset < DOT {
        out.push((ino, DOT, b"."));
    }
    if offset < DOTDOT {
        out.push((job.volume.parent(ino).await?, DOTDOT, b".."));
    }
    Ok(out)
}

/// One batch of names, about as many as fit. Only one: a second call would wait for a revocation that waits for the first
/// one's lease.
async fn names(job: &Job, ino: u64, offset: u64, max: usize, plus: bool) -> Result<Leased<Vec<DirEntry>>> {
    let after = if offset <= DOTDOT { 0 } else { offset };
    job.volume.readdir(ino, after, max.max(1), plus).await
}

pub async fn readdir(job: &Job, ino: u64, offset: u64, size: u32, reply: Reply) {
    let mut buf = DirBuffer::new(size);
    let dots = match dots(job, ino, offset).await {
        Ok(dots) => dots,
        Err(e) => return fail(&e, reply),
    };
    match names(job, ino, offset, size as usize / SMALL_ENTRY, false).await {
        Ok(held) => {
            let fits = dots.iter().all(|(ino, cookie, name)| buf.push(*ino, *cookie, libc::DT_DIR, name));
            // Stops at the first that does not fit.
            let _ = fits && held.value.iter().all(|e| buf.push(e.ino, e.cookie, e.file_type, &e.name));
            reply.dir(&buf);
            drop(held);
        }
        Err(e) => fail(&e, reply),
    }
}

pub async fn readdirplus(job: &Job, ino: u64, offset: u64, size: u32, reply: Reply) {
    let mut buf = DirPlusBuffer::new(size);
    let dots = match dots(job, ino, offset).await {
        Ok(dots) => dots,
        Err(e) => return fail(&e, reply),
    };
    let held = match names(job, ino, offset, size as usize / SMALL_PLUS_ENTRY, true).await {
        Ok(held) => held,
        Err(e) => return fail(&e, reply),
    };
    let no_entry = EntryOut::default();
    if !dots.iter().all(|(ino, cookie, name)| buf.push(&no_entry, *ino, *cookie, libc::DT_DIR, name)) {
        reply.dir_plus(&buf);
        return;
    }
    let mut given: Vec<u64> = Vec::new();
    for e in &held.value {
        // Without attributes the kernel takes the name only, and looks it up when it is used.
        let told = e.attr.as_ref().filter(|a| !job.must_learn(a));
        let entry = told.map_or_else(EntryOut::default, |a| convert::entry(a, held.cacheable));
        if entry.nodeid != 0 {
            given.push(to_ino(entry.nodeid));
            job.known.looked_up(to_ino(entry.nodeid), entry.generation, entry.attr.size);
        }
        if !buf.push(&entry, e.ino, e.cookie, e.file_type, &e.name) {
            if entry.nodeid != 0 {
                job.known.forgotten(to_ino(entry.nodeid), 1);
                given.pop();
            }
            break;
        }
    }
    if !reply.dir_plus(&buf) {
        given.iter().for_each(|ino| job.known.forgotten(*ino, 1));
    }
    drop(held);
}
