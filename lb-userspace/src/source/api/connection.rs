//! The way to the API server.
//!
//! In: a kubeconfig, a URL, or nothing, in a pod. Out: a client. Tokens and CAs that are files are read again as they are rotated.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use axum::http::{HeaderValue, Uri, header::USER_AGENT};
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::layer::layer_fn;

use super::requests::{Counted, Requests};

/// The API server sends something into every watch once a minute; so long without anything, the connection is dead.
const SILENCE: Duration = Duration::from_secs(120);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);

/// Where the API server is, and how to be let in. With neither, the agent is a pod with a service account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// A kubeconfig file.
    pub kubeconfig: Option<PathBuf>,
    /// The URL, which wins over the kubeconfig's.
    pub master: Option<String>,
}

impl Address {
    /// What kube needs to know.
    ///
    /// # Errors
    ///
    /// When files are missing or can't be read, or there is nothing to go by.
    pub async fn config(&self) -> Result<Config> {
        let mut config = match (&self.kubeconfig, &self.master) {
            (Some(path), _) => {
                let told = || format!("{}: the kubeconfig can't be used", path.display());
                let file = Kubeconfig::read_from(path).with_context(told)?;
                let options = KubeConfigOptions::default();
                let ca = authority(&file);
                let config = Config::from_custom_kubeconfig(file, &options).await.with_context(told)?;
                with_authority(config, ca)
            }
            (None, Some(_)) => Config::new(Uri::default()),
            (None, None) => Config::incluster_env().context(
                "where the API server is can't be told: name a --kubeconfig, or run as a pod with a service account",
            )?,
        };
        if let Some(master) = &self.master {
            config.cluster_url = master.parse().with_context(|| format!("--master {master}: no URL"))?;
        }
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(SILENCE);
        config.reset_reader_on_write = true;
        let agent = HeaderValue::from_static(concat!("fairlead/", env!("CARGO_PKG_VERSION")));
        config.headers.push((USER_AGENT, agent));
        Ok(config)
    }

    /// A client whose `requests` are counted, and the URL that it goes to. `answered` hears of every request that succeeds.
    ///
    /// # Errors
    ///
    /// As [`Self::config`].
    pub async fn client(
        &self,
        requests: &Requests,
        answered: impl Fn() + Clone + Send + 'static,
    ) -> Result<(Client, String)> {
        let config = self.config().await?;
        let url = config.cluster_url.to_string();
        let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
        let requests = requests.clone();
        let layer = layer_fn(move |inner| Counted {
            inner,
            requests: requests.clone(),
            host: host.clone(),
            answered: answered.clone(),
        });
        let client = ClientBuilder::try_from(config).context("the client can't be made")?.with_layer(&layer).build();
        Ok((client, url.trim_end_matches('/').to_owned()))
    }
}

/// The file with the CA of the current context's cluster, if it is a file.
fn authority(file: &Kubeconfig) -> Option<PathBuf> {
    let current = file.current_context.as_deref()?;
    let context = file.contexts.iter().find(|context| context.name == current)?.context.as_ref()?;
    let cluster = file.clusters.iter().find(|cluster| cluster.name == context.cluster)?.cluster.as_ref()?;
    // Data in the kubeconfig itself win over a file.
    let inline = cluster.certificate_authority_data.is_some();
    cluster.certificate_authority.as_ref().filter(|_| !inline).map(PathBuf::from)
}

fn with_authority(mut config: Config, file: Option<PathBuf>) -> Config {
    config.root_cert_file = file;
    config
}
