"""What an adapter must be to be served: plain peft files, finite, of one rank, on modules that the base has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from learners.base import adaptable_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOREIGN = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "trainable_token_indices", "target_parameters")
"""Settings of peft that vLLM ignores or refuses: an adapter with one would serve something else than was trained."""
CHANGES_ITS_BASE = {"pissa", "olora", "corda", "loftq"}
"""Beginnings of peft's that an adapter was trained beside a base of its own with."""
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Unservable(Exception):
    """The adapter is damaged, foreign, or of a form that the engine does not serve; the message says which."""


def check(folder: Path, max_rank: int, base: Path | None = None) -> None:
    """Raise `Unservable` unless the folder holds a plain, finite LoRA of uniform rank and alpha that vLLM serves.

    With the base's folder, also unless it adapts exactly the modules of that base that its config names.
    """
    config = _config(folder)
    _check_config(config, max_rank)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise Unservable(f"{folder / WEIGHTS} cannot be read: {error}") from None
    _check_weights(weights, int(config["r"]))
    if base is not None:
        check_coverage(set(weights), _expected(base, config["target_modules"]))


def check_coverage(found: set[str], expected: set[str]) -> None:
    """Raise `Unservable` unless the keys found are those that are expected."""
    for keys, told in ((expected - found, "lacks"), (found - expected, "has, but the base has no place for,")):
        if keys:
            raise Unservable(f"the adapter {told} {min(keys)} and {len(keys) - 1} more")


def _config(folder: Path) -> dict[str, Any]:
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise Unservable(f"{folder} holds pickled weights: only safetensors are read")
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise Unservable(f"{folder / CONFIG} cannot be read: {error}") from None


def _check_config(config: Mapping[str, Any], max_rank: int) -> None:
    if config.get("peft_type") != "LORA":
        raise Unservable(f"peft_type is {config.get('peft_type')!r}: only plain LoRA is served")
    foreign = [name for name in FOREIGN if config.get(name)]
    if str(config.get("init_lora_weights")).split("_")[0].lower() in CHANGES_ITS_BASE:
        foreign.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if foreign or config.get("bias", "none") != "none":
        raise Unservable(f"the adapter uses {', '.join(foreign) or 'bias'}, which the engine does not serve")
    if not 1 <= int(config["r"]) <= max_rank:
        raise Unservable(f"rank {config['r']} is over base.max_rank {max_rank}")


def _check_weights(weights: Mapping[str, torch.Tensor], rank: int) -> None:
    modules: dict[str, set[str]] = {}
    for key, tensor in weights.items():
        match = KEY.match(key)
        if match is None:
            raise Unservable(f"{key} is no LoRA weight")
        if not torch.isfinite(tensor).all():
            raise Unservable(f"{key} is not finite")
        if tensor.shape[0 if match["factor"] == "A" else 1] != rank:
            raise Unservable(f"{key} has the shape {tuple(tensor.shape)}, not rank {rank}")
        modules.setdefault(match["module"], set()).add(match["factor"])
    halves = [module for module, factors in modules.items() if factors != {"A", "B"}]
    if halves or not modules:
        raise Unservable(f"{halves[0] if halves else 'every module'} lacks one of its two factors")


def _expected(base: Path, targets: Any) -> set[str]:
    """The keys of an adapter on all modules of the base that may be adapted and have a name in `targets`."""
    if not isinstance(targets, list):
        raise Unservable(f"target_modules is {targets!r}, not a list of names")
    wanted = {module for module in adaptable_modules(base) if any(f".{module}".endswith(f".{target}") for target in targets)}
    return {f"base_model.model.{module}.lora_{factor}.weight" for module in wanted for factor in "AB"}
