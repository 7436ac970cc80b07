//! What is measured: a cluster of real mounts on an image file, or a local filesystem on a loop device over a file beside it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::io::{self, Io};
use crate::cluster::{Cluster, Result, umount};

/// The most nodes that a scenario uses.
pub const NODES: usize = 4;
const BYTES: u64 = 16 << 30;
/// All nodes are killed after this.
const LIMIT: Duration = Duration::from_secs(12 * 3600);

/// A filesystem, mounted as long as this lives.
pub enum Place {
    Clusterfs { cluster: Cluster, options: String },
    Local(Local),
}

/// ext4 or xfs. Flushes and direct I/O reach the backing file, as clusterfs's do.
pub struct Local {
    kind: String,
    device: String,
    dir: TempDir,
}

impl Place {
    /// `clusterfs`, `clusterfs:OPTION,...` with options of the mount, or what mkfs knows: `ext4`, `xfs`. Images are made in
    /// `store`.
    pub fn new(spec: &str, store: &Path) -> Result<Place> {
        match spec.split_once(':').unwrap_or((spec, "")) {
            ("clusterfs", options) => {
                let image = store.join(format!("{}.img", spec.replace([':', ',', '='], "-")));
                File::create(&image)?.set_len(BYTES)?;
                let cluster = Cluster::formatted_on(&image, NODES, LIMIT, &[])?;
                let options = ["rw,noatime", options].join(",").trim_end_matches(',').to_string();
                (0..NODES).try_for_each(|n| cluster.mount_with(n, &options))?;
                Ok(Place::Clusterfs { cluster, options })
            }
            (kind @ ("ext4" | "xfs"), "") => Ok(Place::Local(Local::new(kind, store)?)),
            _ => Err(format!("'{spec}' cannot be measured: clusterfs, clusterfs:MOUNT-OPTIONS, ext4 or xfs").into()),
        }
    }

    pub fn name(&self) -> String {
        match self {
            Place::Clusterfs { options, .. } => match options.strip_prefix("rw,noatime,") {
                Some(more) => format!("clusterfs:{more}"),
                None => "clusterfs".into(),
            },
            Place::Local(local) => local.kind.clone(),
        }
    }

    /// Whether this can be used by as many nodes.
    pub fn has(&self, nodes: usize) -> bool {
        match self {
            Place::Clusterfs { .. } => nodes <= NODES,
            Place::Local(_) => nodes == 1,
        }
    }

    pub fn root(&self, node: usize) -> PathBuf {
        match self {
            Place::Clusterfs { cluster, .. } => cluster.mount_point(node),
            Place::Local(local) => local.dir.path().to_owned(),
        }
    }

    /// Unmounts and mounts again, so that nothing is cached.
    pub fn remount(&self, node: usize) -> Result<()> {
        match self {
            Place::Clusterfs { cluster, options } => {
                cluster.unmount(node)?;
                cluster.mount_with(node, options)
            }
            Place::Local(local) => {
                umount(local.dir.path(), 0)?;
                local.mount()
            }
        }
    }

    /// Writes out what waits to be written.
    pub fn settle(&self) -> Result<()> {
        let nodes = if self.has(NODES) { NODES } else { 1 };
        for node in 0..nodes {
            let root = File::open(self.root(node))?;
            // SAFETY: an open descriptor.
            if unsafe { libc::syncfs(std::os::fd::AsRawFd::as_raw_fd(&root)) } != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        Ok(())
    }

    /// What the nodes last complained of.
    pub fn complaints(&self) -> String {
        let Place::Clusterfs { cluster, .. } = self else { return String::new() };
        let last = |n| {
            let log = cluster.log_text(n);
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(5)..].iter().map(|line| format!("\nnode {n}: {line}")).collect::<String>()
        };
        (0..NODES).map(last).collect()
    }

    pub fn io(&self) -> Result<Io> {
        match self {
            Place::Clusterfs { cluster, .. } => {
                (0..NODES).try_fold(Io::default(), |sum, n| Ok(sum.plus(&io::of_mount(&cluster.mount_point(n))?)))
            }
            Place::Local(local) => io::of_block_device(local.device.trim_start_matches("/dev/")),
        }
    }
}

/// Runs a program to its end and returns what it printed; its name is in the error.
pub fn program(name: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(name).args(args).output().map_err(|e| format!("{name}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{name}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

impl Local {
    fn new(kind: &str, store: &Path) -> Result<Local> {
        let image = store.join(format!("{kind}.img"));
        File::create(&image)?.set_len(BYTES)?;
        let image = image.to_str().ok_or("the name of the directory for images is not UTF-8")?;
        // Only metadata that is used is made: as mkfs.clusterfs, which takes seconds whatever the size.
        program(&format!("mkfs.{kind}"), &["-q", image])?;
        let device = program("losetup", &["--find", "--show", "--direct-io=on", image])?.trim().to_string();
        let local = Local { kind: kind.into(), device, dir: tempfile::tempdir()? };
        local.mount()?;
        Ok(local)
    }

    fn mount(&self) -> Result<()> {
        let dir = self.dir.path().to_str().ok_or("the name of the directory for mounts is not UTF-8")?;
        program("mount", &["-t", &self.kind, "-o", "noatime", &self.device, dir]).map(drop)
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Err(e) = umount(self.dir.path(), libc::MNT_DETACH) {
            eprintln!("{}: {e}", self.dir.path().display());
        }
        if let Err(e) = program("losetup", &["--detach", &self.device]) {
            eprintln!("{e}");
        }
    }
}

/// Bytes that a directory of images uses on its filesystem.
pub fn is_roomy(store: &Path, bytes: u64) -> Result<()> {
    let s = crate::sys::statfs(store)?;
    let free = s.f_bavail * s.f_bsize as u64;
    fs::metadata(store)?;
    if free < bytes {
        return Err(format!("{} has {} MiB free, {} MiB are needed", store.display(), free >> 20, bytes >> 20).into());
    }
    Ok(())
}
