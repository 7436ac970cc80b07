//! File locks that outlast their node's hold of the domain: items (object 0, kind 9) whose offset is the number of the entry.
//! Numbers grow, so those of waiters are their order. An entry counts while the incarnation of its node has not ended.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 8 | local number of the inode |
//! | 8  | 8 | owner: a process's table of files or an open file, as the owner's node numbers them |
//! | 16 | 8 | first byte |
//! | 24 | 8 | last byte, included; 2^63 - 1 is the end of the file, wherever that is |
//! | 32 | 4 | incarnation of the owner's node |
//! | 36 | 2 | slot of the owner's node |
//! | 38 | 1 | flags: 1 exclusive, 2 flock, 4 waited for, not held |
//! | 39 | 1 | zero |
//! | 40 | 4 | process that set the lock, on its node; only to be shown |

use cluster::{MAX_NODES, NodeId};

use super::bytes::{FormatError, Reader, Writer};
use crate::locks::{Entry, Lock, Owner, Space, TO_THE_END};

pub const FILE_LOCK_SIZE: usize = 44;
const WHAT: &str = "file lock";
const EXCLUSIVE: u8 = 1;
const FLOCK: u8 = 2;
const WAITS: u8 = 4;

pub fn encode(e: &Entry) -> [u8; FILE_LOCK_SIZE] {
    let l = &e.lock;
    let flag = |on, bit| if on { bit } else { 0 };
    let flags = flag(l.exclusive, EXCLUSIVE) | flag(l.space == Space::Flock, FLOCK) | flag(e.waits, WAITS);
    let mut b = [0; FILE_LOCK_SIZE];
    let mut w = Writer::new(&mut b);
    w.u64(l.file).u64(l.owner.id).u64(l.first).u64(l.last);
    w.u32(l.owner.node.incarnation).u16(l.owner.node.slot).u8(flags).u8(0).u32(l.pid);
    b
}

pub fn decode(b: &[u8]) -> Result<Entry, FormatError> {
    let mut r = Reader::new(WHAT, b);
    let (file, id, first, last) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
    let (incarnation, slot, flags, zero, pid) = (r.u32()?, r.u16()?, r.u8()?, r.u8()?, r.u32()?);
    if first > last || last > TO_THE_END {
        return Err(FormatError::new(WHAT, format!("bytes {first} to {last} are no range")));
    }
    if flags & !(EXCLUSIVE | FLOCK | WAITS) != 0 || zero != 0 || !r.rest().is_empty() {
        return Err(FormatError::new(WHAT, "reserved bytes"));
    }
    if usize::from(slot) >= MAX_NODES || incarnation == 0 {
        return Err(FormatError::new(WHAT, "its owner is no node"));
    }
    let space = if flags & FLOCK != 0 { Space::Flock } else { Space::Record };
    let owner = Owner { node: NodeId { slot, incarnation }, id };
    let lock = Lock { file, space, owner, first, last, exclusive: flags & EXCLUSIVE != 0, pid };
    Ok(Entry { lock, waits: flags & WAITS != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Entry {
        let owner = Owner { node: NodeId { slot: 6, incarnation: 0x0708 }, id: 2 };
        let lock = Lock { file: 1, space: Space::Flock, owner, first: 3, last: 4, exclusive: true, pid: 9 };
        Entry { lock, waits: true }
    }

    #[test]
    fn golden_bytes() {
        let b = encode(&sample());
        let words: Vec<u64> = b[..32].chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        assert_eq!(words, [1, 2, 3, 4]);
        assert_eq!(b[32..], [8, 7, 0, 0, 6, 0, 7, 0, 9, 0, 0, 0]);
        assert_eq!(decode(&b), Ok(sample()));
    }

    #[test]
    fn damage_is_found() {
        let good = encode(&sample());
        for (at, byte) in [(31, 0x80), (16, 5), (36, 64), (38, 8), (39, 1)] {
            let mut bad = good;
            bad[at] = byte;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
        assert!(decode(&good[..43]).is_err() && decode(&[&good[..], &[0]].concat()).is_err());
        let mut nobody = good;
        nobody[32..36].fill(0);
        assert!(decode(&nobody).is_err());
    }
}
