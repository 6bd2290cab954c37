"""What the checks share: the cluster, namespaces, pods, calls, records, load.

Nothing here waits by sleeping. `until` asks again and again until something holds or a deadline
passes; waits for objects are watches of kubectl's.
"""

import http.client
import json
import pathlib
import re
import subprocess
import tempfile
import threading
import time
import urllib.parse

import checks
from checks import CHECKS, check, expect  # noqa: F401

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
GROUP = "/apis/sidegate.dev/v1alpha1"
DEADLINE_SECONDS = 60
SYSTEM = "sidegate-system"


class Skipped(Exception):
    """What a check asks for is not there; the reason is printed."""


def until(what, probe, seconds=DEADLINE_SECONDS, every=0.05):
    """As that of `checks`, with the patience that a cluster needs."""
    return checks.until(what, probe, seconds, every)


def workload(service_account, namespace):
    """A SPIFFE ID."""
    return f"spiffe://cluster.local/ns/{namespace}/sa/{service_account}"


class Cluster:
    """The cluster that KUBECONFIG names, and what is tried on it."""

    def __init__(self, sidegate, images):
        self.sidegate_binary = sidegate
        self.images = images
        self.proxy = subprocess.Popen(
            ["kubectl", "proxy", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.proxy.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        expect(found, "kubectl proxy says", line)
        self.port = int(found.group(1))
        self.local = threading.local()
        nodes = self.get("/api/v1/nodes")["items"]
        self.nodes = [node["metadata"]["name"] for node in nodes if not node["spec"].get("taints")]
        self.made = []

    def close(self):
        self.proxy.terminate()
        self.proxy.wait()

    # -- the API, through `kubectl proxy`

    def request(self, method, path, body=None, content_type="application/json"):
        """The status and the answer (JSON where it is JSON)."""
        connection = getattr(self.local, "connection", None)
        if connection is None:
            connection = self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        payload = None if body is None else (body if isinstance(body, (bytes, str)) else json.dumps(body))
        try:
            connection.request(method, path, payload, {"content-type": content_type} if payload else {})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            connection.close()
            self.local.connection = None
            raise
        try:
            return answer.status, json.loads(text)
        except json.JSONDecodeError:
            return answer.status, text

    def get(self, path):
        status, answer = self.request("GET", path)
        expect(status == 200, "GET", path, status, answer)
        return answer

    def find(self, path):
        """The object, or None."""
        status, answer = self.request("GET", path)
        return answer if status == 200 else None

    def patch(self, path, body):
        """A merge patch."""
        status, answer = self.request("PATCH", path, body, "application/merge-patch+json")
        expect(status == 200, "PATCH", path, status, answer)
        return answer

    # -- the command lines

    def kubectl(self, *arguments, stdin=None, timeout=180, fails=False):
        """What kubectl prints. With `fails`, what it complains of; None takes either end."""
        given = json.dumps(stdin) if isinstance(stdin, (dict, list)) else stdin
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=timeout)
        expect(fails is None or (done.returncode != 0) == fails, "kubectl", *arguments, done.returncode, done.stdout, done.stderr)
        return done.stderr if fails else done.stdout

    def sidegate(self, *arguments, stdin=None, timeout=120, code=0):
        done = subprocess.run([self.sidegate_binary, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout)
        if code is not None:
            expect(done.returncode == code, "sidegate", *arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stdout + done.stderr

    # -- objects

    def apply(self, *objects, fails=False):
        return self.kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": list(objects)}, fails=fails)

    def dry_run(self, object, fails=False):
        """The object as admission leaves it, or the refusal."""
        out = self.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=object, fails=fails)
        return out if fails else json.loads(out)

    def namespace(self, name, meshed=True, annotations=None, service_accounts=()):
        """A new namespace; a meshed one is returned when its pods can be injected at once."""
        self.forget(name)
        labels = {"sidegate.dev/inject": "enabled"} if meshed else {}
        self.made.append(name)
        self.apply({"apiVersion": "v1", "kind": "Namespace",
                    "metadata": {"name": name, "labels": labels, "annotations": annotations or {}}},
                   *[account(name, service_account) for service_account in service_accounts])
        if meshed:
            self.await_bundle(name)
        return name

    def await_bundle(self, namespace):
        until(f"the bundle of {namespace}", lambda: self.find(f"/api/v1/namespaces/{namespace}/configmaps/sidegate-bundle"))

    def forget(self, *names):
        """Deletes namespaces and returns when they have gone."""
        there = [name for name in names if self.find(f"/api/v1/namespaces/{name}")]
        if there:
            self.kubectl("delete", "namespace", "--ignore-not-found", "--wait=true", "--timeout=150s", *there)

    def leave(self, *names):
        """Deletes namespaces without waiting."""
        self.kubectl("delete", "namespace", "--ignore-not-found", "--wait=false", *names)

    def pod(self, namespace, name):
        return self.get(f"/api/v1/namespaces/{namespace}/pods/{name}")

    def pods(self, namespace, selector=""):
        query = urllib.parse.urlencode({"labelSelector": selector}) if selector else ""
        items = self.get(f"/api/v1/namespaces/{namespace}/pods?{query}")["items"]
        return [item for item in items if "deletionTimestamp" not in item["metadata"]]

    def await_pods(self, namespace, *names, seconds=90):
        self.kubectl("-n", namespace, "wait", "--for=condition=Ready", f"--timeout={seconds}s",
                     *[f"pod/{name}" for name in names], timeout=seconds + 20)

    def await_rollout(self, namespace, *names, seconds=120):
        for name in names:
            self.kubectl("-n", namespace, "rollout", "status", name, f"--timeout={seconds}s", timeout=seconds + 20)

    # -- looking into pods

    def exec(self, namespace, pod, container, *command, timeout=60, stdin=None, code=0):
        """What a command in a container prints; `code` None takes any end."""
        interactive = ["-i"] if stdin is not None else []
        done = subprocess.run(["kubectl", "-n", namespace, "exec", *interactive, pod, "-c", container, "--", *command],
                              input=stdin, capture_output=True, text=True, timeout=timeout)
        if code is not None:
            expect(done.returncode == code, namespace, pod, *command, done.returncode, done.stdout, done.stderr)
        return done.stdout if code is not None else (done.returncode, done.stdout + done.stderr)

    def call(self, namespace, pod, *ask, container="app"):
        """One call of the shop's own client in a pod: what it came to."""
        code, out = self.exec(namespace, pod, container, "/sidegate-shop", "call", *ask, code=None)
        for line in reversed(out.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"call {ask} from {namespace}/{pod}: {code} {out}")

    def log(self, namespace, pod, container):
        return self.kubectl("-n", namespace, "logs", pod, "-c", container, "--tail=-1")

    def records(self, namespace, pod):
        """The access records that a pod's sidecar wrote."""
        found = []
        for line in self.log(namespace, pod, "sidegate-proxy").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # The last line may still be being written.
            if record.get("kind") == "access":
                found.append(record)
        return found

    def record(self, namespace, pod, test=lambda record: True, **wanted):
        """The newest record with these fields, waited for. `pod` may be a selector such as app=orders."""
        def find():
            names = [pod] if "=" not in pod else [item["metadata"]["name"] for item in self.pods(namespace, pod)]
            for name in names:
                for record in reversed(self.records(namespace, name)):
                    if all(record.get(field) == value for field, value in wanted.items()) and test(record):
                        return record
            return None
        return until(f"a record of {namespace}/{pod} with {wanted}", find, seconds=20, every=0.2)[0]

    def metrics(self, namespace, pod):
        """The samples of a sidecar: {name{labels}: value}."""
        status, text = self.request("GET", f"/api/v1/namespaces/{namespace}/pods/{pod}:19021/proxy/metrics")
        expect(status == 200, "metrics of", pod, status, text)
        samples = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def counted(self, namespace, pod, name, **labels):
        """The sum of a sidecar's samples of `name` that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(value for sample, value in self.metrics(namespace, pod).items()
                   if sample.split("{")[0] == name and all(part in sample for part in wanted))

    # -- policies

    def policy(self, namespace, name, spec, kind="AuthorizationPolicy"):
        return {"apiVersion": "sidegate.dev/v1alpha1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}

    def allow(self, namespace, name, app, port, callers, to):
        """A policy by which `callers` (service accounts, or whole `from` entries) may do `to`."""
        sources = [caller if isinstance(caller, dict) else {"workload": {"serviceAccount": caller}} for caller in callers]
        return self.policy(namespace, name, {
            "selector": {"matchLabels": {"app": app}}, "ports": [port], "action": "Allow",
            "rules": [{"name": "rule", "from": sources, "to": to}]})

    def live(self, namespace, name, kind="authorizationpolicies", seconds=30):
        """Waits until this generation of a policy is live on every sidecar that it selects."""
        def is_live():
            found = self.get(f"{GROUP}/namespaces/{namespace}/{kind}/{name}")
            for condition in found.get("status", {}).get("conditions", []):
                if condition["type"] == "Live" and condition["status"] == "True":
                    return condition.get("observedGeneration", found["metadata"]["generation"]) == found["metadata"]["generation"]
            return False
        return until(lambda: f"{namespace}/{name} is live: {self.find(f'{GROUP}/namespaces/{namespace}/{kind}/{name}')}", is_live, seconds)


ANY_HTTP = [{"http": {"methods": ["*"], "paths": ["/**"]}}]


def account(namespace, name):
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}


def container(image, args, name="app", port=None, **more):
    made = {"name": name, "image": image, "imagePullPolicy": "IfNotPresent", "args": args,
            "resources": {"requests": {"cpu": "5m", "memory": "16Mi"}}}
    if port:
        made["ports"] = [{"name": port[0], "containerPort": port[1]}]
    made.update(more)
    return made


def pod_spec(*containers, service_account="default", **more):
    return {"serviceAccountName": service_account, "automountServiceAccountToken": False,
            "containers": list(containers), **more}


def pod(namespace, name, *containers, labels=None, annotations=None, **more):
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": name, **(labels or {})}, "annotations": annotations or {}},
            "spec": pod_spec(*containers, **more)}


def deployment(namespace, name, *containers, app=None, replicas=1, annotations=None, kind="Deployment", strategy=None, **more):
    app = app or name
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": app, "part": name}},
            "template": {"metadata": {"labels": {"app": app, "part": name}, "annotations": annotations or {}},
                         "spec": pod_spec(*containers, **more)}}
    if strategy:
        spec["strategy"] = strategy
    if kind == "DaemonSet":
        del spec["replicas"]
    if kind == "StatefulSet":
        spec["serviceName"] = name
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def service(namespace, name, port, target, app=None, **more):
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": {"app": app or name}, "ports": [{"name": "p", "port": port, "targetPort": target}], **more}}


def shop_container(cluster, which, port, name="app", **more):
    """One service of the sample shop, with a readiness probe that says the truth."""
    ports = {"orders": "http", "web": "http", "inventory": "grpc", "ledger": "tcp"}
    probe = {"orders": {"httpGet": {"port": port, "path": "/healthz"}},
             "web": {"httpGet": {"port": port, "path": "/healthz"}},
             "inventory": {"grpc": {"port": port}},
             "ledger": {"tcpSocket": {"port": port}}}[which]
    return container(cluster.images.shop, [which, "--listen", f"0.0.0.0:{port}"], name=name, port=(ports[which], port),
                     **{"readinessProbe": {**probe, "periodSeconds": 1}, **more})


# What pod security `restricted` asks of a container, for pods in sidegate-system.
RESTRICTED = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
              "seccompProfile": {"type": "RuntimeDefault"}}


def caller(cluster, namespace, name, service_account="default", **more):
    """A pod that only waits to be told to call."""
    idle = container(cluster.images.shop, ["ledger", "--listen", "127.0.0.1:6379"])
    return pod(namespace, name, idle, service_account=service_account, **more)


def is_meshed(item):
    names = [each["name"] for each in item["spec"].get("initContainers", [])]
    return "sidegate-proxy" in names and "sidegate.dev/injected" in item["metadata"].get("annotations", {})


class Load:
    """Constant load from a pod of its own, counted exactly: a call that fails is in `stop`'s figures."""

    def __init__(self, cluster, namespace, name, url, rate=50, service_account="default", meshed=True, **more):
        self.cluster, self.namespace, self.name, self.meshed = cluster, namespace, name, meshed
        args = ["run", "--url", url, "--rate", str(rate), "--connections", "8", "--duration", "1h", "--warmup", "0s", "-o", "json"]
        made = container(cluster.images.loadtest, args)
        # A node hears of a new Service a moment after it is there, and the generator gives up at once.
        reach = ["-c", 'until curl -sf -o /dev/null --max-time 5 "$1"; do sleep 0.2; done', "sh", url]
        more.setdefault("initContainers", []).append(container(cluster.images.tools, reach, command=["sh"], name="reach"))
        labels = {} if meshed else {"sidegate.dev/inject": "disabled"}
        cluster.apply(pod(namespace, name, made, labels=labels, service_account=service_account, restartPolicy="Never", **more))
        cluster.await_pods(namespace, name)
        self.log = subprocess.Popen(["kubectl", "-n", namespace, "logs", "-f", name, "-c", "app"],
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.beside = None
        if meshed:
            # For telling what became of a call that failed; kubectl has no log of a pod that is gone.
            self.beside = tempfile.TemporaryFile("w+")
            self.follow = subprocess.Popen(["kubectl", "-n", namespace, "logs", "-f", name, "-c", "sidegate-proxy"],
                                           stdout=self.beside, stderr=subprocess.DEVNULL)
            until(f"{name} calls", lambda: self.calls() > rate / 5)

    def calls(self):
        """How many calls its sidecar has seen end."""
        return self.cluster.counted(self.namespace, self.name, "sidegate_requests_total", direction="outbound")

    def more(self, calls=100):
        """Returns when so many calls more have ended."""
        before = self.calls()
        until(f"{calls} calls of {self.name}", lambda: self.calls() >= before + calls)

    def stop(self):
        """Ends it; the run as `sidegate-loadtest` tells it."""
        still = self.cluster.pod(self.namespace, self.name)["status"]["phase"]
        self.cluster.kubectl("-n", self.namespace, "delete", "pod", self.name, "--wait=true", "--timeout=90s")
        text = self.log.communicate(timeout=60)[0]
        expect(still == "Running", self.name, "ended before it was told to:", text[-2000:])
        begin = text.find("{")
        expect(begin >= 0, self.name, "told no figures:", text[-2000:])
        return json.JSONDecoder().raw_decode(text[begin:])[0]["runs"][0]

    def odd_lines(self, most=12):
        """What its sidecar wrote beside calls that were answered with 200."""
        if not self.beside:
            return []
        try:
            self.follow.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.follow.kill()
        self.beside.seek(0)
        odd = [line.strip() for line in self.beside if '"status":200' not in line or '"error"' in line]
        return ["\n      its sidecar said:", *[f"\n      {line}" for line in odd[-most:]]]

    def stop_without_failure(self, least=100):
        """Ends it; every call must have been answered with 200. Returns how many that were."""
        told = self.stop()
        counts = told["counts"]
        facts = (self.name, counts, told["errors"], told["statuses"], *self.odd_lines())
        expect(counts["failed"] == 0 and counts["unfinished"] == 0, *facts)
        expect(set(told["statuses"]) == {"200"}, *facts)
        expect(counts["answered"] >= least, *facts)
        return counts["answered"]


class Watcher:
    """A call made again and again from a pod; `next` is told each time its outcome changes."""

    def __init__(self, cluster, namespace, pod, *ask):
        self.process = subprocess.Popen(
            ["kubectl", "-n", namespace, "exec", pod, "-c", "app", "--", "/sidegate-shop", "call", "--watch", *ask],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.seen = []
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                self.seen.append((time.monotonic(), json.loads(line)))
                self.changed.notify_all()

    def await_outcome(self, test, seconds=DEADLINE_SECONDS):
        """When the newest outcome began to pass `test` (a status, or a function of the outcome)."""
        wanted = test if callable(test) else lambda told: told.get("status") == test
        deadline = time.monotonic() + seconds
        with self.changed:
            while True:
                if self.seen and wanted(self.seen[-1][1]):
                    return self.seen[-1][0]
                left = deadline - time.monotonic()
                expect(left > 0, "the outcome that was waited for did not come; seen:", [told for _, told in self.seen[-3:]])
                self.changed.wait(left)

    def stop(self):
        self.process.kill()
        self.process.wait()
