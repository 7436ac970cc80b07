//! The guest's machine: filesystems, kernel modules, programs, the way out.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The host's directory that may be written to.
pub const SHARED: &str = "/run/shared";
/// A directory in memory.
pub const ROOM: &str = "/run/room";

fn c(s: &str) -> CString {
    CString::new(s).unwrap()
}

pub fn mount(source: &str, target: &str, kind: &str, options: &str) {
    fs::create_dir_all(target).unwrap();
    let (source, at, kind_, options) = (c(source), c(target), c(kind), c(options));
    // SAFETY: valid strings.
    let done = unsafe { libc::mount(source.as_ptr(), at.as_ptr(), kind_.as_ptr(), 0, options.as_ptr().cast()) };
    assert_eq!(done, 0, "mount {kind} on {target}: {}", std::io::Error::last_os_error());
}

/// Makes a machine of it; `shared` is a directory of the host.
pub fn start(shared: &Path) {
    mount("proc", "/proc", "proc", "");
    mount("sys", "/sys", "sysfs", "");
    mount("run", "/run", "tmpfs", "");
    mount("none", SHARED, "hostfs", shared.to_str().unwrap());
    fs::create_dir_all(ROOM).unwrap();
    // The kernel starts it with nothing.
    // SAFETY: no other thread is there yet.
    unsafe { std::env::set_var("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") };
}

pub fn power_off() -> ! {
    // SAFETY: no arguments that point anywhere.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    panic!("the guest does not power off");
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_string()
}

/// Loads a module and what it needs, as modprobe(8) would.
pub fn load(name: &str) {
    let root = Path::new("/usr/lib/uml/modules").join(release());
    let dep = fs::read_to_string(root.join("modules.dep")).unwrap();
    let mut loaded = BTreeSet::new();
    let of = |name: &str| {
        dep.lines().find_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let stem = Path::new(file).file_stem()?.to_str()?.replace('-', "_");
            (stem == name.replace('-', "_")).then(|| (file, needs.split_whitespace().collect::<Vec<_>>()))
        })
    };
    let (file, needs) = of(name).unwrap_or_else(|| panic!("the guest's kernel has no module {name}"));
    // What is needed by others is named last.
    for file in needs.iter().rev().chain([&file]) {
        if loaded.insert(*file) {
            insert(&root.join(file));
        }
    }
}

fn insert(file: &Path) {
    let (module, none) = (File::open(file).unwrap(), c(""));
    // SAFETY: a descriptor and a valid string.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), none.as_ptr(), 0) };
    let error = std::io::Error::last_os_error();
    assert!(done == 0 || error.raw_os_error() == Some(libc::EEXIST), "{}: {error}", file.display());
}

/// Waits until something is so.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a program to its end; what it says.
pub fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}: {said}", out.status);
    said
}
