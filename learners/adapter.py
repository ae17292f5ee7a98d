"""LoRA on the base: attach, warm start, write, and refuse what vLLM cannot serve. The only door to peft.

Adapter weights are fp32 over the base's own dtype; every linear layer but the output head is adapted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learners.base import adaptable_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOREIGN = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "trainable_token_indices", "target_parameters")
"""Settings of peft that vLLM ignores or refuses: an adapter with one would serve something else than was trained."""
NO_EMBEDDINGS = {"save_embedding_layers": False}
"""Else peft asks the hub, over the network, for the base's vocabulary each time it writes or lists weights."""
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Unservable(Exception):
    """The adapter is damaged, foreign, or of a form that the engine does not serve; the message says which."""


def load_base(path: Path, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The base and its tokenizer from a Hugging Face folder, frozen, on the GPU if there is one."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def attach(base: Any, parent: Path | None, *, rank: int, alpha: int, dropout: float, seed: int) -> Any:
    """A trainable adapter on the base: a warm start from the parent's folder, else a fresh one, whose effect is zero.

    Raises `Unservable` when the parent's rank or alpha differ from what is asked, since a line keeps its shape, and when
    its weights do not fill the adapter exactly: peft itself would leave the rest at random with no more than a warning.
    """
    if parent is not None:
        config = json.loads((parent / CONFIG).read_text())
        if (config["r"], config["lora_alpha"]) != (rank, alpha):
            told = f"rank {config['r']}, alpha {config['lora_alpha']}"
            raise Unservable(f"the parent has {told}, the settings ask for rank {rank}, alpha {alpha}: a line keeps its shape")
        model = PeftModel.from_pretrained(base, parent, is_trainable=True, torch_device="cpu")
        _check_coverage(set(load_file(parent / WEIGHTS)), set(get_peft_model_state_dict(model, **NO_EMBEDDINGS)))
        # A version names its base without a path; peft asks the hub about such a name at each checkpoint.
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return model
    torch.manual_seed(seed)
    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return get_peft_model(base, LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM"))


def without(model: Any) -> AbstractContextManager[None]:
    """The base alone, while the context lasts."""
    return model.disable_adapter()  # type: ignore[no-any-return]


def write(model: Any, folder: Path, base_name: str) -> None:
    """Write plain peft files, with the base under its name instead of a path of this machine."""
    model.save_pretrained(folder, selected_adapters=["default"], **NO_EMBEDDINGS)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])  # a set: else equal adapters had unequal digests
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))


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
        _check_coverage(set(weights), _expected(base, config["target_modules"]))


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


def _check_coverage(found: set[str], expected: set[str]) -> None:
    for keys, told in ((expected - found, "lacks"), (found - expected, "has, but the base has no place for,")):
        if keys:
            raise Unservable(f"the adapter {told} {min(keys)} and {len(keys) - 1} more")
