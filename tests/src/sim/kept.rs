//! Seeds that failed, one per line of a file, until they pass again: the next soak begins with them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Result, Seek, Write};
use std::path::{Path, PathBuf};

/// The file; none for a soak that neither keeps nor replays.
#[derive(Clone, Debug)]
pub struct Kept {
    path: PathBuf,
}

impl Kept {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Those that failed and have not passed since, in the order in which they failed.
    pub fn seeds(&self) -> Result<Vec<u64>> {
        match File::open(&self.path) {
            Ok(mut file) => {
                file.lock_shared()?;
                read(&mut file)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    pub fn failed(&self, seed: u64) -> Result<()> {
        self.change(|seeds| {
            if !seeds.contains(&seed) {
                seeds.push(seed);
            }
        })
    }

    pub fn passed(&self, seed: u64) -> Result<()> {
        self.change(|seeds| seeds.retain(|s| *s != seed))
    }

    /// Under a lock: several soaks may run at once.
    fn change(&self, f: impl FnOnce(&mut Vec<u64>)) -> Result<()> {
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.path)?;
        file.lock()?;
        let mut seeds = read(&mut file)?;
        let before = seeds.clone();
        f(&mut seeds);
        if seeds == before {
            return Ok(());
        }
        file.rewind()?;
        file.set_len(0)?;
        let lines: String = seeds.iter().map(|s| format!("{s}\n")).collect();
        file.write_all(lines.as_bytes())
    }
}

/// A line that is no number is somebody's mistake; it is dropped with the next change.
fn read(file: &mut File) -> Result<Vec<u64>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.lines().filter_map(|l| l.trim().parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_stay_until_they_pass() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::new(&dir.path().join("new/failing-seeds"));
        assert!(kept.seeds().unwrap().is_empty());
        kept.passed(3).unwrap();
        for seed in [7, 12_345, 7] {
            kept.failed(seed).unwrap();
        }
        assert_eq!(kept.seeds().unwrap(), [7, 12_345]);
        kept.passed(7).unwrap();
        kept.passed(8).unwrap();
        assert_eq!(std::fs::read_to_string(kept.path()).unwrap(), "12345\n");
        kept.passed(12_345).unwrap();
        assert!(kept.seeds().unwrap().is_empty());
    }
}
