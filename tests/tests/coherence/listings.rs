//! Listings of directories, and positions in them.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Scenario, names};

pub const ALL: &[(&str, Scenario)] = &[
    ("every-change", every_change),
    ("large", large),
    ("rewound", rewound),
    ("untouched-exactly-once", untouched_exactly_once),
    ("position-across-changes", position_across_changes),
    ("types-and-inodes", types_and_inodes),
];

/// A directory stream of the C library: with positions.
struct Stream(*mut libc::DIR);

struct Entry {
    name: String,
    ino: u64,
    kind: u8,
}

impl Stream {
    fn open(dir: &Path) -> Self {
        let path = CString::new(dir.as_os_str().as_bytes()).unwrap();
        // SAFETY: a valid C string.
        let d = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!d.is_null(), "{}: {}", dir.display(), std::io::Error::last_os_error());
        Self(d)
    }

    fn next(&mut self) -> Option<Entry> {
        // SAFETY: an open stream; the entry is copied before the next call.
        unsafe {
            *libc::__errno_location() = 0;
            let e = libc::readdir64(self.0);
            if e.is_null() {
                assert_eq!(*libc::__errno_location(), 0, "readdir failed");
                return None;
            }
            let name = CStr::from_ptr((*e).d_name.as_ptr()).to_str().unwrap().to_owned();
            Some(Entry { name, ino: (*e).d_ino, kind: (*e).d_type })
        }
    }

    fn tell(&mut self) -> i64 {
        // SAFETY: an open stream.
        unsafe { libc::telldir(self.0) }
    }

    fn seek(&mut self, at: i64) {
        // SAFETY: an open stream.
        unsafe { libc::seekdir(self.0, at) };
    }

    fn rewind(&mut self) {
        // SAFETY: an open stream.
        unsafe { libc::rewinddir(self.0) };
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: an open stream, not used any more.
        unsafe { libc::closedir(self.0) };
    }
}

fn every_change(me: &Path, others: &[PathBuf]) {
    let mut expected: Vec<String> = Vec::new();
    for i in 0..12 {
        let name = format!("n{i:02}");
        fs::write(me.join(&name), b"").unwrap();
        expected.push(name);
        others.iter().for_each(|o| assert_eq!(names(o), expected));
    }
    for i in [5, 0, 9] {
        fs::remove_file(me.join(expected.remove(i))).unwrap();
        others.iter().for_each(|o| assert_eq!(names(o), expected));
    }
    fs::rename(me.join(&expected[0]), me.join("zz")).unwrap();
    expected.remove(0);
    expected.push("zz".into());
    others.iter().for_each(|o| assert_eq!(names(o), expected));
    fs::create_dir(others[0].join("zzz")).unwrap();
    expected.push("zzz".into());
    assert_eq!(names(me), expected);
}

fn large(me: &Path, others: &[PathBuf]) {
    let mut expected: Vec<String> = (0..600).map(|i| format!("a-name-of-usual-length-{i:04}")).collect();
    for n in &expected {
        fs::write(me.join(n), n).unwrap();
    }
    others.iter().for_each(|o| assert_eq!(names(o), expected));
    for i in (0..expected.len()).rev().step_by(7) {
        fs::remove_file(me.join(expected.remove(i))).unwrap();
    }
    others.iter().for_each(|o| assert_eq!(names(o), expected));
    for o in others {
        for n in &expected {
            assert_eq!(fs::metadata(o.join(n)).unwrap().len(), n.len() as u64);
        }
    }
}

/// A stream that is rewound shows what is there now.
fn rewound(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("a"), b"").unwrap();
    let mut streams: Vec<Stream> = others.iter().map(|o| Stream::open(o)).collect();
    let list = |s: &mut Stream| {
        s.rewind();
        let mut all: Vec<String> =
            std::iter::from_fn(|| s.next()).map(|e| e.name).filter(|n| !n.starts_with('.')).collect();
        all.sort();
        all
    };
    streams.iter_mut().for_each(|s| assert_eq!(list(s), ["a"]));
    fs::write(me.join("b"), b"").unwrap();
    streams.iter_mut().for_each(|s| assert_eq!(list(s), ["a", "b"]));
    fs::remove_file(me.join("a")).unwrap();
    streams.iter_mut().for_each(|s| assert_eq!(list(s), ["b"]));
}

