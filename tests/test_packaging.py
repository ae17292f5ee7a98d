"""The package as it is installed: its names, its pins, its private classifier."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_it_cannot_be_uploaded_by_mistake():
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]


def test_our_top_level_packages_are_ours_alone():
    owners = importlib.metadata.packages_distributions()
    for package in ("replay", "learners", "service"):
        assert set(owners.get(package, ["learnd"])) == {"learnd"}, f"{package} also comes from {owners[package]}"


def test_both_variants_pin_everything_and_agree_on_the_big_ones():
    pins = {}
    for variant in ("cpu", "cuda"):
        lines = (ROOT / f"packaging/constraints-{variant}.txt").read_text().splitlines()
        rows = [line for line in lines if line.strip() and not line.startswith("#")]
        assert all(re.match(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", row) for row in rows)
        pins[variant] = dict(re.match(r"^([A-Za-z0-9._-]+)\S*?==(\S+)", row).groups() for row in rows)
    for name in ("torch", "ray", "transformers", "peft", "trl"):
        assert pins["cpu"][name] == pins["cuda"][name], name


def test_the_vllm_plugin_is_registered():
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert "learnd_cpu_lora" in names


def test_the_vllm_plugin_s_entry_point_does_its_work():
    """In a process of its own, as vLLM calls it: one whose import fails is only logged there, and the slow kernels serve."""
    code = """
import importlib.metadata
[point] = importlib.metadata.entry_points(group="vllm.general_plugins", name="learnd_cpu_lora")
point.load()()
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.utils import _get_lora_device
from vllm.platforms import current_platform
print(current_platform.is_cpu(), current_platform.get_punica_wrapper())
print(BaseLinearLayerWithLoRA.create_lora_weights.__module__, _get_lora_device.__module__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "LEARND_CPU_LORA"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, mended = done.stdout.splitlines()[-2:]
    if not kernels.startswith("True "):
        pytest.skip("this vLLM is for another platform, which the plug-in leaves alone")
    assert kernels == "True service.engines.vllm_cpu.GroupedPunicaWrapper", "is this vLLM in TESTED_VERSIONS?"
    assert mended == "service.engines.vllm_cpu service.engines.vllm_cpu"


def test_extras():
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "cuda", "dev", "bench"}
