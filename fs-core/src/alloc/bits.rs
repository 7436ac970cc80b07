//! A bitmap in memory with run search.

/// Bit set = busy.
#[derive(Debug, Clone)]
pub struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    /// All clear.
    pub fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// More bits, clear ones.
    pub fn grow(&mut self, len: u64) {
        self.words.resize(len.div_ceil(64) as usize, 0);
        self.len = len;
    }

    pub fn get(&self, i: u64) -> bool {
        i >= self.len || self.words[(i / 64) as usize] & (1 << (i % 64)) != 0
    }

    pub fn set(&mut self, i: u64, on: bool) {
        if i >= self.len {
            return;
        }
        let w = &mut self.words[(i / 64) as usize];
        if on { *w |= 1 << (i % 64) } else { *w &= !(1 << (i % 64)) }
    }

    pub fn count_clear(&self) -> u64 {
        let set: u64 = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
        self.len - set.min(self.len)
    }

    /// First clear bit at or after `from`.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        let mut i = from;
        while i < self.len {
            let w = !self.words[(i / 64) as usize] >> (i % 64);
            if w != 0 {
                let at = i + u64::from(w.trailing_zeros());
                return (at < self.len).then_some(at);
            }
            i = (i / 64 + 1) * 64;
        }
        None
    }

    /// Length of the clear run at `from`, at most `max`.
    pub fn run(&self, from: u64, max: u64) -> u64 {
        let end = from.saturating_add(max).min(self.len);
        let mut i = from;
        while i < end {
            let w = self.words[(i / 64) as usize] >> (i % 64);
            if w != 0 {
                return (i + u64::from(w.trailing_zeros())).min(end) - from;
            }
            i = (i / 64 + 1) * 64;
        }
        end - from
    }

    /// The first run of `want` clear bits at or after `from`, wrapping around; else the longest there is.
    pub fn find(&self, want: u64, from: u64) -> Option<(u64, u64)> {
        let mut best: Option<(u64, u64)> = None;
        for (mut i, end) in [(from, self.len), (0, from.min(self.len))] {
            while let Some(at) = self.next_clear(i).filter(|at| *at < end) {
                let len = self.run(at, want);
                if len == want {
                    return Some((at, len));
                }
                if best.is_none_or(|(_, l)| len > l) {
                    best = Some((at, len));
                }
                i = at + len + 1;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_runs() {
        let mut b = Bits::new(200);
        for i in 0..100 {
            b.set(i, true);
        }
        b.set(110, true);
        assert_eq!(b.find(5, 0), Some((100, 5)));
        assert_eq!(b.find(50, 0), Some((111, 50)));
        assert_eq!(b.find(150, 0), Some((111, 89)));
        assert_eq!(b.find(8, 190), Some((190, 8)));
        assert_eq!(b.find(20, 190), Some((111, 20)));
        assert_eq!(b.count_clear(), 99);
    }

    proptest! {
        #[test]
        fn run_and_next_clear_agree_with_single_bits(set in prop::collection::btree_set(0u64..300, 0..200), from in 0u64..300) {
            let mut b = Bits::new(300);
            for i in &set { b.set(*i, true); }
            prop_assert_eq!(b.next_clear(from), (from..300).find(|i| !set.contains(i)));
            let run = (from..300).take_while(|i| !set.contains(i)).count() as u64;
            prop_assert_eq!(b.run(from, 1000), run);
            prop_assert_eq!(b.count_clear(), 300 - set.len() as u64);
        }
    }
}
