//! One process that works with a file's locks, for tests: `clusterfs-locks COMMAND KIND FILE ...`. Answers are lines.
//!
//! | command | does | answers |
//! |---|---|---|
//! | `hold KIND FILE` | locks, then reads lines: `unlock`, `open-close` (another descriptor of the file), `write`, `fork` (the child keeps the descriptor) | `ok` or the errno, for each |
//! | `try KIND FILE` | locks without waiting | `ok` or the errno |
//! | `test KIND FILE` | F_GETLK | `free`, or type, start, length, pid |
//! | `count KIND FILE TIMES` | adds one to the number in the file under the lock | `ok` |
//! | `timed KIND FILE MS` | opens the file, reads a line, does it with an alarm after MS milliseconds | `open`; `ok` or the errno, and the milliseconds it took |
//!
//! KIND is `fcntl-r`, `fcntl-w`, `ofd-r`, `ofd-w`, `flock-s` or `flock-x`; for `count` also `excl` and `link` (dotlocks); for
//! `timed` also `stat`, `fsync` and `create`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn cvt(r: i32) -> io::Result<()> {
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn record(exclusive: bool, unlock: bool) -> libc::flock {
    // SAFETY: plain numbers, for which zero is a value.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = match (unlock, exclusive) {
        (true, _) => libc::F_UNLCK,
        (_, true) => libc::F_WRLCK,
        _ => libc::F_RDLCK,
    } as _;
    l.l_whence = libc::SEEK_SET as _;
    l
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Wait,
    Try,
    Unlock,
}

fn lock(file: &File, kind: &str, how: How) -> io::Result<()> {
    let fd = file.as_raw_fd();
    if let Some(mode) = kind.strip_prefix("flock-") {
        let op = match (how, mode) {
            (How::Unlock, _) => libc::LOCK_UN,
            (_, "x") => libc::LOCK_EX,
            _ => libc::LOCK_SH,
        };
        let nb = if how == How::Try { libc::LOCK_NB } else { 0 };
        // SAFETY: numbers only.
        return cvt(unsafe { libc::flock(fd, op | nb) });
    }
    let ofd = kind.starts_with("ofd");
    let cmd = match (ofd, how) {
        (false, How::Wait) => libc::F_SETLKW,
        (false, _) => libc::F_SETLK,
        (true, How::Wait) => libc::F_OFD_SETLKW,
        (true, _) => libc::F_OFD_SETLK,
    };
    let l = record(kind.ends_with("-w"), how == How::Unlock);
    // SAFETY: the kernel reads the record during the call.
    cvt(unsafe { libc::fcntl(fd, cmd, &l) })
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn say(what: impl std::fmt::Display) {
    let mut out = io::stdout();
    // Nobody reads it any more: the test is over.
    let _ = writeln!(out, "{what}").and_then(|()| out.flush());
}

fn outcome(r: io::Result<()>) -> String {
    match r {
        Ok(()) => "ok".into(),
        Err(e) => e.raw_os_error().unwrap_or(-1).to_string(),
    }
}

fn hold(kind: &str, path: &Path) -> io::Result<()> {
    let file = open(path)?;
    say(outcome(lock(&file, kind, How::Wait)));
    for line in io::stdin().lock().lines() {
        let done = match line?.as_str() {
            "unlock" => lock(&file, kind, How::Unlock),
            "open-close" => File::open(path).map(drop),
            "write" => file.write_at(b"x", 100).map(drop).and_then(|()| file.sync_all()),
            // SAFETY: the child only sleeps until its parent's end of the pipe is gone with the test.
            "fork" => match unsafe { libc::fork() } {
                0 => loop {
                    // SAFETY: no arguments to go wrong.
                    unsafe { libc::pause() };
                },
                child => {
                    say(child);
                    continue;
                }
            },
            other => Err(io::Error::other(other.to_owned())),
        };
        say(outcome(done));
    }
    Ok(())
}

fn test(kind: &str, path: &Path) -> io::Result<()> {
    let file = open(path)?;
    let mut l = record(kind.ends_with("-w"), false);
    // SAFETY: the kernel fills in the record.
    cvt(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut l) })?;
    match i32::from(l.l_type) {
        libc::F_UNLCK => say("free"),
        t => say(format_args!("{} {} {} {}", if t == libc::F_WRLCK { "w" } else { "r" }, l.l_start, l.l_len, l.l_pid)),
    }
    Ok(())
}

