"""What the CA must not fall for: tokens that prove nothing, bundles written by others, a CA that is none, a lost key.

The tokens are tried from a pod, as an attacker would, with curl: gRPC is HTTP/2, and the message is put together by hand.
Each refusal has its own words, and they are looked for, so that no check passes for another one's reason.
"""

import base64
import json
import time

from harness import SYSTEM, check, expect, until, workload

NAMESPACE = "token-attacks"
MESHED = "token-attacks-meshed"
AUDIENCE = "sidegate-ca"
BUNDLE = f"/api/v1/namespaces/{SYSTEM}/configmaps/sidegate-bundle"
SECRET = f"/api/v1/namespaces/{SYSTEM}/secrets/sidegate-ca"
CA_LABEL = {"app.kubernetes.io/name": "sidegate-ca"}

# Asks the CA for a certificate with the token on standard input, and prints what it said as JSON.
ASK = r"""
import base64, json, os, subprocess, sys, tempfile, urllib.parse
address, token = sys.argv[1], sys.stdin.read().strip().encode()
def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data
os.chdir(tempfile.mkdtemp())
subprocess.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "key.pem"],
               check=True, stderr=subprocess.DEVNULL)
csr = subprocess.run(["openssl", "req", "-new", "-key", "key.pem", "-subj", "/CN=x", "-outform", "DER"], check=True, capture_output=True).stdout
message = field(1, csr) + field(4, field(1, token))
frame = b"\0" + len(message).to_bytes(4, "big") + message
done = subprocess.run(["curl", "-sk", "--http2", "--max-time", "20", "-D", "heads", "-o", "body", "--data-binary", "@-",
                       "-H", "content-type: application/grpc", "-H", "te: trailers",
                       f"https://{address}/sidegate.identity.v1alpha1.Identity/IssueSvid"], input=frame, capture_output=True)
heads = dict(line.split(": ", 1) for line in open("heads", errors="replace").read().splitlines() if ": " in line) if os.path.exists("heads") else {}
body = open("body", "rb").read()[5:] if os.path.exists("body") else b""
chain, at = [], 0
def read_varint():
    global at
    value = shift = 0
    while True:
        byte = body[at]; at += 1
        value |= (byte & 127) << shift; shift += 7
        if byte < 128:
            return value
identity = ""
while at < len(body):
    number = read_varint() >> 3
    size = read_varint()
    data = body[at:at + size]; at += size
    if number == 1:
        chain.append(data)
    else:
        identity = data.decode()
pem = "".join("-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der).decode() + "-----END CERTIFICATE-----\n" for der in chain)
print(json.dumps({"curl": done.returncode, "status": heads.get("grpc-status", ""), "message": urllib.parse.unquote(heads.get("grpc-message", "")),
                  "identity": identity, "chain": pem, "key": open("key.pem").read()}))
"""


def tools_pod(cluster, name, service_account, labels=None):
    """A pod with two tokens of its own: one for the CA, one for the Kubernetes API."""
    def projected(volume, audience):
        source = {"path": "token", "expirationSeconds": 600, **({"audience": audience} if audience else {})}
        return {"name": volume, "projected": {"sources": [{"serviceAccountToken": source}]}}
    mounts = [{"name": "ours", "mountPath": "/tokens/ours"}, {"name": "api", "mountPath": "/tokens/api"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels or {}},
            "spec": {"serviceAccountName": service_account, "terminationGracePeriodSeconds": 0,
                     "volumes": [projected("ours", AUDIENCE), projected("api", None)],
                     "containers": [{"name": "app", "image": cluster.images.tools, "imagePullPolicy": "IfNotPresent",
                                     "command": ["sh", "-c", "trap exit TERM; while :; do sleep 1; done"], "volumeMounts": mounts}]}}


def prepared(cluster):
    """The namespace with its pods, made by the first check that comes here."""
    if cluster.find(f"/api/v1/namespaces/{NAMESPACE}/pods/asker"):
        return
    cluster.namespace(NAMESPACE, meshed=False, service_accounts=["asker", "victim"])
    cluster.apply(tools_pod(cluster, "asker", "asker"), tools_pod(cluster, "victim", "victim"))
    cluster.await_pods(NAMESPACE, "asker", "victim")


def token_of(cluster, pod, which="ours"):
    return cluster.exec(NAMESPACE, pod, "app", "cat", f"/tokens/{which}/token").strip()


