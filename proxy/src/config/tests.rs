//! What configuration is accepted, refused and printed.

use super::*;

const COMPLETE: &str = "\
workload:
  trustDomain: mesh.local
  namespace: shop
  serviceAccount: orders
  labels: { app: orders }
  enforcement: enforce
ca:
  address: 127.0.0.1:19010
  root: ca/root.pem
  joinToken: s3cret-join-token
resources: resources
ports:
  - { name: http, port: 80, address: 127.0.0.1:8080, protocol: auto }
  - { name: db, port: 6379, address: 127.0.0.1:6379, protocol: tcp }
upstreams:
  - { service: ledger.shop:6379, address: 127.0.0.1:16379 }
log: { path: logs/orders.jsonl }
state: state/orders
workers: 2
drainTimeout: 10s
limits: { inboundConnectionsMax: 100, handshakeTimeout: 3s }
";

/// The complete text with one change, and the one line that refuses it.
#[track_caller]
fn check(from: &str, to: &str, expected: &str) {
    assert!(COMPLETE.contains(from), "the text has no {from:?}");
    let text = COMPLETE.replacen(from, to, 1);
    let error = Config::from_yaml("orders.yaml", &text).expect_err("it was accepted");
    let shown = error.to_string();
    assert!(
        shown.lines().any(|line| line.starts_with(expected)),
        "{expected}\n{shown}"
    );
}

#[test]
fn a_complete_configuration_is_accepted() {
    let config = Config::from_yaml("orders.yaml", COMPLETE).unwrap();
    let workload = config.workload().unwrap();
    assert_eq!(
        workload.id.as_str(),
        "spiffe://mesh.local/ns/shop/sa/orders"
    );
    assert_eq!(workload.ports.len(), 2);
    assert_eq!(config.limits.inbound_connections_max, 100);
    assert_eq!(
        config.limits.handshakes_max,
        LimitsConfig::default().handshakes_max
    );
    assert_eq!(config.source(), Source::Folder("resources".into()));
    let token = JoinToken::Inline(Secret::new("s3cret-join-token"));
    assert_eq!(config.evidence(), Evidence::JoinToken(Some(token)));
    assert_eq!(config.destination(), Destination::Authority);
}

#[test]
fn a_service_account_may_have_dots_as_in_a_cluster() {
    let text = COMPLETE.replace("serviceAccount: orders", "serviceAccount: team.builder");
    let config = Config::from_yaml("orders.yaml", &text).unwrap();
    assert_eq!(config.workload.service_account, "team.builder");
}

