//! The superblock and its copies, each written from the others.

use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, DevError, IoClass};

use super::{Repair, RepairError, repaired};
use crate::format::layout::BLOCK;
use crate::format::superblock::{MAGIC, Superblock, SuperblockError, newest_copy};

/// Writes the superblock from the newer of its copies, and the copies from the superblock. With `absent`, a superblock that is all
/// zeros is written too: the volume may have been destroyed on purpose, so only who asks for that gets it back.
pub async fn superblock(dev: &Arc<dyn BlockDevice>, absent: bool) -> Result<Vec<Repair>, RepairError> {
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let mut done = Vec::new();
    let sb = match Superblock::decode(&first) {
        Ok(sb) => sb,
        Err(e @ (SuperblockError::Newer { .. } | SuperblockError::Older { .. })) => return Err(e.into()),
        Err(found) => {
            // Anything else in block 0 is somebody else's.
            let ours = first[..8] == MAGIC || (absent && first.iter().all(|b| *b == 0));
            let Some((at, sb)) = newest_copy(dev.as_ref()).await.filter(|_| ours) else { return Err(found.into()) };
            write(dev, 0, &sb).await?;
            done.push(repaired("superblock, block 0".into(), &format!("written from its copy in block {at}")));
            sb
        }
    };
    let blocks = dev.geometry().size / BLOCK;
    // Where it was truncated there is no place for the last.
    for at in sb.layout().superblock_copies().into_iter().filter(|at| *at < blocks) {
        // A copy that cannot be read is written anew: that is what makes a drive replace a bad sector.
        let copy = dev.read(IoClass::Meta, at * BLOCK, BLOCK as usize).await;
        let copy = copy.ok().and_then(|c| Superblock::decode(&c).ok());
        if copy.as_ref() == Some(&sb) {
            continue;
        }
        write(dev, at, &sb).await?;
        let text = match copy {
            Some(c) if c.uuid == sb.uuid && c.generation > sb.generation => {
                "written from the superblock: it spoke of a growth that was cut off"
            }
            _ => "written from the superblock",
        };
        done.push(repaired(format!("copy of the superblock, block {at}"), text));
    }
    Ok(done)
}

async fn write(dev: &Arc<dyn BlockDevice>, block: u64, sb: &Superblock) -> Result<(), DevError> {
    let mut b = AlignedBuf::zeroed(BLOCK as usize);
    sb.encode(&mut b);
    dev.write(IoClass::Meta, block * BLOCK, Arc::new(b), false).await?;
    dev.flush(IoClass::Meta).await
}
