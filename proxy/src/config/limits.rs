//! The `limits` of the configuration: every bound, its default and its sense.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Fault, fault};

/// Every bound of a sidecar. Counts are for the whole process, whatever the number of workers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LimitsConfig {
    /// Inbound connections at once.
    pub inbound_connections_max: u32,
    /// Inbound connections at once of one peer identity.
    pub inbound_connections_per_peer_max: u32,
    /// Outbound connections at once, those of `upstreams` included.
    pub outbound_connections_max: u32,
    /// TLS handshakes at once that have not ended yet, in each direction.
    pub handshakes_max: u32,
    /// Longest TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// Inbound requests at once, streams and tunnels included.
    pub inbound_requests_max: u32,
    /// Outbound requests at once, streams and tunnels included.
    pub outbound_requests_max: u32,
    /// Connections at once from this sidecar to other sidecars.
    pub upstream_connections_max: u32,
    /// Connections at once from this sidecar to one endpoint.
    pub upstream_connections_per_endpoint_max: u32,
    /// Calls at once that wait for a connection to another sidecar.
    pub upstream_waiters_max: u32,
    /// Connections at once from this sidecar to its application.
    pub application_connections_max: u32,
    /// Longest wait for a TCP connection, to an endpoint or to the application.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Bytes of one request's or response's head.
    pub head_bytes_max: u32,
    /// Fields of one request's or response's head.
    pub headers_max: u32,
    /// Longest time that a request's head may take once it has begun, and that a new connection
    /// may stay silent.
    #[serde(with = "humantime_serde")]
    pub head_timeout: Duration,
    /// Streams at once on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// HTTP/2 flow-control window of one connection, in bytes.
    pub connection_window_bytes: u32,
    /// HTTP/2 flow-control window of one stream, in bytes.
    pub stream_window_bytes: u32,
    /// Longest time that a connection stays without a request.
    #[serde(with = "humantime_serde")]
    pub connection_idle_timeout: Duration,
    /// Longest time that this sidecar keeps its own idle connections: below the former, so that a
    /// connection is not used in the moment in which the other end closes it.
    #[serde(with = "humantime_serde")]
    pub pool_idle_timeout: Duration,
    /// Longest time that this sidecar keeps an unused connection to its application: below the
    /// keep-alive of usual servers, which is 5 s.
    #[serde(with = "humantime_serde")]
    pub application_idle_timeout: Duration,
    /// Longest pause within a request's body.
    #[serde(with = "humantime_serde")]
    pub request_body_idle_timeout: Duration,
    /// Longest silence, both ways, of a stream, WebSocket or tunnel after its head.
    #[serde(with = "humantime_serde")]
    pub stream_idle_timeout: Duration,
    /// Connections at once to the administration port.
    pub admin_connections_max: u32,
    /// Connections at once to the health port.
    pub health_connections_max: u32,
    /// Time series in all; what comes later is counted under `other`.
    pub metric_series_max: u32,
    /// Time after which the series of a peer that was not seen any more are removed.
    #[serde(with = "humantime_serde")]
    pub metric_series_idle_timeout: Duration,
    /// Destinations that the controller is asked about at a time.
    pub destinations_max: u32,
    /// Time after which a destination that nobody called any more is forgotten.
    #[serde(with = "humantime_serde")]
    pub destination_idle_timeout: Duration,
    /// Resources that the controller may send.
    pub resources_max: u32,
    /// Probes and lifecycle hooks that are carried out at a time.
    pub probes_max: u32,
    /// Files in the resources folder.
    pub resource_files_max: u32,
    /// Bytes of one resource file.
    pub resource_file_bytes_max: u32,
    /// How long two equal scans of the resources folder lie apart, at least 100 ms.
    #[serde(with = "humantime_serde")]
    pub resources_settle_time: Duration,
    /// How often the resources folder is read again without a notification.
    #[serde(with = "humantime_serde")]
    pub resources_reread_interval: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            inbound_connections_max: 8_192,
            inbound_connections_per_peer_max: 2_048,
            outbound_connections_max: 8_192,
            handshakes_max: 256,
            handshake_timeout: Duration::from_secs(5),
            inbound_requests_max: 16_384,
            outbound_requests_max: 16_384,
            upstream_connections_max: 4_096,
            upstream_connections_per_endpoint_max: 64,
            upstream_waiters_max: 4_096,
            application_connections_max: 4_096,
            connect_timeout: Duration::from_secs(5),
            head_bytes_max: 64 * 1024,
            headers_max: 100,
            head_timeout: Duration::from_secs(10),
            streams_per_connection_max: 256,
            connection_window_bytes: 16 * 1024 * 1024,
            stream_window_bytes: 1024 * 1024,
            connection_idle_timeout: Duration::from_mins(5),
            pool_idle_timeout: Duration::from_secs(90),
            application_idle_timeout: Duration::from_secs(4),
            request_body_idle_timeout: Duration::from_mins(1),
            stream_idle_timeout: Duration::from_hours(1),
            admin_connections_max: 16,
            health_connections_max: 64,
            metric_series_max: 20_000,
            metric_series_idle_timeout: Duration::from_mins(15),
            destinations_max: 4_096,
            destination_idle_timeout: Duration::from_mins(5),
            resources_max: 10_000,
            probes_max: 64,
            resource_files_max: 4_096,
            resource_file_bytes_max: 4 * 1024 * 1024,
            resources_settle_time: Duration::from_millis(150),
            resources_reread_interval: Duration::from_secs(5),
        }
    }
}

