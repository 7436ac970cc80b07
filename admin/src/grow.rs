//! `clusterfs grow`: lets a volume use all of its device, also while nodes have it mounted.

use std::path::Path;
use std::sync::Arc;

use blockdev::iscsi::Settings;
use blockdev::open::{User, has_sectors_of_its_own};
use blockdev::{BlockDevice, IoClass};
use fs_core::format::layout::BLOCK;
use fs_core::format::superblock::Superblock;
use fs_core::grow::Grown;
use mkfs::Bytes;
use serde::Serialize;

use crate::Error;

#[derive(Serialize)]
struct Result {
    device: String,
    grown: bool,
    /// Bytes, before and now.
    old_size: u64,
    size: u64,
    groups: u32,
    /// Bytes of the device that the volume cannot grow into.
    beyond: u64,
}

/// Opens it as a node does, with the sector size that its volume was made with.
async fn open(path: &Path) -> std::result::Result<Arc<dyn BlockDevice>, Error> {
    let settings = Settings::default();
    let dev = blockdev::open::open(path, User::Node, None, &settings).await?;
    let sb = Superblock::decode(&dev.read(IoClass::Meta, 0, BLOCK as usize).await?)?;
    if sb.sector_size == dev.geometry().sector_size || has_sectors_of_its_own(dev.as_ref()) {
        return Ok(dev);
    }
    Ok(blockdev::open::open(path, User::Node, Some(sb.sector_size), &settings).await?)
}

pub async fn run(device: &Path, json: bool) -> std::result::Result<String, Error> {
    let located = |e: &dyn std::fmt::Display| format!("{}: {e}", device.display());
    let dev = open(device).await.map_err(|e| match e.downcast_ref::<blockdev::open::NameError>() {
        Some(_) => e,
        None => located(&e).into(),
    })?;
    let grown = fs_core::grow::grow(&dev, rand::random()).await.map_err(|e| located(&e))?;
    let r = Result {
        device: device.display().to_string(),
        grown: grown.from < grown.to,
        old_size: grown.from * BLOCK,
        size: grown.to * BLOCK,
        groups: grown.groups,
        beyond: grown.beyond * BLOCK,
    };
    if json {
        return Ok(serde_json::to_string_pretty(&r)? + "\n");
    }
    Ok(text(&r, &grown))
}

fn text(r: &Result, grown: &Grown) -> String {
    let mut s = match r.grown {
        true => format!("{}: grew from {} to {} ({} bytes)\n", r.device, Bytes(r.old_size), Bytes(r.size), r.size),
        false if r.beyond > 0 => format!("{}: the volume has {}, as much as it can\n", r.device, Bytes(r.size)),
        false => format!("{}: the volume has {}, all of its device\n", r.device, Bytes(r.size)),
    };
    if grown.beyond > 0 {
        let why = "a volume grows to the --max-size that mkfs.clusterfs was given";
        s += &format!("{} of the device stay unused: {why}\n", Bytes(r.beyond));
    }
    s
}
