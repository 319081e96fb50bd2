//! YAML becomes values.
//!
//! In: a stream's bytes, one document of it. Out: the documents, each its [`Value`]. A file may be as large as the cluster, but a
//! few lines with `&` and `*` can say a thing a billion times: what that takes is bounded.

use std::{cell::Cell, fmt};

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{DefaultMessageFormatter, Error, MessageFormatter as _, Options, budget::BudgetBreach};

/// How deep lists and maps may stand in one another: each takes its part of the stack. Objects that are read here go to ten, the
/// schemas of others to forty.
const MOST_DEPTH: usize = 64;

/// How many scalars, lists and maps `*` may say again in a document, ...
const MOST_REPEATED: usize = 100_000;

/// ... and how much text.
const MOST_REPEATED_TEXT: usize = 16 << 20;

/// What a document says, or what is wrong with it, where, and what helps. `line` is the number of lines before it.
pub(super) fn value(document: &str, line: usize) -> Result<Value, String> {
    // An escape takes fewer bytes than what it stands for, but not half of them.
    let text = Cell::new(MOST_REPEATED_TEXT.saturating_add(2 * document.len()));
    serde_saphyr::with_deserializer_from_str_with_options(document, options(), |deserializer| {
        Counted(&text).read(deserializer)
    })
    .map_err(|error| {
        let at = error
            .location()
            .map_or_else(String::new, |at| format!(" (line {}, column {})", at.line() + line as u64, at.column()));
        let (what, remedy) = trouble(&error);
        format!("{what}{at}; {remedy}")
    })
}

fn options() -> Options {
    let budget = serde_saphyr::budget! {
        max_events: usize::MAX,
        max_nodes: usize::MAX,
        max_total_scalar_bytes: usize::MAX,
        max_depth: MOST_DEPTH,
        max_aliases: MOST_REPEATED,
        max_anchors: MOST_REPEATED,
        max_merge_keys: MOST_REPEATED,
        max_recorded_anchor_events: MOST_REPEATED,
        max_recorded_anchor_bytes: MOST_REPEATED_TEXT,
        enforce_alias_anchor_ratio: false,
    };
    let alias_limits = serde_saphyr::alias_limits! { max_total_replayed_events: MOST_REPEATED };
    serde_saphyr::options! { budget: budget, alias_limits: alias_limits, with_snippet: false }
}

const REPEATED: &str = "`*` says too much again";

/// What is wrong, without the place, and what helps.
fn trouble(mut error: &Error) -> (String, &'static str) {
    while let Error::AliasError { error: inner, .. } | Error::WithSnippet { error: inner, .. } = error {
        error = inner;
    }
    if matches!(error, Error::Budget { breach: BudgetBreach::Depth { .. }, .. }) {
        return (format!("more than {MOST_DEPTH} lists and maps in one another"), "write it flatter");
    }
    let repeated = matches!(
        error,
        Error::AliasReplayLimitExceeded { .. } | Error::AliasReplayStackDepthExceeded { .. } | Error::Budget { .. }
    );
    let text = if repeated { REPEATED.into() } else { DefaultMessageFormatter.format_message(error) };
    if text == REPEATED {
        return (text.into_owned(), "write out what it stands for, or fewer objects into one document");
    }
    (text.lines().next().unwrap_or_default().to_owned(), "correct the YAML")
}

/// Reads a value, and counts its text down.
#[derive(Clone, Copy)]
struct Counted<'a>(&'a Cell<usize>);

impl Counted<'_> {
    fn read<'de, D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn text<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.0.set(self.0.get().checked_sub(text.len()).ok_or_else(|| E::custom(REPEATED))?);
        Ok(())
    }
}

impl<'de> de::DeserializeSeed<'de> for Counted<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.read(deserializer)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has too")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        self.text(text)?;
        Ok(text.into())
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
        self.text(&text)?;
        Ok(text.into())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.read(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = access.next_element_seed(self)? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            self.text(&key)?;
            map.insert(key, access.next_value_seed(self)?);
        }
        Ok(map.into())
    }
}

/// The documents of a stream that hold anything, with the number of lines before each. A line of `---` ends a document
/// wherever it stands, so that a broken one doesn't hide the next.
pub(super) fn documents(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let marker = line.strip_prefix(b"---").is_some_and(|rest| rest.first().is_none_or(u8::is_ascii_whitespace));
        if marker && holds_anything(&bytes[start..at]) {
            documents.push((start_line, &bytes[start..at]));
            (start, start_line) = (at, number);
        } else if marker {
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    if holds_anything(&bytes[start..]) {
        documents.push((start_line, &bytes[start..]));
    }
    documents
}

fn holds_anything(document: &[u8]) -> bool {
    document.split(|byte| *byte == b'\n').any(|line| {
        let line = line.strip_prefix(b"---").unwrap_or(line).trim_ascii();
        !line.is_empty() && !line.starts_with(b"#") && line != b"..." && !line.starts_with(b"%")
    })
}
