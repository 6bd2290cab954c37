"""Who gets a sidecar, and that every kind of workload lives with one."""

import datetime
import json

from harness import RESTRICTED, check, container, deployment, expect, is_meshed, pod, pod_spec, shop_container, until

NS = "e2e-inject"


def sleeper(cluster, **more):
    return container(cluster.images.shop, ["ledger", "--listen", "127.0.0.1:6379"], **more)


def fresh(cluster):
    if NS not in cluster.made:
        cluster.namespace(NS, service_accounts=["app"])
    return NS


def dry_pod(cluster, namespace, *containers, labels=None, annotations=None, **more):
    return pod(namespace, "dry", *(containers or [sleeper(cluster)]), labels=labels, annotations=annotations, **more)


@check
def label_decides(cluster):
    """a pod is injected where the namespace has the label, unless its own label opts out"""
    fresh(cluster)
    plain = cluster.namespace("e2e-plain", meshed=False)
    expect(is_meshed(cluster.dry_run(dry_pod(cluster, NS))), "labelled namespace")
    out = cluster.dry_run(dry_pod(cluster, NS, labels={"sidegate.dev/inject": "disabled"}))
    expect("initContainers" not in out["spec"] and "volumes" not in out["spec"], "opted out", out["spec"])
    out = cluster.dry_run(dry_pod(cluster, plain))
    expect("initContainers" not in out["spec"], "no label on the namespace", out["spec"])
    out = cluster.dry_run(dry_pod(cluster, plain, labels={"sidegate.dev/inject": "enabled"}))
    expect("initContainers" not in out["spec"], "a pod's label alone injects nothing", out["spec"])
    for namespace in ("kube-system", "sidegate-system"):
        out = cluster.dry_run(dry_pod(cluster, namespace, sleeper(cluster, securityContext=RESTRICTED)))
        expect(not is_meshed(out), namespace)


@check
def shape(cluster):
    """an injected pod: init container and sidecar first, least rights, resources, the audience-bound token, and all else untouched"""
    fresh(cluster)
    own = dict(container(cluster.images.shop, ["batch"]), name="own-init")
    out = cluster.dry_run(dry_pod(cluster, NS, sleeper(cluster), initContainers=[own]))
    names = [each["name"] for each in out["spec"]["initContainers"]]
    expect(names == ["sidegate-init", "sidegate-proxy", "own-init"], names)
    init, sidecar = out["spec"]["initContainers"][:2]
    expect(init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}, init)
    expect(sidecar["restartPolicy"] == "Always", sidecar)
    context = sidecar["securityContext"]
    expect(context["runAsUser"] == 1519 and context["runAsNonRoot"] and context["readOnlyRootFilesystem"], context)
    expect(context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"]["type"] == "RuntimeDefault", context)
    for each in (init, sidecar):
        expect(each["resources"].get("requests") and each["resources"].get("limits"), each["name"], each["resources"])
    expect(sidecar["lifecycle"]["postStart"]["exec"]["command"][1] == "wait", sidecar["lifecycle"])
    volumes = {each["name"]: each for each in out["spec"]["volumes"]}
    token = volumes["sidegate-token"]["projected"]["sources"][0]["serviceAccountToken"]
    expect(token["audience"] == "sidegate-ca" and token["expirationSeconds"] == 600, token)
    expect(volumes["sidegate-bundle"]["configMap"]["name"] == "sidegate-bundle", volumes)
    expect(out["spec"]["containers"][0]["args"] == ["ledger", "--listen", "127.0.0.1:6379"], out["spec"]["containers"])


@check
def every_kind(cluster):
    """Pod, Deployment, ReplicaSet, StatefulSet, DaemonSet, Job and CronJob all come up meshed"""
    fresh(cluster)
    app = lambda: shop_container(cluster, "orders", 8080)
    selector = {"matchLabels": {"app": "replicas"}}
    replicas = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "replicas", "namespace": NS},
                "spec": {"replicas": 1, "selector": selector,
                         "template": {"metadata": {"labels": selector["matchLabels"]}, "spec": pod_spec(app())}}}
    cluster.apply(pod(NS, "bare", app()), deployment(NS, "deployed", app()), replicas,
                  deployment(NS, "stateful", app(), kind="StatefulSet"), deployment(NS, "daemon", app(), kind="DaemonSet"))
    cluster.await_rollout(NS, "deployment/deployed", "statefulset/stateful", "daemonset/daemon")
    cluster.await_pods(NS, "bare")
    until("the replica set is ready", lambda: cluster.get(f"/apis/apps/v1/namespaces/{NS}/replicasets/replicas")["status"].get("readyReplicas") == 1)
    items = cluster.pods(NS)
    expect(len(items) == 4 + len(cluster.nodes), [item["metadata"]["name"] for item in items])
    for item in items:
        expect(is_meshed(item), item["metadata"]["name"])
    cluster.kubectl("-n", NS, "delete", "deployment,statefulset,daemonset,replicaset,pod", "--all", "--wait=false")