def ask(cluster, token, pod="asker"):
    """What the CA says to a token that comes from `pod`."""
    address = f"sidegate-ca.{SYSTEM}.svc.cluster.local:19010"
    out = cluster.exec(NAMESPACE, pod, "app", "python3", "-c", ASK, address, stdin=token)
    told = json.loads(out)
    expect(told["curl"] == 0 and (told["status"] or told["chain"]), "no answer of the CA:", told)
    return told


def ask_when_it_is_back(cluster, token):
    """The same, of a CA that has just become ready: the nodes hear of it a moment later."""
    def asked():
        try:
            return ask(cluster, token)
        except AssertionError:
            return None
    return until("the CA answers again", asked, seconds=20)[0]


def expect_refused(told, words, code="16"):
    expect(told["status"] == code and words in told["message"] and not told["chain"],
           f"expected {code} … {words} …, got", told["status"], told["message"])


@check
def own_token_is_taken(cluster):
    """a pod's own token, from the pod, gets the identity of its service account, and only that"""
    prepared(cluster)
    told = ask(cluster, token_of(cluster, "asker"))
    expect(told["identity"] == workload("asker", NAMESPACE), told["identity"], told["message"])
    script = "printf %s \"$1\" | openssl x509 -noout -ext subjectAltName"
    names = cluster.exec(NAMESPACE, "asker", "app", "sh", "-c", script, "-", told["chain"])
    expect(f"URI:{workload('asker', NAMESPACE)}" in names and "DNS" not in names, names)


@check
def wrong_audience_is_refused(cluster):
    """a token without our audience is refused, also that of the Kubernetes API"""
    prepared(cluster)
    expect_refused(ask(cluster, token_of(cluster, "asker", "api")), f"not for the audience {AUDIENCE}")
    other = cluster.kubectl("-n", NAMESPACE, "create", "token", "asker", "--audience", "somebody-else",
                            "--bound-object-kind", "Pod", "--bound-object-name", "asker").strip()
    expect_refused(ask(cluster, other), f"not for the audience {AUDIENCE}")


@check
def token_of_another_pod_is_refused(cluster):
    """a token of another pod is refused where it does not belong"""
    prepared(cluster)
    stolen = token_of(cluster, "victim")
    expect_refused(ask(cluster, stolen), f"token of pod {NAMESPACE}/victim came from")
    told = ask(cluster, stolen, pod="victim")
    expect(told["identity"] == workload("victim", NAMESPACE), told)


@check
def token_of_a_deleted_pod_is_refused(cluster):
    """a token of a pod that was deleted is refused, also once another one has its name"""
    prepared(cluster)
    name = f"short-lived-{int(time.time())}"
    cluster.apply(tools_pod(cluster, name, "victim"))
    cluster.await_pods(NAMESPACE, name)
    kept = token_of(cluster, name)
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", name, "--wait=true")
    expect_refused(ask(cluster, kept), "does not accept the token")
    cluster.apply(tools_pod(cluster, name, "victim"))
    cluster.await_pods(NAMESPACE, name)
    expect_refused(ask(cluster, kept, pod=name), "does not accept the token")


@check
def expired_and_forged_tokens_are_refused(cluster):
    """a token that is over is refused unreviewed, and one whose end was moved is forged"""
    prepared(cluster)
    def moved(seconds):
        head, payload, signature = token_of(cluster, "asker").split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        claims["exp"] = int(time.time()) + seconds
        return ".".join([head, base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("="), signature])
    expect_refused(ask(cluster, moved(-60)), "has expired")
    expect_refused(ask(cluster, moved(3600)), "does not accept the token")
    expect_refused(ask(cluster, "nonsense"), "no service account token")


@check
def legacy_and_unbound_tokens_are_refused(cluster):
    """a token from a Secret is refused, and one that was made by hand for no pod"""
    prepared(cluster)
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
                   "metadata": {"name": "legacy", "namespace": NAMESPACE,
                                "annotations": {"kubernetes.io/service-account.name": "asker"}}})
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/legacy"
    secret, _ = until("the token of a Secret", lambda: (cluster.get(path).get("data") or {}).get("token") and cluster.get(path))
    expect_refused(ask(cluster, base64.b64decode(secret["data"]["token"]).decode()), "token from a Secret")
    unbound = cluster.kubectl("-n", NAMESPACE, "create", "token", "asker", "--audience", AUDIENCE).strip()
    expect_refused(ask(cluster, unbound), "not bound to a pod")


