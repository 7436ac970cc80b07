//! The lock block: the truth about who holds a domain or group. Changed by compare-and-write only (I10).

use std::collections::BTreeMap;

use crate::{Grant, Incarnation, Layout, LockId, LockValue, MAX_NODES, Mode, NodeId, Slot, Tenure};

use super::doorbell::{kind_of, mode_bits, mode_of};
use super::{FormatError, begin, open, put, seal, u32_at, u64_at};

const MAGIC: &[u8; 4] = b"CLKB";
const ENTRIES: usize = 96;
const ENTRY: usize = 6;

/// One slot's part in a lock. It counts only while its incarnation has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub incarnation: Incarnation,
    pub held: Option<Mode>,
    pub wanted: Option<Mode>,
    /// Place in the queue of waiters, from 1 without gaps; 0 while nothing is wanted.
    pub ticket: u8,
    /// The node gave the lock up with files of the domain open.
    pub open: bool,
}

/// ```text
///   0  4  magic "CLKB"
///   4  1  version
///   5  1  kind: 0 domain, 1 group
///   6  1  crashes: how often leftovers may have come about (see the field), up to 255
///   7  1  zero
///   8  8  volume
///  16  4  number of the domain or group
///  20  4  zero
///  24  8  sequence number, +1 per change (I8)
///  32  8  tenure: sequence number at the latest exclusive acquisition (I5)
///  40  8  tenure before that
///  48  8  nonce of the latest change (I9)
///  56  8  value: root
///  64  8  value: next local number
///  72  8  value: version
///  80     zero
///  96  6  each of 64 slots: 4 incarnation, 1 bits (0-1 held, 2-3 wanted: 0 none, 1 shared, 2 exclusive; 4 open),
///         1 ticket
/// 480     zero
/// 496 16  checksum
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LockBlock {
    pub volume: u64,
    pub id: LockId,
    pub seq: u64,
    pub tenure: Tenure,
    pub previous_tenure: Tenure,
    pub nonce: u64,
    pub value: LockValue,
    /// How often a holder died, or a node that had files open ended, since an exclusive holder that knew of
    /// all of them last gave the lock up in order: if not 0 there may be leftovers.
    pub crashes: u8,
    /// Only slots with a part in the lock.
    pub entries: BTreeMap<Slot, Entry>,
}

impl LockBlock {
    /// A lock that nobody holds.
    pub fn unheld(volume: u64, id: LockId, value: LockValue) -> Self {
        Self {
            volume,
            id,
            seq: 1,
            tenure: 0,
            previous_tenure: 0,
            nonce: 0,
            value,
            crashes: 0,
            entries: BTreeMap::new(),
        }
    }

    pub fn encode(&self, stride: u64) -> Vec<u8> {
        let mut r = begin(MAGIC, self.volume);
        let (kind, number) = kind_of(self.id);
        r[5] = kind;
        r[6] = self.crashes;
        put(&mut r, 16, &number.to_le_bytes());
        put(&mut r, 24, &self.seq.to_le_bytes());
        put(&mut r, 32, &self.tenure.to_le_bytes());
        put(&mut r, 40, &self.previous_tenure.to_le_bytes());
        put(&mut r, 48, &self.nonce.to_le_bytes());
        put(&mut r, 56, &self.value.root.to_le_bytes());
        put(&mut r, 64, &self.value.next_local.to_le_bytes());
        put(&mut r, 72, &self.value.version.to_le_bytes());
        for (slot, e) in self.entries.range(..MAX_NODES as Slot) {
            let at = ENTRIES + ENTRY * usize::from(*slot);
            put(&mut r, at, &e.incarnation.to_le_bytes());
            r[at + 4] = mode_bits(e.held) | mode_bits(e.wanted) << 2 | u8::from(e.open) << 4;
            r[at + 5] = e.ticket;
        }
        seal(r, stride)
    }

    pub fn decode(sector: &[u8], volume: u64, id: LockId) -> Result<Self, FormatError> {
        let r = open(sector, MAGIC, volume)?;
        if (r[5], u32_at(&r, 16)) != kind_of(id) {
            return Err(FormatError::OtherPlace);
        }
        let mut entries = BTreeMap::new();
        for slot in 0..MAX_NODES {
            let at = ENTRIES + ENTRY * slot;
            let bits = r[at + 4];
            if bits == 0 {
                continue;
            }
            let entry = Entry {
                incarnation: u32_at(&r, at),
                held: mode_of(bits & 3)?,
                wanted: mode_of(bits >> 2 & 3)?,
                open: bits & 16 != 0,
                ticket: r[at + 5],
            };
            entries.insert(slot as Slot, entry);
        }
        let block = Self {
            volume,
            id,
            seq: u64_at(&r, 24),
            tenure: u64_at(&r, 32),
            previous_tenure: u64_at(&r, 40),
            nonce: u64_at(&r, 48),
            value: LockValue { root: u64_at(&r, 56), next_local: u64_at(&r, 64), version: u64_at(&r, 72) },
            crashes: r[6],
            entries,
        };
        block.check().map_err(FormatError::Invalid)?;
        if block.encode(sector.len() as u64) != sector {
            return Err(FormatError::Invalid("reserved bytes"));
        }
        Ok(block)
    }

