"""What an unmeshed pod, and what a process inside a meshed pod, may try."""

import json

from harness import (Skipped, caller, check, container, deployment, expect, pod, service, shop_container, until,
                     workload)

NS = "e2e-bypass"


def setup(cluster):
    """orders, which only `friend` may read; `friend` and `guest` with a shell and curl, `outside` without a sidecar."""
    if NS in cluster.made:
        return
    cluster.namespace(NS, service_accounts=["friend", "guest", "server"])
    shell = lambda **more: container(cluster.images.tools, ["-c", "exec sleep infinity"], command=["sh"], **more)
    reads = [{"http": {"methods": ["GET"], "paths": ["/orders/*"]}}]
    cluster.apply(
        deployment(NS, "orders", shop_container(cluster, "orders", 8080), service_account="server"), service(NS, "orders", 80, "http"),
        cluster.allow(NS, "orders", "orders", "http", ["friend"], reads),
        pod(NS, "guest", shell(), service_account="guest", terminationGracePeriodSeconds=1),
        pod(NS, "root", shell(securityContext={"runAsUser": 0, "capabilities": {"drop": ["ALL"]}}), service_account="guest", terminationGracePeriodSeconds=1),
        pod(NS, "outside", shell(), service_account="friend", labels={"sidegate.dev/inject": "disabled"}, terminationGracePeriodSeconds=1))
    cluster.await_rollout(NS, "deployment/orders")
    cluster.await_pods(NS, "guest", "root", "outside")
    cluster.live(NS, "orders")


def orders_ip(cluster):
    return cluster.pods(NS, "app=orders")[0]["status"]["podIP"]


def curl(cluster, who, *arguments):
    """The exit code, the status and what was said."""
    code, said = cluster.exec(NS, who, "app", "curl", "-sS", "--max-time", "10", "-w", "\\n%{http_code}", *arguments, code=None)
    return code, said


def refused(cluster, who, *arguments):
    """Nothing of orders is told."""
    code, said = curl(cluster, who, *arguments)
    expect('"item"' not in said and not said.rstrip().endswith("200"), who, arguments, code, said)
    return said


@check
def unmeshed_is_refused(cluster):
    """a pod without a sidecar reaches no meshed pod, by Service, by pod IP or at the sidecar's port, and that is on record"""
    setup(cluster)
    address = orders_ip(cluster)
    for url in (f"http://orders.{NS}/orders/7", f"http://{address}:8080/orders/7", f"http://{address}:19006/orders/7"):
        refused(cluster, "outside", url)
    cluster.record(NS, "app=orders", lambda record: "source" not in record and "plaintext" in record.get("reason", ""), direction="inbound")
    for port in (19000, 19001):
        code, said = curl(cluster, "outside", f"http://{address}:{port}/config")
        expect(code != 0, "a port that listens on loopback only", port, said)
    ask = f"printf 'GET /orders/7 HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n' | openssl s_client -connect {address}:19006 -alpn sidegate/1 -tls1_3 -ign_eof 2>&1"
    _, said = cluster.exec(NS, "outside", "app", "sh", "-c", ask, code=None)
    expect("CONNECTED" in said and '"item"' not in said, said)


@check
def any_uid_is_redirected(cluster):
    """whatever uid calls, the sidecar takes the call: root, the application's, another"""
    setup(cluster)
    for who in ("root", "guest"):
        said = refused(cluster, who, f"http://orders.{NS}/orders/7")
        expect(said.rstrip().endswith("403"), who, said)
    # A second container under a uid of its own shares the pod's network, and its sidecar.
    own = container(cluster.images.tools, ["-c", "exec sleep infinity"], command=["sh"], securityContext={"runAsUser": 4242, "runAsNonRoot": True})
    cluster.apply(pod(NS, "other", own, service_account="guest", terminationGracePeriodSeconds=1))
    cluster.await_pods(NS, "other")
    said = refused(cluster, "other", f"http://orders.{NS}/orders/7")
    expect(said.rstrip().endswith("403"), said)


@check
def raw_addresses(cluster):
    """a pod IP, with and without a false Host, is the same destination under the same policy"""
    setup(cluster)
    address = orders_ip(cluster)
    for more in ([], ["-H", "Host: elsewhere.example"], ["-H", f"Host: orders.{NS}"]):
        refused(cluster, "guest", f"http://{address}:8080/orders/7", *more)
    refused(cluster, "guest", "--http2-prior-knowledge", f"http://{address}:8080/orders/7")
    refused(cluster, "guest", "-k", f"https://{address}:8080/orders/7")
    refused(cluster, "guest", f"http://{address}:19006/orders/7")


