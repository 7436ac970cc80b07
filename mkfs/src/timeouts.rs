//! The cluster's timeouts, from what the user says: checked here, because a volume keeps them for its life.

use std::time::Duration;

use cluster::Timeouts;

/// Heartbeats in a lease: one may be lost and one late without harm.
const BEATS: u32 = 6;
const LEASE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
const LONGEST_QUEUE: Duration = Duration::from_secs(3600);
/// How long open-iscsi keeps commands for a path that is down (node.session.timeo.replacement_timeout).
pub const INITIATOR_QUEUE: Duration = Duration::from_secs(120);

/// A time such as `6`, `6s`, `500ms` or `2m`; plain numbers are seconds.
pub fn parse_duration(s: &str) -> Result<Duration, String> {
    let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = s.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("'{s}' is not a time, such as 6s"))?;
    let ms = match unit {
        "" | "s" => 1000,
        "ms" => 1,
        "m" | "min" => 60_000,
        _ => return Err(format!("'{unit}' is no unit of time: use ms, s or m")),
    };
    number.checked_mul(ms).map(Duration::from_millis).ok_or_else(|| format!("'{s}' is too long"))
}

/// The timeouts for a lease and a queue time; `image`: the device is a file, so this host's kernel is the only initiator.
pub fn choose(lease: Option<Duration>, queue: Option<Duration>, image: bool) -> Result<Timeouts, String> {
    let mut t = Timeouts::default();
    if let Some(lease) = lease {
        if !(LEASE.0..=LEASE.1).contains(&lease) {
            return Err(format!(
                "a lease of {lease:?} is refused: shorter than {:?}, any stall of the device would end all nodes; longer than \
                 {:?}, nobody wants to wait for a dead one",
                LEASE.0, LEASE.1
            ));
        }
        t.lease_ms = ms(lease);
        t.heartbeat_ms = t.lease_ms / BEATS;
    }
    if let Some(queue) = queue {
        if queue > LONGEST_QUEUE {
            return Err(format!("a queue time of {queue:?} is refused: the most is {LONGEST_QUEUE:?}"));
        }
        if !image && queue < INITIATOR_QUEUE {
            return Err(format!(
                "a queue time of {queue:?} is refused on a block device: initiators keep writes for a path that is down for up to \
                 {INITIATOR_QUEUE:?}, and one that arrives after the takeover destroys what others wrote"
            ));
        }
        t.queue_ms = ms(queue);
    }
    Ok(t)
}

fn ms(d: Duration) -> u32 {
    u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(parse_duration("6"), Ok(Duration::from_secs(6)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "-1", "1.5s", "1h", "99999999999999999999"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unsafe_combinations_are_refused_with_the_reason() {
        assert_eq!(choose(None, None, false), Ok(Timeouts::default()));
        let t = choose(Some(Duration::from_secs(3)), Some(Duration::ZERO), true).unwrap();
        assert_eq!((t.heartbeat_ms, t.lease_ms, t.queue_ms), (500, 3000, 0));
        let refused = choose(None, Some(Duration::from_secs(10)), false).unwrap_err();
        assert!(refused.contains("initiators"), "{refused}");
        assert!(choose(Some(Duration::from_millis(999)), None, true).is_err());
        assert!(choose(Some(Duration::from_secs(601)), None, true).is_err());
        assert!(choose(None, Some(Duration::from_secs(3601)), true).is_err());
    }
}