#[test]
fn an_unknown_or_missing_key_is_refused_with_its_place() {
    check(
        "workers: 2",
        "workerz: 2",
        "orders.yaml:19:1: unknown field",
    );
    check(
        "namespace: shop",
        "nameSpace: shop",
        "orders.yaml:3:3: unknown field",
    );
    check(
        "handshakeTimeout",
        "handshakeTimout",
        "orders.yaml:21:39: unknown field",
    );
    check("protocol: auto", "protocol: udp", "orders.yaml:13:");
    check("drainTimeout: 10s", "drainTimeout: soon", "orders.yaml:20:");
    check(
        "address: 127.0.0.1:8080",
        "address: 127.0.0.1",
        "orders.yaml:13:",
    );
    check(
        "service: ledger.shop:6379",
        "service: ledger",
        "orders.yaml:16:",
    );
    check("  namespace: shop\n", "", "orders.yaml:5:3: missing field");
    check("workers: 2", "workers: [", "orders.yaml:");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_could_not_run_is_refused_with_its_place() {
    for (from, to, expected) in [
        (
            "trustDomain: mesh.local",
            "trustDomain: Mesh",
            "2:16: `workload.trustDomain`",
        ),
        (
            "namespace: shop",
            "namespace: a/b",
            "3:14: `workload.namespace`",
        ),
        (
            "serviceAccount: orders",
            "serviceAccount: ''",
            "4:19: `workload.serviceAccount`",
        ),
        (
            "serviceAccount: orders",
            "serviceAccount: team..orders",
            "4:19: `workload.serviceAccount`",
        ),
        (
            "address: 127.0.0.1:19010",
            "address: nowhere",
            "8:12: `ca.address`",
        ),
        (
            "joinToken: s3cret-join-token",
            "joinToken: '[redacted]'",
            "10:14: `ca.joinToken`",
        ),
        ("port: 6379,", "port: 80,", "14:23: `ports.1.port`"),
        ("port: 6379,", "port: 0,", "14:23: `ports.1.port`"),
        ("name: db", "name: http", "14:13: `ports.1.name`"),
        ("name: db", "name: '80'", "14:13: `ports.1.name`"),
        (
            "address: 127.0.0.1:6379,",
            "address: 0.0.0.0:6379,",
            "14:38: `ports.1.address`",
        ),
        (
            "address: 127.0.0.1:8080",
            "address: 127.0.0.1:19001",
            "13:38: `ports.0.address`",
        ),
        (
            "address: 127.0.0.1:8080",
            "address: 127.0.0.1:19006",
            "13:38: `ports.0.address`",
        ),
        (
            "127.0.0.1:16379",
            "127.0.0.1:19000",
            "16:43: `upstreams.0.address`",
        ),
        (
            "127.0.0.1:16379",
            "0.0.0.0:16379",
            "16:43: `upstreams.0.address`",
        ),
        (
            "workers: 2",
            "diagnostics: { level: 'a=loud' }",
            "19:23: `diagnostics.level`",
        ),
        ("workers: 2", "workers: 0", "19:10: `workers`"),
        (
            "workers: 2",
            "outbound: { address: '0.0.0.0:19001' }",
            "19:22: `outbound.address`",
        ),
        (
            "workers: 2",
            "admin: { address: '10.0.0.1:19000' }",
            "19:19: `admin.address`",
        ),
        (
            "workers: 2",
            "health: { address: '0.0.0.0:19006' }",
            "19:20: `health.address`",
        ),
        (
            "drainTimeout: 10s",
            "drainTimeout: 10ms",
            "1:1: `drainGrace`",
        ),
        (
            "path: logs/orders.jsonl",
            "path: x, stdout: true",
            "17:25: `log.stdout`",
        ),
        (
            "path: logs/orders.jsonl",
            "flushInterval: 1s",
            "17:23: `log.flushInterval`",
        ),
        (
            "path: logs/orders.jsonl",
            "denialsQueueMax: 0",
            "17:25: `log.denialsQueueMax`",
        ),
        (
            "ConnectionsMax: 100",
            "ConnectionsMax: 0",
            "21:34: `limits.inboundConnectionsMax`",
        ),
        (
            "handshakeTimeout: 3s",
            "handshakeTimeout: 0s",
            "21:57: `limits.handshakeTimeout`",
        ),
        (
            "handshakeTimeout: 3s",
            "resourcesSettleTime: 10ms",
            "21:60: `limits.resourcesSettleTime`",
        ),
        (
            "handshakeTimeout: 3s",
            "connectionWindowBytes: 1",
            "21:62: `limits.connectionWindowBytes`",
        ),
        (
            "handshakeTimeout: 3s",
            "poolIdleTimeout: 1h",
            "21:56: `limits.poolIdleTimeout`",
        ),
    ] {
        check(from, to, &format!("orders.yaml:{expected}"));
    }
}

#[test]
fn two_proofs_or_none_are_refused() {
    let both = "joinToken: a\n  joinTokenFile: token";
    check(
        "joinToken: s3cret-join-token",
        both,
        "orders.yaml:11:18: `ca.joinTokenFile`",
    );
    let text = COMPLETE.replacen("state: state/orders\n", "", 1);
    let text = text.replacen("  joinToken: s3cret-join-token\n", "", 1);
    let error = Config::from_yaml("orders.yaml", &text)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("orders.yaml:8:3: `ca`: nothing proves who"),
        "{error}"
    );
}

#[test]
fn every_problem_is_reported_at_once() {
    let text =
        COMPLETE
            .replacen("workers: 2", "workers: 0", 1)
            .replacen("name: db", "name: http", 1);
    let error = Config::from_yaml("orders.yaml", &text)
        .unwrap_err()
        .to_string();
    assert_eq!(error.lines().count(), 2, "{error}");
}

#[test]
fn printed_configuration_shows_every_default_and_no_secret() {
    let config = Config::from_yaml("orders.yaml", COMPLETE).unwrap();
    let printed = config.to_yaml();
    assert!(!printed.contains("s3cret"), "{printed}");
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
    for line in [
        "joinToken:",
        "address: 127.0.0.1:19001",
        "address: 0.0.0.0:19006",
        "address: 127.0.0.1:19000",
        "address: 127.0.0.1:19021",
        "drainTimeout: 10s",
        "drainGrace: 1s",
        "headBytesMax: 65536",
        "headersMax: 100",
        "poolIdleTimeout: 1m 30s",
        "level: info",
    ] {
        assert!(printed.contains(line), "{line}\n{printed}");
    }
    let again = printed
        .replace("'[redacted]'", "token")
        .replace("\"[redacted]\"", "token");
    let again = Config::from_yaml("printed.yaml", &again).expect("what was printed can be read");
    assert_eq!(again.limits.inbound_connections_max, 100);
}

