"""An int8 embedding in vLLM's own layers, from the checkpoint's description and tensors to what is looked up and multiplied."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed import parallel_state
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod, VocabParallelEmbedding

from learners import compressed
from learners.quantize import SCHEMES, round_to_nearest
from service.engines import native_head, vllm_rows
from service.engines.vllm_rows import Int8Rows, serve_rows

VOCABULARY, WIDTH = 100, 48
"""Not whole blocks: vLLM pads the first to 128, the kernel the second to 64."""
INT8 = SCHEMES["int8"]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.tensor([[0, 99, 7], [7, 64, 1]])
MENDED = ((CompressedTensorsConfig, "get_quant_method"), (ParallelLMHead, "tie_weights"), (Int8Rows, "has_kernel"))
AS_IT_IS = [(kind, name, vars(kind)[name]) for kind, name in MENDED]
"""Taken before any test runs: other files' tests register the plug-in in this process."""


@pytest.fixture(autouse=True)
def vllm_as_it_is(monkeypatch):
    """Nothing is mended, and afterwards all is as it was; and vLLM's group of this one process, which its parameters ask for."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    for kind, name, method in AS_IT_IS:
        monkeypatch.setattr(kind, name, method)


@pytest.fixture(params=["kernel", "switched off", "no AMX"])
def way(request, monkeypatch):
    """Each way that a CPU may serve it."""
    if request.param == "no AMX":
        monkeypatch.setattr(native_head, "load", lambda: None)
    elif request.param == "kernel" and native_head.load() is None:
        pytest.skip("this machine has no AMX, or no compiler")
    serve_rows(has_kernel=request.param != "switched off")
    return request.param


def rows_of(seed):
    return round_to_nearest(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed)), INT8)


def config(vocabulary, scheme=INT8):
    found = CompressedTensorsConfig.from_config(compressed._described(scheme, vocabulary))
    found.packed_modules_mapping = {}
    return found


def made(kind, quantization, dtype=torch.bfloat16):
    """A layer as Llama makes it: the embedding without a name."""
    name = HEAD if kind is ParallelLMHead else ""
    return kind(VOCABULARY, WIDTH, params_dtype=dtype, quant_config=quantization, prefix=name, disable_tp=True)


def filled(layer, rows):
    """Loaded and processed as vLLM does it."""
    for name, tensor in compressed._stored_rows(rows).items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_tied_embedding_looks_up_and_multiplies(way, dtype):
    rows = rows_of(0)
    quantization = config({EMBEDDING: rows, HEAD: None})
    layer = made(VocabParallelEmbedding, quantization, dtype)
    head = made(ParallelLMHead, quantization, dtype).tie_weights(layer)
    filled(layer, rows)
    is_packed = way == "kernel" and dtype in native_head.PRODUCTS
    assert isinstance(head.quant_method, Int8Rows if is_packed else UnquantizedEmbeddingMethod)
    assert torch.equal(layer(IDS), rows.dequantized()[IDS].to(dtype))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = head.quant_method.apply(head, x)
    want = x.float() @ rows.dequantized().t()
    torch.testing.assert_close(logits[:, :VOCABULARY].float(), want, rtol=0.02, atol=0.1)
    assert logits[:, VOCABULARY:].count_nonzero() == 0
    assert (logits[:, :VOCABULARY].float() - x.float() @ rows_of(2).dequantized().t()).abs().max() > 1, (
        "another one's are told apart"
    )


def test_nothing_is_kept_twice(way):
    rows = rows_of(0)
    layer = filled(made(VocabParallelEmbedding, config({EMBEDDING: rows, HEAD: None})), rows)
    names = {name for name, _ in layer.named_parameters()}
    assert names == (set() if way == "kernel" else {"weight"})
    if way == "kernel":
        assert layer.rows.packed.nbytes == 128 * 64, "a byte for each, with both sides whole blocks"


def test_a_head_of_its_own_has_rows_of_its_own(way):
    first, second = rows_of(0), rows_of(1)
    quantization = config({EMBEDDING: first, HEAD: second})
    layer, head = filled(made(VocabParallelEmbedding, quantization), first), filled(made(ParallelLMHead, quantization), second)
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    logits = head.quant_method.apply(head, x)
    torch.testing.assert_close(logits[:, :VOCABULARY].float(), x.float() @ second.dequantized().t(), rtol=0.02, atol=0.1)
    if way == "kernel":
        deep = head.quant_method.apply(head, x.view(2, 3, WIDTH), torch.ones(128).bfloat16())
        assert torch.equal(deep, logits.view(2, 3, 128) + 1)
    assert torch.equal(layer(IDS), first.dequantized()[IDS].bfloat16())


@pytest.mark.parametrize("scheme", ["int8-layers", "int4"])
def test_an_embedding_that_stays_is_left_to_vllm(scheme):
    serve_rows(has_kernel=True)
    quantization = config({}, SCHEMES[scheme])
    layer, head = made(VocabParallelEmbedding, quantization), made(ParallelLMHead, quantization)
    assert isinstance(layer.quant_method, UnquantizedEmbeddingMethod)
    assert head.tie_weights(layer) is head
    assert head.weight is layer.weight


def test_vllm_by_itself_cannot_tie_them():
    """Why this is here; when it can, this may go."""
    quantization = config({EMBEDDING: rows_of(0), HEAD: None})
    with pytest.raises(AttributeError, match="weight"):
        made(ParallelLMHead, quantization).tie_weights(made(VocabParallelEmbedding, quantization))


@pytest.mark.parametrize("is_tied", [True, False])
def test_elsewhere_only_a_tied_one_is_dequantized(monkeypatch, is_tied):
    """On another platform, as far as it can be seen without one."""
    text = SimpleNamespace(tie_word_embeddings=is_tied)
    held = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(get_text_config=lambda: text)))
    serve_rows(has_kernel=False)
    monkeypatch.setattr(vllm_rows, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(vllm_rows, "get_current_vllm_config", lambda: held)
    rows = rows_of(0)
    layer = made(VocabParallelEmbedding, config({EMBEDDING: rows, HEAD: None if is_tied else rows}))
    assert type(layer.quant_method) is (Int8Rows if is_tied else CompressedTensorsEmbeddingWNA16Int)
    if is_tied:
        assert torch.equal(filled(layer, rows)(IDS), rows.dequantized()[IDS].bfloat16())


@pytest.mark.parametrize("changed", [{"num_bits": 4}, {"symmetric": False}, {"strategy": "group", "group_size": 16}])
def test_another_form_of_rows_is_not_ours(changed):
    described = compressed._described(INT8, {EMBEDDING: rows_of(0), HEAD: None})
    described["config_groups"]["group_1"]["weights"] |= changed
    scheme = CompressedTensorsConfig.from_config(described).target_scheme_map["Embedding"]
    assert not vllm_rows.is_int8_rows(scheme)
    assert vllm_rows.is_int8_rows(config({EMBEDDING: rows_of(0), HEAD: None}).target_scheme_map["Embedding"])


def test_mending_twice_is_mending_once():
    serve_rows(has_kernel=False)
    once = CompressedTensorsConfig.get_quant_method, ParallelLMHead.tie_weights
    serve_rows(has_kernel=True)
    assert (CompressedTensorsConfig.get_quant_method, ParallelLMHead.tie_weights) == once
    assert Int8Rows.has_kernel
