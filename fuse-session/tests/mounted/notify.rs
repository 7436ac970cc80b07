//! Notifications do in the kernel what their names say, with TTLs of an hour everywhere.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::guard::Mounted;
use crate::sys;

fn read_all(file: &File) -> Vec<u8> {
    let mut out = vec![0u8; 100];
    let len = file.read_at(&mut out, 0).unwrap();
    out.truncate(len);
    out
}

fn add_file(m: &Mounted, name: &str, data: &[u8]) -> u64 {
    let mut s = m.fs.state.lock();
    let nodeid = s.add(1, name.as_bytes(), libc::S_IFREG | 0o644, 0, 0);
    s.set_data(nodeid, data);
    nodeid
}

#[test]
fn inval_inode_drops_pages_and_attributes() {
    let m = Mounted::new();
    let nodeid = add_file(&m, "f", b"old");
    let file = File::open(m.path("f")).unwrap();
    assert_eq!(read_all(&file), b"old");
    // A READ makes the kernel doubt the access time; this lets it learn all attributes again.
    file.metadata().unwrap();
    m.fs.state.lock().set_data(nodeid, b"newer");
    assert_eq!(read_all(&file), b"old", "served from the page cache");
    assert_eq!(file.metadata().unwrap().len(), 3);
    assert!(m.notifier().inval_inode(nodeid, 0, 0).unwrap());
    assert_eq!(file.metadata().unwrap().len(), 5);
    assert_eq!(read_all(&file), b"newer");
}

#[test]
fn a_negative_offset_leaves_the_pages() {
    let m = Mounted::new();
    let nodeid = add_file(&m, "f", b"old");
    let file = File::open(m.path("f")).unwrap();
    assert_eq!(read_all(&file), b"old");
    m.fs.state.lock().set_data(nodeid, b"new");
    m.fs.state.lock().nodes.get_mut(&nodeid).unwrap().attr.mode = libc::S_IFREG | 0o600;
    assert!(m.notifier().inval_inode(nodeid, -1, 0).unwrap());
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&file.metadata().unwrap()) & 0o777, 0o600);
    assert_eq!(read_all(&file), b"old");
}

#[test]
fn what_the_kernel_does_not_know_is_no_error() {
    let m = Mounted::new();
    fs::metadata(m.root()).unwrap();
    let n = m.notifier();
    assert!(!n.inval_inode(4711, 0, 0).unwrap());
    assert!(!n.inval_entry(4711, b"x", false).unwrap());
    assert!(!n.inval_entry(1, b"never-seen", false).unwrap());
    assert!(!n.delete(1, 4711, b"never-seen").unwrap());
    assert!(!n.store(4711, 0, b"data").unwrap());
    assert!(n.inval_entry(1, &[b'x'; 5000], false).is_err(), "an error of ours is told apart");
}

#[test]
fn inval_entry_makes_a_new_lookup_of_that_name_only() {
    let m = Mounted::new();
    add_file(&m, "a", b"");
    add_file(&m, "b", b"");
    let look = || ["a", "b", "none"].map(|n| sys::stat(&m.path(n)).is_ok());
    assert_eq!((look(), look()), ([true, true, false], [true, true, false]));
    assert!(m.notifier().inval_entry(1, b"a", false).unwrap());
    assert!(m.notifier().inval_entry(1, b"none", false).unwrap());
    look();
    let s = m.fs.state.lock();
    assert_eq!(["a", "b", "none"].map(|n| s.lookups_of(n)), [2, 1, 2]);
}

