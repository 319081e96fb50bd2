//! An object as it came, not understood yet.
//!
//! In: any JSON object. Out: its name and version, and its text. kube's watcher gives up a whole list when one object of it can't
//! be read; this can always be read, and what it says is looked at one by one.

use std::borrow::Cow;

use kube::{
    Resource,
    core::{DynamicResourceScope, ObjectMeta},
};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::model::{Kind, ObjectName, object::Metadata};

/// An object of some kind.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    meta: ObjectMeta,
    /// Its text.
    pub text: Box<RawValue>,
}

#[derive(Default, Deserialize)]
struct Head {
    metadata: HeadMetadata,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct HeadMetadata {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
}

impl Raw {
    /// Its name.
    pub(super) fn name(&self, kind: Kind) -> ObjectName {
        let text = |text: &'_ Option<String>| text.as_deref().unwrap_or_default().to_owned();
        let name = ObjectName::new(&text(&self.meta.namespace), &text(&self.meta.name));
        let metadata = Metadata { name, ..Metadata::default() };
        match kind {
            Kind::Service | Kind::EndpointSlice | Kind::Pod => metadata.namespaced(),
            Kind::Node | Kind::ServiceCidr => metadata.cluster_wide(),
        }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let HeadMetadata { name, namespace, resource_version } =
            serde_json::from_str::<Head>(text.get()).unwrap_or_default().metadata;
        Ok(Self { meta: ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() }, text })
    }
}

impl Resource for Raw {
    type DynamicType = Kind;
    type Scope = DynamicResourceScope;

    fn kind(kind: &Kind) -> Cow<'_, str> {
        kind.as_str().into()
    }

    fn group(kind: &Kind) -> Cow<'_, str> {
        kind.group().into()
    }

    fn version(kind: &Kind) -> Cow<'_, str> {
        kind.version().into()
    }

    fn plural(kind: &Kind) -> Cow<'_, str> {
        kind.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