def job(cluster, name, *ask, kind="Job"):
    work = container(cluster.images.shop, list(ask), name="work")
    template = {"metadata": {"labels": {"app": name}}, "spec": dict(pod_spec(work, service_account="app"), restartPolicy="Never")}
    spec = {"backoffLimit": 0, "template": template}
    if kind == "CronJob":
        return {"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": name, "namespace": NS},
                "spec": {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": spec}}}
    return {"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": name, "namespace": NS}, "spec": spec}


def moment(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


@check
def jobs_complete(cluster):
    """a Job and one made from a CronJob complete within seconds of their work, which called through the mesh"""
    fresh(cluster)
    cluster.apply(job(cluster, "once", "call", "http", "http://orders.shop/healthz"),
                  job(cluster, "regular", "call", "http", "http://orders.shop/healthz", kind="CronJob"))
    cluster.kubectl("-n", NS, "create", "job", "regular-now", "--from=cronjob/regular")
    for name in ("once", "regular-now"):
        cluster.kubectl("-n", NS, "wait", "--for=condition=Complete", f"job/{name}", "--timeout=90s")
        (item,) = cluster.get(f"/api/v1/namespaces/{NS}/pods?labelSelector=job-name%3D{name}")["items"]
        expect(is_meshed(item), name)
        (work,) = item["status"]["containerStatuses"]
        finished = moment(work["state"]["terminated"]["finishedAt"])
        completed = moment(cluster.get(f"/apis/batch/v1/namespaces/{NS}/jobs/{name}")["status"]["completionTime"])
        took = (completed - finished).total_seconds()
        expect(took <= 8, name, "completed", took, "s after its work")
        said = cluster.log(NS, item["metadata"]["name"], "work")
        expect('"status":200' in said, said)


@check
def init_containers_have_a_network(cluster):
    """an application's init container calls through the mesh before the application starts"""
    fresh(cluster)
    first = container(cluster.images.shop, ["call", "http", "http://orders.shop/healthz"], name="first")
    cluster.apply(pod(NS, "prepared", sleeper(cluster), initContainers=[first], service_account="app"))
    cluster.await_pods(NS, "prepared")
    said = cluster.log(NS, "prepared", "first")
    expect('"status":200' in said, said)
    cluster.kubectl("-n", NS, "delete", "pod", "prepared", "--wait=false")


@check
def quota_and_non_root(cluster):
    """a quota on limits admits an injected pod, and runAsNonRoot for the whole pod stands"""
    namespace = cluster.namespace("e2e-quota")
    cluster.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "all", "namespace": namespace},
                   "spec": {"hard": {"limits.cpu": "4", "limits.memory": "2Gi", "requests.cpu": "2", "requests.memory": "1Gi"}}})
    until("the quota is counted", lambda: cluster.get(f"/api/v1/namespaces/{namespace}/resourcequotas/all").get("status", {}).get("used"))
    limits = {"requests": {"cpu": "5m", "memory": "16Mi"}, "limits": {"cpu": "100m", "memory": "64Mi"}}
    cluster.apply(pod(namespace, "strict", sleeper(cluster, resources=limits),
                      securityContext={"runAsNonRoot": True, "runAsUser": 1000}))
    cluster.await_pods(namespace, "strict")
    expect(is_meshed(cluster.pod(namespace, "strict")), "meshed")
    cluster.leave(namespace)


