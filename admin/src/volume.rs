//! Opening a volume for looking at it.

use std::path::Path;
use std::sync::Arc;

use blockdev::iscsi::Settings;
use blockdev::open::{User, has_sectors_of_its_own};
use blockdev::{BlockDevice, IoClass};
use fs_core::format::layout::BLOCK;
use fs_core::format::superblock::{Superblock, SuperblockError, newest_copy};

use crate::Error;

/// Where the superblock was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    First,
    /// The first one is damaged or gone; this is the newer of its copies.
    Copy,
}

pub struct Volume {
    pub dev: Arc<dyn BlockDevice>,
    pub superblock: Superblock,
    pub source: Source,
}

/// Opens a device read-only, with the sector size that its volume was made with.
pub async fn open(path: &Path) -> Result<Volume, Error> {
    let dev = blockdev::open::open(path, User::Reader, None, &Settings::default()).await?;
    let first = Superblock::decode(&dev.read(IoClass::Meta, 0, BLOCK as usize).await?);
    let (superblock, source) = match first {
        Ok(sb) => (sb, Source::First),
        Err(e @ (SuperblockError::Newer { .. } | SuperblockError::Older { .. })) => return Err(located(path, &e)),
        Err(e) => match newest_copy(dev.as_ref()).await {
            Some((_, sb)) => (sb, Source::Copy),
            None => return Err(located(path, &e)),
        },
    };
    let dev = if superblock.sector_size == dev.geometry().sector_size || has_sectors_of_its_own(dev.as_ref()) {
        dev
    } else {
        blockdev::open::open(path, User::Reader, Some(superblock.sector_size), &Settings::default()).await?
    };
    if superblock.blocks > dev.geometry().size / BLOCK {
        let (has, wants) = (dev.geometry().size, superblock.blocks * BLOCK);
        return Err(format!("{}: the device has {has} bytes, its volume {wants}", path.display()).into());
    }
    Ok(Volume { dev, superblock, source })
}

fn located(path: &Path, e: &SuperblockError) -> Error {
    format!("{}: {e}", path.display()).into()
}
