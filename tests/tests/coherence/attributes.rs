//! Attributes, permissions, extended attributes, ACLs, the filesystem's numbers.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clusterfs_tests::sys::{self, as_user, errno};

use crate::{Scenario, bytes, warm_all};

pub const ALL: &[(&str, Scenario)] = &[
    ("chmod", chmod),
    ("permissions-of-directories", permissions_of_directories),
    ("chown", chown),
    ("utimes", utimes),
    ("times-of-changes", times_of_changes),
    ("times-of-directories", times_of_directories),
    ("set-user-id-ends-with-a-write", set_user_id_ends_with_a_write),
    ("xattrs", xattrs),
    ("large-xattr", large_xattr),
    ("xattrs-of-directories", xattrs_of_directories),
    ("acl", acl),
    ("default-acl", default_acl),
    ("size-while-open", size_while_open),
    ("statfs", statfs),
];

const USER: u32 = 4711;

fn chmod(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    let warm = warm_all(others, "f");
    for mode in [0o600, 0o604, 0o4755, 0o000, 0o644] {
        fs::set_permissions(me.join("f"), Permissions::from_mode(mode)).unwrap();
        for (o, w) in others.iter().zip(&warm) {
            assert_eq!(fs::metadata(o.join("f")).unwrap().mode() & 0o7777, mode);
            assert_eq!(w.file().metadata().unwrap().mode() & 0o7777, mode);
            as_user(USER, USER, || {
                let may = mode & 0o004 != 0;
                assert_eq!(sys::access(&o.join("f"), libc::R_OK).is_ok(), may, "access with mode {mode:o}");
                assert_eq!(File::open(o.join("f")).is_ok(), may, "open with mode {mode:o}");
            });
        }
    }
}

fn permissions_of_directories(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    fs::write(me.join("d/f"), b"x").unwrap();
    for mode in [0o755, 0o700, 0o711, 0o704, 0o757] {
        fs::set_permissions(me.join("d"), Permissions::from_mode(mode)).unwrap();
        for o in others {
            let d = o.join("d");
            as_user(USER, USER, || {
                assert_eq!(fs::read(d.join("f")).is_ok(), mode & 1 != 0, "through {mode:o}");
                assert_eq!(fs::read_dir(&d).is_ok(), mode & 4 != 0, "listing {mode:o}");
                assert_eq!(File::create(d.join("g")).is_ok(), mode & 3 == 3, "creating in {mode:o}");
            });
        }
    }
    assert_eq!(fs::metadata(me.join("d/g")).unwrap().uid(), USER);
}

fn chown(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    fs::set_permissions(me.join("f"), Permissions::from_mode(0o640)).unwrap();
    let warm = warm_all(others, "f");
    for (uid, gid, may) in
        [(USER, 0, true), (0, USER, true), (0, 0, false), (USER + 1, USER + 1, false), (USER, 5, true)]
    {
        sys::chown(&me.join("f"), uid, gid).unwrap();
        for (o, w) in others.iter().zip(&warm) {
            let m = fs::metadata(o.join("f")).unwrap();
            assert_eq!((m.uid(), m.gid()), (uid, gid));
            let m = w.file().metadata().unwrap();
            assert_eq!((m.uid(), m.gid()), (uid, gid));
            assert_eq!(as_user(USER, USER, || File::open(o.join("f")).is_ok()), may, "of {uid}:{gid}");
        }
    }
}

fn utimes(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    let warm = warm_all(others, "f");
    for (atime, mtime) in [((1, 2), (3, 4)), ((-5, 999_999_999), (1 << 33, 7)), ((100, 0), (50, 1))] {
        sys::utimes(&me.join("f"), atime, mtime).unwrap();
        for (o, w) in others.iter().zip(&warm) {
            for m in [fs::metadata(o.join("f")).unwrap(), w.file().metadata().unwrap()] {
                assert_eq!(((m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec())), (atime, mtime));
            }
        }
    }
}

fn mtime(path: &Path) -> (i64, i64) {
    let m = fs::symlink_metadata(path).unwrap();
    (m.mtime(), m.mtime_nsec())
}

