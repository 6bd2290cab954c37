//! `inventory`: gRPC of all four kinds, with server reflection.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::{Running, start};
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::health_server::{Health, HealthServer};
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::proto::inventory_server::{Inventory, InventoryServer};
use crate::proto::{
    DESCRIPTOR, GetRequest, Level, Reservation, ReserveRequest, RestockRequest, RestockResponse,
    WatchRequest,
};

/// Different SKUs kept at once; restocking another is refused with `RESOURCE_EXHAUSTED`.
const SKUS_MAX: usize = 10_000;

type HealthStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;
type LevelStream = Pin<Box<dyn Stream<Item = Result<Level, Status>> + Send>>;
type ReservationStream = Pin<Box<dyn Stream<Item = Result<Reservation, Status>> + Send>>;

/// Serves `inventory` on `listen`, with some tea and cups in stock.
///
/// # Errors
///
/// The listener's error when `listen` cannot be bound, or that of an unreadable descriptor.
pub async fn serve(listen: SocketAddr) -> io::Result<Running> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .build_v1()
        .map_err(io::Error::other)?;
    let reflection_alpha = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .build_v1alpha()
        .map_err(io::Error::other)?;
    let stock = Stock::with([("tea", 100), ("cup", 12), ("pot", 3)]);
    let router = tonic::transport::Server::builder()
        .add_service(InventoryServer::new(stock))
        .add_service(HealthServer::new(Serving))
        .add_service(reflection)
        .add_service(reflection_alpha);
    start(listen, |listener, stop| async move {
        // An answer is several small writes; with Nagle's algorithm each waits 40 ms for the last.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let served = router
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "inventory ended");
        }
    })
    .await
}

/// Says that the inventory takes calls, which is so for as long as somebody can ask.
struct Serving;

impl Serving {
    fn of(service: &str) -> Result<HealthCheckResponse, Status> {
        match service {
            "" | "shop.v1.Inventory" => Ok(HealthCheckResponse {
                status: ServingStatus::Serving.into(),
            }),
            other => Err(Status::not_found(format!("no service {other:?}"))),
        }
    }
}

#[tonic::async_trait]
impl Health for Serving {
    type WatchStream = HealthStream;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Self::of(&request.into_inner().service).map(Response::new)
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthStream>, Status> {
        let now = Self::of(&request.into_inner().service)?;
        let changes = tokio_stream::once(Ok(now)).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(changes)))
    }
}

#[derive(Clone)]
struct Stock {
    levels: Arc<Mutex<BTreeMap<String, watch::Sender<u64>>>>,
}

impl Stock {
    fn with<const N: usize>(initial: [(&str, u64); N]) -> Self {
        let levels = initial.map(|(sku, quantity)| (sku.to_owned(), watch::Sender::new(quantity)));
        Self {
            levels: Arc::new(Mutex::new(levels.into())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, watch::Sender<u64>>> {
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, sku: &str) -> Result<watch::Receiver<u64>, Status> {
        let levels = self.lock();
        let level = levels.get(sku).ok_or_else(|| unknown(sku))?;
        Ok(level.subscribe())
    }

    fn add(&self, sku: &str, quantity: u64) -> Result<(), Status> {
        let mut levels = self.lock();
        if levels.len() >= SKUS_MAX && !levels.contains_key(sku) {
            return Err(Status::resource_exhausted(format!(
                "at most {SKUS_MAX} SKUs"
            )));
        }
        let level = levels
            .entry(sku.to_owned())
            .or_insert_with(|| watch::Sender::new(0));
        level.send_modify(|level| *level = level.saturating_add(quantity));
        Ok(())
    }

    fn take(&self, sku: &str, wanted: u64) -> Result<Reservation, Status> {
        let levels = self.lock();
        let level = levels.get(sku).ok_or_else(|| unknown(sku))?;
        let reserved = wanted.min(*level.borrow());
        level.send_modify(|level| *level -= reserved);
        Ok(Reservation {
            sku: sku.to_owned(),
            reserved,
            remaining: *level.borrow(),
        })
    }
}

fn unknown(sku: &str) -> Status {
    Status::not_found(format!("no SKU {sku:?}"))
}

#[tonic::async_trait]
impl Inventory for Stock {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Level>, Status> {
        let sku = request.into_inner().sku;
        let quantity = *self.watch(&sku)?.borrow();
        Ok(Response::new(Level { sku, quantity }))
    }

    type WatchStream = LevelStream;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let mut level = Stock::watch(self, &request.sku)?;
        // The first message is the present level, so that a watcher need not ask twice.
        level.mark_changed();
        let repeat_after = match request.repeat_after_ms {
            0 => Duration::from_secs(1),
            ms => Duration::from_millis(u64::from(ms)),
        };
        let sku = request.sku;
        let levels = futures_util::stream::unfold(level, move |mut level| {
            let sku = sku.clone();
            async move {
                if let Ok(Err(_gone)) = tokio::time::timeout(repeat_after, level.changed()).await {
                    return None;
                }
                let quantity = *level.borrow_and_update();
                Some((Ok(Level { sku, quantity }), level))
            }
        });
        let limit = match request.limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        Ok(Response::new(Box::pin(levels.take(limit))))
    }

    async fn restock(
        &self,
        request: Request<Streaming<RestockRequest>>,
    ) -> Result<Response<RestockResponse>, Status> {
        let mut deliveries = request.into_inner();
        let mut sum = RestockResponse::default();
        while let Some(delivery) = deliveries.next().await {
            let delivery = delivery?;
            self.add(&delivery.sku, delivery.quantity)?;
            sum.deliveries += 1;
            sum.quantity = sum.quantity.saturating_add(delivery.quantity);
        }
        Ok(Response::new(sum))
    }

    type ReserveStream = ReservationStream;

    async fn reserve(
        &self,
        request: Request<Streaming<ReserveRequest>>,
    ) -> Result<Response<Self::ReserveStream>, Status> {
        let stock = self.clone();
        let answers = request.into_inner().map(move |wanted| {
            let wanted = wanted?;
            stock.take(&wanted.sku, wanted.quantity)
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
