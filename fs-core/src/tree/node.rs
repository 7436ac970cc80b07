//! One node: a slotted page, laid out so that a small change of the tree is a small change of bytes, and so a small
//! journal record. An insert moves 2-byte slots and appends one body; bodies move only when the free room is in pieces.
//!
//! Offsets are from the start of the block, which begins with the header of every metadata block
//! ([`journal::block`]); integers are little endian, keys big endian ([`Key::encode`]).
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 64 | 2 | level: 1 is a leaf, an inner node's children are one less |
//! | 66 | 2 | items |
//! | 68 | 2 | heap: offset of the lowest body, 4096 when there is none |
//! | 70 | 2 | garbage: bytes from the heap's start to the block's end that belong to no item |
//! | 72 | 2 x items | slots: offset of each item's body, in the order of the keys |
//! |    |   | room for more slots and bodies |
//! | heap | | bodies, in no order |
//!
//! Body of an item in a leaf: key (17), length of the value (2), value. In an inner node: key (17), child's block (8), child's
//! version (4), which the child has in its header too; the key is the smallest that the child may hold, and that of the first item is the smallest that the node itself
//! may hold ([`Key::MIN`] along the left edge of the tree), so every node's bounds can be verified from above.
//!
//! Nothing here panics on what a node holds: [`Node::open`] bounds the counts, every body is bounds-checked when used.

use crate::format::item::{KEY_SIZE, Key, VALUE_MAX};

pub(crate) const BLOCK_LEN: usize = 4096;
const LEVEL: usize = 64;
const COUNT: usize = 66;
const HEAP: usize = 68;
const GARBAGE: usize = 70;
const SLOTS: usize = 72;
const SLOT: usize = 2;
/// Bytes of slots and bodies that fit.
pub(crate) const CAPACITY: usize = BLOCK_LEN - SLOTS;
/// A node that a removal leaves with less than this is merged with a neighbour or filled up from it.
pub(crate) const UNDERFULL: usize = CAPACITY / 4;
/// Two neighbours are merged if they fill a node no further than this, so that the next insert does not split it again.
/// Otherwise an even split of both leaves each with more than `UNDERFULL` (the largest item is under a third of a node).
pub(crate) const MERGE_MAX: usize = CAPACITY / 8 * 7;
const LEAF_HEAD: usize = KEY_SIZE + 2;
const CHILD_VERSION: usize = KEY_SIZE + 8;
const INNER_BODY: usize = CHILD_VERSION + 4;

/// A key as stored: compares bytewise as keys do.
pub(crate) type RawKey = [u8; KEY_SIZE];

/// What is wrong with a node.
pub(crate) type Bad = String;

fn get16(b: &[u8], at: usize) -> usize {
    match b.get(at..at + 2) {
        Some(v) => usize::from(u16::from_le_bytes([v[0], v[1]])),
        None => 0,
    }
}

fn put16(b: &mut [u8], at: usize, v: usize) {
    b[at..at + 2].copy_from_slice(&(v as u16).to_le_bytes());
}

/// Body of a leaf item.
pub(crate) fn leaf_body(key: &RawKey, value: &[u8]) -> Vec<u8> {
    let mut b = Vec::with_capacity(LEAF_HEAD + value.len());
    b.extend_from_slice(key);
    b.extend_from_slice(&(value.len() as u16).to_le_bytes());
    b.extend_from_slice(value);
    b
}

/// Body of an inner item.
pub(crate) fn inner_body(key: &RawKey, child: u64, version: u32) -> Vec<u8> {
    let mut b = Vec::with_capacity(INNER_BODY);
    b.extend_from_slice(key);
    b.extend_from_slice(&child.to_le_bytes());
    b.extend_from_slice(&version.to_le_bytes());
    b
}

/// The key that a body starts with.
pub(crate) fn body_key(body: &[u8]) -> RawKey {
    let mut k = [0; KEY_SIZE];
    if let Some(b) = body.get(..KEY_SIZE) {
        k.copy_from_slice(b);
    }
    k
}

/// Bytes of a node that an item with this body takes.
pub(crate) fn cost(body: &[u8]) -> usize {
    SLOT + body.len()
}

/// A node being read.
#[derive(Clone, Copy)]
pub(crate) struct Node<'a> {
    b: &'a [u8],
    level: usize,
    count: usize,
    heap: usize,
    garbage: usize,
}

