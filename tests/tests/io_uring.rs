//! Nodes whose requests come through io_uring, beside one that reads /dev/fuse. Needs root, Linux 6.14 and the programs:
//! `cargo xtask test`.
#![allow(clippy::unwrap_used)]

#[path = "../../fuse-session/tests/mounted/enable.rs"]
mod enable;

use std::time::Duration;

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::load::{assert_once, deliver_during, make_boxes};
use clusterfs_tests::mail::read_maildir;

const BOXES: [&str; 2] = ["one", "two"];

#[test]
fn mail_is_delivered_once_from_nodes_of_both_transports() {
    let _on = enable::Enabled::new();
    let c = Cluster::formatted_for(3, 1 << 30, Duration::from_secs(60)).unwrap();
    c.mount_with(0, "rw,io_uring,log=info").unwrap();
    c.mount_with(1, "rw,io_uring,log=info").unwrap();
    c.mount_with(2, "rw,log=info").unwrap();
    let used = |n: usize| c.log_text(n).contains("requests come through io_uring");
    assert_eq!([0, 1, 2].map(used), [true, true, false]);
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    let load = || {
        std::thread::sleep(Duration::from_secs(3));
        Ok(())
    };
    let delivered = deliver_during(&c, 3, &BOXES, 1, load).unwrap();
    assert_eq!(delivered.failed, 0);
    assert!(delivered.ids.len() > 30, "only {} messages in 3 s", delivered.ids.len());
    for node in 0..3 {
        assert_once(&c, node, &BOXES, &delivered.ids, read_maildir);
    }
    c.finish();
}
