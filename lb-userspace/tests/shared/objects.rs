//! Manifests as JSON become objects of the model. In: a value that is right. Out: the object; panics tell what is not.

use fairlead::model::{EndpointSlice, Interner, Kind, Object, ObjectName, Pod, PodState, SliceState};
use serde_json::Value;

/// The object that a manifest stands for.
pub fn object(value: &Value, interner: &mut Interner) -> Object {
    fn of<T: serde::de::DeserializeOwned>(value: &Value) -> T {
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
    }
    match kind(value) {
        Kind::Service => Object::Service(of(value)),
        Kind::Node => Object::Node(of(value)),
        Kind::ServiceCidr => Object::ServiceCidr(of(value)),
        Kind::EndpointSlice => Object::EndpointSlice(SliceState::new(&of::<EndpointSlice>(value), interner).0.into()),
        Kind::Pod => Object::Pod(PodState::new(&of::<Pod>(value), interner).0.into()),
    }
}

/// What kind of object it is.
pub fn kind(value: &Value) -> Kind {
    value["kind"].as_str().and_then(Kind::from_name).unwrap_or_else(|| panic!("no kind: {value}"))
}

/// What stands for the object in a deletion.
pub fn key(value: &Value) -> (Kind, ObjectName) {
    let object = object(value, &mut Interner::default());
    (object.kind(), object.name())
}
