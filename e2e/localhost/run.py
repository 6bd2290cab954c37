#!/usr/bin/env python3
"""End-to-end test of the demo with real clients: curl, grpcurl, nghttp, ws and openssl.

    e2e/localhost/run.py --sidegate target/release/sidegate

Starts `sidegate demo --dir DIR`, calls through its sidecars as a user would, and holds the answers
against the log. Nothing here waits by sleeping: a condition is asked for until it holds or a
deadline passes.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
from checks import CHECKS, check, expect, until  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def run(*command, stdin=None, timeout=30):
    # Not as text: that would turn \r\n into \n.
    given = None if stdin is None else stdin.encode()
    done = subprocess.run(command, input=given, capture_output=True, timeout=timeout)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Demo:
    """A running `sidegate demo` and what its demo.json says."""

    def __init__(self, sidegate, directory):
        self.sidegate = sidegate
        self.directory = directory
        self.output = open(directory / "demo.out", "w")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sidegate, "demo", "--dir", str(directory / "mesh")],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        self.file = directory / "mesh" / "demo.json"
        until("demo.json is written", self._is_up)
        self.start_seconds = time.monotonic() - self.started
        self.json = json.loads(self.file.read_text())
        self.sidecars = {sidecar["workload"]: sidecar for sidecar in self.json["sidecars"]}
        self.resources = pathlib.Path(self.json["resources"])

    def _is_up(self):
        expect(self.process.poll() is None, "the demo ended:", (self.directory / "demo.out").read_text())
        return self.file.exists()

    def outbound(self, workload):
        return self.sidecars[workload]["outbound"]

    def records(self, workload):
        path = pathlib.Path(self.sidecars[workload]["log"])
        lines = path.read_text(errors="strict").splitlines() if path.exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # The last line may still be being written.
        return [record for record in records if record.get("kind") == "access"]

    def record(self, workload, **wanted):
        """The newest record of `workload` with these fields, waited for."""

        def find():
            for record in reversed(self.records(workload)):
                if all(record.get(name) == value for name, value in wanted.items()):
                    return record
            return None

        return until(f"a record of {workload} with {wanted}", find)[0]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "killed"


def curl(address, url, *more):
    """curl through the sidecar at `address`: status, headers (lower-case names), body."""
    code, out, err = run("curl", "-sS", "-i", "--max-time", "20", "-x", f"http://{address}", url, *more)
    expect(code == 0, "curl", url, code, err)
    head, _, body = out.partition("\r\n\r\n")
    while head.startswith("HTTP/1.1 1"):
        head, _, body = body.partition("\r\n\r\n")
    lines = head.split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return int(lines[0].split()[1]), headers, body


def grpcurl(address, method, data, *more):
    return run(
        "grpcurl", "-plaintext", "-max-time", "20", "-authority", "inventory.shop",
        "-d", "@", *more, address, method, stdin=data,
    )


def websocket(address, host, path, message):
    return run("node", str(HERE / "websocket.mjs"), address, host, path, message)


def conversation(address, *lines):
    """What a TCP server says to these lines, each sent after its answer, until it closes."""
    host, _, port = address.rpartition(":")
    said = []
    with socket.create_connection((host, int(port)), timeout=20) as stream:
        file = stream.makefile("rwb")
        said.append(file.readline().decode())
        for line in lines:
            file.write(line.encode() + b"\r\n")
            file.flush()
            said.append(file.readline().decode())
        stream.shutdown(socket.SHUT_WR)
        said.append(file.read().decode())
    return said


@check
def demo_starts_in_time(demo):
    """the demo is up in less than two seconds"""
    expect(demo.start_seconds < 2.0, demo.start_seconds)


@check
def rest_allowed(demo):
    """an allowed REST call is answered 200 and on record on both sides"""
    status, headers, body = curl(demo.outbound("shop/web"), "http://orders.shop/orders/7")
    expect(status == 200 and json.loads(body)["id"] == 7, status, body)
    expect("sidegate-error" not in headers, headers)
    inbound = demo.record("shop/orders", direction="inbound", path="/orders/7", status=200)
    expect(inbound["source"] == demo.sidecars["shop/web"]["id"], inbound)
    expect(inbound["destination"] == demo.sidecars["shop/orders"]["id"], inbound)
    expect(inbound["decision"] == "allow" and inbound["policy"] == "shop/orders", inbound)
    expect(inbound["response_bytes"] == len(body.encode()), inbound)
    expect(inbound["tls_version"] == "TLSv1.3", inbound)
    outbound = demo.record("shop/web", direction="outbound", path="/orders/7", status=200)
    expect(outbound["destination_service"] == "orders.shop:80", outbound)


@check
def rest_denied(demo):
    """a denied REST call is answered 403 with a decision that the log explains"""
    status, headers, body = curl(demo.outbound("jobs/batch"), "http://orders.shop/orders/7")
    expect(status == 403, status)
    decision = headers["sidegate-decision"]
    expect(json.loads(body) == {"error": "denied by policy", "decision": decision}, body)
    expect("sidegate-error" in headers, headers)
    record = demo.record("shop/orders", decision_id=decision)
    expect(record["decision"] == "deny" and record["reason"] == "no rule admits", record)
    expect(record["source"] == demo.sidecars["jobs/batch"]["id"], record)
    status, _, _ = curl(demo.outbound("jobs/batch"), "http://orders.shop/healthz")
    expect(status == 200, "healthz", status)


@check
def spoofed_headers(demo):
    """identity headers of a caller never arrive"""
    spoofs = {
        "x-forwarded-client-cert": "URI=spiffe://mesh.local/ns/shop/sa/admin",
        "X_Forwarded_Client_Cert": "spoofed",
        "sidegate-client-id": "spiffe://mesh.local/ns/shop/sa/admin",
        "sidegate_client_id": "spoofed",
        "sidegate-port": "1",
        "l5d-client-id": "spoofed",
    }
    more = [part for name, value in spoofs.items() for part in ("-H", f"{name}: {value}")]
    status, _, body = curl(demo.outbound("shop/web"), "http://orders.shop/headers", *more)
    seen = json.loads(body)
    web = demo.sidecars["shop/web"]["id"]
    expect(status == 200, status)
    expect(seen["sidegate-client-id"] == web, seen)
    expect(seen["x-forwarded-client-cert"] == f"URI={web}", seen)
    expect("admin" not in body and "spoofed" not in body and "sidegate-port" not in seen, body)


@check
def bodies(demo):
    """large and echoed bodies pass whole"""
    outbound = demo.outbound("shop/web")
    code, out, err = run("sh", "-c", f"curl -sS --max-time 60 -x http://{outbound} http://orders.shop/bytes/50000000 | wc -c")
    expect(code == 0 and out.strip() == "50000000", code, out, err)
    payload = "x" * 100_000
    status, _, body = curl(outbound, "http://orders.shop/echo", "-H", "Expect: 100-continue", "--data-binary", payload)
    expect(status == 200 and body == payload, status, len(body))
    status, _, body = curl(outbound, "http://orders.shop/echo", "-H", "Transfer-Encoding: chunked", "--data-binary", payload)
    expect(status == 200 and body == payload, status, len(body))
    status, _, _ = curl(outbound, "http://orders.shop/status/204")
    expect(status == 204, status)
    code, out, err = run("curl", "-sS", "-I", "--max-time", "10", "-x", f"http://{outbound}", "http://orders.shop/orders/7")
    expect(code == 0 and out.startswith("HTTP/1.1 200"), code, out, err)


@check
def bad_requests(demo):
    """ambiguous requests are answered 400 by the sidecar, and on record"""
    host, _, port = demo.outbound("shop/web").rpartition(":")
    smuggled = b"POST /echo HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as stream:
        stream.sendall(smuggled)
        answer = stream.makefile("rb").read().decode()
    expect(answer.startswith("HTTP/1.1 400") and "sidegate-error: " in answer.lower(), answer)
    expect(answer.count("HTTP/1.1 ") == 1, answer)
    demo.record("shop/web", direction="outbound", status=400, error="bad_request")
    status, headers, _ = curl(demo.outbound("shop/web"), "http://orders.shop/orders%2f7", "--path-as-is")
    expect(status == 400 and "sidegate-error" in headers, status, headers)
    status, headers, _ = curl(demo.outbound("shop/web"), "http://nobody.shop/")
    expect(headers.get("sidegate-error") == "destination_unknown", status, headers)


@check
def http2(demo):
    """nghttp speaks HTTP/2 with prior knowledge"""
    code, out, err = run("nghttp", "-v", "--no-dep", "-H", ":authority: orders.shop",
                         f"http://{demo.outbound('shop/web')}/orders/3")
    expect(code == 0 and ":status: 200" in out and '"id":3' in out, code, out, err)
    demo.record("shop/orders", path="/orders/3", protocol="h2", status=200)


@check
def grpc_kinds(demo):
    """gRPC calls of all four kinds pass, with reflection"""
    web = demo.outbound("shop/web")
    code, out, err = grpcurl(web, "shop.v1.Inventory/Get", '{"sku":"tea"}')
    expect(code == 0 and "quantity" in out, code, out, err)
    code, out, err = grpcurl(web, "shop.v1.Inventory/Watch", '{"sku":"tea","limit":3,"repeat_after_ms":10}')
    expect(code == 0 and out.count('"sku"') == 3, code, out, err)
    code, out, err = grpcurl(web, "shop.v1.Inventory/Restock", '{"sku":"cup","quantity":"2"}{"sku":"cup","quantity":"3"}')
    expect(code == 0 and json.loads(out)["quantity"] == "5", code, out, err)
    code, out, err = grpcurl(web, "shop.v1.Inventory/Reserve", '{"sku":"cup","quantity":"1"}{"sku":"cup","quantity":"2"}')
    expect(code == 0 and out.count('"reserved"') == 2, code, out, err)
    record = demo.record("shop/inventory", grpc_method="Reserve", grpc_status=0)
    expect(record["protocol"] == "grpc" and record["grpc_service"] == "shop.v1.Inventory", record)
    code, out, err = grpcurl(web, "shop.v1.Inventory/Get", '{"sku":"air"}')
    expect(code != 0 and "NotFound" in err, code, out, err)
    demo.record("shop/inventory", grpc_method="Get", grpc_status=5)


@check
def grpc_denied(demo):
    """a denied gRPC call ends as PERMISSION_DENIED"""
    proto = ["-import-path", str(HERE.parent.parent / "examples" / "proto"), "-proto", "shop/v1/inventory.proto"]
    code, out, err = grpcurl(demo.outbound("jobs/batch"), "shop.v1.Inventory/Get", '{"sku":"tea"}', *proto)
    expect(code != 0 and "PermissionDenied" in err, code, out, err)
    record = demo.record("shop/inventory", grpc_status=7)
    expect(record["decision"] == "deny", record)


@check
def grpc_deadline(demo):
    """a deadline ends a stream"""
    code, out, err = run(
        "grpcurl", "-plaintext", "-max-time", "1", "-authority", "inventory.shop", "-d", '{"sku":"tea"}',
        demo.outbound("shop/web"), "shop.v1.Inventory/Watch")
    expect(code != 0 and "DeadlineExceeded" in err, code, out, err)


@check
def websocket_echo(demo):
    """a WebSocket conversation passes, and one that is not allowed is refused"""
    code, out, err = websocket(demo.outbound("shop/web"), "orders.shop", "/orders/7/events", "hello")
    expect(code == 0 and out.strip() == "hello", code, out, err)
    demo.record("shop/orders", protocol="websocket", path="/orders/7/events")
    code, out, err = websocket(demo.outbound("jobs/batch"), "orders.shop", "/orders/7/events", "hello")
    expect(code == 1 and out.startswith("refused 403 "), code, out, err)


@check
def opaque_tcp(demo):
    """the ledger speaks first, through a tunnel"""
    upstream = demo.sidecars["shop/web"]["upstreams"]["ledger.shop:6379"]
    said = conversation(upstream, "ADD e2e 5", "BALANCE e2e")
    expect(said[0].startswith("220 ") and said[1:] == ["250 5\r\n", "250 5\r\n", ""], said)
    record = demo.record("shop/ledger", protocol="tcp", decision="allow")
    expect(record["request_bytes"] > 0 and record["response_bytes"] > 0, record)


@check
def web_calls_all(demo):
    """web calls the three others through its sidecar"""
    code, out, err = run("curl", "-sS", f"http://{demo.sidecars['shop/web']['application']}/checkout/7")
    expect(code == 0 and set(json.loads(out)) == {"order", "in_stock", "balance"}, code, out, err)


@check
def refused_at_the_door(demo):
    """plaintext, no certificate and another CA's certificate are refused inbound, with the reason"""
    inbound = demo.sidecars["shop/orders"]["inbound"]
    failures = lambda: [r for r in demo.records("shop/orders") if r.get("error") and not r.get("path")]
    before = len(failures())
    run("curl", "-sS", "--max-time", "10", f"http://{inbound}/orders/7")
    until("plaintext is on record", lambda: len(failures()) > before)
    before = len(failures())
    openssl(demo, inbound)
    until("no certificate is on record", lambda: len(failures()) > before)
    before = len(failures())
    own = forge(demo.directory, demo.sidecars["shop/web"]["id"])
    openssl(demo, inbound, "-cert", str(own / "leaf.pem"), "-key", str(own / "leaf.key"))
    until("another CA's certificate is on record", lambda: len(failures()) > before)
    before = len(failures())
    other = forge(demo.directory, "spiffe://elsewhere.example/ns/shop/sa/web")
    openssl(demo, inbound, "-cert", str(other / "leaf.pem"), "-key", str(other / "leaf.key"))
    until("another trust domain is on record", lambda: len(failures()) > before)
    for record in failures():
        expect(record.get("reason"), record)


