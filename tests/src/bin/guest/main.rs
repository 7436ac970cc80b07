//! clusterfs-guest DIR SCENARIO [ARGUMENT...]: the first process of a test's guest (`clusterfs_tests::uml`). It sets the machine
//! up, does a scenario, writes a report into DIR of the host and powers off.
//!
//! | scenario | disks | what it shows |
//! |---|---|---|
//! | `device` | two paths to one LUN | the block device backend: compare-and-write, registrations, fencing |
//! | `volume BIN` | the same | two nodes on one LUN, one of them fenced |
//! | `multipath` | three paths | dm-multipath: paths come and go, fencing hits all of them |
#![allow(clippy::unwrap_used)]

mod device;
mod lio;
mod machine;
mod multipath;
mod volume;

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use clusterfs_tests::uml::{END, REPORT, WELL};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).take_while(|a| a != END).collect();
    let Some((dir, scenario)) = args.split_first() else { panic!("usage: clusterfs-guest DIR SCENARIO [ARGUMENT...]") };
    machine::start(Path::new(dir));
    let scenario: Vec<String> = scenario.to_vec();
    let done = catch_unwind(move || {
        let words: Vec<&str> = scenario.iter().map(String::as_str).collect();
        match words[..] {
            ["device"] => device::run(),
            ["volume", bin] => volume::run(Path::new(bin)),
            ["multipath"] => multipath::run(),
            _ => panic!("no scenario {words:?}"),
        }
    });
    let report = match done {
        Ok(said) => format!("{WELL}\n{said}"),
        Err(why) => {
            let why = why.downcast_ref::<String>().map(String::as_str).or(why.downcast_ref::<&str>().copied());
            format!("failed: {}", why.unwrap_or("a panic"))
        }
    };
    fs::write(Path::new(machine::SHARED).join(REPORT), report).expect("the report is written");
    machine::power_off();
}
