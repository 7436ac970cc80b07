//! Whether this host itself uses the device: mounts, swap, loop devices, other kernel users.
//!
//! Mounts of clusterfs are left out: those are nodes, which the volume's own slots know better, on other hosts too.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::MkfsError;

/// Refuses a device that the kernel of this host uses. Not even `--force` overrides it: nothing good can come of it.
pub fn check(path: &Path) -> Result<(), MkfsError> {
    let in_use = |why: String| Err(MkfsError::InUse(format!("{} {why}", path.display())));
    // A device that is not there gets its message from opening it.
    let (Ok(real), Ok(meta)) = (path.canonicalize(), fs::metadata(path)) else { return Ok(()) };
    if let Some(dir) = mounted_on(&real, &fs::read_to_string("/proc/self/mounts").unwrap_or_default()) {
        return in_use(format!("is mounted on {dir}: unmount it first"));
    }
    if listed(&real, &fs::read_to_string("/proc/swaps").unwrap_or_default()) {
        return in_use("is used as swap space: swapoff it first".into());
    }
    if meta.file_type().is_block_device() {
        match File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) || e.kind() == ErrorKind::ResourceBusy => {
                in_use("is in use by this host's kernel (mounted, or part of an array or of a logical volume)".into())
            }
            _ => Ok(()),
        }
    } else if let Some(dev) = loop_device(&real, Path::new("/sys/block")) {
        in_use(format!("is set up as {}: losetup -d it first, or use that device", dev.display()))
    } else {
        Ok(())
    }
}

/// The mount point in /proc/mounts whose source is this path, unless its filesystem is clusterfs.
fn mounted_on(real: &Path, mounts: &str) -> Option<String> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (source, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        let same = source.starts_with('/') && Path::new(&unescape(source)) == real;
        (same && !kind.contains("clusterfs")).then(|| unescape(dir))
    })
}

/// Whether the first column of a list names this path.
fn listed(real: &Path, list: &str) -> bool {
    list.lines().filter_map(|l| l.split_whitespace().next()).any(|p| Path::new(&unescape(p)) == real)
}

/// The loop device whose backing file this is.
fn loop_device(real: &Path, sys_block: &Path) -> Option<PathBuf> {
    fs::read_dir(sys_block).ok()?.flatten().find_map(|entry| {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let same = Path::new(backing.trim_end_matches('\n')) == real;
        same.then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// The kernel writes blanks and backslashes as \ooo.
fn unescape(s: &str) -> String {
    let mut out = Vec::new();
    let b = s.as_bytes();
    let mut i = 0;
    while i < b.len() {
        let octal = (b[i] == b'\\')
            .then(|| b.get(i + 1..i + 4))
            .flatten()
            .and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match octal {
            Some(c) => {
                out.push(c);
                i += 4;
            }
            None => {
                out.push(b[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_clusterfs_left_out() {
        let mounts = "/dev/sda1 / ext4 rw 0 0\n/img\\040one /mnt\\040a xfs rw 0 0\n/lun /srv fuse.clusterfs rw 0 0\nproc /proc proc rw 0 0\n";
        assert_eq!(mounted_on(Path::new("/img one"), mounts), Some("/mnt a".into()));
        assert_eq!(mounted_on(Path::new("/dev/sda1"), mounts), Some("/".into()));
        assert_eq!(mounted_on(Path::new("/lun"), mounts), None);
        assert_eq!(mounted_on(Path::new("/other"), mounts), None);
    }

    #[test]
    fn a_plain_file_is_free_and_swap_is_not() {
        let f = tempfile::NamedTempFile::new().unwrap();
        check(f.path()).unwrap();
        check(Path::new("/no/such/device")).unwrap();
        let swaps = "Filename Type Size Used Priority\n/swap\\040file file 1 0 -2\n";
        assert!(listed(Path::new("/swap file"), swaps));
        assert!(!listed(Path::new("/swap"), swaps));
    }

    #[test]
    fn loop_devices_are_found_by_backing_file() {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join("loop7/loop")).unwrap();
        fs::create_dir_all(sys.path().join("sda")).unwrap();
        fs::write(sys.path().join("loop7/loop/backing_file"), "/images/a.img\n").unwrap();
        assert_eq!(loop_device(Path::new("/images/a.img"), sys.path()), Some("/dev/loop7".into()));
        assert_eq!(loop_device(Path::new("/images/b.img"), sys.path()), None);
    }
}
