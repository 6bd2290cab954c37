//! The one way to a cluster: kubeconfig, contexts and namespaces as kubectl has them.
//!
//! Always true: nothing is written to the cluster from here; what fails says what it was about,
//! why, and what to do; every wait for an answer is bounded.

#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod forward;
pub(crate) mod log;
mod proxy;
pub(crate) mod sidecars;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::GroupVersionKind;
use kube::{Api, Client, Config};
use serde::de::DeserializeOwned;
use sidegate_mesh::resource::Kind;

use crate::plugin::Called;

/// Longest wait for a connection to the cluster.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Objects that are asked for at once.
const PAGE: u32 = 500;

/// Which cluster.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterArgs {
    /// Kubeconfig file; default: those of KUBECONFIG, else ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig; default: its current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

impl ClusterArgs {
    /// Whether a cluster was named.
    pub(crate) fn is_given(&self) -> bool {
        self.kubeconfig.is_some() || self.context.is_some()
    }
}

/// Which namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every one.
    All,
    /// This one.
    Namespace(String),
}

impl Scope {
    /// The namespace, unless it is all.
    pub(crate) fn namespace(&self) -> Option<&str> {
        match self {
            Self::All => None,
            Self::Namespace(name) => Some(name),
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("any namespace"),
            Self::Namespace(name) => write!(f, "the namespace {name}"),
        }
    }
}

/// A cluster that can be asked. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    /// The context's namespace, else `default`.
    namespace: String,
    /// The context or the address, for messages.
    name: String,
}

impl Cluster {
    /// Reads the kubeconfig and makes a client; nothing is asked yet. Within a runtime only.
    ///
    /// # Errors
    ///
    /// When there is no kubeconfig, or what it says cannot be used.
    pub(crate) async fn connect(arguments: &ClusterArgs) -> anyhow::Result<Self> {
        let (mut config, name) = read_config(arguments).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config)
            .with_context(|| format!("the kubeconfig's cluster {name} cannot be used"))?;
        Ok(Self {
            client,
            namespace,
            name,
        })
    }

    /// A cluster behind a client that is there already.
    #[cfg(test)]
    pub(crate) fn behind(client: Client, namespace: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            name: "test".to_owned(),
        }
    }

    /// The client, for what has no helper here.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// The context's namespace.
    pub(crate) fn default_namespace(&self) -> &str {
        &self.namespace
    }

    /// All namespaces, the one that was named, or the context's.
    pub(crate) fn scope(&self, namespace: Option<&str>, all: bool) -> Scope {
        if all {
            return Scope::All;
        }
        Scope::Namespace(namespace.unwrap_or(&self.namespace).to_owned())
    }

    /// The objects of one type in a scope.
    pub(crate) fn api<K>(&self, scope: &Scope) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        match scope {
            Scope::All => Api::all(self.client()),
            Scope::Namespace(namespace) => Api::namespaced(self.client(), namespace),
        }
    }

    /// Resources of ours in a scope, untyped, so that one that cannot be read hides no other.
    pub(crate) fn resources(&self, kind: Kind, scope: &Scope) -> Api<DynamicObject> {
        let resource = api_resource(kind);
        match scope {
            Scope::All => Api::all_with(self.client(), &resource),
            Scope::Namespace(name) => Api::namespaced_with(self.client(), name, &resource),
        }
    }

    /// Lists all objects of `api`, page by page; `doing` says what for, such as "listing pods".
    ///
    /// # Errors
    ///
    /// When the cluster does not answer, or refuses.
    pub(crate) async fn list<K>(
        &self,
        api: &Api<K>,
        doing: &str,
        mut each: impl FnMut(K),
    ) -> anyhow::Result<()>
    where
        K: Clone + DeserializeOwned + std::fmt::Debug,
    {
        let mut parameters = ListParams::default().limit(PAGE);
        loop {
            let page = api.list(&parameters).await;
            let page = page.map_err(|error| self.explain(error, doing))?;
            page.items.into_iter().for_each(&mut each);
            match page.metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) => parameters.continue_token = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// An error of the cluster in words: what was being done, why it failed, what to do.
    pub(crate) fn explain(&self, error: kube::Error, doing: &str) -> anyhow::Error {
        let name = &self.name;
        match error {
            kube::Error::Api(status) if status.code == 401 => anyhow!(
                "{doing}: the cluster {name} does not accept your credentials; log in again, or \
                 choose another --context"
            ),
            kube::Error::Api(status) if status.code == 403 => anyhow!(
                "{doing}: forbidden: {}; ask whoever runs the cluster for that permission \
                 (`kubectl auth can-i` shows what you have)",
                status.message
            ),
            kube::Error::Api(status) if is_unknown_type(&status) => anyhow!(
                "{doing}: the cluster {name} does not know Sidegate's resources; install it first: \
                 `{} install | kubectl apply -f -`",
                Called::now().command()
            ),
            kube::Error::Api(status) => anyhow!("{doing}: {}", status.message),
            error @ kube::Error::Auth(_) => anyhow!(
                "{doing}: no credentials for the cluster {name}: {}; does `kubectl get pods` work?",
                innermost(&error)
            ),
            error @ (kube::Error::HyperError(_) | kube::Error::Service(_)) => anyhow!(
                "{doing}: the cluster {name} cannot be reached: {}; is it running, and is it the \
                 right --context?",
                innermost(&error)
            ),
            other => anyhow::Error::new(other).context(doing.to_owned()),
        }
    }
}

