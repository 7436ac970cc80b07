//! What the simulated device has stored: sparse pages, and the volatile write cache over them.
//!
//! The pages hold what a read sees. For every sector with unflushed content the cache keeps the durable content and
//! each version written over it since, oldest first, so that a power loss can leave any of them (I7, I11).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

pub(super) const PAGE: usize = 4096;
type Page = [u8; PAGE];

/// The contents of a simulated device, cheap to clone: pages are shared until written.
#[derive(Clone)]
pub struct SimImage {
    pub(super) size: u64,
    pub(super) pages: BTreeMap<u64, Arc<Page>>,
}

impl SimImage {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies the content at `offset` to `out`; zeros beyond what was ever written.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let start = (at % PAGE as u64) as usize;
            let n = (PAGE - start).min(out.len() - done);
            let part = &mut out[done..done + n];
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => part.copy_from_slice(&page[start..start + n]),
                None => part.fill(0),
            }
            done += n;
        }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let start = (at % PAGE as u64) as usize;
            let n = (PAGE - start).min(bytes.len() - done);
            let page = self.pages.entry(at / PAGE as u64).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[start..start + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
    }

    /// Saves the contents as a sparse image file, to look at a failed run with other tools.
    pub fn save(&self, path: &std::path::Path) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path)?;
        file.set_len(self.size)?;
        for (number, page) in &self.pages {
            let at = number * PAGE as u64;
            let n = self.size.saturating_sub(at).min(PAGE as u64) as usize;
            file.write_all_at(&page[..n], at)?;
        }
        Ok(())
    }

    /// Loads an image file, leaving out pages of zeros.
    pub fn load(path: &std::path::Path) -> std::io::Result<Self> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        let mut image = Self { size, pages: BTreeMap::new() };
        let mut page = [0; PAGE];
        for number in 0..size.div_ceil(PAGE as u64) {
            let at = number * PAGE as u64;
            let n = (size - at).min(PAGE as u64) as usize;
            page.fill(0);
            file.read_exact_at(&mut page[..n], at)?;
            if page.iter().any(|b| *b != 0) {
                image.pages.insert(number, Arc::new(page));
            }
        }
        Ok(image)
    }
}

/// One unflushed content of a sector.
struct Version {
    /// The operation that wrote it.
    seq: u64,
    bytes: Box<[u8]>,
}

struct Volatile {
    durable: Box<[u8]>,
    /// Never empty; the last is what the pages hold.
    versions: Vec<Version>,
}

/// A sector written over and over without a flush (a heartbeat) must not grow without bound; the oldest versions are
/// forgotten, the durable one is not.
const MAX_VERSIONS: usize = 32;

/// What becomes of one unflushed write when the device loses power.
enum Verdict {
    Kept,
    Lost,
    Torn,
}

pub(super) struct Medium {
    image: SimImage,
    sector: usize,
    write_cache: bool,
    volatile: BTreeMap<u64, Volatile>,
}

impl Medium {
    pub(super) fn new(image: SimImage, sector: usize, write_cache: bool) -> Self {
        Self { image, sector, write_cache, volatile: BTreeMap::new() }
    }

    pub(super) fn enlarge(&mut self, size: u64) {
        self.image.size = size;
    }

    pub(super) fn image(&self) -> &SimImage {
        &self.image
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        self.image.read(offset, out);
    }

    /// Writes one sector; `durable` as a write through the cache.
    pub(super) fn write_sector(&mut self, seq: u64, offset: u64, bytes: &[u8], durable: bool) {
        debug_assert_eq!(bytes.len(), self.sector);
        let number = offset / self.sector as u64;
        if durable || !self.write_cache {
            self.volatile.remove(&number);
        } else {
            let (image, sector) = (&self.image, self.sector);
            let entry = self.volatile.entry(number).or_insert_with(|| {
                let mut old = vec![0; sector].into_boxed_slice();
                image.read(offset, &mut old);
                Volatile { durable: old, versions: Vec::new() }
            });
            if entry.versions.len() == MAX_VERSIONS {
                entry.versions.remove(0);
            }
            entry.versions.push(Version { seq, bytes: bytes.into() });
        }
        self.image.write(offset, bytes);
    }

