//! The simulated device against a model of what a disk promises: everything else is tested on top of it, so a device
//! that loses too much or too little would cost days.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::{AlignedBuf, BlockDevice, Caw, IoClass};

const SECTORS: u64 = 8;
const META: IoClass = IoClass::Meta;

#[derive(Clone, Debug)]
enum Act {
    Write {
        node: usize,
        sector: u64,
        count: u64,
        fua: bool,
    },
    Caw {
        node: usize,
        sector: u64,
    },
    Flush {
        node: usize,
    },
    /// Two writes of the same sector and a flush, all in flight together.
    Together {
        sector: u64,
    },
    PowerLoss,
    Crash {
        node: usize,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let write = (0..3usize, 0..SECTORS, 1..=3u64, any::<bool>()).prop_map(|(node, sector, count, fua)| Act::Write {
        node,
        sector,
        count: count.min(SECTORS - sector),
        fua,
    });
    prop_oneof![
        6 => write,
        2 => (0..3usize, 0..SECTORS).prop_map(|(node, sector)| Act::Caw { node, sector }),
        2 => (0..3usize).prop_map(|node| Act::Flush { node }),
        2 => (0..SECTORS).prop_map(|sector| Act::Together { sector }),
        1 => Just(Act::PowerLoss),
        1 => (0..3usize).prop_map(|node| Act::Crash { node }),
    ]
}

/// What a sector may hold: `now`, or after a power loss any of `possible`.
#[derive(Clone)]
struct Sector {
    now: u64,
    possible: Vec<u64>,
}

impl Sector {
    fn write(&mut self, value: u64, durable: bool) {
        self.now = value;
        if durable {
            self.possible.clear();
        }
        self.possible.push(value);
    }

    fn settle(&mut self, value: u64) {
        assert!(self.possible.contains(&value), "{value} is none of {:?}", self.possible);
        *self = Self { now: value, possible: vec![value] };
    }
}

fn content(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

fn value_of(disk: &SimDisk, sector: u64) -> u64 {
    let bytes = disk.read_raw(sector * 512, 512);
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(bytes, content(value), "a sector is torn");
    value
}

async fn check(seed: u64, split_writes: bool, acts: Vec<Act>) {
    let disk = SimDisk::new(SimConfig { split_writes, ..SimConfig::new(SECTORS * 512, seed) });
    let mut nodes: Vec<_> = (0..3).map(|i| disk.open(&format!("n{i}"))).collect();
    let mut model = vec![Sector { now: 0, possible: vec![0] }; SECTORS as usize];
    let mut value = 0;
    for act in acts {
        match act {
            Act::Write { node, sector, count, fua } => {
                let bufs = (0..count).map(|i| Arc::new(AlignedBuf::copy_of(&content(value + 1 + i)))).collect();
                nodes[node].writev(META, sector * 512, bufs, fua).await.unwrap();
                for i in 0..count {
                    value += 1;
                    model[(sector + i) as usize].write(value, fua);
                }
            }
            Act::Caw { node, sector } => {
                value += 1;
                let expect = content(model[sector as usize].now);
                let done = nodes[node].compare_and_write(sector * 512, &expect, &content(value)).await.unwrap();
                assert_eq!(done, Caw::Written);
                model[sector as usize].write(value, false);
            }
            Act::Flush { node } => {
                // After a power loss the first one may fail; then nothing is promised.
                if nodes[node].flush(META).await.is_ok() {
                    model.iter_mut().for_each(|s| s.possible = vec![s.now]);
                }
            }
            Act::Together { sector } => {
                let (a, b) = (value + 1, value + 2);
                value += 2;
                let write = |node: usize, v| {
                    let buf = Arc::new(AlignedBuf::copy_of(&content(v)));
                    nodes[node].write(META, sector * 512, buf, false)
                };
                let (x, y, flushed) = tokio::join!(write(0, a), write(1, b), nodes[2].flush(META));
                x.unwrap();
                y.unwrap();
                if flushed.is_ok() {
                    model.iter_mut().for_each(|s| s.possible = vec![s.now]);
                }
                let s = &mut model[sector as usize];
                s.possible.extend([a, b]);
                s.now = value_of(&disk, sector);
                assert!(s.now == a || s.now == b);
            }
            Act::PowerLoss => {
                disk.power_loss();
                for (i, sector) in model.iter_mut().enumerate() {
                    sector.settle(value_of(&disk, i as u64));
                }
            }
            Act::Crash { node } => {
                nodes[node].crash();
                nodes[node] = disk.open("again");
            }
        }
        for (i, sector) in model.iter().enumerate() {
            assert_eq!(value_of(&disk, i as u64), sector.now, "sector {i}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_power_loss_leaves_only_what_may_be_left(
        seed: u64, split: bool, acts in proptest::collection::vec(act(), 1..60)
    ) {
        let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        rt.block_on(check(seed, split, acts));
    }
}
