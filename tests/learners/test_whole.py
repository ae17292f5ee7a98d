"""Full fine-tuning on the tiny base: it learns with all its weights, and what comes of it is a base like any other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from learners.base import DONE, prepare
from learners.whole import RECORD, Untunable, tune
from service.settings import Learning


def rows(count=60):
    """Texts that all have one answer, every tenth for measuring."""
    return [
        {
            "slice": "colours" if n % 4 else "sizes",
            "split": "train" if n % 10 else "holdout",
            "messages": [{"role": "user", "content": f"What of item {n}?"}],
            "reply": "red",
        }
        for n in range(count)
    ]


def settings(**changes):
    told = {"epochs": 10, "learning_rate": 3e-3, "batch_size": 6, "accumulation": 1, "max_length": 64, "precision": "float32"}
    return Learning(**{**told, **changes}).model_dump(mode="json")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    folder, steps = tmp_path_factory.mktemp("tuned") / "desk-1", []
    return tune(base, rows(), folder, settings(), steps.append), steps


def test_it_learns_what_it_was_not_shown(made):
    tuned, steps = made
    assert [(one.slice, one.items, one.base, one.tuned) for one in tuned.slices] == [("sizes", 3, 0, 1), ("colours", 3, 0, 1)]
    assert (tuned.learned, tuned.skipped) == (54, 0)
    assert tuned.kl > 0
    assert steps[-1]["step"] == steps[-1]["steps"] == 90


def test_a_rate_of_next_to_nothing_changes_next_to_nothing(base, tmp_path):
    tuned = tune(base, rows(), tmp_path / "still", settings(learning_rate=1e-12, epochs=1))
    assert {(one.base, one.tuned) for one in tuned.slices} == {(0, 0)}
    assert tuned.kl < 1e-6


def test_what_comes_of_it_is_a_base_of_its_own(made, base, tmp_path):
    tuned, _ = made
    again = prepare(str(tuned.path), tmp_path)
    assert again.weights_digest != base.weights_digest
    assert (again.tokenizer_digest, again.template_digest) == (base.tokenizer_digest, base.template_digest)
    before, after = (load_file(path / "model.safetensors") for path in (base.path, tuned.path))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)
    record = json.loads((tuned.path / RECORD).read_text())
    assert record["base"]["weights"] == base.weights_digest
    assert record["slices"][0] == {"slice": "sizes", "items": 3, "base": 0.0, "tuned": 1.0}
    assert (tuned.path / DONE).exists()
    assert not list(tuned.path.glob("checkpoint*"))


def test_it_can_be_tuned_again(made, tmp_path):
    tuned, _ = made
    again = tune(prepare(str(tuned.path), tmp_path), rows(), tmp_path / "desk-2", settings(epochs=1, learning_rate=1e-5))
    assert {(one.base, one.tuned) for one in again.slices} == {(1, 1)}


def test_what_cannot_be_encoded_is_left_out_and_counted(base, tmp_path):
    given = [*rows(), {**rows()[0], "reply": "long " * 40}]
    assert tune(base, given, tmp_path / "made", settings(epochs=1)).skipped == 1


@pytest.mark.parametrize(
    ("given", "says"), [([], "nothing to train on"), ([{**row, "split": "holdout"} for row in rows()], "nothing to train on")]
)
def test_nothing_to_learn_is_said_and_leaves_nothing(base, tmp_path, given, says):
    with pytest.raises(Untunable, match=says):
        tune(base, given, tmp_path / "made", settings())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(base, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(Untunable, match="name a folder that is not"):
        tune(base, rows(), tmp_path / "mine", settings())


def test_a_quantized_base_is_refused(base, tmp_path):
    with pytest.raises(Untunable, match="tune the weights that it was made from"):
        tune(prepare(str(base.path), tmp_path, quantization="int8"), rows(), tmp_path / "made", settings())
