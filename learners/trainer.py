"""TRL's SFT trainer with our data and our loss. With `learners/preference.py` the only door to trl.

The loss is the weighted mean of the reply tokens' cross entropy over a whole optimiser step, also under accumulation and
over several workers; logits are computed for the replies' columns only. Everything else (schedule, clipping, checkpoints,
early stopping, devices) is transformers' and TRL's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from learners import sharding
from learners.dark import Distillation
from learners.encode import IGNORED, Encoded, collate, cross_entropies, reply_logits
from learners.order import Order, epoch_size
from learners.precision import Precision
from learners.strategy import Beside
from learners.tracking import tracked

WHOLE = "COMPLETE"
"""The marker of a checkpoint that was written to its end."""

GATHERED = "gathered"
"""The whole adapter, beside the checkpoints, when no worker has it."""

DEFAULTS: dict[str, Any] = {
    "progressive_mixing": (),
    "lr_scheduler": "cosine",
    "gradient_checkpointing": "auto",
    "report_to": (),
    "deepspeed": None,
    "fsdp": {},
}
"""Of settings that a job's folder may lack: one that was prepared before there were these goes on as it began."""

CHECKS_PER_EPOCH = 2
"""Validations and checkpoints in an epoch: a job that dies loses no more than half of one."""

Report = Callable[[Mapping[str, Any]], None]


class Lifeless(ValueError):
    """A part of the loss has no effect although it should have one; the message says which."""


def fit(
    model: Any,
    tokenizer: Any,
    training: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    report: Report,
    penalty: Beside | None = None,
    distillation: Distillation | None = None,
    rehearsed: int | None = None,
) -> dict[str, Any]:
    """Train the adapter on `model` in place, going on from the folder's last whole checkpoint; returns the trainer's metrics.

    `settings` are the line's learning settings by name; `report` is told of steps, loss, tokens a second and time left;
    `penalty` stands beside the loss, which it is told of, `distillation` in the place of remembered examples' losses; both say
    in the end what they came to. `rehearsed` are the remembered examples of an epoch; None: all.
    """
    if not training:
        raise ValueError("there is nothing to train on: every example is held out or cannot be encoded")
    settings = {**DEFAULTS, **settings}
    patience, shares = int(settings["early_stopping_patience"]), settings["progressive_mixing"]
    size = epoch_size([example.source for example in training], shares, rehearsed)
    with tracked(settings["report_to"], folder.parent) as tracking:
        trainer = _Trainer(
            model=model,
            args=_arguments(settings, precision, folder, size, has_validation=bool(validation), tracking=tracking),
            train_dataset=_dataset(training),
            eval_dataset=_dataset(validation) if validation else None,
            processing_class=tokenizer,
            data_collator=partial(_collated, pad_id=tokenizer.pad_token_id),
            callbacks=[reporter := Reporter(report), *([EarlyStoppingCallback(patience)] if patience and validation else [])],
            penalty=penalty,
            distillation=distillation,
            shares=shares,
            rehearsed=rehearsed,
        )
        done = trainer.train(resume_from_checkpoint=last_whole(folder))
    if not done.training_loss:
        raise Lifeless("the loss was exactly zero throughout: nothing was learned")
    if sharding.is_sharded(settings):
        trainer.save_model(str(folder / GATHERED))
    metrics = {name: float(value) for name, value in done.metrics.items()} | {"tokens_per_second": reporter.tokens_per_second}
    return metrics | _outcomes([part.outcome() for part in (penalty, distillation) if part])