impl LimitsConfig {
    /// Finds bounds that would make the sidecar useless or unsafe.
    pub(super) fn check(&self, faults: &mut Vec<Fault>) {
        for (key, bound) in self.counts() {
            if bound == 0 {
                let field = format!("limits.{key}");
                fault(
                    faults,
                    &field,
                    "0 would refuse everything",
                    "write 1 or more",
                );
            }
        }
        for (key, time) in self.times() {
            if time.is_zero() {
                let field = format!("limits.{key}");
                fault(faults, &field, "no time at all", "write for example `5s`");
            }
        }
        self.check_windows(faults);
        if self.resources_settle_time < Duration::from_millis(100) {
            let message = "a file that is still being written could be published";
            fault(
                faults,
                "limits.resourcesSettleTime",
                message,
                "write `100ms` or more",
            );
        }
        if self.pool_idle_timeout > self.connection_idle_timeout {
            let message = "connections would be used in the moment in which the peer closes them";
            let help = "keep it below `connectionIdleTimeout`";
            fault(faults, "limits.poolIdleTimeout", message, help);
        }
    }

    /// The `h2` crate refuses other values, and small windows end connections with many streams.
    fn check_windows(&self, faults: &mut Vec<Fault>) {
        if !(65_535..=0x7fff_ffff).contains(&self.connection_window_bytes) {
            let message = "a connection's window is 65535 to 2147483647 bytes";
            let help = "16 MiB (16777216) suits many small streams";
            fault(faults, "limits.connectionWindowBytes", message, help);
        }
        if !(16_384..=self.connection_window_bytes).contains(&self.stream_window_bytes) {
            let message = "a stream's window is 16384 bytes to the connection's window";
            fault(
                faults,
                "limits.streamWindowBytes",
                message,
                "1 MiB is 1048576",
            );
        }
        if !(1_024..=1_048_576).contains(&self.head_bytes_max) {
            let message = "a head's limit is 1024 to 1048576 bytes";
            fault(faults, "limits.headBytesMax", message, "64 KiB is 65536");
        }
        if self.headers_max > 1_024 {
            let message = "more than 1024 fields make each head expensive";
            fault(faults, "limits.headersMax", message, "100 is usual");
        }
    }

    fn counts(&self) -> [(&'static str, u32); 21] {
        [
            ("inboundConnectionsMax", self.inbound_connections_max),
            (
                "inboundConnectionsPerPeerMax",
                self.inbound_connections_per_peer_max,
            ),
            ("outboundConnectionsMax", self.outbound_connections_max),
            ("handshakesMax", self.handshakes_max),
            ("inboundRequestsMax", self.inbound_requests_max),
            ("outboundRequestsMax", self.outbound_requests_max),
            ("upstreamConnectionsMax", self.upstream_connections_max),
            (
                "upstreamConnectionsPerEndpointMax",
                self.upstream_connections_per_endpoint_max,
            ),
            (
                "applicationConnectionsMax",
                self.application_connections_max,
            ),
            ("upstreamWaitersMax", self.upstream_waiters_max),
            ("headersMax", self.headers_max),
            ("streamsPerConnectionMax", self.streams_per_connection_max),
            ("adminConnectionsMax", self.admin_connections_max),
            ("healthConnectionsMax", self.health_connections_max),
            ("metricSeriesMax", self.metric_series_max),
            ("destinationsMax", self.destinations_max),
            ("resourcesMax", self.resources_max),
            ("probesMax", self.probes_max),
            ("resourceFilesMax", self.resource_files_max),
            ("resourceFileBytesMax", self.resource_file_bytes_max),
            ("headBytesMax", self.head_bytes_max),
        ]
    }

    fn times(&self) -> [(&'static str, Duration); 11] {
        [
            ("handshakeTimeout", self.handshake_timeout),
            ("connectTimeout", self.connect_timeout),
            ("headTimeout", self.head_timeout),
            ("connectionIdleTimeout", self.connection_idle_timeout),
            ("poolIdleTimeout", self.pool_idle_timeout),
            ("applicationIdleTimeout", self.application_idle_timeout),
            ("requestBodyIdleTimeout", self.request_body_idle_timeout),
            ("streamIdleTimeout", self.stream_idle_timeout),
            ("metricSeriesIdleTimeout", self.metric_series_idle_timeout),
            ("destinationIdleTimeout", self.destination_idle_timeout),
            ("resourcesRereadInterval", self.resources_reread_interval),
        ]
    }
}
