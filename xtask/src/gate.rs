//! The test gate, the demo and the soak.

use std::process::Command;

use crate::run::{cargo, step, works};
use crate::{Result, programs};

/// Tests find the programs that users call in the directory this names.
pub const BIN_DIR: &str = "CLUSTERFS_BIN_DIR";

pub fn test(args: &[String]) -> Result<()> {
    step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step("lints", cargo().args(clippy))?;
    println!("== programs");
    let bin = programs::build()?;
    crate::tools::install()?;
    let mut tests = if works("cargo-nextest", &["nextest", "--version"]) {
        let mut c = cargo();
        c.args(["nextest", "run", "--workspace"]);
        c
    } else {
        let mut c = cargo();
        c.args(["test", "--quiet", "--workspace"]);
        c
    };
    step("unit and property tests, simulator, real mounts", tests.env(BIN_DIR, bin).args(args))
}

pub fn demo(args: &[String]) -> Result<()> {
    let bin = programs::build()?;
    let run = ["run", "--release", "--quiet", "--package", "clusterfs-tests", "--bin", "clusterfs-demo", "--"];
    let mut c: Command = cargo();
    crate::run::run(c.args(run).args(args).env(BIN_DIR, bin))
}

/// The simulator on as many seeds as asked for.
pub fn soak(args: &[String]) -> Result<()> {
    let run = ["run", "--release", "--quiet", "--package", "clusterfs-tests", "--bin", "clusterfs-sim", "--", "soak"];
    crate::run::run(cargo().args(run).args(args))
}

/// What takes how long; see the help of `clusterfs-bench`.
pub fn bench(args: &[String]) -> Result<()> {
    let bin = programs::build()?;
    let run = ["run", "--release", "--quiet", "--package", "clusterfs-tests", "--bin", "clusterfs-bench", "--"];
    crate::run::run(cargo().args(run).args(args).env(BIN_DIR, bin))
}

/// Random operations on the contents of files, on two nodes; see the help of `clusterfs-exercise`.
pub fn exercise(args: &[String]) -> Result<()> {
    let bin = programs::build()?;
    crate::tools::install()?;
    let run = ["run", "--release", "--quiet", "--package", "clusterfs-tests", "--bin", "clusterfs-exercise", "--"];
    crate::run::run(cargo().args(run).args(args).env(BIN_DIR, bin))
}
