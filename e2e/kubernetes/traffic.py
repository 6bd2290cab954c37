"""Calls of every kind between nodes, allowed and denied, and to every kind of destination."""

import json
import subprocess
import time

from harness import (ANY_HTTP, SYSTEM, Skipped, caller, check, container, deployment, expect, pod, service, shop_container, until,
                     workload)

NS = "e2e-traffic"
TCP = [{"tcp": {}}]


def setup(cluster):
    """orders, inventory and ledger on the last node; callers `friend` and `stranger` on the first."""
    if NS in cluster.made:
        return
    cluster.namespace(NS, service_accounts=["friend", "stranger", "server"])
    there = {"nodeSelector": {"kubernetes.io/hostname": cluster.nodes[-1]}, "service_account": "server"}
    here = {"nodeSelector": {"kubernetes.io/hostname": cluster.nodes[0]}}
    grpc = [{"grpc": {"service": "shop.v1.Inventory", "methods": ["*"]}}]
    websocket = ANY_HTTP + [{"http": {"methods": ["GET"], "paths": ["/orders/*/events"], "upgrades": ["websocket"]}}]
    cluster.apply(
        deployment(NS, "orders", shop_container(cluster, "orders", 8080), **there), service(NS, "orders", 80, "http"),
        deployment(NS, "inventory", shop_container(cluster, "inventory", 9000), **there), service(NS, "inventory", 80, "grpc"),
        deployment(NS, "ledger", shop_container(cluster, "ledger", 6379), **there), service(NS, "ledger", 6379, "tcp"),
        service(NS, "orders-headless", 8080, "http", app="orders", clusterIP="None"),
        cluster.allow(NS, "orders", "orders", "http", ["friend"], websocket),
        cluster.allow(NS, "inventory", "inventory", "grpc", ["friend"], grpc),
        cluster.allow(NS, "ledger", "ledger", 6379, ["friend"], TCP),
        caller(cluster, NS, "friend", service_account="friend", **here),
        caller(cluster, NS, "stranger", service_account="stranger", **here))
    cluster.await_rollout(NS, "deployment/orders", "deployment/inventory", "deployment/ledger")
    cluster.await_pods(NS, "friend", "stranger")
    for name in ("orders", "inventory", "ledger"):
        cluster.live(NS, name)


@check
def rest(cluster):
    """REST across nodes: allowed with both records and the caller's identity, denied with a decision that the log explains"""
    setup(cluster)
    told = cluster.call(NS, "friend", "http", f"http://orders.{NS}/orders/7")
    expect(told.get("status") == 200 and json.loads(told["body"])["id"] == 7, told)
    inbound = cluster.record(NS, "app=orders", direction="inbound", path="/orders/7", status=200)
    expect(inbound["source"] == workload("friend", NS) and inbound["destination"] == workload("server", NS), inbound)
    expect(inbound["decision"] == "allow" and inbound["policy"] == f"{NS}/orders" and inbound["tls_version"] == "TLSv1.3", inbound)
    outbound = cluster.record(NS, "friend", direction="outbound", path="/orders/7", status=200)
    expect(outbound["destination_service"] == f"orders.{NS}:80", outbound)
    told = cluster.call(NS, "friend", "http", f"http://orders.{NS}/headers", "-H", "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/x/sa/y")
    seen = json.loads(told["body"])
    expect(seen["sidegate-client-id"] == workload("friend", NS) and seen["x-forwarded-client-cert"] == f"URI={workload('friend', NS)}", seen)
    told = cluster.call(NS, "stranger", "http", f"http://orders.{NS}/orders/7")
    expect(told.get("status") == 403, told)
    denied = cluster.record(NS, "app=orders", decision_id=told["headers"]["sidegate-decision"])
    expect(denied["decision"] == "deny" and denied["source"] == workload("stranger", NS) and denied["reason"] == "no rule admits", denied)


@check
def nodes_differ(cluster):
    """caller and called are on two nodes, where there are two"""
    setup(cluster)
    if len(cluster.nodes) < 2:
        raise Skipped("one node only")
    (orders,) = cluster.pods(NS, "app=orders")
    expect(orders["spec"]["nodeName"] != cluster.pod(NS, "friend")["spec"]["nodeName"], "same node")


@check
def grpc(cluster):
    """gRPC of all four kinds across nodes, and PERMISSION_DENIED"""
    setup(cluster)
    for kind in ("get", "watch", "restock", "reserve"):
        told = cluster.call(NS, "friend", "grpc", f"inventory.{NS}:80", kind)
        expect(told.get("code") == "Ok", kind, told)
    record = cluster.record(NS, "app=inventory", grpc_method="Reserve", grpc_status=0)
    expect(record["protocol"] == "grpc" and record["source"] == workload("friend", NS), record)
    told = cluster.call(NS, "stranger", "grpc", f"inventory.{NS}:80", "get")
    expect(told.get("code") == "PermissionDenied", told)
    cluster.record(NS, "app=inventory", grpc_status=7, decision="deny")


