"""LoRA on the base: attach, warm start, read and write. The only door to peft.

Adapter weights are fp32 over the base's own dtype; every linear layer but the output head is adapted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learners import dequantize, fused, subspace
from learners.base import quantization_of
from learners.initial import MIRRORED, balanced, begin, freeze_half
from learners.servable import CONFIG, WEIGHTS, Unservable, check_coverage

NO_EMBEDDINGS = {"save_embedding_layers": False}
"""Else peft asks the hub, over the network, for the base's vocabulary each time it writes or lists weights."""
REFERENCE = "ref"
"""What TRL calls the adapter that it makes and compares with."""


class _Fused(Linear):  # type: ignore[misc] # peft is untyped
    """PEFT's layer, which computes by `learners.fused` what one plain adapter on a frozen layer does."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `peft.tuners.lora.Linear`."""
        name, base = self._plain(), self.base_layer
        if name is None or args or kwargs or type(base) is not torch.nn.Linear or base.weight.requires_grad:
            theirs: torch.Tensor = super().forward(x, *args, **kwargs)
            return theirs
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return fused.adapted(x, base.weight, base.bias, a, b, self.scaling[name])

    def _plain(self) -> str | None:
        """The adapter that is at work, if it is one alone and no more than its two factors."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged:
            return None
        (name,) = active
        is_dropping = isinstance(self.lora_dropout[name], torch.nn.Dropout) and self.training
        return None if is_dropping or name in self.lora_variant or self.lora_bias[name] else str(name)


def load_base(path: Path, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The base and its tokenizer from a Hugging Face folder, frozen, on the GPU if there is one.

    Of a quantized checkpoint the dequantized weights: adapters learn on what serves, its rounding included.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    kind = getattr(torch, dtype)
    model = dequantize.load(path, kind) if quantization_of(path) else AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001 - transformers has no other word for it
        model.set_attn_implementation(fused.ATTENTION)
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
    is_fused: bool = True,
) -> Any:
    """A trainable adapter on the base: a warm start from the parent's folder, else a fresh one, whose effect is zero.

    `init` is one of `learners.initial.INITS`; with `rslora` the scale is alpha/√rank in place of alpha/rank. `is_fused` computes
    by `learners.fused`, which no worker can that holds a part of each layer. Raises
    `Unservable` when the parent's rank, alpha or kind of scale differ from what is asked, since a line keeps its shape, and when
    its weights do not fill the adapter exactly: peft itself would leave the rest at random with no more than a warning.
    """
    if parent is not None:
        config = json.loads((parent / CONFIG).read_text())
        had, asked = (config["r"], config["lora_alpha"], bool(config.get("use_rslora"))), (rank, alpha, rslora)
        if had != asked:
            told, wanted = ("rank {}, alpha {}, rslora {}".format(*shape) for shape in (had, asked))
            raise Unservable(f"the parent has {told}, the settings ask for {wanted}: a line keeps its shape")
        shape = _with_layers(PeftConfig.from_pretrained(parent), is_fused=is_fused)
        model = PeftModel.from_pretrained(base, parent, is_trainable=True, config=shape, torch_device="cpu")
        check_coverage(set(load_file(parent / WEIGHTS)), set(get_peft_model_state_dict(model, **NO_EMBEDDINGS)))
        # A version names its base without a path; peft asks the hub about such a name at each checkpoint.
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return model
    torch.manual_seed(seed)
    fresh = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
    shape = LoraConfig(**fresh, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, _with_layers(shape, is_fused=is_fused))
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
    check_coverage(set(weights), set(factors(model)))
    with torch.no_grad():
        for name, factor in factors(model).items():
            factor.copy_(weights[name])


def refer(model: Any, champion: Mapping[str, torch.Tensor]) -> None:
    """Make the adapter that TRL compares with compute what the champion does; its factors are named as `factors` names them."""
    found = {name.replace(f".{REFERENCE}.", "."): p for name, p in model.named_parameters() if f".{REFERENCE}." in name}
    check_coverage(set(champion), set(found))
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


def _with_layers(shape: Any, *, is_fused: bool) -> Any:
    """The configuration, with our kind of layer or peft's own; it is not written with it."""
    if is_fused:
        shape._register_custom_module({torch.nn.Linear: _Fused})  # noqa: SLF001 - peft documents it by this name
    return shape


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
