//! The kernel's requests: messages of every kind, whole or changed at random, ACLs among them, through the parser and the
//! handler to a mounted volume. Each is answered, and in the end fsck finds nothing.

use std::collections::BTreeSet;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use fs_core::Volume;
use fs_core::check::check;
use fuse_mount::counters::Counters;
use fuse_mount::handler::Server;
use fuse_mount::kernel_cache::KnownInodes;
use fuse_mount::membership::Membership;
use fuse_mount::report::Reporter;
use fuse_session::{Channel, Handler, InterruptTable, Reply, Request, abi};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use tokio::sync::Notify;

use super::device::Overlaid;
use super::{guarded, mutate, rng};
use crate::golden;

/// Messages of a case.
const MESSAGES: u64 = 150;
/// Longest that an answer may take, in paused time.
const PATIENCE: Duration = Duration::from_secs(600);
/// The kernel never asks for more at once.
const MAX_READ: u32 = 1 << 20;

const OPS: [u32; 36] = [
    abi::LOOKUP,
    abi::FORGET,
    abi::BATCH_FORGET,
    abi::GETATTR,
    abi::SETATTR,
    abi::READLINK,
    abi::SYMLINK,
    abi::MKNOD,
    abi::MKDIR,
    abi::UNLINK,
    abi::RMDIR,
    abi::RENAME,
    abi::RENAME2,
    abi::LINK,
    abi::OPEN,
    abi::OPENDIR,
    abi::CREATE,
    abi::TMPFILE,
    abi::READ,
    abi::READDIR,
    abi::READDIRPLUS,
    abi::WRITE,
    abi::STATFS,
    abi::RELEASE,
    abi::RELEASEDIR,
    abi::FSYNC,
    abi::FLUSH,
    abi::FSYNCDIR,
    abi::SETXATTR,
    abi::GETXATTR,
    abi::LISTXATTR,
    abi::REMOVEXATTR,
    abi::ACCESS,
    abi::FALLOCATE,
    abi::LSEEK,
    abi::GETLK,
];

/// Collects the answers.
#[derive(Default)]
struct Answers {
    /// Requests that were answered, and the inodes that answers named.
    seen: Mutex<(BTreeSet<u64>, Vec<u64>)>,
    more: Notify,
    interrupts: InterruptTable,
}

impl Channel for Answers {
    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> std::io::Result<()> {
        let mut seen = self.seen.lock();
        assert!(seen.0.insert(unique), "request {unique} is answered twice");
        let entry: Vec<u8> = body.iter().flat_map(|b| b.iter().copied()).take(8).collect();
        if let (0, Ok(ino)) = (error, entry.try_into()) {
            seen.1.push(u64::from_ne_bytes(ino));
        }
        self.more.notify_one();
        Ok(())
    }

    fn interrupts(&self) -> &InterruptTable {
        &self.interrupts
    }
}

pub struct Requests {
    base: Arc<Vec<u8>>,
}

impl Requests {
    /// `base` is a volume on which no node lives or died.
    pub fn new(base: Vec<u8>) -> Self {
        Self { base: Arc::new(base) }
    }

    /// One case: how many messages the parser took for requests. The error says what does not hold.
    pub fn case(&self, seed: u64) -> Result<u64, String> {
        let mut taken = 0;
        let result = guarded(seed, || {
            let rt = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
            let rt = rt.map_err(|e| e.to_string())?;
            taken = rt.block_on(self.run(&mut rng(seed), rt.handle()))?;
            Ok(())
        });
        result.map_err(|e| format!("seed {seed}: {e}"))?;
        Ok(taken)
    }

