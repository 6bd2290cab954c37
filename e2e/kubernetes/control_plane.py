"""The control plane is killed, goes away and comes back, and calls that are allowed go on."""

from harness import (ANY_HTTP, RESTRICTED, SYSTEM, Load, caller, check, deployment, expect, is_meshed, service, shop_container, until)

NS = "e2e-control"
WORKLOADS = ("statefulset/sidegate-ca", "deployment/sidegate-controller", "deployment/sidegate-injector")


def setup(cluster):
    if NS in cluster.made:
        return
    cluster.namespace(NS, service_accounts=["friend", "server"])
    cluster.apply(deployment(NS, "orders", shop_container(cluster, "orders", 8080), replicas=2, service_account="server"),
                  service(NS, "orders", 80, "http"), service(NS, "other", 80, "http", app="orders"),
                  cluster.allow(NS, "orders", "orders", "http", ["friend"], ANY_HTTP))
    cluster.await_rollout(NS, "deployment/orders")
    cluster.live(NS, "orders")


def name_of(which):
    return which.split("/")[1]


def scale(cluster, which, replicas):
    cluster.kubectl("-n", SYSTEM, "scale", which, f"--replicas={replicas}")


@check
def killed_under_load(cluster):
    """CA, controller and injector killed in turn, then at once, under constant load: no call fails, and all come back"""
    setup(cluster)
    load = Load(cluster, NS, "steady", f"http://orders.{NS}/orders/7", service_account="friend", rate=100)
    for which in (*WORKLOADS, None):
        killed = [which] if which else list(WORKLOADS)
        items = [item for each in killed for item in cluster.pods(SYSTEM, f"app.kubernetes.io/name={name_of(each)}")]
        expect(items, "no pods of", killed)
        cluster.kubectl("-n", SYSTEM, "delete", "pod", "--grace-period=0", "--force", *[item["metadata"]["name"] for item in items])
        load.more(100)
        cluster.await_rollout(SYSTEM, *killed)
    load.more(100)
    print(f"      {load.stop_without_failure()} calls, none failed")
    cluster.apply(cluster.allow(NS, "after", "orders", "http", ["friend"], ANY_HTTP))
    cluster.live(NS, "after")


