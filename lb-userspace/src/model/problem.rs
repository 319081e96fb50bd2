//! What is wrong with a field of an object.

use std::{borrow::Cow, fmt};

/// A field that can't be used, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The way to the field, as `kubectl explain` writes it, with indices: `spec.ports[0].port`.
    pub field: String,
    /// What is wrong and what helps.
    pub message: String,
}

impl FieldError {
    /// A field's error.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Text that writes over nothing, where it is shown: others' words may hold what a terminal obeys.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.contains(char::is_control) {
        let escape = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
        return Cow::Owned(text.chars().map(escape).collect());
    }
    Cow::Borrowed(text)
}

/// Whether this may be a part of a Service port's name: it is written between `/` and `:`, and shown.
pub fn is_name(text: &str) -> bool {
    !text.contains(|c: char| c.is_control() || c == '/' || c == ':')
}
