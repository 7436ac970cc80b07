//! Running other programs, and the places they work in.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use crate::Result;

/// The repository.
pub fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.clone(), PathBuf::from)
}

/// The build directory, which CARGO_TARGET_DIR or a configuration file may have moved: this program lies in it.
pub fn target_dir() -> Result<PathBuf> {
    let me = std::env::current_exe().map_err(|e| format!("where am I? {e}"))?;
    let dir = me.parent().and_then(|profile| profile.parent());
    dir.map(PathBuf::from).ok_or_else(|| format!("{} is not in a build directory", me.display()))
}

/// The cargo that runs this.
pub fn cargo() -> Command {
    let mut c = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    c.current_dir(root());
    c
}

/// Runs a command to its end; failure is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let text = words(command);
    let status = command.status().map_err(|e| format!("{text}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{text}: {status}")) }
}

/// Runs a step of several that has a title.
pub fn step(title: &str, command: &mut Command) -> Result<()> {
    println!("== {title}");
    run(command)
}

/// Whether a command can be run and ends well, without a word.
pub fn works(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|o| o.status.success())
}

fn words(c: &Command) -> String {
    let all = std::iter::once(c.get_program()).chain(c.get_args());
    all.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
