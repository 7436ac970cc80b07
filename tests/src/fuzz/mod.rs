//! Fuzzing of what is parsed from disk, network and kernel: bytes are changed at random, their checksums are made right again so
//! that the change gets past them, and then nothing may panic, overflow, hang, turn in a circle or allocate without bound
//! ([`watch`]). Everything follows from the seed.
//!
//! | what | must hold |
//! |---|---|
//! | [`formats`] | decoding gives an error or something that encodes to what decodes to the same |
//! | [`volume`] | a volume that fsck calls clean can be mounted and read in full; so can one that fsck -y has repaired, in which a second run finds nothing; mkfs refuses it, or makes a sound one of it |
//! | [`noise`] | hints, doorbells and heartbeats of others change nothing of what a node shows |
//! | [`requests`] | every request of the kernel is answered, and leaves a sound volume |

mod device;
pub mod formats;
pub mod noise;
pub mod requests;
pub mod volume;
pub mod watch;

use std::cell::RefCell;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use flate2::read::GzDecoder;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

pub const BLOCK: usize = 4096;

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Keeps what panics say, those of tasks too, which their runtime would swallow.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with(|p| p.borrow_mut().push(info.to_string()));
            before(info);
        }));
    });
}

/// Runs one case; a panic in it, or in a task on its thread, is a failure.
pub(crate) fn guarded(seed: u64, case: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let _case = watch::Case::begin(seed);
    watch_panics();
    PANICS.with(|p| p.borrow_mut().clear());
    let outcome = catch_unwind(AssertUnwindSafe(case));
    let panics = PANICS.with(|p| std::mem::take(&mut *p.borrow_mut()));
    match outcome {
        _ if !panics.is_empty() => Err(panics.join("; ")),
        Ok(result) => result,
        Err(_) => Err("panicked".into()),
    }
}

/// A golden volume.
pub fn golden(name: &str) -> std::io::Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../images/{name}.img.gz"));
    let mut bytes = Vec::new();
    GzDecoder::new(std::fs::File::open(path)?).read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Numbers at the edges of what fields hold.
const EDGES: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX / 2, u64::MAX - 1, u64::MAX];

/// Changes 1 to 4 fields or bytes, mostly where something is.
pub fn mutate(rng: &mut StdRng, b: &mut [u8]) {
    if b.is_empty() {
        return;
    }
    let used: Vec<usize> = (0..b.len()).filter(|i| b[*i] != 0).collect();
    for _ in 0..rng.random_range(1..=4) {
        let at = match used.choose(rng) {
            Some(at) if rng.random_range(0..4) != 0 => *at,
            _ => rng.random_range(0..b.len()),
        };
        match rng.random_range(0..6) {
            0 => b[at] ^= 1 << rng.random_range(0..8),
            1 => b[at] = rng.random(),
            2 | 3 => {
                let len = [1, 2, 4, 8][rng.random_range(0..4)];
                let at = at / len * len;
                let value = EDGES[rng.random_range(0..EDGES.len())].to_le_bytes();
                let len = len.min(b.len() - at);
                b[at..at + len].copy_from_slice(&value[..len]);
            }
            4 => {
                let len = [2, 4, 8][rng.random_range(0..3)].min(b.len() - at);
                let mut value = [0; 8];
                value[..len].copy_from_slice(&b[at..at + len]);
                let by = rng.random_range(0..17u64).wrapping_sub(8);
                let value = u64::from_le_bytes(value).wrapping_add(by).to_le_bytes();
                b[at..at + len].copy_from_slice(&value[..len]);
            }
            _ => {
                let len = rng.random_range(1..=32).min(b.len() - at);
                let from = rng.random_range(0..=b.len() - len);
                b.copy_within(from..from + len, at);
            }
        }
    }
}

/// Makes the checksums in a block right again, whatever kind of block or record it is.
pub fn fix_checksums(b: &mut [u8]) {
    let hash = |parts: &[&[u8]]| {
        let mut h = blake3::Hasher::new();
        parts.iter().for_each(|p| {
            h.update(p);
        });
        *h.finalize().as_bytes()
    };
    if b.len() == BLOCK && b.starts_with(b"CLFS") {
        let sum = journal::block::checksum(b);
        b[48..64].copy_from_slice(&sum);
    } else if b.len() >= 272 && b.starts_with(b"CLUSTRFS") {
        let sum = hash(&[&b[..240]]);
        b[240..272].copy_from_slice(&sum);
    } else if b.len() >= 80 && b.starts_with(b"CLJH") {
        let sum = hash(&[&b[..48]]);
        b[48..80].copy_from_slice(&sum);
    } else {
        for r in b.chunks_mut(512).filter(|r| r.len() == 512) {
            if [b"CSLT", b"CHBT", b"CDBL", b"CLKB"].iter().any(|m| r.starts_with(*m)) {
                let sum = hash(&[&r[..496]]);
                r[496..].copy_from_slice(&sum[..16]);
            }
        }
    }
}

/// As [`fix_checksums`], for a journal record, which `b` starts with and may go beyond.
pub fn fix_record(b: &mut [u8]) {
    let Some(len) = b.get(36..40).and_then(|l| l.try_into().ok()).map(u32::from_le_bytes) else { return };
    let Some(payload) = b.get(96..96 + len as usize) else { return };
    let mut h = blake3::Hasher::new();
    h.update(&b[..64]).update(payload);
    let sum = *h.finalize().as_bytes();
    b[64..96].copy_from_slice(&sum);
}
