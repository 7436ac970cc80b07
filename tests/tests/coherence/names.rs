//! Names: made, moved, removed.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use clusterfs_tests::sys::{self, errno};

use crate::{Scenario, bytes, missing, names, same, warm_all};

pub const ALL: &[(&str, Scenario)] = &[
    ("create", create),
    ("remove", remove),
    ("create-and-remove-in-turn", create_and_remove_in_turn),
    ("rename", rename),
    ("rename-over", rename_over),
    ("rename-between-directories", rename_between_directories),
    ("rename-directory", rename_directory),
    ("exchange", exchange),
    ("no-replace", no_replace),
    ("unlink-while-open", unlink_while_open),
    ("replaced-while-open", replaced_while_open),
    ("mkdir-and-rmdir", mkdir_and_rmdir),
    ("rmdir-while-inside", rmdir_while_inside),
    ("working-directory-keeps-its-name", working_directory_keeps_its_name),
    ("link", link),
    ("symlinks", symlinks),
    ("special-files", special_files),
    ("unnamed", unnamed),
    ("maildir", maildir),
    ("open-directories", open_directories),
];

fn create(me: &Path, others: &[PathBuf]) {
    warm_all(others, "f");
    others.iter().for_each(|o| missing(&o.join("f")));
    let made = File::create_new(me.join("f")).unwrap().metadata().unwrap();
    for o in others {
        let seen = fs::metadata(o.join("f")).unwrap();
        assert_eq!((seen.ino(), seen.len(), seen.mode()), (made.ino(), 0, made.mode()));
        assert_eq!(names(o), ["f"]);
        assert_eq!(errno(File::create_new(o.join("f"))), libc::EEXIST);
    }
    // The missing name of one is made by another.
    let last = others.last().unwrap();
    missing(&me.join("g"));
    warm_all(others, "g");
    fs::write(last.join("g"), b"g").unwrap();
    assert_eq!(fs::read(me.join("g")).unwrap(), b"g");
    others.iter().for_each(|o| assert_eq!(fs::read(o.join("g")).unwrap(), b"g"));
}

fn remove(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    warm_all(others, "f");
    fs::remove_file(me.join("f")).unwrap();
    for o in others {
        missing(&o.join("f"));
        assert!(names(o).is_empty());
        assert_eq!(errno(fs::remove_file(o.join("f"))), libc::ENOENT);
    }
}

fn create_and_remove_in_turn(me: &Path, others: &[PathBuf]) {
    let all: Vec<&Path> = std::iter::once(me).chain(others.iter().map(PathBuf::as_path)).collect();
    for i in 0..30 {
        let (a, b) = (all[i % all.len()], all[(i + 1) % all.len()]);
        fs::write(a.join("f"), i.to_string()).unwrap();
        assert_eq!(fs::read_to_string(b.join("f")).unwrap(), i.to_string());
        fs::remove_file(b.join("f")).unwrap();
        missing(&a.join("f"));
        all.iter().for_each(|d| assert!(names(d).is_empty()));
    }
}

fn rename(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"contents").unwrap();
    let ino = sys::stat(&me.join("f")).unwrap().st_ino;
    warm_all(others, "f");
    warm_all(others, "g");
    fs::rename(me.join("f"), me.join("g")).unwrap();
    for o in others {
        missing(&o.join("f"));
        assert_eq!(fs::read(o.join("g")).unwrap(), b"contents");
        assert_eq!(sys::stat(&o.join("g")).unwrap().st_ino, ino);
        assert_eq!(names(o), ["g"]);
    }
    fs::rename(others[0].join("g"), others[0].join("f")).unwrap();
    missing(&me.join("g"));
    assert_eq!(fs::read(me.join("f")).unwrap(), b"contents");
}

