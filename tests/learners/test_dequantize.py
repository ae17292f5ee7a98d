"""What others have quantized, read as vLLM reads it: its own unpacking is the reference, and what would be misread is refused."""

import json
import shutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from learners import adapter, dequantize
from learners.base import BaseMissing, adaptable_modules, prepare, refuse_floats
from learners.quantize import pack

with warnings.catch_warnings(action="ignore"):  # it compiles at import, with parts of torch that torch calls old
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

GROUP, MIDDLE = 16, 8


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """VLLM's parameters ask for their place among workers."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)


def words_of(*shape):
    """Any bits at all."""
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int32)


def scales_of(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).half() / 32


def spread(of_groups, inputs):
    """(groups, outputs) for each input."""
    return of_groups.float().repeat_interleave(inputs // len(of_groups), 0)


def awq(outputs, inputs):
    """An AWQ module, and the weight (outputs, inputs) that vLLM's own conversion makes of it."""
    parts = {
        "qweight": words_of(inputs, outputs // 8),
        "qzeros": words_of(inputs // GROUP, outputs // 8),
        "scales": scales_of(inputs // GROUP, outputs),
    }
    layer = SimpleNamespace(**{name: torch.nn.Parameter(parts[name], requires_grad=False) for name in ("qweight", "qzeros")})
    _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, 0)
    zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, 0).t()
    return parts, ((codes - spread(zeros, inputs)) * spread(parts["scales"], inputs)).t()


def gptq(outputs, inputs):
    """A GPTQ module, and its weight by vLLM's own unpacking; what lies in `qzeros` of a symmetric one is not looked at."""
    parts = {
        "qweight": words_of(inputs // 8, outputs),
        "qzeros": words_of(inputs // GROUP, outputs // 8),
        "scales": scales_of(inputs // GROUP, outputs),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    codes = unpack_quantized_values_into_int32(parts["qweight"], scalar_types.uint4b8, 0)
    return parts, ((codes - MIDDLE) * spread(parts["scales"], inputs)).t()


def symmetric(outputs, inputs):
    """Four bits with a scale for each group and no zeros, as most compressed-tensors checkpoints have them."""
    codes = torch.randint(-8, 8, (outputs, inputs), generator=torch.Generator().manual_seed(outputs))
    scale = scales_of(outputs, inputs // GROUP).bfloat16()
    parts = {"weight_packed": pack(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([outputs, inputs])}
    return parts, codes * spread(scale.t(), inputs).t()


def one_scale(outputs, inputs):
    """Floats of eight bits with one scale for all, and one for what enters, which is the engine's business."""
    codes = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.01).bfloat16()
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale.float()


def weights_as(bits, kind, strategy, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
FORMS = {
    "awq": (awq, AWQ),
    "gptq": (gptq, GPTQ),
    "four bits without zeros": (symmetric, weights_as(4, "int", "group", group_size=GROUP)),
    "floats with one scale": (one_scale, weights_as(8, "float", "tensor")),
}


@pytest.fixture(params=FORMS)
def made(request, base, one_worker, tmp_path):
    """The tiny base with all its layers' matrices stored in that form, and what they should be read as."""
    make, config = FORMS[request.param]
    folder, expected = tmp_path / "made", {}
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    for module in adaptable_modules(base.path):
        parts, expected[f"{module}.weight"] = make(*tensors.pop(f"{module}.weight").shape)
        tensors |= {f"{module}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    return folder, expected


def test_it_trains_on_what_vllm_would_serve(made, base):
    folder, expected = made
    found = prepare(str(folder), folder.parent / "cache")
    assert found.path == folder
    assert adaptable_modules(folder) == adaptable_modules(base.path), "else no adapter would be found to fit it"
    model, _ = adapter.load_base(folder, "float32")
    plain = load_file(base.path / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight.cpu(), expected.get(name, plain.get(name)).float(), rtol=1e-6, atol=1e-6, msg=name)
    adapted = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)
    ids = torch.arange(2, 40, device=adapted.device)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.factors(adapted).values())


def test_awq_without_zeros_is_about_the_middle():
    parts, _ = awq(16, 32)
    zeros = parts.pop("qzeros")
    found = dequantize._awq(parts, {}).dequantized()
    middle = dequantize._awq({**parts, "qzeros": torch.full_like(zeros, -0x77777778)}, {}).dequantized()  # 0x88888888
    assert torch.equal(found, middle)


def test_eight_bits_of_gptq():
    parts = {"qweight": words_of(8, 16), "scales": scales_of(2, 16)}
    codes = unpack_quantized_values_into_int32(parts["qweight"], scalar_types.uint8b128, 0) - 128
    assert torch.equal(dequantize._gptq(parts, {"bits": 8}).dequantized(), (codes * spread(parts["scales"], 32)).t())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "bitsandbytes"}, "format is bitsandbytes; read are compressed-tensors, awq, gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "format is fp8"),
        (AWQ | {"bits": 8}, "8 bits in AWQ's form gemm"),
        (AWQ | {"version": "gemv"}, "form gemv"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"sym": False}, "sym False"),
        (GPTQ | {"desc_act": True}, "desc_act"),
        (GPTQ | {"dynamic": {"-:.*mlp.*": {}}}, "dynamic"),
        (weights_as(4, "float", "group"), "4-bit floats"),
        (weights_as(8, "float", "block"), "a scale for each block"),
        (weights_as(4, "int", "group", actorder="group"), "actorder"),
    ],
)
def test_what_would_be_misread_is_refused(base, tmp_path, config, why):
    folder = tmp_path / "base"
    shutil.copytree(base.path, folder)
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(BaseMissing, match=f"cannot train on: .*{why}.*base.quantization"):
        prepare(str(folder), tmp_path)


def test_floats_are_refused_where_there_is_no_gpu(made, request):
    """Whoever wrote them: as the setting's own are."""
    found = prepare(str(made[0]), made[0].parent / "cache")
    is_float = request.node.callspec.params["made"].startswith("floats")
    refused = pytest.raises(BaseMissing, match=r"8-bit floats, which are for GPUs.*engine\.gpus")
    with refused if is_float else nullcontext():
        refuse_floats(found)


@pytest.mark.parametrize(
    "config", [AWQ, AWQ | {"version": "GEMM"}, GPTQ | {"bits": 8}, GPTQ | {"desc_act": True, "group_size": -1}], ids=str
)
def test_what_is_read_alike_is_not_refused(config):
    assert dequantize.refusal(config) is None