@check
def websocket(cluster):
    """a WebSocket across nodes, and one that is refused"""
    setup(cluster)
    told = cluster.call(NS, "friend", "websocket", f"ws://orders.{NS}/orders/7/events", "packed")
    expect(told.get("said") == ["packed"], told)
    cluster.record(NS, "app=orders", protocol="websocket", path="/orders/7/events")
    told = cluster.call(NS, "stranger", "websocket", f"ws://orders.{NS}/orders/7/events", "packed")
    expect(told.get("status") == 403, told)


@check
def tcp_server_first(cluster):
    """TCP in which the server speaks first, across nodes, and a stranger hears nothing"""
    setup(cluster)
    told = cluster.call(NS, "friend", "tcp", f"ledger.{NS}:6379", "ADD e2e 5", "BALANCE e2e")
    expect(told.get("said") == ["220 ledger ready", "250 5", "250 5"], told)
    record = cluster.record(NS, "app=ledger", protocol="tcp", decision="allow")
    expect(record["request_bytes"] > 0 and record["response_bytes"] > 0 and record["source"] == workload("friend", NS), record)
    told = cluster.call(NS, "stranger", "tcp", f"ledger.{NS}:6379", "BALANCE e2e")
    expect("said" not in told, told)
    cluster.record(NS, "app=ledger", decision="deny", source=workload("stranger", NS))


LISTEN = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 6379))
while told := connection.recv(4096):
    print(told.decode().strip(), flush=True)
