import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from learners import artifact, servable


@pytest.fixture
def version(written, base):
    artifact.seal(written, {"base": base.digests}, {"probes": []})
    return written


def test_a_whole_version_is_served_and_its_digest_is_its_manifest_s(version, base):
    assert artifact.check(version, base, 16) == artifact._digest(version / "manifest.json")
    assert set(json.loads((version / "manifest.json").read_text())["files"]) == {
        servable.WEIGHTS,
        servable.CONFIG,
        "fingerprint.json",
    }


def damaged(version):
    weights = version / servable.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda v: (v / "COMPLETE").unlink(), "incomplete"),
        (damaged, "changed or damaged"),
        (lambda v: (v / "manifest.json").write_text("{"), "cannot be read"),
        (lambda v: (v / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda v: (v / "fingerprint.json").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_version_is_refused(version, base, damage, said):
    damage(version)
    with pytest.raises(servable.Unservable, match=said):
        artifact.check(version, base, 16)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "template"])
def test_another_base_is_refused(version, base, part):
    with pytest.raises(servable.Unservable, match=f"made for another base: its {part}"):
        artifact.check(version, replace(base, **{f"{part}_digest": "other"}), 16)


def test_what_a_strategy_leaves_is_part_of_the_version(written, base):
    assert artifact.consolidation(None) == artifact.consolidation(written) == {}
    left = {"a": torch.tensor([[1.5, 0.0]]), "b": torch.tensor([3e-30])}
    artifact.seal(written, {"base": base.digests}, {"probes": []}, left)
    found = artifact.consolidation(written)
    assert found.keys() == left.keys()
    assert all(torch.equal(found[name], left[name]) for name in left)
    artifact.check(written, base, 16)
    save_file({"a": left["a"]}, written / artifact.CONSOLIDATION)
    with pytest.raises(servable.Unservable, match="changed or damaged"):
        artifact.check(written, base, 16)
