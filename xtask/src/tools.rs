//! Test programs of others, from crates.io, in versions that are known to work. They are run, not linked with.

use std::fs;

use crate::Result;
use crate::run::{cargo, run, target_dir};

/// Name and version. What they are for: docs/decisions/024-tests-of-others.md.
const TOOLS: &[(&str, &str)] = &[("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// Puts what is missing into `tools/bin` of the build directory.
pub fn install() -> Result<()> {
    let root = target_dir()?.join("tools");
    // cargo's own list of what it has installed.
    let there = fs::read_to_string(root.join(".crates.toml")).unwrap_or_default();
    for (name, version) in TOOLS {
        if there.contains(&format!("\"{name} {version} ")) && root.join("bin").join(name).exists() {
            continue;
        }
        println!("installing {name} {version}");
        let mut c = cargo();
        c.args(["install", "--quiet", "--locked", "--force", "--version", version, name]).arg("--root").arg(&root);
        // A build directory of its own, which all of them share.
        c.arg("--target-dir").arg(root.join("build")).env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        run(&mut c)?;
    }
    Ok(())
}
