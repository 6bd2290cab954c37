"""Probes and lifecycle hooks of every kind go on working while no policy allows anything."""

import subprocess

from harness import (check, container, expect, is_meshed, pod, shop_container, until)

NS = "e2e-probes"

# An application that is strict about its probes and writes down each call: HTTP on 8080, HTTPS on 8443, TCP on 8090.
# `/tmp/NAME` makes what NAME says fail.
APPLICATION = r"""
import http.server, os, socketserver, ssl, subprocess, sys, threading
def note(*words): print(*words, file=sys.stderr, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        kind = self.path.split("?")[0].lstrip("/")
        header = self.headers.get("X-Probe", "")
        note("asked", self.server.scheme, self.path, header, self.headers.get("Host"))
        good = not os.path.exists("/tmp/fail-" + kind) and (kind != "ready" or (self.path == "/ready?deep=1&x=%2F" and header == "kubelet"))
        body = b"ok" if good else b"no"
        self.send_response(200 if good else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
def serve(port, scheme, context=None):
    server = Threads(("0.0.0.0", port), Answer)
    server.scheme = scheme
    if context: server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
serve(8080, "http")
subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=app", "-days", "2",
                "-keyout", "/tmp/key.pem", "-out", "/tmp/cert.pem"], check=True, capture_output=True)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tmp/cert.pem", "/tmp/key.pem")
serve(8443, "https", context)
class Accept(socketserver.BaseRequestHandler):
    def handle(self): note("asked", "tcp")
class Listen(socketserver.ThreadingMixIn, socketserver.TCPServer): daemon_threads, allow_reuse_address = True, True
threading.Thread(target=Listen(("0.0.0.0", 8090), Accept).serve_forever, daemon=True).start()
import signal
signal.signal(signal.SIGTERM, lambda *_: (note("terminated"), os._exit(0)))
note("serving")
signal.pause()
"""


def http(port, path, **more):
    return {"httpGet": {"port": port, "path": path, **more}, "periodSeconds": 1, "failureThreshold": 3}


def strict(cluster, **more):
    ports = [{"name": "web", "containerPort": 8080}, {"name": "tls", "containerPort": 8443}]
    return container(cluster.images.tools, ["-c", APPLICATION], command=["python3"], name="app", ports=ports, **more)


@check
def every_probe(cluster):
    """HTTP, HTTPS, TCP, gRPC and exec probes of containers and of another native sidecar succeed, with nothing allowed"""
    cluster.namespace(NS)
    header = [{"name": "X-Probe", "value": "kubelet"}]
    app = strict(cluster,
                 startupProbe=dict(http("web", "start"), failureThreshold=60),  # A path without a leading slash.
                 readinessProbe=http("web", "/ready?deep=1&x=%2F", httpHeaders=header),
                 livenessProbe=http("tls", "/live", scheme="HTTPS"))
    inventory = shop_container(cluster, "inventory", 9000, name="grpc",
                               livenessProbe={"grpc": {"port": 9000, "service": "shop.v1.Inventory"}, "periodSeconds": 1},
                               startupProbe={"grpc": {"port": 9000}, "periodSeconds": 1, "failureThreshold": 60})
    tcp = shop_container(cluster, "ledger", 6379, name="tcp", livenessProbe={"tcpSocket": {"port": "tcp"}, "periodSeconds": 1})
    runs = container(cluster.images.shop, ["ledger", "--listen", "127.0.0.1:6380"], name="exec",
                     readinessProbe={"exec": {"command": ["/sidegate-shop", "call", "tcp", "127.0.0.1:6380"]}, "periodSeconds": 1})
    beside = dict(shop_container(cluster, "orders", 8081, name="beside", startupProbe=dict(http(8081, "/healthz"), failureThreshold=60),
                                 livenessProbe=http(8081, "/healthz")), restartPolicy="Always")
    cluster.apply(pod(NS, "probed", app, inventory, tcp, runs, initContainers=[beside]))
    cluster.await_pods(NS, "probed")
    item = cluster.pod(NS, "probed")
    expect(is_meshed(item), "meshed")
    said = until("each probe has been asked", lambda: _said(cluster, "asked http /start", "asked http /ready?deep=1&x=%2F kubelet", "asked https /live"))[0]
    expect("asked http start" not in said, "a path without a slash is asked with one", said[-500:])
    for status in cluster.pod(NS, "probed")["status"]["containerStatuses"]:
        expect(status["restartCount"] == 0 and status["ready"], status)
    nobody = cluster.namespace("e2e-probes-caller", meshed=False)
    cluster.apply(pod(nobody, "out", container(cluster.images.shop, ["ledger", "--listen", "127.0.0.1:6379"])))
    cluster.await_pods(nobody, "out")
    told = cluster.call(nobody, "out", "http", f"http://{item['status']['podIP']}:8080/live")
    expect(told.get("headers", {}).get("sidegate-error") == "plaintext", "nothing but the kubelet's probes is served", told)
    told = cluster.call(nobody, "out", "http", f"http://{item['status']['podIP']}:19021/probe/app/readiness")
    expect(told.get("status") != 200, "a probe without the pod's secret is no probe", told)
    cluster.leave(nobody)