def last_whole(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; None: begin at the beginning."""
    whole = [marker.parent for marker in folder.glob(f"checkpoint-*/{WHOLE}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _outcomes(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several parts of the loss came to; they have one name in common, `warning`, and none of those is lost."""
    warnings = [one["warning"] for one in told if "warning" in one]
    found = {name: value for one in told for name, value in one.items()}
    return found | ({"warning": "; ".join(warnings)} if warnings else {})


def _arguments(
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    examples: int,
    *,
    has_validation: bool,
    tracking: Mapping[str, Any],
) -> SFTConfig:
    has_gpu = torch.cuda.is_available()
    steps = math.ceil(examples / (settings["batch_size"] * settings["accumulation"] * int(os.environ.get("WORLD_SIZE", "1"))))
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"} if has_validation else {}
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=settings["learning_rate"],
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=2 * settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        warmup_steps=settings["warmup_ratio"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        seed=settings["seed"],
        lr_scheduler_type=settings["lr_scheduler"],
        eval_strategy="steps" if has_validation else "no",
        save_strategy="steps",
        eval_steps=math.ceil(steps / CHECKS_PER_EPOCH),
        save_steps=math.ceil(steps / CHECKS_PER_EPOCH),
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        use_cpu=not has_gpu,
        bf16=precision == "bfloat16",
        gradient_checkpointing=has_gpu
        if settings["gradient_checkpointing"] == "auto"
        else settings["gradient_checkpointing"] == "on",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        **best,
        **tracking,
        **sharding.arguments(settings),
    )


def _dataset(examples: Sequence[Encoded]) -> Dataset:
    rows = [
        {"input_ids": e.input_ids, "labels": e.labels, "weight": e.weight, "key": e.key, "source": e.source} for e in examples
    ]
    return Dataset.from_list(rows)


def _collated(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    return collate([Encoded(row["input_ids"], row["labels"], row["weight"], row["key"]) for row in rows], pad_id)


class _Trainer(SFTTrainer):  # type: ignore[misc] # trl is untyped
    """SFT with the weighted reply loss, in our order, and a penalty beside it."""

    is_fsdp_enabled: bool

    def __init__(
        self,
        *args: Any,
        penalty: Beside | None,
        distillation: Distillation | None,
        shares: Sequence[float],
        rehearsed: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._shares = shares
        self._rehearsed = rehearsed
        self._penalty = penalty
        self._distillation = distillation
        self._is_proven = False

    def create_accelerator_and_postprocess(self) -> None:
        """See `Trainer`; and FSDP where accelerate has none."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            sharding.share_out_on_cpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths, epochs = [len(ids) for ids in rows["input_ids"]], self.args.num_train_epochs
        return Order(lengths, step_size, self.args.seed, list(rows["source"]), self._shares, epochs, self._rehearsed)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a version's manifest says more."""

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of weighted token losses over the step's tokens, and the penalty; see `Trainer.compute_loss` for the protocol.

        Losses of a step's batches are added and gradients of workers averaged. So each batch brings its share of the
        penalty, and each worker the whole of it. Without the step's tokens the trainer itself divides by the batches.
        """
        weights = inputs["weights"].requires_grad_(model.training and not self._is_proven)
        loss = self._weighted(model, inputs, num_items_in_batch)
        if weights.requires_grad:
            _prove_that_weights_count(loss, weights)
            self._is_proven = True
        if self._penalty is not None and model.training:  # validation asks how well it learns, not how far it went
            batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            added = self._penalty()
            self._penalty.note(loss * batches, added)
            loss = loss + added / batches
        return (loss, {}) if return_outputs else loss

    def _weighted(self, model: Any, inputs: Mapping[str, torch.Tensor], num_items_in_batch: Any) -> torch.Tensor:
        logits, wanted = reply_logits(model, inputs)
        losses, mask = cross_entropies(logits, wanted), wanted != IGNORED
        if self._distillation is not None:
            losses = self._distillation(losses, logits, inputs["keys"])
        total: torch.Tensor = (losses * mask * inputs["weights"][:, None]).sum()
        if num_items_in_batch is None:
            return total / mask.sum()
        workers = int(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1
        mean: torch.Tensor = total / num_items_in_batch * workers
        return mean


def _prove_that_weights_count(loss: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise `Lifeless` unless the loss, and so its gradient, changes with the weights of a batch's examples."""
    (slope,) = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if loss.requires_grad else (None,)
    if slope is None or not slope.any():
        raise Lifeless("the weights of the examples do not reach the gradient: each would count as if it had none")


class Reporter(TrainerCallback):  # type: ignore[misc] # transformers is untyped
    """Tells how far the training is, and marks its checkpoints as whole."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._began = time.monotonic()
        self._first, self._first_token = 0, 0
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Note where it starts from: a resumed job has done some steps."""
        self._began, self._first = time.monotonic(), state.global_step
        self._first_token = state.num_input_tokens_seen

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Mark the checkpoint as whole: this is called when its last file is written."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Report each logged step of the main process."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        passed = time.monotonic() - self._began
        steps = max(state.global_step - self._first, 1)
        left = (state.max_steps - state.global_step) * passed / steps
        self.tokens_per_second = (state.num_input_tokens_seen - self._first_token) / passed
        self._report(
            {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": logs["loss"],
                "tokens_per_second": self.tokens_per_second or None,
                "eta_seconds": left,
            }
        )
