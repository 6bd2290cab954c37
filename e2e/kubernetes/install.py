"""Install, its second time, its checks; last of all uninstall, which leaves nothing behind."""

import json

from harness import (ANY_HTTP, REPOSITORY, SYSTEM, Load, caller, check, deployment, expect, service, shop_container,
                     until)

NS = "e2e-leave"


def manifests(cluster):
    return cluster.sidegate("install", *cluster.images.flags)


def versions(cluster):
    """uid and resourceVersion of everything that install applies and nobody else writes."""
    out = cluster.kubectl("get", "-f", "-", "-o", "json", stdin=manifests(cluster))
    kept = {}
    for item in json.loads(out)["items"]:
        metadata = item["metadata"]
        kept[f"{item['kind']}/{metadata.get('namespace', '')}/{metadata['name']}"] = metadata.get("generation", metadata["resourceVersion"])
    return kept


@check
def applied_twice(cluster):
    """applying the same manifests again changes nothing, and `kubectl diff` is clean"""
    before = versions(cluster)
    said = cluster.kubectl("apply", "-f", "-", stdin=manifests(cluster))
    changed = [line for line in said.splitlines() if not line.endswith(" unchanged")]
    expect(not changed, changed)
    expect(versions(cluster) == before, before, versions(cluster))
    out = cluster.kubectl("diff", "-f", "-", stdin=manifests(cluster))  # Exit code 1 where something differs.
    expect(not out.strip(), out)


@check
def kustomize_base_is_the_same(cluster):
    """the kustomize base in deploy/ applies cleanly beside what install prints"""
    base = REPOSITORY / "deploy" / "kubernetes"
    out = cluster.kubectl("kustomize", str(base))
    cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=out)


@check
def checks_pass(cluster):
    """`sidegate check` finds nothing wrong"""
    out = cluster.sidegate("check")
    expect("✘" not in out, out)


@check
def least_rights(cluster):
    """no rule of the control plane has a wildcard, and only the CA reads its Secret"""
    for kind in ("clusterroles", "roles"):
        path = f"/apis/rbac.authorization.k8s.io/v1/{kind}" if kind == "clusterroles" else f"/apis/rbac.authorization.k8s.io/v1/namespaces/{SYSTEM}/roles"
        for item in cluster.get(path)["items"]:
            if item["metadata"]["name"].startswith("sidegate"):
                for rule in item["rules"]:
                    expect("*" not in rule["verbs"] + rule.get("resources", []) + rule.get("apiGroups", []), item["metadata"]["name"], rule)
    may = lambda who, verb, what, *more: cluster.kubectl("auth", "can-i", verb, what, f"--as=system:serviceaccount:{SYSTEM}:sidegate-{who}", *more,
                                                         fails=None).strip()
    for who in ("controller", "injector"):
        for more in (["-n", SYSTEM], ["-n", "default"], ["-A"]):
            expect(may(who, "get", "secrets", *more) == "no", who, more)
    expect(may("ca", "get", "secret/sidegate-ca", "-n", SYSTEM) == "yes", "the CA its own")
    expect(may("ca", "get", "secrets", "-n", "default") == "no" and may("ca", "list", "secrets", "-A") == "no", "the CA others'")
    for verb, what in (("get", "authorizationpolicies.sidegate.dev"), ("create", "pods")):
        expect(may("ca", verb, what, "-A") == "no", "ca", verb, what)


def left(cluster):
    """What of ours is still there."""
    found = []
    for kind in ("namespaces", "clusterroles", "clusterrolebindings", "mutatingwebhookconfigurations", "validatingwebhookconfigurations",
                 "validatingadmissionpolicies", "validatingadmissionpolicybindings", "customresourcedefinitions", "priorityclasses", "apiservices"):
        for name in cluster.kubectl("get", kind, "-o", "name").split():
            if "sidegate" in name:
                found.append(name)
    for kind in ("configmaps", "roles", "rolebindings", "secrets", "leases", "serviceaccounts"):
        for item in json.loads(cluster.kubectl("get", kind, "-A", "-o", "json"))["items"]:
            if "sidegate" in item["metadata"]["name"]:
                found.append(f"{kind}/{item['metadata']['namespace']}/{item['metadata']['name']}")
    return found


@check
def uninstall(cluster):
    """uninstall refuses while meshed pods exist; forced, under load, no call fails, and nothing is left behind"""
    cluster.namespace(NS, service_accounts=["friend", "server"])
    cluster.apply(deployment(NS, "orders", shop_container(cluster, "orders", 8080), replicas=2, service_account="server"),
                  service(NS, "orders", 80, "http"), cluster.allow(NS, "orders", "orders", "http", ["friend"], ANY_HTTP))
    cluster.await_rollout(NS, "deployment/orders")
    cluster.live(NS, "orders")
    said = cluster.sidegate("uninstall", code=1)
    expect("meshed" in said and "--force" in said, said)
    load = Load(cluster, NS, "leaving", f"http://orders.{NS}/orders/7", service_account="friend")
    cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=cluster.sidegate("uninstall", "--force"), timeout=300)
    until(lambda: f"nothing is left, but {left(cluster)}", lambda: not left(cluster), every=0.5)
    load.more(200)
    # And a pod that comes now comes without a sidecar.
    cluster.apply(caller(cluster, NS, "plain"))
    cluster.await_pods(NS, "plain")
    expect("initContainers" not in cluster.pod(NS, "plain")["spec"], "injected after the uninstall")
    print(f"      {load.stop_without_failure()} calls, none failed")
    cluster.leave(NS)
