#!/usr/bin/env python3
"""End-to-end tests on a cluster: the one that KUBECONFIG names, in which Sidegate and the sample shop are installed.

    examples/kubernetes/up --local          # or up, with a cluster of your own
    e2e/kubernetes/images                   # or --tools and --mariadb with images that your nodes reach
    e2e/kubernetes/run.py --sidegate target/release/sidegate

The last check uninstalls Sidegate. `--only WORD` runs the checks whose module or function has the word in it and then does
not uninstall, `--list` prints them all. What failed is told with what kubectl knows of it.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
import harness  # noqa: E402


@dataclass
class Images:
    """Where the pods' images come from."""

    shop: str
    loadtest: str
    tools: str
    mariadb: str
    flags: list = field(default_factory=list)


def load_checks():
    """One module a topic, in the order in which they are tried; uninstall is last."""
    import injection  # noqa: F401
    import traffic  # noqa: F401
    import probes  # noqa: F401
    import policies  # noqa: F401
    import bypass  # noqa: F401
    import token_attacks  # noqa: F401
    import commands  # noqa: F401
    import adoption  # noqa: F401
    import lifecycle  # noqa: F401
    import control_plane  # noqa: F401
    import documentation  # noqa: F401
    import install  # noqa: F401
    last = [function for function in harness.CHECKS if function.__name__ == "uninstall"]
    return [function for function in harness.CHECKS if function not in last] + last


def reachable():
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG is not set"
    try:
        done = subprocess.run(["kubectl", "get", "--raw", "/readyz"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def explain(cluster):
    """What a failed check leaves to look at."""
    for arguments in (["get", "pods", "-A", "-o", "wide"], ["get", "events", "-A", "--sort-by=.lastTimestamp"]):
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True)
        lines = done.stdout.splitlines()
        if arguments[1] == "events":
            lines = [line for line in lines if " Warning " in line][-15:]
        print("\n".join(f"      | {line}" for line in lines), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidegate", required=True, help="the sidegate binary")
    parser.add_argument("--image-registry", default="sidegate", help="as for `sidegate install`")
    parser.add_argument("--image-tag", default="0.1.0", help="as for `sidegate install`")
    parser.add_argument("--tools", default="sidegate-e2e/tools:1", help="an image with sh, python3, curl and openssl")
    parser.add_argument("--mariadb", default="sidegate-e2e/mariadb:1", help="an image with mariadbd, mariadb-install-db and mariadb")
    parser.add_argument("--only", action="append", default=[], help="run the checks whose module or function has this word in it")
    parser.add_argument("--list", action="store_true", help="print the checks")
    parser.add_argument("--keep", action="store_true", help="leave the namespaces there")
    arguments = parser.parse_args()
    checks = load_checks()
    if arguments.only:
        wanted = lambda function: any(word in f"{function.__module__}.{function.__name__}" for word in arguments.only)
        checks = [function for function in checks if wanted(function)]
    if arguments.list:
        for function in checks:
            print(f"{function.__module__}.{function.__name__}: {function.__doc__}")
        return 0
    why = reachable()
    if why:
        print(f"SKIPPED: no cluster, so NOTHING was tested: {why}")
        return 0
    flags = ["--image-registry", arguments.image_registry, "--image-tag", arguments.image_tag]
    ours = lambda name: f"{arguments.image_registry}/{name}:{arguments.image_tag}"
    images = Images(ours("shop"), ours("loadtest"), arguments.tools, arguments.mariadb, flags)
    cluster = harness.Cluster(arguments.sidegate, images)
    passed, failed, skipped = 0, [], 0
    try:
        if not cluster.find(f"/api/v1/namespaces/{harness.SYSTEM}"):
            print("FAIL  Sidegate is not installed: examples/kubernetes/up")
            return 1
        for function in checks:
            started = time.monotonic()
            try:
                function(cluster)
                passed += 1
                print(f"ok    {function.__doc__} ({time.monotonic() - started:.1f} s)", flush=True)
            except harness.Skipped as reason:
                skipped += 1
                print(f"SKIPPED {function.__doc__}: {reason}", flush=True)
            except Exception as error:  # Every check is reported, whatever it trips over.
                failed.append(function)
                print(f"FAIL  {function.__doc__} ({time.monotonic() - started:.1f} s)\n      {type(error).__name__}: {error}", flush=True)
                where = traceback.extract_tb(error.__traceback__)
                print("      at " + " > ".join(f"{frame.name}:{frame.lineno}" for frame in where), flush=True)
                explain(cluster)
        if cluster.made and not arguments.keep:
            cluster.leave(*dict.fromkeys(cluster.made))
    finally:
        cluster.close()
    for function in failed:
        print(f"FAILED {function.__module__}.{function.__name__}: {function.__doc__}")
    print(f"{passed} passed, {len(failed)} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