@check
def skipped_with_a_reason(cluster):
    """a hostNetwork pod is skipped, and says why"""
    fresh(cluster)
    out = cluster.dry_run(dry_pod(cluster, NS, hostNetwork=True))
    expect(not is_meshed(out), out["spec"])
    reason = out["metadata"]["annotations"].get("sidegate.dev/skipped", "")
    expect("host" in reason.lower(), out["metadata"]["annotations"])


@check
def refusals_name_their_cause(cluster):
    """wrong annotations, spoofed containers, our uid, our ports and a shared process namespace are refused by name"""
    fresh(cluster)
    proxy = container("example.invalid/evil", ["x"], name="sidegate-proxy")
    cases = [
        ("proxy-cpu-limit", dict(annotations={"sidegate.dev/proxy-cpu-limit": "lots"})),
        ("log-level", dict(annotations={"sidegate.dev/log-level": "chatty"})),
        ("drain-timeout", dict(annotations={"sidegate.dev/drain-timeout": "soon"})),
        ("skip-inbound-port", dict(annotations={"sidegate.dev/skip-inbound-port": "80"})),
        ("skip-inbound-ports", dict(annotations={"sidegate.dev/skip-inbound-ports": "8080"})),  # Not allowed by the namespace.
        ("sidegate.dev/enforcement", dict(annotations={"sidegate.dev/enforcement": "audit"})),
        ("shareProcessNamespace", dict(shareProcessNamespace=True)),
        ("1519", dict(securityContext={"runAsUser": 1519})),
    ]
    for wanted, more in cases:
        said = cluster.dry_run(dry_pod(cluster, NS, **more), fails=True)
        expect(wanted in said, "wanted", wanted, "in", said)
    for wanted, containers in [
        ("sidegate-proxy", [sleeper(cluster), proxy]),
        ("19006", [sleeper(cluster, ports=[{"containerPort": 19006}])]),
        ("1519", [sleeper(cluster, securityContext={"runAsUser": 1519})]),
    ]:
        said = cluster.dry_run(dry_pod(cluster, NS, *containers), fails=True)
        expect(wanted in said, "wanted", wanted, "in", said)


@check
def overrides_where_the_namespace_allows(cluster):
    """a traffic annotation counts on a pod whose namespace lists it, and on the namespace itself"""
    namespace = cluster.namespace("e2e-override", annotations={"sidegate.dev/allow-pod-overrides": "opaque-ports"})
    out = cluster.dry_run(dry_pod(cluster, namespace, annotations={"sidegate.dev/opaque-ports": "3306"}))
    expect(is_meshed(out), out)
    said = cluster.dry_run(dry_pod(cluster, namespace, annotations={"sidegate.dev/skip-outbound-ports": "25"}), fails=True)
    expect("skip-outbound-ports" in said and "allow-pod-overrides" in said, said)
    cluster.kubectl("annotate", "namespace", namespace, "sidegate.dev/skip-outbound-ports=25")
    out = until("the namespace's annotation is seen", lambda: _args(cluster.dry_run(dry_pod(cluster, namespace)), "25"))[0]
    expect(out, "25")
    cluster.leave(namespace)


def _args(item, text):
    init = next(each for each in item["spec"]["initContainers"] if each["name"] == "sidegate-init")
    said = str(init.get("args", [])) + str(init.get("env", []))
    return said if text in said else None


@check
def offline_is_the_same(cluster):
    """`sidegate inject -f` gives what the webhook gives, and --uninject takes it back"""
    fresh(cluster)
    given = dry_pod(cluster, NS)
    offline = cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", "-",
                              stdin=cluster.sidegate("inject", "-f", "-", stdin=json.dumps(given)))
    offline = json.loads(offline)["spec"]
    live = cluster.dry_run(given)["spec"]
    for at in (0, 1):
        ours, theirs = offline["initContainers"][at], live["initContainers"][at]
        for field in ("name", "image", "securityContext", "resources"):
            expect(ours.get(field) == theirs.get(field), field, ours.get(field), theirs.get(field))
    back = cluster.sidegate("inject", "-f", "-", "--uninject", stdin=json.dumps(dict(given, spec=offline)))
    expect("sidegate-proxy" not in back, back)