#[test]
fn relative_paths_are_relative_to_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.yaml");
    std::fs::write(&file, COMPLETE).unwrap();
    let config = Config::from_file(&file).unwrap();
    assert_eq!(config.resources, Some(folder.path().join("resources")));
    assert_eq!(config.ca.root, folder.path().join("ca/root.pem"));
    assert_eq!(
        config.log.path,
        Some(folder.path().join("logs/orders.jsonl"))
    );
    assert_eq!(config.state, Some(folder.path().join("state/orders")));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::from_file(Path::new("/nowhere/orders.yaml")).unwrap_err();
    assert!(
        error.to_string().contains("/nowhere/orders.yaml"),
        "{error}"
    );
}

/// The page that people read, with every key.
const REFERENCE: &str = include_str!("../../../docs/sidecar.yaml");

#[test]
fn the_reference_has_every_key_with_its_default() {
    let reference = Config::from_yaml("docs/sidecar.yaml", REFERENCE).unwrap();
    let mut smallest = Config::from_yaml(
        "smallest.yaml",
        "workload: { namespace: shop, serviceAccount: orders }
ca: { root: ca/root.pem, joinToken: token }
resources: resources
",
    )
    .unwrap();
    // What has no default of its own is an example there.
    smallest
        .workload
        .labels
        .clone_from(&reference.workload.labels);
    smallest.workload.enforcement = reference.workload.enforcement;
    smallest.ports.clone_from(&reference.ports);
    smallest.upstreams.clone_from(&reference.upstreams);
    smallest.state.clone_from(&reference.state);
    smallest.log.path.clone_from(&reference.log.path);
    assert_eq!(smallest.to_yaml(), reference.to_yaml());
    let printed = reference.to_yaml();
    let keys = |text: &str| {
        let words = text.split(['{', '}', ',', '\n', ' ', '-']);
        let keys = words.filter_map(|word| word.trim().strip_suffix(':'));
        keys.map(str::to_owned)
            .collect::<std::collections::BTreeSet<_>>()
    };
    let missing: Vec<_> = keys(&printed)
        .difference(&keys(REFERENCE))
        .cloned()
        .collect();
    assert!(
        missing.is_empty(),
        "docs/sidecar.yaml does not name {missing:?}"
    );
}

#[test]
fn a_resource_file_may_be_as_large_as_the_grammar_reads() {
    let max = LimitsConfig::default().resource_file_bytes_max;
    assert_eq!(max as usize, sidegate_mesh::resource::FILE_BYTES_MAX);
}

const CLUSTER: &str = r#"
workload: { trustDomain: cluster.local, namespace: shop, serviceAccount: web }
ca: { address: "sidegate-ca.sidegate-system.svc.cluster.local:19010", root: /var/run/sidegate/bundle/root.pem, tokenFile: /var/run/sidegate/token/token }
controller: { address: "sidegate-controller.sidegate-system.svc.cluster.local:19012" }
destination: original
ports: [{ name: http, port: 8080, protocol: auto }]
plaintextPorts: [9090]
opaquePorts: [3306]
health: { address: "[::]:19021" }
inbound: { address: "[::]:19006" }
log: { stdout: true }
drainTimeout: 25s
probes:
  secret: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  entries:
    app/liveness: { http: { scheme: http, port: 8080, path: "/healthz?x=1", headers: [{ name: x, value: y }] }, timeout: 1s }
    app/readiness: { tcp: { port: 5432 }, timeout: 1s }
    app/startup: { grpc: { port: 9000, service: "" }, timeout: 1s }
"#;

/// The text of a cluster with one change, and what refuses it.
#[track_caller]
fn check_cluster(from: &str, to: &str, expected: &str) {
    assert!(CLUSTER.contains(from), "the text has no {from:?}");
    let text = CLUSTER.replacen(from, to, 1);
    let error = Config::from_yaml("web", &text).expect_err("it was accepted");
    let shown = error.to_string();
    assert!(shown.contains(expected), "{expected}\n{shown}");
}

#[test]
fn what_the_injector_writes_is_accepted() {
    let config = Config::from_yaml("web", CLUSTER).unwrap();
    let controller = "sidegate-controller.sidegate-system.svc.cluster.local:19012";
    assert_eq!(config.source(), Source::Controller(controller.into()));
    let token = "/var/run/sidegate/token/token".into();
    assert_eq!(config.evidence(), Evidence::ServiceAccountToken(token));
    assert_eq!(config.destination(), Destination::Original);
    assert_eq!(config.workload.enforcement, None);
    let probes = config.probes.as_ref().unwrap();
    let http = probes.entries["app/liveness"].http.as_ref().unwrap();
    assert_eq!(http.path_and_query().unwrap(), "/healthz?x=1");
    let printed = config.to_yaml();
    assert!(!printed.contains("0123456789abcdef"), "{printed}");
}

