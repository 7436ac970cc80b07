//! Reading a journal back: replay of a dead node's records, and scans for checking.
//!
//! Replay is physical and idempotent: for every block it works out the image that the valid records lead to and writes that.
//! A change counts if its lock is still held by the dead incarnation in the same tenure (I5), if no later record frees the
//! block (I6), and, where the block on the device is sound, if it is newer than that (forward only). A torn block takes all
//! changes since the tail: the ranges cover every byte that may differ, and the checksum in the last change proves it (I7).

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use blockdev::{AlignedBuf, BlockDevice, IoClass};
use cluster::{LockId, NodeId, Tenure};
use tokio::task::JoinSet;

use crate::BLOCK_SIZE;
use crate::block::{self, Block, BlockHeader};
use crate::commit::SUMMED_MAX;
use crate::diff::apply;
use crate::format::{Delta, HEADER_COPY, Header, RECORD_HEADER, RING_START, Record};
use crate::place::write_blocks;
use crate::types::{JournalError, RecordNo, Region, Result};

/// Blocks that replay reads at once.
const READS: usize = 32;

/// Bytes read at once.
const CHUNK: u64 = 1 << 20;

/// Who holds a lock, and in which tenure, as the lock blocks say.
#[async_trait]
pub trait TenureSource: Send + Sync {
    /// The tenure in which `holder` holds the lock exclusively; `None` if it does not.
    async fn exclusive_tenure(&self, lock: LockId, holder: NodeId) -> std::result::Result<Option<Tenure>, String>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayReport {
    pub records: usize,
    /// The newest record was left out because its data had not arrived.
    pub dropped: bool,
    pub blocks_written: usize,
    pub changes_skipped: usize,
}

/// The records of a journal that count, oldest first.
pub struct Scan {
    pub records: Vec<Record>,
    pub dropped: bool,
}

pub(crate) async fn read_header(dev: &Arc<dyn BlockDevice>, region: Region) -> Result<Header> {
    Ok(read_headers(dev, region).await?.0)
}

/// The header that counts, and whether both copies are sound.
async fn read_headers(dev: &Arc<dyn BlockDevice>, region: Region) -> Result<(Header, bool)> {
    let both = dev.read(IoClass::Journal, region.offset, 2 * HEADER_COPY).await?;
    let sound = Header::sound_copies(&both, &region) == 2;
    Header::decode(&both, &region).map(|h| (h, sound)).ok_or_else(|| JournalError::Damaged {
        slot: region.slot,
        offset: region.offset,
        reason: "neither copy of its header is readable: run fsck.clusterfs".into(),
    })
}

/// The number of the newest record that an incarnation wrote.
pub(crate) async fn newest_record(dev: &Arc<dyn BlockDevice>, region: Region, header: &Header) -> Result<RecordNo> {
    let records = Ring::new(dev, region).records(header).await?;
    Ok(records.last().map_or(0, |r| r.number))
}

/// Reads the ring in large pieces.
struct Ring<'a> {
    dev: &'a Arc<dyn BlockDevice>,
    region: Region,
    /// Ring offset of what is in memory.
    at: u64,
    buf: AlignedBuf,
    /// Take sectors that cannot be read as zeros.
    lenient: bool,
}

impl<'a> Ring<'a> {
    fn new(dev: &'a Arc<dyn BlockDevice>, region: Region) -> Self {
        Self { dev, region, at: 0, buf: AlignedBuf::zeroed(0), lenient: false }
    }

    fn len(&self) -> u64 {
        self.region.len - RING_START
    }