/// How the API server knows a kind of ours.
pub(crate) fn api_resource(kind: Kind) -> ApiResource {
    let plural = match kind {
        Kind::AuthorizationPolicy => "authorizationpolicies",
        Kind::StaticService => "staticservices",
        Kind::TrafficPolicy => "trafficpolicies",
    };
    let gvk = GroupVersionKind::gvk("sidegate.dev", "v1alpha1", kind.as_str());
    ApiResource::from_gvk_with_plural(&gvk, plural)
}

/// Whether an error of the API says that what was asked for is not there.
pub(crate) fn is_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether an error of the API will come again however often it is tried.
pub(crate) fn is_refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403))
}

/// An object that is not there is named in the message; a type that is not is answered in plain
/// text.
fn is_unknown_type(status: &kube::core::Status) -> bool {
    status.code == 404 && !status.message.contains('"')
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

async fn read_config(arguments: &ClusterArgs) -> anyhow::Result<(Config, String)> {
    let Some(kubeconfig) = read_kubeconfig(arguments)? else {
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() && !arguments.is_given() {
            let config = Config::incluster().context("the pod's own credentials cannot be used")?;
            return Ok((config, "around this pod".to_owned()));
        }
        bail!(
            "there is no kubeconfig: set KUBECONFIG, or give --kubeconfig FILE, as for kubectl \
             (a mesh on this machine is named with --dir)"
        );
    };
    let current = kubeconfig.current_context.clone();
    let Some(name) = arguments.context.clone().or(current) else {
        bail!("the kubeconfig has no current context: give --context NAME");
    };
    let mut known = kubeconfig.contexts.iter();
    if !known.any(|context| context.name == name) {
        let contexts = kubeconfig.contexts.iter();
        let names: Vec<_> = contexts.map(|context| context.name.as_str()).collect();
        bail!(
            "the kubeconfig has no context `{name}`, only: {}",
            names.join(", ")
        );
    }
    let options = KubeConfigOptions {
        context: Some(name.clone()),
        ..KubeConfigOptions::default()
    };
    let said = proxy::said_by(&kubeconfig, &name);
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .with_context(|| format!("the context `{name}` cannot be used"))?;
    let name = match proxy::choose(&mut config, said, &name)? {
        Some(proxy) => format!("{name} behind the proxy {proxy}"),
        None => name,
    };
    Ok((config, name))
}

/// The kubeconfig that was named, those of KUBECONFIG merged, or that of the home folder. A file
/// of several that is not there counts for nothing, as for kubectl.
fn read_kubeconfig(arguments: &ClusterArgs) -> anyhow::Result<Option<Kubeconfig>> {
    if let Some(path) = &arguments.kubeconfig {
        let shown = path.display();
        let read = Kubeconfig::read_from(path);
        return read
            .map(Some)
            .with_context(|| format!("the kubeconfig {shown} cannot be used"));
    }
    let listed = std::env::var_os("KUBECONFIG").unwrap_or_default();
    let mut paths: Vec<PathBuf> = std::env::split_paths(&listed).collect();
    paths.retain(|path| !path.as_os_str().is_empty());
    if paths.is_empty() {
        paths.extend(std::env::home_dir().map(|home| home.join(".kube").join("config")));
    }
    let mut merged: Option<Kubeconfig> = None;
    for path in paths {
        let next = match Kubeconfig::read_from(&path) {
            Err(KubeconfigError::ReadConfig(error, _))
                if error.kind() == io::ErrorKind::NotFound =>
            {
                continue;
            }
            read => {
                read.with_context(|| format!("the kubeconfig {} cannot be used", path.display()))?
            }
        };
        merged = Some(match merged {
            Some(before) => before
                .merge(next)
                .context("the files of KUBECONFIG do not fit together")?,
            None => next,
        });
    }
    Ok(merged)
}

#[cfg(test)]
mod tests;
