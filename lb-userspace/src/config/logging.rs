//! `logging`: how kube-proxy's log lines are written, as its configuration file says it.
//!
//! In, out: the section of the file. What of it concerns our own log is decided where the log is opened.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{duration::GoDuration, file::is_false};

/// The section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Logging {
    /// `text` or `json`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub format: String,
    /// How long lines may be held back; ours are not.
    pub flush_frequency: FlushFrequency,
    /// How much is said: kube-proxy's `-v`.
    pub verbosity: u32,
    /// The same for files of kube-proxy's sources, which we don't have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vmodule: Vec<VModule>,
    /// Experiments.
    pub options: FormatOptions,
}

/// An element of `vmodule`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VModule {
    /// Which files.
    pub file_pattern: String,
    /// How much.
    pub verbosity: u32,
}

/// `options`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FormatOptions {
    /// For format `json`.
    pub json: Routing,
    /// For format `text`.
    pub text: Routing,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Routing {
    /// Errors to the standard error, the rest to the standard output.
    #[serde(skip_serializing_if = "is_false")]
    pub split_stream: bool,
    /// A quantity of bytes.
    #[serde(deserialize_with = "quantity")]
    pub info_buffer_size: String,
}

impl Default for Routing {
    fn default() -> Self {
        Self { split_stream: false, info_buffer_size: "0".to_owned() }
    }
}

impl Logging {
    /// One of everything: which fields there are.
    pub(super) fn with_every_field() -> Self {
        let routing = Routing { split_stream: true, ..Routing::default() };
        Self {
            format: "text".to_owned(),
            vmodule: vec![VModule::default()],
            options: FormatOptions { json: routing.clone(), text: routing },
            ..Self::default()
        }
    }
}

/// `flushFrequency`: a duration, or a number of nanoseconds; it is written as it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushFrequency {
    /// How long.
    pub duration: GoDuration,
    /// Whether it is a duration's text.
    pub as_text: bool,
}

impl Serialize for FlushFrequency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.as_text { self.duration.serialize(serializer) } else { serializer.serialize_i64(self.duration.0) }
    }
}

impl<'de> Deserialize<'de> for FlushFrequency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Nanoseconds(i64),
            Text(GoDuration),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Nanoseconds(nanos) => Self { duration: GoDuration(nanos), as_text: false },
            Either::Text(duration) => Self { duration, as_text: true },
        })
    }
}

fn quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::Number(number) => number.to_string(),
        Either::Text(text) if text.is_empty() => "0".to_owned(),
        Either::Text(text) => text,
    })
}
