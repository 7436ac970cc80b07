//! What processes of this host watch by inotify: the kernel says so in `/proc/PID/fdinfo/FD`, and nowhere else.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fs_core::ROOT_INO;

const INOTIFY: &[u8] = b"anon_inode:inotify";
/// Inodes of the mount with device number `device` that somebody watches. What cannot be read belongs to a process that has ended.
pub fn search(proc: &Path, device: u64) -> Vec<u64> {
    let mut found = Vec::new();
    for process in fs::read_dir(proc).into_iter().flatten().flatten() {
        if !process.file_name().as_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let info = process.path().join("fdinfo");
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            if fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str().as_bytes() == INOTIFY) {
                let text = fs::read_to_string(info.join(fd.file_name())).unwrap_or_default();
                found.extend(text.lines().filter_map(|line| watched(line, device)));
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// A line like `inotify wd:1 ino:10000000003 sdev:2b mask:3df ignored_mask:0 fhandle-bytes:...`, numbers in base 16.
fn watched(line: &str, device: u64) -> Option<u64> {
    let mut words = line.split(' ');
    if words.next() != Some("inotify") {
        return None;
    }
    let (mut ino, mut sdev) = (None, None);
    for word in words {
        let Some((name, value)) = word.split_once(':') else { continue };
        let value = || u64::from_str_radix(value, 16).ok();
        match name {
            "ino" => ino = value(),
            "sdev" => sdev = value(),
            _ => {}
        }
    }
    // The kernel numbers the root of every FUSE mount 1.
    (sdev? == device).then_some(if ino? == 1 { ROOT_INO } else { ino? })
}

/// The device number of what is mounted at `dir`, as the kernel writes it in `/proc`: minor number in the lower 20 bits.
pub fn device_of(dir: &Path) -> io::Result<u64> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("{} is not in /proc/self/mountinfo", dir.display()));
    // The last one is on top.
    mounts.lines().rev().find_map(|l| device_in(l, dir)).ok_or_else(missing)
}

/// A line like `36 35 98:0 / /mnt rw,noatime ...`.
fn device_in(line: &str, dir: &Path) -> Option<u64> {
    let mut words = line.split(' ').skip(2);
    let device = words.next()?;
    let mount_point = words.nth(1)?;
    if fuse_session::unescape(mount_point.as_bytes()) != dir.as_os_str().as_bytes() {
        return None;
    }
    let (major, minor) = device.split_once(':')?;
    Some(major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let line = "inotify wd:1 ino:10000000003 sdev:2b mask:3df ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:0001";
        assert_eq!(watched(line, 0x2b), Some(0x100_0000_0003));
        assert_eq!(watched(line, 0x2c), None);
        assert_eq!(watched(&line.replace("ino:10000000003", "ino:1"), 0x2b), Some(ROOT_INO));
        for bad in ["pos:\t0", "inotify wd:1", "inotify ino:zz sdev:2b mask:3df", ""] {
            assert_eq!(watched(bad, 0x2b), None);
        }
    }

    #[test]
    fn lines_of_mountinfo() {
        let line = r"36 35 0:43 / /srv/mail\040box rw,noatime shared:1 - fuse.clusterfs /dev/sdb rw";
        assert_eq!(device_in(line, Path::new("/srv/mail box")), Some(43));
        assert_eq!(device_in(line, Path::new("/srv/mail")), None);
        assert_eq!(device_in("36 35 8:1", Path::new("/")), None);
        assert_eq!(fuse_session::unescape(br"a\\134b\"), br"a\\b\");
    }

    #[test]
    fn own_watches_are_found() {
        let dir = std::env::temp_dir();
        // SAFETY: the descriptor lives until the end; the path is a C string.
        let fd = unsafe {
            use std::os::fd::FromRawFd;
            let fd = std::os::fd::OwnedFd::from_raw_fd(libc::inotify_init1(libc::IN_CLOEXEC));
            let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).expect("has no zero byte");
            assert!(
                libc::inotify_add_watch(std::os::fd::AsRawFd::as_raw_fd(&fd), path.as_ptr(), libc::IN_ALL_EVENTS) > 0
            );
            fd
        };
        let meta = fs::metadata(&dir).expect("is there");
        let (device, ino) = {
            use std::os::unix::fs::MetadataExt;
            (u64::from(libc::major(meta.dev())) << 20 | u64::from(libc::minor(meta.dev())), meta.ino())
        };
        assert!(search(Path::new("/proc"), device).contains(&ino));
        drop(fd);
    }
}
