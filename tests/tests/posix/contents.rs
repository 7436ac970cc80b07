//! Contents and attributes of files, where the suites do not look.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys::{self, Map, errno};

fn statx(path: &Path) -> libc::statx {
    let p = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    // SAFETY: all-zero is a valid statx; both live through the call.
    unsafe {
        let mut st: libc::statx = std::mem::zeroed();
        assert_eq!(libc::statx(libc::AT_FDCWD, p.as_ptr(), libc::AT_SYMLINK_NOFOLLOW, mask, &mut st), 0);
        st
    }
}

fn born(path: &Path) -> (i64, u32) {
    let st = statx(path);
    assert_ne!(st.stx_mask & libc::STATX_BTIME, 0, "{} has no time of birth", path.display());
    (st.stx_btime.tv_sec, st.stx_btime.tv_nsec)
}

#[test]
fn time_of_birth() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let before = SystemTime::now();
    fs::write(a.join("f"), b"1").unwrap();
    fs::create_dir(a.join("d")).unwrap();
    sys::mknod(&a.join("null"), libc::S_IFCHR | 0o600, libc::makedev(1, 3)).unwrap();
    let made = born(&a.join("f"));
    let since = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((since(before)..=since(SystemTime::now())).contains(&made.0));
    std::thread::sleep(Duration::from_millis(20));
    File::options().append(true).open(b.join("f")).unwrap().write_all(b"2").unwrap();
    fs::rename(b.join("f"), b.join("d/g")).unwrap();
    for m in [&a, &b] {
        assert_eq!(born(&m.join("d/g")), made);
        assert!(
            fs::metadata(m.join("d/g")).unwrap().modified().unwrap()
                > fs::metadata(m.join("d/g")).unwrap().created().unwrap()
        );
        assert_eq!(born(&m.join("d")).0, born(&a.join("d")).0);
        let (st, x) = (sys::stat(&m.join("null")).unwrap(), statx(&m.join("null")));
        assert_eq!((st.st_rdev, x.stx_rdev_major, x.stx_rdev_minor), (libc::makedev(1, 3), 1, 3));
        let (st, x) = (sys::stat(&m.join("d/g")).unwrap(), statx(&m.join("d/g")));
        assert_eq!((st.st_size as u64, st.st_ino, st.st_mtime), (x.stx_size, x.stx_ino, x.stx_mtime.tv_sec));
    }
    c.finish();
}

#[test]
fn names_of_any_bytes() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let mut names: Vec<Vec<u8>> = (1..=255).filter(|n| ![b'/', b'.'].contains(n)).map(|n| vec![n]).collect();
    names.extend([vec![0xff; 255], b"\n\r\t\x1b".to_vec(), b"...".to_vec(), "\u{1f4e7}".repeat(63).into_bytes()]);
    for n in &names {
        fs::write(a.join(OsStr::from_bytes(n)), n).unwrap();
    }
    for m in [&a, &b] {
        let mut listed: Vec<Vec<u8>> =
            fs::read_dir(m).unwrap().map(|e| e.unwrap().file_name().as_bytes().to_vec()).collect();
        listed.sort();
        let mut expected = names.clone();
        expected.sort();
        assert_eq!(listed, expected);
        assert!(names.iter().all(|n| fs::read(m.join(OsStr::from_bytes(n))).unwrap() == *n));
    }
    assert_eq!(errno(File::create(b.join("x".repeat(256)))), libc::ENAMETOOLONG);
    c.finish();
}

