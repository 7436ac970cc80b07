//! What only the io_uring transport can get wrong.

use std::fs::{self, File};

use fuse_session::InitFlags;

use crate::enable::{SWITCH, lock, users};
use crate::guard::Mounted;
use crate::sys;

#[test]
fn requests_do_come_through_io_uring() {
    let m = Mounted::new();
    assert_eq!(sys::stat(&m.path("none")), Err(libc::ENOENT));
    assert!(m.session.negotiated().unwrap().flags.contains(InitFlags::OVER_IO_URING));
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|t| fs::read_to_string(t.unwrap().path().join("comm")));
    let rings = threads.filter(|name| name.as_ref().is_ok_and(|n| n.starts_with("fuse-ring-"))).count();
    assert!(rings > 0, "a queue that was refused ends its thread");
}

/// The switch off, with no other test that has it on.
struct Disabled {
    before: String,
    _users: File,
}

impl Disabled {
    fn new() -> Disabled {
        let users = users();
        assert!(lock(&users, libc::LOCK_EX));
        let before = fs::read_to_string(SWITCH).unwrap();
        fs::write(SWITCH, "N").expect("these tests need root");
        Disabled { before, _users: users }
    }
}

impl Drop for Disabled {
    fn drop(&mut self) {
        fs::write(SWITCH, self.before.trim()).ok();
    }
}

#[test]
fn without_it_everything_comes_through_dev_fuse() {
    let off = Disabled::new();
    let m = Mounted::with_switch(0, None);
    assert_eq!(sys::stat(&m.path("none")), Err(libc::ENOENT));
    assert!(!m.session.negotiated().unwrap().flags.contains(InitFlags::OVER_IO_URING));
    drop((m, off));
}