    /// The invariants of a block's content, I4 among them.
    pub fn check(&self) -> Result<(), &'static str> {
        let held = self.entries.values().filter(|e| e.held.is_some()).count();
        if held > 1 && self.exclusive_holder().is_some() {
            return Err("holders: an exclusive one beside others");
        }
        let mut tickets: Vec<u8> = self.entries.values().filter(|e| e.wanted.is_some()).map(|e| e.ticket).collect();
        tickets.sort_unstable();
        if tickets.iter().enumerate().any(|(i, t)| usize::from(*t) != i + 1) {
            return Err("order of waiters");
        }
        if self.entries.values().any(|e| e.wanted.is_none() && e.ticket != 0) {
            return Err("ticket of a slot that does not wait");
        }
        if self.entries.values().any(|e| e.wanted.is_some() && e.wanted <= e.held) {
            return Err("want that is already held");
        }
        if self.entries.values().any(|e| e.incarnation == 0)
            || self.entries.keys().any(|s| usize::from(*s) >= MAX_NODES)
        {
            return Err("holder");
        }
        if self.tenure > self.seq || self.previous_tenure > self.tenure || self.seq >= u64::MAX / 2 {
            return Err("sequence number or tenure");
        }
        Ok(())
    }

    /// The node whose entry says that it holds the lock exclusively; it may have ended.
    pub fn exclusive_holder(&self) -> Option<NodeId> {
        let (slot, e) = self.entries.iter().find(|(_, e)| e.held == Some(Mode::Exclusive))?;
        Some(NodeId { slot: *slot, incarnation: e.incarnation })
    }

    /// The entry of this very life of the slot.
    pub fn entry(&self, node: NodeId) -> Option<&Entry> {
        self.entries.get(&node.slot).filter(|e| e.incarnation == node.incarnation)
    }

    /// The mode in which `node` holds the lock. Replay asks this of a dead node, and compares the tenure (I5).
    pub fn held_by(&self, node: NodeId) -> Option<Mode> {
        self.entry(node)?.held
    }

    /// What `node` has been granted, if anything.
    pub fn grant(&self, node: NodeId) -> Option<Grant> {
        let mode = self.held_by(node)?;
        Some(Grant {
            mode,
            previous_tenure: if mode == Mode::Exclusive { self.previous_tenure } else { self.tenure },
            tenure: self.tenure,
            value: self.value,
            open_elsewhere: self.entries.iter().any(|(slot, e)| *slot != node.slot && e.open),
            after_crash: self.crashes != 0,
        })
    }
}

/// What mkfs writes to a lock block: nobody holds it.
pub fn initial_lock_block(layout: &Layout, id: LockId, value: LockValue) -> Vec<u8> {
    LockBlock::unheld(layout.volume, id, value).encode(layout.stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LockBlock {
        let shared =
            Entry { incarnation: 3, held: Some(Mode::Shared), wanted: Some(Mode::Exclusive), ticket: 1, open: false };
        LockBlock {
            volume: 7,
            id: LockId::Group(0x0203),
            seq: 20,
            tenure: 18,
            previous_tenure: 12,
            nonce: 0x99,
            value: LockValue { root: 0x41, next_local: 0x42, version: 0x43 },
            crashes: 2,
            entries: BTreeMap::from([
                (1, shared),
                (63, Entry { incarnation: 9, held: None, wanted: None, ticket: 0, open: true }),
            ]),
        }
    }

    #[test]
    fn golden_bytes() {
        let b = sample().encode(512);
        assert_eq!(&b[..24], b"CLKB\x01\x01\x02\x00\x07\0\0\0\0\0\0\0\x03\x02\0\0\0\0\0\0");
        let words: Vec<u64> = b[24..80].chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        assert_eq!(words, [20, 18, 12, 0x99, 0x41, 0x42, 0x43]);
        assert_eq!(&b[96..108], &[0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0b1001, 1]);
        assert_eq!(&b[474..480], &[9, 0, 0, 0, 0b10000, 0]);
        assert_eq!(b[496..512], blake3::hash(&b[..496]).as_bytes()[..16]);
    }

    #[test]
    fn round_trip_and_damage() {
        for stride in [512, 4096] {
            let bytes = sample().encode(stride);
            assert_eq!(LockBlock::decode(&bytes, 7, LockId::Group(0x0203)), Ok(sample()));
            assert_eq!(LockBlock::decode(&bytes, 7, LockId::Domain(0x0203)), Err(FormatError::OtherPlace));
            for at in 0..bytes.len() {
                let mut bad = bytes.clone();
                bad[at] ^= 4;
                assert!(LockBlock::decode(&bad, 7, LockId::Group(0x0203)).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn a_block_that_breaks_one_writer_is_damaged() {
        let mut b = sample();
        b.entries
            .insert(2, Entry { incarnation: 1, held: Some(Mode::Exclusive), wanted: None, ticket: 0, open: false });
        assert!(matches!(LockBlock::decode(&b.encode(512), 7, b.id), Err(FormatError::Invalid(_))));
    }
}
