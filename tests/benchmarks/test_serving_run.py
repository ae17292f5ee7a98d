"""How the serving bench goes through its parts: within its time, one server at a time, past what fails. No server is started."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import _cells
import _house
import _parts
import _report
import _site
import serving
from _budget import Budget
from _floor import Floor
from _load import Reply, Turn


class Clock:
    """Goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


class FakeServer:
    """A server as the bench sees it."""

    def __init__(self, name, seen, starts=True):
        self.name, self.port, self._seen, self._starts = name, name, seen, starts
        self.start_seconds, self.ready_bytes, self.is_alive, self.runs = 1.0, 2**30, False, False

    def launch(self):
        self._seen.append(f"launch {self.name}")
        self.is_alive = self.runs = True

    def is_ready(self, patience_seconds):
        assert patience_seconds > 0
        if not self._starts:
            raise SystemExit(f"{self.name} did not start")
        return True

    def pause(self):
        self.runs = False

    def resume(self):
        self.runs = True

    def stop(self):
        assert self.runs, "a paused server cannot end"
        self.is_alive = self.runs = False
        self._seen.append(f"stop {self.name}")

    def weigh(self):
        return 3 * 2**30

    def cpu_seconds(self):
        return {"engine": 1.0}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bench(clock):
    return _cells.Bench(True, Console(file=io.StringIO()), Budget(clock=clock), Floor(0, lambda _: None))


@pytest.fixture
def seen():
    return []


def house_of(bench, seen, *names, broken=()):
    plans = {name: lambda name=name: FakeServer(name, seen, starts=name not in broken) for name in names}
    return _house.House(bench, plans, lambda _: None)


# The time.


def test_each_part_has_a_share_of_what_is_left_by_its_need(clock):
    budget = Budget({"a": 10, "b": 30}, 80, clock)
    budget.begin("a")
    assert (budget.left, budget.has_room(20), budget.has_room(21)) == (40, True, False)
    clock.go(10)  # less than its share: the rest is the next one's
    budget.begin("b")
    assert (budget.left, budget.has_room(70), budget.has_room(71)) == (70, True, False)
    clock.go(70)
    with pytest.raises(TimeoutError, match="not begun"):
        budget.begin("b")


def test_without_an_end_nothing_is_cut_short(clock):
    budget = Budget(clock=clock)
    budget.begin("anything")
    clock.go(1e9)
    assert budget.left == math.inf
    assert budget.has_room(1e9)


def test_quick_needs_less_than_it_has():
    needs = sum(part.needs for part in _parts.PARTS.values()) + 4 * _parts.START_NEEDS
    assert needs <= serving.QUICK_SECONDS <= 360 - 30  # adapters before it, stopping after it


# The floor.


def test_one_server_runs_at_a_time_and_who_was_stopped_is_given_a_moment(seen):
    slept = []
    floor = Floor(1.5, slept.append)
    one, two = FakeServer("one", seen), FakeServer("two", seen)
    for server in (one, two):
        server.launch()
        floor.enter(server)
    floor.give(one)
    assert (one.runs, two.runs, slept) == (True, False, [])
    floor.give(one)
    floor.give(two)
    assert (one.runs, two.runs, slept) == (False, True, [1.5])
    floor.open()
    assert one.runs
    assert two.runs
    floor.give(two)
    floor.leave(one)
    assert one.runs, "so that it can end"


# Turns.


def answering(clock, seconds, runs=lambda port: None):
    """Stands for `drive`: every reply takes so long, and what was asked beyond `within` is cut off."""

    def drive(port, models, clients, waves, _, *, tokens, within=math.inf):
        runs(port)
        if seconds > within:
            clock.go(within)
            raise TimeoutError
        clock.go(seconds)
        return Turn([Reply(models[0], 0.0, at=[0.1, 0.2], tokens=tokens)] * (clients * waves), seconds)

    return drive


def test_a_turn_more_is_asked_only_if_there_is_room_for_it(bench, clock, seen, monkeypatch):
    monkeypatch.setattr(_cells, "drive", answering(clock, 6))
    arms = [(FakeServer("a", seen), "base", ["m"]), (FakeServer("b", seen), "base", ["m"])]
    bench.budget = Budget({"gateway": 1}, 20, clock)
    bench.budget.begin("gateway")
    bench.turns(arms, 8, turns=4)
    assert [len(cell.turns) for cell in bench.cells.values()] == [1, 1]
    assert "1 of 4" in bench.notes[-1][1]


