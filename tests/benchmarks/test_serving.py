"""What the serving bench makes of its turns: ratios pair by pair, the last line's keys, replies by the wrong version."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import _alone
import _cells
import _report
from _load import Reply, Turn


def turn(tokens, seconds, ttft=0.1):
    return Turn([Reply("m", 0.0, at=[ttft, ttft + 0.05], tokens=tokens)], seconds)


@pytest.fixture
def bench():
    made = _cells.Bench(True, Console(file=io.StringIO()))
    for key, turns in {
        ("learnd", "base", 8): [turn(90, 1, 0.11), turn(50, 1, 0.2)],
        ("bare", "base", 8): [turn(100, 1, 0.1), turn(40, 1, 0.2)],
        ("engine", "base", 8): [turn(100, 1, 0.1), turn(100, 1, 0.2)],
        ("learnd", "base+", 8): [turn(100, 1)],
        ("learnd", "one", 8): [turn(88, 1)],
    }.items():
        made.cells[key] = _cells.Cell(*key, turns)
    return made


def test_ratios_are_of_neighbouring_turns(bench):
    ratio = bench.ratio(("learnd", "base", 8), ("bare", "base", 8), _cells.throughput)
    assert ratio.values == [0.9, 1.25]  # not 70/70, which is what the means would give
    assert ratio.middle == 1.075


def test_the_last_line_has_the_keys_and_null_for_what_was_not_measured(bench):
    told = _report.figures_of(bench)
    assert list(told) == [
        "vs_bare_vllm", "vs_own_engine", "vs_ray_serve_llm", "adapter_vs_base", "mixed4_vs_base", "vs_stock_lora", "int8_vs_bf16", "int4_vs_bf16",
        "vs_transformers_fp32", "swap", "while_training",
    ]  # fmt: skip
    assert told["vs_bare_vllm"] == {"c8": {"throughput": 1.075, "ttft_p50": 1.05}, "c16": {"throughput": None, "ttft_p50": None}}
    assert told["vs_own_engine"]["c8"] == {"throughput": 0.7, "ttft_p50": 1.05}
    assert told["adapter_vs_base"] == {"c1": None, "c8": 0.88}
    assert told["int8_vs_bf16"] == {"base": None, "adapter": None, "bytes": None}
    assert told["swap"] == {"stall_ms_p99": None, "failed": None, "wrong_version": None}


def test_the_table_and_the_plots_are_made(bench, tmp_path):
    bench.note("what", "told")
    Console(file=(shown := io.StringIO()), width=200).print(_report.table(bench), _report.findings(bench))
    assert "1.07 (0.90 – 1.25)" in shown.getvalue() or "1.08 (0.90 – 1.25)" in shown.getvalue()
    _report.plot(bench, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"serving-throughput.png", "serving-ttft.png"}


@pytest.mark.parametrize(
    ("named", "header", "text", "is_wrong"),
    [
        ("v1", "v1", "one says this", False),
        ("v1", "v1", "two says that", True),
        ("v1", "v2", "one says this", True),
        ("v3", "v3", "one says this", True),
        ("v1", "v1", "neither of the two", False),
    ],
)
def test_a_reply_by_another_version_is_seen(named, header, text, is_wrong):
    own = {
        name: [Reply(name, 0.0, text=f"{word} says {what}")]
        for name, word, what in (("v1", "one", "this"), ("v2", "two", "that"))
    }
    assert _alone._is_by_another(Reply("m", 0.0, named=named, header=header, text=text), own) is is_wrong
