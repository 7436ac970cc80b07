//! How often the kernel has asked for what: shows whether its caches spare the daemon requests.

use std::collections::BTreeMap;
use std::fmt;

use fuse_session::Op;
use parking_lot::Mutex;

/// Requests since the mount, by kind.
#[derive(Default)]
pub struct Counters(Mutex<BTreeMap<&'static str, u64>>);

impl Counters {
    pub fn count(&self, op: &Op) {
        *self.0.lock().entry(name(op)).or_default() += 1;
    }

    pub fn by_kind(&self) -> BTreeMap<String, u64> {
        self.0.lock().iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }
}

/// `getattr=12 lookup=3`, by name; kinds that never came are left out.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.0.lock().clone();
        for (i, (name, count)) in counts.iter().enumerate() {
            write!(f, "{}{name}={count}", if i > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

fn name(op: &Op) -> &'static str {
    match op {
        Op::Lookup { .. } => "lookup",
        Op::Getattr { .. } => "getattr",
        Op::Statx { .. } => "statx",
        Op::Setattr(_) => "setattr",
        Op::Readlink => "readlink",
        Op::Symlink { .. } => "symlink",
        Op::Mknod { .. } => "mknod",
        Op::Mkdir { .. } => "mkdir",
        Op::Unlink { .. } => "unlink",
        Op::Rmdir { .. } => "rmdir",
        Op::Rename { .. } => "rename",
        Op::Link { .. } => "link",
        Op::Open { .. } => "open",
        Op::Create { .. } => "create",
        Op::Tmpfile { .. } => "tmpfile",
        Op::Read { .. } => "read",
        Op::Write { .. } => "write",
        Op::Statfs => "statfs",
        Op::Release { .. } => "release",
        Op::Fsync { .. } => "fsync",
        Op::Flush { .. } => "flush",
        Op::Opendir { .. } => "opendir",
        Op::Readdir { .. } => "readdir",
        Op::Readdirplus { .. } => "readdirplus",
        Op::Releasedir { .. } => "releasedir",
        Op::Fsyncdir { .. } => "fsyncdir",
        Op::Setxattr { .. } => "setxattr",
        Op::Getxattr { .. } => "getxattr",
        Op::Listxattr { .. } => "listxattr",
        Op::Removexattr { .. } => "removexattr",
        Op::Getlk { .. } | Op::Setlk { .. } | Op::Setlkw { .. } => "lock",
        Op::Fallocate { .. } => "fallocate",
        Op::Lseek { .. } => "lseek",
        Op::Syncfs => "syncfs",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_kind() {
        let c = Counters::default();
        assert_eq!(c.to_string(), "");
        for op in [Op::Statfs, Op::Lookup { name: b"x".to_vec() }, Op::Statfs] {
            c.count(&op);
        }
        assert_eq!(c.to_string(), "lookup=1 statfs=2");
    }
}