def openssl(demo, address, *more):
    """An s_client with the mesh's ALPN that asks for /orders/7; it must never be answered."""
    code, out, err = run("openssl", "s_client", "-connect", address, "-alpn", "sidegate/1", "-tls1_3", "-ign_eof",
                         *more, stdin="GET /orders/7 HTTP/1.1\r\nHost: orders.shop\r\n\r\n", timeout=30)
    expect('"id":7' not in out, out)


def forge(directory, spiffe_id):
    """A self-made CA and a leaf with `spiffe_id`, by the openssl command line."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=directory))
    extensions = folder / "leaf.cnf"
    extensions.write_text(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=critical,URI:{spiffe_id}\n")
    steps = [
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=another root", "-keyout", "ca.key", "-out", "ca.pem",
         "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
        ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/",
         "-keyout", "leaf.key", "-out", "leaf.csr"],
        ["openssl", "x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "1",
         "-CAcreateserial", "-extfile", "leaf.cnf", "-out", "leaf.pem"],
    ]
    for step in steps:
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, timeout=30)
        expect(done.returncode == 0, step, done.stderr)
    return folder


@check
def logs_command(demo):
    """`sidegate logs` shows the denials, as a table and as JSON"""
    directory = str(demo.directory / "mesh")
    code, out, err = run(demo.sidegate, "logs", "--dir", directory, "--denied")
    expect(code == 0 and "jobs/batch" in out and "DENY" in out and "TIME" in out, code, out, err)
    code, out, err = run(demo.sidegate, "logs", "orders", "-n", "shop", "--dir", directory, "--denied", "-o", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    expect(code == 0 and rows and all(row["decision"] == "deny" for row in rows if "decision" in row), code, out, err)
    log = pathlib.Path(demo.sidecars["shop/orders"]["log"]).read_text()
    code, out, err = run(demo.sidegate, "logs", "--file", "-", "--status", "403", stdin=log + "{broken\n")
    expect(code == 0 and "403" in out and "{broken" in out, code, out, err)


@check
def authz_test(demo):
    """`sidegate authz test` says the same as the sidecar"""
    directory = str(demo.directory / "mesh")
    ask = lambda caller: run(demo.sidegate, "authz", "test", "--dir", directory, "--from", demo.sidecars[caller]["id"],
                             "--to", "shop/orders", "--method", "GET", "--path", "/orders/7")
    code, out, err = ask("shop/web")
    expect(code == 0 and "allow" in out.lower(), code, out, err)
    code, out, err = ask("jobs/batch")
    expect(code == 1 and "deny" in out.lower(), code, out, err)


@check
def policy_change(demo):
    """a policy edited on disk is live in less than a second; a broken one changes nothing"""
    batch = demo.outbound("jobs/batch")
    get = lambda: curl(batch, "http://orders.shop/orders/7")[0]
    expect(get() == 403, "denied before")
    extra = demo.resources / "e2e.yaml"
    policy = """apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: e2e, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  action: Allow
  rules:
    - name: batch
      from: [{ workload: { serviceAccount: batch, namespace: jobs } }]
      to: [{ http: { methods: [GET], paths: ["/orders/*"] } }]
