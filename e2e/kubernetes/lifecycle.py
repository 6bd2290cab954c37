"""Pods come and go under constant load; and what a sidecar costs at a pod's start."""

import datetime
import statistics
import time

from harness import (ANY_HTTP, Load, check, container, deployment, expect, is_meshed, pod, service, shop_container,
                     until)

NS = "e2e-life"
STARTUP_SECONDS_MAX = 10.0
DELAY_SECONDS_MAX = 0.5


def setup(cluster):
    if NS in cluster.made:
        return
    cluster.namespace(NS, service_accounts=["friend", "server"])
    cluster.apply(orders(cluster, 3), service(NS, "orders", 80, "http"), service(NS, "direct", 8080, 8080, app="orders", clusterIP="None"),
                  cluster.allow(NS, "orders", "orders", "http", ["friend"], ANY_HTTP))
    cluster.await_rollout(NS, "deployment/orders")
    cluster.live(NS, "orders")


def orders(cluster, replicas, **more):
    return deployment(NS, "orders", shop_container(cluster, "orders", 8080), replicas=replicas, service_account="server", **more)


def load(cluster, name):
    setup(cluster)
    return Load(cluster, NS, name, f"http://orders.{NS}/orders/7", service_account="friend", rate=100)


def names(cluster):
    return {item["metadata"]["name"] for item in cluster.pods(NS, "app=orders")}


@check
def rolling_update(cluster):
    """two rolling updates under constant load fail no call, without any preStop"""
    constant = load(cluster, "rolling")
    for _ in range(2):
        before = names(cluster)
        cluster.kubectl("-n", NS, "rollout", "restart", "deployment/orders")
        cluster.await_rollout(NS, "deployment/orders")
        until("the old pods are gone", lambda: not before & {item["metadata"]["name"] for item in cluster.get(f"/api/v1/namespaces/{NS}/pods")["items"]})
        constant.more(100)
    print(f"      {constant.stop_without_failure()} calls, none failed")


@check
def scale_down(cluster):
    """scaling from five to one and back under constant load fails no call"""
    constant = load(cluster, "scaling")
    for replicas in (5, 1, 3):
        cluster.kubectl("-n", NS, "scale", "deployment/orders", f"--replicas={replicas}")
        cluster.await_rollout(NS, "deployment/orders")
        until(f"{replicas} pods", lambda: len([item for item in cluster.get(f"/api/v1/namespaces/{NS}/pods?labelSelector=app%3Dorders")["items"]]) == replicas)
        constant.more(100)
    print(f"      {constant.stop_without_failure()} calls, none failed")


@check
def eviction(cluster):
    """evicting each pod in turn under constant load fails no call"""
    constant = load(cluster, "evicting")
    for name in names(cluster):
        status, answer = cluster.request("POST", f"/api/v1/namespaces/{NS}/pods/{name}/eviction",
                                         {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NS}})
        expect(status == 201, status, answer)
        cluster.kubectl("-n", NS, "wait", "--for=delete", f"pod/{name}", "--timeout=60s")
        cluster.await_rollout(NS, "deployment/orders")
        constant.more(50)
    print(f"      {constant.stop_without_failure()} calls, none failed")


@check
def node_side_eviction(cluster):
    """a pod that its kubelet evicts under constant load fails no call"""
    setup(cluster)
    full = shop_container(cluster, "orders", 8080)
    # `filler` goes over the pod's allowance when told to; the kubelet then evicts the pod.
    filler = container(cluster.images.tools, ["-c", "trap 'exit 0' TERM; while :; do sleep 1 & wait; done"], command=["sh"], name="filler",
                       volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}])
    cluster.apply(pod(NS, "evicted", full, filler, labels={"app": "orders"}, service_account="server",
                      volumes=[{"name": "scratch", "emptyDir": {"sizeLimit": "1Mi"}}]))
    cluster.await_pods(NS, "evicted")
    constant = load(cluster, "pressed")
    until("the pod is called", lambda: cluster.counted(NS, "evicted", "sidegate_requests_total", direction="inbound") > 10)
    cluster.exec(NS, "evicted", "filler", "dd", "if=/dev/zero", "of=/scratch/full", "bs=1M", "count=8", code=None)
    # A kubelet measures a volume once in one to two minutes (volumeStatsAggPeriod, with jitter).
    until("the kubelet evicts it", lambda: cluster.pod(NS, "evicted")["status"].get("reason") == "Evicted", seconds=180)
    constant.more(100)
    print(f"      {constant.stop_without_failure()} calls, none failed")
    cluster.kubectl("-n", NS, "delete", "pod", "evicted", "--wait=false")