def test_what_is_cut_off_in_the_middle_counts_for_nobody(bench, clock, seen, monkeypatch):
    monkeypatch.setattr(_cells, "drive", answering(clock, 6))
    arms = [(FakeServer("a", seen), "base", ["m"]), (FakeServer("b", seen), "base", ["m"])]
    bench.budget = Budget({"gateway": 1}, 8, clock)
    bench.attempt("gateway", lambda: bench.turns(arms, 8))
    assert bench.cells == {}
    assert bench.failed == ["gateway: cut off after 8 s of the whole: its time was over"]


# What fails.


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit("bare did not start:\nline of its log"), "swap: bare did not start: line of its log"),
        (httpx.ReadError("gone"), "swap: ReadError: gone"),
        (TimeoutError("v3 was not promoted"), "swap: v3 was not promoted"),
        (ZeroDivisionError("division by zero"), "swap: ZeroDivisionError: division by zero"),
    ],
)
def test_a_part_that_fails_is_said_and_the_next_one_is_begun(bench, error, told):
    def fail():
        raise error

    bench.attempt("swap", fail)
    bench.attempt("training", lambda: bench.note("training", "went on"))
    assert bench.failed == [told]
    assert bench.notes == [("training", "went on")]


def test_ctrl_c_ends_all_of_it(bench):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.attempt("swap", interrupt)


def test_a_server_that_does_not_start_is_tried_once_and_fails_who_asks_for_it(bench, seen):
    house = house_of(bench, seen, "learnd", "bare", "engine", broken=("bare",))
    for _ in range(2):
        with pytest.raises(SystemExit, match="bare did not start"):
            house["bare"]
    assert seen == ["launch bare", "stop bare"]
    assert [server.name for server in house.those("gateway", ("engine", "bare", "ray-serve-llm"))] == ["engine"]
    assert bench.failed == ["gateway: bare did not start"]


def test_a_server_that_ended_by_itself_is_started_once_more(bench, seen):
    house = house_of(bench, seen, "learnd")
    first = house["learnd"]
    first.is_alive = False
    assert house["learnd"] is not first
    house.close()
    assert seen == ["launch learnd", "launch learnd", "stop learnd"]


def test_servers_end_with_the_last_part_that_needs_them(bench, seen, monkeypatch):
    bench.quick = False
    steps = {"gateway": ("learnd", "bare"), "naive": ("learnd", "transformers")}

    def part(name):
        return _parts.Part(lambda _, house: seen.append([house[server].name for server in steps[name]]), steps[name], 1)

    monkeypatch.setattr(serving, "PARTS", {name: part(name) for name in steps})
    serving.measure(bench, house_of(bench, seen, "learnd", "bare", "transformers"), tuple(steps))
    assert seen[:5] == ["launch learnd", "launch bare", ["learnd", "bare"], "stop bare", "launch transformers"]
    assert sorted(seen[6:]) == ["stop learnd", "stop transformers"]


def test_servers_end_though_somebody_interrupts(bench, seen, monkeypatch):
    def interrupt(_, house):
        bench.floor.give(house["learnd"])
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "PARTS", {"swap": _parts.Part(interrupt, ("learnd",), 1)})
    with pytest.raises(KeyboardInterrupt):
        serving.measure(bench, house_of(bench, seen, "learnd", "int8"), ("swap",))
    assert sorted(seen[2:]) == ["stop int8", "stop learnd"]


# The whole of it.


@pytest.fixture
def played(bench, clock, seen, monkeypatch):
    """All parts, `--quick`, with servers that are not there."""
    house = house_of(bench, seen, "learnd", "bare", "transformers", "int8")

    def runs(port):
        alone = [name for name, server in house._running.items() if server.runs]
        assert alone == [port], f"{port} is asked while {alone} run"

    async def swapped(*_):
        return {
            "stall_ms_p99": 90.0,
            "stall_vs_steady": 1.5,
            "verdict_to_first_token_seconds": 0.5,
            "failed": 0,
            "wrong_version": 0,
        }

    async def beside(*_):
        return {"ttft_p50": 1.2}

    for module in (_cells, _parts):
        monkeypatch.setattr(module, "drive", answering(clock, 2, runs))
    monkeypatch.setattr(_parts, "swapped", swapped)
    monkeypatch.setattr(_parts, "beside_a_job", beside)
    monkeypatch.setattr(_parts, "time", SimpleNamespace(sleep=clock.go, monotonic=clock))
    bench.weights = {"none": 200, "fp32": 400, "int8": 122, "int4": 88}
    needs = {"start": 4 * _parts.START_NEEDS, **{name: part.needs for name, part in _parts.PARTS.items()}}
    bench.budget = Budget(needs, serving.QUICK_SECONDS, clock)
    return house