@check
def without_a_controller(cluster):
    """with no controller: calls go on, an unknown destination fails by name, a new sidecar is not ready rather than open"""
    setup(cluster)
    cluster.apply(caller(cluster, NS, "before", service_account="friend"))
    cluster.await_pods(NS, "before")
    url = f"http://orders.{NS}/orders/7"
    expect(cluster.call(NS, "before", "http", url).get("status") == 200, "before")
    replicas = cluster.get(f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/sidegate-controller")["spec"]["replicas"]
    load = Load(cluster, NS, "alone", url, service_account="friend")
    scale(cluster, "deployment/sidegate-controller", 0)
    try:
        until("the controller is gone", lambda: not cluster.get(f"/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io%2Fname%3Dsidegate-controller")["items"])
        load.more(100)
        told = cluster.call(NS, "before", "http", f"http://other.{NS}/orders/7")
        expect(told.get("status") != 200, "a destination that nobody knows", told)
        error = told.get("headers", {}).get("sidegate-error")
        expect(error in (None, "destination_unknown"), told)
        cluster.record(NS, "before", error="destination_unknown")
        cluster.apply(caller(cluster, NS, "after", service_account="friend"))
        until("the sidecar has started", lambda: _started(cluster, "after"))
        item = cluster.pod(NS, "after")
        expect(is_meshed(item), "injected")
        statuses = item["status"].get("containerStatuses", [])
        expect(not any(each["ready"] for each in statuses), "not ready", statuses)
        load.more(100)
        statuses = cluster.pod(NS, "after")["status"].get("containerStatuses", [])
        expect(not any(each["ready"] for each in statuses), "still not ready", statuses)
    finally:
        scale(cluster, "deployment/sidegate-controller", replicas)
    cluster.await_rollout(SYSTEM, "deployment/sidegate-controller")
    cluster.await_pods(NS, "after", seconds=120)
    told = until("known again", lambda: _ok(cluster.call(NS, "before", "http", f"http://other.{NS}/orders/7")))[0]
    expect(told["status"] == 200, told)
    print(f"      {load.stop_without_failure()} calls, none failed")
    cluster.kubectl("-n", NS, "delete", "pod", "before", "after", "--wait=false")


def _started(cluster, name):
    """Whether the kubelet has started the sidecar; its status says so only after postStart."""
    events = cluster.get(f"/api/v1/namespaces/{NS}/events?fieldSelector=involvedObject.name%3D{name},reason%3DStarted")["items"]
    return any("sidegate-proxy" in event["involvedObject"].get("fieldPath", "") for event in events)


def _ok(told):
    return told if told.get("status") == 200 else None


@check
def no_pod_past_a_dead_injector(cluster):
    """with no injector a labelled namespace takes no pod rather than an unmeshed one, and the control plane itself heals"""
    setup(cluster)
    replicas = cluster.get(f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/sidegate-injector")["spec"]["replicas"]
    scale(cluster, "deployment/sidegate-injector", 0)
    try:
        until("the injector is gone", lambda: not cluster.get(f"/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io%2Fname%3Dsidegate-injector")["items"])
        said = cluster.dry_run(caller(cluster, NS, "dry"), fails=True)
        expect("sidegate" in said, said)
        strict = caller(cluster, SYSTEM, "dry")
        strict["spec"]["containers"][0]["securityContext"] = RESTRICTED
        cluster.dry_run(strict)
        cluster.dry_run(caller(cluster, NS, "dry", labels={"sidegate.dev/inject": "disabled"}))
    finally:
        scale(cluster, "deployment/sidegate-injector", replicas)
    cluster.await_rollout(SYSTEM, "deployment/sidegate-injector")
    until("pods are injected again", lambda: _injected(cluster))


@check
def either_injector_may_go(cluster):
    """of two injectors each is deleted in turn, and no pod that is made meanwhile is refused"""
    setup(cluster)
    injectors = lambda: cluster.pods(SYSTEM, "app.kubernetes.io/name=sidegate-injector")
    before = cluster.get(f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/sidegate-injector")["spec"]["replicas"]
    scale(cluster, "deployment/sidegate-injector", 2)
    try:
        cluster.await_rollout(SYSTEM, "deployment/sidegate-injector")
        made = 0
        for old in [item["metadata"]["name"] for item in injectors()]:
            cluster.kubectl("-n", SYSTEM, "delete", "pod", old, "--wait=false")
            while cluster.find(f"/api/v1/namespaces/{SYSTEM}/pods/{old}"):
                expect(is_meshed(cluster.dry_run(caller(cluster, NS, "dry"))), "a pod was made without a sidecar")
                made += 1
            cluster.await_rollout(SYSTEM, "deployment/sidegate-injector")
        print(f"      {made} pods made meanwhile, none refused")
        expect(made >= 10, made)
    finally:
        scale(cluster, "deployment/sidegate-injector", before)
        cluster.await_rollout(SYSTEM, "deployment/sidegate-injector")


def _injected(cluster):
    status, answer = cluster.request("POST", f"/api/v1/namespaces/{NS}/pods?dryRun=All", caller(cluster, NS, "dry"))
    return status == 201 and is_meshed(answer)


@check
def either_replica_may_die(cluster):
    """with two replicas each, either one of controller and CA is killed under load: no call fails, a policy is live, a pod starts"""
    setup(cluster)
    load = Load(cluster, NS, "doubled", f"http://orders.{NS}/orders/7", service_account="friend")
    cluster.kubectl("apply", "-f", "-", stdin=cluster.sidegate("install", "--ha", *cluster.images.flags))
    try:
        cluster.await_rollout(SYSTEM, *WORKLOADS)
        for which in ("statefulset/sidegate-ca", "deployment/sidegate-controller"):
            items = cluster.pods(SYSTEM, f"app.kubernetes.io/name={name_of(which)}")
            expect(len(items) == 2, which, [item["metadata"]["name"] for item in items])
            for at, item in enumerate(items):
                cluster.kubectl("-n", SYSTEM, "delete", "pod", "--grace-period=0", "--force", item["metadata"]["name"])
                # At once, with the other one alone; the sidecars of a dead controller find it.
                name = f"{name_of(which)}-{at}"
                cluster.apply(cluster.allow(NS, name, "orders", "http", ["friend"], ANY_HTTP),
                              caller(cluster, NS, name, service_account="friend"))
                cluster.live(NS, name, seconds=60)
                cluster.await_pods(NS, name)
                cluster.await_rollout(SYSTEM, which)
        load.more(100)
        print(f"      {load.stop_without_failure()} calls, none failed")
    finally:
        cluster.kubectl("apply", "-f", "-", stdin=cluster.sidegate("install", *cluster.images.flags))
        cluster.kubectl("-n", SYSTEM, "delete", "poddisruptionbudgets", "--all")
        cluster.await_rollout(SYSTEM, *WORKLOADS)
