"""What people thought of replies, as losses: thumbs by KTO, pairs by DPO, after imitation and against the champion.

With Δ(y) = log π(y|x) − log π_ref(y|x), in nats over a whole reply, and the mean over a batch:

    KTO   λ_y (1 − σ(β(Δ(y) − z)))  for a good reply, λ_y (1 − σ(β(z − Δ(y))))  for a bad one,
          z = max(0, mean Δ(y′)) over replies y′ to other questions of the batch           Ethayarajh et al. 2024
    DPO   −log σ(β(Δ(good) − Δ(bad))), where a share ε of pairs is the wrong way round:
          [ε log σ(−u) − (1−ε) log σ(u)] / (1 − 2ε), u = β(Δ(good) − Δ(bad))          Rafailov et al. 2023, Chowdhury et al. 2024

π_ref is the champion that the job starts from, not what imitation has made of it meanwhile: the distance that β makes dear is
that from what serves. Without a champion it is the base. λ evens out thumbs up and down (KTO's equation 8). Beside DPO stands
`imitation` times the mean cross entropy of the better reply, without which both replies may become less likely. A bad reply
is never imitated: no term makes it likelier. A strategy's penalty stands beside both, per opinion instead of per token.

With `learners/trainer.py` the only door to trl.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from learners import adapter
from learners.precision import Precision
from learners.strategy import Beside
from learners.tracking import tracked
from learners.trainer import DEFAULTS, Lifeless, Report, Reporter, last_whole

Phase = Literal["kto", "dpo"]
PHASES: tuple[Phase, ...] = ("kto", "dpo")

Row = dict[str, Any]
"""An opinion in tokens: `prompt_ids` and `good`, `bad` or both, each with the end token."""


def fit(
    phase: Phase,
    model: Any,
    tokenizer: Any,
    training: Sequence[Row],
    held_out: Sequence[Row],
    champion: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    report: Report,
    penalty: Beside | None = None,
) -> dict[str, Any]:
    """Train the adapter on `model` in place, going on from the folder's last whole checkpoint; returns what came of it.

    `champion` are the factors of the reference, `settings` the line's learning settings and the trainer's own. `folder` lies two
    levels below the job's, where the run is followed if it is to be. Metrics are named `kto_…` or `dpo_…`.
    """
    make = _kto if phase == "kto" else _dpo
    reporter = Reporter(report)
    settings = {**DEFAULTS, **settings}
    with tracked(settings["report_to"], folder.parent.parent, phase) as tracking:
        trainer = make(model, tokenizer, training, held_out, settings, precision, folder, reporter, tracking)
        trainer.penalty = penalty
        adapter.refer(model, champion)
        done = trainer.train(resume_from_checkpoint=last_whole(folder))
        if not done.training_loss:
            raise Lifeless(f"the loss of {phase} was exactly zero throughout: nothing was learned")
        told = {"loss": done.training_loss, "items": len(training), "seconds": done.metrics["train_runtime"]}
        seen = trainer.evaluate() if held_out else {}
    told |= {f"held_out_{short}": seen[name] for name, short in _HELD_OUT.items() if name in seen}
    told |= penalty.outcome() if penalty else {}
    adapter.drop_reference(model)
    return {f"{phase}_{name}": value for name, value in told.items()}


_HELD_OUT = {"eval_loss": "loss", "eval_rewards/margins": "margin", "eval_rewards/accuracies": "accuracy"}


class _Beside:
    """A penalty beside TRL's loss, in training: validation asks how well it learns, not how far it went.

    TRL's preference losses are means over a batch, and the trainer divides by the accumulated batches: so each brings the whole.
    """

    model: Any
    penalty: Beside | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """See `Trainer.compute_loss` for the protocol."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc] # of the trainer beside it
        if self.penalty is None or not model.training:
            return loss
        added = self.penalty()
        self.penalty.note(loss, added)
        return loss + added

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Nothing: it is in tokens, by the template that serves."""
        return dataset

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter alone. Transformers reads a checkpoint's folders of other adapters, and then not the one beside them."""
        adapter.read_into(self.model if model is None else model, Path(resume_from_checkpoint))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a version's manifest says more."""