    async fn run(&self, rng: &mut StdRng, runtime: &tokio::runtime::Handle) -> Result<u64, String> {
        let device: Arc<dyn BlockDevice> = Arc::new(Overlaid::new(self.base.clone()));
        let volume = Volume::mount(golden::mount_config(device.clone(), 0)).await.map_err(|e| e.to_string())?;
        let known = Arc::new(KnownInodes::default());
        let counters = Arc::<Counters>::default();
        let server = Server {
            membership: Membership::new(volume.clone(), known.clone()),
            known,
            reporter: Arc::new(Reporter::new("fuzz", counters.clone())),
            counters,
            io_uring: false,
            dirsync: false,
            runtime: runtime.clone(),
            ready: Arc::default(),
        };
        let answers = Arc::new(Answers::default());
        let mut taken = 0;
        for unique in 1..=MESSAGES {
            let inodes = answers.seen.lock().1.clone();
            let (opcode, message) = message(rng, unique, &inodes);
            let Ok(Some(request)) = Request::parse(&message) else { continue };
            taken += 1;
            let what = format!("{request:?}");
            let unique = request.unique;
            server.request(request, Reply::new(unique, opcode, answers.clone()));
            let answered = async {
                while !answers.seen.lock().0.contains(&unique) {
                    answers.more.notified().await;
                }
            };
            if tokio::time::timeout(PATIENCE, answered).await.is_err() {
                return Err(format!("no answer to {}", &what[..what.len().min(300)]));
            }
            // Uniques are the kernel's: never used twice.
            answers.seen.lock().0.remove(&unique);
        }
        drop(server);
        volume.unmount().await.map_err(|e| format!("unmounting: {e}"))?;
        let report = check(&device, None).await.map_err(|e| e.to_string())?;
        match report.violations.first() {
            None => Ok(taken),
            Some(v) => Err(format!("fsck finds {v:?}")),
        }
    }
}

fn name(rng: &mut StdRng) -> Vec<u8> {
    let names: [&[u8]; 8] = [b"a", b"b", b"c", b"new", b"node1", b".", b"..", b"node0.link"];
    match rng.random_range(0..12) {
        0 => vec![b'x'; rng.random_range(0..300)],
        1 => (0..rng.random_range(1..10)).map(|_| rng.random_range(1..=255)).collect(),
        _ => names[rng.random_range(0..names.len())].to_vec(),
    }
}

/// The value of an ACL as Linux has it, mostly a sound one.
fn acl(rng: &mut StdRng) -> Vec<u8> {
    let mut v = 2u32.to_le_bytes().to_vec();
    let mut entry = |tag: u16, perm: u16, id: u32| {
        v.extend(tag.to_le_bytes());
        v.extend(perm.to_le_bytes());
        v.extend(id.to_le_bytes());
    };
    entry(1, rng.random_range(0..8), u32::MAX);
    let named = rng.random_range(0..4);
    for id in 0..named {
        entry(2, rng.random_range(0..8), id);
    }
    entry(4, rng.random_range(0..8), u32::MAX);
    if named > 0 {
        entry(16, rng.random_range(0..8), u32::MAX);
    }
    entry(32, rng.random_range(0..8), u32::MAX);
    if rng.random() {
        mutate(rng, &mut v);
    }
    if rng.random_range(0..8) == 0 {
        v.truncate(rng.random_range(0..v.len()));
    }
    v
}