fn rename_over(me: &Path, others: &[PathBuf]) {
    for i in 0..5 {
        fs::write(me.join("f"), format!("old {i}")).unwrap();
        let old = warm_all(others, "f");
        fs::write(me.join("new"), format!("new {i}")).unwrap();
        warm_all(others, "new");
        let ino = sys::stat(&me.join("new")).unwrap().st_ino;
        fs::rename(me.join("new"), me.join("f")).unwrap();
        for (o, w) in others.iter().zip(&old) {
            assert_eq!(fs::read_to_string(o.join("f")).unwrap(), format!("new {i}"));
            assert_eq!(sys::stat(&o.join("f")).unwrap().st_ino, ino);
            missing(&o.join("new"));
            let mut text = [0; 5];
            w.file().read_exact_at(&mut text, 0).unwrap();
            assert_eq!(String::from_utf8_lossy(&text), format!("old {i}"), "who has the old one open keeps it");
        }
    }
}

fn rename_between_directories(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("a")).unwrap();
    fs::create_dir(me.join("b")).unwrap();
    fs::write(me.join("a/f"), b"x").unwrap();
    for o in others {
        assert_eq!((names(&o.join("a")), names(&o.join("b"))), (vec!["f".to_string()], vec![]));
        assert_eq!(fs::read(o.join("a/f")).unwrap(), b"x");
        missing(&o.join("b/f"));
    }
    fs::rename(me.join("a/f"), me.join("b/f")).unwrap();
    for o in others {
        missing(&o.join("a/f"));
        assert_eq!(fs::read(o.join("b/f")).unwrap(), b"x");
        assert_eq!((names(&o.join("a")), names(&o.join("b"))), (vec![], vec!["f".to_string()]));
    }
    // Where the inode's domain is not its directory's.
    fs::write(others[0].join("b/f"), b"changed after the move").unwrap();
    assert_eq!(fs::read(me.join("b/f")).unwrap(), b"changed after the move");
    fs::remove_file(others[0].join("b/f")).unwrap();
    missing(&me.join("b/f"));
}

fn rename_directory(me: &Path, others: &[PathBuf]) {
    fs::create_dir_all(me.join("a/b/c")).unwrap();
    fs::create_dir(me.join("z")).unwrap();
    fs::write(me.join("a/b/c/f"), b"deep").unwrap();
    for o in others {
        assert_eq!(fs::read(o.join("a/b/c/f")).unwrap(), b"deep");
        missing(&o.join("z/b"));
    }
    let links = |d: &Path| fs::metadata(d).unwrap().nlink();
    let before: Vec<_> = others.iter().map(|o| (links(&o.join("a")), links(&o.join("z")))).collect();
    fs::rename(me.join("a/b"), me.join("z/b")).unwrap();
    for (o, (a, z)) in others.iter().zip(before) {
        missing(&o.join("a/b/c/f"));
        assert_eq!(fs::read(o.join("z/b/c/f")).unwrap(), b"deep");
        assert_eq!((links(&o.join("a")), links(&o.join("z"))), (a - 1, z + 1));
        let up = sys::stat(&o.join("z/b/..")).unwrap().st_ino;
        assert_eq!(up, sys::stat(&o.join("z")).unwrap().st_ino);
    }
    assert_eq!(errno(fs::rename(others[0].join("z"), others[0].join("z/b/c/z"))), libc::EINVAL);
    fs::rename(others[0].join("z/b/c"), others[0].join("c")).unwrap();
    assert_eq!(fs::read(me.join("c/f")).unwrap(), b"deep");
}

fn exchange(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"one").unwrap();
    fs::write(me.join("g"), b"two").unwrap();
    fs::create_dir(me.join("d")).unwrap();
    for n in ["f", "g", "d"] {
        warm_all(others, n);
    }
    sys::rename2(&me.join("f"), &me.join("g"), libc::RENAME_EXCHANGE).unwrap();
    for o in others {
        assert_eq!(
            (fs::read(o.join("f")).unwrap(), fs::read(o.join("g")).unwrap()),
            (b"two".to_vec(), b"one".to_vec())
        );
    }
    sys::rename2(&others[0].join("f"), &others[0].join("d"), libc::RENAME_EXCHANGE).unwrap();
    assert!(fs::metadata(me.join("f")).unwrap().is_dir());
    assert_eq!(fs::read(me.join("d")).unwrap(), b"two");
    assert_eq!(errno(sys::rename2(&me.join("f"), &me.join("nothing"), libc::RENAME_EXCHANGE)), libc::ENOENT);
}

