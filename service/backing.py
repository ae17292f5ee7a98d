"""What `[training]` names must be there before the first job: trackers, DeepSpeed and its file. Looked at, not imported."""

from __future__ import annotations

import importlib.util
import json

from service.errors import SettingsError
from service.settings import Settings, Training

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Any of these serves."""


def missing(training: Training) -> list[str]:
    """What is not there, each with what to do."""
    found = [
        f"training.report_to names {name!r}, which is not installed: pip install {PACKAGES[name][0]}, or leave it out"
        for name in training.report_to
        if not any(map(_is_installed, PACKAGES[name]))
    ]
    if training.deepspeed is not None:
        if not _is_installed("deepspeed"):
            found.append("training.deepspeed is set, but DeepSpeed is not installed: pip install deepspeed, or use training.fsdp")
        try:
            json.loads(training.deepspeed.read_text())
        except (OSError, ValueError) as error:
            found.append(f"training.deepspeed: {training.deepspeed} is no JSON that can be read: {error}")
    return found


def check(settings: Settings) -> None:
    """Raise `SettingsError` when a job could not run as the settings say."""
    if found := missing(settings.training):
        raise SettingsError("; ".join(found))


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
