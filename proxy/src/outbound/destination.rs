//! Where an application's connection goes: by its requests' authority, by the port that it came to,
//! or by the address that it was made to.
//!
//! Invariants: with redirection only that address counts, whatever the application writes into its
//! requests; bytes leave as they are only on the controller's word that the address is not the
//! mesh's; a connection to this pod stays within it, and under its policy.

use std::net::SocketAddr;
use std::sync::Arc;

use sidegate_mesh::access_log::{Address, Protocol};
use sidegate_mesh::host::{Authority, ServiceName};
use sidegate_mesh::routes::{Endpoint, PortProtocol, Route, Routes, Traffic};
use tokio::net::TcpStream;

use super::{BoundService, Connection, Outbound};
use crate::balance::Target;
use crate::call::Call;
use crate::config;
use crate::destinations::{Destination, Destinations};
use crate::detect::{self, Detected, Expected, SILENCE};
use crate::error::RequestError;
use crate::headers::Head;
use crate::original;
use crate::wire::tunnel::Abortable;

/// Where a connection goes.
#[derive(Clone, Debug)]
pub(crate) enum Destined {
    /// Each request says it.
    Authority,
    /// To the service that its port is bound to.
    Bound(Arc<BoundService>),
    /// To the address that it was made to.
    Original(Original),
}

/// The address that a connection was made to, and what is there.
#[derive(Clone, Debug)]
pub(crate) struct Original {
    at: SocketAddr,
    place: Place,
}

/// What is at an address.
#[derive(Clone, Debug)]
enum Place {
    /// The mesh's, and where exactly is asked anew for each call.
    Mesh,
    /// This pod itself.
    Own(Arc<Route>),
    /// Nobody knows.
    Unknown,
    /// What the namespace does not let out.
    Forbidden,
}

impl Destined {
    /// The port that the called side has to be told; none where its address says it.
    pub(super) fn named_port(&self, route: &Route) -> Option<u16> {
        match self {
            Self::Authority | Self::Bound(_) => Some(route.target_port),
            Self::Original(_) => None,
        }
    }

    /// The address that the connection was made to, where that is what counts.
    pub(super) fn original(&self) -> Option<SocketAddr> {
        match self {
            Self::Authority | Self::Bound(_) => None,
            Self::Original(original) => Some(original.at),
        }
    }
}

impl Outbound {
    /// Serves a connection that was redirected here.
    pub(super) async fn serve_redirected(
        self: &Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        destinations: &Destinations,
    ) {
        let at = match self.original_of(&stream) {
            Ok(at) => at,
            Err((reason, at)) => {
                drop(stream);
                return self.refuse_address(address, reason, at);
            }
        };
        let io = Abortable::new(stream);
        let connection = |place| Connection {
            address,
            destined: Destined::Original(Original { at, place }),
            abort: io.abort(),
            stale: Arc::default(),
        };
        if self.shared.own.has(at.ip()) {
            let route = self.own_route(at);
            let protocol = self.protocol_at(&route, at);
            let connection = connection(Place::Own(route));
            return self.serve_spoken(io, connection, Some(protocol)).await;
        }
        match destinations.resolve(at).await {
            Ok(Destination::Meshed(route)) => {
                let protocol = self.protocol_at(&route, at);
                let connection = connection(Place::Mesh);
                self.serve_spoken(io, connection, Some(protocol)).await;
            }
            Ok(Destination::External { refused: false }) => {
                Box::pin(self.pass(io, address, at)).await;
            }
            Ok(Destination::External { refused: true }) => {
                let connection = connection(Place::Forbidden);
                Box::pin(self.turn_away(io, connection)).await;
            }
            Err(_) => {
                let connection = connection(Place::Unknown);
                Box::pin(self.turn_away(io, connection)).await;
            }
        }
    }