fn no_replace(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"one").unwrap();
    warm_all(others, "f");
    warm_all(others, "g");
    fs::write(me.join("g"), b"two").unwrap();
    for o in others {
        assert_eq!(errno(sys::rename2(&o.join("f"), &o.join("g"), libc::RENAME_NOREPLACE)), libc::EEXIST);
    }
    fs::remove_file(me.join("g")).unwrap();
    sys::rename2(&others[0].join("f"), &others[0].join("g"), libc::RENAME_NOREPLACE).unwrap();
    missing(&me.join("f"));
    assert_eq!(fs::read(me.join("g")).unwrap(), b"one");
}

fn unlink_while_open(me: &Path, others: &[PathBuf]) {
    for len in [50, 200_000] {
        let data = bytes(len as u64, len);
        fs::write(me.join("f"), &data).unwrap();
        let mut open: Vec<File> =
            others.iter().map(|o| File::options().read(true).write(true).open(o.join("f")).unwrap()).collect();
        fs::remove_file(me.join("f")).unwrap();
        for (o, f) in others.iter().zip(&mut open) {
            missing(&o.join("f"));
            let mut got = Vec::new();
            f.read_to_end(&mut got).unwrap();
            same("unlinked but open", &got, &data);
            assert_eq!(f.metadata().unwrap().nlink(), 0);
        }
        // Written by one, it is the same file on the others that have it.
        open[0].write_all_at(b"still here", 10).unwrap();
        for f in &mut open {
            let mut got = [0; 10];
            f.read_exact_at(&mut got, 10).unwrap();
            assert_eq!(&got, b"still here");
        }
        // A new file of the same name is another.
        fs::write(me.join("f"), b"other").unwrap();
        open[0].seek(SeekFrom::End(0)).unwrap();
        open[0].write_all(b"end").unwrap();
        assert_eq!(open.last().unwrap().metadata().unwrap().len(), len as u64 + 3);
        assert_eq!(fs::read(others[0].join("f")).unwrap(), b"other");
        fs::remove_file(others[0].join("f")).unwrap();
    }
}

fn replaced_while_open(me: &Path, others: &[PathBuf]) {
    let data = bytes(1, 100_000);
    fs::write(me.join("f"), &data).unwrap();
    let open: Vec<File> = others.iter().map(|o| File::open(o.join("f")).unwrap()).collect();
    fs::write(me.join("g"), b"new").unwrap();
    fs::rename(me.join("g"), me.join("f")).unwrap();
    for (o, mut f) in others.iter().zip(open) {
        assert_eq!(fs::read(o.join("f")).unwrap(), b"new");
        let mut got = Vec::new();
        f.read_to_end(&mut got).unwrap();
        same("replaced but open", &got, &data);
    }
}

fn mkdir_and_rmdir(me: &Path, others: &[PathBuf]) {
    warm_all(others, "d");
    let links = fs::metadata(&others[0]).unwrap().nlink();
    fs::create_dir(me.join("d")).unwrap();
    for o in others {
        assert!(fs::metadata(o.join("d")).unwrap().is_dir());
        assert_eq!(fs::metadata(o).unwrap().nlink(), links + 1);
        assert_eq!(errno(fs::create_dir(o.join("d"))), libc::EEXIST);
    }
    warm_all(others, "d");
    fs::write(others[0].join("d/f"), b"").unwrap();
    assert_eq!(errno(fs::remove_dir(me.join("d"))), libc::ENOTEMPTY);
    fs::remove_file(me.join("d/f")).unwrap();
    fs::remove_dir(others.last().unwrap().join("d")).unwrap();
    missing(&me.join("d"));
    for o in others {
        missing(&o.join("d"));
        missing(&o.join("d/f"));
        assert_eq!(fs::metadata(o).unwrap().nlink(), links);
    }
}

/// Runs in a thread that has a working directory of its own.
fn inside<T: Send>(dir: &Path, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| {
        let inside = s.spawn(|| {
            // SAFETY: only this thread's own view of the working directory changes.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FS) }, 0);
            std::env::set_current_dir(dir).unwrap();
            work()
        });
        inside.join().unwrap()
    })
}

