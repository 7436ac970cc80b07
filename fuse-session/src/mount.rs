//! mount(2) and umount2(2), done directly by root: no helper program, no shell, clear errors.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tracing::debug;

/// What to mount where.
#[derive(Debug, Clone)]
pub struct MountSpec {
    /// What /proc/mounts shows as the device.
    pub source: String,
    /// The type is shown as `fuse.SUBTYPE`.
    pub subtype: String,
    pub dir: PathBuf,
    /// `libc::MS_RDONLY`, `MS_NOSUID`, `MS_NODEV`, `MS_NOEXEC`, `MS_NOATIME`...
    pub flags: u64,
    /// Largest READ the kernel sends.
    pub max_read: u32,
    /// Further options of the kernel's FUSE, such as `blksize=4096`; `allow_other` and `default_permissions` are
    /// always set.
    pub options: Vec<String>,
}

impl MountSpec {
    pub fn new(source: impl Into<String>, subtype: impl Into<String>, dir: impl Into<PathBuf>) -> MountSpec {
        MountSpec {
            source: source.into(),
            subtype: subtype.into(),
            dir: dir.into(),
            flags: 0,
            max_read: 1 << 20,
            options: Vec::new(),
        }
    }
}

/// Why a mount failed, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("mount point {} does not exist", .0.display())]
    Missing(PathBuf),
    #[error("mount point {} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    #[error("mount point {} holds a mount whose server is gone: unmount it first (`umount -l`)", .0.display())]
    Stale(PathBuf),
    #[error("mount point {}: {source}", dir.display())]
    MountPoint { dir: PathBuf, source: io::Error },
    #[error("only root may mount")]
    NotRoot,
    #[error("/dev/fuse does not exist: run `modprobe fuse`")]
    NoDevice,
    #[error("cannot open /dev/fuse: {0}")]
    Device(io::Error),
    #[error("mount option {0:?} is not valid here")]
    Option(String),
    #[error("mounting {fstype} on {}: {source}", dir.display())]
    Mount { fstype: String, dir: PathBuf, source: io::Error },
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmountMode {
    /// Fails with EBUSY while files are open.
    Plain,
    /// Off the tree at once; the connection ends when the last open file is closed.
    Detach,
    /// Off the tree at once, and every outstanding request fails.
    Force,
}

/// A mount that we made.
#[derive(Debug)]
pub(crate) struct Mount {
    dir: PathBuf,
    /// The superblock's device number, by which we know our mount from another on the same directory.
    dev: Option<(u32, u32)>,
}

impl Mount {
    /// Mounts, and returns the device that serves the mount.
    pub(crate) fn new(spec: &MountSpec) -> Result<(Mount, File), MountError> {
        let dir = check_dir(&spec.dir)?;
        // SAFETY: geteuid has no preconditions and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return Err(MountError::NotRoot);
        }
        let device = open_device()?;
        let data = option_string(spec, device.as_raw_fd())?;
        let fstype = format!("fuse.{}", spec.subtype);
        mount(&spec.source, &dir, &fstype, spec.flags, &data)?;
        let dev = find_ours(&dir);
        debug!(dir = %dir.display(), ?dev, "mounted");
        Ok((Mount { dir, dev }, device))
    }

    /// The number under /sys/fs/fuse/connections.
    pub(crate) fn connection(&self) -> Option<u32> {
        self.dev.map(|(_, minor)| minor)
    }

    /// Whether our mount is still what the directory shows. Assumed if /proc does not tell.
    pub(crate) fn is_mounted(&self) -> bool {
        self.dev.is_none() || find_ours(&self.dir) == self.dev
    }

    /// Ok also if it is unmounted already.
    pub(crate) fn unmount(&self, mode: UnmountMode) -> io::Result<()> {
        if !self.is_mounted() {
            return Ok(());
        }
        let flags = match mode {
            UnmountMode::Plain => 0,
            UnmountMode::Detach => libc::MNT_DETACH,
            UnmountMode::Force => libc::MNT_FORCE | libc::MNT_DETACH,
        };
        let dir = c_string(self.dir.as_os_str().as_bytes())?;
        // SAFETY: the path is a NUL-terminated string that lives through the call.
        if unsafe { libc::umount2(dir.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // Somebody else unmounted it in between.
            e if e.raw_os_error() == Some(libc::EINVAL) && !self.is_mounted() => Ok(()),
            e => Err(e),
        }
    }
}

fn check_dir(dir: &Path) -> Result<PathBuf, MountError> {
    let here = || dir.to_path_buf();
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOENT) => MountError::Missing(here()),
        Some(libc::ENOTDIR) => MountError::NotADirectory(here()),
        Some(libc::ENOTCONN) => MountError::Stale(here()),
        _ => MountError::MountPoint { dir: here(), source: e },
    };
    let resolved = fs::canonicalize(dir).map_err(failed)?;
    if !fs::metadata(&resolved).map_err(failed)?.is_dir() {
        return Err(MountError::NotADirectory(here()));
    }
    Ok(resolved)
}

