"""TRL's SFT trainer with our data and our loss. The only door to trl.

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

from learners.encode import Encoded, collate, token_losses
from learners.order import Order
from learners.precision import Precision

WHOLE = "COMPLETE"
"""The marker of a checkpoint that was written to its end."""

CHECKS_PER_EPOCH = 2
"""Validations and checkpoints in an epoch: a job that dies loses no more than half of one."""

Report = Callable[[Mapping[str, Any]], None]


def fit(
    model: Any,
    tokenizer: Any,
    training: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Mapping[str, Any],
    precision: Precision,
    folder: Path,
    report: Report,
) -> dict[str, float]:
    """Train the adapter on `model` in place, going on from the folder's last whole checkpoint; returns the trainer's metrics.

    `settings` are the line's learning settings by name; `report` is told of steps, loss, tokens a second and time left.
    """
    if not training:
        raise ValueError("there is nothing to train on: every example is held out or cannot be encoded")
    patience = int(settings["early_stopping_patience"])
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, precision, folder, len(training), has_validation=bool(validation)),
        train_dataset=_dataset(training),
        eval_dataset=_dataset(validation) if validation else None,
        processing_class=tokenizer,
        data_collator=partial(_collated, pad_id=tokenizer.pad_token_id),
        callbacks=[_Reporter(report), *([EarlyStoppingCallback(patience)] if patience and validation else [])],
    )
    done = trainer.train(resume_from_checkpoint=last_whole(folder))
    return {name: float(value) for name, value in done.metrics.items()}


def last_whole(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; None: begin at the beginning."""
    whole = [marker.parent for marker in folder.glob(f"checkpoint-*/{WHOLE}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _arguments(
    settings: Mapping[str, Any], precision: Precision, folder: Path, examples: int, *, has_validation: bool
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
        lr_scheduler_type="cosine",
        eval_strategy="steps" if has_validation else "no",
        save_strategy="steps",
        eval_steps=math.ceil(steps / CHECKS_PER_EPOCH),
        save_steps=math.ceil(steps / CHECKS_PER_EPOCH),
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        use_cpu=not has_gpu,
        bf16=precision == "bfloat16",
        gradient_checkpointing=has_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
        **best,
    )


def _dataset(examples: Sequence[Encoded]) -> Dataset:
    rows = [{"input_ids": e.input_ids, "labels": e.labels, "weight": e.weight} for e in examples]
    return Dataset.from_list(rows)


def _collated(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    return collate([Encoded(row["input_ids"], row["labels"], row["weight"]) for row in rows], pad_id)


class _Trainer(SFTTrainer):  # type: ignore[misc] # trl is untyped
    """SFT with the weighted reply loss, in our order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return Order([len(ids) for ids in rows["input_ids"]], step_size, self.args.seed)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a version's manifest says more."""

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of weighted token losses over the step's tokens; see `Trainer.compute_loss` for the protocol."""
        losses, mask, _ = token_losses(model, inputs)
        total = (losses * mask * inputs["weights"][:, None]).sum()
        if num_items_in_batch is None:
            loss = total / mask.sum()
        else:
            loss = total / num_items_in_batch * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
        return (loss, {}) if return_outputs else loss


class _Reporter(TrainerCallback):  # type: ignore[misc] # transformers is untyped
    """Tells how far the training is."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._began = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Note where it starts from: a resumed job has done some steps."""
        self._began, self._first = time.monotonic(), state.global_step

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
        tokens = state.num_input_tokens_seen / passed if state.num_input_tokens_seen else None
        self._report(
            {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": logs["loss"],
                "tokens_per_second": tokens,
                "eta_seconds": left,
            }
        )
