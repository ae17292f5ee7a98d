"""What the bench of one request makes of a profiler's looks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import request

SITE = "/somewhere/site-packages"


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        (["run (asyncio/runners.py:1)", "tap (/clone/service/tap.py:9)"], "learnd: gateway, tap, recorder"),
        (["tap (/clone/service/tap.py:9)", "loads (json/decoder.py:3)"], "learnd: gateway, tap, recorder"),
        ([f"serve ({SITE}/vllm/entrypoints/a.py:1)", "lora (/clone/service/engines/native.py:2)"], "learnd: adapters' kernels"),
        ([f"step ({SITE}/vllm/v1/core/sched.py:1)", f"mm ({SITE}/torch/x.py:1)"], "torch"),
        ([f"head ({SITE}/vllm/entrypoints/openai/x.py:1)"], "vLLM: API server, front of the engine"),
        (["run_forever (/python/asyncio/base_events.py:1)", "select (/python/selectors.py:4)"], "asyncio"),
        (["start (/python/threading.py:4)"], "else"),
    ],
)
def test_a_look_counts_for_the_innermost_room(frames, wanted):
    assert request.room(frames) == wanted


def test_looks_are_added_up_by_room():
    raw = "a (/x/service/tap.py:1);b (/x/json/decoder.py:2) 3\na (/x/service/gateway.py:1) 4\nc (/x/threading.py:1) 2\n"
    assert request.counted(raw) == {"learnd: gateway, tap, recorder": 7, "else": 2}