impl<'a> Node<'a> {
    /// Verifies what bounds everything else; `level` is the one that the way down from the root implies.
    pub fn open(b: &'a [u8], level: u32) -> Result<Self, Bad> {
        if b.len() != BLOCK_LEN {
            return Err(format!("node of {} bytes", b.len()));
        }
        let n = Self {
            b,
            level: get16(b, LEVEL),
            count: get16(b, COUNT),
            heap: get16(b, HEAP),
            garbage: get16(b, GARBAGE),
        };
        if n.level != level as usize || n.level == 0 {
            return Err(format!("level {} where {level} belongs", n.level));
        }
        if n.heap > BLOCK_LEN || SLOTS + SLOT * n.count > n.heap {
            return Err(format!("{} items do not fit below the heap at {}", n.count, n.heap));
        }
        if n.garbage > BLOCK_LEN - n.heap {
            return Err(format!("{} bytes of garbage in a heap of {}", n.garbage, BLOCK_LEN - n.heap));
        }
        Ok(n)
    }

    pub fn count(&self) -> usize {
        self.count
    }

    fn is_leaf(&self) -> bool {
        self.level == 1
    }

    /// Bytes in slots and bodies.
    pub fn used(&self) -> usize {
        SLOT * self.count + (BLOCK_LEN - self.heap - self.garbage)
    }

    /// An item's body and its place.
    fn body_at(&self, i: usize) -> Result<(usize, &'a [u8]), Bad> {
        if i >= self.count {
            return Err(format!("no item {i} among {}", self.count));
        }
        let at = get16(self.b, SLOTS + SLOT * i);
        let len = if self.is_leaf() { LEAF_HEAD + get16(self.b, at + KEY_SIZE) } else { INNER_BODY };
        if at < self.heap || at + len > BLOCK_LEN || len > LEAF_HEAD + VALUE_MAX {
            return Err(format!("item {i} at {at} of {len} bytes is out of bounds"));
        }
        Ok((at, &self.b[at..at + len]))
    }

    pub fn body(&self, i: usize) -> Result<&'a [u8], Bad> {
        Ok(self.body_at(i)?.1)
    }

    pub fn key(&self, i: usize) -> Result<RawKey, Bad> {
        Ok(body_key(self.body(i)?))
    }

    /// Value of a leaf's item.
    pub fn value(&self, i: usize) -> Result<&'a [u8], Bad> {
        Ok(self.body(i)?.get(LEAF_HEAD..).unwrap_or(&[]))
    }

    /// Child of an inner node's item.
    pub fn child(&self, i: usize) -> Result<u64, Bad> {
        let body = self.body(i)?;
        let mut v = [0; 8];
        if let Some(b) = body.get(KEY_SIZE..KEY_SIZE + 8) {
            v.copy_from_slice(b);
        }
        Ok(u64::from_le_bytes(v))
    }

    /// Version that the child of an inner node's item has.
    pub fn child_version(&self, i: usize) -> Result<u32, Bad> {
        let mut v = [0; 4];
        if let Some(b) = self.body(i)?.get(CHILD_VERSION..INNER_BODY) {
            v.copy_from_slice(b);
        }
        Ok(u32::from_le_bytes(v))
    }

    /// The item with this key, or where it would go.
    pub fn search(&self, key: &RawKey) -> Result<Result<usize, usize>, Bad> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let mid = (low + high) / 2;
            match self.key(mid)?.cmp(key) {
                std::cmp::Ordering::Less => low = mid + 1,
                std::cmp::Ordering::Greater => high = mid,
                std::cmp::Ordering::Equal => return Ok(Ok(mid)),
            }
        }
        Ok(Err(low))
    }

    /// In an inner node: the item whose child covers the key.
    pub fn covering(&self, key: &RawKey) -> Result<usize, Bad> {
        Ok(match self.search(key)? {
            Ok(i) => i,
            Err(i) => i.saturating_sub(1),
        })
    }

    /// Every body in the order of keys.
    pub fn bodies(&self) -> Result<Vec<&'a [u8]>, Bad> {
        (0..self.count).map(|i| self.body(i)).collect()
    }

    /// Cheap test of a node against the bounds its parent gives: [lower, upper).
    pub fn within(&self, lower: &RawKey, upper: Option<&RawKey>) -> Result<(), Bad> {
        if self.count == 0 {
            return Err("node without items".into());
        }
        let first = self.key(0)?;
        if first < *lower || (!self.is_leaf() && first != *lower) {
            return Err("first key is outside the bounds that the parent gives".into());
        }
        if upper.is_some_and(|u| self.key(self.count - 1).is_ok_and(|k| k >= *u)) {
            return Err("last key is outside the bounds that the parent gives".into());
        }
        Ok(())
    }

    /// Everything that can be verified in a node alone.
    pub fn check(&self) -> Result<(), Bad> {
        let mut places = Vec::with_capacity(self.count);
        let mut last: Option<RawKey> = None;
        for i in 0..self.count {
            let (at, body) = self.body_at(i)?;
            let key = body_key(body);
            if last.is_some_and(|l| l >= key) {
                return Err(format!("item {i} is not in the order of keys"));
            }
            if !self.is_leaf() && self.child(i)? == 0 {
                return Err(format!("item {i} has no child"));
            }
            last = Some(key);
            places.push((at, body.len()));
        }
        places.sort_unstable();
        let mut end = self.heap;
        for (at, len) in &places {
            if *at < end {
                return Err(format!("bodies overlap at {at}"));
            }
            end = at + len;
        }
        let bodies: usize = places.iter().map(|p| p.1).sum();
        if bodies + self.garbage != BLOCK_LEN - self.heap {
            return Err(format!(
                "{bodies} bytes of bodies and {} of garbage in a heap of {}",
                self.garbage,
                BLOCK_LEN - self.heap
            ));
        }
        Ok(())
    }
}

