//! What is wrong with a field of an object.

use std::fmt;

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
