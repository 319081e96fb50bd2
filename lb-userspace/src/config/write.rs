//! The configuration in force, as kube-proxy writes it.
//!
//! In: a [`Config`]. Out: the tree of `v1alpha1`, for `/configz`, and the YAML of `--write-config-to`: sorted fields, `null`
//! where nothing is said, text in quotes only where it would be taken for something else.

use std::fmt::Write as _;

use serde_json::Value;

use super::{
    Config, KubeProxyConfiguration,
    file::{API_VERSION, KIND},
};
use crate::plan::node::ProxyMode;

impl Config {
    /// The file that says all that is in force. Of the modes' sections, only that of the mode is filled.
    #[must_use]
    pub fn versioned(&self) -> KubeProxyConfiguration {
        let mut file = self.fields.clone();
        let (sync, min) = match self.mode() {
            ProxyMode::Iptables => (&mut file.iptables.sync_period, &mut file.iptables.min_sync_period),
            ProxyMode::Ipvs => (&mut file.ipvs.sync_period, &mut file.ipvs.min_sync_period),
            ProxyMode::Nftables => (&mut file.nftables.sync_period, &mut file.nftables.min_sync_period),
        };
        (*sync, *min) = (self.sync_period, self.min_sync_period);
        match self.mode() {
            ProxyMode::Nftables => file.nftables.masquerade_all = self.masquerade_all,
            ProxyMode::Iptables | ProxyMode::Ipvs => file.iptables.masquerade_all = self.masquerade_all,
        }
        file
    }

    /// The same as a tree; `/configz` shows it under `kubeproxy.config.k8s.io`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut tree = serde_json::to_value(self.versioned()).unwrap_or_default();
        if let Value::Object(fields) = &mut tree {
            fields.insert("apiVersion".to_owned(), API_VERSION.into());
            fields.insert("kind".to_owned(), KIND.into());
        }
        tree
    }

    /// The same as text; reading it again gives the same configuration.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        yaml(&self.to_json())
    }
}

/// A tree as text: the YAML that Kubernetes' own programs write.
#[must_use]
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

/// Writes a mapping or a list whose lines begin at this column.
fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            for (index, (name, value)) in fields.into_iter().enumerate() {
                // The first field of a list's element stands behind its dash.
                let column = if index == 0 && out.ends_with("- ") { 0 } else { indent };
                let _ = write!(out, "{:column$}{}:", "", scalar(name));
                // Lists begin at their field's column, as kube-proxy writes them.
                let below = indent + if value.is_object() { 2 } else { 0 };
                behind(value, below, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                let _ = write!(out, "{:indent$}- ", "");
                match item {
                    Value::Object(fields) if !fields.is_empty() => block(item, indent + 2, out),
                    Value::Object(_)
                    | Value::Array(_)
                    | Value::Null
                    | Value::Bool(_)
                    | Value::Number(_)
                    | Value::String(_) => {
                        let _ = writeln!(out, "{}", inline(item));
                    }
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(out, "{}", inline(value));
        }
    }
}

fn behind(value: &Value, indent: usize, out: &mut String) {
    let empty = value.as_object().is_some_and(|it| it.is_empty()) || value.as_array().is_some_and(Vec::is_empty);
    if !empty && (value.is_object() || value.is_array()) {
        out.push('\n');
        block(value, indent, out);
    } else {
        out.push(' ');
        fold(&inline(value), indent + 2, out);
        out.push('\n');
    }
}

/// Writes a value; a long one goes on in the next line after the first space behind column 80, as go-yaml does it.
fn fold(text: &str, indent: usize, out: &mut String) {
    let mut column = out.len() - out.rfind('\n').map_or(0, |at| at + 1);
    let may_fold = !text.starts_with(['"', '[', '{']);
    let mut rest = text.chars().peekable();
    let mut last = ' ';
    while let Some(letter) = rest.next() {
        let next = rest.peek().copied().unwrap_or(' ');
        if may_fold && letter == ' ' && column > 80 && last != ' ' && next != ' ' {
            let _ = write!(out, "\n{:indent$}", "");
            column = indent;
        } else {
            out.push(letter);
            column += 1;
        }
        last = letter;
    }
}

fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

/// Text, in quotes where YAML would read something else without.
fn scalar(text: &str) -> String {
    let resolves = text.is_empty()
        || ["~", "null", "Null", "NULL", "<<", "="].contains(&text)
        || ["y", "n", "yes", "no", "on", "off", "true", "false", ".nan", ".inf", "-.inf", "+.inf"]
            .contains(&text.to_lowercase().as_str())
        || text.replace('_', "").parse::<f64>().is_ok()
        || ["0x", "0o", "0b"].iter().any(|prefix| text.trim_start_matches(['-', '+']).starts_with(prefix));
    if resolves || text.chars().any(char::is_control) {
        // JSON's escapes are YAML's, too.
        return Value::from(text).to_string();
    }
    let starts = text
        .starts_with([' ', '#', ',', '[', ']', '{', '}', '&', '*', '!', '|', '>', '\'', '"', '%', '@', '`'])
        || text.starts_with(['-', '?']) && (text.len() == 1 || text[1..].starts_with(' '));
    if starts || text.ends_with([' ', ':']) || text.contains(": ") || text.contains(" #") {
        return format!("'{}'", text.replace('\'', "''"));
    }
    text.to_owned()
}
