//! The programs: how cargo calls them and how users do. Cargo's names cannot have dots, mount(8)'s must.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::run::{cargo, run, target_dir};

pub struct Program {
    pub package: &'static str,
    /// The binary that cargo makes.
    pub built: &'static str,
    pub installed: &'static str,
    /// mount(8), umount(8), fsck(8) and mkfs(8) look for helpers in /sbin only.
    pub helper: bool,
}

pub const PROGRAMS: &[Program] = &[
    Program { package: "fuse-mount", built: "mount-clusterfs", installed: "mount.clusterfs", helper: true },
    // umount(8) looks for the type that the kernel shows.
    Program { package: "fuse-mount", built: "umount-clusterfs", installed: "umount.fuse.clusterfs", helper: true },
    Program { package: "mkfs", built: "mkfs-clusterfs", installed: "mkfs.clusterfs", helper: true },
    Program { package: "fsck", built: "fsck-clusterfs", installed: "fsck.clusterfs", helper: true },
    Program { package: "admin", built: "clusterfs", installed: "clusterfs", helper: false },
];

/// Builds the programs and puts them under the names of users into a directory, which is returned.
pub fn build() -> Result<PathBuf> {
    let mut c = cargo();
    c.args(["build", "--release", "--quiet"]);
    for p in PROGRAMS {
        c.args(["--package", p.package, "--bin", p.built]);
    }
    run(&mut c)?;
    let target = target_dir()?;
    let bin = target.join("bin");
    fs::create_dir_all(&bin).map_err(|e| format!("{}: {e}", bin.display()))?;
    for p in PROGRAMS {
        put(&target.join("release").join(p.built), &bin.join(p.installed), 0o755)?;
    }
    Ok(bin)
}

/// Copies a file so that a running program keeps the old one.
pub fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let mut name = to.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    fs::copy(from, &new)
        .and_then(|_| fs::set_permissions(&new, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&new, to))
        .map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))
}