    /// `len` bytes at a ring offset, less at the end of the ring.
    async fn bytes(&mut self, offset: u64, len: u64) -> Result<&[u8]> {
        let sector = u64::from(self.dev.geometry().sector_size);
        let end = (offset + len).min(self.len());
        if offset < self.at || end > self.at + self.buf.len() as u64 {
            let from = offset / sector * sector;
            let to = (from + CHUNK).max(end.next_multiple_of(sector)).min(self.len());
            let start = self.region.offset + RING_START + from;
            self.buf = match self.dev.read(IoClass::Journal, start, (to - from) as usize).await {
                Ok(b) => b,
                Err(_) if self.lenient => self.sectors(start, (to - from) as usize).await,
                Err(e) => return Err(e.into()),
            };
            self.at = from;
        }
        Ok(&self.buf[(offset - self.at) as usize..(end - self.at) as usize])
    }

    async fn sectors(&self, start: u64, len: usize) -> AlignedBuf {
        let sector = self.dev.geometry().sector_size as usize;
        let mut all = AlignedBuf::zeroed(len);
        for (piece, at) in all.chunks_mut(sector).zip((start..).step_by(sector)) {
            if let Ok(b) = self.dev.read(IoClass::Journal, at, piece.len()).await {
                piece.copy_from_slice(&b);
            }
        }
        all
    }

    async fn record(&mut self, offset: u64, number: RecordNo, incarnation: u32) -> Result<Option<(Record, u64)>> {
        let found = self.record_at(offset, number, incarnation).await?;
        Ok(found.filter(|(r, _)| r.number == number))
    }

    /// The record that starts here, if it is whole and its number is not below `least`.
    async fn record_at(&mut self, offset: u64, least: RecordNo, incarnation: u32) -> Result<Option<(Record, u64)>> {
        let region = self.region;
        if offset >= self.len() {
            return Ok(None);
        }
        let head = self.bytes(offset, RECORD_HEADER as u64).await?;
        let Some((found, len)) = Record::peek(head, &region, incarnation) else { return Ok(None) };
        if found < least || offset + len as u64 > self.len() {
            return Ok(None);
        }
        let whole = self.bytes(offset, len as u64).await?;
        Ok(Record::decode(whole, &region, incarnation).map(|r| (r, len as u64)))
    }

    /// A whole record anywhere in the ring that was written when record `number` was durable.
    async fn witness_of(&mut self, number: RecordNo, incarnation: u32) -> Result<Option<Record>> {
        let region = self.region;
        let sector = self.dev.geometry().sector_size as usize;
        let mut from = 0;
        while from < self.len() {
            let len = CHUNK.min(self.len() - from);
            let start = region.offset + RING_START + from;
            let chunk = match self.dev.read(IoClass::Journal, start, len as usize).await {
                Ok(chunk) => chunk,
                // It may never have been written: no reason to leave the rest of the journal unreplayed.
                Err(e) => {
                    tracing::warn!(slot = region.slot, "a part of the journal that may be unused: {e}");
                    AlignedBuf::zeroed(0)
                }
            };
            for (i, head) in chunk.chunks(sector).enumerate() {
                if Record::peek(head, &region, incarnation).is_none_or(|(found, _)| found <= number) {
                    continue;
                }
                let offset = from + (i * sector) as u64;
                if let Some((record, _)) = self.record_at(offset, number, incarnation).await?
                    && record.durable_before >= number
                {
                    return Ok(Some(record));
                }
            }
            from += len;
        }
        Ok(None)
    }

    /// All consecutive records from the tail.
    async fn records(&mut self, header: &Header) -> Result<Vec<Record>> {
        let (mut at, mut number) = (header.tail, header.tail_number);
        let mut records = Vec::new();
        loop {
            let mut found = self.record(at, number, header.incarnation).await?;
            if found.is_none() && at != 0 {
                // What did not fit before the end of the ring went to its start.
                at = 0;
                found = self.record(0, number, header.incarnation).await?;
            }
            let Some((record, len)) = found else { return Ok(records) };
            records.push(record);
            at += len;
            number += 1;
        }
    }