fn rmdir_while_inside(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    for o in others {
        fs::create_dir_all(me.join("d")).unwrap();
        inside(&o.join("d"), || {
            assert_eq!(fs::read_dir(".").unwrap().count(), 0);
            fs::write("f", b"").unwrap();
            fs::remove_file("f").unwrap();
            fs::remove_dir(me.join("d")).unwrap();
            // Here a node differs from a local filesystem: it may say that the directory itself is gone.
            let gone = [libc::ENOENT, libc::ESTALE];
            assert!(gone.contains(&errno(fs::write("f", b""))), "a removed directory takes no names");
            assert!(gone.contains(&errno(fs::metadata("f").map(drop))));
            // What read_dir may say of a removed directory differs between filesystems: nothing, or that it is gone.
            if let Ok(list) = fs::read_dir(".") {
                assert_eq!(list.flatten().count(), 0);
            }
        });
        missing(&o.join("d"));
    }
}

fn working_directory_keeps_its_name(me: &Path, others: &[PathBuf]) {
    fs::create_dir_all(me.join("a/b")).unwrap();
    for o in others {
        let dir = o.join("a/b");
        inside(&dir, || {
            let cwd = || std::env::current_dir().unwrap();
            assert_eq!(cwd(), dir);
            for i in 0..5 {
                fs::write(me.join("a").join(i.to_string()), b"").unwrap();
                fs::write(me.join("a/b").join(i.to_string()), b"").unwrap();
                assert_eq!(cwd(), dir);
                for e in fs::read_dir(o.join("a")).unwrap() {
                    e.unwrap().metadata().unwrap();
                }
                assert_eq!(cwd(), dir);
                assert!(Path::new(&i.to_string()).exists());
            }
            fs::rename(me.join("a/b"), me.join("a/c")).unwrap();
            assert!(Path::new("0").exists(), "a directory that was moved is still the same");
            fs::metadata(o.join("a/c")).unwrap();
            assert_eq!(cwd(), o.join("a/c"));
            fs::rename(me.join("a/c"), me.join("a/b")).unwrap();
        });
    }
}

fn link(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"x").unwrap();
    let warm = warm_all(others, "f");
    warm_all(others, "g");
    fs::hard_link(me.join("f"), me.join("g")).unwrap();
    for (o, w) in others.iter().zip(&warm) {
        let (f, g) = (sys::stat(&o.join("f")).unwrap(), sys::stat(&o.join("g")).unwrap());
        assert_eq!((f.st_ino, f.st_nlink, g.st_nlink), (g.st_ino, 2, 2));
        assert_eq!(w.file().metadata().unwrap().nlink(), 2);
        assert_eq!(errno(fs::hard_link(o.join("f"), o.join("g"))), libc::EEXIST);
    }
    fs::create_dir(me.join("d")).unwrap();
    fs::hard_link(others[0].join("g"), others[0].join("d/h")).unwrap();
    assert_eq!(sys::stat(&me.join("f")).unwrap().st_nlink, 3);
    fs::write(me.join("d/h"), b"through another name").unwrap();
    for o in others {
        assert_eq!(fs::read(o.join("f")).unwrap(), b"through another name");
    }
    fs::remove_file(me.join("f")).unwrap();
    for (o, w) in others.iter().zip(&warm) {
        missing(&o.join("f"));
        assert_eq!(sys::stat(&o.join("g")).unwrap().st_nlink, 2);
        assert_eq!(w.file().metadata().unwrap().nlink(), 2);
    }
    fs::remove_file(others[0].join("g")).unwrap();
    assert_eq!(sys::stat(&me.join("d/h")).unwrap().st_nlink, 1);
}

fn symlinks(me: &Path, others: &[PathBuf]) {
    for target in ["a", &"long/".repeat(700)] {
        symlink(target, me.join("l")).unwrap();
        warm_all(others, "l");
        for o in others {
            assert_eq!(fs::read_link(o.join("l")).unwrap(), Path::new(target));
            assert_eq!(sys::stat(&o.join("l")).unwrap().st_size, target.len() as i64);
        }
        fs::remove_file(me.join("l")).unwrap();
        symlink("other", me.join("l")).unwrap();
        others.iter().for_each(|o| assert_eq!(fs::read_link(o.join("l")).unwrap(), Path::new("other")));
        fs::write(me.join("other"), b"followed").unwrap();
        others.iter().for_each(|o| assert_eq!(fs::read(o.join("l")).unwrap(), b"followed"));
        fs::remove_file(others[0].join("l")).unwrap();
        fs::remove_file(others[0].join("other")).unwrap();
        missing(&me.join("l"));
    }
}