/// Far beyond 4 TiB, up to the last byte there can be.
#[test]
fn sparse_files_of_any_size() {
    const FAR: [u64; 5] = [5 << 40, (5 << 40) + 4095, 1 << 50, 1 << 60, i64::MAX as u64 - 4];
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0).join("f"), c.mount_point(1).join("f"));
    let f = File::options().read(true).write(true).create_new(true).open(&a).unwrap();
    for at in FAR {
        f.write_all_at(b"far", at).unwrap();
    }
    let other = File::open(&b).unwrap();
    let st = other.metadata().unwrap();
    assert_eq!(st.len(), i64::MAX as u64 - 1);
    assert!(st.blocks() <= 8 * 8, "{} blocks", st.blocks());
    for at in FAR {
        let mut got = [9; 5];
        let n = other.read_at(&mut got, at - 1).unwrap();
        assert_eq!((&got[..4], n >= 4), (&b"\0far"[..], true), "at {at}");
    }
    assert_eq!(sys::seek(&other, 0, libc::SEEK_DATA).unwrap(), 5 << 40);
    assert_eq!(sys::seek(&other, 1 << 50, libc::SEEK_HOLE).unwrap(), (1 << 50) + 4096);
    assert_eq!(sys::seek(&other, (1 << 50) + 4096, libc::SEEK_DATA).unwrap(), 1 << 60);
    assert_eq!(errno(sys::seek(&other, i64::MAX - 1, libc::SEEK_DATA)), libc::ENXIO);
    // Sparse as it is, it may be cut anywhere.
    f.set_len((1 << 60) + 1).unwrap();
    let mut got = [9; 2];
    assert_eq!((other.read_at(&mut got, 1 << 60).unwrap(), got[0]), (1, b'f'));
    f.set_len(0).unwrap();
    assert_eq!((other.metadata().unwrap().len(), other.metadata().unwrap().blocks()), (0, 0));
    drop((f, other));
    c.finish();
}

#[test]
fn direct_and_spliced() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let direct = |write: bool, path: &Path| {
        File::options().read(true).write(write).create(write).custom_flags(libc::O_DIRECT).open(path).unwrap()
    };
    let f = direct(true, &a.join("direct"));
    // Aligned or not.
    f.write_all_at(&data[..8192], 0).unwrap();
    f.write_all_at(&data[8192..], 8192).unwrap();
    let mut got = vec![0; data.len()];
    direct(false, &b.join("direct")).read_exact_at(&mut got, 0).unwrap();
    assert!(got == data, "read directly");
    f.write_all_at(b"changed", 1001).unwrap();
    direct(false, &b.join("direct")).read_exact_at(&mut got[..7], 1001).unwrap();
    assert_eq!(&got[..7], b"changed");
    f.write_all_at(&data[1001..1008], 1001).unwrap();

    // Through a pipe, from one node's file to the other's.
    let (from, to) = (File::open(b.join("direct")).unwrap(), File::create(b.join("spliced")).unwrap());
    let (reader, writer) = std::io::pipe().unwrap();
    let (r, w) = (reader.as_raw_fd(), writer.as_raw_fd());
    let splice = |i: i32, o: i32, len: usize| -> usize {
        // SAFETY: open descriptors, no offsets.
        let n = unsafe { libc::splice(i, std::ptr::null_mut(), o, std::ptr::null_mut(), len, 0) };
        usize::try_from(n).unwrap_or_else(|_| panic!("splice: {}", std::io::Error::last_os_error()))
    };
    loop {
        let mut n = splice(from.as_raw_fd(), w, 60_000);
        if n == 0 {
            break;
        }
        while n > 0 {
            n -= splice(r, to.as_raw_fd(), n);
        }
    }
    assert!(fs::read(a.join("spliced")).unwrap() == data, "spliced");
    drop((f, from, to));
    c.finish();
}