"""
    replace(extra, policy)
    _, took = until("the policy is live", lambda: get() == 200)
    expect(took < 1.0, f"live after {took:.2f} s")
    replace(extra, policy.replace("methods", "method"))
    admin = demo.sidecars["shop/orders"]["admin"]
    reported = lambda: "method" in run("curl", "-sS", f"http://{admin}/snapshot")[1] and "e2e.yaml" in run("curl", "-sS", f"http://{admin}/snapshot")[1]
    until("the broken policy is reported", reported)
    expect(get() == 200, "the last good version stays")
    code, out, err = run(demo.sidegate, "validate", str(extra))
    expect(code == 1 and "e2e.yaml:10:" in out + err and "methods" in out + err, code, out, err)
    extra.unlink()
    _, took = until("the policy is gone", lambda: get() == 403)
    expect(took < 1.0, f"gone after {took:.2f} s")


def replace(path, text):
    """Writes as an editor should: whole, beside it, renamed over it."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)


@check
def administration(demo):
    """administration says what is live, and never a key"""
    admin = demo.sidecars["shop/orders"]["admin"]
    for path in ("/config", "/snapshot", "/certs", "/connections", "/denials"):
        code, out, err = run("curl", "-sS", "--fail", f"http://{admin}{path}")
        expect(code == 0, path, err)
        json.loads(out)
        expect("PRIVATE KEY" not in out and "sgt_" not in out, path, out)
    code, _, _ = run("curl", "-sS", "--fail", "-H", "Origin: http://evil.example", f"http://{admin}/config")
    expect(code == 22, "a foreign Origin is refused")
    code, _, _ = run("curl", "-sS", "--fail", "-H", "Host: evil.example", f"http://{admin}/config")
    expect(code == 22, "a foreign Host is refused")
    health = demo.sidecars["shop/orders"]["health"]
    code, out, err = run("curl", "-sS", "--fail", f"http://{health}/readyz")
    expect(code == 0, out, err)
    code, metrics, err = run("curl", "-sS", "--fail", f"http://{health}/metrics")
    expect(code == 0 and "sidegate_requests_total{" in metrics, err)
    code, out, err = run("promtool", "check", "metrics", stdin=metrics)
    expect(code == 0, "promtool", out, err)