fn special_files(me: &Path, others: &[PathBuf]) {
    for n in ["fifo", "null", "socket"] {
        warm_all(others, n);
    }
    sys::mknod(&me.join("fifo"), libc::S_IFIFO | 0o640, 0).unwrap();
    sys::mknod(&me.join("null"), libc::S_IFCHR | 0o666, libc::makedev(1, 3)).unwrap();
    sys::mknod(&me.join("socket"), libc::S_IFSOCK | 0o600, 0).unwrap();
    for o in others {
        let kind = |n: &str| fs::symlink_metadata(o.join(n)).unwrap();
        assert!(kind("fifo").file_type().is_fifo() && kind("fifo").mode() & 0o777 == 0o640);
        assert!(kind("null").file_type().is_char_device() && kind("null").rdev() == libc::makedev(1, 3));
        assert!(kind("socket").file_type().is_socket());
        assert_eq!(names(o), ["fifo", "null", "socket"]);
    }
    fs::remove_file(others[0].join("fifo")).unwrap();
    missing(&me.join("fifo"));
}

fn unnamed(me: &Path, others: &[PathBuf]) {
    warm_all(others, "f");
    let mut f = sys::tmpfile(me).unwrap();
    f.write_all(b"made without a name").unwrap();
    others.iter().for_each(|o| assert!(names(o).is_empty()));
    sys::link_open(&f, &me.join("f")).unwrap();
    for o in others {
        assert_eq!(fs::read(o.join("f")).unwrap(), b"made without a name");
        assert_eq!(sys::stat(&o.join("f")).unwrap().st_nlink, 1);
    }
    // One that never gets a name goes away when it is closed: fsck at the end would find it.
    sys::tmpfile(me).unwrap().write_all(&bytes(3, 50_000)).unwrap();
}

/// The parts of a maildir share a domain.
fn maildir(me: &Path, others: &[PathBuf]) {
    for sub in ["tmp", "new", "cur"] {
        fs::create_dir(me.join(sub)).unwrap();
    }
    for o in others {
        for sub in ["tmp", "new", "cur"] {
            assert!(names(&o.join(sub)).is_empty());
        }
    }
    for i in 0..10 {
        let name = format!("{i}.mail");
        let mut f = File::create_new(me.join("tmp").join(&name)).unwrap();
        f.write_all(name.as_bytes()).unwrap();
        f.sync_all().unwrap();
        for o in others {
            assert_eq!(names(&o.join("tmp")), [&*name]);
            missing(&o.join("new").join(&name));
        }
        fs::rename(me.join("tmp").join(&name), me.join("new").join(&name)).unwrap();
        for o in others {
            assert_eq!(fs::read_to_string(o.join("new").join(&name)).unwrap(), name);
            assert!(names(&o.join("tmp")).is_empty());
        }
        let o = &others[i % others.len()];
        fs::rename(o.join("new").join(&name), o.join("cur").join(format!("{name}:2,S"))).unwrap();
        missing(&me.join("new").join(&name));
        assert_eq!(names(&me.join("cur")).len(), i + 1);
    }
}

/// Through a directory that was opened before the change.
fn open_directories(me: &Path, others: &[PathBuf]) {
    fs::create_dir(me.join("d")).unwrap();
    fs::write(me.join("d/old"), b"").unwrap();
    let through = |d: &File| {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/self/fd/{}", d.as_raw_fd()))
    };
    let open: Vec<File> = others.iter().map(|o| File::open(o.join("d")).unwrap()).collect();
    for d in &open {
        assert_eq!(names(&through(d)), ["old"]);
        missing(&through(d).join("new"));
    }
    fs::rename(me.join("d/old"), me.join("d/new")).unwrap();
    fs::rename(me.join("d"), me.join("e")).unwrap();
    for d in &open {
        assert!(through(d).join("new").exists());
        missing(&through(d).join("old"));
        assert_eq!(names(&through(d)), ["new"]);
    }
}
