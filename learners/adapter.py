"""LoRA on the base: attach, warm start, write, and refuse what vLLM cannot serve. The only door to peft.

Adapter weights are fp32 over the base's own dtype; every linear layer but the output head is adapted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learners import compressed, subspace
from learners.base import adaptable_modules
from learners.initial import MIRRORED, balanced, begin, freeze_half

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOREIGN = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "trainable_token_indices", "target_parameters")
"""Settings of peft that vLLM ignores or refuses: an adapter with one would serve something else than was trained."""
CHANGES_ITS_BASE = {"pissa", "olora", "corda", "loftq"}
"""Beginnings of peft's that an adapter was trained beside a base of its own with."""
NO_EMBEDDINGS = {"save_embedding_layers": False}
"""Else peft asks the hub, over the network, for the base's vocabulary each time it writes or lists weights."""
REFERENCE = "ref"
"""What TRL calls the adapter that it makes and compares with."""
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Unservable(Exception):
    """The adapter is damaged, foreign, or of a form that the engine does not serve; the message says which."""


def load_base(path: Path, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The base and its tokenizer from a Hugging Face folder, frozen, on the GPU if there is one.

    Of a quantized checkpoint the dequantized weights: adapters learn on what serves, its rounding included.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    scheme, kind = compressed.scheme_of(path), getattr(torch, dtype)
    model = compressed.load(path, scheme, kind) if scheme else AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def attach(
    base: Any,
    parent: Path | None,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    seed: int,
    init: str = "default",
    rslora: bool = False,
) -> Any:
    """A trainable adapter on the base: a warm start from the parent's folder, else a fresh one, whose effect is zero.

    `init` is one of `learners.initial.INITS`; with `rslora` the scale is alpha/√rank in place of alpha/rank. Raises
    `Unservable` when the parent's rank, alpha or kind of scale differ from what is asked, since a line keeps its shape, and when
    its weights do not fill the adapter exactly: peft itself would leave the rest at random with no more than a warning.
    """
    if parent is not None:
        config = json.loads((parent / CONFIG).read_text())
        had, asked = (config["r"], config["lora_alpha"], bool(config.get("use_rslora"))), (rank, alpha, rslora)
        if had != asked:
            told, wanted = ("rank {}, alpha {}, rslora {}".format(*shape) for shape in (had, asked))
            raise Unservable(f"the parent has {told}, the settings ask for {wanted}: a line keeps its shape")
        model = PeftModel.from_pretrained(base, parent, is_trainable=True, torch_device="cpu")
        _check_coverage(set(load_file(parent / WEIGHTS)), set(get_peft_model_state_dict(model, **NO_EMBEDDINGS)))
        # A version names its base without a path; peft asks the hub about such a name at each checkpoint.
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return model
    torch.manual_seed(seed)
    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
    model = get_peft_model(base, LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM"))
    if init != "default":
        renew(model, seed, init)
    return model


def renew(model: Any, seed: int, init: str = "default") -> None:
    """Make the adapter as a fresh one is: the base is what it computes."""
    torch.manual_seed(seed)
    for module in _layers(model):
        if init == "default":
            module.reset_lora_parameters("default", init_lora_weights=True)
        else:
            _begin(module, init)


@torch.no_grad()
def settle(model: Any) -> None:
    """Give a trained adapter balanced factors with the same products, within rounding; see `learners.initial`."""
    for module in _layers(model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        _fill(module, *balanced(a, b))  # other parameters: none of them is held where it was


def stack(model: Any, seed: int) -> None:
    """Put a fresh adapter of the same rank and scale beside the one there is, whose half gets no gradient from now on.

    The new A begins outside the old one's span, the new B at zero: what the model computes does not change.
    """
    torch.manual_seed(seed)
    for module in _layers(model):
        a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        fresh = torch.nn.init.kaiming_uniform_(torch.empty_like(a, device="cpu"), a=math.sqrt(5)).to(a.device)
        directions = subspace.basis(a)
        _fill(module, torch.cat([a, fresh - fresh @ directions.T @ directions]), torch.cat([b, torch.zeros_like(b)], 1))
        module.lora_A["default"].weight.register_hook(partial(_without_first, dim=0, count=len(a)))
        module.lora_B["default"].weight.register_hook(partial(_without_first, dim=1, count=len(a)))
    model.peft_config["default"].r *= 2
    model.peft_config["default"].lora_alpha *= 2


def compress(model: Any, rank: int) -> float:
    """Make a stacked adapter the best one of a rank, at the same scale; returns the relative Frobenius error over all modules."""
    whole, lost = 0.0, 0.0
    for module in _layers(model):
        b, a, values = subspace.truncated(
            module.lora_B["default"].weight.detach(), module.lora_A["default"].weight.detach(), rank
        )
        _fill(module, a, b)
        whole, lost = whole + float(values.square().sum()), lost + float(values[rank:].square().sum())
    config = model.peft_config["default"]
    config.lora_alpha = config.lora_alpha * rank // config.r
    config.r = rank
    return math.sqrt(lost / whole) if whole else 0.0


def without(model: Any) -> AbstractContextManager[None]:
    """The base alone, while the context lasts."""
    return model.disable_adapter()  # type: ignore[no-any-return]


def factors(model: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained, by the names that it has in the adapter's file: A is (rank, inputs), B is (outputs, rank)."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def release(model: Any) -> None:
    """Let every part of the factors learn, also what `renew` or `stack` held; their values stay."""
    for module in _layers(model):
        _fill(module, module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())


def read_into(model: Any, folder: Path) -> None:
    """Give the adapter the weights that `write` left in a folder."""
    weights = load_file(folder / WEIGHTS)
    _check_coverage(set(weights), set(factors(model)))
    with torch.no_grad():
        for name, factor in factors(model).items():
            factor.copy_(weights[name])


def refer(model: Any, champion: Mapping[str, torch.Tensor]) -> None:
    """Make the adapter that TRL compares with compute what the champion does; its factors are named as `factors` names them."""
    found = {name.replace(f".{REFERENCE}.", "."): p for name, p in model.named_parameters() if f".{REFERENCE}." in name}
    _check_coverage(set(champion), set(found))
    with torch.no_grad():
        for name, factor in found.items():
            factor.copy_(champion[name])


def drop_reference(model: Any) -> None:
    """Leave the adapter alone on the base again."""
    model.delete_adapter(REFERENCE)


def write(model: Any, folder: Path, base_name: str) -> None:
    """Write plain peft files, with the base under its name instead of a path of this machine."""
    model.save_pretrained(folder, selected_adapters=["default"], **NO_EMBEDDINGS)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = base_name
    config["init_lora_weights"] = True  # how it began is the manifest's; some engines refuse other words here
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


def _layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _begin(module: Any, init: str) -> None:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    found = begin(init, module.get_base_layer().weight.detach().cpu(), a.shape[0], module.scaling["default"])
    with torch.no_grad():
        for factor, start in zip((a, b), found, strict=True):
            factor.copy_(start)
    if init in MIRRORED:
        freeze_half(a, b)


def _fill(module: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Give a module other factors, of whatever rank; its scale stays."""
    module.lora_A["default"].weight, module.lora_B["default"].weight = torch.nn.Parameter(a), torch.nn.Parameter(b)
    module.lora_A["default"].out_features = module.lora_B["default"].in_features = module.r["default"] = len(a)


def _without_first(gradient: torch.Tensor, *, dim: int, count: int) -> torch.Tensor:
    return gradient.index_fill(dim, torch.arange(count, device=gradient.device), 0)


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


def _check_coverage(found: set[str], expected: set[str]) -> None:
    for keys, told in ((expected - found, "lacks"), (found - expected, "has, but the base has no place for,")):
        if keys:
            raise Unservable(f"the adapter {told} {min(keys)} and {len(keys) - 1} more")