/// Makes the content of a block that of an empty node; the block's header stays.
pub(crate) fn init(b: &mut [u8], level: u32) {
    put16(b, LEVEL, level as usize);
    put16(b, COUNT, 0);
    put16(b, HEAP, BLOCK_LEN);
    put16(b, GARBAGE, 0);
}

/// Fills a node anew with `bodies`, which are in the order of keys.
pub(crate) fn rebuild(b: &mut [u8], level: u32, bodies: &[&[u8]]) -> Result<(), Bad> {
    if bodies.iter().map(|x| cost(x)).sum::<usize>() > CAPACITY {
        return Err("more items than a node can hold".into());
    }
    init(b, level);
    let mut heap = BLOCK_LEN;
    for (i, body) in bodies.iter().enumerate() {
        heap -= body.len();
        b[heap..heap + body.len()].copy_from_slice(body);
        put16(b, SLOTS + SLOT * i, heap);
    }
    put16(b, COUNT, bodies.len());
    put16(b, HEAP, heap);
    Ok(())
}

/// Moves the bodies together so that the free room is in one piece.
fn compact(b: &mut [u8], level: u32) -> Result<(), Bad> {
    let copy = b.to_vec();
    let bodies = Node::open(&copy, level)?.bodies()?;
    rebuild(b, level, &bodies)
}

/// Inserts an item at position `i`; the caller knows that there is room for it ([`Node::used`]).
pub(crate) fn insert_at(b: &mut [u8], level: u32, i: usize, body: &[u8]) -> Result<(), Bad> {
    let n = Node::open(b, level)?;
    if i > n.count || n.used() + cost(body) > CAPACITY {
        return Err(format!("no room for an item of {} bytes", body.len()));
    }
    if n.heap - (SLOTS + SLOT * n.count) < cost(body) {
        compact(b, level)?;
    }
    let n = Node::open(b, level)?;
    let (count, heap) = (n.count, n.heap);
    let slot = SLOTS + SLOT * i;
    let end = SLOTS + SLOT * count;
    let Some(at) = heap.checked_sub(body.len()).filter(|at| *at >= end + SLOT) else {
        return Err("its garbage is miscounted".into());
    };
    b[at..heap].copy_from_slice(body);
    b.copy_within(slot..end, slot + SLOT);
    put16(b, slot, at);
    put16(b, COUNT, count + 1);
    put16(b, HEAP, at);
    Ok(())
}

/// Removes the items of positions `range`.
pub(crate) fn remove_at(b: &mut [u8], level: u32, range: std::ops::Range<usize>) -> Result<(), Bad> {
    let n = Node::open(b, level)?;
    if range.start > range.end || range.end > n.count {
        return Err(format!("no items {range:?} among {}", n.count));
    }
    let (count, heap, mut garbage) = (n.count, n.heap, n.garbage);
    for i in range.clone() {
        garbage += n.body(i)?.len();
    }
    let left = count - range.len();
    if garbage > BLOCK_LEN - heap {
        return Err("its garbage is miscounted".into());
    }
    b.copy_within(SLOTS + SLOT * range.end..SLOTS + SLOT * count, SLOTS + SLOT * range.start);
    put16(b, COUNT, left);
    put16(b, GARBAGE, garbage);
    if left == 0 {
        put16(b, HEAP, BLOCK_LEN);
        put16(b, GARBAGE, 0);
    }
    Ok(())
}

