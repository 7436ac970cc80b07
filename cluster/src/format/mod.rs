//! The cluster's records on disk: encode and decode of each, one logical sector per record.
//!
//! Every record is 512 bytes of content, zero-padded to the sector, little endian, and ends in a checksum at offset 496:
//! the first 16 bytes of blake3 over bytes 0 to 495. Every record carries the volume and its own place, so that a
//! misdirected or foreign sector is never taken for a record. Decoding is strict: a record that would not be encoded to
//! the same bytes again is damaged, so a decoded record can stand for its sector in a compare-and-write.

mod cell;
mod doorbell;
mod heartbeat;
mod lock;
mod slot;

pub(crate) use cell::{Cell, CellState};
pub(crate) use doorbell::{Asked, Doorbell, MAX_REQUESTS};
pub(crate) use heartbeat::Heartbeat;
pub use lock::{Entry, LockBlock, initial_lock_block};
pub use slot::{LastEnd, SlotBlock, SlotState, initial_slot_block};

/// Bytes of a record's content.
pub(crate) const RECORD: usize = 512;
const CHECKSUM: usize = 496;
const VERSION: u8 = 1;

type Record = [u8; RECORD];

/// Why a sector is not the record that it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("not a record of this kind")]
    Magic,
    #[error("format version {0} is unknown")]
    Version(u8),
    #[error("checksum mismatch")]
    Checksum,
    #[error("belongs to another volume")]
    OtherVolume,
    #[error("belongs to another place")]
    OtherPlace,
    #[error("invalid {0}")]
    Invalid(&'static str),
}

/// Bytes `at..at + N`; offsets are constants of the formats, within the record.
fn bytes<const N: usize>(record: &Record, at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&record[at..at + N]);
    out
}

fn u16_at(record: &Record, at: usize) -> u16 {
    u16::from_le_bytes(bytes(record, at))
}

fn u32_at(record: &Record, at: usize) -> u32 {
    u32::from_le_bytes(bytes(record, at))
}

fn u64_at(record: &Record, at: usize) -> u64 {
    u64::from_le_bytes(bytes(record, at))
}

fn put(record: &mut Record, at: usize, value: &[u8]) {
    record[at..at + value.len()].copy_from_slice(value);
}

fn checksum(record: &Record) -> [u8; 16] {
    let hash = blake3::hash(&record[..CHECKSUM]);
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

fn begin(magic: &[u8; 4], volume: u64) -> Record {
    let mut record = [0; RECORD];
    put(&mut record, 0, magic);
    record[4] = VERSION;
    put(&mut record, 8, &volume.to_le_bytes());
    record
}

/// Adds the checksum and pads to a sector.
fn seal(mut record: Record, stride: u64) -> Vec<u8> {
    let sum = checksum(&record);
    put(&mut record, CHECKSUM, &sum);
    let mut sector = record.to_vec();
    sector.resize(usize::try_from(stride).map_or(RECORD, |s| s.max(RECORD)), 0);
    sector
}

/// Checks what all records have in common.
fn open(sector: &[u8], magic: &[u8; 4], volume: u64) -> Result<Record, FormatError> {
    let mut record = [0; RECORD];
    let content = sector.get(..RECORD).ok_or(FormatError::Invalid("length"))?;
    record.copy_from_slice(content);
    if record[..4] != *magic {
        return Err(FormatError::Magic);
    }
    if record[4] != VERSION {
        return Err(FormatError::Version(record[4]));
    }
    if bytes(&record, CHECKSUM) != checksum(&record) {
        return Err(FormatError::Checksum);
    }
    if u64_at(&record, 8) != volume {
        return Err(FormatError::OtherVolume);
    }
    if sector[RECORD..].iter().any(|b| *b != 0) {
        return Err(FormatError::Invalid("padding"));
    }
    Ok(record)
}
