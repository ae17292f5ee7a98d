"""How fast a job trains, beside plain TRL: tokens a second and peak memory of TRL's SFT, `naive` and `ewc+replay`, in turns.

Each turn is a process of its own, in the order TRL, naive, ewc+replay, TRL, naive, …; all have the same base, tokens, batches,
steps, rank, precision and checkpoints. Only the training loop is timed; tokens are those of the examples, without padding.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from learners import adapter, artifact, base, precision
from learners.encode import Encoded, encode
from learners.strategy import STRATEGIES
from learners.trainer import fit
from replay.records import Example, Split
from service.settings import Learning

KINDS = ("trl", "naive", "ewc+replay")
TOPICS = {"spam": "Classify the subject of this email.", "debian": "Classify the section of this software package."}
"""What is learned afresh, and what was learned before, of `desk-5.tsv`."""


def examples(task: str, rows: int) -> list[Example]:
    lines = (Path(__file__).parent / "desk-5.tsv").read_text().splitlines()
    texts = [(label, text) for name, label, text in (line.split("\t") for line in lines) if name == task][:rows]
    return [example(f"{task}-{n}", task, *both) for n, both in enumerate(texts)]


def example(name: str, task: str, label: str, text: str) -> Example:
    asked = ({"role": "user", "content": f"{TOPICS[task]}\n{text}"},)
    return Example(name, name, name, "desk", task, asked, label, Split.TRAIN)


def learning(strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    return Learning(strategy=strategy, epochs=options.epochs, early_stopping_patience=0, max_length=256).model_dump(mode="json")


def mixture(strategy: str, options: argparse.Namespace, tokenizer: Any) -> list[Encoded]:
    fresh, old = examples("spam", options.rows), examples("debian", options.rows)
    plan = STRATEGIES[strategy].plan(fresh, old, [], learning(strategy, options)["replay_ratio"], 0)
    return [replace(encode(tokenizer, list(e.messages), e.reply, 256), source=e.source) for e in plan]


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """A champion to start from, with a Fisher as `ewc` leaves one."""
    settings = learning("ewc+replay", options)
    model, tokenizer = adapter.load_base(folder / "base", options.precision)
    model = adapter.attach(model, None, **shape(settings))
    with torch.no_grad():
        for name, factor in adapter.factors(model).items():
            if "lora_B" in name:
                factor.normal_(std=1e-3)
    adapter.write(model, folder / "champion", "base")
    old = [encode(tokenizer, list(e.messages), e.reply, 256) for e in examples("debian", 16)]
    found = STRATEGIES["ewc"].consolidate(model, adapter.factors(model), {}, old, tokenizer.pad_token_id, settings)
    torch.save(found, folder / "fisher.pt")


def shape(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("rank", "alpha", "dropout", "seed")}


def ours(strategy: str, folder: Path, options: argparse.Namespace) -> tuple[list[Encoded], float]:
    """What a job's training loop learns, and its seconds."""
    settings = learning(strategy, options)
    model, tokenizer = adapter.load_base(folder / "base", options.precision)
    model = adapter.attach(model, folder / "champion", **shape(settings))
    rows = mixture(strategy, options, tokenizer)
    state = torch.load(folder / "fisher.pt") if "ewc" in strategy else artifact.consolidation(None)
    tokens = sum(row.reply_length for row in rows)
    penalty = STRATEGIES[strategy].penalty(adapter.factors(model), state, tokens, settings)
    with tempfile.TemporaryDirectory() as place:
        told = fit(model, tokenizer, rows, [], settings, options.precision, Path(place) / "checkpoints", lambda _: None, penalty)
    return rows, told["train_runtime"]


