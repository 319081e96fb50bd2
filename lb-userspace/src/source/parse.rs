//! The text of a file becomes objects.
//!
//! In: YAML or JSON, with several documents and lists. Out: [`Parsed`]: the objects, and a [`Problem`] for each one that can't be
//! used. A bad document costs itself and no other.

mod yaml;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

use super::{Problem, check};
use crate::model::{FieldError, Interner, Kind, Object, ObjectName, PodState, SliceState, is_name, object};

/// With which some editors begin a file.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// So many lists may stand in one another. Tools write one.
const MOST_LISTS: usize = 8;

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// Objects, with the number of the document each stands in.
    pub objects: Vec<(usize, Object)>,
    /// Objects that the file names and that can't be used: they keep what they said before.
    pub kept: Vec<(usize, Kind, ObjectName)>,
    /// Some part of the file can't be told to be any object: no object that was in the file may be taken for deleted.
    pub unidentified: bool,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Objects of other kinds.
    pub skipped: usize,
}

/// Reads a file's text. Several threads may do so with one interner.
pub(super) fn parse(file: &Path, bytes: &[u8], interner: &Mutex<Interner>) -> Parsed {
    let mut parser = Parser { file, document: 1, interner, parsed: Parsed::default() };
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    if file.extension().is_some_and(|extension| extension == "json") {
        parser.json(bytes);
    } else {
        parser.yaml(bytes);
    }
    parser.parsed
}

/// What tells what a document is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head<T> {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<HeadMetadata>,
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
struct HeadMetadata {
    name: Option<String>,
    namespace: Option<String>,
}

/// A document of which only the outline is known.
trait Outline: Sized {
    fn head(&self) -> Result<Head<Self>, FieldError>;
    fn read<T: DeserializeOwned>(&self) -> Result<T, FieldError>;
}

impl Outline for &RawValue {
    fn head(&self) -> Result<Head<Self>, FieldError> {
        serde_json::from_str(self.get()).map_err(|_| located(&mut serde_json::Deserializer::from_str(self.get())))
    }

    fn read<T: DeserializeOwned>(&self) -> Result<T, FieldError> {
        // The way to a bad field costs time, and is looked for only where there is one.
        serde_json::from_str(self.get())
            .map_err(|_| path_to_error::<T, _>(&mut serde_json::Deserializer::from_str(self.get())))
    }
}

impl Outline for Value {
    fn head(&self) -> Result<Head<Self>, FieldError> {
        Head::deserialize(self).map_err(|_| located(self))
    }

    fn read<T: DeserializeOwned>(&self) -> Result<T, FieldError> {
        T::deserialize(self).map_err(|_| path_to_error::<T, _>(self))
    }
}

fn located<'de, D: Deserializer<'de>>(deserializer: D) -> FieldError {
    path_to_error::<Head<serde::de::IgnoredAny>, _>(deserializer)
}

fn path_to_error<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> FieldError {
    match serde_path_to_error::deserialize::<_, T>(deserializer) {
        Ok(_) => FieldError::new("", "unreadable; write it as kubectl prints it"),
        Err(error) => {
            let path = error.path().to_string();
            FieldError::new(if path == "." { String::new() } else { path }, remedy(&error.inner().to_string()))
        }
    }
}

/// Adds what helps to what serde says.
fn remedy(message: &str) -> String {
    // The position is that within the object, not that within the file.
    let message = message.split(" at line ").next().unwrap_or(message);
    let help = if message.contains("PortRef") {
        return "no port; write a number from 1 to 65535 or the name of a container port".into();
    } else if message.contains("expected u16") {
        "write a number from 0 to 65535"
    } else if message.contains("expected a string") {
        "put the value into quotes"
    } else if message.contains("expected one of") {
        "write one of them"
    } else {
        "correct it (`kubectl explain` shows the field)"
    };
    format!("{message}; {help}")
}

struct Parser<'a> {
    file: &'a Path,
    document: usize,
    interner: &'a Mutex<Interner>,
    parsed: Parsed,
}

/// Where an object stands in its document, and what its list says it is.
#[derive(Clone, Default)]
struct Place {
    prefix: String,
    kind: Option<String>,
    api_version: Option<String>,
    /// Lists around it.
    lists: usize,
}

