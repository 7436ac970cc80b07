//! Single structures: each block of the golden volumes, changed, goes through every decoder that could meet it.

use cluster::{LockBlock, LockId, SlotBlock};
use fs_core::format::domain::DomainHeader;
use fs_core::format::group::GroupHeader;
use fs_core::format::item::{Dirent, ExtentItem, Inode, Key, decode_xattr_piece, encode_xattr_piece};
use fs_core::format::superblock::Superblock;
use journal::Block;
use journal::block::BlockHeader;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::{BLOCK, fix_checksums, guarded, mutate, rng};

/// Blocks that a decoder of ours reads.
pub struct Corpus(Vec<Vec<u8>>);

impl Corpus {
    pub fn new(volumes: &[Vec<u8>]) -> Self {
        let magics: [&[u8]; 7] = [b"CLFS", b"CLUSTRFS", b"CSLT", b"CHBT", b"CDBL", b"CLKB", b"CLJH"];
        let ours = |b: &&[u8]| b.chunks(512).any(|s| magics.iter().any(|m| s.starts_with(m)));
        let mut blocks: Vec<Vec<u8>> =
            volumes.iter().flat_map(|v| v.chunks(BLOCK)).filter(ours).map(Into::into).collect();
        blocks.sort();
        blocks.dedup();
        Self(blocks)
    }

    pub fn blocks(&self) -> usize {
        self.0.len()
    }

    /// One case. The error says what does not hold.
    pub fn case(&self, seed: u64) -> Result<(), String> {
        let mut rng = rng(seed);
        let Some(block) = self.0.choose(&mut rng) else { return Err("no blocks".into()) };
        let mut b = block.clone();
        mutate(&mut rng, &mut b);
        fix_checksums(&mut b);
        guarded(seed, || decode(&mut rng, &b)).map_err(|e| format!("seed {seed}: {e}"))
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, one: &T, again: &T) -> Result<(), String> {
    if one == again { Ok(()) } else { Err(format!("{what}: {one:?} encodes to {again:?}")) }
}

fn decode(rng: &mut StdRng, b: &[u8]) -> Result<(), String> {
    let u64_at = |s: &[u8], at: usize| s.get(at..at + 8).and_then(|v| v.try_into().ok()).map_or(0, u64::from_le_bytes);
    if let Ok(sb) = Superblock::decode(b) {
        let mut again = vec![0; BLOCK];
        sb.encode(&mut again);
        same("superblock", &Ok(sb), &Superblock::decode(&again))?;
    }
    for s in b.as_chunks::<512>().0 {
        let volume = u64_at(s, 8);
        let slot = u16::from_le_bytes([s[6], s[7]]);
        if let Ok(x) = SlotBlock::decode(s, volume, slot) {
            same("slot block", &x.encode(512), &s.to_vec())?;
        }
        let number = u64_at(s, 16) as u32;
        for id in [LockId::Domain(number), LockId::Group(number)] {
            if let Ok(x) = LockBlock::decode(s, volume, id) {
                same("lock block", &x.encode(512), &s.to_vec())?;
            }
        }
    }
    if let Ok(h) = BlockHeader::decode(b) {
        let mut again = b.to_vec();
        h.encode(&mut again);
        same("block header", &Ok(h), &BlockHeader::decode(&again))?;
        let _ = journal::block::verify(b, h.volume, h.block, h.owner);
    }
    let mut again = b.to_vec();
    if let Ok(h) = DomainHeader::decode(b) {
        h.encode(&mut again);
        same("domain header", &Ok(h), &DomainHeader::decode(&again))?;
    }
    if let Ok(h) = GroupHeader::decode(b) {
        h.encode(&mut again);
        same("group header", &Ok(h), &GroupHeader::decode(&again))?;
    }
    let block = Block::copy_of(b);
    for level in 0..4 {
        let _ = fs_core::tree::check_node(&block, level);
    }
    // Items begin anywhere in a node.
    for _ in 0..8 {
        let at = rng.random_range(0..BLOCK);
        let len = rng.random_range(0..300).min(BLOCK - at);
        items(&b[at..at + len])?;
    }
    Ok(())
}

fn items(v: &[u8]) -> Result<(), String> {
    if let Some(k) = Key::decode(v) {
        same("key", &Some(k), &Key::decode(&k.encode()))?;
    }
    if let Ok(i) = Inode::decode(v) {
        same("inode", &Ok(i), &Inode::decode(&i.encode()))?;
    }
    if let Ok(e) = ExtentItem::decode(v) {
        same("extent", &Ok(e), &ExtentItem::decode(&e.encode()))?;
    }
    if let Ok(d) = Dirent::decode(v) {
        let again = Dirent::decode(&d.encode());
        same("directory entry", &Ok(d), &again)?;
    }
    if let Ok((name, pieces, value)) = decode_xattr_piece(v) {
        let bytes = encode_xattr_piece(name, pieces, value);
        same("extended attribute", &Ok((name, pieces, value)), &decode_xattr_piece(&bytes))?;
    }
    Ok(())
}