/// Takes the dotlock, trying as mail programs do.
fn dotlock(path: &Path, link: bool) -> io::Result<PathBuf> {
    let dot = PathBuf::from(format!("{}.lock", path.display()));
    let own = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    loop {
        let taken = match link {
            true => File::create(&own).and_then(|_| fs::hard_link(&own, &dot)),
            false => OpenOptions::new().write(true).create_new(true).open(&dot).map(drop),
        };
        if link {
            fs::remove_file(&own)?;
        }
        match taken {
            Ok(()) => return Ok(dot),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => return Err(e),
        }
    }
}

fn count(kind: &str, path: &Path, times: u64) -> io::Result<()> {
    for _ in 0..times {
        let dot = match kind {
            "excl" | "link" => Some(dotlock(path, kind == "link")?),
            _ => None,
        };
        let file = open(path)?;
        if dot.is_none() {
            lock(&file, kind, How::Wait)?;
        }
        let mut number = [0; 8];
        file.read_exact_at(&mut number, 0)?;
        let next = u64::from_le_bytes(number) + 1;
        file.write_all_at(&next.to_le_bytes(), 0)?;
        // Every second time the close has to do it.
        if dot.is_none() && next.is_multiple_of(2) {
            lock(&file, kind, How::Unlock)?;
        }
        drop(file);
        if let Some(dot) = dot {
            fs::remove_file(dot)?;
        }
    }
    say("ok");
    Ok(())
}

fn create(path: &Path) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: a valid C string.
    match unsafe { libc::open(path.as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

extern "C" fn on_alarm(_: libc::c_int) {}

fn timed(kind: &str, path: &Path, ms: u64) -> io::Result<()> {
    let file = match kind {
        "stat" | "create" => None,
        _ => Some(open(path)?),
    };
    if let ("fsync", Some(file)) = (kind, &file) {
        file.write_all_at(b"to be synced", 0)?;
    }
    say("open");
    io::stdin().read_line(&mut String::new())?;
    // SAFETY: a handler that does nothing, without SA_RESTART; plain numbers.
    unsafe {
        let mut act: libc::sigaction = std::mem::zeroed();
        act.sa_sigaction = on_alarm as extern "C" fn(libc::c_int) as usize;
        cvt(libc::sigaction(libc::SIGALRM, &act, std::ptr::null_mut()))?;
        let tv = libc::timeval { tv_sec: (ms / 1000) as _, tv_usec: (ms % 1000 * 1000) as _ };
        let once = libc::itimerval { it_interval: std::mem::zeroed(), it_value: tv };
        cvt(libc::setitimer(libc::ITIMER_REAL, &once, std::ptr::null_mut()))?;
    }
    let start = Instant::now();
    let done = match (kind, &file) {
        ("stat", _) => fs::metadata(path).map(drop),
        // Not the library's, which tries again after a signal.
        ("create", _) => create(path),
        // SAFETY: a descriptor that is open.
        ("fsync", Some(file)) => cvt(unsafe { libc::fsync(file.as_raw_fd()) }),
        (kind, Some(file)) => lock(file, kind, How::Wait),
        _ => Ok(()),
    };
    say(format_args!("{} {}", outcome(done), start.elapsed().as_millis()));
    Ok(())
}

fn run() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = || io::Error::other("usage: clusterfs-locks COMMAND KIND FILE [NUMBER]");
    let [command, kind, path, rest @ ..] = args.as_slice() else { return Err(usage()) };
    let path = Path::new(path);
    let number = rest.first().map_or(Ok(0), |n| n.parse()).map_err(|_| usage())?;
    match command.as_str() {
        "hold" => hold(kind, path),
        "try" => {
            say(outcome(open(path).and_then(|f| lock(&f, kind, How::Try))));
            Ok(())
        }
        "test" => test(kind, path),
        "count" => count(kind, path, number),
        "timed" => timed(kind, path, number),
        _ => Err(usage()),
    }
}

fn main() {
    if let Err(e) = run() {
        eprintln!("clusterfs-locks: {e}");
        std::process::exit(1);
    }
}