/// The fixed part of an operation in numbers that make sense, and what follows it. Layouts: `fuse.h` of Linux.
fn body(rng: &mut StdRng, op: u32, inodes: &[u64]) -> Vec<u8> {
    let ino = inodes.choose(rng).copied().unwrap_or(1);
    let small = u64::from(rng.next_u32() % 20_000);
    let at = if rng.random_range(0..6) == 0 { rng.next_u64() >> rng.random_range(0..64) } else { small };
    let u32s = |v: &[u32]| -> Vec<u8> { v.iter().flat_map(|x| x.to_ne_bytes()).collect() };
    let u64s = |v: &[u64]| -> Vec<u8> { v.iter().flat_map(|x| x.to_ne_bytes()).collect() };
    let text = |mut v: Vec<u8>| {
        v.push(0);
        v
    };
    let mode = rng.random_range(0..0o10000);
    match op {
        abi::LOOKUP | abi::UNLINK | abi::RMDIR => text(name(rng)),
        abi::FORGET => u64s(&[rng.random_range(0..3)]),
        abi::BATCH_FORGET => [u32s(&[1, 0]), u64s(&[ino, 1])].concat(),
        abi::GETATTR => u64s(&[0, 0]),
        abi::SETATTR => {
            let valid = rng.next_u32() & 0x7ff;
            let mut b = [u32s(&[valid, 0]), u64s(&[0, at, 0, 1, 2, 3])].concat();
            b.extend(u32s(&[4, 5, 6, 0o100000 | mode, 0, 7, 8, 0]));
            b
        }
        abi::SYMLINK => [text(name(rng)), text(name(rng))].concat(),
        abi::MKNOD => {
            let kind = [libc::S_IFREG, libc::S_IFIFO, libc::S_IFCHR, libc::S_IFSOCK][rng.random_range(0..4)];
            [u32s(&[kind | mode, 0, 0o22, 0]), text(name(rng))].concat()
        }
        abi::MKDIR => [u32s(&[mode, 0o22]), text(name(rng))].concat(),
        abi::RENAME => [u64s(&[ino]), text(name(rng)), text(name(rng))].concat(),
        abi::RENAME2 => {
            let flags = rng.random_range(0..4);
            [u64s(&[ino]), u32s(&[flags, 0]), text(name(rng)), text(name(rng))].concat()
        }
        abi::LINK => [u64s(&[ino]), text(name(rng))].concat(),
        abi::OPEN | abi::OPENDIR => u32s(&[rng.random_range(0..3), 0]),
        abi::CREATE => [u32s(&[2, libc::S_IFREG | mode, 0o22, 0]), text(name(rng))].concat(),
        abi::TMPFILE => u32s(&[2, libc::S_IFREG | mode, 0o22, 0]),
        abi::READ | abi::READDIR | abi::READDIRPLUS => {
            [u64s(&[0, at]), u32s(&[rng.random_range(0..70_000), 0]), u64s(&[0]), u32s(&[0, 0])].concat()
        }
        abi::WRITE => {
            let data = vec![b'w'; rng.random_range(0..9000)];
            [u64s(&[0, at]), u32s(&[data.len() as u32, 0]), u64s(&[0]), u32s(&[0, 0]), data].concat()
        }
        abi::RELEASE | abi::RELEASEDIR | abi::FLUSH | abi::FSYNC | abi::FSYNCDIR => u64s(&[0, 0, 0]),
        abi::SETXATTR => {
            let value = acl(rng);
            let names: [&[u8]; 3] = [b"system.posix_acl_access", b"system.posix_acl_default", b"user.x"];
            let name = names[rng.random_range(0..3)];
            let flags = rng.random_range(0..3);
            [u32s(&[value.len() as u32, flags, 0, 0]), text(name.to_vec()), value].concat()
        }
        abi::GETXATTR => [u32s(&[rng.random_range(0..300), 0]), text(b"system.posix_acl_access".to_vec())].concat(),
        abi::LISTXATTR => u32s(&[rng.random_range(0..300), 0]),
        abi::REMOVEXATTR => text(b"system.posix_acl_default".to_vec()),
        abi::ACCESS => u32s(&[4, 0]),
        abi::FALLOCATE => [u64s(&[0, at, small]), u32s(&[rng.random_range(0..4), 0])].concat(),
        abi::LSEEK => [u64s(&[0, at]), u32s(&[rng.random_range(3..5), 0])].concat(),
        abi::GETLK => [u64s(&[0, 1, at, small]), u32s(&[1, 2, 0, 0])].concat(),
        _ => Vec::new(),
    }
}

fn message(rng: &mut StdRng, unique: u64, inodes: &[u64]) -> (u32, Vec<u8>) {
    let op = OPS[rng.random_range(0..OPS.len())];
    let mut body = body(rng, op, inodes);
    match rng.random_range(0..6) {
        0 | 1 => mutate(rng, &mut body),
        2 if !body.is_empty() => body.truncate(rng.random_range(0..body.len())),
        _ => {}
    }
    // fuse_read_in: the size is at byte 16.
    if let (abi::READ | abi::READDIR | abi::READDIRPLUS, Some(size)) = (op, body.get_mut(16..20)) {
        let asked = u32::from_ne_bytes([size[0], size[1], size[2], size[3]]);
        size.copy_from_slice(&asked.min(MAX_READ).to_ne_bytes());
    }
    let node = match rng.random_range(0..10) {
        0 => rng.next_u64() >> rng.random_range(0..64),
        1..4 => 1,
        _ => inodes.choose(rng).copied().unwrap_or(1),
    };
    let mut m = Vec::new();
    m.extend((40 + body.len() as u32).to_ne_bytes());
    m.extend(op.to_ne_bytes());
    m.extend(unique.to_ne_bytes());
    m.extend(node.to_ne_bytes());
    for id in [1000u32, 100, 42] {
        m.extend(id.to_ne_bytes());
    }
    m.extend([0; 4]);
    m.extend(body);
    (op, m)
}