class _Kto(_Beside, KTOTrainer):  # type: ignore[misc] # trl is untyped
    """TRL's KTO."""


class _Dpo(_Beside, DPOTrainer):  # type: ignore[misc] # trl is untyped
    """TRL's DPO."""


def _kto(
    model: Any,
    tokenizer: Any,
    training: Sequence[Row],
    held_out: Sequence[Row],
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    reporter: Reporter,
    tracking: Mapping[str, Any],
) -> _Kto:
    size = kto_batch(len(training), settings["batch_size"])
    up = sum("good" in row for row in training)
    down = len(training) - up
    weights = {"desirable_weight": max(down / up, 1.0), "undesirable_weight": max(up / down, 1.0)} if up and down else {}
    data = partial(_thumbs, size=size, seed=settings["seed"])
    return _Kto(
        model=model,
        args=KTOConfig(**_arguments(settings, precision, folder, len(training), size, tracking), **weights),
        train_dataset=data(training),
        eval_dataset=data(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=[reporter],
    )


def _dpo(
    model: Any,
    tokenizer: Any,
    training: Sequence[Row],
    held_out: Sequence[Row],
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    reporter: Reporter,
    tracking: Mapping[str, Any],
) -> _Dpo:
    chosen, size = settings["preferences"], settings["batch_size"]
    terms: dict[str, Any] = {"loss_type": ["robust" if chosen["label_smoothing"] else "sigmoid"], "loss_weights": [1.0]}
    if chosen["imitation"]:
        terms = {"loss_type": [*terms["loss_type"], "sft"], "loss_weights": [1.0, chosen["imitation"]]}
    told = _arguments(settings, precision, folder, len(training), size, tracking)
    return _Dpo(
        model=model,
        args=DPOConfig(**told, **terms, label_smoothing=chosen["label_smoothing"]),
        train_dataset=_pairs(training),
        eval_dataset=_pairs(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=[reporter],
    )


def kto_batch(items: int, wanted: int) -> int:
    """The size of KTO's batches, at least `wanted` and 2: one that leaves no single item over, which would be its own z."""
    return next(size for size in count(max(wanted, 2)) if items % size != 1)


def _thumbs(rows: Sequence[Row], size: int, seed: int) -> Dataset:
    """In a seeded order, both thumbs mixed; each prompt with the reply to the question before it in its batch, for z."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - an order, no secret
    replies = [row.get("good") or row["bad"] for row in shuffled]
    others: list[list[int]] = []
    for start in range(0, len(replies), size):
        batch = replies[start : start + size]
        others += [batch[-1], *batch[:-1]]
    return Dataset.from_list(
        [
            {"prompt_ids": row["prompt_ids"], "completion_ids": reply, "KL_completion_ids": other, "label": "good" in row}
            for row, reply, other in zip(shuffled, replies, others, strict=True)
        ]
    )


def _pairs(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_list(
        [{"prompt_ids": row["prompt_ids"], "chosen_ids": row["good"], "rejected_ids": row["bad"]} for row in rows]
    )


def _arguments(
    settings: Mapping[str, Any], precision: Precision, folder: Path, items: int, size: int, tracking: Mapping[str, Any]
) -> dict[str, Any]:
    """What both trainers are told: the line's learning settings, but for those that stand under `preferences`."""
    chosen, has_gpu, spares = settings["preferences"], torch.cuda.is_available(), settings["gradient_checkpointing"]
    return {
        "output_dir": str(folder),
        "beta": chosen["beta"],
        "learning_rate": chosen["learning_rate"],
        "num_train_epochs": chosen["epochs"],
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": settings["accumulation"],
        "warmup_steps": settings["warmup_ratio"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["max_grad_norm"],
        "max_length": settings["max_length"],
        "seed": settings["seed"],
        "lr_scheduler_type": settings["lr_scheduler"],
        "save_strategy": "steps",
        "save_steps": max(1, items // (2 * size * settings["accumulation"])),
        "save_total_limit": 2,
        "logging_steps": 1,
        "use_cpu": not has_gpu,
        "bf16": precision == "bfloat16",
        "gradient_checkpointing": has_gpu if spares == "auto" else spares == "on",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        **tracking,
    }