/// Replaces the value of a leaf's item in place, if it is not longer than the old one.
pub(crate) fn shrink_value(b: &mut [u8], i: usize, value: &[u8]) -> Result<bool, Bad> {
    let n = Node::open(b, 1)?;
    let (at, body) = n.body_at(i)?;
    let garbage = n.garbage;
    let Some(less) = (body.len() - LEAF_HEAD).checked_sub(value.len()) else {
        return Ok(false);
    };
    if garbage + less > BLOCK_LEN - n.heap {
        return Err("its garbage is miscounted".into());
    }
    put16(b, at + KEY_SIZE, value.len());
    b[at + LEAF_HEAD..at + LEAF_HEAD + value.len()].copy_from_slice(value);
    put16(b, GARBAGE, garbage + less);
    Ok(true)
}

/// Overwrites the key of an item, which must keep the order.
pub(crate) fn set_key(b: &mut [u8], level: u32, i: usize, key: &RawKey) -> Result<(), Bad> {
    let (at, _) = Node::open(b, level)?.body_at(i)?;
    b[at..at + KEY_SIZE].copy_from_slice(key);
    Ok(())
}

/// Says that the child of an inner node's item has this version from here on.
pub(crate) fn set_child_version(b: &mut [u8], level: u32, i: usize, version: u32) -> Result<(), Bad> {
    let n = Node::open(b, level)?;
    if n.is_leaf() {
        return Err("a leaf has no children".into());
    }
    let (at, _) = n.body_at(i)?;
    b[at + CHILD_VERSION..at + INNER_BODY].copy_from_slice(&version.to_le_bytes());
    Ok(())
}

/// Decodes a stored key.
pub(crate) fn cooked(key: &RawKey) -> Key {
    Key::decode(key).unwrap_or(Key::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::item::Kind;

    fn key(object: u64, offset: u64) -> RawKey {
        Key::new(object, Kind::Inode, offset).encode()
    }

    #[test]
    fn golden_leaf() {
        let mut b = vec![0; BLOCK_LEN];
        init(&mut b, 1);
        insert_at(&mut b, 1, 0, &leaf_body(&key(2, 0x0102), b"bb")).unwrap();
        insert_at(&mut b, 1, 0, &leaf_body(&key(1, 0), b"a")).unwrap();
        // level 1, 2 items, heap at 4096 - 21 - 20 = 0x0fd7, no garbage, slots 0x0fd7 and 0x0feb
        assert_eq!(b[64..76], [1, 0, 2, 0, 0xd7, 0x0f, 0, 0, 0xd7, 0x0f, 0xeb, 0x0f]);
        assert_eq!(b[0xfd7..0xfeb], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, b'a']);
        assert_eq!(b[0xfeb..], [0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 1, 2, 2, 0, b'b', b'b']);
        assert!(b[76..0xfd7].iter().all(|x| *x == 0));
    }

    #[test]
    fn golden_inner() {
        let mut b = vec![0; BLOCK_LEN];
        init(&mut b, 3);
        insert_at(&mut b, 3, 0, &inner_body(&key(9, 0), 0x1122, 0x0304)).unwrap();
        assert_eq!(b[64..74], [3, 0, 1, 0, 0xe3, 0x0f, 0, 0, 0xe3, 0x0f]);
        assert_eq!(b[0xfe3..0xff4], [0, 0, 0, 0, 0, 0, 0, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(b[0xff4..], [0x22, 0x11, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0]);
    }

    #[test]
    fn check_sees_disorder_overlap_and_miscounting() {
        let mut good = vec![0; BLOCK_LEN];
        init(&mut good, 1);
        for i in 0..4 {
            insert_at(&mut good, 1, i, &leaf_body(&key(i as u64, 0), &[7; 50])).unwrap();
        }
        Node::open(&good, 1).unwrap().check().unwrap();
        let check = |b: &[u8]| Node::open(b, 1).and_then(|n| n.check());
        let mut b = good.clone();
        b.copy_within(SLOTS..SLOTS + 2, SLOTS + 2);
        assert!(check(&b).is_err(), "one body in two slots");
        let mut b = good.clone();
        let (x, y) = (get16(&b, SLOTS), get16(&b, SLOTS + 2));
        put16(&mut b, SLOTS, y);
        put16(&mut b, SLOTS + 2, x);
        assert!(check(&b).unwrap_err().contains("order"));
        let mut b = good.clone();
        put16(&mut b, GARBAGE, 1);
        assert!(check(&b).unwrap_err().contains("garbage"));
        let mut b = good.clone();
        put16(&mut b, COUNT, 3000);
        assert!(check(&b).is_err());
        let mut b = good.clone();
        put16(&mut b, SLOTS + 4, 4090);
        assert!(check(&b).is_err());
        assert!(Node::open(&good, 2).is_err(), "wrong level");
    }
}
