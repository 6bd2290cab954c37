"""The command line against the cluster: what it shows is what happened."""

import json
import os
import pathlib
import subprocess
import tempfile

from harness import ANY_HTTP, Watcher, caller, check, deployment, expect, service, shop_container, until, workload

NS = "e2e-commands"


def setup(cluster):
    if NS in cluster.made:
        return
    cluster.namespace(NS, service_accounts=["friend", "guest", "server"])
    cluster.apply(deployment(NS, "orders", shop_container(cluster, "orders", 8080), replicas=2, service_account="server"),
                  service(NS, "orders", 80, "http"), cluster.allow(NS, "orders", "orders", "http", ["friend"], ANY_HTTP),
                  caller(cluster, NS, "friend", service_account="friend"), caller(cluster, NS, "guest", service_account="guest"))
    cluster.await_rollout(NS, "deployment/orders")
    cluster.await_pods(NS, "friend", "guest")
    cluster.live(NS, "orders")
    expect(cluster.call(NS, "friend", "http", f"http://orders.{NS}/orders/7").get("status") == 200, "allowed")
    expect(cluster.call(NS, "guest", "http", f"http://orders.{NS}/orders/7").get("status") == 403, "denied")


@check
def logs(cluster):
    """`sidegate logs` merges a namespace's sidecars in time order, chooses, and follows pods that are new"""
    setup(cluster)
    def read():
        said = cluster.sidegate("logs", "-n", NS, "--direction", "all", "-o", "json")
        rows = [json.loads(line) for line in said.splitlines()]
        return rows if len(rows) >= 4 else None

    # A sidecar writes a call's line after its answer has left.
    rows, _ = until("both sides' records of both calls", read)
    times = [row["time"] for row in rows if "time" in row]
    expect(times == sorted(times), times)
    directions = {row.get("direction") for row in rows}
    expect(directions >= {"inbound", "outbound"}, directions)
    table = cluster.sidegate("logs", "orders", "-n", NS, "--denied")
    expect("DENY no rule admits" in table and "GET /orders/7" in table and f"{NS}/guest" in table and "allow" not in table, table)
    follow = subprocess.Popen([cluster.sidegate_binary, "logs", "-n", NS, "-f", "-o", "json", "--path", "/orders/3"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        cluster.apply(caller(cluster, NS, "late", service_account="guest"))
        cluster.await_pods(NS, "late")
        cluster.call(NS, "late", "http", f"http://orders.{NS}/orders/3")
        record = json.loads(follow.stdout.readline())
        expect(record["path"] == "/orders/3" and record["status"] == 403, record)
    finally:
        follow.kill()
        follow.wait()


@check
def status(cluster):
    """`sidegate status` says which policy is live on how many sidecars, and --wait returns when it is on all"""
    setup(cluster)
    out = cluster.sidegate("status", "-n", NS, "--wait")
    expect("orders" in out and "2 of 2" in out.replace("2/2", "2 of 2"), out)
    json.loads(cluster.sidegate("status", "-n", NS, "-o", "json"))


@check
def certs(cluster):
    """`sidegate certs` shows each sidecar's identity and its end"""
    setup(cluster)
    out = cluster.sidegate("certs", "-n", NS)
    expect(workload("server", NS) in out and workload("friend", NS) in out, out)
    expect("BEGIN CERTIFICATE" in cluster.sidegate("certs", "orders", "-n", NS, "--pem"), "--pem")


@check
def authz(cluster):
    """`sidegate authz test` decides as the sidecars do"""
    setup(cluster)
    ask = lambda who, code: cluster.sidegate("authz", "test", "--from", f"{NS}/{who}", "--to", f"{NS}/orders", "--method", "GET", "--path", "/orders/7", code=code)
    expect("allow" in ask("friend", 0).lower(), "friend")
    expect("deny" in ask("guest", 1).lower(), "guest")


@check
def check_namespace(cluster):
    """`sidegate check -n` names an unmeshed pod, an opt-out and a policy that selects nothing, with remedies"""
    setup(cluster)
    cluster.apply(caller(cluster, NS, "out", labels={"sidegate.dev/inject": "disabled"}),
                  cluster.allow(NS, "idle", "no-such-app", "http", ["friend"], ANY_HTTP))
    cluster.await_pods(NS, "out")
    cluster.live(NS, "idle")
    out = cluster.sidegate("check", "-n", NS, code=None)
    expect("out" in out and "idle" in out and "‼" in out, out)


@check
def plugin(cluster):
    """the same binary answers as `kubectl sidegate`"""
    with tempfile.TemporaryDirectory() as directory:
        os.symlink(pathlib.Path(cluster.sidegate_binary).resolve(), pathlib.Path(directory) / "kubectl-sidegate")
        path = f"{directory}:{os.environ['PATH']}"
        done = subprocess.run(["kubectl", "sidegate", "version"], capture_output=True, text=True, env={**os.environ, "PATH": path})
        expect(done.returncode == 0 and "sidegate" in done.stdout, done.stdout, done.stderr)


@check
def top(cluster):
    """`sidegate top --once` shows the rates of a pair that calls now"""
    setup(cluster)
    watcher = Watcher(cluster, NS, "friend", "http", f"http://orders.{NS}/orders/7")
    try:
        watcher.await_outcome(200)
        out = until("the pair is shown", lambda: _shown(cluster))[0]
        expect(f"{NS}/server" in out, out)
    finally:
        watcher.stop()


def _shown(cluster):
    out = cluster.sidegate("top", "-n", NS, "--once", code=0)
    return out if "friend" in out else None
