//! Opening a device by its name, as users give it: a path, or an iSCSI disk.

use std::path::Path;
use std::sync::Arc;

use crate::image::{ImageFile, OpenError, OpenMode};
use crate::scsi::reservation::TOOL;
use crate::{BlockDevice, DevError, FenceKey, FencingKind, iscsi, kernel};

/// The slot in the keys of programs that are no node.
pub const TOOL_SLOT: u16 = TOOL;

/// Who opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// A mount, which will register when it joins.
    Node,
    /// mkfs, fsck: may write also where the device is reserved for nodes (dead ones; they check that none lives).
    Tool,
    /// A further connection of who has it open as a node already, and has registered.
    BesideNode,
    /// Only reads.
    Reader,
}

#[derive(Debug, thiserror::Error)]
pub enum NameError {
    #[error(transparent)]
    File(#[from] OpenError),
    #[error("{name}: {why}")]
    Scsi { name: String, why: String },
    #[error("{name}: {source}")]
    Device { name: String, source: DevError },
}

/// Whether a name means an iSCSI disk.
pub fn is_iscsi(name: &Path) -> bool {
    name.to_str().is_some_and(|n| n.starts_with(iscsi::SCHEME))
}

/// Opens a device. For a file `sector_size` is that of the volume on it, if known.
pub async fn open(
    name: &Path,
    user: User,
    sector_size: Option<u32>,
    settings: &iscsi::Settings,
) -> Result<Arc<dyn BlockDevice>, NameError> {
    let mode = if user == User::Reader { OpenMode::ReadOnly } else { OpenMode::ReadWrite };
    let failed = |why| NameError::Scsi { name: name.display().to_string(), why };
    let disk: Arc<dyn BlockDevice> = match name.to_str().filter(|n| n.starts_with(iscsi::SCHEME)) {
        Some(url) => {
            let disk = iscsi::open(url, mode, settings).await.map_err(failed)?;
            if user != User::Reader {
                disk.check_for_nodes().map_err(|e| failed(e.to_string()))?;
            }
            disk
        }
        None => match kernel::open(name, user, mode).await.map_err(failed)? {
            Some(disk) => disk,
            None => {
                return Ok(match sector_size {
                    Some(size) => ImageFile::open_with_sector_size(name, mode, size)?,
                    None => ImageFile::open(name, mode)?,
                });
            }
        },
    };
    if user == User::Tool && disk.geometry().fencing == FencingKind::Reservations {
        let key = FenceKey { slot: TOOL, incarnation: rand::random() };
        let registered = disk.register(key).await;
        registered.map_err(|source| NameError::Device { name: name.display().to_string(), source })?;
    }
    Ok(disk)
}

/// Whether the size of its sectors is the device's own, whatever the volume on it was made with.
pub fn has_sectors_of_its_own(dev: &dyn BlockDevice) -> bool {
    dev.abilities().is_some()
}
