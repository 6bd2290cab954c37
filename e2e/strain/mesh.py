"""A mesh of processes under load: a CA, a backend and sidecars, as `sidegate-loadtest compare` configures them.

Default deny with 20 rules of which the last admits the callers, access log into a file. Whatever a mesh starts ends
with it; what its processes say is in its folder.
"""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile

from checks import expect, until

DEADLINE_SECONDS = 20
LOAD_SECONDS_MAX = 120
NAMESPACE = "strain"
RULES = 20
# Below the ports that the kernel gives to outgoing connections, which could take one before a process listens on it.
PORTS = range(20_000, 32_000)


def free_addresses():
    """Loopback addresses that are free, each once."""
    offset = os.getpid() % len(PORTS)  # Other harnesses on this machine begin elsewhere.
    for number in range(len(PORTS)):
        port = PORTS[(offset + number) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield f"127.0.0.1:{port}"


ADDRESSES = free_addresses()


def place(process, cores, nice=0):
    """Runs all threads of a process on these cores, with this priority."""
    for thread in threads(process):
        os.sched_setaffinity(thread, cores)
        if nice:
            os.setpriority(os.PRIO_PROCESS, thread, nice)


def threads(process):
    return [int(thread) for thread in os.listdir(f"/proc/{process.pid}/task")]


class Sidecar:
    """A sidegate-proxy: its addresses and files, and, once it is started, its process."""

    def __init__(self, mesh, account, application=None):
        self.mesh, self.account = mesh, account
        self.outbound, self.inbound, admin, self.health = itertools.islice(ADDRESSES, 4)
        self.svid = mesh.folder / f"{account}-state" / "svid.pem"
        ports = f'[{{ name: http, port: 80, address: "{application}" }}]' if application else "[]"
        (mesh.folder / f"{account}.yaml").write_text(f"""\
workload: {{ trustDomain: mesh.local, namespace: {NAMESPACE}, serviceAccount: {account}, labels: {{ app: {account} }} }}
ca: {{ address: "{mesh.ca}", root: ca/root.pem, joinTokenFile: {account}.token }}
resources: resources
ports: {ports}
outbound: {{ address: "{self.outbound}" }}
inbound: {{ address: "{self.inbound}" }}
admin: {{ address: "{admin}" }}
health: {{ address: "{self.health}" }}
log: {{ path: {account}.log }}
state: {account}-state
""")

    def start(self):
        token = self.mesh.command("sidegate-ca", "token", "create", "--config", "ca.yaml",
                                  "--namespace", NAMESPACE, "--service-account", self.account)
        file = self.mesh.folder / f"{self.account}.token"
        file.touch(mode=0o600)
        file.write_text(token)
        self.process = self.mesh.start("sidegate-proxy", "--config", f"{self.account}.yaml")
        self.mesh.command("sidegate-proxy", "wait", "--timeout", f"{DEADLINE_SECONDS}s",
                          "--url", f"http://{self.health}/readyz")

    def memory_kib(self, field="VmRSS"):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        lines = (line.split() for line in status.splitlines())
        return next(int(words[1]) for words in lines if words[0] == f"{field}:")

    def cpu_seconds(self):
        files = (pathlib.Path(f"/proc/{self.process.pid}/task/{thread}/schedstat") for thread in threads(self.process))
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9

    def begin_log(self):
        """Begins a new log, so that ten million calls fill no disk."""
        (self.mesh.folder / f"{self.account}.log").unlink()
        self.process.send_signal(signal.SIGHUP)


class Mesh:
    """A CA, a backend, and sidecars by account; they run as long as the `with` block."""

    def __init__(self, bench, callers=("caller",), called=("called",)):
        self.binaries = bench.bin_dir.resolve()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=bench.folder))
        self.callers, self.called = callers, called
        self.ca = next(ADDRESSES)
        self.processes, self.sidecars = [], {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        (self.folder / "ca.yaml").write_text(
            f"trustDomain: mesh.local\nstateDir: ca\naddress: {self.ca}\nmetricsAddress: {next(ADDRESSES)}\n")
        ca = self.start("sidegate-ca", "serve", "--config", "ca.yaml")
        until("the CA is up", lambda: self._serves(ca))
        self.backend = self.start("sidegate-loadtest", "backend", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        application = self.backend.stdout.readline().decode().strip()
        self.sidecars = {account: Sidecar(self, account, application) for account in self.called}
        self.sidecars |= {account: Sidecar(self, account) for account in self.callers}
        (self.folder / "resources").mkdir()
        for account in self.called:
            (self.folder / "resources" / f"{account}.yaml").write_text(self._resources(account))
        for sidecar in self.sidecars.values():
            sidecar.start()

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __getitem__(self, account):
        return self.sidecars[account]

    def _serves(self, ca):
        expect(ca.poll() is None, "the CA has ended; what it said is in", self.folder)
        return self._run("sidegate-ca", "token", "list", "--config", "ca.yaml").returncode == 0

    def _resources(self, account):
        others = "".join(f"""\
    - name: other-{number}
      from: [{{ workload: {{ serviceAccount: other-{number} }} }}]
      to: [{{ http: {{ methods: [GET, POST], paths: ["/other-{number}/**"] }} }}]
""" for number in range(1, RULES))
        callers = ", ".join(f"{{ workload: {{ serviceAccount: {caller} }} }}" for caller in self.callers)
        return f"""\
apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: {{ name: {account}, namespace: {NAMESPACE} }}
spec:
  ports: [{{ name: http, port: 80, protocol: auto }}]
  endpoints: [{{ address: "{self[account].inbound}", identity: {{ workload: {{ serviceAccount: {account} }} }} }}]
---
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{ name: {account}, namespace: {NAMESPACE} }}
spec:
  selector: {{ matchLabels: {{ app: {account} }} }}
  ports: [http]
  action: Allow
  rules:
{others}    - name: callers
      from: [{callers}]
      to:
        - http: {{ methods: [GET, POST], paths: ["/bytes/**"] }}
        - grpc: {{ service: bench.Echo, methods: [Call] }}
"""

    def start(self, program, *arguments, nice=0, **streams):
        """Starts a process that ends with the mesh."""
        with open(self.folder / f"{len(self.processes)}-{program}.out", "w") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output} | streams
            command = ["nice", "-n", str(nice), self.binaries / program, *arguments]
            process = subprocess.Popen(command, cwd=self.folder, **streams)
        self.processes.append(process)
        return process

    def _run(self, program, *arguments):
        return subprocess.run([self.binaries / program, *arguments], cwd=self.folder, capture_output=True, text=True,
                              timeout=2 * DEADLINE_SECONDS)

    def command(self, program, *arguments):
        """Runs a program to its end; what it printed."""
        done = self._run(program, *arguments)
        expect(done.returncode == 0, program, *arguments, done.stderr)
        return done.stdout

    def begin_run(self, *flags, nice=0):
        """Starts a load, for `result` to read."""
        return self.start("sidegate-loadtest", "run", "-o", "json", *map(str, flags), nice=nice,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def begin_load(self, *flags, caller="caller", called="called", path="/bytes/100", nice=0):
        """Starts to call `called` through the sidecar of `caller`."""
        return self.begin_run("--url", f"http://{called}.{NAMESPACE}{path}", "-x", self[caller].outbound, *flags,
                              nice=nice)

    def begin_new_connections(self, rate, seconds, nice=0):
        """Starts to open so many mTLS connections a second to `called`, each with a call, as `caller`'s sidecar would."""
        called, svid = self["called"], self["caller"].svid
        return self.begin_run(
            "--url", f"https://{called.inbound}/bytes/100", "--protocol", "http2", "--alpn", "sidegate/1",
            "-H", "sidegate-protocol: http/1.1", "--insecure", "--cert", svid, "--key", svid, "--new-connections",
            "--connections", 64, "--rate", rate, "--warmup", "0s", "--duration", f"{seconds}s", nice=nice)

    def load(self, *flags, **where):
        return result(self.begin_load(*flags, **where))


def result(load, unfinished_allowed=False):
    """What a load measured, at its end; each call that ended must have been answered with 200."""
    output, said = load.communicate(timeout=LOAD_SECONDS_MAX)
    expect(load.returncode == 0, f"the load ended with {load.returncode}:", said.decode())
    run = json.loads(output)["runs"][0]
    counts = run["counts"]
    expect(counts["failed"] == 0, counts, run["errors"])
    expect(unfinished_allowed or counts["unfinished"] == 0, counts)
    expect(run["statuses"] == {"200": counts["answered"]}, run["statuses"], counts)
    return run


def milliseconds(run, percentile):
    return run["latency_us"][percentile] / 1000


def rate(run):
    return run["counts"]["answered"] / run["elapsed_s"]
