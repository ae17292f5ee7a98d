"""What the settings say, as vLLM understands it; `tests/end_to_end` runs the engine itself."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.engines.vllm import SPARE_ADAPTERS, SWITCH, VllmEngine, arguments
from service.settings import Settings


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


def test_adapters_change_layers_and_nothing_else(folder):
    assert parsed(folder).lora_target_modules == ["o_proj", "q_proj", "up_proj"]


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
