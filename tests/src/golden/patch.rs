//! Damage as a patch of a golden volume: a text file, a line per run of bytes.
//!
//! ```text
//! # what is wrong
//! base NAME
//! put OFFSET HEX
//! zero OFFSET LENGTH
//! truncate LENGTH
//! extend LENGTH
//! ```

/// Runs of bytes that differ are joined over gaps of equal ones up to this long.
const GAP: usize = 8;
/// Runs of zeros at least this long are said as such.
const ZEROS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    pub title: String,
    pub base: String,
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Put(usize, Vec<u8>),
    Zero(usize, usize),
    Truncate(usize),
    /// To this length, with zeros.
    Extend(usize),
}

impl Patch {
    /// What turns `old`, the volume `base`, into `new`.
    pub fn between(title: &str, base: &str, old: &[u8], new: &[u8]) -> Self {
        let mut steps = Vec::new();
        let mut extended = Vec::new();
        let mut old = old;
        if new.len() > old.len() {
            extended.extend_from_slice(old);
            extended.resize(new.len(), 0);
            old = &extended;
            steps.push(Step::Extend(new.len()));
        }
        let same = old.len().min(new.len());
        let mut at = 0;
        while let Some(start) = (at..same).find(|i| old[*i] != new[*i]) {
            let (mut end, mut i) = (start + 1, start + 1);
            while i < same && i <= end + GAP {
                if old[i] != new[i] {
                    end = i + 1;
                }
                i += 1;
            }
            put(&mut steps, start, &new[start..end]);
            at = end;
        }
        if new.len() < old.len() {
            steps.push(Step::Truncate(new.len()));
        }
        Self { title: title.into(), base: base.into(), steps }
    }

    pub fn apply(&self, bytes: &mut Vec<u8>) {
        for s in &self.steps {
            match s {
                Step::Put(at, b) => bytes[*at..at + b.len()].copy_from_slice(b),
                Step::Zero(at, len) => bytes[*at..at + len].fill(0),
                Step::Truncate(len) => bytes.truncate(*len),
                Step::Extend(len) => bytes.resize(*len, 0),
            }
        }
    }

    pub fn to_text(&self) -> String {
        let mut out = format!("# {}\nbase {}\n", self.title, self.base);
        for s in &self.steps {
            let line = match s {
                Step::Put(at, b) => format!("put {at} {}", b.iter().map(|x| format!("{x:02x}")).collect::<String>()),
                Step::Zero(at, len) => format!("zero {at} {len}"),
                Step::Truncate(len) => format!("truncate {len}"),
                Step::Extend(len) => format!("extend {len}"),
            };
            out.push_str(&line);
            out.push('\n');
        }
        out
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let title = lines.next()?.strip_prefix("# ")?.into();
        let base = lines.next()?.strip_prefix("base ")?.into();
        let mut steps = Vec::new();
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            steps.push(match words[..] {
                ["put", at, hex] => Step::Put(at.parse().ok()?, from_hex(hex)?),
                ["zero", at, len] => Step::Zero(at.parse().ok()?, len.parse().ok()?),
                ["truncate", len] => Step::Truncate(len.parse().ok()?),
                ["extend", len] => Step::Extend(len.parse().ok()?),
                _ => return None,
            });
        }
        Some(Self { title, base, steps })
    }
}

/// Bytes, with long runs of zeros taken out.
fn put(steps: &mut Vec<Step>, at: usize, bytes: &[u8]) {
    let mut from = 0;
    let mut i = 0;
    while i < bytes.len() {
        let zeros = bytes[i..].iter().take_while(|b| **b == 0).count();
        if zeros >= ZEROS {
            if from < i {
                steps.push(Step::Put(at + from, bytes[from..i].to_vec()));
            }
            steps.push(Step::Zero(at + i, zeros));
            from = i + zeros;
        }
        i += zeros.max(1);
    }
    if from < bytes.len() {
        steps.push(Step::Put(at + from, bytes[from..].to_vec()));
    }
}

fn from_hex(s: &str) -> Option<Vec<u8>> {
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(s.get(i..i + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_makes_the_new_from_the_old_also_after_being_text() {
        let old: Vec<u8> = (0..2000u32).map(|i| (i * 7) as u8).collect();
        let mut new = old[..1900].to_vec();
        new[3] = 99;
        new[100..400].fill(0);
        new[390] = 1;
        new[1899] ^= 1;
        let p = Patch::between("it is broken", "clean", &old, &new);
        assert!(p.to_text().len() < 300, "{}", p.to_text());
        let again = Patch::parse(&p.to_text()).expect("it parses");
        assert_eq!(again, p);
        let mut made = old;
        again.apply(&mut made);
        assert!(made == new);
    }
}