#[test]
fn expire_only_looks_up_again_and_keeps_an_open_directory_reachable() {
    let m = Mounted::new();
    fs::create_dir(m.path("d")).unwrap();
    assert!(m.notifier().has_expire_only());
    let dir = File::open(m.path("d")).unwrap();
    let shown = || fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).unwrap();
    assert_eq!(shown(), m.path("d"));
    let before = m.fs.state.lock().lookups_of("d");
    sys::stat(&m.path("d")).unwrap();
    assert_eq!(m.fs.state.lock().lookups_of("d"), before);
    assert!(m.notifier().inval_entry(1, b"d", true).unwrap());
    assert_eq!(shown(), m.path("d"), "still connected");
    sys::stat(&m.path("d")).unwrap();
    assert_eq!(m.fs.state.lock().lookups_of("d"), before + 1);
    assert_eq!(shown(), m.path("d"));
    assert!(m.notifier().inval_entry(1, b"d", false).unwrap());
    assert_ne!(shown(), m.path("d"), "the plain form cuts it off, which is why expire-only exists");
}

#[test]
fn inc_epoch_makes_new_lookups_of_present_and_absent_names() {
    let m = Mounted::new();
    add_file(&m, "gone-later", b"");
    fs::create_dir(m.path("d")).unwrap();
    assert!(m.notifier().has_inc_epoch());
    for _ in 0..2 {
        assert_eq!(sys::stat(&m.path("gone-later")), Ok(()));
        assert_eq!(sys::stat(&m.path("comes-later")), Err(libc::ENOENT));
    }
    add_file(&m, "comes-later", b"");
    m.fs.state.lock().nodes.get_mut(&1).unwrap().children.remove(&b"gone-later"[..]);
    assert_eq!(sys::stat(&m.path("gone-later")), Ok(()), "believed for an hour");
    assert_eq!(sys::stat(&m.path("comes-later")), Err(libc::ENOENT), "believed for an hour");
    m.notifier().inc_epoch().unwrap();
    assert_eq!(sys::stat(&m.path("gone-later")), Err(libc::ENOENT));
    assert_eq!(sys::stat(&m.path("comes-later")), Ok(()));
    let lookups = m.fs.state.lock().lookups_of("comes-later");
    sys::stat(&m.path("comes-later")).unwrap();
    assert_eq!(m.fs.state.lock().lookups_of("comes-later"), lookups, "and believed again afterwards");
}

#[test]
fn delete_removes_a_name() {
    let m = Mounted::new();
    let nodeid = add_file(&m, "f", b"");
    sys::stat(&m.path("f")).unwrap();
    m.fs.state.lock().nodes.get_mut(&1).unwrap().children.remove(&b"f"[..]);
    assert_eq!(sys::stat(&m.path("f")), Ok(()));
    assert!(m.notifier().delete(1, nodeid, b"f").unwrap());
    assert_eq!(sys::stat(&m.path("f")), Err(libc::ENOENT));
}

#[test]
fn store_fills_the_page_cache() {
    let m = Mounted::new();
    let nodeid = add_file(&m, "f", b"from the handler");
    let file = File::open(m.path("f")).unwrap();
    let mut page = vec![b'.'; 4096];
    page[..16].copy_from_slice(b"from the store..");
    assert!(m.notifier().store(nodeid, 0, &page).unwrap());
    assert_eq!(&read_all(&file)[..16], b"from the store..");
    assert_eq!(m.fs.state.lock().reads, []);
}

#[test]
fn prune_lets_the_kernel_forget_unused_nodes() {
    let m = Mounted::new();
    let (unused, used) = (add_file(&m, "unused", b""), add_file(&m, "used", b""));
    sys::stat(&m.path("unused")).unwrap();
    let file = File::open(m.path("used")).unwrap();
    let nlookup = |id: u64| m.fs.state.lock().nodes[&id].nlookup;
    assert_eq!((nlookup(unused), nlookup(used)), (1, 1));
    match m.notifier().prune(&[unused, used, 4711]) {
        Ok(()) => {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
            while nlookup(unused) != 0 {
                assert!(std::time::Instant::now() < end, "no FORGET came");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            assert_eq!(nlookup(used), 1, "an open file stays");
        }
        Err(e) => {
            assert!(!m.notifier().has_prune(), "promised by the protocol version but refused: {e}");
            assert_eq!(e.kind(), std::io::ErrorKind::Unsupported);
        }
    }
    drop(file);
}
