//! The host's switch for FUSE over io_uring, on for as long as a test needs it, and then as it was found.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;

pub const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// Locked shared by each test that needs the switch on; holds what it was before the first of them.
const USERS: &str = "/run/clusterfs-tests-enable_uring";

pub struct Enabled(File);

pub fn lock(file: &File, how: i32) -> bool {
    unsafe { libc::flock(file.as_raw_fd(), how) == 0 }
}

pub fn users() -> File {
    File::options().create(true).truncate(false).read(true).write(true).open(USERS).unwrap()
}

impl Enabled {
    pub fn new() -> Enabled {
        let mut users = users();
        if lock(&users, libc::LOCK_EX | libc::LOCK_NB) {
            let before = fs::read_to_string(SWITCH).expect("these tests need a kernel with FUSE over io_uring (6.14)");
            users.set_len(0).unwrap();
            users.write_all(before.as_bytes()).unwrap();
            fs::write(SWITCH, "Y").expect("these tests need root");
        }
        // If another test has it exclusively, it is about to turn it on or off: wait, and look.
        assert!(lock(&users, libc::LOCK_SH));
        if fs::read_to_string(SWITCH).unwrap().trim() != "Y" {
            drop(users);
            return Enabled::new();
        }
        Enabled(users)
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        if lock(&self.0, libc::LOCK_EX | libc::LOCK_NB) {
            let mut before = String::new();
            self.0.rewind().and_then(|()| self.0.read_to_string(&mut before)).ok();
            fs::write(SWITCH, before.trim()).ok();
        }
    }
}
