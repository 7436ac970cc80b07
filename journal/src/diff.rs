//! What changed in a block, as byte ranges.

use crate::BLOCK_SIZE;

/// Tenure, record number and checksum are stamped anew by replay.
const STAMP: std::ops::Range<usize> = 32..64;
/// Equal bytes between two changed ones that are cheaper to log than a range of their own.
const GAP: usize = 6;

/// Ranges of `new` that differ from `old`; a missing `old` is all zeros.
pub fn diff(old: Option<&[u8]>, new: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let zero = [0; BLOCK_SIZE];
    let old = old.unwrap_or(&zero);
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for (word, (a, b)) in old.chunks_exact(8).zip(new.chunks_exact(8)).enumerate() {
        if a == b || STAMP.contains(&(word * 8)) {
            continue;
        }
        for i in (0..8).filter(|i| a[*i] != b[*i]) {
            let at = word * 8 + i;
            match ranges.last_mut() {
                Some((from, to)) if at - *to <= GAP && !(*from < STAMP.end && at >= STAMP.end) => *to = at + 1,
                _ => ranges.push((at, at + 1)),
            }
        }
    }
    ranges.into_iter().map(|(from, to)| (from as u16, new[from..to].to_vec())).collect()
}

pub fn apply(block: &mut [u8], ranges: &[(u16, Vec<u8>)]) {
    for (at, bytes) in ranges {
        let at = usize::from(*at);
        if let Some(part) = block.get_mut(at..at + bytes.len()) {
            part.copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn applying_the_diff_gives_the_new_block(edits in prop::collection::vec((0usize..BLOCK_SIZE, any::<u8>()), 0..60)) {
            let old: Vec<u8> = (0..BLOCK_SIZE).map(|i| (i * 7) as u8).collect();
            let mut new = old.clone();
            for (at, v) in edits.into_iter().filter(|(at, _)| !STAMP.contains(at)) {
                new[at] = v;
            }
            let mut got = old.clone();
            apply(&mut got, &diff(Some(&old), &new));
            prop_assert_eq!(&got, &new);
            let mut whole = vec![0; BLOCK_SIZE];
            apply(&mut whole, &diff(None, &new));
            whole[STAMP].copy_from_slice(&new[STAMP]);
            prop_assert_eq!(&whole, &new);
        }
    }
}
