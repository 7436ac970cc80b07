//! Records and headers on disk. All integers are little endian; a record starts on a sector and is padded to one.
//!
//! Record:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 4  | magic `CLJR` |
//! | 4  | 4  | version, 1 |
//! | 8  | 8  | volume id |
//! | 16 | 2  | slot |
//! | 18 | 2  | zero |
//! | 20 | 4  | incarnation |
//! | 24 | 8  | number |
//! | 32 | 4  | length in bytes, padding included |
//! | 36 | 4  | length of the payload |
//! | 40 | 8  | every record up to this number was durable when this one was written |
//! | 48 | 4  | locks |
//! | 52 | 4  | data sums |
//! | 56 | 4  | revokes |
//! | 60 | 4  | changes |
//! | 64 | 32 | blake3 of bytes 0..64 and the payload |
//! | 96 |    | payload |
//!
//! Payload: locks (type u8: 0 domain, 1 group; number u32; tenure u64), data sums (first block u64, blocks u32, first 16
//! bytes of the blake3 of their contents), revokes (first block u64, count u64), changes (index of the lock u16, block u64,
//! flags u8: 1 = the base is a zeroed block; first 8 bytes of the resulting block's checksum; number of ranges u16; per range
//! offset u16, length u16, bytes).
//!
//! Header: two copies of 4096 bytes at the start of the region, written in turn, so that a torn write leaves one good:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 4  | magic `CLJH` |
//! | 4  | 4  | version, 1 |
//! | 8  | 8  | volume id |
//! | 16 | 2  | slot |
//! | 18 | 2  | zero |
//! | 20 | 4  | incarnation whose records follow |
//! | 24 | 8  | generation: the copy with the larger one counts |
//! | 32 | 8  | tail: byte offset in the ring of the oldest record that may be needed |
//! | 40 | 8  | its number (records before it are not needed, whatever is in the ring) |
//! | 48 | 32 | blake3 of bytes 0..48 |

use cluster::{LockId, NodeId, Tenure};

use crate::types::{RecordNo, Region};

pub const RECORD_HEADER: usize = 96;
pub const HEADER_COPY: usize = 4096;
/// The ring starts behind the two header copies.
pub const RING_START: u64 = 2 * HEADER_COPY as u64;
const RECORD_MAGIC: [u8; 4] = *b"CLJR";
const HEADER_MAGIC: [u8; 4] = *b"CLJH";
const VERSION: u32 = 1;

