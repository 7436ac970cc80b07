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

/// Where our mount stands among those on its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It is what the directory shows.
    Shown,
    /// Something else was mounted over it.
    Covered,
    Gone,
    /// /proc did not tell when we mounted.
    Unknown,
}

/// A mount that we made.
#[derive(Debug)]
pub(crate) struct Mount {
    dir: PathBuf,
    /// The superblock's device number, by which we know our mount from another on the same directory.
    dev: Option<Dev>,
}

/// Major and minor number.
pub(crate) type Dev = (u32, u32);

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
        let dev = mounts_on(&dir).pop();
        debug!(dir = %dir.display(), ?dev, "mounted");
        Ok((Mount { dir, dev }, device))
    }

    /// The device number of the mounted filesystem.
    pub(crate) fn dev(&self) -> Option<Dev> {
        self.dev
    }

    /// The number under /sys/fs/fuse/connections.
    pub(crate) fn connection(&self) -> Option<u32> {
        self.dev.map(|(_, minor)| minor)
    }

    /// How far the kernel reads ahead of who reads in sequence, in bytes. A new FUSE mount has 128 KiB, and an answer to INIT can only
    /// lower that. Needs /sys to be writable.
    pub(crate) fn set_read_ahead(&self, bytes: u32) -> io::Result<()> {
        let (major, minor) = self.dev.ok_or_else(|| io::Error::other("the mount's device number is not known"))?;
        fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), (bytes / 1024).to_string())
    }

    fn place(&self) -> Place {
        match self.dev {
            None => Place::Unknown,
            Some(ours) => place(&mounts_on(&self.dir), ours),
        }
    }

    /// Whether our mount is still in place. Assumed if /proc does not tell.
    pub(crate) fn is_mounted(&self) -> bool {
        self.place() != Place::Gone
    }

    /// Ok also if it is unmounted already.
    pub(crate) fn unmount(&self, mode: UnmountMode) -> io::Result<()> {
        match self.place() {
            Place::Gone => return Ok(()),
            // umount2 would take the wrong one.
            Place::Covered => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
            Place::Shown | Place::Unknown => {}
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
            e if e.raw_os_error() == Some(libc::EINVAL) && self.place() == Place::Gone => Ok(()),
            e => Err(e),
        }
    }

    /// Ends the connection wherever the mount is; needs fusectl to be mounted, as it commonly is. umount2 with
    /// MNT_FORCE does the same, but only to what the directory shows. Only for a connection that is still alive: its
    /// number is free for others afterwards.
    pub(crate) fn abort(&self) {
        if let Some(connection) = self.connection() {
            let path = format!("/sys/fs/fuse/connections/{connection}/abort");
            if let Err(e) = fs::write(&path, b"1") {
                debug!("{path}: {e}");
            }
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

/// The device numbers of what is mounted on `dir`, the one that its path leads to last.
fn mounts_on(dir: &Path) -> Vec<Dev> {
    // Of this thread: it may be in another mount namespace than the process's first.
    fs::read("/proc/thread-self/mountinfo")
        .map(|text| parse_mountinfo(&text, dir.as_os_str().as_bytes()))
        .unwrap_or_default()
}

fn place(on_dir: &[Dev], ours: Dev) -> Place {
    match on_dir.iter().rev().position(|dev| *dev == ours) {
        Some(0) => Place::Shown,
        Some(_) => Place::Covered,
        None => Place::Gone,
    }
}

/// A line starts with: id, parent id, major:minor, root, mount point.
fn parse_mountinfo(text: &[u8], dir: &[u8]) -> Vec<Dev> {
    let dev_if_on_dir = |line: &[u8]| {
        let mut fields = line.split(|&b| b == b' ').skip(2);
        let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
        let dev = (major.parse().ok()?, minor.parse().ok()?);
        (unescape(fields.nth(1)?) == dir).then_some(dev)
    };
    text.split(|&b| b == b'\n').filter_map(dev_if_on_dir).collect()
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash in a field of `/proc/self/mountinfo`.
pub fn unescape(field: &[u8]) -> Vec<u8> {
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
    fn our_mount_is_found_among_others_on_its_directory() {
        let text = b"22 1 0:20 / /sys rw shared:7 - sysfs sysfs rw\n\
            30 1 0:50 / /mnt/a\\040b rw,nosuid - fuse.clusterfs /dev/sda rw,user_id=0\n\
            31 1 0:51 / /mnt/a\\040b rw,nosuid shared:3 master:1 - fuse.clusterfs /dev/sdb rw\n\
            32 1 0:52 / /mnt/c rw - fuse.clusterfs x rw\n";
        let on = parse_mountinfo(text, b"/mnt/a b");
        assert_eq!(on, [(0, 50), (0, 51)]);
        assert_eq!(place(&on, (0, 51)), Place::Shown);
        assert_eq!(place(&on, (0, 50)), Place::Covered);
        assert_eq!(place(&on, (0, 52)), Place::Gone);
        assert_eq!(parse_mountinfo(text, b"/mnt/d"), []);
        assert_eq!(parse_mountinfo(b"1 2 3\n1 2 3:4 /", b""), []);
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
