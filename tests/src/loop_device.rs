//! Block devices of this kernel over one file: each is to the others as another host's is, for no lock goes through it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cluster::Result;

/// Past the page cache. Gone when dropped.
pub struct LoopDevice(PathBuf);

fn losetup(args: &[&str]) -> Result<String> {
    let out = Command::new("losetup").args(args).output().map_err(|e| format!("losetup: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_string());
    }
    Err(format!("losetup {args:?}: {}", String::from_utf8_lossy(&out.stderr)).into())
}

impl LoopDevice {
    pub fn new(file: &Path) -> Result<Self> {
        let file = file.display().to_string();
        Ok(Self(losetup(&["--find", "--show", "--direct-io=on", &file])?.into()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(e) = losetup(&["-d", &self.0.display().to_string()]) {
            eprintln!("{}: {e}", self.0.display());
        }
    }
}
