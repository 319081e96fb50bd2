//! Go's durations, such as `15m0s`.
//!
//! In: text as `time.ParseDuration` takes it. Out: nanoseconds, and the text as Go writes it. Absent, `""` and `0` are zero,
//! which kube-proxy takes for "unset" in most places.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A duration in nanoseconds, of either sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub i64);

/// Units with their nanoseconds, the longer ones first. Go knows two letters for micro.
const UNITS: [(&str, i64); 8] = [
    ("h", 3600 * SECOND),
    ("m", 60 * SECOND),
    ("s", SECOND),
    ("ms", SECOND / 1000),
    ("us", 1000),
    ("µs", 1000),
    ("μs", 1000),
    ("ns", 1),
];
const SECOND: i64 = 1_000_000_000;

/// What the error says helps.
const REMEDY: &str = "write it like 30s, 1m30s or 500ms";

impl GoDuration {
    /// Nothing, or not said.
    pub const ZERO: Self = Self(0);

    /// So many seconds.
    #[must_use]
    pub const fn from_secs(seconds: i64) -> Self {
        Self(seconds * SECOND)
    }

    /// Nothing, or not said.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The time, where it isn't negative.
    #[must_use]
    pub fn time(self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }
}

impl FromStr for GoDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no duration; {REMEDY}");
        let (negative, mut rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if rest == "0" {
            return Ok(Self::ZERO);
        }
        if rest.is_empty() {
            return Err(wrong());
        }
        let mut sum: i128 = 0;
        while !rest.is_empty() {
            let number = rest.find(|c: char| c != '.' && !c.is_ascii_digit()).ok_or_else(wrong)?;
            let (digits, behind) = rest.split_at(number);
            let letters = behind.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(behind.len());
            let (unit, behind) = behind.split_at(letters);
            rest = behind;
            let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
            sum = sum.checked_add(scaled(digits, *unit).ok_or_else(wrong)?).ok_or_else(wrong)?;
        }
        i64::try_from(if negative { -sum } else { sum }).map(Self).map_err(|_| wrong())
    }
}

/// A decimal number of units as nanoseconds; what is smaller than one is cut off.
fn scaled(digits: &str, unit: i64) -> Option<i128> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || digits.len() > 30 {
        return None;
    }
    let number = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<i128>().ok() };
    // Further digits are less than a nanosecond even of an hour.
    let fraction = &fraction[..fraction.len().min(18)];
    let part = number(fraction)? * i128::from(unit) / 10_i128.pow(u32::try_from(fraction.len()).ok()?);
    number(whole)?.checked_mul(i128::from(unit))?.checked_add(part)
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.unsigned_abs();
        if self.0 < 0 {
            f.write_str("-")?;
        }
        let decimal = |count: u64, unit: u64| {
            let width = unit.ilog10() as usize;
            let text = format!("{}.{:0width$}", count / unit, count % unit);
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        };
        match nanos {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{nanos}ns"),
            1_000..1_000_000 => write!(f, "{}µs", decimal(nanos, 1_000)),
            1_000_000..1_000_000_000 => write!(f, "{}ms", decimal(nanos, 1_000_000)),
            _ => {
                let second = SECOND.unsigned_abs();
                let (hours, minutes) = (nanos / (3600 * second), nanos / (60 * second) % 60);
                if hours > 0 {
                    write!(f, "{hours}h")?;
                }
                if hours > 0 || minutes > 0 {
                    write!(f, "{minutes}m")?;
                }
                if nanos.is_multiple_of(second) {
                    write!(f, "{}s", nanos / second % 60)
                } else {
                    write!(f, "{}s", decimal(nanos % (60 * second), second))
                }
            }
        }
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = GoDuration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a duration; {REMEDY}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
                if text.is_empty() { Ok(GoDuration::ZERO) } else { text.parse().map_err(E::custom) }
            }

            // A bare 0 needs no unit in Go's syntax either.
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<GoDuration, E> {
                if number == 0 {
                    Ok(GoDuration::ZERO)
                } else {
                    Err(E::custom(format!("{number} has no unit; {REMEDY}")))
                }
            }

            fn visit_unit<E: de::Error>(self) -> Result<GoDuration, E> {
                Ok(GoDuration::ZERO)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written_as_go_does() {
        for (text, nanos, written) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("15m", 900 * SECOND, "15m0s"),
            ("24h", 86_400 * SECOND, "24h0m0s"),
            ("1h30m", 5400 * SECOND, "1h30m0s"),
            ("1.5h", 5400 * SECOND, "1h30m0s"),
            ("90s", 90 * SECOND, "1m30s"),
            (".5s", SECOND / 2, "500ms"),
            ("1.s", SECOND, "1s"),
            ("1m1.5s", 61_500_000_000, "1m1.5s"),
            ("1500us", 1_500_000, "1.5ms"),
            ("7µs", 7000, "7µs"),
            ("12ns", 12, "12ns"),
            ("-30s", -30 * SECOND, "-30s"),
            ("+1s", SECOND, "1s"),
            ("1m1m", 120 * SECOND, "2m0s"),
        ] {
            let duration: GoDuration = text.parse().unwrap();
            assert_eq!((duration.0, duration.to_string().as_str()), (nanos, written), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", "5", "s", "1d", "1 s", "1h-5m", ".s", "1..5s", "-", "9999999999h", "1e3s"] {
            assert!(text.parse::<GoDuration>().unwrap_err().contains("write it like"), "{text}");
        }
    }
}
