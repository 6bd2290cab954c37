//! The shop in a mesh: its services, a sidecar beside each, and the resources that connect them.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use sidegate_local::{LocalError, LocalMesh, LocalSidecar, Member, ServicePort};
use sidegate_mesh::{
    Ask, Caller, CanonicalPath, Clock, HttpAsk, Snapshot, SpiffeId, SpiffeIdError, TrustDomain,
};

use crate::shop::{Running, inventory, ledger, orders, web};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// The ledger, as callers name it.
pub const LEDGER: &str = "ledger.shop:6379";

/// Policies that are written once, and then belong to whoever edits them.
const POLICIES: &[(&str, &str)] = &[
    ("orders.yaml", include_str!("../resources/shop/orders.yaml")),
    (
        "inventory.yaml",
        include_str!("../resources/shop/inventory.yaml"),
    ),
    ("ledger.yaml", include_str!("../resources/shop/ledger.yaml")),
];

/// Why the shop could not open.
#[derive(Debug, thiserror::Error)]
pub enum ShopError {
    /// A service could not listen.
    #[error("{service} could not listen")]
    Service {
        /// Which.
        service: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The mesh around it.
    #[error(transparent)]
    Mesh(#[from] LocalError),
    /// The trust domain is not one.
    #[error("{0}")]
    TrustDomain(#[from] SpiffeIdError),
    /// `demo.json` could not be written.
    #[error("cannot write {}", path.display())]
    Description {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A sidecar lacks what it was asked for: an error in this crate.
    #[error("no sidecar of {0}")]
    Missing(&'static str),
}

/// The shop, running.
pub struct Shop {
    mesh: LocalMesh,
    services: Vec<(&'static str, Running)>,
}

/// `demo.json`: every address of a running demo.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// The watched folder of resources.
    pub resources: PathBuf,
    /// Where identities come from.
    pub ca: CaDescription,
    /// One entry a sidecar.
    pub sidecars: Vec<SidecarDescription>,
}

/// The CA of a running demo.
#[derive(Clone, Debug, Serialize)]
pub struct CaDescription {
    /// Where it listens.
    pub address: SocketAddr,
    /// PEM file of its root.
    pub root: PathBuf,
    /// Unix socket of its administration, for `sidegate-ca token`, `issued` and `revoke`.
    pub admin_socket: PathBuf,
}

/// One sidecar of a running demo.
#[derive(Clone, Debug, Serialize)]
pub struct SidecarDescription {
    /// `namespace/service-account`.
    pub workload: String,
    /// Its SPIFFE ID.
    pub id: String,
    /// Its labels.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Where its application's calls go.
    pub outbound: SocketAddr,
    /// Where other sidecars connect.
    pub inbound: SocketAddr,
    /// Where it may be looked into.
    pub admin: SocketAddr,
    /// Readiness, liveness and metrics.
    pub health: SocketAddr,
    /// Its application; absent for one that only calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application: Option<SocketAddr>,
    /// Its access log.
    pub log: PathBuf,
    /// Local ports that are bound to one service each.
    pub upstreams: std::collections::BTreeMap<String, SocketAddr>,
}

impl Shop {
    /// Opens the shop in `dir` and waits until every sidecar is ready and knows all services.
    ///
    /// Policies that are already in `dir/resources` stay as they are; the services' addresses are
    /// written anew.
    ///
    /// # Errors
    ///
    /// [`ShopError`]; what was started by then ends with the process.
    pub async fn open(dir: &Path, clock: Arc<dyn Clock>) -> Result<Self, ShopError> {
        let trust_domain: TrustDomain = "mesh.local".parse()?;
        let mut mesh = LocalMesh::start(dir, trust_domain, clock).await?;
        let orders = listen("orders", orders::serve(ANY_PORT)).await?;
        let inventory = listen("inventory", inventory::serve(ANY_PORT)).await?;
        let ledger = listen("ledger", ledger::serve(ANY_PORT)).await?;
        let to_ledger = ServicePort {
            name: "ledger".to_owned(),
            namespace: "shop".to_owned(),
            port: 6379,
        };
        let callees = [
            Member::new("shop", "orders").port("http", 80, orders.address),
            Member::new("shop", "inventory").port("grpc", 80, inventory.address),
            Member::new("shop", "ledger").port("tcp", 6379, ledger.address),
        ];
        for member in callees.iter().chain([&Member::new("jobs", "batch")]) {
            let config = mesh.sidecar_config(member).await?;
            mesh.add(config)?;
        }
        // web calls through its sidecar, and its sidecar forwards to web: the port comes first.
        let listener = tokio::net::TcpListener::bind(ANY_PORT)
            .await
            .map_err(|source| ShopError::Service {
                service: "web",
                source,
            })?;
        let address = listener.local_addr().map_err(|source| ShopError::Service {
            service: "web",
            source,
        })?;
        let member = Member::new("shop", "web")
            .port("http", 80, address)
            .upstream(to_ledger);
        let config = mesh.sidecar_config(&member).await?;
        let beside = mesh.add(config)?;
        let outbound = beside.sidecar.addresses().outbound.to_string();
        let to_ledger = upstream(beside, LEDGER).ok_or(ShopError::Missing("shop/web"))?;
        let reach = web::Reach {
            orders: outbound.clone(),
            inventory: outbound,
            ledger: to_ledger.to_string(),
        };
        let web = listen("web", async { web::serve(listener, reach) }).await?;
        write_resources(&mesh).await?;
        let services = vec![
            ("shop/orders", orders),
            ("shop/inventory", inventory),
            ("shop/ledger", ledger),
            ("shop/web", web),
        ];
        Ok(Self { mesh, services })
    }

    /// The mesh around the shop.
    pub fn mesh(&self) -> &LocalMesh {
        &self.mesh
    }

    /// The sidecar of `workload`, such as `shop/web`.
    ///
    /// # Errors
    ///
    /// [`ShopError::Missing`] when the shop has no such workload.
    pub fn sidecar(&self, workload: &'static str) -> Result<&LocalSidecar, ShopError> {
        self.mesh
            .sidecar(workload)
            .ok_or(ShopError::Missing(workload))
    }

    /// The application of `workload`, when it has one.
    pub fn application(&self, workload: &str) -> Option<SocketAddr> {
        let (_, running) = self.services.iter().find(|(name, _)| *name == workload)?;
        Some(running.address)
    }

    /// Every address, as `demo.json` says them.
    pub fn describe(&self) -> Description {
        let sidecars = self.mesh.sidecars().iter().map(|beside| {
            let addresses = beside.sidecar.addresses();
            SidecarDescription {
                workload: beside.workload.clone(),
                id: beside.id.to_string(),
                labels: beside.labels.clone(),
                outbound: addresses.outbound,
                inbound: addresses.inbound,
                admin: addresses.admin,
                health: addresses.health,
                application: self.application(&beside.workload),
                log: beside.log.clone(),
                upstreams: addresses
                    .upstreams
                    .iter()
                    .map(|(service, address)| (service.to_string(), *address))
                    .collect(),
            }
        });
        Description {
            trust_domain: self.mesh.trust_domain().to_string(),
            resources: self.mesh.resources_dir(),
            ca: CaDescription {
                address: self.mesh.ca().address(),
                root: self.mesh.ca().root_path(),
                admin_socket: self.mesh.ca().admin_socket(),
            },
            sidecars: sidecars.collect(),
        }
    }

    /// Writes `demo.json` into `dir`, whole.
    ///
    /// # Errors
    ///
    /// [`ShopError::Description`] when it cannot be written.
    pub fn write_description(&self, dir: &Path) -> Result<(), ShopError> {
        let path = dir.join("demo.json");
        let beside = dir.join("demo.json.new");
        serde_json::to_vec_pretty(&self.describe())
            .map_err(io::Error::from)
            .and_then(|json| std::fs::write(&beside, json))
            .and_then(|()| std::fs::rename(&beside, &path))
            .map_err(|source| ShopError::Description { path, source })
    }

    /// Waits until every call that has ended is on record.
    pub async fn flush_logs(&self) {
        self.mesh.flush_logs().await;
    }

    /// Drains the sidecars, then stops the services.
    pub async fn close(self) {
        self.mesh.stop().await;
        for (_, service) in &self.services {
            service.stop().await;
        }
    }
}

/// Services first, so that no policy is read before the service that it names, then the policies
/// that are not there yet; returns when every sidecar has read them.
async fn write_resources(mesh: &LocalMesh) -> Result<(), ShopError> {
    mesh.write_resource("services.yaml", &services_yaml(mesh.sidecars()))?;
    mesh.until(|_, snapshot| snapshot.routes.all().len() == mesh.sidecars().len() - 1)
        .await?;
    let missing: Vec<_> = POLICIES
        .iter()
        .filter(|(file, _)| !mesh.resources_dir().join(file).exists())
        .collect();
    for (file, policy) in &missing {
        mesh.write_resource(file, policy)?;
    }
    let web = SpiffeId::for_workload(mesh.trust_domain(), "shop", "web")?;
    mesh.until(|beside, snapshot| {
        let (_, account) = beside.id.workload().unwrap_or_default();
        let written = missing
            .iter()
            .any(|(file, _)| file.strip_suffix(".yaml") == Some(account));
        !written || web_may_call(account, &web, snapshot)
    })
    .await?;
    Ok(())
}

/// Whether the shop's own policy of `account` is in force, as it was written.
fn web_may_call(account: &str, web: &SpiffeId, snapshot: &Snapshot) -> bool {
    let (path, method, grpc) = match account {
        "inventory" => ("/shop.v1.Inventory/Get", "POST", true),
        _ => ("/orders", "GET", false),
    };
    let Ok(path) = CanonicalPath::parse(path) else {
        return false;
    };
    let (port, ask) = match account {
        "ledger" => (6379, Ask::Opaque),
        _ => (
            80,
            Ask::Http(HttpAsk {
                method,
                path: &path,
                authority: None,
                upgrade: None,
                grpc,
            }),
        ),
    };
    snapshot
        .policy
        .authorize(Caller::Mesh(web), port, &ask)
        .is_served()
}

async fn listen(
    service: &'static str,
    serving: impl Future<Output = io::Result<Running>>,
) -> Result<Running, ShopError> {
    serving
        .await
        .map_err(|source| ShopError::Service { service, source })
}

fn upstream(beside: &LocalSidecar, service: &str) -> Option<SocketAddr> {
    let mut upstreams = beside.sidecar.addresses().upstreams.iter();
    let (_, address) = upstreams.find(|(bound, _)| bound.to_string() == service)?;
    Some(*address)
}

/// A `StaticService` for each member that has a port, at the inbound address of its sidecar.
fn services_yaml(sidecars: &[LocalSidecar]) -> String {
    let services = sidecars.iter().filter_map(|beside| {
        let port = beside.ports.first()?;
        let name = port.name.as_deref()?;
        let (namespace, account) = beside.id.workload()?;
        let number = port.port;
        let protocol = if name == "tcp" { "tcp" } else { "auto" };
        let inbound = beside.sidecar.addresses().inbound;
        Some(format!(
            "---
apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: {{ name: {account}, namespace: {namespace} }}
spec:
  ports: [{{ name: {name}, port: {number}, protocol: {protocol} }}]
  endpoints:
    - {{ address: \"{inbound}\", identity: {{ workload: {{ serviceAccount: {account} }} }} }}
"
        ))
    });
    let heading = "# Written by the demo at each start: where the sidecars listen.\n".to_owned();
    services.fold(heading, |yaml, service| yaml + &service)
}
