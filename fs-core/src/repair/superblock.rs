//! The superblock and its copy, each written from the other.

use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, DevError, IoClass};

use super::{Repair, RepairError, repaired};
use crate::format::layout::BLOCK;
use crate::format::superblock::{MAGIC, Superblock, SuperblockError};

/// Writes the superblock from its copy, or the copy from the superblock. With `absent`, a superblock that is all zeros is
/// written too: the volume may have been destroyed on purpose, so only who asks for that gets it back.
pub async fn superblock(dev: &Arc<dyn BlockDevice>, absent: bool) -> Result<Option<Repair>, RepairError> {
    let last = (dev.geometry().size / BLOCK).saturating_sub(1);
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let found = match Superblock::decode(&first) {
        Ok(sb) => {
            let at = sb.layout().backup_superblock();
            if at > last {
                // Truncated: there is no place for the copy.
                return Ok(None);
            }
            // A copy that cannot be read is written anew: that is what makes a drive replace a bad sector.
            let copy = dev.read(IoClass::Meta, at * BLOCK, BLOCK as usize).await;
            if copy.is_ok_and(|c| Superblock::decode(&c).is_ok_and(|c| c == sb)) {
                return Ok(None);
            }
            write(dev, at, &sb).await?;
            return Ok(Some(repaired(format!("copy of the superblock, block {at}"), "written from the superblock")));
        }
        Err(e @ (SuperblockError::Newer { .. } | SuperblockError::Older { .. })) => return Err(e.into()),
        Err(e) => e,
    };
    // Anything else in block 0 is somebody else's.
    let ours = first[..8] == MAGIC || (absent && first.iter().all(|b| *b == 0));
    let copy = dev.read(IoClass::Meta, last * BLOCK, BLOCK as usize).await?;
    match Superblock::decode(&copy) {
        // A copy of a volume of another size is left over from an earlier one.
        Ok(sb) if ours && sb.layout().backup_superblock() == last => {
            write(dev, 0, &sb).await?;
            Ok(Some(repaired("superblock, block 0".into(), &format!("written from its copy in block {last}"))))
        }
        _ => Err(found.into()),
    }
}

async fn write(dev: &Arc<dyn BlockDevice>, block: u64, sb: &Superblock) -> Result<(), DevError> {
    let mut b = AlignedBuf::zeroed(BLOCK as usize);
    sb.encode(&mut b);
    dev.write(IoClass::Meta, block * BLOCK, Arc::new(b), false).await?;
    dev.flush(IoClass::Meta).await
}