    /// All sound records of an incarnation, wherever they lie, from the oldest up to the first that is missing. Those before the
    /// tail, which are in their places, do no harm: replay goes only forward.
    async fn search(&mut self, incarnation: u32) -> Result<Vec<Record>> {
        let sector = u64::from(self.dev.geometry().sector_size);
        let mut found = BTreeMap::new();
        let mut at = 0;
        while at + RECORD_HEADER as u64 <= self.len() {
            let region = self.region;
            let head = Record::peek(self.bytes(at, RECORD_HEADER as u64).await?, &region, incarnation);
            let record = match head {
                Some((number, _)) => self.record(at, number, incarnation).await?,
                None => None,
            };
            at += match record {
                Some((record, len)) => {
                    found.insert(record.number, record);
                    len.max(sector)
                }
                None => sector,
            };
        }
        let first = found.keys().next().copied().unwrap_or(0);
        Ok(found.into_iter().zip(first..).take_while(|((n, _), want)| n == want).map(|((_, r), _)| r).collect())
    }
}

/// The incarnation that last opened a journal; 0 if none ever did.
pub async fn last_opened_by(dev: &Arc<dyn BlockDevice>, region: Region) -> Result<u32> {
    Ok(read_header(dev, region).await?.incarnation)
}

/// The valid records of an incarnation; the newest is left out if its data did not arrive.
///
/// Where they end is the end of the journal: its last record may be torn, as nobody was told that it is durable. That is
/// proven by what is not there: one record is written at a time, after a flush, and says which ones were durable before. A
/// whole record behind the end tells of damage, and so does any record of a life that the header does not know of; then
/// what was acknowledged would be lost (I11), and nothing is replayed.
pub async fn scan(dev: &Arc<dyn BlockDevice>, region: Region, dead: NodeId) -> Result<Scan> {
    let (header, sound) = read_headers(dev, region).await?;
    let mut records = match header.incarnation == dead.incarnation {
        true => Ring::new(dev, region).records(&header).await?,
        // It died before it started its journal: it changed nothing.
        false => Vec::new(),
    };
    if !sound {
        // If the copy that is left is the older one, what it says of the tail may be overwritten, or of an earlier life.
        let found = Ring::new(dev, region).search(dead.incarnation).await?;
        if found.last().map(|r| r.number) > records.last().map(|r| r.number) {
            records = found;
        }
    }
    refuse_gaps(dev, region, dead, &header, &records).await?;
    arrived(dev, region, records).await
}

/// An error if something durable is missing behind `records`, the ones that were found.
async fn refuse_gaps(
    dev: &Arc<dyn BlockDevice>,
    region: Region,
    dead: NodeId,
    header: &Header,
    records: &[Record],
) -> Result<()> {
    let known = header.incarnation == dead.incarnation;
    if dead.incarnation == 0 || header.incarnation > dead.incarnation {
        return Ok(());
    }
    let end = records.last().map_or(if known { header.tail_number } else { 0 }, |r| r.number + 1);
    let Some(later) = Ring::new(dev, region).witness_of(end, dead.incarnation).await? else { return Ok(()) };
    let reason = if known || !records.is_empty() {
        format!(
            "record {end} cannot be read, but was durable before record {} was written, which can: run fsck.clusterfs",
            later.number
        )
    } else {
        format!(
            "its header is of incarnation {}, but record {} of incarnation {} is there: run fsck.clusterfs",
            header.incarnation, later.number, dead.incarnation
        )
    };
    Err(JournalError::Damaged { slot: region.slot, offset: region.offset, reason })
}

/// The records that can be found without a header, up to the first sector that cannot be read.
pub(crate) async fn scan_without_header(dev: &Arc<dyn BlockDevice>, region: Region, dead: NodeId) -> Result<Scan> {
    let mut ring = Ring { lenient: true, ..Ring::new(dev, region) };
    let records = ring.search(dead.incarnation).await?;
    arrived(dev, region, records).await
}

