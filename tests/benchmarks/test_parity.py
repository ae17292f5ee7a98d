"""The engine says what training computes, with and without an adapter: on the real base and engine, in eight bits.

Which is what can go wrong in most ways: weights and inputs are rounded, and the adapter stands beside both. In bf16 each load in the
end-to-end tests is proven by the version's fingerprint; int4, and all three on more texts, are `learnd bench parity`'s.
"""

import json
import subprocess
import sys

BOUND = 0.02
"""Nats per token."""


def test_the_engine_says_what_training_computes():
    """By the bench itself, in a process of its own, as `learnd bench parity` runs it."""
    command = [sys.executable, "benchmarks/parity.py", "--quick", "--json", "--only", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["int8"]
    assert abs(found["base"]["mean"]) <= BOUND
    assert abs(found["random"]["mean"]) <= BOUND
    assert 0.5 <= found["random"]["applied"] <= 1.5, "left out it is 0, applied twice 2"  # 1.05 here: a few tokens weigh most
