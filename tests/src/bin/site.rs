//! clusterfs-site: a volume of its own with mail servers on one node, until its input ends. Says where that is. A process of the test
//! that kills it.

use std::io::Read;

use clusterfs_tests::servers::accounts::Store;
use clusterfs_tests::servers::site::{Queue, Settings, Site};

fn main() {
    let site = Site::start(1, Settings { store: Store::Maildir, queue: Queue::Local, dovecot: "", postfix: "" });
    println!("{}", site.cluster.path().display());
    std::io::stdin().read_to_end(&mut Vec::new()).expect("input ends");
    site.finish();
}
