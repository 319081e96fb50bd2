//! What a test says to the API server. In: objects as JSON, paths. Out: what the API server answers. Every request is made in the
//! namespace of the control plane, on a connection of its own.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::netns::Netns;

/// A user of the API server.
#[derive(Clone, Debug)]
pub struct Api {
    netns: Netns,
    kubeconfig: PathBuf,
}

impl Api {
    /// A user by kubeconfig.
    pub fn new(netns: &Netns, kubeconfig: &Path) -> Self {
        Self { netns: netns.clone(), kubeconfig: kubeconfig.to_owned() }
    }

    /// What is at a path.
    pub fn get(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.text(path)?)?)
    }

    /// What is at a path, as text.
    pub fn text(&self, path: &str) -> Result<String> {
        self.send(Method::GET, path, "", &Value::Null)
    }

    /// Creates what is not kept under a name, such as a review, and returns the answer.
    pub fn create(&self, path: &str, object: &Value) -> Result<Value> {
        Ok(serde_json::from_str(&self.send(Method::POST, path, "application/json", object)?)?)
    }

    /// Creates an object, or makes it what is said; its status too, which the API server takes by a request of its own.
    pub fn put(&self, object: impl Into<Value>) {
        let mut object = object.into();
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("uid");
        }
        if let Some(containers) = object["spec"]["containers"].as_array_mut() {
            containers.iter_mut().for_each(|container| container["image"] = "server".into());
        }
        let folder = collection(&object);
        let path = format!("{folder}/{name}");
        let made = self.send(Method::POST, &folder, "application/json", &object);
        let status = object["status"].take();
        if let Err(error) = made {
            assert!(format!("{error:#}").contains("AlreadyExists"), "creating {path}: {error:#}");
            self.patch(&path, &object);
        }
        if !status.is_null() {
            self.patch(&format!("{path}/status"), &json!({"status": status}));
        }
    }

    /// Changes what a merge patch says.
    pub fn patch(&self, path: &str, patch: &Value) {
        self.send(Method::PATCH, path, "application/merge-patch+json", patch)
            .unwrap_or_else(|error| panic!("changing {path}: {error:#}"));
    }

    /// Deletes what is at a path, at once.
    pub fn delete(&self, path: &str) {
        let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0});
        self.send(Method::DELETE, path, "application/json", &options)
            .unwrap_or_else(|error| panic!("deleting {path}: {error:#}"));
    }

    /// Waits until what is at a path is as wanted.
    pub fn until(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let now = self.get(path);
            match &now {
                Ok(value) if wanted(value) => return now.unwrap_or_default(),
                _ => assert!(start.elapsed() < Duration::from_secs(20), "{path} is not as it should be: {now:?}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn send(&self, method: Method, path: &str, content_type: &str, body: &Value) -> Result<String> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let mut request = Request::builder().method(method).uri(path);
        if !content_type.is_empty() {
            request = request.header("content-type", content_type);
        }
        let request = request.body(body).context("a path that is no path")?;
        self.netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let file = Kubeconfig::read_from(&self.kubeconfig)?;
                let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
                Ok(Client::try_from(config)?.request_text(request).await?)
            })
        })
    }
}

/// The path of the collection that an object belongs to.
fn collection(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let root = if version.contains('/') { "apis" } else { "api" };
    let namespace = object["metadata"]["namespace"].as_str();
    let namespace = namespace.map(|namespace| format!("namespaces/{namespace}/")).unwrap_or_default();
    format!("/{root}/{version}/{namespace}{}s", kind.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_tells_where_it_belongs() {
        for (version, kind, namespace, path) in [
            ("v1", "Service", json!("a"), "/api/v1/namespaces/a/services"),
            ("v1", "Node", json!(null), "/api/v1/nodes"),
            (
                "discovery.k8s.io/v1",
                "EndpointSlice",
                json!("a"),
                "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices",
            ),
        ] {
            let object = json!({"apiVersion": version, "kind": kind, "metadata": {"namespace": namespace}});
            assert_eq!(collection(&object), path);
        }
    }
}
