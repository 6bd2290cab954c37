//! Which records are shown.

use std::str::FromStr;
use std::time::Duration;

use sidegate_mesh::access_log::Line;
use time::OffsetDateTime;

use super::show::Entry;
use super::source::Raw;
use super::{LogsArgs, Side, glob};

/// What a record must be to be shown.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub(crate) struct Filter {
    direction: Side,
    /// Several sidecars' records are at hand: show each call once.
    once: bool,
    /// The one namespace whose records are at hand; all when absent.
    at_hand: Option<String>,
    since: Option<OffsetDateTime>,
    workload: Option<String>,
    namespace: Option<String>,
    denied: bool,
    errors: bool,
    from: Option<String>,
    to: Option<String>,
    methods: Vec<String>,
    path: Option<String>,
    statuses: Vec<Status>,
    slower_than: Option<Duration>,
    diagnostics: bool,
}

/// An outcome that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Exactly this HTTP status.
    Http(u16),
    /// HTTP statuses that start with this digit.
    Class(u16),
    /// Exactly this gRPC status.
    Grpc(u32),
}

impl FromStr for Status {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad =
            || format!("`{text}` is no status; write `404`, `5xx`, `grpc:7` or `grpc:NOT_FOUND`");
        if let Some(code) = text.strip_prefix("grpc:") {
            let by_name =
                || (0..=16).find(|number| Line::grpc_code(*number).eq_ignore_ascii_case(code));
            let number = code.parse().ok().or_else(by_name);
            return number.map(Self::Grpc).ok_or_else(bad);
        }
        if let Some(class) = text.strip_suffix("xx") {
            let class = class.parse().ok().filter(|class| (1..=5).contains(class));
            return class.map(Self::Class).ok_or_else(bad);
        }
        let status = text
            .parse()
            .ok()
            .filter(|status| (100..600).contains(status));
        status.map(Self::Http).ok_or_else(bad)
    }
}

impl Status {
    fn matches(self, line: &Line) -> bool {
        // A gRPC call ends with its own status; HTTP's is 200 whatever happened.
        let http = line.status.filter(|_| line.grpc_status.is_none());
        match self {
            Self::Http(status) => http == Some(status),
            Self::Class(class) => http.is_some_and(|status| status / 100 == class),
            Self::Grpc(status) => line.grpc_status == Some(status),
        }
    }
}

impl Filter {
    /// Every call of a folder, once.
    pub(crate) fn each_call_once() -> Self {
        Self {
            once: true,
            ..Self::default()
        }
    }

    /// Every call that the sidecars of one namespace know, once.
    pub(crate) fn each_call_of(namespace: Option<&str>) -> Self {
        Self {
            at_hand: namespace.map(ToOwned::to_owned),
            ..Self::each_call_once()
        }
    }

    /// What the arguments ask for, of records of which those of a workload or namespace are still
    /// to be chosen.
    ///
    /// # Errors
    ///
    /// When WORKLOAD names a namespace and `--namespace` another.
    pub(super) fn new(arguments: &LogsArgs, now: OffsetDateTime) -> anyhow::Result<Self> {
        let (mut workload, mut namespace) =
            (arguments.workload.clone(), arguments.namespace.clone());
        if let Some((of, account)) = arguments
            .workload
            .as_deref()
            .and_then(|name| name.split_once('/'))
        {
            if namespace
                .as_deref()
                .is_some_and(|namespace| namespace != of)
            {
                anyhow::bail!("WORKLOAD names the namespace {of}, and --namespace another");
            }
            (namespace, workload) = (Some(of.to_owned()), Some(account.to_owned()));
        }
        Ok(Self {
            once: arguments.dir.is_some() && arguments.workload.is_none(),
            at_hand: namespace.clone(),
            workload,
            namespace,
            ..Self::of_calls(arguments, now)
        })
    }

    /// What the arguments ask for, of the records of pods that were chosen already, those of one
    /// namespace or of all.
    pub(super) fn of_pods(
        arguments: &LogsArgs,
        namespace: Option<&str>,
        now: OffsetDateTime,
    ) -> Self {
        Self {
            once: arguments.workload.is_none(),
            at_hand: namespace.map(ToOwned::to_owned),
            ..Self::of_calls(arguments, now)
        }
    }

    fn of_calls(arguments: &LogsArgs, now: OffsetDateTime) -> Self {
        Self {
            direction: arguments.direction,
            since: arguments
                .since
                .and_then(|since| now.checked_sub(since.try_into().ok()?)),
            denied: arguments.denied,
            errors: arguments.errors,
            from: arguments.from.clone(),
            to: arguments.to.clone(),
            methods: arguments.method.clone(),
            path: arguments.path.clone(),
            statuses: arguments.status.clone(),
            slower_than: arguments.slower_than,
            diagnostics: arguments.diagnostics,
            ..Self::default()
        }
    }

    /// The entry of a line, if it is to be shown. One that cannot be read always is.
    pub(crate) fn entry(&self, raw: Raw) -> Option<Entry> {
        let Ok(line) = Line::parse(&raw.text) else {
            return Some(Entry::broken(raw));
        };
        match line.kind.as_deref() {
            Some("access") => self.admits(&line).then(|| Entry::call(line, raw)),
            Some("diagnostic") => {
                let shown = self.diagnostics && self.is_recent(&line);
                shown.then(|| Entry::diagnostic(line, raw))
            }
            _ => Some(Entry::broken(raw)),
        }
    }