    /// Writes whole sectors from `offset`.
    pub(super) fn write(&mut self, seq: u64, offset: u64, bytes: &[u8], durable: bool) {
        for (i, sector) in bytes.chunks(self.sector).enumerate() {
            self.write_sector(seq, offset + (i * self.sector) as u64, sector, durable);
        }
    }

    /// Changes any bytes under the device's feet: the affected sectors become durable as they then are.
    pub(super) fn write_raw(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let first = offset / self.sector as u64;
        let last = (offset + bytes.len() as u64 - 1) / self.sector as u64;
        let touched: Vec<u64> = self.volatile.range(first..=last).map(|(number, _)| *number).collect();
        for number in touched {
            self.volatile.remove(&number);
        }
        self.image.write(offset, bytes);
    }

    /// Makes durable every version written by an operation before `before` that is not in `exempt`; versions under
    /// it are superseded.
    pub(super) fn flush(&mut self, before: u64, exempt: &BTreeSet<u64>) {
        self.volatile.retain(|_, v| {
            let newest = v.versions.iter().rposition(|w| w.seq < before && !exempt.contains(&w.seq));
            if let Some(i) = newest {
                let rest = v.versions.split_off(i + 1);
                if let Some(durable) = v.versions.pop() {
                    v.durable = durable.bytes;
                }
                v.versions = rest;
            }
            !v.versions.is_empty()
        });
    }

    /// The sectors in a range that were ever written: only these can differ from zeros.
    pub(super) fn written_sectors(&self, offset: u64, len: u64) -> Vec<u64> {
        let (page, sector) = (PAGE as u64, self.sector as u64);
        let end = offset + len;
        let mut found = Vec::new();
        for (number, _) in self.image.pages.range(offset / page..end.div_ceil(page)) {
            let from = (number * page).max(offset);
            let to = ((number + 1) * page).min(end);
            found.extend((from..to).step_by(sector as usize));
        }
        found
    }

    /// How many sectors a power loss could change.
    pub(super) fn volatile_sectors(&self) -> usize {
        self.volatile.len()
    }

    /// Loses a random part of the cache: each unflushed write is kept, lost or torn between sectors.
    pub(super) fn power_loss(&mut self, rng: &mut StdRng) {
        let writes: BTreeSet<u64> = self.volatile.values().flat_map(|v| v.versions.iter().map(|w| w.seq)).collect();
        // Some losses take everything and some nothing: those are the likely ones in the field.
        let keep = [0.0, 0.25, 0.5, 0.75, 1.0][rng.random_range(0..5)];
        let verdicts: BTreeMap<u64, Verdict> = writes
            .into_iter()
            .map(|seq| {
                let torn = keep > 0.0 && keep < 1.0 && rng.random_bool(0.3);
                let kept = rng.random_bool(keep);
                (
                    seq,
                    if torn {
                        Verdict::Torn
                    } else if kept {
                        Verdict::Kept
                    } else {
                        Verdict::Lost
                    },
                )
            })
            .collect();
        for (number, v) in std::mem::take(&mut self.volatile) {
            let survivor = v.versions.iter().rev().find(|w| match verdicts.get(&w.seq) {
                Some(Verdict::Kept) => true,
                Some(Verdict::Torn) => rng.random_bool(0.5),
                Some(Verdict::Lost) | None => false,
            });
            let content = survivor.map_or(&v.durable, |w| &w.bytes);
            self.image.write(number * self.sector as u64, content);
        }
    }

    /// Overwrites a range with random bytes, durably.
    pub(super) fn corrupt(&mut self, offset: u64, len: usize, rng: &mut StdRng) {
        let mut junk = vec![0; len];
        rng.fill_bytes(&mut junk);
        self.write_raw(offset, &junk);
    }
}
