//! dm-multipath: a node writes by whichever path works, is registered by each, and is fenced on all of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockdev::open::User;
use blockdev::{DevError, Fenced, Presence};

use crate::device::{SIZE, block_on, first_byte, key, node, try_open, write};
use crate::lio::{Lun, Shape};
use crate::machine::{load, run as done, wait_for};

const NAME: &str = "disk";

fn dmsetup(args: &[&str]) -> String {
    done(Command::new("dmsetup").args(args))
}

/// A table with the disks of these paths, in the order in which they are used.
fn table(lun: &Lun, paths: &[usize]) -> String {
    let groups: String = paths.iter().map(|p| format!(" round-robin 0 1 1 {} 1", lun.device(*p).display())).collect();
    format!("0 {} multipath 0 0 {} 1{groups}", SIZE / 512, paths.len())
}

fn reload(lun: &Lun, paths: &[usize]) {
    dmsetup(&["reload", NAME, "--table", &table(lun, paths)]);
    dmsetup(&["resume", NAME]);
}

fn create(lun: &Lun, paths: &[usize]) -> PathBuf {
    ["dm_multipath", "dm_round_robin"].into_iter().for_each(load);
    dmsetup(&["create", NAME, "--uuid", "mpath-36001405000", "--noudevsync", "--table", &table(lun, paths)]);
    let device = Path::new("/dev/dm-0").to_owned();
    wait_for("the multipath device", Duration::from_secs(10), || device.exists().then(|| device.clone()))
}

pub fn run() -> String {
    let lun = Lun::new(SIZE, 3, Shape::default());
    let device = create(&lun, &[0]);
    block_on(async {
        let other = node(lun.device(2)).await;
        other.register(key(1, 1)).await.unwrap();
        let dev = node(&device).await;
        dev.register(key(0, 1)).await.unwrap();
        write(&dev, 0, 1).await.unwrap();
        // Its paths are not to be used beside it.
        assert!(try_open(lun.device(0), User::Node).await.is_err());
        println!("a path that came later");
        // A path that came later, and is the only one that works now: nothing is registered by it.
        reload(&lun, &[0, 1]);
        lun.set_online(0, false);
        write(&dev, 0, 2).await.unwrap();
        dev.compare_and_write(0, &[2; 512], &[3; 512]).await.unwrap();
        println!("written by it");
        assert_eq!(first_byte(&other, 0).await, 3);
        println!("both paths");
        lun.set_online(0, true);
        dmsetup(&["message", NAME, "0", "reinstate_path", "8:0"]);
        // Both paths are registered anew with the next key, and both are fenced.
        dev.register(key(0, 2)).await.unwrap();
        write(&dev, 0, 4).await.unwrap();
        assert_eq!(other.presence(key(0, 1)).await.unwrap(), Presence::Gone);
        assert_eq!(other.fence(key(0, 2)).await.unwrap(), Fenced::Done);
        let refused = write(&dev, 0, 5).await;
        assert!(matches!(refused, Err(DevError::Fenced)), "{refused:?}");
        let refused = dev.compare_and_write(0, &[4; 512], &[5; 512]).await;
        assert!(matches!(refused, Err(DevError::Fenced)), "{refused:?}");
        // Of no path of its is a registration left.
        assert_eq!(other.registrations().await.unwrap().unwrap().nodes, [key(1, 1)]);
        assert_eq!(first_byte(&other, 0).await, 4);
        println!("back as a new member");
        dev.register(key(0, 3)).await.unwrap();
        for (number, byte) in [(0, 6), (1, 7)] {
            lun.set_online(1 - number, false);
            write(&dev, 0, byte).await.unwrap();
            lun.set_online(1 - number, true);
            dmsetup(&["message", NAME, "0", "reinstate_path", &format!("8:{}", 16 * (1 - number))]);
            assert_eq!(first_byte(&other, 0).await, byte);
        }
        dev.unregister().await.unwrap();
        assert_eq!(other.registrations().await.unwrap().unwrap().nodes, [key(1, 1)]);
        other.unregister().await.unwrap();
    });
    "paths came and went".into()
}
