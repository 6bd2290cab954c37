#!/usr/bin/env python3
"""Sidecars under strain: many connections, a storm of handshakes, a greedy caller, memory that must not grow.

    e2e/strain/run.py --bin-dir target/release
    e2e/strain/run.py --bin-dir target/binaries --only flat_memory --requests 10000000

Each check starts a mesh of its own, puts load on it with `sidegate-loadtest run`, and reads memory and CPU from
/proc. Generator, sidecars and backend share the cores of one machine: let nothing else run on it.
"""

import argparse
import contextlib
import http.client
import os
import pathlib
import resource
import shutil
import statistics
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
from checks import CHECKS, check, expect, until  # noqa: E402
from mesh import DEADLINE_SECONDS, NAMESPACE, Mesh, milliseconds, place, rate, result  # noqa: E402

IDLE_CONNECTIONS = 5000
STORM_RATE = 2000
STORM_SECONDS = 12
# Fewer are no storm: cores that are shared with the callers make far fewer than are offered.
STORM_RATE_MIN = 100
STARVED_MS = 100
FILES_MIN = 12_000
REPETITIONS = 5
REST_SECONDS = 5


def figure(text):
    print(f"      {text}", flush=True)


# What an application does with a connection that it keeps.


def connect(sidecar):
    connection = http.client.HTTPConnection(sidecar.outbound, timeout=DEADLINE_SECONDS)
    connection.connect()
    connection.auto_open = False  # One that was closed is an error, and not opened anew.
    return connection


def call(connection):
    connection.request("GET", f"http://called.{NAMESPACE}/bytes/100")
    answer = connection.getresponse()
    body = answer.read()
    expect(answer.status == 200 and len(body) == 100, answer.status, body)


@check
def idle_and_busy(bench):
    """5,000 idle connections and 200 busy ones hold"""
    with Mesh(bench) as mesh, contextlib.ExitStack() as closing:
        caller = mesh["caller"]
        mesh.load("--closed", "--connections", 16, "--warmup", "0s", "--duration", "1s")
        before_kib = caller.memory_kib()
        idle = []
        for _ in range(IDLE_CONNECTIONS):
            idle.append(closing.enter_context(contextlib.closing(connect(caller))))
            call(idle[-1])
        each_kib = (caller.memory_kib() - before_kib) / len(idle)
        busy = mesh.load("--closed", "--connections", 200, "--duration", "10s")
        for connection in idle:
            call(connection)
        figure(f"each of {len(idle)} idle connections takes {each_kib:.1f} KiB of the calling sidecar; beside them "
               f"{rate(busy):.0f} calls/s, p99 {milliseconds(busy, 'p99'):.1f} ms")


@check
def handshake_storm(bench):
    """open calls go on while 2,000 new mTLS connections a second are offered"""
    # Warm-up and measurement are within the storm.
    open_calls = ("--rate", 200, "--connections", 64, "--warmup", "1s", "--duration", "10s")
    with Mesh(bench) as mesh:
        called = mesh["called"]
        cpu_before = called.cpu_seconds()
        calm = mesh.load(*open_calls)
        cpu_calm = called.cpu_seconds()
        # Callers are elsewhere: they take what CPU the mesh leaves.
        storm = mesh.begin_new_connections(STORM_RATE, STORM_SECONDS, nice=19)
        stormy = mesh.load(*open_calls)
        made = result(storm, unfinished_allowed=True)
        cpu_stormy = called.cpu_seconds()
    cpu_us = ((cpu_stormy - cpu_calm) - (cpu_calm - cpu_before)) / made["counts"]["answered"] * 1e6
    figure(f"{rate(made):.0f} of {STORM_RATE} handshakes/s with a call each, "
           f"{cpu_us:.0f} us of the called sidecar's CPU each")
    for name, run in (("without", calm), ("with", stormy)):
        figure(f"open calls {name} the storm: p50 {milliseconds(run, 'p50'):.2f} ms, "
               f"p99 {milliseconds(run, 'p99'):.2f} ms, max {milliseconds(run, 'max'):.1f} ms")
    expect(rate(made) >= STORM_RATE_MIN, f"{rate(made):.0f} handshakes a second are no storm")
    expect(milliseconds(stormy, "p99") < STARVED_MS, "open calls are starved")


