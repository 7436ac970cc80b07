//! A LUN of the kernel's target (LIO), by several paths: each is a session of the kernel's initiator (open-iscsi) under a name of
//! its own, to the device what a host's path is. (LIO's loopback would need no network, but waits for itself in PREEMPT AND
//! ABORT on this kernel.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::machine::{ROOM, load, mount, run, wait_for};

const CONFIG: &str = "/sys/kernel/config";
const PORTAL: (&str, &str) = ("127.0.0.1", "3260");

/// What is unusual about a LUN.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// It says that its write cache is volatile.
    pub write_cache: bool,
}

pub struct Lun {
    devices: Vec<PathBuf>,
}

impl Lun {
    pub fn new(bytes: u64, paths: usize, shape: Shape) -> Self {
        ["configfs", "sd_mod", "target_core_mod"].into_iter().for_each(load);
        mount("configfs", CONFIG, "configfs", "");
        let target = Path::new(CONFIG).join("target");
        // Where registrations are kept over a power loss.
        let kept = format!("{ROOM}/target");
        fs::create_dir_all(format!("{kept}/pr")).unwrap();
        fs::create_dir_all(format!("{kept}/alua")).unwrap();
        fs::write(target.join("dbroot"), &kept).unwrap();
        ["target_core_file", "iscsi_target_mod", "iscsi_tcp"].into_iter().for_each(load);
        let lun = backstore(&target, bytes, shape);
        run(Command::new("ip").args(["link", "set", "lo", "up"]));
        let path = |letter: char| {
            // The initiator has one session with each target.
            let name = format!("iqn.2026-01.test:path-{letter}");
            export(&target, &lun, &name);
            log_in(&name, letter)
        };
        let devices = ('a'..).take(paths).map(path).collect();
        Self { devices }
    }

    /// The disk of a path.
    pub fn device(&self, path: usize) -> &Path {
        &self.devices[path]
    }

    /// As if the cable of a path were pulled, or put back.
    pub fn set_online(&self, path: usize, online: bool) {
        let name = self.devices[path].file_name().unwrap();
        let state = Path::new("/sys/block").join(name).join("device/state");
        fs::write(state, if online { "running\n" } else { "offline\n" }).unwrap();
    }
}

fn backstore(target: &Path, bytes: u64, shape: Shape) -> PathBuf {
    let lun = target.join("core/fileio_0/lun");
    fs::create_dir_all(&lun).unwrap();
    let file = format!("{ROOM}/lun");
    fs::File::create(&file).unwrap().set_len(bytes).unwrap();
    fs::write(lun.join("control"), format!("fd_dev_name={file},fd_dev_size={bytes},fd_buffered_io=1")).unwrap();
    fs::write(lun.join("enable"), "1").unwrap();
    fs::write(lun.join("wwn/vpd_unit_serial"), "6001405000").unwrap();
    fs::write(lun.join("attrib/emulate_tpu"), "1").unwrap();
    fs::write(lun.join("attrib/emulate_write_cache"), if shape.write_cache { "1" } else { "0" }).unwrap();
    lun
}

fn export(target: &Path, lun: &Path, name: &str) {
    fs::create_dir_all(target.join("iscsi")).unwrap();
    let group = target.join("iscsi").join(name).join("tpgt_1");
    fs::create_dir_all(group.join(format!("np/{}:{}", PORTAL.0, PORTAL.1))).unwrap();
    let exported = group.join("lun/lun_0");
    fs::create_dir_all(&exported).unwrap();
    std::os::unix::fs::symlink(lun, exported.join("lun")).unwrap();
    // Whoever comes may write.
    for (name, value) in [
        ("authentication", "0"),
        ("generate_node_acls", "1"),
        ("demo_mode_write_protect", "0"),
        ("cache_dynamic_acls", "1"),
    ] {
        fs::write(group.join("attrib").join(name), value).unwrap();
    }
    fs::write(group.join("enable"), "1").unwrap();
}

/// A session, and the disk that it brings.
fn log_in(target: &str, letter: char) -> PathBuf {
    let initiator = format!("iqn.2026-01.test:host-{letter}");
    let (address, port) = PORTAL;
    run(Command::new("iscsistart").args(["-i", &initiator, "-t", target, "-g", "1", "-a", address, "-p", port]));
    let device = Path::new("/dev").join(format!("sd{letter}"));
    wait_for(&device.display().to_string(), Duration::from_secs(10), || device.exists().then(|| device.clone()))
}
