"""A tiny base quantized from start to finish: what is written, read back, refused and kept."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from learners import adapter, calibrate, compressed, dequantize
from learners import base as bases
from learners.base import BaseMissing, adaptable_modules, is_quantized, prepare, preparing, quantization_of
from learners.calibrate import TooCoarse, quantize
from learners.quality import Quality
from learners.quantize import SCHEMES, round_to_nearest, unpack

EACH = pytest.mark.parametrize("name", SCHEMES)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Short texts and no bound: a base of random weights has no skill to lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "LENGTH", 64)
        patch.setattr(calibrate, "SCHEMES", {k: dataclasses.replace(v, max_kl=1e9) for k, v in SCHEMES.items()})
        yield


@pytest.fixture
def tied(model, tokenizer, tmp_path_factory):
    """The tiny base with a head that is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=SCHEMES, scope="module")
def made(request, base, tmp_path_factory):
    """A checkpoint of the tiny base, with what was said of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, quantize(base.path, folder, request.param)


def test_the_checkpoint_is_smaller_and_whole(made, base):
    name, folder, quality = made
    stored = load_file(folder / "model.safetensors")
    int8, int4 = {"weight", "weight_scale"}, {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    kinds = {"int8": int8, "int8-layers": int8, "fp8": int8, "int4": int4}
    for module in adaptable_modules(base.path):
        assert {key.removeprefix(f"{module}.") for key in stored if key.startswith(f"{module}.")} == kinds[name]
    rows = {"weight_packed", "weight_scale", "weight_shape"} if name == "int8" else {"weight"}
    for module in ("model.embed_tokens", "lm_head"):
        assert {key.removeprefix(f"{module}.") for key in stored if key.startswith(f"{module}.")} == rows
    assert adaptable_modules(folder) == adaptable_modules(base.path)
    assert quality.bytes_quantized < quality.bytes_base
    assert json.loads((folder / "quantization.json").read_text())["kl"] == quality.kl
    assert dequantize.refusal(quantization_of(folder)) is None
    assert quantization_of(base.path) is None


@pytest.mark.filterwarnings("ignore")  # the library compiles at import with what torch calls old, and speaks of its own use
def test_training_loads_what_compressed_tensors_would(made):
    """Our reading against transformers' own, which decompresses through the library that defines the format.

    But for embeddings, for which transformers has no room: of those, what is packed is the library's in test_quantize.py.
    """
    name, folder, _ = made
    if name == "int8":
        pytest.skip("transformers cannot load a quantized embedding")
    ours, _ = adapter.load_base(folder, "float32")
    how = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).state_dict()
    assert len(ours.state_dict()) == 21
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


def test_an_adapter_trains_on_it(made):
    _, folder, _ = made
    model, _ = adapter.load_base(folder, "float32")
    adapted = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)
    ids = torch.arange(2, 40, device=adapted.device)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.factors(adapted).values())


def test_a_tied_head_is_stored_once_and_trains_as_it_serves(tied, tmp_path):
    quality = quantize(tied, tmp_path, "int8")
    stored = load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if key.startswith("lm_head")]
    described = quantization_of(tmp_path)
    assert described["ignore"] == ["lm_head"], "else the library would take it for one of the layers' modules"
    assert described["config_groups"]["group_1"]["targets"] == ["Embedding"]
    model, _ = adapter.load_base(tmp_path, "float32")
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    rows = unpack(stored["model.embed_tokens.weight_packed"], 8, weight.shape[1]).float()
    assert torch.equal(weight.cpu(), rows * stored["model.embed_tokens.weight_scale"].float())
    before = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].float()
    off = (weight.cpu() - before).abs()
    assert 0 < off.max() <= 0.51 * stored["model.embed_tokens.weight_scale"].float().max()
    kept = tmp_path / "kept"
    kept.mkdir()
    assert quantize(tied, kept, "int8-layers").bytes_quantized > quality.bytes_quantized
    assert torch.equal(dequantize.read(kept, torch.float32)["model.embed_tokens.weight"], before)


def test_a_copy_of_a_tied_head_in_the_source_is_left_out(tied, tmp_path):
    """vLLM would take it for a head of its own, which training does not see."""
    doubled = tmp_path / "doubled"
    shutil.copytree(tied, doubled)
    tensors = load_file(doubled / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        doubled / "model.safetensors",
        {"format": "pt"},
    )
    (made := tmp_path / "made").mkdir()
    quantize(doubled, made, "int8")
    assert not [key for key in load_file(made / "model.safetensors") if key.startswith("lm_head")]


def test_what_has_more_than_one_embedding_is_refused(model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = calibrate.AutoModelForCausalLM.from_pretrained

    def with_positions(*arguments, **named):
        found = loaded(*arguments, **named)
        found.model.positions = torch.nn.Embedding(4, 32)
        return found

    monkeypatch.setattr(calibrate.AutoModelForCausalLM, "from_pretrained", with_positions)
    with pytest.raises(TooCoarse, match=r"one embedding.*'int8-layers'"):
        quantize(tmp_path / "base", tmp_path, "int8")


def test_what_was_made_before_embeddings_were_rounded_is_found_as_the_layers_alone(base, tmp_path):
    """Its folder had the name of int8, and versions belong to it."""
    made = prepare(str(base.path), tmp_path, quantization="int8-layers")
    assert re.fullmatch(r"tiny-int8-[0-9a-f]{12}", made.path.name)
    assert prepare(str(base.path), tmp_path, quantization="int8").path != made.path


@EACH
def test_calibration_keeps_more_of_the_base_than_rounding_to_nearest(base, tmp_path, name):
    kept = {}
    for rounding in (calibrate.gptq, lambda weight, _, scheme: round_to_nearest(weight, scheme)):
        folder = tmp_path / f"{len(kept)}"
        folder.mkdir()
        kept[len(kept)] = quantize(base.path, folder, name, rounding=rounding).kl
    assert 0 < kept[0] < kept[1]


def test_a_base_that_would_stray_is_refused_and_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SCHEMES", {k: dataclasses.replace(v, max_kl=1e-9) for k, v in SCHEMES.items()})
    with pytest.raises(BaseMissing, match=r"int4 changes this base too much.*base.quantization = 'int8'"):
        prepare(str(base.path), tmp_path, quantization="int4")
    assert list((tmp_path / "bases").iterdir()) == []


@EACH
def test_it_is_made_once_and_pinned(base, tmp_path, name):
    told = []
    first = prepare(str(base.path), tmp_path, told.append, quantization=name)
    assert f"{name}: layer 2 of 2" in told
    assert first.name == base.name
    assert first.digests["weights"] != base.digests["weights"]
    assert first.digests["tokenizer"] == base.digests["tokenizer"]
    assert first.digests["template"] == base.digests["template"]
    told.clear()
    assert prepare(str(base.path), tmp_path, told.append, quantization=name) == first
    assert told == [f"{name}: {Quality.read(first.path)}"], "what it loses is said each time"
    assert "KL" in told[0]
    assert is_quantized(base, name, tmp_path)
    assert not is_quantized(base, name, tmp_path / "elsewhere")
    (first.path / "quantization.json").write_text("{")
    prepare(str(base.path), tmp_path, told.append, quantization=name)
    assert "cannot be read" in told[-1], "a damaged report keeps nobody from serving"


def test_each_step_is_told_while_it_is_made_and_the_base_at_the_end(base, tmp_path):
    steps = list(preparing(str(base.path), "int8", tmp_path))
    assert steps[-1] == prepare(str(base.path), tmp_path, quantization="int8")
    assert "int8: layer 2 of 2" in steps
    assert f"int8: {Quality.read(steps[-1].path)}" in steps


def test_what_goes_wrong_comes_after_what_was_said(tmp_path):
    with pytest.raises(BaseMissing, match="there is no folder"):
        list(preparing("/nowhere", "int8", tmp_path))


def test_what_is_quantized_is_not_quantized_again(base, tmp_path):
    first = prepare(str(base.path), tmp_path, quantization="int8")
    with pytest.raises(BaseMissing, match="quantized already"):
        prepare(str(first.path), tmp_path, quantization="int4")


def test_a_dead_write_leaves_nothing(base, tmp_path, monkeypatch):
    def dies(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed, "write", dies)
    with pytest.raises(BaseMissing, match="No space left"):
        prepare(str(base.path), tmp_path, quantization="int8")
    assert list((tmp_path / "bases").iterdir()) == []
    assert bases.DONE not in {path.name for path in tmp_path.rglob("*")}


def test_texts_to_measure_on_take_no_part_in_rounding(monkeypatch):
    rounded_by, measured_on = calibrate.texts()
    assert rounded_by
    assert measured_on
    assert not set(rounded_by) & set(measured_on)
    monkeypatch.setattr(calibrate, "_news", list)
    assert all(len(part) > 10 for part in calibrate.texts())


def test_too_few_texts_are_said(tokenizer):
    with pytest.raises(TooCoarse, match="only 1 of 2 texts"):
        calibrate.batches(tokenizer, ["short", "long enough " * 50], 2)
