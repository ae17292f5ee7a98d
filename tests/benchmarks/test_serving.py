"""What the serving bench makes of its turns: ratios pair by pair, the last line's keys, replies by the wrong version."""

import io
import json
import math
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
    made = _cells.Bench(False, Console(file=io.StringIO()))
    for key, turns in {
        ("learnd", "base", 8): [turn(90, 1, 0.11), turn(50, 1, 0.2)],
        ("bare", "base", 8): [turn(100, 1, 0.1), turn(40, 1, 0.2)],
        ("engine", "base", 8): [turn(100, 1, 0.1), turn(100, 1, 0.2)],
        ("learnd", "base+", 8): [turn(100, 1)],
        ("learnd", "one", 8): [turn(88, 1)],
        ("learnd", "one|naive", 8): [turn(120, 1), turn(60, 1)],
        ("transformers", "one|naive", 8): [turn(10, 1), turn(10, 1)],
        ("learnd", "base|naive", 1): [turn(24, 1)],
        ("int8", "base|naive", 1): [turn(36, 1)],
        ("transformers", "base|naive", 1): [turn(12, 1)],
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
        "vs_transformers_fp32", "swap", "while_training", "peak_gib", "failed",
    ]  # fmt: skip
    assert told["vs_bare_vllm"] == {"c8": {"throughput": 1.075, "ttft_p50": 1.05}, "c16": {"throughput": None, "ttft_p50": None}}
    assert told["vs_own_engine"]["c8"] == {"throughput": 0.7, "ttft_p50": 1.05}
    assert told["adapter_vs_base"] == {"c1": None, "c8": 0.88, "c16": None}
    assert told["int8_vs_bf16"] == {"base": None, "adapter": None, "bytes": None}
    assert set(told["swap"].values()) == {None}


def test_transformers_are_compared_by_their_own_turns_and_by_bytes_of_fp32(bench):
    bench.weights = {"none": 200, "fp32": 400, "int8": 122, "int4": 88}
    told = _report.figures_of(bench)
    assert told["vs_transformers_fp32"] == {
        "c8": 9.0, "base_c1": 2.0, "adapter_c1": None, "adapter_c8": 9.0, "int8_base_c1": 3.0, "int8_adapter_c1": None,
        "bytes_bf16": 0.5, "bytes_int8": 0.305, "bytes_int4": 0.22,
    }  # fmt: skip
    assert (told["int8_vs_bf16"]["bytes"], told["int4_vs_bf16"]["bytes"]) == (0.61, 0.44)
    assert ("adapter_c8: learnd / Transformers fp32", "tokens/s 9.00 (6.00 – 12.00)") in list(_report._ratios(bench))


def test_the_last_line_is_json_whatever_was_seen(bench):
    bench.swap = {"stall_ms_p99": math.nan, "failed": 0}
    bench.training = {"ttft_p50": math.inf}
    bench.cells["learnd", "base", 8].turns[0] = Turn([Reply("m", 0.0, error="http_500")], 1.0)
    told = json.loads(json.dumps(_report.figures_of(bench), allow_nan=False))
    assert told["swap"] == {"stall_ms_p99": None, "failed": 0}
    assert told["while_training"] == {"ttft_p50": None}
    assert told["vs_bare_vllm"]["c8"] == {"throughput": 1.25, "ttft_p50": 1.0}


def test_the_table_and_the_plots_are_made(bench, tmp_path):
    bench.note("what", "told [with brackets]")
    bench.fail("swap", "it [did] not")
    bench.cells["bare", "one", 8] = _cells.Cell("bare", "one", 8, [Turn([Reply("m", 0.0, error="no")], 1.0)], tokens=16)
    Console(file=(shown := io.StringIO()), width=260).print(_report.table(bench), _report.findings(bench))
    assert "1.07 (0.90 – 1.25)" in shown.getvalue() or "1.08 (0.90 – 1.25)" in shown.getvalue()
    assert "told [with brackets]" in shown.getvalue()
    assert "swap: it [did] not" in shown.getvalue()
    assert "1 of 1, 16 tokens: few" in shown.getvalue()
    assert "nan" not in shown.getvalue()
    _report.plot(bench, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"serving-throughput.png", "serving-ttft.png"}


def test_nothing_at_all_is_shown_too(tmp_path):
    nothing = _cells.Bench(True, Console(file=(shown := io.StringIO())))
    nothing.console.print(_report.table(nothing), _report.findings(nothing))
    _report.plot(nothing, tmp_path)
    assert json.dumps(_report.figures_of(nothing), allow_nan=False)
    assert "Serving" in shown.getvalue()
    assert "bare vLLM" not in shown.getvalue(), "what was not asked has no row"


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


def swap(replies):
    own = {f"desk@v{n}": [Reply("m", 0.0, text=f"{n} says")] for n in (1, 2, 3)}
    return _alone.Swap(replies, own, asked=10.0, decided=11.0, settled=11.5, seconds=0.25)


def test_a_swap_is_told_by_its_pauses_and_the_new_version_s_first_token(bench):
    old = Reply("desk", 8.0, at=[8.5, 8.6, 9.0], named="desk@v2", header="desk@v2", text="2 says")
    across = Reply("desk", 10.0, at=[10.2, 10.4, 11.2], named="desk@v2", header="desk@v2", text="2 says")
    new = Reply("desk", 11.1, at=[11.75, 11.8], named="desk@v3", header="desk@v3", text="3 says")
    told = _alone._told_of(bench, swap([old, across, new, Reply("desk", 11.0, error="http_503")]))
    assert told == {
        "stall_ms_p99": pytest.approx(794.0), "stall_vs_steady": 2.0, "verdict_to_first_token_seconds": 0.75, "failed": 1, "wrong_version": 0,
    }  # fmt: skip


def test_a_swap_without_pauses_has_no_figure_and_no_error(bench):
    bench.swap = _alone._told_of(bench, swap([Reply("desk", 8.0, error="no")]))
    assert _report.figures_of(bench)["swap"]["stall_ms_p99"] is None
    assert _report.figures_of(bench)["swap"]["failed"] == 1


JOB = {"state": "running", "phase": "training", "step": 2, "steps": 6}


def test_a_client_beside_a_job_is_compared_with_itself(bench):
    assert _alone._told_beside(bench, turn(48, 2, 0.1), turn(48, 3, 0.15), JOB, None) == {"ttft_p50": 1.5}


def test_a_job_that_is_over_before_a_reply_gives_null(bench):
    done = {**JOB, "state": "done", "started_at": 100.0, "ended_at": 250.0}
    assert _alone._told_beside(bench, turn(48, 2), None, done, 100.0) == {"ttft_p50": None, "job_time": 1.5}
    assert "was over before one reply" in bench.notes[-1][1]
