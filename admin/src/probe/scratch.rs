//! A place that may be written to: on a device that carries nothing known, in a stretch of zeros.

use blockdev::{BlockDevice, IoClass, Registrations};
use mkfs::signature;

use super::fences;

/// Bytes of a stretch.
pub const LEN: u64 = 64 << 10;
/// Places that are looked at.
const PLACES: u64 = 64;
/// Kept clear of at both ends: where signatures are, and whatever is unknown is likely to have its first blocks.
const MARGIN: u64 = 1 << 20;

/// The offset of a stretch of [`LEN`] zeros; or why nothing may be written.
pub async fn find(dev: &dyn BlockDevice) -> Result<u64, String> {
    carries_nothing(dev).await?;
    for offset in places(dev.geometry().size) {
        let found = dev.read(IoClass::Data, offset, LEN as usize).await.map_err(|e| e.to_string())?;
        if found.iter().all(|b| *b == 0) {
            return Ok(offset);
        }
    }
    Err(format!(
        "none of {PLACES} places that were looked at is blank: the device may carry something that is not known, nothing is written"
    ))
}

/// Refuses a device with something on it, or that somebody uses.
pub async fn carries_nothing(dev: &dyn BlockDevice) -> Result<(), String> {
    let found = signature::probe(dev).await.map_err(|e| e.to_string())?;
    if !found.is_empty() {
        let mut names: Vec<&str> = found.iter().map(|f| f.name).collect();
        names.dedup();
        return Err(format!("the device holds {}: nothing is written", names.join(", ")));
    }
    if fences(dev) {
        let r = dev.registrations().await.map_err(|e| e.to_string())?.unwrap_or_default();
        if r != Registrations::default() {
            return Err("others have registered with the device: nothing is written while they may use it".into());
        }
    }
    Ok(())
}

/// Spread over the device, the middle first: that is furthest from what either end may hold.
fn places(size: u64) -> Vec<u64> {
    let room = size.saturating_sub(2 * MARGIN + LEN);
    let mut all: Vec<u64> = (0..PLACES).map(|i| MARGIN + room / PLACES * i / LEN * LEN).collect();
    all.dedup();
    all.sort_by_key(|offset| offset.abs_diff(size / 2));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_within_the_device_and_clear_of_its_ends() {
        for size in [16 << 20, (1 << 40) + 512, 1 << 50] {
            let all = places(size);
            assert!(all.iter().all(|o| *o >= MARGIN && o + LEN <= size - MARGIN && o.is_multiple_of(LEN)), "{all:?}");
            assert!(all.len() > 32, "{}", all.len());
        }
    }
}
