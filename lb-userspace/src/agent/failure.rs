//! Something that is wrong until it isn't.
//!
//! In: errors of one kind of work, as it is tried again and again. Out: whether one is news; what to list as long as it lasts.

use anyhow::Error;

/// What is wrong with one kind of work, if anything is.
#[derive(Debug, Default)]
pub struct Failure(Option<String>);

impl Failure {
    /// The work failed. Answers what to say, unless that was the last thing said.
    pub fn news(&mut self, error: &Error) -> Option<&str> {
        let text = format!("{error:#}");
        if self.0.as_ref() == Some(&text) {
            return None;
        }
        Some(self.0.insert(text))
    }

    /// The work succeeded.
    pub fn ends(&mut self) {
        self.0 = None;
    }

    /// What lasts, under a heading.
    pub fn lasting(&self, heading: &str) -> Option<String> {
        self.0.as_ref().map(|text| format!("{heading}: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn one_cause_is_said_once_until_it_ends() {
        let mut failure = Failure::default();
        assert_eq!(failure.lasting("tables"), None);
        assert_eq!(failure.news(&anyhow!("full").context("map SLOTS")), Some("map SLOTS: full"));
        assert_eq!(failure.news(&anyhow!("full").context("map SLOTS")), None);
        assert_eq!(failure.news(&anyhow!("gone")), Some("gone"));
        assert_eq!(failure.lasting("tables").as_deref(), Some("tables: gone"));
        failure.ends();
        assert_eq!((failure.lasting("tables"), failure.news(&anyhow!("gone"))), (None, Some("gone")));
    }
}
