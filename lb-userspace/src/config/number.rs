//! Numbers and truth values on a command line, as Go reads them.
//!
//! In: text. Out: the value that `strconv.ParseInt` (base 0) and `strconv.ParseBool` give, or what helps.

/// A truth value: `true`, `false` and the short forms that Go takes.
///
/// # Errors
///
/// It is none of them.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// A whole number: decimal, or with a prefix 0x, 0o (or 0), 0b; `_` may stand between digits.
pub(super) fn integer(text: &str) -> Result<i32, String> {
    let wrong = || format!("write a whole number from {} to {}", i32::MIN, i32::MAX);
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = rest.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let prefixed = radix != 10;
    let apart = digits.strip_prefix('_').filter(|_| prefixed).unwrap_or(digits);
    if apart.is_empty() || apart.starts_with(['_', '+', '-']) || apart.ends_with('_') || apart.contains("__") {
        return Err(wrong());
    }
    i32::from_str_radix(&format!("{sign}{}", apart.replace('_', "")), radix).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_does() {
        for (text, want) in [
            ("0", Some(0)),
            ("-999", Some(-999)),
            ("+5", Some(5)),
            ("0x10", Some(16)),
            ("0b11", Some(3)),
            ("0o17", Some(15)),
            ("017", Some(15)),
            ("1_000", Some(1000)),
            ("0x_ff", Some(255)),
            ("-0x1", Some(-1)),
            ("2147483647", Some(i32::MAX)),
            ("2147483648", None),
            ("", None),
            ("1.5", None),
            ("1__0", None),
            ("_1", None),
            ("1_", None),
            ("08", None),
            ("--1", None),
            ("0x", None),
            ("ten", None),
        ] {
            assert_eq!(integer(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn truth_has_go_s_names() {
        for (text, want) in
            [("true", Some(true)), ("T", Some(true)), ("0", Some(false)), ("False", Some(false)), ("yes", None)]
        {
            assert_eq!(boolean(text).ok(), want, "{text}");
        }
    }
}
