import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from learners import adapter, servable
from learners.servable import Unservable

SHAPE = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
IDS = torch.tensor([[5, 9, 11, 30]], device="cuda" if torch.cuda.is_available() else "cpu")  # where `load_base` puts a model


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    return model


def test_a_fresh_adapter_changes_nothing(model, adapted):
    with adapter.without(adapted):
        alone = adapted(IDS).logits
    assert torch.equal(adapted(IDS).logits, alone)


def test_only_the_adapter_trains_and_in_fp32(base):
    model, _ = adapter.load_base(base.path)
    adapted = adapter.attach(model, None, **SHAPE)
    trained = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and dtype == torch.float32 for name, dtype in trained.items())
    assert model.dtype == torch.bfloat16


def test_a_warm_start_answers_as_its_parent_did(adapted, base, tmp_path):
    adapter.write(moved(adapted), tmp_path / "v1", "tiny")
    fresh, _ = adapter.load_base(base.path, "float32")
    again = adapter.attach(fresh, tmp_path / "v1", **SHAPE)
    assert torch.allclose(again(IDS).logits, adapted(IDS).logits, atol=1e-5)
    assert any(p.requires_grad for p in again.parameters())


def test_plain_peft_reads_it(adapted, base, tmp_path):
    adapter.write(moved(adapted), tmp_path / "v1", "tiny")
    assert sorted(f.name for f in (tmp_path / "v1").iterdir()) == [servable.CONFIG, servable.WEIGHTS]
    assert json.loads((tmp_path / "v1" / servable.CONFIG).read_text())["base_model_name_or_path"] == "tiny"
    plain = PeftModel.from_pretrained(adapter.load_base(base.path, "float32")[0], tmp_path / "v1")
    assert torch.allclose(plain(IDS).logits, adapted(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("key", ["rank", "alpha"])
def test_a_line_keeps_its_shape(written, another, key):
    with pytest.raises(Unservable, match="a line keeps its shape"):
        adapter.attach(another, written, **{**SHAPE, key: 2})


def change_weights(folder, change):
    weights = load_file(folder / servable.WEIGHTS)
    change(weights)
    save_file(weights, folder / servable.WEIGHTS)


def test_what_is_whole_is_served(written, base):
    servable.check(written, 16, base.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(min(w)), "lacks one of its two factors"),
        (lambda w: w.update({min(w): w[min(w)] * float("nan")}), "not finite"),
        (lambda w: w.update({min(w): w[min(w)][:2].contiguous()}), "not rank 4"),
        (lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(2)}), "no LoRA weight"),
        (lambda w: [w.pop(k) for k in list(w) if "layers.1.mlp.up_proj" in k], "the adapter lacks"),
        (lambda w: w.update({f"base_model.model.lm_head.lora_{f}.weight": torch.ones(4, 4) for f in "AB"}), "no place for"),
        (lambda w: w.update({k.replace("layers.1", "layers.7"): t.clone() for k, t in list(w.items())}), "no place for"),
    ],
)
def test_damaged_or_foreign_weights_are_refused(written, base, change, said):
    change_weights(written, change)
    with pytest.raises(Unservable, match=said):
        servable.check(written, 16, base.path)


def test_a_head_is_refused_also_when_the_config_names_it(written, base):
    """The base's head is a matrix of its own here: what bars it is that no layer holds it."""
    assert "lm_head.weight" in load_file(base.path / "model.safetensors")
    config = json.loads((written / servable.CONFIG).read_text())
    config["target_modules"].append("lm_head")
    (written / servable.CONFIG).write_text(json.dumps(config))
    change_weights(written, lambda w: w.update({f"base_model.model.lm_head.lora_{f}.weight": torch.ones(4, 4) for f in "AB"}))
    with pytest.raises(Unservable, match="no place for"):
        servable.check(written, 16, base.path)


def test_a_partial_parent_is_no_start(written, another):
    change_weights(written, lambda w: [w.pop(k) for k in list(w) if "layers.1.mlp.up_proj" in k])
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(Unservable, match="the adapter lacks"):
        adapter.attach(another, written, **SHAPE)


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"])
def test_what_the_engine_would_serve_wrongly_is_refused(written, key):
    config = json.loads((written / servable.CONFIG).read_text()) | {key: {"x": 1}}
    (written / servable.CONFIG).write_text(json.dumps(config))
    with pytest.raises(Unservable, match=key):
        servable.check(written, 16)


def test_too_high_a_rank_is_refused(written):
    with pytest.raises(Unservable, match=r"over base\.max_rank 2"):
        servable.check(written, 2)


def test_pickles_are_refused(written):
    (written / "adapter_model.bin").touch()
    with pytest.raises(Unservable, match="only safetensors"):
        servable.check(written, 16)


def test_a_torn_file_is_refused(written):
    weights = written / servable.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(Unservable, match="cannot be read"):
        servable.check(written, 16)
