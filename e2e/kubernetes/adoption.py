"""A live namespace comes into the mesh: audit, look, enforce, and no call is refused on the way."""

from harness import ANY_HTTP, Load, caller, check, deployment, expect, is_meshed, service, shop_container, until, workload

NS = "e2e-adopt"
PACE = {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


@check
def audit_look_enforce(cluster):
    """with half the pods meshed in audit, then all, then enforce, no call of a meshed or an unmeshed caller fails"""
    cluster.namespace(NS, meshed=False, service_accounts=["friend", "guest", "server"])
    app = lambda: shop_container(cluster, "orders", 8080)
    cluster.apply(deployment(NS, "old", app(), app="orders", replicas=2, service_account="server"), service(NS, "orders", 80, "http"))
    cluster.await_rollout(NS, "deployment/old")
    url = f"http://orders.{NS}/orders/7"
    plain = Load(cluster, NS, "plain", url, service_account="guest", meshed=False)

    # In: the label and the annotation, then pods as they come anew. Half of orders' are meshed.
    cluster.kubectl("annotate", "namespace", NS, "sidegate.dev/enforcement=audit")
    cluster.kubectl("label", "namespace", NS, "sidegate.dev/inject=enabled")
    cluster.await_bundle(NS)
    cluster.apply(deployment(NS, "new", app(), app="orders", replicas=2, service_account="server"))
    cluster.await_rollout(NS, "deployment/new")
    meshed = [is_meshed(item) for item in cluster.pods(NS, "app=orders")]
    expect(sorted(meshed) == [False, False, True, True], meshed)
    load = Load(cluster, NS, "meshed", url, service_account="friend")
    load.more(200)

    # Look: what would have been refused is on record, with its reason, of both kinds of caller. `plain` keeps the
    # connections that it has, to the old pods; a caller that connects now may come to the new ones.
    cluster.apply(caller(cluster, NS, "unmeshed", service_account="friend", labels={"sidegate.dev/inject": "disabled"}))
    cluster.await_pods(NS, "unmeshed")
    for _ in range(12):
        told = cluster.call(NS, "unmeshed", "http", url)
        expect(told.get("status") == 200, "audit takes plaintext", told)
    cluster.record(NS, "part=new", decision="would_deny", source=workload("friend", NS))
    cluster.record(NS, "part=new", lambda record: "source" not in record, decision="would_deny")
    cluster.apply(cluster.allow(NS, "orders", "orders", "http", ["friend"], ANY_HTTP))
    cluster.live(NS, "orders")
    before = cluster.counted(NS, _newest(cluster), "sidegate_requests_total", direction="inbound", decision="allow")
    until("calls are allowed by the policy", lambda: cluster.counted(
        NS, _newest(cluster), "sidegate_requests_total", direction="inbound", decision="allow") > before)
    print(f"      audit: {plain.stop_without_failure()} calls of an unmeshed caller, none failed")

    # All of it meshed, then enforced, under the meshed caller's load.
    cluster.apply(deployment(NS, "new", app(), app="orders", replicas=4, service_account="server"))
    cluster.await_rollout(NS, "deployment/new")
    cluster.kubectl("-n", NS, "delete", "deployment", "old", "--wait=true", "--timeout=60s")
    load.more(100)
    cluster.apply(caller(cluster, NS, "guest", service_account="guest"))
    cluster.await_pods(NS, "guest")
    told = cluster.call(NS, "guest", "http", url)
    expect(told.get("status") == 200, "audit serves what no policy admits", told)
    cluster.kubectl("annotate", "namespace", NS, "sidegate.dev/enforcement=enforce", "--overwrite")
    until("enforced", lambda: cluster.call(NS, "guest", "http", url).get("status") == 403, seconds=20)
    told = cluster.call(NS, "unmeshed", "http", url)
    expect(told.get("headers", {}).get("sidegate-error") == "plaintext", "a caller without a sidecar is refused", told)
    load.more(100)
    print(f"      audit to enforce: {load.stop_without_failure()} calls of a meshed caller, none failed")
    cluster.leave(NS)


def _newest(cluster):
    return cluster.pods(NS, "part=new")[-1]["metadata"]["name"]
