"""The engine says what training computes, for each quantization, with and without an adapter: on the real base and engine."""

import json
import subprocess
import sys

import pytest

BOUND = 0.02
"""Nats per token."""


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_engine_says_what_training_computes(quantization):
    """By the bench itself, in a process of its own, as `learnd bench parity` runs it."""
    command = [sys.executable, "benchmarks/parity.py", "--quick", "--json", "--only", quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])[quantization]
    assert abs(found["base"]["mean"]) <= BOUND
    assert abs(found["random"]["mean"]) <= BOUND
    assert abs(found["random"]["ignored"]) > 2 * BOUND, "an engine that leaves the adapter out would pass"