@contextlib.contextmanager
def confined(cores):
    """What is started meanwhile runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def modest_p99(mesh, greedy_calls):
    """The p99 of the modest caller in milliseconds, and the calls a second of the greedy one meanwhile."""
    greedy = greedy_calls and mesh.begin_load(
        "--closed", "--connections", 256, "--warmup", "0s", "--duration", "7s",
        caller="greedy", called=greedy_calls, nice=19)
    modest = mesh.load("--rate", 100, "--connections", 4, "--warmup", "1s", "--duration", "5s")
    return milliseconds(modest, "p99"), rate(result(greedy)) if greedy else 0


@check
def fairness(bench):
    """a greedy caller does not raise another caller's p99 more than twofold

    The called side has a core of its own, as if it were another machine. The control sends the same load through
    another sidecar on that core to the same backend; what that adds is the machine's doing. Whatever only the greedy
    caller uses has the lowest priority: the modest one waits for it nowhere but in the called sidecar.
    """
    cores = sorted(os.sched_getaffinity(0))
    expect(len(cores) > 1, "this needs two cores")
    callers_cores, called_core = set(cores[:-1]), {cores[-1]}
    samples = {None: [], "bystander": [], "called": []}
    with confined(callers_cores), Mesh(bench, ("caller", "greedy"), ("called", "bystander")) as mesh:
        place(mesh["called"].process, called_core)
        place(mesh.backend, called_core)
        place(mesh["bystander"].process, called_core, nice=19)
        place(mesh["greedy"].process, callers_cores, nice=19)
        for _ in range(REPETITIONS):
            for greedy_calls, measured in samples.items():
                measured.append(modest_p99(mesh, greedy_calls))
    for greedy_calls, measured in samples.items():
        each = ", ".join(f"{p99:.1f}" for p99, _ in measured)
        calls = statistics.median(calls for _, calls in measured)
        figure(f"p99 {each} ms while a greedy caller makes {calls:.0f} calls/s to {greedy_calls or 'nobody'}")
    alone, elsewhere = (rise(samples["called"], samples[control]) for control in (None, "bystander"))
    figure(f"p99 rises {alone:.1f}-fold over that without a greedy caller, {elsewhere:.1f}-fold over the control")
    expect(elsewhere <= 2, f"p99 rises {elsewhere:.1f}-fold")


def rise(samples, control):
    """The median ratio, made within each repetition."""
    return statistics.median(p99 / before for (p99, _), (before, _) in zip(samples, control, strict=True))


def make_calls(mesh, wanted):
    """Makes at least so many calls over 64 connections."""
    made, per_second = 0, 2000
    while made < wanted:
        seconds = min(max((wanted - made) / per_second, 1), 60)
        run = mesh.load("--closed", "--connections", 64, "--warmup", "0s", "--duration", f"{seconds:.1f}s")
        made, per_second = made + run["counts"]["answered"], rate(run)
        for sidecar in mesh.sidecars.values():
            sidecar.begin_log()


def memory_kept(mesh):
    """What is kept once the last calls have ended: their buffers go back within a second or two."""
    time.sleep(REST_SECONDS)
    return memory(mesh)


def memory(mesh, field="VmRSS"):
    return {account: sidecar.memory_kib(field) for account, sidecar in mesh.sidecars.items()}


@check
def flat_memory(bench):
    """memory stays flat over many requests"""
    with Mesh(bench) as mesh:
        make_calls(mesh, bench.requests / 10)
        early = memory_kept(mesh)
        make_calls(mesh, bench.requests * 9 / 10)
        late = memory_kept(mesh)
    for account in early:
        figure(f"{account}: {early[account]} KiB after a tenth of {bench.requests} calls, "
               f"{late[account]} KiB at the end")
    grown = [account for account in early if late[account] - early[account] >= 2048]
    expect(not grown, "grown by 2 MiB and more:", *grown)


@check
def memory_given_back(bench):
    """of what a burst of 2,000 connections took, all but a quarter is given back within 10 s"""
    with Mesh(bench) as mesh:
        mesh.load("--closed", "--connections", 4, "--warmup", "0s", "--duration", "1s")
        idle = memory(mesh)
        mesh.load("--closed", "--connections", 2000, "--warmup", "0s", "--duration", "5s")
        peak = memory(mesh, "VmHWM")
        expect(all(peak[account] > idle[account] for account in idle), "there was no burst")

        def kept():
            return {account: (now - idle[account]) / (peak[account] - idle[account])
                    for account, now in memory(mesh).items()}

        try:
            _, took = until("a quarter of it is left at most", lambda: max(kept().values()) <= 0.25, seconds=10)
            figure(f"given back after {took:.1f} s")
        finally:
            for account, share in kept().items():
                figure(f"{account}: {idle[account]} KiB idle, {peak[account]} KiB at most, "
                       f"{share:.0%} of the burst kept")


def raise_files_max():
    """As many open files as this user may have; processes that are started inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    expect(most >= FILES_MIN, f"at most {most} open files are allowed here (ulimit -Hn), {FILES_MIN} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main():
    names = [function.__name__ for function in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin-dir", type=pathlib.Path, default="target/release",
                        help="where sidegate-proxy, sidegate-ca and sidegate-loadtest are (target/release)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--requests", type=int, default=200_000, help="how many flat_memory makes (200000)")
    bench = parser.parse_args()
    bench.folder = pathlib.Path(tempfile.mkdtemp(prefix="sidegate-strain-"))
    raise_files_max()
    passed, failed = 0, []
    for function in CHECKS:
        if function.__name__ not in bench.only:
            continue
        name = function.__doc__.splitlines()[0]
        try:
            function(bench)
            passed += 1
            print(f"ok    {name}", flush=True)
        except Exception as error:  # Every check is reported, whatever it trips over.
            failed.append(name)
            print(f"FAIL  {name}\n      {type(error).__name__}: {error}", flush=True)
    if failed:
        print(f"kept: {bench.folder}")
    else:
        shutil.rmtree(bench.folder)
    print(f"{passed} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