def plain(folder: Path, options: argparse.Namespace) -> tuple[list[Encoded], float]:
    """The same with TRL's own trainer, loss, order and collator, as its documentation has it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings, has_gpu = learning("naive", options), torch.cuda.is_available()
    model, tokenizer = adapter.load_base(folder / "base", options.precision)
    rows = mixture("naive", options, tokenizer)
    told = [{"input_ids": e.input_ids, "completion_mask": [int(label != -100) for label in e.labels]} for e in rows]
    steps = -(-len(rows) // (settings["batch_size"] * settings["accumulation"]))
    with tempfile.TemporaryDirectory() as place:
        arguments = SFTConfig(
            output_dir=place, learning_rate=settings["learning_rate"], num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"], gradient_accumulation_steps=settings["accumulation"],
            warmup_steps=settings["warmup_ratio"], lr_scheduler_type="cosine", max_length=256, completion_only_loss=True,
            bf16=options.precision == "bfloat16", use_cpu=not has_gpu, gradient_checkpointing=has_gpu, seed=0,
            save_steps=-(-steps // 2), save_total_limit=2, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(told), processing_class=tokenizer, peft_config=lora
        )
        return rows, float(trainer.train().metrics["train_runtime"])


def turn(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One measurement, in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, seconds = plain(folder, options) if kind == "trl" else ours(kind, folder, options)
    tokens = sum(len(row.input_ids) for row in rows) * options.epochs
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mib()
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_mib": peak}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One measurement, in a process of its own, whose last line it is."""
    told = [
        f"--rows={options.rows}",
        f"--epochs={options.epochs}",
        f"--precision={options.precision}",
        f"--threads={options.threads}",
    ]
    command = [sys.executable, __file__, "--turn", kind, "--folder", str(folder), *told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) or {}


def tiny(folder: Path, source: Path) -> None:
    """Two random layers under the built-in base's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def summary(turns: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    def ratio(one: str, other: str, what: str) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(turns[one], turns[other], strict=True))

    kinds = {
        kind: {what: statistics.median(t[what] for t in told) for what in ("tokens_per_second", "peak_mib", "tokens", "seconds")}
        | {"all_tokens_per_second": [round(t["tokens_per_second"], 1) for t in told]}
        for kind, told in turns.items()
    }
    return {
        "kinds": kinds,
        "naive_to_trl": ratio("naive", "trl", "tokens_per_second"),
        "ewc_replay_to_naive": ratio("ewc+replay", "naive", "tokens_per_second"),
        "ewc_replay_to_naive_memory": ratio("ewc+replay", "naive", "peak_mib"),
        "precision": options.precision,
        "threads": options.threads or torch.get_num_threads(),
        "rows": options.rows,
        "turns": options.turns,
    }


def show(found: dict[str, Any]) -> None:
    print(f"{'':12}{'tokens/s':>10}{'peak MiB':>10}   each turn")
    for kind, told in found["kinds"].items():
        print(f"{kind:12}{told['tokens_per_second']:10.1f}{told['peak_mib']:10.0f}   {told['all_tokens_per_second']}")
    print(f"naive / TRL: {found['naive_to_trl']:.3f} of the tokens a second (medians of the turns' ratios)")
    print(f"ewc+replay / naive: {found['ewc_replay_to_naive']:.3f}, memory {found['ewc_replay_to_naive_memory']:.3f}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="learnd bench training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=160, help="fresh examples, at most 400")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each")
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: as many as cores")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], help="default: the faster one here")
    parser.add_argument("--quick", action="store_true", help="two random layers, few rows: shows that it works, no figures")
    parser.add_argument("--json", action="store_true", help="one last line with every figure")
    parser.add_argument("--turn", choices=["prepare", *KINDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.turns, options.precision = 32, 1, "float32"
    options.precision = options.precision or precision.fastest()
    return options


def main() -> None:
    options = parsed()
    if options.turn:
        found = prepare(options.folder, options) if options.turn == "prepare" else turn(options.turn, options.folder, options)
        print(json.dumps(found))
        return
    pinned = base.prepare("builtin:smollm2-135m", say=print)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.quick:
            tiny(folder / "base", pinned.path)
        else:
            (folder / "base").symlink_to(pinned.path)
        child("prepare", folder, options)
        turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(options.turns):
            for kind in KINDS:
                turns[kind].append(child(kind, folder, options))
                print(f"turn {number + 1}, {kind}: {turns[kind][-1]['tokens_per_second']:.1f} tokens/s", flush=True)
    found = summary(turns, options)
    show(found)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