@check
def recreated_service_account_does_not_inherit(cluster):
    """a service account that was deleted and made again inherits nothing"""
    prepared(cluster)
    name = f"remade-{int(time.time())}"
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}}
    cluster.apply(account)
    cluster.apply(tools_pod(cluster, name, name))
    cluster.await_pods(NAMESPACE, name)
    expect(ask(cluster, token_of(cluster, name), pod=name)["identity"] == workload(name, NAMESPACE), "the pod's own token")
    cluster.kubectl("-n", NAMESPACE, "delete", "serviceaccount", name, "--wait=true")
    cluster.apply(account)
    # The API server may still know the former one for a moment; then it is our own look that tells.
    told = ask(cluster, token_of(cluster, name), pod=name)
    expect_refused(told, "made again" if "made again" in told["message"] else "does not accept the token")


@check
def opted_out_pod_has_no_identity(cluster):
    """a pod that has left the mesh by its label gets no identity"""
    prepared(cluster)
    cluster.apply(tools_pod(cluster, "outside", "asker", labels={"sidegate.dev/inject": "disabled"}))
    cluster.await_pods(NAMESPACE, "outside")
    expect_refused(ask(cluster, token_of(cluster, "outside"), pod="outside"), "has no identity", code="7")


@check
def revoked_identity_is_refused_by_every_replica(cluster):
    """an identity that one replica revoked is refused by all within ten seconds"""
    prepared(cluster)
    name = f"revoked-{int(time.time())}"
    cluster.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}})
    cluster.apply(tools_pod(cluster, name, name))
    cluster.await_pods(NAMESPACE, name)
    expect(ask(cluster, token_of(cluster, name), pod=name)["identity"] == workload(name, NAMESPACE), "not before")
    cluster.exec(SYSTEM, "sidegate-ca-0", "ca", "/sidegate-ca", "revoke", workload(name, NAMESPACE))
    replicas = len(cluster.pods(SYSTEM, "app.kubernetes.io/name=sidegate-ca"))
    refused_in_a_row = 0
    def refused_by_all():
        nonlocal refused_in_a_row
        refused_in_a_row = refused_in_a_row + 1 if ask(cluster, token_of(cluster, name), pod=name)["status"] == "7" else 0
        return refused_in_a_row >= 3 * replicas
    until("refused by every replica", refused_by_all, seconds=30)
    listed = cluster.exec(SYSTEM, "sidegate-ca-0", "ca", "/sidegate-ca", "issued", "--id", workload(name, NAMESPACE), "-o", "json")
    expect(replicas > 1 or f"/{name}@" in listed, listed)


@check
def join_tokens_are_refused_with_the_reason(cluster):
    """`sidegate-ca token create` in a cluster says why there are none"""
    code, told = cluster.exec(SYSTEM, "sidegate-ca-0", "ca", "/sidegate-ca", "token", "create", "-n", "shop", "-s", "web", code=None)
    expect(code == 1 and "never evidence" in told, code, told)


@check
def nobody_else_writes_the_bundle(cluster):
    """a bundle is patched, made or deleted neither by an editor of its namespace nor by the controller"""
    cluster.namespace(MESHED, service_accounts=["editor"])
    bind = lambda name, subject: {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                                  "metadata": {"name": name, "namespace": MESHED},
                                  "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
                                  "subjects": [subject]}
    # The controller too, so that not only its lack of rights refuses.
    cluster.apply(bind("editor", {"kind": "ServiceAccount", "name": "editor", "namespace": MESHED}),
                  bind("controller", {"kind": "ServiceAccount", "name": "sidegate-controller", "namespace": SYSTEM}))
    before = cluster.get(f"/api/v1/namespaces/{MESHED}/configmaps/sidegate-bundle")["data"]
    patch = json.dumps({"data": {"root.pem": "mine"}})
    for who in (f"system:serviceaccount:{MESHED}:editor", f"system:serviceaccount:{SYSTEM}:sidegate-controller"):
        allowed = cluster.kubectl("auth", "can-i", "patch", "configmaps", "-n", MESHED, "--as", who)
        expect("yes" in allowed, who, "may not patch any ConfigMap, so this proves nothing")
        for wish in (["patch", "configmap", "sidegate-bundle", "--type=merge", "-p", patch],
                     ["delete", "configmap", "sidegate-bundle"],
                     ["annotate", "configmap", "sidegate-bundle", "a=b"]):
            told = cluster.kubectl("-n", MESHED, "--as", who, *wish, fails=True)
            expect("only Sidegate's CA writes it" in told, who, wish, told)
    expect(cluster.get(f"/api/v1/namespaces/{MESHED}/configmaps/sidegate-bundle")["data"] == before, "the bundle has changed")
    told = cluster.kubectl("-n", NAMESPACE, "create", "configmap", "sidegate-bundle", "--from-literal=root.pem=x", fails=True)
    expect("only Sidegate's CA writes it" in told, "an administrator by mistake:", told)