def missing(told, path=""):
    for key, value in told.items():
        yield from missing(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"] * (value is None)


def test_quick_has_every_figure_but_those_of_servers_that_it_leaves_out(bench, played):
    serving.measure(bench, played, tuple(_parts.PARTS))
    told = _report.figures_of(bench)
    left_out = [name for name in missing(told) if not name.startswith(("vs_own_engine.", "vs_ray_serve_llm."))]
    assert left_out == ["int4_vs_bf16.base", "int4_vs_bf16.adapter"]
    assert bench.failed == []
    assert set(told["peak_gib"]) == {"learnd", "bare", "transformers", "int8"}
    assert bench.budget.taken < serving.QUICK_SECONDS


def test_all_servers_of_quick_start_at_once_and_end(bench, played, seen):
    serving.measure(bench, played, tuple(_parts.PARTS))
    assert seen[:4] == [f"launch {name}" for name in ("learnd", "bare", "transformers", "int8")]
    assert sorted(seen[4:]) == [f"stop {name}" for name in ("bare", "int8", "learnd", "transformers")]


def test_without_bare_vllm_the_other_parts_have_their_figures(bench, played, seen):
    played._plans["bare"] = lambda: FakeServer("bare", seen, starts=False)
    serving.measure(bench, played, tuple(_parts.PARTS))
    told = json.loads(json.dumps(_report.figures_of(bench), allow_nan=False))
    assert told["failed"] == ["gateway: bare did not start", "adapters: bare did not start"]
    assert told["vs_bare_vllm"]["c8"]["throughput"] is None
    assert told["adapter_vs_base"] == {"c1": 1.0, "c8": 1.0}
    assert told["int8_vs_bf16"]["base"] == 1.0
    assert told["while_training"] == {"ttft_p50": 1.2}


def test_something_missing_is_an_exit_status(bench, tmp_path, capsys):
    said = SimpleNamespace(json=True, out=tmp_path)
    assert serving.shown(bench, said) == 0
    bench.fail("swap", "why")
    assert serving.shown(bench, said) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["swap: why"]


def test_it_does_not_begin_beside_a_job_of_another_daemon(monkeypatch, capsys):
    monkeypatch.setattr(serving.cores, "are_wanted", lambda: True)
    monkeypatch.setattr(serving, "run", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--quick"])
    assert serving.main() == 1
    assert "a learning job of another daemon" in capsys.readouterr().err


def test_a_part_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        serving.parsed(["--only", "gateway,naif"])
    assert "no part naif" in capsys.readouterr().err


# What servers a run has.


@pytest.mark.parametrize(
    ("quick", "parts", "made", "names"),
    [
        (False, tuple(_parts.PARTS), (), ["learnd", "bare", "engine", "transformers", "int8", "int4"]),
        (True, tuple(_parts.PARTS), ("int8", "int4"), ["learnd", "bare", "transformers", "int8"]),
        (True, tuple(_parts.PARTS), (), ["learnd", "bare", "transformers"]),
        (False, ("swap",), (), ["learnd"]),
    ],
)
def test_a_run_has_the_servers_of_its_parts(tmp_path, monkeypatch, quick, parts, made, names):
    monkeypatch.setattr(_site, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(_site, "is_quantized", lambda _, kind: kind in made)
    site = _site.Site(tmp_path, _site.Asked(parts, "builtin:smollm2-135m", "bfloat16", quick), print)
    assert list(site.plans()) == names


def test_bytes_are_counted_as_stored_and_as_fp32(tmp_path):
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.int8)}, tmp_path / "w.safetensors")
    assert _site.fp32_bytes(tmp_path) == 4 * 17
    assert _site.weights_bytes(tmp_path) == (tmp_path / "w.safetensors").stat().st_size
