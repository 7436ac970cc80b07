//! Several hosts, each in a network namespace of its own, on one iSCSI disk: networks are cut, sessions dropped, hosts die. What
//! was acknowledged is there once, whoever was cut off is fenced and comes back by itself. Needs root, the programs and the packages
//! that `cargo xtask setup` installs.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::iscsi_target::{Kind, Shape, Target};
use clusterfs_tests::load::{assert_once, deliver_during, make_boxes, read_when_back, returns};
use clusterfs_tests::mail::read_maildir;
use clusterfs_tests::netns::{Hosts, Network};

const LIMIT: Duration = Duration::from_secs(250);
const BOXES: [&str; 3] = ["anna", "ben", "team"];
const LEASE: [&str; 2] = ["--lease", "2s"];

/// Hosts, target and volume; every host has it mounted.
fn start(hosts: usize) -> (Hosts, Target, Cluster) {
    let net = Hosts::new(hosts).unwrap();
    let shape = Shape { kind: Kind::Tgt, at: (net.portal(), 3260).into(), block_size: 512, netns: Some(net.hub()) };
    let target = Target::with(1 << 30, shape).unwrap();
    let mut c = Cluster::formatted_in(net.hub(), Path::new(&target.url()), hosts + 1, LIMIT, &LEASE).unwrap();
    for host in 0..hosts {
        c.netns.insert(host, net.namespace(host));
        c.options.insert(host, format!("host=host{host},hints={}", net.address(host, Network::Hints)));
        c.mount(host).unwrap();
    }
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    (net, target, c)
}

fn sleep(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

#[test]
fn networks_are_cut_and_hosts_die() {
    const HOSTS: usize = 3;
    let (net, target, c) = start(HOSTS);
    let all = deliver_during(&c, HOSTS, &BOXES, 1, || {
        sleep(500);
        println!("host 0 is cut from the disk for less than the lease");
        net.cut(0, Network::San)?;
        sleep(700);
        net.heal(0, Network::San)?;
        sleep(1500);
        assert!(!c.log_text(0).contains("lapsed"), "cut for less than the lease:\n{}", c.log_text(0));
        println!("host 1 is cut from the disk for longer");
        net.cut(1, Network::San)?;
        sleep(5000);
        net.heal(1, Network::San)?;
        sleep(4000);
        println!("host 2 is cut from the other hosts only");
        net.cut(2, Network::Hints)?;
        sleep(2000);
        net.heal(2, Network::Hints)?;
        assert!(!c.log_text(2).contains("lapsed"), "the other hosts were all it could not reach:\n{}", c.log_text(2));
        println!("every session is dropped");
        target.drop_sessions()?;
        sleep(4000);
        Ok(())
    })
    .unwrap();
    println!("{} delivered, {} failed, {} returns", all.ids.len(), all.failed, returns(&c, HOSTS));
    (0..HOSTS).for_each(|n| assert_once(&c, n, &BOXES, &all.ids, read_when_back));
    assert!(c.log_text(1).contains("a member of the volume again"), "{}", c.log_text(1));
    let fenced = [0, 2].iter().any(|n| c.log_text(*n).contains("fenced: registration"));
    assert!(fenced, "nobody fenced the host that was cut off:\n{}\n{}", c.log_text(0), c.log_text(2));
    c.kill9(0).unwrap();
    assert_once(&c, 1, &BOXES, &all.ids, read_when_back);
    c.finish_after_faults();
}

/// One host delivers, three serve.
#[test]
fn four_hosts_on_one_disk() {
    const HOSTS: usize = 4;
    let (_net, _target, c) = start(HOSTS);
    let (stop, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
    let all = std::thread::scope(|s| {
        for n in 1..HOSTS {
            let (root, stop, seen) = (c.mount_point(n), &stop, &seen);
            s.spawn(move || {
                while !stop.load(Relaxed) {
                    for b in BOXES {
                        seen.fetch_add(read_maildir(&root.join(b)).unwrap().len(), Relaxed);
                    }
                }
            });
        }
        let all = deliver_during(&c, 1, &BOXES, 2, || {
            sleep(4000);
            Ok(())
        });
        stop.store(true, Relaxed);
        all
    })
    .unwrap();
    println!("{} delivered, {} read meanwhile", all.ids.len(), seen.load(Relaxed));
    assert_eq!(all.failed, 0);
    assert!(all.ids.len() > 10 && seen.load(Relaxed) > 0);
    (0..HOSTS).for_each(|n| assert_once(&c, n, &BOXES, &all.ids, read_maildir));
    c.finish();
}