impl Parser<'_> {
    fn json(&mut self, bytes: &[u8]) {
        let Some(text) = self.text(bytes, 0) else { return };
        for document in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
            match document {
                Ok(document) => self.object(&document, &Place::default()),
                Err(error) => self.unidentified(format!("{error}; what follows is not read, correct the JSON")),
            }
            self.document += 1;
        }
    }

    /// The text of bytes that stand behind so many lines.
    fn text<'a>(&mut self, bytes: &'a [u8], lines: usize) -> Option<&'a str> {
        let text = str::from_utf8(bytes);
        text.map_err(|error| {
            let line = 1 + lines + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            self.unidentified(format!("no UTF-8 (line {line}); save the file as UTF-8"));
        })
        .ok()
    }

    fn yaml(&mut self, bytes: &[u8]) {
        for (line, document) in yaml::documents(bytes) {
            match self.text(document, line).map(|text| yaml::value(text, line)) {
                None | Some(Ok(Value::Null)) => {}
                Some(Ok(value)) => self.object(&value, &Place::default()),
                Some(Err(message)) => self.unidentified(message),
            }
            self.document += 1;
        }
    }

    fn object<T: Outline>(&mut self, outline: &T, place: &Place) {
        let head = match outline.head() {
            Ok(head) => head,
            Err(error) => {
                self.parsed.unidentified = true;
                return self.problem(None, place, error);
            }
        };
        let kind = head.kind.filter(|kind| !kind.is_empty()).or_else(|| place.kind.clone());
        let api_version = head.api_version.filter(|version| !version.is_empty()).or_else(|| place.api_version.clone());
        let metadata = head.metadata.unwrap_or_default();
        let (Some(kind), Some(api_version)) = (kind, api_version) else {
            self.parsed.unidentified = true;
            let message = "kind or apiVersion is missing; write both, like `kind: Service` and `apiVersion: v1`";
            return self.problem(None, place, FieldError::new("", message));
        };
        if let Some(element) = kind.strip_suffix("List")
            && let Some(items) = head.items
        {
            if place.lists == MOST_LISTS {
                self.parsed.unidentified = true;
                let message = format!("more than {MOST_LISTS} lists in one another; write the objects into one list");
                return self.problem(None, place, FieldError::new("items", message));
            }
            let named = (!element.is_empty()).then(|| (element.to_owned(), api_version));
            let (kind, api_version) = named.unzip();
            for (index, item) in items.iter().enumerate() {
                let prefix = format!("{}items[{index}].", place.prefix);
                let (kind, api_version) = (kind.clone(), api_version.clone());
                self.object(item, &Place { prefix, kind, api_version, lists: place.lists + 1 });
            }
            return;
        }
        let group = |version: &str| version.rsplit_once('/').map(|(group, _)| group.to_owned());
        let known = Kind::from_name(&kind).filter(|kind| group(kind.api_version()) == group(&api_version));
        let Some(known) = known else {
            self.parsed.skipped += 1;
            return;
        };
        let (namespace, own_name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
        let name = object::Metadata { name: ObjectName::new(&namespace, &own_name), ..object::Metadata::default() };
        let name = match known {
            Kind::Service | Kind::EndpointSlice | Kind::Pod => name.namespaced(),
            Kind::Node | Kind::ServiceCidr => name.cluster_wide(),
        };
        if api_version != known.api_version() {
            self.parsed.skipped += 1;
            let message = format!("{api_version:?} is not read; write {:?}", known.api_version());
            return self.problem(Some((known, &name)), place, FieldError::new("apiVersion", message));
        }
        for (field, text) in [("metadata.namespace", &namespace), ("metadata.name", &own_name)] {
            if !is_name(text) {
                self.parsed.unidentified = true;
                let message = format!("{text:?} is no name; write letters, digits, `-` and `.`");
                return self.problem(Some((known, &name)), place, FieldError::new(field, message));
            }
        }
        if name.name().is_empty() {
            self.parsed.unidentified = true;
            let error = FieldError::new("metadata.name", "missing; give the object a name");
            return self.problem(Some((known, &name)), place, error);
        }
        match read(outline, known, self.interner) {
            Ok((object, errors)) => {
                self.parsed.objects.push((self.document, object));
                errors.into_iter().for_each(|error| self.problem(Some((known, &name)), place, error));
            }
            Err(errors) => {
                self.parsed.kept.push((self.document, known, name.clone()));
                errors.into_iter().for_each(|error| self.problem(Some((known, &name)), place, error));
            }
        }
    }

    fn problem(&mut self, object: Option<(Kind, &ObjectName)>, place: &Place, error: FieldError) {
        let field = format!("{}{}", place.prefix, error.field);
        let field = field.trim_end_matches('.');
        self.parsed.problems.push(Problem {
            file: self.file.to_owned(),
            document: Some(self.document),
            object: object.map(|(kind, name)| format!("{kind} {name}").trim_end().to_owned()),
            field: (!field.is_empty()).then(|| field.to_owned()),
            message: error.message,
        });
    }

    fn unidentified(&mut self, message: String) {
        self.parsed.unidentified = true;
        self.problem(None, &Place::default(), FieldError::new("", message));
    }
}

/// An object as the API server writes it, and what is wrong with parts of it, or what is wrong with all of it.
pub(super) fn read_json(
    text: &RawValue,
    kind: Kind,
    interner: &Mutex<Interner>,
) -> Result<(Object, Vec<FieldError>), Vec<FieldError>> {
    read(&text, kind, interner)
}

/// For a moment: other threads read other files.
fn lock(interner: &Mutex<Interner>) -> MutexGuard<'_, Interner> {
    interner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The object and what is wrong with parts of it, or what is wrong with all of it.
fn read<T: Outline>(
    outline: &T,
    kind: Kind,
    interner: &Mutex<Interner>,
) -> Result<(Object, Vec<FieldError>), Vec<FieldError>> {
    let one = |error| vec![error];
    Ok(match kind {
        Kind::Service => {
            let mut service: object::Service = outline.read().map_err(one)?;
            let errors = check::service(&service);
            if !errors.is_empty() {
                return Err(errors);
            }
            service.shrink(&mut lock(interner));
            (Object::Service(Box::new(service)), Vec::new())
        }
        Kind::EndpointSlice => {
            let slice = outline.read().map_err(one)?;
            let (slice, errors) = SliceState::new(&slice, &mut lock(interner));
            (Object::EndpointSlice(Box::new(slice)), errors)
        }
        Kind::Pod => {
            let pod = outline.read().map_err(one)?;
            let (pod, errors) = PodState::new(&pod, &mut lock(interner));
            (Object::Pod(Arc::new(pod)), errors)
        }
        Kind::Node => {
            let node: object::Node = outline.read().map_err(one)?;
            let errors = check::node(&node);
            (Object::Node(Box::new(node)), errors)
        }
        Kind::ServiceCidr => {
            let cidr: object::ServiceCidr = outline.read().map_err(one)?;
            let errors = check::service_cidr(&cidr);
            (Object::ServiceCidr(Box::new(cidr)), errors)
        }
    })
}