    /// The same of a line of the sidecar of `workload`, `namespace/service-account`: no pod can put
    /// words into the mouth of another, so that such a line is shown as broken.
    pub(crate) fn entry_of(&self, raw: Raw, workload: &str) -> Option<Entry> {
        match Line::parse(&raw.text) {
            Ok(line) if !is_of(&line, workload) => Some(Entry::broken(raw)),
            _ => self.entry(raw),
        }
    }

    /// Whether the record of a call is to be shown.
    pub(crate) fn admits(&self, line: &Line) -> bool {
        self.is_side(line)
            && self.is_recent(line)
            && self.is_writer(line)
            && self.is_outcome(line)
            && self.is_request(line)
            && self
                .from
                .as_deref()
                .is_none_or(|from| names(line.source.as_deref(), from))
            && self.to.as_deref().is_none_or(|to| {
                names(line.destination.as_deref(), to)
                    || line
                        .destination_service
                        .as_deref()
                        .is_some_and(|service| is_service(service, to))
            })
    }

    fn is_side(&self, line: &Line) -> bool {
        let inbound = line.direction.as_deref() == Some("inbound");
        match (self.direction, self.once) {
            (Side::All, _) | (Side::Auto, false) => true,
            (Side::In, _) => inbound,
            (Side::Out, _) => !inbound,
            // What the peer refused, the peer has written down.
            (Side::Auto, true) => {
                inbound
                    || line.error.as_deref().is_some_and(|error| error != "denied")
                    || !self.is_called_side_at_hand(line)
            }
        }
    }

    /// Whether the called side's own record is among those that are looked at: not when the call
    /// left the mesh, nor when it went to a namespace that is not looked at.
    fn is_called_side_at_hand(&self, line: &Line) -> bool {
        let Some(id) = line.destination.as_deref() else {
            return false;
        };
        let namespace = workload_of(id).map(|(namespace, _)| namespace);
        self.at_hand.is_none() || self.at_hand.as_deref() == namespace
    }

    fn is_recent(&self, line: &Line) -> bool {
        match (self.since, line.at()) {
            (Some(since), Some(at)) => at >= since,
            _ => true,
        }
    }

    /// Whether the sidecar that wrote it is one that was asked for.
    fn is_writer(&self, line: &Line) -> bool {
        if self.workload.is_none() && self.namespace.is_none() {
            return true;
        }
        let outbound = line.direction.as_deref() == Some("outbound");
        let id = if outbound {
            &line.source
        } else {
            &line.destination
        };
        let Some((namespace, account)) = id.as_deref().and_then(workload_of) else {
            return false;
        };
        self.namespace
            .as_deref()
            .is_none_or(|asked| asked == namespace)
            && self
                .workload
                .as_deref()
                .is_none_or(|asked| asked == account)
    }

    fn is_outcome(&self, line: &Line) -> bool {
        let denied = matches!(line.decision.as_deref(), Some("deny" | "would_deny"));
        let slow = |than: Duration| {
            line.duration_ms
                .is_some_and(|ms| ms > than.as_secs_f64() * 1000.0)
        };
        (!self.denied || denied)
            && (!self.errors || line.failed())
            && (self.statuses.is_empty() || self.statuses.iter().any(|status| status.matches(line)))
            && self.slower_than.is_none_or(slow)
    }

    fn is_request(&self, line: &Line) -> bool {
        let same = |method: &Option<String>, asked: &str| {
            method
                .as_deref()
                .is_some_and(|method| method.eq_ignore_ascii_case(asked))
        };
        let method = |asked: &String| same(&line.method, asked) || same(&line.grpc_method, asked);
        (self.methods.is_empty() || self.methods.iter().any(method))
            && self.path.as_deref().is_none_or(|pattern| {
                line.path
                    .as_deref()
                    .is_some_and(|path| glob::matches(pattern, path))
            })
    }
}

/// Whether a record may be that of the sidecar of `workload`: the side that wrote it is that
/// workload, or is not said.
pub(crate) fn is_of(line: &Line, workload: &str) -> bool {
    let writer = match line.direction.as_deref() {
        Some("outbound") => &line.source,
        _ => &line.destination,
    };
    let written_by = writer.as_deref().map(workload_of);
    written_by.is_none_or(|writer| writer.is_some() && writer == workload.split_once('/'))
}

/// Namespace and service account of a workload's SPIFFE ID.
pub(crate) fn workload_of(id: &str) -> Option<(&str, &str)> {
    let path = id.strip_prefix("spiffe://")?.split_once('/')?.1;
    let (namespace, account) = path.strip_prefix("ns/")?.split_once("/sa/")?;
    (!account.contains('/')).then_some((namespace, account))
}

/// Whether `id` is what `asked` says: the whole ID, `namespace/account`, or the account.
fn names(id: Option<&str>, asked: &str) -> bool {
    let Some(id) = id else {
        return false;
    };
    let workload = workload_of(id);
    id == asked
        || workload.is_some_and(|(namespace, account)| {
            asked == account || asked.split_once('/') == Some((namespace, account))
        })
}

/// Whether `service`, such as `orders.shop:80`, is what `asked` says, with or without its port.
fn is_service(service: &str, asked: &str) -> bool {
    service == asked
        || service
            .rsplit_once(':')
            .is_some_and(|(name, _)| name == asked)
}
