//! Sizes as people write and read them.

use std::fmt;

/// Bytes with an optional suffix K, M, G or T (powers of 1024; `KiB` and the like are understood too).
pub fn parse_size(s: &str) -> Result<u64, String> {
    let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = s.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("'{s}' is not a size, such as 64M"))?;
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(format!("'{suffix}' is no unit: use K, M, G or T")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{s}' is too large"))
}

/// Shows a number of bytes in the largest unit that leaves at least one digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} bytes", self.0);
        }
        let mut unit = 0;
        let mut scale = 1024u64;
        while unit + 1 < UNITS.len() && self.0 / scale >= 1024 {
            scale *= 1024;
            unit += 1;
        }
        let tenths = (u128::from(self.0) * 10 + u128::from(scale) / 2) / u128::from(scale);
        let (whole, tenth) = (tenths / 10, tenths % 10);
        if tenth == 0 { write!(f, "{whole} {}", UNITS[unit]) } else { write!(f, "{whole}.{tenth} {}", UNITS[unit]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("2gib"), Ok(2 << 30));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        for bad in ["", "M", "-1", "1.5G", "1X", "99999999999T", "1 G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        let shown = [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1 << 20, "1 MiB"),
            (3 << 29, "1.5 GiB"),
            (10 << 40, "10 TiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (n, text) in shown {
            assert_eq!(Bytes(n).to_string(), text);
        }
    }
}
