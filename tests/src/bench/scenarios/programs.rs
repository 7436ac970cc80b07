//! Benchmarks that others wrote, from Debian.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::super::place::program;
use super::super::{Done, Scenario, Work};
use crate::cluster::Result;

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "postmark",
        about: "postmark (Debian): files of 0.5 to 10 KB made, read, appended to and removed, without fsync",
        limits: "the daemon: several requests per transaction",
        unit: "transactions",
        nodes: &[1],
        prepare: |_| Ok(()),
        run: postmark,
    },
    Scenario {
        name: "fs-mark",
        about: "fs_mark (Debian): files of 16 KiB by 4 threads, each with fsync",
        limits: "the device's flush, shared by those who wait for it",
        unit: "files",
        nodes: &[1],
        prepare: |_| Ok(()),
        run: fs_mark,
    },
];

fn postmark(w: &Work) -> Result<Done> {
    let (files, transactions) = (w.scale.of(5000), w.scale.of(50_000));
    let commands = format!(
        "set location {}\nset number {files}\nset transactions {transactions}\nset subdirectories 10\nset size 500 10000\nrun\nquit\n",
        w.dir().display()
    );
    let begin = Instant::now();
    let mut child = Command::new("postmark")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| format!("postmark: {e}: apt-get install postmark"))?;
    child.stdin.take().ok_or("no standard input")?.write_all(commands.as_bytes())?;
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("postmark: {status}").into());
    }
    Ok(Done::since(begin, transactions as f64))
}

fn fs_mark(w: &Work) -> Result<Done> {
    let each = w.scale.of(4000) / 4;
    let dir = w.dir().to_str().ok_or("a name is not UTF-8")?;
    let begin = Instant::now();
    program("fs_mark", &["-d", dir, "-t", "4", "-n", &each.to_string(), "-s", "16384", "-S", "1", "-l", "/dev/null"])
        .map_err(|e| format!("{e}: apt-get install fsmark"))?;
    Ok(Done::since(begin, 4.0 * each as f64))
}