def _said(cluster, *wanted):
    said = cluster.log(NS, "probed", "app")
    return said if all(each in said for each in wanted) else None


@check
def a_failing_probe_fails(cluster):
    """an application that is not ready makes its pod not ready, and one that does not live is restarted"""
    cluster.exec(NS, "probed", "app", "touch", "/tmp/fail-ready")
    cluster.kubectl("-n", NS, "wait", "--for=condition=Ready=false", "pod/probed", "--timeout=30s")
    cluster.exec(NS, "probed", "app", "rm", "/tmp/fail-ready")
    cluster.await_pods(NS, "probed")
    cluster.exec(NS, "probed", "app", "touch", "/tmp/fail-live")
    restarts = lambda: next(each["restartCount"] for each in cluster.pod(NS, "probed")["status"]["containerStatuses"] if each["name"] == "app")
    until("the application is restarted", lambda: restarts() >= 1)
    cluster.await_pods(NS, "probed")
    cluster.leave(NS)


@check
def hooks(cluster):
    """httpGet and tcpSocket lifecycle hooks are made: postStart before the pod is up, preStop before it is told to end"""
    namespace = cluster.namespace("e2e-hooks")
    # postStart may come before the application listens, and its failure ends the container: a hook that is served at once.
    helper = dict(shop_container(cluster, "orders", 8081, name="helper", startupProbe=dict(http(8081, "/healthz"), failureThreshold=60)),
                  restartPolicy="Always")
    app = strict(cluster, readinessProbe=http("web", "/ready?deep=1&x=%2F", httpHeaders=[{"name": "X-Probe", "value": "kubelet"}]),
                 lifecycle={"postStart": {"httpGet": {"port": 8081, "path": "/status/200"}},
                            "preStop": {"httpGet": {"port": "web", "path": "/bye?last=1"}}})
    cluster.apply(pod(namespace, "hooked", app, initContainers=[helper]))
    cluster.await_pods(namespace, "hooked")
    item = cluster.dry_run(pod(namespace, "dry", strict(cluster, lifecycle={"preStop": {"tcpSocket": {"port": 8090}}})))
    hook = next(each for each in item["spec"]["containers"] if each["name"] == "app")["lifecycle"]["preStop"]
    expect(hook.get("httpGet", {}).get("port") == 19021 and hook["httpGet"]["path"] == "/probe/app/pre-stop", hook)

    log = subprocess.Popen(["kubectl", "-n", namespace, "logs", "-f", "hooked", "-c", "app"], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    cluster.kubectl("-n", namespace, "delete", "pod", "hooked", "--wait=true", "--timeout=60s")
    said = log.communicate(timeout=30)[0]
    expect("asked http /bye?last=1" in said and "terminated" in said, said[-1000:])
    expect(said.index("/bye?last=1") < said.index("terminated"), said[-1000:])
    cluster.leave(namespace)
