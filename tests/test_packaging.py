"""The package as it is installed: its names, its pins, its private classifier."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

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


def test_extras():
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "cuda", "dev", "bench"}