#[test]
fn the_pod_comes_from_the_environment() {
    let environment = |name: &str| {
        let value = match name {
            "SIDEGATE_CONFIG" => CLUSTER,
            "POD_NAME" => "web-1",
            "POD_UID" => "6f1c",
            "POD_IPS" => "10.245.1.4,fd00::4",
            "NODE_NAME" => "node-1",
            _ => return None,
        };
        Some(value.to_owned())
    };
    let config = Config::from_environment(environment).unwrap();
    let pod = config.pod.unwrap();
    assert_eq!((pod.name.as_str(), pod.uid.as_str()), ("web-1", "6f1c"));
    assert_eq!(pod.ips.len(), 2);
    for variable in ["POD_NAME", "POD_UID", "POD_IPS"] {
        let without = |name: &str| environment(name).filter(|_| name != variable);
        let error = Config::from_environment(without).unwrap_err().to_string();
        assert!(error.contains(variable), "{error}");
    }
    let odd = |name: &str| match name {
        "POD_IPS" => Some("10.245.1.4,x".to_owned()),
        _ => environment(name),
    };
    let error = Config::from_environment(odd).unwrap_err().to_string();
    assert!(error.contains("`x` in POD_IPS"), "{error}");
    let error = Config::from_environment(|_| None).unwrap_err().to_string();
    assert!(error.starts_with("SIDEGATE_CONFIG:"), "{error}");
}

#[test]
fn the_modes_do_not_mix() {
    for (from, to, expected) in [
        (
            "log:",
            "resources: x\nlog:",
            "`controller`: there is a `resources`",
        ),
        (
            "destination: original\n",
            "",
            "`destination`: only the controller knows",
        ),
        ("log:", "state: x\nlog:", "`ca.tokenFile`: in a cluster"),
        (
            "tokenFile:",
            "joinToken: x, tokenFile:",
            "`ca.tokenFile`: in a cluster",
        ),
        (
            "port: 8080, protocol",
            "port: 8080, address: '127.0.0.1:1', protocol",
            "`ports.0.address`",
        ),
        (
            "log:",
            "upstreams: [{ service: a.b:1, address: '127.0.0.1:1' }]\nlog:",
            "`upstreams`",
        ),
        (":19012", "", "`controller.address`"),
        (
            "[9090]",
            "[19006]",
            "`plaintextPorts.0`: 19006 is this sidecar's own",
        ),
        (
            "[3306]",
            "[3306, 3306]",
            "`opaquePorts.1`: port 3306 is there already",
        ),
        ("[3306]", "[0]", "`opaquePorts.0`"),
    ] {
        check_cluster(from, to, expected);
    }
    check(
        "resources: resources\n",
        "",
        "orders.yaml:1:1: `resources`: nothing says",
    );
    check(
        "workers: 2",
        "plaintextPorts: [1]",
        "orders.yaml:19:17: `plaintextPorts`",
    );
    check(
        "name: http, port: 80, address: 127.0.0.1:8080,",
        "name: http, port: 80,",
        "orders.yaml:13:5: `ports.0.address`: nothing says where",
    );
}

#[test]
fn a_probe_is_one_question_to_the_application() {
    for (from, to, expected) in [
        (
            "app/startup",
            "app/begin",
            "`probes.entries.app/begin`: `app/begin` is not",
        ),
        ("app/startup", "startup", "`probes.entries.startup`"),
        (
            "{ tcp: { port: 5432 }",
            "{ tcp: { port: 1 }, grpc: { port: 1 }",
            "exactly one way",
        ),
        (
            "{ tcp: { port: 5432 }, timeout: 1s }",
            "{ timeout: 1s }",
            "exactly one way",
        ),
        ("port: 5432", "port: 19021", "19021 is this sidecar's own"),
        (
            "port: 5432",
            "port: 0",
            "`probes.entries.app/readiness.tcp.port`",
        ),
        (
            "name: x, value: y",
            "name: 'a b', value: y",
            "http.headers.0`",
        ),
        (
            "secret: 0123456789abcdef",
            "secret: 0123 #",
            "`probes.secret`: whoever guesses",
        ),
        ("grpc: { port: 9000", "grpc: { prot: 9000", "unknown field"),
        (
            "timeout: 1s }\n    app/readiness",
            "timeout: 0s }\n    app/readiness",
            "liveness.timeout`",
        ),
    ] {
        check_cluster(from, to, expected);
    }
}