/// Leaves the newest record out if its data did not arrive.
async fn arrived(dev: &Arc<dyn BlockDevice>, region: Region, mut records: Vec<Record>) -> Result<Scan> {
    let arrived = match records.last() {
        Some(newest) => data_arrived(dev, region, newest).await?,
        None => true,
    };
    if !arrived {
        records.pop();
    }
    Ok(Scan { records, dropped: !arrived })
}

async fn data_arrived(dev: &Arc<dyn BlockDevice>, region: Region, record: &Record) -> Result<bool> {
    let on_device = dev.geometry().size / BLOCK_SIZE as u64;
    for s in &record.sums {
        let end = s.block.checked_add(s.blocks.into());
        if s.blocks as usize > SUMMED_MAX || end.is_none_or(|end| end > on_device) {
            let reason = format!("record {} has checksums of impossible data", record.number);
            return Err(JournalError::Damaged { slot: region.slot, offset: region.offset, reason });
        }
        let bytes = s.blocks as usize * BLOCK_SIZE;
        let data = dev.read(IoClass::Data, s.block * BLOCK_SIZE as u64, bytes).await?;
        if blake3::hash(&data).as_bytes()[..16] != s.sum {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A change with what its record says about it.
pub(crate) struct Counted<'a> {
    record: RecordNo,
    tenure: Tenure,
    pub lock: LockId,
    delta: &'a Delta,
}

impl Scan {
    /// The block images that replay would write.
    pub async fn images(
        &self,
        dev: &Arc<dyn BlockDevice>,
        region: Region,
        dead: NodeId,
        locks: &dyn TenureSource,
    ) -> Result<(BTreeMap<u64, Block>, ReplayReport)> {
        let mut report = ReplayReport { records: self.records.len(), dropped: self.dropped, ..Default::default() };
        let counted = self.counted(region, dead, locks, &mut report).await?;
        let mut found = in_place(dev, counted.keys().copied()).await?;
        let mut images = BTreeMap::new();
        for (number, changes) in counted {
            let Some(image) = found.remove(&number) else { continue };
            if let Some(image) = replayed(image, region, number, &changes)? {
                images.insert(number, image);
            }
        }
        report.blocks_written = images.len();
        Ok((images, report))
    }

    pub(crate) async fn counted(
        &self,
        region: Region,
        dead: NodeId,
        locks: &dyn TenureSource,
        report: &mut ReplayReport,
    ) -> Result<BTreeMap<u64, Vec<Counted<'_>>>> {
        let mut held: BTreeMap<LockId, Option<Tenure>> = BTreeMap::new();
        let mut out: BTreeMap<u64, Vec<Counted<'_>>> = BTreeMap::new();
        for r in &self.records {
            // A record that frees a block and changes it lists the change of the new life only.
            for (first, n) in &r.revokes {
                let freed: Vec<u64> = out.range(*first..first.saturating_add(*n)).map(|(b, _)| *b).collect();
                for b in freed {
                    report.changes_skipped += out.remove(&b).map_or(0, |changes| changes.len());
                }
            }
            for delta in &r.changes {
                let Some((lock, tenure)) = r.locks.get(usize::from(delta.lock)).copied() else {
                    let reason = format!("record {} names a lock it does not list", r.number);
                    return Err(JournalError::Damaged { slot: region.slot, offset: region.offset, reason });
                };
                if let std::collections::btree_map::Entry::Vacant(v) = held.entry(lock) {
                    let tenure = locks.exclusive_tenure(lock, dead).await;
                    v.insert(tenure.map_err(|reason| JournalError::Replay { block: delta.block, reason })?);
                }
                let current = held.get(&lock).copied().flatten() == Some(tenure);
                if !current {
                    report.changes_skipped += 1;
                    continue;
                }
                out.entry(delta.block).or_default().push(Counted { record: r.number, tenure, lock, delta });
            }
        }
        Ok(out)
    }
}

/// Reads a block as it lies in its place now.
pub(crate) async fn one_in_place(dev: &Arc<dyn BlockDevice>, block: u64) -> Result<Block> {
    if block >= dev.geometry().size / BLOCK_SIZE as u64 {
        return Err(JournalError::Replay { block, reason: "it lies beyond the device".into() });
    }
    Ok(dev.read(IoClass::Meta, block * BLOCK_SIZE as u64, BLOCK_SIZE).await?)
}

/// Reads the blocks that lie in their places now, many at once: the node's neighbours wait for it.
async fn in_place(dev: &Arc<dyn BlockDevice>, numbers: impl Iterator<Item = u64>) -> Result<BTreeMap<u64, Block>> {
    let (mut found, mut reads) = (BTreeMap::new(), JoinSet::new());
    let ended = |done: std::result::Result<_, tokio::task::JoinError>| {
        done.unwrap_or_else(|e| Err(JournalError::Replay { block: 0, reason: format!("a read ended: {e}") }))
    };
    for block in numbers {
        if reads.len() >= READS
            && let Some(done) = reads.join_next().await
        {
            found.extend([ended(done)?]);
        }
        let dev = dev.clone();
        reads.spawn(async move { Ok((block, one_in_place(&dev, block).await?)) });
    }
    while let Some(done) = reads.join_next().await {
        found.extend([ended(done)?]);
    }
    Ok(found)
}

/// The image that the changes lead to, from the one in the block's place; `None` if that has them already.
pub(crate) fn replayed(
    mut image: Block,
    region: Region,
    number: u64,
    changes: &[Counted<'_>],
) -> Result<Option<Block>> {
    let Some(last) = changes.last() else { return Ok(None) };
    let fail = |reason: &str| JournalError::Replay { block: number, reason: reason.into() };
    let sound = block::verify(&image, region.volume, number, last.lock).ok();
    let newer = |c: &&Counted<'_>, h: &BlockHeader| (c.tenure, c.record) > (h.tenure, h.record);
    let due: Vec<&Counted<'_>> = match &sound {
        Some(h) => changes.iter().filter(|c| newer(c, h)).collect(),
        None => changes.iter().collect(),
    };
    if due.is_empty() {
        return Ok(None);
    }
    // Whatever is older than a whole image does not matter.
    let start = due.iter().rposition(|c| c.delta.whole).unwrap_or(0);
    for c in &due[start..] {
        if c.delta.whole {
            image.fill(0);
        }
        apply(&mut image, &c.delta.ranges);
    }
    block::seal(&mut image, last.tenure, last.record);
    if image[48..56] != last.delta.sum {
        return Err(fail("what its records lead to does not have the checksum they promise: run fsck.clusterfs"));
    }
    block::verify(&image, region.volume, number, last.lock).map_err(|e| fail(&e.to_string()))?;
    Ok(Some(image))
}

/// Writes what records lead to, durably. The newest record may have arrived without having been flushed: it is made durable first, or a
/// loss of power in between could leave a torn block, and take the record that would mend it (I2).
pub(crate) async fn place(dev: &Arc<dyn BlockDevice>, images: &[(u64, Arc<Block>)]) -> Result<()> {
    if !images.is_empty() {
        dev.flush(IoClass::Journal).await?;
        write_blocks(dev, images).await?;
    }
    // Also where nothing is left to write: an earlier replay may not have come to its flush.
    dev.flush(IoClass::Meta).await?;
    Ok(())
}

/// Replays a dead node's journal: writes the images to their places, durably. May be done again.
pub async fn replay(
    dev: &Arc<dyn BlockDevice>,
    region: Region,
    dead: NodeId,
    locks: &dyn TenureSource,
) -> Result<ReplayReport> {
    let scan = scan(dev, region, dead).await?;
    let (images, report) = scan.images(dev, region, dead, locks).await?;
    let images: Vec<_> = images.into_iter().map(|(number, image)| (number, Arc::new(image))).collect();
    place(dev, &images).await?;
    Ok(report)
}
