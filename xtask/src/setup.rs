//! What a bare Debian 12 with Rust lacks, and the programs. Doing it again does nothing.

use std::path::Path;
use std::process::Command;

use crate::run::{run, works};
use crate::{Result, programs};

/// gcc is cargo's linker; mount has mount(8) and umount(8). FUSE needs no package: the mount program speaks to the kernel
/// itself.
const PACKAGES: &[&str] = &["gcc", "libc6-dev", "mount"];

pub fn setup() -> Result<()> {
    packages()?;
    if !Path::new("/dev/fuse").exists() && !works("modprobe", &["fuse"]) {
        println!("warning: there is no /dev/fuse here, nothing can be mounted (modprobe fuse as root)");
    }
    let bin = programs::build()?;
    println!("programs are in {}", bin.display());
    Ok(())
}

fn packages() -> Result<()> {
    if !works("dpkg-query", &["--version"]) {
        println!("not a Debian system: {} are taken for granted", PACKAGES.join(", "));
        return Ok(());
    }
    let installed = |p: &str| {
        let args = ["-W", "-f=${db:Status-Abbrev}", p];
        Command::new("dpkg-query").args(args).output().is_ok_and(|o| o.stdout.starts_with(b"ii"))
    };
    let missing: Vec<&str> = PACKAGES.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let apt = || {
        let mut c = Command::new("apt-get");
        c.env("DEBIAN_FRONTEND", "noninteractive");
        c
    };
    run(apt().args(["update", "-qq"]))?;
    run(apt().args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing))
}
