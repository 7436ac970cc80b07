//! Requests per second and processor time per request of the two transports, with a handler that does nothing:
//! `cargo run --release -p fuse-session --example transport -- [SECONDS [ROUNDS]]`, as root. FUSE over io_uring must be
//! on (`/sys/module/fuse/parameters/enable_uring`). Rounds of both are interleaved; the medians are printed.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_session::{
    Attr, EntryOut, Forget, Handler, InitConfig, InitFlags, InitRequest, MountSpec, Op, Reply, Request, Session,
    UnmountMode, abi,
};

const READ_LEN: usize = 128 << 10;
const FILE_LEN: u64 = 1 << 30;
const CLIENTS: usize = 4;

/// One directory with one file in it, of which the kernel is to remember nothing. Names that begin with `task` are
/// answered on another thread.
struct Nothing {
    uring: bool,
    data: Vec<u8>,
    elsewhere: std::sync::mpsc::Sender<Reply>,
}

fn attr(ino: u64) -> Attr {
    let mode = if ino == 1 { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o644 };
    Attr { ino, mode, nlink: 1, size: FILE_LEN, blksize: 4096, ..Attr::default() }
}

fn entry() -> EntryOut {
    EntryOut { nodeid: 2, generation: 0, entry_valid: Duration::ZERO, attr_valid: Duration::ZERO, attr: attr(2) }
}

impl Handler for Nothing {
    fn init(&self, _: &InitRequest) -> InitConfig {
        let ring = if self.uring { InitFlags::OVER_IO_URING } else { InitFlags::default() };
        InitConfig { flags: InitFlags::ASYNC_READ | InitFlags::PARALLEL_DIROPS | ring, ..InitConfig::default() }
    }

    fn request(&self, request: Request, reply: Reply) {
        match request.op {
            Op::Lookup { name } if name.starts_with(b"task") => self.elsewhere.send(reply).unwrap(),
            Op::Lookup { .. } => drop(reply.entry(&entry())),
            Op::Getattr { .. } => {
                reply.attr(Duration::from_secs((request.nodeid == 1).into()), &attr(request.nodeid));
            }
            Op::Open { .. } => drop(reply.open(0, abi::FOPEN_DIRECT_IO | abi::FOPEN_NOFLUSH)),
            Op::Read { size, .. } => drop(reply.data(&self.data[..size as usize])),
            Op::Write { data, .. } => drop(reply.write(data.len() as u32)),
            Op::Release { .. } => drop(reply.ok()),
            _ => drop(reply.err(libc::ENOSYS)),
        }
    }

    fn forget(&self, _: Vec<Forget>) {}
}

#[derive(Clone, Copy)]
enum Load {
    Stat,
    StatElsewhere,
    Open,
    Read,
    Write,
}

fn client(load: Load, dir: &Path, until: Instant) -> u64 {
    let path = dir.join(if matches!(load, Load::StatElsewhere) { "task" } else { "f" });
    let mut done = 0;
    let mut buffer = vec![0u8; READ_LEN];
    let file = match load {
        Load::Read | Load::Write => Some(File::options().read(true).write(true).custom_flags(0).open(&path).unwrap()),
        _ => None,
    };
    while Instant::now() < until {
        match (load, &file) {
            (Load::Read, Some(file)) => file.read_exact_at(&mut buffer, done * READ_LEN as u64 % FILE_LEN).unwrap(),
            (Load::Write, Some(file)) => file.write_all_at(&buffer, done * READ_LEN as u64 % FILE_LEN).unwrap(),
            (Load::Open, _) => drop(File::open(&path).unwrap()),
            _ => drop(std::fs::symlink_metadata(&path).unwrap()),
        }
        done += 1;
    }
    done
}

fn cpu() -> f64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Calls per second, and microseconds of processor time per call, clients included.
fn measure(load: Load, dir: &Path, clients: usize, time: Duration) -> (f64, f64) {
    let (begin, before) = (Instant::now(), cpu());
    let done: u64 = std::thread::scope(|scope| {
        let all: Vec<_> = (0..clients).map(|_| scope.spawn(|| client(load, dir, begin + time))).collect();
        all.into_iter().map(|c| c.join().unwrap()).sum()
    });
    (done as f64 / begin.elapsed().as_secs_f64(), (cpu() - before) * 1e6 / done as f64)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() {
    let mut args = std::env::args().skip(1);
    let seconds = args.next().map_or(1.0, |s| s.parse().unwrap());
    let rounds: usize = args.next().map_or(5, |s| s.parse().unwrap());
    let time = Duration::from_secs_f64(seconds);
    let mounts = [false, true].map(|uring| {
        let dir = tempfile::tempdir().unwrap();
        let session = Arc::new(Session::mount(&MountSpec::new("none", "transport", dir.path())).unwrap());
        let (elsewhere, replies) = std::sync::mpsc::channel::<Reply>();
        std::thread::spawn(move || replies.into_iter().for_each(|reply| assert!(reply.entry(&entry()))));
        let (run, data) = (session.clone(), vec![1; 1 << 20]);
        std::thread::spawn(move || run.run(Arc::new(Nothing { uring, data, elsewhere }), 2).unwrap());
        assert!(std::fs::metadata(dir.path()).unwrap().is_dir());
        let used = session.negotiated().unwrap().flags.contains(InitFlags::OVER_IO_URING);
        assert_eq!(used, uring, "io_uring is off: echo Y > /sys/module/fuse/parameters/enable_uring");
        (dir, session)
    });
    println!(
        "{:40} {:>12} {:>12} {:>10} {:>10}",
        "4 clients unless said otherwise", "/dev/fuse/s", "io_uring/s", "us CPU", "us CPU"
    );
    let loads = [
        ("stat (LOOKUP), one client", Load::Stat, 1),
        ("stat (LOOKUP)", Load::Stat, CLIENTS),
        ("stat, answered by another thread", Load::StatElsewhere, CLIENTS),
        ("open, close (LOOKUP, OPEN, RELEASE)", Load::Open, CLIENTS),
        ("read 128 KiB", Load::Read, CLIENTS),
        ("write 128 KiB", Load::Write, CLIENTS),
    ];
    for (name, load, clients) in loads {
        let mut all = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        for _ in 0..rounds {
            for (n, (dir, _)) in mounts.iter().enumerate() {
                let (rate, cpu) = measure(load, dir.path(), clients, time);
                all[n].0.push(rate);
                all[n].1.push(cpu);
            }
        }
        let [(a, b), (c, d)] = all.map(|(rate, cpu)| (median(rate), median(cpu)));
        println!("{name:40} {a:12.0} {c:12.0} {b:10.1} {d:10.1}");
    }
    for (_, session) in mounts {
        session.unmount(UnmountMode::Force).unwrap();
    }
}