@check
def fake_ca_behind_the_service_receives_nothing(cluster):
    """a fake CA behind the CA's Service, with an SVID of its own, receives not one byte, and pods start all the same"""
    prepared(cluster)
    svid = ask(cluster, token_of(cluster, "asker"))
    name = "fake-ca"
    cluster.kubectl("-n", SYSTEM, "delete", "pod,configmap", name, "--ignore-not-found", "--wait=true")
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    serve = "exec openssl s_server -accept 19010 -cert /svid/chain -cert_chain /svid/chain -key /svid/key -alpn h2 -tls1_3 -state"
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": SYSTEM},
                   "data": {"chain": svid["chain"], "key": svid["key"]}},
                  {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM, "labels": CA_LABEL},
                   "spec": {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0,
                            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                            "volumes": [{"name": "svid", "configMap": {"name": name}}],
                            "containers": [{"name": "app", "image": cluster.images.tools, "imagePullPolicy": "IfNotPresent",
                                            "command": ["sh", "-c", f"sleep infinity | ({serve})"], "securityContext": restricted,
                                            "ports": [{"name": "grpc", "containerPort": 19010}],
                                            "readinessProbe": {"tcpSocket": {"port": 19010}, "periodSeconds": 1},
                                            "volumeMounts": [{"name": "svid", "mountPath": "/svid"}]}]}})
    try:
        cluster.await_pods(SYSTEM, name)
        if not cluster.find(f"/api/v1/namespaces/{MESHED}"):
            cluster.namespace(MESHED)
        told = lambda: cluster.log(SYSTEM, name, "app")
        # A sidecar says hello, sees who answers, and sends an alert.
        attempts = lambda: told().count("SSL3 alert read") + told().count("alert number")
        tried = 0
        while attempts() == 0:
            expect(tried < 12, "no sidecar has met the fake CA:", told()[-1500:])
            pod = f"meets-{tried}"
            idle = {"name": "app", "image": cluster.images.shop, "imagePullPolicy": "IfNotPresent", "args": ["ledger", "--listen", "127.0.0.1:6379"]}
            cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "namespace": MESHED},
                           "spec": {"terminationGracePeriodSeconds": 1, "containers": [idle]}})
            cluster.await_pods(MESHED, pod)
            tried += 1
        for word in ("PRI * HTTP/2", "IssueSvid", "WatchBundle", "eyJ"):
            expect(word not in told(), "the fake CA received", word, told()[-1500:])
    finally:
        cluster.kubectl("-n", SYSTEM, "delete", "pod,configmap", name, "--ignore-not-found", "--wait=true")


@check
def lost_key_makes_no_new_root(cluster):
    """deleting the key Secret makes no new root: a running CA goes on, a new one says what to do, the backup mends it"""
    prepared(cluster)
    bundle = cluster.get(BUNDLE)["data"]
    backup = cluster.get(SECRET)
    for field in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
        backup["metadata"].pop(field, None)
    cluster.kubectl("-n", SYSTEM, "delete", "secret", "sidegate-ca")
    try:
        told = ask(cluster, token_of(cluster, "asker"))
        expect(told["identity"] == workload("asker", NAMESPACE), "a running CA goes on:", told)
        pods = [item["metadata"]["name"] for item in cluster.pods(SYSTEM, "app.kubernetes.io/name=sidegate-ca")]
        cluster.kubectl("-n", SYSTEM, "delete", "pod", pods[0], "--wait=true")
        log = f"/api/v1/namespaces/{SYSTEM}/pods/{pods[0]}/log?container=ca"
        until("the CA says what to do", lambda: "restore the Secret from a backup" in str(cluster.request("GET", log)[1]))
        expect(cluster.find(SECRET) is None, "a new Secret was made")
        expect(cluster.get(BUNDLE)["data"] == bundle, "the bundle has changed")
    finally:
        if not cluster.find(SECRET):
            cluster.kubectl("create", "-f", "-", stdin=backup)
    cluster.kubectl("-n", SYSTEM, "delete", "pod", pods[0], "--wait=true")
    cluster.await_rollout(SYSTEM, "statefulset/sidegate-ca")
    expect(cluster.get(BUNDLE)["data"] == bundle, "the bundle has changed")
    told = ask_when_it_is_back(cluster, token_of(cluster, "asker"))
    expect(told["identity"] == workload("asker", NAMESPACE), told)
