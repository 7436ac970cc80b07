//! Whole volumes: some blocks changed, checksums right; then a check as of fsck -n and a mount that reads everything, or a repair as of
//! fsck -y, or a new volume in its place.

use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use fs_core::Volume;
use fs_core::check::{Options, check};
use fs_core::repair;
use mkfs::FormatOptions;
use rand::RngExt;
use rand::seq::IndexedRandom;

use super::device::Overlaid;
use super::{BLOCK, fix_checksums, fix_record, guarded, mutate, rng};
use crate::golden;

/// Longest that a check or a mount may take, in the runtime's paused time: what waits longer waits for ever.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A golden volume, and where its own blocks are: a list per kind, so that rare kinds are met as often as frequent ones.
pub struct Target {
    base: Arc<Vec<u8>>,
    kinds: Vec<Vec<usize>>,
}

/// What became of a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The check found something, or refused the volume.
    pub found: bool,
    /// The volume was mounted and all of it was read.
    pub read: bool,
}

/// What became of a repair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repaired {
    /// There was nothing to do.
    Nothing,
    /// The volume was made sound.
    Sound,
    /// It was refused, or left something, and said why.
    Not(String),
}

impl Target {
    pub fn new(base: Vec<u8>) -> Self {
        let mut kinds: Vec<(Vec<u8>, Vec<usize>)> = Vec::new();
        for at in (0..base.len()).step_by(512) {
            let s = &base[at..at + 512];
            let kind = match &s[..4] {
                b"CLFS" => s[..5].to_vec(),
                b"CLUS" | b"CSLT" | b"CHBT" | b"CDBL" | b"CLKB" | b"CLJH" | b"CLJR" => s[..4].to_vec(),
                _ => continue,
            };
            match kinds.iter_mut().find(|k| k.0 == kind) {
                Some(k) => k.1.push(at),
                None => kinds.push((kind, vec![at])),
            }
        }
        Self { base: Arc::new(base), kinds: kinds.into_iter().map(|k| k.1).collect() }
    }

    pub fn kinds(&self) -> usize {
        self.kinds.len()
    }

    /// The volume of a case, for other programs to look at.
    pub fn image(&self, seed: u64) -> Vec<u8> {
        self.device(seed).0.image()
    }

    fn device(&self, seed: u64) -> (Arc<Overlaid>, String) {
        let mut rng = rng(seed);
        let device = Overlaid::new(self.base.clone());
        let mut what = Vec::new();
        for _ in 0..rng.random_range(1..=2) {
            let Some(at) = self.kinds.choose(&mut rng).and_then(|k| k.choose(&mut rng)).copied() else { continue };
            let record = self.base[at..].starts_with(b"CLJR");
            let sector = [b"CSLT", b"CHBT", b"CDBL", b"CLKB"].iter().any(|m| self.base[at..].starts_with(*m));
            let len = match (record, sector) {
                (true, _) => 16 * BLOCK,
                (_, true) => 512,
                _ => BLOCK,
            };
            let mut b = self.base[at..(at + len).min(self.base.len())].to_vec();
            if record {
                let payload = u32::from_le_bytes([b[36], b[37], b[38], b[39]]) as usize;
                let end = (96 + payload).min(b.len());
                mutate(&mut rng, &mut b[..end]);
                fix_record(&mut b);
            } else {
                mutate(&mut rng, &mut b);
                fix_checksums(&mut b);
            }
            device.put(at as u64, &b);
            what.push(format!("{} at byte {at}", self.base[at..at + 4].escape_ascii()));
        }
        (Arc::new(device), what.join(", "))
    }

    /// One case. The error says what does not hold.
    pub fn case(&self, seed: u64) -> Result<Outcome, String> {
        let (device, what) = self.device(seed);
        let device: Arc<dyn BlockDevice> = device;
        let mut outcome = Outcome::default();
        let result = guarded(seed, || {
            let checked = paused(check(&device, None), "the check")?;
            // Unknown features are for newer programs: a mount refuses to write.
            outcome.found = checked.as_ref().map_or(true, |r| !r.is_clean() || r.read_only_features != 0);
            let read = paused(walk(device.clone()), "mounting and reading")?;
            outcome.read = read.is_ok();
            match read {
                Err(e) if !outcome.found => Err(format!("fsck finds nothing, but {e}")),
                _ => Ok(()),
            }
        });
        result.map_err(|e| format!("seed {seed} ({what}): {e}"))?;
        Ok(outcome)
    }

