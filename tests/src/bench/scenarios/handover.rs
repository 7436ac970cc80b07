//! A directory that nodes change by turns: each change needs it handed over.

use std::fs::File;
use std::time::Instant;

use super::super::{Done, Scenario};

pub const ALL: &[Scenario] = &[Scenario {
    name: "handover",
    about: "nodes make a file in one directory by turns: how long the next one waits for it",
    limits: "a hint over the network, the former holder's commit and placing, two compare-and-writes",
    unit: "handovers",
    nodes: &[2, 4],
    prepare: |w| Ok(File::create(w.dir().join("first")).map(drop)?),
    run: |w| {
        let (begin, turns) = (Instant::now(), w.scale.of(1000));
        let mut latencies = Vec::new();
        for turn in 0..turns {
            let begin = Instant::now();
            // The node after the one that holds the directory since the preparation or the last turn.
            File::create(w.dirs[(turn + 1) % w.dirs.len()].join(format!("turn{turn}")))?;
            latencies.push(begin.elapsed());
        }
        Ok(Done { count: turns as f64, time: begin.elapsed(), latencies })
    },
}];