fn times_of_changes(me: &Path, others: &[PathBuf]) {
    let f = me.join("f");
    fs::write(&f, b"x").unwrap();
    warm_all(others, "f");
    let mut before = mtime(&others[0].join("f"));
    let open = File::options().write(true).open(&f).unwrap();
    let changes: [&dyn Fn(); 3] =
        [&|| open.write_all_at(b"y", 0).unwrap(), &|| open.set_len(100).unwrap(), &|| drop(File::create(&f).unwrap())];
    for (i, change) in changes.iter().enumerate() {
        std::thread::sleep(std::time::Duration::from_millis(2));
        change();
        for o in others {
            assert!(mtime(&o.join("f")) > before, "change {i} has not moved the time");
        }
        before = mtime(&others[0].join("f"));
        assert_eq!(before, mtime(&f));
    }
    std::thread::sleep(std::time::Duration::from_millis(2));
    let ctime = |p: &Path| fs::metadata(p).map(|m| (m.ctime(), m.ctime_nsec())).unwrap();
    let before = ctime(&others[0].join("f"));
    fs::set_permissions(&f, Permissions::from_mode(0o600)).unwrap();
    others.iter().for_each(|o| assert!(ctime(&o.join("f")) > before));
}

fn times_of_directories(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    let d = me.join("d");
    let changes: [&dyn Fn(); 4] = [
        &|| fs::write(d.join("f"), b"").unwrap(),
        &|| fs::rename(d.join("f"), d.join("g")).unwrap(),
        &|| fs::hard_link(d.join("g"), d.join("h")).unwrap(),
        &|| fs::remove_file(d.join("g")).unwrap(),
    ];
    for (i, change) in changes.iter().enumerate() {
        let before: Vec<_> = others.iter().map(|o| mtime(&o.join("d"))).collect();
        std::thread::sleep(std::time::Duration::from_millis(2));
        change();
        for (o, before) in others.iter().zip(before) {
            assert!(mtime(&o.join("d")) > before, "change {i} has not moved the time");
        }
    }
}

fn set_user_id_ends_with_a_write(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"program").unwrap();
    fs::set_permissions(me.join("f"), Permissions::from_mode(0o6777)).unwrap();
    warm_all(others, "f");
    as_user(USER, USER, || {
        File::options().write(true).open(others[0].join("f")).unwrap().write_all(b"changed").unwrap();
    });
    for d in others.iter().map(PathBuf::as_path).chain([me]) {
        assert_eq!(fs::metadata(d.join("f")).unwrap().mode() & 0o7777, 0o777);
    }
}

fn xattrs(me: &Path, others: &[PathBuf]) {
    let f = me.join("f");
    fs::write(&f, b"x").unwrap();
    warm_all(others, "f");
    let none = |o: &Path| assert_eq!(errno(sys::xattr(&o.join("f"), "user.a")), libc::ENODATA);
    others.iter().for_each(|o| none(o));
    for value in [&b"one"[..], b"", b"another value"] {
        sys::set_xattr(&f, "user.a", value, 0).unwrap();
        others.iter().for_each(|o| assert_eq!(sys::xattr(&o.join("f"), "user.a").unwrap(), value));
    }
    sys::set_xattr(&others[0].join("f"), "user.b", b"b", libc::XATTR_CREATE).unwrap();
    sys::set_xattr(&others[0].join("f"), "trusted.t", b"t", 0).unwrap();
    assert_eq!(sys::xattrs(&f).unwrap(), ["trusted.t", "user.a", "user.b"]);
    assert_eq!(errno(sys::set_xattr(&f, "user.b", b"", libc::XATTR_CREATE)), libc::EEXIST);
    sys::remove_xattr(&f, "user.a").unwrap();
    for o in others {
        none(o);
        assert_eq!(sys::xattrs(&o.join("f")).unwrap(), ["trusted.t", "user.b"]);
        assert_eq!(errno(sys::set_xattr(&o.join("f"), "user.a", b"", libc::XATTR_REPLACE)), libc::ENODATA);
        assert_eq!(errno(sys::remove_xattr(&o.join("f"), "user.a")), libc::ENODATA);
    }
}

fn large_xattr(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    for len in [200, 4000, 65_536, 10] {
        let value = bytes(len as u64, len);
        sys::set_xattr(&me.join("f"), "user.large", &value, 0).unwrap();
        for o in others {
            assert!(sys::xattr(&o.join("f"), "user.large").unwrap() == value, "{len} bytes");
        }
    }
}

fn xattrs_of_directories(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    warm_all(others, "d");
    sys::set_xattr(&me.join("d"), "user.color", b"green", 0).unwrap();
    others.iter().for_each(|o| assert_eq!(sys::xattr(&o.join("d"), "user.color").unwrap(), b"green"));
    sys::remove_xattr(&others[0].join("d"), "user.color").unwrap();
    assert!(sys::xattrs(&me.join("d")).unwrap().is_empty());
}