    /// Where the connection was going, unless nobody may go there.
    fn original_of(
        &self,
        stream: &TcpStream,
    ) -> Result<SocketAddr, (&'static str, Option<SocketAddr>)> {
        let original = self.shared.originals.of(stream);
        let original = original.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => ("not_redirected", None),
            _ => ("original_destination", None),
        })?;
        let at = original::canonical(original);
        match self.shared.own.refuses_outbound(at) {
            Some(reason) => Err((reason, Some(at))),
            None => Ok(at),
        }
    }

    /// A connection to an address that is nobody's to call: it is closed, and on record.
    fn refuse_address(&self, address: SocketAddr, reason: &'static str, at: Option<SocketAddr>) {
        let mut call = self.begin(address);
        call.record().protocol = Protocol::Tcp;
        call.record().destination_address = at.map(Address::Socket);
        call.fail(&RequestError::DestinationRefused { reason });
        call.finish();
    }

    /// Tells an application that its call goes nowhere: in HTTP if that is what it speaks, else with
    /// a reset.
    async fn turn_away(self: &Arc<Self>, io: Abortable, connection: Connection) {
        let clock = &*self.shared.clock;
        let detected = detect::protocol(io, clock, SILENCE, Expected::Anything).await;
        match detected {
            Ok((Detected::Http1, io)) => self.serve_http1(io, connection).await,
            Ok((Detected::Http2, io)) => self.serve_http2(io, connection).await,
            other => {
                connection.abort.arm();
                let mut call = self.begin(connection.address);
                call.record().protocol = Protocol::Tcp;
                if let Err(error) = self.route_of(&mut call, &connection.destined).await {
                    call.fail(&error);
                }
                call.finish();
                drop(other);
            }
        }
    }

    /// What is spoken at `at`, where `route` leads.
    fn protocol_at(&self, route: &Route, at: SocketAddr) -> PortProtocol {
        if self.shared.config.opaque_ports.contains(&at.port()) {
            return PortProtocol::Tcp;
        }
        route.protocol
    }

    /// The way to this pod's own address, which needs nobody's word.
    fn own_route(&self, at: SocketAddr) -> Arc<Route> {
        let ports = &self.shared.config.ports;
        let port = ports.iter().find(|port| port.port == at.port());
        let protocol = match port.map(|port| port.protocol).unwrap_or_default() {
            config::PortProtocol::Auto => PortProtocol::Auto,
            config::PortProtocol::Http => PortProtocol::Http,
            config::PortProtocol::Grpc => PortProtocol::Grpc,
            config::PortProtocol::Tcp => PortProtocol::Tcp,
        };
        let workload = &self.shared.workload;
        Arc::new(Route {
            service: at.to_string().into(),
            name: ServiceName {
                namespace: workload.namespace.clone(),
                name: at.ip().to_string(),
            },
            port: at.port(),
            protocol,
            target_port: at.port(),
            endpoints: [Endpoint::new(at, workload.id.clone())].into(),
            traffic: Arc::new(Traffic::default()),
        })
    }

    /// The route of a connection that does not look into its bytes, or that was redirected.
    pub(super) async fn route_of(
        &self,
        call: &mut Call,
        destined: &Destined,
    ) -> Result<Arc<Route>, RequestError> {
        let snapshot = self.shared.state.current().ok_or(RequestError::NotReady)?;
        call.record().snapshot = Some(snapshot.number);
        let route = match destined {
            Destined::Authority => Err(RequestError::DestinationUnknown),
            Destined::Bound(bound) => {
                let route = snapshot.routes.service(&bound.name, bound.port);
                route
                    .map(Arc::clone)
                    .ok_or(RequestError::DestinationUnknown)
            }
            Destined::Original(original) => self.route_to(original).await,
        };
        match route {
            Ok(route) => {
                call.record().destination_service = Some(Arc::clone(&route.service));
                Ok(route)
            }
            Err(error) => {
                let at = destined.original();
                call.record().destination_address = at.map(Address::Socket);
                Err(error)
            }
        }
    }

    /// The route to the address that a connection was made to, as it is now.
    async fn route_to(&self, original: &Original) -> Result<Arc<Route>, RequestError> {
        match &original.place {
            Place::Own(route) => Ok(Arc::clone(route)),
            Place::Unknown => Err(RequestError::DestinationUnknown),
            Place::Forbidden => Err(RequestError::EgressDenied),
            Place::Mesh => {
                let destinations = self.shared.destinations.as_ref();
                let destinations = destinations.ok_or(RequestError::DestinationUnknown)?;
                match destinations.resolve(original.at).await {
                    Ok(Destination::Meshed(route)) => Ok(route),
                    // Half a connection can't be passed on as it is.
                    Ok(Destination::External { .. }) => Err(RequestError::DestinationChanged),
                    Err(_) => Err(RequestError::DestinationUnknown),
                }
            }
        }
    }

    /// The route of one request; its head becomes what is forwarded.
    pub(super) async fn select(
        &self,
        call: &mut Call,
        head: &mut Head,
        destined: &Destined,
    ) -> Result<Arc<Route>, RequestError> {
        let route = match destined {
            Destined::Authority => {
                let snapshot = self.shared.state.current().ok_or(RequestError::NotReady)?;
                call.record().snapshot = Some(snapshot.number);
                by_authority(&snapshot.routes, head)?
            }
            Destined::Bound(bound) => {
                // What the application wrote there is an address of this machine.
                head.authority = Authority::parse(&authority_of(bound)).ok();
                self.route_of(call, destined).await?
            }
            Destined::Original(original) => {
                // HTTP/1.0 may name no host, and HTTP/2 must name one.
                if head.authority.is_none() {
                    head.authority = Authority::parse(&original.at.to_string()).ok();
                }
                self.route_of(call, destined).await?
            }
        };
        if route.protocol == PortProtocol::Tcp {
            return Err(RequestError::NotCarried { reason: "http" });
        }
        Ok(route)
    }

    /// What is known of `route`'s service.
    pub(super) fn target(&self, route: Arc<Route>) -> Target {
        let zone = match &self.shared.destinations {
            Some(destinations) if route.traffic.prefer_zone => destinations.zone(),
            _ => None,
        };
        self.shared.services.target(route, zone)
    }

    /// What `target` has become meanwhile, where its endpoints have changed.
    pub(super) fn refreshed(&self, destined: &Destined, target: &Target) -> Option<Target> {
        let at = destined.original()?;
        let Destination::Meshed(route) = self.shared.destinations.as_ref()?.current(at)? else {
            return None;
        };
        let same = Arc::ptr_eq(&route.endpoints, &target.route.endpoints);
        (!same).then(|| self.target(route))
    }
}

/// The route that a request's authority means.
fn by_authority(routes: &Routes, head: &Head) -> Result<Arc<Route>, RequestError> {
    let authority = head.authority.as_ref();
    let authority = authority.ok_or(RequestError::BadRequest {
        reason: "host_missing",
    })?;
    let route = routes.resolve(authority);
    route
        .map(Arc::clone)
        .ok_or(RequestError::DestinationUnknown)
}

fn authority_of(bound: &BoundService) -> String {
    match bound.port {
        80 => bound.name.to_string(),
        port => format!("{}:{port}", bound.name),
    }
}
