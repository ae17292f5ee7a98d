"""What jobs are to use besides is looked for before the first job, by the doctor and at the start."""

import pytest

from service import backing, doctor
from service.errors import SettingsError
from service.settings import Settings


@pytest.fixture
def installed(monkeypatch):
    there = set()
    monkeypatch.setattr(backing, "_is_installed", there.__contains__)
    return there


def settings(**training):
    return Settings(training=training)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_said_with_what_to_do(installed, name, package):
    with pytest.raises(SettingsError, match=f"'{name}', which is not installed: pip install {name}"):
        backing.check(settings(report_to=[name]))
    installed.add(package)
    backing.check(settings(report_to=[name]))


def test_deepspeed_and_its_file(installed, tmp_path):
    file = tmp_path / "zero.json"
    told = backing.missing(settings(deepspeed=file, is_on_gpu=True).training)
    assert "pip install deepspeed" in told[0]
    assert "zero.json is no JSON" in told[1]
    installed.add("deepspeed")
    file.write_text('{"zero_optimization": {"stage": 2}}')
    assert backing.missing(settings(deepspeed=file, is_on_gpu=True).training) == []


def test_the_doctor_says_the_same(installed):
    asked = settings(report_to=["wandb"]).training
    assert doctor.training(backing.missing(asked)).level == "fail"
    assert "wandb" in doctor.training(backing.missing(asked)).found
    assert doctor.training(backing.missing(settings().training)).level == "ok"