print("ended", flush=True)
"""


@check
def revoked_loses_its_open_connection(cluster):
    """an identity that is revoked loses the connection that it has open, within ten seconds, and gets no other"""
    setup(cluster)
    # Revoked identities stay revoked, so each run has one of its own.
    name = f"leaver-{int(time.time())}"
    tools = container(cluster.images.tools, ["-c", "trap exit TERM; while :; do sleep 1; done"], command=["sh"])
    cluster.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NS}},
                  cluster.allow(NS, "leaver", "ledger", 6379, [name], TCP),
                  pod(NS, name, tools, service_account=name))
    cluster.live(NS, "leaver")
    cluster.await_pods(NS, name)
    open_connection = subprocess.Popen(
        ["kubectl", "-n", NS, "exec", name, "-c", "app", "--", "python3", "-c", LISTEN, f"ledger.{NS}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        expect(open_connection.stdout.readline().strip() == "220 ledger ready", "it was not open before")
        cluster.exec(SYSTEM, "sidegate-ca-0", "ca", "/sidegate-ca", "revoke", workload(name, NS))
        started = time.monotonic()
        told = open_connection.communicate(timeout=60)[0]
        took = time.monotonic() - started
    finally:
        open_connection.kill()
    print(f"      ended {took:.1f} s after the end of the command")
    expect(took < 10, took, told)
    told = cluster.exec(NS, name, "app", "python3", "-c", LISTEN, f"ledger.{NS}", code=None)
    expect("220" not in told[1], told)
    cluster.record(NS, "app=ledger", decision="deny", error="tls_handshake", reason=f"revoked, claimed {workload(name, NS)}")


@check
def mariadb(cluster):
    """a real MariaDB across nodes: allowed for one, refused for another, port known by its number"""
    setup(cluster)
    database = container(cluster.images.mariadb, [], port=("mysql", 3306), command=["sh", "-ec", """
        mariadb-install-db --user=mysql --datadir=/tmp/data --auth-root-authentication-method=normal --skip-test-db >/dev/null
        exec mariadbd --user=mysql --datadir=/tmp/data --socket=/tmp/mysql.sock --pid-file=/tmp/mysql.pid --bind-address=0.0.0.0 \\
            --init-file=/config/init.sql --skip-log-error"""],
        volumeMounts=[{"name": "config", "mountPath": "/config"}],
        readinessProbe={"tcpSocket": {"port": 3306}, "periodSeconds": 1, "failureThreshold": 60})
    client = lambda name: pod(NS, f"sql-{name}", container(cluster.images.mariadb, ["-c", "exec sleep infinity"], command=["sh"]),
                              service_account=name, nodeSelector={"kubernetes.io/hostname": cluster.nodes[0]},
                              terminationGracePeriodSeconds=1)
    cluster.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mariadb", "namespace": NS}, "data": {
            "init.sql": "CREATE DATABASE shop;\nCREATE USER shop IDENTIFIED BY 'tea';\nGRANT ALL ON shop.* TO shop;\n"}},
        deployment(NS, "mariadb", database, service_account="server", volumes=[{"name": "config", "configMap": {"name": "mariadb"}}],
                   nodeSelector={"kubernetes.io/hostname": cluster.nodes[-1]}),
        service(NS, "mariadb", 3306, "mysql"),
        cluster.allow(NS, "mariadb", "mariadb", 3306, ["friend"], TCP),
        client("friend"), client("stranger"))
    cluster.await_rollout(NS, "deployment/mariadb")
    cluster.await_pods(NS, "sql-friend", "sql-stranger")
    sql = "CREATE TABLE IF NOT EXISTS t(n INT); INSERT INTO t VALUES (41); SELECT MAX(n)+1 FROM t;"
    ask = lambda name, code: cluster.exec(NS, f"sql-{name}", "app", "mariadb", "-h", f"mariadb.{NS}", "-u", "shop", "-ptea",
                                          "--skip-ssl", "-N", "shop", "-e", sql, code=code)
    expect(ask("friend", 0).strip() == "42", "the answer")
    code, said = ask("stranger", None)
    expect(code != 0 and "42" not in said, code, said)
    record = cluster.record(NS, "app=mariadb", decision="allow", protocol="tcp")
    expect(record["source"] == workload("friend", NS) and record["response_bytes"] > 50, record)
    cluster.record(NS, "app=mariadb", decision="deny", source=workload("stranger", NS))


@check
def addresses_of_every_kind(cluster):
    """a service by ClusterIP, by short and long name, headless, by pod IP, with several and with named ports"""
    setup(cluster)
    address = cluster.get(f"/api/v1/namespaces/{NS}/services/orders")["spec"]["clusterIP"]
    (orders,) = cluster.pods(NS, "app=orders")
    pod_ip = orders["status"]["podIP"]
    several = service(NS, "several", 80, "http", app="orders")
    several["spec"]["ports"] = [{"name": "a", "port": 80, "targetPort": "http"}, {"name": "b", "port": 8081, "targetPort": 8080, "appProtocol": "http"}]
    cluster.apply(several)
    for url in (f"http://{address}", "http://orders", f"http://orders.{NS}.svc", f"http://orders.{NS}.svc.cluster.local:80",
                f"http://orders-headless.{NS}:8080", f"http://{pod_ip}:8080", f"http://several.{NS}", f"http://several.{NS}:8081"):
        told = until(url, lambda: _ok(cluster.call(NS, "friend", "http", f"{url}/orders/7")), seconds=15)[0]
        expect(told["status"] == 200, url, told)
        told = cluster.call(NS, "stranger", "http", f"{url}/orders/7")
        expect(told.get("status") == 403, url, told)


def _ok(told):
    return told if told.get("status") == 200 else None


@check
def outside_the_mesh(cluster):
    """what is not the mesh's passes as bytes and is on record without an identity; egress: deny refuses it"""
    setup(cluster)
    tools = lambda namespace: pod(namespace, "tools", container(cluster.images.tools, ["-c", "exec sleep infinity"], command=["sh"]),
                                  terminationGracePeriodSeconds=1, service_account="default")
    plain = cluster.namespace("e2e-outside", meshed=False)
    cluster.apply(deployment(plain, "orders", shop_container(cluster, "orders", 8080)), service(plain, "orders", 80, "http"), tools(NS))
    cluster.await_rollout(plain, "deployment/orders")
    cluster.await_pods(NS, "tools")
    told = cluster.call(NS, "friend", "http", f"http://orders.{plain}/orders/7")
    expect(told.get("status") == 200, told)
    record = cluster.record(NS, "friend", lambda record: record.get("destination_address", "").endswith((":80", ":8080")) and "destination" not in record,
                            direction="outbound")
    expect("destination" not in record, record)
    said = cluster.exec(NS, "tools", "app", "curl", "-sSk", "--max-time", "10", "https://kubernetes.default.svc/version", code=None)
    expect("gitVersion" in said[1] or '"code": 40' in said[1], "the API server, through TLS of its own:", said)
    cluster.kubectl("annotate", "namespace", NS, "sidegate.dev/egress=deny", "--overwrite")
    until("egress is refused", lambda: "status" not in cluster.call(NS, "friend", "http", f"http://orders.{plain}/orders/7")
          or cluster.call(NS, "friend", "http", f"http://orders.{plain}/orders/7").get("status") in (403, 502, 503), seconds=20)
    told = cluster.call(NS, "friend", "http", f"http://orders.{NS}/orders/7")
    expect(told.get("status") == 200, "the mesh's own services go on", told)
    cluster.kubectl("annotate", "namespace", NS, "sidegate.dev/egress-")
    until("egress is allowed again", lambda: _ok(cluster.call(NS, "friend", "http", f"http://orders.{plain}/orders/7")), seconds=20)
    cluster.leave(plain)


@check
def own_service(cluster):
    """a pod that calls its own Service is authorized like anybody"""
    setup(cluster)
    (orders,) = cluster.pods(NS, "app=orders")
    name = orders["metadata"]["name"]
    for url in (f"http://orders.{NS}/orders/7", f"http://{orders['status']['podIP']}:8080/orders/7"):
        told = cluster.call(NS, name, "http", url)
        expect(told.get("status") == 403, url, told)
    cluster.record(NS, "app=orders", decision="deny", source=workload("server", NS), direction="inbound")
    told = cluster.call(NS, name, "http", "http://127.0.0.1:8080/orders/7")
    expect(told.get("status") == 200, "loopback is the pod's own", told)