    /// What fsck -y repairs is sound: a second run finds nothing, and all of it can be read.
    pub fn repair(&self, seed: u64) -> Result<Repaired, String> {
        let (device, what) = self.device(seed);
        let device: Arc<dyn BlockDevice> = device;
        let mut repaired = Repaired::Nothing;
        let result = guarded(seed, || {
            let first = paused(repair::run(&device, true, Options::default(), seed, None), "the repair")?;
            let first = match first {
                Ok(outcome) => outcome,
                Err(e) => {
                    repaired = Repaired::Not(e.to_string());
                    return Ok(());
                }
            };
            if let Some(left) = first.left.first() {
                repaired = Repaired::Not(format!("{}: {}", left.place, left.text));
                return Ok(());
            }
            if !first.report.is_clean() {
                return Err(format!("nothing was left to do, but {:?}", first.report.violations));
            }
            if !first.repairs.is_empty() {
                repaired = Repaired::Sound;
            }
            let again = paused(repair::run(&device, true, Options::default(), seed + 1, None), "the second repair")?;
            match again {
                Ok(o) if o.repairs.is_empty() && o.left.is_empty() => {}
                Ok(o) => return Err(format!("a second run finds {:?} {:?}", o.repairs, o.left)),
                Err(e) => return Err(format!("a second run: {e}")),
            }
            paused(walk(device.clone()), "mounting and reading")?
        });
        result.map_err(|e| format!("seed {seed} ({what}): {e}"))?;
        Ok(repaired)
    }

    /// mkfs destroys nothing that it was not told to destroy, and what it makes has nothing of what was there.
    pub fn remake(&self, seed: u64) -> Result<(), String> {
        let (device, what) = self.device(seed);
        let (before, shared) = (device.image(), device.clone() as Arc<dyn BlockDevice>);
        let result = guarded(seed, || {
            let careful = FormatOptions { nodes: Some(3), journal_size: Some(1 << 20), ..FormatOptions::seeded(seed) };
            let last = before.len() - BLOCK;
            let named = [0, last].iter().any(|at| before[*at..].starts_with(b"CLUSTRFS"));
            if named {
                match paused(mkfs::format(&shared, &careful, &mut |_| {}), "mkfs")? {
                    Ok(_) => return Err("mkfs destroyed a volume".into()),
                    Err(_) if device.image() != before => return Err("mkfs wrote before it refused".into()),
                    Err(_) => {}
                }
            }
            let forced = FormatOptions { force: true, ..careful };
            paused(mkfs::format(&shared, &forced, &mut |_| {}), "mkfs")?.map_err(|e| format!("mkfs --force: {e}"))?;
            let report = paused(check(&shared, None), "the check")?.map_err(|e| format!("the new volume: {e}"))?;
            if !report.is_clean() {
                return Err(format!("the new volume: {:?}", report.violations));
            }
            paused(walk(shared.clone()), "mounting and reading")?
        });
        result.map_err(|e| format!("seed {seed} ({what}): {e}"))
    }
}

/// Runs something to its end, within its patience.
fn paused<T>(work: impl Future<Output = T>, name: &str) -> Result<T, String> {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let rt = rt.map_err(|e| e.to_string())?;
    let done = rt.block_on(async { tokio::time::timeout(PATIENCE, work).await });
    done.map_err(|_| format!("{name} does not end"))
}

async fn walk(device: Arc<dyn BlockDevice>) -> Result<(), String> {
    let v = Volume::mount(golden::mount_config(device, 7)).await.map_err(|e| format!("mounting: {e}"))?;
    let read = golden::listing(&v).await.map_err(|e| format!("reading: {e}"));
    let left = v.unmount().await.map_err(|e| format!("unmounting: {e}"));
    read?;
    left
}