/// While one node makes and removes names all the time, a listing has every other name exactly once.
fn untouched_exactly_once(me: &Path, others: &[PathBuf]) {
    const KEPT: usize = 500;
    for i in 0..KEPT {
        fs::write(me.join(format!("kept-{i}")), b"").unwrap();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let maker = s.spawn(|| {
            let mut i = 0u64;
            while !stop.load(Ordering::Relaxed) {
                fs::write(me.join(format!("passing-{i}")), b"").unwrap();
                if i >= 20 {
                    fs::remove_file(me.join(format!("passing-{}", i - 20))).unwrap();
                }
                i += 1;
            }
            i
        });
        let listers: Vec<_> = others
            .iter()
            .map(|o| {
                s.spawn(move || {
                    for round in 0..6 {
                        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
                        let mut stream = Stream::open(o);
                        while let Some(e) = stream.next() {
                            if e.name.starts_with("kept-") {
                                *seen.entry(e.name).or_default() += 1;
                            }
                        }
                        assert_eq!(seen.len(), KEPT, "round {round}: names are missing in {}", o.display());
                        let twice: Vec<_> = seen.iter().filter(|(_, n)| **n != 1).collect();
                        assert!(twice.is_empty(), "round {round}: {twice:?} in {}", o.display());
                    }
                })
            })
            .collect();
        let results: Vec<_> = listers.into_iter().map(|l| l.join()).collect();
        stop.store(true, Ordering::Relaxed);
        let made = maker.join().unwrap();
        results.into_iter().for_each(|r| r.unwrap());
        println!("  {made} names were made and removed meanwhile");
    });
}

/// telldir on one side of changes, seekdir on the other.
fn position_across_changes(me: &Path, others: &[PathBuf]) {
    for i in 0..300 {
        fs::write(me.join(format!("kept-{i}")), b"").unwrap();
    }
    for o in others {
        let mut s = Stream::open(o);
        let mut before = Vec::new();
        while before.len() < 150 {
            before.push(s.next().unwrap().name);
        }
        let at = s.tell();
        for i in 0..40 {
            fs::write(me.join(format!("added-{i}")), b"").unwrap();
        }
        let rest = |s: &mut Stream| {
            let mut all: Vec<String> =
                std::iter::from_fn(|| s.next()).map(|e| e.name).filter(|n| n.starts_with("kept-")).collect();
            all.sort();
            all
        };
        s.seek(at);
        let first = rest(&mut s);
        for i in 0..40 {
            fs::remove_file(me.join(format!("added-{i}"))).unwrap();
        }
        s.seek(at);
        assert_eq!(rest(&mut s), first);
        let kept = before.iter().filter(|n| n.starts_with("kept-")).count();
        assert_eq!(kept + first.len(), 300);
        assert!(before.iter().all(|n| first.binary_search(n).is_err()), "a name before the position came again");
    }
}

fn types_and_inodes(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("file"), b"").unwrap();
    fs::create_dir(me.join("dir")).unwrap();
    std::os::unix::fs::symlink("x", me.join("link")).unwrap();
    for o in others {
        let mut s = Stream::open(o);
        while let Some(e) = s.next() {
            let kind = match &*e.name {
                "file" => libc::DT_REG,
                "link" => libc::DT_LNK,
                _ => libc::DT_DIR,
            };
            assert_eq!(e.kind, kind, "{}", e.name);
            if e.name != ".." {
                assert_eq!(e.ino, clusterfs_tests::sys::stat(&o.join(&e.name)).unwrap().st_ino, "{}", e.name);
            }
        }
    }
}
