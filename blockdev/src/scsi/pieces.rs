//! Transfers that are larger than a device takes at once.

use crate::AlignedBuf;

/// Lengths of the transfers that `lens` are done in, none above `most`, and whether a piece goes on in the next one.
pub(super) fn split(lens: &[usize], most: usize) -> Vec<Vec<usize>> {
    let mut transfers = vec![Vec::new()];
    let mut room = most;
    for len in lens {
        let mut rest = *len;
        while rest > 0 {
            if room == 0 {
                transfers.push(Vec::new());
                room = most;
            }
            let part = rest.min(room);
            if let Some(last) = transfers.last_mut() {
                last.push(part);
            }
            (rest, room) = (rest - part, room - part);
        }
    }
    transfers
}

/// Puts parts together to buffers of `lens`; without a copy where a buffer came in one part.
pub(super) fn join(lens: &[usize], parts: Vec<AlignedBuf>) -> Vec<AlignedBuf> {
    let mut parts = parts.into_iter();
    let mut bufs = Vec::with_capacity(lens.len());
    for len in lens {
        if *len == 0 {
            bufs.push(AlignedBuf::zeroed(0));
            continue;
        }
        let Some(first) = parts.next() else { break };
        if first.len() == *len {
            bufs.push(first);
            continue;
        }
        let mut whole = AlignedBuf::zeroed(*len);
        whole[..first.len()].copy_from_slice(&first);
        let mut at = first.len();
        while at < *len {
            let Some(part) = parts.next() else { break };
            whole[at..at + part.len()].copy_from_slice(&part);
            at += part.len();
        }
        bufs.push(whole);
    }
    bufs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_transfers_are_split_and_put_together() {
        assert_eq!(split(&[512, 512], 1 << 20), vec![vec![512, 512]]);
        assert_eq!(split(&[1000, 2500], 1500), vec![vec![1000, 500], vec![1500], vec![500]]);
        let parts: Vec<_> =
            [1000, 500, 1500, 500].iter().zip(1u8..).map(|(n, b)| AlignedBuf::copy_of(&vec![b; *n])).collect();
        let bufs = join(&[1000, 2500], parts);
        assert_eq!((bufs[0].len(), bufs[1].len()), (1000, 2500));
        assert!(bufs[1][..500].iter().all(|b| *b == 2) && bufs[1][2000..].iter().all(|b| *b == 4));
    }
}