#[test]
fn times_of_reads_and_stores() {
    let c = Cluster::formatted(3, 1 << 30).unwrap();
    c.mount_with(0, "relatime").unwrap();
    c.mount_with(1, "noatime").unwrap();
    let (a, b) = (c.mount_point(0).join("f"), c.mount_point(1).join("f"));
    fs::write(&a, vec![1; 8192]).unwrap();
    let old = (1_000_000_000, 5);
    let atime = |p: &Path| sys::stat(p).map(|s| (s.st_atime, s.st_atime_nsec)).unwrap();
    // Older than the last change: a read moves it, in the background, and only once.
    sys::utimes(&a, old, (1_000_000_001, 0)).unwrap();
    fs::read(&a).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while atime(&a) == old && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    let read = atime(&a);
    assert!(read > old, "a read left the access time alone");
    std::thread::sleep(Duration::from_millis(30));
    let mut page = [0; 10];
    File::options().read(true).write(true).open(&a).unwrap().read_exact(&mut page).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(atime(&a), read, "relatime moves it when it is older than the last change, or a day old");
    // Never with noatime.
    sys::utimes(&b, old, (1_000_000_001, 0)).unwrap();
    File::options().read(true).write(true).open(&b).unwrap().read_exact(&mut page).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(atime(&b), old);
    // A store into a map counts as a change by msync at the latest.
    sys::utimes(&a, old, old).unwrap();
    let map = Map::new(&File::options().read(true).write(true).open(&a).unwrap(), 8192, true).unwrap();
    map.write(5000, b"x");
    map.sync().unwrap();
    let st = sys::stat(&b).unwrap();
    assert!(st.st_mtime > old.0 && st.st_ctime > old.0, "mtime {} after a store", st.st_mtime);
    drop(map);
    c.finish();
}

/// The kernel keeps writers from it, and nothing is emptied before it does.
#[test]
fn a_running_program_is_not_emptied() {
    let c = Cluster::start(1);
    let program = c.mount_point(0).join("program");
    fs::copy("/bin/sleep", &program).unwrap();
    let before = fs::read(&program).unwrap();
    let mut running = Command::new(&program).arg("60").spawn().unwrap();
    let tried = [
        errno(File::options().write(true).open(&program)),
        errno(File::create(&program)),
        errno(File::options().read(true).custom_flags(libc::O_TRUNC).open(&program)),
    ];
    let ended = running.try_wait().unwrap();
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(tried, [libc::ETXTBSY; 3]);
    assert_eq!(ended, None, "the program has ended");
    assert!(fs::read(&program).unwrap() == before, "the program is another");
    c.finish();
}

/// Who empties a file that is not theirs takes its special rights away, as who writes to it does.
#[test]
fn emptied_by_another_user() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0).join("f"), c.mount_point(1).join("f"));
    for how in ["opened", "truncated"] {
        fs::write(&a, "contents").unwrap();
        fs::set_permissions(&a, fs::Permissions::from_mode(0o6777)).unwrap();
        let emptied = sys::as_user(65534, 65534, || match how {
            "opened" => File::create(&b).map(drop),
            _ => File::options().write(true).open(&b).and_then(|f| f.set_len(0)),
        });
        emptied.unwrap();
        for path in [&a, &b] {
            let now = fs::metadata(path).unwrap();
            assert_eq!((now.len(), now.mode() & 0o7777), (0, 0o777), "{how}: {}", path.display());
        }
    }
    c.finish();
}

/// Their names are on all nodes, what they connect is on one host.
#[test]
fn sockets_and_fifos() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let listener = UnixListener::bind(a.join("socket")).unwrap();
    let talk = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello").unwrap());
    let mut said = String::new();
    UnixStream::connect(a.join("socket")).unwrap().read_to_string(&mut said).unwrap();
    talk.join().unwrap();
    assert_eq!(said, "hello");
    assert_eq!(sys::stat(&b.join("socket")).unwrap().st_mode & libc::S_IFMT, libc::S_IFSOCK);
    assert_eq!(errno(UnixStream::connect(b.join("socket"))), libc::ECONNREFUSED);
    sys::mknod(&a.join("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    let path = a.join("fifo");
    let writer = std::thread::spawn(move || fs::write(path, b"through the fifo").unwrap());
    assert_eq!(fs::read(a.join("fifo")).unwrap(), b"through the fifo");
    writer.join().unwrap();
    assert_eq!(sys::stat(&b.join("fifo")).unwrap().st_mode & libc::S_IFMT, libc::S_IFIFO);
    c.finish();
}
