//! When to look for watches and whom to wake: no clock and no kernel in here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Whoever takes a domain away gets this long to do what he wants with it.
const SETTLE: Duration = Duration::from_millis(150);
/// Between two wakings of one domain.
pub const PAUSE: Duration = Duration::from_millis(750);
/// Between two searches for watches, and at least so many times as long as the last one took.
const SEARCH_PAUSE: Duration = Duration::from_millis(250);
const SEARCH_SHARE: u32 = 20;
const DOMAIN_SHIFT: u32 = 40;

#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Search, then say what was found.
    Search,
    Wake(Vec<u64>),
    /// Nothing to do before then, or before the next news.
    Wait(Option<Instant>),
}

/// When a domain was taken away, for the first and for the last time.
struct Pending {
    first: Instant,
    last: Instant,
}

#[derive(Default)]
pub struct Schedule {
    /// Domains taken away and not dealt with.
    pending: BTreeMap<u32, Pending>,
    /// Inodes with watches by domain, as last found.
    watched: BTreeMap<u32, Vec<u64>>,
    /// Start of the search that found them.
    searched: Option<Instant>,
    next_search: Option<Instant>,
    /// When each domain was last woken; older entries than [`PAUSE`] do not matter.
    woken: BTreeMap<u32, Instant>,
}

impl Schedule {
    pub fn taken(&mut self, domain: u32, now: Instant) {
        self.pending.entry(domain).or_insert(Pending { first: now, last: now }).last = now;
    }

    pub fn searched(&mut self, started: Instant, ended: Instant, inodes: Vec<u64>) {
        self.watched.clear();
        for ino in inodes {
            self.watched.entry((ino >> DOMAIN_SHIFT) as u32).or_default().push(ino);
        }
        self.searched = Some(started);
        self.next_search = Some(ended + SEARCH_PAUSE.max(SEARCH_SHARE * (ended - started)));
    }

    pub fn step(&mut self, now: Instant) -> Step {
        self.woken.retain(|_, at| now < *at + PAUSE);
        // A watch that is set after a domain was taken away takes it back: the kernel asks for the inode's permissions.
        let (watched, searched) = (&self.watched, self.searched);
        let sure = |p: &Pending| searched.is_some_and(|at| at >= p.last);
        self.pending.retain(|d, p| watched.contains_key(d) || !sure(p));
        let search = match self.next_search {
            _ if self.pending.values().all(sure) => None,
            Some(at) if now < at => Some(at),
            _ => return Step::Search,
        };
        let due = self.pending.keys().filter_map(|d| Some((self.due(*d)?, *d))).min();
        match due {
            Some((at, domain)) if at <= now => {
                // Those who began to watch since the search are woken after the next one.
                match (self.pending.get_mut(&domain), search) {
                    (Some(p), Some(next)) if !sure(p) => p.first = next,
                    _ => drop(self.pending.remove(&domain)),
                }
                self.woken.insert(domain, now);
                Step::Wake(self.watched.get(&domain).cloned().unwrap_or_default())
            }
            _ => Step::Wait(due.map(|(at, _)| at).into_iter().chain(search).min()),
        }
    }

    /// When a watched domain that was taken away is to be woken.
    fn due(&self, domain: u32) -> Option<Instant> {
        self.watched.get(&domain)?;
        let settled = self.pending.get(&domain)?.first + SETTLE;
        Some(self.woken.get(&domain).map_or(settled, |at| settled.max(*at + PAUSE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: u64 = 7 << DOMAIN_SHIFT | 3;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn nothing_happens_without_news() {
        assert_eq!(Schedule::default().step(Instant::now()), Step::Wait(None));
    }

    #[test]
    fn an_unwatched_domain_costs_one_search() {
        let (mut s, t) = (Schedule::default(), Instant::now());
        s.taken(7, t);
        assert_eq!(s.step(t), Step::Search);
        s.searched(t, t + ms(1), vec![INO + (1 << DOMAIN_SHIFT)]);
        assert_eq!(s.step(t + ms(1)), Step::Wait(None));
        // Again soon: the search has to wait.
        s.taken(7, t + ms(10));
        assert_eq!(s.step(t + ms(10)), Step::Wait(Some(t + ms(1) + SEARCH_PAUSE)));
    }

    #[test]
    fn a_watched_domain_is_woken_soon_and_not_too_often() {
        let (mut s, t) = (Schedule::default(), Instant::now());
        s.taken(7, t);
        assert_eq!(s.step(t), Step::Search);
        s.searched(t, t + ms(1), vec![INO, INO + 1]);
        assert_eq!(s.step(t + ms(1)), Step::Wait(Some(t + SETTLE)));
        assert_eq!(s.step(t + SETTLE), Step::Wake(vec![INO, INO + 1]));
        assert_eq!(s.step(t + SETTLE), Step::Wait(None));
        // Many handovers, one waking.
        for n in 1..50 {
            s.taken(7, t + SETTLE + ms(n));
        }
        let (next, search) = (t + SETTLE + PAUSE, t + ms(1) + SEARCH_PAUSE);
        assert_eq!(s.step(t + SETTLE + ms(50)), Step::Wait(Some(search)));
        assert_eq!(s.step(search), Step::Search);
        s.searched(search, search, vec![INO]);
        assert_eq!(s.step(search), Step::Wait(Some(next)));
        assert_eq!(s.step(next), Step::Wake(vec![INO]));
        assert_eq!(s.step(next), Step::Wait(None));
    }

    #[test]
    fn a_search_that_has_to_wait_delays_only_new_watches() {
        let (mut s, t) = (Schedule::default(), Instant::now());
        let late = ms(100) * SEARCH_SHARE + ms(100);
        s.searched(t, t + ms(100), vec![INO]);
        s.taken(7, t + ms(101));
        assert_eq!(s.step(t + ms(101)), Step::Wait(Some(t + ms(101) + SETTLE)));
        assert_eq!(s.step(t + ms(101) + SETTLE), Step::Wake(vec![INO]));
        assert_eq!(s.step(t + ms(101) + SETTLE), Step::Wait(Some(t + late)));
        assert_eq!(s.step(t + late), Step::Search);
        s.searched(t + late, t + late, vec![INO, INO + 1]);
        assert_eq!(s.step(t + late + SETTLE), Step::Wake(vec![INO, INO + 1]));
        assert_eq!(s.step(t + late + SETTLE), Step::Wait(None));
    }

    #[test]
    fn a_watch_is_not_believed_in_for_ever() {
        let (mut s, t) = (Schedule::default(), Instant::now());
        s.searched(t, t, vec![INO]);
        let late = t + SEARCH_PAUSE;
        s.taken(7, late);
        assert_eq!(s.step(late), Step::Search);
        s.searched(late, late, vec![]);
        assert_eq!(s.step(late), Step::Wait(None));
    }

    #[test]
    fn searches_take_a_bounded_share_of_the_time() {
        let (mut s, t) = (Schedule::default(), Instant::now());
        s.taken(7, t);
        s.searched(t, t + ms(100), vec![]);
        s.taken(8, t + ms(101));
        assert_eq!(s.step(t + ms(101)), Step::Wait(Some(t + ms(100) + SEARCH_SHARE * ms(100))));
    }
}
