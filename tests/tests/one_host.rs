//! Kernel block devices that keep no hosts apart, under two hosts: loop devices over one file, whose locks the other's nodes do not
//! see. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::loop_device::LoopDevice;

const LIMIT: Duration = Duration::from_secs(120);
const OPTIONS: [&str; 4] = ["--lease", "3s", "--queue-time", "0"];
const REFUSED: &str = "cannot keep hosts apart";

fn two_hosts() -> (Cluster, Vec<LoopDevice>) {
    let mut c = Cluster::formatted_with(4, 128 << 20, LIMIT, &OPTIONS).unwrap();
    let devices: Vec<_> = (0..2).map(|_| LoopDevice::new(&c.image()).unwrap()).collect();
    for (number, device) in devices.iter().enumerate() {
        c.devices.insert(number, device.path().to_owned());
        c.devices.insert(number + 2, device.path().to_owned());
    }
    (c, devices)
}

/// At the very same time, and one heartbeat (half a second) and more apart: never both.
#[test]
fn mounts_of_two_hosts_at_once_are_noticed() {
    let (c, _devices) = two_hosts();
    let mut refused = 0;
    for apart in [0, 0, 30, 400, 1500] {
        let (a, b) = std::thread::scope(|s| {
            let first = s.spawn(|| c.mount_with(0, "nohints,host=a").map_err(|e| e.to_string()));
            std::thread::sleep(Duration::from_millis(apart));
            let second = c.mount_with(1, "nohints,host=b").map_err(|e| e.to_string());
            (first.join().unwrap(), second)
        });
        println!("{apart} ms apart: {} {}", a.is_ok(), b.is_ok());
        assert!(a.is_err() || b.is_err(), "both hosts have it mounted, {apart} ms apart");
        for (number, mounted) in [(0, a), (1, b)] {
            match mounted {
                // Whoever stays works.
                Ok(()) => {
                    fs::write(c.mount_point(number).join("file"), "mail").unwrap();
                    c.unmount(number).unwrap();
                }
                Err(why) => {
                    assert!(why.contains(REFUSED), "{why}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused >= 5);
    c.finish_after_faults();
}

/// Further nodes of the same host need no proof, and one of them that dies is no other host.
#[test]
fn several_nodes_of_one_host() {
    let (c, _devices) = two_hosts();
    c.mount(0).unwrap();
    let began = Instant::now();
    c.mount(2).unwrap();
    println!("the second mount of a host took {:.1?}", began.elapsed());
    let refused = c.mount(1).unwrap_err().to_string();
    assert!(refused.contains(REFUSED), "{refused}");
    fs::create_dir(c.mount_point(0).join("held")).unwrap();
    fs::write(c.mount_point(0).join("held/file"), "mail").unwrap();
    fs::File::open(c.mount_point(0).join("held/file")).unwrap().sync_all().unwrap();
    c.kill9(0).unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(2).join("held/file")).unwrap(), "mail");
    c.mount(0).unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(0).join("held/file")).unwrap(), "mail");
    c.finish();
}