/// Reads fields, refusing to read beyond the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
    fn u8(&mut self) -> Option<u8> {
        Some(self.bytes(1)?[0])
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSum {
    pub block: u64,
    pub blocks: u32,
    pub sum: [u8; 16],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    pub lock: u16,
    pub block: u64,
    /// The ranges apply to a zeroed block: nothing older is needed.
    pub whole: bool,
    pub sum: [u8; 8],
    pub ranges: Vec<(u16, Vec<u8>)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Record {
    pub number: RecordNo,
    pub durable_before: RecordNo,
    pub locks: Vec<(LockId, Tenure)>,
    pub sums: Vec<DataSum>,
    pub revokes: Vec<(u64, u64)>,
    pub changes: Vec<Delta>,
}

fn hash(head: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut h = blake3::Hasher::new();
    h.update(head);
    h.update(payload);
    *h.finalize().as_bytes()
}

impl Record {
    /// The record padded to `sector` bytes.
    pub fn encode(&self, region: &Region, node: NodeId, sector: usize) -> Vec<u8> {
        let mut b = vec![0; RECORD_HEADER];
        for (id, tenure) in &self.locks {
            let (kind, number) = match id {
                LockId::Domain(d) => (0u8, *d),
                LockId::Group(g) => (1, *g),
            };
            b.push(kind);
            b.extend(number.to_le_bytes());
            b.extend(tenure.to_le_bytes());
        }
        for s in &self.sums {
            b.extend(s.block.to_le_bytes());
            b.extend(s.blocks.to_le_bytes());
            b.extend(s.sum);
        }
        for (block, count) in &self.revokes {
            b.extend(block.to_le_bytes());
            b.extend(count.to_le_bytes());
        }
        for c in &self.changes {
            b.extend(c.lock.to_le_bytes());
            b.extend(c.block.to_le_bytes());
            b.push(u8::from(c.whole));
            b.extend(c.sum);
            b.extend((c.ranges.len() as u16).to_le_bytes());
            for (at, bytes) in &c.ranges {
                b.extend(at.to_le_bytes());
                b.extend((bytes.len() as u16).to_le_bytes());
                b.extend(bytes);
            }
        }
        let payload = (b.len() - RECORD_HEADER) as u32;
        b.resize(b.len().next_multiple_of(sector), 0);
        let total = b.len() as u32;
        b[..4].copy_from_slice(&RECORD_MAGIC);
        b[4..8].copy_from_slice(&VERSION.to_le_bytes());
        b[8..16].copy_from_slice(&region.volume.to_le_bytes());
        b[16..18].copy_from_slice(&region.slot.to_le_bytes());
        b[20..24].copy_from_slice(&node.incarnation.to_le_bytes());
        b[24..32].copy_from_slice(&self.number.to_le_bytes());
        b[32..36].copy_from_slice(&total.to_le_bytes());
        b[36..40].copy_from_slice(&payload.to_le_bytes());
        b[40..48].copy_from_slice(&self.durable_before.to_le_bytes());
        let counts = [self.locks.len(), self.sums.len(), self.revokes.len(), self.changes.len()];
        for (i, n) in counts.into_iter().enumerate() {
            b[48 + 4 * i..52 + 4 * i].copy_from_slice(&(n as u32).to_le_bytes());
        }
        let sum = hash(&b[..64], &b[RECORD_HEADER..RECORD_HEADER + payload as usize]);
        b[64..96].copy_from_slice(&sum);
        b
    }

    /// The padded length that the record starting here claims, if it looks like one of this slot and incarnation.
    pub fn peek(b: &[u8], region: &Region, incarnation: u32) -> Option<(RecordNo, usize)> {
        let mut r = Reader(b.get(..RECORD_HEADER)?);
        let ours = r.bytes(4)? == RECORD_MAGIC && r.u32()? == VERSION && r.u64()? == region.volume;
        let ours = ours && r.u16()? == region.slot && r.u16()? == 0 && r.u32()? == incarnation;
        let (number, total, payload) = (r.u64()?, r.u32()? as usize, r.u32()? as usize);
        let fits =
            total >= RECORD_HEADER && payload <= total - RECORD_HEADER && total as u64 <= region.len - RING_START;
        (ours && fits).then_some((number, total))
    }

    /// Decodes and verifies; `None` for anything that is not exactly what `encode` made for this slot and incarnation.
    pub fn decode(b: &[u8], region: &Region, incarnation: u32) -> Option<Self> {
        let (number, total) = Self::peek(b, region, incarnation)?;
        let b = b.get(..total)?;
        let mut h = Reader(&b[36..64]);
        let payload = b.get(RECORD_HEADER..RECORD_HEADER + h.u32()? as usize)?;
        if hash(&b[..64], payload) != b[64..96] {
            return None;
        }
        let durable_before = h.u64()?;
        let (locks, sums, revokes, changes) = (h.u32()?, h.u32()?, h.u32()?, h.u32()?);
        let mut r = Reader(payload);
        let mut record = Record { number, durable_before, ..Record::default() };
        for _ in 0..locks {
            let (kind, n, tenure) = (r.u8()?, r.u32()?, r.u64()?);
            let id = match kind {
                0 => LockId::Domain(n),
                1 => LockId::Group(n),
                _ => return None,
            };
            record.locks.push((id, tenure));
        }
        for _ in 0..sums {
            record.sums.push(DataSum { block: r.u64()?, blocks: r.u32()?, sum: r.bytes(16)?.try_into().ok()? });
        }
        for _ in 0..revokes {
            record.revokes.push((r.u64()?, r.u64()?));
        }
        for _ in 0..changes {
            record.changes.push(Self::decode_delta(&mut r)?);
        }
        r.0.is_empty().then_some(record)
    }

    fn decode_delta(r: &mut Reader<'_>) -> Option<Delta> {
        let (lock, block, flags) = (r.u16()?, r.u64()?, r.u8()?);
        let sum = r.bytes(8)?.try_into().ok()?;
        let mut ranges = Vec::new();
        for _ in 0..r.u16()? {
            let (at, len) = (r.u16()?, r.u16()?);
            if usize::from(at) + usize::from(len) > crate::BLOCK_SIZE {
                return None;
            }
            ranges.push((at, r.bytes(len.into())?.to_vec()));
        }
        Some(Delta { lock, block, whole: flags & 1 != 0, sum, ranges })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub incarnation: u32,
    pub generation: u64,
    /// Byte offset in the ring.
    pub tail: u64,
    pub tail_number: RecordNo,
}

impl Header {
    pub fn encode(&self, region: &Region) -> Vec<u8> {
        let mut b = vec![0; HEADER_COPY];
        b[..4].copy_from_slice(&HEADER_MAGIC);
        b[4..8].copy_from_slice(&VERSION.to_le_bytes());
        b[8..16].copy_from_slice(&region.volume.to_le_bytes());
        b[16..18].copy_from_slice(&region.slot.to_le_bytes());
        b[20..24].copy_from_slice(&self.incarnation.to_le_bytes());
        b[24..32].copy_from_slice(&self.generation.to_le_bytes());
        b[32..40].copy_from_slice(&self.tail.to_le_bytes());
        b[40..48].copy_from_slice(&self.tail_number.to_le_bytes());
        let sum = hash(&b[..48], &[]);
        b[48..80].copy_from_slice(&sum);
        b
    }

    fn decode_copy(b: &[u8], region: &Region) -> Option<Self> {
        let mut r = Reader(b.get(..48)?);
        let ours = r.bytes(4)? == HEADER_MAGIC && r.u32()? == VERSION && r.u64()? == region.volume;
        if !ours || r.u16()? != region.slot || r.u16()? != 0 || hash(&b[..48], &[]) != *b.get(48..80)? {
            return None;
        }
        let h = Header { incarnation: r.u32()?, generation: r.u64()?, tail: r.u64()?, tail_number: r.u64()? };
        (h.tail < region.len - RING_START).then_some(h)
    }

    /// How many of the two copies are sound. One that is not was being written when its node died, or was damaged since.
    pub fn sound_copies(both: &[u8], region: &Region) -> usize {
        both.chunks(HEADER_COPY).take(2).filter(|c| Self::decode_copy(c, region).is_some()).count()
    }

    /// The newer of the two copies.
    pub fn decode(both: &[u8], region: &Region) -> Option<Self> {
        let copies = both.chunks(HEADER_COPY).take(2).filter_map(|c| Self::decode_copy(c, region));
        copies.max_by_key(|h| h.generation)
    }
}

/// For mkfs: the first 8192 bytes of a region that mean "empty".
pub fn initial_header(region: Region) -> Vec<u8> {
    let h = Header { incarnation: 0, generation: 1, tail: 0, tail_number: 1 };
    let mut b = h.encode(&region);
    b.extend(Header { generation: 0, ..h }.encode(&region));
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REGION: Region = Region { slot: 3, offset: 0, len: 1 << 20, volume: 0x0807_0605_0403_0201 };
    const NODE: NodeId = NodeId { slot: 3, incarnation: 9 };

    fn sample() -> Record {
        Record {
            number: 7,
            durable_before: 6,
            locks: vec![(LockId::Domain(5), 11), (LockId::Group(2), 12)],
            sums: vec![DataSum { block: 1000, blocks: 4, sum: [7; 16] }],
            revokes: vec![(50, 2)],
            changes: vec![Delta {
                lock: 1,
                block: 60,
                whole: true,
                sum: [1; 8],
                ranges: vec![(0, vec![1, 2, 3]), (4000, vec![9; 96])],
            }],
        }
    }

    #[test]
    fn record_round_trip_and_golden_start() {
        let b = sample().encode(&REGION, NODE, 512);
        assert_eq!(b.len(), 512);
        assert_eq!(&b[..24], b"CLJR\x01\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08\x03\0\0\0\x09\0\0\0");
        assert_eq!(Record::decode(&b, &REGION, 9), Some(sample()));
        assert_eq!(Record::decode(&b, &REGION, 8), None);
    }

    #[test]
    fn newer_header_copy_counts_and_a_torn_one_does_not() {
        let h = Header { incarnation: 2, generation: 5, tail: 4096, tail_number: 77 };
        let mut both = h.encode(&REGION);
        both.extend(Header { generation: 6, ..h }.encode(&REGION));
        assert_eq!(Header::decode(&both, &REGION).map(|h| h.generation), Some(6));
        both[HEADER_COPY + 33] ^= 1;
        assert_eq!(Header::decode(&both, &REGION).map(|h| h.generation), Some(5));
        assert_eq!(Header::decode(&initial_header(REGION), &REGION).map(|h| h.tail_number), Some(1));
    }

    proptest! {
        #[test]
        fn mutated_records_are_refused_without_panic(at in 0usize..400, bit in 0u8..8) {
            let mut b = sample().encode(&REGION, NODE, 512);
            let used = RECORD_HEADER + u32::from_le_bytes(b[36..40].try_into().expect("4 bytes")) as usize;
            b[at] ^= 1 << bit;
            let got = Record::decode(&b, &REGION, 9);
            prop_assert!(got.is_none() || at >= used);
        }
    }
}