@check
def every_line_parses(demo):
    """every line of every log is JSON"""
    for sidecar in demo.sidecars.values():
        text = pathlib.Path(sidecar["log"]).read_text()
        for line in text.splitlines():
            json.loads(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidegate", required=True, help="the sidegate binary")
    parser.add_argument("--only", help="run the checks whose function name has this in it")
    arguments = parser.parse_args()
    missing = [tool for tool in ("curl", "grpcurl", "nghttp", "node", "openssl", "promtool") if not shutil.which(tool)]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; .ci/run installs them")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="sidegate-e2e-"))
    demo = Demo(arguments.sidegate, directory)
    passed, failed = 0, []
    try:
        for function in CHECKS:
            if arguments.only and arguments.only not in function.__name__:
                continue
            try:
                function(demo)
                passed += 1
                print(f"ok    {function.__doc__}", flush=True)
            except Exception as error:  # Every check is reported, whatever it trips over.
                failed.append(function.__doc__)
                print(f"FAIL  {function.__doc__}\n      {type(error).__name__}: {error}", flush=True)
    finally:
        code = demo.stop()
    if code != 0:
        failed.append("the demo ends with 0 on Ctrl-C")
        print(f"FAIL  the demo ended with {code}")
    else:
        passed += 1
    if failed:
        print(f"kept: {directory}")
    else:
        shutil.rmtree(directory)
    print(f"{passed} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
