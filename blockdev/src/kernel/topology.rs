//! What sysfs says of a block device: whether it is a whole SCSI disk, or a multipath device over paths to one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How SCSI commands reach a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole disk.
    Disk,
    /// dm-multipath, which sends each command by a path that works.
    Multipath { sysfs: PathBuf },
    /// No SCSI disk, a part of one (whose commands would go to the whole disk), or one beneath something else.
    Other,
}

/// Of the block device with this number.
pub(super) fn kind(rdev: u64) -> Kind {
    kind_in(&Path::new("/sys/dev/block").join(format!("{}:{}", libc::major(rdev), libc::minor(rdev))))
}

fn kind_in(device: &Path) -> Kind {
    let Ok(sysfs) = fs::canonicalize(device) else { return Kind::Other };
    if sysfs.join("partition").exists() {
        return Kind::Other;
    }
    // multipathd gives its devices such names; a linear device over a disk also passes commands on, to the wrong place.
    if fs::read_to_string(sysfs.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("mpath-")) {
        return Kind::Multipath { sysfs };
    }
    let subsystem = fs::canonicalize(sysfs.join("device/subsystem"));
    match subsystem.is_ok_and(|s| s.file_name().is_some_and(|name| name == "scsi")) {
        true => Kind::Disk,
        false => Kind::Other,
    }
}

/// The device nodes of a multipath device's paths, as they are now.
pub(super) fn paths(multipath: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(multipath.join("slaves")).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|slave| {
            let number = fs::read_to_string(slave.path().join("dev")).ok()?;
            let (major, minor) = number.trim().split_once(':')?;
            let number = (major.parse().ok()?, minor.parse().ok()?);
            let node = Path::new("/dev").join(slave.file_name());
            let rdev = fs::metadata(&node).ok()?.rdev();
            ((libc::major(rdev), libc::minor(rdev)) == number).then_some(node)
        })
        .collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn whole_disks_and_multipath_devices_only() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for path in ["bus/scsi", "bus/nvme", "sda/sda1", "nvme0n1", "loop0", "dm-0/dm", "dm-1/dm", "sddev", "nvdev"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        symlink(at("bus/scsi"), at("sddev/subsystem")).unwrap();
        symlink(at("bus/nvme"), at("nvdev/subsystem")).unwrap();
        symlink(at("sddev"), at("sda/device")).unwrap();
        symlink(at("nvdev"), at("nvme0n1/device")).unwrap();
        fs::write(at("sda/sda1/partition"), "1\n").unwrap();
        fs::write(at("dm-0/dm/uuid"), "mpath-360014050000\n").unwrap();
        fs::write(at("dm-1/dm/uuid"), "LVM-abc\n").unwrap();
        let kind = |path: &str| kind_in(&at(path));
        assert_eq!(kind("sda"), Kind::Disk);
        assert_eq!(kind("dm-0"), Kind::Multipath { sysfs: fs::canonicalize(at("dm-0")).unwrap() });
        for path in ["sda/sda1", "nvme0n1", "loop0", "dm-1", "none"] {
            assert_eq!(kind(path), Kind::Other, "{path}");
        }
        assert_eq!(paths(&at("dm-0")), Vec::<PathBuf>::new());
    }
}