/// The attribute's form as in Linux's posix_acl_xattr.h, for a user and a mask besides the usual.
fn acl_bytes(user: u32, may: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [(1u16, 6u16, NOBODY), (2, may, user), (4, 0, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]
    {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn acl(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    fs::set_permissions(me.join("f"), Permissions::from_mode(0o600)).unwrap();
    warm_all(others, "f");
    let opens = |d: &Path| as_user(USER, USER, || File::open(d.join("f")).is_ok());
    others.iter().for_each(|o| assert!(!opens(o)));
    for may in [4, 0, 6] {
        sys::set_xattr(&me.join("f"), ACCESS, &acl_bytes(USER, may), 0).unwrap();
        for o in others {
            assert_eq!(opens(o), may & 4 != 0, "as the ACL says");
            assert_eq!(sys::xattr(&o.join("f"), ACCESS).unwrap(), acl_bytes(USER, may));
            assert_eq!(fs::metadata(o.join("f")).unwrap().mode() & 0o777, 0o670, "the mask is the group's part");
        }
    }
    // chmod changes the mask.
    fs::set_permissions(others[0].join("f"), Permissions::from_mode(0o600)).unwrap();
    assert!(!opens(me));
    others.iter().for_each(|o| assert!(!opens(o)));
    fs::set_permissions(others[0].join("f"), Permissions::from_mode(0o640)).unwrap();
    assert!(opens(me));
    sys::remove_xattr(&me.join("f"), ACCESS).unwrap();
    others.iter().for_each(|o| assert_eq!(errno(sys::xattr(&o.join("f"), ACCESS)), libc::ENODATA));
}

fn default_acl(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    warm_all(others, "d");
    sys::set_xattr(&me.join("d"), DEFAULT, &acl_bytes(USER, 4), 0).unwrap();
    for (i, o) in others.iter().enumerate() {
        let name = format!("d/f{i}");
        OpenOptions::new().write(true).create_new(true).open(o.join(&name)).unwrap();
        let inherited = sys::xattr(&me.join(&name), ACCESS).unwrap();
        assert_eq!(inherited.len(), acl_bytes(USER, 4).len());
        as_user(USER, USER, || assert_eq!(errno(File::options().write(true).open(me.join(&name))), libc::EACCES));
        let sub = format!("d/s{i}");
        fs::create_dir(o.join(&sub)).unwrap();
        assert_eq!(sys::xattr(&me.join(&sub), DEFAULT).unwrap(), acl_bytes(USER, 4));
    }
    sys::remove_xattr(&me.join("d"), DEFAULT).unwrap();
    for (i, o) in others.iter().enumerate() {
        let name = format!("d/g{i}");
        File::create(o.join(&name)).unwrap();
        assert_eq!(errno(sys::xattr(&me.join(&name), ACCESS)), libc::ENODATA);
    }
}

fn size_while_open(me: &Path, others: &[PathBuf]) {
    let mut f = File::create(me.join("f")).unwrap();
    let open: Vec<File> = others.iter().map(|o| File::open(o.join("f")).unwrap()).collect();
    let mut len = 0;
    for i in 0..20 {
        f.write_all(&vec![1; i * 100]).unwrap();
        len += i as u64 * 100;
        for (o, open) in others.iter().zip(&open) {
            assert_eq!((fs::metadata(o.join("f")).unwrap().len(), open.metadata().unwrap().len()), (len, len));
        }
    }
}

/// Free space may lag behind a little, it is not coordinated; sizes are the same everywhere.
fn statfs(me: &Path, others: &[PathBuf]) {
    let mine = sys::statfs(me).unwrap();
    for o in others {
        let s = sys::statfs(o).unwrap();
        assert_eq!((s.f_blocks, s.f_bsize, s.f_namelen), (mine.f_blocks, mine.f_bsize, 255));
        assert!(s.f_bfree <= s.f_blocks && s.f_bfree > 0 && s.f_ffree > 0);
    }
    let f = File::create(me.join("f")).unwrap();
    f.write_all_at(&bytes(1, 1 << 20), 0).unwrap();
    f.sync_all().unwrap();
    let after = sys::statfs(me).unwrap();
    assert!(after.f_bfree < mine.f_bfree, "{} blocks free before, {} after", mine.f_bfree, after.f_bfree);
}