@check
def connect_is_refused(cluster):
    """CONNECT through the own sidecar opens nothing"""
    setup(cluster)
    address = orders_ip(cluster)
    for proxy in ("127.0.0.1:19001", f"orders.{NS}:80"):
        refused(cluster, "guest", "--proxytunnel", "-x", f"http://{proxy}", f"http://{address}:8080/orders/7")


@check
def own_ports_and_loops(cluster):
    """the sidecar's own ports are no destination: not by loopback, not by the pod's own address, and nothing loops"""
    setup(cluster)
    own = cluster.pod(NS, "guest")["status"]["podIP"]
    for target in (f"{own}:19006", f"{own}:19001", f"{own}:19000", "127.0.0.1:19001", "127.0.0.1:19006"):
        refused(cluster, "guest", f"http://{target}/orders/7")
    before = cluster.counted(NS, "guest", "sidegate_requests_total")
    refused(cluster, "guest", f"http://{own}:19001/orders/7")
    expect(cluster.counted(NS, "guest", "sidegate_requests_total") - before < 10, "a loop")
    code, said = curl(cluster, "guest", "http://127.0.0.1:19000/config")
    expect("PRIVATE KEY" not in said and probe_secret(cluster, "guest") not in said, "administration tells a secret")
    said = refused(cluster, "guest", "-H", "Host: evil.example", "http://127.0.0.1:19000/config")
    expect("spiffe" not in said, said)


def probe_secret(cluster, name):
    """What the kubelet must show to be served a probe; long and random."""
    sidecar = next(each for each in cluster.pod(NS, name)["spec"]["initContainers"] if each["name"] == "sidegate-proxy")
    config = next(each["value"] for each in sidecar["env"] if each["name"] == "SIDEGATE_CONFIG")
    secret = (json.loads(config).get("probes") or {}).get("secret", "")
    return secret or "no probe, no secret"


@check
def spoofed_identity(cluster):
    """identity headers of a caller give nothing"""
    setup(cluster)
    spoof = workload("friend", NS)
    refused(cluster, "guest", "-H", f"x-forwarded-client-cert: URI={spoof}", "-H", f"sidegate-client-id: {spoof}", f"http://orders.{NS}/orders/7")


@check
def other_protocols_in(cluster):
    """inbound UDP is dropped unless it is named"""
    setup(cluster)
    listen = "import socket; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 5353)); print('listening', flush=True)\nwhile True: print('heard', s.recvfrom(100)[0].decode(), flush=True)"
    udp = container(cluster.images.tools, ["-c", listen], command=["python3"])
    namespace = NS
    cluster.apply(pod(namespace, "udp", udp, terminationGracePeriodSeconds=1),
                  pod(namespace, "udp-plain", udp, terminationGracePeriodSeconds=1, labels={"sidegate.dev/inject": "disabled"}))
    cluster.await_pods(namespace, "udp", "udp-plain")
    for name in ("udp", "udp-plain"):
        until(f"{name} listens", lambda: "listening" in cluster.log(namespace, name, "app"))
    send = "import socket,sys; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); [s.sendto(b'knock', (ip, 5353)) for ip in sys.argv[1:]]"
    addresses = [cluster.pod(namespace, name)["status"]["podIP"] for name in ("udp", "udp-plain")]
    cluster.exec(namespace, "outside", "app", "python3", "-c", send, *addresses)
    until("the unmeshed pod hears it", lambda: "heard knock" in cluster.log(namespace, "udp-plain", "app"))
    expect("heard" not in cluster.log(namespace, "udp", "app"), "the meshed pod heard UDP")


@check
def ipv6(cluster):
    """the pod's IPv6 address, where there is one, is guarded as its IPv4 address"""
    setup(cluster)
    addresses = [each["ip"] for each in cluster.pods(NS, "app=orders")[0]["status"]["podIPs"] if ":" in each["ip"]]
    if not addresses:
        raise Skipped("the pods of this cluster have no IPv6 address")
    refused(cluster, "outside", f"http://[{addresses[0]}]:8080/orders/7")
    refused(cluster, "guest", f"http://[{addresses[0]}]:8080/orders/7")


@check
def friend_is_served(cluster):
    """and beside all that the one who is allowed is served"""
    setup(cluster)
    cluster.apply(caller(cluster, NS, "friend", service_account="friend"))
    cluster.await_pods(NS, "friend")
    told = cluster.call(NS, "friend", "http", f"http://orders.{NS}/orders/7")
    expect(told.get("status") == 200 and json.loads(told["body"])["id"] == 7, told)
