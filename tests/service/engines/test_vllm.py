"""What the settings say, as vLLM understands it; `tests/end_to_end` runs the engine itself."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config.lora import LoRAConfig
from vllm.logprobs import Logprob
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import IterationStats, LoRARequestStates, RequestStateStats

from learners import adapter
from learners.encode import encode
from service.engines.vllm import LOOKS_FOR_NAN, SPARE_ADAPTERS, SWITCH, NoNumbers, VllmEngine, arguments, numbers_only
from service.errors import InvalidRequest, SettingsError
from service.settings import Settings
from tests.learners.conftest import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A base with two layers, a norm, an embedding and a head of its own; one of its modules is quantized."""
    matrix, vector = np.zeros((2, 2), np.float32), np.zeros(2, np.float32)
    weights = {f"model.layers.{n}.self_attn.{name}.weight": matrix for n in (0, 1) for name in ("q_proj", "o_proj")}
    weights |= {"model.layers.0.mlp.up_proj.weight_packed": matrix, "model.layers.0.mlp.up_proj.weight_scale": matrix}
    weights |= {"model.layers.0.norm.weight": vector, "model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def parsed(folder, **tables):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    told = arguments(Settings(**tables), folder)
    return make_arg_parser(FlexibleArgumentParser()).parse_args(told)


def test_the_settings_reach_vllm(folder):
    base = {"source": "/models/x", "name": "x", "dtype": "float32", "max_model_len": 512, "max_rank": 17, "max_resident": 3}
    args = parsed(folder, base=base, engine={"kv_cache_gib": 0.5, "max_num_seqs": 7})
    assert (args.model, args.served_model_name, args.dtype, args.max_model_len) == (str(folder), ["x"], "float32", 512)
    assert (args.enable_lora, args.max_loras, args.max_cpu_loras, args.max_lora_rank) == (True, 3, 3 + SPARE_ADAPTERS, 32)
    assert (args.kv_cache_memory_bytes, args.max_num_seqs, args.enforce_eager) == (2**29, 7, True)
    assert not args.enable_auto_tool_choice


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_cpu_computes_as_it_can_and_a_gpu_as_the_base_says(folder, monkeypatch, precision):
    monkeypatch.setattr("service.engines.vllm.fastest", lambda: precision)
    assert parsed(folder, engine={"gpus": 0}).dtype == precision
    assert parsed(folder, engine={"gpus": 1}).dtype == "auto"


@pytest.mark.parametrize("quantization", ["int8", "int8-layers"])
def test_int8_in_fp32_is_refused_where_it_would_end_the_engine(folder, monkeypatch, quantization):
    base = {"quantization": quantization, "dtype": "float32"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": True})
    with pytest.raises(SettingsError, match=r"base\.dtype: .*bfloat16"):
        parsed(folder, base=base, engine={"gpus": 0})
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert parsed(folder, base=base, engine={"gpus": 0}).dtype == "float32"


def test_adapters_change_layers_and_nothing_else(folder):
    assert parsed(folder).lora_target_modules == ["o_proj", "q_proj", "up_proj"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_vllm_multiplies_by_the_scale_that_an_adapter_was_trained_with(tmp_path, rslora, scale):
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = adapter.attach(LlamaForCausalLM(LlamaConfig(**shape)), None, rank=4, alpha=8, dropout=0, seed=0, rslora=rslora)
    adapter.write(model, tmp_path, "tiny")
    helper = PEFTHelper.from_local_dir(str(tmp_path), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    layer = LoRALayerWeights.from_config("q_proj", helper)
    layer.lora_b = torch.ones(8, 4)
    assert torch.equal(layer.optimize().lora_b, torch.full((8, 4), scale))
    (trained,) = {module.scaling["default"] for module in adapter._layers(model)}
    assert trained == scale


def test_a_gpu_compiles_and_shares_its_memory(folder):
    args = parsed(folder, engine={"gpus": 1, "gpu_memory_utilization": 0.5})
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes, args.enforce_eager) == (0.5, None, False)


def test_tools_and_extra_arguments_are_passed_through(folder):
    args = parsed(folder, engine={"tool_call_parser": "hermes", "extra_args": ["--max-num-seqs=3", "--disable-log-stats"]})
    assert (args.tool_call_parser, args.enable_auto_tool_choice) == ("hermes", True)
    assert (args.max_num_seqs, args.disable_log_stats) == (3, True)


@pytest.mark.parametrize(("is_on", "told"), [(False, "1"), (True, None)])
def test_nothing_phones_home_unless_it_may(is_on, told):
    variables = VllmEngine.environment(Settings(telemetry={"is_on": is_on}))
    assert variables.get("VLLM_NO_USAGE_STATS") == variables.get("DO_NOT_TRACK") == told
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_the_plug_in_has_a_switch():
    assert VllmEngine.environment(Settings())[SWITCH] == "1"
    assert VllmEngine.environment(Settings(engine={"has_grouped_lora": False}))[SWITCH] == "0"


def test_threads_are_as_told():
    assert VllmEngine.environment(Settings(engine={"threads": 3}))["OMP_NUM_THREADS"] == "3"
    assert "TORCH_COMPILE_DISABLE" in VllmEngine.environment(Settings())
    assert "TORCH_COMPILE_DISABLE" not in VllmEngine.environment(Settings(engine={"gpus": 1}))


def test_vllm_looks_at_the_logits_unless_told_otherwise():
    assert VllmEngine.environment(Settings())[LOOKS_FOR_NAN] == "1"
    assert VllmEngine.environment(Settings(engine={"checks_logits": False}))[LOOKS_FOR_NAN] == "0"


class Sampler:
    """vLLM's client with its own outputs, of which the one at `corrupted` has NaN among its logits, as its own statistics find it."""

    def __init__(self, corrupted=None, length=3, has_statistics=True):
        self.corrupted, self.length, self.has_statistics = corrupted, length, has_statistics
        self.computed, self.is_closed = 0, False

    async def generate(self, _, params, request_id, lora_request=None):
        stats = RequestStateStats()
        try:
            for place in range(self.length):
                self.computed += 1
                said = EngineCoreOutput(request_id, [7], num_nans_in_logits=49152 if place == self.corrupted else 0)
                IterationStats().update_from_output(said, 0.0, False, stats, LoRARequestStates(True), None)
                yield self._output(request_id, stats, params.prompt_logprobs)
        finally:
            self.is_closed = True

    def _output(self, request_id, stats, prompt_logprobs):
        scores = None if prompt_logprobs is None else [None, {3: Logprob(-0.5)}, {8: Logprob(-1.5)}]
        metrics = stats if self.has_statistics else None
        return RequestOutput(request_id, None, [5, 3, 8], scores, [], finished=False, metrics=metrics)


@pytest.fixture
def _vllm_looks(monkeypatch):
    monkeypatch.setenv(LOOKS_FOR_NAN, "1")


async def replied(generate):
    return [output async for output in generate("prompt", SamplingParams(), "chatcmpl-1")]


@pytest.mark.usefixtures("_vllm_looks")
@pytest.mark.parametrize("corrupted", [0, 1])
async def test_a_reply_from_no_numbers_is_broken_off_and_let_go(corrupted):
    client = Sampler(corrupted)
    with pytest.raises(NoNumbers, match="chatcmpl-1"):
        await replied(numbers_only(client.generate))
    assert (client.computed, client.is_closed) == (corrupted + 1, True)
    assert len(await replied(Sampler(corrupted).generate)) == 3  # the control: vLLM's own goes on


@pytest.mark.usefixtures("_vllm_looks")
async def test_a_sound_reply_passes_as_it_is_and_so_does_one_of_which_nothing_is_known():
    assert len(await replied(numbers_only(Sampler().generate))) == 3
    assert len(await replied(numbers_only(Sampler(1, has_statistics=False).generate))) == 3


async def test_where_vllm_does_not_look_nothing_is_found():
    assert len(await replied(numbers_only(Sampler(1).generate))) == 3


@pytest.mark.usefixtures("_vllm_looks")
async def test_a_reader_that_leaves_closes_vllm_s_own():
    client = Sampler()
    outputs = numbers_only(client.generate)("prompt", SamplingParams(), "chatcmpl-1")
    await anext(outputs)
    await outputs.aclose()
    assert (client.computed, client.is_closed) == (1, True)


@pytest.mark.usefixtures("_vllm_looks")
async def test_what_is_scored_by_no_numbers_has_no_scores():
    def engine(client):
        client.generate = numbers_only(client.generate)
        return VllmEngine(client, None, byte_tokenizer, 40)

    assert await engine(Sampler()).logprobs(None, [5, 3, 8]) == [-0.5, -1.5]
    assert np.isnan(await engine(Sampler(0)).logprobs(None, [5, 3, 8])).tolist() == [True, True]


class Told(VllmEngine):
    """The engine with a model that says of each token its place."""

    async def logprobs(self, name, token_ids):
        self.seen = (name, list(token_ids))
        return [float(place) for place in range(1, len(token_ids))]


@pytest.fixture
def told():
    return Told(None, None, byte_tokenizer, 40)


async def test_a_reply_is_scored_as_it_would_be_learned(told):
    asked = [{"role": "user", "content": "hello"}]
    encoded = encode(byte_tokenizer(), asked, "ok", 40)
    found = await told.score("desk@v1", asked, "ok")
    assert told.seen == ("desk@v1", encoded.input_ids)
    assert found == [float(place) for place in range(len(encoded.input_ids) - 3, len(encoded.input_ids))]  # o, k, the end
    await told.score(None, [{"role": "user", "content": "x" * 100}], "ok")
    assert len(told.seen[1]) == 40


async def test_what_cannot_be_rendered_is_not_scored(told):
    with pytest.raises(InvalidRequest, match="cannot be scored"):
        await told.score(None, [{"role": "user", "content": "hello"}], " ")


class Client:
    """vLLM's client, as far as adapters go."""

    def __init__(self):
        self.added, self.removed = [], []

    async def add_lora(self, request):
        self.added.append(request)

    async def remove_lora(self, int_id):
        self.removed.append(int_id)


async def test_adapters_keep_the_id_that_they_were_given_and_none_is_loaded_in_place():
    client, models = Client(), SimpleNamespace(lora_requests={})
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))
    engine = VllmEngine(client, app, byte_tokenizer, 40)
    await engine.load("desk@v1", Path("/v1"), 7)
    await engine.load("desk@v1", Path("/other"), 7)
    await engine.load("desk@v2", Path("/v2"), 8)
    known = [(one.lora_name, one.lora_int_id, one.lora_path) for one in client.added]
    assert known == [("desk@v1", 7, "/v1"), ("desk@v2", 8, "/v2")]
    assert not any(one.load_inplace for one in client.added)
    assert {name: one.lora_int_id for name, one in models.lora_requests.items()} == {"desk@v1": 7, "desk@v2": 8}
    await engine.unload("desk@v1")
    assert (client.removed, list(models.lora_requests)) == ([7], ["desk@v2"])
