"""What every end-to-end test is made of: checks that register themselves, expectations, and waiting for a condition.

Nothing waits by sleeping: `until` asks again and again until something holds or a deadline passes.
"""

import time

FACTS_LENGTH_MAX = 4000
CHECKS = []


def check(function):
    """Registers a check; the first line of its docstring is its name."""
    CHECKS.append(function)
    return function


def expect(condition, *facts):
    if not condition:
        raise AssertionError(" ".join(str(fact) for fact in facts)[:FACTS_LENGTH_MAX])


def until(what, probe, seconds=20, every=0.02):
    """Asks `probe` until it returns something true; returns that and the seconds it took."""
    started = time.monotonic()
    while True:
        found = probe()
        took = time.monotonic() - started
        if found:
            return found, took
        expect(took < seconds, f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(every)