def moment(text):
    text = text.replace("Z", "+00:00")
    whole, _, fraction = text.partition(".")
    if fraction:
        digits, sign, zone = fraction.partition("+")
        text = f"{whole}.{digits[:6]}{sign}{zone}"
    return datetime.datetime.fromisoformat(text)


def first_line(cluster, namespace, name, which):
    """When a container wrote its first line."""
    said = cluster.kubectl("-n", namespace, "logs", name, "-c", which, "--timestamps")
    return moment(said.split()[0])


@check
def startup_figures(cluster):
    """label and restart to ready takes under 10 s above the pods' own start; the application starts under 0.5 s later than beside an empty sidecar"""
    namespace = cluster.namespace("e2e-start", meshed=False)
    app = lambda: shop_container(cluster, "orders", 8080)
    clock = Clock(cluster, namespace)
    cluster.apply(deployment(namespace, "orders", app()))
    cluster.await_rollout(namespace, "deployment/orders")
    own = clock.restart()
    # The kubelet looks once a second whether one container may follow another. That is not the mesh's, so the
    # measure is a pod with the same containers that do nothing.
    says = lambda name, more: container(cluster.images.tools, ["-c", f"echo {name}; {more}"], command=["sh"], name=name)
    hook = {"postStart": {"exec": {"command": ["true"]}}}
    empty = dict(says("empty", "trap 'exit 0' TERM; while :; do sleep 1 & wait; done"), restartPolicy="Always", lifecycle=hook)
    cluster.apply(deployment(namespace, "orders", app(), initContainers=[says("first", "true"), empty]))
    cluster.await_rollout(namespace, "deployment/orders")
    beside_empty = delays(cluster, namespace, clock, "empty")
    cluster.apply(deployment(namespace, "orders", app()))
    cluster.await_rollout(namespace, "deployment/orders")
    started = clock.now()
    cluster.kubectl("label", "namespace", namespace, "sidegate.dev/inject=enabled")
    cluster.await_bundle(namespace)
    labelled = clock.now() - started
    meshed = clock.restart() + labelled
    beside_ours = delays(cluster, namespace, clock, "sidegate-proxy")
    shown = lambda seconds: ", ".join(f"{each * 1000:.0f}" for each in seconds)
    print(f"      restart to ready: {own:.1f} s alone, {meshed:.1f} s with label and sidecar")
    print(f"      application after its sidecar: {shown(beside_ours)} ms; after one that does nothing: {shown(beside_empty)} ms")
    expect(meshed - own < STARTUP_SECONDS_MAX, own, meshed)
    expect(statistics.median(beside_ours) - statistics.median(beside_empty) < DELAY_SECONDS_MAX, beside_ours, beside_empty)
    cluster.leave(namespace)


def delays(cluster, namespace, clock, sidecar):
    """The seconds between the first lines of a sidecar and of its application, of five restarts."""
    found = []
    for _ in range(5):
        clock.restart()
        item = until("one pod", lambda: _only(cluster.pods(namespace)))[0]
        expect(is_meshed(item) == (sidecar == "sidegate-proxy"), item["metadata"]["name"], "is not what is measured")
        name = item["metadata"]["name"]
        found.append((first_line(cluster, namespace, name, "app") - first_line(cluster, namespace, name, sidecar)).total_seconds())
    return found


def _only(items):
    return items[0] if len(items) == 1 else None


class Clock:
    """Times restarts of the deployment `orders`."""

    def __init__(self, cluster, namespace):
        self.cluster, self.namespace, self.now = cluster, namespace, time.monotonic

    def restart(self):
        started = self.now()
        self.cluster.kubectl("-n", self.namespace, "rollout", "restart", "deployment/orders")
        self.cluster.await_rollout(self.namespace, "deployment/orders")
        return self.now() - started