fn open_device() -> Result<File, MountError> {
    File::options().read(true).write(true).open("/dev/fuse").map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => MountError::NoDevice,
        _ => MountError::Device(e),
    })
}

fn option_string(spec: &MountSpec, fd: i32) -> Result<String, MountError> {
    let mut data = format!(
        "fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={}",
        spec.max_read
    );
    for option in &spec.options {
        // A comma would smuggle in a second option; the others are ours to set.
        let key = option.split('=').next().unwrap_or_default();
        let ours = ["", "fd", "rootmode", "user_id", "group_id", "max_read"].contains(&key);
        if ours || option.contains([',', '\0']) {
            return Err(MountError::Option(option.clone()));
        }
        data.push(',');
        data.push_str(option);
    }
    Ok(data)
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn mount(source: &str, dir: &Path, fstype: &str, flags: u64, data: &str) -> Result<(), MountError> {
    let failed = |source| MountError::Mount { fstype: fstype.to_owned(), dir: dir.to_path_buf(), source };
    let attempt = || {
        let (source, target) = (c_string(source.as_bytes())?, c_string(dir.as_os_str().as_bytes())?);
        let (kind, data) = (c_string(fstype.as_bytes())?, c_string(data.as_bytes())?);
        // SAFETY: all four are NUL-terminated strings that live through the call.
        let rc = unsafe {
            libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags as libc::c_ulong, data.as_ptr().cast())
        };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    attempt().map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => MountError::NotRoot,
        _ => failed(e),
    })
}

/// The device number of the FUSE filesystem mounted last on `dir`.
fn find_ours(dir: &Path) -> Option<(u32, u32)> {
    parse_mountinfo(&fs::read("/proc/self/mountinfo").ok()?, dir.as_os_str().as_bytes())
}

/// A line is: id, parent id, major:minor, root, mount point, options, tags..., `-`, type, source, superblock options.
/// The last line of a mount point is what its path leads to.
fn parse_mountinfo(text: &[u8], dir: &[u8]) -> Option<(u32, u32)> {
    let line = text
        .split(|&b| b == b'\n')
        .rfind(|line| line.split(|&b| b == b' ').nth(4).is_some_and(|point| unescape(point) == dir))?;
    let mut fields = line.split(|&b| b == b' ');
    let dev = std::str::from_utf8(fields.nth(2)?).ok()?;
    let fstype = fields.skip_while(|f| *f != b"-").nth(1)?;
    if !fstype.starts_with(b"fuse") {
        return None;
    }
    let (major, minor) = dev.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_on_a_directory_counts_if_it_is_ours() {
        let text = b"22 1 0:20 / /sys rw shared:7 - sysfs sysfs rw\n\
            30 1 0:50 / /mnt/a\\040b rw,nosuid - fuse.clusterfs /dev/sda rw,user_id=0\n\
            31 1 0:51 / /mnt/a\\040b rw,nosuid shared:3 master:1 - fuse.clusterfs /dev/sdb rw\n\
            32 1 0:52 / /mnt/c rw - fuse.clusterfs x rw\n\
            33 1 8:1 / /mnt/c rw - ext4 /dev/sda1 rw\n";
        assert_eq!(parse_mountinfo(text, b"/mnt/a b"), Some((0, 51)));
        assert_eq!(parse_mountinfo(text, b"/mnt/c"), None, "covered by another filesystem");
        assert_eq!(parse_mountinfo(text, b"/mnt/d"), None);
        assert_eq!(parse_mountinfo(b"1 2 3", b""), None);
    }

    #[test]
    fn options_cannot_override_or_smuggle() {
        let mut spec = MountSpec::new("dev", "clusterfs", "/mnt");
        spec.options = vec!["blksize=4096".into()];
        let data = option_string(&spec, 7).unwrap();
        assert!(data.starts_with("fd=7,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"));
        assert!(data.ends_with(",blksize=4096"));
        for bad in ["fd=3", "a,b", "", "user_id=5", "x\0"] {
            spec.options = vec![bad.into()];
            assert!(matches!(option_string(&spec, 7), Err(MountError::Option(o)) if o == bad));
        }
    }

    #[test]
    fn a_bad_mount_point_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |p: &Path| MountSpec::new("dev", "clusterfs", p);
        let missing = dir.path().join("missing");
        assert!(matches!(Mount::new(&spec(&missing)), Err(MountError::Missing(p)) if p == missing));
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(Mount::new(&spec(&file)), Err(MountError::NotADirectory(p)) if p == file));
    }
}
