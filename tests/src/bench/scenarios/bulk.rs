//! Large files, from beginning to end.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Instant;

use super::super::{Done, Scenario, Work};
use crate::cluster::Result;

const PIECE: usize = 1 << 20;

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "write-large",
        about: "one file in pieces of 1 MiB, with one fsync at the end",
        limits: "the device's bandwidth",
        unit: "MiB",
        nodes: &[1],
        prepare: |_| Ok(()),
        run: |w| {
            let begin = Instant::now();
            write(w)?;
            Ok(Done::since(begin, pieces(w) as f64))
        },
    },
    Scenario {
        name: "read-large",
        about: "and read in such pieces, with nothing cached",
        limits: "the device's bandwidth and the kernel's read-ahead",
        unit: "MiB",
        nodes: &[1],
        prepare: |w| {
            write(w)?;
            w.place.remount(0)
        },
        run: |w| {
            let begin = Instant::now();
            let mut file = File::open(w.dir().join("large"))?;
            let mut buffer = vec![0; PIECE];
            for _ in 0..pieces(w) {
                file.read_exact(&mut buffer)?;
            }
            Ok(Done::since(begin, pieces(w) as f64))
        },
    },
];

fn pieces(w: &Work) -> usize {
    w.scale.of(2048)
}

fn write(w: &Work) -> Result<()> {
    let mut file = File::create(w.dir().join("large"))?;
    let data: Vec<u8> = (0..PIECE).map(|i| (i % 251) as u8).collect();
    (0..pieces(w)).try_for_each(|_| file.write_all(&data))?;
    Ok(file.sync_all()?)
}
